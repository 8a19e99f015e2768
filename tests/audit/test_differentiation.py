"""All batches at once, one at a time, and through a loss's own draws: the same gradients, and the
report says which.
"""

import itertools
import math

import pytest
import torch

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core import logspace
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import DivergedError, InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from klrl_edu.learning.batches import needs
from klrl_edu.learning.training import train
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import count_reward
from tests.audit.scenes import (
    answers,
    answers_policy,
    batch_mean_baseline,
    k2_loss,
    log_ratio,
    random_prefix_table,
)


def stubborn(loss):
    """The same loss, which looks at a number on its way, as no vmapped loss can."""

    def looking(batch):
        value = loss(batch)
        assert float(value.detach()) < math.inf
        return value

    return looking


@needs("distributions")
def rao_blackwell(batch):
    return kl_values.per_token_kl(batch.log_dists, batch.prior_log_dists).sum(-1).mean()


@pytest.mark.parametrize("loss", [losses.rloo, batch_mean_baseline, k2_loss])
def test_a_loss_that_vmap_cannot_run_gives_the_same_moments_and_the_report_says_so(loss):
    fast, slow = (
        audit_gradient(one, answers_policy(), answers(), batch_size=3)
        for one in (loss, stubborn(loss))
    )
    assert fast.differentiation == "vmap"
    assert slow.differentiation.startswith("one backward pass an execution: vmap")
    assert "one backward pass an execution" in str(slow)
    assert torch.allclose(fast.mean, slow.mean, rtol=0, atol=1e-14)
    assert fast.variance == pytest.approx(slow.variance, rel=1e-12)


def test_full_distributions_run_under_vmap_too():
    marked = needs("distributions")(stubborn(rao_blackwell))
    fast, slow = (
        audit_gradient(one, answers_policy(), answers(), batch_size=2)
        for one in (rao_blackwell, marked)
    )
    assert fast.differentiation == "vmap"
    assert slow.differentiation != "vmap"
    assert torch.allclose(fast.mean, slow.mean, rtol=0, atol=1e-14)
    assert fast.verdict == "rao_blackwell is unbiased for reverse_kl_per_token."
    assert fast.variance == pytest.approx(slow.variance, rel=1e-12)


def test_a_loss_that_means_something_else_under_vmap_is_run_one_batch_at_a_time():
    def by_rank(batch):
        scale = 1.0 if not torch._C._functorch.is_batchedtensor(batch.live) else 3.0
        return scale * k2_loss(batch)

    report = audit_gradient(by_rank, answers_policy(), answers())
    assert (
        report.differentiation
        == "one backward pass an execution: under vmap it gives other results"
    )
    assert report.relative_bias["reverse_kl"] < 1e-12


def masked(batch, draw):
    """Reinforces one sequence of the batch, picked at random: half the noise is the loss's own."""
    weights = torch.full(
        (1, len(batch.rewards)), -math.log(len(batch.rewards)), dtype=torch.float64
    )
    chosen = draw(weights)
    reward = losses.penalised_reward(batch)
    return -(reward * batch.log_probs.sum(-1))[chosen].sum()


def test_the_draws_of_a_loss_are_enumerated_with_their_probabilities():
    report = audit_gradient(masked, four_sentences_policy(), four_sentences(), batch_size=2)
    single = audit_gradient(losses.reinforce, four_sentences_policy(), four_sentences())
    assert report.relative_bias["objective"] < 1e-12
    assert report.variance == pytest.approx(single.variance, rel=1e-12)  # one of two is one
    assert report.executions == 10 * 2
    assert report.differentiation == "one backward pass an execution: the loss draws random numbers"


def test_a_loss_with_biased_coins_by_hand():
    """With probability ¼ the loss is REINFORCE, else nothing: E is ¼ of it and E‖g‖² too."""

    def coin(batch, draw):
        heads = draw(torch.tensor([[0.75, 0.25]], dtype=torch.float64).log())
        return losses.reinforce(batch) * heads.sum()

    report = audit_gradient(coin, four_sentences_policy(), four_sentences())
    whole = audit_gradient(losses.reinforce, four_sentences_policy(), four_sentences())
    size = float(whole.mean.square().sum())
    assert torch.allclose(report.mean, whole.mean / 4, rtol=0, atol=1e-15)
    assert report.variance == pytest.approx((whole.variance + size) / 4 - size / 16, rel=1e-12)
    assert report.verdict == "coin follows objective, scaled by 0.25."


def test_outcomes_of_draws_count_against_max_executions():
    assert (
        audit_gradient(
            masked, four_sentences_policy(), four_sentences(), batch_size=2, max_executions=20
        ).executions
        == 20
    )
    with pytest.raises(
        TooLargeError,
        match=(
            r"with its own draws the loss masked has more than max_executions = 19"
            r" outcomes.*monte_carlo"
        ),
    ):
        audit_gradient(
            masked, four_sentences_policy(), four_sentences(), batch_size=2, max_executions=19
        )


def test_padding_moves_nothing_whatever_a_loss_does_there():
    """After EOS log π is 0 by definition: a gradient there reaches no parameter."""

    def reads_padding(batch):
        return k2_loss(batch) + (7.0 * batch.log_probs * ~batch.live).sum()

    space = SequenceSpace(("a", "b"), 6)
    problem = Problem(random_prefix_table(space, 1), count_reward("a", space), 0.5)
    for policy, tried, size in (
        (answers_policy(), answers(), 2),
        (random_prefix_table(space, 0), problem, 1),
    ):  # both ways to a variance
        report, plain = (
            audit_gradient(loss, policy, tried, batch_size=size)
            for loss in (reads_padding, k2_loss)
        )
        assert report.relative_bias["reverse_kl"] < 1e-12
        assert report.variance == pytest.approx(plain.variance, rel=1e-12)


@needs("distributions")
def careless_entropy(batch):
    """A single `where`: its value is right, and its gradient behind log 0 is NaN."""
    log_dists = batch.log_dists
    return torch.where(log_dists > -math.inf, log_dists.exp() * log_dists, 0.0).sum((-1, -2)).mean()


def test_nan_behind_a_token_without_mass_is_refused_as_training_refuses_it():
    """A softmax hands a NaN at one logit on to all others."""
    with pytest.raises(DivergedError, match="the gradient's norm is nan"):
        train(answers_policy(), answers(), careless_entropy, steps=1, draw=seeded_draw(0))
    with pytest.raises(
        InputError, match=r"the loss careless_entropy is -1.64\d+ and the gradient's norm is nan on"
    ):
        audit_gradient(careless_entropy, answers_policy(), answers())


def test_nan_where_no_weight_stands_behind_is_no_fault_in_training_or_audit():
    """With every text open, log 0 is only where EOS is forced, and that is no weight's doing."""

    @needs("distributions")
    def careful(batch):
        return logspace.expectation(batch.log_dists, batch.log_dists).sum(-1).mean()

    space = SequenceSpace(("a", "b"), 3)
    problem = Problem(random_prefix_table(space, 1), count_reward("a", space), 0.5)
    policy = random_prefix_table(space, 0)
    seen, expected = (audit_gradient(loss, policy, problem) for loss in (careless_entropy, careful))
    assert torch.allclose(seen.mean, expected.mean, rtol=0, atol=1e-14)
    assert seen.variance == pytest.approx(expected.variance, rel=1e-12)
    train(policy, problem, careless_entropy, steps=1, draw=seeded_draw(0))


class Floor(torch.autograd.Function):
    """max(x, −50) that hands its gradient on unchanged."""

    @staticmethod
    def forward(ctx, values):
        return values.clamp(min=-50)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_push_on_a_token_without_mass_is_refused():
    """Its softmax would hand the push on to the tokens with mass, which no trie of them shows."""

    @needs("distributions")
    def floored(batch):
        return (Floor.apply(batch.log_dists).sum(-1) * batch.live).sum()

    with pytest.raises(InputError, match=r"the loss floored pushes .* tokens without mass"):
        audit_gradient(floored, answers_policy(), answers())


def test_groups_are_read_as_one_group_of_the_batch():
    def by_group(batch):
        count = torch.bincount(batch.group)
        assert count.tolist() == [3]
        return -(losses.penalised_reward(batch) * batch.log_probs.sum(-1)).sum() / count[0]

    assert (
        audit_gradient(by_group, answers_policy(), answers(), batch_size=3).differentiation
        == "vmap"
    )


def test_every_pair_counts_once_in_a_pairwise_loss():
    """The mean over ordered pairs of σ(u − u')-weighted differences, against a loop."""

    def pairs(batch):
        u = log_ratio(batch)
        return -torch.nn.functional.logsigmoid(u[:, None] - u).mean()

    report = audit_gradient(pairs, answers_policy(), answers(), batch_size=2)
    theta = answers_policy().logits.detach().requires_grad_()
    log_pi = torch.log_softmax(theta, 0)
    u = log_pi - answers().prior.log_probs.detach()
    pi = log_pi.detach().exp()
    total = 0.0
    for a, b in itertools.product(range(6), repeat=2):
        both = torch.stack([u[a], u[b]])
        total = total - pi[a] * pi[b] * torch.nn.functional.logsigmoid(both[:, None] - both).mean()
    (expected,) = torch.autograd.grad(total, theta)
    assert torch.allclose(report.mean, expected, rtol=0, atol=1e-14)
