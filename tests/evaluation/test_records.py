"""Histories, strict JSON, and files that are whole or absent."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import pickle
import resource
import signal

import numpy as np
import pytest
import torch

from klrl_edu.core.errors import CheckpointError
from klrl_edu.evaluation.records import (
    History,
    RecordLines,
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


@contextlib.contextmanager
def files_end_at(size):
    """No file grows past `size` bytes, as on a full disk."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_cuts_no_record_in_two_and_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines, wrote = RecordLines(path), []

    def fill_the_disk():
        for step in range(100):
            lines.write({"step": step, "loss": 1 / 3})
            wrote.append(step)

    with files_end_at(1000):
        with pytest.raises(OSError, match="metrics") as caught:
            fill_the_disk()
        assert caught.value.filename == str(path)
        # every line is whole, and the file's last one is the last that was written
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == wrote
        assert 10 < len(wrote) < 100
        assert path.read_bytes().endswith(b"}\n")
    lines.write({"step": "after", "loss": math.inf})  # room was made
    lines.close()
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": "after", "loss": "inf"}
    assert len(path.read_text().splitlines()) == len(wrote) + 1


def test_records_are_on_disk_before_the_file_is_closed(tmp_path):
    lines = RecordLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1, "text": "é"})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"))["text"] == "é"
    lines.close()


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
    for length in range(1, 30):  # whatever the stride, the last step stands there, and once
        shown = [row[0] for row in History([{"step": n} for n in range(length)])._table()[1]]
        assert shown[-1] == length - 1
        assert len(shown) == len(set(shown))
    assert str(History()) == "History: no steps"
    assert "<table>" in History([{"step": 1}])._repr_html_()
