"""A vector's posterior where sums or quotients overflow, where it is computed in place, and without
rewards. Its identities and limits are held on problems, in tests/exact/test_enumeration.py.
"""

import pytest
import torch

from klrl_edu.closed_forms.tilt import tilt


def test_rewards_at_both_ends_of_the_floats_are_weighed_without_overflow():
    # (r − m)/λ = (−1.5e308 − 1.5e308)/λ, though r − m itself overflows: about the mean, and about
    # the best where the rewards span many λ
    for kl_coef, expected in ((1e308, 3), (3e306, 100)):
        tilted = tilt(
            torch.tensor([0.5, 0.5], dtype=torch.float64).log(),
            torch.tensor([1.5e308, -1.5e308], dtype=torch.float64),
            kl_coef,
        )
        odds = float(tilted.log_posterior[0] - tilted.log_posterior[1])
        assert odds == pytest.approx(expected, rel=1e-12)


def test_many_outcomes_written_over_their_own_sums_are_those_of_a_fresh_softmax():
    generator = torch.Generator().manual_seed(0)
    log_prior = torch.log_softmax(torch.randn(200_003, generator=generator, dtype=torch.float64), 0)
    rewards = torch.randn(200_003, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        tilt(log_prior, rewards, 0.5).log_posterior,
        torch.log_softmax(log_prior + rewards / 0.5, 0),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("kl_coef", [5e-324, 1e-305, 0.5, 1e300])
def test_zero_rewards_leave_the_prior_whatever_the_coefficient(kl_coef):
    log_prior = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64).log()
    tilted = tilt(log_prior, torch.zeros(3, dtype=torch.float64), kl_coef)
    torch.testing.assert_close(tilted.log_posterior, log_prior, rtol=1e-15, atol=0)
    assert float(tilted.log_evidence) == pytest.approx(0, abs=1e-15)
