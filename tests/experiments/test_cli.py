"""The command line as people use it: results on disk, and one line with the remedy for bad
input.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from klrl_edu.experiments import cli

FOUR = "sentence,prob,reward\nthe cat,0.4,1\nthe dog,0.3,0\na cat,0.2,0\na dog,0.1,2\n"
POSTERIOR = {
    "the cat": 0.467416455322,
    "the dog": 0.128964678284,
    "a cat": 0.085976452189,
    "a dog": 0.317642414206,
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "four.csv").write_text(FOUR, encoding="utf-8")
    return tmp_path


def result(folder):
    def refuse(name):
        raise AssertionError(f"{name} in result.json")

    return json.loads((folder / "result.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_posterior_prints_draws_and_saves_the_known_numbers(tmp_path, capsys):
    assert cli.main(["posterior", "four.csv", "--out", "out"]) == 0
    saved = result(tmp_path / "out")
    assert saved["log_evidence"] == pytest.approx(math.log(2.326218341277), abs=1e-12)
    assert saved["value"] == pytest.approx(0.844243919543, abs=1e-12)
    rows = [
        line.split(",")
        for line in (
            (tmp_path / "out" / "posterior.csv").read_text(encoding="utf-8").splitlines()[1:]
        )
    ]
    assert {row[0]: pytest.approx(float(row[3]), abs=1e-12) for row in rows} == POSTERIOR
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "result.json",
        "posterior.csv",
        "posterior.png",
        "posterior.pdf",
    }
    assert "the cat" in capsys.readouterr().out


@pytest.mark.filterwarnings("default:no installed font")  # true where no CJK font is installed
def test_a_table_of_thousands_of_rows_in_any_language_is_read(tmp_path):
    rows = "".join(f"字{chr(0x4E00 + i)}é{i},{1 / 4096},{i % 3}\n" for i in range(4096))
    (tmp_path / "big.csv").write_text("sentence,prob,reward\n" + rows, encoding="utf-8-sig")
    started = time.process_time()
    assert (
        cli.main(["posterior", "big.csv", "--separator", "", "--out", "out", "--count", "5"]) == 0
    )
    assert time.process_time() - started < 60
    weights = [math.exp(i % 3) / 4096 for i in range(4096)]
    assert result(tmp_path / "out")["log_evidence"] == pytest.approx(
        math.log(math.fsum(weights)), abs=1e-12
    )


def test_a_formula_in_a_table_is_not_handed_on_to_a_spreadsheet(tmp_path):
    (tmp_path / "f.csv").write_text(
        'sentence,prob,reward\n"=HYPERLINK(""x"")",0.5,1\nb,0.5,-inf\n', encoding="utf-8"
    )
    assert cli.main(["posterior", "f.csv", "--out", "out", "--quiet"]) == 0
    assert "'=HYPERLINK" in (tmp_path / "out" / "posterior.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", ["table", "lstm", "gru", "transformer"])
def test_train_writes_a_run_and_compare_reads_it_back_bit_for_bit(model, tmp_path, capsys):
    assert (
        cli.main(
            ["train", "four.csv", "--model", model, "--steps", "30", "--lr", "1e-3", "--out", "run"]
        )
        == 0
    )
    saved = result(tmp_path / "run")
    assert saved["steps_done"] == 30
    assert not saved["interrupted"]
    assert saved["end"]["reverse_kl"] < saved["start"]["reverse_kl"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(31))
    assert (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").count("\n") == 32
    (tmp_path / "four.csv").unlink()  # the run holds its own copy
    assert cli.main(["compare", "run"]) == 0
    again = result(tmp_path / "run" / "compare")
    assert {name: again[name] for name in saved["end"]} == saved["end"]


@pytest.mark.parametrize("loss", ["exact", "reinforce", "rloo"])
def test_every_loss_trains_a_named_problem(loss, tmp_path):
    assert (
        cli.main(
            [
                "train",
                "four-sentences",
                "--loss",
                loss,
                "--model",
                "table",
                "--lr",
                "0.01",
                "--steps",
                "60",
                "--out",
                "run",
                "--quiet",
            ]
        )
        == 0
    )
    saved = result(tmp_path / "run")
    assert saved["end"]["reverse_kl"] < 0.6 * saved["start"]["reverse_kl"]


@pytest.mark.parametrize("kl_coef", ["0", "0.5"])
def test_hard_rewards_train_on_what_they_allow(kl_coef, tmp_path):
    (tmp_path / "hard.csv").write_text(
        FOUR.replace("the dog,0.3,0", "the dog,0.3,-inf"), encoding="utf-8"
    )
    for model, loss in (("table", "exact"), ("lstm", "rloo")):
        arguments = [
            "train",
            "hard.csv",
            "--model",
            model,
            "--loss",
            loss,
            "--steps",
            "20",
            "--kl-coef",
            kl_coef,
            "--out",
            f"run-{model}",
            "--quiet",
        ]
        assert cli.main(arguments) == 0
        saved = result(tmp_path / f"run-{model}")["end"]
        assert saved["uncovered_mass"] == 0
        if kl_coef != "0":
            assert saved["violating_mass"] == 0


@pytest.mark.parametrize("model", ["table", "lstm", "transformer"])
def test_the_defaults_reach_the_posterior_of_the_four_sentences(model, tmp_path):
    words = ["train", "four-sentences", "--model", model, "--out", "run", "--quiet"]
    assert cli.main(words) == 0
    saved = result(tmp_path / "run")
    assert saved["start"]["reverse_kl"] > 0.1
    assert saved["end"]["reverse_kl"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("model", ["table", "lstm", "gru", "transformer"])
def test_the_defaults_reach_the_posterior_of_the_surnames(model, tmp_path):
    assert cli.main(["train", "surnames", "--model", model, "--out", "run", "--quiet"]) == 0
    saved = result(tmp_path / "run")
    assert saved["start"]["reverse_kl"] > 0.05  # a table starts as the prior
    assert saved["end"]["reverse_kl"] < 1e-3


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert (
            cli.main(
                ["train", "four.csv", "--steps", "5", "--seed", seed, "--out", name, "--quiet"]
            )
            == 0
        )
    first, again, other = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "abc")
    assert first == again != other


def test_runs_without_out_take_fresh_folders(tmp_path):
    for _ in range(2):
        assert cli.main(["train", "four.csv", "--steps", "1", "--model", "table", "--quiet"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["train", "train-2"]


def test_env_says_versions_and_writes_only_when_asked(tmp_path, capsys):
    assert cli.main(["env"]) == 0
    assert "torch" in capsys.readouterr().out
    assert cli.main(["env", "--out", "e", "--quiet"]) == 0
    assert result(tmp_path / "e")["torch_threads"] == 1


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_is_everywhere(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    assert "usage: klrl" in capsys.readouterr().out


BAD_TABLES = {
    "negative": (FOUR.replace("0.4", "-0.4"), "prob = '-0.4' is not allowed"),
    "nan": (FOUR.replace("0.4", "nan"), "prob = 'nan' is not allowed"),
    "empty": ("", "is empty"),
    "no rows": ("sentence,prob,reward\n", "has no rows"),
    "unnormalised": (FOUR.replace("0.4", "0.333"), "sum to 0.933, not 1"),
    "duplicate": (FOUR.replace("the dog", "the cat"), "already stands at line 2"),
    "ragged": (FOUR.replace("the dog,0.3,0", "the dog,0.3"), "2 fields, expected 3"),
    "binary": ("\0\1", "binary file"),
    "nan reward": (FOUR.replace("0.4,1", "0.4,nan"), "reward = nan of 'the cat' is not allowed"),
    "+inf reward": (FOUR.replace("0.4,1", "0.4,inf"), "reward = inf of 'the cat' is not allowed"),
    "all -inf": ("sentence,prob,reward\na,.5,-inf\nb,.5,-inf\n", "the posterior is empty"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
@pytest.mark.parametrize("command", ["posterior", "train"])
def test_a_bad_table_is_one_line_exit_2_and_nothing_written(kind, command, tmp_path, capsys):
    text, words = BAD_TABLES[kind]
    (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
    refused([command, "bad.csv", "--out", "out"], words, capsys)
    assert not (tmp_path / "out").exists()


BAD_ARGUMENTS = {
    "posterior nowhere.csv": "neither a file nor a standing problem",
    "posterior .": "cannot read",
    "posterior four.csv --kl-coef -1": "kl_coef = -1.0 must be at least 0",
    "posterior four.csv --kl-coef nan": "kl_coef = nan must be at least 0",
    "posterior four.csv --kl-coef abc": "--kl-coef 'abc' is not a number",
    "posterior four.csv --kl-coeff 1": "Perhaps you meant: --kl-coef",
    "posterior four.csv --count 0": "count = 0 must be a whole number of at least 1",
    "posterior four.csv --out four.csv": "is a file; name a directory",
    "posterior four.csv --out .": "did not write",
    "train four.csv --out /proc/none": "cannot be written",
    "train four.csv --model rnn": "invalid choice 'rnn'",
    "train four.csv --steps -1": "steps = -1",
    "train four.csv --batch-size 0": "batch_size = 0",
    "train four.csv --batch-size 1": "batch_size >= 2",
    "train four.csv --lr -1": "lr = -1.0 must be a positive number",
    "train four.csv --seed -1": "seed = -1",
    "train four.csv --kl-coef inf": "nothing to train",
    "demo --seed -1": "seed = -1",
    "compare four.csv": "not a training run",
    "compare nowhere": "not a training run",
    "posterior": "Missing",
    "unknown": "unknown command 'unknown'; the commands are demo, posterior, train, compare",
}


@pytest.mark.parametrize("line", BAD_ARGUMENTS)
def test_a_bad_argument_is_one_line_exit_2_and_nothing_written(line, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    refused(line.split(), BAD_ARGUMENTS[line], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def refused(arguments, words, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("klrl: ")
    assert error.count("\n") == 1, error
    assert words in error
    assert "Traceback" not in error


def test_cuda_by_name_never_falls_back(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(["train", "four.csv", "--device", "cuda", "--out", "run"], "no CUDA device", capsys)


def test_a_finished_run_is_never_overwritten(tmp_path, capsys):
    assert cli.main(["train", "four.csv", "--steps", "1", "--out", "run", "--quiet"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    refused(["train", "four.csv", "--steps", "2", "--out", "run"], "is not empty", capsys)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_loss_that_turns_nan_keeps_metrics_and_the_last_good_weights(tmp_path, capsys):
    (tmp_path / "turns.py").write_text(
        "from klrl_edu import losses\nseen = []\n"
        "def turns(batch):\n    seen.append(1)\n"
        "    return losses.rloo(batch) * (float('nan') if len(seen) == 4 else 1)\n",
        encoding="utf-8",
    )
    words = ["train", "four.csv", "--loss", "turns.py:turns", "--out", "run", "--quiet"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "step 4: the loss is nan" in error
    assert "last good weights" in error
    assert str(tmp_path / "run") in error
    saved = result(tmp_path / "run")
    assert saved["interrupted"]
    assert saved["end"]["reverse_kl"] != saved["start"]["reverse_kl"]  # three steps were good
    assert cli.main(["compare", "run", "--quiet"]) == 0


def test_a_rate_that_breaks_the_first_step_is_one_line_and_leaves_nothing(tmp_path, capsys):
    refused(["train", "four.csv", "--lr", "1e300", "--out", "run", "--quiet"], "step 1", capsys)
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_or_config_is_said_so(tmp_path, capsys):
    assert cli.main(["train", "four.csv", "--steps", "1", "--out", "run", "--quiet"]) == 0
    weights = tmp_path / "run" / "policy.pt"
    good = weights.read_bytes()
    weights.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    refused(["compare", "run"], "is damaged", capsys)
    weights.write_bytes(good)
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model": "gru"}))
    refused(["compare", "run"], "does not fit the run's model", capsys)
    config.write_text('{"command": "train"}')
    refused(["compare", "run"], "is incomplete", capsys)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_keeps_the_metrics_so_far_and_exits_130(tmp_path):
    command = [
        sys.executable,
        "-m",
        "klrl_edu",
        "train",
        "four.csv",
        "--steps",
        "1000000",
        "--out",
        "run",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        metrics.exists() and metrics.read_text().count("\n") > 3
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted after step" in error
    assert str(tmp_path / "run") in error
    saved = result(tmp_path / "run")
    assert saved["interrupted"]
    assert metrics.read_text().count("\n") == saved["steps_done"] + 1
    assert cli.main(["compare", "run", "--quiet"]) == 0
