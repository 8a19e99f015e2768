"""The command line: `klrl COMMAND …`.

Exit 0: done; 1: a check failed; 2: bad input, in one line with the remedy; 130: interrupted, with
what was written so far kept.
"""

import contextlib
import csv
import functools
import io
import math
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from klrl_edu.core.display import Cell, text_table
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import KlrlError
from klrl_edu.core.validation import check_count
from klrl_edu.evaluation.compare import compare as compare_models
from klrl_edu.evaluation.records import Record, write_atomically
from klrl_edu.exact.posterior import Posterior, looked_up
from klrl_edu.exact.posterior import posterior as exact_posterior
from klrl_edu.experiments import figures, plots
from klrl_edu.experiments.audit_command import audit
from klrl_edu.experiments.check_command import run_check
from klrl_edu.experiments.console import BAD_INPUT, CHECK_FAILED, INTERRUPTED, OK, Quiet, speaker
from klrl_edu.experiments.demo import run_demo
from klrl_edu.experiments.runner import (
    LOSSES,
    DeviceName,
    LossName,
    ModelName,
    ProblemSource,
    RunWriter,
    build_policy,
    claim_directory,
    compare_run,
    fresh_directory,
    pick_device,
    spreadsheet_cell,
    write_json,
)
from klrl_edu.learning.training import SCHEDULES, comparison_metrics, train_steps
from klrl_edu.models.contract import LanguageModel
from klrl_edu.problems.examples import EXAMPLES
from klrl_edu.theory.identities import EXAMPLES as CHECK_EXAMPLES

_EVALUATIONS = 20  # exact comparisons in the course of a training run


def demo(*, out: Path = Path("runs/demo"), seed: int = 0, quiet: Quiet = False) -> None:
    """Four sentences, networks trained to their posterior, US surnames, and 262,144 digit
    sequences: one to two minutes.

    Writes result.json (four_sentences, networks, surnames, count_threes: every printed number) and
    three pictures as .png and .pdf.

    Args:
        out: where to write.
        seed: of weights and samples.
    """
    seeded_draw(seed)  # refuses a bad seed before anything is written
    directory = claim_directory(out, "demo")
    say = speaker(quiet)
    result = run_demo(directory, seed, say, _progress(quiet))
    write_json(directory / "result.json", {"command": "demo", "seed": seed, **result})
    say(f"\nPictures and result.json are in {directory}")


def posterior(
    file: Annotated[str, tyro.conf.Positional],
    /,
    *,
    kl_coef: float = 1.0,
    separator: str = " ",
    normalize: bool = False,
    count: int = 20,
    out: Path = Path("runs/posterior"),
    quiet: Quiet = False,
) -> None:
    """The exact posterior of a table (CSV with the header sentence,prob,reward, or JSON) or of a
    standing problem.

    Writes result.json (value, log_evidence, method, support_size, expected_reward,
    kl_posterior_to_prior, prior), posterior.csv with every sequence, and posterior.png/.pdf.

    Args:
        file: the table, or four-sentences, surnames, count-threes.
        kl_coef: λ, at least 0 (0: reward only; inf: the prior).
        separator: between words; "" reads sentences as characters.
        normalize: the table holds weights, not probabilities.
        count: sequences to print and draw.
        out: where to write.
    """
    source = ProblemSource(file, kl_coef, separator, normalize)
    check_count(count, "count")
    target = exact_posterior(source.load())
    directory = claim_directory(out, "posterior")
    say = speaker(quiet)
    rows = target.rows()
    prior_side, self_side = (
        compare_models(target.problem.prior, target),
        compare_models(target.model, target),
    )
    say(target.text(count))
    say(
        f"E[r]: prior {prior_side.expected_reward:.12g}, posterior"
        f" {self_side.expected_reward:.12g};  KL(π*‖q) = {self_side.kl_to_prior:.12g} nats"
    )
    _write_posterior_csv(directory / "posterior.csv", rows)
    _draw_posterior(target, directory / "posterior", count)
    write_json(
        directory / "result.json",
        {
            "command": "posterior",
            "problem": file,
            **target.to_dict(),
            "expected_reward": self_side.expected_reward,
            "kl_posterior_to_prior": self_side.kl_to_prior,
            "prior": prior_side.metrics(),
        },
    )
    say(f"All {len(rows):,} sequences, the picture and result.json are in {directory}")


def train(
    problem: Annotated[str, tyro.conf.Positional],
    /,
    *,
    model: ModelName = "lstm",
    loss: LossName = "rloo",
    kl_coef: float = 1.0,
    steps: int = 500,
    batch_size: int = 64,
    lr: float = 3e-3,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
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
    Writes config.json, metrics.jsonl (a record a step), metrics.csv, policy.pt, result.json (start,
    end: the comparison's metrics; steps_done; interrupted) and training.png/.pdf.

    Args:
        problem: a table (CSV or JSON), or four-sentences, surnames, count-threes.
        model: table is a copy of the prior; the others are fresh networks.
        loss: exact (the gradient of J, no sampling), reinforce, or rloo.
        kl_coef: λ, at least 0 (0: reward only; inf: the prior).
        steps: updates.
        batch_size: sequences a step.
        lr: Adam's learning rate; gradients are clipped to norm 1.
        schedule: of the learning rate.
        seed: of weights and samples.
        device: auto takes CUDA where there is one; cuda by name never falls back.
        separator: between words; "" reads sentences as characters.
        normalize: the table holds weights, not probabilities.
        out: a new directory; by default the first free of runs/train, runs/train-2, …
    """
    draw = seeded_draw(seed)
    where = pick_device(device)
    source = ProblemSource(problem, kl_coef, separator, normalize)
    loaded = source.load()
    loaded.prior.to(where)
    target = exact_posterior(loaded)
    policy = build_policy(model, target, seed)
    start = comparison_metrics(policy, target)
    options = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "schedule": SCHEDULES[schedule],
        "max_grad_norm": 1.0,
    }
    loop = train_steps(policy, looked_up(target), LOSSES[loss], draw=draw, **options)  # type: ignore[arg-type]
    first = next(loop, None)  # bad arguments surface here, before anything is written
    directory = claim_directory(fresh_directory(out, "train"), "train")
    config = {
        "command": "train",
        "problem": {
            "name": problem,
            "kl_coef": loaded.kl_coef,
            "separator": separator,
            "normalize": normalize,
        },
        **{
            "model": model,
            "loss": loss,
            "steps": steps,
            "batch_size": batch_size,
            "lr": lr,
            "schedule": schedule,
            "seed": seed,
        },
        **{
            "device": str(where),
            "torch_threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }
    writer = RunWriter(directory, config, None if problem in EXAMPLES else Path(problem))
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
    stopped = _record_steps(
        _progress(quiet)(_chain(first, loop), steps, "training"), steps, writer, policy, target
    )
    writer.close(policy)
    end = compare_models(policy, target)
    _finish_training(
        directory, writer, target, start, end.metrics(), interrupted=stopped is not None
    )
    say(f"\n{end}\n\nmetrics, policy, pictures and result.json are in {directory}")
    if isinstance(stopped, KeyboardInterrupt):
        print(
            f"klrl: interrupted after step {len(writer.history) - 1}; metrics and weights so far"
            f" are in {directory}",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED)
    if stopped is not None:
        stopped.args = (
            f"{stopped} Metrics and weights so far are in {directory}.",
            *stopped.args[1:],
        )
        raise stopped


def _record_steps(
    loop: Iterable[Record], steps: int, writer: RunWriter, policy: LanguageModel, target: Posterior
) -> KeyboardInterrupt | KlrlError | None:
    """Every step to disk as it comes, an exact comparison now and then; returns what stopped it
    early, if anything did.
    """
    every = max(1, steps // _EVALUATIONS)
    try:
        for record in loop:
            if record["step"] % every == 0 or record["step"] == steps:
                record.update(comparison_metrics(policy, target))
            writer.record(record)
    except (KeyboardInterrupt, KlrlError) as stopped:
        return stopped
    return None


def compare(
    run: Annotated[Path, tyro.conf.Positional], /, *, out: Path | None = None, quiet: Quiet = False
) -> None:
    """Holds the policy of a training run against its exact posterior again, from the files of the
    run alone.

    Writes result.json (the comparison's metrics).

    Args:
        run: the --out of a `klrl train`.
        out: where to write; RUN/compare by default.
    """
    _, comparison = compare_run(run)
    directory = claim_directory(run / "compare" if out is None else out, "compare")
    write_json(
        directory / "result.json",
        {"command": "compare", "run": str(run.resolve()), **comparison.metrics()},
    )
    say = speaker(quiet)
    say(str(comparison))
    say(f"\nresult.json is in {directory}")


def figure(
    name: Annotated[str, tyro.conf.Positional] = "list",
    /,
    *,
    out: Path | None = None,
    quiet: Quiet = False,
) -> None:
    """Computes and draws a figure of the registry, or one's own; without a name, lists the
    registry.

    Writes result.json (number, title, source, script, config, seconds, data: every number of the
    picture), data.json (the data alone) and the picture as .png and vector .pdf, named as the
    script.

    Args:
        name: a number such as 01, or the path of a .py file that defines Config (a dataclass),
            compute(config) -> dict and draw(data) -> Figure.
        out: where to write; runs/figure-NAME by default.
    """
    say = speaker(quiet)
    if name == "list":
        say(
            text_table(
                ["figure", "title", "source"],
                [[entry.number, entry.title, entry.source] for entry in figures.find_figures()],
            )
        )
        return
    entry = figures.find_figure(name)
    out = Path("runs") / f"figure-{entry.number or entry.script.stem}" if out is None else out
    figures.check_out(entry, out)
    say(f"{entry.title}\n{entry.source}")
    made = figures.make_figure(entry.script)
    directory = figures.save_made_figure(entry, made, out)
    numbers: list[list[Cell]] = [
        [key, value] for key, value in made.data.items() if isinstance(value, float | int)
    ]
    if numbers:
        say("\n" + text_table(["number", "value"], numbers))
    say(
        f"\n{entry.script.stem}.png, .pdf, data.json and result.json are in {directory}"
        f" ({made.seconds:.1f} s)"
    )


def check(
    *,
    name: str | None = None,
    claims: bool = False,
    seed: int = 0,
    examples: int = CHECK_EXAMPLES,
    out: Path = Path("runs/check"),
    quiet: Quiet = False,
) -> None:
    """Tries every identity and bound of the theory on random problems, and every claim of the five
    articles; exit 1 where one is not as stated.

    Writes result.json (seed, examples, wrong: names; identities and claims: each with its formula,
    source, largest error, verdict and twin).

    Args:
        name: one statement or claim by its name; all by default.
        claims: the articles' claims alone, with the numbers that decide each.
        seed: of the random problems.
        examples: random problems a statement.
        out: where to write.
    """
    if not run_check(out, quiet=quiet, name=name, claims_only=claims, seed=seed, examples=examples):
        raise SystemExit(CHECK_FAILED)


def env(*, out: Path | None = None, quiet: Quiet = False) -> None:
    """Versions, threads and devices, for a report.

    Args:
        out: write them as result.json there too.
    """
    packages = ("klrl_edu", "torch", "numpy", "scipy", "matplotlib", "tyro")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: metadata.version(name) for name in packages},
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
    if out is not None:
        write_json(claim_directory(out, "env") / "result.json", {"command": "env", **facts})
    say = speaker(quiet)
    for name, value in facts.items():
        say(f"{name:14} {value}")


COMMANDS: dict[str, Callable[..., None]] = {
    run.__name__: run for run in (demo, posterior, train, compare, audit, check, figure, env)
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    torch.set_num_threads(1)
    _speak_utf8()
    warnings.showwarning = _note
    try:
        return _dispatch(sys.argv[1:] if arguments is None else arguments)
    except KlrlError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("klrl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        return _refuse(f"{error.filename or 'input or output'}: {error.strerror or error}")


def _dispatch(arguments: list[str]) -> int:
    """tyro parses; its boxed messages become one line, and `--help` stays as it is."""
    captured = io.StringIO()
    parsed: list[Callable[[], None]] = []
    deferred = {name: _deferred(command, parsed) for name, command in COMMANDS.items()}
    try:
        with contextlib.redirect_stderr(captured):
            tyro.extras.subcommand_cli_from_dict(
                deferred,
                prog="klrl",
                description=(
                    "An exact laboratory for KL-regularised reinforcement learning of language"
                    " models."
                ),
                args=arguments,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            return OK
        return _refuse(f"{_one_line(captured.getvalue())} (klrl --help)")
    try:
        parsed[0]()
    except SystemExit as stop:
        return int(stop.code or 0)
    return OK


def _deferred(
    command: Callable[..., None], parsed: list[Callable[[], None]]
) -> Callable[..., None]:
    """The command with its work put off until parsing is over, so that only tyro's own words are
    captured.
    """

    @functools.wraps(command)
    def later(*args: Any, **kwargs: Any) -> None:
        parsed.append(lambda: command(*args, **kwargs))

    return later


def _one_line(boxed: str) -> str:
    """The words inside a box up to its first rule, and the suggestion after it if there is one."""
    lines = [line.strip("│╭╮╰╯ ") for line in boxed.splitlines()[1:]]
    parts = " ".join("\n" if line.startswith("───") else line for line in lines if line).split("\n")
    said = [
        part.strip()
        for part in parts
        if part is parts[0] or part.strip().startswith("Perhaps you meant")
    ]
    return "; ".join(part for part in said if part) or "bad arguments"


def _refuse(message: str) -> int:
    print("klrl: " + " ".join(message.split("\n")), file=sys.stderr)
    return BAD_INPUT


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    """Warnings as one line, without the place in the code."""
    print(f"klrl: note: {message}", file=sys.stderr)


def _speak_utf8() -> None:
    """λ and π on consoles whose encoding lacks them: replaced, never a crash."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _progress(quiet: bool) -> Callable[[Iterable[Record], int, str], Iterable[Record]]:
    def bar(loop: Iterable[Record], steps: int, label: str) -> Iterable[Record]:
        return tqdm(
            loop, desc=label, total=steps, disable=quiet or None, leave=False, mininterval=0.2
        )

    return bar


def _chain(first: Record | None, rest: Iterable[Record]) -> Iterable[Record]:
    if first is not None:
        yield first
    yield from rest


def _write_posterior_csv(path: Path, rows: list[tuple[str, float, float, float]]) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["sentence", "prior", "reward", "posterior"])
    writer.writerows([spreadsheet_cell(text), *numbers] for text, *numbers in rows)
    write_atomically(path, out.getvalue().encode())


def _draw_posterior(target: Posterior, path: Path, count: int) -> None:
    with plots.publication_style():
        shown = min(count, len(target.enumerated().tokens))
        figure, (ax,) = plots.new_figure(1, 5.5, max(2.2, 0.32 * shown + 1))
        plots.plot_posterior(target, ax=ax, count=count)
        ax.set_title(
            f"λ = {target.problem.kl_coef:g}, log Z = {float(target.log_evidence):.4g} nats"
        )
        plots.save_figure(figure, path)


def _finish_training(
    directory: Path,
    writer: RunWriter,
    target: Posterior,
    start: Record,
    end: dict[str, float | None],
    *,
    interrupted: bool,
) -> None:
    write_json(
        directory / "result.json",
        {
            "command": "train",
            **target.to_dict(),
            "steps_done": len(writer.history) - 1,
            "interrupted": interrupted,
            "start": start,
            "end": end,
        },
    )
    with plots.publication_style():
        figure, (divergences, objective) = plots.new_figure(2)
        plots.plot_metrics(
            writer.history,
            {"reverse_kl": "KL(π‖π*)", "forward_kl": "KL(π*‖π)"},
            divergences,
            ylabel="nats a sequence",
            log=True,
        )
        plots.plot_metrics(
            writer.history, {"exact_objective": "J(π)"}, objective, ylabel="reward units"
        )
        objective.axhline(
            float(target.value),
            color=plots.POSTERIOR_COLOUR,
            linestyle="--",
            label="λ log Z, the most there is",
        )
        objective.legend(loc="lower right")
        plots.save_figure(figure, directory / "training")


if __name__ == "__main__":
    sys.exit(main())
