"""Statements about divergences: geometry, inequalities, other regularisers, what samples of π
estimate.

KL(π‖q) = E_π[u],    u = log π/q,    D_f(π‖q) = E_q f(π/q)                                       (1)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from klrl_edu.closed_forms import acceptance, regularizers
from klrl_edu.closed_forms.moments import match_moments
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.estimators import divergences, kl_values
from klrl_edu.theory.cases import Case
from klrl_edu.theory.statements import Sides, bound, identity

kl, mean = logspace.kl_divergence, logspace.expectation


def tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The total variation of two distributions, as the mean of its estimator under p."""
    return mean(log_p, divergences.total_variation(log_p - log_q))


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
    # the one of the family that has the moment of p
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
    # by autograd through the tilt; the covariance is written out
    jacobian = torch.autograd.functional.jacobian(
        lambda b: tilt(case.log_prior, features @ b, 1.0).log_posterior.exp() @ features, beta
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
    """A small divergence bounds the difference of every probability; two nearly equal halves reach
    the bound.
    """
    return _pinsker(case, 0.5)


def _pinsker(case: Case, factor: float) -> Sides:
    """TV² and the factor times KL, of the policy and of a pair that nearly reaches the bound."""
    # near the half TV² ≈ KL/2, so that a smaller factor shows
    pairs = (case.log_policy, case.log_prior), _two(0.51 + 0.01 * case.noise.random(), 0.5)
    return (
        torch.stack([tv(p, q) ** 2 for p, q in pairs]),
        torch.stack([factor * kl(p, q) for p, q in pairs]),
    )


def _two(p: float, q: float) -> tuple[Tensor, Tensor]:
    """Two laws of two outcomes, (p, 1 − p) and (q, 1 − q), as logs [2]."""
    chances = torch.tensor([[p, 1 - p], [q, 1 - q]], dtype=torch.float64)
    return chances[0].log(), chances[1].log()


pinsker.broken("a quarter in place of the half", lambda case: _pinsker(case, 0.25))


@bound(
    r"\mathrm{TV}(\pi,q) \le \sqrt{1-e^{-\mathrm{KL}(\pi\|q)}}", "Bretagnolle & Huber (1979)", "t01"
)
def bretagnolle_huber(case: Case) -> Sides:
    """A bound on total variation that stays below one however large the divergence; laws far apart
    come near it.
    """
    return _far_apart(case, lambda divergence: torch.sqrt(-torch.expm1(-divergence)))


def _far_apart(case: Case, most: Callable[[Tensor], Tensor]) -> Sides:
    """TV, and what a function of KL allows, of the policy and of two laws that hardly overlap."""
    # laws that hardly overlap come near the bound, so that a slip shows
    pairs = (case.log_policy, case.log_prior), _two(1e-6, 1 - 1e-6)
    return (
        torch.stack([tv(p, q) for p, q in pairs]),
        torch.stack([most(kl(p, q)) for p, q in pairs]),
    )


bretagnolle_huber.broken(
    "1 − e^{−KL/2} without the root",
    lambda case: _far_apart(case, lambda divergence: -torch.expm1(-divergence / 2)),
)


@bound(
    r"\mathrm{KL}(\pi\|q) \le \log\big(1+\chi^2(\pi\|q)\big)", "Jensen; Gibbs & Su (2002)", "t14"
)
def chi_squared_bound(case: Case) -> Sides:
    """The χ² divergence, the variance of importance weights, bounds KL."""
    return _chi_squared_bound(case, 1.0)


def _chi_squared_bound(case: Case, factor: float) -> Sides:
    """KL at most the factor times log(1 + χ²), χ² the mean of its estimator, no more than the
    square of weights says.
    """
    # the estimator's convention has a half
    chi_squared = 2 * mean(case.log_policy, divergences.chi_squared(case.log_ratio))
    most = factor * torch.log1p(chi_squared)
    by_weights = torch.logsumexp(2 * case.log_policy - case.log_prior, 0)
    return torch.stack([kl(case.log_policy, case.log_prior), most]), torch.stack([most, by_weights])


chi_squared_bound.broken("half of it", lambda case: _chi_squared_bound(case, 0.5))


@bound(
    r"\mathrm{JS}(\pi,q) \le \min\{\log 2,\ \tfrac14(\mathrm{KL}(\pi\|q)+\mathrm{KL}(q\|\pi))\}",
    "Lin (1991)",
    "t01",
)
def jensen_shannon_bound(case: Case) -> Sides:
    """Jensen–Shannon is at most log 2, which laws far apart come near, and at most a quarter of
    both divergences.
    """
    return _jensen_shannon(case, 1 / 4)


def _jensen_shannon(case: Case, share: float) -> Sides:
    """JS, and the least of log 2 and a share of both divergences, of the policy and of two laws
    that hardly overlap.
    """
    pairs = (case.log_policy, case.log_prior), _two(1e-6, 1 - 1e-6)
    found = [mean(p, divergences.jensen_shannon(p - q)) for p, q in pairs]
    most = [(share * (kl(p, q) + kl(q, p))).clamp(max=math.log(2)) for p, q in pairs]
    return torch.stack(found), torch.stack(most)


jensen_shannon_bound.broken("a tenth of both", lambda case: _jensen_shannon(case, 1 / 10))


@identity(
    r"r(y) - \lambda f'(\pi(y)/q(y)) = \nu,\ \sum_y\pi(y) = 1,\quad f(t) = -\log t",
    "Wang et al. (2023), f-DPO",
    "t12",
)
def forward_kl_optimum(case: Case) -> Sides:
    """Under forward KL the optimum is λq/(ν − r): rewards balance −λq/π, and π sums to one."""
    return _balance(
        case, regularizers.forward_kl(case.log_prior, case.rewards, case.kl_coef).log_probs
    )


def _balance(case: Case, log_pi: Tensor) -> Sides:
    residual = case.rewards + case.kl_coef * torch.exp(case.log_prior - log_pi)
    one = torch.ones(1, dtype=torch.float64)
    # ν is their mean, as at the optimum all residuals are equal
    return torch.cat([residual, log_pi.exp().sum()[None]]), torch.cat(
        [residual.mean().expand_as(residual), one]
    )


forward_kl_optimum.broken(
    "the posterior, which reverse KL has for its optimum",
    lambda case: _balance(case, case.log_star),
)


@identity(
    r"\pi^*_{\chi^2} = q\,[1+(r-\nu)/\lambda]_+,\quad \sum_y\pi^*_{\chi^2} = 1",
    "Huang et al. (2024)",
    "t12",
)
def chi_squared_optimum(case: Case) -> Sides:
    """Under χ² the optimum is linear in the reward, zero below a threshold, and sums to one."""
    return _linear(case, lambda found: found.log_probs)


def _linear(case: Case, law: Callable[[regularizers.Optimum], Tensor]) -> Sides:
    found = regularizers.chi_squared(case.log_prior, case.rewards, case.kl_coef)
    linear = (1 + (case.rewards - found.normaliser) / case.kl_coef).clamp(min=0)
    pi, one = law(found).exp(), torch.ones(1, dtype=torch.float64)
    return torch.cat([pi, pi.sum()[None]]), torch.cat([case.log_prior.exp() * linear, one])


chi_squared_optimum.broken(
    "the posterior in its place", lambda case: _linear(case, lambda _: case.log_star)
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
    # 1 + χ² = Σ π²/q
    chi_squared = torch.logsumexp(2 * case.log_policy - case.log_prior, 0).expm1()
    return case.log_policy.exp() @ kl_values.k3(-case.log_ratio), chi_squared - kl(
        case.log_policy, case.log_prior
    )


swapped_ratio.broken(
    "KL(π‖q)", lambda case: (swapped_ratio.sides(case)[0], kl(case.log_policy, case.log_prior))
)


@identity(
    r"\mathrm{Var}_\pi(u + c(e^{-u}-1)) = \mathrm{Var}_\pi(u) -"
    r" \tfrac{\mathrm{Cov}(u,e^{-u})^2}{\mathrm{Var}(e^{-u})} +"
    r" (c-c^*)^2\,\mathrm{Var}(e^{-u}),\quad"
    r" c^* = -\tfrac{\mathrm{Cov}(u,e^{-u})}{\mathrm{Var}(e^{-u})}",
    "control variates",
    "t06",
)
def best_control_variate(case: Case) -> Sides:
    """Of the family k1 + c·(q/π − 1) the variance is least at c*, and grows with the square of the
    distance from it.
    """
    return _variances(case, kl_values.best_coefficient(case.log_policy, case.log_prior))


def _variances(case: Case, best: Tensor) -> Sides:
    """The variance of k_c at c*, about it and at k1 and k3, in parts of Var(e^−u) [5]."""
    away = case.normal(2)
    # at c* alone a wrong scale of c would not show
    coefficients = torch.stack([best, best + away[0], best - away[1], 0 * best, 0 * best + 1])
    log_pi, weight = case.log_policy, torch.exp(-case.log_ratio)
    spread, joint = _cov(log_pi, weight, weight), _cov(log_pi, case.log_ratio, weight)
    values = kl_values.control_variate(case.log_ratio, coefficients[:, None])
    found = torch.stack([_cov(log_pi, one, one) for one in values])
    least = _cov(log_pi, case.log_ratio, case.log_ratio) - joint**2 / spread
    return found / spread, least / spread + (coefficients - best) ** 2


def _cov(log_p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return mean(log_p, (x - mean(log_p, x)) * (y - mean(log_p, y)))


best_control_variate.broken(
    "c* taken for 1, which is k3",
    lambda case: _variances(case, torch.ones((), dtype=torch.float64)),
)


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
    # at half λ the exponent is 2r/λ
    doubled = torch.logsumexp(case.log_prior + 2 * case.rewards / case.kl_coef, 0)
    log_share = math.log(
        acceptance.effective_sample_size(case.log_prior, case.rewards, case.kl_coef)
    )
    return -log_share, doubled - 2 * case.tilted.log_evidence


effective_samples.broken(
    "e^{KL(π*‖q)}, which is only a bound",
    lambda case: (effective_samples.sides(case)[0], kl(case.log_star, case.log_prior)),
)
