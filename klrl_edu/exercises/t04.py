"""Exercises of t04. Where is the posterior, token by token?"""

import math
import random
from typing import Any

from klrl_edu import reference
from klrl_edu.exercises.judging import Exercise, Mistake, Table
from klrl_edu.exercises.pieces import marginals, posterior, random_table
from klrl_edu.problems.examples import FOUR_REWARDS, FOUR_SENTENCES

NEW_KL_COEF = 0.5


def _soft_value(prior: Table, values: Table, lam: float) -> float:
    """λ log Σ_a q(a) e^{Q(a)/λ}."""
    return lam * math.log(math.fsum(prior[a] * math.exp(values[a] / lam) for a in prior))


def _soft_policy(prior: Table, values: Table, lam: float) -> Table:
    """q(a) e^{(Q(a) − V)/λ}."""
    value = _soft_value(prior, values, lam)
    return {a: prior[a] * math.exp((values[a] - value) / lam) for a in prior}


def _values_inputs(generator: random.Random) -> tuple[Any, ...]:
    prior = random_table(generator)
    return prior, {a: generator.gauss(0, 1) for a in prior}, generator.uniform(0.2, 3.0)


def _value_of_first_words(lam: float) -> Table:
    """V(the), V(a)."""
    first = marginals(FOUR_SENTENCES)[0]
    found = {}
    for a in first:
        nexts = {y: q / first[a] for y, q in FOUR_SENTENCES.items() if y.startswith(f"{a} ")}
        found[a] = _soft_value(nexts, {y: FOUR_REWARDS[y] for y in nexts}, lam)
    return found


def _mean_reward_of_first_words() -> Table:
    """E_q[r | first word]."""
    first = marginals(FOUR_SENTENCES)[0]
    return {
        a: (
            math.fsum(
                q * FOUR_REWARDS[y] for y, q in FOUR_SENTENCES.items() if y.startswith(f"{a} ")
            )
            / first[a]
        )
        for a in first
    }


def _best_reward_of_first_words() -> Table:
    return {
        a: max(r for y, r in FOUR_REWARDS.items() if y.startswith(f"{a} "))
        for a in marginals(FOUR_SENTENCES)[0]
    }


def _first_word(lam: float) -> Table:
    """π*(first word)."""
    return marginals(posterior(lam))[0]


def _greedy_first_word() -> Table:
    """The first word tilted by its mean reward under q instead of its soft value."""
    first = marginals(FOUR_SENTENCES)[0]
    return _soft_policy(first, _mean_reward_of_first_words(), 1.0)


EXERCISES = (
    Exercise(
        "t04.value",
        _soft_value,
        "reward units",
        (
            Mistake(
                "That is log Σ q·exp(Q/λ), in nats; times λ it is in reward units.",
                lambda q, v, lam: _soft_value(q, v, lam) / lam,
            ),
            Mistake(
                "The exponent is Q/λ; yours is Q·λ.",
                lambda q, v, lam: lam * math.log(math.fsum(q[a] * math.exp(v[a] * lam) for a in q)),
            ),
            Mistake(
                "That forgets the prior: weigh exp(Q/λ) by q(a).",
                lambda q, v, lam: lam * math.log(math.fsum(math.exp(v[a] / lam) for a in q)),
            ),
            Mistake(
                "That is the mean of Q under the prior, the limit of large λ.",
                lambda q, v, lam: math.fsum(q[a] * v[a] for a in q),
            ),
            Mistake(
                "That is the largest Q, the limit of small λ.", lambda q, v, lam: max(v.values())
            ),
        ),
        "λ times the log of the prior's mean of exp(Q/λ)",
        _values_inputs,
    ),
    Exercise(
        "t04.prefixes",
        lambda: _value_of_first_words(NEW_KL_COEF),
        "reward units",
        (
            Mistake(
                "Those are the values at λ = 1; here λ = ½.", lambda: _value_of_first_words(1.0)
            ),
            Mistake(
                "Those are mean rewards under q, which is what λ → ∞ gives.",
                _mean_reward_of_first_words,
            ),
            Mistake(
                "Those are the best rewards in reach, which is what λ → 0 gives.",
                _best_reward_of_first_words,
            ),
        ),
        "the soft value over the second word, with q(second | first), for each first word",
    ),
    Exercise(
        "t04.first",
        lambda: _first_word(NEW_KL_COEF),
        "",
        (
            Mistake("That is π*(first word) at λ = 1; here λ = ½.", lambda: _first_word(1.0)),
            Mistake(
                "That is the prior's law of the first word.", lambda: marginals(FOUR_SENTENCES)[0]
            ),
            Mistake(
                "That tilts by the mean reward behind each word; tilt by its soft value V.",
                _greedy_first_word,
            ),
        ),
        "q(first)·exp(V(first)/λ), normalised; or sum π* over the second word",
    ),
    Exercise(
        "t04.policy",
        _soft_policy,
        "",
        (
            Mistake(
                "That is a softmax of Q/λ; it forgets the prior.",
                lambda q, v, lam: reference.softmax({a: x / lam for a, x in v.items()}),
            ),
            Mistake(
                "That subtracts nothing; e^{Q/λ} needs the value V taken out, or the sum"
                " divided by.",
                lambda q, v, lam: {a: q[a] * math.exp(v[a] / lam) for a in q},
            ),
        ),
        "q(a)·exp((Q(a) − V)/λ), with V from exercise 1",
        _values_inputs,
    ),
)
