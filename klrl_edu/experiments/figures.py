"""The registry of figures: number -> title, source, script and data, and how one is drawn.

A figure is one Python file that defines

    Config                  a frozen dataclass; its defaults are the published figure
    compute(config)         -> a dict of numbers, texts, lists and dicts: everything that the
    picture shows
    draw(data)              -> a matplotlib Figure

Its docstring opens with the title and holds a paragraph that starts with "Source:". The figures of
the package lie in figures/, named figNN_slug.py, each with its data (figures/data/figNN.json) and
its picture beside it; one's own may lie anywhere.

    python -m klrl_edu.experiments.figures [NN …]     redraws pictures and data of the package in
    place, and figures/README.md
"""

import ast
import dataclasses
import json
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from matplotlib.figure import Figure

from klrl_edu.core.errors import InputError, KlrlError
from klrl_edu.evaluation.records import jsonable, write_atomically
from klrl_edu.experiments import plots
from klrl_edu.experiments.directories import check_owned, owned_directory
from klrl_edu.experiments.loading import said
from klrl_edu.experiments.runner import write_json

_NAME = re.compile(r"fig(\d\d)_\w+\.py")
_PACKAGE = Path(__file__).resolve().parents[1]
_CONTRACT = ("Config", "compute", "draw")


@dataclass(frozen=True)
class FigureEntry:
    """A figure of the registry, or one's own.

    Attributes:
        script: the file.
        title, source: from its docstring; the source is "" where it names none.
    """

    script: Path
    title: str
    source: str

    @property
    def number(self) -> str:
        """Two digits, or "" for a file that is not named figNN_slug.py."""
        match = _NAME.fullmatch(self.script.name)
        return match[1] if match else ""

    @property
    def data(self) -> Path:
        """Where the registry keeps its data."""
        return self.script.parent / "data" / f"fig{self.number}.json"


@dataclass(frozen=True)
class DrawnFigure:
    """What a figure's file made: its config, its data, the picture, and the seconds that `compute`
    took.
    """

    config: Any
    data: dict[str, Any]
    picture: Figure
    seconds: float


def figures_folder() -> Path:
    """figures/ inside the installed package, or beside it in a checkout.

    Raises:
        InputError: in neither place.
    """
    places = (_PACKAGE / "figures", _PACKAGE.parent / "figures")
    for place in places:
        if any(_NAME.fullmatch(path.name) for path in place.glob("fig*.py")):
            return place
    raise InputError(f"no figures are in {places[0]} or {places[1]}; install the package again.")


def find_figures() -> list[FigureEntry]:
    """The figures of the package in the order of their numbers; their files are read, not run."""
    return [
        read_entry(path)
        for path in sorted(figures_folder().glob("fig*.py"))
        if _NAME.fullmatch(path.name)
    ]


def find_figure(name: str) -> FigureEntry:
    """A figure by its number ("01" or "1") or by the path of one's own file.

    Raises:
        InputError: no such figure or file, or a file that Python cannot read.
    """
    if name.endswith(".py"):
        return read_entry(Path(name))
    known = {entry.number: entry for entry in find_figures()}
    if name.isdecimal() and name.zfill(2) in known:
        return known[name.zfill(2)]
    raise InputError(
        f"figure {name!r} is not known; choose from {', '.join(known)}, or give the path of a .py"
        " file with Config, compute and draw."
    )


def read_entry(script: Path) -> FigureEntry:
    """Title and source from a file's docstring, without running it.

    Raises:
        InputError: it cannot be read, or is not Python.
    """
    documentation = (ast.get_docstring(_parse(script)) or script.stem).strip()
    paragraphs = [" ".join(text.split()) for text in documentation.split("\n\n")]
    named = [text for text in paragraphs if text.startswith("Source:")]
    source = named[0].removeprefix("Source:").strip() if named else ""
    return FigureEntry(script, paragraphs[0], source)


def _parse(script: Path) -> ast.Module:
    try:
        return ast.parse(script.read_bytes(), str(script))
    except OSError as error:
        raise InputError(f"cannot read {script}: {error.strerror or error}.") from None
    except (SyntaxError, ValueError) as error:
        line = f" line {error.lineno}:" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise InputError(f"{script} is not Python:{line} {reason}.") from None


def load_module(script: Path) -> ModuleType:
    """Runs a figure's file and checks what it defines; leaves no byte code behind.

    Raises:
        InputError: it cannot be read or run, or lacks Config, compute or draw.
    """
    code = compile(_parse(script), str(script), "exec")
    module = ModuleType(f"klrl_figure_{script.stem}")
    module.__file__ = str(script)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    _guarded(script, "running it", lambda: exec(code, module.__dict__))
    missing = [name for name in _CONTRACT if not callable(getattr(module, name, None))]
    if missing:
        raise InputError(
            f"{script} defines no {', '.join(missing)}; a figure's file has Config (a dataclass),"
            " compute(config) and draw(data)."
        )
    if not (isinstance(module.Config, type) and dataclasses.is_dataclass(module.Config)):
        raise InputError(
            f"{script}: Config is not a dataclass; write @dataclass(frozen=True) above it."
        )
    return module


def make_figure(script: Path) -> DrawnFigure:
    """Loads a figure's file, computes its data from the default Config, and draws it in the
    publication style.

    Raises:
        InputError: the file breaks the contract or fails; the message has the line.
    """
    module = load_module(script)
    config = _guarded(script, "Config()", module.Config)
    started = time.perf_counter()
    data = _guarded(script, "compute(Config())", lambda: module.compute(config))
    seconds = time.perf_counter() - started
    if not isinstance(data, dict):
        raise InputError(
            f"{script}: compute returned a {type(data).__name__}; return a dict of numbers, texts,"
            " lists and dicts."
        )
    _check_jsonable(data, f"{script}: compute returned what")
    _check_jsonable(dataclasses.asdict(config), f"{script}: Config holds what")
    with plots.publication_style():
        picture = _guarded(script, "draw(data)", lambda: module.draw(data))
    if not isinstance(picture, Figure):
        raise InputError(
            f"{script}: draw returned a {type(picture).__name__}; return the matplotlib Figure"
            " (ax.figure of an Axes)."
        )
    return DrawnFigure(config, data, picture, seconds)


def _check_jsonable(data: dict[str, Any], what: str) -> None:
    try:
        data_bytes(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{what} JSON cannot hold ({error}); give plain numbers and lists, e.g. by .tolist()."
        ) from None


def _guarded(script: Path, what: str, call: Callable[[], Any]) -> Any:
    """Calls into a figure's file; a failure there is one line with its place."""
    try:
        return call()
    except KlrlError as error:
        raise InputError(f"{script}: {what}: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anything can go wrong in a user's file
        trace = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in trace if frame.filename == str(script)]
        place = f" at line {lines[-1]}" if lines else ""
        raise InputError(f"{script}: {what} failed{place}: {said(error)}; fix the file.") from error


def data_bytes(data: dict[str, Any]) -> bytes:
    """Strict JSON, one line a key; infinities as the strings "inf" and "-inf"."""
    # a changed number then shows as one changed line
    lines = (
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in jsonable(data).items()
    )
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def save_made_figure(entry: FigureEntry, made: DrawnFigure, out: Path) -> Path:
    """Writes data.json, result.json and the picture (.png, .pdf, named as the script) into a folder
    that this figure owns.

    Returns:
        The folder.

    Raises:
        InputError: `out` holds something else or cannot be written.
    """
    directory = owned_directory(out, _owner(entry))
    write_atomically(directory / "data.json", data_bytes(made.data))
    with plots.publication_style():
        try:
            plots.save_figure(made.picture, directory / entry.script.stem)
        except OSError:
            raise
        except Exception as error:  # drawn now for the first time: a broken formula, say
            raise InputError(
                f"{entry.script}: its picture cannot be drawn: {said(error)}; fix draw(data)."
            ) from None
    result = {
        "command": "figure",
        "number": entry.number,
        "title": entry.title,
        "source": entry.source,
        "script": entry.script.name,
        "config": dataclasses.asdict(made.config),
        "seconds": made.seconds,
        "data": made.data,
    }
    write_json(directory / "result.json", result)
    return directory


def check_out(entry: FigureEntry, out: Path) -> None:
    """Refuses a folder that holds something else, before anything is computed."""
    check_owned(out, _owner(entry))


def _owner(entry: FigureEntry) -> str:
    # each figure by itself, so that none is written over another
    return f"figure {entry.number or entry.script.stem}"


def registry_text(width: int = 100) -> str:
    """Every figure for a terminal: number, title and, below it, the source, within `width`
    columns.
    """
    indent, lines = " " * 4, []
    for entry in find_figures():
        for text, first in ((entry.title, f"{entry.number}  "), (entry.source, indent)):
            lines += textwrap.wrap(text, width, initial_indent=first, subsequent_indent=indent)
    return "\n".join([*lines, "", "klrl figure 01 draws one; klrl figure file.py one of your own"])


def registry_table() -> str:
    """figures/README.md: every figure with its source, script, data and picture."""
    rows = [
        f"| {e.number} | {e.title} | {e.source} | [{e.script.name}]({e.script.name}) |"
        f" [{e.data.name}](data/{e.data.name}) | [png]({e.script.stem}.png)"
        f" [pdf]({e.script.stem}.pdf) |\n"
        for e in find_figures()
    ]
    return (
        "# Figures\n\nOne file a figure: `Config`, `compute(config)` → data, `draw(data)` →"
        " picture. `klrl figure 01` computes and draws one again,\n`klrl figure path.py` one of"
        " your own. `python -m klrl_edu.experiments.figures` renews everything here, this table"
        " included.\n\n| fig | title | source | script | data | picture"
        " |\n|---|---|---|---|---|---|\n" + "".join(rows)
    )


def redraw(numbers: list[str]) -> None:
    """Renews data and pictures of the package's figures (all by default) in place, and the
    table.
    """
    for entry in [find_figure(number) for number in numbers] or find_figures():
        made = make_figure(entry.script)
        entry.data.parent.mkdir(exist_ok=True)
        write_atomically(entry.data, data_bytes(made.data))
        with plots.publication_style():
            plots.save_figure(made.picture, entry.script.with_suffix(""))
        print(f"{entry.number}  {made.seconds:6.1f} s  {entry.title}", flush=True)
    write_atomically(figures_folder() / "README.md", registry_table().encode())


def main(numbers: list[str]) -> int:
    """Renews the figures of the given numbers, or all; returns the exit code."""
    # as the command line does: sums of floats then have one order
    torch.set_num_threads(1)
    try:
        redraw(numbers)
    except KlrlError as error:
        print(f"klrl: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
