"""Exercises of t07. What does the auxiliary model cost?"""

import math
import random
from typing import Any

from klrl_edu import reference
from klrl_edu.exercises.judging import Exercise, Mistake, Table
from klrl_edu.exercises.pieces import random_table
from klrl_edu.problems.examples import FOUR_POLICY, FOUR_REWARDS, FOUR_SENTENCES

AUXILIARY = {"the cat": 0.3, "the dog": 0.4, "a cat": 0.2, "a dog": 0.1}


def _weighted_reward(y: str) -> float:
    """w·r, w = q/p."""
    return FOUR_SENTENCES[y] / AUXILIARY[y] * FOUR_REWARDS[y]


def _variance(p: Table, f: reference.Function) -> float:
    return reference.mean_and_variance(p, f)[1]


def _pairs(p: Table, w: Table, f: Table) -> dict[tuple[str, str], float]:
    """p(x) p(y) (w f + w′ f′)/(w + w′) of every ordered pair."""
    return {(x, y): p[x] * p[y] * (w[x] * f[x] + w[y] * f[y]) / (w[x] + w[y]) for x in p for y in p}


def _weights(p: Table, q: Table) -> Table:
    return {y: q[y] / p[y] for y in p}


def _pair_mean(p: Table, q: Table, f: Table) -> float:
    """E_p of the self-normalised mean of f from two draws."""
    return math.fsum(_pairs(p, _weights(p, q), f).values())


def _pair_inputs(generator: random.Random) -> tuple[Any, ...]:
    p = random_table(generator)
    return p, random_table(generator), {y: generator.gauss(0, 1) for y in p}


def _squared_score(y: str) -> float:
    """‖s(y)‖² = Σ_z (1[z = y] − π(z))², in sequence logits."""
    return 1 - 2 * FOUR_POLICY[y] + math.fsum(p * p for p in FOUR_POLICY.values())


def _mean_log_ratio(prior: Table, weight: reference.Function) -> float:
    """E_π[weight · log π/prior]."""
    return reference.expectation(
        FOUR_POLICY, lambda y: weight(y) * math.log(FOUR_POLICY[y] / prior[y])
    )


def _best_constant(prior: Table, weight: reference.Function = _squared_score) -> float:
    """argmin over c of E_π[‖s‖²(log π/prior + c)²]: −E_π[‖s‖² log π/prior]/E_π[‖s‖²]."""
    return -_mean_log_ratio(prior, weight) / reference.expectation(FOUR_POLICY, weight)


def _regret(p: Table, q: Table, r: Table, lam: float) -> float:
    """λ KL(π*_p‖π*_q)."""
    return lam * reference.kl(reference.posterior(p, r, lam)[0], reference.posterior(q, r, lam)[0])


def _repaired(p: Table, q: Table, r: Table, lam: float) -> Table:
    """r + λ log q/p."""
    return {y: r[y] + lam * math.log(q[y] / p[y]) for y in p}


def _problem_inputs(generator: random.Random) -> tuple[Any, ...]:
    p = random_table(generator)
    return (
        p,
        random_table(generator),
        {y: generator.gauss(0, 1) for y in p},
        generator.uniform(0.2, 3.0),
    )


EXERCISES = (
    Exercise(
        "t07.variance",
        lambda: _variance(AUXILIARY, _weighted_reward),
        "",
        (
            Mistake(
                "That is the variance of r under q: of a draw from q itself.",
                lambda: _variance(FOUR_SENTENCES, lambda y: FOUR_REWARDS[y]),
            ),
            Mistake(
                "That is the variance of r under p; the draw is weighted: w·r.",
                lambda: _variance(AUXILIARY, lambda y: FOUR_REWARDS[y]),
            ),
            Mistake(
                "That is E_p[(w r)²]; subtract (E_p[w r])².",
                lambda: reference.expectation(AUXILIARY, lambda y: _weighted_reward(y) ** 2),
            ),
            Mistake(
                "That is the standard deviation; its square is asked.",
                lambda: math.sqrt(_variance(AUXILIARY, _weighted_reward)),
            ),
        ),
        "E_p[(w r)²] − (E_p[w r])², with w = q/p",
    ),
    Exercise(
        "t07.pair",
        _pair_mean,
        "",
        (
            Mistake(
                "That is E_p[f], the mean of one self-normalised draw; take two.",
                lambda p, q, f: reference.expectation(p, lambda y: f[y]),
            ),
            Mistake(
                "That is E_q[f], the ratio of the means; the mean of the ratio is asked, pair by"
                " pair.",
                lambda p, q, f: reference.expectation(q, lambda y: f[y]),
            ),
            Mistake(
                "The pairs come from q there; they are drawn from p.",
                lambda p, q, f: math.fsum(_pairs(q, _weights(p, q), f).values()),
            ),
            Mistake(
                "The weights are upside down: w = q/p.",
                lambda p, q, f: math.fsum(_pairs(p, _weights(q, p), f).values()),
            ),
            Mistake(
                "That leaves out the pairs of a sentence with itself.",
                lambda p, q, f: math.fsum(
                    part for (x, y), part in _pairs(p, _weights(p, q), f).items() if x != y
                ),
            ),
            Mistake(
                "That counts a pair of different sentences once; it is drawn in two orders.",
                lambda p, q, f: math.fsum(
                    part for (x, y), part in _pairs(p, _weights(p, q), f).items() if x <= y
                ),
            ),
        ),
        "sum p(x)·p(y)·(w(x) f(x) + w(y) f(y))/(w(x) + w(y)) over all x and y, equal ones too",
        _pair_inputs,
    ),
    Exercise(
        "t07.constant",
        lambda: _best_constant(AUXILIARY),
        "nats",
        (
            Mistake(
                "That is −KL(π‖p), which centres log π/p; the variance weighs by ‖s‖².",
                lambda: -reference.kl(FOUR_POLICY, AUXILIARY),
            ),
            Mistake(
                "That weighs by ‖s‖; the variance holds its square.",
                lambda: _best_constant(AUXILIARY, lambda y: math.sqrt(_squared_score(y))),
            ),
            Mistake(
                "That is the best constant for log π/q; article C weighs with log π/p.",
                lambda: _best_constant(FOUR_SENTENCES),
            ),
            Mistake(
                "That is −E_π[‖s‖² log π/p]; divide by E_π[‖s‖²].",
                lambda: -_mean_log_ratio(AUXILIARY, _squared_score),
            ),
        ),
        "set the derivative of E_π[‖s‖²(log π/p + c)²] by c to 0; ‖s(y)‖² = 1 − 2π(y) + Σ π²",
    ),
    Exercise(
        "t07.regret",
        _regret,
        "reward units",
        (
            Mistake(
                "That is KL(π*_p‖π*_q) in nats; the regret is λ times that.",
                lambda p, q, r, lam: _regret(p, q, r, lam) / lam,
            ),
            Mistake(
                "That is the KL the other way round: the policy is π*_p, and stands first.",
                lambda p, q, r, lam: _regret(q, p, r, lam),
            ),
            Mistake(
                "That is the distance of the priors, λ KL(p‖q); the posteriors are compared.",
                lambda p, q, r, lam: lam * reference.kl(p, q),
            ),
            Mistake(
                "That is λ log Z of q less λ log Z of p, which compares two yardsticks; measure"
                " π*_p by the J that holds q.",
                lambda p, q, r, lam: (
                    lam * (reference.posterior(q, r, lam)[1] - reference.posterior(p, r, lam)[1])
                ),
            ),
        ),
        "λ log Z − J(π*_p), both with the prior q; by tutorial 3 that is λ KL(π*_p‖π*_q)",
        _problem_inputs,
    ),
    Exercise(
        "t07.repair",
        _repaired,
        "reward units",
        (
            Mistake(
                "log q/p is in nats; times λ it is in reward units.",
                lambda p, q, r, lam: {y: r[y] + math.log(q[y] / p[y]) for y in p},
            ),
            Mistake(
                "The ratio is upside down: q/p is asked.",
                lambda p, q, r, lam: {y: r[y] + lam * math.log(p[y] / q[y]) for y in p},
            ),
            Mistake(
                "That weighs the reward by q/p; solve for r′ in the exponent.",
                lambda p, q, r, lam: {y: r[y] * q[y] / p[y] for y in p},
            ),
            Mistake(
                "That is the correction alone; add it to r.",
                lambda p, q, r, lam: {y: lam * math.log(q[y] / p[y]) for y in p},
            ),
        ),
        "solve p·exp(r′/λ) = q·exp(r/λ) for r′",
        _problem_inputs,
    ),
)
