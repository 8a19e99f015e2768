"""The ten lines of the page on verification: a user's own loss, verified. The mistake that they
guard against is seen failing.
"""

import pytest

# the page: begin
from klrl_edu.testing import assert_unbiased


def my_rloo(batch):
    log_prob = batch.log_probs.sum(-1)
    u = log_prob.detach() - batch.prior_log_probs.sum(-1)
    reward = batch.rewards.sum(-1) - batch.kl_coef * u
    baseline = (reward.sum() - reward) / (len(reward) - 1)  # the mean of the others
    return -((reward - baseline) * log_prob).mean()


def test_my_loss_descends_the_objective():
    assert_unbiased(my_rloo, "objective", batch_size=3)  # exactly


# the page: end


def test_with_the_mean_of_all_it_fails_and_says_why():
    def mine(batch):
        log_prob = batch.log_probs.sum(-1)
        u = log_prob.detach() - batch.prior_log_probs.sum(-1)
        reward = batch.rewards.sum(-1) - batch.kl_coef * u
        return -((reward - reward.mean()) * log_prob).mean()

    with pytest.raises(
        AssertionError,
        match=(
            r"mine is biased for objective.*(?s:.*)times 0\.666667: the baseline includes the"
            r" sequence itself"
        ),
    ):
        assert_unbiased(mine, "objective", batch_size=3)
