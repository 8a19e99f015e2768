"""Exercises of t05. One optimum, four routes? values, Q-learning, planning, policy gradient"""

import math
import random
from collections.abc import Callable
from typing import Any

from klrl_edu import reference
from klrl_edu.exercises.judging import Exercise, Mistake, Table
from klrl_edu.exercises.pieces import (
    OTHER_WAY,
    marginals,
    normalised,
    posterior,
    random_table,
    tilted,
    times,
)
from klrl_edu.problems.examples import FOUR_REWARDS, FOUR_SENTENCES

# Q-learning
# --------------------------------------------------------------------------------------------------


def _soft(prior: Table, values: Table, lam: float) -> float:
    """λ log Σ_a q(a) e^{Q(a)/λ}."""
    return lam * math.log(math.fsum(prior[a] * math.exp(values[a] / lam) for a in prior))


def _update(
    old: float, reward: float, prior: Table, values: Table, lam: float, gamma: float, alpha: float
) -> float:
    """(1 − α)Q + α(r + γV)."""
    return (1 - alpha) * old + alpha * (reward + gamma * _soft(prior, values, lam))


def _hard_update(look_ahead: Callable[[Table, Table], float]) -> Callable[..., float]:
    """The update with another value of what follows."""
    return lambda old, reward, prior, values, lam, gamma, alpha: (
        (1 - alpha) * old + alpha * (reward + gamma * look_ahead(prior, values))
    )


def _update_inputs(generator: random.Random) -> tuple[Any, ...]:
    prior = random_table(generator)
    values = {a: generator.gauss(0, 1) for a in prior}
    old, reward = generator.gauss(0, 1), generator.gauss(0, 1)
    return (
        old,
        reward,
        prior,
        values,
        generator.uniform(0.2, 3.0),
        generator.uniform(0.3, 0.95),
        generator.uniform(0.1, 0.4),
    )


def _first_word_by_the_maximum(prior: Table) -> Table:
    """q(first)·exp(best reward behind it), at λ = 1; the prior may be left out by giving ones."""
    best = {a: max(r for y, r in FOUR_REWARDS.items() if y.startswith(f"{a} ")) for a in prior}
    return normalised(tilted(prior, best))


def _gap_at_the_first_word(first: Table) -> float:
    """λ KL(first word‖π*(first word)), λ = 1: what a policy lacks whose second words are right."""
    return reference.kl(first, marginals(posterior(1.0))[0])


def _greedy_gap() -> float:
    """λ log Z − J of the policy that always says 'a dog', λ = 1."""
    return -math.log(posterior(1.0)["a dog"])


# Policy gradient
# --------------------------------------------------------------------------------------------------


def _advantage(pi: Table, q: Table, r: Table, lam: float) -> Table:
    """r − λ log π/q − J."""
    return {y: r[y] - lam * math.log(pi[y] / q[y]) - reference.objective(pi, q, r, lam) for y in pi}


def _gradient(pi: Table, q: Table, r: Table, lam: float) -> Table:
    """∂J/∂θ(y) = π(y)(r(y) − λ log π(y)/q(y) − J)."""
    return {y: pi[y] * a for y, a in _advantage(pi, q, r, lam).items()}


def _gradient_inputs(generator: random.Random) -> tuple[Any, ...]:
    pi, q = random_table(generator), random_table(generator)
    return pi, q, {y: generator.gauss(0, 1) for y in pi}, generator.uniform(0.2, 3.0)


def _natural_step(pi: Table, q: Table, r: Table, lam: float, eta: float) -> Table:
    """π·exp(η(r − λ log π/q)), normalised."""
    return normalised(tilted(pi, times(eta, _advantage(pi, q, r, lam))))


def _plain_step(pi: Table, q: Table, r: Table, lam: float, eta: float) -> Table:
    """Logits moved by η∇J."""
    return normalised(tilted(pi, times(eta, _gradient(pi, q, r, lam))))


def _natural_inputs(generator: random.Random) -> tuple[Any, ...]:
    return (*_gradient_inputs(generator), generator.uniform(0.1, 0.3))


# A world that answers
# -----------------------------------------------------------------------------------------------


def _action_value(reward: float, replies: Table, values: Table, lam: float, gamma: float) -> float:
    """r + γ Σ P(s') V(s')."""
    return reward + gamma * math.fsum(replies[s] * values[s] for s in replies)


def _replies_inputs(generator: random.Random) -> tuple[Any, ...]:
    replies = random_table(generator, "xyz")
    values = {s: generator.gauss(0, 1) for s in replies}
    return (
        generator.gauss(0, 1),
        replies,
        values,
        generator.uniform(0.2, 3.0),
        generator.uniform(0.3, 0.95),
    )


EXERCISES = (
    Exercise(
        "t05.update",
        _update,
        "reward units",
        (
            Mistake(
                "That takes the largest Q of what follows; take its soft value under the prior.",
                _hard_update(lambda q, v: max(v.values())),
            ),
            Mistake(
                "That takes the prior's mean of what follows, which is the value of q, not of the"
                " optimum.",
                _hard_update(lambda q, v: math.fsum(q[a] * v[a] for a in q)),
            ),
            Mistake(
                "That forgets the prior in the soft value: weigh exp(Q/λ) by q(a).",
                lambda old, r, q, v, lam, gamma, alpha: _update(
                    old, r, dict.fromkeys(q, 1.0), v, lam, gamma, alpha
                ),
            ),
            Mistake(
                "The target goes in whole there: α belongs before it, so that the new Q is a mean"
                " of the old one and the target.",
                lambda old, r, q, v, lam, gamma, alpha: (
                    (1 - alpha) * old + r + gamma * _soft(q, v, lam)
                ),
            ),
            Mistake(
                "That weighs the reward by α and what follows by 1 − α, and forgets the old Q.",
                lambda old, r, q, v, lam, gamma, alpha: (
                    alpha * r + (1 - alpha) * gamma * _soft(q, v, lam)
                ),
            ),
            Mistake(
                "α and 1 − α have changed places.",
                lambda old, r, q, v, lam, gamma, alpha: _update(
                    old, r, q, v, lam, gamma, 1 - alpha
                ),
            ),
            Mistake(
                "The reward is missing from the target.",
                lambda old, r, q, v, lam, gamma, alpha: _update(old, 0.0, q, v, lam, gamma, alpha),
            ),
            Mistake(
                "γ is missing before the value of what follows.",
                lambda old, r, q, v, lam, gamma, alpha: _update(old, r, q, v, lam, 1.0, alpha),
            ),
        ),
        "(1 − α)·old + α·(r + γ V), with V = λ log Σ q·exp(Q/λ)",
        _update_inputs,
    ),
    Exercise(
        "t05.hard",
        lambda: _gap_at_the_first_word(_first_word_by_the_maximum(marginals(FOUR_SENTENCES)[0])),
        "reward units",
        (
            Mistake(
                OTHER_WAY,
                lambda: reference.kl(
                    marginals(posterior(1.0))[0],
                    _first_word_by_the_maximum(marginals(FOUR_SENTENCES)[0]),
                ),
            ),
            Mistake(
                "That policy forgets the prior at the first word: π ∝ q·exp(Q/λ).",
                lambda: _gap_at_the_first_word(
                    _first_word_by_the_maximum(dict.fromkeys(marginals(FOUR_SENTENCES)[0], 1.0))
                ),
            ),
            Mistake(
                "That is the gap of the greedy policy, which always says 'a dog'; here π ∝"
                " q·exp(Q/λ).",
                _greedy_gap,
            ),
            Mistake(
                "That is the gap of the prior.",
                lambda: reference.kl(FOUR_SENTENCES, posterior(1.0)),
            ),
        ),
        "only the first word is wrong, so the gap is λ times the KL of the first word's law to"
        " π*'s",
    ),
    Exercise(
        "t05.gradient",
        _gradient,
        "reward units",
        (
            Mistake(
                "Those do not sum to 0, but adding a constant to all logits changes nothing:"
                " subtract J.",
                lambda pi, q, r, lam: {
                    y: pi[y] * (r[y] - lam * math.log(pi[y] / q[y])) for y in pi
                },
            ),
            Mistake(
                "That is the gradient of E[r] alone; the KL term is missing.",
                lambda pi, q, r, lam: {
                    y: pi[y] * (r[y] - reference.expectation(pi, lambda z: r[z])) for y in pi
                },
            ),
            Mistake(
                "That is the advantage, without the factor π(y) that a logit's derivative brings.",
                _advantage,
            ),
            Mistake(
                "That points downhill: it is −∇J.",
                lambda pi, q, r, lam: times(-1.0, _gradient(pi, q, r, lam)),
            ),
        ),
        "π(y)·(r(y) − λ log π(y)/q(y) − J)",
        _gradient_inputs,
    ),
    Exercise(
        "t05.natural",
        _natural_step,
        "",
        (
            Mistake(
                "That multiplies by exp(η r) alone and never feels the prior; the KL term belongs"
                " in the exponent.",
                lambda pi, q, r, lam, eta: normalised(tilted(pi, times(eta, r))),
            ),
            Mistake(
                "That starts from the prior; the step starts from π.",
                lambda pi, q, r, lam, eta: normalised(tilted(q, times(eta, r))),
            ),
            Mistake("That is the plain gradient's step: leave out the factor π(y).", _plain_step),
            Mistake(
                "That is the posterior itself, which only a step of η = 1/λ reaches.",
                lambda pi, q, r, lam, eta: reference.posterior(q, r, lam)[0],
            ),
        ),
        "π(y)·exp(η(r(y) − λ log π(y)/q(y))), normalised",
        _natural_inputs,
    ),
    Exercise(
        "t05.replies",
        _action_value,
        "reward units",
        (
            Mistake(
                "That takes a soft value over the replies, as if they were ours to choose; they are"
                " the world's: take their plain mean.",
                lambda r, replies, values, lam, gamma: r + gamma * _soft(replies, values, lam),
            ),
            Mistake(
                "That counts on the best reply.",
                lambda r, replies, values, lam, gamma: r + gamma * max(values.values()),
            ),
            Mistake(
                "That counts on the most likely reply alone; take the mean over all.",
                lambda r, replies, values, lam, gamma: (
                    r + gamma * values[max(replies, key=lambda s: replies[s])]
                ),
            ),
            Mistake(
                "γ is missing before the value of what follows.",
                lambda r, replies, values, lam, gamma: _action_value(r, replies, values, lam, 1.0),
            ),
            Mistake(
                "γ discounts what comes next, not the reward of now.",
                lambda r, replies, values, lam, gamma: (
                    gamma * _action_value(r, replies, values, lam, 1.0)
                ),
            ),
        ),
        "r + γ·Σ P(s')·V(s')",
        _replies_inputs,
    ),
)
