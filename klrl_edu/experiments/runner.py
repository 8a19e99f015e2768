"""A run: a directory with what was asked (config.json), what came out (result.json), metrics,
pictures and weights.

config.json     command and arguments; enough to build problem and policy again
metrics.jsonl   a record a step, written as they come; metrics.csv, the same as a table at the end
policy.pt       the weights, with a checksum
result.json     every printed number; infinities as the strings "inf" and "-inf"
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from klrl_edu.core.display import Cell
from klrl_edu.core.errors import CheckpointError, InputError
from klrl_edu.evaluation.compare import Comparison, compare
from klrl_edu.evaluation.records import (
    History,
    json_line,
    jsonable,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from klrl_edu.exact.posterior import Posterior, feasible_prior, posterior
from klrl_edu.learning import losses
from klrl_edu.learning.batches import Loss
from klrl_edu.models.contract import LanguageModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.examples import EXAMPLES, example
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.tables import load_table

ModelName = Literal["table", "lstm", "gru", "transformer"]
LossName = Literal["exact", "reinforce", "rloo"]
DeviceName = Literal["auto", "cpu", "cuda"]
LOSSES: dict[str, Loss] = {
    "exact": losses.exact,
    "reinforce": losses.reinforce,
    "rloo": losses.rloo,
}


@dataclass(frozen=True)
class ProblemSource:
    """Where a problem comes from: a standing example by name, or a table file.

    Args:
        name: an example's name or a path.
        kl_coef: λ.
        separator, normalize: how to read a table.
    """

    name: str
    kl_coef: float = 1.0
    separator: str = " "
    normalize: bool = False

    def load(self) -> Problem:
        """The problem itself.

        Raises:
            InputError: neither an example nor a readable table.
        """
        if self.name in EXAMPLES:
            return example(self.name, self.kl_coef)
        if not Path(self.name).exists():
            raise InputError(
                f"{self.name!r} is neither a file nor a standing problem ({', '.join(EXAMPLES)});"
                " check the spelling."
            )
        return load_table(
            self.name, self.kl_coef, separator=self.separator, normalize=self.normalize
        )


def check_directory(out: Path, command: str) -> Path:
    """A directory that a run may claim: not there yet, empty, or left by the same command; writes
    nothing.

    Returns:
        The resolved path.

    Raises:
        InputError: it is a file, or holds something else.
    """
    out = out.expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a directory.")
    if out.is_dir() and any(out.iterdir()) and _command_of(out) != command:
        raise InputError(
            f"--out {out} holds files that `klrl {command}` did not write; choose a new or an empty"
            " directory."
        )
    return out


def claim_directory(out: Path, command: str) -> Path:
    """A directory for a run: new, empty, or left by the same command; anything else is refused, so
    that nothing is lost.

    Returns:
        The resolved path.

    Raises:
        InputError: it holds something else, or cannot be written.
    """
    try:
        out = check_directory(out, command)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.json", json_bytes({"command": command}))
    except OSError as error:
        raise InputError(
            f"--out {out} cannot be written: {error.strerror or error}; choose another directory."
        ) from None
    return out


def fresh_directory(out: Path | None, stem: str) -> Path:
    """A directory for a training run: `out` if it holds nothing yet, by default the first free of
    runs/stem, runs/stem-2, …

    Raises:
        InputError: `out` already holds something: runs are not overwritten.
    """
    if out is None:
        numbers: Iterator[Path] = (
            Path("runs") / (stem if k == 1 else f"{stem}-{k}") for k in range(1, 1_000_000)
        )
        return next(path for path in numbers if not path.exists())
    if out.is_dir() and any(out.iterdir()):
        raise InputError(
            f"--out {out} is not empty, and runs are not overwritten; choose another directory, or"
            " remove it."
        )
    return out


def _command_of(directory: Path) -> str | None:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("command") if isinstance(config, dict) else None


def json_bytes(value: Any) -> bytes:
    """Strict JSON, indented, UTF-8."""
    return (
        json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()


def write_json(path: Path, value: Any) -> Path:
    """Strict JSON, whole or not at all."""
    write_atomically(path, json_bytes(value))
    return path


def spreadsheet_cell(text: Cell) -> Cell:
    """Text that a spreadsheet would run as a formula gets an apostrophe in front."""
    return (
        f"'{text}"
        if isinstance(text, str) and text.startswith(("=", "+", "-", "@", "\t", "\r"))
        else text
    )


def pick_device(name: DeviceName) -> torch.device:
    """The device asked for; "auto" takes CUDA where there is one.

    Raises:
        InputError: CUDA was asked for by name and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available; use --device cpu or auto.")
    return torch.device(
        "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    )


def build_policy(name: ModelName, target: Posterior, seed: int) -> LanguageModel:
    """An untrained policy on the sequences with prior mass and a finite reward: a copy of q there
    for "table", else a restricted network.
    """
    problem = target.problem
    space, device = problem.space, target.enumerated().tokens.device
    allowed = feasible_prior(problem)
    if name == "table":
        return allowed
    size = 0 if problem.prompt is None else len(problem.prompt)
    network: LanguageModel = (
        TransformerModel(space, max_prompt=size, seed=seed)
        if name == "transformer"
        else RecurrentModel(space, cell=name, seed=seed)
    )
    return restrict_to_support(network.to(device), allowed)


class RunWriter:
    """Writes a training run as it goes; whatever stops it, what was written stays.

    Args:
        directory: a claimed directory.
        config: command and arguments, with `problem` and `model`.
        table: a user's table, copied into the run so that it can be compared later.
    """

    def __init__(self, directory: Path, config: dict[str, Any], table: Path | None = None):
        self.directory = directory
        self.history = History()
        if table is not None:
            shutil.copyfile(table, directory / f"table{table.suffix.lower()}")
            config = {**config, "table": f"table{table.suffix.lower()}"}
        write_json(directory / "config.json", config)
        self._lines = (directory / "metrics.jsonl").open("w", encoding="utf-8")

    def record(self, record: dict[str, float]) -> None:
        """One step's metrics, on disk at once."""
        self.history.records.append(record)
        self._lines.write(json_line(record) + "\n")
        self._lines.flush()

    def close(self, policy: LanguageModel) -> None:
        """Weights and the metrics as a table."""
        self._lines.close()
        self.history.write_csv(self.directory / "metrics.csv")
        save_checkpoint(self.directory / "policy.pt", {"weights": policy.state_dict()})


def load_run(directory: Path) -> tuple[dict[str, Any], Posterior, LanguageModel]:
    """The config, exact posterior and trained policy of a run directory.

    Raises:
        InputError: not a training run.
        CheckpointError: its weights are damaged or do not fit.
    """
    config_path = directory / "config.json"
    if _command_of(directory) != "train":
        raise InputError(
            f"{directory} is not a training run (no config.json by `klrl train` in it); give the"
            " --out of a `klrl train`."
        )
    config = json.loads(config_path.read_text(encoding="utf-8"))
    try:
        source = ProblemSource(**config["problem"])
        if "table" in config:
            source = ProblemSource(
                str(directory / Path(config["table"]).name),
                source.kl_coef,
                source.separator,
                source.normalize,
            )
        model, seed = config["model"], config["seed"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{config_path} is incomplete ({error}); it was altered since `klrl train` wrote it."
        ) from None
    target = posterior(source.load())
    policy = build_policy(model, target, seed)
    try:
        policy.load_state_dict(load_checkpoint(directory / "policy.pt")["weights"])
    except (RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{directory / 'policy.pt'} does not fit the run's model: {str(error).splitlines()[0]}"
        ) from None
    return config, target, policy


def compare_run(directory: Path) -> tuple[dict[str, Any], Comparison]:
    """A run's policy held against its exact posterior again, from the files alone."""
    config, target, policy = load_run(directory)
    return config, compare(policy, target)
