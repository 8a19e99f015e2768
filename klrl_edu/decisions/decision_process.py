"""Finite decision processes with a prior policy: what a sequence problem becomes where somebody
else, a user or a tool, moves too.

    s_0 ~ μ,    a_t ~ π(·|s_t),    s_{t+1} ~ P(·|s_t, a_t),
    J(π) = E_π[Σ_t γ^t (r(s_t, a_t) − λ log π(a_t|s_t)/q(a_t|s_t))]                              (1)

A token process is the case where P is deterministic (a token appends itself), γ = 1 and every path
ends: its optimum is the posterior of the problem (`token_process`). Howard & Matheson (1972);
Todorov (2006); Levine (2018), §2; Puterman (1994), ch. 7, for γ = 1. S states, A actions; logs in
nats, rewards and values in reward units.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.display import format_number
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.validation import SUM_TOLERANCE, check_number
from klrl_edu.exact.enumeration import Support, problem_support
from klrl_edu.exact.soft_bellman import edge_log_prior, edge_rewards
from klrl_edu.models.table import PrefixTable
from klrl_edu.problems.problem import Problem

MAX_ENTRIES = 10_000_000  # of transitions [S,A,S]: 80 MB
_ENDING_NAME = "end"


@dataclass(frozen=True, eq=False)
class DecisionProcess:
    """A finite Markov decision process with a prior policy q.

    Rows of terminal states, and of actions without prior mass, mean nothing and are stored as
    zeros; probabilities are divided by their sum.

    Args:
        log_prior: log q(a|s) [S,A] in nats; −inf where the action is not available.
        transitions: P(s'|s,a) [S,A,S].
        rewards: r(s,a) [S,A] in reward units; −inf forbids the action.
        initial: μ [S], 0 at terminal states.
        terminal: [S], true where the process ends: value 0, no actions.
        discount: γ from 0 to 1.
        continuing: accept states from which no end can be reached; needs γ < 1.
        states, actions: S and A names, for messages and tables; numbered by default.

    Raises:
        InputError: wrong shapes, rows that do not sum to one within 1e-9, NaN or +inf, γ outside
            [0, 1], a state that the prior cannot reach, or one from which it cannot reach an end
            without `continuing`. The message names state and action.
    """

    log_prior: Tensor
    transitions: Tensor
    rewards: Tensor
    initial: Tensor
    terminal: Tensor
    discount: float = 1.0
    continuing: bool = False
    states: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # in this order: a check may rely on what stands above it, as messages do on the names
        for name in ("log_prior", "transitions", "rewards", "initial"):
            self._set(name, _numbers(getattr(self, name), name))
        self._set("terminal", _as_tensor(self.terminal, "terminal", None))
        _check_shapes(self)
        self._set("states", _names(self.states, "states", self.initial.numel(), "s"))
        self._set("actions", _names(self.actions, "actions", self.log_prior.shape[1], "a"))
        self._set("discount", _check_discount(self.discount, self.continuing))
        self._set("log_prior", _clean_prior(self))
        self._set("rewards", _clean_rewards(self))
        self._set("transitions", _clean_transitions(self))
        self._set("initial", _clean_initial(self))
        _check_reachable(self)
        _check_ends(self)

    @classmethod
    def from_probabilities(
        cls,
        prior: Tensor | Sequence[Any],
        transitions: Tensor | Sequence[Any],
        rewards: Tensor | Sequence[Any],
        *,
        initial: Tensor | Sequence[float],
        terminal: Tensor | Sequence[bool],
        discount: float = 1.0,
        continuing: bool = False,
        states: Sequence[str] = (),
        actions: Sequence[str] = (),
    ) -> "DecisionProcess":
        """The process with prior probabilities q(a|s) [S,A], 0 where an action is not available;
        other arguments as in the class, lists too.
        """
        probabilities = _numbers(prior, "prior")
        for index in _first(~(probabilities >= 0)):  # also NaN
            raise InputError(
                f"prior{index} = {float(probabilities[tuple(index)])} is not a probability; give 0"
                " for an action that is not available."
            )
        return cls(
            probabilities.log(),
            _numbers(transitions, "transitions"),
            _numbers(rewards, "rewards"),
            _numbers(initial, "initial"),
            _as_tensor(terminal, "terminal", None),
            discount,
            continuing,
            tuple(states),
            tuple(actions),
        )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def available(self) -> Tensor:
        """[S,A], true where the prior has mass; nowhere at terminal states."""
        return self.log_prior > -math.inf

    @property
    def horizon(self) -> float:
        """H, the most transitions on a path from any state to an end; inf where the process can
        return to a state.
        """
        edges = (self.moves(self.available.double()) > 0).double()
        # each round strikes out the states that lead to none still waiting: after n rounds those
        # are left from which a path of more than n transitions starts
        waiting, rounds = ~self.terminal, 0
        while bool(waiting.any()):
            left = waiting & (edges @ waiting.double() > 0)
            if bool((left == waiting).all()):
                return math.inf  # they lead to one another, for ever
            waiting, rounds = left, rounds + 1
        return float(rounds)

    @property
    def discounted_horizon(self) -> float:
        """Σ_{t<H} γ^t: what one unit at every step can sum to; inf where γ = 1 and the process can
        return to a state.
        """
        if self.discount == 1:
            return self.horizon
        # γ^inf is 0: the sum of a process that returns is 1/(1 − γ)
        return (1 - self.discount**self.horizon) / (1 - self.discount)

    def moves(self, weights: Tensor) -> Tensor:
        """Σ_a w(s,a) P(s'|s,a) [S,S]: the chain of states under a policy [S,A], or where a set of
        actions [S,A] can lead (> 0).
        """
        # a product [1,A]·[A,S] a state, faster than one einsum on so small matrices
        return torch.bmm(weights.unsqueeze(1), self.transitions).squeeze(1)

    def action_values(self, state_values: Tensor) -> Tensor:
        """Q = r + γ Σ_s' P V [S,A] of values [S] that may be −inf; −inf too where an action is not
        available.
        """
        values = self.rewards
        if self.discount > 0:  # at γ = 0 what follows does not count, though it be −inf
            values = values + self.discount * expected_next(self.transitions, state_values)
        return torch.where(self.available, values, -math.inf)

    def place(self, state: int, action: int | None = None) -> str:
        """How messages name a state, or a state and an action."""
        return f"state {self.states[state]!r}" + (
            "" if action is None else f", action {self.actions[action]!r}"
        )

    def __repr__(self) -> str:
        states = f"{len(self.states)} states ({int(self.terminal.sum())} terminal)"
        discount = f"discount {format_number(self.discount)}"
        return f"DecisionProcess({states}, {len(self.actions)} actions, {discount})"


def expected_next(probabilities: Tensor, values: Tensor) -> Tensor:
    """Σ_s' p(s') V(s') [...] of probabilities [...,S] and values [S], where −inf counts only with
    mass on it.
    """
    lost = values == -math.inf
    mean = probabilities @ torch.where(lost, 0, values)  # 0 · −inf would be NaN
    may_lose = probabilities @ lost.double() > 0
    return torch.where(may_lose, -math.inf, mean)


def spread(edges: Tensor, start: Tensor) -> Tensor:
    """Where edges [S,S] (true from row to column) lead from a set of states [S], itself included.
    -> [S]
    """
    reached = start
    while True:
        further = reached | (reached.double() @ edges.double() > 0)
        if bool((further == reached).all()):
            return reached
        reached = further


# --- checks at the boundary -----------------------------------------------------------------------


def _as_tensor(values: Any, name: str, dtype: torch.dtype | None) -> Tensor:
    try:
        # a cast would drop an imaginary part without a word
        real = not torch.is_complex(torch.as_tensor(values))
        tensor = torch.as_tensor(values, dtype=dtype).detach() if real else None
    except (TypeError, ValueError, RuntimeError, OverflowError):
        tensor = None
    if tensor is None:
        raise InputError(
            f"{name} is not a rectangular array of numbers; give a tensor, or lists of equal"
            " lengths."
        )
    return tensor


def _numbers(values: Any, name: str) -> Tensor:
    return _as_tensor(values, name, torch.float64)


def _check_shapes(process: DecisionProcess) -> None:
    if process.log_prior.ndim != 2 or 0 in process.log_prior.shape:
        raise InputError(
            f"log_prior has shape {list(process.log_prior.shape)}; expected [S, A] with a state and"
            " an action at least."
        )
    S, A = process.log_prior.shape
    expected = {
        "transitions": ("[S, A, S]", [S, A, S]),
        "rewards": ("[S, A]", [S, A]),
        "initial": ("[S]", [S]),
        "terminal": ("[S]", [S]),
    }
    for name, (letters, shape) in expected.items():
        given = list(getattr(process, name).shape)
        if given != shape:
            raise InputError(
                f"{name} has shape {given}; with log_prior [S, A] = {[S, A]} expected {letters} ="
                f" {shape}."
            )
    if process.terminal.dtype != torch.bool:
        raise InputError(
            f"terminal is of {process.terminal.dtype}; give true or false for each state."
        )


def _names(given: Sequence[str], name: str, count: int, letter: str) -> tuple[str, ...]:
    if given and len(given) != count:
        raise InputError(f"{name} has {len(given)} names for {count}; give one each, or none.")
    return tuple(given) or tuple(f"{letter}{index}" for index in range(count))


def _check_discount(discount: float, continuing: bool) -> float:
    value = check_number(
        discount,
        "discount",
        "from 0 (only the next reward) to 1 (rewards count in full until the end)",
        lambda number: 0 <= number <= 1,
    )
    if continuing and value == 1:
        raise InputError(
            "continuing=True needs discount < 1: without discount a process without end has no"
            " finite value."
        )
    return value


def _clean_prior(process: DecisionProcess) -> Tensor:
    # kept in logs throughout, where a mass that underflows is still an action
    log_prior = process.log_prior.masked_fill(process.terminal[:, None], -math.inf)
    for state, action in _first(torch.isnan(log_prior) | (log_prior == math.inf)):
        value = float(log_prior[state, action])
        raise InputError(
            f"log_prior of {process.place(state, action)} is {value}; give log q(a|s), -inf for an"
            " action that is not available."
        )
    total = log_prior.exp().sum(-1)
    for (state,) in _first(~process.terminal & (log_prior == -math.inf).all(-1)):
        raise InputError(
            f"{process.place(state)} has no available action; give it one, or mark it in terminal."
        )
    for (state,) in _first(~process.terminal & ((total - 1).abs() > SUM_TOLERANCE)):
        raise InputError(
            f"the prior's actions in {process.place(state)} sum to {float(total[state]):.12g}, not"
            " 1; divide the row by its sum, in float64."
        )
    return logspace.log_normalize_alive(log_prior)


def _clean_rewards(process: DecisionProcess) -> Tensor:
    rewards = torch.where(process.available, process.rewards, 0)
    for state, action in _first(torch.isnan(rewards) | (rewards == math.inf)):
        raise InputError(
            f"the reward of {process.place(state, action)} is {float(rewards[state, action])}; give"
            " a number, or -inf to forbid it."
        )
    return rewards


def _clean_transitions(process: DecisionProcess) -> Tensor:
    # where an action that is never taken would lead is nobody's concern, NaN included
    transitions = process.transitions.masked_fill(~process.available[:, :, None], 0)
    for state, action, after in _first(~((transitions >= 0) & (transitions < math.inf))):
        value = float(transitions[state, action, after])
        raise InputError(
            f"the transition from {process.place(state, action)} to {process.place(after)} is"
            f" {value}; give a probability."
        )
    total = transitions.sum(-1)
    for state, action in _first(process.available & ((total - 1).abs() > SUM_TOLERANCE)):
        value = float(total[state, action])
        raise InputError(
            f"the transitions of {process.place(state, action)} sum to {value:.12g}, not 1; divide"
            " the row by its sum, in float64."
        )
    return transitions / torch.where(process.available, total, 1)[:, :, None]


def _clean_initial(process: DecisionProcess) -> Tensor:
    initial = process.initial
    for (state,) in _first(~((initial >= 0) & (initial < math.inf))):
        raise InputError(
            f"initial of {process.place(state)} is {float(initial[state])}; give a probability."
        )
    if abs(float(initial.sum()) - 1) > SUM_TOLERANCE:
        raise InputError(
            f"initial sums to {float(initial.sum()):.12g}, not 1; divide it by its sum, in float64."
        )
    for (state,) in _first(process.terminal & (initial > 0)):
        raise InputError(
            f"initial gives {float(initial[state]):.3g} to the terminal {process.place(state)};"
            " start where there is something to decide."
        )
    return initial / initial.sum()


def _check_reachable(process: DecisionProcess) -> None:
    reached = spread(process.moves(process.available.double()) > 0, process.initial > 0)
    for (state,) in _first(~reached):
        raise InputError(
            f"{process.place(state)} is unreachable from initial, whatever the prior does; remove"
            " it, or give it mass in initial."
        )


def _check_ends(process: DecisionProcess) -> None:
    if process.continuing:
        return
    # edges turned round: from the ends back to whatever can reach one
    ending = spread((process.moves(process.available.double()) > 0).T, process.terminal)
    for (state,) in _first(~ending):
        remedy = (
            "pass discount < 1 with continuing=True"
            if process.discount == 1
            else "pass continuing=True if that is meant"
        )
        raise InputError(
            f"from {process.place(state)} no terminal state can be reached: the process has no end."
            f" Mark one in terminal, or {remedy}."
        )


def _first(bad: Tensor) -> Iterator[list[int]]:
    """The index of the first true entry, if there is one."""
    if bool(bad.any()):
        yield bad.nonzero()[0].tolist()


def check_max_entries(max_entries: float) -> float:
    """A limit is a number of at least 0; NaN would let everything pass."""
    return check_number(max_entries, "max_entries", "at least 0", lambda number: number >= 0)


# --- sequences as decision processes --------------------------------------------------------------


def token_process(problem: Problem, max_entries: int = MAX_ENTRIES) -> DecisionProcess:
    """A problem as a process: its states are the prefixes that the prior supports, in the order of
    their trie, and one end.

    Args:
        problem: its prior must have a support that can be listed, and a whole-sequence or causal
            reward.
        max_entries: the most entries of P [S,A,S].

    Raises:
        TooLargeError: P would have more; `soft_bellman` needs no such array.
        InputError, InfeasibleError: as `problem_support` does.
    """
    check_max_entries(max_entries)
    support = problem_support(problem)
    trie, columns = support.trie, problem.space.vocab_size
    S = trie.nodes + 1
    if S * S * columns > max_entries:
        raise TooLargeError(
            f"{S:,} prefixes and {columns:,} tokens make {S * S * columns:,} transition entries,"
            f" more than max_entries = {max_entries:,}; soft_bellman solves a token process on its"
            " trie, without them."
        )
    # the end is one state for all texts, numbered after the prefixes
    end, edges = trie.nodes, (trie.parent, trie.token)
    log_prior = support.log_prior.new_full((S, columns), -math.inf).index_put(
        edges, edge_log_prior(support)
    )
    rewards = log_prior.new_zeros(S, columns).index_put(edges, edge_rewards(support))
    transitions = log_prior.new_zeros(S, columns, S)
    # a token appends itself, surely; what has no child was the last
    transitions[(*edges, torch.where(trie.child >= 0, trie.child, end))] = 1
    here = torch.arange(S, device=log_prior.device)
    words = problem.space.vocabulary + ("EOS",) * problem.space.eos
    names = (*_prefix_names(support, words, problem.space.separator), _ENDING_NAME)
    return DecisionProcess(
        log_prior,
        transitions,
        rewards,
        (here == 0).double(),
        here == end,
        states=names,
        actions=words,
    )


def token_policy(problem: Problem, log_policy: Tensor) -> PrefixTable:
    """The policy [S,A] of `token_process(problem)` as a language model, for `compare` and `sample`;
    in nats, −inf rows only where it has no mass.
    """
    support = problem_support(problem)
    expected = [support.trie.nodes + 1, problem.space.vocab_size]
    if list(log_policy.shape) != expected:
        raise InputError(
            f"log_policy has shape {list(log_policy.shape)}; the token process of this problem has"
            f" [S, A] = {expected}."
        )
    # the last row is the end's, where nothing is decided
    return PrefixTable(problem.space, support.tokens, log_policy[:-1])


def _prefix_names(support: Support, words: Sequence[str], separator: str) -> list[str]:
    trie = support.trie
    names = [""] * trie.nodes
    columns = trie.parent.tolist(), trie.token.tolist(), trie.child.tolist()
    for parent, token, child in zip(*columns, strict=True):
        if child >= 0:  # edges stand in order of depth, so the parent has its name
            names[child] = separator.join(part for part in (names[parent], words[token]) if part)
    return ["∅", *names[1:]]
