"""λ for a KL budget or a target reward, the reward–KL frontier, the path of mirror descent.

    d E_{π*}[r]/d(1/λ) = Var_{π*}(r),    d E[r]/d KL(π*‖q) = λ along the frontier                (1)
    λ → ∞:  ΔE[r] ≈ Var_q(r)/λ,   KL ≈ Var_q(r)/2λ²;     λ → 0:
    q on argmax r, KL → −log q(argmax r)                                                         (2)
    mirror descent with step η:  π_t ∝ q exp(r/λ_t),   λ_t = λ/(1 − (1 − ηλ)^t);
    without the KL term λ_t = 1/(ηt)                                                             (3)

K outcomes; log q in nats (−inf is zero mass), rewards in reward units (−inf forbids).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from klrl_edu.closed_forms.tilt import Tilted, tilt
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.validation import check_count, check_kl_coef


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
        log_prior, rewards: [K].
        kl_coefs: M values of λ.
    """
    rows = []
    for kl_coef in kl_coefs:
        tilted = tilt(log_prior, rewards, kl_coef)
        mean, kl = _mean(tilted, rewards), _kl(log_prior, tilted)
        rows.append((kl_coef, mean, kl, float(tilted.value)))
    columns = zip(*rows, strict=True)
    return Frontier(*(torch.tensor(column, dtype=torch.float64) for column in columns))


def _mean(tilted: Tilted, rewards: Tensor) -> float:
    """E_{π*}[r]."""
    return float(logspace.expectation(tilted.log_posterior, rewards))


def _kl(log_prior: Tensor, tilted: Tilted) -> float:
    """KL(π*‖q)."""
    return float(logspace.kl_divergence(tilted.log_posterior, log_prior))


@takes_numbers
def kl_coef_for_budget(log_prior: Tensor, rewards: Tensor, budget: float) -> float:
    """The λ at which KL(π*‖q) = budget; inf at a budget of 0 where nothing is forbidden.

    Args:
        log_prior, rewards: [K].
        budget: in nats.

    Raises:
        InputError: a budget below what forbidden outcomes cost at any λ, or from −log q(argmax r)
            on, which only λ = 0 attains.
    """
    # the KL left at λ = inf, where π* is q without what is forbidden: 0, not its rounding, if
    # nothing is
    forbidden = bool(((log_prior > -math.inf) & (rewards == -math.inf)).any())
    least = _kl(log_prior, tilt(log_prior, rewards, math.inf)) if forbidden else 0.0
    most = _kl(log_prior, tilt(log_prior, rewards, 0.0))
    if not least <= budget < math.inf or math.isnan(budget):
        raise InputError(
            f"budget = {budget!r} is below {least:.12g} nats, the least that the rewards leave;"
            f" give one from {least:.12g} to {most:.12g}."
        )
    if budget > most:
        raise InputError(
            f"budget = {budget!r} nats is above the most attainable, −log q(argmax r) ="
            f" {most:.12g}; λ = 0 already reaches that."
        )
    return _solve(log_prior, rewards, budget, least, most, lambda tilted: _kl(log_prior, tilted))


@takes_numbers
def kl_coef_for_reward(log_prior: Tensor, rewards: Tensor, target: float) -> float:
    """The λ at which E_{π*}[r] = target.

    Args:
        log_prior, rewards: [K].
        target: in reward units.

    Raises:
        InputError: a target outside [E_q[r | not forbidden], max r]; the message has the range.
    """
    least = _mean(tilt(log_prior, rewards, math.inf), rewards)
    most = _mean(tilt(log_prior, rewards, 0.0), rewards)
    if not least <= target <= most:
        raise InputError(
            f"target = {target!r} is outside the attainable range [{least:.12g}, {most:.12g}] of"
            " E[r]."
        )
    return _solve(log_prior, rewards, target, least, most, lambda tilted: _mean(tilted, rewards))


def _solve(
    log_prior: Tensor,
    rewards: Tensor,
    target: float,
    least: float,
    most: float,
    measure: Callable[[Tilted], float],
) -> float:
    """The λ of a quantity that falls from `most` at λ = 0 to `least` at λ = inf.

    Found by bracketing log λ, from the scale of the rewards on.
    """
    if target == least:
        return math.inf
    if target == most:
        return 0.0
    spread = _spread(log_prior, rewards)

    def excess(log_scale: float) -> float:
        return measure(tilt(log_prior, rewards, spread * math.exp(log_scale))) - target

    low, high = -1.0, 1.0
    while excess(low) < 0:
        low *= 2
        if spread * math.exp(low) == 0 or low < -1400:
            return 0.0  # nearer to the limit than a float λ can say
    while excess(high) > 0:
        high *= 2
        if high > 700:
            return math.inf
    log_scale = float(brentq(excess, low, high, xtol=1e-14, rtol=8.9e-16, maxiter=500))
    return spread * math.exp(log_scale)


def _spread(log_prior: Tensor, rewards: Tensor) -> float:
    """The scale of λ: the range of the rewards that count."""
    counted = rewards[(log_prior > -math.inf) & (rewards > -math.inf)]
    # halved first: rewards at both ends of the range of floats would overflow
    return float(counted.amax() / 2 - counted.amin() / 2) * 2 or 1.0


def mirror_descent_kl_coefs(kl_coef: float, step_size: float, steps: int) -> Tensor:
    """λ_t for t = 0 … steps by (3): [steps + 1], inf at t = 0 (the prior).

    Every iterate of mirror descent from q, and of the natural gradient, is the posterior at λ_t.

    Args:
        kl_coef: λ ≥ 0; at 0 the updates are multiplicative weights and λ_t = 1/(ηt).
        step_size: η > 0 in nats a reward unit, with ηλ ≤ 1.

    Raises:
        InputError: ηλ > 1, where the path oscillates around π* and leaves the family.
    """
    check_kl_coef(kl_coef)
    check_count(steps, "steps", 0)
    if not 0 < step_size < math.inf or not step_size * kl_coef <= 1:
        raise InputError(
            f"step_size = {step_size!r} must be positive with step_size · kl_coef ≤ 1 (kl_coef ="
            f" {kl_coef:g})."
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
    check_count(steps, "steps", 0)
    if not (0 < kl_coef < math.inf and 0 < step_size < math.inf):
        raise InputError(
            f"kl_coef = {kl_coef!r} and step_size = {step_size!r} must be positive numbers."
        )
    t = torch.arange(steps + 1, dtype=torch.float64)
    return kl_coef / -torch.expm1(-t * math.log1p(step_size * kl_coef))
