"""The messages of forward–backward against enumeration: evidence and value for every kind of
prior and any λ, as numbers and as logarithms.
"""

import math
from dataclasses import replace

import pytest
import torch

from klrl_edu.core.errors import InfeasibleError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact import forward_backward
from klrl_edu.exact.forward_backward import backward
from klrl_edu.exact.lattice import build_lattice
from klrl_edu.exact.posterior import posterior
from klrl_edu.exact.structured import StructuredPosterior
from klrl_edu.models.ngram import NGramModel
from klrl_edu.problems.automata import (
    AutomatonReward,
    constraint,
    exactly,
)
from klrl_edu.problems.problem import Problem
from tests.exact.lattices import INF, LAMBDAS, both, close, random_problem


@pytest.mark.parametrize("kl_coef", LAMBDAS)
@pytest.mark.parametrize("kind", ["bigram", "hmm-3"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_value_and_evidence_agree_with_enumeration(kind, kl_coef, hard):
    for seed in range(12):
        problem = random_problem(kind, kl_coef, seed, hard=hard)
        try:
            oracle = posterior(problem, "enumeration")
        except InfeasibleError:
            continue
        target = posterior(problem, "forward_backward")
        assert target.method == "forward_backward"
        close(target.value, oracle.value)
        close(target.log_evidence, oracle.log_evidence)


@pytest.mark.parametrize("kind", ["bigram", "hmm-3"])
@pytest.mark.parametrize("kl_coef", [0.1, 5e-324])
def test_huge_rewards_stay_finite(kind, kl_coef):
    for seed in range(12):
        pair = both(random_problem(kind, kl_coef, seed, scale=5e306), "logs")
        if pair is not None:
            close(pair[0].log_prob(pair[1].enumerated().tokens).exp(), pair[1].log_probs.exp())
            assert bool(torch.isfinite(pair[0].anchor))


def test_rewards_that_span_what_no_weight_can_are_messages_of_logarithms():
    space = SequenceSpace(("a", "b"), 2, eos=False)
    final = torch.tensor([0.0, 450.0], dtype=torch.float64)
    moves, words = torch.tensor([[0, 1], [0, 1]]), torch.zeros(2, 2, dtype=torch.float64)
    reward = AutomatonReward(space, moves, 0, words, final, "ends in b")
    problem = Problem(NGramModel(space, 1), reward, 0.5)
    assert forward_backward._backward_in_numbers(build_lattice(problem)) is None
    close(posterior(problem, "forward_backward").log_evidence, 900 - math.log(2))


def test_the_largest_reward_and_the_least_entry_pass_over_what_is_none():
    lattice = build_lattice(random_problem("bigram", 1.0, 7))
    words = torch.tensor([[0.5, -3.0], [-INF, 0.0]], dtype=torch.float64)
    some = replace(lattice, word_rewards=words, final_rewards=words[1])
    assert forward_backward._largest(some) == 3
    assert forward_backward._largest(replace(some, word_rewards=words[1:] - INF)) == 0
    assert forward_backward._least(torch.tensor([0.5, 0.0, 0.25])) == 0.25
    assert forward_backward._least(torch.zeros(2)) == 0


def test_messages_of_numbers_give_way_where_they_might_underflow():
    space = SequenceSpace(("a", "b"), 2000, eos=False)
    logits = torch.tensor([0.0, -800.0], dtype=torch.float64).expand(3, 2)
    lattice = build_lattice(
        Problem(NGramModel(space, 2, logits), constraint(exactly("b", 2, space)), 1.0)
    )
    assert forward_backward._backward_in_numbers(lattice) is None
    expected = math.lgamma(2001) - math.lgamma(3) - math.lgamma(1999) - 1600
    close(StructuredPosterior(lattice, backward(lattice)).log_mass, expected)
