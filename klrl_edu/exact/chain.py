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

from klrl_edu.closed_forms.soft_maximum import SoftMaximum, soft_gains, soft_maximum
from klrl_edu.core import logspace, ties
from klrl_edu.core.errors import InfeasibleError
from klrl_edu.core.groups import Rows
from klrl_edu.exact.forward_backward import Messages
from klrl_edu.exact.lattice import Lattice


@dataclass(frozen=True, eq=False)
class PosteriorChain:
    """Where π* starts and how it goes on. Made by `posterior_chain`.

    Attributes:
        lattice: prior times automaton.
        messages: β on it.
        anchor: a return in reach of the start, in reward units, and at λ = 0 the best; 0 where the
            messages are numbers, which hold the rewards themselves.
        start_log_ratio: log π*(c)/q(c) [C] of the first context in nats.
        log_mass: log Z less anchor/λ.
    """

    lattice: Lattice
    messages: Messages
    anchor: Tensor
    start_log_ratio: Tensor
    log_mass: Tensor

    def moved(self, fn: Callable[[Tensor], Tensor]) -> "PosteriorChain":
        """The same chain, its tensors changed by `fn`: to another device or dtype."""
        parts: dict[str, Tensor | None] = self.messages._asdict()
        given = {name: fn(part) for name, part in parts.items() if part is not None}
        messages = self.messages._replace(**given)
        numbers = (fn(part) for part in (self.anchor, self.start_log_ratio, self.log_mass))
        return PosteriorChain(self.lattice.moved(fn), messages, *numbers)

    @property
    def log_start(self) -> Tensor:
        """log π*(c) [C] of the first context in nats."""
        return self.lattice.log_initial + self.start_log_ratio

    def start_pair(self) -> int:
        """The pair where every sequence starts, if contexts are not hidden."""
        return int(self.log_start.argmax()) * self.lattice.states + self.lattice.start

    # --- the conditionals ---

    def edges(self, t: int, context: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each column of rows (c,s) [M] leads to at position t < L, all [M,V].

        Returns:
            the reward of the column, with the anchor ahead where messages are logarithms, in reward
            units; ℓ, the log-message ahead, in nats; and the slack of the reward at λ = 0.
        """
        lattice, messages = self.lattice, self.messages
        after = lattice.next_pair[context * lattice.states + state]
        reward = lattice.word_rewards[state]
        ahead = messages.log_ahead[t + 1].reshape(-1)[after]
        slack = torch.zeros_like(ahead)
        if messages.anchor_ahead is not None and messages.slack_ahead is not None:
            anchor = messages.anchor_ahead[t + 1].reshape(-1)[after]
            slack = messages.slack_ahead[t + 1].reshape(-1)[after]
            if lattice.kl_coef == 0:
                slack = slack + ties.addition_slack(reward, anchor)
            reward = reward + anchor
        if lattice.space.eos:  # nothing follows EOS: log 1
            reward = torch.cat([reward, lattice.final_rewards[state, None]], -1)
            ahead, slack = (torch.nn.functional.pad(part, (0, 1)) for part in (ahead, slack))
        return reward, ahead, slack

    def log_weights(self, t: int, context: Tensor, state: Tensor) -> Tensor:
        """The logs of (1)'s right side [M,V] for rows (c,s) [M] at t < L, up to a constant a row.

        A dead row is −inf throughout.
        """
        return self.lattice.log_emission[context] + self._gains(t, context, state)

    def _gains(self, t: int, context: Tensor, state: Tensor) -> Tensor:
        """log p_t/q [M,V] for rows (c,s) [M], up to a constant a row."""
        log_q = self.lattice.log_emission[context]
        return self._gains_of(log_q, *self.edges(t, context, state))

    def _gains_of(self, log_q: Tensor, reward: Tensor, ahead: Tensor, slack: Tensor) -> Tensor:
        """log π*/q of columns [M,V] up to a constant a row: r/λ + ℓ, less an anchor."""
        kl_coef = self.lattice.kl_coef
        if self.messages.anchor is None:  # r/λ is moderate, and λ no limit
            return reward / kl_coef + ahead
        return soft_gains(Rows(), log_q, reward, ahead, kl_coef, slack).log_gain

    def word_log_weights(self, t: int) -> Tensor:
        """(1) for every pair: log-weights [C·S,V]."""
        gains = self._word_gains(t)
        shape = (self.lattice.contexts, self.lattice.states, -1)
        return (self.lattice.log_emission[:, None] + gains.view(shape)).view(len(gains), -1)

    def word_log_ratio(self, t: int) -> Tensor:
        """log p_t/q of every pair [C·S,V] in nats; NaN where nothing is in reach."""
        gains = self._word_gains(t)
        return gains - Rows().log_mean_exp(self.lattice.pair_emission(), gains)[:, None]

    def _word_gains(self, t: int) -> Tensor:
        """`_gains` of every pair."""
        lattice = self.lattice
        one_future = bool((lattice.successor == lattice.successor[:1]).all())
        if self.messages.anchor is None and one_future:
            return self._bigram_gains(t)
        pair = torch.arange(lattice.pairs, device=lattice.successor.device)
        return self._gains(t, pair // lattice.states, pair % lattice.states)

    def _bigram_gains(self, t: int) -> Tensor:
        """The fast path of `_word_gains` where the next context is the last word.

        What lies ahead of a word is then the same from every context: [S,V], once for all.
        """
        # the rows of context 0 stand for those of every other
        first = torch.arange(self.lattice.states, device=self.lattice.successor.device)
        gains = self._gains(t, torch.zeros_like(first), first)
        return gains.expand(self.lattice.contexts, -1, -1).reshape(self.lattice.pairs, -1)

    def hidden_log_weights(self, t: int) -> Tensor:
        """(2) before position t for every pair: log-weights [C·S,C]."""
        assert self.lattice.log_transition is not None
        log_q = self.lattice.log_transition.repeat_interleave(self.lattice.states, 0)
        return log_q + self._hidden_gains(t, log_q)

    def hidden_log_ratio(self, t: int) -> Tensor:
        """log of (2) over the prior's law, for every pair [C·S,C] in nats; NaN where dead."""
        assert self.lattice.log_transition is not None
        log_q = self.lattice.log_transition.repeat_interleave(self.lattice.states, 0)
        gains = self._hidden_gains(t, log_q)
        return gains - Rows().log_mean_exp(log_q, gains)[:, None]

    def _hidden_gains(self, t: int, log_q: Tensor) -> Tensor:
        """log of (2) over the prior's law [C·S,C], up to a constant a row."""
        messages, contexts = self.messages, self.lattice.contexts
        ahead, anchor, slack = (
            torch.zeros_like(log_q) if part is None else part[t].T.repeat(contexts, 1)
            for part in (messages.log_mass, messages.anchor, messages.slack)
        )
        return self._gains_of(log_q, anchor, ahead, slack)

    def hidden_word_log_weights(self, t: int, log_filtered: Tensor, state: Tensor) -> Tensor:
        """(1) where a row's context is known by its law alone: log-weights [N,V].

        Args:
            log_filtered: the log-laws [N,C] of the contexts, given what was read.
            state: [N], of the automaton.
        """
        n, contexts = log_filtered.shape
        every = torch.arange(contexts, device=state.device)
        log_q = self.lattice.log_emission + log_filtered[:, :, None]
        edges = self.edges(t, every.repeat(n), state.repeat_interleave(contexts))
        # one anchor for a whole row: its contexts are summed
        gains = self._gains_of(log_q.view(n, -1), *(part.view(n, -1) for part in edges))
        return logspace.logsumexp(log_q + gains.view_as(log_q), 1)

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
    # the first context is one more step: drawn by the prior, and weighed by what lies ahead
    if messages.anchor is None or messages.slack is None:
        # messages that are numbers hold the rewards, so there is no maximum to take out
        log_mass, none = Rows().log_mean_exp(lattice.log_initial, mass), mass.new_zeros(())
        start = SoftMaximum(none, log_mass, none, mass)
    else:
        anchor, slack = (part[0, :, lattice.start] for part in (messages.anchor, messages.slack))
        start = soft_maximum(Rows(), lattice.log_initial, anchor, mass, lattice.kl_coef, slack)
    if not bool(start.log_mass > -math.inf):
        raise InfeasibleError(
            f"no sequence of {lattice.space!r} with prior mass satisfies {lattice.text!r}: the"
            " posterior is empty. Relax it."
        )
    return PosteriorChain(
        lattice, messages, start.anchor, start.log_gain - start.log_mass, start.log_mass
    )
