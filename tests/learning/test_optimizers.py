"""Muon for the matrices between layers, Adam for the rest, as one optimiser."""

import torch

from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.learning import losses
from klrl_edu.learning.optimizers import MuonWithAdam
from klrl_edu.learning.training import linear, train
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import count_reward

SPACE = SequenceSpace(("a", "b"), 3)


def test_each_parameter_has_one_optimiser():
    model = TransformerModel(SPACE, width=8, heads=2, layers=2, seed=0)
    optimizer = MuonWithAdam(model)
    muon, adam = (
        {id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts
    )
    assert muon == {
        id(p) for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2
    }
    assert adam == {id(p) for p in model.parameters()} - muon


def test_a_model_without_blocks_is_adams():
    model, twin = (RecurrentModel(SPACE, hidden_size=4, seed=0) for _ in range(2))
    optimizers = [MuonWithAdam(model, adam_lr=0.01), torch.optim.Adam(twin.parameters(), lr=0.01)]
    for optimizer, policy in zip(optimizers, (model, twin), strict=True):
        policy.log_prob(SPACE.all_tokens()).sum().backward()
        optimizer.step()
    assert all(
        torch.equal(mine, other)
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_matrix_moves_by_the_same_amount_in_every_direction():
    model = TransformerModel(SPACE, width=16, heads=2, layers=1, seed=0)
    weight = model.blocks[0].project.weight
    before = weight.detach().clone()
    model.log_prob(SPACE.all_tokens()).sum().backward()
    rank = int(
        (torch.linalg.svdvals(weight.grad) > 1e-6 * torch.linalg.svdvals(weight.grad)[0]).sum()
    )
    MuonWithAdam(model, lr=0.01).step()
    moved = torch.linalg.svdvals(weight.detach() - before)[:rank] / 0.01
    assert bool(
        ((moved > 0.5) & (moved < 1.5)).all()
    )  # five Newton-Schulz steps bring singular values near 1, not onto it


def test_the_schedule_reaches_both_parts():
    model = TransformerModel(SPACE, width=8, heads=2, layers=1, seed=0)
    optimizer = MuonWithAdam(model, lr=1e-2, adam_lr=1e-3)
    problem = Problem(
        TransformerModel(SPACE, width=8, heads=2, layers=1, seed=1).requires_grad_(False),
        count_reward("a", SPACE),
        1.0,
    )
    train(
        model,
        problem,
        losses.rloo,
        steps=4,
        batch_size=8,
        optimizer=optimizer,
        schedule=linear,
        draw=seeded_draw(0),
    )
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [0.25e-2, 0.25e-3]
