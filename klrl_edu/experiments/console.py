"""What every command shares: exit codes, the words of its arguments, and how it talks."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, TextIO

import tyro
from tqdm import tqdm

from klrl_edu.evaluation.records import Record
from klrl_edu.experiments.parsing import Word

OK, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
Quiet = Annotated[bool, tyro.conf.arg(help="Print nothing but errors.")]
TableArgument = Annotated[str, Word("TABLE")]
LEGEND = (
    "uncovered_mass: what the posterior holds and the policy never gives; violating_mass: what the"
    "\npolicy gives where the posterior has nothing."
)
Say = Callable[[str], None]
Progress = Callable[[Iterable[Record], int, str], Iterable[Record]]


def speaker(quiet: bool) -> Say:
    """`print`, or nothing. A reader who has seen enough (`| head`) does not stop the work."""
    if quiet:
        return lambda text: None

    def say(text: str) -> None:
        try:
            print(text)
        except BrokenPipeError:
            silence(sys.stdout)

    return say


def note(text: str) -> None:
    """One line on the error stream, also where nothing else is printed."""
    with contextlib.suppress(BrokenPipeError):
        print(f"klrl: {text}", file=sys.stderr)


def silence(stream: TextIO) -> None:
    """A stream whose reader has gone writes to nothing from now on, so that closing it at the end
    is no error either.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


def progress(quiet: bool) -> Progress:
    """A bar with the step, the seconds and, where a record has it, KL(π‖π*)."""

    def bar(loop: Iterable[Record], steps: int, label: str) -> Iterable[Record]:
        with tqdm(
            loop,
            desc=label,
            total=steps,
            # None leaves the bar out where no terminal shows it
            disable=quiet or None,
            leave=False,
            mininterval=0.2,
            unit="step",
            bar_format="{desc}: step {n_fmt} of {total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",
        ) as shown:
            for record in shown:
                yield record
                # after the yield: who reads the loop adds what an exact comparison says
                if "reverse_kl" in record:
                    shown.set_postfix_str(f"KL(π‖π*) = {record['reverse_kl']:.4g} nats")

    return bar
