"""The standing problems hold the course's numbers."""

import math

import pytest
import torch

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.exact.posterior import posterior
from klrl_edu.problems.examples import EXAMPLES, SURNAME_PATTERN, example, four_sentences, four_sentences_policy, surnames


def test_the_four_sentences_are_the_courses():
    problem = four_sentences()
    assert problem.kl_coef == 1.0
    assert problem.space.vocabulary == ("the", "a", "cat", "dog")
    assert (problem.space.size, problem.space.eos) == (16, False)
    support = posterior(problem).enumerated()
    texts = problem.space.decode(support.tokens)
    assert dict(zip(texts, support.rewards.tolist(), strict=True)) == {"the cat": 1, "the dog": 0, "a cat": 0, "a dog": 2}
    prior = dict(zip(texts, support.log_prior.exp().tolist(), strict=True))
    assert prior == pytest.approx({"the cat": 0.4, "the dog": 0.3, "a cat": 0.2, "a dog": 0.1}, abs=1e-15)
    assert float(logspace.entropy(support.log_prior)) == pytest.approx(1.279854225834, abs=5.1e-13)
    assert four_sentences_policy().log_probs.exp().tolist() == pytest.approx([0.5, 0.2, 0.1, 0.2], abs=1e-15)


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
    with pytest.raises(InputError, match=r"'five-sentences' is not known; choose from four-sentences, surnames.*CSV or JSON"):
        example("five-sentences", 1.0)
