"""Mean and total variance of a gradient from its sparse contributions, exactly.

    E g = Σ_e m_e φ_e,  m = E c;    Var g = E‖g‖² − ‖E g‖²,  ‖g‖² = Σ_ij c_i c_j <φ_i, φ_j>      (1)
    Var g = E‖Σ_e (c − m)_e φ_e‖²                                                                (2)

(1) costs n² an execution and loses digits where the variance is small beside the terms that cancel;
(2) costs P and loses none. X executions, n entries of a gradient, E edges, P parameters.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.audit.coordinates import Coordinates
from klrl_edu.audit.differentiation import LossOnSupport
from klrl_edu.audit.subjects import Executions

_KEEPS_DIGITS = 1e-4  # of the sum of absolute terms: (1) then errs by under 1e-12 of the variance
_CHUNK = 1 << 20  # numbers at once
# pairs of edges at once, so that what lies between two passes stays in the processor's cache
_PAIRS = 1 << 16


class Contributions(NamedTuple):
    """What batches contribute: the edges [X,n] they touch (−1 for none), their depths [n], ∂loss/∂ℓ
    [X,n], and log-probabilities [X].
    """

    edges: Tensor
    depths: Tensor
    coefficients: Tensor
    log_weight: Tensor


def contributions_of(
    loss: LossOnSupport, executions: Iterable[Executions]
) -> Iterator[Contributions]:
    """The gradients of a loss as what they do to edges."""
    return (
        Contributions(loss.edges(part.rows), loss.depths(part.rows), part.results, part.log_weight)
        for part in executions
    )


class GradientMoments(NamedTuple):
    """E g as coefficients [E], total variance, and how many executions there were; √E(Σ|c|)², the
    size of what was added up; and the largest ‖φ_e‖.
    """

    coefficients: Tensor
    variance: float
    executions: int
    size: float
    longest: float


def gradient_moments(
    contributions: Callable[[], Iterable[Contributions]],
    coordinates: Coordinates,
    edges: int,
    device: torch.device,
) -> GradientMoments:
    """Both moments; reads the contributions once where (1) keeps its digits, else twice.

    Args:
        contributions: starts a pass over them, always the same ones, whose probabilities sum to
            one.
        coordinates: what the gradient is made of.
        edges: E.
        device: where they are.
    """
    mean = torch.zeros(edges, dtype=torch.float64, device=device)
    kernel = Kernel(coordinates, edges, device)
    second, largest, executions, direct = 0.0, 0.0, 0, False
    for part in contributions():
        # (2) takes P numbers an execution and (1) n²: where P is fewer, straight to (2)
        direct = coordinates.squares_are_cheap and coordinates.size <= part.edges.shape[1] ** 2
        weight = torch.exp(part.log_weight)
        # −1 stands for no edge, and is no index
        live = part.edges >= 0
        mean.index_add_(0, part.edges[live], (weight[:, None] * part.coefficients)[live])
        executions += len(weight)
        largest += float(weight @ part.coefficients.abs().sum(-1).square())
        if not direct:
            second += float(weight @ kernel.squared_norms(part))
    variance = second - float(coordinates.squared_norms(mean[None]))  # (1)
    # (Σ|c|)² max ‖φ‖² bounds what (1) adds up, and so what may cancel in it
    if direct or variance < _KEEPS_DIGITS * largest * kernel.longest**2:
        variance = _about_the_mean(contributions(), coordinates, mean)
    return GradientMoments(mean, variance, executions, math.sqrt(largest), kernel.longest)


def _about_the_mean(
    contributions: Iterable[Contributions], coordinates: Coordinates, mean: Tensor
) -> float:
    """The total variance by (2), from a second pass over the contributions."""
    return math.fsum(
        float(torch.exp(weight) @ coordinates.squared_norms(dense - mean))
        for dense, weight in dense_coefficients(contributions, len(mean))
    )


def dense_coefficients(
    contributions: Iterable[Contributions], edges: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Contributions as coefficients [x,E] with log-probabilities [x], a chunk at a time."""
    for part in contributions:
        for indices, values, weight in _split(part, max(1, _CHUNK // edges)):
            live = indices >= 0
            dense = torch.zeros(len(values), edges, dtype=torch.float64, device=values.device)
            # where there is no edge, 0 is added to the first
            yield dense.scatter_add(1, indices.clamp(min=0), torch.where(live, values, 0.0)), weight


class Kernel:
    """‖g‖² by (1): kernels of pairs of edges, looked up where all pairs fit into a small matrix."""

    def __init__(self, coordinates: Coordinates, edges: int, device: torch.device):
        self.coordinates = coordinates
        index = torch.arange(edges, device=device)
        self.longest = math.sqrt(float(coordinates.kernel(index, index).max()))  # of all ‖φ_e‖
        small = edges**2 <= _CHUNK
        self.table = (
            coordinates.kernel(*torch.broadcast_tensors(index[:, None], index[None]))
            if small
            else None
        )

    def squared_norms(self, part: Contributions) -> Tensor:
        """‖g‖² of each execution, by (1): [X]."""
        one, other = self._pairs(part.depths)
        times = torch.where(one == other, 1.0, 2.0).double()  # each pair stands for two
        norms = []
        for indices, values, _ in _split(part, max(1, _PAIRS // len(one))):
            terms = self._products(indices[:, one], indices[:, other])
            terms = terms.mul_(values[:, one]).mul_(values[:, other])  # in place, for the cache
            norms.append(terms @ times)
        return torch.cat(norms)

    def _pairs(self, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Which entries of n to multiply, each pair once; those of other depths only where they are
        not orthogonal anyway.
        """
        one, other = torch.triu_indices(len(depths), len(depths), device=depths.device)
        if not self.coordinates.depths_are_orthogonal:
            return one, other
        same_depth = depths[one] == depths[other]
        return one[same_depth], other[same_depth]

    def _products(self, left: Tensor, right: Tensor) -> Tensor:
        """Kernels of pairs of edges [x,pairs]; where there is no edge (−1) any number does, as its
        coefficient is 0.
        """
        left, right = left.clamp(min=0), right.clamp(min=0)
        if self.table is None:
            return self.coordinates.kernel(left, right)
        return self.table[left, right]


def _split(part: Contributions, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(
        part.edges.split(rows),
        part.coefficients.split(rows),
        part.log_weight.split(rows),
        strict=True,
    )
