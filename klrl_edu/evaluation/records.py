"""What a run leaves behind: metrics by step, and checkpoints that cannot be mistaken or half
written.
"""

import csv
import hashlib
import io
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from klrl_edu.core.display import html_table, text_table
from klrl_edu.core.errors import CheckpointError
from klrl_edu.models.contract import LanguageModel

Record = dict[str, float]
_CHECKPOINT_VERSION = 1


@dataclass
class History:
    """Metrics of a training run, a record a step.

    Attributes:
        records: each with `step` and its metrics, in nats and reward units.
        policy: what was trained, where a run knows it.
    """

    records: list[Record] = field(default_factory=list)
    policy: LanguageModel | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __getitem__(self, name: str) -> list[float]:
        """One metric over the steps that have it, e.g. history["reverse_kl"]."""
        return [record[name] for record in self.records if name in record]

    def steps(self, name: str) -> list[float]:
        """The steps at which a metric was recorded."""
        return [record["step"] for record in self.records if name in record]

    @property
    def names(self) -> list[str]:
        """Every metric, in order of appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record))

    def to_dict(self) -> dict[str, Any]:
        """{"records": […]}."""
        return {"records": self.records}

    def write_csv(self, path: Path) -> None:
        """All records as one CSV table, empty cells where a step lacks a metric."""
        out = io.StringIO()
        writer = csv.DictWriter(out, self.names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        write_atomically(path, out.getvalue().encode())

    def _table(self, shown: int = 8) -> tuple[list[str], list[list[float | None]]]:
        stride = max(1, math.ceil(len(self.records) / shown))
        picked = self.records[::stride]
        if self.records and (len(self.records) - 1) % stride:
            picked.append(self.records[-1])  # the last step always
        return self.names, [[record.get(name) for name in self.names] for record in picked]

    def __str__(self) -> str:
        return text_table(*self._table(), digits=4) if self.records else "History: no steps"

    def _repr_html_(self) -> str:
        return html_table(*self._table(), digits=4)


def json_line(record: Mapping[str, Any]) -> str:
    """One record as strict JSON: infinities and NaN as strings, which JSON has no numbers for."""
    return json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False)


class RecordLines:
    """A file of records, a line of strict JSON each: on disk as they come, whole or not at all.

    Whoever stops the run finds every line that was written, and none that is cut.

    Args:
        path: of the file, which is begun anew.
    """

    def __init__(self, path: Path):
        self.path = path
        # unbuffered: what did not fit is not tried once more when the file is closed
        self._file = path.open("wb", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """One record more.

        Raises:
            OSError: with the file's name; the file is as it was before.
        """
        line = memoryview(f"{json_line(record)}\n".encode())
        whole = self._file.tell()
        try:
            while line:  # a disk that is filling up takes a part of it first
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(whole)
            self._file.seek(whole)
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()


def jsonable(value: Any) -> Any:
    """Plain JSON values: tensors as lists, non-finite numbers as the strings "inf",
    "-inf", "nan".
    """
    if isinstance(value, torch.Tensor):
        return jsonable(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: to a temporary neighbour, renamed over the old one."""
    # in the same folder: a rename is whole only within one file system
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            # on the disk before the rename, or a crash could leave the new name empty
            os.fsync(out.fileno())
        # mkstemp's 0600 would shut out all other readers
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    # Ctrl-C among them: no temporary file stays
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file did not fit
        raise


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Tensors, numbers and strings to a file that ends in the SHA-256 of the rest; the old file
    stays until the new one is whole.
    """
    buffer = io.BytesIO()
    torch.save({"version": _CHECKPOINT_VERSION, "state": dict(state)}, buffer)
    data = buffer.getvalue()
    write_atomically(Path(path), data + hashlib.sha256(data).digest())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` saved, on the CPU; loads weights only, never code.

    Raises:
        CheckpointError: missing, truncated, altered, or not one of ours.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}.") from None
    # SHA-256 has 32 bytes
    data, digest = raw[:-32], raw[-32:]
    if len(raw) <= 32 or hashlib.sha256(data).digest() != digest:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({len(raw)} bytes, its SHA-256 does not match); take"
            " another copy, or train again."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with it is said below, once
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # torch raises several types for a file that is not a plain checkpoint
        # torch's own words are not repeated: they end in advice to load the code all the same
        raise CheckpointError(
            f"checkpoint {path} holds more than weights and will not be loaded: loading it could"
            " run code. Take another copy, or train again."
        ) from None
    if not isinstance(content, dict) or content.get("version") != _CHECKPOINT_VERSION:
        raise CheckpointError(f"checkpoint {path} is not of version {_CHECKPOINT_VERSION}.")
    state = content.get("state")
    if not isinstance(state, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(state).__name__} in place of its state; take another"
            " copy, or train again."
        )
    return state
