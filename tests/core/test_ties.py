"""Ties of returns: what rounding may have split is one, what a reward says is not."""

import itertools
from fractions import Fraction

import pytest
import torch

from klrl_edu.core import ties


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("terms", [(0.1, 0.2, 0.3), (0.7, 0.1, -0.3), (1e-3, 0.6, 0.6, 0.1)])
def test_sums_of_the_same_decimals_tie_in_any_order(terms):
    rows = torch.tensor(list(itertools.permutations(terms)), dtype=torch.float64)
    totals, slack = ties.summed(rows)
    assert len(set(totals.tolist())) > 1  # rounding does split them
    assert len(set(ties.level_ties(totals, slack).tolist())) == 1


def test_a_sum_ties_with_the_number_it_is_meant_to_be():
    totals, slack = ties.summed(torch.tensor([[0.1, 0.2], [0.3, 0.0]], dtype=torch.float64))
    assert totals[0] != totals[1]
    assert ties.level_ties(totals, slack).tolist() == [0.30000000000000004] * 2
    totals, slack = ties.summed(torch.tensor([[0.1, 0.7], [0.8, 0.0]], dtype=torch.float64))
    assert totals[0] < totals[1]  # here the sum is the smaller one
    assert ties.level_ties(totals, slack).tolist() == [0.8] * 2


def test_single_rewards_an_ulp_apart_are_no_tie():
    totals, slack = ties.summed(vector(0.3, 0.30000000000000004)[:, None])
    assert ties.level_ties(totals, slack).tolist() == [0.3, 0.30000000000000004]


def test_the_slack_bounds_the_rounding_and_is_not_much_larger():
    generator = torch.Generator().manual_seed(0)
    decimals = torch.randint(-999, 1000, (200, 12), generator=generator)
    totals, slack = ties.summed(decimals.double() / 1000)
    for row, total, most in zip(decimals.tolist(), totals.tolist(), slack.tolist(), strict=True):
        assert abs(Fraction(total) - Fraction(sum(row), 1000)) <= most < 1e-13


def test_what_is_forbidden_has_no_slack_and_never_ties():
    totals, slack = ties.summed(
        torch.tensor([[-torch.inf, 0.2], [0.1, 1e308]], dtype=torch.float64)
    )
    assert slack[0] == 0
    assert ties.level_ties(totals, slack).tolist() == [-torch.inf, 1e308]
