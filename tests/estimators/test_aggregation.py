"""Four means over tokens, by hand and in expectation."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.audit.claims.catalogue import answers_case
from klrl_edu.estimators import aggregation
from tests.estimators.cases import vector, whole_batch

VALUES = torch.tensor([[1.0, 2.0, 4.0], [8.0, math.nan, math.nan]], dtype=torch.float64)
LIVE = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq_mean_token_sum", 7.5),
        ("seq_mean_token_mean", (7 / 3 + 8) / 2),
        ("token_mean", 15 / 4),
        ("fixed_length", 2.5),
    ],
)
def test_each_mean_by_hand_whatever_stands_after_the_end(name, value):
    values = VALUES.clone().requires_grad_()
    seen = getattr(aggregation, name)(values, LIVE)
    assert float(seen.detach()) == pytest.approx(value, rel=1e-15)
    (gradient,) = torch.autograd.grad(seen, values)
    assert bool((gradient[~LIVE] == 0).all())
    assert bool((gradient[LIVE] > 0).all())


@given(data=st.data(), n=st.integers(1, 4), length=st.integers(1, 4))
def test_at_one_length_all_agree_up_to_it(data, n, length):
    values = vector(
        *data.draw(st.lists(st.floats(-5, 5), min_size=n * length, max_size=n * length))
    ).reshape(n, length)
    live = torch.ones(n, length, dtype=torch.bool)
    total = float(aggregation.seq_mean_token_sum(values, live))
    for name in ("seq_mean_token_mean", "token_mean", "fixed_length"):
        assert float(getattr(aggregation, name)(values, live)) == pytest.approx(
            total / length, rel=1e-12, abs=1e-13
        )


def test_a_fixed_length_may_be_given():
    assert float(aggregation.fixed_length(VALUES, LIVE, 30)) == pytest.approx(0.25, rel=1e-15)


def means(name, case, size):
    """E of the aggregated log-ratio over all ordered batches of a size."""
    whole = whole_batch(case)
    ratio, log_pi = (
        (whole.log_probs - whole.prior_log_probs).detach(),
        whole.log_probs.detach().sum(-1),
    )
    total = 0.0
    for rows in itertools.product(range(len(ratio)), repeat=size):
        picked = list(rows)
        total += math.exp(float(log_pi[picked].sum())) * float(
            getattr(aggregation, name)(ratio[picked], whole.live[picked])
        )
    return total


def test_the_token_mean_depends_on_the_batch_size_and_the_others_do_not():
    case = answers_case()
    whole = whole_batch(case)
    pi, ratio, length = (
        whole.log_probs.detach().sum(-1).exp(),
        (whole.log_probs - whole.prior_log_probs).detach().sum(-1),
        whole.live.sum(-1),
    )
    expected = {
        "seq_mean_token_sum": pi @ ratio,
        "seq_mean_token_mean": pi @ (ratio / length),
        "fixed_length": pi @ ratio / 3,
    }
    for name, value in expected.items():
        assert [means(name, case, size) for size in (1, 2, 3)] == pytest.approx(
            [float(value)] * 3, rel=1e-13
        )
    seen = [means("token_mean", case, size) for size in (1, 2, 3)]
    limit = float(pi @ ratio / (pi @ length.double()))
    assert seen[0] == pytest.approx(float(expected["seq_mean_token_mean"]), rel=1e-13)
    gaps = [abs(value - limit) for value in seen]
    assert gaps[0] > gaps[1] > gaps[2] > 1e-4
