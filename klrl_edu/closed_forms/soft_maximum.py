"""The soft maximum λ log E_q[e^{r/λ}], to the last digits at any λ: one node of every method.

    λ log E_q[e^{r/λ}] = m + λℓ,    ℓ = log E_q[e^{(r − m)/λ}], for any m                        (1)
    m = E_q[r] where the rewards span few λ:  ℓ ≈ Var_q(r)/2λ² ≥ 0, so that m holds the digits;
    m = max r elsewhere:  ℓ ≤ 0, and nothing overflows                                           (2)

Near the prior (λ large) log E is about r/λ, and 1 + r/λ has lost the digits of r: ℓ is therefore
taken by log1p and expm1 (`Groups.log_mean_exp`). In a dynamic programme each outcome brings its own
m and ℓ from what lies ahead, and (1) is applied node by node. λ = inf is the first case of (2),
with ℓ = log q(r > −inf); λ = 0 is the second, with the ties of `core/ties.py`. Rewards in reward
units, logs in nats.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import ties
from klrl_edu.core.groups import Groups

# rewards that span up to this many λ are centred at their mean: e^64 is far from overflow
_FEW = 64.0


class SoftGains(NamedTuple):
    """What each outcome is worth beside the anchor of its group.

    Attributes:
        anchor: m of each group in reward units; −inf where nothing is allowed.
        slack: how far rounding may have moved m at λ = 0, in reward units.
        log_gain: (r − m)/λ + ℓ_ahead of each outcome in nats: log π*/q, but for ℓ.
    """

    anchor: Tensor
    slack: Tensor
    log_gain: Tensor


class SoftMaximum(NamedTuple):
    """λ log E_q[e^{r/λ}] = anchor + λ·log_mass of each group.

    Attributes:
        anchor, slack, log_gain: as in `SoftGains`.
        log_mass: ℓ of each group in nats; −inf where nothing is allowed.
    """

    anchor: Tensor
    log_mass: Tensor
    slack: Tensor
    log_gain: Tensor


def soft_maximum(
    groups: Groups,
    log_prior: Tensor,
    rewards: Tensor,
    log_ahead: Tensor,
    kl_coef: float,
    slack: Tensor,
) -> SoftMaximum:
    """(1) of each group, where an outcome is worth e^{r/λ + ℓ_ahead}.

    Args:
        groups: which outcomes [...] belong to one node.
        log_prior: log q, normalised over each group.
        rewards: r with the anchor of what lies ahead; −inf forbids.
        log_ahead: ℓ of what lies ahead; −inf forbids.
        kl_coef: λ, 0 and inf by their limits.
        slack: of the rewards at λ = 0; not looked at elsewhere.
    """
    anchor, slack, gain = soft_gains(groups, log_prior, rewards, log_ahead, kl_coef, slack)
    return SoftMaximum(anchor, groups.log_mean_exp(log_prior, gain), slack, gain)


def soft_gains(
    groups: Groups,
    log_prior: Tensor,
    rewards: Tensor,
    log_ahead: Tensor,
    kl_coef: float,
    slack: Tensor,
) -> SoftGains:
    """The part of `soft_maximum` that comes before ℓ; `log_prior` need not be normalised."""
    log_weights = log_prior + log_ahead
    allowed = (rewards > -math.inf) & (log_weights > -math.inf)
    rewards = torch.where(allowed, rewards, -math.inf)
    if kl_coef == 0:
        rewards, best_slack = _level_ties(groups, rewards, slack)
    anchor = find_anchor(groups, log_weights, rewards, kl_coef)
    if kl_coef > 0:
        best_slack = torch.zeros_like(anchor)
    advantage = scaled_advantage(rewards, groups.spread(anchor), kl_coef)
    return SoftGains(anchor, best_slack, torch.where(allowed, log_ahead + advantage, -math.inf))


def _level_ties(groups: Groups, rewards: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards [...] in which what ties with the best is equal to it, and the slack of the best."""
    tied = ties.reaches(rewards, slack, groups.spread(groups.amax(rewards - slack)))
    level = torch.where(tied, groups.spread(groups.amax(rewards)), rewards)
    return level, groups.amax(torch.where(tied, slack, 0.0))


def find_anchor(groups: Groups, log_weights: Tensor, rewards: Tensor, kl_coef: float) -> Tensor:
    """m of (2) for each group, without gradient, as any m gives the same; −inf without mass.

    Args:
        log_weights: of the mean, in nats; rewards: −inf where there is no weight.
    """
    log_weights, rewards = log_weights.detach(), rewards.detach()
    top = groups.amax(rewards)
    if kl_coef == 0:
        return top
    allowed = rewards > -math.inf
    low = -groups.amax(torch.where(allowed, -rewards, -math.inf))
    # halved: rewards at both ends of the range of floats lie further apart than a float says
    narrow = (top > -math.inf) & (top / 2 - low / 2 <= kl_coef * (_FEW / 2))
    if not bool(narrow.any()):
        return top
    total = groups.spread(groups.logsumexp(log_weights))
    shares = torch.where(allowed, torch.exp(log_weights - total), 0.0)
    mean = groups.sum(shares * torch.where(allowed, rewards, 0.0))
    # rounding may leave the range of the rewards, and be infinite at its end
    return torch.where(narrow, torch.minimum(torch.maximum(mean, low), top), top)


def scaled_advantage(rewards: Tensor, top: Tensor, kl_coef: float) -> Tensor:
    """(r − m)/λ, and −inf where r = −inf.

    In the limits: 0 where r = m and −inf elsewhere at λ = 0; 0 at λ = inf.
    """
    feasible = rewards > -math.inf
    below = torch.where(feasible, rewards, top) - top
    forbidden = torch.full_like(below, -math.inf)
    if kl_coef == 0:
        return torch.where(feasible & (below == 0), below, forbidden)
    # r − m itself overflows where rewards lie at both ends of the range of floats
    scaled = torch.where(torch.isinf(below), rewards / kl_coef - top / kl_coef, below / kl_coef)
    return torch.where(feasible, scaled, forbidden)


def soft_value(anchor: Tensor, log_mass: Tensor, kl_coef: float) -> Tensor:
    """m + λℓ in reward units: max r at λ = 0; E_q[r] at inf, −inf where mass is forbidden."""
    if kl_coef == math.inf:  # inf·0 would be NaN
        return anchor.masked_fill(log_mass < 0, -math.inf)
    # without mass m is −inf already, and 0·(−inf) at λ = 0 would be NaN
    return anchor + kl_coef * log_mass.masked_fill(log_mass == -math.inf, 0.0)


def soft_log_evidence(anchor: Tensor, log_mass: Tensor, kl_coef: float) -> Tensor:
    """log Z = m/λ + ℓ in nats; at λ = 0 ±inf, or ℓ where m = 0."""
    if kl_coef == 0:
        return log_mass if anchor == 0 else torch.sign(anchor) * math.inf
    return anchor / kl_coef + log_mass + 0.0  # −0 would be printed as such
