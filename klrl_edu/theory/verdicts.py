"""What a claim is, of an article or a paper, and how numbers judge it.

    printed error = max over examples |printed − truth|,
    corrected error = max |corrected − truth|                                                    (1)
    holds: the printed error vanishes.    Otherwise it must not, and the corrected error must.   (2)

A claim is a function of an example that gives one quantity three ways, decorated by its verdict:
`@holds`, `@corrected` or `@false`. Whether a formula that fails is repaired (a missing factor,
sign, sum or weight) or false (nothing that says the same thing is true) is a judgement in words;
that it fails, and that the corrected formula does not, is not. Beside it stand the sentence of what
was seen (`.says`) and a broken twin (`.broken`): the formula that is right with one slip, which the
same check must refuse.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

from klrl_edu.theory.statements import Twin

Verdict = Literal["holds", "holds with a correction", "false"]
Example = TypeVar("Example")

TOLERANCE = 1e-10


class Formulas(NamedTuple):
    """One quantity three ways, tensors of one shape.

    Attributes:
        truth: by another way than the formula, which nobody doubts.
        printed: by the formula as printed; NaN where that gives no number.
        corrected: by the corrected formula; None where it holds as printed.
    """

    truth: Tensor
    printed: Tensor
    corrected: Tensor | None = None

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
        twin_error: the same error of the broken twin.
    """

    printed_error: float
    corrected_error: float
    unit: str
    says: str
    twin_error: float


class Check(NamedTuple):
    """A claim, what computing it gave, and why the numbers refuse its verdict: "" where
    they agree.
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


@dataclass
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
        function: example -> the quantity three ways.
        sentence: the first example and what it gave -> what was seen.
        twin: the formula that is right, with a slip.
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
    sentence: Callable[[Example, Formulas], str] | None = None
    twin: Twin[Example, Tensor] | None = None

    def __call__(self, example: Example) -> Formulas:
        """The quantity three ways on an example."""
        return self.function(example)

    def says(self, sentence: Callable[[Example, Formulas], str]) -> None:
        """Registers the sentence of what is seen on the first example."""
        self.sentence = sentence

    def broken(self, slip: str, function: Callable[[Example], Tensor]) -> None:
        """Registers the broken twin."""
        self.twin = Twin(slip, function)

    def check(self) -> Check:
        """Runs the claim and its broken twin, and holds its verdict against the numbers."""
        assert self.sentence is not None, f"{self.name} does not say what was seen"
        assert self.twin is not None, f"{self.name} has no broken twin"
        examples = self.examples()
        found = [self(example) for example in examples]
        truths = [formulas.truth for formulas in found]
        finding = Finding(
            worst_error([formulas.printed for formulas in found], truths),
            worst_error([formulas.right for formulas in found], truths),
            self.unit,
            self.sentence(examples[0], found[0]),
            worst_error([self.twin.function(example) for example in examples], truths),
        )
        return Check(self, finding, self.refusal(finding))

    def refusal(self, finding: Finding) -> str:
        """Why the numbers refuse the verdict, by (2), or the check itself; "" where they agree."""
        holds = finding.printed_error <= self.tolerance
        if self.verdict == "holds" and not holds:
            return f"declared to hold, but it is off by {finding.printed_error:.6g} {finding.unit}"
        if self.verdict != "holds" and holds:
            return f"declared {self.verdict!r}, but on these examples it holds as printed"
        if not finding.corrected_error <= self.tolerance:
            return f"the corrected formula is off by {finding.corrected_error:.6g} {finding.unit}"
        if finding.twin_error <= self.tolerance:
            slip = self.twin.slip if self.twin else ""
            return f"its broken twin passes too: {slip}"
        return ""


Decorator = Callable[[Callable[[Example], Formulas]], Claim[Example]]


def holds(
    source: str,
    section: str,
    printed: str,
    unit: str,
    tutorial: str,
    examples: Callable[[], Sequence[Example]],
) -> Decorator[Example]:
    """Makes `example -> (truth, printed)` a claim that holds as printed; see `Claim`."""
    return _claim(source, section, printed, "", "holds", unit, tutorial, examples, TOLERANCE)


def corrected(
    source: str,
    section: str,
    printed: str,
    correction: str,
    unit: str,
    tutorial: str,
    examples: Callable[[], Sequence[Example]],
) -> Decorator[Example]:
    """Makes `example -> (truth, printed, corrected)` a claim that holds with a correction."""
    verdict: Verdict = "holds with a correction"
    return _claim(
        source, section, printed, correction, verdict, unit, tutorial, examples, TOLERANCE
    )


def false(
    source: str,
    section: str,
    printed: str,
    correction: str,
    unit: str,
    tutorial: str,
    examples: Callable[[], Sequence[Example]],
    *,
    tolerance: float = TOLERANCE,
) -> Decorator[Example]:
    """Makes `example -> (truth, printed, corrected)` a false claim, beside what is true instead."""
    return _claim(
        source, section, printed, correction, "false", unit, tutorial, examples, tolerance
    )


def _claim(
    source: str,
    section: str,
    printed: str,
    correction: str,
    verdict: Verdict,
    unit: str,
    tutorial: str,
    examples: Callable[[], Sequence[Example]],
    tolerance: float,
) -> Decorator[Example]:
    def make(function: Callable[[Example], Formulas]) -> Claim[Example]:
        return Claim(
            function.__name__.replace("_", "-"),
            source,
            section,
            printed,
            correction,
            verdict,
            unit,
            tutorial,
            examples,
            tolerance,
            function,
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
        .where(value != truth, 0.0)
        .nan_to_num(nan=math.inf, posinf=math.inf)
        .max()
    )
