"""Copies of the tutorials for students: the same scripts without their solutions, as .py and as
notebooks.

python -m klrl_edu.site.student OUT
"""

import sys
from pathlib import Path
from typing import Any

from klrl_edu.core.errors import InputError, KlrlError
from klrl_edu.evaluation.records import write_atomically

SOLUTION_TAG = "solution"


def tutorials_folder() -> Path:
    """Where the tutorials lie: beside the package in a checkout, inside it in an installed wheel.

    Raises:
        InputError: in neither place.
    """
    package = Path(__file__).parents[1]
    for folder in (package.parent / "tutorials", package / "tutorials"):
        if any(folder.glob("t[0-9][0-9]_*.py")):
            return folder
    raise InputError(
        f"no tutorials (tNN_*.py) lie beside or in {package}; run this in a checkout of klrl_edu."
    )


def write_student_copies(source: Path, out: Path) -> list[Path]:
    """Writes every tutorial of a folder without its solution cells, as .py and as .ipynb.

    Args:
        source: a folder with tNN_*.py, jupytext percent scripts whose solution cells carry the tag
            `solution`.
        out: made if it is missing. A file there that differs may hold a student's answers, and is
            never overwritten.

    Returns:
        The written files, .py and .ipynb of each tutorial in order.

    Raises:
        InputError: jupytext is not installed; no tutorial in `source`; a file in `out` would be
            overwritten.
    """
    try:
        import jupytext
    except ImportError:
        raise InputError(
            "student copies need jupytext; install it: pip install 'klrl_edu[docs]', or pip install"
            " jupytext."
        ) from None
    tutorials = sorted(source.glob("t[0-9][0-9]_*.py"))
    if not tutorials:
        raise InputError(f"{source} holds no tutorial tNN_*.py.")
    copies: dict[Path, bytes] = {}
    for path in tutorials:
        notebook = without_solutions(jupytext.read(path), path.stem)
        copies[out / path.name] = jupytext.writes(notebook, fmt="py:percent").encode()
        copies[out / f"{path.stem}.ipynb"] = jupytext.writes(notebook, fmt="ipynb").encode()
    for path, text in copies.items():  # all of them before the first is written
        if path.exists() and path.read_bytes() != text:
            raise InputError(
                f"{path} is already there and differs; it may hold answers. Choose another"
                " folder, or move it away."
            )
    out.mkdir(parents=True, exist_ok=True)
    for path, text in copies.items():
        write_atomically(path, text)
    return list(copies)


def without_solutions(notebook: Any, stem: str) -> Any:
    """The notebook without the cells tagged `solution`; cells get ids that are the same at every
    call.
    """
    kept = [cell for cell in notebook.cells if SOLUTION_TAG not in cell.metadata.get("tags", [])]
    notebook.cells = kept
    for number, cell in enumerate(kept):
        cell["id"] = f"{stem[:40]}-{number:02d}"  # an id has at most 64 characters
    return notebook


def main(arguments: list[str]) -> int:
    """Writes the copies of all tutorials to OUT; returns an exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m klrl_edu.site.student OUT", file=sys.stderr)
        return 2
    try:
        paths = write_student_copies(tutorials_folder(), Path(arguments[0]))
    except KlrlError as error:
        print(f"student: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"student: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    print(f"wrote {len(paths)} files to {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
