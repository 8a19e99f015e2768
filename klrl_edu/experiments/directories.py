"""Where results go: a directory that one call alone may write to, and never an old result's.

A call wins a directory by creating its config.json, which the file system lets exactly one caller
do; so two calls at the same time cannot both have it.
"""

import itertools
import json
from pathlib import Path

from klrl_edu.core.errors import InputError
from klrl_edu.evaluation.records import write_atomically

_CONFIG = "config.json"


def check_new(out: Path | None, command: str) -> None:
    """Refuses, before anything is computed, what `new_directory` would refuse; writes nothing."""
    if out is None:
        return
    out = resolved(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a directory.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if command_of(out) == command:
        raise InputError(
            f"--out {out} is not empty: it holds a former result of `klrl {command}`, and results"
            " are not overwritten; choose another directory, or remove it."
        )
    raise _not_written_by(out, command)


def new_directory(out: Path | None, command: str, default: Path | None = None) -> Path:
    """A directory that this call alone writes to.

    Args:
        out: as asked for, new or empty; None takes the first free of `default`, default-2, …
        command: what the directory is for, kept in its config.json.
        default: runs/COMMAND unless given.

    Returns:
        The resolved path, with a config.json that names the command.

    Raises:
        InputError: `out` holds something, or cannot be written.
    """
    if out is not None:
        # again: something may have come since the command began
        check_new(out, command)
        out = resolved(out)
        if not _won(out, command):
            raise InputError(
                f"--out {out} was taken by another call just now; choose another directory."
            )
        return out
    first = resolved(Path("runs") / command if default is None else default)
    for number in itertools.count(1):
        place = first if number == 1 else first.with_name(f"{first.name}-{number}")
        # a link that leads nowhere does not exist, and still takes the name
        if not place.exists() and not place.is_symlink() and _won(place, command):
            return place
    raise AssertionError("unreachable")


def owned_directory(out: Path, command: str) -> Path:
    """A directory that is renewed in place: new, empty, or left by the same command.

    Returns:
        The resolved path.

    Raises:
        InputError: it holds something else, or cannot be written.
    """
    out = check_owned(out, command)
    if not _won(out, command) and command_of(out) != command:
        raise _not_written_by(out, command)
    return out


def check_owned(out: Path, command: str) -> Path:
    """Refuses, before anything is computed, what `owned_directory` would refuse; writes nothing.

    Returns:
        The resolved path.
    """
    out = resolved(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a directory.")
    if out.is_dir() and any(out.iterdir()) and command_of(out) != command:
        raise _not_written_by(out, command)
    return out


def command_of(directory: Path) -> str | None:
    """The command that wrote a directory, or None where its config.json names none."""
    try:
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    command = config.get("command") if isinstance(config, dict) else None
    return command if isinstance(command, str) else None


def resolved(out: Path, called: str = "--out") -> Path:
    """The absolute path, links and ~ followed.

    Args:
        out: as typed.
        called: what of the command line it is, for the message.

    Raises:
        InputError: a link that leads to itself, or the home of nobody.
    """
    try:
        return out.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # Python before 3.13 raises RuntimeError for a loop
        reason = str((isinstance(error, OSError) and error.strerror) or error).rstrip(".")
        raise InputError(
            f"{called} {out} leads nowhere ({reason}); name another directory."
        ) from None


def _won(place: Path, command: str) -> bool:
    """Makes the directory and its config.json; False where another call made that file first."""
    config = (json.dumps({"command": command}, indent=2) + "\n").encode()
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / _CONFIG).open("xb").close()  # fails where the file is there: one caller wins
        # the empty file was the claim; now it says whose
        write_atomically(place / _CONFIG, config)
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(
            f"--out {place} cannot be written: {error.strerror or error}; choose another directory."
        ) from None
    return True


def _not_written_by(out: Path, command: str) -> InputError:
    return InputError(
        f"--out {out} holds files that `klrl {command}` did not write; choose a new or an empty"
        " directory."
    )
