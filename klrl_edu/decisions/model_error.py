"""Planning on a wrong model: how much it can lose, and what a plan promises that treats the world's
replies as its own choice.

    ‖V* − V̂‖∞ ≤ Σ_{t<H} γ^t · max_{s,a} |r − r̂ + γ Σ_s' (P − P̂) V̂|                           (1)
    V(s) = λ log Σ_a q(a|s) Σ_s' P(s'|s,a) e^{(r(s,a) + γV(s'))/λ}                               (2)

V* and V̂ are the soft values of the process (r, P) and of the model (r̂, P̂); the soft maximum
moves no further than its arguments, so (1) is proved as for the maximum. Kearns & Singh (2002),
Lemma 4, for (1); Levine (2018), §2.4, for (2). S states, A actions, H the longest path; logs in
nats, values in reward units.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.decisions.decision_process import MAX_ENTRIES, DecisionProcess, check_max_entries
from klrl_edu.decisions.soft_control import policy_iteration


@takes_numbers
def simulation_bound(
    process: DecisionProcess, model: DecisionProcess, model_values: Tensor
) -> float:
    """(1): how far V̂ = V* of `model` may lie from V* of `process`, in reward units, and V̂ from
    what its policy earns in `process`.

    A policy planned on the model therefore loses at most twice the bound. inf where γ = 1 and the
    process returns to a state.

    Args:
        model_values: V̂ [S], finite.

    Raises:
        InputError: the two differ in shape, discount, terminal states or available actions.
    """
    same = (
        process.transitions.shape == model.transitions.shape and process.discount == model.discount
    )
    if not same or bool(
        (process.terminal != model.terminal).any() | (process.available != model.available).any()
    ):
        raise InputError(
            "process and model must share states, terminal states, discount and available actions;"
            " only rewards and transitions differ."
        )
    if not bool(torch.isfinite(model_values).all()):
        raise InputError("model_values holds NaN or an infinity; give finite values V̂ [S].")
    equal = process.rewards == model.rewards  # −inf in both is no difference, and not NaN
    reward_error = torch.where(equal, 0, process.rewards - torch.where(equal, 0, model.rewards))
    moved = (process.transitions - model.transitions) @ model_values
    error = reward_error + process.discount * moved
    worst = float(torch.where(process.available, error, 0).abs().max())
    # 0 is told apart, as an endless horizon times 0 would be NaN
    return process.discounted_horizon * worst if worst > 0 else 0.0


class ChosenReplies(NamedTuple):
    """What a plan believes that treats replies as its own choice.

    Attributes:
        state_values: V [S] in reward units, at least V*.
        value: Σ μ V, the promised value.
        log_policy: its actions, log π(a|s) [S,A] in nats.
        log_replies: how it thinks the world replies, log P̃(s'|s,a) [S,A,S] in nats.
    """

    state_values: Tensor
    value: float
    log_policy: Tensor
    log_replies: Tensor


def trajectory_value(
    process: DecisionProcess, kl_coef: float, max_entries: int = MAX_ENTRIES
) -> ChosenReplies:
    """The posterior over trajectories, which tilts the world's replies as well as the actions, by
    (2).

    It is the optimum of another process, in which the model picks action and reply at once and pays
    KL for both; with γ = 1 it is q(τ) e^{r(τ)/λ}/Z. By Jensen (2) promises at least what is
    attainable, and no more where transitions are deterministic.

    Raises:
        TooLargeError: the other process would have more than `max_entries` transition entries;
            otherwise as in `policy_iteration`.

    Source: Levine (2018), §2.4.
    """
    check_max_entries(max_entries)
    S, A = process.log_prior.shape
    entries = S * A * S * S
    if entries > max_entries:
        raise TooLargeError(
            f"{S} states and {A} actions make {entries:,} entries, more than max_entries ="
            f" {max_entries:,}; take fewer states."
        )
    # an action of the other process is a pair (a, s'), at index a S + s': the prior takes it with
    # q(a|s) P(s'|s,a), and it surely leads to s'
    log_pairs = (process.log_prior[:, :, None] + process.transitions.log()).reshape(S, A * S)
    each_state = torch.eye(S, dtype=log_pairs.dtype, device=log_pairs.device)
    goes_to = each_state.repeat(A, 1).expand(S, A * S, S)
    rewards = process.rewards[:, :, None].expand(S, A, S).reshape(S, A * S)
    names = tuple(f"{action} → {state}" for action in process.actions for state in process.states)
    believed = DecisionProcess(
        log_pairs,
        goes_to,
        rewards,
        process.initial,
        process.terminal,
        process.discount,
        process.continuing,
        process.states,
        names,
    )
    solved = policy_iteration(believed, kl_coef)
    joint = solved.log_policy.reshape(S, A, S)
    log_policy = logspace.logsumexp(joint)
    taken = log_policy[:, :, None] > -math.inf
    log_replies = torch.where(taken, joint - log_policy[:, :, None], -math.inf)
    return ChosenReplies(solved.state_values, solved.value, log_policy, log_replies)
