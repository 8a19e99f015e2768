"""A run: a directory with what was asked (config.json), what came out (result.json), metrics,
pictures and weights.

config.json     command and arguments; enough to build problem and policy again
metrics.jsonl   a record a step, written as they come; metrics.csv, the same as a table at the end
policy.pt       the weights, written now and then and at the end, with their step, a hash of what
                they were trained on, and a checksum
result.json     every printed number; infinities as the strings "inf" and "-inf"
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from klrl_edu.core.display import Cell
from klrl_edu.core.errors import CheckpointError, InputError
from klrl_edu.evaluation.records import (
    History,
    RecordLines,
    jsonable,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from klrl_edu.exact.posterior import Posterior, feasible_prior, posterior
from klrl_edu.experiments.directories import command_of, resolved
from klrl_edu.experiments.loading import build_model
from klrl_edu.models.contract import LanguageModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.examples import EXAMPLES, example
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.tables import load_table

MODELS = ("table", "lstm", "gru", "transformer")
DeviceName = Literal["auto", "cpu", "cuda"]
_NETWORK_DTYPE = torch.float32  # twice as fast; log-probabilities are taken in float64 anyway
_SECONDS_BETWEEN_SAVES = 1.0
_SAVING_SHARE = 0.02  # of a run's time, at most


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

    @property
    def table(self) -> Path | None:
        """The table's file; None for a standing problem."""
        return None if self.name in EXAMPLES else Path(self.name)

    def load(self) -> Problem:
        """The problem itself.

        Raises:
            InputError: neither an example nor a readable table.
        """
        if self.table is None:
            return example(self.name, self.kl_coef)
        if not self.name or not self.table.exists():
            raise InputError(
                f"{self.name!r} is neither a file nor a standing problem ({', '.join(EXAMPLES)});"
                " check the spelling."
            )
        return load_table(
            self.table, self.kl_coef, separator=self.separator, normalize=self.normalize
        )

    def fingerprint(self) -> str:
        """A hash of all that the posterior depends on: the table's bytes or the example's name, λ,
        and how the table is read.
        """
        what = self.name if self.table is None else self.table.read_bytes().hex()
        words = [what, float(self.kl_coef), self.separator, self.normalize]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def json_bytes(value: Any) -> bytes:
    """Strict JSON, indented, UTF-8."""
    text = json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False)
    # a file's name may hold bytes that are no text; JSON writes those as \udcff
    return f"{text}\n".encode(errors="backslashreplace")


def write_json(path: Path, value: Any) -> Path:
    """Strict JSON, whole or not at all."""
    write_atomically(path, json_bytes(value))
    return path


def spreadsheet_cell(text: Cell) -> Cell:
    """Text that a spreadsheet would run as a formula gets an apostrophe in front."""
    if isinstance(text, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{text}"
    return text


def pick_device(name: DeviceName) -> torch.device:
    """The device asked for; "auto" takes CUDA where there is one.

    Raises:
        InputError: CUDA was asked for by name and is not there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: no CUDA device is available; use --device cpu or auto.")
    on_cuda = name == "cuda" or (name == "auto" and available)
    return torch.device("cuda" if on_cuda else "cpu")


def build_policy(name: str, target: Posterior, seed: int) -> LanguageModel:
    """An untrained policy on the sequences with prior mass and a finite reward: a copy of q there
    for "table", else a restricted network, the package's or one's own (file.py:Class).

    Raises:
        InputError: an unknown name, or what `loading.build_model` refuses.
    """
    problem = target.problem
    space, device = problem.space, target.enumerated().tokens.device
    allowed = feasible_prior(problem)
    assert isinstance(allowed, SequenceTable)  # the target was enumerated
    if name == "table":
        return allowed
    network: LanguageModel
    if name == "transformer":
        size = 0 if problem.prompt is None else len(problem.prompt)
        network = TransformerModel(space, max_prompt=size, seed=seed, dtype=_NETWORK_DTYPE)
    elif name in ("lstm", "gru"):
        cell = cast(Literal["lstm", "gru"], name)
        network = RecurrentModel(space, cell=cell, seed=seed, dtype=_NETWORK_DTYPE)
    elif ":" in name:
        network = build_model(name, space, seed)
    else:
        raise InputError(
            f"--model: invalid choice {name!r}; choose from {', '.join(MODELS)}, or give"
            " file.py:Class of a model of your own."
        )
    return restrict_to_support(network.to(device), _by_prefix(allowed).for_prompt(problem.prompt))


@torch.no_grad()
def _by_prefix(table: SequenceTable) -> PrefixTable:
    """The same law, with the conditionals as rows: a restriction reads them at every step, and a
    SequenceTable would sum them over all of its sequences each time.
    """
    trie = table.trie
    logits = table.logits.new_full((trie.nodes, table.space.vocab_size), -math.inf)
    # the masses of a node's edges are the logits of its row, up to a constant
    logits[trie.parent, trie.token] = table.edge_log_mass()
    return PrefixTable(table.space, table.tokens, logits).requires_grad_(False)


class RunWriter:
    """Writes a training run as it goes; whatever stops it, what was written stays.

    Args:
        directory: a claimed directory.
        config: command and arguments, with `problem` and `model`.
        source: of the problem; a user's table is copied into the run, so that it can be compared
            later.
    """

    def __init__(self, directory: Path, config: dict[str, Any], source: ProblemSource):
        self.directory = directory
        self.history = History()
        self._fingerprint = source.fingerprint()
        self._saved_at, self._pause = -math.inf, _SECONDS_BETWEEN_SAVES
        if source.table is not None:
            name = f"table{source.table.suffix.lower()}"
            # the copy before the config that names it
            write_atomically(directory / name, source.table.read_bytes())
            config = {**config, "table": name}
        write_json(directory / "config.json", config)
        self._lines = RecordLines(directory / "metrics.jsonl")

    def record(self, record: dict[str, float]) -> None:
        """One step's metrics, on disk at once and whole."""
        self.history.records.append(record)
        self._lines.write(record)

    def save_now_and_then(self, policy: LanguageModel) -> None:
        """The weights so far, every second or so, for a run that is killed; the first call saves
        at once. Weights that are not numbers are left out: the last good ones stay.
        """
        started = time.monotonic()
        if started - self._saved_at < self._pause:
            return
        weights = policy.state_dict()
        if any(bool(value.isnan().any()) for value in weights.values()):
            return
        self._save(weights)
        self._saved_at = time.monotonic()
        # large weights, or a slow disk: saved less often, so that saving costs its share at most
        took = self._saved_at - started
        self._pause = max(_SECONDS_BETWEEN_SAVES, took / _SAVING_SHARE)

    def close(self, policy: LanguageModel) -> None:
        """Weights and the metrics as a table."""
        self._lines.close()
        self.history.write_csv(self.directory / "metrics.csv")
        self._save(policy.state_dict())

    def _save(self, weights: dict[str, Any]) -> None:
        step = int(self.history.records[-1]["step"]) if len(self.history) else 0
        state = {"weights": weights, "step": step, "trained_on": self._fingerprint}
        save_checkpoint(self.directory / "policy.pt", state)


@dataclass(frozen=True)
class Run:
    """A training run, read back.

    Attributes:
        config: as written.
        target: the exact posterior that it was trained to.
        policy: with the weights of `step`.
        step: of the weights, out of config["steps"].
    """

    config: dict[str, Any]
    target: Posterior
    policy: LanguageModel
    step: int


def load_run(directory: Path, own_model: str | None = None) -> Run:
    """A run directory as it was written.

    Args:
        directory: the --out of a `klrl train`.
        own_model: where the run's model is a class of the user's, its name again: code runs only
            when it is asked for, never because a file names it.

    Raises:
        InputError: not a training run, or one whose files were altered.
        CheckpointError: its weights are damaged, missing, or do not fit.
    """
    if command_of(directory) != "train":
        raise InputError(
            f"{directory} is not a training run (no config.json by `klrl train` in it); give the"
            " --out of a `klrl train`."
        )
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    source, model, seed = _checked_config(directory, config)
    state = _checked_state(directory, model)
    # before the posterior, which takes its time and would be of another problem
    if state.get("trained_on") != source.fingerprint():
        raise InputError(
            f"{directory}: its table, kl_coef, separator or normalize is not what the policy was"
            " trained on; take an unaltered copy of the run, or train again."
        )
    target = posterior(source.load())
    policy = build_policy(_model_to_run(directory, model, own_model), target, seed)
    try:
        policy.load_state_dict(state["weights"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'policy.pt'} does not fit the run's model: {str(error).splitlines()[0]}"
        ) from None
    return Run(config, target, policy, state["step"])


def _checked_config(directory: Path, config: dict[str, Any]) -> tuple[ProblemSource, str, int]:
    """Problem, model and seed, each of its type; a table is read from the run alone."""
    problem, table = config.get("problem"), config.get("table")
    wanted: dict[str, tuple[object, type | tuple[type, ...]]] = {
        "problem.name": (_item(problem, "name"), str),
        "problem.kl_coef": (_item(problem, "kl_coef"), (int, float)),
        "problem.separator": (_item(problem, "separator"), str),
        "problem.normalize": (_item(problem, "normalize"), bool),
        "model": (config.get("model"), str),
        "seed": (config.get("seed"), int),
        "steps": (config.get("steps"), int),
    }
    wrong = []
    for name, (value, kind) in wanted.items():
        bool_as_number = isinstance(value, bool) and kind is not bool  # True is an int in Python
        # a whole number beyond every float is none that `klrl train` wrote
        too_large = isinstance(value, int) and abs(value) > 2**1000
        if not isinstance(value, kind) or bool_as_number or too_large:
            wrong.append(name)
    if wrong:
        raise InputError(
            f"{directory / 'config.json'} is incomplete ({', '.join(wrong)}); it was altered since"
            " `klrl train` wrote it."
        )
    assert isinstance(problem, dict)
    name = problem["name"]
    if name not in EXAMPLES:
        name = str(_table_in(directory, table))
    source = ProblemSource(name, problem["kl_coef"], problem["separator"], problem["normalize"])
    return source, config["model"], config["seed"]


def _table_in(directory: Path, table: object) -> Path:
    """The run's copy of its table; no other file is read, whatever config.json names."""
    if not isinstance(table, str) or Path(table).name != table or Path(table).stem != "table":
        raise InputError(
            f"{directory / 'config.json'} is incomplete (table); it was altered since `klrl train`"
            " wrote it."
        )
    path = directory / table
    check_inside(directory, path)
    if not path.is_file():
        raise InputError(f"{path}, the run's copy of its table, is missing; train again.")
    return path


def check_inside(directory: Path, path: Path) -> None:
    """Refuses a link that leads out of a run."""
    inside = resolved(directory, "RUN")
    if not resolved(path, "RUN").is_relative_to(inside):
        raise InputError(
            f"{path} is a link that leads out of the run; remove it, or name another place by"
            " --out."
        )


def _item(mapping: object, key: str) -> object:
    return mapping.get(key) if isinstance(mapping, dict) else None


def _checked_state(directory: Path, model: str) -> dict[str, Any]:
    """The checkpoint's content: weights that are numbers, and the step that they are of."""
    path = directory / "policy.pt"
    if not path.exists():
        raise CheckpointError(
            f"{directory} has no policy.pt: the run was stopped before any weights were saved;"
            " train again."
        )
    state = load_checkpoint(path)
    weights, step = state.get("weights"), state.get("step")
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and _is_plain(value) for key, value in weights.items()
    ):
        raise CheckpointError(
            f"{path} holds no weights by name; take an unaltered copy, or train again."
        )
    for name, value in weights.items():
        # −inf is a table's logit without mass, and no weight of a network
        allowed = value.isfinite() | ((value == -math.inf) if model == "table" else False)
        if not bool(allowed.all()):
            raise CheckpointError(
                f"{path}: weights {name!r} hold NaN or infinity; take an unaltered copy, or train"
                " again."
            )
    if not isinstance(step, int) or isinstance(step, bool) or "trained_on" not in state:
        raise CheckpointError(
            f"{path} does not say its step and what it was trained on, as those of an older klrl;"
            " train again."
        )
    return state


def _is_plain(value: object) -> bool:
    """A tensor whose numbers are there, each in its place."""
    if not isinstance(value, torch.Tensor):
        return False
    number = value.dtype in (torch.float64, torch.float32, torch.int64)  # as `klrl train` writes
    return number and value.layout == torch.strided and value.device.type == "cpu"


def _model_to_run(directory: Path, model: str, own_model: str | None) -> str:
    """The model's name; code of the user's is run only where the user names it."""
    if ":" not in model:
        return model
    if own_model is None:
        raise InputError(
            f"the policy of {directory} is {model}, code of your own, which is run only when you"
            f" name it: klrl compare {directory} --model {model}"
        )
    return own_model
