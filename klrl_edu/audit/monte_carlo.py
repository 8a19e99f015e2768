"""Means by sampling: what they are off by, and how far they lie from a target.

    |E g − ḡ| ≤ √(2 V ln(4P/δ)/n) + 14 b ln(4P/δ)/(3(n − 1)),   |g| ≤ b, in all P entries with
    probability 1 − δ                                                                            (1)
    D² = mean over k ≠ l of <ḡ_k − t, ḡ_l − t>,    E D² = ‖E g − t‖²                             (2)

V is the sample variance (n − 1 in the denominator). (1) is Maurer and Pontil (2009), Theorem 4, for
both sides of P entries of range 2b; it holds for every distribution, and needs the range. (2) needs
none: the means ḡ_k of K independent parts of the sample multiply to a distance without bias, where
‖ḡ − t‖² itself is too large by the noise. Its error is the jackknife's over the parts, which is on
the large side (Efron and Stein, 1981). A target that is a mean of the same batches has a part t_k
beside each ḡ_k, and the noise that both share cancels.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from klrl_edu.core.arguments import check_draw
from klrl_edu.core.errors import InputError

FAILURE_PROBABILITY = 1e-6  # δ of (1), over all entries
PARTS = 20  # K of (2)
CONFIDENCE = 0.999  # of one interval by (2)


class SampledMoments(NamedTuple):
    """Sample mean [P], half-widths [P] by (1), total sample variance, share of negative first
    entries, draws.
    """

    mean: Tensor
    interval: Tensor
    variance: float
    negative: float
    draws: int


def distance_interval(parts: Tensor, target: Tensor) -> tuple[float, float]:
    """The least and the largest distance ‖E g − t‖ that the draws allow.

    Args:
        parts: means of the parts [K,P].
        target: [P], or a part beside each [K,P].
    """
    apart, count = parts - target, len(parts)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    if parts.shape[1] == 1:  # a number has a standard error of its own
        mean, reach = abs(float(apart.mean())), quantile * float(standard_errors(apart))
        return max(0.0, mean - reach), mean + reach
    squared, error = squared_distance(apart)
    low, high = squared - quantile * error, squared + quantile * error
    # D² is unbiased, and so below 0 at times; a distance is not
    return math.sqrt(max(0.0, low)), math.sqrt(max(0.0, high))


def squared_distance(apart: Tensor) -> tuple[float, float]:
    """‖E g − t‖² by (2) from the differences of the parts [K,P], and its jackknife error."""
    count, products = len(apart), apart @ apart.T
    own = products.diagonal()
    between = products.sum() - own.sum()  # over k ≠ l
    # without part k, what it has with the others is gone, in both orders
    without = between - 2 * (products.sum(1) - own)
    each = without / ((count - 1) * (count - 2))
    error = torch.sqrt((count - 1) / count * (each - each.mean()).square().sum())
    return float(between) / (count * (count - 1)), float(error)


def standard_errors(parts: Tensor) -> Tensor:
    """Of the entries of the mean [P], from the means of the parts [K,P]."""
    return parts.std(0) / math.sqrt(len(parts))


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
    if isinstance(monte_carlo, bool) or not isinstance(monte_carlo, int) or monte_carlo < 2 * PARTS:
        raise InputError(
            f"monte_carlo = {monte_carlo!r} must be a whole number of at least {2 * PARTS}, the"
            " number of batches to draw."
        )
    if draw is None:
        raise InputError("monte_carlo needs its randomness: draw=seeded_draw(0).")
    check_draw(draw)
    if bound is not None and not 0 < bound < math.inf:
        raise InputError(
            f"bound = {bound!r} must be a positive number, the largest |entry| that an estimate can"
            " have."
        )


def sampled_moments(samples: Iterable[Tensor], bound: float) -> SampledMoments:
    """From independent estimates, chunks of [x,P].

    Raises:
        InputError: an estimate lies beyond `bound`.
    """
    # [] until the first chunk says what P is, and [P] from then on
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
