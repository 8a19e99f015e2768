"""The only door to randomness: a `Draw` turns rows of log-probabilities into indices.

    draw(log_probs [M,K], rows [N] | None) -> index [N]

N draws from M distinct rows; rows[i] says which row draw i takes, and None takes every row once.
Whoever writes a random program against this door can run it with a seed, or run it through every
outcome with the probability of each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.validation import check_count

Result = TypeVar("Result")
# an outcome with more of either is taken for one that never ends
_MOST_CHOICES, _MOST_DRAWS = 250, 100_000


class Draw(Protocol):
    """draw(log_probs [M,K] in nats, rows [N] or None) -> index [N], never an index of zero mass."""

    def __call__(self, log_probs: Tensor, rows: Tensor | None = None) -> Tensor: ...


def as_generator(seed: int | torch.Generator) -> torch.Generator:
    """A CPU generator from a seed; one that is given passes, to serve several calls."""
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(
            f"seed = {seed!r} must be a whole number from 0 to 2^63 − 1, or a torch.Generator."
        )
    return torch.Generator().manual_seed(seed)


def seeded_draw(seed: int | torch.Generator) -> Draw:
    """Draws by inverting the cumulative distribution in float64; one uniform a draw.

    The uniforms come from a CPU generator and move to the device of `log_probs`, so that a run uses
    the same ones on CPU and GPU.
    """
    generator = as_generator(seed)

    def draw(log_probs: Tensor, rows: Tensor | None = None) -> Tensor:
        logs = log_probs.detach().double()
        # relative to the largest, so that u·total rounds below the total also where a row's mass
        # underflows
        cumulative = (logs - logs.amax(-1, keepdim=True)).exp().cumsum(-1)
        if bool((~(cumulative[:, -1] > 0)).any()):
            raise InputError(
                "draw: a row of log_probs has no mass (or NaN); normalise the rows first."
            )
        if rows is not None:
            cumulative = cumulative.index_select(0, rows)
        uniform = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64)
        level = uniform.to(cumulative.device) * cumulative[:, -1:]
        # right=True: the first entry whose cumulative mass exceeds u·total, so an entry of zero
        # mass is never taken
        return torch.searchsorted(cumulative, level, right=True).squeeze(-1)

    return draw


class Execution(NamedTuple, Generic[Result]):
    """One outcome of a random program, and the log of its probability in nats."""

    result: Result
    log_prob: float


@dataclass
class _Choice:
    """One scalar draw: the indices that have mass, their log-probabilities, and which is taken."""

    options: list[int]
    log_probs: list[float]
    taken: int = 0


def enumerate_executions(
    program: Callable[[Draw], Result], max_executions: int = 100_000
) -> list[Execution[Result]]:
    """Every outcome of a random program with its log-probability: the program is run once for each.

    Args:
        program: takes a `Draw` and nothing random besides; must make the same calls when it gets
            the same answers.
        max_executions: the most outcomes to run.

    Raises:
        TooLargeError: there are more outcomes, or one of them does not end: it took 250 random
            choices, or 100,000 draws.
    """
    check_count(max_executions, "max_executions")
    # the path from the root of the tree of draws to the outcome that is being run
    choices: list[_Choice] = []
    branching = 0  # how many of them have more than one option
    executions: list[Execution[Result]] = []
    while True:
        if len(executions) == max_executions:
            raise TooLargeError(
                f"the program has more than max_executions = {max_executions:,} outcomes; shrink"
                " it, or sample with seeded_draw."
            )
        replayed = 0  # draws answered in this run: by the path first, then by new choices

        def draw(log_probs: Tensor, rows: Tensor | None = None) -> Tensor:
            nonlocal replayed, branching
            table = log_probs.detach().double()
            total = torch.logsumexp(table, -1, keepdim=True)
            if not bool(torch.isfinite(total).all()):
                raise InputError(
                    "draw: a row of log_probs has no mass (or NaN); normalise the rows first."
                )
            log_rows: list[list[float]] = (table - total).tolist()
            asked = range(len(log_rows)) if rows is None else rows.tolist()
            picked = []
            for row in asked:
                if replayed == len(choices):
                    logs = log_rows[row]
                    options = [k for k, value in enumerate(logs) if value > -math.inf]
                    choices.append(_Choice(options, [logs[k] for k in options]))
                    branching += len(options) > 1
                    if branching > _MOST_CHOICES or len(choices) > _MOST_DRAWS:
                        raise TooLargeError(
                            f"one outcome of the program took {len(choices):,} draws,"
                            f" {branching:,} of them random, and has not ended; end it, or sample"
                            " with seeded_draw."
                        )
                choice = choices[replayed]
                picked.append(choice.options[choice.taken])
                replayed += 1
            return torch.tensor(picked, dtype=torch.long, device=log_probs.device)

        result = program(draw)
        executions.append(Execution(result, math.fsum(c.log_probs[c.taken] for c in choices)))
        # to the next leaf: up from choices that are exhausted, and one option on
        while choices and choices[-1].taken == len(choices[-1].options) - 1:
            branching -= len(choices.pop().options) > 1
        if not choices:
            return executions
        choices[-1].taken += 1
