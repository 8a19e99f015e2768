"""The whole theory of KL-regularised reinforcement learning, in plain dictionaries and `math`.

A distribution is a dict from outcomes to probabilities. The prior q, a reward r and λ > 0 define

    π*(y) = q(y) e^{r(y)/λ} / Z        J(π) = E_π[r] − λ KL(π‖q) = λ log Z − λ KL(π‖π*)

and everything else in this package agrees with these few lines on small spaces; the tests hold it
to that. Outcomes that are read token by token are tuples of tokens. Gradients are in sequence
logits: π(y) = e^{θ_y} / Σ e^θ.
"""

import math
from collections.abc import Callable
from typing import Any

Table = dict[Any, float]  # outcome -> probability, reward or logit
Function = Callable[[Any], float]


def expectation(p: Table, f: Function) -> float:
    """E_p[f]; an outcome without mass does not count, whatever f is there."""
    return math.fsum(p[y] * f(y) for y in p if p[y] > 0)


def entropy(p: Table) -> float:
    """H(p) = −Σ p log p, in nats."""
    return expectation(p, lambda y: -math.log(p[y]))


def kl(p: Table, q: Table) -> float:
    """KL(p‖q) = Σ p log p/q, in nats; inf where q has no mass and p has."""
    return expectation(p, lambda y: math.log(p[y] / q[y]) if q.get(y, 0) > 0 else math.inf)


def posterior(q: Table, r: Table, lam: float) -> tuple[Table, float]:
    """(π*, log Z): the prior reweighted by e^{r/λ}; the largest reward is taken out first."""
    top = max(r[y] for y in q if q[y] > 0)
    weight = {y: q[y] * math.exp((r[y] - top) / lam) if q[y] > 0 else 0.0 for y in q}
    z = math.fsum(weight.values())
    return {y: w / z for y, w in weight.items()}, math.log(z) + top / lam


def objective(p: Table, q: Table, r: Table, lam: float) -> float:
    """J(p) = E_p[r] − λ KL(p‖q), in reward units."""
    return expectation(p, lambda y: r[y]) - lam * kl(p, q)


def gradient(p: Table, f: Function) -> Table:
    """∇_θ E_p[f] with f held fixed, in sequence logits: p(y)(f(y) − E_p[f])."""
    mean = expectation(p, f)
    return {y: p[y] * (f(y) - mean) if p[y] > 0 else 0.0 for y in p}


def objective_gradient(p: Table, q: Table, r: Table, lam: float) -> Table:
    """∇J = E_p[(r − λ log p/q) ∇log p]; the gradient of the logarithm itself has mean 0."""
    return gradient(p, lambda y: r[y] - lam * math.log(p[y] / q[y]))


def softmax(logits: Table) -> Table:
    """θ -> π."""
    top = max(logits.values())
    weight = {y: math.exp(x - top) for y, x in logits.items()}
    z = math.fsum(weight.values())
    return {y: w / z for y, w in weight.items()}


def next_token(p: Table, prefix: tuple[Any, ...]) -> Table:
    """p(token | prefix) of a distribution over tuples of tokens."""
    mass: Table = {}
    for y, probability in p.items():
        if y[: len(prefix)] == prefix and len(y) > len(prefix):
            mass[y[len(prefix)]] = mass.get(y[len(prefix)], 0.0) + probability
    total = math.fsum(mass.values())
    return {token: m / total for token, m in mass.items()}


def soft_value(q: Table, r: Table, lam: float, prefix: tuple[Any, ...] = ()) -> float:
    """V(prefix) = λ log Σ_a q(a|prefix) e^{V(prefix a)/λ}, and r at the end: V(()) = λ log Z."""
    if prefix in q:
        return r[prefix]
    mass = math.fsum(
        p * math.exp(soft_value(q, r, lam, (*prefix, token)) / lam)
        for token, p in next_token(q, prefix).items()
        if p > 0
    )
    return lam * math.log(mass) if mass > 0 else -math.inf


def chain_rule(p: Table, q: Table, length: int) -> list[float]:
    """KL(p‖q) over tuples of one length as its sum over positions: Σ_t
    E_p[KL(p(·|y_<t)‖q(·|y_<t))], one term a position.
    """

    def at(t: int) -> Function:
        return lambda y: kl(next_token(p, y[:t]), next_token(q, y[:t]))

    return [expectation(p, at(t)) for t in range(length)]


def k1(p: Table, q: Table) -> Function:
    """Schulman's estimators of KL(p‖q) as functions of a sample y ~ p; this one is log p/q."""
    return lambda y: math.log(p[y] / q[y])


def k2(p: Table, q: Table) -> Function:
    """½ (log p/q)²: biased."""
    return lambda y: math.log(p[y] / q[y]) ** 2 / 2


def k3(p: Table, q: Table) -> Function:
    """q/p − 1 − log q/p: unbiased and never negative."""
    return lambda y: q[y] / p[y] - 1 - math.log(q[y] / p[y])


def mean_and_variance(p: Table, f: Function) -> tuple[float, float]:
    """E_p[f] and Var_p[f]."""
    mean = expectation(p, f)
    return mean, expectation(p, lambda y: (f(y) - mean) ** 2)
