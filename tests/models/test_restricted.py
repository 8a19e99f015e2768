"""Policies kept to a support: what the contract tests do not already cover."""

import math

import pytest
import torch

from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.posterior import feasible_prior
from klrl_edu.models.contract import (
    LanguageModel,
    conditional_log_probs,
    enumerate_support,
    sequence_log_probs,
)
from klrl_edu.models.ngram import NGramModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems import automata
from klrl_edu.problems.problem import Problem

SPACE = SequenceSpace(("a", "b"), max_length=2, eos=False)


def table(*texts):
    return SequenceTable.from_texts({text: 1 / len(texts) for text in texts}, space=SPACE)


def test_a_policy_that_shares_no_next_token_with_its_reference_is_refused_not_nan():
    policy = restrict_to_support(table("a a", "b b"), table("a b", "b b"))
    with pytest.raises(InputError, match="no next token in common"):
        sequence_log_probs(policy, SPACE.encode(["a b"]))
    with pytest.raises(InputError, match="no next token in common"):
        enumerate_support(policy)


def test_a_prefix_out_of_the_reference_s_reach_is_uniform_and_its_mass_is_zero():
    policy = restrict_to_support(RecurrentModel(SPACE, hidden_size=4), table("a a", "a b"))
    rows = conditional_log_probs(policy, SPACE.encode(["b a"]))[0].detach()
    assert rows[0].tolist() == [0.0, -math.inf]
    assert rows[1].tolist() == pytest.approx([math.log(0.5)] * 2)
    assert len(enumerate_support(policy)) == 2


class DeadLastRow(LanguageModel):
    """A model whose raw logits at the last position, where EOS is forced, are all −inf."""

    def __init__(self):
        super().__init__()
        self.space = SequenceSpace(("a",), max_length=2)
        self.logits = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def forward(self, tokens, prompt=None):
        return torch.stack([self.logits, self.logits - math.inf]).expand(len(tokens), 2, 2)


def test_a_forced_row_never_sends_nan_into_the_gradient():
    model = DeadLastRow()
    sequence_log_probs(model, model.space.encode(["a"])).sum().backward()
    p = torch.softmax(model.logits.detach(), 0)
    assert model.logits.grad.tolist() == pytest.approx([1 - p[0].item(), -p[1].item()])


def test_a_move_takes_the_reference_along_and_leaves_the_priors_own_weights():
    """Two policies share a prior; one of them moves, and neither the prior nor the other does."""
    prior = NGramModel(SPACE, 2)
    moved, other = (restrict_to_support(RecurrentModel(SPACE, hidden_size=4), prior) for _ in "ab")
    mine = dict(moved.named_parameters())
    assert moved.to("cpu").reference is prior  # nothing moves
    assert moved.to("meta").reference.logits.device.type == "meta"
    assert moved.reference.successor.device.type == "meta"
    assert prior.logits.device.type == prior.successor.device.type == "cpu"
    assert other.reference is prior
    assert dict(moved.named_parameters()).keys() == mine.keys()  # the prior's are not among them
    assert other.float().reference.logits.dtype == torch.float32
    assert prior.logits.dtype == torch.float64
    assert enumerate_support(other).tokens.tolist() == SPACE.all_tokens().tolist()


def test_a_reference_that_moved_by_itself_is_still_shared():
    prior = NGramModel(SPACE, 2)
    policy = restrict_to_support(RecurrentModel(SPACE, hidden_size=4), prior)
    prior.float()
    assert policy.float().reference is prior


def test_the_support_of_a_structured_posterior_moves_too():
    space = SequenceSpace(("a", "b"), max_length=6)
    reward = automata.accept_reward(automata.at_least("a", 2, space), 0.0, -math.inf)
    problem = Problem(NGramModel(space, 2), reward, 1.0)
    reference = feasible_prior(problem, max_sequences=3)
    policy = restrict_to_support(RecurrentModel(space, hidden_size=4), reference)
    policy.to("meta")
    assert policy.reference.chain.log_start.device.type == "meta"
    assert reference.chain.log_start.device.type == "cpu"


def test_a_module_that_holds_the_policy_moves_its_reference():
    prior = NGramModel(SPACE, 2)
    both = torch.nn.ModuleList([restrict_to_support(RecurrentModel(SPACE, hidden_size=4), prior)])
    assert both.to("meta")[0].reference.logits.device.type == "meta"
