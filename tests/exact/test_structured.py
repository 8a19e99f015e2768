"""The posterior of a lattice as a language model against enumeration, for every kind of prior and
any λ.
"""

import math

import pytest
import torch

from klrl_edu import testing
from klrl_edu.core import logspace
from klrl_edu.core.draws import enumerate_executions, seeded_draw
from klrl_edu.core.errors import InfeasibleError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.posterior import feasible_prior, posterior
from klrl_edu.exact.structured import StructuredPosterior
from klrl_edu.models.ngram import NGramModel
from klrl_edu.problems.automata import (
    constraint,
    exactly,
)
from klrl_edu.problems.problem import Problem
from tests.exact.lattices import INF, LAMBDAS, PRIORS, WAYS, both, close, random_problem


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kl_coef", LAMBDAS)
@pytest.mark.parametrize("kind", PRIORS)
def test_it_agrees_with_enumeration(kind, kl_coef, way, hard):
    for seed in range(12):
        pair = both(random_problem(kind, kl_coef, seed, hard=hard), way)
        if pair is None:
            continue
        model, oracle = pair
        support = oracle.enumerated()
        # log π* of size r/λ rounds by that size: at λ = 1e-3 the fourth digit of 1e-12 is lost
        size = max(1.0, float(oracle.log_probs[oracle.log_probs > -INF].abs().max()))
        close(model.log_prob(support.tokens), oracle.log_probs, 1e-12 * size)
        close(model.kl_to_prior(), logspace.kl_divergence(oracle.log_probs, support.log_prior))
        mean = logspace.expectation(oracle.log_probs, support.rewards)
        seen_mean, seen_variance = model.reward_moments()
        close(seen_mean, mean)
        close(seen_variance, logspace.expectation(oracle.log_probs, (support.rewards - mean) ** 2))
        lengths = (
            oracle.problem.space.live(support.tokens).sum(-1) - int(oracle.problem.space.eos)
        ).clamp(max=model.lattice.words)
        law = torch.zeros(model.lattice.words + 1, dtype=torch.float64).index_add(
            0, lengths, oracle.log_probs.exp()
        )
        close(model.length_law(), law)
        if not model.hidden:
            close(model.entropy(), logspace.entropy(oracle.log_probs))


@pytest.mark.parametrize("kind", PRIORS)
def test_it_keeps_the_laws_of_a_language_model(kind):
    for seed in (4, 7, 11):
        model = posterior(random_problem(kind, 0.5, seed), "forward_backward").model
        testing.check_language_model(model)


@pytest.mark.parametrize("kind", PRIORS)
def test_every_execution_of_its_sampler_gives_the_posterior(kind):
    for seed in (3, 4, 7, 8):
        problem = random_problem(kind, 0.5, seed, hard=seed % 2 == 0)
        try:
            oracle = posterior(problem, "enumeration")
        except InfeasibleError:
            continue
        model = posterior(problem, "forward_backward").model
        seen: dict[tuple[int, ...], float] = {}
        for run in enumerate_executions(
            lambda draw, model=model: tuple(model.sample(1, draw=draw)[0].tolist())
        ):
            seen[run.result] = seen.get(run.result, 0.0) + math.exp(run.log_prob)
        expected = dict(
            zip(
                map(tuple, oracle.enumerated().tokens.tolist()),
                oracle.log_probs.exp().tolist(),
                strict=True,
            )
        )
        assert seen == pytest.approx(
            {row: mass for row, mass in expected.items() if mass > 0}, rel=1e-11
        )


@pytest.mark.parametrize("seed", [8, 11], ids=["11 texts with EOS", "22 texts without"])
def test_many_samples_use_the_table_of_all_pairs_and_few_only_their_own(seed):
    problem = random_problem("bigram", 0.5, seed)
    testing.assert_samples_from(
        posterior(problem, "forward_backward").model.sample, posterior(problem, "enumeration").model
    )


def test_a_space_of_ten_to_the_hundred_is_taken_by_auto_and_agrees_with_a_count():
    # exactly 7 of one word among 50 independent draws from 100 words: a binomial
    space = SequenceSpace(tuple(f"w{k}" for k in range(100)), 50, eos=False)
    problem = Problem(NGramModel(space, 2), constraint(exactly("w3", 7, space)), 1.0)
    target = posterior(problem)
    assert target.method == "forward_backward"
    assert space.size == 10**100
    log_binomial = (
        math.lgamma(51)
        - math.lgamma(8)
        - math.lgamma(44)
        + 7 * math.log(0.01)
        + 43 * math.log(0.99)
    )
    close(target.log_evidence, log_binomial)
    tokens = target.model.sample(50, draw=seeded_draw(0))
    assert bool(((tokens == 3).sum(-1) == 7).all())
    close(target.model.kl_to_prior(), -log_binomial)
    close(
        target.model.count_moments(["w3", "w4"]).mean,
        torch.tensor([7, 43 / 99], dtype=torch.float64),
    )


def test_the_feasible_prior_of_a_large_space_is_a_posterior_without_reward():
    space = SequenceSpace(tuple("abcdefgh"), 30, eos=False)
    prior = feasible_prior(Problem(NGramModel(space, 2), constraint(exactly("a", 1, space)), 0.5))
    assert isinstance(prior, StructuredPosterior)
    tokens = prior.sample(8, draw=seeded_draw(0))
    close(
        prior.log_prob(tokens),
        torch.full((8,), -math.log(30) - 29 * math.log(7), dtype=torch.float64),
    )
