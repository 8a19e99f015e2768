"""Statements about decision processes with a prior policy.

    V* − J(π) = λ Σ_s d_π(s) KL(π(·|s)‖π*(·|s)),
    TV(s) = λ log Σ_a q(a|s) e^{(r + γ Σ P V)/λ}                                                 (1)

Random processes: three states where something is decided and one end, two actions, every transition
possible, γ = 0.9.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.decisions.decision_process import DecisionProcess, token_process
from klrl_edu.decisions.model_error import simulation_bound, trajectory_value
from klrl_edu.decisions.soft_control import (
    SoftSolution,
    objective_gap,
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
    # nothing starts where all ends
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
    # the process's states are the nodes of the trie
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
    ).expand(2)


def _gap(process: DecisionProcess, log_policy: Tensor, kl_coef: float) -> Tensor:
    """The difference of values, and what the package calls the gap [2]."""
    optimum = policy_iteration(process, kl_coef)
    difference = optimum.value - policy_evaluation(process, log_policy, kl_coef).value
    return log_policy.new_tensor([difference, objective_gap(optimum, log_policy)])


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
    ).expand(2)


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
    # at the end nothing is chosen and nothing paid
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
    # written out from (I − γP)V = r, without the functions that it is held against
    chain = process.discount * torch.einsum(
        "sa,sat->st", log_pi.exp(), process.transitions[live][:, :, live]
    )
    values = torch.linalg.solve(torch.eye(_LIVE, dtype=torch.float64) - chain, reward)
    return torch.autograd.grad(process.initial[live] @ values, logits)[0]


def _undiscounted_visits(case: Case) -> Sides:
    process, log_policy = random_process(case), random_policy(case)
    # every policy ends with certainty here, so visits stay finite without a discount
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
    return _contraction(case, lambda process, values: _one_step(process, values, case.kl_coef))


def _contraction(case: Case, backup: Callable[[DecisionProcess, Tensor], SoftSolution]) -> Sides:
    """Three pairs of values, and the differences that a backup leaves: all moved by the same, which
    reaches γ, all by numbers of their own, and one alone.
    """
    process = random_process(case)
    one, alone = case.normal(_LIVE + 1), torch.arange(_LIVE + 1) == 0
    left, right = [], []
    for move in (case.normal(1).expand(_LIVE + 1), case.normal(_LIVE + 1, scale=3), 9.0 * alone):
        first, second = (backup(process, values).state_values for values in (one, one + move))
        left.append((first - second).abs().max())
        right.append(process.discount * move.abs().max())
    return torch.stack(left), torch.stack(right)


def _one_step(process: DecisionProcess, values: Tensor, kl_coef: float) -> SoftSolution:
    """TV and its policy, by the package: the optimum of one step that pays r + γ Σ P V and ends."""
    end = (torch.arange(_LIVE + 1) == _LIVE).double()
    paid = torch.where(process.available, process.action_values(values), 0.0)
    start = (~process.terminal).double() / _LIVE
    # what would follow is in the reward already
    ending = process.transitions * 0 + end
    return value_iteration(
        replace(process, transitions=ending, rewards=paid, initial=start), kl_coef
    )


def _stretched(case: Case) -> Sides:
    """A backup that moves with the mean of the values as it should, and stretches the rest."""

    def backup(process: DecisionProcess, values: Tensor) -> SoftSolution:
        mean = values.mean()
        return _one_step(process, mean + 3 * (values - mean), case.kl_coef)

    return _contraction(case, backup)


bellman_contracts.broken("differences between states stretched threefold", _stretched)


@bound(
    r"V_\pi \le TV_\pi \le V_{\pi'},\quad \pi' = q\,e^{Q_\pi/\lambda}/Z",
    "policy improvement; Haarnoja et al. (2018), lemma 2",
    "t05",
)
def policy_improvement(case: Case) -> Sides:
    """The posterior of a policy's own values is a better policy, at every start: better even than
    to follow it for one step.
    """
    return _improved(case, 1.0)


def _improved(case: Case, factor: float) -> Sides:
    """V_π, the best of one step that ends in a multiple of V_π, and what its policy earns."""
    process, log_policy = random_process(case), random_policy(case)
    values = policy_evaluation(process, log_policy, case.kl_coef).state_values
    scaled = replace(process, rewards=factor * process.rewards)
    step = _one_step(scaled, factor * values, case.kl_coef)
    earned = policy_evaluation(process, step.log_policy, case.kl_coef).state_values
    return torch.stack([values, step.state_values]), torch.stack([step.state_values, earned])


policy_improvement.broken("the values with the wrong sign", lambda case: _improved(case, -1.0))


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
    wrong = (
        process.rewards
        - model.rewards
        + process.discount * ((process.transitions - model.transitions) @ planned)
    )
    most = wrong[~process.terminal].abs().max() / (1 - process.discount)
    bound = factor * most.new_tensor(simulation_bound(process, model, planned))
    # and no looser than printed
    return torch.stack([(true - planned).abs().max(), bound]), torch.stack([bound, most])


model_error.broken(
    "one step's error, without the horizon", lambda case: _model_error(case, 1 - _DISCOUNT)
)


@bound(
    r"V^*(s) \le V(s) = \lambda\log\sum_{a,s'}"
    r" q(a|s)P(s'|s,a)\,e^{(r(s,a)+\gamma V(s'))/\lambda}",
    "Levine (2018), §2.4; Jensen",
    "t05",
)
def chosen_replies_promise_more(case: Case) -> Sides:
    """A plan that chooses the world's replies too promises at least what is attainable."""
    return _promises(case, 1.0)


def _promises(case: Case, factor: float) -> Sides:
    """V* below what is promised, and a multiple of the promise equal to its own equation."""
    process = random_process(case)
    # the world draws its replies here, and the plan chooses them below
    attainable = policy_iteration(process, case.kl_coef).state_values
    promised = factor * trajectory_value(process, case.kl_coef).state_values
    live = ~process.terminal
    ahead = (process.rewards[..., None] + process.discount * promised) / case.kl_coef
    each = process.log_prior[..., None] + process.transitions.log() + ahead
    # the end keeps its 0; elsewhere the promise is what its own equation makes of it
    equation = promised.clone()
    equation[live] = case.kl_coef * torch.logsumexp(each[live].flatten(1), -1)
    return torch.stack([attainable, promised, equation]), torch.stack(
        [promised, equation, promised]
    )


chosen_replies_promise_more.broken("twice the promise", lambda case: _promises(case, 2.0))
