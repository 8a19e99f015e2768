"""What an exercise is, and what is wrong with an answer to it."""

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-9
_TRIALS = 20  # random inputs on which an answer that is a function is tried
_ROUNDED = 1e-2  # this near, a number was probably rounded

Table = dict[Any, float]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that is recognised.

    Attributes:
        says: what the reader did, and what to do instead.
        value: computes what that gives; of the same arguments as the exercise's reference.
    """

    says: str
    value: Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One question.

    Attributes:
        name: "tNN.word".
        reference: computes the right answer; a number, a text, a dict, a sequence. For an exercise
            that asks for a function: that function.
        unit: of the numbers, "nats" or "reward units" or empty.
        mistakes: the wrong answers to recognise.
        hint: said where the mistake is not recognised.
        inputs: for a function: arguments from a random generator; None where the answer is a value.
    """

    name: str
    reference: Callable[..., Any]
    unit: str = ""
    mistakes: tuple[Mistake, ...] = ()
    hint: str = ""
    inputs: Callable[[random.Random], tuple[Any, ...]] | None = None


def judge(exercise: Exercise, answer: object) -> str | None:
    """What is wrong with an answer; None if it is right."""
    if exercise.inputs is None:
        if callable(answer) and not hasattr(answer, "tolist"):
            return "Your answer is a function; call it, and answer with what it returns."
        trials: list[tuple[Any, ...]] = [()]
        given = [answer]
    else:
        if not callable(answer):
            return f"This exercise asks for a function; your answer is {_describe(answer)}."
        trials = list(_inputs(exercise))
        given = []
        for arguments in trials:
            try:
                given.append(answer(*copy.deepcopy(arguments)))
            except Exception as error:  # whatever the reader's function raises is for the reader
                said = f"{type(error).__name__}: {error}".rstrip(": ")
                return _with_hint(
                    exercise, f"Your function raised {said}, called with {_arguments(arguments)}."
                )
            if given[-1] is None:
                return "Your function returned None; does it end with a return?"
    expected = [exercise.reference(*copy.deepcopy(arguments)) for arguments in trials]
    faults = [_fault(one, right) for one, right in zip(given, expected, strict=True)]
    if not any(faults):
        return None
    for mistake in exercise.mistakes:
        wrong = [mistake.value(*copy.deepcopy(arguments)) for arguments in trials]
        if all(_fault(one, other, 1e-6) is None for one, other in zip(given, wrong, strict=True)):
            return mistake.says
    for says, recognised in _COMMON:
        if all(
            recognised(_plain(one), right, exercise.unit)
            for one, right in zip(given, expected, strict=True)
        ):
            return says
    first = next(index for index, fault in enumerate(faults) if fault)
    called = f" (called with {_arguments(trials[first])})" if exercise.inputs else ""
    return _with_hint(exercise, f"{faults[first]}{called}.")


def _inputs(exercise: Exercise) -> Iterator[tuple[Any, ...]]:
    """The same random inputs at every call."""
    assert exercise.inputs is not None
    generator = random.Random(20)
    for _ in range(_TRIALS):
        yield exercise.inputs(generator)


# What is wrong with one value
# ---------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Tensors, arrays and numpy numbers as Python's own; word tuples as texts."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_key(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _key(key: Any) -> Any:
    return " ".join(map(str, key)) if isinstance(key, tuple) else key


def _fault(given: Any, expected: Any, tolerance: float = TOLERANCE) -> str | None:
    """What is wrong with a value, without telling the right one; None if it agrees."""
    given, expected = _plain(given), _plain(expected)
    if isinstance(given, list) and len(given) == 1 and not isinstance(expected, list | dict):
        given = given[0]
    if isinstance(expected, dict):
        return _dict_fault(given, expected, tolerance)
    if isinstance(expected, list):
        return _list_fault(given, expected, tolerance)
    if isinstance(expected, str):
        return (
            None
            if isinstance(given, str) and given.split() == expected.split()
            else f"Your answer is {_describe(given)}, which is not it"
        )
    return _number_fault(given, expected, tolerance)


def _dict_fault(given: Any, expected: Table, tolerance: float) -> str | None:
    if isinstance(given, list) and len(given) == len(
        expected
    ):  # values in the order of the sentences
        given = dict(zip(expected, given, strict=True))
    if not isinstance(given, dict):
        return (
            f"A dict with the keys {_names(expected)} is expected; your answer is"
            f" {_describe(given)}"
        )
    if missing := [key for key in expected if key not in given]:
        return f"There is no entry for {_names(missing)}"
    if extra := [key for key in given if key not in expected]:
        return f"There is an entry too many: {_names(extra)}"
    return _first_fault(
        (repr(key), given[key], expected[key])
        for key in expected
        if _fault(given[key], expected[key], tolerance)
    )


def _list_fault(given: Any, expected: list[Any], tolerance: float) -> str | None:
    given = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(given, list):
        return f"A sequence of {len(expected)} is expected; your answer is {_describe(given)}"
    if len(given) != len(expected):
        return f"A sequence of {len(expected)} is expected; your answer has {len(given)}"
    pairs = enumerate(zip(given, expected, strict=True))
    return _first_fault(
        (f"[{index}]", one, right) for index, (one, right) in pairs if _fault(one, right, tolerance)
    )


def _first_fault(faults: Iterator[tuple[str, Any, Any]]) -> str | None:
    found = list(faults)
    if not found:
        return None
    where, given, right = found[0]
    more = f" ({len(found)} entries are off)" if len(found) > 1 else ""
    return f"At {where}: {_fault(given, right)}{more}"


def _number_fault(given: Any, expected: float, tolerance: float) -> str | None:
    if isinstance(given, bool) or not isinstance(given, int | float):
        return f"A number is expected; your answer is {_describe(given)}"
    if math.isnan(given):
        return "Your answer is nan: somewhere 0 · log 0 or inf − inf was computed"
    if given == expected:
        return None
    if math.isinf(expected):
        return f"{given:.12g} is not it: the answer is infinite"
    if abs(given - expected) <= tolerance * max(1.0, abs(expected)):
        return None
    size = "too large" if given > expected else "too small"
    if abs(given - expected) <= _ROUNDED * abs(expected):
        return (
            f"{given:.12g} is close but {size}: agreement to 1e-9 is asked, so let Python compute"
            " the number instead of typing it rounded"
        )
    return f"{given:.12g} is {size}"


def _is_negative(given: Any, expected: Any, unit: str) -> bool:
    return (
        _is_number(given)
        and _is_number(expected)
        and expected != 0
        and _number_fault(-given, expected, 1e-6) is None
    )


def _is_in_bits(given: Any, expected: Any, unit: str) -> bool:
    if not (unit == "nats" and _is_number(given) and _is_number(expected)):
        return False
    return expected != 0 and _number_fault(given * math.log(2), expected, 1e-6) is None


def _is_unnormalised(given: Any, expected: Any, unit: str) -> bool:
    """The right proportions of a distribution, and another sum."""
    if not (
        isinstance(given, dict)
        and isinstance(expected, dict)
        and set(given) == set(expected)
        and all(map(_is_number, given.values()))
    ):
        return False
    total = math.fsum(given.values())
    if abs(math.fsum(expected.values()) - 1) > TOLERANCE or not 0 < total < math.inf:
        return False
    return _fault({key: value / total for key, value in given.items()}, expected, 1e-6) is None


_COMMON: tuple[tuple[str, Callable[[Any, Any, str], bool]], ...] = (
    ("The size is right and the sign is wrong.", _is_negative),
    ("That is in bits; nats are asked: use the natural logarithm.", _is_in_bits),
    (
        "The proportions are right, but the probabilities do not sum to 1: divide by their sum.",
        _is_unnormalised,
    ),
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _describe(value: Any) -> str:
    if callable(value) and not hasattr(value, "tolist"):
        return "a function"
    value = _plain(value)
    return (
        f"{value:.12g}"
        if isinstance(value, float)
        else f"{value!r:.60}"
        if isinstance(value, str | int)
        else f"a {type(value).__name__}"
    )


def _names(keys: Any) -> str:
    return ", ".join(repr(key) for key in keys)


def _arguments(arguments: tuple[Any, ...]) -> str:
    def short(value: Any) -> str:
        return (
            "{" + ", ".join(f"{key!r}: {short(item)}" for key, item in value.items()) + "}"
            if isinstance(value, dict)
            else f"{value:.3g}"
        )

    return ", ".join(map(short, arguments))


def _with_hint(exercise: Exercise, fault: str) -> str:
    return f"{fault} Hint: {exercise.hint}" if exercise.hint else fault
