"""What an audit says: exact mean, bias and variance of an estimator, beside everything it might
have been meant to follow.
"""

import html
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from klrl_edu.audit.verdict import nearest_target, relative_distance, verdict
from klrl_edu.core.display import Cell, html_table, text_table
from klrl_edu.evaluation.records import jsonable

_EXACT = 1e-9  # relative error below which two exact computations in float64 agree
_SHOWN = 8  # entries of a mean that are printed


@dataclass(frozen=True)
class AuditReport:
    """Exact moments of an estimator under its own sampling, or moments by Monte Carlo with an
    interval.

    Attributes:
        name: of the estimator.
        mean: E[g], a vector in `coordinates` (a scalar [1] for a value).
        variance: total variance E‖g − E g‖².
        targets: name -> what it might estimate, in the same coordinates; gradients are to descend
            (objective is ∇(−J)).
        coordinates: what the entries of `mean` are derivatives by; nats for a value.
        batch_size: sequences an estimate.
        executions: outcomes enumerated, or drawn.
        seconds: wall time.
        differentiation: how a loss was differentiated by its log-probabilities; None for a value.
        cost: what backward passes through a network took, in words; None where the closed form of a
            table served.
        notes: what else must be known, e.g. mass that sampling misses.
        probability_negative: P(estimate < 0) of a value; None for a gradient.
        interval: half-widths [P] around `mean`; None where it is exact.
        failure_probability: that any entry of the exact mean lies outside its interval.
        precision: relative error below which two numbers count as equal; larger for a policy in
            float32.
    """

    name: str
    mean: Tensor
    variance: float
    targets: dict[str, Tensor]
    coordinates: str
    batch_size: int
    executions: int
    seconds: float
    differentiation: str | None = None
    cost: str | None = None
    notes: tuple[str, ...] = field(default=())
    probability_negative: float | None = None
    interval: Tensor | None = None
    failure_probability: float | None = None
    precision: float = _EXACT

    @property
    def bias(self) -> dict[str, float]:
        """‖E g − target‖; for a value the signed E g − target."""
        if len(self.mean) == 1:
            return {name: float(self.mean - target) for name, target in self.targets.items()}
        return {name: float((self.mean - target).norm()) for name, target in self.targets.items()}

    @property
    def relative_bias(self) -> dict[str, float]:
        """‖E g − target‖/‖target‖; the plain norm where the target is 0, inf where it is
        infinite.
        """
        return {name: relative_distance(self.mean, target) for name, target in self.targets.items()}

    @property
    def cosine(self) -> dict[str, float]:
        """The cosine of the angle between E g and each target; NaN where either is 0."""
        return {
            name: _ratio(float(self.mean @ target), float(self.mean.norm() * target.norm()))
            for name, target in self.targets.items()
        }

    @property
    def scale(self) -> dict[str, float]:
        """The factor c that brings c·target closest to E g; NaN where the target is 0."""
        return {
            name: _ratio(float(self.mean @ target), float(target @ target))
            for name, target in self.targets.items()
        }

    @property
    def verdict(self) -> str:
        """In words: what this follows."""
        if self.interval is None:
            return verdict(
                self.name, self.mean, self.targets, math.sqrt(self.variance), self.precision
            )
        inside = [
            name
            for name, target in self.targets.items()
            if bool(((self.mean - target).abs() <= self.interval).all())
        ]
        if inside:
            return (
                f"{self.name} is consistent with {' and '.join(inside)}, as far as"
                f" {self.executions:,} draws tell."
            )
        nearest, distance = nearest_target(self.mean, self.targets)
        return (
            f"{self.name} is biased for all targets, certain but for {self.failure_probability:g};"
            f" nearest is {nearest}, off by {distance:.3g} of it."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as strict JSON: plain numbers and lists, infinities and NaN as the strings
        "inf", "-inf", "nan".
        """
        return jsonable(
            {
                "name": self.name,
                "verdict": self.verdict,
                "mean": self.mean,
                "variance": self.variance,
                "probability_negative": self.probability_negative,
                "coordinates": self.coordinates,
                "batch_size": self.batch_size,
                "executions": self.executions,
                "exact": self.interval is None,
                "interval": self.interval,
                "failure_probability": self.failure_probability,
                "seconds": self.seconds,
                "differentiation": self.differentiation,
                "cost": self.cost,
                "notes": self.notes,
                "targets": self.targets,
                "bias": self.bias,
                "relative_bias": self.relative_bias,
                "cosine": self.cosine,
                "scale": self.scale,
            }
        )

    def __str__(self) -> str:
        return "\n".join(
            [
                self.verdict,
                *self._lines(),
                text_table(*self._table()),
                *(f"Note: {note}" for note in self.notes),
            ]
        )

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in self._lines())
        notes = "".join(f"<p><em>{html.escape(note)}</em></p>" for note in self.notes)
        head = f"<p><strong>{html.escape(self.verdict)}</strong></p>"
        return f"{head}{lines}{html_table(*self._table())}{notes}"

    def _lines(self) -> list[str]:
        """Mean, moments and means of computing, a line each."""
        within = "" if self.interval is None else f" ± at most {float(self.interval.max()):.3g}"
        shown = ", ".join(f"{value:.6g}" for value in self.mean[:_SHOWN].tolist())
        if len(self.mean) > _SHOWN:
            shown += ", …"
        negative = ""
        if self.probability_negative is not None:
            negative = f", P(estimate < 0) = {self.probability_negative:.6g}"
        how = "outcomes enumerated" if self.interval is None else "batches drawn"
        lines = [
            f"mean {shown}{within} ({self.coordinates})",
            (
                f"variance {self.variance:.6g}{negative} at batch size {self.batch_size};"
                f" {self.executions:,} {how} in {self.seconds:.2g} s"
            ),
        ]
        if self.differentiation:
            lines.append(f"differentiated by: {self.differentiation}")
        if self.cost:
            lines.append(f"cost: {self.cost}")
        return lines

    def _table(self) -> tuple[list[str], list[list[Cell]]]:
        if len(self.mean) == 1:
            values: list[list[Cell]] = [
                [n, float(t), self.bias[n], self.relative_bias[n]] for n, t in self.targets.items()
            ]
            return ["target", "value", "bias", "relative bias"], values
        rows: list[list[Cell]] = [
            [n, self.bias[n], self.relative_bias[n], self.cosine[n], self.scale[n]]
            for n in self.targets
        ]
        return ["descent of", "bias", "relative bias", "cosine", "best scale"], rows


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def total_variance(log_weight: Tensor, values: Tensor, mean: Tensor) -> float:
    """Σ p ‖g − E g‖² of outcomes [K] with values [K,P]."""
    return float(torch.exp(log_weight) @ (values - mean).square().sum(-1))
