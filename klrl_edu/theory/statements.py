"""What a statement of the theory is, and how it is tried.

    left(case) = right(case)   or   left(case) ≤ right(case)
    on every case, within a tolerance                                                            (1)

Every statement comes with a broken twin, the same with one slip; a check that the twin passes would
be worth nothing.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from klrl_edu.theory.cases import Case

TOLERANCE = 1e-12
Sides = tuple[Tensor | float, Tensor | float]


Tried = TypeVar("Tried")
Given = TypeVar("Given")


class Twin(NamedTuple, Generic[Tried, Given]):
    """A statement or a formula with one slip: what the slip is, and case -> what it gives with it,
    a statement its two sides, a formula the quantity.
    """

    slip: str
    function: Callable[[Tried], Given]


@dataclass
class Statement:
    """An identity or a bound.

    Attributes:
        name: of its function.
        about: one line in words, the docstring of its function.
        latex: the statement.
        source: paper and equation, or how it follows.
        tutorial: that explains it.
        relation: "=" or "≤".
        tolerance: largest error relative to max(1, |right|).
        function: case -> (left, right), tensors of one shape.
        twin: the same with a slip.
    """

    name: str
    about: str
    latex: str
    source: str
    tutorial: str
    relation: Literal["=", "≤"]
    tolerance: float
    function: Callable[[Case], Sides]
    twin: Twin[Case, Sides] | None = None

    def broken(self, slip: str, function: Callable[[Case], Sides]) -> None:
        """Registers the broken twin.

        What it draws from the case are the numbers that the statement draws, and so are those of
        `sides`: nothing but its slip makes it fail.
        """
        self.twin = Twin(slip, function)

    def sides(self, case: Case) -> Sides:
        """Left and right on a case."""
        with _noise_of(self, case):
            return self.function(case)

    def twin_sides(self, case: Case) -> Sides:
        """Left and right of the broken twin."""
        assert self.twin is not None, f"{self.name} has no broken twin"
        with _noise_of(self, case):
            return self.twin.function(case)


@contextmanager
def _noise_of(statement: Statement, case: Case) -> Iterator[None]:
    """The case's noise as this statement sees it, from its start; after it the noise goes on where
    it was, so that neither what was tried before nor the order within a twin changes a number.
    """
    # a statement draws the same numbers whichever ran before it, and under whatever seed of its own
    before = case.noise.getstate()
    case.noise.seed(f"{case.key}/{statement.name}")
    try:
        yield
    finally:
        case.noise.setstate(before)


def identity(
    latex: str, source: str, tutorial: str, tolerance: float = TOLERANCE
) -> Callable[[Callable[[Case], Sides]], Statement]:
    """Makes `case -> (left, right)` a statement left = right; its docstring says it in words."""
    return _statement(latex, source, tutorial, "=", tolerance)


def bound(
    latex: str, source: str, tutorial: str, tolerance: float = TOLERANCE
) -> Callable[[Callable[[Case], Sides]], Statement]:
    """Makes `case -> (left, right)` a statement left ≤ right."""
    return _statement(latex, source, tutorial, "≤", tolerance)


def _statement(
    latex: str, source: str, tutorial: str, relation: Literal["=", "≤"], tolerance: float
) -> Callable[[Callable[[Case], Sides]], Statement]:
    def make(sides: Callable[[Case], Sides]) -> Statement:
        return Statement(
            sides.__name__,
            " ".join((sides.__doc__ or "").split()),
            latex,
            source,
            tutorial,
            relation,
            tolerance,
            sides,
        )

    return make


class Trial(NamedTuple):
    """What trying a statement on some cases gave.

    Attributes:
        examples: cases tried.
        error: the largest error; NaN and inf count as inf.
        worst: the index of the case that has it.
    """

    examples: int
    error: float
    worst: int


def error(relation: str, left: Tensor | float, right: Tensor | float) -> float:
    """max |left − right| / max(1, |right|) for "=", max (left − right)₊ / max(1, |right|) for "≤";
    inf where either is not a number.
    """
    left, right = (
        torch.as_tensor(left, dtype=torch.float64),
        torch.as_tensor(right, dtype=torch.float64),
    )
    # broadcasting would compare what does not belong together
    if left.shape != right.shape:
        raise AssertionError(
            f"a statement's sides have shapes {list(left.shape)} and {list(right.shape)}"
        )
    excess = (left - right).abs() if relation == "=" else (left - right).clamp(min=0)
    # relative to the largest entry of the right side: small ones are sums of large ones
    found = float(excess.max() / right.abs().max().clamp(min=1))
    return found if math.isfinite(found) else math.inf


def try_statement(statement: Statement, cases: Iterable[Case]) -> Trial:
    """The largest error of a statement over cases."""
    errors = [error(statement.relation, *statement.sides(case)) for case in cases]
    worst = max(range(len(errors)), key=lambda index: errors[index])
    return Trial(len(errors), errors[worst], worst)


def twin_is_caught(statement: Statement, cases: Iterable[Case]) -> bool:
    """Whether the broken twin fails on one of the cases; the first that does ends the search."""
    return any(
        error(statement.relation, *statement.twin_sides(case)) > statement.tolerance
        for case in cases
    )
