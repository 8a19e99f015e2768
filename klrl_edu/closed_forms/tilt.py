"""The posterior of a vector: a prior tilted by its rewards.

    log π*(y) = log q(y) + (r(y) − m)/λ − ℓ,    ℓ = log Σ_y q(y) e^{(r(y) − m)/λ},
    m = max r over q's support                                                                   (1)
    log Z = m/λ + ℓ,    value = λ log Z = m + λℓ                                                 (2)

With the maximum taken out, (1) and `value` are finite for any reward and any λ > 0; only log Z
itself may overflow. K outcomes; logs in nats, values in reward units.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InfeasibleError
from klrl_edu.core.validation import check_kl_coef

_SMALL = 1e-300  # above it 1/λ is finite
_PLAIN = 64.0  # |r|/λ up to here rounds to 7e-15 nats, and needs no maximum taken out


class Tilted(NamedTuple):
    """A tilted distribution: log π* [K], value λ log Z in reward units, log Z in nats."""

    log_posterior: Tensor
    value: Tensor
    log_evidence: Tensor


def tilt(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Tilted:
    """q·e^{r/λ}/Z by (1) and (2), with gradients to both tensors for 0 < λ < inf.

    Args:
        log_prior: [K] in nats, normalised; −inf is zero mass, and the reward there is ignored, NaN
            included.
        rewards: [K] in reward units; −inf forbids an outcome.
        kl_coef: λ. At 0 the limit q restricted to argmax r (ties, by exact equality, keep q's
            proportions; value = max r; log Z is ±inf, or log q(argmax) where max r = 0). At inf the
            limit q restricted to r > −inf (value = E_q[r]).

    Raises:
        InfeasibleError: no outcome has both prior mass and a finite reward.
    """
    check_kl_coef(kl_coef)
    if _is_plain(log_prior, rewards, kl_coef):
        plain = _tilt_plain(log_prior, rewards, kl_coef)
        if bool(torch.isfinite(plain.log_evidence)):
            return plain
    return _tilt_below_the_best(log_prior, rewards, kl_coef)


def _tilt_below_the_best(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Tilted:
    """(1) and (2) as they stand, with the limits of λ."""
    supported = log_prior > -math.inf
    rewards = torch.where(supported, rewards, torch.full_like(rewards, -math.inf))
    feasible = rewards > -math.inf
    if not bool(feasible.any()):
        count = int(supported.sum())
        raise InfeasibleError(
            f"every supported outcome has reward -inf ({count} of {count}): the posterior is empty."
            " Relax the constraint."
        )
    top = rewards.amax().detach()  # any m gives the same: no gradient passes through it
    lifted = log_prior + scaled_advantage(rewards, top, kl_coef)
    residual = logspace.logsumexp(lifted)
    if kl_coef == math.inf:
        value, log_evidence = logspace.expectation(log_prior, rewards), residual
    else:
        value = top + kl_coef * residual
        if kl_coef > 0:
            scaled_top = top / kl_coef
        else:  # m/λ in the limit: ±inf, or 0 where m is
            scaled_top = torch.where(top == 0, top, torch.sign(top) * math.inf)
        log_evidence = residual + scaled_top
    return Tilted(lifted - residual, value, log_evidence)


def scaled_advantage(rewards: Tensor, top: Tensor, kl_coef: float) -> Tensor:
    """(r − m)/λ ≤ 0, and −inf where r = −inf.

    In the limits: 0 on the argmax and −inf elsewhere at λ = 0; 0 at λ = inf.
    """
    feasible = rewards > -math.inf
    below = torch.where(feasible, rewards, top) - top
    forbidden = torch.full_like(below, -math.inf)
    if kl_coef == 0:
        return torch.where(feasible & (below == 0), below, forbidden)
    # r − m itself overflows where rewards lie at both ends of the range of floats
    scaled = torch.where(torch.isinf(below), rewards / kl_coef - top / kl_coef, below / kl_coef)
    return torch.where(feasible, scaled, forbidden)


# --- the fast path: no gradient and moderate rewards ----------------------------------------------


def _is_plain(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> bool:
    """No gradient, no limit, and |r|/λ small everywhere: log q + r/λ can be formed as it stands."""
    if log_prior.requires_grad or rewards.requires_grad or not rewards.numel():
        return False
    if not _SMALL < kl_coef < math.inf:
        return False
    low, high = torch.aminmax(rewards)
    return bool((low >= -_PLAIN * kl_coef) & (high <= _PLAIN * kl_coef))


def _tilt_plain(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Tilted:
    """(1) and (2) with m = 0, in one allocation; log Z is NaN where the prior has no mass."""
    lifted = torch.add(log_prior, rewards, alpha=1 / kl_coef)
    top = lifted.amax()
    log_posterior = torch.log_softmax(lifted, 0, out=lifted)
    log_evidence = top - log_posterior.amax()  # both at the best outcome: lifted − log π*
    return Tilted(log_posterior, kl_coef * log_evidence, log_evidence)
