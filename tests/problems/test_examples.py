"""The standing problems hold the course's numbers."""

import hashlib
import math

import pytest
import torch

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.exact.posterior import posterior
from klrl_edu.models.contract import sequence_log_probs
from klrl_edu.problems.examples import (
    EXAMPLES,
    SURNAME_PATTERN,
    count_threes,
    count_threes_prior,
    example,
    four_sentences,
    four_sentences_policy,
    surnames,
)
from klrl_edu.testing import check_causal_reward


def test_the_four_sentences_are_the_courses():
    problem = four_sentences()
    assert problem.kl_coef == 1.0
    assert problem.space.vocabulary == ("the", "a", "cat", "dog")
    assert (problem.space.size, problem.space.eos) == (16, False)
    support = posterior(problem).enumerated()
    texts = problem.space.decode(support.tokens)
    assert dict(zip(texts, support.rewards.tolist(), strict=True)) == {
        "the cat": 1,
        "the dog": 0,
        "a cat": 0,
        "a dog": 2,
    }
    prior = dict(zip(texts, support.log_prior.exp().tolist(), strict=True))
    assert prior == pytest.approx(
        {"the cat": 0.4, "the dog": 0.3, "a cat": 0.2, "a dog": 0.1}, abs=1e-15
    )
    assert float(logspace.entropy(support.log_prior)) == pytest.approx(1.279854225834, abs=5.1e-13)
    assert four_sentences_policy().log_probs.exp().tolist() == pytest.approx(
        [0.5, 0.2, 0.1, 0.2], abs=1e-15
    )


def test_the_twelve_other_word_pairs_have_no_mass():
    problem = four_sentences()
    log_prob = problem.prior.log_prob(problem.space.all_tokens()).detach()
    assert int((log_prob > -math.inf).sum()) == 4


def test_surnames_reward_the_spelling():
    problem = surnames(kl_coef=0.5, count=200)
    target = posterior(problem)
    support = target.enumerated()
    texts = problem.space.decode(support.tokens)
    assert (len(texts), problem.space.separator, problem.kl_coef) == (200, "", 0.5)
    rewards = dict(zip(texts, support.rewards.tolist(), strict=True))
    assert (rewards["johnson"], rewards["smith"]) == (1.0, 0.0)
    matched = support.rewards == 1
    prior, star = (float(x[matched].exp().sum()) for x in (support.log_prior, target.log_probs))
    odds = prior / (1 - prior) * math.exp(1 / 0.5)
    assert star == pytest.approx(odds / (1 + odds), rel=1e-12)
    assert "son" in SURNAME_PATTERN


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_has_a_posterior(name):
    target = posterior(example(name, 0.5))
    assert target.problem.kl_coef == 0.5
    assert float(target.log_probs.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert bool(torch.isfinite(target.value))


def test_an_unknown_example_lists_the_known_ones():
    with pytest.raises(
        InputError,
        match=r"'five-sentences' is not known; choose from four-sentences, surnames.*CSV or JSON",
    ):
        example("five-sentences", 1.0)


# count-threes: pinned, so that numbers quoted for it stay comparable


def test_count_threes_is_the_problem_that_its_numbers_were_quoted_for():
    problem = count_threes()
    assert (problem.space.size, problem.kl_coef) == (262_144, 0.5)
    assert sum(parameter.numel() for parameter in problem.prior.parameters()) == 101_568
    target = posterior(problem)
    support = target.enumerated()
    assert len(support.tokens) == 262_144
    assert float(logspace.entropy(support.log_prior)) == pytest.approx(9.6827, abs=1e-4)
    assert float(logspace.kl_divergence(support.log_prior, target.log_probs)) == pytest.approx(
        1.11531, abs=1e-5
    )


def test_the_prior_of_count_threes_has_the_pinned_log_probabilities():
    prior = count_threes_prior(torch.float64)
    log_probs = sequence_log_probs(prior, prior.space.all_tokens()[:1000])
    digest = hashlib.sha256(
        "\n".join(f"{value:.6f}" for value in log_probs.tolist()).encode()
    ).hexdigest()
    assert digest[:16] == "e0e53e7b65ab98ac"


def test_the_reward_of_count_threes_counts_threes_and_charges_repeats():
    problem = count_threes()
    tokens = problem.space.encode(["3 3 0 3 1 1", "0 1 2 4 5 6"])
    assert problem.rewards(tokens).tolist() == [3 - 2 * 0.5, 0.0]
    check_causal_reward(problem.reward, problem.space)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_by_its_name_has_the_kl_coef_of_its_function(name):
    assert example(name).kl_coef == EXAMPLES[name]().kl_coef
    assert example(name).kl_coef == (0.5 if name == "count-threes" else 1.0)
