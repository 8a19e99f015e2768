"""Solving a decision process: planning, the value of a policy, its visits and its gradient, all
exact.

    Q(s,a) = r(s,a) + γ Σ_s' P(s'|s,a) V(s'),    V(s) = λ log Σ_a q(a|s) e^{Q(s,a)/λ},
    π*(a|s) = q(a|s) e^{(Q(s,a) − V(s))/λ}                                                       (1)
    V_π = (I − γP_π)^{-1} (r_π − λ KL(π‖q)),    d_π = μ (I − γP_π)^{-1}                          (2)
    ∂J/∂θ(s,a) = d_π(s) π(a|s) (Q_π(s,a) − λ log π(a|s)/q(a|s) − V_π(s)),
    π(·|s) = softmax θ(s,·)                                                                      (3)

As in `soft_bellman`, V = m + λℓ (`closed_forms/soft_maximum.py`), so that (1) is finite and keeps
its digits at any λ > 0. At the limit λ = 0 the policy is q on the best actions, those that rounding
alone may have split included, each weighed by q's mass of the best that follows; at λ = inf it is q
on what is feasible, and V = E_q of the return. Ziebart (2010) and Levine
(2018), §2, for (1); Puterman (1994), ch. 6, for both iterations; Sutton et al. (1999) and Kakade
(2001) for (3). S states, A actions; logs in nats, values in reward units. Terminal states have
value 0 and rows of −inf in policies.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from klrl_edu.closed_forms.soft_maximum import soft_maximum
from klrl_edu.core import logspace, ties
from klrl_edu.core.display import Cell, html_table, text_table
from klrl_edu.core.errors import InfeasibleError, InputError, UnsupportedPolicyError
from klrl_edu.core.groups import Rows
from klrl_edu.core.validation import SUM_TOLERANCE, check_kl_coef, check_number
from klrl_edu.decisions.decision_process import DecisionProcess, expected_next, spread

_MAX_SWEEPS = 1_000_000
_MAX_IMPROVEMENTS = 1_000
_MAX_STEPS = 1e12  # an expected path longer than this leaves a linear solve no digits


@dataclass(frozen=True, eq=False)
class SoftSolution:
    """The KL-regularised optimum of a process.

    Attributes:
        process, kl_coef: what was solved.
        state_values: V* [S] in reward units; −inf where every path is forbidden.
        action_values: Q* [S,A]; −inf too where an action is not available.
        log_policy: log π* [S,A] in nats; as the prior's available actions, evenly, where every path
            is forbidden.
        value: J(π*) = Σ μ V*, in reward units.
        values: J-estimate after each sweep, or J of each policy.
        error_bound: on |V* − V| by the last change, rounding aside.
    """

    process: DecisionProcess = field(repr=False)
    kl_coef: float
    state_values: Tensor
    action_values: Tensor = field(repr=False)
    log_policy: Tensor = field(repr=False)
    value: float
    values: tuple[float, ...] = field(repr=False)
    error_bound: float

    @property
    def iterations(self) -> int:
        """Sweeps of value iteration, or policies of policy iteration."""
        return len(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Value, iterations, error bound, and by state its value and action probabilities (those
        above 0).
        """
        states = {}
        values, policy = self.state_values.tolist(), self.log_policy.exp().tolist()
        for name, value, row in zip(self.process.states, values, policy, strict=True):
            taken = {
                action: p for action, p in zip(self.process.actions, row, strict=True) if p > 0
            }
            states[name] = {"value": value, "policy": taken}
        return {
            "value": self.value,
            "iterations": self.iterations,
            "error_bound": self.error_bound,
            "states": states,
        }

    def _table(self) -> tuple[list[str], list[list[Cell]]]:
        header = ["state", "V*", *(f"π*({action})" for action in self.process.actions)]
        rows: list[list[Cell]] = []
        live = (~self.process.terminal).nonzero().squeeze(-1).tolist()
        for state in live:
            policy = self.log_policy[state].exp().tolist()
            available = self.process.available[state].tolist()
            # a cell stays empty where the prior has no such action; a 0 is the policy's own
            shares = [p if offered else None for p, offered in zip(policy, available, strict=True)]
            rows.append([self.process.states[state], float(self.state_values[state]), *shares])
        return header, rows

    def __str__(self) -> str:
        first_line = f"value {self.value:.12g}, {self.iterations} iterations\n"
        return first_line + text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())


class PolicyValues(NamedTuple):
    """V_π [S] and Q_π [S,A] in reward units, and J(π) = Σ μ V_π; −inf where the policy meets
    something forbidden.
    """

    state_values: Tensor
    action_values: Tensor
    value: float


class _Values(NamedTuple):
    """V in its two parts m and ℓ [S], 0 where nothing is feasible, and how far rounding may have
    moved m at λ = 0.
    """

    best: Tensor
    mass: Tensor
    slack: Tensor


class _Backup(NamedTuple):
    """One application of (1): V, the actions' log q + ℓ_Q + (m_Q − m)/λ, −inf where nothing is
    feasible, and Q in its two parts m_Q and ℓ_Q [S,A].
    """

    values: _Values
    lifted: Tensor
    action_best: Tensor
    action_mass: Tensor


# --- planning -------------------------------------------------------------------------------------


def value_iteration(
    process: DecisionProcess, kl_coef: float, tolerance: float = 1e-14
) -> SoftSolution:
    """V*, Q* and π* by sweeps of (1) from V = 0: exact after H sweeps where no state returns, a
    γ-contraction elsewhere.

    Where γ = 1 and states return they start from the prior's values, below V*: from 0 a loop that
    earns nothing would seem worth its 0 at λ = 0.

    Args:
        process: with γ = 1 a loop must cost more than it earns.
        kl_coef: λ ≥ 0; 0 and inf by their limits, inf without sweeps.
        tolerance: from 1e-15 to 1. Where states return, stop once no value changes by more than
            this part of the largest and of λ (or the largest |r|, where that is less). The error
            bound is then γ/(1 − γ) times the last change; with γ = 1 the change times the longest
            expected path under π*, to first order.

    Raises:
        InputError: an argument outside these, values that grow without bound (γ = 1), or a million
            sweeps that do not settle them.
        InfeasibleError: every start is forbidden to reach an end.
    """
    kl_coef, tolerance = check_kl_coef(kl_coef), _check_tolerance(tolerance)
    feasible = _feasible_actions(process)
    if kl_coef == math.inf:
        return _at_the_prior(process, feasible)
    alive, returns = feasible.any(-1) | process.terminal, process.horizon == math.inf
    zeros = torch.zeros_like(process.initial)
    best = zeros
    if returns and process.discount == 1:
        policy_iteration(process, kl_coef)  # raises where sweeps would go on for ever
        start = _evaluate(process, _feasible_prior(process, feasible), kl_coef)
        best = best if start is None else torch.where(alive, start, 0)
    rounding = min(kl_coef, _largest_reward(process, feasible))
    here, values = _Values(best, zeros, zeros), []
    for _ in range(_MAX_SWEEPS if returns else int(process.horizon)):
        before = here
        sweep = _backup(process, feasible, before, kl_coef)
        total = sweep.values.best + kl_coef * sweep.values.mass
        # m alone need not settle where V does: a loop may pay, and cost more in KL
        here = _Values(total, zeros, zeros) if returns else sweep.values
        values.append(_start_value(process, torch.where(alive, total, -math.inf)))
        change = float((here.best - before.best).abs().max())
        if returns and change <= tolerance * _scale(here.best.abs(), rounding):
            break
    else:
        if returns:
            raise InputError(
                f"{_MAX_SWEEPS:,} sweeps still change a value by {change:.3g}; policy_iteration"
                " solves this process in a few steps."
            )
    log_policy = _policy(process, feasible, sweep.lifted)
    if returns and kl_coef == 0:  # which actions tie is seen where values are exact
        log_policy = policy_iteration(process, kl_coef).log_policy
    return _solution(
        process, feasible, sweep, log_policy, kl_coef, values, change if returns else 0.0
    )


def policy_iteration(
    process: DecisionProcess, kl_coef: float, tolerance: float = 1e-14
) -> SoftSolution:
    """V*, Q* and π* by improvement π ← q e^{Q_π/λ} and exact evaluation, from q: Newton's method on
    (1), each policy better than the last.

    Args:
        kl_coef: λ ≥ 0; 0 and inf by their limits.
        tolerance: from 1e-15 to 1; stop once no value rises by more than this part of the largest
            and of λ (or the largest |r|, where that is less).

    Raises:
        InputError: an argument outside these, values that grow without bound (γ = 1 and a loop
            earns at least its cost), or an expected path that passes 10^12 steps.
        InfeasibleError: every start is forbidden to reach an end.
    """
    kl_coef, tolerance = check_kl_coef(kl_coef), _check_tolerance(tolerance)
    feasible = _feasible_actions(process)
    if kl_coef == math.inf:
        return _at_the_prior(process, feasible)  # there is nothing to improve
    zeros = torch.zeros_like(process.initial)
    alive = feasible.any(-1) | process.terminal
    rounding = min(kl_coef, _largest_reward(process, feasible))
    log_policy = _feasible_prior(process, feasible)
    before, values = torch.full_like(zeros, -math.inf), []
    found = _evaluate(process, log_policy, kl_coef)
    for _ in range(_MAX_IMPROVEMENTS):
        if found is None or not _ends_in_sight(process, log_policy):
            _refuse_unbounded(process, before)
        values.append(_start_value(process, found))
        here = _Values(torch.where(alive, found, 0), zeros, zeros)
        sweep = _backup(process, feasible, here, kl_coef)
        rise = torch.where(alive, sweep.values.best + kl_coef * sweep.values.mass - found, 0)
        if float((found - before)[alive].max()) <= tolerance * _scale(found[alive].abs(), rounding):
            break
        log_policy = _policy(process, feasible, sweep.lifted)
        # V_π − V = (I − γP_π)^{-1} (TV − V): evaluated as it stands, λ KL(π‖q) would lose its
        # digits where λ is large and π almost q
        gained = _solve(process, log_policy, rise)
        before, found = found, None if gained is None else found + gained
    log_policy = _policy(process, feasible, sweep.lifted)
    if kl_coef == 0:
        log_policy = _at_the_best(process, sweep.action_best, log_policy)
    residual = float(rise.abs().max())
    return _solution(process, feasible, sweep, log_policy, kl_coef, values, residual)


def _check_tolerance(tolerance: float) -> float:
    return check_number(
        tolerance,
        "tolerance",
        "from 1e-15 (below it rounding lets nothing settle) to 1, as a part of the largest value",
        lambda number: 1e-15 <= number <= 1,
    )


def _at_the_prior(process: DecisionProcess, feasible: Tensor) -> SoftSolution:
    """λ = inf: V is E_q of the return, by one linear solve, and π is q on what is feasible, each
    action weighed by the mass that stays feasible after it.
    """
    log_policy = _prior_on(process, feasible)
    mean = _evaluate(process, process.log_prior, 0.0)
    assert mean is not None, "a checked process ends under its prior"
    value, action_values = _start_value(process, mean), process.action_values(mean)
    return SoftSolution(process, math.inf, mean, action_values, log_policy, value, (value,), 0.0)


def _at_the_best(process: DecisionProcess, action_values: Tensor, log_policy: Tensor) -> Tensor:
    """λ = 0: π is q on the best actions by exact values Q, each weighed by the mass of the best
    that follows it.

    Args:
        log_policy: a policy of best actions: as long as its paths are, rounding has added up.
    """
    feasible = action_values > -math.inf
    size = float(action_values[feasible].abs().max())
    slack = len(process.states) * (1 + _steps_ahead(process, log_policy)) * ties.EPSILON * size
    slack_of_each = torch.full_like(action_values, slack)
    floor = ties.floor_of(action_values, slack_of_each).amax(-1, keepdim=True)
    return _prior_on(process, feasible & ties.reaches(action_values, slack_of_each, floor))


def _prior_on(process: DecisionProcess, actions: Tensor) -> Tensor:
    """q given that only these actions [S,A] are ever taken, as log π [S,A]: the limit of V/λ → ℓ.

    Each action is weighed by the mass that can stay among them after it: ℓ is the value at λ = 1
    where nothing is paid and the rest is forbidden.
    """
    unpaid = replace(process, rewards=torch.where(actions, 0.0, -math.inf))
    return policy_iteration(unpaid, 1.0).log_policy


def _feasible_actions(process: DecisionProcess) -> Tensor:
    """[S,A]: actions after which a policy exists that surely avoids rewards of −inf and, where γ =
    1, surely ends.

    Raises:
        InfeasibleError: no start has one.
    """
    safe = process.available & (process.rewards > -math.inf)
    # an action struck out may leave a state without one, and so make others unsafe: repeated until
    # nothing changes
    while True:
        alive = safe.any(-1) | process.terminal
        if process.discount == 1:
            alive &= spread((process.moves(safe.double()) > 0).T, process.terminal)
        narrowed = safe & alive[:, None]
        if process.discount > 0:  # at γ = 0 nobody minds where an action leads
            risks_a_dead_end = process.transitions @ (~alive).double() > 0
            narrowed &= ~risks_a_dead_end
        if bool((narrowed == safe).all()):
            break
        safe = narrowed
    if not bool((alive & (process.initial > 0)).any()):
        raise InfeasibleError(
            "from every initial state the reward -inf cannot be avoided, so no policy has a finite"
            " value. Relax the constraint."
        )
    return safe


def _largest_reward(process: DecisionProcess, feasible: Tensor) -> float:
    """max |r| over the feasible actions."""
    return float(process.rewards[feasible].abs().max())


def _backup(process: DecisionProcess, feasible: Tensor, ahead: _Values, kl_coef: float) -> _Backup:
    """(1) in its two parts."""
    following = process.discount * (process.transitions @ ahead.best)
    action_best = torch.where(feasible, process.rewards + following, -math.inf)  # m_Q
    action_mass = process.discount * (process.transitions @ ahead.mass)  # ℓ_Q
    slack = _slack(process, ahead, following) if kl_coef == 0 else torch.zeros_like(following)
    found = soft_maximum(Rows(), process.log_prior, action_best, action_mass, kl_coef, slack)
    alive = feasible.any(-1)
    values = _Values(*(torch.where(alive, part, 0) for part in found[:3]))
    return _Backup(values, process.log_prior + found.log_gain, action_best, action_mass)


def _slack(process: DecisionProcess, ahead: _Values, following: Tensor) -> Tensor:
    """How far rounding may have moved r + γ Σ P m [S,A], from the slack of m on."""
    several = process.transitions.count_nonzero(-1)
    # a sum of one term with P = 1 is that term; else every product and every addition rounds
    roundings = torch.where(several > 1, several + 1, 0) + (0 < process.discount < 1)
    moved = ties.EPSILON * roundings * (process.transitions @ ahead.best.abs())
    carried = process.discount * (process.transitions @ ahead.slack + moved)
    return carried + ties.addition_slack(process.rewards, following)


def _feasible_prior(process: DecisionProcess, feasible: Tensor) -> Tensor:
    """log q [S,A] restricted to the feasible actions."""
    kept = _policy(process, feasible, torch.where(feasible, process.log_prior, -math.inf))
    # q itself where nothing is struck out: normalised anew its KL to q would round, times λ
    whole = (feasible == process.available).all(-1, keepdim=True)
    return torch.where(whole, process.log_prior, kept)


def _policy(process: DecisionProcess, feasible: Tensor, lifted: Tensor) -> Tensor:
    """[S,A] log-masses normalised; even over the available actions where none is feasible."""
    even = torch.where(process.available, 0.0, -math.inf)
    lifted = torch.where(feasible.any(-1, keepdim=True), lifted, even)
    return logspace.log_normalize_alive(lifted)


def _solution(
    process: DecisionProcess,
    feasible: Tensor,
    sweep: _Backup,
    log_policy: Tensor,
    kl_coef: float,
    values: list[float],
    change: float,
) -> SoftSolution:
    dead = ~feasible.any(-1) & ~process.terminal
    state_values = torch.where(dead, -math.inf, sweep.values.best + kl_coef * sweep.values.mass)
    action_values = sweep.action_best + kl_coef * sweep.action_mass
    error_bound = change * _steps_ahead(process, log_policy) if change > 0 else 0.0
    return SoftSolution(
        process,
        kl_coef,
        state_values,
        action_values,
        log_policy,
        _start_value(process, state_values),
        tuple(values),
        error_bound,
    )


def _steps_ahead(process: DecisionProcess, log_policy: Tensor) -> float:
    """γ/(1 − γ); with γ = 1 the longest expected path under a policy."""
    if process.discount < 1:
        return process.discount / (1 - process.discount)
    steps = _solve(process, log_policy, torch.ones_like(process.initial))
    return math.inf if steps is None else float(steps.max())


def _scale(sizes: Tensor, rounding: float) -> float:
    """What rounding is measured against: λ log Σ q e^{Q/λ} has no more digits than λ has, or than
    the rewards, where λ exceeds them.
    """
    return float(sizes.max()) + rounding


def _start_value(process: DecisionProcess, state_values: Tensor) -> float:
    return float(expected_next(process.initial, state_values))


def _ends_in_sight(process: DecisionProcess, log_policy: Tensor) -> bool:
    """With γ = 1: the expected path of a policy is short enough for its values to have digits.
    Policies that chase an unbounded value stretch it.
    """
    if process.discount < 1:
        return True
    steps = _solve(process, log_policy, torch.ones_like(process.initial))
    # a path has at least 1 step, unless the solve lost all digits
    return steps is not None and bool(((steps > 0.5) & (steps < _MAX_STEPS)).all())


def _refuse_unbounded(process: DecisionProcess, before: Tensor) -> NoReturn:
    state = int(torch.where(process.terminal, -math.inf, before).argmax())
    raise InputError(
        f"the values grow without bound (at {process.place(state)} past"
        f" {float(before[state]):.3g}): with discount 1 a loop earns at least what it costs, λ log"
        " q included. Raise kl_coef, lower the discount, or make the loop's reward smaller."
    )


# --- policies -------------------------------------------------------------------------------------


def policy_evaluation(process: DecisionProcess, log_policy: Tensor, kl_coef: float) -> PolicyValues:
    """V_π, Q_π and J(π) by the linear system (2), exact also where states return.

    Args:
        log_policy: log π(a|s) [S,A] in nats; rows of terminal states are ignored.
        kl_coef: λ ≥ 0; at inf a policy other than q has value −inf.

    Raises:
        UnsupportedPolicyError: the policy takes an action that the prior does not.
        InputError: a wrong shape, rows that do not sum to one, or γ = 1 and a state from which the
            policy never ends.
    """
    log_policy = _check_policy(process, log_policy)
    state_values = _evaluate(process, log_policy, check_kl_coef(kl_coef))
    if state_values is None:
        _refuse_endless(process, log_policy)
    return PolicyValues(
        state_values, process.action_values(state_values), _start_value(process, state_values)
    )


def visits(process: DecisionProcess, log_policy: Tensor) -> Tensor:
    """d_π = μ (I − γP_π)^{-1} [S], expected visits with the t-th worth γ^t; at terminal states the
    discounted chance to end there.

    Raises:
        UnsupportedPolicyError, InputError: as in `policy_evaluation`.
    """
    log_policy = _check_policy(process, log_policy)
    found = _solve(process, log_policy, process.initial, transposed=True)
    if found is None:
        _refuse_endless(process, log_policy)
    return found


def policy_gradient(process: DecisionProcess, log_policy: Tensor, kl_coef: float) -> Tensor:
    """∂J/∂θ [S,A] by (3), in the softmax logits of each state, reward units; 0 where the policy has
    no mass.

    Raises:
        InputError: λ = inf, or a policy whose value is −inf on a state it visits; otherwise as in
            `policy_evaluation`.
    """
    kl_coef = check_kl_coef(kl_coef)
    if kl_coef == math.inf:
        raise InputError(
            "kl_coef = inf leaves only the prior, where J has no gradient; give a finite λ."
        )
    log_policy = _check_policy(process, log_policy)
    found, weight = policy_evaluation(process, log_policy, kl_coef), visits(process, log_policy)
    visited = (weight > 0) & ~process.terminal
    for state in (visited & (found.state_values == -math.inf)).nonzero().squeeze(-1).tolist()[:1]:
        raise InputError(
            f"the policy's value at {process.place(state)} is -inf, so J has no gradient; give"
            " forbidden actions log_policy -inf."
        )
    # masked twice: −inf − (−inf) both in the log-ratio and in Q − V would be NaN
    taken = (log_policy > -math.inf) & visited[:, None]
    log_ratio = torch.where(taken, log_policy - process.log_prior, 0)
    regularised = found.action_values - kl_coef * log_ratio
    advantage = torch.where(taken, regularised - found.state_values[:, None], 0)
    return weight[:, None] * logspace.mul_exp(advantage, log_policy)  # (3)


def objective_gap(optimum: SoftSolution, log_policy: Tensor) -> float:
    """J(π*) − J(π) ≥ 0 of a policy [S,A], in reward units, directly: λ Σ_s d_π(s)
    KL(π(·|s)‖π*(·|s)), which keeps its digits near 0.

    At the limits λ = 0 and inf the difference itself.

    Raises:
        InputError: J(π*) = −inf, as at λ = inf where the prior meets a reward of −inf.
        UnsupportedPolicyError, InputError: as in `policy_evaluation`.
    """
    process, kl_coef = optimum.process, optimum.kl_coef
    if optimum.value == -math.inf:
        raise InputError(
            "the optimum's value is -inf, so no policy has a gap to it; start where an end can be"
            " reached without rewards of -inf, with a finite kl_coef."
        )
    if not 0 < kl_coef < math.inf:
        return max(0.0, optimum.value - policy_evaluation(process, log_policy, kl_coef).value)
    weight = visits(process, log_policy)
    divergence = logspace.kl_divergence(_check_policy(process, log_policy), optimum.log_policy)
    return kl_coef * float(torch.where(weight > 0, weight * divergence, 0).sum())


def _check_policy(process: DecisionProcess, log_policy: Tensor) -> Tensor:
    if log_policy.shape != process.log_prior.shape:
        raise InputError(
            f"log_policy has shape {list(log_policy.shape)}; expected [S, A] ="
            f" {list(process.log_prior.shape)}."
        )
    if log_policy.is_complex():  # a cast would drop the imaginary part without a word
        raise InputError("log_policy is complex; give log π(a|s) as real numbers.")
    log_policy = log_policy.detach().double().masked_fill(process.terminal[:, None], -math.inf)
    total = log_policy.exp().sum(-1)
    off = ~((total - 1).abs() <= SUM_TOLERANCE)  # "not near" where "far" would let NaN pass
    for state in (off & ~process.terminal).nonzero().squeeze(-1).tolist()[:1]:
        raise InputError(
            f"the policy's actions in {process.place(state)} sum to {float(total[state]):.12g}, not"
            " 1; apply log_softmax to the logits."
        )
    for state, action in ((log_policy > -math.inf) & ~process.available).nonzero().tolist()[:1]:
        mass = float(log_policy[state, action].exp())
        raise UnsupportedPolicyError(
            f"the policy gives mass {mass:.3g} to {process.place(state, action)}, where the prior"
            " has none, so KL is infinite; give the action log_policy -inf, or prior mass."
        )
    return logspace.log_normalize_alive(log_policy)


def _evaluate(process: DecisionProcess, log_policy: Tensor, kl_coef: float) -> Tensor | None:
    """V_π [S] of (2); −inf from where the policy can meet −inf; None where γ = 1 and it does not
    end.
    """
    divergence = logspace.kl_divergence(log_policy, process.log_prior)
    penalty = torch.where(divergence == 0, 0, kl_coef * divergence)  # inf · 0 at λ = inf is 0
    expected_reward = logspace.expectation(log_policy, process.rewards)
    return _solve(process, log_policy, expected_reward - penalty)


def _solve(
    process: DecisionProcess, log_policy: Tensor, right: Tensor, transposed: bool = False
) -> Tensor | None:
    """(I − γP_π)^{-1} right [S]; its transpose for row vectors. None where it does not exist, or
    has no digits.
    """
    chain = process.discount * process.moves(log_policy.exp())
    if process.discount == 1 and not _ends(process, log_policy):
        return None
    # −inf spreads to every state that can lead there; the linear system is that of the others
    lost = right == -math.inf
    if bool(lost.any()):
        lost = spread((chain > 0).T, lost)
    kept = ~lost
    identity = torch.eye(int(kept.sum()), dtype=chain.dtype, device=chain.device)
    system = identity - chain[kept][:, kept]
    found, failed = torch.linalg.solve_ex(system.T if transposed else system, right[kept])
    if int(failed) or not bool(torch.isfinite(found).all()):
        return None
    return torch.full_like(right, -math.inf).masked_scatter(kept, found)


def _ends(process: DecisionProcess, log_policy: Tensor) -> bool:
    """Every state can reach an end: then in a finite process it surely does."""
    edges = process.moves((log_policy > -math.inf).double()) > 0
    return bool(spread(edges.T, process.terminal).all())


def _refuse_endless(process: DecisionProcess, log_policy: Tensor) -> NoReturn:
    ending = spread((process.moves(log_policy.exp()) > 0).T, process.terminal)
    where = (~ending).nonzero().squeeze(-1).tolist()
    place = (
        f"from {process.place(where[0])} the policy never ends"
        if where
        else "the policy ends with a probability too small to resolve"
    )
    raise InputError(
        f"{place}, and with discount {process.discount:g} its value need not exist; give an ending"
        " action some mass, or discount < 1."
    )
