"""Article C, an RNN policy with a KL penalty, and importance sampling on four sentences: eight
rows, nine claims.

    J(π) = E_π[r] − λ KL(π‖q) = λ log Z − λ KL(π‖π*)                                             (1)
    ∇E_π[r] = E_π[r s],    ∇KL(π‖q) = E_π[s log π/q],    s = ∇log π                              (2)
    E_π[s (log π/p + c)] = ∇KL(π‖p) = ∇KL(π‖q) + E_π[s log q/p]
    for any c: biased unless p = q                                                               (3)
    its total variance is least at c* = −E[‖s‖² log π/p]/E[‖s‖²]                                 (4)
    d KL(π*‖q)/dλ = −Var_{π*}(r)/λ³ ≤ 0                                                          (5)
    E_P[f] = E_Q[f P/Q] where Q > 0 wherever P f ≠ 0                                             (6)

K sentences; gradients in sequence logits; logs in nats.
"""

import math

import torch
from torch import Tensor

from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.core import logspace
from klrl_edu.estimators import kl_gradients
from klrl_edu.estimators.advantages import best_scalar_baseline
from klrl_edu.learning import losses
from klrl_edu.theory.articles.examples import (
    Auxiliary,
    course_case,
    mean_score,
    sentences,
    with_auxiliary,
)
from klrl_edu.theory.cases import Case
from klrl_edu.theory.gradients import forward_kl_gradient, kl, logit_gradient, scores
from klrl_edu.theory.verdicts import ClaimsOf, Formulas, shown

article = ClaimsOf("C", sentences)


def _vector(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values.tolist()) + ")"


@article.at("3.1", "reward units", "t03").holds(
    r"$J(\theta) = E_\pi[r] - \lambda D_{KL}(\pi_\theta \Vert q)$"
)
def c_objective(case: Case) -> Formulas:
    """The objective; the truth is λ log Z − λ KL(π‖π*), by (1)."""
    best, printed = case.tilted.value, case.objective(case.log_policy)
    penalty = case.kl_coef * kl(case.log_policy, case.log_prior)
    return Formulas(
        truth=best - case.kl_coef * kl(case.log_policy, case.log_star),
        printed=printed,
        broken={"the penalty added": printed + 2 * penalty},
        says=lambda found: (
            f"J(π) = {printed:.6f}; its maximiser, which the article leaves out, is π* ∝ q"
            f" e^(r/λ) = {_vector(case.log_star.exp())}, better by λ KL(π‖π*) ="
            f" {best - printed:.12f}"
        ),
    )


@article.at("3.2 (3)", "reward units", "t05").holds(
    r"$\nabla E[r] \approx \frac{1}{N} \sum_i r(x_i) \nabla \log \pi(x_i)$"
)
def c_reinforce(case: Case) -> Formulas:
    """The gradient of the mean reward [K]: its mean over every batch of N = 2, by enumeration; the
    truth by autograd.
    """
    unpenalised = case.at(0.0).problem  # λ = 0: the reward alone
    printed = -audit_gradient(losses.reinforce, case.policy, unpenalised, batch_size=2).mean
    return Formulas(
        truth=logit_gradient(case, lambda log_pi: logspace.expectation(log_pi, case.rewards)),
        printed=printed,
        broken={"less the mean of its own batch: shrunk by (N − 1)/N": printed / 2},
        says=lambda found: (
            f"over every batch of two sentences its mean is {_vector(found.printed)} = ∇E[r]"
        ),
    )


@article.at("3.2 (4)", "nats", "t06").holds(
    r"$\nabla D_{KL} = E_\pi[\nabla \log \pi\, (\log \pi - \log q)]$"
)
def c_kl_gradient(case: Case) -> Formulas:
    """The gradient of KL(π‖q) [K] as the mean score that the package's surrogate has over all
    sentences, by (2); the truth by autograd.
    """
    extra = mean_score(case, torch.ones_like(case.log_policy)).abs().max()
    return Formulas(
        truth=_kl_gradient(case, case.log_prior),
        printed=audit_gradient(kl_gradients.reward_k1, case.policy, case.problem).mean,
        broken={
            "KL(q‖π)": forward_kl_gradient(case),
            "the mean of ∇u², not of ∇u²/2": 2 * mean_score(case, case.log_ratio),
        },
        says=lambda found: (
            f"∇KL(π‖q) = {_vector(found.printed)}; the 1 that differentiating log π adds has mean"
            f" {shown(float(extra))}"
        ),
    )


def _kl_gradient(case: Case, log_reference: Tensor) -> Tensor:
    """The gradient of KL(π‖reference) [K], by autograd."""
    return logit_gradient(case, lambda log_pi: kl(log_pi, log_reference))


@article.at("3.3, 4.2", "nats", "t07", on=with_auxiliary).false(
    r"$\nabla D_{KL} \approx E_\pi[\nabla \log \pi\, (\log \frac{\pi}{p} + c)]$, unbiased"
    r" importance sampling",
    r"$\nabla D_{KL} = E_\pi[\nabla \log \pi\, \log \frac{\pi}{p}] - E_\pi[\nabla \log"
    r" \pi\, \log \frac{q}{p}]$",
)
def c_auxiliary(example: Auxiliary) -> Formulas:
    """The gradient of KL(π‖q) [K] with an auxiliary model p in the place of q, and less the bias by
    which (3) misses it.
    """
    printed, bias = auxiliary_gradient(example), auxiliary_bias(example)
    return Formulas(
        truth=_kl_gradient(example.case, example.case.log_prior),
        printed=printed,
        corrected=printed - bias,
        broken={"the bias added again": printed + bias},
        says=lambda found: (
            "the samples come from π, so nothing is importance-weighted; the mean is"
            f" {_vector(printed)} where ∇KL(π‖q) = {_vector(found.truth)}:"
            f" a bias {_vector(bias)} of norm {bias.norm():.6f} for any number of samples"
        ),
    )


def auxiliary_gradient(example: Auxiliary, constant: float = 0.0) -> Tensor:
    """The gradient E_π[s (log π/p + c)] [K], with an auxiliary model p in the place of q."""
    case, log_auxiliary = example
    return mean_score(case, case.log_policy - log_auxiliary + constant)


def auxiliary_bias(example: Auxiliary) -> Tensor:
    """The bias E_π[s log q/p] [K], by which (3) misses ∇KL(π‖q)."""
    case, log_auxiliary = example
    return mean_score(case, case.log_prior - log_auxiliary)


@article.at("3.3, 4.2", "nats", "t07", on=with_auxiliary).holds(
    r"$E_\pi[\nabla \log \pi\, (\log \frac{\pi}{p} + c)]$ for any constant $c$"
)
def c_constant(example: Auxiliary) -> Formulas:
    """The mean for several c, then the variance at c* of (4): [C·K + 1]. The truth are ∇KL(π‖p) by
    autograd, once for each c, and the lowest point of the variance, a parabola in c through three
    of its points.
    """
    left, middle, right = (constant_variance(example, c) for c in (-1.0, 0.0, 1.0))
    slope, curvature = (right - left) / 2, right - 2 * middle + left
    lowest = middle - slope**2 / (2 * curvature)
    constants, best = (0.0, 1.0, -2.0), best_constant(example)
    # the means carry c as given, the variance stands last and alone depends on c
    truth = _kl_gradient(example.case, example.log_auxiliary).repeat(len(constants))
    means = torch.cat([auxiliary_gradient(example, c) for c in constants])
    printed, negated, halved = (
        torch.cat([means, constant_variance(example, c)[None]]) for c in (best, -best, best / 2)
    )
    return Formulas(
        truth=torch.cat([truth, lowest[None]]),
        printed=printed,
        broken={"c* without its sign": negated, "half of c*": halved},
        says=lambda found: (
            f"no c changes the mean; the variance of one sample is least, {printed[-1]:.6f}, at c*"
            f" = {best:.6f} nats ({middle:.6f} at c = 0, {right:.6f} at c = 1)"
        ),
    )


def best_constant(example: Auxiliary) -> float:
    """The constant c* of (4) with the least variance, in nats: a baseline of −c* for log π/p."""
    case, log_auxiliary = example
    squared_norms = scores(case.log_policy).square().sum(-1)
    log_ratio = case.log_policy - log_auxiliary
    return -float(best_scalar_baseline(log_ratio, squared_norms, case.log_policy))


def constant_variance(example: Auxiliary, constant: float) -> Tensor:
    """The total variance of one sample's gradient, E‖s (log π/p + c)‖² − ‖E s (log π/p + c)‖²: a
    scalar.
    """
    case, log_auxiliary = example
    each = scores(case.log_policy) * (case.log_policy - log_auxiliary + constant)[:, None]
    probs = case.log_policy.exp()
    return probs @ each.square().sum(-1) - (probs @ each).square().sum()


@article.at("4.1, example", "nats or bits", "t01", on=lambda: (course_case(),)).false(
    r"$D_{KL} \approx 0.22$ for $q = (.4, .3, .2, .1)$, $\pi = (.5, .2, .1, .2)$",
    r"$D_{KL} \approx 0.0998$ nats $= 0.1440$ bits",
    tolerance=5e-5,
)
def c_kl_example(case: Case) -> Formulas:
    """The divergence KL(π‖q) of the four sentences, in nats and in bits [2]."""
    truth, turned = (
        torch.stack([nats, nats / math.log(2)])
        for nats in (kl(case.log_policy, case.log_prior), kl(case.log_prior, case.log_policy))
    )
    return Formulas(
        truth=truth,
        printed=torch.tensor([0.22, 0.22], dtype=torch.float64),
        corrected=torch.tensor([0.0998, 0.1440], dtype=torch.float64),
        broken={"KL(q‖π)": turned},
        says=lambda found: f"printed 0.22; KL(π‖q) = {truth[0]:.4f} nats = {truth[1]:.4f} bits",
    )


@article.at("4.2, example", "nats", "t07", on=with_auxiliary).corrected(
    r"$D_{KL}(\pi \Vert p)$ with $p = (.3, .4, .2, .1)$ in the place of $D_{KL}(\pi"
    r" \Vert q)$",
    r"$D_{KL}(\pi \Vert q) = D_{KL}(\pi \Vert p) - E_\pi[\log \frac{q}{p}]$",
)
def c_auxiliary_example(example: Auxiliary) -> Formulas:
    """The divergence KL(π‖q) with an auxiliary model in the place of q."""
    case, log_auxiliary = example
    printed = kl(case.log_policy, log_auxiliary)
    missed = logspace.expectation(case.log_policy, case.log_prior - log_auxiliary)
    return Formulas(
        truth=kl(case.log_policy, case.log_prior),
        printed=printed,
        corrected=printed - missed,
        broken={"the mean of log q/p added": printed + missed},
        says=lambda found: (
            f"KL(π‖p) = {printed:.4f} nats where KL(π‖q) = {found.truth:.4f}: an error of"
            f" {printed - found.truth:+.12f}"
        ),
    )


def _drawn_by_another() -> list[Auxiliary]:
    """Q = q, then a Q that leaves out the last sentence, where f is 0."""
    unrewarded = course_case().rewarded(course_case().rewards * torch.tensor([1.0, 1.0, 1.0, 0.0]))
    drawn_by_prior = [Auxiliary(case, case.log_prior) for case in sentences()]
    return [*drawn_by_prior, without_last(unrewarded)]


def without_last(case: Case) -> Auxiliary:
    """Q = q, the last sentence left out."""
    none = torch.tensor([-math.inf], dtype=torch.float64)
    return Auxiliary(case, logspace.log_normalize(torch.cat([case.log_prior[:-1], none])))


@article.at("4.2", "reward units", "t07", on=_drawn_by_another).holds(
    r"$E_P[f] = E_Q[f\, P/Q]$, as usual with $Q > 0$ wherever $P f \neq 0$"
)
def c_importance(example: Auxiliary) -> Formulas:
    """The mean of f = r under P = π, from draws of an auxiliary Q: (6)."""
    case, log_q = example
    # Q (P/Q)^power in logarithms, so that Q = 0 gives 0 and not 0 · inf
    upside_down, root = (
        ((1 - power) * log_q + power * case.log_policy).exp() @ case.rewards for power in (-1, 0.5)
    )
    return Formulas(
        truth=case.log_policy.exp() @ case.rewards,
        printed=weighed_mean(example),
        broken={"Q/P for P/Q": upside_down, "the root of P/Q": root},
        says=lambda found: (
            f"E_π[r] = {found.truth:.4g}, and with Q = q weighting gives {found.printed:.4g};"
            " outside its condition, with Q(a dog) = 0, it gives"
            f" {weighed_mean(without_last(case)):.4g}, the mass that Q never draws being lost"
        ),
    )


def weighed_mean(example: Auxiliary) -> Tensor:
    """The mean over every draw of Q of f P/Q, as the package enumerates draws: a scalar in reward
    units.
    """

    def weighed(log_probs: Tensor, behaviour_log_probs: Tensor, rewards: Tensor) -> Tensor:
        return (log_probs - behaviour_log_probs).sum(-1).exp() * rewards.sum(-1)

    case, drawn_by = example.case, example.case.table(example.log_auxiliary)
    return audit_value(weighed, case.policy, case.problem, behaviour=drawn_by).mean.squeeze()


_KL_COEFS = (0.2, 0.5, 1.0, 3.0)


@article.at("1.3", "nats a reward unit", "t03").holds(
    r"the KL penalty keeps text close to the corpus: $D_{KL}(\pi^* \Vert q)$ falls as"
    r" $\lambda$ grows"
)
def c_stays_close(case: Case) -> Formulas:
    """The slopes of KL(π*‖q) at several λ, −Var_{π*}(r)/λ³ by (5); the truth by autograd through
    the posterior.
    """
    kl_coefs = torch.tensor(_KL_COEFS, dtype=torch.float64, requires_grad=True)
    log_star = torch.log_softmax(case.log_prior + case.rewards / kl_coefs[:, None], -1)
    printed = torch.stack([_variance_slope(case.at(kl_coef)) for kl_coef in _KL_COEFS])
    return Formulas(
        truth=torch.autograd.grad(kl(log_star, case.log_prior).sum(), kl_coefs)[0],
        printed=printed,
        broken={"divided by λ²": printed * torch.tensor(_KL_COEFS)},
        says=lambda found: (
            f"at the optimum KL(π*‖q) = {_kl_at(case, (0.0, *_KL_COEFS))} nats at λ = 0,"
            f" {', '.join(f'{kl_coef:g}' for kl_coef in _KL_COEFS)}: close by that much, no more"
        ),
    )


def _variance_slope(case: Case) -> Tensor:
    mean = logspace.expectation(case.log_star, case.rewards)
    variance = logspace.expectation(case.log_star, (case.rewards - mean).square())
    return -variance / case.kl_coef**3


def _kl_at(case: Case, kl_coefs: tuple[float, ...]) -> str:
    return ", ".join(f"{kl(case.at(c).log_star, case.log_prior):.4f}" for c in kl_coefs)
