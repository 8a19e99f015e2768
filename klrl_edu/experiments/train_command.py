"""`klrl train`: a policy trained towards the exact posterior, and held against it."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from klrl_edu.core.draws import Draw, seeded_draw
from klrl_edu.core.errors import InputError, KlrlError, TooLargeError
from klrl_edu.core.validation import check_count
from klrl_edu.evaluation.compare import compare as compare_models
from klrl_edu.evaluation.records import Record
from klrl_edu.exact.posterior import Posterior, looked_up
from klrl_edu.exact.posterior import posterior as exact_posterior
from klrl_edu.experiments import plots
from klrl_edu.experiments.console import (
    INTERRUPTED,
    LEGEND,
    Quiet,
    TableArgument,
    note,
    progress,
    speaker,
)
from klrl_edu.experiments.directories import check_new, new_directory
from klrl_edu.experiments.loading import blaming, find_loss
from klrl_edu.experiments.parsing import Word
from klrl_edu.experiments.runner import (
    DeviceName,
    ProblemSource,
    RunWriter,
    build_policy,
    pick_device,
    write_json,
)
from klrl_edu.learning import sources
from klrl_edu.learning.batches import Loss, needs_of
from klrl_edu.learning.training import SCHEDULES, comparison_metrics, train_steps
from klrl_edu.learning.updates import optimizers_of
from klrl_edu.models.contract import LanguageModel, readable_count
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.problem import Problem

_EVALUATIONS = 20  # exact comparisons in the course of a training run
_MAX_NUMBERS = 50_000_000  # next-token probabilities a step: 0.4 GB a copy in float64
_OF_A_NETWORK = 20  # what a network keeps of a token for its gradient, in such numbers
_LOOKED_AT = 16  # sequences that training looks at first, whatever the batch
_LR = {"table": 2e-1, "lstm": 1e-2, "gru": 1e-2, "transformer": 3e-3}
_LR_OF_OWN = 3e-3
_STEPS, _STEPS_OF_SUMS = 1000, 200
_EPSILON_OF_A_TABLE = 1e-12
_MARGIN = 1e-6  # nats: rounding and sampling near the optimum are no divergence


def train(
    problem: TableArgument,
    /,
    *,
    model: Annotated[str, Word("MODEL")] = "lstm",
    loss: Annotated[str | None, Word("LOSS")] = None,
    kl_coef: float = 1.0,
    steps: int | None = None,
    batch_size: int = 256,
    lr: float | None = None,
    schedule: Literal["constant", "linear", "cosine", "warmup_cosine"] = "warmup_cosine",
    seed: int = 0,
    device: DeviceName = "auto",
    separator: str = " ",
    normalize: bool = False,
    out: Path | None = None,
    quiet: Quiet = False,
) -> None:
    """Trains a policy towards the exact posterior of a table or of a standing problem, and compares
    them.

    The policy is restricted to the sequences with prior mass and a finite reward, and says so.
    Writes config.json, metrics.jsonl (a record a step), metrics.csv, policy.pt (now and then, and
    at the end), result.json (start, end: the comparison's metrics; steps_done; interrupted) and
    training.png/.pdf.

    Args:
        problem: a table (CSV or JSON), or four-sentences, surnames, count-threes.
        model: table (a copy of the prior), a fresh lstm, gru or transformer in float32, or
            file.py:Class of one's own, made as Class(space), or Class(space, seed=seed) if it takes
            a seed.
        loss: exact (the gradient of J, no sampling), rloo, or any other of klrl_edu.losses, with
            arguments as in "grpo(clip=0.1)"; or file.py:function, module:function of one's own. By
            default exact for table, whose sequences samples would visit too seldom, and rloo
            otherwise.
        kl_coef: λ, at least 0 (0: reward only; inf: the prior).
        steps: updates. By default 200 for exact, and 1000 for a loss that samples.
        batch_size: sequences a step, where the loss samples.
        lr: Adam's learning rate; gradients are clipped to norm 1. By default 0.2 for table, 0.01
            for lstm and gru, 0.003 otherwise.
        schedule: of the learning rate; warmup_cosine rises for a tenth of the run, then falls to 0.
        seed: of weights and samples.
        device: auto takes CUDA where there is one; cuda by name never falls back.
        separator: between words; "" reads sentences as characters.
        normalize: the table holds weights, not probabilities.
        out: a new or empty directory; by default the first free of runs/train, runs/train-2, …
    """
    check_new(out, "train")
    source = ProblemSource(problem, kl_coef, separator, normalize)
    asked = _filled_in(source, model, loss, steps, batch_size, lr, schedule, seed, device)
    training = _begin(asked)  # what would fail fails here, before anything is written
    policy, target = training.policy, training.target

    directory = new_directory(out, "train")
    writer = RunWriter(directory, asked.config(), source)
    say = speaker(quiet)
    say(_opening(asked, target))
    writer.record({"step": 0, **training.start})
    records = progress(quiet)(training.records, asked.steps, "training")
    stopped = _record_steps(records, asked, writer, policy, target)
    # before the last comparison: the weights are kept whatever comes of it
    writer.close(policy)

    end = compare_models(policy, target)
    result = {
        "command": "train",
        **target.to_dict(),
        "steps_done": len(writer.history) - 1,
        "interrupted": stopped is not None,
        "start": training.start,
        "end": end.metrics(),
    }
    write_json(directory / "result.json", result)
    _draw(writer, target, f"{model} by {asked.loss}", directory / "training")
    say(f"\n{end}\n{LEGEND}\n\nmetrics, policy, pictures and result.json are in {directory}")
    worse = further_away(training.start, end.metrics())
    if worse is not None:
        note(f"note: {worse} Lower --lr (it was {asked.lr:g}).")
    _stop(stopped, len(writer.history) - 1, directory)


@dataclass(frozen=True)
class _Asked:
    """What a run was asked for, with what was left open filled in."""

    problem: ProblemSource
    model: str
    loss: str
    steps: int
    batch_size: int
    lr: float
    schedule: str
    seed: int
    device: str

    def config(self) -> dict[str, Any]:
        """All of it, for config.json, and what else decides the numbers."""
        torch_facts = {"torch_threads": torch.get_num_threads(), "torch": torch.__version__}
        return {"command": "train", **asdict(self), **torch_facts}

    @property
    def own(self) -> str:
        """What of it is the user's own, code or a loss's arguments, as messages name it; "" for
        nothing.
        """
        named = [(f"--loss {self.loss}", self.loss), (f"--model {self.model}", self.model)]
        return " or ".join(option for option, name in named if ":" in name or "(" in name)


@dataclass(frozen=True)
class _Training:
    """A run that has made its first step.

    Attributes:
        policy: after that step.
        target: what it is trained towards.
        start: the comparison before that step.
        records: of every step, the first one included; who reads them makes the steps.
    """

    policy: LanguageModel
    target: Posterior
    start: Record
    records: Iterable[Record]


def _filled_in(
    source: ProblemSource,
    model: str,
    loss: str | None,
    steps: int | None,
    batch_size: int,
    lr: float | None,
    schedule: str,
    seed: int,
    device: DeviceName,
) -> _Asked:
    """The defaults that depend on model and loss."""
    loss = ("exact" if model == "table" else "rloo") if loss is None else loss
    steps = (_STEPS_OF_SUMS if _sums(find_loss(loss)) else _STEPS) if steps is None else steps
    lr = _LR.get(model, _LR_OF_OWN) if lr is None else lr
    # settled here, so that config.json says what auto came to
    where = str(pick_device(device))
    return _Asked(source, model, loss, steps, batch_size, lr, schedule, seed, where)


def _begin(asked: _Asked) -> _Training:
    """Problem, posterior and policy, and the first step of the loop.

    Raises:
        InputError: whatever of what was asked cannot be had.
    """
    draw, loss = seeded_draw(asked.seed), find_loss(asked.loss)
    check_count(asked.steps, "steps", 0)
    check_count(asked.batch_size, "batch_size")
    problem = asked.problem.load()
    # before the posterior, which takes its time where sentences are long
    _check_trainable(problem, asked.problem.table)
    _check_size(problem, asked, _sums(loss))
    # a module moves in place, so the problem keeps its own prior
    problem.prior.to(asked.device)
    target = exact_posterior(problem)
    with blaming(asked.own):
        policy = build_policy(asked.model, target, asked.seed)
        start = comparison_metrics(policy, target)
        loop = train_steps(
            policy,
            _source(looked_up(target), loss, asked, draw),
            loss,
            steps=asked.steps,
            optimizer=_adam(policy, loss, asked.lr),
            schedule=SCHEDULES[asked.schedule],
            max_grad_norm=1.0,
        )
        # a loss that fails does so here, and leaves no directory behind
        first = list(itertools.islice(loop, 1))
    return _Training(policy, target, start, itertools.chain(first, loop))


def _sums(loss: Loss) -> bool:
    """Whether a loss sums over the whole support instead of sampling."""
    return "support" in needs_of(loss)


def _source(problem: Problem, loss: Loss, asked: _Asked, draw: Draw) -> sources.Source:
    """The policy's own samples, or the whole support, which prior and reward score once a run."""
    distributions = "distributions" in needs_of(loss)
    if not _sums(loss):
        return sources.on_policy(problem, asked.batch_size, draw=draw, distributions=distributions)
    whole = sources.support(problem, distributions=distributions)
    return sources.replay(whole, max(1, asked.steps))


def _adam(policy: LanguageModel, loss: Loss, lr: float) -> list[torch.optim.Optimizer]:
    """The loop's own Adam. A table's gradient at a sequence is of the size of its probability, and
    would drown in the ε of 1e-8 that Adam adds to it.
    """
    optimizers = optimizers_of(policy, loss, None, lr)
    if isinstance(policy, SequenceTable):
        for group in optimizers[0].param_groups:
            group["eps"] = _EPSILON_OF_A_TABLE
    return optimizers


def _opening(asked: _Asked, target: Posterior) -> str:
    """What is trained on what, in two lines."""
    problem = target.problem
    feasible = int((target.enumerated().rewards > -math.inf).sum())
    every = readable_count(problem.space.size)
    return (
        f"{asked.model} trained by {asked.loss} on {asked.problem.name} at kl_coef ="
        f" {problem.kl_coef:g}, restricted to the {feasible:,} of {every}\nsequences"
        " with prior mass and a finite reward, whose log q and r are looked up; exact λ log Z ="
        f" {float(target.value):.12g}"
    )


def further_away(start: Record, end: dict[str, float | None]) -> str | None:
    """One sentence where training led away from the posterior; None where it did not."""
    before, after = start["objective_gap"], end["objective_gap"]
    if after is not None and after > before + _MARGIN:
        return (
            "the policy is further from the posterior than at the start: its objective's gap went"
            f" from {before:.6g} to {after:.6g}."
        )
    before, after = start["forward_kl"], end["forward_kl"]
    if after is not None and after > before + _MARGIN:
        return (
            "the policy gives less to what the posterior holds than at the start: KL(π*‖π) went"
            f" from {before:.6g} to {after:.6g} nats, though J is higher: it gathers on few"
            " sequences."
        )
    return None


def _record_steps(
    records: Iterable[Record],
    asked: _Asked,
    writer: RunWriter,
    policy: LanguageModel,
    target: Posterior,
) -> KeyboardInterrupt | KlrlError | None:
    """Every step to disk as it comes, an exact comparison and the weights now and then; returns
    what stopped it early, if anything did.
    """
    every = max(1, asked.steps // _EVALUATIONS)
    try:
        writer.save_now_and_then(policy)
        with blaming(asked.own):
            for record in records:
                if record["step"] % every == 0 or record["step"] == asked.steps:
                    record.update(comparison_metrics(policy, target))
                # the record first: the weights are saved with the last record's step
                writer.record(record)
                writer.save_now_and_then(policy)
    except (KeyboardInterrupt, KlrlError) as stopped:
        # raised later: first come the weights, metrics and pictures of what was done
        return stopped
    return None


def _stop(stopped: KeyboardInterrupt | KlrlError | None, step: int, directory: Path) -> None:
    """Ends a run that was stopped early with its exit code, and says where what there is lies."""
    if isinstance(stopped, KeyboardInterrupt):
        note(f"interrupted after step {step}; metrics and weights so far are in {directory}")
        raise SystemExit(INTERRUPTED)
    if stopped is not None:
        kept = f"{stopped} Metrics and weights so far are in {directory}."
        stopped.args = (kept, *stopped.args[1:])
        raise stopped


def _check_trainable(problem: Problem, table: Path | None) -> None:
    """Refuses, before anything is computed, what leaves nothing to train or nothing to keep."""
    if table is not None and not table.is_file():
        raise InputError(
            f"{table} is no file, and can be read only once, while a run keeps a copy of its table;"
            " save the table in a file."
        )
    if problem.kl_coef == math.inf:
        raise InputError(
            "kl_coef = inf: the posterior is the prior itself, and there is nothing to train; give"
            " a finite kl_coef."
        )


def _check_size(problem: Problem, asked: _Asked, sums: bool) -> None:
    """Refuses a step that would keep more numbers for its gradient than fit: N·T·(V + width)."""
    space, prior = problem.space, problem.prior
    if not sums:
        rows = max(asked.batch_size, _LOOKED_AT)
    else:
        rows = len(prior.tokens) if isinstance(prior, SequenceTable) else space.size
    a_sequence = space.max_length * (space.vocab_size + _OF_A_NETWORK * (asked.model != "table"))
    if rows * a_sequence <= _MAX_NUMBERS:
        return
    fitting = _MAX_NUMBERS // a_sequence
    remedy = (
        f"a --batch-size of at most {fitting:,}"
        if fitting >= _LOOKED_AT and not sums
        else "shorter sentences with fewer different words"
        + (" or a loss that samples, such as rloo" if sums else "")
    )
    raise TooLargeError(
        f"a step over {rows:,} sequences of {space.max_length:,} tokens, each one of"
        f" {space.vocab_size:,}, keeps some {rows * a_sequence:,} numbers for its gradient; at"
        f" most {_MAX_NUMBERS:,} are allowed. Give {remedy}."
    )


def _draw(writer: RunWriter, target: Posterior, what: str, path: Path) -> None:
    with plots.publication_style():
        figure, (divergences, objective) = plots.new_figure(2)
        plots.plot_metrics(
            writer.history,
            {"reverse_kl": "KL(π‖π*)", "forward_kl": "KL(π*‖π)"},
            divergences,
            ylabel="nats a sequence",
            log=True,
        )
        divergences.set_title(plots.literal(f"Distance of {what}"))
        plots.plot_metrics(
            writer.history, {"exact_objective": "J(π)"}, objective, ylabel="reward units"
        )
        objective.set_title(f"Its objective at λ = {target.problem.kl_coef:g}")
        objective.axhline(
            float(target.value),
            color=plots.POSTERIOR_COLOUR,
            linestyle="--",
            label="λ log Z, the most there is",
        )
        objective.legend(loc="lower right")
        plots.save_figure(figure, path)
