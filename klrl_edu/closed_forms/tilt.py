"""The posterior of a vector: a prior tilted by its rewards.

    log π*(y) = log q(y) + u(y),    u = (r(y) − m)/λ − ℓ,    ℓ = log Σ_y q(y) e^{(r(y) − m)/λ}   (1)
    log Z = m/λ + ℓ,    value = λ log Z = m + λℓ                                                 (2)
    KL(π*‖q) = Σ_y q(y) [e^u (u − 1) + 1],    E_π*[r] − E_q[r] = Σ_y q(y) (e^u − 1) r(y)         (3)

With m taken out (`soft_maximum`), (1) and `value` are finite for any reward and any λ > 0, and keep
their digits; only log Z itself may overflow. K outcomes; logs in nats, values in reward units.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.closed_forms.soft_maximum import find_anchor, soft_log_evidence, soft_value
from klrl_edu.closed_forms.soft_maximum import scaled_advantage as scaled_advantage
from klrl_edu.core import logspace
from klrl_edu.core.errors import InfeasibleError
from klrl_edu.core.groups import Rows
from klrl_edu.core.outcomes import check_rewards, check_shapes
from klrl_edu.core.validation import SUM_TOLERANCE, check_kl_coef

_SMALL = 1e-300  # above it 1/λ is finite
_PLAIN = 64.0  # |r|/λ up to here rounds to 7e-15 nats, and needs nothing taken out
_WELL_ABOVE_ZERO = 0.5  # |log Z| from here on keeps its digits where nothing was taken out


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
        kl_coef: λ. At 0 the limit q restricted to argmax r (ties keep q's proportions, and are
            exact equalities: what rounding of a sum may have split, `core/ties.py` levels first;
            value = max r; log Z is ±inf, or log q(argmax) where max r = 0). At inf the limit q
            restricted to r > −inf (value = E_q[r]).

    Raises:
        InputError: λ < 0, other shapes, NaN, or a reward of +inf where the prior has mass.
        InfeasibleError: no outcome has both prior mass and a finite reward.
    """
    kl_coef = check_kl_coef(kl_coef)
    check_shapes(log_prior, rewards)
    if _is_plain(log_prior, rewards, kl_coef):
        plain = _tilt_plain(log_prior, rewards, kl_coef)
        if _WELL_ABOVE_ZERO <= abs(float(plain.log_evidence)) < math.inf:
            return plain
        if math.isfinite(plain.log_evidence):
            return _tilt_near_the_prior(log_prior, rewards, kl_coef) or plain
    anchor, advantage, log_mass = _centred(log_prior, rewards, kl_coef)
    lifted = log_prior + advantage
    if kl_coef == math.inf:
        supported = torch.where(log_prior > -math.inf, rewards, -math.inf)
        value = logspace.expectation(log_prior, supported)
    else:
        value = soft_value(anchor, log_mass, kl_coef)
    # by its own sum, not by ℓ: it sums to one also where q does so to nine digits only
    log_posterior = lifted - logspace.logsumexp(lifted)
    return Tilted(log_posterior, value, soft_log_evidence(anchor, log_mass, kl_coef))


def tilt_log_ratio(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Tensor:
    """u = log π*/q [K] of (1) in nats, −inf where π* is 0.

    It is small near the prior, and log π* − log q would have lost its digits.

    Arguments and errors as in `tilt`.
    """
    kl_coef = check_kl_coef(kl_coef)
    check_shapes(log_prior, rewards)
    _, advantage, log_mass = _centred(log_prior, rewards, kl_coef)
    return advantage - log_mass


def _centred(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> tuple[Tensor, Tensor, Tensor]:
    """m, (r − m)/λ [K] and ℓ of (1), with the limits of λ."""
    check_rewards(log_prior, rewards)
    supported = log_prior > -math.inf
    rewards = torch.where(supported, rewards, torch.full_like(rewards, -math.inf))
    feasible = rewards > -math.inf
    if not bool(feasible.any()):
        count = int(supported.sum())
        raise InfeasibleError(
            f"every supported outcome has reward -inf ({count} of {count}): the posterior is empty."
            " Relax the constraint."
        )
    groups = Rows(0)
    anchor = find_anchor(groups, log_prior, rewards, kl_coef)
    advantage = scaled_advantage(rewards, anchor, kl_coef)
    return anchor, advantage, groups.log_mean_exp(log_prior, advantage)


# --- the fast path: no gradient and moderate rewards ----------------------------------------------


def _is_plain(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> bool:
    """No gradient, no limit, and |r|/λ small everywhere: log q + r/λ can be formed as it stands."""
    if log_prior.requires_grad or rewards.requires_grad or not rewards.numel():
        return False
    if log_prior.dtype != rewards.dtype:
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


def _tilt_near_the_prior(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Tilted | None:
    """(1) and (2) with m = E_q[r], where log Z near 0 has lost its digits above.

    None where the prior is not normalised, and log Z is near 0 by chance.
    """
    prior = log_prior.exp()
    total = prior.sum()
    if abs(float(total) - 1) > SUM_TOLERANCE:
        return None
    anchor = prior.dot(rewards) / total
    advantage = (rewards - anchor) / kl_coef
    log_mass = torch.log1p(prior.dot(torch.expm1(advantage)) / total)
    log_posterior = torch.log_softmax(advantage.add_(log_prior), 0)
    return Tilted(log_posterior, anchor + kl_coef * log_mass, anchor / kl_coef + log_mass)
