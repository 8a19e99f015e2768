"""What an estimator follows, in words: found by solving for it, exact to the precision of the mean.

E g = target,    E g = c·target,    E g = a·target₁ + b·target₂,    or the nearest target        (1)
"""

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

_PARALLEL = 0.99  # cosine


def verdict(
    name: str, mean: Tensor, targets: Mapping[str, Tensor], spread: float, precision: float
) -> str:
    """One sentence.

    Args:
        mean: E g [P].
        targets: name -> [P].
        spread: √Var g, beside which a mean of rounding errors counts as 0.
        precision: relative error below which two exact computations agree.
    """
    size = float(mean.norm())
    if math.isinf(size):
        alike = [other for other, target in targets.items() if torch.equal(mean, target)]
        company = f", as have {' and '.join(alike)}" if alike else ""
        return f"{name} has an infinite mean{company}."
    if size < precision * max(1.0, spread):
        return f"{name} has expectation 0."
    exact = [
        other
        for other, target in targets.items()
        if float((mean - target).norm()) < precision * float(target.norm())
    ]
    if exact:
        return f"{name} is unbiased for {' and '.join(exact)}."
    if len(mean) > 1:
        combined = _scaled(mean, targets, precision) or _sum_of_two(mean, targets, precision)
        if combined:
            return f"{name} {combined}."
    nearest, distance = nearest_target(mean, targets)
    return f"{name} is biased for all targets; nearest is {nearest}, relative bias {distance:.3g}."


def nearest_target(mean: Tensor, targets: Mapping[str, Tensor]) -> tuple[str, float]:
    """The target of the smallest relative bias, and that bias; targets of 0 and infinite
    ones last.
    """
    distances = {name: relative_distance(mean, target) for name, target in targets.items()}

    def rank(name: str) -> tuple[float, str]:
        distance = distances[name]  # NaN compares with nothing, so it goes last with the infinite
        return (math.inf if math.isnan(distance) else distance, name)

    name = min(distances, key=rank)
    return name, distances[name]


def relative_distance(mean: Tensor, target: Tensor) -> float:
    """‖mean − target‖/‖target‖; the plain norm where the target is 0, inf where it is infinite."""
    size = float(target.norm())
    return math.inf if math.isinf(size) else float((mean - target).norm()) / (size or 1.0)


def _scaled(mean: Tensor, targets: Mapping[str, Tensor], precision: float) -> str | None:
    for name, target in targets.items():
        size = float(target @ target)
        scale = float(mean @ target) / size if size else math.nan
        if float((mean - scale * target).norm()) < precision * float(mean.norm()):
            warning = ": it climbs what it should descend" if scale < 0 else ""
            return f"follows {name}, scaled by {scale:.6g}{warning}"
    return None


def _sum_of_two(mean: Tensor, targets: Mapping[str, Tensor], precision: float) -> str | None:
    """The plainest exact combination of two targets; none where two vectors span all there is, and
    any mean would be one.
    """
    if len(targets) < 2:
        return None
    vectors = torch.stack([mean, *targets.values()])
    if int(torch.linalg.matrix_rank(vectors, rtol=precision)) < 3:
        return None
    found: list[tuple[int, str]] = []
    for one, other in itertools.combinations(targets, 2):
        basis = torch.stack([targets[one], targets[other]], 1)
        if _nearly_parallel(*basis.unbind(1)):
            continue
        a, b = torch.linalg.lstsq(basis, mean[:, None], driver="gelsd").solution[:, 0].tolist()
        rest = basis @ torch.tensor([a, b], dtype=mean.dtype) - mean
        if float(rest.norm()) < precision * float(mean.norm()):
            # the plainest has the fewest coefficients other than ±1
            odd = sum(not abs(abs(c) - 1) < precision for c in (a, b))
            terms = _term(a, one, precision) + _term(b, other, precision, joined=True)
            found.append((odd, f"descends {terms}"))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _nearly_parallel(one: Tensor, other: Tensor) -> bool:
    """Two targets whose difference is small beside them, or that are 0: large coefficients of
    opposite signs would fit what neither means.
    """
    sizes = float(one.norm() * other.norm())
    return sizes == 0 or abs(float(one @ other)) > _PARALLEL * sizes


def _term(coefficient: float, name: str, precision: float, *, joined: bool = False) -> str:
    sign = "−" if coefficient < 0 else "+"
    lead = f" {sign} " if joined else ("−" if coefficient < 0 else "")
    size = abs(coefficient)
    return f"{lead}{name}" if abs(size - 1) < precision else f"{lead}{size:.6g}·{name}"
