"""Losses whose gradient is a sum over the sequences of a batch and over its pairs: their moments
over all batches from batches that hold two sequences beside a fixed one.

    g(y_1 … y_B) = g_0 + Σ_i f_1(y_i) + Σ_{i<j} f_2(y_i, y_j),    g_0 = g(o … o),
    f_1(y) = g(y, o … o) − g_0,    f_2(y, z) = g(y, z, o … o) − f_1(y) − f_1(z) − g_0            (1)
    E g = g_0 + B E f_1 + C(B,2) E f_2                                                           (2)
    Var g = B Var φ + C(B,2) E‖f_2 − e(Y) − e(Z) + E f_2‖²,
    e(y) = E f_2(y, Z),    φ = f_1 + (B − 1) e                                                   (3)

(1) is the decomposition anchored at a sequence o; leave-one-out baselines, means of the group and
anything pairwise have it, a standard deviation has not. Whether a loss has it is tried out on whole
batches. (3) is Hoeffding's (1948) for U-statistics. S sequences, so S (S + 1)/2 batches in place of
C(S+B−1, B). E edges, X batches.
"""

import math
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from klrl_edu.audit.coordinates import Coordinates
from klrl_edu.audit.differentiation import LossOnSupport
from klrl_edu.audit.moments import (
    Contributions,
    GradientMoments,
    Kernel,
    contributions_of,
    dense_coefficients,
)
from klrl_edu.core.multisets import count_multisets, multisets

_TRIED, _LARGE = 8, 16  # whole batches on which (1) is tried; fewer where each has many pairs
_MAX_SIZE = 64  # sequences a batch: trying (1) on one takes C(B,2) batches of B
_MAX_DENSE = 1 << 26  # numbers in e(y) [S,E]: 512 MiB
_AT_ONCE = 256  # vectors [E] whose squares are taken together


def whole_batches(drawn: Tensor, size: int) -> Tensor:
    """Some batches [X,B] of the sequences `drawn` [S]: spread over all of them, and one that
    repeats itself.
    """
    # strides of their own spread the batches; steps // 2 repeats each sequence
    steps = torch.arange(size, device=drawn.device)
    tried = _TRIED if size <= _LARGE else 2
    places = [steps * (2 * k + 1) + k * k + 1 for k in range(tried - 1)]
    return drawn[torch.stack([*places, steps // 2]) % len(drawn)]


def fits(loss: LossOnSupport, sequences: int, size: int, max_executions: int) -> bool:
    """Whether (1) can be tried on batches of `size`, all pairs be run, and what they give be
    held.
    """
    pairs = count_multisets(sequences, 2)
    held = sequences * loss.tree.edges <= _MAX_DENSE
    return size <= _MAX_SIZE and pairs <= max_executions and held


def is_sum_over_pairs(loss: LossOnSupport, batches: Tensor, anchor: Tensor) -> bool:
    """Whether (1) holds on whole batches [X,B], with the sequence `anchor` [] as o."""
    size = batches.shape[1]
    pairs = list(combinations(range(size), 2))
    for batch in batches:
        # in the order of (1): g_0, then what gives f_1, then what gives f_2
        subsets = [[], *([i] for i in range(size)), *map(list, pairs)]
        rows = torch.stack([_filled(batch[subset], anchor, size) for subset in subsets])
        results = loss.results(rows, None, vmap=True)
        # as pushes on edges: a sequence stands at other places in a subset than in its batch
        pushed = [loss.unordered(row, seen) for row, seen in zip(rows, results, strict=True)]
        nothing, both = pushed[0], pushed[size + 1 :]
        f_1 = [one - nothing for one in pushed[1 : size + 1]]
        expected = nothing + torch.stack(f_1).sum(0)
        for (i, j), pair in zip(pairs, both, strict=True):
            expected = expected + pair - f_1[i] - f_1[j] - nothing
        if not loss.same(loss.unordered(batch, loss.many(batch[None])[0]), expected):
            return False
    return True


def pair_moments(
    loss: LossOnSupport, law: Tensor, size: int, coordinates: Coordinates
) -> GradientMoments:
    """Both moments over batches of `size` draws from a law [S], by (2) and (3); for losses of
    which `is_sum_over_pairs` says so.
    """
    drawn = (law > -math.inf).nonzero().squeeze(-1)
    probs, edges = law[drawn].exp(), loss.tree.edges
    rows, log_weight = multisets(law[drawn], 2)
    pairs = _Pairs(loss, drawn, size, coordinates, edges)
    nothing = pairs.gradients(drawn[:0][None])[0]  # o at all places
    f_1 = pairs.gradients(drawn[:, None]) - nothing

    given = torch.zeros(len(drawn), edges, dtype=torch.float64, device=law.device)
    second = largest = 0.0  # E‖g‖² of pairs, and E(Σ|c|)²
    for some, part in pairs.contributions(rows, log_weight):
        weight = part.log_weight.exp()
        second += float(weight @ pairs.kernel.squared_norms(part))
        largest += float(weight @ part.coefficients.abs().sum(-1).square())
        live = part.edges >= 0
        # E g(y, Z, o …): each of a pair is y once; where they are the same, half of it each time
        for mine, other in ((0, 1), (1, 0)):
            share = probs[some[:, other]] * torch.where(some[:, 0] == some[:, 1], 0.5, 1.0)
            place = (some[:, mine, None] * edges + part.edges)[live]
            # one index for (sequence, edge), as index_add_ works along one axis
            given.view(-1).index_add_(0, place, (share[:, None] * part.coefficients)[live])

    def spread(vectors: Tensor, centre: Tensor | float = 0.0) -> float:
        """E‖v(Y) − centre‖²."""
        chunks = zip((vectors - centre).split(_AT_ONCE), probs.split(_AT_ONCE), strict=True)
        return math.fsum(float(p @ coordinates.squared_norms(some)) for some, p in chunks)

    def square(vector: Tensor) -> float:
        return float(coordinates.squared_norms(vector[None]))

    own = f_1 + nothing / 2  # f_2(y, z) = g − own(y) − own(z)
    # (1) averaged over z
    e = given - own - probs @ own
    mean_1, mean_2, count = probs @ f_1, probs @ e, math.comb(size, 2)
    # E‖f_2‖², with <a, b> = (‖a + b‖² − ‖a − b‖²)/4
    cross = (spread(given + own) - spread(given - own)) / 4
    all_of_f_2 = second - 4 * cross + 2 * spread(own) + 2 * square(probs @ own)
    # Hoeffding's terms are orthogonal: the last of (3) is what the others leave of E‖f_2‖²
    beyond_e = all_of_f_2 - 2 * spread(e, mean_2) - square(mean_2)
    phi, mean_phi = f_1 + (size - 1) * e, mean_1 + (size - 1) * mean_2
    return GradientMoments(
        coefficients=nothing + size * mean_1 + count * mean_2,
        # a difference of squares, which rounding may take below 0
        variance=size * spread(phi, mean_phi) + count * max(0.0, beyond_e),
        executions=len(rows),
        size=math.sqrt(largest),
        longest=pairs.kernel.longest,
    )


class _Pairs:
    """g of batches in which all but two sequences are o."""

    def __init__(
        self, loss: LossOnSupport, drawn: Tensor, size: int, coordinates: Coordinates, edges: int
    ):
        self.loss, self.drawn, self.size, self.edges = loss, drawn, size, edges
        self.kernel = Kernel(coordinates, edges, drawn.device)

    def gradients(self, chosen: Tensor) -> Tensor:
        """As coefficients [X,E], for X choices of at most two sequences [X,k]."""
        rows = torch.stack([_filled(some, self.drawn[0], self.size) for some in chosen])
        log_weight = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        parts = self.loss.executions(rows, log_weight, vmap=True, max_executions=len(rows))
        dense = dense_coefficients(contributions_of(self.loss, parts), self.edges)
        return torch.cat([some for some, _ in dense])

    def contributions(
        self, pairs: Tensor, log_weight: Tensor
    ) -> Iterator[tuple[Tensor, Contributions]]:
        """Chunks of the pairs [X,2] of places in `drawn`, and what they contribute; the copies of o
        touch the same edges, and count together.
        """
        rows = torch.full((len(pairs), self.size), int(self.drawn[0]), device=pairs.device)
        rows[:, :2] = self.drawn[pairs]
        parts = self.loss.executions(rows, log_weight, vmap=True, max_executions=len(rows))
        seen = 0
        for part in contributions_of(self.loss, parts):
            some = pairs[seen : seen + len(part.edges)]
            seen += len(some)
            yield some, self._copies_together(part)

    def _copies_together(self, part: Contributions) -> Contributions:
        edges, depths, coefficients, start = [], [], [], 0
        # entries stand field by field, and within a field sequence by sequence
        for width in self.loss.widths:
            each = part.coefficients[:, start : start + self.size * width]
            each = each.unflatten(1, (self.size, width))
            copies = each[:, 2:].sum(1, keepdim=True)
            coefficients.append(torch.cat([each[:, :2], copies], 1).flatten(1))
            # the edges of the pair and of the first o, which stands for all its copies
            edges.append(part.edges[:, start : start + 3 * width])
            depths.append(part.depths[start : start + 3 * width])
            start += self.size * width
        return Contributions(
            torch.cat(edges, 1), torch.cat(depths), torch.cat(coefficients, 1), part.log_weight
        )


def _filled(chosen: Tensor, anchor: Tensor, size: int) -> Tensor:
    """A batch [B] of the chosen sequences, and o in all other places."""
    return torch.cat([chosen, anchor.expand(size - len(chosen))])
