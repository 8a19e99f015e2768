"""The Transformer against its equations written out in loops, seeds, prompts, refusals."""

import math

import pytest
import torch

from klrl_edu.core.errors import InputError
from klrl_edu.models.transformer import TransformerModel
from tests.models.toys import words

SPACE = words(3, 4)


def normalised(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt(centred.square().mean() + norm.eps) * norm.weight + norm.bias


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def by_hand(model: TransformerModel, prompt: list[int], tokens: list[int]) -> list[torch.Tensor]:
    """Logits from BOS on, one position, head and key at a time; the prompt without its padding."""
    length = SPACE.max_length
    ids = [*prompt, SPACE.vocab_size, *tokens]
    rows = [length + len(prompt) - 1 - i for i in range(len(prompt))] + list(range(len(tokens) + 1))
    stream = [
        model.token_embedding.weight[i] + model.position_embedding.weight[r]
        for i, r in zip(ids, rows, strict=True)
    ]
    for block in model.blocks:
        width = stream[0].shape[0] // block.heads
        parts = [
            (block.qkv.weight @ normalised(x, block.attention_norm) + block.qkv.bias).split(
                stream[0].shape[0]
            )
            for x in stream
        ]
        after = []
        for i, x in enumerate(stream):
            heads = []
            for h in range(block.heads):
                one = slice(h * width, (h + 1) * width)
                scores = torch.stack(
                    [parts[i][0][one] @ parts[j][1][one] / math.sqrt(width) for j in range(i + 1)]
                )
                heads.append(sum(a * parts[j][2][one] for j, a in enumerate(scores.softmax(0))))
            x = x + block.project.weight @ torch.cat(heads) + block.project.bias
            inner = gelu(block.expand.weight @ normalised(x, block.mlp_norm) + block.expand.bias)
            after.append(x + block.contract.weight @ inner + block.contract.bias)
        stream = after
    return [model.head.weight @ normalised(x, model.norm) for x in stream[len(prompt) :]]


def scrambled(max_prompt: int = 0) -> TransformerModel:
    """Weights large enough that every part shows, norms and biases included."""
    model = TransformerModel(SPACE, width=8, heads=2, layers=2, max_prompt=max_prompt)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return model


@pytest.mark.parametrize("prompt", [[], [2], [1, 0, 2]])
def test_logits_follow_the_equations(prompt):
    model, tokens = scrambled(max_prompt=3), torch.tensor([[2, 0, 1, 3]])
    padded = torch.tensor([[-1] * (3 - len(prompt)) + prompt, [0, 1, 2]]) if prompt else None
    logits = model(tokens if padded is None else tokens.expand(2, -1), padded)[0]
    assert torch.allclose(
        logits, torch.stack(by_hand(model, prompt, [2, 0, 1])), rtol=0, atol=1e-12
    )


def test_branches_share_their_parents_cache_and_agree_with_steps():
    model = scrambled()
    logits, state = model.start(2)
    tokens = torch.tensor([[0, 1, 2], [2, 1, 0]])
    branched, children = model.branch(state, tokens)
    for k in range(3):
        logits, _ = model.step(state, tokens[:, k])
        assert torch.allclose(branched[:, k], logits, rtol=0, atol=1e-13)
    assert all(
        layer.shape[0] == 2 for layer in children.keys
    )  # two parents' caches, not six children's
    chosen = torch.tensor([5, 0, 2])
    for again, state_of in ((model.select(children, chosen), chosen), (children, torch.arange(6))):
        token = torch.zeros(len(state_of), dtype=torch.long)
        parents = model.select(state, state_of // 3)
        _, stepped = model.step(parents, tokens.reshape(-1)[state_of])
        assert torch.allclose(
            model.step(again, token)[0], model.step(stepped, token)[0], rtol=0, atol=1e-13
        )


def test_a_prompt_longer_than_max_prompt_is_refused_unless_the_rest_is_padding():
    model = scrambled(max_prompt=2)
    tokens = torch.tensor([[0, 1, 2, 3]])
    with pytest.raises(
        InputError,
        match=r"prompt has 3 tokens, more than max_prompt = 2; build it with max_prompt=3",
    ):
        model(tokens, torch.tensor([[0, 1, 2]]))
    assert torch.allclose(
        model(tokens, torch.tensor([[-1, -1, 1, 2]])),
        model(tokens, torch.tensor([[1, 2]])),
        rtol=0,
        atol=1e-13,
    )


def test_equal_seeds_give_equal_weights_and_the_global_generator_stays():
    before = torch.get_rng_state()
    one, same, other = (
        TransformerModel(SPACE, width=8, heads=2, seed=seed).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if one[name].ndim == 2)


def test_every_weight_is_finite_and_reached_by_the_gradient():
    model = TransformerModel(SPACE, width=8, heads=2, max_prompt=3)
    model(
        torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]]), torch.tensor([[0, 1, 2], [2, 1, 0]])
    ).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_gradients_stay_finite_beside_a_prompt_of_padding_only():
    model = TransformerModel(SPACE, width=8, heads=2, max_prompt=2)
    model(torch.tensor([[0, 1, 2, 3]] * 2), torch.tensor([[-1, -1], [0, 1]])).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kwargs", [{"width": 9}, {"heads": 0}, {"layers": 0}, {"max_prompt": -1}])
def test_wrong_options_are_refused_by_name(kwargs):
    with pytest.raises(InputError, match=next(iter(kwargs))):
        TransformerModel(SPACE, **kwargs)


def test_float32_is_kept():
    assert (
        TransformerModel(SPACE, width=8, heads=2, dtype=torch.float32)(
            torch.tensor([[0, 1, 2, 3]])
        ).dtype
        == torch.float32
    )
