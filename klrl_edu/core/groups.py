"""Sums over groups of outcomes: along a dimension, or over the entries of each segment.

    log E_q[e^x] = log1p(Σ q (e^x − 1))                                                          (1)

Near 0 the right side of (1) keeps the digits that the left loses: they are those of x, and not
those of 1 + x. What is written for groups holds for vectors, for a lattice's tables and for the
edges of a trie alike. Logs in nats.
"""

import math

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.validation import SUM_TOLERANCE, any_known

# a logarithm above this loses under 1e-15 of itself to the rounding of its sum
_WELL_ABOVE_ZERO = 0.5


class Groups:
    """Entries [...] in groups; a subclass says which belong together."""

    def amax(self, x: Tensor) -> Tensor:
        """The largest of each group."""
        raise NotImplementedError

    def sum(self, x: Tensor) -> Tensor:
        """The sum of each group."""
        raise NotImplementedError

    def logsumexp(self, x: Tensor) -> Tensor:
        """log Σ e^x of each group; −inf where it has no mass."""
        raise NotImplementedError

    def spread(self, x: Tensor) -> Tensor:
        """A number a group, at each of its entries."""
        raise NotImplementedError

    def log_mean_exp(self, log_q: Tensor, x: Tensor) -> Tensor:
        """(1) of each group, with full relative accuracy also near 0.

        Args:
            log_q: log-probabilities, whose sum is taken for 1, rounded (unnormalised ones keep
                their sum, and the plain form).
            x: in nats; −inf forbids.

        Gradients follow both arguments: e^x q/E_q[e^x] to log q and to x.
        """
        plain = self.logsumexp(log_q + x)
        near = plain.detach().abs() < _WELL_ABOVE_ZERO
        if any_known(near) is False:
            return plain
        q = torch.exp(log_q)
        mass = self.sum(q)
        near = near & ((mass.detach() - 1).abs() <= SUM_TOLERANCE)
        inside = self.spread(near)
        # a group that is far from 0 takes the other form: a row of zeros is harmless to this one
        small = torch.where(inside & (x < 1), x, torch.zeros_like(x))
        large = torch.where(inside & (x >= 1), log_q + x, -math.inf)
        # q·expm1(x), and e^{log q + x} − q where e^x alone may overflow
        gains = torch.where(inside & (x >= 1), torch.exp(large) - q, q * torch.expm1(small))
        # no change of the value, but Σq has a gradient, which (1) must not lose
        excess = (self.sum(gains) + (mass - mass.detach())) / mass.detach()
        excess = torch.where(near, excess, torch.zeros_like(excess))
        return torch.where(near, torch.log1p(excess), plain)


class Rows(Groups):
    """Groups along one dimension."""

    def __init__(self, dim: int = -1):
        self.dim = dim

    def amax(self, x: Tensor) -> Tensor:
        return x.amax(self.dim)

    def sum(self, x: Tensor) -> Tensor:
        return x.sum(self.dim)

    def logsumexp(self, x: Tensor) -> Tensor:
        return logspace.logsumexp(x, self.dim)

    def spread(self, x: Tensor) -> Tensor:
        return x.unsqueeze(self.dim)


class Segments(Groups):
    """Entries [E] of `count` groups: `index` [E] says which each belongs to."""

    def __init__(self, index: Tensor, count: int):
        self.index, self.count = index, count

    def amax(self, x: Tensor) -> Tensor:
        return x.new_full((self.count,), -math.inf).scatter_reduce(0, self.index, x, "amax")

    def sum(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.count).index_add(0, self.index, x)

    def logsumexp(self, x: Tensor) -> Tensor:
        return logspace.segment_logsumexp(x, self.index, self.count)

    def spread(self, x: Tensor) -> Tensor:
        return x[self.index]
