"""What moves by a rounding moves by no more, ties stay ties, and a loss's arithmetic is seen."""

import dataclasses
import math

import pytest
import torch

from klrl_edu.audit.rounding import arithmetic_of, nudged_batches, relative_precision
from klrl_edu.learning.batches import score_batch
from tests.audit.scenes import answers, answers_policy

EPS = torch.finfo(torch.float64).eps


def batch():
    tokens = answers_policy().tokens
    return score_batch(answers_policy(), [answers()], [tokens], distributions=True)


def test_numbers_move_by_one_rounding_in_two_ways_and_whole_numbers_stay():
    plain = batch()
    one, other = nudged_batches(plain, torch.float64)
    for nudged in (one, other):
        before, after = plain.log_probs.detach(), nudged.log_probs.detach()
        change = (after / before - 1)[before != 0].abs()
        assert float(change.min()) > 0.4 * EPS
        assert float(change.max()) < 1.6 * EPS
        assert torch.equal(after[before == 0], before[before == 0])
        whole = plain.rewards == plain.rewards.round()
        assert torch.equal(nudged.rewards[whole], plain.rewards[whole])
        assert torch.equal(nudged.log_dists == -math.inf, plain.log_dists == -math.inf)
    assert not torch.equal(one.log_probs, other.log_probs)


def test_equal_numbers_stay_equal():
    """So that a policy that is the prior stays it, and a ratio of 1 stays 1."""
    at_prior = dataclasses.replace(batch(), prior_log_probs=batch().log_probs.detach())
    for nudged in nudged_batches(at_prior, torch.float64):
        assert torch.equal(nudged.log_probs, nudged.prior_log_probs)
        assert torch.equal(nudged.log_probs, nudged.behaviour_log_probs)


@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        (lambda x: x.float() * 0.3, torch.float32),
        (lambda x: (x * torch.tensor(0.1)).double() + torch.tensor(0.1), torch.float32),
        (lambda x: x.bfloat16().double(), torch.bfloat16),
        (lambda x: (x * (x > 0).float()).sum(), torch.float64),
        (lambda x: x / torch.tensor(3.0, dtype=torch.float64), torch.float64),
        (lambda x: x * (x > 0).float().sum(), torch.float64),
    ],
)
def test_the_least_precise_arithmetic_is_found(run, dtype):
    x = torch.tensor([0.5, -1 / 3, 2.0], dtype=torch.float64)
    assert arithmetic_of(lambda: run(x)) == dtype


def test_precision_follows_the_type():
    kinds = (torch.float64, torch.float32, torch.bfloat16)
    assert [relative_precision(kind) for kind in kinds] == [1e-9, 1e-5, 4 * 2**-7]
