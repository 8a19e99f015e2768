"""Problems and policies as the dictionaries of `reference.py`, and as mpmath numbers: the oracles
of these tests.
"""

import math

import mpmath
import torch
from torch import Tensor

from klrl_edu import reference
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.problem import Problem

INF = math.inf


def live_tuples(space: SequenceSpace, tokens: Tensor) -> list[tuple[int, ...]]:
    """Each sequence as the tuple of its live tokens, EOS included: no tuple is a prefix of
    another.
    """
    return [
        tuple(row[: sum(live)])
        for row, live in zip(tokens.tolist(), space.live(tokens).tolist(), strict=True)
    ]


def table_dict(table: SequenceTable) -> dict:
    """A SequenceTable as outcome -> probability, by plain softmax."""
    return reference.softmax(
        dict(zip(live_tuples(table.space, table.tokens), table.logits.tolist(), strict=True))
    )


def reward_dict(problem: Problem) -> dict:
    """Outcome -> reward, one sequence at a time, NaN where the prior has no mass."""
    prior = problem.prior
    rewards = {}
    for key, row, logit in zip(
        live_tuples(prior.space, prior.tokens), prior.tokens, prior.logits.tolist(), strict=True
    ):
        value = problem.reward(row[None], None)
        rewards[key] = float(value.sum()) if logit > -INF else math.nan
    return rewards


def text_dict(space: SequenceSpace, tokens: Tensor, values: Tensor) -> dict:
    """Text -> value."""
    return dict(zip(space.decode(tokens), values.tolist(), strict=True))


def mpmath_posterior(problem: Problem) -> tuple[dict, mpmath.mpf, mpmath.mpf]:
    """(outcome -> (log q, log π*), value, the largest |log q| or 1) for 0 < λ < inf, in 50
    digits.
    """
    with mpmath.workdps(50):
        keys = live_tuples(problem.space, problem.prior.tokens)
        logits = {
            key: mpmath.mpf(x)
            for key, x in zip(keys, problem.prior.logits.tolist(), strict=True)
            if x > -INF
        }
        total = mpmath.log(mpmath.fsum(mpmath.exp(x) for x in logits.values()))
        log_q = {key: x - total for key, x in logits.items()}
        rewards = {key: r for key, r in reward_dict(problem).items() if key in log_q and r > -INF}
        top, lam = mpmath.mpf(max(rewards.values())), mpmath.mpf(problem.kl_coef)
        tilted = {key: log_q[key] + (mpmath.mpf(r) - top) / lam for key, r in rewards.items()}
        residual = mpmath.log(mpmath.fsum(mpmath.exp(x) for x in tilted.values()))
        log_posterior = {
            key: (log_q[key], tilted[key] - residual if key in tilted else -mpmath.inf)
            for key in log_q
        }
        scale = max([mpmath.mpf(1), *(abs(x) for x in log_q.values())])
        return log_posterior, top + lam * residual, scale


def assert_close(
    seen: float | Tensor, expected: float | Tensor, scale: float = 1.0, tolerance: float = 1e-12
) -> None:
    """Equal infinities, or a difference within `tolerance` of the largest of 1, |expected| and
    `scale`.
    """
    seen, expected = (
        torch.as_tensor(seen, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
    )
    assert seen.shape == expected.shape, (seen.shape, expected.shape)
    finite = expected[torch.isfinite(expected)].abs()
    largest = max([1.0, scale, *finite.reshape(-1).tolist()])
    same = (seen == expected) | ((seen - expected).abs() <= tolerance * largest)
    assert bool(same.all()), (
        f"{seen.tolist()} is not {expected.tolist()} within {tolerance:g} of {largest:g}"
    )
