"""A prior with C contexts times an automaton with S states.

On this lattice a posterior is summed without listing sequences:

    q(y) e^{r(y)/λ} = q(c_0) Π_t q(y_t|c_t) e^{w(s_t,y_t)/λ} · e^{f(s_end)/λ}, summed over contexts
    that are hidden                                                                              (1)

Mohri (2009) for the product with an automaton. The reward is r(y) = Σ_t w(s_t, y_t) + f(s_end). K
words, V = K + 1 columns with EOS, L = T − 1 words at most there (EOS is forced at T), V = K and
L = T without. Logs in nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import check_same_space
from klrl_edu.models.finite_state import FiniteStateModel
from klrl_edu.problems.automata import AutomatonReward, as_automaton_reward, check_same_vocabulary
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import reward_name

MAX_MESSAGES = 200_000_000  # entries of all messages, or of one step's products C·K·S


@dataclass(frozen=True)
class Lattice:
    """A finite-state prior times an automaton: what the recursion (1) runs on.

    Attributes:
        space: of the sequences; `words` is L, the most words of a text.
        log_initial: log q(c) [C].
        log_emission: log q(v|c) [C,V].
        successor: [C,K], the context after each word; where `log_transition` is given, the context
            itself, which is drawn from afterwards.
        log_transition: log q(c'|c) [C,C], or None where the word determines the next context.
        next_state: δ [S,K]; `start` is s₀.
        word_rewards, final_rewards: w [S,K] and f [S] in reward units; −inf forbids.
        kl_coef: λ.
        text: the reward's, for errors.
    """

    space: SequenceSpace
    log_initial: Tensor
    log_emission: Tensor
    successor: Tensor
    log_transition: Tensor | None
    next_state: Tensor
    start: int
    word_rewards: Tensor
    final_rewards: Tensor
    kl_coef: float
    text: str

    @property
    def words(self) -> int:
        """L, the most words of a text: EOS, where there is one, is forced at T."""
        return self.space.max_length - self.space.eos

    @property
    def contexts(self) -> int:
        """C, how many contexts the prior has."""
        return len(self.log_initial)

    @property
    def states(self) -> int:
        """S, how many states the automaton has."""
        return len(self.final_rewards)

    @property
    def pairs(self) -> int:
        """C·S, how many pairs (c,s) there are; (c,s) is number c·S + s."""
        return self.contexts * self.states

    @property
    def hidden(self) -> bool:
        """Whether contexts are hidden: drawn by the prior, not determined by the words."""
        return self.log_transition is not None

    @cached_property
    def next_pair(self) -> Tensor:
        """The pair that each word leads to [C·S,K], before a hidden context moves."""
        # made when it is first needed, as log Z alone does without
        pair = self.successor[:, None, :] * self.states + self.next_state  # [C,S,K]
        return pair.view(self.pairs, -1)

    def pair_emission(self) -> Tensor:
        """log q(v|c) of every pair: [C·S,V]."""
        return self.log_emission.repeat_interleave(self.states, 0)

    def moved(self, fn: Callable[[Tensor], Tensor]) -> "Lattice":
        """The same lattice, its tensors changed by `fn`: to another device or dtype."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, part in parts.items():
            if isinstance(part, Tensor):
                parts[name] = fn(part)
        return replace(self, **parts)

    @torch.no_grad()
    def forbids(self) -> bool:
        """Whether the prior gives mass to a sequence with reward −inf."""
        # a walk over the pairs that the prior reaches, whatever the reward forbids on the way
        words = self.next_pair.shape[-1]
        emits = self.pair_emission() > -math.inf
        closed = (self.word_rewards == -math.inf).repeat(self.contexts, 1)
        ends = (self.final_rewards == -math.inf).repeat(self.contexts)
        here = torch.zeros(self.contexts, self.states, dtype=torch.bool, device=emits.device)
        here[:, self.start] = self.log_initial > -math.inf
        here, found = here.view(-1), False
        for _ in range(self.words):
            found = found or bool((here[:, None] & emits[:, :words] & closed).any())
            found = found or (self.space.eos and bool((here & emits[:, -1] & ends).any()))
            reached = self.next_pair[here[:, None] & emits[:, :words]]
            here = torch.zeros_like(here).index_fill(0, reached, True)
            if self.log_transition is not None:
                moves = (self.log_transition > -math.inf).double()
                here = (moves.T @ here.view(self.contexts, -1).double() > 0).view(-1)
        return found or bool((here & ends).any())


def build_lattice(problem: Problem) -> Lattice:
    """The lattice of a problem.

    Raises:
        InputError: the prior or the reward is of another kind, or the prior's laws do not sum to
            one.
        TooLargeError: more than MAX_MESSAGES numbers.
    """
    prior, reward = problem.prior, as_automaton_reward(problem.reward, problem.space)
    if not isinstance(prior, FiniteStateModel):
        raise InputError(
            f"the prior is a {type(prior).__name__}; forward-backward needs an n-gram or hidden"
            " Markov model (a FiniteStateModel)."
        )
    if reward is None:
        name = reward_name(problem.reward)
        raise InputError(
            f"no automaton is known for the reward {name!r}; build one (problems/automata.py), or"
            " use method='enumeration'."
        )
    check_same_vocabulary(prior.space, reward.space)
    # how long texts may be is the prior's matter: the spaces may differ in T alone
    if prior.space.eos != reward.space.eos:
        check_same_space(prior.space, reward.space, "prior and reward")
    return _lattice(prior, reward, problem.kl_coef)


@torch.no_grad()
def _lattice(prior: FiniteStateModel, reward: AutomatonReward, kl_coef: float) -> Lattice:
    """The parts of a lattice, checked: normalised laws of one kind, and not too many numbers."""
    initial, emission = prior.initial_log_probs().double(), prior.emission_log_probs().double()
    transition = prior.transition_log_probs()
    successor = prior.successors()
    _check_normalised("initial_log_probs", initial[None])
    _check_normalised("emission_log_probs", emission)
    if transition is not None:
        transition = transition.double()
        _check_normalised("transition_log_probs", transition)
    if (successor is None) == (transition is None):
        raise InputError(
            f"{type(prior).__name__} must give either successors or transition_log_probs."
        )
    words, device = len(prior.space.vocabulary), initial.device
    if successor is None:
        # a word leaves a hidden context where it is: it moves afterwards, by the transition
        successor = torch.arange(len(initial), device=device)[:, None].expand(-1, words)
    contexts, states = len(initial), len(reward.final_rewards)
    longer = max(prior.space.max_length, words)
    count = contexts * states * longer
    if count > MAX_MESSAGES:
        raise TooLargeError(
            f"{contexts:,} contexts × {states:,} automaton states × {longer:,} make {count:,}"
            f" numbers, more than {MAX_MESSAGES:,}; lower the order of the prior, or simplify the"
            " automaton."
        )
    return Lattice(
        space=prior.space,
        log_initial=initial,
        log_emission=emission,
        successor=successor,
        log_transition=transition,
        next_state=reward.transitions.to(device),
        start=reward.start,
        word_rewards=reward.word_rewards.to(device),
        final_rewards=reward.final_rewards.to(device),
        kl_coef=kl_coef,
        text=reward.text,
    )


def _check_normalised(name: str, log_probs: Tensor) -> None:
    total = torch.logsumexp(log_probs, -1).exp()
    bad = ~((total - 1).abs() <= 1e-9)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InputError(
            f"the prior's {name} sum to {float(total[row]):.12g} in row {row}, not 1, so it has no"
            " posterior; normalise the row."
        )
