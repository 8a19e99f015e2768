"""What a claim is, of an article or a paper, and how numbers judge it.

    printed error = max over examples |printed − truth|,
    corrected error = max |corrected − truth|                                                    (1)
    holds: the printed error vanishes.    Otherwise it must not, and the corrected error must.   (2)

A claim is a function of an example that gives one quantity several ways, decorated by its verdict:
`holds`, `corrected` or `false` of the article that makes it. Whether a formula that fails is
repaired (a missing factor, sign, sum or weight) or false (nothing that says the same thing is true)
is a judgement in words; that it fails, and that the corrected formula does not, is not. With the
quantity come broken twins, the formula that is right with one slip, which the same check must
refuse, and the sentence of what was seen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

from torch import Tensor

Verdict = Literal["holds", "holds with a correction", "false"]
Example = TypeVar("Example")
Other = TypeVar("Other")

TOLERANCE = 1e-10


@dataclass(frozen=True, kw_only=True)
class Formulas:
    """One quantity several ways, tensors of one shape.

    Attributes:
        truth: by another way than the formula, which nobody doubts.
        printed: by the formula as printed; NaN where that gives no number.
        corrected: by the corrected formula; None where it holds as printed.
        broken: what a slip is -> the formula that is right, with it.
        says: these formulas -> what is seen here, one sentence; asked of the first example only.
    """

    truth: Tensor
    printed: Tensor
    corrected: Tensor | None = None
    broken: Mapping[str, Tensor]
    says: Callable[["Formulas"], str]

    @property
    def right(self) -> Tensor:
        """What must be the truth: the corrected formula, or the printed one where that holds."""
        return self.printed if self.corrected is None else self.corrected


class Finding(NamedTuple):
    """What computing a claim gave.

    Attributes:
        printed_error: how far the printed formula is from the truth on the claim's examples, in
            `unit`; inf where it gives no number.
        corrected_error: the same of the corrected formula; of the printed one, where that holds.
        unit: of both errors.
        says: what was seen, one sentence with the computed numbers.
        twin_errors: the same error of each broken twin, by its slip.
    """

    printed_error: float
    corrected_error: float
    unit: str
    says: str
    twin_errors: Mapping[str, float]


class Check(NamedTuple):
    """A claim, what computing it gave, and why the numbers refuse its verdict: "" where they
    agree.
    """

    claim: "Claim[Any]"
    finding: Finding
    refusal: str

    @property
    def passed(self) -> bool:
        """Whether the verdict is what the numbers say."""
        return not self.refusal

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and texts."""
        claim, finding = self.claim, self.finding
        return {
            "name": claim.name,
            "article": claim.source,
            "section": claim.section,
            "printed": claim.printed,
            "corrected": claim.corrected,
            "verdict": claim.verdict,
            "tutorial": claim.tutorial,
            "tolerance": claim.tolerance,
            "printed_error": finding.printed_error,
            "corrected_error": finding.corrected_error,
            "unit": finding.unit,
            "says": finding.says,
            "passed": self.passed,
            "refusal": self.refusal,
        }


@dataclass(frozen=True)
class Claim(Generic[Example]):
    """One formula or claim in words, and a function that judges it.

    Attributes:
        name: stable; of its function, with dashes.
        source: the key of what claims it, an article's letter "A" … "E".
        section: where it stands there.
        printed: the formula as printed, or a claim in a few words; Markdown with $…$ mathematics.
        corrected: the same of the corrected formula; "" where it holds as printed.
        verdict: what the numbers must say.
        unit: of the errors.
        tutorial: the one that explains it.
        examples: what it is tried on, the course's own example first.
        tolerance: the error that counts as none; half a unit of the last digit where the article
            prints a rounded number.
        function: example -> the quantity several ways.
    """

    name: str
    source: str
    section: str
    printed: str
    corrected: str
    verdict: Verdict
    unit: str
    tutorial: str
    examples: Callable[[], Sequence[Example]]
    tolerance: float
    function: Callable[[Example], Formulas]

    def __call__(self, example: Example) -> Formulas:
        """The quantity several ways on an example."""
        return self.function(example)

    def check(self) -> Check:
        """Runs the claim and its broken twins, and holds its verdict against the numbers."""
        found = [self(example) for example in self.examples()]
        # the worst over all examples: a formula may hold on one of them by chance
        truths = [formulas.truth for formulas in found]
        finding = Finding(
            worst_error([formulas.printed for formulas in found], truths),
            worst_error([formulas.right for formulas in found], truths),
            self.unit,
            # the course's own example stands first
            found[0].says(found[0]),
            {
                slip: worst_error([formulas.broken[slip] for formulas in found], truths)
                for slip in found[0].broken
            },
        )
        return Check(self, finding, self.refusal(finding))

    def refusal(self, finding: Finding) -> str:
        """Why the numbers refuse the verdict, by (2), or the check itself; "" where they agree."""
        holds = finding.printed_error <= self.tolerance
        if self.verdict == "holds" and not holds:
            return f"declared to hold, but it is off by {finding.printed_error:.6g} {finding.unit}"
        if self.verdict != "holds" and holds:
            return f"declared {self.verdict!r}, but on these examples it holds as printed"
        if not finding.corrected_error <= self.tolerance:  # so, and NaN is refused too
            return f"the corrected formula is off by {finding.corrected_error:.6g} {finding.unit}"
        for slip, error in finding.twin_errors.items():
            if error <= self.tolerance:
                return f"its broken twin passes too: {slip}"
        return "" if finding.twin_errors else "it has no broken twin"


Decorator = Callable[[Callable[[Example], Formulas]], Claim[Example]]


@dataclass(frozen=True)
class ClaimsOf(Generic[Example]):
    """What the claims of one article share.

    Attributes:
        key: of the article, its letter.
        examples: what its claims are tried on, the course's own example first.
    """

    key: str
    examples: Callable[[], Sequence[Example]]

    @overload
    def at(self, section: str, unit: str, tutorial: str) -> "Passage[Example]": ...
    @overload
    def at(
        self, section: str, unit: str, tutorial: str, on: Callable[[], Sequence[Other]]
    ) -> "Passage[Other]": ...
    def at(
        self, section: str, unit: str, tutorial: str, on: Callable[[], Sequence[Any]] | None = None
    ) -> "Passage[Any]":
        """Where a claim stands, the unit of its errors, the tutorial that explains it, and what it
        is tried on, where that is something else.
        """
        return Passage(self.key, section, unit, tutorial, self.examples if on is None else on)


@dataclass(frozen=True)
class Passage(Generic[Example]):
    """A passage of an article; its methods make a function of an example a claim that stands there,
    printed and, where it fails, corrected.
    """

    source: str
    section: str
    unit: str
    tutorial: str
    examples: Callable[[], Sequence[Example]]

    def holds(self, printed: str) -> Decorator[Example]:
        """It holds as printed."""
        return self._claim("holds", printed, "")

    def corrected(self, printed: str, corrected: str) -> Decorator[Example]:
        """It holds once a factor, a sign, a sum or a weight is mended."""
        return self._claim("holds with a correction", printed, corrected)

    def false(
        self, printed: str, corrected: str, *, tolerance: float = TOLERANCE
    ) -> Decorator[Example]:
        """It is false, and `corrected` is what is true instead."""
        return self._claim("false", printed, corrected, tolerance)

    def _claim(
        self, verdict: Verdict, printed: str, corrected: str, tolerance: float = TOLERANCE
    ) -> Decorator[Example]:
        def make(function: Callable[[Example], Formulas]) -> Claim[Example]:
            return Claim(
                name=function.__name__.replace("_", "-"),
                source=self.source,
                section=self.section,
                printed=printed,
                corrected=corrected,
                verdict=verdict,
                unit=self.unit,
                tutorial=self.tutorial,
                examples=self.examples,
                tolerance=tolerance,
                function=function,
            )

        return make


def shown(error: float) -> str:
    """An error in a sentence: rounding, which differs from machine to machine, is 0."""
    return "0" if abs(error) <= TOLERANCE else f"{error:.4g}"


def worst_error(values: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """The largest |value − truth| over pairs of tensors of one shape; equal infinities are no
    error, a NaN is an infinite one.
    """
    return max(_error(value, truth) for value, truth in zip(values, truths, strict=True))


def _error(value: Tensor, truth: Tensor) -> float:
    if value.shape != truth.shape:
        raise AssertionError(
            f"a formula gave shape {list(value.shape)} where the truth has {list(truth.shape)}"
        )
    value, truth = value.detach(), truth.detach()
    return float(
        (value - truth)
        .abs()
        .where(value != truth, 0.0)  # inf − inf is NaN, and equal infinities are no error
        .nan_to_num(nan=math.inf, posinf=math.inf)
        .max()
    )
