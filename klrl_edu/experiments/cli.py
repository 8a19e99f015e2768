"""The command line: `klrl COMMAND …`.

Exit 0: done; 1: a check failed; 2: bad input, in one line with the remedy; 130: interrupted, with
what was written so far kept.
"""

import errno
import platform
import re
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch

from klrl_edu.core.display import Cell, text_table
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import KlrlError
from klrl_edu.experiments import figures
from klrl_edu.experiments.audit_command import audit
from klrl_edu.experiments.check_command import run_check
from klrl_edu.experiments.compare_command import compare
from klrl_edu.experiments.console import (
    BAD_INPUT,
    CHECK_FAILED,
    INTERRUPTED,
    OK,
    Quiet,
    note,
    progress,
    silence,
    speaker,
)
from klrl_edu.experiments.demo import run_demo
from klrl_edu.experiments.directories import check_new, new_directory
from klrl_edu.experiments.parsing import MisspeltError, Word, parse
from klrl_edu.experiments.posterior_command import posterior
from klrl_edu.experiments.runner import write_json
from klrl_edu.experiments.train_command import train
from klrl_edu.theory.identities import EXAMPLES as CHECK_EXAMPLES


def demo(*, out: Path | None = None, seed: int = 0, quiet: Quiet = False) -> None:
    """Four sentences, networks trained to their posterior, US surnames, and 262,144 digit
    sequences: one to two minutes.

    Writes result.json (four_sentences, networks, surnames, count_threes: every printed number) and
    three pictures as .png and .pdf.

    Args:
        out: a new or empty directory; by default the first free of runs/demo, runs/demo-2, …
        seed: of weights and samples.
    """
    seeded_draw(seed)  # refuses a bad seed before anything is written
    directory = new_directory(out, "demo")
    say = speaker(quiet)
    result = run_demo(directory, seed, say, progress(quiet))
    write_json(directory / "result.json", {"command": "demo", "seed": seed, **result})
    say(f"\nPictures and result.json are in {directory}")


def figure(
    name: Annotated[str, Word("NUMBER|FILE")] = "list",
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
        out: where to write; by default runs/figure-NAME, which the same figure renews.
    """
    say = speaker(quiet)
    if name == "list":
        say(figures.registry_text())
        return
    entry = figures.find_figure(name)
    out = Path("runs") / f"figure-{entry.number or entry.script.stem}" if out is None else out
    figures.check_out(entry, out)
    say(f"{entry.title}\n{entry.source}")
    made = figures.make_figure(entry.script)
    directory = figures.save_made_figure(entry, made, out)
    numbers: list[list[Cell]] = [
        [str(key), value] for key, value in made.data.items() if isinstance(value, float | int)
    ]
    if numbers:
        say("\n" + text_table(["number", "value"], numbers))
    say(
        f"\n{entry.script.stem}.png, .pdf, data.json and result.json are in {directory}"
        f" ({made.seconds:.1f} s)"
    )


def check(
    *,
    name: Annotated[str | None, Word("NAME")] = None,
    claims: bool = False,
    seed: int = 0,
    examples: int = CHECK_EXAMPLES,
    out: Path | None = None,
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
        out: a new or empty directory; by default the first free of runs/check, runs/check-2, …
    """
    if not run_check(out, quiet=quiet, name=name, claims_only=claims, seed=seed, examples=examples):
        raise SystemExit(CHECK_FAILED)


def env(*, out: Path | None = None, quiet: Quiet = False) -> None:
    """Versions, threads and devices, for a report.

    Args:
        out: write them as result.json there too, in a new or empty directory.
    """
    check_new(out, "env")
    packages = ("klrl_edu", "torch", "numpy", "scipy", "matplotlib", "tyro")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: metadata.version(name) for name in packages},
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
    if out is not None:
        write_json(new_directory(out, "env") / "result.json", {"command": "env", **facts})
    say = speaker(quiet)
    for name, value in facts.items():
        say(f"{name:14} {value}")


COMMANDS: dict[str, Callable[..., None]] = {
    run.__name__: run for run in (demo, posterior, train, compare, audit, check, figure, env)
}
_ABOUT = (
    "An exact laboratory for KL-regularised reinforcement learning of language models. What a"
    " command takes: klrl COMMAND --help."
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    # several threads make models this small slower, on a busy machine many times
    torch.set_num_threads(1)
    _speak_utf8()
    warnings.showwarning = _show
    try:
        asked = parse(sys.argv[1:] if arguments is None else arguments, COMMANDS, _ABOUT)
        if asked is not None:
            asked.run()
        # here, where a pipe that was closed is still caught
        sys.stdout.flush()
        return OK
    except BrokenPipeError:  # `| head` has seen enough
        silence(sys.stdout)
        return OK
    except SystemExit as stop:
        return int(stop.code or 0)
    except (KlrlError, MisspeltError, Warning) as error:  # a warning: python -W error
        return _refuse(str(error))
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except OSError as error:
        return _refuse(_said_of(error))


def _refuse(message: str) -> int:
    line = " ".join(message.split("\n"))
    # a path or a number of thousands of characters would bury what is wrong with it
    note(re.sub(r"(\S{80})\S{200,}(\S{20})", r"\1…\2", line))
    return BAD_INPUT


def _said_of(error: OSError) -> str:
    full = "; free some space, or name another --out" if error.errno == errno.ENOSPC else ""
    return f"{error.filename or 'input or output'}: {error.strerror or error}{full}"


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    """Warnings as one line, without the place in the code."""
    note(f"note: {message}")


def _speak_utf8() -> None:
    """λ and π on consoles whose encoding lacks them: replaced, never a crash."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
