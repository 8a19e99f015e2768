"""The exact assertions' arguments, messages and corners; test_meta.py holds them against known
faults.
"""

import math

import pytest
import torch

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core.errors import InputError
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from klrl_edu.learning.batches import needs
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.testing import assert_same_gradient, assert_unbiased, assert_variance_at_most
from tests.testing import faults


def scaled(factor):
    def loss(batch):
        return factor * losses.rloo(batch)

    return loss


def importance_weighted(batch):
    """REINFORCE on batches of another policy; the ratio carries the gradient: ∇ρ = ρ s."""
    ratio = torch.exp(batch.log_probs.sum(-1) - batch.behaviour_log_probs.sum(-1))
    return -(losses.penalised_reward(batch) * ratio).mean()


# --- what is refused before anything is compared --------------------------------------------------


def test_an_unknown_target_is_refused_with_those_there_are():
    with pytest.raises(
        InputError, match="target 'objektive' is unknown or infinite here; choose from objective, "
    ):
        assert_unbiased(losses.rloo, "objektive")


def test_an_infinite_target_is_refused():
    prior = SequenceTable.from_texts({"a": 0.5, "b": 0.5})
    problem = Problem(prior, lambda tokens, prompt: torch.zeros(len(tokens)), 1.0)
    narrow = SequenceTable(prior.space, prior.tokens[:1], torch.zeros(1))
    for estimator in (kl_values.k1, losses.reinforce):
        with pytest.raises(InputError, match="target 'forward_kl' is unknown or infinite here"):
            assert_unbiased(estimator, "forward_kl", narrow, problem)


def test_a_target_of_another_size_is_refused():
    with pytest.raises(InputError, match=r"target has 3 entries; expected 4 \(.*logits"):
        assert_unbiased(losses.rloo, torch.zeros(3), four_sentences_policy(), four_sentences())


@pytest.mark.parametrize(
    "given", [{"policy": four_sentences_policy()}, {"problem": four_sentences()}]
)
@pytest.mark.parametrize(
    "check",
    [
        lambda **k: assert_unbiased(losses.rloo, "objective", **k),
        lambda **k: assert_same_gradient(*[losses.rloo] * 2, **k),
    ],
)
def test_a_policy_needs_its_problem(check, given):
    with pytest.raises(InputError, match="give both policy and problem, or neither"):
        check(**given)


# --- assert_unbiased ------------------------------------------------------------------------------


def test_the_gradient_itself_may_be_the_target():
    policy, problem = four_sentences_policy(), four_sentences(0.5)
    gradient = audit_gradient(losses.exact, policy, problem).mean
    assert_unbiased(losses.rloo, gradient, policy, problem)
    with pytest.raises(AssertionError, match="rloo is biased for the target given"):
        assert_unbiased(losses.rloo, gradient + 1e-9, policy, problem)


def test_every_target_has_a_loss_that_follows_it_and_no_other():
    @needs("distributions")
    def reverse_per_token(batch):
        return kl_values.per_token_kl(batch.log_dists, batch.prior_log_dists).sum(-1).mean()

    @needs("distributions")
    def forward_per_token(batch):
        return kl_values.per_token_kl(batch.prior_log_dists, batch.log_dists).sum(-1).mean()

    followers = {
        "objective": losses.rloo,
        "expected_reward": faults.kl_left_out,
        "reverse_kl": faults.reinforce_reverse_kl,
        "forward_kl": faults.reversed_kl,
        "reverse_kl_per_token": reverse_per_token,
        "forward_kl_per_token": forward_per_token,
    }
    for target, loss in followers.items():
        for name in followers:
            if name == target:
                assert_unbiased(loss, name)
            else:
                with pytest.raises(AssertionError, match=f"is biased for {name}"):
                    assert_unbiased(loss, name)


def test_the_tolerance_is_relative_to_target_or_noise():
    assert_unbiased(scaled(1 + 1e-9), "objective", tolerance=1e-8)
    with pytest.raises(AssertionError, match=r"allowed \d+(\.\d)?e-11"):
        assert_unbiased(scaled(1 + 1e-9), "objective", tolerance=1e-10)


def test_at_the_posterior_where_target_and_noise_vanish_rounding_is_no_bias():
    problem = four_sentences(0.7)
    logits = problem.prior.log_probs.detach() + problem.rewards(problem.prior.tokens) / 0.7
    assert_unbiased(
        losses.rloo,
        "objective",
        SequenceTable(problem.space, problem.prior.tokens, logits),
        problem,
    )


def test_a_nan_is_never_unbiased():
    with pytest.raises((AssertionError, InputError), match=r"(?i)nan|finite"):
        assert_unbiased(lambda u: u * math.nan, "reverse_kl")


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [
        (faults.self_including_mean, r"times 0\.5: the baseline includes the sequence itself"),
        (faults.summed_batch, "times 2: the batch is summed; take the mean"),
        (faults.wrong_sign, "times -1: the sign is wrong, or the ratio is upside down"),
        (scaled(3), "times 3: look for a factor"),
        (faults.k1_as_a_loss, "put the term into the reward, detached"),
        (faults.kl_left_out, "bias, angle and best scale for every target"),
    ],
)
def test_the_message_has_a_remedy_for_the_usual_faults(loss, remedy):
    with pytest.raises(AssertionError, match=f"(?s)biased for objective.*Remedy: .*{remedy}"):
        assert_unbiased(loss, "objective")


def test_a_loss_off_policy_needs_its_ratio():
    policy, problem = four_sentences_policy(), four_sentences(0.5)
    behaviour = SequenceTable(
        problem.space, problem.prior.tokens, torch.tensor([0.0, 0.5, 1.0, -0.5])
    )
    assert_unbiased(importance_weighted, "objective", policy, problem, behaviour=behaviour)
    with pytest.raises(AssertionError, match="reinforce is biased for objective"):
        assert_unbiased(losses.reinforce, "objective", policy, problem, behaviour=behaviour)
    with pytest.raises(AssertionError, match="differ on"):
        assert_same_gradient(
            importance_weighted, losses.reinforce, policy, problem, behaviour=behaviour
        )
    assert_same_gradient(
        importance_weighted, losses.reinforce, policy, problem
    )  # on-policy they are one
    assert_variance_at_most(losses.reinforce, importance_weighted, policy, problem)
    with pytest.raises(AssertionError, match="has variance"):
        assert_variance_at_most(
            importance_weighted, losses.reinforce, policy, problem, behaviour=behaviour
        )


# --- assert_same_gradient -------------------------------------------------------------------------


def test_a_loss_on_the_whole_support_has_the_mean_of_one_on_samples():
    assert_same_gradient(losses.exact, losses.exact)
    assert_same_gradient(losses.exact, losses.rloo, in_expectation=True)
    assert_unbiased(losses.exact, "objective")


def test_losses_on_full_distributions_are_compared_too():
    @needs("distributions")
    def rao_blackwell(batch):
        return kl_values.per_token_kl(batch.log_dists, batch.prior_log_dists).sum(-1).mean()

    assert_same_gradient(rao_blackwell, rao_blackwell)
    with pytest.raises(AssertionError, match=r"differ on .* batches"):
        assert_same_gradient(rao_blackwell, faults.reinforce_reverse_kl)


def test_the_message_names_batch_and_both_gradients():
    pattern = (
        r"loss and rloo differ on 12 of 16 batches \(four sentences at λ = 0\.5\); on \['the cat',"
        r" 'the dog'\] the gradients are \(.*\) and \(.*\)"
    )
    with pytest.raises(AssertionError, match=pattern):
        assert_same_gradient(scaled(2), losses.rloo)


def test_losses_of_named_tensors_are_understood_and_random_ones_have_only_a_mean():
    def named(log_probs, prior_log_probs, rewards, kl_coef):
        reward = rewards.sum(-1) - kl_coef * (log_probs.detach() - prior_log_probs).sum(-1)
        return -(reward * log_probs.sum(-1)).mean()

    def random(batch, draw):
        keep = draw(torch.zeros(1, 2, dtype=torch.float64))[
            0
        ]  # a fair coin: none of the gradient, or twice
        return 2 * keep * losses.reinforce(batch)

    assert_unbiased(named, "objective")
    assert_same_gradient(named, losses.reinforce)
    assert_unbiased(random, "objective")
    assert_same_gradient(random, named, in_expectation=True)
    with pytest.raises(
        InputError,
        match=(
            "random draws random numbers, so a batch has no one gradient; compare with"
            " in_expectation=True"
        ),
    ):
        assert_same_gradient(random, named)


# --- assert_variance_at_most ----------------------------------------------------------------------


def test_k3_varies_less_than_k1_where_policy_and_prior_are_close():
    assert_variance_at_most(kl_values.k3, kl_values.k1)
    with pytest.raises(AssertionError, match=r"k1 has variance .* expected at most .*, that of k3"):
        assert_variance_at_most(kl_values.k1, kl_values.k3)


def test_a_number_bounds_the_variance_of_a_batch():
    policy, problem = four_sentences_policy(), four_sentences()
    one = 0.191954080129  # Var k1, tutorial 6
    assert_variance_at_most(kl_values.k1, one / 5 + 1e-12, policy, problem, batch_size=5)
    with pytest.raises(AssertionError, match=r"k1 has variance 0\.03839.*batches of 5"):
        assert_variance_at_most(kl_values.k1, one / 5 - 1e-9, policy, problem, batch_size=5)
