"""What an audit says: exact mean, bias and variance of an estimator, beside everything it might have been meant to follow."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klrl_edu.core.display import Cell, html_table, text_table

_EXACT = 1e-9  # relative error below which two exact computations agree


@dataclass(frozen=True)
class AuditReport:
    """Exact moments of an estimator under its own sampling.

    Attributes:
        name: of the estimator.
        mean: E[g], a vector in `coordinates` (a scalar [1] for a value).
        variance: total variance E‖g − E g‖².
        targets: name -> what it might estimate, in the same coordinates.
        coordinates: what the entries of `mean` are derivatives by.
        batch_size: sequences an estimate.
        executions: outcomes enumerated.
        seconds: wall time.
    """

    name: str
    mean: Tensor
    variance: float
    targets: dict[str, Tensor]
    coordinates: str
    batch_size: int
    executions: int
    seconds: float

    @property
    def bias(self) -> dict[str, float]:
        """‖E g − target‖."""
        return {name: float((self.mean - target).norm()) for name, target in self.targets.items()}

    @property
    def relative_bias(self) -> dict[str, float]:
        """‖E g − target‖/‖target‖; the plain norm where the target is 0."""
        return {name: bias / (float(self.targets[name].norm()) or 1.0) for name, bias in self.bias.items()}

    @property
    def cosine(self) -> dict[str, float]:
        """The cosine of the angle between E g and each target; NaN where either is 0."""
        return {name: _ratio(float(self.mean @ target), float(self.mean.norm() * target.norm())) for name, target in self.targets.items()}

    @property
    def scale(self) -> dict[str, float]:
        """The factor c that brings c·target closest to E g; NaN where the target is 0."""
        return {name: _ratio(float(self.mean @ target), float(target @ target)) for name, target in self.targets.items()}

    @property
    def verdict(self) -> str:
        """In words: what this follows."""
        if float(self.mean.norm()) < _EXACT * max(1.0, math.sqrt(self.variance)):
            return f"{self.name} has expectation 0."
        exact = [name for name, bias in self.relative_bias.items() if bias < _EXACT]
        if exact:
            return f"{self.name} is unbiased for {' and '.join(exact)}."
        parallel = [name for name, cosine in self.cosine.items() if cosine > 1 - _EXACT and len(self.mean) > 1]
        if parallel:
            return f"{self.name} follows {parallel[0]}, scaled by {self.scale[parallel[0]]:.6g}."
        nearest = min(self.relative_bias, key=lambda name: self.relative_bias[name])
        return f"{self.name} is biased for all targets; nearest is {nearest}, relative bias {self.relative_bias[nearest]:.3g}."

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "mean": self.mean.tolist(),
            "variance": self.variance,
            "coordinates": self.coordinates,
            "batch_size": self.batch_size,
            "executions": self.executions,
            "seconds": self.seconds,
            "targets": {name: target.tolist() for name, target in self.targets.items()},
            "bias": self.bias,
            "relative_bias": self.relative_bias,
            "cosine": self.cosine,
            "scale": self.scale,
        }

    def __str__(self) -> str:
        moments = f"variance {self.variance:.6g} at batch size {self.batch_size}; {self.executions:,} outcomes enumerated in {self.seconds:.2g} s"
        mean = "mean " + ", ".join(f"{value:.6g}" for value in self.mean[:8].tolist()) + (", …" if len(self.mean) > 8 else "")
        return f"{self.verdict}\n{mean} ({self.coordinates})\n{moments}\n{text_table(*self._table())}"

    def _repr_html_(self) -> str:
        return f"<p>{self.verdict}</p>{html_table(*self._table())}"

    def _table(self) -> tuple[list[str], list[list[Cell]]]:
        rows: list[list[Cell]] = [[n, self.bias[n], self.relative_bias[n], self.cosine[n], self.scale[n]] for n in self.targets]
        return ["target", "bias", "relative bias", "cosine", "best scale"], rows


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def total_variance(log_weight: Tensor, values: Tensor, mean: Tensor) -> float:
    """Σ p ‖g − E g‖² of outcomes [K] with values [K,P]."""
    return float(torch.exp(log_weight) @ (values - mean).square().sum(-1))
