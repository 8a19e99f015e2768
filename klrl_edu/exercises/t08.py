"""Exercises of t08. When is the posterior tractable?"""

import itertools
import math
import random
from typing import Any

from klrl_edu.exercises.judging import Exercise, Mistake, Table
from klrl_edu.exercises.pieces import normalised

COUNTS = {"the cat": 4, "the dog": 3, "a cat": 2, "a dog": 1}
# a bigram over two words, and its law of three words
START = {"a": 0.6, "b": 0.4}
AFTER = {"a": {"a": 0.7, "b": 0.3}, "b": {"a": 0.5, "b": 0.5}}
WORDS = 3


def _predictive(alpha: float) -> Table:
    """(n + α)/(N + αK)."""
    return normalised({y: n + alpha for y, n in COUNTS.items()})


def _even(p: float, length: int) -> float:
    """P(an even number of successes among `length` draws of probability p), by two states and one
    step a draw.
    """
    even, odd = 1.0, 0.0
    for _ in range(length):
        even, odd = (1 - p) * even + p * odd, (1 - p) * odd + p * even
    return even


def _even_inputs(generator: random.Random) -> tuple[Any, ...]:
    return generator.uniform(0.05, 0.95), generator.randrange(1, 40)


def _binomial(p: float, length: int, wanted: int) -> float:
    return math.comb(length, wanted) * p**wanted * (1 - p) ** (length - wanted)


def _texts() -> dict[tuple[str, ...], float]:
    """q of every text of three words."""
    found = {}
    for text in itertools.product("ab", repeat=WORDS):
        q = START[text[0]]
        for before, word in itertools.pairwise(text):
            q *= AFTER[before][word]
        found[text] = q
    return found


def _first_given_one_b() -> Table:
    """P(first word | exactly one 'b')."""
    kept = {text: q for text, q in _texts().items() if text.count("b") == 1}
    return normalised(
        {word: math.fsum(q for text, q in kept.items() if text[0] == word) for word in "ab"}
    )


def _uniform_given_one_b() -> Table:
    kept = [text for text in _texts() if text.count("b") == 1]
    return {word: sum(text[0] == word for text in kept) / len(kept) for word in "ab"}


EXERCISES = (
    Exercise(
        "t08.predictive",
        lambda: _predictive(1.0),
        "",
        (
            Mistake(
                "Those are the plain shares; Dirichlet(1) adds one to each count.",
                lambda: _predictive(0.0),
            ),
            Mistake("That adds ½ to each count; here α = 1.", lambda: _predictive(0.5)),
        ),
        "(n + 1)/(N + 4)",
    ),
    Exercise(
        "t08.even",
        _even,
        "",
        (
            Mistake(
                "That is the probability of an odd number.", lambda p, length: 1 - _even(p, length)
            ),
            Mistake("That takes one step too few.", lambda p, length: _even(p, length - 1)),
            Mistake(
                "That is the probability of none at all.", lambda p, length: _binomial(p, length, 0)
            ),
        ),
        "two states, even and odd; each draw moves a share p across",
        _even_inputs,
    ),
    Exercise(
        "t08.first",
        _first_given_one_b,
        "",
        (
            Mistake("That counts texts without weighing them by the prior.", _uniform_given_one_b),
            Mistake(
                "That is the prior's first word; the constraint must be heard.", lambda: dict(START)
            ),
        ),
        "sum q over the three texts with one 'b', split by the first word",
    ),
)
