"""Recurrent models against their equations written out, seeds, prompts, refusals."""

import pytest
import torch

from klrl_edu.core.errors import InputError
from klrl_edu.models.recurrent import RecurrentModel
from tests.models.toys import words

SPACE = words(3, 4)


def by_hand(model: RecurrentModel, ids: list[int]) -> torch.Tensor:
    """Logits after ids by the equations of Hochreiter & Schmidhuber (1997) and Cho et al. (2014),
    one layer at a time.
    """
    weights, size = model.recurrent, model.recurrent.hidden_size
    inputs = [model.embedding.weight[i] for i in ids]
    for layer in range(weights.num_layers):
        w, u, b, c = (
            getattr(weights, f"{name}_l{layer}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden = cell = torch.zeros(size, dtype=w.dtype)
        outputs = []
        for x in inputs:
            from_x, from_h = (w @ x + b).split(size), (u @ hidden + c).split(size)
            if model.cell == "lstm":
                i, f, g, o = (a + h for a, h in zip(from_x, from_h, strict=True))
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = o.sigmoid() * cell.tanh()
            else:
                reset, update = (from_x[0] + from_h[0]).sigmoid(), (from_x[1] + from_h[1]).sigmoid()
                new = (from_x[2] + reset * from_h[2]).tanh()
                hidden = (1 - update) * new + update * hidden
            outputs.append(hidden)
        inputs = outputs
    return model.head.weight @ inputs[-1] + model.head.bias


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_logits_follow_the_equations_with_a_prompt_before_bos(cell, layers):
    model = RecurrentModel(SPACE, cell=cell, hidden_size=5, layers=layers, seed=1)
    tokens, prompt, bos = torch.tensor([[2, 0, 1, 3]]), torch.tensor([[-1, 1, 2]]), SPACE.vocab_size
    for given, before in ((None, []), (prompt, [1, 2])):
        logits = model(tokens, given)[0]
        for t in range(4):
            assert torch.allclose(
                logits[t],
                by_hand(model, [*before, bos, *tokens[0, :t].tolist()]),
                rtol=0,
                atol=1e-14,
            )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_equal_seeds_give_equal_weights_and_the_global_generator_stays(cell):
    before = torch.get_rng_state()
    one, same, other = (
        RecurrentModel(SPACE, cell=cell, hidden_size=5, layers=2, seed=seed).state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_every_weight_is_initialised_to_a_finite_number_and_reached_by_the_gradient():
    model = RecurrentModel(SPACE, hidden_size=5, layers=2)
    prompt = torch.tensor([[0, 1, 2]]).expand(2, -1)
    model(torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]]), prompt).square().sum().backward()
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()
        assert parameter.grad is not None
        assert (parameter.grad != 0).any()


@pytest.mark.parametrize(
    "kwargs", [{"cell": "rnn"}, {"hidden_size": 0}, {"layers": 0}, {"seed": -1}]
)
def test_wrong_options_are_refused_by_name(kwargs):
    with pytest.raises(InputError, match=next(iter(kwargs))):
        RecurrentModel(SPACE, **kwargs)


def test_float32_is_kept():
    assert (
        RecurrentModel(SPACE, hidden_size=4, dtype=torch.float32)(
            torch.tensor([[0, 1, 2, 3]])
        ).dtype
        == torch.float32
    )
