"""Assertions about samples, each with a proven false-alarm probability δ and the bias that it finds
with probability 1 − 1e-6.

    counts      c_k ~ Binomial(n, p_k):
    fails if P(C_k ≤ c_k) ≤ δ/2K or P(C_k ≥ c_k) ≤ δ/2K for any of K bins                        (1)
    means       |x̄ − μ| ≤ σ√(2t/n) + bt/3n  but with probability 2e^{−t},  t = log 2/δ,
    b ≥ |x − μ|                                                                                  (2)

(1) is exact for any counts (Clopper and Pearson 1934) and adds up over bins by Bonferroni's
inequality. (2) is Bernstein's inequality (Boucheron, Lugosi and Massart 2013, theorem 2.10 and
corollary 2.11, c = b/3) with the σ and b of the enumerated distribution. No t-test: with one
outcome of probability 1/n, its normal approximation is wrong with probability 1/e at any level
(tests/testing/test_calibration.py). n samples, K bins, S supported sequences, T tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from klrl_edu.core.arguments import describe
from klrl_edu.core.draws import Draw, seeded_draw
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import as_numbers
from klrl_edu.core.validation import check_count, check_number
from klrl_edu.models.contract import LanguageModel, enumerate_support
from klrl_edu.testing import ledger

__tracebackhide__ = True  # pytest shows the line that asserts, and no frame of this module

FALSE_ALARM = 1e-9
MISS = 1e-6  # the probability of missing a bias as large as the one that an assertion states
_RARE = 10.0  # sequences expected less often are counted together
_ROUNDING = 1e-12  # of the largest value: two exact sums of the same numbers differ by less

Array = NDArray[Any]


class Sampler(Protocol):
    """sampler(n, draw=draw) -> tokens [n,T]: `model.sample`, or a function of one's own."""

    def __call__(self, n: int, *, draw: Draw) -> Tensor: ...


def run_draw() -> Draw:
    """A `Draw` from the seed of the run: --klrl-seed under pytest, otherwise 0."""
    return seeded_draw(ledger.run.seed)


# --- counts ---------------------------------------------------------------------------------------


def assert_samples_from(
    sampler: LanguageModel | Sampler | Tensor,
    model: LanguageModel | None = None,
    *,
    n: int = 20_000,
    draw: Draw | None = None,
    prompt: Tensor | None = None,
    false_alarm: float = FALSE_ALARM,
) -> None:
    """Independent samples have the model's distribution over whole sequences, by (1).

    Args:
        sampler: a model, whose `sample` is meant; a function called as sampler(n, draw=draw) ->
            tokens [n,T]; or the tokens themselves, drawn independently.
        model: the distribution they should have; its support is enumerated. By default the model
            that samples.
        n: how many to draw; ignored where tokens are given.
        draw: the randomness; by default the run's seed.
        prompt: [S] of the model, or None.
        false_alarm: δ, the probability that samples of the model itself fail.

    Raises:
        AssertionError: a sequence of mass zero, or a count that (1) refuses.
        TooLargeError: the support cannot be enumerated.
        InputError: no model to hold them against, or no samples.
    """
    _check_false_alarm(false_alarm)
    tokens = _drawn(sampler, check_count(n, "n"), run_draw() if draw is None else draw, prompt)
    model = sampler if model is None and isinstance(sampler, LanguageModel) else model
    if model is None:
        raise InputError(
            "model is missing: only a model that samples itself says what its samples should be;"
            " pass assert_samples_from(sampler, model)."
        )
    support = enumerate_support(model, prompt=prompt)
    index = _index_in(support.tokens, model.space.check_tokens(tokens, "samples"))
    if not len(tokens):
        raise InputError("samples hold no sequence, and nothing is from any model; give some.")
    probs = support.log_weights.exp().cpu().numpy()
    bins = _bins(probs, len(tokens))
    mass = np.bincount(bins, probs)
    limits = count_limits(len(tokens), mass, false_alarm)
    detectable = detectable_mass(len(tokens), mass, limits)
    ledger.run.record(
        "assert_samples_from",
        false_alarm=limits.false_alarm,
        detectable=detectable,
        unit="of mass in a bin",
    )
    claim = _claim(limits.false_alarm, f"a bin's mass off by more than {detectable:.3g}")
    stray = (index < 0).nonzero()
    assert not len(stray), (
        f"sample {int(stray[0])} is {model.space.decode(tokens[stray[0]])[0]!r}, which has mass 0"
        f" under {type(model).__name__} ({len(stray)} of {len(tokens):,} samples have); no such"
        f" sample is allowed. Remedy: look where the sampler forgets a −inf.{claim}"
    )
    counts = np.bincount(bins[index.cpu().numpy()], minlength=len(mass))
    outside = (counts < limits.low) | (counts > limits.high)
    # named is the bin that is furthest off in standard deviations, which go with √mass
    surprise = np.abs(counts / len(tokens) - mass) / np.sqrt(mass)
    k = int(np.argmax(np.where(outside, surprise, 0)))
    members = model.space.decode(support.tokens[torch.as_tensor(bins == k)])
    name = repr(members[0])
    if members[1:]:
        name += f" (and {len(members) - 1} rare ones beside it)"
    assert not outside.any(), (
        f"{len(tokens):,} samples are not from {type(model).__name__}: {name} came {counts[k]:,}"
        f" times, a share of {counts[k] / len(tokens):.6g}; expected {mass[k]:.6g}, between"
        f" {limits.low[k]:,.0f} and {limits.high[k]:,.0f} times ({outside.sum()} of {len(mass)}"
        " bins are outside). Remedy: compare the sampler's conditionals with"
        f" conditional_log_probs(model, tokens), position by position.{claim}"
    )


def _drawn(
    sampler: LanguageModel | Sampler | Tensor, n: int, draw: Draw, prompt: Tensor | None
) -> Tensor:
    """The samples as tokens [n,T], drawn unless they are given."""
    if isinstance(sampler, Tensor):
        return sampler
    if isinstance(sampler, LanguageModel):
        return sampler.sample(n, draw=draw, prompt=prompt)
    return sampler(n, draw=draw)


class CountLimits(NamedTuple):
    """The counts that (1) accepts, low ≤ c ≤ high [K], and the exact probability, summed over bins,
    that one is outside.
    """

    low: Array
    high: Array
    false_alarm: float


def count_limits(n: int, mass: Array, false_alarm: float) -> CountLimits:
    """The limits of (1) for n samples in bins of mass [K].

    The binomial is discrete, so what is left outside is less than δ, and is summed exactly.
    """
    mass = np.minimum(mass, 1.0)  # a sum of probabilities may round to a little more
    level = _check_false_alarm(false_alarm) / (2 * len(mass))
    # (1) refuses a count whose tail is no more likely than the level; a count at which the tail
    # just meets it is refused too, hence the step by one
    low = stats.binom.ppf(level, n, mass)  # the smallest c with P(C ≤ c) ≥ level
    low = np.where(stats.binom.cdf(low, n, mass) <= level, low + 1, low)
    high = stats.binom.isf(level, n, mass)  # the smallest c with P(C > c) ≤ level
    high = np.where(stats.binom.sf(high - 1, n, mass) <= level, high - 1, high)
    outside = stats.binom.cdf(low - 1, n, mass) + stats.binom.sf(high, n, mass)
    return CountLimits(low, high, math.fsum(outside))


def detectable_mass(n: int, mass: Array, limits: CountLimits) -> float:
    """The smallest Δ such that a bin whose mass is off by more than Δ, up or down, passes with
    probability below 1e-6.

    Where no count is too high or too low, Δ is all that a mass can move that way. By the beta form
    of the binomial tails, P(C ≤ c | p) = 1 − I_p(c + 1, n − c) (Clopper and Pearson 1934).
    """
    low, high = limits.low, limits.high
    # the mass `up` at which P(C ≤ high) = 1e-6, and `down` at which P(C ≥ low) = 1e-6
    up = stats.beta.ppf(1 - MISS, high + 1, np.maximum(n - high, 1))
    down = stats.beta.ppf(MISS, np.maximum(low, 1), n - low + 1)
    up, down = np.where(high < n, up, 1.0), np.where(low > 0, down, 0.0)
    return float(max((up - mass).max(), (mass - down).max()))


def _bins(probs: Array, n: int) -> Array:
    """Which bin each supported sequence [S] is counted in: its own, or one that it shares with rare
    neighbours in lexicographic order.

    Neighbours share a prefix, so that a fault in one conditional is not averaged away. The first
    bins are those of the rare ones.
    """
    rare = n * probs < _RARE
    bins = np.zeros(len(probs), dtype=np.int64)
    if rare.any():
        bins[rare] = _pieces(n * probs[rare])
    first_free = bins.max() + 1 if rare.any() else 0
    bins[~rare] = np.arange((~rare).sum()) + first_free
    return bins


def _pieces(expected: Array) -> Array:
    """Which piece each of the counts [R] falls in, cut so that every piece expects from _RARE to
    3·_RARE, or all of them less.
    """
    cumulative, done, ends = np.cumsum(expected), 0.0, []
    while cumulative[-1] - done >= 2 * _RARE:
        ends.append(int(np.searchsorted(cumulative, done + _RARE)) + 1)
        done = cumulative[ends[-1] - 1]
    return np.searchsorted(ends, np.arange(len(expected)), side="right")


def _index_in(support: Tensor, tokens: Tensor) -> Tensor:
    """The row of `support` [S,T] that each of `tokens` [n,T] is -> [n]; −1 where there is none."""
    # sorted together, a sample and its row of the support get the same number
    both = torch.cat([support, tokens.to(support)])
    distinct, inverse = torch.unique(both, dim=0, return_inverse=True)
    row = torch.full((len(distinct),), -1, dtype=torch.long, device=support.device)
    row[inverse[: len(support)]] = torch.arange(len(support), device=support.device)
    return row[inverse[len(support) :]]


# --- means ----------------------------------------------------------------------------------------


def assert_mean_is(
    samples: Tensor,
    expected: float,
    *,
    sigma: float,
    value_range: tuple[float, float],
    false_alarm: float = FALSE_ALARM,
) -> None:
    """Independent samples have the expected mean, by (2).

    Args:
        samples: [n], independent, in any unit.
        expected: μ.
        sigma: the standard deviation of one sample, enumerated, never estimated from the samples;
            above 0, as a constant is no matter of chance.
        value_range: (lowest, highest) value that a sample can have, enumerated too.
        false_alarm: δ, the probability that samples of mean μ, standard deviation `sigma` and this
            range fail.

    Raises:
        AssertionError: the mean is further off than (2) allows, or a sample is outside the range.
        InputError: `expected` is outside the range, `sigma` is 0, negative or larger than the range
            allows.
    """
    if isinstance(samples, Tensor) and samples.is_complex():
        raise InputError(f"samples is a tensor of {samples.dtype}; expected real numbers [n].")
    samples = as_numbers(samples, "samples")
    if samples.ndim != 1 or not len(samples):
        raise InputError(
            f"samples has shape {list(samples.shape)}; expected [n] with n at least 1."
        )
    n, (lowest, highest) = len(samples), _check_range(value_range)
    limits = mean_limits(n, expected, sigma, value_range, false_alarm)
    detectable = detectable_shift(n, expected, sigma, value_range, false_alarm)
    ledger.run.record(
        "assert_mean_is", false_alarm=false_alarm, detectable=detectable, unit="of the mean"
    )
    claim = _claim(false_alarm, f"a mean off by more than {detectable:.3g} with this σ and range")
    values = samples.detach().double().cpu()
    rounding = _ROUNDING * max(abs(lowest), abs(highest))
    inside = (values >= lowest - rounding) & (values <= highest + rounding)
    assert bool(inside.all()), (
        f"samples[{int((~inside).nonzero()[0])}] = {float(values[~inside][0]):.17g} is outside the"
        f" enumerated range [{lowest:.17g}, {highest:.17g}]. Remedy: enumerate the range of the"
        f" very function that is sampled.{claim}"
    )
    mean = math.fsum(values.tolist()) / n
    assert limits[0] - rounding <= mean <= limits[1] + rounding, (
        f"the mean of {n:,} samples is {mean:.9g}; expected {expected:.9g}, between {limits[0]:.9g}"
        f" and {limits[1]:.9g} (σ = {sigma:.6g}). Remedy: audit the estimator exactly"
        f" (audit_gradient, audit_value) to see what it follows.{claim}"
    )


def mean_limits(
    n: int, expected: float, sigma: float, value_range: tuple[float, float], false_alarm: float
) -> tuple[float, float]:
    """Where (2) keeps the mean of n samples, with δ/2 on each side."""
    lowest, highest = _check_range(value_range)
    expected = check_number(expected, "expected", "a finite number", math.isfinite)
    if not lowest <= expected <= highest:
        raise InputError(
            f"expected = {expected!r} is outside value_range = {value_range!r}; a mean lies between"
            " the lowest and the highest value."
        )
    sigma = check_number(sigma, "sigma", "a number above 0", lambda value: True)
    if sigma == 0:
        raise InputError(
            "sigma = 0: a constant is no matter of chance; compare the samples with it directly:"
            " torch.allclose(samples, expected)."
        )
    largest = highest / 2 - lowest / 2  # halved first: the range of two floats may overflow
    if not 0 < sigma <= largest * (1 + _ROUNDING):  # Popoviciu
        raise InputError(
            f"sigma = {sigma!r} is impossible: a standard deviation is between 0 and half the"
            f" range, {largest!r}."
        )
    level = _check_false_alarm(false_alarm) / 2
    return (
        expected - bernstein_deviation(n, sigma, expected - lowest, level),
        expected + bernstein_deviation(n, sigma, highest - expected, level),
    )


def detectable_shift(
    n: int, expected: float, sigma: float, value_range: tuple[float, float], false_alarm: float
) -> float:
    """The smallest shift of the mean that fails with probability at least 1 − 1e-6, for samples of
    no larger σ and the same range.

    The mean must be further off than the limit by what (2) allows the other way.
    """
    low, high = mean_limits(n, expected, sigma, value_range, false_alarm)
    lowest, highest = value_range
    # wherever the true mean lies, a sample exceeds it by the whole range at most
    other_way = bernstein_deviation(n, sigma, highest - lowest, MISS)
    return max(high - expected, expected - low) + other_way


def bernstein_deviation(n: int, sigma: float, largest: float, probability: float) -> float:
    """σ√(2t/n) + bt/3n with t = log 1/probability: the mean of n independent values exceeds its
    expectation by more at most so often.

    Args:
        sigma: the standard deviation of one value.
        largest: b, the most by which a value can exceed its expectation.

    Source: (2), one side.
    """
    t = -math.log(probability)
    return sigma * math.sqrt(2 * t / n) + largest * t / (3 * n)


def _check_false_alarm(false_alarm: float) -> float:
    rule = "above 0 and below 1, such as 1e-9"
    return check_number(false_alarm, "false_alarm", rule, lambda value: 0 < value < 1)


def _check_range(value_range: tuple[float, float]) -> tuple[float, float]:
    """(lowest, highest), finite numbers in order."""
    if not isinstance(value_range, Sequence) or len(value_range) != 2:
        raise InputError(
            f"value_range is {describe(value_range)}; expected (lowest, highest), enumerated."
        )
    rule = "finite, so that no sample can carry the mean away"
    lowest, highest = (
        check_number(value, f"value_range[{k}]", rule, math.isfinite)
        for k, value in enumerate(value_range)
    )
    if lowest > highest:
        raise InputError(f"value_range = {value_range!r} must be (lowest, highest), in this order.")
    return lowest, highest


def _claim(false_alarm: float, bias: str) -> str:
    return (
        f"\nFalse-alarm probability {false_alarm:.2g}; finds {bias} with probability 1 − {MISS:g}."
    )
