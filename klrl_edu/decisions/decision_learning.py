"""Learning a decision process from its transitions, three ways, with the exact gap to the optimum
along the way.

    model-free:       Q(s,a) ← (1 − α)Q(s,a) + α(r + γ V(s')),
    V(s') = λ log Σ_a q(a|s') e^{Q(s',a)/λ},    α = n(s,a)^{−ω}                                  (1)
    model-based:      π* of the estimate P̂(s'|s,a) = (n(s,a,s') + 1/S)/(n(s,a) + 1)             (2)
    policy gradient:  θ ← θ + η Σ_t ∇log π(a_t|s_t) (Σ_{u≥t} (r_u − λ log π/q) − b(s_t)),
    averaged over episodes                                                                       (3)

(1) keeps the soft maximum inside the target: r + γ max Q would forget the prior, r + γ Q(s', a')
the optimum. In (2) every pair starts with one observation shared evenly by all states, so that a
pair never seen leads anywhere and every policy ends. All three know r(s,a), q and μ, not P.

A discount is drawn: after each transition an episode survives with probability γ, so that sums
along it need no powers of γ, and (3) is unbiased. Watkins & Dayan (1992), Even-Dar & Mansour (2003)
and Fox et al. (2016) for (1); Williams (1992) for (3). S states, A actions, N transitions.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.display import Cell, html_table, text_table
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.validation import check_count, check_kl_coef, check_number
from klrl_edu.decisions.decision_process import DecisionProcess
from klrl_edu.decisions.model_error import simulation_bound
from klrl_edu.decisions.soft_control import SoftSolution, objective_gap, policy_iteration, visits
from klrl_edu.estimators.advantages import to_go

_MOST = 100_000_000  # transitions, of 32 bytes each


class Transitions(NamedTuple):
    """State, action and next state [N] of whole episodes one after the other, and each one's
    episode [N], rising from 0.
    """

    state: Tensor
    action: Tensor
    next_state: Tensor
    episode: Tensor


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """What a learner reached, at the first end of an episode at or after each checkpoint.

    Attributes:
        learner: its name.
        transitions: consumed so far.
        gaps: J(π*) − J(π) of the learned policy, exact, in reward units.
        log_policy: the last policy, log π [S,A] in nats.
        model_bounds: planning only: 2 × `simulation_bound`, which no gap exceeds; needs the true
            process.
        count_bounds: planning only: 2/(1 − γ) × `sampling_bound`, which the counts alone give; inf
            where γ = 1.
    """

    learner: str
    transitions: tuple[int, ...]
    gaps: tuple[float, ...]
    log_policy: Tensor = field(repr=False)
    model_bounds: tuple[float, ...] = ()
    count_bounds: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the policy."""
        return {
            "learner": self.learner,
            "transitions": list(self.transitions),
            "gaps": list(self.gaps),
            "model_bounds": list(self.model_bounds),
            "count_bounds": list(self.count_bounds),
        }

    def _table(self) -> tuple[list[str], list[list[Cell]]]:
        header = ["transitions", f"gap, {self.learner}"]
        columns: list[tuple[Cell, ...]] = [self.transitions, self.gaps]
        if self.model_bounds:
            header += ["model bound", "count bound"]
            columns += [self.model_bounds, self.count_bounds]
        return header, [list(row) for row in zip(*columns, strict=True)]

    def __str__(self) -> str:
        return text_table(*self._table(), digits=4)

    def _repr_html_(self) -> str:
        return html_table(*self._table(), digits=4)


# --- the learners ---------------------------------------------------------------------------------


def soft_q_learning(
    process: DecisionProcess,
    kl_coef: float,
    checkpoints: Sequence[int],
    draw: Draw,
    *,
    exponent: float = 0.8,
) -> LearningCurve:
    """(1) from Q = 0, one update a transition, along episodes of the prior.

    Args:
        process: finite rewards.
        kl_coef: 0 < λ < inf.
        checkpoints: rising numbers of transitions at which to take the gap.
        exponent: ω in (½, 1]. At 1 the estimates are plain means, which keep their first targets,
            taken before V was known, for very long.

    Raises:
        InputError: an argument outside these.
    """
    optimum, table = _optimum(process, kl_coef), SoftQTable(process, kl_coef, exponent)
    episodes, ends = _prior_episodes(process, checkpoints, draw)
    gaps: list[float] = []
    start = 0
    for end in ends:
        table.update(*(column[start:end].tolist() for column in episodes[:3]))
        gaps.append(objective_gap(optimum, table.log_policy()))
        start = end
    return LearningCurve("soft Q-learning", ends, tuple(gaps), table.log_policy())


def plan_on_estimate(
    process: DecisionProcess,
    kl_coef: float,
    checkpoints: Sequence[int],
    draw: Draw,
    *,
    confidence: float = 0.95,
) -> LearningCurve:
    """(2): at each checkpoint the optimum of the process estimated from the prior's episodes so
    far, with two bounds on its gap.

    Args:
        process, kl_coef, checkpoints: as in `soft_q_learning`.
        confidence: with which `count_bounds` hold, all checkpoints at once; between 0 and 1.

    Raises:
        InputError: an argument outside these.
    """
    optimum, confidence = _optimum(process, kl_coef), _check_confidence(confidence)
    episodes, ends = _prior_episodes(process, checkpoints, draw)
    counts, start = torch.zeros_like(process.transitions), 0
    # a value off by ε misleads the plan by 2ε at each of the steps still ahead
    ahead = 1 / (1 - process.discount) if process.discount < 1 else math.inf
    gaps, model_bounds, count_bounds = [], [], []
    for end in ends:
        seen = tuple(column[start:end] for column in episodes[:3])
        counts.index_put_(seen, counts.new_ones(()), accumulate=True)
        model = estimated_process(process, counts)
        plan = policy_iteration(model, kl_coef)
        gaps.append(objective_gap(optimum, plan.log_policy))
        model_bounds.append(2 * simulation_bound(process, model, plan.state_values))
        count_bounds.append(2 * ahead * sampling_bound(process, counts.sum(-1), confidence))
        start = end
    bounds = tuple(model_bounds), tuple(count_bounds)
    return LearningCurve("planning on an estimate", ends, tuple(gaps), plan.log_policy, *bounds)


def policy_gradient_learning(
    process: DecisionProcess,
    kl_coef: float,
    checkpoints: Sequence[int],
    draw: Draw,
    *,
    episodes: int = 32,
    learning_rate: float = 1.0,
) -> LearningCurve:
    """(3) from π = q; the baseline b(s) is the mean of what followed s in the batch before, so the
    gradient stays unbiased.

    Args:
        process, kl_coef, checkpoints: as in `soft_q_learning`.
        episodes: a step.
        learning_rate: η > 0, per reward unit.

    Raises:
        InputError: an argument outside these.
    """
    optimum = _optimum(process, kl_coef)
    _check_size(episodes, "episodes")
    learning_rate = check_number(
        learning_rate,
        "learning_rate",
        "above 0, a step per reward unit that climbs",
        lambda number: 0 < number < math.inf,
    )
    baseline, log_policy = torch.zeros_like(process.initial), process.log_prior
    waiting, consumed = list(_check_checkpoints(checkpoints)), 0
    transitions, gaps = [], []
    while waiting:
        batch = sample_transitions(process, log_policy, episodes, draw)
        gradient, baseline = reinforce_gradient(process, log_policy, kl_coef, batch, baseline)
        # log π are logits of π, so that no parameters need be kept beside it
        raised = log_policy + learning_rate * gradient
        log_policy = logspace.log_normalize_alive(raised)
        consumed += len(batch.state)
        if consumed >= waiting[0]:
            waiting = [checkpoint for checkpoint in waiting if checkpoint > consumed]
            transitions.append(consumed)
            gaps.append(objective_gap(optimum, log_policy))
    return LearningCurve("policy gradient", tuple(transitions), tuple(gaps), log_policy)


# --- their pieces ---------------------------------------------------------------------------------


def sample_transitions(
    process: DecisionProcess, log_policy: Tensor, episodes: int, draw: Draw
) -> Transitions:
    """Whole episodes of a policy [S,A] (log π, nats): each ends at a terminal state, or after a
    transition with probability 1 − γ.

    Raises:
        InputError: no whole number of episodes from 1 to 10^8.
    """
    _check_size(episodes, "episodes")
    A, terminal = len(process.actions), process.terminal
    # rows never drawn from, but every row of a Draw needs mass
    choices = logspace.uniform_where_dead(log_policy, terminal)
    replies = logspace.uniform_where_dead(process.transitions.log(), ~process.available)
    replies = replies.flatten(0, 1)
    survival = torch.tensor([[1 - process.discount, process.discount]], dtype=torch.float64).log()
    # all episodes take a step together; `index` says which of them still run
    index = torch.arange(episodes)
    state = draw(process.initial.log()[None], torch.zeros_like(index))
    steps = []
    while len(index):
        action = draw(choices, state)
        after = draw(replies, state * A + action)
        steps.append(torch.stack([state, action, after, index]))
        goes_on = ~terminal[after]
        if process.discount < 1:
            goes_on &= draw(survival, torch.zeros_like(index)) == 1
        index, state = index[goes_on], after[goes_on]
    columns = torch.cat(steps, 1)
    # from step by step to episode by episode; a stable sort keeps the steps of each in order
    by_episode = torch.argsort(columns[3], stable=True)
    return Transitions(*columns[:, by_episode])


class SoftQTable:
    """Q, its visit counts and its soft values in plain floats: (1) is one short sum a transition,
    for which tensors are slow.

    Args:
        process: gives q, r and γ.
        kl_coef: 0 < λ < inf.
        exponent: ω in (½, 1].

    Raises:
        InputError: λ or ω outside these.
    """

    def __init__(self, process: DecisionProcess, kl_coef: float, exponent: float):
        self.process, self.kl_coef = process, _check_kl_coef(kl_coef)
        self.exponent = check_number(
            exponent,
            "exponent",
            "above 1/2 (steps that average noise out) and at most 1 (steps that still reach)",
            lambda number: 0.5 < number <= 1,
        )
        prior = process.log_prior.exp().tolist()
        self.prior = [[(a, p) for a, p in enumerate(row) if p > 0] for row in prior]
        self.rewards = process.rewards.tolist()
        self.action_values = [[0.0] * len(process.actions) for _ in process.states]
        self.counts = [[0] * len(process.actions) for _ in process.states]
        self.state_values = [0.0] * len(process.states)

    def update(
        self, states: Sequence[int], actions: Sequence[int], next_states: Sequence[int]
    ) -> None:
        """(1) for N transitions in turn."""
        discount = self.process.discount
        for state, action, after in zip(states, actions, next_states, strict=True):
            self.counts[state][action] += 1
            step = self.counts[state][action] ** -self.exponent
            target = self.rewards[state][action] + discount * self.state_values[after]
            surprise = target - self.action_values[state][action]
            self.action_values[state][action] += step * surprise  # (1)
            self.state_values[state] = self._soft_value(state)

    def _soft_value(self, state: int) -> float:
        """λ log Σ_a q(a|s) e^{Q(s,a)/λ}, in reward units."""
        row, choices = self.action_values[state], self.prior[state]
        # the largest Q taken out, so that no exponential overflows
        top = max(row[action] for action, _ in choices)
        lifted = sum(p * math.exp((row[action] - top) / self.kl_coef) for action, p in choices)
        return top + self.kl_coef * math.log(lifted)

    def log_policy(self) -> Tensor:
        """log π [S,A] in nats, π ∝ q e^{Q/λ}."""
        action_values = torch.tensor(self.action_values, dtype=torch.float64)
        return logspace.log_normalize_alive(self.process.log_prior + action_values / self.kl_coef)


def estimated_process(process: DecisionProcess, counts: Tensor) -> DecisionProcess:
    """(2) from counts n(s,a,s') [S,A,S]; everything but the transitions is the process's own."""
    total = counts.sum(-1, keepdim=True)
    estimate = (counts + 1 / len(process.states)) / (total + 1)  # (2)
    return replace(process, transitions=estimate)


def sampling_bound(process: DecisionProcess, counts: Tensor, confidence: float = 0.95) -> float:
    """How far V* of the estimate (2) may lie from the true V*, and Q* too, by its counts n(s,a)
    [S,A] alone, in reward units.

    γ R/(1 − γ) · max_{s,a} min(1, n/(n + 1) √(log(2 K n(n + 1)/δ)/2n) + 1/(n + 1)), with K
    available pairs, δ = 1 − confidence, and R = (max r⁺ + max r⁻)/(1 − γ) the range in which V*
    must lie: Hoeffding's inequality for the mean of V* over the replies seen, at every pair and
    every n at once (n depends on the replies), and the one observation that was not seen. inf where
    γ = 1.

    Args:
        counts: n(s,a) [S,A], at least 0.
        confidence: between 0 and 1.

    Raises:
        InputError: an argument outside these.
    """
    confidence = _check_confidence(confidence)
    if counts.shape != process.log_prior.shape:
        raise InputError(
            f"counts has shape {list(counts.shape)}; expected [S, A] ="
            f" {list(process.log_prior.shape)}."
        )
    if not bool(((counts >= 0) & (counts < math.inf)).all()):
        raise InputError("counts holds a number below 0, NaN or inf; give n(s,a), at least 0.")
    # the first reward alone is known, whatever the replies
    if process.discount == 0:
        return 0.0
    if process.discount == 1:
        return math.inf
    ahead = 1 / (1 - process.discount)
    highest, lowest = process.rewards.clamp(min=0).max(), process.rewards.clamp(max=0).min()
    value_range = float(highest - lowest) * ahead
    n = counts[process.available].double()
    # never 0 in the root: where n = 0 the deviation counts n/(n + 1) = 0 times
    seen = n.clamp(min=1)
    # every pair, and every n with the share 1/n(n + 1) of δ: the shares of all n sum to 1
    log_tries = torch.log(2 * len(n) * seen * (seen + 1) / (1 - confidence))
    deviation = torch.sqrt(log_tries / (2 * seen))
    share_off = (n / (n + 1) * deviation + 1 / (n + 1)).clamp(max=1)  # of the range, at most all
    return process.discount * ahead * value_range * float(share_off.max())


def reinforce_gradient(
    process: DecisionProcess,
    log_policy: Tensor,
    kl_coef: float,
    batch: Transitions,
    baseline: Tensor,
) -> tuple[Tensor, Tensor]:
    """(3) [S,A] from episodes of the policy, an unbiased estimate of `policy_gradient`, and the
    mean of what followed each state [S].

    Args:
        kl_coef: 0 ≤ λ < inf.
        baseline: b [S] in reward units, from other episodes; it is kept where the batch visits no
            such state.

    Raises:
        InputError: λ outside these.
    """
    kl_coef, baseline = check_kl_coef(kl_coef), baseline.to(log_policy)
    if kl_coef == math.inf:
        raise InputError(
            "kl_coef = inf leaves only the prior, where J has no gradient; give a finite λ."
        )
    state, action = batch.state, batch.action
    # only of actions that were taken: elsewhere it may be −inf − (−inf)
    log_ratio = (log_policy - process.log_prior)[state, action]
    paid = process.rewards[state, action] - kl_coef * log_ratio
    # from here to the end of the batch, less what stands after the episode
    total = to_go(paid)
    after = torch.searchsorted(batch.episode, batch.episode, right=True)
    followed = total - torch.cat([total, total.new_zeros(1)])[after]
    advantage = followed - baseline[state]
    # ∇log π(a|s) = e_a − π(·|s): first the e_a of all transitions, then their π(·|s)
    pushed = torch.zeros_like(log_policy).index_put((state, action), advantage, accumulate=True)
    gradient = pushed - log_policy.exp() * pushed.sum(-1, keepdim=True)
    visited = torch.bincount(state, minlength=len(baseline))
    mean = torch.zeros_like(baseline).index_add(0, state, followed) / visited
    episodes = float(batch.episode[-1] + 1)
    return gradient / episodes, torch.where(visited > 0, mean, baseline)


def _optimum(process: DecisionProcess, kl_coef: float) -> SoftSolution:
    _check_kl_coef(kl_coef)
    for state, action in (process.rewards == -math.inf).nonzero().tolist()[:1]:
        raise InputError(
            f"the reward of {process.place(state, action)} is -inf, which no average survives; give"
            " the action no prior mass instead."
        )
    return policy_iteration(process, kl_coef)


def _check_kl_coef(kl_coef: float) -> float:
    value = check_kl_coef(kl_coef)
    if not 0 < value < math.inf:
        raise InputError(
            f"kl_coef = {value!r}: learners need 0 < λ < inf; at 0 their policies need not end,"
            " and at inf there is nothing to learn."
        )
    return value


def _check_confidence(confidence: float) -> float:
    return check_number(
        confidence, "confidence", "a number between 0 and 1", lambda number: 0 < number < 1
    )


def _check_size(count: int, name: str) -> int:
    """A number of episodes or transitions: they are held in memory."""
    if check_count(count, name) > _MOST:
        raise TooLargeError(f"{name} = {count:,} is more than the {_MOST:,} that are held at once.")
    return count


def _prior_episodes(
    process: DecisionProcess, checkpoints: Sequence[int], draw: Draw
) -> tuple[Transitions, tuple[int, ...]]:
    """Episodes of the prior up to the last checkpoint, and the first end of an episode at or after
    each.
    """
    wanted = _check_checkpoints(checkpoints)
    # an episode's length on average: discounted visits count those that survive
    length = float(visits(process, process.log_prior)[~process.terminal].sum())
    blocks, have, episodes = [], 0, 0
    while have < wanted[-1]:
        count = math.ceil((wanted[-1] - have) / length)
        block = sample_transitions(process, process.log_prior, count, draw)
        blocks.append(block._replace(episode=block.episode + episodes))
        have, episodes = have + len(block.state), episodes + count
    joined = Transitions(*(torch.cat(columns) for columns in zip(*blocks, strict=True)))
    ends = torch.bincount(joined.episode).cumsum(0)
    place = torch.searchsorted(ends, torch.tensor(wanted))
    # one long episode may end several checkpoints; its end stands once, in order
    return joined, tuple(dict.fromkeys(ends[place].tolist()))


def _check_checkpoints(checkpoints: Sequence[int]) -> tuple[int, ...]:
    named = [(value, f"checkpoints[{index}]") for index, value in enumerate(checkpoints)]
    wanted = tuple(_check_size(value, name) for value, name in named)
    if not wanted or any(later <= earlier for earlier, later in itertools.pairwise(wanted)):
        raise InputError(
            f"checkpoints = {list(wanted)} must rise; give numbers of transitions such as (100,"
            " 1_000, 10_000)."
        )
    return wanted
