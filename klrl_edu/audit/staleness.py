"""How a loss degrades as the policy that drew the samples falls behind: one exact audit a behaviour
policy.

E_μ[∇loss] for μ = π, then older ones;    staleness = KL(π‖μ) in nats a sequence                 (1)
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from klrl_edu.audit.adapting import Adapter
from klrl_edu.audit.audit import audit_gradient
from klrl_edu.audit.comparisons import Against
from klrl_edu.audit.report import AuditReport
from klrl_edu.audit.verdict import nearest_target
from klrl_edu.core import logspace
from klrl_edu.core.display import Cell, html_table, text_table
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError
from klrl_edu.evaluation.records import jsonable
from klrl_edu.learning.batches import Loss
from klrl_edu.models.contract import LanguageModel, enumerate_support, sequence_log_probs
from klrl_edu.problems.problem import Problem, check_problems


@dataclass(frozen=True)
class StalenessRow:
    """One behaviour policy.

    Attributes:
        label: its name.
        divergence: KL(π‖μ) in nats; inf where μ has no mass and π has.
        report: the audit under it.
    """

    label: str
    divergence: float
    report: AuditReport


@dataclass(frozen=True)
class StalenessReport:
    """An audit a behaviour policy, in the order given.

    Attributes:
        rows: one each.
    """

    rows: tuple[StalenessRow, ...]

    @property
    def target(self) -> str:
        """What the loss is held against: the target nearest to it under the first
        behaviour policy.
        """
        first = self.rows[0].report
        # a target of 0 is near to any small mean, and no relative bias for it means anything
        compared = {n: t for n, t in first.targets.items() if n not in first.zero_targets}
        return nearest_target(first.mean, compared or first.targets)[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything as strict JSON: target, and a row each with label, divergence and the
        report.
        """
        rows = [
            {"label": row.label, "divergence": row.divergence, **row.report.to_dict()}
            for row in self.rows
        ]
        return {"target": self.target, "rows": jsonable(rows)}

    def __str__(self) -> str:
        verdicts = [f"{row.label}: {row.report.verdict}" for row in self.rows]
        return "\n".join([text_table(*self._table()), *verdicts, *self._notes()])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p><em>{html.escape(note)}</em></p>" for note in self._notes())
        return f"{html_table(*self._table())}{notes}"

    def _notes(self) -> list[str]:
        """What else must be known, once where it is of every row, else with the rows' labels."""
        labels: dict[str, list[str]] = {}
        for row in self.rows:
            for note in row.report.notes:
                labels.setdefault(note, []).append(row.label)
        return [
            f"Note: {note}" if len(of) == len(self.rows) else f"Note ({', '.join(of)}): {note}"
            for note, of in labels.items()
        ]

    def _table(self) -> tuple[list[str], list[list[Cell]]]:
        header = [
            "drawn by",
            "KL(π‖μ)",
            f"bias for {self.target}",
            "relative bias",
            "cosine",
            "variance",
        ]
        return header, [self._line(row) for row in self.rows]

    def _line(self, row: StalenessRow) -> list[Cell]:
        report, target = row.report, self.target
        return [
            row.label,
            row.divergence,
            report.bias[target],
            *self._or_zero(report),
            report.variance,
        ]

    def _or_zero(self, report: AuditReport) -> list[Cell]:
        """Relative bias and cosine, which mean nothing beside a target of 0."""
        if self.target in report.zero_targets:
            return ["the target is 0 here", None]
        return [report.relative_bias[self.target], report.cosine[self.target]]


def audit_staleness(
    loss: Loss | Callable[..., Any],
    policy: LanguageModel,
    problem: Problem | Sequence[Problem],
    behaviours: Mapping[str, LanguageModel] | Sequence[LanguageModel],
    *,
    batch_size: int = 1,
    adapt: Adapter | None = None,
    against: Against | Mapping[str, Against] | None = None,
    micro_batches: int | None = None,
    ordered: bool = False,
    max_executions: int | None = None,
    monte_carlo: int | None = None,
    draw: Draw | None = None,
) -> StalenessReport:
    """The exact bias and variance of a loss under each of several policies that may have drawn its
    batches.

    Args:
        behaviours: label -> μ, freshest first, each on π's support; without labels they are
            numbered from 0.
        Others: as for `audit_gradient`.

    Returns:
        A row a behaviour policy; of several problems KL(π‖μ) is the mean.

    Raises:
        InputError: no behaviour policy, and what `audit_gradient` raises.
    """
    if isinstance(behaviours, Mapping):
        named = behaviours
    else:
        named = {str(index): model for index, model in enumerate(behaviours)}
    if not named:
        raise InputError(
            "behaviours is empty; give at least one policy, such as the policy itself."
        )
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "adapt": adapt,
        "against": against,
        "micro_batches": micro_batches,
        "ordered": ordered,
        "max_executions": max_executions,
        "monte_carlo": monte_carlo,
        "draw": draw,
    }
    # audits first: they refuse a μ that leaves π's support, which KL(π‖μ) would not notice
    reports = {
        label: audit_gradient(loss, policy, problem, behaviour=model, **options)
        for label, model in named.items()
    }
    problems = check_problems(problem)
    rows = []
    for label, report in reports.items():
        each = [_divergence(policy, named[label], one) for one in problems]
        rows.append(StalenessRow(label, sum(each) / len(each), report))
    return StalenessReport(tuple(rows))


@torch.no_grad()
def _divergence(policy: LanguageModel, behaviour: LanguageModel, problem: Problem) -> float:
    """KL(π‖μ) on π's support, which holds all of μ's mass."""
    support = enumerate_support(policy, prompt=problem.prompt)
    log_mu = sequence_log_probs(behaviour, support.tokens, problem.prompt)
    return float(logspace.kl_divergence(support.log_weights, log_mu))
