"""Article C, an RNN policy with a KL penalty, and importance sampling on four sentences: eight
rows, nine claims.

    J(π) = E_π[r] − λ KL(π‖q) = λ log Z − λ KL(π‖π*)                                             (1)
    ∇E_π[r] = E_π[r s],    ∇KL(π‖q) = E_π[s log π/q],    s = ∇log π                              (2)
    E_π[s (log π/p + c)] = ∇KL(π‖p) = ∇KL(π‖q) + E_π[s log q/p]
    for any c: biased unless p = q                                                               (3)
    its total variance is least at c* = −E[‖s‖² log π/p]/E[‖s‖²]                                 (4)
    d KL(π*‖q)/dλ = −Var_{π*}(r)/λ³ ≤ 0                                                          (5)

K sentences; gradients in sequence logits; logs in nats.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core import logspace
from klrl_edu.learning import losses
from klrl_edu.problems.problem import Problem
from klrl_edu.theory.articles.examples import (
    Auxiliary,
    course_case,
    mean_score,
    sentences,
    with_auxiliary,
)
from klrl_edu.theory.cases import Case
from klrl_edu.theory.gradients import batch_mean, forward_kl_gradient, kl, logit_gradient, scores
from klrl_edu.theory.verdicts import Formulas, corrected, false, holds, shown


def _vector(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values.tolist()) + ")"


@holds(
    "C",
    "3.1",
    r"$J(\theta) = E_\pi[r] - \lambda D_{KL}(\pi_\theta \Vert q)$",
    "reward units",
    "t03",
    sentences,
)
def c_objective(case: Case) -> Formulas:
    """The objective; the truth is λ log Z − λ KL(π‖π*), by (1)."""
    gap = case.kl_coef * kl(case.log_policy, case.log_star)
    return Formulas(truth=case.tilted.value - gap, printed=case.objective(case.log_policy))


c_objective.says(
    lambda case, found: (
        f"J(π) = {found.printed:.6f}; its maximiser, which the article leaves out, is π* ∝ q"
        f" e^(r/λ) = {_vector(case.log_star.exp())}, better by λ KL(π‖π*) ="
        f" {case.tilted.value - found.printed:.12f}"
    )
)
c_objective.broken(
    "the penalty added",
    lambda case: (
        case.objective(case.log_policy) + 2 * case.kl_coef * kl(case.log_policy, case.log_prior)
    ),
)


@holds(
    "C",
    "3.2 (3)",
    r"$\nabla E[r] \approx \frac{1}{N} \sum_i r(x_i) \nabla \log \pi(x_i)$",
    "reward units",
    "t05",
    sentences,
)
def c_reinforce(case: Case) -> Formulas:
    """The gradient of the mean reward [K]: its mean over every batch of N = 2, by enumeration; the
    truth by autograd.
    """
    return Formulas(
        truth=logit_gradient(case, lambda log_pi: logspace.expectation(log_pi, case.rewards)),
        printed=-audit_gradient(
            losses.reinforce, case.policy, _unpenalised(case), batch_size=2
        ).mean,
    )


def _unpenalised(case: Case) -> Problem:
    return case.at(0.0).problem


c_reinforce.says(
    lambda case, found: (
        f"over every batch of two sentences its mean is {_vector(found.printed)} = ∇E[r]"
    )
)
c_reinforce.broken(
    "less the mean of its own batch: shrunk by (N − 1)/N",
    lambda case: -audit_gradient(batch_mean, case.policy, _unpenalised(case), batch_size=2).mean,
)


@holds(
    "C",
    "3.2 (4)",
    r"$\nabla D_{KL} = E_\pi[\nabla \log \pi\, (\log \pi - \log q)]$",
    "nats",
    "t06",
    sentences,
)
def c_kl_gradient(case: Case) -> Formulas:
    """The gradient of KL(π‖q) [K] as a mean score, by (2); the truth by autograd."""
    return Formulas(
        truth=_kl_gradient(case, case.log_prior), printed=mean_score(case, case.log_ratio)
    )


def _kl_gradient(case: Case, log_reference: Tensor) -> Tensor:
    """The gradient of KL(π‖reference) [K], by autograd."""
    return logit_gradient(case, lambda log_pi: kl(log_pi, log_reference))


@c_kl_gradient.says
def _(case: Case, found: Formulas) -> str:
    extra = float(mean_score(case, torch.ones_like(case.log_policy)).abs().max())
    return (
        f"∇KL(π‖q) = {_vector(found.printed)}; the 1 that differentiating log π adds"
        f" has mean {shown(extra)}"
    )


c_kl_gradient.broken("KL(q‖π)", forward_kl_gradient)


@false(
    "C",
    "3.3, 4.2",
    r"$\nabla D_{KL} \approx E_\pi[\nabla \log \pi\, (\log \frac{\pi}{p} + c)]$, unbiased"
    r" importance sampling",
    r"$\nabla D_{KL} = E_\pi[\nabla \log \pi\, \log \frac{\pi}{p}] - E_\pi[\nabla \log"
    r" \pi\, \log \frac{q}{p}]$",
    "nats",
    "t07",
    with_auxiliary,
)
def c_auxiliary(example: Auxiliary) -> Formulas:
    """The gradient of KL(π‖q) [K] with an auxiliary model p in the place of q, and less the bias by
    which (3) misses it.
    """
    printed = auxiliary_gradient(example)
    return Formulas(
        truth=_kl_gradient(example.case, example.case.log_prior),
        printed=printed,
        corrected=printed - auxiliary_bias(example),
    )


def auxiliary_gradient(example: Auxiliary, constant: float = 0.0) -> Tensor:
    """The gradient E_π[s (log π/p + c)] [K], with an auxiliary model p in the place of q."""
    case, log_auxiliary = example
    return mean_score(case, case.log_policy - log_auxiliary + constant)


def auxiliary_bias(example: Auxiliary) -> Tensor:
    """The bias E_π[s log q/p] [K], by which (3) misses ∇KL(π‖q)."""
    case, log_auxiliary = example
    return mean_score(case, case.log_prior - log_auxiliary)


@c_auxiliary.says
def _(example: Auxiliary, found: Formulas) -> str:
    bias = auxiliary_bias(example)
    return (
        "the samples come from π, so nothing is importance-weighted; the mean is"
        f" {_vector(found.printed)} where ∇KL(π‖q) = {_vector(found.truth)}:"
        f" a bias {_vector(bias)} of norm {float(bias.norm()):.6f} for any number of samples"
    )


c_auxiliary.broken(
    "the bias added again", lambda example: auxiliary_gradient(example) + auxiliary_bias(example)
)

_CONSTANTS = (0.0, 1.0, -2.0)


@holds(
    "C",
    "3.3, 4.2",
    r"$E_\pi[\nabla \log \pi\, (\log \frac{\pi}{p} + c)]$ for any constant $c$",
    "nats",
    "t07",
    with_auxiliary,
)
def c_constant(example: Auxiliary) -> Formulas:
    """The mean for several c, then the variance at c* of (4): [C·K + 1]. The truth are ∇KL(π‖p) by
    autograd, once for each c, and the lowest point of the variance, a parabola in c through three
    of its points.
    """
    case, log_auxiliary = example
    left, middle, right = (constant_variance(example, c) for c in (-1.0, 0.0, 1.0))
    slope, curvature = (right - left) / 2, right - 2 * middle + left
    lowest = middle - slope**2 / (2 * curvature)
    one_gradient = _kl_gradient(case, log_auxiliary)
    return Formulas(
        truth=torch.cat([one_gradient.repeat(len(_CONSTANTS)), lowest[None]]),
        printed=_gradients_and_variance(example, best_constant(example)),
    )


def _gradients_and_variance(example: Auxiliary, constant: float) -> Tensor:
    means = [auxiliary_gradient(example, c) for c in _CONSTANTS]
    return torch.cat([*means, constant_variance(example, constant)[None]])


def best_constant(example: Auxiliary) -> float:
    """The constant c* of (4) with the least variance, in nats."""
    case, log_auxiliary = example
    weight = case.log_policy.exp() * scores(case.log_policy).square().sum(-1)
    return -float(weight @ (case.log_policy - log_auxiliary) / weight.sum())


def constant_variance(example: Auxiliary, constant: float) -> Tensor:
    """The total variance of one sample's gradient, E‖s (log π/p + c)‖² − ‖E s (log π/p + c)‖²: a
    scalar.
    """
    case, log_auxiliary = example
    each = scores(case.log_policy) * (case.log_policy - log_auxiliary + constant)[:, None]
    probs = case.log_policy.exp()
    return probs @ each.square().sum(-1) - (probs @ each).square().sum()


@c_constant.says
def _(example: Auxiliary, found: Formulas) -> str:
    best = best_constant(example)
    at_best, at_zero, at_one = (float(constant_variance(example, c)) for c in (best, 0.0, 1.0))
    return (
        f"no c changes the mean; the variance of one sample is least, {at_best:.6f}, at c* ="
        f" {best:.6f} nats ({at_zero:.6f} at c = 0, {at_one:.6f} at c = 1)"
    )


c_constant.broken(
    "c* without its sign",
    lambda example: _gradients_and_variance(example, -best_constant(example)),
)


@false(
    "C",
    "4.1, example",
    r"$D_{KL} \approx 0.22$ for $q = (.4, .3, .2, .1)$, $\pi = (.5, .2, .1, .2)$",
    r"$D_{KL} \approx 0.0998$ nats $= 0.1440$ bits",
    "nats or bits",
    "t01",
    lambda: (course_case(),),
    tolerance=5e-5,
)
def c_kl_example(case: Case) -> Formulas:
    """The divergence KL(π‖q) of the four sentences, in nats and in bits [2]."""
    nats = kl(case.log_policy, case.log_prior)
    return Formulas(
        truth=torch.stack([nats, nats / math.log(2)]),
        printed=torch.tensor([0.22, 0.22], dtype=torch.float64),
        corrected=torch.tensor([0.0998, 0.1440], dtype=torch.float64),
    )


c_kl_example.says(
    lambda case, found: (
        f"printed 0.22; KL(π‖q) = {found.truth[0]:.4f} nats = {found.truth[1]:.4f} bits"
    )
)
c_kl_example.broken("KL(q‖π)", lambda case: torch.tensor([0.1017, 0.1467], dtype=torch.float64))


@corrected(
    "C",
    "4.2, example",
    r"$D_{KL}(\pi \Vert p)$ with $p = (.3, .4, .2, .1)$ in the place of $D_{KL}(\pi"
    r" \Vert q)$",
    r"$D_{KL}(\pi \Vert q) = D_{KL}(\pi \Vert p) - E_\pi[\log \frac{q}{p}]$",
    "nats",
    "t07",
    with_auxiliary,
)
def c_auxiliary_example(example: Auxiliary) -> Formulas:
    """The divergence KL(π‖q) with an auxiliary model in the place of q."""
    case, log_auxiliary = example
    printed = kl(case.log_policy, log_auxiliary)
    missed = logspace.expectation(case.log_policy, case.log_prior - log_auxiliary)
    return Formulas(
        truth=kl(case.log_policy, case.log_prior), printed=printed, corrected=printed - missed
    )


c_auxiliary_example.says(
    lambda example, found: (
        f"KL(π‖p) = {found.printed:.4f} nats where KL(π‖q) = {found.truth:.4f}: an error of"
        f" {found.printed - found.truth:+.12f}"
    )
)


def _added(example: Auxiliary) -> Tensor:
    found = c_auxiliary_example(example)
    return 2 * found.printed - found.right


c_auxiliary_example.broken("the mean of log q/p added", _added)


class Weighting(NamedTuple):
    """Two distributions [K] as log-probabilities, and a function [K]."""

    log_p: Tensor
    log_q: Tensor
    values: Tensor


def _weightings() -> list[Weighting]:
    """f = r under P = π from Q = q, with the last sentence taken out of Q, and with full
    support.
    """
    plain = [Weighting(case.log_policy, case.log_prior, case.rewards) for case in sentences()]
    return [_without_last(weighting) for weighting in plain] + plain


def _without_last(weighting: Weighting) -> Weighting:
    none = torch.tensor([-math.inf], dtype=torch.float64)
    return weighting._replace(log_q=logspace.log_normalize(torch.cat([weighting.log_q[:-1], none])))


@corrected(
    "C",
    "4.2",
    r"$E_P[f] = E_Q[f\, P/Q]$",
    r"$E_P[f] = E_Q[f\, P/Q] + \sum_{Q(y) = 0} P(y) f(y)$, no more to add where $Q > 0$"
    r" wherever $P f \neq 0$",
    "reward units",
    "t07",
    _weightings,
)
def c_importance(weighting: Weighting) -> Formulas:
    """The mean of f under P from draws of Q; an outcome with Q = 0 is never drawn."""
    log_p, log_q, values = weighting
    weight = torch.where(log_q > -math.inf, log_p - log_q, 0.0).exp()
    printed = logspace.expectation(log_q, values * weight)
    never_drawn = (log_p.exp() * values)[log_q == -math.inf].sum()
    return Formulas(
        truth=logspace.expectation(log_p, values),
        printed=printed,
        corrected=printed + never_drawn,
    )


@c_importance.says
def _(weighting: Weighting, found: Formulas) -> str:
    full = c_importance(weighting._replace(log_q=course_case().log_prior)).printed
    return (
        f"E_π[r] = {found.truth:.4g}, and with Q = q weighting gives {full:.4g};"
        f" with Q(a dog) = 0 it gives {found.printed:.4g}, the mass that Q never draws"
        " being lost"
    )


def _self_normalised(weighting: Weighting) -> Tensor:
    weights = c_importance(weighting._replace(values=torch.ones_like(weighting.values))).printed
    return c_importance(weighting).printed / weights


c_importance.broken("divided by the mean weight instead", _self_normalised)

_KL_COEFS = (0.2, 0.5, 1.0, 3.0)


@holds(
    "C",
    "1.3",
    r"the KL penalty keeps text close to the corpus: $D_{KL}(\pi^* \Vert q)$ falls as"
    r" $\lambda$ grows",
    "nats a reward unit",
    "t03",
    sentences,
)
def c_stays_close(case: Case) -> Formulas:
    """The slopes of KL(π*‖q) at several λ, −Var_{π*}(r)/λ³ by (5); the truth by autograd through
    the posterior.
    """
    kl_coefs = torch.tensor(_KL_COEFS, dtype=torch.float64, requires_grad=True)
    log_star = torch.log_softmax(case.log_prior + case.rewards / kl_coefs[:, None], -1)
    return Formulas(
        truth=torch.autograd.grad(kl(log_star, case.log_prior).sum(), kl_coefs)[0],
        printed=torch.stack([_variance_slope(case.at(kl_coef)) for kl_coef in _KL_COEFS]),
    )


def _variance_slope(case: Case) -> Tensor:
    mean = logspace.expectation(case.log_star, case.rewards)
    variance = logspace.expectation(case.log_star, (case.rewards - mean).square())
    return -variance / case.kl_coef**3


@c_stays_close.says
def _(case: Case, found: Formulas) -> str:
    kls = [kl(case.at(kl_coef).log_star, case.log_prior) for kl_coef in (0.0, *_KL_COEFS)]
    return (
        f"at the optimum KL(π*‖q) = {', '.join(f'{value:.4f}' for value in kls)} nats at λ = 0,"
        f" {', '.join(f'{kl_coef:g}' for kl_coef in _KL_COEFS)}: close by that much, no more"
    )


c_stays_close.broken(
    "divided by λ²", lambda case: c_stays_close(case).printed * torch.tensor(_KL_COEFS)
)
