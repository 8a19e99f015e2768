"""Tables that people bring: CSV with the header `sentence,prob,reward`, or JSON.

The fields of a CSV are parted by commas, semicolons or tabs, as its header is; with the last two
numbers may have a decimal comma, as spreadsheets write them in much of Europe.
JSON is {"sentences": [{"sentence": "the cat", "prob": 0.4, "reward": 1}, …], "separator": " "} or
the bare list; a separator in the file goes before the argument.
Texts are NFC-normalised UTF-8 (a BOM is fine). Every refusal names file, row, value and remedy.
"""

import csv
import io
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import check_probabilities
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward

COLUMNS = ("sentence", "prob", "reward")
_MAX_BYTES = 2**28  # millions of rows, more than can be enumerated
_DELIMITERS = (",", ";", "\t")
# 1,250: one and a quarter in Paris, more than a thousand in London
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")


class TableRow(NamedTuple):
    """One line of a table, and where it stands in the file."""

    sentence: str
    prob: float
    reward: float
    place: str


def load_table(
    path: str | Path, kl_coef: float, *, separator: str = " ", normalize: bool = False
) -> Problem:
    """A user's file -> Problem with a SequenceTable prior and a table reward.

    Args:
        path: a .csv or .json file.
        kl_coef: λ ≥ 0.
        separator: between words, unless a JSON file states its own; "" spells sentences as
            characters.
        normalize: accept weights instead of probabilities.

    Raises:
        InputError: anything wrong with the file, named by row.
    """
    path = Path(path)
    text = _read(path)
    if path.suffix.lower() == ".json":
        rows, separator = _json_rows(text, path, separator)
    else:
        rows = _csv_rows(text, path)
    if not rows:
        raise InputError(
            f"{path}: the table has no rows; give at least one line of sentence,prob,reward."
        )
    # before the sum of the probabilities, which a doubled line spoils
    _refuse_duplicates(rows, path, separator)
    sentences = [row.sentence for row in rows]
    try:
        probs = check_probabilities([row.prob for row in rows], "prob", normalize=normalize)
        space = SequenceSpace.from_texts(sentences, separator=separator)
    except InputError as error:
        raise InputError(
            # the remedy as the command line and as Python spell it
            f"{path}: {error}".replace("Pass normalize=True", "Pass --normalize (normalize=True)")
        ) from None
    prior = SequenceTable(space, space.encode(sentences), torch.log(probs))
    for row, prob in zip(rows, probs.tolist(), strict=True):
        # where the prior has no mass the reward is never looked up, whatever it is
        if prob > 0 and (math.isnan(row.reward) or row.reward == math.inf):
            raise InputError(
                f"{path}, {row.place}: reward = {row.reward} of {row.sentence!r} is not allowed;"
                " give a number, or -inf to forbid it."
            )
    rewards = {row.sentence: row.reward for row in rows}
    return Problem(prior, table_reward(rewards, space), kl_coef)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)  # of a device there may be no end
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; give a CSV or JSON table."
        ) from None
    # before decoding, as NUL is sound UTF-8
    if b"\0" in raw:
        raise InputError(
            f"{path} is a binary file (it holds a NUL byte at {raw.index(0)}); save the table as"
            " UTF-8 text."
        )
    if len(raw) > _MAX_BYTES:
        raise InputError(f"{path} holds more than {_MAX_BYTES:,} bytes; give a smaller table.")
    try:
        # without the BOM, which would become a part of the header
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; save the table as UTF-8."
        ) from None


def _csv_rows(text: str, path: Path) -> list[TableRow]:
    delimiter = _delimiter(text)
    # newline="" leaves line breaks inside quotes to the reader
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; check the quotes.") from None
    if not lines:
        raise InputError(
            f"{path} is empty; write a header line 'sentence,prob,reward' and one line a sentence."
        )
    header = tuple(name.strip().lower() for name in lines[0][1])
    if header != COLUMNS:
        raise InputError(
            f"{path}: the header is {delimiter.join(lines[0][1])!r}; expected"
            " 'sentence,prob,reward', with commas, semicolons or tabs."
        )
    rows = []
    for number, line in lines[1:]:
        place = f"line {number}"
        if len(line) != len(COLUMNS):
            raise InputError(
                f"{path}, {place}: {len(line)} fields, expected 3 (sentence,prob,reward);"
                f" {_remedy(line, delimiter)}."
            )
        numbers = []
        for column, field in zip(COLUMNS[1:], line[1:], strict=True):
            written = _with_point(field, column, delimiter, path, place)
            numbers.append(_number(written, column, path, place))
        prob, reward = numbers
        rows.append(TableRow(_sentence(line[0], path, place), prob, reward, place))
    return rows


def _delimiter(text: str) -> str:
    """What parts the header into three fields; the comma where nothing does."""
    # the header alone, as a sentence may hold any of the three
    header = next((line for line in text.splitlines() if line.strip()), "")
    for delimiter in _DELIMITERS:
        if len(header.split(delimiter)) == len(COLUMNS):
            return delimiter
    return ","


def _remedy(line: list[str], delimiter: str) -> str:
    """What a line with too many or too few fields probably wants."""
    # a field of whole digits looks like the left half of 0,4
    if delimiter == "," and len(line) > len(COLUMNS) and line[1].strip().lstrip("+-").isdigit():
        return (
            "numbers with a decimal comma? Write them with a point, or part the fields by"
            " semicolons; and quote a sentence that contains a comma"
        )
    names = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
    return f"quote a sentence that contains {names[delimiter]}"


def _with_point(number: str, column: str, delimiter: str, path: Path, place: str) -> str:
    """A number with its decimal comma as a point, in a table whose fields commas do not part."""
    if delimiter == "," or number.count(",") == 0:
        return number
    if _THOUSANDS.fullmatch(number.strip()):
        raise InputError(
            f"{path}, {place}: {column} = {_short(number)} may be read in two ways; write it with a"
            " point, without marks between thousands."
        )
    return number.replace(",", ".")


def _json_rows(text: str, path: Path, separator: str) -> tuple[list[TableRow], str]:
    def refuse_constant(name: str) -> float:
        raise InputError(
            f'{path}: {name} is not JSON; give finite numbers (to forbid a sentence write "-inf" in'
            " quotes)."
        )

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # json itself keeps the last of two without a word
        keys = [key for key, _ in pairs]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise InputError(f"{path}: key {repeated!r} stands twice in one object; remove one.")
        return dict(pairs)

    try:
        data = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; this is not JSON."
        ) from None
    # raised by the two hooks above, and a ValueError too
    except InputError:
        raise
    except ValueError:  # Python refuses whole numbers of more than 4,300 digits
        raise InputError(
            f"{path}: a number is too long to read; write it like 0.25 or 1e300."
        ) from None
    except RecursionError:
        raise InputError(
            f"{path}: nested too deeply to be a table; give a list of {{sentence, prob, reward}}."
        ) from None
    entries, unknown = data, []
    if isinstance(data, dict):
        entries = data.get("sentences")
        separator = data.get("separator", separator)
        unknown = sorted(set(data) - {"sentences", "separator"})
    if not isinstance(separator, str) or unknown:
        what = f"separator = {_short(separator)} is not text"
        if unknown:
            what = f"key {_short(unknown[0])} is not known"
        raise InputError(f'{path}: {what}; expected {{"sentences": [...], "separator": " "}}.')
    if not isinstance(entries, list):
        raise InputError(
            f'{path}: expected a list of {{"sentence", "prob", "reward"}} objects, or'
            ' {"sentences": [...]}.'
        )
    rows = []
    for index, entry in enumerate(entries):
        place = f"entry {index}"
        if not isinstance(entry, dict) or set(entry) != set(COLUMNS):
            raise InputError(
                f"{path}, {place}: expected an object with the keys sentence, prob, reward; got"
                f" {_short(entry)}."
            )
        prob = _number(entry["prob"], "prob", path, place)
        reward = _number(entry["reward"], "reward", path, place)
        rows.append(TableRow(_sentence(entry["sentence"], path, place), prob, reward, place))
    return rows, separator


def _sentence(value: object, path: Path, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{path}, {place}: sentence = {_short(value)} is not text; put it in quotes."
        )
    # an escape such as \ud800 in JSON makes one
    if any(0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise InputError(
            f"{path}, {place}: sentence holds a lone surrogate, which is not Unicode text;"
            " re-encode the file as UTF-8."
        )
    # é is one code point or two, and one text
    return unicodedata.normalize("NFC", value)


def _number(value: object, column: str, path: Path, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{path}, {place}: {column} = {_short(value)} is not a number.")
    # float() reads 1_000 as 1000, which spreadsheets and JSON do not
    if isinstance(value, str) and "_" in value:
        raise InputError(
            f"{path}, {place}: {column} = {_short(value)} is not a number; write it without"
            " underscores."
        )
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise InputError(
            f"{path}, {place}: {column} = {_short(value)} is not a number a float can hold; write"
            " it like 0.25."
        ) from None
    # 1e999 overflows to inf: only who writes the word means it
    if math.isinf(number) and not (isinstance(value, str) and "inf" in value.lower()):
        raise InputError(
            f"{path}, {place}: {column} = {value} is out of a float's range; give a finite number."
        )
    if column == "prob" and not 0 <= number < math.inf:
        raise InputError(
            f"{path}, {place}: prob = {_short(value)} is not allowed; probabilities are numbers"
            " from 0 to 1."
        )
    return number


def _refuse_duplicates(rows: list[TableRow], path: Path, separator: str) -> None:
    """Raises for a sentence that stands twice, blanks between its words apart."""
    seen: dict[str, str] = {}
    for row in rows:
        key = " ".join(row.sentence.split()) if separator == " " else row.sentence
        if key in seen:
            raise InputError(
                f"{path}, {row.place}: sentence {row.sentence!r} already stands at {seen[key]};"
                " remove one, or add their probabilities."
            )
        seen[key] = row.place


def _short(value: object) -> str:
    """A value as an error shows it: at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
