"""Random lattices for the tests: a finite-state prior times an automaton, and its posterior by
enumeration.
"""

import math

import pytest
import torch
from torch import Tensor

from klrl_edu.core.errors import InfeasibleError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact import forward_backward
from klrl_edu.exact.lattice import build_lattice
from klrl_edu.exact.posterior import Posterior, posterior
from klrl_edu.exact.structured import StructuredPosterior
from klrl_edu.models.finite_state import FiniteStateModel
from klrl_edu.models.hmm import HiddenMarkovModel
from klrl_edu.models.ngram import NGramModel
from klrl_edu.problems.automata import (
    AutomatonReward,
)
from klrl_edu.problems.problem import Problem

INF = math.inf
LAMBDAS = [1.0, 0.1, 5.0, 0.0, INF, 1e-3, 5e-324]
PRIORS = ["unigram", "bigram", "trigram", "hmm-1", "hmm-3"]
WAYS = {
    "numbers": forward_backward._backward_in_numbers,
    "logs": forward_backward._backward_in_logs,
}


def random_problem(
    kind: str, kl_coef: float, seed: int, *, scale: float = 1.0, hard: bool = False
) -> Problem:
    """A random prior with zeros over 1 to 3 words and 1 to 4 positions, and a random reward on up
    to 4 states.
    """
    generator = torch.Generator().manual_seed(seed)
    space = SequenceSpace(("a", "b", "c")[: 1 + seed % 3], 1 + seed // 3 % 4, eos=seed % 2 == 0)
    words, states = len(space.vocabulary), 1 + seed % 4
    if kind.startswith("hmm"):
        prior: FiniteStateModel = HiddenMarkovModel.random(space, int(kind[-1]), seed=seed)
    else:
        shape = NGramModel(space, 1 + ["unigram", "bigram", "trigram"].index(kind)).logits.shape
        logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        zero = torch.rand(shape, generator=generator) < 0.25
        zero[:, 0] = False
        prior = NGramModel(
            space, 1 + ["unigram", "bigram", "trigram"].index(kind), logits.masked_fill(zero, -INF)
        )
    per_word, final = (
        scale * torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((states, words), (states,))
    )
    if hard:
        per_word = per_word.masked_fill(torch.rand(per_word.shape, generator=generator) < 0.2, -INF)
        final = final.masked_fill(torch.rand(final.shape, generator=generator) < 0.3, -INF)
    transitions = torch.randint(states, (states, words), generator=generator)
    return Problem(
        prior,
        AutomatonReward(space, transitions, seed % states, per_word, final, "a random automaton"),
        kl_coef,
    )


def both(problem: Problem, way: str) -> tuple[StructuredPosterior, Posterior] | None:
    """Forward–backward one way, and enumeration; None where that way or the problem does
    not apply.
    """
    lattice = build_lattice(problem)
    messages = WAYS[way](lattice)
    if messages is None:
        return None
    try:
        oracle = posterior(problem, "enumeration")
    except InfeasibleError:
        with pytest.raises(InfeasibleError, match="a random automaton"):
            StructuredPosterior(lattice, messages)
        return None
    return StructuredPosterior(lattice, messages), oracle


def close(seen: Tensor | float, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        *(torch.as_tensor(side, dtype=torch.float64).detach() for side in (seen, expected)),
        rtol=tolerance,
        atol=tolerance,
    )
