"""Exercises of t06. Which of k1, k2, k3 may be differentiated?"""

import math
import random
from typing import Any

from klrl_edu import reference
from klrl_edu.exercises.judging import Exercise, Mistake, Table
from klrl_edu.exercises.pieces import normalised, random_table
from klrl_edu.problems.examples import FOUR_POLICY, FOUR_SENTENCES

SAMPLES = 64


def _noise(estimator: reference.Function) -> float:
    """The standard deviation of one sample, relative to KL(π‖q)."""
    return math.sqrt(reference.mean_and_variance(FOUR_POLICY, estimator)[1]) / reference.kl(
        FOUR_POLICY, FOUR_SENTENCES
    )


def _difference(p: Table, q: Table) -> Table:
    """p − q: ∇KL(q‖p) in the sequence logits of p."""
    return {y: p[y] - q[y] for y in p}


def _reverse(pi: Table, q: Table) -> Table:
    """∇KL(π‖q) = E[u s]."""
    return reference.gradient(pi, reference.k1(pi, q))


def _in_the_reward(pi: Table, q: Table) -> Table:
    """E[k3 s]."""
    return reference.gradient(pi, reference.k3(pi, q))


def _forward_optimum(q: Table, r: Table, lam: float) -> Table:
    """argmax E_π[r] − λ KL(q‖π) = λ q/(ν − r), with the ν at which it sums to one, by bisection."""
    best = max(r.values())
    low, high = best, best + lam
    for _ in range(200):
        nu = (low + high) / 2
        if nu <= best or math.fsum(lam * q[y] / (nu - r[y]) for y in q) > 1:
            low = nu
        else:
            high = nu
    return {y: lam * q[y] / (high - r[y]) for y in q}


def _two_tables(generator: random.Random) -> tuple[Any, ...]:
    return random_table(generator), random_table(generator)


def _problems(generator: random.Random) -> tuple[Any, ...]:
    q = random_table(generator)
    return q, {y: generator.gauss(0, 1) for y in q}, generator.uniform(0.2, 3.0)


EXERCISES = (
    Exercise(
        "t06.noise",
        lambda: _noise(reference.k1(FOUR_POLICY, FOUR_SENTENCES)) / math.sqrt(SAMPLES),
        "",
        (
            Mistake(
                "That is the noise of one sample; the mean of 64 has √64 times less.",
                lambda: _noise(reference.k1(FOUR_POLICY, FOUR_SENTENCES)),
            ),
            Mistake(
                "The variance falls as 1/64, the standard deviation as 1/√64; yours fell as 1/64.",
                lambda: _noise(reference.k1(FOUR_POLICY, FOUR_SENTENCES)) / SAMPLES,
            ),
            Mistake(
                "That is k3's; k1's is asked.",
                lambda: _noise(reference.k3(FOUR_POLICY, FOUR_SENTENCES)) / math.sqrt(SAMPLES),
            ),
            Mistake(
                "That is the standard deviation in nats; divide it by KL(π‖q).",
                lambda: math.sqrt(
                    reference.mean_and_variance(
                        FOUR_POLICY, reference.k1(FOUR_POLICY, FOUR_SENTENCES)
                    )[1]
                    / SAMPLES
                ),
            ),
            Mistake(
                "That is the variance over the KL; take the square root of the variance first.",
                lambda: (
                    reference.mean_and_variance(
                        FOUR_POLICY, reference.k1(FOUR_POLICY, FOUR_SENTENCES)
                    )[1]
                    / SAMPLES
                    / reference.kl(FOUR_POLICY, FOUR_SENTENCES)
                ),
            ),
        ),
        "√(Var k1/64), divided by KL(π‖q)",
    ),
    Exercise(
        "t06.loss",
        _difference,
        "",
        (
            Mistake(
                "That is ∇KL(π‖q), the gradient of k3's *mean*; on samples the loss gives the mean"
                " of its gradient, E[∇k3].",
                _reverse,
            ),
            Mistake("That is E[k3 s], the half that k3 follows in the reward.", _in_the_reward),
            Mistake(
                "The sign is wrong: the slope of k3 is 1 − q/π, so a sentence that π likes more"
                " than q has a positive entry.",
                lambda pi, q: _difference(q, pi),
            ),
            Mistake(
                "That is the slope 1 − q/π of each sentence; its mean with s is asked, and each"
                " sentence comes with probability π.",
                lambda pi, q: {y: 1 - q[y] / pi[y] for y in pi},
            ),
        ),
        "E[(1 − q/π) s], with s of sentence y in logit y′ equal to 1{y = y′} − π(y′)",
        _two_tables,
    ),
    Exercise(
        "t06.reward",
        lambda: _in_the_reward(FOUR_POLICY, FOUR_SENTENCES),
        "",
        (
            Mistake(
                "That is k1 in the reward, ∇KL(π‖q); k3 is asked.",
                lambda: _reverse(FOUR_POLICY, FOUR_SENTENCES),
            ),
            Mistake(
                "That is k3 in the loss; in the reward k3 is a number that weighs s.",
                lambda: _difference(FOUR_POLICY, FOUR_SENTENCES),
            ),
            Mistake(
                "That is π·k3; the entry of a sentence is π(y)(k3(y) − E[k3]), as its logit also"
                " lowers all the others.",
                lambda: {
                    y: p * reference.k3(FOUR_POLICY, FOUR_SENTENCES)(y)
                    for y, p in FOUR_POLICY.items()
                },
            ),
            Mistake(
                "The sign is wrong: a KL penalty is descended, and k3 counts as a cost.",
                lambda: {y: -g for y, g in _in_the_reward(FOUR_POLICY, FOUR_SENTENCES).items()},
            ),
        ),
        "E[k3 s]: π(y)(k3(y) − E[k3]) at each sentence",
    ),
    Exercise(
        "t06.stale",
        lambda pi, mu: _difference(mu, pi),
        "",
        (
            Mistake(
                "That is the answer on-policy: E_π[s] = 0; here the samples come from μ.",
                lambda pi, mu: dict.fromkeys(pi, 0.0),
            ),
            Mistake("The sign is wrong: E_μ[s] at sentence y is μ(y) − π(y).", _difference),
            Mistake("That is ∇KL(π‖μ); k1 has the slope 1, and s is averaged under μ.", _reverse),
        ),
        "E_μ[s], with s of sentence y in logit y′ equal to 1{y = y′} − π(y′)",
        _two_tables,
    ),
    Exercise(
        "t06.end",
        _forward_optimum,
        "",
        (
            Mistake(
                "That is π*, where E[r] − λ KL(π‖q) is largest; k3 as a loss has KL(q‖π) there.",
                lambda q, r, lam: reference.posterior(q, r, lam)[0],
            ),
            Mistake(
                "That forgets λ: the optimum is λq/(ν − r).",
                lambda q, r, lam: _forward_optimum(q, r, 1.0),
            ),
            Mistake(
                "The exponent of λ is wrong: the optimum is λq/(ν − r), yours has 1/λ.",
                lambda q, r, lam: _forward_optimum(q, r, 1 / lam),
            ),
            Mistake(
                "That takes ν = max r + λ and divides by the sum; no constant factor is free here:"
                " ν itself must make the sum one.",
                lambda q, r, lam: normalised({y: q[y] / (max(r.values()) + lam - r[y]) for y in q}),
            ),
        ),
        "bisect for ν between max r and max r + λ until λ Σ q/(ν − r) = 1",
        _problems,
    ),
)
