"""Exercises of t02. Why does reward alone collapse?"""

import math
import random
from typing import Any

from klrl_edu import reference
from klrl_edu.exercises.judging import Exercise, Mistake, Table
from klrl_edu.exercises.pieces import OTHER_WAY, normalised, random_table, tilted, times
from klrl_edu.problems.examples import FOUR_REWARDS, FOUR_SENTENCES

# two sentences share the best reward
TIED_REWARDS = {"the cat": 2.0, "the dog": 0.0, "a cat": 0.0, "a dog": 2.0}

STEP_SIZE = 0.1


def _step(pi: Table, r: Table, eta: float) -> Table:
    """One multiplicative step: π e^{ηr}, normalised."""
    return normalised(tilted(pi, times(eta, r)))


def _step_inputs(generator: random.Random) -> tuple[Any, ...]:
    return (
        random_table(generator),
        {y: generator.gauss(0, 1) for y in "abcd"},
        generator.uniform(0.05, 0.5),
    )


def _steps_until(probability: float) -> int:
    """The first k with P('a dog') > probability after k steps from q."""
    pi, k = dict(FOUR_SENTENCES), 0
    while pi["a dog"] <= probability:
        pi, k = _step(pi, FOUR_REWARDS, STEP_SIZE), k + 1
    return k


def _best(r: Table) -> list[Any]:
    return [y for y in r if r[y] == max(r.values())]


def _point_mass(y: Any, p: Table) -> Table:
    return {x: float(x == y) for x in p}


EXERCISES = (
    Exercise(
        "t02.step",
        _step,
        "",
        (
            Mistake(
                "That is π + ηr: probabilities are multiplied by e^(ηr), not added to.",
                lambda pi, r, eta: {y: pi[y] + eta * r[y] for y in pi},
            ),
            Mistake(
                "That multiplies by 1 + ηr, the first two terms of e^(ηr); use math.exp.",
                lambda pi, r, eta: normalised({y: pi[y] * (1 + eta * r[y]) for y in pi}),
            ),
            Mistake(
                "That multiplies by e^(r/η); a small η must be a small step, e^(ηr).",
                lambda pi, r, eta: _step(pi, r, 1 / eta),
            ),
            Mistake(
                "That is a softmax of ηr; it forgets the probabilities that the step starts from.",
                lambda pi, r, eta: reference.softmax(times(eta, r)),
            ),
        ),
        "weight[y] = pi[y] * math.exp(eta * r[y]), then divide by the sum",
        _step_inputs,
    ),
    Exercise(
        "t02.steps",
        lambda: _steps_until(0.99),
        "",
        (
            Mistake(
                "That is the last step with P('a dog') ≤ 0.99; the first one above it is asked.",
                lambda: _steps_until(0.99) - 1,
            ),
            Mistake(
                "One too many: start to count at k = 0, where π is q.",
                lambda: _steps_until(0.99) + 1,
            ),
        ),
        "a loop from q, counting steps until pi['a dog'] > 0.99",
    ),
    Exercise(
        "t02.limit",
        lambda: reference.kl(_point_mass("a dog", FOUR_SENTENCES), FOUR_SENTENCES),
        "nats",
        (
            Mistake(
                "That is log 4, which is right only where q is uniform.",
                lambda: math.log(len(FOUR_SENTENCES)),
            ),
            Mistake(
                "That is the entropy of q. What remains is one sentence, of probability 1.",
                lambda: reference.entropy(FOUR_SENTENCES),
            ),
            Mistake(OTHER_WAY, lambda: math.inf),
        ),
        "all mass on 'a dog': one term is left in the sum",
    ),
    Exercise(
        "t02.tie",
        lambda: normalised(
            {y: FOUR_SENTENCES[y] if y in _best(TIED_REWARDS) else 0.0 for y in FOUR_SENTENCES}
        ),
        "",
        (
            Mistake(
                "That shares equally between the two best; every step multiplies both by the same"
                " factor, so they keep the ratio that q gives them.",
                lambda: {
                    y: float(y in _best(TIED_REWARDS)) / len(_best(TIED_REWARDS))
                    for y in FOUR_SENTENCES
                },
            ),
            Mistake(
                "That is the limit for the old rewards, where 'a dog' alone is best.",
                lambda: _point_mass("a dog", FOUR_SENTENCES),
            ),
            Mistake(
                "All mass on one of the two best; but every step multiplies both by the same"
                " factor.",
                lambda: _point_mass(_best(TIED_REWARDS)[0], FOUR_SENTENCES),
            ),
        ),
        "which sentences lose their mass? What happens to the ratio of the others?",
    ),
)
