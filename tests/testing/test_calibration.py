"""How often each statistical assertion is wrong when everything is right, and when a bias of the
stated size is there: 200,000 repetitions each.

    python dev.py test -m calibration

Levels are large enough to be seen (δ = 0.05, δ = 0.01); the observed rate may exceed δ only by what
the binomial allows with probability 1e-9. Repetitions are drawn as counts, all at once.
"""

import math

import numpy as np
import pytest
from scipy import stats

from klrl_edu.testing.statistical import (
    MISS,
    count_limits,
    detectable_mass,
    detectable_shift,
    mean_limits,
)

REPETITIONS = 200_000
N = 1000  # samples a repetition
RARE = np.array([1 / N, *[(1 - 1 / N) / 2] * 2])
HEAVY = np.array(
    [N / 2, 0.4, 0.6]
)  # importance weights π*/q: E_q[w] is close to 1, and half of it comes once in N samples
HEAVY = HEAVY / float(RARE @ HEAVY)  # now it is 1
COUNTED = {
    "two even bins": [0.5, 0.5],
    "four sentences": [0.5, 0.2, 0.1, 0.2],
    "forty bins": [1 / 40] * 40,
    "one rare bin": [1 / N, 1 - 1 / N],
    "geometric": [2.0**-k for k in range(1, 12)] + [2.0**-11],
}
AVERAGED = {
    "a fair coin": ([0.5, 0.5], [0.0, 1.0]),
    "a rare coin": ([0.01, 0.99], [1.0, 0.0]),
    "k1 on four sentences": (
        [0.5, 0.2, 0.1, 0.2],
        [math.log(5 / 4), math.log(2 / 3), math.log(1 / 2), math.log(2)],
    ),
    "heavy-tailed importance weights": (RARE, HEAVY),
}
calibration = pytest.mark.calibration


def repeated(probs):
    """Counts [repetitions, K] of N samples each, seed 0."""
    return np.random.default_rng(0).multinomial(N, probs, size=REPETITIONS)


def check_rate(failures, false_alarm):
    """At most what Binomial(repetitions, δ) exceeds with probability 1e-9; prints the rate (`-s`
    shows it).
    """
    print(f"observed {failures.mean():.3g}, stated {false_alarm:.3g}")
    assert failures.sum() <= stats.binom.isf(1e-9, len(failures), false_alarm)


@calibration
@pytest.mark.parametrize("false_alarm", [0.05, 0.01])
@pytest.mark.parametrize("name", COUNTED)
def test_counts_of_the_right_distribution_fail_no_more_often_than_stated(name, false_alarm):
    mass = np.array(COUNTED[name])
    limits = count_limits(N, mass, false_alarm)
    counts = repeated(mass)
    failures = ((counts < limits.low) | (counts > limits.high)).any(-1)
    check_rate(failures, limits.false_alarm)  # the attained level, which is at most δ


@calibration
@pytest.mark.parametrize("name", ["two even bins", "four sentences", "one rare bin"])
def test_counts_off_by_the_stated_mass_pass_once_in_a_million(name):
    mass = np.array(COUNTED[name])
    limits = count_limits(N, mass, 0.01)
    shift = detectable_mass(N, mass, limits)
    moved = mass + np.array([shift, *[-shift / (len(mass) - 1)] * (len(mass) - 1)])
    counts = repeated(np.clip(moved, 0, None) / np.clip(moved, 0, None).sum())
    check_rate(((counts >= limits.low) & (counts <= limits.high)).all(-1), MISS)


@calibration
@pytest.mark.parametrize("false_alarm", [0.05, 0.01])
@pytest.mark.parametrize("name", AVERAGED)
def test_means_of_the_right_distribution_fail_no_more_often_than_stated(name, false_alarm):
    probs, values = map(np.array, AVERAGED[name])
    expected = float(probs @ values)
    sigma = math.sqrt(probs @ (values - expected) ** 2)
    low, high = mean_limits(N, expected, sigma, (values.min(), values.max()), false_alarm)
    means = repeated(probs) @ values / N
    check_rate((means < low) | (means > high), false_alarm)


@calibration
def test_means_off_by_the_stated_shift_pass_less_than_once_in_a_million():
    """A coin of ½, moved by the stated shift with σ = ½, which no coin exceeds."""
    low, high = mean_limits(N, 0.5, 0.5, (0.0, 1.0), 0.01)
    moved = 0.5 + detectable_shift(N, 0.5, 0.5, (0.0, 1.0), 0.01)
    means = repeated([moved, 1 - moved])[:, 0] / N
    check_rate((means >= low) & (means <= high), MISS)
    assert stats.binom.cdf(math.floor(high * N), N, moved) <= MISS


@calibration
def test_a_t_test_at_a_billionth_is_wrong_once_in_e_times_on_importance_weights():
    """Where the rare sequence did not come, (1 − 1/n)^n = 0.368 of the time, the sample has almost
    no variance and mean 1/2: t is huge.

    Bernstein's inequality with the enumerated σ, on the very same samples, is never wrong.
    """
    counts = repeated(RARE)
    means = counts @ HEAVY / N
    deviations = np.sqrt((counts @ HEAVY**2 / N - means**2) * N / (N - 1))
    p_values = 2 * stats.t.sf(np.abs(means - 1) / (deviations / math.sqrt(N)), N - 1)
    rate = float((p_values < 1e-9).mean())
    missed = (1 - 1 / N) ** N
    print(
        f"t-test at 1e-9: {rate:.4f} of the runs refused; the rare sequence is missed in"
        f" {missed:.4f}"
    )
    assert abs(rate - missed) < 6 * math.sqrt(missed * (1 - missed) / REPETITIONS)
    sigma = math.sqrt(RARE @ (HEAVY - 1) ** 2)
    low, high = mean_limits(N, 1.0, sigma, (HEAVY.min(), HEAVY.max()), 1e-9)
    assert not ((means < low) | (means > high)).any()
