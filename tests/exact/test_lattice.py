"""What can be no lattice is named; a lattice moves with its model."""

import math

import pytest
import torch

from klrl_edu.core.errors import InfeasibleError, InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.lattice import Lattice, build_lattice
from klrl_edu.exact.posterior import posterior
from klrl_edu.models.finite_state import FiniteStateModel
from klrl_edu.models.hmm import HiddenMarkovModel
from klrl_edu.models.ngram import NGramModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.problems.automata import (
    accept_reward,
    constraint,
    exactly,
    length_between,
)
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import count_reward, text_reward
from tests.exact.lattices import random_problem


class Unnormalised(FiniteStateModel):
    """Emits with total mass 1.1."""

    def __init__(self, space):
        super().__init__()
        self.space = space

    def initial_log_probs(self):
        return torch.zeros(1, dtype=torch.float64)

    def emission_log_probs(self):
        return torch.full((1, 2), math.log(0.55), dtype=torch.float64)

    def successors(self):
        return torch.zeros(1, 1, dtype=torch.long)


def test_bad_problems_are_named():
    space, other = SequenceSpace(("a",), 3), SequenceSpace(("b",), 3)
    with pytest.raises(InfeasibleError, match="exactly 5 × 'a'"):
        posterior(
            Problem(NGramModel(space, 2), constraint(exactly("a", 5, space)), 1.0),
            "forward_backward",
        )
    both_lengths = length_between(0, 1, space) & length_between(2, 2, space)
    with pytest.raises(InfeasibleError, match=r"\(0 to 1 words\) and \(2 to 2 words\)"):
        posterior(Problem(NGramModel(space, 1), constraint(both_lengths), 1.0), "forward_backward")
    with pytest.raises(InputError, match=r"only here: \['a'\]; only there: \['b'\]"):
        build_lattice(Problem(NGramModel(space, 2), accept_reward(exactly("b", 1, other)), 1.0))
    with pytest.raises(InputError, match="RecurrentModel; forward-backward needs an n-gram"):
        build_lattice(Problem(RecurrentModel(space, hidden_size=2), count_reward("a", space), 1.0))
    with pytest.raises(InputError, match="no automaton is known for the reward 'len'"):
        build_lattice(Problem(NGramModel(space, 2), text_reward(len, space), 1.0))
    with pytest.raises(InputError, match=r"emission_log_probs sum to 1.1 in row 0"):
        build_lattice(Problem(Unnormalised(space), count_reward("a", space), 1.0))
    hidden = posterior(
        Problem(HiddenMarkovModel.random(space, 2), count_reward("a", space), 1.0),
        "forward_backward",
    ).model
    for question in (hidden.entropy, lambda: hidden.top_sequences(2)):
        with pytest.raises(InputError, match="samples"):
            question()
    with pytest.raises(InputError, match=r"\['z'\] are not in the vocabulary"):
        hidden.count_moments(["z"])


def test_too_many_numbers_are_refused_with_their_count():
    space = SequenceSpace(tuple(f"w{k}" for k in range(1000)), 10, eos=False)
    with pytest.raises(
        TooLargeError,
        match=r"1,001 contexts × 302 automaton states × 1,000 make 302,302,000 numbers",
    ):
        build_lattice(Problem(NGramModel(space, 2), constraint(exactly("w0", 300, space)), 1.0))


def test_what_the_prior_cannot_reach_forbids_nothing():
    # context 0 says a and stays; context 1 says b, which is forbidden, and is never entered
    space = SequenceSpace(("a", "b"), 3, eos=False)
    never = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64)
    reward = constraint(exactly("b", 0, space))
    for transition, forbids in ((never, False), (torch.zeros_like(never), True)):
        prior = HiddenMarkovModel(space, never[0], transition, never)
        assert build_lattice(Problem(prior, reward, 1.0)).forbids() == forbids


def test_a_lattice_moves_with_its_model():
    model = posterior(random_problem("hmm-3", 0.5, 4), "forward_backward").model
    assert isinstance(model.float().double().lattice, Lattice)
