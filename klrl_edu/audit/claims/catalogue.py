"""Every estimator and loss of the package, checked against what it claims on two small cases.

    error = ‖E[g] − claim‖ / ‖claim‖ ≤ 1e-12                                                     (1)

`klrl audit` without a target prints the check, and tutorials/estimators.md is made of it. A claim
of 0 is measured beside √Var g. Advantages are checked inside the losses that use them.
`evidence.reverse_importance_sampling` is not here: its samples have two laws, which no audit draws.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.audit.cases import AuditCase
from klrl_edu.audit.claims import gradients, values
from klrl_edu.audit.claims.entries import Entry
from klrl_edu.audit.report import AuditReport
from klrl_edu.core.display import Cell, text_table
from klrl_edu.exact.posterior import posterior
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward

TOLERANCE = 1e-12

SECTIONS: dict[str, tuple[Entry, ...]] = {
    "KL(π‖q) from samples": values.KL_VALUES,
    "Other divergences from the same samples": values.DIVERGENCES,
    "Means over tokens": values.AGGREGATES,
    "Evidence": values.EVIDENCE,
    "Gradients of KL": gradients.KL_GRADIENTS,
    "Gradients of KL from samples of μ": gradients.OFF_POLICY,
    "Policy gradients": gradients.POLICY_GRADIENTS,
    "Policy gradients from samples of μ": gradients.CLIPPED,
    "f-DPG": gradients.F_DPG,
}
CATALOGUE: tuple[Entry, ...] = tuple(entry for section in SECTIONS.values() for entry in section)


class CheckedEntry(NamedTuple):
    """An entry on a case: relative error of its claim, exact total variance of one estimate, and
    seconds.
    """

    entry: Entry
    case: str
    error: float
    variance: float
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the claim is met to 1e-12."""
        return self.error <= TOLERANCE

    def to_dict(self) -> dict[str, str | float | bool]:
        """Plain numbers and texts, for result.json."""
        said = {
            "name": self.entry.name,
            "kind": self.entry.kind,
            "formula": self.entry.formula,
            "mean": _said(self.entry),
            "case": self.case,
        }
        return {
            **said,
            "error": self.error,
            "variance": self.variance,
            "holds": self.holds,
            "seconds": self.seconds,
        }


def four_sentences_case() -> AuditCase:
    """The four sentences: two tokens each; π and q agree on the first, so that forward KL per token
    and per sequence have one gradient.
    """
    problem = four_sentences()
    behaviour = SequenceTable.from_texts(
        {"the cat": 0.25, "the dog": 0.3, "a cat": 0.35, "a dog": 0.1}, space=problem.space
    )
    return AuditCase("four sentences", four_sentences_policy(), problem, behaviour)


def answers_case() -> AuditCase:
    """Texts of none to two words that end in EOS, so that lengths differ, with ties in the reward;
    no two targets agree.
    """
    prior = SequenceTable.from_texts(
        {"": 0.1, "a": 0.3, "b": 0.2, "a a": 0.15, "a b": 0.15, "b a": 0.1}
    )
    policy = SequenceTable.from_texts(
        {"": 0.2, "a": 0.1, "b": 0.25, "a a": 0.25, "a b": 0.1, "b a": 0.1}, space=prior.space
    )
    behaviour = SequenceTable.from_texts(
        {"": 0.15, "a": 0.2, "b": 0.2, "a a": 0.1, "a b": 0.2, "b a": 0.15}, space=prior.space
    )
    reward = table_reward(
        {"": 0.0, "a": 1.0, "b": 0.0, "a a": 2.0, "a b": 0.5, "b a": 1.0}, prior.space
    )
    return AuditCase("answers", policy, Problem(prior, reward, 0.7), behaviour)


def check_entry(entry: Entry, case: AuditCase) -> CheckedEntry:
    """Audits one entry and compares its exact mean with its claim."""
    started = time.perf_counter()
    constants = {} if entry.constants is None else entry.constants(case.policy, case.problem)
    function = partial(entry.audited or entry.function, **constants)
    audit = audit_value if entry.kind == "value" else audit_gradient
    drawn_by = {
        "policy": None,
        "behaviour": case.behaviour,
        "posterior": posterior(case.problem).model,
    }[entry.drawn_by]
    report = audit(
        function, case.policy, case.problem, batch_size=entry.batch_size, behaviour=drawn_by
    )
    error = _error(report, _claimed(entry, report, case))
    return CheckedEntry(entry, case.name, error, report.variance, time.perf_counter() - started)


def check_catalogue(
    entries: Sequence[Entry] = CATALOGUE, cases: Sequence[AuditCase] | None = None
) -> list[CheckedEntry]:
    """Every entry on every case (by default the four sentences and the answers): a row each, in
    order.
    """
    tried = (four_sentences_case(), answers_case()) if cases is None else cases
    return [check_entry(entry, case) for entry in entries for case in tried]


def catalogue_text(rows: Sequence[CheckedEntry]) -> str:
    """The check as a table in plain text, an entry a line, and what it comes to."""
    cases = list(dict.fromkeys(row.case for row in rows))  # each once, in order
    by_entry: dict[str, dict[str, CheckedEntry]] = {}
    for row in rows:
        by_entry.setdefault(row.entry.name, {})[row.case] = row
    lines: list[list[Cell]] = []
    for name, found in by_entry.items():
        said = _said(next(iter(found.values())).entry)
        errors = [f"{found[case].error:.1e}" if case in found else "–" for case in cases]
        kept = "holds" if all(row.holds for row in found.values()) else "FAILS"
        lines.append([name, said, *errors, kept])
    failures = sum(not row.holds for row in rows)
    verdict = (
        f"{len(by_entry)} claims hold to {TOLERANCE:g} on {' and '.join(cases)}."
        if not failures
        else f"{failures} of {len(rows)} checks fail."
    )
    header = ["estimator", "its mean", *(f"error, {case}" for case in cases), "claim"]
    return f"{text_table(header, lines)}\n{verdict}"


def markdown_table() -> str:
    """The tables of tutorials/estimators.md, a section each: name, formula, what it is unbiased for
    or follows, exact variance on the four sentences.
    """
    case = four_sentences_case()
    parts = []
    for title, entries in SECTIONS.items():
        lines = [f"| {title} | one estimate | its mean | variance |", "|---|---|---|---|"]
        for entry in entries:
            drawn = f" of {entry.batch_size}" if entry.batch_size > 1 else ""
            cells = [
                f"`{entry.name}`",
                entry.formula,
                _said(entry),
                f"{check_entry(entry, case).variance:.6f}{drawn}",
            ]
            # a bare | would end the cell
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _said(entry: Entry) -> str:
    return f"unbiased for {entry.words}" if entry.unbiased else entry.words


def _claimed(entry: Entry, report: AuditReport, case: AuditCase) -> Tensor:
    """The claimed mean in the coordinates of the report."""
    if callable(entry.claim):
        # a case without a behaviour policy is on-policy: predictions ask for one all the same
        drawn_by = case.policy if case.behaviour is None else case.behaviour
        return entry.claim(case.policy, case.problem, drawn_by)
    total = torch.zeros_like(report.mean)
    for name, coefficient in entry.claim.items():
        total = total + coefficient * report.targets[name]
    return total


def _error(report: AuditReport, claimed: Tensor) -> float:
    """How far the mean is from the claimed one, relative to it: (1)."""
    # a claim of 0 has no size of its own: the noise of one estimate stands for it
    scale = float(claimed.norm()) or math.sqrt(report.variance) or 1.0
    return float((report.mean - claimed).norm()) / scale
