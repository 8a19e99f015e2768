"""`klrl train`: its defaults, and that its short cuts change nothing."""

import json
import math

import pytest
import torch

from klrl_edu.core.draws import seeded_draw
from klrl_edu.evaluation.records import load_checkpoint
from klrl_edu.exact.posterior import feasible_prior, looked_up, posterior
from klrl_edu.experiments import cli
from klrl_edu.experiments.runner import build_policy
from klrl_edu.learning import losses
from klrl_edu.learning.training import SCHEDULES, train_steps
from klrl_edu.models.contract import conditional_log_probs, enumerate_support
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.tables import load_table

HARD = "sentence,prob,reward\nthe cat,0.4,1\nthe dog,0.3,-inf\na cat,0.2,0\na dog,0.1,2\n"


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hard.csv").write_text(HARD, encoding="utf-8")
    return posterior(load_table("hard.csv", 0.5))


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_a_network_is_float32_and_kept_to_the_feasible_prior(model, target):
    policy = build_policy(model, target, 0)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    tokens = target.problem.space.all_tokens()
    kept, wanted = (
        conditional_log_probs(law, tokens)
        for law in (policy.reference, feasible_prior(target.problem))
    )
    assert torch.allclose(kept.exp(), wanted.exp(), rtol=0, atol=1e-15)
    support = enumerate_support(policy)
    assert target.problem.space.decode(support.tokens) == ["the cat", "a cat", "a dog"]


@pytest.mark.parametrize(
    ("model", "loss", "lr"),
    [("table", "exact", 0.2), ("gru", "rloo", 0.01)],
)
def test_loss_and_learning_rate_follow_the_model(model, loss, lr, target, tmp_path):
    words = ["train", "hard.csv", "--model", model, "--steps", "1", "--out", "run", "--quiet"]
    assert cli.main(words) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["loss"], config["lr"], config["batch_size"]) == (loss, lr, 256)


@pytest.mark.parametrize("loss", ["exact", "rloo"])
def test_a_run_trains_as_the_loop_of_the_library_does(loss, target, tmp_path):
    words = ["train", "hard.csv", "--model", "table", "--loss", loss, "--kl-coef", "0.5"]
    assert cli.main([*words, "--steps", "4", "--seed", "3", "--out", "run", "--quiet"]) == 0
    policy = feasible_prior(target.problem)
    assert isinstance(policy, SequenceTable)
    problem, schedule = looked_up(target), SCHEDULES["warmup_cosine"]
    sampled = {} if loss == "exact" else {"draw": seeded_draw(3), "batch_size": 256}
    for _ in train_steps(
        policy,
        problem,
        getattr(losses, loss),
        steps=4,
        optimizer=torch.optim.Adam(policy.parameters(), lr=0.2, eps=1e-12, fused=True),
        schedule=schedule,
        max_grad_norm=1.0,
        **sampled,
    ):
        pass
    saved = load_checkpoint(tmp_path / "run" / "policy.pt")["weights"]["logits"]
    assert torch.equal(saved, policy.logits.detach())
    assert math.isfinite(float(saved.sum()))
