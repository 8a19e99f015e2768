"""Exercises that check themselves.

    check("t01.mutual", answer)

says whether an answer is right, and if it is not, what is wrong with it. References are recomputed
at every call from `reference.py`; an answer counts when it agrees with them to 1e-9. What was
checked is recorded in `.klrl/answers.json`, or in the file that KLRL_ANSWERS names. Each tutorial's
exercises have a file of their own here.
"""

import difflib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from klrl_edu.core.errors import InputError
from klrl_edu.evaluation.records import json_line, write_atomically
from klrl_edu.exercises import t01, t02, t03, t04, t05, t06, t07, t08
from klrl_edu.exercises.judging import Exercise, judge


def check(name: str, answer: object) -> None:
    """Prints whether an answer is right or what is wrong with it, and records the result.

    Args:
        name: of the exercise, "t01.mutual".
        answer: a number, a dict sentence -> number, a sequence, an array or tensor of these, or a
            function where the exercise asks for one; `...` is not answered yet.

    Raises:
        InputError: no such exercise; the message lists those of the tutorial.
    """
    exercise = find(name)
    if answer is ...:
        print(f"{name}: not answered yet. Put your answer in place of the dots.")
        return
    wrong = judge(exercise, answer)
    print(f"{name}: {'right.' if wrong is None else f'not yet. {wrong}'}")
    _record(name, wrong is None)


def find(name: str) -> Exercise:
    """An exercise by its name.

    Raises:
        InputError: no such name; the message lists the known ones.
    """
    if name not in EXERCISES:
        near = difflib.get_close_matches(str(name), EXERCISES, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"exercise {name!r} is not known.{meant} The exercises are {', '.join(EXERCISES)}."
        )
    return EXERCISES[name]


def answers_path() -> Path:
    """Where results are recorded: KLRL_ANSWERS, or .klrl/answers.json in the working directory."""
    return Path(os.environ.get("KLRL_ANSWERS") or Path(".klrl") / "answers.json")


def read_answers(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """What was recorded: name -> {"correct": bool, "time": when, in UTC}; empty where nothing was.

    Raises:
        InputError: the file is not such a record.
    """
    path = answers_path() if path is None else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(one, dict) and isinstance(one.get("correct"), bool) for one in found.values()
    ):
        raise InputError(
            f"{path} is not a record of answers; move it away, or name another file in"
            " KLRL_ANSWERS."
        )
    return found


def _record(name: str, correct: bool) -> None:
    """The latest result of each exercise; a folder that cannot be written to costs the record, not
    the tutorial.
    """
    path = answers_path()
    try:
        results = {
            **read_answers(path),
            name: {"correct": correct, "time": datetime.now(UTC).isoformat(timespec="seconds")},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json_line(results) + "\n").encode())
    except (OSError, InputError) as error:
        reason = error if isinstance(error, InputError) else f"{path}: {error.strerror or error}"
        print(f"(not recorded: {reason})")


EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise
    for room in (t01, t02, t03, t04, t05, t06, t07, t08)
    for exercise in room.EXERCISES
}
