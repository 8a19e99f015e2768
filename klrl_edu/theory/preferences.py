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
from klrl_edu.learning import losses
from klrl_edu.theory.cases import Case
from klrl_edu.theory.gradients import expected_gradient, logit_gradient
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
    # of the bounded rewards, which the preferences come from
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
    return _ipo_sides(case, bradley_terry(bounded(case)), 1.0)


def _ipo_sides(case: Case, preferences: Tensor, factor: float) -> Sides:
    """IPO's optimum at a multiple of τ, and the gradient there [2,K], against the posterior of
    p(y ≻ μ) and 0.
    """
    tau, reward = case.kl_coef, preferences @ case.log_prior.exp()
    logits = ipo_optimum(case.log_prior, preferences, factor * tau).requires_grad_()
    loss = ipo_loss(torch.log_softmax(logits, 0), case.log_prior, preferences, tau)
    (gradient,) = torch.autograd.grad(loss, logits)
    # written out, as the optimum and the loss could be wrong in the same way
    expected = torch.log_softmax(case.log_prior + reward / tau, 0)
    return torch.stack([logits.detach(), gradient]), torch.stack([expected, 0 * expected])


ipo_optimum_is_stationary.broken(
    "the optimum at 2τ", lambda case: _ipo_sides(case, bradley_terry(bounded(case)), 2.0)
)


@identity(
    r"\max_\rho F(\rho,\pi) - \min_\rho F(\pi,\rho) ="
    r" 2\tau\,\mathrm{KL}\big(\pi\,\|\,q\,e^{P(\cdot\succ\pi)/\tau}/Z\big),\quad"
    r" F(\rho,\pi) = P(\rho\succ\pi) - \tau\,\mathrm{KL}(\rho\|q) + \tau\,\mathrm{KL}(\pi\|q)",
    "Munos et al. (2023)",
    "t12",
)
def duality_gap_is_a_divergence(case: Case) -> Sides:
    """What both players of the regularised preference game could gain, by the best of all replies,
    is twice a divergence from the best response.
    """
    return _gaps(case, 2.0)


def _gaps(case: Case, players: float) -> Sides:
    """The gap and the divergence, both against what the players gain by their best replies."""
    preferences, tau = bradley_terry(case.normal(len(case.rewards))), case.kl_coef
    pi, log_q = case.log_policy, case.log_prior
    reply = torch.log_softmax(log_q + preferences @ pi.exp() / tau, 0)

    def payoff(mine: Tensor, other: Tensor) -> Tensor:
        return mine.exp() @ preferences @ other.exp() - tau * (kl(mine, log_q) - kl(other, log_q))

    gain = payoff(reply, pi) - payoff(pi, reply)
    # no reply is better: the most that one can gain, with its own maximum over replies
    most = tau * torch.logsumexp(log_q + preferences @ pi.exp() / tau, 0) + tau * kl(pi, log_q)
    divergence = players * tau * kl(pi, reply)
    # F(π, ρ) = 1 − F(ρ, π), so both players gain twice the most, less 1
    return torch.stack([duality_gap(pi, log_q, preferences, tau), divergence, 2 * most - 1]), (
        gain.expand(3)
    )


duality_gap_is_a_divergence.broken("one player's gain", lambda case: _gaps(case, 1.0))


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
    return _reinforced(case, preferences @ case.log_prior.exp()), logit_gradient(
        case, lambda log_pi: log_pi.exp() @ preferences @ case.log_prior.exp()
    )


def _reinforced(case: Case, reward: Tensor) -> Tensor:
    """What REINFORCE climbs on average with this reward and no KL [K]."""
    # at λ = 0, as REINFORCE would add the KL
    return -expected_gradient(case.rewarded(reward).at(0.0), losses.reinforce, 1)


def _self_play(case: Case) -> Sides:
    preferences = bradley_terry(case.normal(len(case.rewards)))
    return _reinforced(case, preferences @ case.log_policy.exp()), logit_gradient(
        case, lambda log_pi: log_pi.exp() @ preferences @ log_pi.exp()
    )


win_rate_gradient.broken("against oneself, where the win rate is ½ and its gradient 0", _self_play)
