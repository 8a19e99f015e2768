"""What a loss or an estimator must not do, looked for before it is averaged: each fault is named,
with the batch that shows it.

Change its inputs, draw from a global generator, give two results for one batch, depend on the order
of the batch. (Not a scalar, not finite, no gradient: `differentiation` and `values`.) B sequences a
batch, X batches, n numbers a result.
"""

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from numpy.random import get_state
from torch import Tensor

from klrl_edu.audit.subjects import Subject
from klrl_edu.core.errors import InputError

_PROBES = 6  # batches that are looked at closely
_MOST_OUTCOMES = 10_000  # of a function's own draws on one probed batch


@contextmanager
def no_global_randomness(what: str) -> Iterator[None]:
    """Refuses work that moves a global generator of torch, numpy or Python.

    Raises:
        InputError: it did; names the generator.
    """
    before = _generator_states()
    try:
        yield
    except InputError:
        _refuse_moved(before, what)  # what else went wrong may come from there
        raise
    _refuse_moved(before, what)


def _refuse_moved(before: dict[str, object], what: str) -> None:
    for generator, state in _generator_states().items():
        if state != before[generator]:
            raise InputError(
                f"{what} draws from the global generator of {generator}, so its outcomes cannot be"
                " enumerated; take a parameter `draw` and draw through it: draw(log_probs) ->"
                " index."
            ) from None


def _generator_states() -> dict[str, object]:
    return {
        # as bytes and tuples, which compare as a whole
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(get_state()),
        "Python": random.getstate(),
    }


def probe(subject: Subject, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Looks closely at a few of the batches rows [X,B], those with most different sequences first.

    Returns:
        Some batches [x,B] and the results on them [x,n]; no results where the function draws.

    Raises:
        InputError: a fault, by its name.
    """
    picked, what = _most_varied(rows), f"the {subject.kind} {subject.name}"
    results = picked[:0]
    if not subject.draws:
        with no_global_randomness(what):
            changed = subject.changed_input(picked[0])
        if changed is not None:
            raise InputError(
                f"{what} changes its input batch.{changed} in place; work on a copy:"
                f" batch.{changed}.clone()."
            )
        results = torch.stack([subject.one(batch) for batch in picked])
        # to the last bit, as the same work on the same numbers rounds alike
        if not torch.equal(subject.one(picked[0]), results[0]):
            raise InputError(
                f"{what} gives two results for one batch {subject.describe(picked[0])}: it keeps a"
                " state, or draws from a generator of its own; take a parameter `draw` and draw"
                " through it."
            )
    return picked, results


def check_rotated(subject: Subject, picked: Tensor, results: Tensor, *, vmap: bool) -> None:
    """What only a rotation shows, on the batches [x,B] that were looked at closely; reversed, every
    batch is looked at when it is run.

    Raises:
        InputError: the order of a batch means something.
    """
    order = subject.orders(picked.shape[1]).get("rotated")
    if order is None or subject.block == 2 * subject.width:  # of two, it is the reversal
        return
    if not subject.draws:
        subject.check_order(picked, results, order, "rotated", vmap)
        return
    for batch in picked:
        if not subject.same(
            average_over_draws(subject, batch[order]), average_over_draws(subject, batch)
        ):
            subject.refuse_order(batch, "rotated")


def _most_varied(rows: Tensor) -> Tensor:
    """A few of the batches [X,B] that hold the most different sequences, spread over all
    of them.
    """
    # sorted, unequal neighbours count the different sequences, less one
    different = (rows.sort(-1).values.diff(dim=-1) != 0).sum(-1)
    # equal sequences hide where the place in the batch counts
    best = (different == different.max()).nonzero().squeeze(-1)
    count = min(_PROBES, len(best))
    evenly = torch.linspace(0, len(best) - 1, count, device=rows.device).long()
    return rows[best[evenly]]


def average_over_draws(subject: Subject, rows: Tensor) -> Tensor:
    """What a function does on a batch [B] whatever its order, averaged over its own draws."""
    if not subject.draws:
        return subject.unordered(rows, subject.one(rows))
    results, log_probs = subject.outcomes(rows, _MOST_OUTCOMES, _MOST_OUTCOMES)
    return subject.unordered(rows, torch.exp(log_probs) @ results)
