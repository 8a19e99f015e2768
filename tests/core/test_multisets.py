"""Multisets against all orders in plain Python."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.core.multisets import count_multisets, every_order, multisets


@given(
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=5).filter(any),
    size=st.integers(1, 4),
)
def test_multisets_carry_the_probability_of_all_their_orders(weights, size):
    probs = [weight / sum(weights) for weight in weights]
    expected = Counter()
    for order in itertools.product(range(len(probs)), repeat=size):
        expected[tuple(sorted(order))] += math.prod(probs[y] for y in order)
    rows, log_weight = multisets(torch.tensor(probs, dtype=torch.float64).log(), size)
    seen = dict(zip(map(tuple, rows.tolist()), log_weight.exp().tolist(), strict=True))
    assert len(seen) == len(rows) == count_multisets(sum(p > 0 for p in probs), size)
    assert seen == pytest.approx(
        {key: value for key, value in expected.items() if value > 0}, rel=1e-13
    )


@pytest.mark.parametrize(
    ("sequences", "size", "count"),
    [(15, 4, 3060), (4096, 1, 4096), (1, 9, 1), (10**6, 100, math.comb(10**6 + 99, 100))],
)
def test_the_count_is_exact(sequences, size, count):
    assert count_multisets(sequences, size) == count


def test_a_thousand_copies_weigh_without_overflow():
    _, log_weight = multisets(torch.tensor([0.5, 0.5], dtype=torch.float64).log(), 2000)
    assert float(torch.logsumexp(log_weight, 0)) == pytest.approx(0, abs=1e-10)


def test_every_order_has_the_product_of_its_draws():
    probs = [0.5, 0.2, 0.0, 0.3]
    rows, log_p = every_order(torch.tensor(probs, dtype=torch.float64).log(), 3)
    orders = list(itertools.product(range(4), repeat=3))
    assert rows.tolist() == [list(order) for order in orders]
    expected = [math.prod(probs[y] for y in order) for order in orders]
    assert log_p.exp().tolist() == pytest.approx(expected, rel=1e-14)
