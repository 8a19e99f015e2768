"""λ for a KL budget or a target reward, the reward–KL frontier, the path of mirror descent.

    d E_{π*}[r]/d(1/λ) = Var_{π*}(r),    d E[r]/d KL(π*‖q) = λ along the frontier                (1)
    λ → ∞:  ΔE[r] ≈ Var_q(r)/λ,   KL ≈ Var_q(r)/2λ²;     λ → 0:
    q on argmax r, KL → −log q(argmax r)                                                         (2)
    mirror descent with step η:  π_t ∝ q exp(r/λ_t),   λ_t = λ/(1 − (1 − ηλ)^t);
    without the KL term λ_t = 1/(ηt)                                                             (3)

K outcomes; log q in nats (−inf is zero mass), rewards in reward units (−inf forbids).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from klrl_edu.closed_forms.tilt import tilt, tilt_log_ratio
from klrl_edu.core import logspace
from klrl_edu.core.arguments import describe
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.outcomes import check_outcomes
from klrl_edu.core.validation import check_count, check_kl_coef, check_number

MAX_STEPS = 10_000_000


class Frontier(NamedTuple):
    """Points of the reward–KL frontier.

    Attributes:
        kl_coef: λ [M].
        expected_reward: E_{π*}[r] [M] in reward units.
        kl: KL(π*‖q) [M] in nats.
        value: λ log Z [M] in reward units.
    """

    kl_coef: Tensor
    expected_reward: Tensor
    kl: Tensor
    value: Tensor


@takes_numbers
def frontier(log_prior: Tensor, rewards: Tensor, kl_coefs: Sequence[float]) -> Frontier:
    """E[r] and KL of the posterior at each of M λs: no policy lies above the curve they trace.

    Args:
        log_prior: [K], normalised; rewards: [K].
        kl_coefs: M values of λ.

    Raises:
        InputError: vectors that are no law and its rewards, or a λ below 0.
    """
    check_outcomes(log_prior, rewards)
    if not isinstance(kl_coefs, Iterable):
        raise InputError(f"kl_coefs is {describe(kl_coefs)}; expected a list of numbers.")
    allowed, rows = _allowed(log_prior, rewards), []
    for kl_coef in map(check_kl_coef, kl_coefs):
        tilted = tilt(log_prior, rewards, kl_coef)
        if _spread(allowed.rewards) <= kl_coef:  # E_q[r] and what λ adds to it, however little
            mean = allowed.mean() + _gain(*allowed[:2], kl_coef)
        else:
            mean = float(logspace.expectation(tilted.log_posterior, rewards))
        rows.append((kl_coef, mean, _kl(log_prior, rewards, kl_coef), float(tilted.value)))
    columns = zip(*rows, strict=True)
    return Frontier(*(torch.tensor(column, dtype=torch.float64) for column in columns))


def _kl(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> float:
    """KL(π*‖q)."""
    return float(logspace.kl_of_tilt(log_prior, tilt_log_ratio(log_prior, rewards, kl_coef)))


def _gain(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> float:
    """E_{π*}[r] − E_q[r] of finite rewards, as Σ q (e^u − 1)(r − E_q[r]): no digits are lost."""
    log_ratio = tilt_log_ratio(log_prior, rewards, kl_coef)
    # q (e^u − 1), and π* − q where e^u alone may overflow
    near = log_ratio < 1
    shift = log_prior.exp() * torch.expm1(torch.where(near, log_ratio, 0.0))
    moved = torch.where(near, shift, (log_prior + log_ratio).exp() - log_prior.exp())
    return float((moved * (rewards - log_prior.exp().dot(rewards))).sum())


class _Allowed(NamedTuple):
    """What may happen, as a law of its own.

    Attributes:
        log_prior: log q(·|r > −inf) [A] in nats.
        rewards: [A] in reward units.
        least_kl: −log q(r > −inf) in nats, which what is forbidden costs at any λ.
    """

    log_prior: Tensor
    rewards: Tensor
    least_kl: float

    def mean(self) -> float:
        """E_q[r | r > −inf]."""
        return float(self.log_prior.exp().dot(self.rewards))


def _allowed(log_prior: Tensor, rewards: Tensor) -> _Allowed:
    """The outcomes with prior mass and a finite reward."""
    least = -float(
        tilt(log_prior, torch.where(rewards > -math.inf, 0.0, rewards), 1.0).log_evidence
    )
    allowed = (log_prior > -math.inf) & (rewards > -math.inf)
    log_q, r = log_prior[allowed].double(), rewards[allowed].double()
    return _Allowed(logspace.log_normalize(log_q), r, least + 0.0)  # + 0.0: no −0


@takes_numbers
def kl_coef_for_budget(log_prior: Tensor, rewards: Tensor, budget: float) -> float:
    """The λ at which KL(π*‖q) = budget; inf at a budget of 0 where nothing is forbidden.

    Args:
        log_prior: [K], normalised; rewards: [K].
        budget: in nats.

    Raises:
        InputError: vectors that are no law and its rewards; a budget below what forbidden outcomes
            cost at any λ, or from −log q(argmax r) on, which only λ = 0 attains.
    """
    check_outcomes(log_prior, rewards)
    budget = check_number(budget, "budget", "a number of nats", lambda x: x == x)
    allowed = _allowed(log_prior, rewards)
    # measured from `least`, so that a budget just above it keeps its digits
    least = allowed.least_kl  # the KL left at λ = inf, where π* is q without what is forbidden
    most = _kl(log_prior, rewards, 0.0)
    if not budget >= least:
        raise InputError(
            f"budget = {budget!r} is below {least:.12g} nats, the least that the rewards leave;"
            f" give one from {least:.12g} to {most:.12g}."
        )
    if budget > most:
        raise InputError(
            f"budget = {budget!r} nats is above the most attainable, −log q(argmax r) ="
            f" {most:.12g}; λ = 0 already reaches that."
        )
    if budget == most:
        return 0.0
    return _solve(allowed, budget - least, _kl)


@takes_numbers
def kl_coef_for_reward(log_prior: Tensor, rewards: Tensor, target: float) -> float:
    """The λ at which E_{π*}[r] = target.

    Args:
        log_prior: [K], normalised; rewards: [K].
        target: in reward units.

    Raises:
        InputError: vectors that are no law and its rewards; a target outside
            [E_q[r | not forbidden], max r]; the message has the range.
    """
    check_outcomes(log_prior, rewards)
    target = check_number(target, "target", "a number of reward units", lambda x: x == x)
    allowed = _allowed(log_prior, rewards)
    least, most = allowed.mean(), float(allowed.rewards.max())
    if not least <= target <= most:
        raise InputError(
            f"target = {target!r} is outside the attainable range [{least:.12g}, {most:.12g}] of"
            " E[r]."
        )
    if target == most:
        return 0.0
    return _solve(allowed, target - least, _gain)


def _solve(
    allowed: _Allowed, target: float, measure: Callable[[Tensor, Tensor, float], float]
) -> float:
    """The λ at which a quantity that falls to 0 at λ = inf is `target`.

    Found by bracketing log λ, from the scale of the rewards on.
    """
    if target == 0:
        return math.inf
    log_prior, rewards, _ = allowed
    spread = _spread(rewards)

    # in log λ, as λ may lie hundreds of decades from the rewards
    def excess(log_scale: float) -> float:
        return measure(log_prior, rewards, spread * math.exp(log_scale)) - target

    low, high = -1.0, 1.0
    while excess(low) < 0:
        low *= 2
        if low < -1400 or spread * math.exp(low) == 0:
            return 0.0  # nearer to the limit than a float λ can say
    while excess(high) > 0:
        high *= 2
        if high > 700:
            return math.inf
    log_scale = float(brentq(excess, low, high, xtol=1e-14, rtol=8.9e-16, maxiter=500))
    return spread * math.exp(log_scale)


def _spread(rewards: Tensor) -> float:
    """The scale of λ: the range of the rewards."""
    # halved first: rewards at both ends of the range of floats would overflow
    return float(rewards.amax() / 2 - rewards.amin() / 2) * 2 or 1.0


def _check_steps(steps: int) -> None:
    check_count(steps, "steps", 0)
    if steps > MAX_STEPS:
        raise TooLargeError(f"steps = {steps:.6g} make a path of more than {MAX_STEPS:,} points.")


def mirror_descent_kl_coefs(kl_coef: float, step_size: float, steps: int) -> Tensor:
    """λ_t for t = 0 … steps by (3): [steps + 1], inf at t = 0 (the prior).

    Every iterate of mirror descent from q, and of the natural gradient, is the posterior at λ_t.

    Args:
        kl_coef: λ ≥ 0; at 0 the updates are multiplicative weights and λ_t = 1/(ηt).
        step_size: η > 0 in nats a reward unit, with ηλ ≤ 1.

    Raises:
        InputError: ηλ > 1, where the path oscillates around π* and leaves the family.
    """
    kl_coef = check_kl_coef(kl_coef)
    _check_steps(steps)
    rule = f"positive with step_size · kl_coef ≤ 1 (kl_coef = {kl_coef:g})"
    step_size = check_number(
        step_size, "step_size", rule, lambda x: 0 < x < math.inf and x * kl_coef <= 1
    )
    t = torch.arange(steps + 1, dtype=torch.float64)
    if kl_coef == 0:
        return 1 / (step_size * t)
    if step_size * kl_coef < 1:
        done = -torch.expm1(t * math.log1p(-step_size * kl_coef))  # 1 − (1 − ηλ)^t
    else:  # ηλ = 1: one step does it all
        done = (t > 0).double()
    return kl_coef / done


def proximal_kl_coefs(kl_coef: float, step_size: float, steps: int) -> Tensor:
    """λ_t = λ/(1 − (1 + ηλ)^{−t}) [steps + 1] of the proximal (implicit) updates; inf at t = 0.

    Raises:
        InputError: λ or η not positive.
    """
    _check_steps(steps)
    kl_coef, step_size = (
        check_number(value, name, "a positive number", lambda x: 0 < x < math.inf)
        for name, value in (("kl_coef", kl_coef), ("step_size", step_size))
    )
    t = torch.arange(steps + 1, dtype=torch.float64)
    return kl_coef / -torch.expm1(-t * math.log1p(step_size * kl_coef))
