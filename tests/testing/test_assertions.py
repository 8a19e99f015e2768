"""The exact assertions' arguments, messages and corners; test_meta.py holds them against known
faults.
"""

import math
from inspect import signature

import pytest
import torch

from klrl_edu import testing
from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core.errors import InputError
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from klrl_edu.learning.batches import needs
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward
from klrl_edu.testing import (
    assert_mean_is,
    assert_same_gradient,
    assert_samples_from,
    assert_unbiased,
    assert_variance_at_most,
    ledger,
)
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


CALLS = {
    assert_unbiased: {
        "estimator": losses.rloo,
        "target": "objective",
    },
    assert_same_gradient: {"loss": losses.rloo, "other": losses.rloo},
    assert_variance_at_most: {"estimator": losses.rloo, "bound": 100.0},
    assert_mean_is: {
        "samples": torch.tensor([0.0, 1.0]),
        "expected": 0.5,
        "sigma": 0.5,
        "value_range": (0.0, 1.0),
    },
    assert_samples_from: {"sampler": four_sentences().prior, "n": 10},
    testing.check_normalised: {"model": four_sentences().prior},
    testing.check_samples_belong: {"model": four_sentences().prior},
    testing.check_decoding_gradient: {"model": four_sentences_policy()},
    testing.example_tokens: {"space": four_sentences().space},
}
NUMBERS = [
    *((call, "tolerance") for call in CALLS if "tolerance" in signature(call).parameters),
    *((call, "batch_size") for call in CALLS if "batch_size" in signature(call).parameters),
    *((call, "micro_batches") for call in CALLS if "micro_batches" in signature(call).parameters),
    *((call, "false_alarm") for call in CALLS if "false_alarm" in signature(call).parameters),
    *((call, "n") for call in CALLS if "n" in signature(call).parameters),
    (testing.example_tokens, "seed"),
    (assert_unbiased, "target"),
    (assert_variance_at_most, "bound"),
    (assert_mean_is, "expected"),
    (assert_mean_is, "sigma"),
]


@pytest.mark.parametrize(
    ("call", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_number_is_right_or_refused_in_one_line(call, name, monkeypatch):
    monkeypatch.setattr(ledger, "run", ledger.Ledger())
    given = CALLS[call]
    if "policy" in signature(call).parameters:
        given = {**given, "policy": four_sentences_policy(), "problem": four_sentences(0.5)}
    never = [math.nan, math.inf, -math.inf, True, 2 + 1j, 2j, "2"]
    # a bias may be negative, and large
    rarely = [0, 1e30, -1.0] if name != "target" else []
    for value in never + rarely:
        refusal = outcome(call, **{**given, name: value})
        if isinstance(refusal, InputError):
            assert "\n" not in str(refusal)
            assert name in str(refusal)
        else:
            allowed = {"tolerance": [0], "bound": [0, 1e30], "seed": [0], "expected": [0]}
            assert value in allowed[name]


def outcome(call, **given):
    """What a call raised, None for nothing."""
    try:
        call(**given)
    except (InputError, AssertionError) as error:
        return error
    return None


@pytest.mark.parametrize(
    "value_range", [(0.0, math.inf), (math.nan, 1.0), (1.0, 0.0), 1.0, (0.0,), (0.0, 1j)]
)
def test_a_range_is_two_finite_numbers_in_order(value_range):
    with pytest.raises(InputError, match="value_range"):
        assert_mean_is(torch.tensor([0.0, 1.0]), 0.5, sigma=0.5, value_range=value_range)


@pytest.mark.parametrize("target", [torch.tensor([math.nan]), torch.tensor([1j]), [0.0, math.inf]])
def test_a_target_is_of_finite_real_numbers(target):
    with pytest.raises(InputError, match="target"):
        assert_unbiased(kl_values.k1, target)


def test_laws_without_sequences_hold_for_anything_and_are_refused():
    prior = four_sentences().prior
    for tokens in (prior.tokens[:0], prior.tokens[0], [[0, 2]]):
        for law in (testing.check_normalised, testing.check_causal, testing.check_language_model):
            with pytest.raises(InputError, match=r"tokens is .* N at least 1"):
                law(prior, tokens=tokens)


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
    names = list(followers)
    for k, (target, loss) in enumerate(followers.items()):
        assert_unbiased(loss, target)
        for name in (names[k - 1], names[k - 2]):
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


def near_the_posterior(distance):
    """A policy at a distance from the posterior of four sentences at λ = 0.7, and the problem."""
    problem = four_sentences(0.7)
    logits = problem.prior.log_probs.detach() + problem.rewards(problem.prior.tokens) / 0.7
    logits = logits + distance * torch.tensor([0.3, -0.9, 0.4, 0.2], dtype=torch.float64)
    return SequenceTable(problem.space, problem.prior.tokens, logits), problem


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("tolerance", [1e-12, 1e-9])
def test_a_bias_of_a_part_in_a_million_shows_next_to_the_posterior(distance, tolerance):
    given = near_the_posterior(distance)
    assert_unbiased(losses.rloo, "objective", *given)
    assert_same_gradient(losses.rloo, faults.log_variance, *given)
    with pytest.raises(AssertionError, match="is biased for objective"):
        assert_unbiased(scaled(1 + 1e-6), "objective", *given, tolerance=tolerance)
    with pytest.raises(AssertionError, match="differ on"):
        assert_same_gradient(scaled(1 + 1e-6), losses.rloo, *given, tolerance=tolerance)


def test_two_losses_that_are_one_are_so_at_the_posterior_too():
    """There both gradients are 0 but for rounding, which is another in each."""
    given = near_the_posterior(0)
    assert_same_gradient(losses.rloo, faults.log_variance, *given)
    with pytest.raises(AssertionError, match="differ on"):
        assert_same_gradient(losses.reinforce, losses.rloo, *given)


def test_several_problems_stand_in_one_batch_and_the_target_is_their_mean():
    policy, one = four_sentences_policy(), four_sentences(0.5)
    values = {"the cat": 9.0, "the dog": 7.0, "a cat": 7.5, "a dog": 9.5}
    two = Problem(one.prior, table_reward(values, one.space), 2.0)
    assert_unbiased(losses.rloo, "objective", policy, [one, two])
    each = [audit_gradient(losses.exact, policy, problem).mean for problem in (one, two)]
    assert_unbiased(losses.rloo, (each[0] + each[1]) / 2, policy, [one, two], batch_size=3)
    # on one problem the whole batch is the group
    assert_unbiased(faults.mean_of_all_groups, "objective", policy, one)
    assert_same_gradient(faults.mean_of_all_groups, losses.rloo, policy, [one])
    with pytest.raises(AssertionError, match=r"times 1\.5"):
        assert_unbiased(faults.mean_of_all_groups, "objective", policy, [one, two])
    with pytest.raises(AssertionError, match=r"differ on \d+ of 184 batches"):
        assert_same_gradient(faults.mean_of_all_groups, losses.rloo, policy, [one, two])
    with pytest.raises(AssertionError, match="has variance"):
        assert_variance_at_most(losses.reinforce, losses.rloo, policy, [one, two])


def test_a_loss_with_one_beta_meets_several_problems_of_one_kl_coef():
    def named(per_token_logps, ref_per_token_logps, rewards, beta):
        log_ratio = (per_token_logps - ref_per_token_logps).sum(-1).detach()
        return -((rewards.sum(-1) - beta * log_ratio) * per_token_logps.sum(-1)).mean()

    assert_unbiased(named, "objective")
    assert_same_gradient(named, losses.reinforce)
    assert_same_gradient(losses.reinforce, named, in_expectation=True)


def test_other_names_are_adapted_in_every_assertion():
    def foreign(logp, reference, score, weight):
        reward = score - weight * (logp.detach() - reference).sum(-1)
        return -(reward * logp.sum(-1)).mean()

    names = {"logp": "log_probs", "reference": "prior_log_probs", "weight": "kl_coef"}
    given = four_sentences_policy(), four_sentences(0.5)
    adapt = {**names, "score": "advantages"}
    assert_unbiased(foreign, "objective", *given, adapt=adapt)
    assert_same_gradient(foreign, losses.reinforce, *given, adapt=adapt)
    assert_same_gradient(foreign, losses.reinforce, *given, adapt=adapt, in_expectation=True)
    assert_variance_at_most(foreign, losses.reinforce, *given, adapt=adapt)
    with pytest.raises(InputError, match="foreign takes 'logp'"):
        assert_unbiased(foreign, "objective", *given)


def weighted_by_place(batch):
    """REINFORCE that counts the second of two sequences thrice as much as the first."""
    weight = torch.tensor([0.5, 1.5]).repeat(len(batch.tokens) // 2)
    return -(weight * losses.penalised_reward(batch) * batch.log_probs.sum(-1)).mean()


def test_what_reads_places_is_enumerated_in_order_where_one_says_so():
    mine, given = weighted_by_place, (four_sentences_policy(), four_sentences(0.5))
    assert_unbiased(mine, "objective", ordered=True)
    for places in ({"ordered": True}, {"micro_batches": 2}):
        assert_same_gradient(mine, losses.reinforce, *given, in_expectation=True, **places)
        with pytest.raises(AssertionError, match="that of reinforce"):
            assert_variance_at_most(mine, losses.reinforce, *given, **places)
        with pytest.raises(InputError, match="k1 is a function of log-ratios, where places mean"):
            assert_unbiased(kl_values.k1, "reverse_kl", *given, **places)
    with pytest.raises(InputError, match="depends on the order of its batch"):
        assert_unbiased(mine, "objective", *given)
    for places, batches in (({"ordered": True}, 64), ({}, 36)):
        with pytest.raises(AssertionError, match=f"differ on .* of {batches} batches"):
            assert_same_gradient(scaled(2), losses.rloo, *given, batch_size=3, **places)


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
    with pytest.raises(InputError, match="no batch is given to both; compare with in_expectation"):
        assert_same_gradient(losses.exact, losses.rloo)


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
    close = four_sentences_policy(), four_sentences(0.5)
    assert_variance_at_most(kl_values.k3, kl_values.k1, *close)
    with pytest.raises(AssertionError, match=r"k1 has variance .* expected at most .*, that of k3"):
        assert_variance_at_most(kl_values.k1, kl_values.k3, *close)
    with pytest.raises(AssertionError, match=r"k3 has variance .* expected at most .*, that of k1"):
        assert_variance_at_most(kl_values.k3, kl_values.k1)


def test_a_number_bounds_the_variance_of_a_batch():
    policy, problem = four_sentences_policy(), four_sentences()
    one = 0.191954080129  # Var k1, tutorial 6
    assert_variance_at_most(kl_values.k1, one / 5 + 1e-12, policy, problem, batch_size=5)
    with pytest.raises(AssertionError, match=r"k1 has variance 0\.03839.*batches of 5"):
        assert_variance_at_most(kl_values.k1, one / 5 - 1e-9, policy, problem, batch_size=5)
