"""Optima of rewards regularised by f-divergences.

    max_π E_π[r] − λ D_f(π‖q),    D_f(π‖q) = E_q f(t), t = π/q;
    optimum: f'(t) = (r − ν)/λ where t > 0                                                       (1)
    reverse KL  f = t log t            t = e^{(r−ν)/λ}           never zero
    forward KL  f = −log t             t = λ/(ν − r)             never zero
    χ²          f = ½(t − 1)²          t = [1 + (r − ν)/λ]₊      zero where r ≤ ν − λ
    KL + χ²     f = t log t + ½(t−1)²  t = W₀(e^{(r−ν)/λ})       never zero (ν absorbs the constant)
    α (0<α<1)   f = (t^α − αt − (1−α))/(α(α−1))   t = (1 − (1−α)(r − ν)/λ)^{1/(α−1)}   never zero
    Jensen–Shannon  f = ½[t log t − (1+t) log((1+t)/2)]   t = 1/(2e^{−2(r−ν)/λ} − 1)   never zero
    Hellinger²  f = ½(√t − 1)²         t = (1 − 2(r − ν)/λ)^{−2}   never zero

ν is the multiplier of Σπ = 1: one root in one variable. Wang et al. (2023), f-DPO, Table 1 for the
derivatives; Huang et al. (2024), χPO, for KL + χ². K outcomes; log q in nats, rewards and ν in
reward units. Every function raises InputError where log q [K] is not normalised, or a reward that
counts is NaN or +inf.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from klrl_edu.closed_forms.soft_maximum import scaled_advantage
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.core.errors import InfeasibleError, InputError
from klrl_edu.core.groups import Rows
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.outcomes import check_outcomes
from klrl_edu.core.validation import check_kl_coef, check_number

# from either start the error of Newton's method halves at first, and then squares
_NEWTON_STEPS = 12


class Optimum(NamedTuple):
    """A regularised optimum.

    Attributes:
        log_probs: log π [K] in nats; −inf is zero mass.
        normaliser: ν in reward units.
        objective: E_π[r] − λ D_f(π‖q) in reward units.
    """

    log_probs: Tensor
    normaliser: float
    objective: float


class _Divergence(NamedTuple):
    """What (1) needs of f, all as functions of vectors.

    They are centred at t = 1, where the optimum lies near the prior: log t and f are small there,
    and keep their digits.

    Attributes:
        log_ratio: log t at y = (r − ν)/λ − f'(1) [K]: 0 at 0, and −inf where t = 0.
        generator: f(t) − f'(1)(t − 1) ≥ 0 at log t [K], whose mean under q is D_f too.
        ceiling: the y at which t becomes infinite (the largest y allowed is below it); inf where
            there is none.
        at_zero: the generator at t = 0, infinite where zero mass is not allowed.
        at_one: f'(1).
    """

    log_ratio: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    ceiling: float
    at_zero: float
    at_one: float


@takes_numbers
def reverse_kl(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Optimum:
    """The posterior π* ∝ q e^{r/λ}: log_prior and rewards [K] -> Optimum; ν = λ log Z."""
    check_outcomes(log_prior, rewards)
    tilted = tilt(log_prior, rewards, kl_coef)
    return Optimum(tilted.log_posterior, float(tilted.value), float(tilted.value))


@takes_numbers
def forward_kl(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Optimum:
    """π = λq/(ν − r), ν > max r: log_prior and rewards [K] -> Optimum.

    A supported outcome of reward −inf makes every objective −inf.

    Raises:
        InfeasibleError: a supported outcome is forbidden.
    """
    return _optimum(_FORWARD, log_prior, rewards, kl_coef)


@takes_numbers
def chi_squared(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Optimum:
    """π = q[1 + (r − ν)/λ]₊, where D = ½E_q(t − 1)²: truly zero where r ≤ ν − λ.

    log_prior and rewards [K] -> Optimum.
    """
    return _optimum(_CHI_SQUARED, log_prior, rewards, kl_coef)


@takes_numbers
def kl_plus_chi_squared(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Optimum:
    """π = q W₀(e^{(r − ν)/λ}), where D = KL(π‖q) + ½E_q(t − 1)².

    log_prior and rewards [K] -> Optimum.
    """
    return _optimum(_KL_CHI_SQUARED, log_prior, rewards, kl_coef)


@takes_numbers
def alpha_divergence(
    log_prior: Tensor, rewards: Tensor, kl_coef: float, alpha: float = 0.5
) -> Optimum:
    """π = q(1 − (1−α)(r − ν)/λ)^{1/(α−1)}, 0 < α < 1: log_prior and rewards [K] -> Optimum.

    Between forward KL (α → 0) and reverse KL (α → 1).

    Raises:
        InputError: α outside (0, 1).
    """
    rule = "between 0 and 1; its ends are forward_kl and reverse_kl"
    alpha = check_number(alpha, "alpha", rule, lambda x: 0 < x < 1)
    return _optimum(_alpha(alpha), log_prior, rewards, kl_coef)


@takes_numbers
def jensen_shannon(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Optimum:
    """π = q/(2e^{−2(r − ν)/λ} − 1): log_prior and rewards [K] -> Optimum."""
    return _optimum(_JENSEN_SHANNON, log_prior, rewards, kl_coef)


@takes_numbers
def squared_hellinger(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Optimum:
    """π = q(1 − 2(r − ν)/λ)^{−2} with D = ½Σ(√π − √q)²: log_prior and rewards [K] -> Optimum."""
    return _optimum(_HELLINGER, log_prior, rewards, kl_coef)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Optimum]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "chi_squared": chi_squared,
    "kl_plus_chi_squared": kl_plus_chi_squared,
    "alpha": alpha_divergence,
    "jensen_shannon": jensen_shannon,
    "squared_hellinger": squared_hellinger,
}


@takes_numbers
def optimum(divergence: str, log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Optimum:
    """The optimum for a divergence by its name: log_prior and rewards [K].

    Raises:
        InputError: no such name; the message lists them.
    """
    if divergence not in DIVERGENCES:
        raise _unknown(divergence)
    return DIVERGENCES[divergence](log_prior, rewards, kl_coef)


@takes_numbers
def density_ratio(divergence: str, x: Tensor) -> Tensor:
    """What the optimum multiplies q by: t = π/q [K] at x = (r − ν)/λ [K], by the table of (1).

    The divergence is given by its name; α = ½.

    Raises:
        InputError: no such name, or an x at which t is infinite or no number.
    """
    if divergence not in DIVERGENCES:
        raise _unknown(divergence)
    if divergence == "reverse_kl":
        return x.exp()
    f = _SHAPES[divergence]
    bad = ~(x - f.at_one < f.ceiling)
    if bool(bad.any()):
        value = float(x[bad].reshape(-1)[0])
        raise InputError(
            f"x holds {value!r}, where π/q of {divergence} is infinite or no number; give x below"
            f" {f.ceiling + f.at_one:.12g}."
        )
    return f.log_ratio(x - f.at_one).exp()


def _unknown(divergence: str) -> InputError:
    known = ", ".join(DIVERGENCES)
    return InputError(f"divergence = {divergence!r} is not known; choose from {known}.")


def _optimum(f: _Divergence, log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Optimum:
    """(1) with ν by bracketing: Σ_k q_k t((r_k − ν)/λ) falls in ν from above 1 to below 1."""
    kl_coef = check_kl_coef(kl_coef)
    check_outcomes(log_prior, rewards)
    if kl_coef == 0 or kl_coef == math.inf:
        # the limits do not depend on f: q on argmax r, where ties keep q's proportions, and q
        tilted = tilt(log_prior, rewards, kl_coef)
        return Optimum(tilted.log_posterior, float(tilted.value), float(tilted.value))
    supported = log_prior > -math.inf
    feasible = supported & (rewards > -math.inf)
    if not bool(feasible.any()):
        raise InfeasibleError(
            "every supported outcome has reward -inf: no policy has a finite objective. Relax the"
            " constraint."
        )
    forbidden = supported & ~feasible
    if f.at_zero == math.inf and bool(forbidden.any()):
        index = int(forbidden.nonzero()[0])
        raise InfeasibleError(
            f"rewards[{index}] is -inf where the prior has mass, and this divergence is infinite at"
            " zero mass: no policy is finite."
        )
    log_q, top = log_prior[feasible], rewards[feasible].amax()
    below = scaled_advantage(rewards[feasible], top, kl_coef)  # (r − max r)/λ ≤ 0
    nothing = torch.full_like(log_prior, -math.inf)

    def excess(shift: float) -> float:
        """Σπ − 1 at ν = max r + λ(shift − f'(1)); below e^700, which the search has no use for."""
        log_t = nothing.masked_scatter(feasible, f.log_ratio(below - shift))
        log_total = float(Rows().log_mean_exp(log_prior, log_t))
        return math.expm1(min(700.0, log_total))

    # ν is sought as its distance from the best reward in units of λ: of order 1 at any scale
    low, high = _bracket(f, excess, -float(below.amin()))
    shift = low
    if low != high:
        shift = float(brentq(excess, low, high, xtol=1e-300, rtol=8.9e-16, maxiter=2000))
    log_t = f.log_ratio(below - shift)
    # normalised once more: the root is exact to rounding only
    log_pi = nothing.masked_scatter(feasible, log_q + log_t - torch.logsumexp(log_q + log_t, 0))
    # D_f: over what is feasible, and f(0) for what the reward forbids (inf · 0 is 0)
    penalty = float((log_q.exp() * f.generator(log_t)).sum())
    forbidden_mass = float(log_prior[forbidden].exp().sum())
    penalty += f.at_zero * forbidden_mass if forbidden_mass else 0.0
    mean = float((log_pi[feasible].exp() * rewards[feasible]).sum())
    normaliser = float(top) + kl_coef * (shift - f.at_one)
    return Optimum(log_pi, normaliser, mean - kl_coef * penalty)


def _bracket(
    f: _Divergence, excess: Callable[[float], float], spread: float
) -> tuple[float, float]:
    """Shifts (ν − max r)/λ + f'(1) with a sum above and below 1.

    At shift = 0 every t ≤ 1 (the best has t = 1), so the sum is at most 1; going down, the best
    alone reaches t = 1/q(argmax), and the sum 1. Where t has a pole the shift stays above it.

    Args:
        spread: (max r − min r)/λ; no shift need be lower where nothing is forbidden.
    """
    high = 0.0
    if excess(high) >= 0:
        return high, high
    # down, in steps that double, until the sum is above 1 or a pole is passed
    width = min(1e-3, spread) or 1e-3  # near the prior the root is of the size of the spread
    low = high - width
    while low > -f.ceiling and excess(low) < 0:
        width *= 2
        low = high - width
    if low <= -f.ceiling:  # a pole: approach it, where the sum grows without bound
        gap = (high + f.ceiling) / 2
        while excess(-f.ceiling + gap) < 0:
            gap /= 2
        low = -f.ceiling + gap
    return low, high


def _log_w(y: Tensor) -> Tensor:
    """log W₀(e^{1+y}): v of e^v − 1 + v = y, by Newton's method from above, where it only falls."""
    v = torch.minimum(y / 2, torch.log1p(y.clamp(min=0)).where(y > 0, y / 2))
    for _ in range(_NEWTON_STEPS):
        v = v - (torch.expm1(v) + v - y) / (torch.exp(v) + 1)
    return v


def _t_log_t(log_t: Tensor) -> Tensor:
    """t log t, 0 at t = 0."""
    return torch.where(log_t == -math.inf, 0.0, log_t.exp() * log_t.clamp(min=-1e300))


def _half_square(log_t: Tensor) -> Tensor:
    """½(t − 1)²."""
    return torch.expm1(log_t) ** 2 / 2


def _kl_generator(log_t: Tensor) -> Tensor:
    """t log t − t + 1, to full relative accuracy near t = 1; 1 at t = 0."""
    near = log_t.abs() < 0.5
    small = torch.where(near, log_t, 0.0)
    direct = _t_log_t(log_t) - torch.expm1(log_t)
    return torch.where(near, small.exp() * logspace.expm1_minus_identity(-small), direct)


def _js_generator(log_t: Tensor) -> Tensor:
    """½[t log t − (1+t) log((1+t)/2)], as ½KL(t‖m) + ½KL(1‖m) with the middle m = (1+t)/2."""
    log_middle = torch.log1p(torch.expm1(log_t) / 2)
    to_middle = log_middle.exp() * _kl_generator(log_t - log_middle)
    return (to_middle + logspace.expm1_minus_identity(log_middle)) / 2


def _js_log_ratio(y: Tensor) -> Tensor:
    """−log(2e^{−2y} − 1)."""
    far = y < -20
    near = -torch.log1p(2 * torch.expm1(-2 * y.clamp(min=-20)))
    # where e^{−2y} alone might overflow
    return torch.where(far, 2 * y - torch.log(2 - torch.exp(2 * y.clamp(max=0))), near)


def _alpha(alpha: float) -> _Divergence:
    """The α-divergence, 0 < α < 1."""

    def generator(log_t: Tensor) -> Tensor:
        dead = log_t == -math.inf
        safe = torch.where(dead, 0.0, log_t)
        by_alpha = logspace.expm1_minus_identity(alpha * safe)
        above = by_alpha - alpha * logspace.expm1_minus_identity(safe)
        return torch.where(dead, 1 / alpha, above / (alpha * (alpha - 1)))

    return _Divergence(
        log_ratio=lambda y: torch.log1p(-(1 - alpha) * y) / (alpha - 1),
        generator=generator,
        ceiling=1 / (1 - alpha),
        at_zero=1 / alpha,
        at_one=0.0,
    )


_FORWARD = _Divergence(
    log_ratio=lambda y: -torch.log1p(-y),
    generator=logspace.expm1_minus_identity,
    ceiling=1.0,
    at_zero=math.inf,
    at_one=-1.0,
)
_CHI_SQUARED = _Divergence(
    log_ratio=lambda y: torch.log1p(y.clamp(min=-1)),
    generator=_half_square,
    ceiling=math.inf,
    at_zero=0.5,
    at_one=0.0,
)
_KL_CHI_SQUARED = _Divergence(
    log_ratio=_log_w,
    generator=lambda log_t: _kl_generator(log_t) + _half_square(log_t),
    ceiling=math.inf,
    at_zero=1.5,
    at_one=1.0,
)
_JENSEN_SHANNON = _Divergence(
    log_ratio=_js_log_ratio,
    generator=_js_generator,
    ceiling=math.log(2) / 2,
    at_zero=math.log(2) / 2,
    at_one=0.0,
)
_HELLINGER = _Divergence(
    log_ratio=lambda y: -2 * torch.log1p(-2 * y),
    generator=lambda log_t: torch.expm1(log_t / 2) ** 2 / 2,
    ceiling=0.5,
    at_zero=0.5,
    at_one=0.0,
)
_SHAPES = {
    "forward_kl": _FORWARD,
    "chi_squared": _CHI_SQUARED,
    "kl_plus_chi_squared": _KL_CHI_SQUARED,
    "alpha": _alpha(0.5),
    "jensen_shannon": _JENSEN_SHANNON,
    "squared_hellinger": _HELLINGER,
}
