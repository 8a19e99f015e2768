"""What references and mistakes of several tutorials share."""

import math
import random

from klrl_edu import reference
from klrl_edu.exercises.judging import Table
from klrl_edu.problems.examples import FOUR_REWARDS, FOUR_SENTENCES

OTHER_WAY = (
    "That is the KL the other way round: the first argument is the one that the mean is taken"
    " under."
)


def words(p: Table) -> Table:
    """'the cat' -> ('the', 'cat')."""
    return {tuple(text.split()): value for text, value in p.items()}


def marginals(p: Table) -> list[Table]:
    """The distributions of the first and of the second word."""
    found: list[Table] = [{}, {}]
    for sentence, probability in words(p).items():
        for position, word in enumerate(sentence):
            found[position][word] = found[position].get(word, 0.0) + probability
    return found


def product(first: Table, second: Table) -> Table:
    return {f"{a} {b}": x * y for a, x in first.items() for b, y in second.items()}


def independent(p: Table) -> Table:
    """The words of p, drawn independently."""
    return product(*marginals(p))


def mean_field(p: Table, rounds: int = 2000) -> Table:
    """argmin KL(π‖p) over independent words, by coordinate descent: log π₁(a) = Σ_b π₂(b) log p(a
    b) + const, and so on.
    """
    first, second = ({word: 1 / len(side) for word in side} for side in marginals(p))
    for _ in range(rounds):
        first = reference.softmax(
            {a: math.fsum(second[b] * math.log(p[f"{a} {b}"]) for b in second) for a in first}
        )
        second = reference.softmax(
            {b: math.fsum(first[a] * math.log(p[f"{a} {b}"]) for a in first) for b in second}
        )
    return product(first, second)


def tilted(q: Table, exponent: Table) -> Table:
    """q e^exponent, not normalised."""
    return {y: q[y] * math.exp(exponent[y]) for y in q}


def normalised(weight: Table) -> Table:
    total = math.fsum(weight.values())
    return {y: w / total for y, w in weight.items()}


def times(factor: float, r: Table) -> Table:
    return {y: factor * value for y, value in r.items()}


def posterior(lam: float) -> Table:
    return reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, lam)[0]


def random_table(generator: random.Random, outcomes: str = "abcd") -> Table:
    return reference.softmax({y: generator.gauss(0, 1) for y in outcomes})


def without(p: Table, outcome: str) -> Table:
    return normalised({y: 0.0 if y == outcome else probability for y, probability in p.items()})
