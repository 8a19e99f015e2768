"""Sampled moments: the interval of Maurer and Pontil holds, needs a range, and is never entered
silently.
"""

import math

import pytest
import torch

from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.audit.monte_carlo import FAILURE_PROBABILITY, sampled_moments
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import InputError
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from tests.audit.scenes import answers, answers_policy, batch_mean_baseline, k2_loss


def sampled(loss, count=20_000, **options):
    options = {"monte_carlo": count, "draw": seeded_draw(0), "bound": 8.0, **options}
    return audit_gradient(loss, answers_policy(), answers(), **options)


def test_the_interval_holds_the_exact_mean():
    """False alarm below 1e-6 a run, by the theorem itself."""
    for loss, size in ((losses.reinforce, 1), (losses.rloo, 3), (k2_loss, 2)):
        exact, drawn = (
            audit_gradient(loss, answers_policy(), answers(), batch_size=size),
            sampled(loss, batch_size=size),
        )
        assert bool(((drawn.mean - exact.mean).abs() <= drawn.interval).all())
        assert float(drawn.interval.max()) < 0.1
        assert drawn.variance == pytest.approx(exact.variance, rel=0.1)
        assert drawn.executions == 20_000
        assert drawn.failure_probability == FAILURE_PROBABILITY
    assert (
        "rloo is consistent with objective, as far as 20,000 draws tell"
        in sampled(losses.rloo, batch_size=3).verdict
    )


def test_a_bias_larger_than_the_interval_is_certain():
    report = sampled(lambda batch: 5 * batch_mean_baseline(batch), batch_size=2, bound=40.0)
    assert "is biased for all targets, certain but for 1e-06; nearest is" in report.verdict
    assert report.to_dict()["exact"] is False
    assert "20,000 batches drawn" in str(report)


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
        ({"monte_carlo": 10, "bound": 1.0}, r"draw=seeded_draw\(0\)"),
        ({"monte_carlo": 10, "draw": seeded_draw(0)}, "without a range no interval holds"),
        ({"monte_carlo": 1, "draw": seeded_draw(0), "bound": 1.0}, "at least 2"),
        ({"monte_carlo": 10, "draw": seeded_draw(0), "bound": math.inf}, "positive number"),
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
    assert report.probability_negative == pytest.approx(
        exact.probability_negative, abs=0.02
    )  # five standard errors

    def coin(batch, draw):
        return k2_loss(batch) * draw(torch.tensor([[0.5, 0.5]]).double().log()).sum()

    drawn, whole = sampled(coin, count=2000), audit_gradient(coin, answers_policy(), answers())
    assert bool(((drawn.mean - whole.mean).abs() <= drawn.interval).all())
