"""Statements about decision processes with a prior policy.

    V* − J(π) = λ Σ_s d_π(s) KL(π(·|s)‖π*(·|s)),
    TV(s) = λ log Σ_a q(a|s) e^{(r + γ Σ P V)/λ}                                                 (1)

Random processes: three states where something is decided and one end, two actions, every transition
possible, γ = 0.9.
"""

from dataclasses import replace

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.decisions.decision_process import DecisionProcess, token_process
from klrl_edu.decisions.model_error import simulation_bound, trajectory_value
from klrl_edu.decisions.soft_control import (
    policy_evaluation,
    policy_gradient,
    policy_iteration,
    value_iteration,
    visits,
)
from klrl_edu.theory.cases import Case
from klrl_edu.theory.sequences import edge_sums
from klrl_edu.theory.statements import Sides, bound, identity

_LIVE, _ACTIONS, _DISCOUNT = 3, 2, 0.9


def random_process(case: Case) -> DecisionProcess:
    """A process of the case's own numbers."""
    S = _LIVE + 1
    start = torch.cat([case.distribution(_LIVE).exp(), torch.zeros(1, dtype=torch.float64)])
    arrays = (
        case.distribution(S, _ACTIONS),
        case.distribution(S, _ACTIONS, S).exp(),
        case.normal(S, _ACTIONS),
        start,
    )
    return DecisionProcess(*arrays, terminal=torch.arange(S) == _LIVE, discount=_DISCOUNT)


def random_policy(case: Case) -> Tensor:
    """A policy of the case's own numbers: log π(a|s) [S,A]."""
    return case.distribution(_LIVE + 1, _ACTIONS)


@identity(
    r"V^*_{\mathrm{tokens}}(\varnothing) = \lambda\log Z,\quad \pi^*_{\mathrm{tokens}} = \pi^*",
    "Levine (2018), §2; Todorov (2006)",
    "t05",
)
def tokens_are_decisions(case: Case) -> Sides:
    """The decision process of a problem's tokens has the posterior for its optimum, token
    by token.
    """
    solution = value_iteration(token_process(case.problem), case.kl_coef)
    trie = case.support.trie
    log_policy = edge_sums(case, solution.log_policy[trie.parent, trie.token])
    return torch.cat([log_policy, case.log_star.new_tensor([solution.value])]), torch.cat(
        [case.log_star, case.tilted.value[None]]
    )


def _at_twice_kl_coef(case: Case) -> Sides:
    values = value_iteration(token_process(case.problem), 2 * case.kl_coef)
    trie = case.support.trie
    log_policy = edge_sums(case, values.log_policy[trie.parent, trie.token])
    return (
        torch.cat([log_policy, case.log_star.new_tensor([values.value])]),
        tokens_are_decisions.sides(case)[1],
    )


tokens_are_decisions.broken("solved at 2λ", _at_twice_kl_coef)


@identity(
    r"V^* - J(\pi) = \lambda\sum_s d_\pi(s)\,\mathrm{KL}\big(\pi(\cdot|s)\,\|\,\pi^*(\cdot|s)\big)",
    "performance difference at the optimum",
    "t05",
)
def gap_of_a_policy(case: Case) -> Sides:
    """What a policy lacks is its divergence from the optimum, state by state, weighed by its own
    discounted visits.
    """
    process, log_policy = random_process(case), random_policy(case)
    return _gap(process, log_policy, case.kl_coef), case.kl_coef * (
        visits(process, log_policy) @ _divergence(process, log_policy, case.kl_coef)
    )


def _gap(process: DecisionProcess, log_policy: Tensor, kl_coef: float) -> Tensor:
    return log_policy.new_tensor(
        policy_iteration(process, kl_coef).value
        - policy_evaluation(process, log_policy, kl_coef).value
    )


def _divergence(process: DecisionProcess, log_policy: Tensor, kl_coef: float) -> Tensor:
    """How far a policy is from the optimum in each state, KL(π(·|s)‖π*(·|s)) [S], 0 where it
    ends.
    """
    each = logspace.kl_divergence(log_policy, policy_iteration(process, kl_coef).log_policy)
    return torch.where(process.terminal, 0.0, each)


def _visits_of_the_optimum(case: Case) -> Sides:
    process, log_policy = random_process(case), random_policy(case)
    best = policy_iteration(process, case.kl_coef).log_policy
    return _gap(process, log_policy, case.kl_coef), case.kl_coef * (
        visits(process, best) @ _divergence(process, log_policy, case.kl_coef)
    )


gap_of_a_policy.broken("visits of the optimum", _visits_of_the_optimum)


@identity(
    r"J(\pi) - J(\rho) = \sum_s d_\pi(s)\sum_a \pi(a|s)\big[Q_\rho(s,a) -"
    r" \lambda\log\tfrac{\pi(a|s)}{q(a|s)} - V_\rho(s)\big]",
    "Kakade & Langford (2002), lemma 6.1",
    "t05",
)
def performance_difference(case: Case) -> Sides:
    """One policy gains on another by the other's advantages along its own visits."""
    return _difference(case, own_visits=True)


def _difference(case: Case, *, own_visits: bool) -> Sides:
    process, mine, other = random_process(case), random_policy(case), random_policy(case)
    values = policy_evaluation(process, other, case.kl_coef)
    live = ~process.terminal
    cost = case.kl_coef * (mine[live] - process.log_prior[live])
    advantage = (
        mine[live].exp() * (values.action_values[live] - cost - values.state_values[live, None])
    ).sum(-1)
    gain = policy_evaluation(process, mine, case.kl_coef).value - values.value
    return mine.new_tensor(gain), visits(process, mine if own_visits else other)[live] @ advantage


performance_difference.broken(
    "the other policy's visits", lambda case: _difference(case, own_visits=False)
)


@identity(
    r"\frac{\partial J}{\partial\theta(s,a)} = d_\pi(s)\pi(a|s)\big[Q_\pi -"
    r" \lambda\log\tfrac{\pi}{q} - V_\pi\big]",
    "Sutton et al. (1999), th. 1; Kakade (2001)",
    "t05",
)
def process_policy_gradient(case: Case) -> Sides:
    """The policy gradient theorem, against autograd through the linear system of the values."""
    process, log_policy = random_process(case), random_policy(case)
    return policy_gradient(process, log_policy, case.kl_coef), _gradient_by_autograd(
        process, log_policy, case.kl_coef
    )


def _gradient_by_autograd(process: DecisionProcess, log_policy: Tensor, kl_coef: float) -> Tensor:
    logits = log_policy.clone().requires_grad_()
    live = ~process.terminal
    log_pi = torch.log_softmax(logits, -1)[live]
    reward = (
        log_pi.exp() * (process.rewards[live] - kl_coef * (log_pi - process.log_prior[live]))
    ).sum(-1)
    chain = process.discount * torch.einsum(
        "sa,sat->st", log_pi.exp(), process.transitions[live][:, :, live]
    )
    values = torch.linalg.solve(torch.eye(_LIVE, dtype=torch.float64) - chain, reward)
    return torch.autograd.grad(process.initial[live] @ values, logits)[0]


def _undiscounted_visits(case: Case) -> Sides:
    process, log_policy = random_process(case), random_policy(case)
    patient = replace(process, discount=1.0)
    scale = visits(patient, log_policy) / torch.where(
        process.terminal, 1.0, visits(process, log_policy)
    )
    return scale[:, None] * policy_gradient(
        process, log_policy, case.kl_coef
    ), _gradient_by_autograd(process, log_policy, case.kl_coef)


process_policy_gradient.broken(
    "visits without the discount, as most code has them", _undiscounted_visits
)


@bound(
    r"\|TV - TU\|_\infty \le \gamma\,\|V-U\|_\infty",
    "Puterman (1994), prop. 6.2.4, with a soft maximum",
    "t05",
)
def bellman_contracts(case: Case) -> Sides:
    """One backup brings any two values nearer by the factor γ."""
    return _contraction(case, 1.0)


def _contraction(case: Case, factor: float) -> Sides:
    process = random_process(case)
    one, shift = case.normal(_LIVE + 1), float(case.normal(1))
    live = ~process.terminal
    one, other = torch.where(live, one, 0.0), torch.where(live, one + shift, 0.0)
    return (
        _backup(process, one, case.kl_coef) - _backup(process, other, case.kl_coef)
    ).abs().max(), factor * process.discount * abs(shift)


def _backup(process: DecisionProcess, values: Tensor, kl_coef: float) -> Tensor:
    lifted = process.log_prior + process.action_values(values) / kl_coef
    return torch.where(process.terminal, 0.0, kl_coef * logspace.logsumexp(lifted))


bellman_contracts.broken("by a factor of γ/2", lambda case: _contraction(case, 0.5))


@bound(
    r"J\big(q\,e^{Q_\pi/\lambda}/Z\big) \ge J(\pi)",
    "policy improvement; Haarnoja et al. (2018), lemma 2",
    "t05",
)
def policy_improvement(case: Case) -> Sides:
    """The posterior of a policy's own values is a better policy, at every start."""
    process, log_policy = random_process(case), random_policy(case)
    values = policy_evaluation(process, log_policy, case.kl_coef)
    better = _greedy(process, values.action_values, case.kl_coef)
    return values.state_values, policy_evaluation(process, better, case.kl_coef).state_values


def _greedy(process: DecisionProcess, action_values: Tensor, kl_coef: float) -> Tensor:
    lifted = torch.where(
        process.terminal[:, None], 0.0, process.log_prior + action_values / kl_coef
    )
    return torch.log_softmax(lifted, -1)


def _against_the_values(case: Case) -> Sides:
    process, log_policy = random_process(case), random_policy(case)
    values = policy_evaluation(process, log_policy, case.kl_coef)
    return (
        values.state_values,
        policy_evaluation(
            process, _greedy(process, -values.action_values, case.kl_coef), case.kl_coef
        ).state_values,
    )


policy_improvement.broken("the values with the wrong sign", _against_the_values)


@bound(
    r"\|V^*-\hat V\|_\infty \le \tfrac{1}{1-\gamma}\max_{s,a}\big|r-\hat"
    r" r+\gamma\textstyle\sum(P-\hat P)\hat V\big|",
    "Kearns & Singh (2002), lemma 4",
    "t05",
)
def model_error(case: Case) -> Sides:
    """Planning on a model errs by at most what the model errs in one step, summed over the
    horizon.
    """
    return _model_error(case, 1.0)


def _model_error(case: Case, factor: float) -> Sides:
    process = random_process(case)
    share = 0.3
    mixed = (1 - share) * process.transitions + share * case.distribution(
        *process.transitions.shape
    ).exp()
    model = replace(
        process,
        transitions=mixed,
        rewards=process.rewards + case.normal(*process.rewards.shape, scale=0.1),
    )
    true, planned = (policy_iteration(one, case.kl_coef).state_values for one in (process, model))
    return (true - planned).abs().max(), factor * simulation_bound(process, model, planned)


model_error.broken(
    "one step's error, without the horizon", lambda case: _model_error(case, 1 - _DISCOUNT)
)


@bound(
    r"V^*(s) \le \lambda\log\sum_{a,s'} q(a|s)P(s'|s,a)\,e^{(r+\gamma V(s'))/\lambda}",
    "Levine (2018), §2.4; Jensen",
    "t05",
)
def chosen_replies_promise_more(case: Case) -> Sides:
    """A posterior over whole trajectories, the world's replies tilted too, promises at least what
    is attainable.
    """
    process = random_process(case)
    return (
        policy_iteration(process, case.kl_coef).state_values,
        trajectory_value(process, case.kl_coef).state_values,
    )


chosen_replies_promise_more.broken(
    "at most, not at least", lambda case: chosen_replies_promise_more.sides(case)[::-1]
)
