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

_STEPS = 100_000


class Equilibrium(NamedTuple):
    """log π [K] in nats of the equilibrium, its duality gap, and the iterations that it took."""

    log_probs: Tensor
    duality_gap: float
    iterations: int


@takes_numbers
def bradley_terry(rewards: Tensor) -> Tensor:
    """The probabilities P(i ≻ j) = σ(r_i − r_j) [K,K] that i is preferred, for rewards [K]."""
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
        log_prior: [K], with mass everywhere.
        preferences: P [K,K].
        log_behaviour: the law [K] of each of the two compared outcomes, drawn independently; the
            prior by default.
    """
    weights = (log_prior if log_behaviour is None else log_behaviour).exp()
    margin = kl_coef * (log_policy - log_prior)  # λu
    log_wins = logsigmoid(margin[:, None] - margin)
    pairs = weights[:, None] * weights * check_preferences(preferences)
    return -(pairs * log_wins).sum()


@takes_numbers
def ipo_loss(
    log_policy: Tensor,
    log_prior: Tensor,
    preferences: Tensor,
    tau: float,
    log_behaviour: Tensor | None = None,
) -> Tensor:
    """The population loss of IPO (2), a scalar, with gradient to log_policy [K].

    Arguments as in `dpo_loss`; τ in preference units a nat.
    """
    weights = (log_prior if log_behaviour is None else log_behaviour).exp()
    ratio = log_policy - log_prior  # u
    pairs = weights[:, None] * weights * check_preferences(preferences)
    return (pairs * (ratio[:, None] - ratio - 1 / (2 * tau)) ** 2).sum()


@takes_numbers
def ipo_optimum(
    log_prior: Tensor, preferences: Tensor, tau: float, log_behaviour: Tensor | None = None
) -> Tensor:
    """log π [K] ∝ q e^{p(y ≻ μ)/τ} (2): the posterior of the reward p(y ≻ μ) = Σ_j μ_j P(y ≻ j).

    Raises:
        InputError: a matrix that is no preference.
    """
    behaviour = (log_prior if log_behaviour is None else log_behaviour).exp()
    return tilt(log_prior, check_preferences(preferences) @ behaviour, tau).log_posterior


@takes_numbers
def duality_gap(log_policy: Tensor, log_prior: Tensor, preferences: Tensor, tau: float) -> Tensor:
    """What both players of (3) could gain at π by their best responses, in preference units.

    A scalar ≥ 0, and 0 at the equilibrium:

        2(τ log Σ q e^{P(y ≻ π)/τ} + τKL(π‖q) − ½) = 2τKL(π‖best response),

    the game being symmetric with P(π ≻ π) = ½.
    """
    best = tilt(log_prior, check_preferences(preferences) @ log_policy.exp(), tau)
    return 2 * tau * logspace.kl_divergence(log_policy, best.log_posterior)


@takes_numbers
def nash_equilibrium(
    log_prior: Tensor, preferences: Tensor, tau: float, tolerance: float = 1e-13
) -> Equilibrium:
    """The fixed point of (3), with its duality gap as a certificate.

    By damped mirror steps, log π ← (1 − ητ) log π + η(P(y ≻ π) + τ log q).

    Raises:
        InputError: τ not positive, a matrix that is no preference, or no convergence (raise τ).
    """
    if not 0 < tau < math.inf:
        raise InputError(
            f"tau = {tau!r} must be a positive number; without regularisation the equilibrium need"
            " not be unique."
        )
    check_preferences(preferences)
    log_policy = log_prior.clone()
    step = min(1.0, tau) / (tau * (1 + 1 / tau))  # ητ, small enough for a game that cycles
    for iteration in range(_STEPS):
        gap = float(duality_gap(log_policy, log_prior, preferences, tau))
        if gap <= tolerance:
            return Equilibrium(log_policy, gap, iteration)
        target = tilt(log_prior, preferences @ log_policy.exp(), tau).log_posterior
        mixed = (1 - step) * log_policy + step * target
        mixed = torch.where(log_prior > -math.inf, mixed, -math.inf)
        log_policy = logspace.log_normalize(torch.where(torch.isnan(mixed), -math.inf, mixed))
    raise InputError(
        f"the equilibrium at tau = {tau:g} was not reached: duality gap {gap:.3g} after {_STEPS:,}"
        " steps; raise tau or tolerance."
    )
