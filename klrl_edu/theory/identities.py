"""The registry of identities and bounds, and how all of them are checked: `klrl check`, the tests
and the site read it.

    every statement, on some hundred random problems; its broken twin, which must fail           (1)

A room of statements is a file of this folder; what it defines with `@identity` or `@bound` is in
the registry.
"""

import difflib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from klrl_edu.core.display import Cell
from klrl_edu.core.errors import InputError
from klrl_edu.theory import (
    decisions,
    divergences,
    gradients,
    posteriors,
    preferences,
    sampling,
    sequences,
)
from klrl_edu.theory.cases import random_cases
from klrl_edu.theory.statements import Statement, Trial, try_statement, twin_is_caught

EXAMPLES = 120
_TWIN_EXAMPLES, _TWIN_SEED = 40, 1  # fixed, so that a small --examples does not let a twin escape


def _statements_of(room: ModuleType) -> Iterator[Statement]:
    return (thing for thing in vars(room).values() if isinstance(thing, Statement))


IDENTITIES: dict[str, Statement] = {
    statement.name: statement
    for room in (posteriors, sequences, gradients, divergences, sampling, preferences, decisions)
    for statement in _statements_of(room)
}


@dataclass(frozen=True)
class CheckedIdentity:
    """One statement and what trying it gave.

    Attributes:
        statement: the identity or bound.
        trial: its largest error.
        caught: whether its broken twin fails.
        seconds: CPU time of both.
    """

    statement: Statement
    trial: Trial
    caught: bool
    seconds: float

    @property
    def holds(self) -> bool:
        """Within its tolerance, by a check that its twin does not pass."""
        return self.trial.error <= self.statement.tolerance and self.caught

    @property
    def verdict(self) -> str:
        """What the check says, in words: "holds", or how it fails."""
        if self.trial.error > self.statement.tolerance:
            return f"FAILS (case {self.trial.worst})"
        return "holds" if self.caught else "TWIN NOT CAUGHT"

    def row(self) -> list[Cell]:
        """The row of the table under `HEADER`: name, relation, largest error, tolerance, verdict,
        source.
        """
        s = self.statement
        return [
            s.name,
            s.relation,
            f"{self.trial.error:.1e}",
            f"{s.tolerance:.0e}",
            self.verdict,
            s.source,
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and texts."""
        s, trial = self.statement, self.trial
        about = {
            name: getattr(s, name)
            for name in ("name", "about", "latex", "source", "tutorial", "relation", "tolerance")
        }
        numbers = {
            "examples": trial.examples,
            "largest_error": trial.error,
            "worst_case": trial.worst,
            "seconds": self.seconds,
        }
        return {
            **about,
            **numbers,
            "holds": self.holds,
            "twin": s.twin.slip if s.twin else None,
            "twin_caught": self.caught,
        }


HEADER = ["statement", "", "largest error", "tolerance", "verdict", "source"]


def find_identity(name: str) -> Statement:
    """A statement by its name.

    Raises:
        InputError: no such name; the message has the nearest ones.
    """
    if name not in IDENTITIES:
        near = difflib.get_close_matches(name, IDENTITIES, 3)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise InputError(
            f"identity {name!r} is not known.{meant} `klrl check` without --name lists all"
            f" {len(IDENTITIES)}."
        )
    return IDENTITIES[name]


def check_identities(
    names: Sequence[str] = (), *, seed: int = 0, examples: int = EXAMPLES
) -> Iterator[CheckedIdentity]:
    """Tries each statement (all by default) on `examples` random problems, and its twin on 40 of
    its own; yields as it goes.

    Raises:
        InputError: an unknown name, a bad seed, examples below 1.
    """
    statements = [find_identity(name) for name in names] or list(IDENTITIES.values())
    # lists: what one statement computed on a case serves the next
    cases, twin_cases = (
        list(random_cases(seed, examples)),
        list(random_cases(_TWIN_SEED, _TWIN_EXAMPLES)),
    )
    for statement in statements:
        started = time.process_time()
        trial = try_statement(statement, cases)
        yield CheckedIdentity(
            statement, trial, twin_is_caught(statement, twin_cases), time.process_time() - started
        )


def identities_markdown(examples: int = EXAMPLES) -> str:
    """The table of the site: every statement, its formula, source, tutorial and largest error,
    computed now.
    """
    head = f"| statement | largest error on {examples} problems | broken twin |\n|---|---|---|\n"
    return head + "".join(_markdown_row(checked) for checked in check_identities(examples=examples))


def _markdown_row(checked: CheckedIdentity) -> str:
    s = checked.statement
    assert s.twin is not None
    verdict = f"{checked.trial.error:.1e}" + ("" if checked.holds else f" **{checked.verdict}**")
    # a bare bar would end the cell
    about = s.about.replace("|", r"\|")
    return (
        f"| `{s.name}`: {about}<br>${table_math(s.latex)}$<br>{s.source}; {s.tutorial} | {verdict}"
        f" | {s.twin.slip} |\n"
    )


def table_math(latex: str) -> str:
    """LaTeX without the bars that would end a cell of a Markdown table."""
    return latex.replace(r"\|", r"\Vert ").replace("|", r"\vert ")
