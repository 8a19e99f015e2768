"""The posterior of a lattice as a Markov chain over its pairs of context and automaton state.

    p_t(v|c,s) ∝ q(v|c) e^{w(s,v)/λ} E_{c'|c,v} β_{t+1}(c', δ(s,v))                              (1)
    p_t(c'|c,s) ∝ q(c'|c) β_t(c',s)    where contexts are hidden                                 (2)

The posterior tilts by r(y) alone, so the law of hidden contexts given y is the prior's. Letters as
in `lattice.py`; M rows among the C·S pairs. Logs in nats.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from klrl_edu.closed_forms.tilt import scaled_advantage
from klrl_edu.core import logspace
from klrl_edu.core.errors import InfeasibleError
from klrl_edu.exact.forward_backward import Messages
from klrl_edu.exact.lattice import Lattice


@dataclass(frozen=True, eq=False)
class PosteriorChain:
    """Where π* starts and how it goes on. Made by `posterior_chain`.

    Attributes:
        lattice: prior times automaton.
        messages: β on it.
        best_return: the highest return in reach of the start, in reward units.
        log_start: log π*(c) [C] of the first context, up to a constant.
        log_mass: log Z less best_return/λ, the logsumexp of `log_start`.
    """

    lattice: Lattice
    messages: Messages
    best_return: Tensor
    log_start: Tensor
    log_mass: Tensor

    def moved(self, fn: Callable[[Tensor], Tensor]) -> "PosteriorChain":
        """The same chain, its tensors changed by `fn`: to another device or dtype."""
        parts: dict[str, Tensor | None] = self.messages._asdict()
        given = {name: fn(part) for name, part in parts.items() if part is not None}
        messages = self.messages._replace(**given)
        numbers = (fn(part) for part in (self.best_return, self.log_start, self.log_mass))
        return PosteriorChain(self.lattice.moved(fn), messages, *numbers)

    def start_pair(self) -> int:
        """The pair where every sequence starts, if contexts are not hidden."""
        return int(self.log_start.argmax()) * self.lattice.states + self.lattice.start

    # --- the conditionals ---

    def edges(self, t: int, context: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What each column of rows (c,s) [M] leads to at position t < L, both [M,V].

        Returns:
            the reward of the column, with the best return ahead where messages are logarithms, in
            reward units; and log q(v|c) + log β ahead in nats, −inf where the reward is.
        """
        lattice, messages = self.lattice, self.messages
        after = lattice.next_pair[context * lattice.states + state]
        reward = lattice.word_rewards[state]
        log_q = lattice.log_emission[context]
        ahead = messages.log_ahead[t + 1].reshape(-1)[after]
        if messages.best_ahead is not None:
            reward = reward + messages.best_ahead[t + 1].reshape(-1)[after]
        if lattice.space.eos:
            reward = torch.cat([reward, lattice.final_rewards[state, None]], -1)
            ahead = torch.nn.functional.pad(ahead, (0, 1))  # nothing follows EOS: log 1
        return reward, torch.where(reward > -math.inf, log_q + ahead, -math.inf)

    def log_weights(self, t: int, context: Tensor, state: Tensor) -> Tensor:
        """The logs of (1)'s right side [M,V] for rows (c,s) [M] at t < L, up to a constant a row.

        A dead row is −inf throughout.
        """
        reward, log_q = self.edges(t, context, state)
        return _lifted(log_q, reward, self.lattice.kl_coef)

    def word_log_weights(self, t: int) -> Tensor:
        """(1) for every pair: log-weights [C·S,V]."""
        lattice = self.lattice
        one_future = bool((lattice.successor == lattice.successor[:1]).all())
        if self.messages.best is None and one_future:
            return self._bigram_log_weights(t)
        pair = torch.arange(lattice.pairs, device=lattice.successor.device)
        return self.log_weights(t, pair // lattice.states, pair % lattice.states)

    def _bigram_log_weights(self, t: int) -> Tensor:
        """The fast path of `word_log_weights` where the next context is the last word.

        What lies ahead of a word is then the same from every context: [S,V], once for all.
        """
        lattice = self.lattice
        beta = self.messages.log_ahead[t + 1].reshape(-1)[lattice.next_pair[: lattice.states]]
        ahead = beta + lattice.word_rewards / lattice.kl_coef
        if lattice.space.eos:
            ahead = torch.cat([ahead, lattice.final_rewards[:, None] / lattice.kl_coef], -1)
        return (lattice.log_emission[:, None] + ahead).view(lattice.pairs, -1)

    def hidden_log_weights(self, t: int) -> Tensor:
        """(2) before position t for every pair: log-weights [C·S,C]."""
        lattice, messages = self.lattice, self.messages
        assert lattice.log_transition is not None
        log_q = lattice.log_transition[:, None] + messages.log_mass[t].T  # [c, s, c']
        if messages.best is not None:
            log_q = _lifted(log_q, messages.best[t].T.expand_as(log_q), lattice.kl_coef)
        return log_q.reshape(-1, lattice.contexts)

    def hidden_word_log_weights(self, t: int, log_filtered: Tensor, state: Tensor) -> Tensor:
        """(1) where a row's context is known by its law alone: log-weights [N,V].

        Args:
            log_filtered: the log-laws [N,C] of the contexts, given what was read.
            state: [N], of the automaton.
        """
        n, contexts = log_filtered.shape
        every = torch.arange(contexts, device=state.device)
        reward, log_q = self.edges(t, every.repeat(n), state.repeat_interleave(contexts))
        reward = reward.view(n, contexts, -1)
        log_q = log_q.view(n, contexts, -1) + log_filtered[:, :, None]
        # one best reward for a whole row: its contexts are summed
        lifted = _lifted(log_q, reward, self.lattice.kl_coef, (1, 2))
        return logspace.logsumexp(lifted, 1)

    # --- where it stands ---

    def occupancy(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where π* stands before each word.

        Yields:
            for t = 0 … L−1: t, the probability [C·S] of each pair, and log p_t [C·S,V].
        """
        lattice = self.lattice
        prob = self.log_start.new_zeros(lattice.contexts, lattice.states)
        prob[:, lattice.start] = logspace.log_normalize_alive(self.log_start).exp()
        prob = prob.view(-1)
        for t in range(lattice.words):
            log_table = logspace.log_normalize_alive(self.word_log_weights(t))
            yield t, prob, log_table
            prob = self.after_word(prob, log_table)
            if lattice.hidden and t + 1 < lattice.words:
                law = logspace.log_normalize_alive(self.hidden_log_weights(t + 1)).exp()
                law = law.view(lattice.contexts, lattice.states, lattice.contexts)
                prob = torch.einsum("cs,csd->ds", prob.view(lattice.contexts, -1), law).reshape(-1)

    def after_word(self, prob: Tensor, log_table: Tensor) -> Tensor:
        """Where π* stands after a word [C·S], before a hidden context moves.

        Args:
            prob: where it stood [C·S].
            log_table: log p_t [C·S,V].
        """
        after = self.lattice.next_pair
        moved = prob[:, None] * log_table[:, : after.shape[-1]].exp()
        return torch.zeros_like(prob).index_add(0, after.reshape(-1), moved.reshape(-1))


def posterior_chain(lattice: Lattice, messages: Messages) -> PosteriorChain:
    """The chain of a lattice and its messages, which are those of `backward(lattice)`.

    Raises:
        InfeasibleError: no sequence with prior mass satisfies the reward's constraint.
    """
    mass = messages.log_mass[0, :, lattice.start]
    best = torch.zeros_like(mass)  # of messages that are numbers, which hold the rewards
    if messages.best is not None:
        best = messages.best[0, :, lattice.start]
    allowed = (lattice.log_initial > -math.inf) & (mass > -math.inf)
    if not bool(allowed.any()):
        raise InfeasibleError(
            f"no sequence of {lattice.space!r} with prior mass satisfies {lattice.text!r}: the"
            " posterior is empty. Relax it."
        )
    best_return = best[allowed].amax()
    reachable = torch.where(allowed, best, -math.inf)
    advantage = scaled_advantage(reachable, best_return, lattice.kl_coef)
    log_start = lattice.log_initial + mass + advantage  # [C]
    return PosteriorChain(lattice, messages, best_return, log_start, logspace.logsumexp(log_start))


def _lifted(
    log_q: Tensor, reward: Tensor, kl_coef: float, dim: int | tuple[int, ...] = -1
) -> Tensor:
    """log q + (r − m)/λ, m the best reward along `dim` that has mass; −inf where q has none."""
    reward = torch.where(log_q > -math.inf, reward, -math.inf)
    best = reward.amax(dim, keepdim=True)
    best = torch.where(best > -math.inf, best, 0.0)  # a row without mass: any m will do
    return log_q + scaled_advantage(reward, best, kl_coef)
