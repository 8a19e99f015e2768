"""Statements about preferences: Bradley–Terry, DPO, IPO, the regularised game.

P(i ≻ j) = σ(r_i − r_j),    DPO: −E log σ(λΔu),    IPO: E(Δu − 1/2τ)²,    u = log π/q            (1)
"""

import torch
from torch import Tensor

from klrl_edu.closed_forms.preferences import (
    bradley_terry,
    dpo_loss,
    duality_gap,
    ipo_loss,
    ipo_optimum,
)
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.theory.cases import Case
from klrl_edu.theory.gradients import logit_gradient
from klrl_edu.theory.statements import Sides, bound, identity

kl = logspace.kl_divergence


def bounded(case: Case) -> Tensor:
    """The case's rewards within [−1, 1] [K]: sigmoids of larger differences are 0 and 1, and their
    gradients nothing to compare.
    """
    return case.rewards / case.rewards.abs().amax().clamp(min=1)


def dpo_gradient_at(case: Case, log_policy: Tensor, preferences: Tensor) -> Tensor:
    """The gradient of DPO's population loss at a policy, in sequence logits [K]."""
    logits = log_policy.clone().requires_grad_()
    loss = dpo_loss(torch.log_softmax(logits, 0), case.log_prior, preferences, case.kl_coef)
    return torch.autograd.grad(loss, logits)[0]


@identity(
    r"\nabla L_{\mathrm{DPO}}(\pi^*) = 0 \text{ under } P = \sigma(r_i-r_j)",
    "Rafailov et al. (2023), §4",
    "t12",
)
def dpo_optimum(case: Case) -> Sides:
    """Under Bradley–Terry preferences DPO's population gradient vanishes at the posterior."""
    rewards = bounded(case)
    star = tilt(case.log_prior, rewards, case.kl_coef).log_posterior
    return dpo_gradient_at(case, star, bradley_terry(rewards)), torch.zeros_like(rewards)


dpo_optimum.broken(
    "the prior in its place",
    lambda case: (
        dpo_gradient_at(case, case.log_prior, bradley_terry(bounded(case))),
        torch.zeros_like(case.rewards),
    ),
)


@identity(
    r"\lambda\log\frac{\pi^*(y)}{q(y)} = r(y) - \lambda\log Z",
    "Rafailov et al. (2023), eq. 5",
    "t12",
)
def implicit_reward(case: Case) -> Sides:
    """The log-ratio of the optimum is the reward, up to the value."""
    star = case.target.model.log_prob(case.support.tokens).detach()
    return case.kl_coef * (star - case.log_prior), case.rewards - case.tilted.value


implicit_reward.broken(
    "the value left out", lambda case: (implicit_reward.sides(case)[0], case.rewards)
)


@identity(
    r"\pi_\tau \propto q\,e^{p(y\succ\mu)/\tau} \;\Rightarrow\; \nabla"
    r" L_{\mathrm{IPO}}(\pi_\tau) = 0",
    "Azar et al. (2023)",
    "t12",
)
def ipo_optimum_is_stationary(case: Case) -> Sides:
    """IPO's population gradient vanishes at the posterior of the mean preference."""
    return _ipo_gradient(case, bradley_terry(bounded(case)), 1.0), torch.zeros_like(case.rewards)


def _ipo_gradient(case: Case, preferences: Tensor, factor: float) -> Tensor:
    tau = case.kl_coef
    logits = ipo_optimum(case.log_prior, preferences, factor * tau).requires_grad_()
    return torch.autograd.grad(
        ipo_loss(torch.log_softmax(logits, 0), case.log_prior, preferences, tau), logits
    )[0]


ipo_optimum_is_stationary.broken(
    "the optimum at 2τ",
    lambda case: (
        _ipo_gradient(case, bradley_terry(bounded(case)), 2.0),
        torch.zeros_like(case.rewards),
    ),
)


@identity(
    r"\max_\rho\min_{\rho'}\ \text{gap}(\pi) ="
    r" 2\tau\,\mathrm{KL}\big(\pi\,\|\,q\,e^{P(\cdot\succ\pi)/\tau}/Z\big)",
    "Munos et al. (2023)",
    "t12",
)
def duality_gap_is_a_divergence(case: Case) -> Sides:
    """What both players of the regularised preference game could gain is a divergence from the best
    response.
    """
    preferences, tau = bradley_terry(case.normal(len(case.rewards))), case.kl_coef
    response = tilt(case.log_prior, preferences @ case.log_policy.exp(), tau)
    gain = response.value - (0.5 - tau * kl(case.log_policy, case.log_prior))
    return duality_gap(case.log_policy, case.log_prior, preferences, tau), 2 * gain


duality_gap_is_a_divergence.broken(
    "one player's gain",
    lambda case: (
        duality_gap_is_a_divergence.sides(case)[0],
        duality_gap_is_a_divergence.sides(case)[1] / 2,
    ),
)


@bound(r"L_{\mathrm{DPO}}(\pi^*) \le L_{\mathrm{DPO}}(\pi)", "Rafailov et al. (2023), §4", "t12")
def dpo_minimum(case: Case) -> Sides:
    """No policy has a lower DPO loss than the posterior of the rewards behind the preferences."""
    rewards = bounded(case)
    preferences = bradley_terry(rewards)
    star = tilt(case.log_prior, rewards, case.kl_coef).log_posterior
    best, other = (
        dpo_loss(log_pi, case.log_prior, preferences, case.kl_coef)
        for log_pi in (star, case.log_policy)
    )
    return best, other


dpo_minimum.broken("the policy against the posterior", lambda case: dpo_minimum.sides(case)[::-1])


@identity(
    r"\nabla_{\theta} E_{\pi}\big[P(y\succ\mu)\big] = E_\pi\big[P(y\succ\mu)\nabla\log\pi\big]",
    "online DPO and Nash learning use it",
    "t12",
)
def win_rate_gradient(case: Case) -> Sides:
    """The win rate against a fixed opponent is a reward like any other."""
    preferences = bradley_terry(case.normal(len(case.rewards)))
    reward = preferences @ case.log_prior.exp()
    pi = case.log_policy.exp()
    return logit_gradient(case, lambda log_pi: log_pi.exp() @ reward), pi * (reward - pi @ reward)


def _self_play(case: Case) -> Sides:
    preferences = bradley_terry(case.normal(len(case.rewards)))
    pi = case.log_policy.exp()
    reward = preferences @ pi
    return logit_gradient(case, lambda log_pi: log_pi.exp() @ preferences @ log_pi.exp()), pi * (
        reward - pi @ reward
    )


win_rate_gradient.broken("against oneself, where the win rate is ½ and its gradient 0", _self_play)
