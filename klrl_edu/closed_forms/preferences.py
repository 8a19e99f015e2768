"""Preferences without a written reward: where DPO, IPO and the regularised game end.

    Bradley–Terry:  P(i ≻ j) = σ(r_i − r_j);     DPO:  −E log σ(λΔu), u = log π/q;
    its optimum under (full) Bradley–Terry is π*                                                 (1)
    IPO:   E(Δu − 1/2τ)² over preferred pairs;   optimum π ∝ q e^{p(y ≻ μ)/τ}                    (2)
    Nash:  max_π min_ρ P(π ≻ ρ) − τKL(π‖q) + τKL(ρ‖q);   π ∝ q e^{P(y ≻ π)/τ}                    (3)

Rafailov et al. (2023), eq. 7; Azar et al. (2023), eq. 17; Munos et al. (2023), Theorem 1. K
outcomes; log q and log π [K] in nats; preference matrices P [K,K] with P + Pᵀ = 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.outcomes import check_law
from klrl_edu.core.validation import check_kl_coef, check_number

_STEPS = 100_000


_POSITIVE = "a positive number"
_LEAST_TOLERANCE = 1e-15  # probabilities are not known more exactly


class Equilibrium(NamedTuple):
    """log π [K] in nats of the equilibrium, its duality gap, and the iterations that it took.

    Attributes:
        residual: ½ Σ |π − best response to π|, which is 0 at the fixed point (3).
    """

    log_probs: Tensor
    duality_gap: float
    iterations: int
    residual: float


def _is_positive(x: float) -> bool:
    return 0 < x < math.inf


@takes_numbers
def bradley_terry(rewards: Tensor) -> Tensor:
    """The probabilities P(i ≻ j) = σ(r_i − r_j) [K,K] that i is preferred, for rewards [K].

    Raises:
        InputError: rewards that are no finite numbers [K].
    """
    if rewards.ndim != 1:
        raise InputError(f"rewards has shape {list(rewards.shape)}; expected [K].")
    bad = ~torch.isfinite(rewards)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise InputError(f"rewards[{index}] = {float(rewards[index])} must be a finite number.")
    return torch.sigmoid(rewards[:, None] - rewards[None, :])


@takes_numbers
def check_preferences(preferences: Tensor) -> Tensor:
    """A square matrix in [0, 1] with P + Pᵀ = 1 within 1e-12.

    Raises:
        InputError: anything else, with the indices.
    """
    if preferences.ndim != 2 or preferences.shape[0] != preferences.shape[1]:
        raise InputError(f"preferences has shape {list(preferences.shape)}; expected [K, K].")
    in_range = (preferences >= 0) & (preferences <= 1)
    sums_to_one = (preferences + preferences.T - 1).abs() <= 1e-12
    bad = ~in_range | ~sums_to_one  # so, and NaN is bad too
    if bool(bad.any()):
        i, j = bad.nonzero()[0].tolist()
        one = f"preferences[{i}, {j}] = {float(preferences[i, j])}"
        other = f"preferences[{j}, {i}] = {float(preferences[j, i])}"
        raise InputError(f"{one} and {other} must lie in [0, 1] and sum to 1.")
    return preferences


@takes_numbers
def dpo_loss(
    log_policy: Tensor,
    log_prior: Tensor,
    preferences: Tensor,
    kl_coef: float,
    log_behaviour: Tensor | None = None,
) -> Tensor:
    """The population loss of DPO (1), a scalar in nats, with gradient to log_policy [K].

    Args:
        log_prior: [K], normalised.
        preferences: P [K,K].
        kl_coef: λ > 0.
        log_behaviour: the law [K] of each of the two compared outcomes, drawn independently; the
            prior by default. It has no mass where the prior has none.

    Raises:
        InputError: λ not positive and finite, laws that are none, a matrix that is no preference.
    """
    kl_coef = check_number(kl_coef, "kl_coef", _POSITIVE, _is_positive)
    log_wins = logsigmoid(kl_coef * _margins(log_policy, log_prior))  # of λΔu
    return -_mean_over_pairs(log_wins, log_prior, log_behaviour, preferences)


@takes_numbers
def ipo_loss(
    log_policy: Tensor,
    log_prior: Tensor,
    preferences: Tensor,
    tau: float,
    log_behaviour: Tensor | None = None,
) -> Tensor:
    """The population loss of IPO (2), a scalar, with gradient to log_policy [K].

    Arguments and errors as in `dpo_loss`; τ > 0 in preference units a nat.
    """
    tau = check_number(tau, "tau", _POSITIVE, _is_positive)
    losses = (_margins(log_policy, log_prior) - 1 / (2 * tau)) ** 2
    return _mean_over_pairs(losses, log_prior, log_behaviour, preferences)


def _margins(log_policy: Tensor, log_prior: Tensor) -> Tensor:
    """Δu = u_i − u_j [K,K] of u = log π/q, 0 on the diagonal and off the prior's support."""
    check_law(log_prior, "log_prior")
    if log_policy.shape != log_prior.shape:
        raise InputError(
            f"log_policy has shape {list(log_policy.shape)}; expected {list(log_prior.shape)}."
        )
    bad = ~(log_policy < math.inf)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise InputError(
            f"log_policy[{index}] = {float(log_policy[index])}; give the log of a probability."
        )
    supported = log_prior > -math.inf
    ratio = torch.where(supported, log_policy, 0.0) - torch.where(supported, log_prior, 0.0)
    # two outcomes that the policy rules out are level: −inf less −inf is no number
    ruled_out = ratio == -math.inf
    level = ruled_out[:, None] & ruled_out
    return torch.where(level, 0.0, ratio[:, None] - torch.where(level, 0.0, ratio))


def _mean_over_pairs(
    losses: Tensor, log_prior: Tensor, log_behaviour: Tensor | None, preferences: Tensor
) -> Tensor:
    """Σ_ij μ_i μ_j P(i ≻ j) loss_ij; a pair that never comes does not count."""
    behaviour = _behaviour(log_prior, log_behaviour)
    stray = (behaviour > 0) & (log_prior == -math.inf)
    if bool(stray.any()):
        index = int(stray.nonzero()[0])
        raise InputError(
            f"log_behaviour[{index}] has mass where the prior has none, and log π/q is infinite."
        )
    weights = behaviour[:, None] * behaviour * _of_size(preferences, len(behaviour))
    return (weights * torch.where(weights > 0, losses, 0.0)).sum()


def _behaviour(log_prior: Tensor, log_behaviour: Tensor | None) -> Tensor:
    """μ [K], the prior by default."""
    if log_behaviour is None:
        return log_prior.exp()
    check_law(log_behaviour, "log_behaviour")
    if log_behaviour.shape != log_prior.shape:
        raise InputError(
            f"log_behaviour has shape {list(log_behaviour.shape)}; expected"
            f" {list(log_prior.shape)}."
        )
    return log_behaviour.exp()


def _of_size(preferences: Tensor, outcomes: int) -> Tensor:
    """Checked preferences between as many outcomes as the prior has."""
    if len(check_preferences(preferences)) != outcomes:
        shape = list(preferences.shape)
        raise InputError(f"preferences has shape {shape}; expected [{outcomes}, {outcomes}].")
    return preferences


@takes_numbers
def ipo_optimum(
    log_prior: Tensor, preferences: Tensor, tau: float, log_behaviour: Tensor | None = None
) -> Tensor:
    """log π [K] ∝ q e^{p(y ≻ μ)/τ} (2): the posterior of the reward p(y ≻ μ) = Σ_j μ_j P(y ≻ j).

    Raises:
        InputError: τ < 0, laws that are none, a matrix that is no preference.
    """
    check_law(log_prior, "log_prior")
    tau, behaviour = check_kl_coef(tau, "tau"), _behaviour(log_prior, log_behaviour)
    return tilt(log_prior, _of_size(preferences, len(log_prior)) @ behaviour, tau).log_posterior


@takes_numbers
def duality_gap(log_policy: Tensor, log_prior: Tensor, preferences: Tensor, tau: float) -> Tensor:
    """What both players of (3) could gain at π by their best responses, in preference units.

    A scalar ≥ 0, and 0 at the equilibrium:

        2(τ log Σ q e^{P(y ≻ π)/τ} + τKL(π‖q) − ½) = 2τKL(π‖best response),

    the game being symmetric with P(π ≻ π) = ½.

    Raises:
        InputError: τ not positive and finite, laws that are none, a matrix that is no preference.
    """
    tau = check_number(tau, "tau", _POSITIVE, _is_positive)
    check_law(log_prior, "log_prior")
    check_law(log_policy, "log_policy")
    best = tilt(log_prior, _of_size(preferences, len(log_prior)) @ log_policy.exp(), tau)
    return 2 * tau * logspace.kl_divergence(log_policy, best.log_posterior)


@takes_numbers
def nash_equilibrium(
    log_prior: Tensor, preferences: Tensor, tau: float, tolerance: float = 1e-13
) -> Equilibrium:
    """The fixed point of (3), with its duality gap as a certificate.

    By damped mirror steps, log π ← (1 − ητ) log π + η(P(y ≻ π) + τ log q).

    Args:
        tolerance: bounds the residual ½ Σ |π − best response to π|. The gap is quadratic in it, and
            would be met while π still misses its digits.

    Raises:
        InputError: τ or the tolerance not positive, a matrix that is no preference, or no
            convergence (raise τ).
    """
    rule = "a positive number; without regularisation the equilibrium need not be unique"
    tau = check_number(tau, "tau", rule, _is_positive)
    rule = f"from {_LEAST_TOLERANCE:g} to 1, in probability; float64 knows no smaller residual"
    tolerance = check_number(tolerance, "tolerance", rule, lambda x: _LEAST_TOLERANCE <= x <= 1)
    check_law(log_prior, "log_prior")
    # off the prior's support nobody ever plays
    supported = log_prior > -math.inf
    log_q = log_prior[supported]
    wins = _of_size(preferences, len(log_prior))[supported][:, supported]
    log_policy = log_q.clone()
    step = min(1.0, tau) / (tau * (1 + 1 / tau))  # ητ, small enough for a game that cycles
    for iteration in range(_STEPS):
        response = tilt(log_q, wins @ log_policy.exp(), tau).log_posterior
        # of probabilities: the logs of the rarest outcomes are the last to settle
        residual = float((response.exp() - log_policy.exp()).abs().sum()) / 2
        if residual <= tolerance:
            whole = torch.full_like(log_prior, -math.inf).masked_scatter(supported, log_policy)
            gap = float(duality_gap(log_policy, log_q, wins, tau))
            return Equilibrium(whole, gap, iteration, residual)
        log_policy = logspace.log_normalize((1 - step) * log_policy + step * response)
    raise InputError(
        f"the equilibrium at tau = {tau:g} was not reached: residual {residual:.3g} after"
        f" {_STEPS:,} steps; raise tau or tolerance."
    )
