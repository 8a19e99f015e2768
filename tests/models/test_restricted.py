"""Policies kept to a support: what the contract tests do not already cover."""

import math

import pytest
import torch

from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.contract import (
    LanguageModel,
    conditional_log_probs,
    enumerate_support,
    sequence_log_probs,
)
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import SequenceTable

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
