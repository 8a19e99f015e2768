"""`klrl` as a process: what stops it, and what its surroundings may not break."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from klrl_edu.experiments import cli

KLRL = [sys.executable, "-m", "klrl_edu"]
INTERRUPTED_WHILE_IMPORTING = """
import os, signal, sys
import klrl_edu.__main__ as klrl

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
sys.exit(klrl.main())
"""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends signals")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("module", ["torch", "matplotlib", "klrl_edu.experiments.cli"])
def test_ctrl_c_while_importing_is_one_line(module):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_IMPORTING, module], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "klrl: interrupted\n")


def test_a_backend_that_does_not_exist_is_not_asked_for():
    done = subprocess.run(
        [*KLRL, "posterior", "four-sentences", "--out", "out", "--quiet"],
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "zz"},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pipe_that_closes_early_leaves_exit_code_0_and_no_words():
    listing = subprocess.Popen([*KLRL, "figure"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listing.stdout.close()
    assert listing.wait(timeout=120) == 0
    assert listing.stderr.read() == b""
    listing.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_a_killed_run_keeps_weights_that_compare_reads(number, tmp_path, capsys):
    words = ["train", "four-sentences", "--steps", "1000000", "--out", "run"]
    process = subprocess.Popen(
        [*KLRL, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    metrics, weights = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "policy.pt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        weights.exists() and metrics.read_text().count("\n") > 3
    ):
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    lines = metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    assert cli.main(["compare", "run"]) == 0
    said = capsys.readouterr().out
    assert "of 1,000,000: the run was stopped early" in said
    assert ("it has no result.json of its own" in said) == (number == signal.SIGKILL)
    saved = json.loads((tmp_path / "run" / "compare" / "result.json").read_text())
    assert 0 <= saved["step"] < len(lines)
