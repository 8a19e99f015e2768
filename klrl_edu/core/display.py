"""How results look as text and in notebooks: one plain table, one number format."""

import html
import unicodedata
from collections.abc import Sequence

Cell = str | int | float | None


def format_number(value: Cell, digits: int = 6) -> str:
    """A number with `digits` significant digits, text as it is, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return str(value)
    return f"{value:.{digits}g}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 6) -> str:
    """A table in plain text: text to the left, numbers to the right."""
    cells = [list(header), *([format_number(cell, digits) for cell in row] for row in rows)]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(header))]
    numeric = [
        all(not isinstance(row[column], str) for row in rows) for column in range(len(header))
    ]
    lines = [
        "  ".join(
            _pad(cell, width, right)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def html_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 6) -> str:
    """The same table for a notebook; every cell is escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(format_number(cell, digits))}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _pad(cell: str, width: int, right: bool) -> str:
    blank = " " * (width - _width(cell))
    return blank + cell if right else cell + blank


def _width(cell: str) -> int:
    """Columns on a terminal: wide East Asian characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in cell
    )
