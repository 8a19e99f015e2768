"""Limits, error probabilities and refusals of the statistical assertions, against exact binomial
tails.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.ngram import NGramModel
from klrl_edu.models.table import SequenceTable
from klrl_edu.testing import assert_mean_is, assert_samples_from, ledger
from klrl_edu.testing.statistical import (
    MISS,
    _bins,
    bernstein_deviation,
    count_limits,
    detectable_mass,
    detectable_shift,
    mean_limits,
)

MASSES = [[1.0], [0.5, 0.5], [0.2, 0.3, 0.5], [1e-9, 1 - 1e-9], [1e-3, 0.0, 0.999], [1 / 40] * 40]
COIN = SequenceTable.from_texts({"head": 0.3, "tail": 0.7})


@pytest.fixture(autouse=True)
def entries(monkeypatch):
    """A ledger of its own: what is refused here on purpose is no risk of the suite."""
    monkeypatch.setattr(ledger, "run", ledger.Ledger())
    return ledger.run.entries


def tosses(heads, n):
    return COIN.space.encode(["head"] * heads + ["tail"] * (n - heads))


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("n", [1, 20, 1000, 20_000])
@pytest.mark.parametrize("false_alarm", [1e-9, 0.05, 0.9])
def test_the_limits_are_the_tightest_whose_tails_stay_below_their_share(mass, n, false_alarm):
    """P(C < low) and P(C > high) are at most δ/2K by the binomial's own tails, and one count
    tighter would not be.
    """
    mass = np.array(mass)
    low, high, attained = count_limits(n, mass, false_alarm)
    share = false_alarm / (2 * len(mass))
    below, above = stats.binom.cdf(low - 1, n, mass), stats.binom.sf(high, n, mass)
    assert (below <= share).all()
    assert (above <= share).all()
    assert (stats.binom.cdf(low, n, mass) > share).all()
    assert (stats.binom.sf(high - 1, n, mass) > share).all()
    assert attained == pytest.approx(float((below + above).sum()), rel=1e-12)
    assert attained <= false_alarm


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("n", [1, 20, 1000, 20_000])
def test_a_mass_off_by_more_than_the_stated_bias_passes_less_than_once_in_a_million(mass, n):
    mass = np.array(mass)
    limits = count_limits(n, mass, 1e-9)
    shift = detectable_mass(n, mass, limits) * (1 + 1e-9)
    tightest = 0.0
    for moved in (mass + shift, mass - shift):
        possible = (moved >= 0) & (moved <= 1)
        p = np.clip(moved, 0, 1)
        passes = stats.binom.cdf(limits.high, n, p) - stats.binom.cdf(limits.low - 1, n, p)
        assert (passes[possible] <= MISS).all()
        tightest = max(tightest, float(passes[possible].max(initial=0.0)))
    assert tightest == 0.0 or tightest == pytest.approx(
        MISS, rel=2e-3
    )  # no smaller bias could be stated


def test_the_assertion_refuses_exactly_the_counts_outside_the_limits():
    (low, _), (high, _), _ = count_limits(500, np.array([0.3, 0.7]), 1e-3)
    for heads, fine in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
        if fine:
            assert_samples_from(tosses(int(heads), 500), COIN, false_alarm=1e-3)
        else:
            with pytest.raises(
                AssertionError,
                match=(
                    rf"500 samples are not from SequenceTable: 'head' came {heads:.0f}"
                    r" times.*expected 0\.3"
                ),
            ):
                assert_samples_from(tosses(int(heads), 500), COIN, false_alarm=1e-3)


def test_rare_neighbours_share_a_bin_of_about_ten_and_the_rest_have_their_own():
    probs = np.array([0.3, *[0.0005] * 100, 0.2, *[0.0005] * 900])
    bins = _bins(probs, 10_000)
    counts, members = np.bincount(bins, probs * 10_000), np.bincount(bins)
    assert sorted(counts[members == 1]) == pytest.approx([2000, 3000])
    assert counts[members > 1].min() >= 10
    assert counts[members > 1].max() < 30
    for k in np.flatnonzero(members > 1):
        rare = np.delete(np.arange(len(probs)), [0, 101])
        inside = np.flatnonzero(np.isin(rare, np.flatnonzero(bins == k)))
        assert (np.diff(inside) == 1).all()  # neighbours


def test_a_few_rare_sequences_make_one_bin():
    assert _bins(np.array([0.5, 1e-4, 0.4998, 1e-4]), 1000).tolist() == [1, 0, 2, 0]


def test_a_sample_without_mass_is_refused_by_name():
    table = SequenceTable.from_texts({"head": 0.5, "tail": 0.5, "edge": 0.0})
    tokens = torch.cat([table.sample(50, draw=seeded_draw(0)), table.space.encode(["edge"])])
    with pytest.raises(
        AssertionError,
        match=r"sample 50 is 'edge', which has mass 0 under SequenceTable \(1 of 51 samples",
    ):
        assert_samples_from(tokens, table)
    with pytest.raises(AssertionError, match="'edge', which has mass 0"):
        assert_samples_from(table.space.encode(["edge"]), table)


def test_tokens_outside_the_space_and_spaces_too_large_are_refused():
    with pytest.raises(InputError, match="samples"):
        assert_samples_from(torch.tensor([[7]]), COIN)
    with pytest.raises(InputError, match="n = 0"):
        assert_samples_from(COIN.sample, COIN, n=0)
    with pytest.raises(InputError, match="false_alarm = 0"):
        assert_samples_from(COIN.sample, COIN, false_alarm=0)
    with pytest.raises(TooLargeError):
        assert_samples_from(
            torch.zeros(5, 50, dtype=torch.long),
            NGramModel(SequenceSpace(tuple(map(str, range(1100))), 50, eos=False), 1),
        )


def test_a_model_alone_is_held_against_its_own_distribution():
    class Bent(SequenceTable):
        def sample(self, n, *, draw, prompt=None):
            return SequenceTable.from_texts({"head": 0.6, "tail": 0.4}, space=self.space).sample(
                n, draw=draw
            )

    table = SequenceTable.from_texts({"head": 0.5, "tail": 0.5})
    assert_samples_from(table)
    bent = Bent(table.space, table.tokens, table.logits.detach())
    with pytest.raises(AssertionError, match="samples are not from Bent"):
        assert_samples_from(bent)
    assert_samples_from(
        bent, SequenceTable.from_texts({"head": 0.6, "tail": 0.4}, space=table.space)
    )
    with pytest.raises(InputError, match="model is missing"):
        assert_samples_from(table.sample)


def test_without_a_draw_samples_come_from_the_seed_of_the_run(monkeypatch):
    seen = []

    def sampler(n, *, draw):
        seen.append(COIN.sample(n, draw=draw))
        return seen[-1]

    assert_samples_from(sampler, COIN, n=100)
    monkeypatch.setattr(ledger.run, "seed", 12)
    assert_samples_from(sampler, COIN, n=100)
    assert_samples_from(sampler, COIN, n=100, draw=seeded_draw(12))
    assert torch.equal(seen[0], COIN.sample(100, draw=seeded_draw(0)))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


def test_each_assertion_is_written_down_with_its_error_probabilities_even_when_it_fails(
    entries, request
):
    assert_samples_from(tosses(300, 1000), COIN)
    with pytest.raises(AssertionError):
        assert_samples_from(tosses(900, 1000), COIN)
    assert_mean_is(torch.tensor([0.0, 1.0]), 0.5, sigma=0.5, value_range=(0, 1), false_alarm=1e-3)
    assert [entry.assertion for entry in entries] == [
        "assert_samples_from",
        "assert_samples_from",
        "assert_mean_is",
    ]
    assert 0 < entries[0].false_alarm <= 1e-9
    assert entries[2].false_alarm == 1e-3
    assert all(entry.detectable > 0 and entry.test == request.node.nodeid for entry in entries)


# --- means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("n", [5, 100, 10_000])
@pytest.mark.parametrize("false_alarm", [1e-9, 1e-2, 0.5])
def test_bernsteins_limits_hold_for_coins_by_the_binomial_itself(p, n, false_alarm):
    sigma = math.sqrt(p * (1 - p))
    low, high = mean_limits(n, p, sigma, (0.0, 1.0), false_alarm)
    counts = np.arange(n + 1)
    outside = (counts / n < low) | (counts / n > high)
    assert stats.binom.pmf(counts[outside], n, p).sum() <= false_alarm


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("n", [1000, 100_000])
def test_a_mean_off_by_the_stated_shift_passes_less_than_once_in_a_million(p, n):
    """Coins again; a shifted coin has another σ, so σ is given as the larger of the two (σ ≤ ½
    always serves).
    """
    for direction in (1, -1):
        sigma = 0.5
        moved = p + direction * detectable_shift(n, p, sigma, (0.0, 1.0), 1e-9)
        if not 0 <= moved <= 1:
            continue
        low, high = mean_limits(n, p, sigma, (0.0, 1.0), 1e-9)
        passes = stats.binom.cdf(math.floor(high * n), n, moved) - stats.binom.cdf(
            math.ceil(low * n) - 1, n, moved
        )
        assert passes <= MISS


def test_the_deviation_is_theorem_2_10():
    assert bernstein_deviation(50, 2.0, 3.0, math.exp(-4.0)) == pytest.approx(
        2 * math.sqrt(8 / 50) + 3 * 4 / 150, rel=1e-15
    )


def test_a_mean_outside_its_limits_is_refused_with_both_numbers():
    with pytest.raises(
        AssertionError,
        match=(
            r"the mean of 1,000 samples is 0\.9; expected 0\.5, between 0\.\d+ and 0\.\d+ \(σ ="
            r" 0\.5\)"
        ),
    ) as caught:
        assert_mean_is(
            torch.tensor([1.0] * 900 + [0.0] * 100), 0.5, sigma=0.5, value_range=(0.0, 1.0)
        )
    assert "False-alarm probability 1e-09; finds a mean off by more than 0." in str(caught.value)
    assert "Remedy: " in str(caught.value)


def test_a_value_outside_the_enumerated_range_and_a_nan_are_refused():
    for stray in (1.5, -0.5, math.nan):
        with pytest.raises(
            AssertionError, match=r"samples\[1\] = .* is outside the enumerated range \[0, 1\]"
        ):
            assert_mean_is(torch.tensor([0.5, stray]), 0.5, sigma=0.5, value_range=(0, 1))


def test_a_constant_is_no_matter_of_chance():
    for value_range in ((0.0, 0.0), (-1.0, 1.0)):
        with pytest.raises(InputError, match=r"sigma = 0: .* compare the samples with it directly"):
            assert_mean_is(torch.zeros(9), 0.0, sigma=0, value_range=value_range)


def test_no_samples_at_all_are_from_no_model():
    with pytest.raises(InputError, match="samples hold no sequence"):
        assert_samples_from(COIN.sample(1, draw=seeded_draw(0))[:0], COIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expected": 1.5}, r"expected = 1\.5 is outside value_range"),
        ({"sigma": 0.6}, r"sigma = 0\.6 is impossible: .* half the range, 0\.5"),
        ({"sigma": -0.1}, "is impossible"),
        ({"sigma": math.nan}, "is impossible"),
        ({"false_alarm": 1.0}, r"false_alarm = 1\.0 must be above 0 and below 1"),
        ({"samples": torch.zeros(0)}, r"shape \[0\]"),
        ({"samples": torch.zeros(2, 2)}, r"shape \[2, 2\]; expected \[n\]"),
    ],
)
def test_impossible_moments_are_refused(change, message):
    given = {
        "samples": torch.zeros(3),
        "expected": 0.5,
        "sigma": 0.5,
        "value_range": (0.0, 1.0),
        **change,
    }
    with pytest.raises(InputError, match=message):
        assert_mean_is(given.pop("samples"), given.pop("expected"), **given)
