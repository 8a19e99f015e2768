"""`klrl check`: every identity of the theory on random problems, and every claim of the articles,
by number.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from klrl_edu.core.display import text_table
from klrl_edu.core.draws import as_generator
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import check_count
from klrl_edu.experiments.console import speaker
from klrl_edu.experiments.directories import check_new, new_directory
from klrl_edu.experiments.runner import write_json
from klrl_edu.theory.claims import CLAIMS, claims_text
from klrl_edu.theory.identities import HEADER, IDENTITIES, check_identities, find_identity


def run_check(
    out: Path | None, *, quiet: bool, name: str | None, claims_only: bool, seed: int, examples: int
) -> bool:
    """Checks, prints a table of each kind, and writes result.json; returns whether everything
    holds.

    Args:
        out: where result.json goes; None for the first free of runs/check, runs/check-2, …
        quiet: print nothing.
        name: one statement or one claim; None for all.
        claims_only: the articles' claims alone, with what was seen of each.
        seed, examples: of the random problems that the statements are tried on.

    Raises:
        InputError: an unknown name, a bad seed or number of examples; nothing is written then.
    """
    check_new(out, "check")
    statements, claims = _asked_for(name, claims_only)
    check_count(examples, "examples")
    as_generator(seed)  # a bad seed is refused here, before anything is written
    directory, say = new_directory(out, "check"), speaker(quiet)
    # of this process alone: a busy machine does not lengthen it
    started = time.process_time()
    trying = check_identities(statements, seed=seed, examples=examples) if statements else ()
    identities = list(
        tqdm(trying, desc="checking", total=len(statements), disable=quiet or None, leave=False)
    )
    checks = [CLAIMS[claim].check() for claim in claims]
    if identities:
        say(
            f"{len(identities)} statements on {examples} random problems, each beside a broken twin"
            " that must fail"
        )
        say(text_table(HEADER, [checked.row() for checked in identities]))
    if checks:
        say(
            ("\n" if identities else "")
            + claims_text(checks, details=claims_only or not identities)
        )
    wrong = [
        *(c.statement.name for c in identities if not c.holds),
        *(c.claim.name for c in checks if not c.passed),
    ]
    seconds = time.process_time() - started
    numbers: dict[str, Any] = {
        "seed": seed,
        "examples": examples,
        "seconds": seconds,
        "wrong": wrong,
    }
    write_json(
        directory / "result.json",
        {
            "command": "check",
            **numbers,
            "identities": [c.to_dict() for c in identities],
            "claims": [c.to_dict() for c in checks],
        },
    )
    say(
        f"\n{_summary(len(identities), len(checks), wrong)} ({seconds:.1f} s of CPU time)."
        f" result.json is in {directory}"
    )
    return not wrong


def _asked_for(name: str | None, claims_only: bool) -> tuple[list[str], list[str]]:
    """The names of the statements and of the claims to check."""
    if name is None:
        return ([] if claims_only else list(IDENTITIES)), list(CLAIMS)
    if claims_only:
        raise InputError(
            f"--name {name} and --claims do not go together: --name takes one statement or one"
            " claim, by its name."
        )
    return ([], [name]) if name in CLAIMS else ([find_identity(name).name], [])


def _summary(statements: int, claims: int, wrong: Sequence[str]) -> str:
    if wrong:
        return f"WRONG: {', '.join(wrong)}"
    held = [f"{statements} statements hold"] * bool(statements) + [
        f"the verdicts of {claims} claims agree with their numbers"
    ] * bool(claims)
    return ", ".join(held)
