"""What exact samplers cost and inexact ones miss, with the prior as proposal.

    rejection:          accept y with e^{(r − max r)/λ};   acceptance Z/e^{max r/λ}              (1)
    quasi-rejection:    p_β ∝ min(P, βq), P = q e^{r/λ};
    acceptance Z_β/β, total variation to π* exact                                                (2)
    independence Metropolis–Hastings:  accept min(1, a′/a), a = π*/q;
    second eigenvalue 1 − 1/max a                                                                (3)
    importance sampling, self-normalised with n draws:
    its exact mean, by every multiset of draws                                                   (4)

Eikema et al. (2022) for (2); Liu (1996), Theorem 2.1, for (3). K outcomes; log q in nats, rewards
in reward units. Every function raises InputError where log q [K] is not normalised, or a reward
that counts is NaN or +inf.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.closed_forms.soft_maximum import scaled_advantage
from klrl_edu.closed_forms.tilt import tilt, tilt_log_ratio
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.multisets import count_multisets, multisets
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.outcomes import check_outcomes
from klrl_edu.core.validation import check_count, check_kl_coef, check_number

MAX_MULTISETS = 1_000_000


class QuasiRejection(NamedTuple):
    """log p_β [K] in nats, the acceptance rate, and the total variation to π*."""

    log_probs: Tensor
    acceptance: float
    total_variation: float


@takes_numbers
def rejection_acceptance(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> float:
    """The probability (1) that a draw from q is accepted: the mean of e^{(r − max r)/λ} under q.

    Args:
        log_prior, rewards: [K]; the prior normalised.
    """
    check_outcomes(log_prior, rewards)
    # max π*/q is e^{max r/λ}/Z, the inverse of (1)
    return math.exp(-float(tilt_log_ratio(log_prior, rewards, kl_coef).amax()))


@takes_numbers
def quasi_rejection(
    log_prior: Tensor, rewards: Tensor, kl_coef: float, log_beta: float
) -> QuasiRejection:
    """What quasi-rejection (2) draws from, and its cost.

    Args:
        log_prior, rewards: [K]; the prior normalised.
        log_beta: log β in nats; from max r/λ on it is rejection, and exact.

    Raises:
        InputError: β not positive and finite, or λ = 0.
    """
    check_outcomes(log_prior, rewards)
    log_beta = check_number(log_beta, "log_beta", "finite", math.isfinite)
    kl_coef = check_kl_coef(kl_coef)
    if kl_coef == 0:
        raise InputError("kl_coef = 0 makes e^{r/λ} 0 or infinite: no β caps it; give λ above 0.")
    log_star = tilt(log_prior, rewards, kl_coef).log_posterior
    best = rewards[log_prior > -math.inf].amax()
    advantage = scaled_advantage(rewards, best, kl_coef)
    # log P/βq of the best; below 0 nothing is capped, and it is taken out of the acceptance alone
    ceiling = best / kl_coef - log_beta
    capped = log_prior + (advantage + ceiling.clamp(min=0)).clamp(max=0)
    log_mass = logspace.logsumexp(capped)
    log_probs = capped - log_mass
    acceptance = math.exp(float(log_mass + ceiling.clamp(max=0)))
    distance = float((log_probs.exp() - log_star.exp()).abs().sum()) / 2
    return QuasiRejection(log_probs, acceptance, distance)


@takes_numbers
def metropolis_matrix(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Tensor:
    """The transition matrix [K,K] of (3): a row moves from one outcome, and sums to one.

    From an outcome without posterior mass every proposal is accepted.

    Args:
        log_prior, rewards: [K]; the prior normalised.
    """
    check_outcomes(log_prior, rewards)
    log_a = tilt_log_ratio(log_prior, rewards, kl_coef)
    log_ratio = log_a[None, :] - log_a[:, None]  # log a′/a, NaN where both are 0
    leaves_nothing = (log_a == -math.inf)[:, None]
    accept = torch.where(leaves_nothing, 0.0, log_ratio).clamp(max=0.0).exp()
    moves = log_prior.exp()[None, :] * accept
    # what is not accepted stays
    moves.fill_diagonal_(0)
    return moves + torch.diag(1 - moves.sum(-1))


@takes_numbers
def metropolis_second_eigenvalue(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> float:
    """The rate 1 − 1/max a of (3) at which the chain forgets its start.

    Args:
        log_prior, rewards: [K]; the prior normalised.
    """
    check_outcomes(log_prior, rewards)
    # 1 − e^{−max log a}, which keeps its digits where nearly all is accepted
    return -math.expm1(-float(tilt_log_ratio(log_prior, rewards, kl_coef).amax())) + 0.0


@takes_numbers
def effective_sample_size(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> float:
    """The effective sample size a draw, in the limit of many: 1/E_q[(π*/q)²] in (0, 1].

    Args:
        log_prior, rewards: [K]; the prior normalised.
    """
    check_outcomes(log_prior, rewards)
    log_ratio = tilt_log_ratio(log_prior, rewards, kl_coef)
    return math.exp(-float(logspace.logsumexp(log_prior + 2 * log_ratio)))


@takes_numbers
def importance_sampling_mean(
    log_prior: Tensor, rewards: Tensor, kl_coef: float, values: Tensor, n: int
) -> float:
    """The exact mean (4) of Σ w f/Σ w over n draws from q, w = e^{r/λ}.

    Less E_π*[f] it is the estimator's bias.

    Args:
        log_prior, rewards: [K]; the prior normalised.
        values: f [K].
        n: draws.

    Raises:
        TooLargeError: more multisets than MAX_MULTISETS.
        InputError: n < 1, or some draw may have no weight at all (r = −inf), where the estimate
            does not exist.
    """
    check_count(n, "n")
    check_outcomes(log_prior, rewards)
    supported = log_prior > -math.inf
    _check_values(values, supported)
    log_w = tilt_log_ratio(log_prior, rewards, kl_coef)
    if bool((log_w[supported] == -math.inf).any()):
        raise InputError(
            "a supported outcome has no weight (reward -inf, or λ = 0): n draws may all be such,"
            " and the estimate is 0/0."
        )
    outcomes = int(supported.sum())
    size = count_multisets(outcomes, n)
    if size > MAX_MULTISETS:
        raise TooLargeError(
            f"{n} draws of {outcomes} outcomes make {size:,} multisets, more than"
            f" {MAX_MULTISETS:,}; take a smaller n."
        )
    # the estimate does not see the order of its draws
    draws, log_p = multisets(log_prior, n)
    estimates = (torch.softmax(log_w[draws], -1) * values[draws]).sum(-1)
    return float(log_p.exp() @ estimates)


def _check_values(values: Tensor, supported: Tensor) -> None:
    if values.shape != supported.shape:
        raise InputError(
            f"values has shape {list(values.shape)}; expected {list(supported.shape)}."
        )
    bad = supported & ~torch.isfinite(values)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise InputError(
            f"values[{index}] = {float(values[index])} where the prior has mass; give a number."
        )
