"""Every batch of B independent draws from S outcomes: in each of its orders, as a multiset, or as
blocks of multisets that stand in a row.

A multiset is all that a loss sees where the order is nothing to it.

    P(multiset) = B!/Π_y n_y! · Π_y p(y)^{n_y},    C(S+B−1, B) of them; S^B orders               (1)
    P(blocks)   = Π over the blocks, each drawn on its own                                       (2)

S outcomes, B batch size, X batches; logs in nats.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def every_order(log_probs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Every batch in every order.

    Args:
        log_probs: [S] in nats, of the distribution that draws.

    Returns:
        rows [S^B,B] in lexicographic order, and the log-probability of each [S^B].
    """
    outcomes = range(len(log_probs))
    rows = _table(itertools.product(outcomes, repeat=size), len(log_probs) ** size, size)
    rows = rows.to(log_probs.device)
    return rows, log_probs[rows].sum(-1)


def count_multisets(outcomes: int, size: int) -> int:
    """C(S+B−1, B), exactly."""
    return math.comb(outcomes + size - 1, size)


def multisets(log_probs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Every multiset of `size` outcomes that can be drawn.

    Args:
        log_probs: [S] in nats, of the distribution that draws; −inf is never drawn.

    Returns:
        rows [X,B], ascending, and the log-probability of each multiset [X] by (1).
    """
    drawn = (log_probs > -math.inf).nonzero().squeeze(-1)
    batches = itertools.combinations_with_replacement(range(len(drawn)), size)
    index = _table(batches, count_multisets(len(drawn), size), size)
    rows = drawn[index.to(log_probs.device)]
    return rows, _log_orders(rows) + log_probs[rows].sum(-1)


def blocks(
    laws: Sequence[Tensor], starts: Sequence[int], size: int, times: int = 1
) -> tuple[Tensor, Tensor]:
    """Every batch of blocks in a row: `times` multisets of `size` outcomes from each law.

    Args:
        laws: log-probabilities [S_m] of each law, in nats.
        starts: what the first outcome of each law is called.
        size: outcomes a block.
        times: blocks a law, which lie side by side.

    Returns:
        rows [X, laws·times·size], ascending within a block, and log-probabilities [X] by (2).
    """
    each = [multisets(law, size) for law in laws]
    names = [rows + start for (rows, _), start in zip(each, starts, strict=True)]
    counts = [torch.arange(len(rows), device=rows.device) for rows, _ in each]
    repeated = [count for count in counts for _ in range(times)]
    picked = torch.cartesian_prod(*repeated).view(-1, len(repeated))
    of_block = picked.unbind(1)
    rows = torch.cat([names[k // times][index] for k, index in enumerate(of_block)], 1)
    log_weight = sum(each[k // times][1][index] for k, index in enumerate(of_block))
    return rows, torch.as_tensor(log_weight)


def count_blocks(outcomes: Sequence[int], size: int, times: int = 1) -> int:
    """How many batches `blocks` gives, exactly."""
    return math.prod(count_multisets(each, size) for each in outcomes) ** times


def _table(batches: Iterable[tuple[int, ...]], count: int, size: int) -> Tensor:
    """`count` batches of indices as a tensor [count,size]."""
    flat = itertools.chain.from_iterable(batches)
    table = np.fromiter(flat, dtype=np.int64, count=count * size)
    return torch.from_numpy(table.reshape(count, size))


def _log_orders(rows: Tensor) -> Tensor:
    """log B!/Π n_y! [X] of ascending rows [X,B]."""
    # equal entries stand side by side: the k-th copy of an outcome divides by k
    run = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    total = torch.full_like(run, math.lgamma(rows.shape[1] + 1))
    for column in range(1, rows.shape[1]):
        run = torch.where(rows[:, column] == rows[:, column - 1], run + 1, 1.0)
        total = total - run.log()
    return total
