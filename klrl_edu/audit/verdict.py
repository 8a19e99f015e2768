"""What an estimator follows, in words: found by solving for it, exact to the precision of the mean.

E g = target,    E g = c·target,    E g = a·target₁ + b·target₂,    or the nearest target        (1)

Gradients are to descend, so a mean that equals the target expected_reward, ∇(−E r), raises E[r].
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

_PARALLEL = 0.99  # cosine

# what a step along each target raises, and what it lowers
RAISES = {
    "objective": "J",
    "expected_reward": "E[r]",
    "entropy": "H(π)",
    "entropy_per_token": "H(π) per token",
    "behaviour_reward": "E_μ[(r − E_μ r) log π]",
    "truncated_reward": "E[r] of π cut to μ's tokens",
}
LOWERS = {
    "reverse_kl": "KL(π‖q)",
    "forward_kl": "KL(q‖π)",
    "reverse_kl_per_token": "KL(π‖q) per token",
    "forward_kl_per_token": "KL(q‖π) per token",
    "behaviour_kl": "KL(μ‖π)",
    "negative_log_likelihood": "the cross-entropy",
}


def direction(name: str) -> str:
    """What a step along a target does: "raises objective", "lowers reverse_kl", …"""
    does = "raises" if name in RAISES else "lowers" if name in LOWERS else "follows"
    return f"{does} {name}"


def verdict(
    name: str,
    mean: Tensor,
    targets: Mapping[str, Tensor],
    tolerance: Callable[[Tensor], float],
    zero: Collection[str] = (),
    *,
    value: bool = False,
) -> str:
    """One sentence.

    Args:
        mean: E g [P].
        targets: name -> [P].
        tolerance: the distance from a vector [P] below which the mean equals it.
        zero: the targets that are 0 here.
        value: the mean is a number, and not the gradient by a single parameter.
    """
    size = float(mean.norm())
    if math.isinf(size):
        # compared as they stand: the difference of two infinite means is NaN
        alike = [other for other, target in targets.items() if torch.equal(mean, target)]
        company = f", as {_have(alike)} {_and(alike)}" if alike else ""
        return f"{name} has an infinite mean{company}."
    compared = {other: vector for other, vector in targets.items() if other not in zero}
    exact = [
        other
        for other, target in compared.items()
        if float((mean - target).norm()) <= tolerance(target)
    ]
    none = torch.zeros_like(mean)
    # a mean of 0 first: every target that is as small would fit it
    if size <= tolerance(none):
        if exact:
            return (
                f"{name} is unbiased for {_and(exact)}, as far as rounding tells: here"
                f" {_they(exact)} 0 but for {tolerance(none):.2g}."
            )
        company = f", as {_have([*zero])} {_and([*zero])} here" if zero else ""
        return f"{name} has expectation 0{company}."
    if exact:
        return f"{name} is unbiased for {_and(exact)}."
    # of a number every target is a multiple, so no scale is looked for
    if value:
        nearest, distance = nearest_target(mean, targets)
        return (
            f"{name} is biased for all targets; nearest is {nearest}, relative bias {distance:.3g}."
        )
    if len(mean) == 1:
        scales = [f"{c:.6g}·{other}" for other, c in _scales(mean, compared).items()]
        return (
            f"{name} is biased for all targets; its gradient is one number, which is a multiple of"
            f" any other: {', '.join(scales)}."
        )
    # the plainest first: one target before two
    combined = _scaled(mean, compared, tolerance) or _sum_of_two(mean, compared, tolerance)
    return f"{name} {combined or _nearest(mean, compared)}."


def sampled_verdict(
    name: str,
    targets: Mapping[str, Tensor],
    distances: Mapping[str, tuple[float, float]],
    size: tuple[float, float],
    draws: int,
    zero: Collection[str] = (),
) -> str:
    """One sentence about a mean that was sampled: which targets it may be, and how far the others
    are, the nearest first.

    Args:
        targets: name -> [P].
        distances: name -> the least and the largest distance that the draws allow.
        size: the same for the distance from 0.
        draws: how many there were.
        zero: the targets that are 0 here.
    """
    if size[0] == 0:
        return (
            f"{name} has a mean that {draws:,} draws do not tell from 0 (at most {size[1]:.3g});"
            " draw more, or audit exactly."
        )
    sizes = {other: float(vector.norm()) for other, vector in targets.items() if other not in zero}
    # by the most they may be off: the least is 0 for all that are near
    ranked = sorted((other for other in sizes if sizes[other] > 0), key=lambda n: distances[n][1])
    near = [other for other in ranked if distances[other][0] == 0]
    far = [
        f"{other} (off by {distances[other][0] / sizes[other]:.3g} to"
        f" {distances[other][1] / sizes[other]:.3g} of it)"
        for other in ranked
        if other not in near and sizes[other] < math.inf
    ]
    if not near:
        return (
            f"{name} is biased for all targets, as far as {draws:,} draws tell; nearest first:"
            f" {', '.join(far[:3])}."
        )
    may_be = [
        f"{other} (off by at most {distances[other][1] / sizes[other]:.3g} of it)" for other in near
    ]
    rest = f"; next {far[0]}" if far else ""
    return f"{name} may be unbiased for {_and(may_be)}, as far as {draws:,} draws tell{rest}."


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


def cosine_of_angle(one: Tensor, other: Tensor) -> float:
    """Of the angle between two vectors; NaN where either is 0."""
    sizes = float(one.norm() * other.norm())
    return float(one @ other) / sizes if sizes else math.nan


def _nearest(mean: Tensor, targets: Mapping[str, Tensor]) -> str:
    """The target of the smallest angle, where none fits."""
    angles = {
        name: cosine_of_angle(mean, target)
        for name, target in targets.items()
        if bool(target.any())
    }
    # NaN compares with nothing, so the largest would depend on the order
    finite = {name: angle for name, angle in angles.items() if not math.isnan(angle)}
    if not finite:
        return "is biased for all targets"
    name = max(finite, key=lambda other: finite[other])
    scale = _scales(mean, {name: targets[name]})[name]
    if finite[name] <= 0:
        return (
            f"is biased for all targets and points away from each; least from {name}, cosine"
            f" {finite[name]:.4g}"
        )
    along = _digits_below_one(finite[name])
    return (
        f"is biased for all targets; nearest is {name}: {along} along it (cosine), scaled by"
        f" {scale:.4g}, relative bias {relative_distance(mean, targets[name]):.3g}"
    )


def _digits_below_one(angle: float) -> str:
    """A cosine that is not 1 with as many digits as show it."""
    # float64 has no more than 15 digits
    digits = 4 if angle < 0.9995 else min(15, 1 - math.floor(math.log10(max(1 - angle, 1e-14))))
    return f"{angle:.{digits}f}"


def _scales(mean: Tensor, targets: Mapping[str, Tensor]) -> dict[str, float]:
    """The factor that brings each target closest to the mean; none where it is 0."""
    sizes = {name: float(target @ target) for name, target in targets.items()}
    return {
        name: float(mean @ targets[name]) / size
        for name, size in sizes.items()
        if 0 < size < math.inf
    }


def _scaled(
    mean: Tensor, targets: Mapping[str, Tensor], tolerance: Callable[[Tensor], float]
) -> str | None:
    for name, scale in _scales(mean, targets).items():
        multiple = scale * targets[name]
        if float((mean - multiple).norm()) <= tolerance(multiple):
            warning = ""
            if scale < 0:
                # lower what the target raises, or raise what it lowers
                raised = name in RAISES
                what = RAISES.get(name) or LOWERS.get(name) or name
                warning = f": it {'lowers' if raised else 'raises'} {what}"
            return f"follows {name}, scaled by {scale:.6g}{warning}"
    return None


def _sum_of_two(
    mean: Tensor, targets: Mapping[str, Tensor], tolerance: Callable[[Tensor], float]
) -> str | None:
    """The plainest exact combination of two targets; none where two vectors span all there is, and
    any mean would be one.
    """
    if len(targets) < 2:
        return None
    size = float(mean.norm())
    # the tolerance as a share of the mean, for ranks and coefficients, which have no unit
    relative = tolerance(mean) / size
    vectors = torch.stack([mean, *targets.values()])
    if int(torch.linalg.matrix_rank(vectors, rtol=relative)) < 3:
        return None
    found: list[tuple[int, str]] = []
    for one, other in itertools.combinations(targets, 2):
        basis = torch.stack([targets[one], targets[other]], 1)
        if _nearly_parallel(*basis.unbind(1)):
            continue
        # gelsd, by singular values, is the driver for targets that are far from orthogonal
        a, b = torch.linalg.lstsq(basis, mean[:, None], driver="gelsd").solution[:, 0].tolist()
        rest = basis @ torch.tensor([a, b], dtype=mean.dtype) - mean
        if float(rest.norm()) <= tolerance(mean):
            # the plainest has the fewest coefficients other than ±1
            odd = sum(not abs(abs(c) - 1) < relative for c in (a, b))
            found.append((odd, _in_words({one: a, other: b}, relative)))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _nearly_parallel(one: Tensor, other: Tensor) -> bool:
    """Two targets whose difference is small beside them, or that are 0: large coefficients of
    opposite signs would fit what neither means.
    """
    sizes = float(one.norm() * other.norm())
    return sizes == 0 or abs(float(one @ other)) > _PARALLEL * sizes


def _in_words(coefficients: Mapping[str, float], precision: float) -> str:
    """What goes up and what goes down: "climbs 0.5·E[r] − 0.02·KL(q‖π)"; without anything to raise
    "descends KL(π‖q) − KL(q‖π)".
    """
    climbs = any(name in RAISES for name in coefficients)
    terms = []
    for name, coefficient in coefficients.items():
        what = RAISES.get(name) or LOWERS.get(name) or name
        up = coefficient if name in RAISES else -coefficient
        terms.append((up if climbs else coefficient, what))
    terms.sort(key=lambda term: term[0] < 0)  # what is meant first, what is taken off it after
    (first, one), (second, other) = terms
    return (
        f"{'climbs' if climbs else 'descends'} {_term(first, one, precision)}"
        f"{_term(second, other, precision, joined=True)}"
    )


def _term(coefficient: float, what: str, precision: float, *, joined: bool = False) -> str:
    sign = "−" if coefficient < 0 else "+"
    lead = f" {sign} " if joined else ("−" if coefficient < 0 else "")
    size = abs(coefficient)
    return f"{lead}{what}" if abs(size - 1) < precision else f"{lead}{size:.6g}·{what}"


def _and(names: list[str]) -> str:
    return " and ".join(names)


def _have(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _they(names: list[str]) -> str:
    return "it is" if len(names) == 1 else "they are"
