"""`klrl train`: a policy trained towards the exact posterior, and held against it."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch

from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import KlrlError, TooLargeError
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
from klrl_edu.learning.batches import needs_of
from klrl_edu.learning.training import SCHEDULES, comparison_metrics, train_steps
from klrl_edu.models.contract import LanguageModel
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.problem import Problem

_EVALUATIONS = 20  # exact comparisons in the course of a training run
_MAX_LOGITS = 50_000_000  # next-token probabilities a step: 0.4 GB a copy in float64
_LOOKED_AT = 16  # sequences that training looks at first, whatever the batch
_LR = {"table": 3e-2, "lstm": 1e-2, "gru": 1e-2, "transformer": 3e-3}
_LR_OF_OWN = 3e-3
_MARGIN = 1e-6  # nats: rounding and sampling near the optimum are no divergence


def train(
    problem: TableArgument,
    /,
    *,
    model: Annotated[str, Word("MODEL")] = "lstm",
    loss: Annotated[str, Word("LOSS")] = "rloo",
    kl_coef: float = 1.0,
    steps: int = 1000,
    batch_size: int = 64,
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
        model: table (a copy of the prior), a fresh lstm, gru or transformer, or file.py:Class of
            one's own, made as Class(space), or Class(space, seed=seed) if it takes a seed.
        loss: exact (the gradient of J, no sampling), rloo, or any other of klrl_edu.losses, with
            arguments as in "grpo(clip=0.1)"; or file.py:function, module:function of one's own.
        kl_coef: λ, at least 0 (0: reward only; inf: the prior).
        steps: updates.
        batch_size: sequences a step.
        lr: Adam's learning rate; gradients are clipped to norm 1. By default 0.03 for table, 0.01
            for lstm and gru, 0.003 otherwise.
        schedule: of the learning rate; warmup_cosine rises for a tenth of the run, then falls to 0.
        seed: of weights and samples.
        device: auto takes CUDA where there is one; cuda by name never falls back.
        separator: between words; "" reads sentences as characters.
        normalize: the table holds weights, not probabilities.
        out: a new or empty directory; by default the first free of runs/train, runs/train-2, …
    """
    check_new(out, "train")
    draw = seeded_draw(seed)
    where = pick_device(device)
    chosen = find_loss(loss)
    lr = _LR.get(model, _LR_OF_OWN) if lr is None else lr
    source = ProblemSource(problem, kl_coef, separator, normalize)
    loaded = source.load()
    sampled = "support" not in needs_of(chosen)
    # before the posterior, which takes its time where sentences are long
    _check_size(loaded, batch_size, sampled)
    loaded.prior.to(where)
    target = exact_posterior(loaded)
    policy = build_policy(model, target, seed)
    # what of it is the user's code, as messages name it
    named = [(f"--loss {loss}", loss), (f"--model {model}", model)]
    own = " or ".join(option for option, name in named if ":" in name)
    with blaming(own):
        start = comparison_metrics(policy, target)
    loop = train_steps(
        policy,
        looked_up(target),
        chosen,
        draw=draw,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        schedule=SCHEDULES[schedule],
        max_grad_norm=1.0,
    )
    with blaming(own):
        first = next(loop, None)  # bad arguments surface here, before anything is written
    directory = new_directory(out, "train")
    config = {
        "command": "train",
        "problem": {
            "name": problem,
            "kl_coef": loaded.kl_coef,
            "separator": separator,
            "normalize": normalize,
        },
        "model": model,
        "loss": loss,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "schedule": schedule,
        "seed": seed,
        "device": str(where),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    writer = RunWriter(directory, config, source)
    say = speaker(quiet)
    feasible = int((target.enumerated().rewards > -math.inf).sum())
    say(
        f"{model} trained by {loss} on {problem} at kl_coef = {loaded.kl_coef:g}, restricted to the"
        f" {feasible:,} of {loaded.space.size:,}"
    )
    say(
        "sequences with prior mass and a finite reward, whose log q and r are looked up; exact λ"
        f" log Z = {float(target.value):.12g}"
    )
    writer.record({"step": 0, **start})
    running = progress(quiet)(_chain(first, loop), steps, "training")
    stopped = _record_steps(running, steps, writer, policy, target, own)
    writer.close(policy)
    end = compare_models(policy, target)
    result = {
        "command": "train",
        **target.to_dict(),
        "steps_done": len(writer.history) - 1,
        "interrupted": stopped is not None,
        "start": start,
        "end": end.metrics(),
    }
    write_json(directory / "result.json", result)
    _draw(writer, target, f"{model} by {loss}", directory / "training")
    say(f"\n{end}\n{LEGEND}\n\nmetrics, policy, pictures and result.json are in {directory}")
    worse = further_away(start, end.metrics())
    if worse is not None:
        note(f"note: {worse} Lower --lr (it was {lr:g}).")
    _stop(stopped, len(writer.history) - 1, directory)


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
    loop: Iterable[Record],
    steps: int,
    writer: RunWriter,
    policy: LanguageModel,
    target: Posterior,
    own: str,
) -> KeyboardInterrupt | KlrlError | None:
    """Every step to disk as it comes, an exact comparison and the weights now and then; returns
    what stopped it early, if anything did. `own` is what of it is the user's code, in words.
    """
    every = max(1, steps // _EVALUATIONS)
    try:
        writer.save_now_and_then(policy)
        with blaming(own):
            for record in loop:
                if record["step"] % every == 0 or record["step"] == steps:
                    record.update(comparison_metrics(policy, target))
                writer.record(record)
                writer.save_now_and_then(policy)
    except (KeyboardInterrupt, KlrlError) as stopped:
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


def _check_size(problem: Problem, batch_size: int, sampled: bool) -> None:
    """Refuses a step that would hold more next-token probabilities than fit: N·T·V of them."""
    space, prior = problem.space, problem.prior
    if sampled:
        rows = max(batch_size, _LOOKED_AT)
    else:
        rows = len(prior.tokens) if isinstance(prior, SequenceTable) else space.size
    logits = rows * space.max_length * space.vocab_size
    if logits <= _MAX_LOGITS:
        return
    fitting = _MAX_LOGITS // (space.max_length * space.vocab_size)
    remedy = (
        f"a --batch-size of at most {fitting:,}"
        if fitting >= _LOOKED_AT and sampled
        else "shorter sentences with fewer different words"
        + ("" if sampled else " or a loss that samples, such as rloo")
    )
    raise TooLargeError(
        f"a step over {rows:,} sequences of {space.max_length:,} tokens, each one of"
        f" {space.vocab_size:,}, holds {logits:,} next-token probabilities; at most"
        f" {_MAX_LOGITS:,} are allowed. Give {remedy}."
    )


def _chain(first: Record | None, rest: Iterable[Record]) -> Iterable[Record]:
    if first is not None:
        yield first
    yield from rest


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
