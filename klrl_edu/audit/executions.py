"""What can happen when a batch is drawn: multisets of sequences with their multiplicities, instead
of all S^B orders.

    P(multiset) = B!/Π_y n_y! · Π_y π(y)^{n_y},    C(S+B−1, B) of them                           (1)

A loss that does not depend on the order of its batch has the same moments over multisets as over
orders. S sequences, B batch size, X executions.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from klrl_edu.core.errors import TooLargeError
from klrl_edu.models.contract import readable_count


def count_multisets(sequences: int, size: int) -> int:
    """C(S+B−1, B), exactly."""
    return math.comb(sequences + size - 1, size)


def check_executions(sequences: int, size: int, max_executions: int) -> int:
    """The number of multisets, if it is allowed.

    Raises:
        TooLargeError: it is not; before anything is allocated.
    """
    count = count_multisets(sequences, size)
    if count > max_executions:
        raise TooLargeError(
            f"batches of {size} out of {sequences:,} sequences are {readable_count(count)}"
            f" multisets, more than max_executions = {max_executions:,}; take a smaller batch_size"
            " or space, raise max_executions, or sample: monte_carlo=n with draw= and bound=."
        )
    return count


def multisets(log_probs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Every multiset of `size` sequences that can be drawn.

    Args:
        log_probs: [S] in nats, of the distribution that draws; −inf is never drawn.

    Returns:
        rows [X,B], ascending, and the log-probability of each multiset [X] by (1).
    """
    drawn = (log_probs > -math.inf).nonzero().squeeze(-1)
    count = count_multisets(len(drawn), size)
    flat = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(range(len(drawn)), size)
    )
    index = torch.from_numpy(
        np.fromiter(flat, dtype=np.int64, count=count * size).reshape(count, size)
    ).to(log_probs.device)
    rows = drawn[index]
    return rows, _log_orders(rows) + log_probs[rows].sum(-1)


def _log_orders(rows: Tensor) -> Tensor:
    """log B!/Π n_y! of ascending rows [X,B] -> [X]: the k-th copy of a sequence in a row divides by
    k.
    """
    run = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    total = torch.full_like(run, math.lgamma(rows.shape[1] + 1))
    for column in range(1, rows.shape[1]):
        run = torch.where(rows[:, column] == rows[:, column - 1], run + 1, 1.0)
        total = total - run.log()
    return total
