"""Exercises of t01. What does KL measure?"""

import math
import random
from typing import Any

from klrl_edu import reference
from klrl_edu.exercises.judging import Exercise, Mistake, Table
from klrl_edu.exercises.pieces import (
    OTHER_WAY,
    independent,
    marginals,
    mean_field,
    random_table,
    without,
    words,
)
from klrl_edu.problems.examples import FOUR_SENTENCES

# 'the' goes with 'cat' and 'a' with 'dog'
CORRELATED = {"the cat": 0.50, "the dog": 0.02, "a cat": 0.03, "a dog": 0.45}


def _kl_inputs(generator: random.Random) -> tuple[Any, ...]:
    """Two tables: full; p without mass somewhere; neither with mass there; q without mass where p
    has some.
    """
    p, q = random_table(generator), random_table(generator)
    kind = generator.randrange(4)
    return without(p, "a") if kind in (1, 2) else p, without(q, "a") if kind in (2, 3) else q


def _kl_skipping(p: Table, q: Table) -> float:
    return math.fsum(p[y] * math.log(p[y] / q[y]) for y in p if p[y] > 0 and q[y] > 0)


def _second_word_kl(weights: Table, p: Table, q: Table) -> float:
    """Σ_a weight(a) KL(p(·|a)‖q(·|a))."""
    return math.fsum(
        w * reference.kl(reference.next_token(p, (a,)), reference.next_token(q, (a,)))
        for a, w in weights.items()
    )


def _chain(second_weights: Table | None = None) -> list[float]:
    """The two terms of KL(CORRELATED‖q), the second with other weights on the first word."""
    p, q = words(CORRELATED), words(FOUR_SENTENCES)
    first, second = reference.chain_rule(p, q, 2)
    return [first, second if second_weights is None else _second_word_kl(second_weights, p, q)]


def _chain_of_marginals() -> list[float]:
    return [
        reference.kl(p, q)
        for p, q in zip(marginals(CORRELATED), marginals(FOUR_SENTENCES), strict=True)
    ]


EXERCISES = (
    Exercise(
        "t01.kl",
        reference.kl,
        "nats",
        (
            Mistake(OTHER_WAY, lambda p, q: reference.kl(q, p)),
            Mistake(
                "That is the cross-entropy −Σ p log q; subtract the entropy of p.",
                lambda p, q: reference.expectation(
                    p, lambda y: -math.log(q[y]) if q[y] > 0 else math.inf
                ),
            ),
            Mistake(
                "Where p has mass and q has none, KL is inf; your function leaves that outcome"
                " out.",
                _kl_skipping,
            ),
        ),
        "an outcome with p = 0 counts 0, whatever q is there; one with p > 0 and q = 0 makes the"
        " sum math.inf",
        _kl_inputs,
    ),
    Exercise(
        "t01.chain",
        _chain,
        "nats",
        (
            Mistake(
                "The second term compares the marginals of the second word. It must compare the"
                " conditionals, given the first word.",
                _chain_of_marginals,
            ),
            Mistake(
                "The second term averages over first words from q; they come from p.",
                lambda: _chain(marginals(FOUR_SENTENCES)[0]),
            ),
            Mistake(
                "The second term sums over first words without weighting them; weight by p(first"
                " word).",
                lambda: _chain({"the": 1, "a": 1}),
            ),
            Mistake(
                OTHER_WAY, lambda: reference.chain_rule(words(FOUR_SENTENCES), words(CORRELATED), 2)
            ),
        ),
        "KL of the first words, then the mean over first words from p of KL between the next-word"
        " distributions",
    ),
    Exercise(
        "t01.mutual",
        lambda: reference.kl(FOUR_SENTENCES, independent(FOUR_SENTENCES)),
        "nats",
        (
            Mistake(OTHER_WAY, lambda: reference.kl(independent(FOUR_SENTENCES), FOUR_SENTENCES)),
            Mistake(
                "That is H(Y₁) + H(Y₂); subtract H(Y₁, Y₂).",
                lambda: reference.entropy(independent(FOUR_SENTENCES)),
            ),
        ),
        "build the four products q₁(first word)·q₂(second word); then one call of kl",
    ),
    Exercise(
        "t01.product",
        lambda: independent(CORRELATED),
        "",
        (
            Mistake(
                "That is p itself, and no model with independent words can be that.",
                lambda: CORRELATED,
            ),
            Mistake(
                "That is the reverse fit, which minimises KL(π‖p). Which π minimises KL(p‖π)?",
                lambda: mean_field(CORRELATED),
            ),
            Mistake(
                "That is uniform. The forward fit keeps the marginals of p.",
                lambda: dict.fromkeys(CORRELATED, 1 / len(CORRELATED)),
            ),
        ),
        "minimising −E_p[log π₁(Y₁)] − E_p[log π₂(Y₂)] are two separate maximum-likelihood fits",
    ),
)
