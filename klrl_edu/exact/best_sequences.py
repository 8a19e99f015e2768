"""The most probable sequences of a lattice's posterior: A* with the exact cost to go.

    V_L = 0,    V_t(c,s) = max_v [log p_t(v|c,s) + V_{t+1}(c', δ(s,v))]                          (1)

A prefix is worth what it has, log π* so far, and by (1) the most that it can still get; prefixes
are opened by their worth, so whole sequences leave the heap in the order of their probability.
Hart, Nilsson & Raphael (1968). Letters as in `lattice.py`; logs in nats.
"""

import heapq
import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import check_count
from klrl_edu.core.weighted import WeightedSequences
from klrl_edu.exact.chain import PosteriorChain
from klrl_edu.exact.lattice import Lattice

_ENDED = -1  # the pair of a sequence that ended by EOS


class _Prefix(NamedTuple):
    """An entry of the heap: the least leaves first, so worth and length stand negated."""

    minus_worth: float
    minus_length: int
    tokens: tuple[int, ...]
    pair: int
    so_far: float


def best_sequences(chain: PosteriorChain, k: int) -> WeightedSequences:
    """The k most probable sequences with log π*(y), best first.

    They are fewer than k where the support is smaller.

    Raises:
        InputError: k < 1, or hidden contexts, under which a sequence is a sum over paths.
    """
    check_count(k, "k")
    lattice = chain.lattice
    if lattice.hidden:
        raise InputError(
            "the most probable sequences under a hidden Markov prior are no shortest paths;"
            " draw samples instead."
        )
    tables = [logspace.log_normalize_alive(chain.word_log_weights(t)) for t in range(lattice.words)]
    to_go = _best_to_go(lattice, tables)
    end = lattice.space.vocab_size - 1
    start = chain.start_pair()
    heap = [_Prefix(-float(to_go[0][start]), 0, (), start, 0.0)]
    found: list[_Prefix] = []
    while heap and len(found) < k:
        prefix = heapq.heappop(heap)
        t = -prefix.minus_length
        # nothing that still waits is worth more: a whole sequence here is the next best
        if prefix.pair == _ENDED or t == lattice.words:
            found.append(prefix)
            continue
        for token, log_p in enumerate(tables[t][prefix.pair].tolist()):
            if log_p == -math.inf:
                continue
            so_far = prefix.so_far + log_p
            if lattice.space.eos and token == end:
                pair, ahead = _ENDED, 0.0
            else:
                pair = int(lattice.next_pair[prefix.pair, token])
                ahead = float(to_go[t + 1][pair])
            tokens = (*prefix.tokens, token)
            heapq.heappush(heap, _Prefix(-(so_far + ahead), -t - 1, tokens, pair, so_far))
    return WeightedSequences(
        lattice.space,
        torch.tensor([_padded(prefix.tokens, lattice) for prefix in found]),
        torch.tensor([prefix.so_far for prefix in found], dtype=torch.float64),
        exact=True,
    )


def _best_to_go(lattice: Lattice, tables: list[Tensor]) -> list[Tensor]:
    """(1) for t = 0 … L, each [C·S], from log p_t [C·S,V]."""
    words = lattice.next_pair.shape[-1]
    best = [lattice.log_initial.new_zeros(lattice.pairs)]
    for table in reversed(tables):
        ahead = (table[:, :words] + best[-1][lattice.next_pair]).amax(-1)
        if lattice.space.eos:  # to end here and now is another way on
            ahead = torch.maximum(ahead, table[:, -1])
        best.append(ahead)
    return best[::-1]


def _padded(tokens: tuple[int, ...], lattice: Lattice) -> list[int]:
    """T tokens: EOS is absorbing, and forced at T."""
    end = lattice.space.vocab_size - 1
    return list(tokens) + [end] * (lattice.space.max_length - len(tokens))
