"""Mean and variance of k1, k2 and k3 in closed form, for two Gaussians of equal variance.

    π = N(0, 1), q = N(μ, 1):   d = KL(π‖q) = μ²/2,   u = log π/q ~ N(d, 2d),   w = e^{−u},
    E w² = e^{2d}                                                                                (1)
    k1 = u                Var = 2d
    k2 = u²/2             mean = d + d²/2,   Var = 2d² + 2d³
    k3 = w − 1 + u        Var = e^{2d} − 1 − 2d
    u + c(w − 1)          Var = 2d − 4cd + c²(e^{2d} − 1),   least at c* = 2d/(e^{2d} − 1)       (2)

k3 is the better estimator only while e^{2d} − 1 < 4d, up to d = 0.628 nats: a sequence that has
moved further is better served by k1. The KL d is a number or a tensor [...], in nats. Schulman
(2020), whose table has d = 0.005 and d = 0.5.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import as_numbers, takes_numbers


class EstimatorMoments(NamedTuple):
    """The mean and variance [...] of an estimator of the KL `kl` [...], all in nats."""

    kl: Tensor
    mean: Tensor
    variance: Tensor

    @property
    def relative_bias(self) -> Tensor:
        """The bias as a part of the KL: (mean − d)/d [...]."""
        return (self.mean - self.kl) / self.kl

    @property
    def relative_std(self) -> Tensor:
        """The standard deviation of one sample as a part of the KL: std/d [...]."""
        return self.variance.sqrt() / self.kl


def _checked(kl: float | Tensor) -> Tensor:
    """A KL as a tensor [...].

    Raises:
        InputError: a KL below 0, infinite or no number.
    """
    given = as_numbers(kl, "kl")
    if isinstance(kl, bool):
        raise InputError(f"kl = {kl!r} must be a number of nats.")
    d = given.to(torch.float64)
    if not bool(((d >= 0) & (d < math.inf)).all()):
        raise InputError(f"kl = {kl!r} must be finite and at least 0, in nats.")
    return d


def k1(kl: float | Tensor) -> EstimatorMoments:
    """The moments of u at d = `kl` [...]: std/d = √(2/d), without bound as d → 0."""
    d = _checked(kl)
    return EstimatorMoments(d, d, 2 * d)


def k2(kl: float | Tensor) -> EstimatorMoments:
    """The moments of u²/2 at d = `kl` [...]: relative bias d/2, std/d = √(2 + 2d)."""
    d = _checked(kl)
    return EstimatorMoments(d, d + d.square() / 2, 2 * d.square() * (1 + d))


def k3(kl: float | Tensor) -> EstimatorMoments:
    """The moments of w − 1 + u at d = `kl` [...]: std/d → √2 as d → 0, and grows as e^d/d."""
    d = _checked(kl)
    return EstimatorMoments(d, d, logspace.expm1_minus_identity(2 * d))


@takes_numbers
def control_variate(kl: float | Tensor, coefficient: float | Tensor) -> EstimatorMoments:
    """The moments (2) of u + c(w − 1) at d = `kl` [...] and c = `coefficient` [...]."""
    d = _checked(kl)
    c = torch.as_tensor(coefficient, dtype=torch.float64)
    if not bool(torch.isfinite(c).all()):
        raise InputError(f"coefficient = {coefficient!r} must be a finite number.")
    # e^{2d} may overflow, and 0·inf is 0 here
    squared = torch.where(c == 0, 0.0, c**2 * torch.expm1(2 * d))
    return EstimatorMoments(d, d, 2 * d - 4 * c * d + squared)


def best_coefficient(kl: float | Tensor) -> Tensor:
    """The c* of least variance (2) at d = `kl` [...]: near 1 (k3) for small d, falling to 0."""
    d = _checked(kl)
    safe = torch.where(d > 0, d, 1.0)
    return torch.where(d > 0, 2 * safe / torch.expm1(2 * safe), 1.0)  # 1 is the limit at 0


def crossing() -> float:
    """The KL in nats, 0.628…, at which k3 and k1 have equal variance; above it k3 is the worse."""
    # the other root is d = 0
    return float(brentq(lambda d: math.expm1(2 * d) - 4 * d, 0.5, 1.0, xtol=1e-15))
