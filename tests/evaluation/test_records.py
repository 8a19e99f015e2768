"""Histories, strict JSON, and files that are whole or absent."""

import csv
import errno
import hashlib
import io
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch

from klrl_edu.core.errors import CheckpointError
from klrl_edu.evaluation.records import (
    History,
    json_line,
    jsonable,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)

STATE = {"weights": {"w": torch.arange(6.0).reshape(2, 3)}, "step": 7, "name": "é"}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "run.ckpt"
    save_checkpoint(path, STATE)
    return path


def with_digest(data):
    return data + hashlib.sha256(data).digest()


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_comes_back(checkpoint):
    state = load_checkpoint(checkpoint)
    assert torch.equal(state["weights"]["w"], STATE["weights"]["w"])
    assert (state["step"], state["name"]) == (7, "é")


@pytest.mark.parametrize("place", [0, 1, 100, 0.5, -33, -32, -1])
def test_one_flipped_bit_is_noticed(checkpoint, place):
    data = bytearray(checkpoint.read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"run\.ckpt is damaged.*SHA-256"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("keep", [0, 1, 31, 32, 33, 1000, -1])
def test_a_truncated_or_empty_file_is_damaged(checkpoint, keep):
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(checkpoint)


class Bomb:
    """Unpickles by writing a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickled_payload_does_not_run_even_with_a_right_digest(tmp_path):
    target, path = tmp_path / "pwned", tmp_path / "run.ckpt"
    buffer = io.BytesIO()
    torch.save({"version": 1, "state": {"bomb": Bomb(target)}}, buffer)
    for data in (buffer.getvalue(), pickle.dumps(Bomb(target))):
        path.write_bytes(with_digest(data))
        with pytest.raises(CheckpointError, match="more than weights"):
            load_checkpoint(path)
        assert not target.exists()


def test_a_file_of_another_program_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    for content in ({"state": {}}, {"version": 2, "state": {}}, [1, 2]):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path.write_bytes(with_digest(buffer.getvalue()))
        with pytest.raises(CheckpointError, match="version 1"):
            load_checkpoint(path)
    path.write_bytes(b"PNG" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_a_missing_file_or_a_directory_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.ckpt.*No such file"):
        load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="directory"):
        load_checkpoint(tmp_path)


# --- whole files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
def test_a_full_disk_leaves_the_old_file_and_no_other(checkpoint, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(checkpoint, {"step": 8})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert load_checkpoint(checkpoint)["step"] == 7
    assert os.listdir(checkpoint.parent) == ["run.ckpt"]


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_a_file_is_written_and_overwritten(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        write_atomically(path, text.encode())
        assert path.read_text() == text
    assert path.stat().st_mode & 0o777 == 0o644


# --- JSON -----------------------------------------------------------------------------------------


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


def test_json_never_holds_nan_or_infinity():
    values = {
        "a": math.nan,
        "b": [math.inf, -math.inf, 1.5],
        "c": {"d": torch.tensor([math.nan, 1.0])},
        3: np.float64("nan"),
        "t": (math.inf,),
    }
    line = json_line(values)
    data = json.loads(line, parse_constant=refuse)
    assert data == {
        "a": "nan",
        "b": ["inf", "-inf", 1.5],
        "c": {"d": ["nan", 1.0]},
        "3": "nan",
        "t": ["inf"],
    }
    assert "\n" not in line


def test_json_keeps_numbers_to_the_last_bit_and_text_readable(tmp_path):
    line = json_line(
        {
            "x": 0.1 + 0.2,
            "text": "é",
            "path": tmp_path,
            "none": None,
            "flag": True,
            "scalar": torch.tensor(2.5),
        }
    )
    assert json.loads(line) == {
        "x": 0.30000000000000004,
        "text": "é",
        "path": str(tmp_path),
        "none": None,
        "flag": True,
        "scalar": 2.5,
    }
    assert "é" in line


def test_jsonable_copies_and_does_not_change_its_input():
    record = {"loss": math.inf}
    assert jsonable(record) == {"loss": "inf"}
    assert record == {"loss": math.inf}


# --- histories ------------------------------------------------------------------------------------


@pytest.fixture
def history():
    return History(
        [
            {"step": 0, "reverse_kl": 0.5},
            {"step": 1, "loss": 2.0},
            {"step": 2, "loss": math.nan, "reverse_kl": 0.25},
        ]
    )


def test_a_history_gives_columns_and_their_steps(history):
    assert history["reverse_kl"] == [0.5, 0.25]
    assert history.steps("reverse_kl") == [0, 2]
    assert history.names == ["step", "reverse_kl", "loss"]
    assert (len(history), list(history)) == (3, history.records)
    json.loads(json_line(history.to_dict()), parse_constant=refuse)


def test_a_history_is_written_as_one_csv_table(history, tmp_path):
    history.write_csv(tmp_path / "h.csv")
    rows = list(csv.DictReader((tmp_path / "h.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == {"step": "0", "reverse_kl": "0.5", "loss": ""}
    assert float(rows[2]["reverse_kl"]) == 0.25


def test_a_long_history_prints_first_and_last():
    text = str(History([{"step": step, "loss": step / 7} for step in range(1, 101)]))
    lines = text.splitlines()
    assert lines[2].split()[0] == "1"
    assert lines[-1].split()[0] == "100"
    assert len(lines) < 15
    assert str(History()) == "History: no steps"
    assert "<table>" in History([{"step": 1}])._repr_html_()
