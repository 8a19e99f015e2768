"""Losses that are sums over the pairs of a batch: the same moments as over all batches, and others
are not taken for such.
"""

import pytest
import torch

import klrl_edu.audit.audit as module
from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from klrl_edu.learning.batches import needs
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.problems.examples import four_sentences
from tests.audit.scenes import (
    answers,
    answers_policy,
    batch_mean_baseline,
    binary,
    k2_loss,
    log_ratio,
    random_prefix_table,
)


def mixed(batch):
    """Parts that grow with the batch in two ways, so that no one factor relates B to 2."""
    return losses.rloo(batch) + 0.3 * batch_mean_baseline(batch) + k2_loss(batch)


@needs("distributions")
def with_distributions(batch):
    per_token = kl_values.per_token_kl(batch.log_dists, batch.prior_log_dists)
    return losses.rloo(batch) + per_token.sum(-1).mean()


def pairwise(batch):
    u = log_ratio(batch)
    return -torch.nn.functional.logsigmoid(u[:, None] - u).mean()


def behaviours():
    return {"behaviour": answers_policy([0.15, 0.2, 0.2, 0.1, 0.2, 0.15])}


def both_ways(monkeypatch, loss, policy, problem, **options):
    whole = audit_gradient(loss, policy, problem, **options)
    monkeypatch.setattr(module, "MAX_EXECUTIONS", 1)
    return whole, audit_gradient(loss, policy, problem, **options)


@pytest.mark.parametrize(
    "loss", [losses.rloo, losses.reinforce, mixed, with_distributions, pairwise]
)
@pytest.mark.parametrize(("size", "options"), [(3, {}), (5, {}), (4, behaviours())])
def test_moments_from_pairs_are_those_over_all_batches(monkeypatch, loss, size, options):
    whole, pairs = both_ways(
        monkeypatch, loss, answers_policy(), answers(), batch_size=size, **options
    )
    assert "a sum over pairs" in pairs.differentiation
    assert (whole.differentiation, pairs.executions) == ("vmap", 21)
    assert torch.allclose(pairs.mean, whole.mean, rtol=0, atol=1e-14)
    assert pairs.variance == pytest.approx(whole.variance, rel=1e-12)
    assert pairs.verdict == whole.verdict


def test_in_other_coordinates_too(monkeypatch):
    problem = answers()
    table = restrict_to_support(random_prefix_table(problem.space, 0), problem.prior)
    sentences = four_sentences()
    network = restrict_to_support(
        RecurrentModel(sentences.space, hidden_size=2, seed=3), sentences.prior
    )
    for policy, tried in ((table, problem), (network, sentences)):
        with monkeypatch.context() as patch:
            whole, pairs = both_ways(patch, mixed, policy, tried, batch_size=3)
        assert "a sum over pairs" in pairs.differentiation
        assert torch.allclose(pairs.mean, whole.mean, rtol=0, atol=1e-13)
        assert pairs.variance == pytest.approx(whole.variance, rel=1e-11)


def of_three(batch):
    """A part in a thousand of what no pair knows."""
    u = log_ratio(batch)
    return losses.rloo(batch) + 1e-3 * u[0] * u[1] * u[2]


@pytest.mark.parametrize(("loss", "size"), [(losses.grpo, 4), (of_three, 3)])
def test_what_is_no_sum_over_pairs_is_enumerated(monkeypatch, loss, size):
    whole, again = both_ways(monkeypatch, loss, answers_policy(), answers(), batch_size=size)
    assert again.differentiation == "vmap"
    assert again.executions == whole.executions > 21


def test_forty_sequences_a_batch_take_as_many_pairs_as_two():
    report = audit_gradient(losses.rloo, answers_policy(), answers(), batch_size=40)
    assert report.executions == 21
    assert report.verdict == "rloo is unbiased for objective."
    with pytest.raises(TooLargeError, match=r"1,221,759 multisets.*max_executions = 1,000,000"):
        audit_gradient(losses.grpo, answers_policy(), answers(), batch_size=40)


def test_five_hundred_sequences_in_fours():
    """2.9 thousand million multisets; REINFORCE's variance is a fourth of one sample's."""
    policy, problem = binary(9)
    one = audit_gradient(losses.reinforce, policy, problem)
    four = audit_gradient(losses.reinforce, policy, problem, batch_size=4)
    assert four.executions == 512 * 513 // 2
    assert four.verdict == "reinforce is unbiased for objective."
    assert four.variance == pytest.approx(one.variance / 4, rel=1e-11)


def test_an_order_that_counts_is_refused_on_the_way(monkeypatch):
    def first(batch):
        return -(batch.rewards.sum(-1) * batch.log_probs.sum(-1))[0]

    monkeypatch.setattr(module, "MAX_EXECUTIONS", 1)
    with pytest.raises(InputError, match="depends on the order"):
        audit_gradient(first, answers_policy(), answers(), batch_size=3)
