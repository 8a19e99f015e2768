"""What an audit says: exact mean, bias and variance of an estimator, beside everything it might
have been meant to follow.
"""

import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klrl_edu.audit.verdict import (
    cosine_of_angle,
    direction,
    relative_distance,
    sampled_verdict,
    verdict,
)
from klrl_edu.core.display import Cell, html_table, text_table
from klrl_edu.core.errors import InputError
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
        batch_size: sequences a problem and estimate.
        executions: outcomes enumerated, or drawn.
        seconds: wall time.
        differentiation: how a loss was differentiated by its log-probabilities; None for a value.
        cost: what backward passes through a network took, in words; None where the closed form of a
            table served.
        notes: what else must be known, e.g. mass that sampling misses.
        probability_negative: P(estimate < 0) of a value; None for a gradient.
        probability_negative_token: the same of the estimate at a live token; None where the
            estimator says nothing of single tokens.
        interval: half-widths [P] around `mean` that hold for every distribution, where batches
            were drawn and a bound was given; else None.
        failure_probability: that any entry of the exact mean lies outside its interval.
        standard_error: of the entries of the mean [P], where batches were drawn; None where it is
            exact.
        distances: name -> the least and the largest ‖E g − target‖ that the draws allow, with
            confidence 99.9 % each; None where it is exact.
        size: the same for ‖E g‖.
        precision: relative error below which two numbers count as equal; larger for a policy in
            float32.
        rounding: the distance, in `coordinates`, by which rounding alone may have moved the mean.
        arithmetic: the least precise type that the estimator computes in.
        zero_targets: the targets that are 0 here, where no relative bias means anything.
        entries: what each entry of the mean belongs to; None for a network's parameters.
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
    probability_negative_token: float | None = None
    interval: Tensor | None = None
    failure_probability: float | None = None
    standard_error: Tensor | None = None
    distances: dict[str, tuple[float, float]] | None = None
    size: tuple[float, float] | None = None
    precision: float = _EXACT
    rounding: float = 0.0
    arithmetic: str = "float64"
    zero_targets: tuple[str, ...] = ()
    entries: tuple[str, ...] | None = None

    @property
    def is_value(self) -> bool:
        """Whether the mean is a number in nats, and no gradient."""
        return self.coordinates == "nats"

    @property
    def bias(self) -> dict[str, float]:
        """‖E g − target‖; for a value the signed E g − target."""
        if self.is_value:
            return {name: float(self.mean - target) for name, target in self.targets.items()}
        return {name: float((self.mean - target).norm()) for name, target in self.targets.items()}

    @property
    def relative_bias(self) -> dict[str, float]:
        """‖E g − target‖/‖target‖; NaN where the target is 0, inf where it is infinite."""
        return {
            name: math.nan if self._is_zero(name) else relative_distance(self.mean, target)
            for name, target in self.targets.items()
        }

    @property
    def cosine(self) -> dict[str, float]:
        """The cosine of the angle between E g and each target; NaN where either is 0."""
        return {
            name: math.nan if self._is_zero(name) else cosine_of_angle(self.mean, target)
            for name, target in self.targets.items()
        }

    @property
    def scale(self) -> dict[str, float]:
        """The factor c that brings c·target closest to E g; NaN where the target is 0."""
        return {
            name: math.nan
            if self._is_zero(name)
            else float(self.mean @ target) / float(target @ target)
            for name, target in self.targets.items()
        }

    def _is_zero(self, name: str) -> bool:
        # exactly 0 counts as well: values come without a list of zero targets
        return name in self.zero_targets or not bool(self.targets[name].any())

    @property
    def verdict(self) -> str:
        """In words: what this follows."""
        if self.distances is not None and self.size is not None:
            return sampled_verdict(
                self.name,
                self.targets,
                self.distances,
                self.size,
                self.executions,
                [name for name in self.targets if self._is_zero(name)],
            )
        said = verdict(
            self.name,
            self.mean,
            self.targets,
            self._tolerance,
            [name for name in self.targets if self._is_zero(name)],
            value=self.is_value,
        )
        if self.arithmetic == "float64":
            return said
        return f"{said.removesuffix('.')}, to {self.arithmetic} precision."

    @property
    def exact(self) -> bool:
        """Whether every outcome was enumerated."""
        return self.distances is None

    def _tolerance(self, vector: Tensor) -> float:
        """How far from a vector the mean may lie, and equal it."""
        size = float(vector.norm())
        # inf · ε is inf, within which every mean would equal an infinite vector
        return self.rounding + (self.precision * size if math.isfinite(size) else 0.0)

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
                "probability_negative_token": self.probability_negative_token,
                "coordinates": self.coordinates,
                "batch_size": self.batch_size,
                "executions": self.executions,
                "exact": self.exact,
                "standard_error": self.standard_error,
                "distances": self.distances,
                "size": self.size,
                "interval": self.interval,
                "failure_probability": self.failure_probability,
                "seconds": self.seconds,
                "differentiation": self.differentiation,
                "cost": self.cost,
                "notes": self.notes,
                "targets": self.targets,
                "zero_targets": self.zero_targets,
                "precision": self.precision,
                "rounding": self.rounding,
                "arithmetic": self.arithmetic,
                "entries": self.entries,
                # what follows from the above, for readers without this package
                "bias": self.bias,
                "relative_bias": self.relative_bias,
                "cosine": self.cosine,
                "scale": self.scale,
            }
        )

    def save(self, path: str | Path) -> None:
        """Writes `to_dict` as JSON, which `load` reads and `against=` takes."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False), "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "AuditReport":
        """Reads what `save`, or `klrl audit` (result.json), wrote.

        Raises:
            InputError: no such file, or not the file of a report.
        """
        try:
            data = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: no report can be read there: {error}.") from None
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the report") -> "AuditReport":
        """The report of a `to_dict`.

        Raises:
            InputError: something is missing, or is not what it should be.
        """
        try:
            # verdict, bias and the like are computed from these
            kept = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
            for name in ("mean", "interval", "standard_error"):
                kept[name] = None if kept[name] is None else _vector(kept[name])
            # JSON turns tuples into lists
            if kept["distances"] is not None:
                kept["distances"] = {n: tuple(pair) for n, pair in kept["distances"].items()}
                kept["size"] = tuple(kept["size"])
            kept["targets"] = {name: _vector(entries) for name, entries in data["targets"].items()}
            for name in ("notes", "zero_targets"):
                kept[name] = tuple(kept[name])
            kept["entries"] = None if kept["entries"] is None else tuple(kept["entries"])
            kept["variance"] = float(kept["variance"])  # may be the word inf
            return cls(**kept)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{where} is not the JSON of an audit's report ({type(error).__name__}: {error});"
                " write one with report.save(path)."
            ) from None

    def __str__(self) -> str:
        return "\n".join(
            [
                self.verdict,
                *(f"Note: {note}" for note in self.notes),
                *self._lines(),
                text_table(*self._table()),
            ]
        )

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in self._lines())
        notes = "".join(f"<p><em>{html.escape(note)}</em></p>" for note in self.notes)
        head = f"<p><strong>{html.escape(self.verdict)}</strong></p>"
        return f"{head}{notes}{lines}{html_table(*self._table())}"

    def _lines(self) -> list[str]:
        """Mean, moments and means of computing, a line each."""
        within = ""
        if self.standard_error is not None:
            within = f", standard error at most {float(self.standard_error.max()):.3g}"
        if self.interval is not None:
            within += f", ± {float(self.interval.max()):.3g} but for {self.failure_probability:g}"
        names = self.entries or ()
        shown = ", ".join(
            f"{names[k]!r} {value:.6g}" if names else f"{value:.6g}"
            for k, value in enumerate(self.mean[:_SHOWN].tolist())
        )
        if len(self.mean) > _SHOWN:
            shown += ", …"
        negative = ""
        if self.probability_negative is not None:
            negative = f", P(estimate < 0) = {self.probability_negative:.6g}"
        if self.probability_negative_token is not None:
            negative += f", of a token's {self.probability_negative_token:.6g}"
        how = "outcomes enumerated" if self.exact else "batches drawn"
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
        if self.is_value and self.distances is not None:
            between: list[list[Cell]] = [
                [n, float(t), self.bias[n], *self.distances[n]] for n, t in self.targets.items()
            ]
            return ["target", "value", "bias", "off by at least", "at most"], between
        if self.is_value:
            values: list[list[Cell]] = [
                [n, float(t), self.bias[n], self._or_zero(n, self.relative_bias[n])]
                for n, t in self.targets.items()
            ]
            return ["target", "value", "bias", "relative bias"], values
        if self.distances is not None:
            drawn: list[list[Cell]] = [
                [
                    direction(name),
                    *self.distances[name],
                    None if self._is_zero(name) else self.cosine[name],
                    None if self._is_zero(name) else self.scale[name],
                ]
                for name in self.targets
            ]
            return ["a step that", "off by at least", "at most", "cosine", "best scale"], drawn
        rows: list[list[Cell]] = [
            [
                direction(name),
                self.bias[name],
                self._or_zero(name, self.relative_bias[name]),
                None if self._is_zero(name) else self.cosine[name],
                None if self._is_zero(name) else self.scale[name],
            ]
            for name in self.targets
        ]
        return ["a step that", "bias", "relative bias", "cosine", "best scale"], rows

    def _or_zero(self, name: str, number: float) -> Cell:
        return "the target is 0 here" if self._is_zero(name) else number


def _vector(entries: Any) -> Tensor:
    """A vector from JSON, where infinities are words."""
    return torch.tensor([float(entry) for entry in entries], dtype=torch.float64)


def total_variance(log_weight: Tensor, values: Tensor, mean: Tensor) -> float:
    """Σ p ‖g − E g‖² of outcomes [K] with values [K,P]."""
    return float(torch.exp(log_weight) @ (values - mean).square().sum(-1))
