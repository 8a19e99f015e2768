"""Statements about the posterior, its evidence, and the paths that lead to it.

    π* = q e^{r/λ}/Z,    J(π) = E_π[r] − λ KL(π‖q) = λ log Z − λ KL(π‖π*)                        (1)

β = 1/λ. Left and right sides come by different ways: the package's functions, autograd, quadrature,
sums over outcomes.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from klrl_edu.closed_forms.budget import mirror_descent_kl_coefs
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.theory.cases import Case
from klrl_edu.theory.statements import Sides, bound, identity

kl, mean = logspace.kl_divergence, logspace.expectation
_NODES = 40  # of Gauss–Legendre quadrature, a piece


@identity(
    r"\lambda\log Z - J(\pi) = \lambda\,\mathrm{KL}(\pi\,\|\,\pi^*)", "Korbak et al. (2022)", "t03"
)
def elbo(case: Case) -> Sides:
    """What a policy lacks to the best objective is λ times its divergence from the posterior."""
    return case.tilted.value - case.objective(case.log_policy), case.kl_coef * kl(
        case.log_policy, case.log_star
    )


elbo.broken(
    "the divergence the other way round",
    lambda case: (elbo.sides(case)[0], case.kl_coef * kl(case.log_star, case.log_policy)),
)


@identity(r"J(\pi^*) = \lambda \log Z", "Korbak et al. (2022)", "t03")
def evidence_is_attained(case: Case) -> Sides:
    """The posterior's objective is λ log Z."""
    return case.objective(case.log_star), case.target.value


evidence_is_attained.broken(
    "λ dropped before log Z",
    lambda case: (case.objective(case.log_star), case.target.log_evidence),
)


@bound(
    r"E_\pi[r] - \lambda\,\mathrm{KL}(\pi\,\|\,q) \le \lambda\log E_q[e^{r/\lambda}]",
    "Donsker & Varadhan (1975)",
    "t03",
)
def variational_bound(case: Case) -> Sides:
    """No policy's objective exceeds λ log Z."""
    return case.objective(case.log_policy), case.target.value


variational_bound.broken(
    "the mean inside the logarithm: E_q[r]",
    lambda case: (case.objective(case.log_star), mean(case.log_prior, case.rewards)),
)


@identity(
    r"\pi^*_{r_1+r_2}(q) = \pi^*_{r_2}\!\big(\pi^*_{r_1}(q)\big)", "Bayes' rule, twice", "t03"
)
def sequential_bayes(case: Case) -> Sides:
    """Rewards compose: yesterday's posterior is today's prior."""
    second = case.normal(len(case.rewards))
    return (
        tilt(case.log_star, second, case.kl_coef).log_posterior,
        tilt(case.log_prior, case.rewards + second, case.kl_coef).log_posterior,
    )


def _half_each(case: Case) -> Sides:
    second = case.normal(len(case.rewards))
    mixed = torch.logaddexp(
        case.log_star, tilt(case.log_prior, second, case.kl_coef).log_posterior
    ) - np.log(2)
    return mixed, tilt(case.log_prior, case.rewards + second, case.kl_coef).log_posterior


sequential_bayes.broken("the two posteriors averaged", _half_each)


@identity(
    r"\lambda \log Z_{r_1+r_2} = \lambda\log Z_{r_1} + \lambda\log Z_{r_2|r_1}",
    "chain rule of the evidence",
    "t03",
)
def evidence_chain_rule(case: Case) -> Sides:
    """The evidence of a sum of rewards is the product of the evidences along the way."""
    second = case.normal(len(case.rewards))
    whole = tilt(case.log_prior, case.rewards + second, case.kl_coef).value
    return whole, case.tilted.value + tilt(case.log_star, second, case.kl_coef).value


def _both_from_the_prior(case: Case) -> Sides:
    second = case.normal(len(case.rewards))
    whole = tilt(case.log_prior, case.rewards + second, case.kl_coef).value
    return whole, case.tilted.value + tilt(case.log_prior, second, case.kl_coef).value


evidence_chain_rule.broken("both evidences under the prior", _both_from_the_prior)


@identity(
    r"\pi^*_{r+c} = \pi^*_r,\qquad \lambda\log Z_{r+c} = \lambda\log Z_r + c", "eq. (1)", "t03"
)
def reward_shift(case: Case) -> Sides:
    """A constant added to the reward changes the value by it and the posterior not at all."""
    shift = float(case.normal(1))
    moved = tilt(case.log_prior, case.rewards + shift, case.kl_coef)
    return torch.cat([moved.log_posterior, moved.value[None]]), torch.cat(
        [case.log_star, case.tilted.value[None] + shift]
    )


reward_shift.broken(
    "the value does not move",
    lambda case: (reward_shift.sides(case)[0], torch.cat([case.log_star, case.tilted.value[None]])),
)


@identity(
    r"\pi^*_{cr,\,c\lambda} = \pi^*_{r,\lambda},\qquad c\lambda\log Z' = c\,(\lambda \log Z)",
    "eq. (1)",
    "t03",
)
def reward_scale(case: Case) -> Sides:
    """Rewards and λ have one unit: scaled together they give the same posterior, and a value scaled
    with them.
    """
    # a power of two would move exponents alone, and no digit
    factor = 3.0
    scaled = tilt(case.log_prior, factor * case.rewards, factor * case.kl_coef)
    return torch.cat([scaled.log_posterior, scaled.value[None]]), torch.cat(
        [case.log_star, factor * case.tilted.value[None]]
    )


def _only_the_reward(case: Case) -> Sides:
    scaled = tilt(case.log_prior, 3.0 * case.rewards, case.kl_coef)
    return torch.cat([scaled.log_posterior, scaled.value[None]]), reward_scale.sides(case)[1]


reward_scale.broken("only the reward is scaled", _only_the_reward)


@identity(
    r"\log\frac{\pi^*(y)}{\pi^*(y')} = \log\frac{q(y)}{q(y')} + \frac{r(y)-r(y')}{\lambda}",
    "Rafailov et al. (2023), eq. 5",
    "t12",
)
def posterior_odds(case: Case) -> Sides:
    """Posterior odds are prior odds times e to the difference of rewards over λ."""
    # neighbours suffice: all other odds are products of theirs
    difference = (case.log_prior + case.rewards / case.kl_coef).diff()
    return case.target.model.log_prob(case.support.tokens).detach().diff(), difference


posterior_odds.broken(
    "λ multiplied, not divided by",
    lambda case: (case.log_star.diff(), (case.log_prior + case.rewards * case.kl_coef).diff()),
)


@identity(
    r"\frac{\partial\,\lambda\log Z}{\partial r(y)} = \pi^*(y)", "exponential families", "t03"
)
def value_gradient(case: Case) -> Sides:
    """The gradient of the value by the rewards is the posterior."""
    rewards = case.rewards.clone().requires_grad_()
    return (
        torch.autograd.grad(tilt(case.log_prior, rewards, case.kl_coef).value, rewards)[0],
        case.log_star.exp(),
    )


value_gradient.broken(
    "the prior in its place", lambda case: (value_gradient.sides(case)[0], case.log_prior.exp())
)


def log_evidence_at(case: Case, beta: Tensor) -> Tensor:
    """The log-evidence log Z at β = 1/λ, with gradient to β."""
    return torch.logsumexp(case.log_prior + beta * case.rewards, 0)


def _beta(case: Case) -> Tensor:
    return torch.tensor(1 / case.kl_coef, dtype=torch.float64, requires_grad=True)


@identity(r"\frac{d\log Z}{d(1/\lambda)} = E_{\pi^*}[r]", "exponential families", "t03")
def evidence_derivative(case: Case) -> Sides:
    """Log-evidence rises in 1/λ at the rate of the posterior's mean reward."""
    beta = _beta(case)
    return torch.autograd.grad(log_evidence_at(case, beta), beta)[0], mean(
        case.log_star, case.rewards
    )


evidence_derivative.broken(
    "the mean under the prior",
    lambda case: (evidence_derivative.sides(case)[0], mean(case.log_prior, case.rewards)),
)


def _variance(log_p: Tensor, values: Tensor) -> Tensor:
    return mean(log_p, (values - mean(log_p, values)) ** 2)


@identity(
    r"\frac{d E_{\pi^*}[r]}{d(1/\lambda)} = \mathrm{Var}_{\pi^*}(r)",
    "fluctuation–dissipation",
    "t03",
)
def reward_fluctuation(case: Case) -> Sides:
    """The posterior's mean reward rises in 1/λ at the rate of its variance."""
    beta = _beta(case)
    star = torch.log_softmax(case.log_prior + beta * case.rewards, 0)
    return torch.autograd.grad(mean(star, case.rewards), beta)[0], _variance(
        case.log_star, case.rewards
    )


reward_fluctuation.broken(
    "the variance under the prior",
    lambda case: (reward_fluctuation.sides(case)[0], _variance(case.log_prior, case.rewards)),
)


@identity(
    r"\frac{d\,\mathrm{KL}(\pi^*\|q)}{d(1/\lambda)} = \frac{1}{\lambda}\frac{d"
    r" E_{\pi^*}[r]}{d(1/\lambda)}",
    "the frontier's slope is λ",
    "t03",
)
def frontier_slope(case: Case) -> Sides:
    """Along the reward–KL frontier one nat buys λ units of reward."""
    beta = _beta(case)
    star = torch.log_softmax(case.log_prior + beta * case.rewards, 0)
    return (
        torch.autograd.grad((star.exp() * (star - case.log_prior)).sum(), beta)[0],
        _variance(case.log_star, case.rewards) / case.kl_coef,
    )


frontier_slope.broken(
    "one nat buys one unit",
    lambda case: (frontier_slope.sides(case)[0], _variance(case.log_star, case.rewards)),
)


@identity(
    r"\log Z = \int_0^{1/\lambda} E_{\pi^*_{1/\beta}}[r]\,d\beta",
    "thermodynamic integration; Gelman & Meng (1998)",
    "t03",
)
def thermodynamic_integral(case: Case) -> Sides:
    """Log-evidence is the area under the mean reward, from the prior to the posterior
    (Gauss–Legendre, 40 nodes a piece of 1.5 nats).
    """
    return (
        _integral(
            case,
            lambda beta: (
                torch.softmax(case.log_prior + beta[:, None] * case.rewards, -1) @ case.rewards
            ),
        ),
        case.tilted.log_evidence,
    )


def _integral(case: Case, integrand: Callable[[Tensor], Tensor]) -> Tensor:
    """The integral over β from 0 to 1/λ, in pieces short against the spread of rewards."""
    spread = float(case.rewards.amax() - case.rewards.amin())
    # over 1.5 nats the integrand is so smooth that 40 nodes are exact to the last digit
    pieces = 1 + int(spread / case.kl_coef / 1.5)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(_NODES))
    edges = torch.linspace(0, 1 / case.kl_coef, pieces + 1, dtype=torch.float64)
    half, middle = edges.diff()[:, None] / 2, ((edges[1:] + edges[:-1]) / 2)[:, None]
    return (integrand((middle + half * nodes).reshape(-1)) * (half * weights).reshape(-1)).sum()


thermodynamic_integral.broken(
    "the mean reward at the end, times the length",
    lambda case: (mean(case.log_star, case.rewards) / case.kl_coef, case.tilted.log_evidence),
)


@identity(
    r"\pi_t \propto q\,e^{r/\lambda_t},\quad \lambda_t = \frac{\lambda}{1-(1-\eta\lambda)^t}",
    "mirror descent on the simplex; Beck & Teboulle (2003)",
    "t02",
)
def mirror_descent_path(case: Case) -> Sides:
    """Every iterate of mirror descent from the prior is a posterior, at a λ of its own."""
    # ηλ = 0.3 whatever λ is: four steps go three quarters of the way
    step = 0.3 / case.kl_coef
    return _mirror_steps(case, step), _posteriors_at(
        case, mirror_descent_kl_coefs(case.kl_coef, step, 4)[1:]
    )


def _mirror_steps(case: Case, step: float) -> Tensor:
    """log π_t for t = 1 … 4 [4,K], each from the last by log π + η(r − λ log π/q)."""
    log_pi, path = case.log_prior, []
    for _ in range(4):
        pull = case.rewards - case.kl_coef * (log_pi - case.log_prior)
        log_pi = logspace.log_normalize(log_pi + step * pull)
        path.append(log_pi)
    return torch.stack(path)


def _posteriors_at(case: Case, kl_coefs: Tensor) -> Tensor:
    return torch.stack(
        [tilt(case.log_prior, case.rewards, one).log_posterior for one in kl_coefs.tolist()]
    )


def _without_the_kl_term(case: Case) -> Sides:
    times = torch.arange(1, 5, dtype=torch.float64)
    return mirror_descent_path.sides(case)[0], _posteriors_at(case, case.kl_coef / (0.3 * times))


mirror_descent_path.broken("λ_t = 1/(ηt), the path without the KL term", _without_the_kl_term)


@bound(
    r"\big|E_{\pi^*}[r]-E_q[r]-\tfrac1\lambda\mathrm{Var}_q(r)\big| \le \frac{(\max r-\min"
    r" r)^3}{2\lambda^2}",
    "Taylor, with the third cumulant",
    "t03",
)
def large_kl_coef(case: Case) -> Sides:
    """For large λ the gain is Var_q(r)/λ, up to half the cube of the rewards' range over λ²."""
    return _gain_less(case, 1.0)


def _gain_less(case: Case, share: float) -> Sides:
    """The error of the gain, |gain − share·Var/λ|, and its bound at a λ a hundred times the
    rewards' range.
    """
    spread = case.rewards.amax() - case.rewards.amin()
    # so far from the rewards that the terms left out are a hundredth of those kept
    kl_coef = case.kl_coef + 100 * float(spread)
    gain = mean(tilt(case.log_prior, case.rewards, kl_coef).log_posterior, case.rewards) - mean(
        case.log_prior, case.rewards
    )
    return (gain - share * _variance(case.log_prior, case.rewards) / kl_coef).abs(), spread**3 / (
        2 * kl_coef**2
    )


large_kl_coef.broken("Var/2λ, which is λ times the KL", lambda case: _gain_less(case, 0.5))


@bound(
    r"\mathrm{KL}(\pi^*_\lambda\|q) \le -\log q(\arg\max r) = \mathrm{KL}(\pi^*_0\|q)",
    "the limit λ → 0",
    "t03",
)
def divergence_is_capped(case: Case) -> Sides:
    """However small λ, the posterior is no farther from the prior than the prior restricted to the
    best outcomes, which it is at λ = 0.
    """
    return _capped(case, _surprise_at_the_best(case))


def _capped(case: Case, cap: Tensor) -> Sides:
    """KL(π*‖q) of three λ at most the cap, and the cap at most that of λ = 0."""
    # down to λ = 0, where the cap is reached
    divergences = [
        kl(tilt(case.log_prior, case.rewards, kl_coef).log_posterior, case.log_prior)
        for kl_coef in (case.kl_coef, 0.01, 0.0)
    ]
    return torch.stack([*divergences, cap]), torch.stack([cap, cap, cap, divergences[-1]])


def _surprise_at_the_best(case: Case) -> Tensor:
    """How rare the best sequences are under the prior, −log q(argmax r) in nats."""
    # single rewards tie by equality alone, as in `tilt`: a vector does not say how they were summed
    best = case.rewards == case.rewards.amax()
    return -torch.logsumexp(case.log_prior[best], 0)


def _log_count(case: Case) -> Tensor:
    """The log of the number of sequences, log K, which −log q is for a uniform prior and one best
    outcome.
    """
    return torch.tensor(float(len(case.rewards)), dtype=torch.float64).log()


divergence_is_capped.broken(
    "log K, the cap for a uniform prior",
    lambda case: _capped(case, _log_count(case)),
)


@bound(
    r"0 \le \max r - \lambda\log Z \le -\lambda\log q(\arg\max r)",
    "log-sum-exp between its bounds",
    "t04",
)
def soft_maximum(case: Case) -> Sides:
    """λ log Z is a soft maximum: below the best reward by at most λ times the surprise at the best
    outcomes.
    """
    return _lack(case, _surprise_at_the_best(case))


def _lack(case: Case, nats: Tensor) -> Sides:
    lack = case.rewards.amax() - case.target.value
    return torch.stack([-lack, lack]), torch.stack([torch.zeros_like(nats), case.kl_coef * nats])


soft_maximum.broken(
    "λ log K, the bound for a uniform prior", lambda case: _lack(case, _log_count(case))
)
