"""Statements about divergences: geometry, inequalities, other regularisers, what samples of π
estimate.

KL(π‖q) = E_π[u],    u = log π/q,    D_f(π‖q) = E_q f(π/q)                                       (1)
"""

import math

import torch
from torch import Tensor

from klrl_edu.closed_forms import acceptance, regularizers
from klrl_edu.closed_forms.moments import match_moments
from klrl_edu.core import logspace
from klrl_edu.estimators import kl_values
from klrl_edu.theory.cases import Case
from klrl_edu.theory.statements import Sides, bound, identity

kl, mean = logspace.kl_divergence, logspace.expectation


def tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The total variation of two distributions, ½ Σ |p − q|."""
    return (log_p.exp() - log_q.exp()).abs().sum() / 2


@identity(
    r"\mathrm{KL}(p\|q) = \mathrm{KL}(p\|\pi) + \mathrm{KL}(\pi\|q) + \sum_y"
    r" (p-\pi)\log\frac{\pi}{q}",
    "Bregman (1967); three-point identity",
    "t02",
)
def three_points(case: Case) -> Sides:
    """The divergence of p from q by way of a third distribution."""
    log_p = case.distribution(len(case.rewards))
    cross = ((log_p.exp() - case.log_policy.exp()) * case.log_ratio).sum()
    return (
        kl(log_p, case.log_prior),
        kl(log_p, case.log_policy) + kl(case.log_policy, case.log_prior) + cross,
    )


def _without_cross(case: Case) -> Sides:
    log_p = case.distribution(len(case.rewards))
    return kl(log_p, case.log_prior), kl(log_p, case.log_policy) + kl(
        case.log_policy, case.log_prior
    )


three_points.broken("the cross term left out", _without_cross)


@identity(
    r"E_p\phi = E_{\pi}\phi,\ \pi\propto q e^{\beta\phi} \;\Rightarrow\; \mathrm{KL}(p\|q) ="
    r" \mathrm{KL}(p\|\pi) + \mathrm{KL}(\pi\|q)",
    "Csiszár (1975), th. 2.2",
    "t14",
)
def pythagoras(case: Case) -> Sides:
    """From the projection on a moment constraint, divergences add like squares."""
    log_p = case.distribution(len(case.rewards))
    feature = case.normal(len(case.rewards), 1)
    projection = match_moments(case.log_prior, feature, log_p.exp() @ feature).log_probs
    return kl(log_p, case.log_prior), kl(log_p, projection) + kl(projection, case.log_prior)


def _other_moment(case: Case) -> Sides:
    log_p = case.distribution(len(case.rewards))
    return kl(log_p, case.log_prior), kl(log_p, case.log_star) + kl(case.log_star, case.log_prior)


pythagoras.broken("a tilted distribution with another moment", _other_moment)


@identity(
    r"\frac{\partial E_\pi\phi_i}{\partial\beta_j} = \mathrm{Cov}_\pi(\phi_i,\phi_j),\quad"
    r" \pi\propto q e^{\beta\cdot\phi}",
    "exponential families",
    "t14",
)
def moment_covariance(case: Case) -> Sides:
    """The moments of an exponential family move with their covariance."""
    features, beta = _features(case)
    jacobian = torch.autograd.functional.jacobian(
        lambda b: torch.softmax(case.log_prior + features @ b, 0) @ features, beta
    )
    return jacobian, _covariance(torch.log_softmax(case.log_prior + features @ beta, 0), features)


def _features(case: Case) -> tuple[Tensor, Tensor]:
    return case.normal(len(case.rewards), 2), case.normal(2)


def _covariance(log_p: Tensor, features: Tensor) -> Tensor:
    away = features - log_p.exp() @ features
    return (away * log_p.exp()[:, None]).T @ away


moment_covariance.broken(
    "the covariance under the prior",
    lambda case: (
        moment_covariance.sides(case)[0],
        _covariance(case.log_prior, _features(case)[0]),
    ),
)


@bound(
    r"\mathrm{TV}(\pi,q)^2 \le \tfrac12\,\mathrm{KL}(\pi\|q)",
    "Pinsker; Tsybakov (2009), lemma 2.5",
    "t01",
)
def pinsker(case: Case) -> Sides:
    """A small divergence bounds the difference of every probability."""
    return (
        tv(case.log_policy, case.log_prior) ** 2,
        kl(case.log_policy, case.log_prior) / 2,
    )


def _near_half(case: Case) -> Sides:
    """Where Pinsker is nearly sharp: two nearly equal halves."""
    shift = 0.1 + 0.1 * case.noise.random()
    p, q = (torch.tensor([0.5 + x, 0.5 - x], dtype=torch.float64).log() for x in (shift, 0.0))
    return tv(p, q) ** 2, kl(p, q) / 4


pinsker.broken("a quarter in place of the half", _near_half)


@bound(
    r"\mathrm{TV}(\pi,q) \le \sqrt{1-e^{-\mathrm{KL}(\pi\|q)}}", "Bretagnolle & Huber (1979)", "t01"
)
def bretagnolle_huber(case: Case) -> Sides:
    """A bound on total variation that stays below one however large the divergence."""
    return tv(case.log_policy, case.log_prior), torch.sqrt(
        -torch.expm1(-kl(case.log_policy, case.log_prior))
    )


def _half_the_exponent(case: Case) -> Sides:
    return tv(case.log_policy, case.log_prior), -torch.expm1(
        -kl(case.log_policy, case.log_prior) / 2
    )


bretagnolle_huber.broken("1 − e^{−KL/2} without the root", _half_the_exponent)


@bound(
    r"\mathrm{KL}(\pi\|q) \le \log\big(1+\chi^2(\pi\|q)\big)", "Jensen; Gibbs & Su (2002)", "t14"
)
def chi_squared_bound(case: Case) -> Sides:
    """The χ² divergence, the variance of importance weights, bounds KL."""
    return kl(case.log_policy, case.log_prior), torch.logsumexp(
        2 * case.log_policy - case.log_prior, 0
    )


chi_squared_bound.broken(
    "half of it",
    lambda case: (
        kl(case.log_policy, case.log_prior),
        torch.logsumexp(2 * case.log_policy - case.log_prior, 0) / 2,
    ),
)


@bound(
    r"\mathrm{JS}(\pi,q) \le \min\{\log 2,\ \tfrac14(\mathrm{KL}(\pi\|q)+\mathrm{KL}(q\|\pi))\}",
    "Lin (1991)",
    "t01",
)
def jensen_shannon_bound(case: Case) -> Sides:
    """Jensen–Shannon is at most log 2, and at most a quarter of both divergences."""
    both = kl(case.log_policy, case.log_prior) + kl(case.log_prior, case.log_policy)
    return _jensen_shannon(case), torch.minimum(
        both / 4, torch.tensor(math.log(2), dtype=torch.float64)
    )


def _jensen_shannon(case: Case) -> Tensor:
    middle = torch.logaddexp(case.log_policy, case.log_prior) - math.log(2)
    return (kl(case.log_policy, middle) + kl(case.log_prior, middle)) / 2


jensen_shannon_bound.broken(
    "a tenth of both",
    lambda case: (
        _jensen_shannon(case),
        (kl(case.log_policy, case.log_prior) + kl(case.log_prior, case.log_policy)) / 10,
    ),
)


@identity(
    r"r(y) - \lambda f'(\pi(y)/q(y)) = \nu,\quad f(t) = -\log t", "Wang et al. (2023), f-DPO", "t12"
)
def forward_kl_optimum(case: Case) -> Sides:
    """Under forward KL the optimum is λq/(ν − r): rewards balance −λq/π."""
    log_pi = regularizers.forward_kl(case.log_prior, case.rewards, case.kl_coef).log_probs
    residual = case.rewards + case.kl_coef * torch.exp(case.log_prior - log_pi)
    return residual, residual.mean().expand_as(residual)


def _forward_of_posterior(case: Case) -> Sides:
    residual = case.rewards + case.kl_coef * torch.exp(case.log_prior - case.log_star)
    return residual, residual.mean().expand_as(residual)


forward_kl_optimum.broken(
    "the posterior, which reverse KL has for its optimum", _forward_of_posterior
)


@identity(
    r"\pi^*_{\chi^2} = q\,[1+(r-\nu)/\lambda]_+,\quad \sum_y\pi^*_{\chi^2} = 1",
    "Huang et al. (2024)",
    "t12",
)
def chi_squared_optimum(case: Case) -> Sides:
    """Under χ² the optimum is linear in the reward, and zero below a threshold."""
    found = regularizers.chi_squared(case.log_prior, case.rewards, case.kl_coef)
    linear = (1 + (case.rewards - found.normaliser) / case.kl_coef).clamp(min=0)
    return found.log_probs.exp(), case.log_prior.exp() * linear


chi_squared_optimum.broken(
    "the posterior in its place",
    lambda case: (case.log_star.exp(), chi_squared_optimum.sides(case)[1]),
)


@identity(r"E_\pi[k_1] = E_\pi[k_3] = \mathrm{KL}(\pi\|q)", "Schulman (2020)", "t06")
def unbiased_estimators(case: Case) -> Sides:
    """k1 and k3 estimate the divergence without bias."""
    values = torch.stack([kl_values.k1(case.log_ratio), kl_values.k3(case.log_ratio)])
    return values @ case.log_policy.exp(), kl(case.log_policy, case.log_prior).expand(2)


unbiased_estimators.broken(
    "k3 with the opposite ratio, which estimates χ² − KL",
    lambda case: (
        torch.stack([kl_values.k1(case.log_ratio), kl_values.k3(-case.log_ratio)])
        @ case.log_policy.exp(),
        unbiased_estimators.sides(case)[1],
    ),
)


@identity(
    r"E_\pi[e^{u}-1-u] = \chi^2(\pi\|q) - \mathrm{KL}(\pi\|q)", "k3 with π and q exchanged", "t06"
)
def swapped_ratio(case: Case) -> Sides:
    """k3 with the ratio upside down estimates χ² − KL."""
    chi_squared = torch.logsumexp(2 * case.log_policy - case.log_prior, 0).expm1()
    return case.log_policy.exp() @ kl_values.k3(-case.log_ratio), chi_squared - kl(
        case.log_policy, case.log_prior
    )


swapped_ratio.broken(
    "KL(π‖q)", lambda case: (swapped_ratio.sides(case)[0], kl(case.log_policy, case.log_prior))
)


@identity(
    r"\mathrm{Var}_\pi(u + c(e^{-u}-1)) \ge \mathrm{Var}_\pi(u + c^*(e^{-u}-1)),\quad c^* ="
    r" -\tfrac{\mathrm{Cov}(u,e^{-u})}{\mathrm{Var}(e^{-u})}",
    "control variates",
    "t06",
)
def best_control_variate(case: Case) -> Sides:
    """Of the family k1 + c·(q/π − 1) the variance is least at c*, and there it is Var u −
    Cov²/Var.
    """
    weight, log_pi = torch.exp(-case.log_ratio), case.log_policy
    spread, joint = _cov(log_pi, weight, weight), _cov(log_pi, case.log_ratio, weight)
    best = case.log_ratio - joint / spread * (weight - 1)
    return (
        _cov(log_pi, best, best) / spread,
        (_cov(log_pi, case.log_ratio, case.log_ratio) - joint**2 / spread) / spread,
    )


def _cov(log_p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return mean(log_p, (x - mean(log_p, x)) * (y - mean(log_p, y)))


def _k3_is_best(case: Case) -> Sides:
    values = kl_values.k3(case.log_ratio)
    spread = _cov(case.log_policy, torch.exp(-case.log_ratio), torch.exp(-case.log_ratio))
    return _cov(case.log_policy, values, values) / spread, best_control_variate.sides(case)[1]


best_control_variate.broken("c = 1, which is k3", _k3_is_best)


@identity(
    r"\frac{1}{\mathrm{ESS}/n} = E_q\Big[\Big(\frac{\pi^*}{q}\Big)^2\Big] = 1+\chi^2(\pi^*\|q) ="
    r" \frac{Z_{\lambda/2}}{Z_\lambda^2}",
    "Kong (1992)",
    "t07",
)
def effective_samples(case: Case) -> Sides:
    """The effective share of samples from the prior is an evidence at half λ over the square of the
    evidence.
    """
    doubled = torch.logsumexp(case.log_prior + 2 * case.rewards / case.kl_coef, 0)
    log_share = math.log(
        acceptance.effective_sample_size(case.log_prior, case.rewards, case.kl_coef)
    )
    return -log_share, doubled - 2 * case.tilted.log_evidence


effective_samples.broken(
    "e^{KL(π*‖q)}, which is only a bound",
    lambda case: (effective_samples.sides(case)[0], kl(case.log_star, case.log_prior)),
)
