"""Sums over groups keep the digits of numbers near 0."""

import math

import pytest
import torch

from klrl_edu.core.groups import Rows


@pytest.mark.parametrize("size", [0.3, 1e-6, 1e-15, 1e-150])
def test_the_log_of_a_mean_near_one_keeps_the_digits_of_what_is_beyond_one(size):
    log_q = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    found = Rows().log_mean_exp(log_q, torch.tensor([size, 0.0], dtype=torch.float64))
    assert float(found) == pytest.approx(math.log1p(math.expm1(size) / 4), rel=1e-15, abs=0)


def test_what_probabilities_sum_to_beside_one_is_rounding():
    log_q = torch.tensor([0.25, 0.75 + 8e-10], dtype=torch.float64).log()
    x = torch.tensor([1e-3, 0.0], dtype=torch.float64)
    expected = math.log1p(math.expm1(1e-3) / 4 / (1 + 8e-10))
    assert float(Rows().log_mean_exp(log_q, x)) == pytest.approx(expected, rel=1e-13)
