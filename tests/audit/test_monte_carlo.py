"""Sampled moments: distances without bias and with an error, the interval of Maurer and Pontil,
and nothing is sampled silently.
"""

import itertools
import math

import pytest
import torch

from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.audit.monte_carlo import FAILURE_PROBABILITY, sampled_moments, squared_distance
from klrl_edu.audit.report import AuditReport
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import InputError
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from klrl_edu.learning.batches import needs
from tests.audit.scenes import (
    answers,
    answers_policy,
    batch_mean_baseline,
    k2_loss,
    log_ratio,
)


def sampled(loss, count=20_000, **options):
    options = {"monte_carlo": count, "draw": seeded_draw(0), **options}
    return audit_gradient(loss, answers_policy(), answers(), **options)


# --- distances without a range --------------------------------------------------------------------


def test_the_squared_distance_is_unbiased_over_every_outcome():
    """Three parts of one draw each from three points: all 27 outcomes, where ‖ḡ − t‖² has the
    noise on top.
    """
    points = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    target = torch.tensor([0.3, -0.2], dtype=torch.float64)
    exact = float((probs @ points - target).square().sum())
    mean, plain = 0.0, 0.0
    for rows in itertools.product(range(3), repeat=3):
        weight, apart = float(probs[list(rows)].prod()), points[list(rows)] - target
        mean += weight * squared_distance(apart)[0]
        plain += weight * float(apart.mean(0).square().sum())
    assert mean == pytest.approx(exact, rel=1e-14)
    assert plain > 1.5 * exact


def test_the_error_is_that_of_leaving_out_each_part():
    apart = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5

    def by_loop(rows):
        pairs = [(k, m) for k in rows for m in rows if k != m]
        return sum(float(apart[k] @ apart[m]) for k, m in pairs) / len(pairs)

    each = [by_loop([k for k in range(6) if k != left]) for left in range(6)]
    mean = sum(each) / 6
    error = math.sqrt(5 / 6 * sum((one - mean) ** 2 for one in each))
    assert squared_distance(apart) == pytest.approx((by_loop(range(6)), error), rel=1e-12)


def test_intervals_hold_the_exact_distances():
    """Seed 0; 27 intervals of confidence 99.9 %, so a false alarm has probability 0.027 at most,
    were the seed drawn.
    """
    for loss, size in ((losses.reinforce, 1), (losses.rloo, 3), (k2_loss, 2)):
        exact = audit_gradient(loss, answers_policy(), answers(), batch_size=size)
        drawn = sampled(loss, batch_size=size)
        intervals = {**drawn.distances, "0": drawn.size}
        distances = {**exact.bias, "0": float(exact.mean.norm())}
        for name, (low, high) in intervals.items():
            assert low <= distances[name] + 1e-12
            assert distances[name] <= high
        assert drawn.variance == pytest.approx(exact.variance, rel=0.1)
        assert (drawn.executions, drawn.exact) == (20_000, False)
        off = (drawn.mean - exact.mean).abs() / drawn.standard_error
        assert float(off.max()) < 6  # standard errors from 20 parts


def test_the_verdict_of_a_sample_ranks_the_targets():
    report = sampled(losses.rloo, batch_size=3)
    assert report.verdict.startswith("rloo may be unbiased for objective (off by at most 0.018")
    assert "as far as 20,000 draws tell; next expected_reward (off by 0.32" in report.verdict
    biased = sampled(batch_mean_baseline, batch_size=3).verdict
    assert biased.startswith("batch_mean_baseline is biased for all targets")
    assert "nearest first: objective (off by 0.3" in biased

    def k1_loss(batch):
        return log_ratio(batch).mean()

    assert "do not tell from 0" in sampled(k1_loss, count=2000).verdict
    assert report.to_dict()["exact"] is False
    assert "20,000 batches drawn" in str(report)


def test_two_losses_of_one_seed_see_the_same_batches(tmp_path):
    """So their difference is seen far below the noise of either."""

    def nearly(batch):
        return losses.rloo(batch) * 1.001

    report = sampled(nearly, count=2000, batch_size=3, against=losses.rloo)
    low, high = report.distances["the mean of rloo"]
    size = float(report.targets["the mean of rloo"].norm())
    assert low > 0.0005 * size
    assert high < 0.002 * size
    again = sampled(losses.rloo, count=2000, batch_size=3)
    assert torch.equal(again.mean, report.targets["the mean of rloo"])
    again.save(tmp_path / "drawn.json")
    assert AuditReport.load(tmp_path / "drawn.json").to_dict() == again.to_dict()

    @needs("support")
    def itself(batch):
        return losses.exact(batch)

    beside = sampled(losses.rloo, count=2000, batch_size=3, against=itself)
    assert torch.allclose(beside.targets["itself"], beside.targets["objective"], rtol=0, atol=1e-12)


def test_order_may_mean_something_in_batches_that_are_drawn():
    def first(batch):
        return -(batch.rewards.sum(-1) * batch.log_probs.sum(-1))[0]

    report = sampled(first, batch_size=2)
    assert "may be unbiased for expected_reward" in report.verdict


# --- the interval of every distribution -----------------------------------------------------------


def test_the_interval_holds_the_exact_mean():
    """False alarm below 1e-6 a run, by the theorem itself."""
    exact = audit_gradient(losses.rloo, answers_policy(), answers(), batch_size=3)
    drawn = sampled(losses.rloo, batch_size=3, bound=8.0)
    assert bool(((drawn.mean - exact.mean).abs() <= drawn.interval).all())
    assert float(drawn.interval.max()) < 0.1
    assert drawn.failure_probability == FAILURE_PROBABILITY


def test_the_half_width_by_hand():
    """n = 4 of one entry, ±1: V = 4/3, ln(4/δ)."""
    log_term = math.log(4 / FAILURE_PROBABILITY)
    found = sampled_moments(
        [torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([[1.0], [-1.0]]).double()], 2.0
    )
    assert float(found.interval) == pytest.approx(
        math.sqrt(2 * 4 / 3 * log_term / 4) + 14 * 2 * log_term / 9
    )
    assert (float(found.mean), found.variance, found.negative, found.draws) == (
        0,
        pytest.approx(4 / 3),
        0.5,
        4,
    )


def test_chunks_of_any_size_give_one_mean_and_variance():
    values = (
        torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    )
    whole = sampled_moments([values], 2e6)
    parts = sampled_moments(values.split(7), 2e6)
    assert torch.allclose(whole.mean, parts.mean, rtol=1e-15)
    assert whole.variance == pytest.approx(float(values.var(0).sum()), rel=1e-9)
    assert parts.variance == pytest.approx(whole.variance, rel=1e-9)


def test_an_entry_beyond_the_bound_is_refused():
    with pytest.raises(InputError, match=r"beyond bound = 0.01; give the largest there can be"):
        sampled(losses.reinforce, count=100, bound=0.01)


def test_what_sampling_needs_is_asked_for():
    for options, match in (
        ({"monte_carlo": 100, "bound": 1.0}, r"draw=seeded_draw\(0\)"),
        ({"monte_carlo": 39, "draw": seeded_draw(0), "bound": 1.0}, "at least 40"),
        ({"monte_carlo": 100, "draw": seeded_draw(0), "bound": math.inf}, "positive number"),
        ({"draw": seeded_draw(0)}, "give monte_carlo=n with them"),
    ):
        for audit, what in ((audit_gradient, k2_loss), (audit_value, kl_values.k1)):
            with pytest.raises(InputError, match=match):
                audit(what, answers_policy(), answers(), **options)
    with pytest.raises(InputError, match="reads the whole support"):
        sampled(losses.exact)


def test_values_and_draws_of_a_loss_are_sampled_too():
    report = audit_value(
        kl_values.k1,
        answers_policy(),
        answers(),
        batch_size=2,
        monte_carlo=20_000,
        draw=seeded_draw(0),
        bound=2.0,
    )
    exact = audit_value(kl_values.k1, answers_policy(), answers(), batch_size=2)
    assert abs(float(report.mean - exact.mean)) <= float(report.interval)
    low, high = report.distances["forward_kl"]
    assert 0 < low < abs(exact.bias["forward_kl"]) < high
    assert report.probability_negative == pytest.approx(
        exact.probability_negative, abs=0.02
    )  # five standard errors

    def coin(batch, draw):
        return k2_loss(batch) * draw(torch.tensor([[0.5, 0.5]]).double().log()).sum()

    drawn, whole = sampled(coin, count=2000), audit_gradient(coin, answers_policy(), answers())
    assert bool(((drawn.mean - whole.mean).abs() <= 6 * drawn.standard_error).all())
