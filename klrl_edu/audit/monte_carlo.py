"""Means by sampling, with an interval that holds for every distribution of bounded range.

    |E g − ḡ| ≤ √(2 V ln(4P/δ)/n) + 14 b ln(4P/δ)/(3(n − 1)),   |g| ≤ b, in all P entries with
    probability 1 − δ  (1)

V is the sample variance (n − 1 in the denominator). Maurer and Pontil (2009), Theorem 4, for both
sides of P entries of range 2b.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core.arguments import check_draw
from klrl_edu.core.errors import InputError

FAILURE_PROBABILITY = 1e-6


class SampledMoments(NamedTuple):
    """Sample mean [P], half-widths [P] by (1), total sample variance, share of negative first
    entries, draws.
    """

    mean: Tensor
    interval: Tensor
    variance: float
    negative: float
    draws: int


def check_monte_carlo(monte_carlo: int | None, draw: object, bound: float | None) -> None:
    """What sampling needs, and nothing of it without sampling.

    Raises:
        InputError: something is missing, or given in vain.
    """
    if monte_carlo is None:
        if draw is not None or bound is not None:
            raise InputError(
                "draw and bound are for sampling: give monte_carlo=n with them, or neither for the"
                " exact audit."
            )
        return
    if isinstance(monte_carlo, bool) or not isinstance(monte_carlo, int) or monte_carlo < 2:
        raise InputError(
            f"monte_carlo = {monte_carlo!r} must be a whole number of at least 2, the number of"
            " batches to draw."
        )
    if draw is None:
        raise InputError("monte_carlo needs its randomness: draw=seeded_draw(0).")
    check_draw(draw)
    if bound is None:
        raise InputError(
            "monte_carlo needs bound=, the largest |entry| that an estimate can have: without a"
            " range no interval holds for every distribution, however many samples are drawn."
        )
    if not 0 < bound < math.inf:
        raise InputError(
            f"bound = {bound!r} must be a positive number, the largest |entry| that an estimate can"
            " have."
        )


def sampled_moments(samples: Iterable[Tensor], bound: float) -> SampledMoments:
    """From independent estimates, chunks of [x,P].

    Raises:
        InputError: an estimate lies beyond `bound`.
    """
    count, mean, squares, negative = 0, torch.zeros(()), torch.zeros(()), 0
    for chunk in samples:
        largest = float(chunk.abs().max())
        if largest > bound:
            raise InputError(
                f"an entry of an estimate is {largest:.6g} in size, beyond bound = {bound:g}; give"
                " the largest there can be."
            )
        # Chan et al. (1983): squares about the chunk's own mean, and what the two means differ by,
        # which loses no digits where E g is large beside the deviation
        more, chunk_mean = len(chunk), chunk.mean(0)
        shift, total = chunk_mean - mean, count + more
        within, between = (chunk - chunk_mean).square().sum(0), shift.square()
        squares = squares + within + between * (count * more / total)
        mean = mean + shift * (more / total)
        count, negative = total, negative + int((chunk[:, 0] < 0).sum())
    variance = squares / (count - 1)
    log_term = math.log(4 * mean.numel() / FAILURE_PROBABILITY)
    by_variance = torch.sqrt(2 * variance * log_term / count)
    by_range = 14 * bound * log_term / (3 * (count - 1))
    interval = by_variance + by_range  # (1)
    return SampledMoments(mean, interval, float(variance.sum()), negative / count, count)
