"""How results look as text and in notebooks: one plain table, one number format."""

import html
import math
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


def readable_count(count: int) -> str:
    """An exact count, shortened to a power of ten where it would fill the line."""
    if count < 10**15:
        return f"{count:,}"
    if count.bit_length() < 4096:
        return f"about 10^{len(str(count)) - 1}"
    # Python writes out no number of more than 4,300 digits
    return f"about 10^{int((count.bit_length() - 1) * math.log10(2))}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 6) -> str:
    """A table in plain text: text to the left, numbers to the right."""
    columns = range(len(header))
    cells = [list(header), *([format_number(cell, digits) for cell in row] for row in rows)]
    widths = [max(_width(row[column]) for row in cells) for column in columns]
    numeric = [all(not isinstance(row[column], str) for row in rows) for column in columns]
    lines = []
    for row in cells:
        padded = [_pad(row[column], widths[column], numeric[column]) for column in columns]
        lines.append("  ".join(padded).rstrip())
    rule = "  ".join("─" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def html_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 6) -> str:
    """The same table for a notebook; every cell is escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html.escape(format_number(cell, digits))}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _pad(cell: str, width: int, right: bool) -> str:
    blank = " " * (width - _width(cell))
    return blank + cell if right else cell + blank


def _width(cell: str) -> int:
    """Columns on a terminal: wide East Asian characters take two, combining marks none."""
    columns = 0
    for character in cell:
        if not unicodedata.combining(character):
            columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return columns
