"""What exact samplers cost and inexact ones miss, with the prior as proposal.

    rejection:          accept y with e^{(r − max r)/λ};   acceptance Z/e^{max r/λ}              (1)
    quasi-rejection:    p_β ∝ min(P, βq), P = q e^{r/λ};
    acceptance Z_β/β, total variation to π* exact                                                (2)
    independence Metropolis–Hastings:  accept min(1, a′/a), a = π*/q;
    second eigenvalue 1 − 1/max a                                                                (3)
    importance sampling, self-normalised with n draws:
    its exact mean, by every multiset of draws                                                   (4)

Eikema et al. (2022) for (2); Liu (1996), Theorem 2.1, for (3). K outcomes; log q in nats, rewards
in reward units.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.multisets import count_multisets, multisets
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.validation import check_count

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
        log_prior, rewards: [K].
    """
    # max π*/q is e^{max r/λ}/Z, the inverse of (1)
    log_star = tilt(log_prior, rewards, kl_coef).log_posterior
    return math.exp(-float(_log_weights(log_prior, log_star).amax()))


@takes_numbers
def quasi_rejection(
    log_prior: Tensor, rewards: Tensor, kl_coef: float, log_beta: float
) -> QuasiRejection:
    """What quasi-rejection (2) draws from, and its cost.

    Args:
        log_prior, rewards: [K].
        log_beta: log β in nats; from max r/λ on it is rejection, and exact.

    Raises:
        InputError: β not positive and finite.
    """
    if not math.isfinite(log_beta):
        raise InputError(f"log_beta = {log_beta!r} must be finite.")
    tilted = tilt(log_prior, rewards, kl_coef)
    log_unnormalised = tilted.log_posterior + tilted.log_evidence  # log P
    capped = torch.minimum(log_unnormalised, log_prior + log_beta)
    log_mass = logspace.logsumexp(capped)
    log_probs = capped - log_mass
    acceptance = math.exp(float(log_mass) - log_beta)
    distance = float((log_probs.exp() - tilted.log_posterior.exp()).abs().sum()) / 2
    return QuasiRejection(log_probs, acceptance, distance)


@takes_numbers
def metropolis_matrix(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> Tensor:
    """The transition matrix [K,K] of (3): a row moves from one outcome, and sums to one.

    From an outcome without posterior mass every proposal is accepted.

    Args:
        log_prior, rewards: [K].
    """
    log_a = _log_weights(log_prior, tilt(log_prior, rewards, kl_coef).log_posterior)
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
        log_prior, rewards: [K].
    """
    return 1 - rejection_acceptance(log_prior, rewards, kl_coef)


@takes_numbers
def effective_sample_size(log_prior: Tensor, rewards: Tensor, kl_coef: float) -> float:
    """The effective sample size a draw, in the limit of many: 1/E_q[(π*/q)²] in (0, 1].

    Args:
        log_prior, rewards: [K].
    """
    log_star = tilt(log_prior, rewards, kl_coef).log_posterior
    covered = log_star > -math.inf
    return math.exp(-float(logspace.logsumexp(2 * log_star[covered] - log_prior[covered])))


@takes_numbers
def importance_sampling_mean(
    log_prior: Tensor, rewards: Tensor, kl_coef: float, values: Tensor, n: int
) -> float:
    """The exact mean (4) of Σ w f/Σ w over n draws from q, w = e^{r/λ}.

    Less E_π*[f] it is the estimator's bias.

    Args:
        log_prior, rewards: [K].
        values: f [K].
        n: draws.

    Raises:
        TooLargeError: more multisets than MAX_MULTISETS.
        InputError: n < 1, or some draw may have no weight at all (r = −inf), where the estimate
            does not exist.
    """
    check_count(n, "n")
    supported = log_prior > -math.inf
    log_w = _log_weights(log_prior, tilt(log_prior, rewards, kl_coef).log_posterior)
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
    draws, log_p = multisets(log_prior, n)
    estimates = (torch.softmax(log_w[draws], -1) * values[draws]).sum(-1)
    return float(log_p.exp() @ estimates)


def _log_weights(log_prior: Tensor, log_star: Tensor) -> Tensor:
    """log a = log π*/q [K], −inf where π* is 0."""
    safe_prior = torch.where(log_prior > -math.inf, log_prior, 0.0)
    return torch.where(log_star > -math.inf, log_star - safe_prior, -math.inf)
