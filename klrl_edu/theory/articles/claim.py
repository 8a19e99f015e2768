"""What a claim of an article is, and how numbers judge it.

    printed error = max over examples |printed − truth|,
    corrected error = max |corrected − truth|                                                    (1)
    holds: the printed error vanishes.    Otherwise it must not, and the corrected error must.   (2)

Whether a formula that fails is repaired (a missing factor, sign, sum or weight) or false (nothing
that says the same thing is true) is a judgement in words; that it fails, and that the corrected
formula does not, is not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

Verdict = Literal["holds", "holds with a correction", "false"]
Example = TypeVar("Example")
Formula = Callable[[Example], Tensor]

TOLERANCE = 1e-10


class Finding(NamedTuple):
    """What computing a claim gave.

    Attributes:
        printed_error: how far the printed formula is from the truth on the claim's examples, in
            `unit`; inf where it gives no number.
        corrected_error: the same of the corrected formula; of the printed one, where that holds.
        unit: of both errors.
        says: what was seen, one sentence with the computed numbers.
    """

    printed_error: float
    corrected_error: float
    unit: str
    says: str


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
        about = (
            "name",
            "article",
            "section",
            "printed",
            "corrected",
            "verdict",
            "tutorial",
            "tolerance",
        )
        described = {name: getattr(self.claim, name) for name in about}
        return {
            **described,
            **self.finding._asdict(),
            "passed": self.passed,
            "refusal": self.refusal,
        }


@dataclass(frozen=True)
class Claim(Generic[Example]):
    """One formula or claim in words, and three programs: what it says, what the correction says,
    and the truth by another way.

    Attributes:
        name: stable; the article's letter, then a–z and dashes.
        article: "A" … "E".
        section: where it stands there.
        printed: the formula as printed, or a claim in a few words; Markdown with $…$ mathematics.
        corrected: the same of the corrected formula; "" where it holds as printed.
        verdict: what the numbers must say.
        tutorial: the one that explains it.
        unit: of the errors.
        examples: what it is tried on, the course's own example first.
        truth: example -> the quantity that the formula is for, of any shape.
        asserted: example -> the same by the printed formula; NaN where that gives no number.
        repaired: example -> the same by the corrected formula; None where it holds as printed.
        says: the sentence of the finding.
        tolerance: the error that counts as none; half a unit of the last digit where the article
            prints a rounded number.
    """

    name: str
    article: str
    section: str
    printed: str
    corrected: str
    verdict: Verdict
    tutorial: str
    unit: str
    examples: Callable[[], Sequence[Example]]
    truth: Formula[Example]
    asserted: Formula[Example]
    repaired: Formula[Example] | None
    says: Callable[[], str]
    tolerance: float = TOLERANCE

    def run(self) -> Finding:
        """Both errors, by (1)."""
        examples = self.examples()
        truths = [self.truth(example) for example in examples]
        printed = worst_error([self.asserted(example) for example in examples], truths)
        repaired = self.repaired
        corrected = (
            printed
            if repaired is None
            else worst_error([repaired(example) for example in examples], truths)
        )
        return Finding(printed, corrected, self.unit, self.says())

    def check(self) -> Check:
        """Runs the claim, and holds its verdict against the numbers."""
        finding = self.run()
        return Check(self, finding, self.refusal(finding))

    def refusal(self, finding: Finding) -> str:
        """Why the numbers refuse the declared verdict, by (2); "" where they agree."""
        holds = finding.printed_error <= self.tolerance
        if self.verdict == "holds":
            return (
                ""
                if holds
                else (
                    f"declared to hold, but it is off by {finding.printed_error:.6g} {finding.unit}"
                )
            )
        if holds:
            return f"declared {self.verdict!r}, but on these examples it holds as printed"
        if not finding.corrected_error <= self.tolerance:
            return f"the corrected formula is off by {finding.corrected_error:.6g} {finding.unit}"
        return ""


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
