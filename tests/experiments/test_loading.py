"""Losses, functions and models by their names: the package's with arguments, and one's own."""

import json
import math

import pytest
import torch

from klrl_edu.core.errors import InputError
from klrl_edu.experiments import cli
from klrl_edu.experiments.loading import find_function, find_loss, package_losses
from klrl_edu.learning import losses
from klrl_edu.learning.batches import needs_of

OWN = """
import torch
from klrl_edu import LanguageModel, losses

def scaled(batch, *, factor=1.0):
    return factor * losses.rloo(batch)

def needs_more(batch, critic):
    return losses.rloo(batch)

class Baseline(torch.nn.Module):
    def __init__(self, start=0.0):
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, batch):
        reward = losses.penalised_reward(batch) - self.level
        return -(reward.detach() * batch.log_probs.sum(-1)).mean() + reward.square().mean()

class Positions(LanguageModel):
    "A row of logits a position."

    def __init__(self, space, seed=0):
        super().__init__()
        self.space = space
        drawn = torch.randn(space.max_length, space.vocab_size, dtype=torch.float64,
                            generator=torch.Generator().manual_seed(seed))
        self.logits = torch.nn.Parameter(drawn)

    def forward(self, tokens, prompt=None):
        return self.logits.expand(len(tokens), -1, -1)

    def start(self, n, prompt=None):
        return self.logits[0].expand(n, -1), 0

    def step(self, state, token):
        return self.logits[state + 1].expand(len(token), -1), state + 1

    def select(self, state, index):
        return state

class NoModel:
    def __init__(self, space):
        pass

def other_space(space):
    return Positions(type(space)(("x",), 3))

def fails(space):
    return space.nothing
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")


def result(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_every_loss_of_the_package_has_its_name():
    known = package_losses()
    assert known["rloo"] is losses.rloo
    assert {"exact", "reinforce", "ppo_clip", "grpo", "dapo", "gspo", "cispo", "f_dpg"} <= set(
        known
    )
    assert "penalised_reward" not in known
    assert all(find_loss(name) is known[name] for name in set(known) - {"f_dpg"})
    assert find_loss("losses.rloo") is losses.rloo


def test_arguments_are_bound_as_plain_values():
    loss = find_loss("dapo(clip_low=0.1, clip_high=3e-1)")
    assert (loss.func, loss.keywords) == (losses.dapo, {"clip_low": 0.1, "clip_high": 0.3})
    assert needs_of(find_loss("exact()")) == {"support"}
    assert find_loss("own.py:scaled(factor=2)").keywords == {"factor": 2}
    assert find_loss("own.py:Baseline(start=3.0)").level.item() == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rlo", "loss 'rlo' is not known (nearest: rloo); choose from exact, reinforce, rloo, "),
        ("penalised_reward", "loss 'penalised_reward' is not known"),
        (
            "grpo(clp=0.1)",
            "loss grpo has no argument 'clp' (nearest: clip); it takes clip, epsilon",
        ),
        ("rloo(clip=1)", "loss rloo has no argument 'clip'; it takes none"),
        ("grpo(0.1)", "write the others by name, such as clip=0.1"),
        ("grpo(**{'clip': 1})", "write the others by name"),
        ("grpo(clip=open('x'))", "write arguments as plain values"),
        ("grpo(clip=0.1", "cannot be read"),
        ("grpo(clip=0.1))", "cannot be read"),
        ("", "cannot be read"),
        ("f_dpg", "loss f_dpg needs pseudo_reward and log_evidence besides the batch"),
        ("f_dpg(log_evidence=0)", "loss f_dpg needs pseudo_reward besides the batch"),
        ("own.py:needs_more", "loss own.py:needs_more needs critic besides the batch"),
        ("own.py:scled", "own.py has no function 'scled'; it has scaled, needs_more"),
        ("own.py:scled", "(nearest: scaled)"),
        ("own.py:Baseline(stop=1)", "cannot be made with the arguments given: TypeError"),
    ],
)
def test_a_loss_that_cannot_be_called_says_why(text, said):
    with pytest.raises(InputError) as caught:
        find_loss(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_audit_and_train_find_the_same_functions():
    assert find_function("losses.rloo") is losses.rloo
    batch_loss = find_function("own.py:scaled")
    assert batch_loss.__name__ == find_loss("own.py:scaled").__name__ == "scaled"


@pytest.mark.parametrize("loss", sorted(set(package_losses()) - {"f_dpg"}))
def test_every_loss_trains_by_its_name(loss, tmp_path):
    words = ["train", "four-sentences", "--loss", loss, "--steps", "3", "--out", "run", "--quiet"]
    assert cli.main(words) == 0
    saved = result(tmp_path / "run")
    assert saved["steps_done"] == 3
    assert saved["end"]["reverse_kl"] != saved["start"]["reverse_kl"]


def test_an_argument_reaches_the_loss(tmp_path):
    for name, loss in (("a", "own.py:scaled"), ("b", "own.py:scaled(factor=0.5)")):
        words = ["train", "four-sentences", "--loss", loss, "--steps", "1", "--out", name]
        assert cli.main([*words, "--quiet"]) == 0
    first, half = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[1]) for name in "ab"
    )
    assert half["loss"] == first["loss"] / 2


def test_a_model_of_one_s_own_trains_and_is_compared_when_it_is_named(tmp_path, capsys):
    words = ["train", "four-sentences", "--model", "own.py:Positions", "--seed", "3"]
    assert cli.main([*words, "--steps", "40", "--lr", "0.05", "--out", "run", "--quiet"]) == 0
    saved = result(tmp_path / "run")
    assert saved["end"]["reverse_kl"] < saved["start"]["reverse_kl"]
    assert cli.main(["compare", "run", "--quiet"]) == 2
    assert "klrl compare run --model own.py:Positions" in capsys.readouterr().err
    assert cli.main(["compare", "run", "--model", "own.py:Positions", "--quiet"]) == 0
    again = result(tmp_path / "run" / "compare")
    assert {name: again[name] for name in saved["end"]} == saved["end"]


def test_the_seed_reaches_a_model_that_takes_one(tmp_path):
    starts = set()
    for seed in ("0", "1"):
        words = ["train", "four-sentences", "--model", "own.py:Positions", "--seed", seed]
        assert cli.main([*words, "--steps", "1", "--out", f"run{seed}", "--quiet"]) == 0
        starts.add(result(tmp_path / f"run{seed}")["start"]["reverse_kl"])
    assert len(starts) == 2


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("own.py:NoModel", "made a NoModel, which is no LanguageModel; derive it from"),
        ("own.py:other_space", "keep the space that it is given"),
        ("own.py:fails", "fails(space) failed (line 50): AttributeError"),
        ("own.py:Nope", "own.py has no function 'Nope'; it has "),
        ("rnn", "invalid choice 'rnn'; choose from table, lstm, gru, transformer, or give"),
    ],
)
def test_what_is_no_language_model_is_refused(model, said, tmp_path, capsys):
    assert cli.main(["train", "four-sentences", "--model", model]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_training_that_leads_away_says_so(tmp_path, capsys):
    words = ["train", "four-sentences", "--lr", "100", "--steps", "30", "--out", "run", "--quiet"]
    assert cli.main(words) == 0
    saved, error = result(tmp_path / "run"), capsys.readouterr().err
    assert saved["end"]["objective_gap"] > saved["start"]["objective_gap"]
    assert "further from the posterior than at the start" in error
    assert "Lower --lr (it was 100)" in error
    assert cli.main(["train", "four-sentences", "--steps", "30", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_less_of_what_the_posterior_holds_is_said_too():
    from klrl_edu.experiments.train_command import further_away

    start = {"objective_gap": 1.0, "forward_kl": 1.0}
    assert further_away(start, {"objective_gap": 0.5, "forward_kl": 0.5}) is None
    assert "KL(π*‖π) went from 1 to 10210 nats" in further_away(
        start, {"objective_gap": 0.5, "forward_kl": 10210.0}
    )
    assert "went from 1 to inf" in further_away(
        start, {"objective_gap": math.inf, "forward_kl": 0.5}
    )


def test_weights_are_numbers_in_every_run(tmp_path):
    assert cli.main(["train", "four-sentences", "--steps", "1", "--out", "run", "--quiet"]) == 0
    from klrl_edu.evaluation.records import load_checkpoint

    state = load_checkpoint(tmp_path / "run" / "policy.pt")
    assert state["step"] == 1
    assert all(torch.isfinite(value).all() for value in state["weights"].values())
