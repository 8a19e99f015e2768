"""A law and its rewards as vectors: what every closed form asks of log q [K] and r [K]."""

import math

import torch
from torch import Tensor

from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import SUM_TOLERANCE


def check_outcomes(log_prior: Tensor, rewards: Tensor) -> None:
    """log q [K] is normalised, and r [K] a number or −inf wherever q has mass.

    Raises:
        InputError: other shapes, NaN, a prior that does not sum to one within 1e-9 (or the
            precision of its dtype), or a NaN or +inf reward where it has mass.
    """
    check_shapes(log_prior, rewards)
    check_law(log_prior, "log_prior")
    check_rewards(log_prior, rewards)


def check_shapes(log_prior: Tensor, rewards: Tensor) -> None:
    """Both are [K], K ≥ 1.

    Raises:
        InputError: other shapes.
    """
    if log_prior.ndim != 1 or rewards.shape != log_prior.shape or not len(log_prior):
        raise InputError(
            f"log_prior {list(log_prior.shape)} and rewards {list(rewards.shape)} must both be [K],"
            " K at least 1."
        )


def check_rewards(log_prior: Tensor, rewards: Tensor) -> None:
    """No NaN or +inf among the rewards [K] that count, nor among log q [K].

    Raises:
        InputError: with the index.
    """
    bad = (log_prior > -math.inf) & (torch.isnan(rewards) | (rewards == math.inf))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise InputError(
            f"rewards[{index}] = {float(rewards[index])} where the prior has mass; give a number,"
            " or -inf for the worst."
        )
    bad = ~(log_prior < math.inf)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise InputError(
            f"log_prior[{index}] = {float(log_prior[index])}; give the log of a probability, or"
            " -inf for zero mass."
        )


def check_law(log_probs: Tensor, name: str) -> None:
    """log-probabilities [K] that sum to one.

    Raises:
        InputError: another shape, NaN, or another sum.
    """
    if log_probs.ndim != 1 or not len(log_probs):
        raise InputError(f"{name} has shape {list(log_probs.shape)}; expected [K], K at least 1.")
    total = float(log_probs.detach().exp().sum())
    tolerance = max(SUM_TOLERANCE, 100 * torch.finfo(log_probs.dtype).eps)
    if not abs(total - 1) <= tolerance:  # also NaN
        raise InputError(
            f"exp({name}) sums to {total:.12g}, not 1; normalise it, e.g. with torch.log_softmax."
        )
