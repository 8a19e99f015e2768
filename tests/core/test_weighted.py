"""Weighted sequences."""

import math

import pytest
import torch

from klrl_edu.core.errors import InfeasibleError, InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.weighted import WeightedSequences

SPACE = SequenceSpace(("a", "b"), 2, eos=False)


def weighted(*log_weights: float) -> WeightedSequences:
    return WeightedSequences(
        SPACE,
        SPACE.all_tokens()[: len(log_weights)],
        torch.tensor(log_weights, dtype=torch.float64),
        exact=True,
    )


def test_evidence_is_the_sum_of_the_weights_and_log_probs_are_normalised_by_it():
    table = weighted(math.log(2), -math.inf, math.log(6))
    assert table.log_evidence.item() == pytest.approx(math.log(8), rel=1e-15)
    assert table.log_probs.exp().tolist() == pytest.approx([0.25, 0, 0.75], rel=1e-15)
    assert table.effective_sample_size.item() == pytest.approx(1.6, rel=1e-14)
    assert (len(table), table.texts) == (3, ["a a", "a b", "b a"])


def test_weights_without_mass_have_no_evidence_and_no_distribution():
    table = weighted(-math.inf, -math.inf)
    assert table.log_evidence.item() == -math.inf
    with pytest.raises(InfeasibleError):
        _ = table.log_probs


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_of_nan_or_inf_is_refused(bad):
    with pytest.raises(InputError, match="NaN or"):
        weighted(0.0, bad)


def test_tokens_of_another_space_and_a_wrong_count_are_refused():
    with pytest.raises(InputError, match="does not belong"):
        WeightedSequences(SPACE, torch.tensor([[0, 2]]), torch.zeros(1), exact=True)
    with pytest.raises(InputError, match=r"log_weights has shape \[3\]; expected \[2\]"):
        WeightedSequences(SPACE, SPACE.all_tokens()[:2], torch.zeros(3), exact=False)
