"""Hostile command lines and altered runs: one line with the remedy, never a traceback."""

import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import sys

import pytest
import torch

from klrl_edu.evaluation.records import load_checkpoint, save_checkpoint
from klrl_edu.exact.posterior import posterior
from klrl_edu.experiments import cli, plots
from klrl_edu.problems import tables
from klrl_edu.problems.tables import load_table

FOUR = "sentence,prob,reward\nthe cat,0.4,1\nthe dog,0.3,0\na cat,0.2,0\na dog,0.1,2\n"
LONG = "sentence,prob,reward\n" + " ".join(f"w{i}" for i in range(5000)) + ",.5,1\na b,.5,0\n"
LOSSES = """import torch

def rewarded(batch, scale=1.0):
    return -scale * (batch.rewards.sum(-1) * batch.log_probs.sum(-1)).mean()

def leaves(batch):
    raise SystemExit(3)

class Unspeakable(BaseException):
    def __str__(self):
        raise RuntimeError

def flees(batch):
    raise Unspeakable

def endless(batch):
    import os, signal
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        pass

def bare(space):
    from klrl_edu import RecurrentModel
    made = RecurrentModel.__new__(RecurrentModel)
    made.__dict__["space"] = space
    return made

def breaks_late(batch, seen=[]):
    seen.append(1)
    return batch.nothing if len(seen) > 3 else rewarded(batch)
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "four.csv").write_text(FOUR, encoding="utf-8")
    (tmp_path / "long.csv").write_text(LONG, encoding="utf-8")
    (tmp_path / "own.py").write_text(LOSSES, encoding="utf-8")
    (tmp_path / "exits.py").write_text("import sys\n\nsys.exit(7)\n", encoding="utf-8")
    (tmp_path / "fails.py").write_text("x = 1\n\n\nx.y\n", encoding="utf-8")
    (tmp_path / "looks.py").write_text("def __getattr__(name):\n    1 / 0\n", encoding="utf-8")
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n", encoding="utf-8")
    return tmp_path


def refused(arguments, words, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("klrl: ")
    assert error.count("\n") == 1, error
    assert words in error


HOSTILE = {
    "posterior four.csv --out ~nouser/x": "leads nowhere",
    "train four.csv --batch-size 1000000000000": "a --batch-size of at most",
    "train long.csv": "keeps some 6,430,725,888 numbers for its gradient; at most",
    "train long.csv --loss exact": "at most",
    "audit a..b": "is no function of this package",
    "audit a.b.c": "is no function of this package",
    "audit kl_values.k1.__class__": "is no function of this package",
    "audit kl_values._k": "is no function of this package",
    "audit os:system": "os is of Python's own library",
    "audit ..x:f": "is no name of a module",
    "audit :f": "is no name of a module",
    "audit exits.py:f": "exits.py (line 3) does not import: SystemExit: 7",
    "audit fails.py:f": "fails.py (line 4) does not import: AttributeError",
    "audit own.py:leaves": "own.py:leaves (line 7) failed as a loss: SystemExit: 3",
    "train four.csv --loss exits.py:f": "exits.py (line 3) does not import: SystemExit: 7",
    "train four.csv --loss fails:f": "module 'fails' (line 4) does not import: AttributeError",
    "train four.csv --loss syntax.py:f": "syntax.py (line 2) does not import: SyntaxError",
    "train four.csv --loss own.py:leaves": "own.py:leaves failed (line 7): SystemExit: 3",
    "train four.csv --loss own.py:flees": "own.py:flees failed (line 14): Unspeakable: no message",
    "train four.csv --loss looks.py:f": "looks.py: its 'f' failed (line 2): ZeroDivisionError",
    "train four.csv --loss grpo(clip=None)": "clip = None must be at least 0",
    "train four.csv --loss grpo(clip=1,clip=2)": "gives clip twice; remove one",
    "train four.csv --model own.py:bare": "--model own.py:bare failed",
}


@pytest.mark.parametrize("line", HOSTILE)
def test_a_hostile_call_is_one_line_exit_2_and_leaves_nothing(line, tmp_path, capsys):
    refused(line.split(), HOSTILE[line], capsys)
    assert not (tmp_path / "runs").exists()


def test_a_word_of_thousands_of_letters_does_not_bury_the_message(capsys):
    refused(["posterior", "a/" * 3000], "…", capsys)
    assert cli.main(["train", "four.csv", "--steps", "9" * 5000]) == 2
    error = capsys.readouterr().err
    assert len(error) < 200
    assert "is not a whole number" in error


@pytest.mark.parametrize("size", [10, 200])
def test_a_table_without_end_is_read_up_to_a_limit(size, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, "_MAX_BYTES", 100)
    (tmp_path / "large.csv").write_text(FOUR * size, encoding="utf-8")
    refused(["posterior", "large.csv"], "holds more than 100 bytes", capsys)
    refused(["posterior", "/dev/zero"], "is a binary file", capsys)


def test_a_pipe_is_read_by_posterior_and_refused_by_train_which_needs_it_twice(tmp_path, capsys):
    for command, code in (("posterior", 0), ("train", 2)):
        reader, writer = os.pipe()
        os.write(writer, FOUR.encode())
        os.close(writer)
        assert cli.main([command, f"/dev/fd/{reader}", "--out", command, "--quiet"]) == code
        os.close(reader)
    assert "can be read only once" in capsys.readouterr().err
    assert not (tmp_path / "train").exists()


def test_a_file_s_name_that_is_no_text_is_kept_as_it_is(tmp_path):
    name = os.fsdecode(b"bad\xff.csv")
    (tmp_path / name).write_text(FOUR, encoding="utf-8")
    assert cli.main(["posterior", name, "--out", "out", "--quiet"]) == 0
    saved = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert saved["problem"] == name


@pytest.mark.parametrize("command", ["train four.csv --loss", "audit"])
def test_ctrl_c_ends_an_endless_loss(command, monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main([*command.split(), "own.py:endless"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "klrl: interrupted\n"


def test_a_full_disk_is_named_with_the_file_and_leaves_no_half_picture(
    tmp_path, monkeypatch, capsys
):
    replace = os.replace

    def replace_unless_full(source, target):
        if str(target).endswith(".png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_unless_full)
    full = f"{tmp_path / 'out' / 'posterior.png'}: No space left on device; free some space"
    refused(["posterior", "four.csv", "--out", "out", "--quiet"], full, capsys)
    assert {one.name for one in (tmp_path / "out").iterdir()} == {"config.json", "posterior.csv"}


def test_a_sentence_of_many_words_leaves_room_for_its_bar(tmp_path):
    words = " ".join(f"w{i}" for i in range(300))
    (tmp_path / "many.csv").write_text(f"sentence,prob,reward\n{words},1,0\n", encoding="utf-8")
    target = posterior(load_table(tmp_path / "many.csv", 1.0))
    (label,) = plots.plot_posterior(target).get_yticklabels()
    assert label.get_text().startswith("w0 w1 w2")
    assert label.get_text().endswith("w298 w299  (r = 0)")
    assert len(label.get_text()) < 80


def test_a_loop_of_links_is_no_place_for_results(tmp_path, capsys):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(["posterior", "four.csv", "--out", "a/x"], "leads nowhere", capsys)


@pytest.mark.parametrize("sentence", ["costs $5 or $6", r"$\frac{a}$", r"$\nothing$ \$ a"])
def test_a_dollar_sign_is_a_dollar_sign_in_the_picture(sentence, tmp_path):
    (tmp_path / "prices.csv").write_text(
        f"sentence,prob,reward\n{sentence},0.5,1\nb,0.5,0\n", encoding="utf-8"
    )
    assert cli.main(["posterior", "prices.csv", "--out", "out", "--quiet"]) == 0
    assert (tmp_path / "out" / "posterior.png").exists()


def test_a_loss_that_fails_late_says_its_line_and_keeps_metrics_and_weights(tmp_path, capsys):
    refused(
        ["train", "four.csv", "--loss", "own.py:breaks_late", "--out", "run", "--quiet"],
        "own.py:breaks_late failed (line 30): AttributeError",
        capsys,
    )
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps_done"] == 3
    assert cli.main(["compare", "run", "--quiet"]) == 0


# --- altered runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "four.csv").write_text(FOUR, encoding="utf-8")
    asked = ["train", str(folder / "four.csv"), "--steps", "2", "--model", "lstm"]
    assert cli.main([*asked, "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def change_config(run, **changes):
    config = json.loads((run / "config.json").read_text())
    config["problem"].update(changes.pop("problem", {}))
    config.update(changes)
    (run / "config.json").write_text(json.dumps(config))


def change_state(run, **changes):
    save_checkpoint(run / "policy.pt", {**load_checkpoint(run / "policy.pt"), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"problem": {"separator": None}},
        {"problem": {"separator": 1}},
        {"problem": {"normalize": 1}},
        {"problem": {"kl_coef": "1"}},
        {"problem": {"kl_coef": True}},
        {"problem": {"kl_coef": 10**400}},
        {"problem": {"name": None}},
        {"model": ["lstm"]},
        {"seed": "0"},
        {"table": None},
        {"table": "../four.csv"},
        {"table": "policy.pt"},
        {"table": ["table.csv"]},
    ],
    ids=str,
)
def test_a_config_of_other_types_is_incomplete(changes, run, capsys):
    change_config(run, **changes)
    refused(["compare", "run"], "is incomplete", capsys)


def test_a_config_without_its_table_reads_no_other_file(run, tmp_path, capsys):
    (tmp_path / "secret.csv").write_text("password\n")
    change_config(run, problem={"name": str(tmp_path / "secret.csv")}, table=None)
    refused(["compare", "run"], "is incomplete", capsys)


@pytest.mark.parametrize("depth", [10, 100_000])
def test_a_nested_config_is_no_training_run(depth, run, capsys):
    (run / "config.json").write_text("[" * depth + "]" * depth)
    refused(["compare", "run"], "is not a training run", capsys)


@pytest.mark.parametrize(
    "weights",
    [
        None,
        [1.0],
        {"a": 1},
        {1: torch.zeros(2)},
        torch.zeros(3),
        {"a": torch.zeros(2).to_sparse()},
        {"a": torch.zeros(2, device="meta")},
        {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        {"a": torch.zeros(2, dtype=torch.complex64)},
    ],
    ids=str,
)
def test_weights_that_are_no_tensors_by_name_are_refused(weights, run, capsys):
    change_state(run, weights=weights)
    refused(["compare", "run"], "holds no weights by name", capsys)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(number, run, capsys):
    weights = load_checkpoint(run / "policy.pt")["weights"]
    next(iter(weights.values())).view(-1)[0] = number
    change_state(run, weights=weights)
    refused(["compare", "run"], "hold NaN or infinity", capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_coef": 2.0},
        {"separator": ""},
        {"normalize": True},
        {"name": "four-sentences"},
    ],
    ids=str,
)
def test_another_problem_than_the_one_trained_on_is_refused(changes, run, capsys):
    change_config(run, problem=changes)
    refused(["compare", "run"], "is not what the policy was trained on", capsys)


def test_another_table_than_the_one_trained_on_is_refused(run, capsys):
    (run / "table.csv").write_text(FOUR.replace("a dog,0.1,2", "a dog,0.1,3"))
    refused(["compare", "run"], "is not what the policy was trained on", capsys)


def test_a_run_without_weights_or_table_says_which_is_missing(run, capsys):
    (run / "table.csv").unlink()
    refused(["compare", "run"], "the run's copy of its table, is missing", capsys)
    (run / "table.csv").write_text(FOUR)
    (run / "policy.pt").unlink()
    refused(["compare", "run"], "has no policy.pt", capsys)


@pytest.mark.parametrize("name", ["compare", "table.csv"])
def test_a_link_out_of_the_run_is_not_followed(name, run, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "table.csv").write_text(FOUR)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside if name == "compare" else outside / "table.csv")
    refused(["compare", "run"], "leads out of the run", capsys)
    assert [path.name for path in outside.iterdir()] == ["table.csv"]


def test_a_checkpoint_with_code_is_refused_without_advice_to_load_it(run, capsys):
    change_state(run, code=sys.exit)
    assert cli.main(["compare", "run"]) == 2
    error = capsys.readouterr().err
    assert "holds more than weights" in error
    assert "weights_only" not in error
    data = pickle.dumps(sys.exit)  # of another protocol than torch's, of which torch would warn
    (run / "policy.pt").write_bytes(data + hashlib.sha256(data).digest())
    refused(["compare", "run"], "holds more than weights", capsys)
