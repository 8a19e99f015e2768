"""Exercises of t03. What does the KL term compute?"""

import math

from klrl_edu import reference
from klrl_edu.exercises.judging import Exercise, Mistake, Table
from klrl_edu.exercises.pieces import OTHER_WAY, posterior, random_table, times
from klrl_edu.problems.examples import FOUR_POLICY, FOUR_REWARDS, FOUR_SENTENCES

NEW_KL_COEF = 0.5


def _gap(lam: float) -> float:
    """λ KL(π‖π*_λ) of the course's policy."""
    return lam * reference.kl(FOUR_POLICY, posterior(lam))


def _variance(p: Table) -> float:
    return reference.mean_and_variance(p, lambda y: FOUR_REWARDS[y])[1]


def _implied_reward(pi: Table, q: Table, lam: float) -> Table:
    """λ log π/q: the reward for which π is the posterior, with Z = 1."""
    return {y: lam * math.log(pi[y] / q[y]) for y in pi}


EXERCISES = (
    Exercise(
        "t03.posterior",
        lambda: posterior(NEW_KL_COEF),
        "",
        (
            Mistake("That is the posterior at λ = 1; here λ = ½.", lambda: posterior(1.0)),
            Mistake("The exponent is r/λ; yours is r·λ.", lambda: posterior(1 / NEW_KL_COEF)),
            Mistake(
                "That is a softmax of r/λ; it forgets the prior q.",
                lambda: reference.softmax(times(1 / NEW_KL_COEF, FOUR_REWARDS)),
            ),
            Mistake(
                "That is π·exp(r/λ), normalised; the posterior starts from the prior q.",
                lambda: reference.posterior(FOUR_POLICY, FOUR_REWARDS, NEW_KL_COEF)[0],
            ),
        ),
        "q(y)·exp(r(y)/λ), divided by its sum",
    ),
    Exercise(
        "t03.gap",
        lambda: _gap(NEW_KL_COEF),
        "reward units",
        (
            Mistake(
                "That is KL(π‖π*) in nats; the gap is λ times that, in reward units.",
                lambda: _gap(NEW_KL_COEF) / NEW_KL_COEF,
            ),
            Mistake("That is the gap at λ = 1; here λ = ½.", lambda: _gap(1.0)),
            Mistake(
                OTHER_WAY, lambda: NEW_KL_COEF * reference.kl(posterior(NEW_KL_COEF), FOUR_POLICY)
            ),
            Mistake(
                "That is KL(π*‖π), without λ and the other way round: λ KL(π‖π*) is asked.",
                lambda: reference.kl(posterior(NEW_KL_COEF), FOUR_POLICY),
            ),
            Mistake(
                "That is λ KL(π‖q): the distance from the prior, not from the posterior.",
                lambda: NEW_KL_COEF * reference.kl(FOUR_POLICY, FOUR_SENTENCES),
            ),
            Mistake(
                "That is log Z − J(π): λ is missing before log Z.",
                lambda: (
                    reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, NEW_KL_COEF)[1]
                    - reference.objective(FOUR_POLICY, FOUR_SENTENCES, FOUR_REWARDS, NEW_KL_COEF)
                ),
            ),
        ),
        "λ log Z − J(π), or λ KL(π‖π*): compute both, they must agree",
    ),
    Exercise(
        "t03.variance",
        lambda: _variance(posterior(1.0)),
        "",
        (
            Mistake(
                "That is the standard deviation; its square is asked.",
                lambda: math.sqrt(_variance(posterior(1.0))),
            ),
            Mistake(
                "That is the variance under the prior q; the derivative is taken at λ = 1, so it is"
                " under π*.",
                lambda: _variance(FOUR_SENTENCES),
            ),
            Mistake(
                "That is E[r²]; subtract (E[r])².",
                lambda: reference.expectation(posterior(1.0), lambda y: FOUR_REWARDS[y] ** 2),
            ),
            Mistake(
                "That is E[r], the first derivative of log Z.",
                lambda: reference.expectation(posterior(1.0), lambda y: FOUR_REWARDS[y]),
            ),
        ),
        "E[r²] − (E[r])², both under π* at λ = 1",
    ),
    Exercise(
        "t03.reward",
        _implied_reward,
        "",
        (
            Mistake(
                "That is log π/q, in nats; times λ it is in reward units.",
                lambda pi, q, lam: _implied_reward(pi, q, 1.0),
            ),
            Mistake(
                "The ratio is upside down: π/q is asked, not q/π.",
                lambda pi, q, lam: _implied_reward(q, pi, lam),
            ),
            Mistake(
                "That is λ·π/q; take the logarithm of the ratio.",
                lambda pi, q, lam: {y: lam * pi[y] / q[y] for y in pi},
            ),
            Mistake(
                "That divides by λ; solve π = q·exp(r/λ) for r.",
                lambda pi, q, lam: _implied_reward(pi, q, 1 / lam),
            ),
        ),
        "solve π = q·exp(r/λ)/Z for r with Z = 1",
        lambda generator: (
            random_table(generator),
            random_table(generator),
            generator.uniform(0.1, 3.0),
        ),
    ),
)
