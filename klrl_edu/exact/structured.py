"""What forward–backward gives: the posterior as a language model, exact samples, moments, and the
most probable sequences.

    p_t(v|c,s) ∝ q(v|c) e^{w(s,v)/λ} E_{c'|c,v} β_{t+1}(c', δ(s,v))                              (1)
    E[φ], Cov[φ] of φ(y) = Σ_t φ(s_t, y_t) + φ_end(s_end), by the laws of total expectation and
    total covariance over (1)   (2)
    KL(π*‖q) = E Σ_t KL(p_t(·|c,s)‖q(·|c)),    H(π*) = E Σ_t H(p_t(·|c,s))                       (3)

The posterior tilts by r(y) alone, so the law of hidden contexts given y is the prior's, and (3) for
KL holds with them summed over too. C contexts, S automaton states, M rows among the C·S pairs
(c,s), K words, V columns, L words at most, D features.
"""

import heapq
import math
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from klrl_edu.closed_forms.tilt import scaled_advantage
from klrl_edu.core import logspace
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InfeasibleError, InputError, TooLargeError
from klrl_edu.core.validation import check_count
from klrl_edu.core.weighted import WeightedSequences
from klrl_edu.exact.forward_backward import MAX_MESSAGES, Lattice, Messages
from klrl_edu.models.contract import LanguageModel, check_room
from klrl_edu.models.ngram import NGramModel
from klrl_edu.problems.automata import reachable_pairs


class LatticeState(NamedTuple):
    """Where each row stands: its context [N], or the log-law of a hidden one given what was read
    [N,C]; its automaton state [N].
    """

    context: Tensor
    state: Tensor
    position: int


class Moments(NamedTuple):
    """Mean [D] and covariance [D,D] of features under π*."""

    mean: Tensor
    covariance: Tensor


class Against(NamedTuple):
    """Exact sums over all sequences of an n-gram policy π against π*, scalars: KLs in nats, E_π[r]
    in reward units (over what is not forbidden), log Σ π*²/π where π covers π*, and the masses of π
    where π* has none and of π* where π has none.
    """

    reverse_kl: Tensor
    forward_kl: Tensor
    kl_to_prior: Tensor
    expected_reward: Tensor
    log_second_moment: Tensor
    uncovered_mass: Tensor
    violating_mass: Tensor


class StructuredPosterior(LanguageModel):
    """π* of a finite-state prior and an automaton's reward, whatever the number of sequences.

    Args:
        lattice: prior times automaton.
        messages: of `backward(lattice)`.

    Raises:
        InfeasibleError: no sequence with prior mass satisfies the reward's constraint.
    """

    def __init__(self, lattice: Lattice, messages: Messages):
        super().__init__()
        self.space, self.lattice, self.messages = lattice.space, lattice, messages
        self._next_place: Tensor | None = None
        mass = messages.log_mass[0, :, lattice.start]
        best = (
            torch.zeros_like(mass) if messages.best is None else messages.best[0, :, lattice.start]
        )
        allowed = (lattice.log_initial > -math.inf) & (mass > -math.inf)
        if not bool(allowed.any()):
            raise InfeasibleError(
                f"no sequence of {self.space!r} with prior mass satisfies {lattice.text!r}: the"
                " posterior is empty. Relax it."
            )
        self.best_return = best[allowed].amax()
        advantage = scaled_advantage(
            torch.where(allowed, best, -math.inf), self.best_return, lattice.kl_coef
        )
        self.log_start = lattice.log_initial + mass + advantage  # [C]
        self.log_mass = logspace.logsumexp(self.log_start)  # log Z less best_return/λ

    def _apply(self, fn: Any, recurse: bool = True) -> "StructuredPosterior":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = {
            f.name: fn(value)
            for f in fields(self.lattice)
            if isinstance(value := getattr(self.lattice, f.name), Tensor)
        }
        self.lattice = replace(self.lattice, **moved)
        self.messages = self.messages._replace(
            **{name: fn(part) for name, part in self.messages._asdict().items() if part is not None}
        )
        self._next_place = None
        self.best_return, self.log_start, self.log_mass = (
            fn(self.best_return),
            fn(self.log_start),
            fn(self.log_mass),
        )
        return self

    @property
    def next_place(self) -> Tensor:
        """Where a word leads among the C·S pairs: [C,S,K]; made when it is first needed, which log
        Z alone does not.
        """
        if self._next_place is None:
            self._next_place = (
                self.lattice.successor[:, None, :] * self.lattice.states + self.lattice.next_state
            )
        return self._next_place

    @property
    def hidden(self) -> bool:
        """Whether contexts are hidden: drawn by the prior, not determined by the words."""
        return self.lattice.log_transition is not None

    # --- as a language model ---

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        logits, state = self.start(len(tokens))
        columns = [logits]
        for t in range(self.space.max_length - 1):
            logits, state = self.step(state, tokens[:, t].long())
            columns.append(logits)
        return torch.stack(columns, 1)

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, LatticeState]:
        lattice = self.lattice
        context = (
            lattice.log_initial.expand(n, -1)
            if self.hidden
            else lattice.log_initial.argmax().expand(n)
        )
        state = LatticeState(context, torch.full((n,), lattice.start, device=context.device), 0)
        return self._logits(state), state

    def step(self, state: LatticeState, token: Tensor) -> tuple[Tensor, LatticeState]:
        check_room(self.space, state.position + 1)
        lattice = self.lattice
        word = token.clamp(
            max=lattice.successor.shape[1] - 1
        )  # after EOS nothing more is read: the contract forces EOS
        if lattice.log_transition is not None:
            joint = state.context + lattice.log_emission.T[token]  # log q(c, y_{≤t}) [N,C]
            moved = torch.logsumexp(joint[:, :, None] + lattice.log_transition, 1)
            total = torch.logsumexp(moved, -1, keepdim=True)
            context = moved - torch.where(total > -math.inf, total, 0.0)
        else:
            context = lattice.successor[state.context, word]
        after = LatticeState(context, lattice.next_state[state.state, word], state.position + 1)
        return self._logits(after), after

    def _logits(self, at: LatticeState) -> Tensor:
        """log p(v|prefix) [N,V] up to a constant a row; uniform where nothing feasible lies ahead,
        and where EOS is forced.
        """
        n, contexts = len(at.state), self.lattice.contexts
        if at.position >= self.lattice.words:
            return self.log_start.new_zeros(n, self.space.vocab_size)
        if not self.hidden:
            return _uniform_where_dead(self.log_weights(at.position, at.context, at.state))
        every = torch.arange(contexts, device=at.state.device)
        reward, log_q = self._edges(
            at.position, every.repeat(n), at.state.repeat_interleave(contexts)
        )
        reward = reward.view(n, contexts, -1)
        log_q = log_q.view(n, contexts, -1) + at.context[:, :, None]
        top = torch.where(log_q > -math.inf, reward, -math.inf).amax((1, 2), keepdim=True)
        top = torch.where(top > -math.inf, top, 0.0)
        return _uniform_where_dead(
            logspace.logsumexp(log_q + scaled_advantage(reward, top, self.lattice.kl_coef), 1)
        )

    # --- the conditionals (1) ---

    def _edges(self, t: int, context: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """For rows (c,s) [M]: the reward (beside the best ahead) and log q(v|c) + log β ahead, both
        [M,V].
        """
        lattice, messages = self.lattice, self.messages
        place = self.next_place[context, state]
        reward = lattice.word_rewards[state]
        log_q = lattice.log_emission[context]
        ahead = messages.log_ahead[t + 1].reshape(-1)[place]
        if messages.best_ahead is not None:
            reward = reward + messages.best_ahead[t + 1].reshape(-1)[place]
        if self.space.eos:
            reward = torch.cat([reward, lattice.final_rewards[state, None]], -1)
            ahead = torch.nn.functional.pad(ahead, (0, 1))
        return reward, torch.where(reward > -math.inf, log_q + ahead, -math.inf)

    def log_weights(self, t: int, context: Tensor, state: Tensor) -> Tensor:
        """The right side of (1) [M,V] for rows (c,s) [M] at position t < L, as logs, up to a
        constant a row; −inf throughout for a dead row.
        """
        reward, log_q = self._edges(t, context, state)
        top = torch.where(log_q > -math.inf, reward, -math.inf).amax(-1, keepdim=True)
        top = torch.where(top > -math.inf, top, 0.0)
        return log_q + scaled_advantage(
            torch.where(log_q > -math.inf, reward, -math.inf), top, self.lattice.kl_coef
        )

    def _table(self, t: int) -> Tensor:
        """(1) for every pair: log-weights [C·S,V], rows in the order of `next_place`."""
        lattice, pairs = self.lattice, self.lattice.contexts * self.lattice.states
        if self.messages.best is None and bool((lattice.successor == lattice.successor[:1]).all()):
            # the next context is the last word, so what lies ahead of a word is the same from every
            # context
            ahead = (
                self.messages.log_ahead[t + 1].reshape(-1)[self.next_place[0]]
                + lattice.word_rewards / lattice.kl_coef
            )
            if self.space.eos:
                ahead = torch.cat([ahead, lattice.final_rewards[:, None] / lattice.kl_coef], -1)
            return (lattice.log_emission[:, None] + ahead).view(pairs, -1)
        place = torch.arange(pairs, device=lattice.successor.device)
        return self.log_weights(t, place // lattice.states, place % lattice.states)

    def _hidden_law(self, t: int) -> Tensor:
        """log-weights of the next hidden context before position t: log q(c'|c) + log β_t(c',s)
        [C·S,C].
        """
        lattice, messages = self.lattice, self.messages
        assert lattice.log_transition is not None
        log_q = lattice.log_transition[:, None] + messages.log_mass[t].T  # [c, s, c']
        if messages.best is not None:
            reward = torch.where(log_q > -math.inf, messages.best[t].T.expand_as(log_q), -math.inf)
            top = reward.amax(-1, keepdim=True)
            log_q = log_q + scaled_advantage(
                reward, torch.where(top > -math.inf, top, 0.0), lattice.kl_coef
            )
        return log_q.reshape(-1, lattice.contexts)

    # --- exact samples ---

    @torch.no_grad()
    def sample(self, n: int, *, draw: Draw, prompt: Tensor | None = None) -> Tensor:
        """n exact, independent sequences [n,T]: one table of conditionals a step, for the pairs
        (c,s) that are in use.
        """
        check_count(n, "n")
        lattice, states = self.lattice, self.lattice.states
        context = draw(
            self.log_start[None], torch.zeros(n, dtype=torch.long, device=self.log_start.device)
        )
        place = context * states + lattice.start
        tokens = torch.full(
            (n, self.space.max_length),
            self.space.vocab_size - 1,
            dtype=torch.long,
            device=place.device,
        )
        live = torch.arange(n, device=place.device)
        for t in range(lattice.words):
            token = self._draw_words(t, place, draw)
            tokens[live, t] = token
            if self.space.eos:
                going = token != self.space.vocab_size - 1
                live, place, token = live[going], place[going], token[going]
                if not len(live):
                    break
            place = self.next_place.view(-1, self.next_place.shape[-1])[place, token]
            if self.hidden and t + 1 < lattice.words:
                distinct, row = torch.unique(place, return_inverse=True)
                place = draw(self._hidden_law(t + 1)[distinct], row) * states + place % states
        return tokens

    def _draw_words(self, t: int, place: Tensor, draw: Draw) -> Tensor:
        """A token for each row that stands at a pair [N], from (1) for all pairs where that is
        less, else for those in use.
        """
        states = self.lattice.states
        if len(place) < self.lattice.contexts * states:
            distinct, row = torch.unique(place, return_inverse=True)
            return draw(self.log_weights(t, distinct // states, distinct % states), row)
        dead = (
            self.messages.log_mass[t].reshape(-1) == -math.inf
        )  # no sample stands there, and a row without mass cannot be drawn from
        table = self._table(t)
        return draw(torch.where(dead[:, None], 0.0, table) if bool(dead.any()) else table, place)

    # --- moments ---

    @torch.no_grad()
    def moments(self, word_features: Tensor, final_features: Tensor) -> Moments:
        """Mean and covariance (2) of additive features under π*, without sampling.

        Args:
            word_features: φ(s,k) [S,K,D], finite; final_features: φ_end(s) [S,D].

        Raises:
            TooLargeError: the C·S·max(K·D, D²) numbers that this needs are too many.
        """
        lattice, size = self.lattice, final_features.shape[-1]
        pairs, words = lattice.contexts * lattice.states, lattice.successor.shape[1]
        needed = pairs * max(pairs, words * size, size * size)
        if needed > MAX_MESSAGES:
            raise TooLargeError(
                f"the covariance of {size} features over {pairs:,} pairs needs {needed:,} numbers;"
                " ask for fewer features at a time."
            )
        every = torch.arange(pairs, device=self.log_start.device)
        place, state = self.next_place.view(pairs, words), every % lattice.states
        mean = final_features[state]  # E[φ to come | c,s], and its covariance
        covariance = mean.new_zeros(pairs, size, size)
        for t in reversed(range(lattice.words)):
            if t + 1 < lattice.words:
                mean, covariance = self._mix_moments(t + 1, mean, covariance)
            p = _normalised(self._table(t))
            values = mean[place] + word_features[state]
            if self.space.eos:
                values = torch.cat([values, final_features[state][:, None]], 1)
            mean = torch.einsum("mv,mvd->md", p, values)
            away = (values - mean[:, None]) * p.sqrt()[..., None]
            moved = p.new_zeros(pairs, pairs).index_put(
                (every[:, None].expand_as(place), place), p[:, :words], accumulate=True
            )
            covariance = (moved @ covariance.view(pairs, -1)).view_as(covariance) + away.mT @ away
        start = every.view(lattice.contexts, -1)[:, lattice.start]
        return _mixture(
            _normalised(self.log_start[None]), mean[start][None], covariance[start][None], 0
        )

    def _mix_moments(self, t: int, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of what follows a hidden context, from those of what follows the next one; as
        they are where contexts are not hidden.
        """
        if not self.hidden:
            return mean, covariance
        lattice = self.lattice
        law = _normalised(self._hidden_law(t))  # [C·S,C]
        state = torch.arange(len(law), device=law.device) % lattice.states
        next_place = (
            torch.arange(lattice.contexts, device=law.device) * lattice.states + state[:, None]
        )
        mixed = _mixture(law, mean[next_place], covariance[next_place], None)
        return mixed.mean, mixed.covariance

    @torch.no_grad()
    def reward_moments(self) -> tuple[Tensor, Tensor]:
        """E[r] and Var[r] under π*, scalars in reward units and their square."""
        word, final = (
            part.masked_fill(part == -math.inf, 0.0)[..., None]
            for part in (self.lattice.word_rewards, self.lattice.final_rewards)
        )
        mean, covariance = self.moments(word, final)
        return mean[0], covariance[0, 0]

    @torch.no_grad()
    def count_moments(self, words: list[str]) -> Moments:
        """Mean [D] and covariance [D,D] of how often each of D words occurs under π*.

        Raises:
            InputError: a word is not in the vocabulary.
        """
        unknown = [word for word in words if word not in self.space.word_ids]
        if unknown:
            raise InputError(f"words = {unknown} are not in the vocabulary of {self.space!r}.")
        ids = torch.tensor(
            [self.space.word_ids[word] for word in words], device=self.log_start.device
        )
        features = self.log_start.new_zeros(
            self.lattice.states, self.lattice.successor.shape[1], len(words)
        )
        features[:, ids, torch.arange(len(words), device=ids.device)] = 1
        return self.moments(features, features[:, 0] * 0)

    @torch.no_grad()
    def kl_to_prior(self) -> Tensor:
        """KL(π*‖q) in nats, a scalar, by (3)."""
        lattice = self.lattice
        if not self.hidden:
            return self._sum_over_time(
                lambda t, log_p: logspace.kl_divergence(log_p, self._prior_rows())
            )
        start = logspace.kl_divergence(logspace.log_normalize(self.log_start), lattice.log_initial)
        emitted = self._sum_over_time(
            lambda t, log_p: logspace.kl_divergence(log_p, self._prior_rows())
        )
        return start + emitted

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """H(π*) in nats, a scalar, by (3).

        Raises:
            InputError: the prior has hidden contexts, whose entropy given the words is no sum over
                steps.
        """
        if self.hidden:
            raise InputError(
                "the entropy of a posterior over a hidden Markov prior has no exact sum; estimate"
                " −E log π* from its exact samples."
            )
        return self._sum_over_time(lambda t, log_p: logspace.entropy(log_p))

    def _prior_rows(self) -> Tensor:
        """log q(v|c) [C·S,V] of every pair."""
        return self.lattice.log_emission.repeat_interleave(self.lattice.states, 0)

    def _sum_over_time(self, each: Any) -> Tensor:
        """E Σ_t each(t, log p_t [C·S,V]) [C·S] along π*, hidden steps included where each is a
        divergence from the prior.
        """
        total = self.log_mass.new_zeros(())
        for t, prob, log_table in self._occupancy():
            total = total + _dot(prob, each(t, log_table))
            if self.hidden and t + 1 < self.lattice.words:
                total = total + _dot(self._after(prob, log_table), self._hidden_divergence(t + 1))
        return total

    def _hidden_divergence(self, t: int) -> Tensor:
        assert self.lattice.log_transition is not None
        law, prior = (
            _log_normalised(self._hidden_law(t)),
            self.lattice.log_transition.repeat_interleave(self.lattice.states, 0),
        )
        return logspace.kl_divergence(
            law, torch.where((law > -math.inf).any(-1, keepdim=True), prior, -math.inf)
        )

    def _occupancy(self) -> Any:
        """For t = 0 … L−1: t, the probability [C·S] that π* stands at each pair before word t, and
        log p_t [C·S,V].
        """
        lattice = self.lattice
        prob = self.log_start.new_zeros(lattice.contexts, lattice.states)
        prob[:, lattice.start] = _normalised(self.log_start[None])[0]
        prob = prob.view(-1)
        for t in range(lattice.words):
            log_table = _log_normalised(self._table(t))
            yield t, prob, log_table
            prob = self._after(prob, log_table)
            if self.hidden and t + 1 < lattice.words:
                law = _normalised(self._hidden_law(t + 1)).view(
                    lattice.contexts, lattice.states, lattice.contexts
                )
                prob = torch.einsum("cs,csd->ds", prob.view(lattice.contexts, -1), law).reshape(-1)

    def _after(self, prob: Tensor, log_table: Tensor) -> Tensor:
        """Where π* stands after a word [C·S], hidden contexts not moved yet."""
        words = self.next_place.shape[-1]
        moved = prob[:, None] * log_table[:, :words].exp()
        return torch.zeros_like(prob).index_add(0, self.next_place.reshape(-1), moved.reshape(-1))

    @torch.no_grad()
    def forbids(self) -> bool:
        """Whether the prior gives mass to a sequence with reward −inf: a walk over the pairs (c,s)
        that the prior reaches.
        """
        lattice, words = self.lattice, self.next_place.shape[-1]
        pairs = lattice.contexts * lattice.states
        emits = (lattice.log_emission > -math.inf).repeat_interleave(lattice.states, 0)
        closed, ends = (
            (lattice.word_rewards == -math.inf).repeat(lattice.contexts, 1),
            (lattice.final_rewards == -math.inf).repeat(lattice.contexts),
        )
        here = torch.zeros(lattice.contexts, lattice.states, dtype=torch.bool, device=emits.device)
        here[:, lattice.start] = lattice.log_initial > -math.inf
        here, found = here.view(-1), False
        for _ in range(lattice.words):
            found = found or bool((here[:, None] & emits[:, :words] & closed).any())
            found = found or (self.space.eos and bool((here & emits[:, -1] & ends).any()))
            reached = self.next_place.view(pairs, words)[here[:, None] & emits[:, :words]]
            here = torch.zeros_like(here).index_fill(0, reached, True)
            if lattice.log_transition is not None:
                moves = (lattice.log_transition > -math.inf).double()
                here = (moves.T @ here.view(lattice.contexts, -1).double() > 0).view(-1)
        return found or bool((here & ends).any())

    @torch.no_grad()
    def length_law(self) -> Tensor:
        """P(the text has ℓ words) under π* for ℓ = 0 … L: [L+1]; all at L where the length is
        fixed.
        """
        law = self.log_start.new_zeros(self.lattice.words + 1)
        left = torch.ones_like(law[0])
        if self.space.eos:
            for t, prob, log_table in self._occupancy():
                law[t] = prob @ log_table[:, -1].exp()
                left = self._after(prob, log_table).sum()
        law[-1] = left
        return law

    # --- an n-gram policy against it ---

    @torch.no_grad()
    def against(self, policy: NGramModel) -> Against:
        """KL(π‖π*), KL(π*‖π), KL(π‖q), E_π[r] and the rest, exactly, by two sweeps over the reached
        triples (π's context, c, s).

        Raises:
            InputError: hidden contexts, which no finite set of triples sums out.
        """
        if self.hidden:
            raise InputError(
                "a posterior over a hidden Markov prior is compared by samples: compare(policy,"
                " target, n=, draw=)."
            )
        lattice, words = self.lattice, self.next_place.shape[-1]
        start = int(self.log_start.argmax()) * lattice.states + lattice.start
        after, mine, place = reachable_pairs(
            policy.successor, 0, self.next_place.view(-1, words), start
        )
        log_pi, log_q = policy.emission_log_probs()[mine], self._prior_rows()[place]
        state = place % lattice.states
        rewards = [lattice.word_rewards[state]] + (
            [lattice.final_rewards[state, None]] if self.space.eos else []
        )
        steps = [_log_normalised(self._table(t)[place]) for t in range(lattice.words)]
        pi, star = ([log_pi] * lattice.words, steps)
        reverse = self._along(pi, after, [logspace.kl_divergence(log_pi, log_p) for log_p in steps])
        forward = self._along(
            star, after, [logspace.kl_divergence(log_p, log_pi) for log_p in steps]
        )
        prior = self._along(pi, after, [logspace.kl_divergence(log_pi, log_q)] * lattice.words)
        reward = self._along(
            pi,
            after,
            [logspace.expectation(log_pi, torch.cat(rewards, -1))] * lattice.words,
            lattice.final_rewards[state],
        )
        covered = [torch.where(log_p > -math.inf, log_pi, -math.inf) for log_p in steps]
        shared = [torch.where(log_pi > -math.inf, log_p, -math.inf) for log_p in steps]
        leaving = [torch.where(log_p > -math.inf, 0.0, log_pi.exp()).sum(-1) for log_p in steps]
        missing = [torch.where(log_pi > -math.inf, 0.0, log_p.exp()).sum(-1) for log_p in steps]
        forbidden = lattice.final_rewards[state] == -math.inf
        squares = [torch.where(log_p > -math.inf, 2 * log_p - log_pi, -math.inf) for log_p in steps]
        return Against(
            *(reverse, forward, prior, reward),
            self._log_total(squares, after, torch.where(forbidden, -math.inf, 0.0)),
            self._along(shared, after, missing),
            self._along(covered, after, leaving, forbidden.double()),
        )

    def _along(
        self,
        log_steps: list[Tensor],
        after: Tensor,
        gains: list[Tensor],
        ends: Tensor | None = None,
    ) -> Tensor:
        """E Σ_t gain_t(place), and the end's, along the chain of conditionals [P,V]; `ends` stands
        for a last token that is forced.
        """
        prob = torch.zeros_like(gains[0]) if gains else self.log_start.new_zeros(len(after))
        prob[0] = 1
        total = self.log_start.new_zeros(())
        for log_p, gain in zip(log_steps, gains, strict=True):
            total = total + _dot(prob, gain)
            moved = prob[:, None] * log_p[:, : after.shape[1]].exp()
            prob = torch.zeros_like(prob).index_add(0, after.reshape(-1), moved.reshape(-1))
        return total if ends is None else total + _dot(prob, ends)

    def _log_total(self, log_steps: list[Tensor], after: Tensor, ends: Tensor) -> Tensor:
        """log Σ over sequences of the product of their weights, backwards: an end by EOS, or by
        `ends` [P] once L words are read.
        """
        ahead = ends
        for log_w in reversed(log_steps):
            words = log_w[:, : after.shape[1]]
            words = torch.where(
                words > -math.inf, words + ahead[after], -math.inf
            )  # where π misses π* the sum beyond may be inf
            ahead = logspace.logsumexp(
                torch.cat([words, log_w[:, -1:]], -1) if self.space.eos else words
            )
        return ahead[0]

    # --- the most probable sequences ---

    @torch.no_grad()
    def top_sequences(self, k: int) -> WeightedSequences:
        """The k most probable sequences with log π*(y), best first (fewer where the support is
        smaller): A* with the exact cost to go.

        Raises:
            InputError: k < 1, or hidden contexts, under which a sequence is a sum over paths.
        """
        check_count(k, "k")
        if self.hidden:
            raise InputError(
                "the most probable sequences under a hidden Markov prior are no shortest paths;"
                " draw samples instead."
            )
        lattice, end = self.lattice, self.space.vocab_size - 1
        tables = [_log_normalised(self._table(t)) for t in range(lattice.words)]
        to_go = self._best_to_go(tables)
        place = int(self.log_start.argmax()) * lattice.states + lattice.start
        heap: list[tuple[float, int, tuple[int, ...], int, float]] = []
        heap.append(
            (-float(to_go[0][place]), 0, (), place, 0.0)
        )  # −(log π* so far + the best to come), −length, words, place, log π* so far
        found: list[tuple[tuple[int, ...], float]] = []
        while heap and len(found) < k:
            _, depth, words, place, so_far = heapq.heappop(heap)
            if place < 0 or -depth == lattice.words:
                found.append((words, so_far))
                continue
            t = -depth
            for token, log_p in enumerate(tables[t][place].tolist()):
                if log_p == -math.inf:
                    continue
                stop = self.space.eos and token == end
                after = (
                    -1
                    if stop
                    else int(self.next_place.view(-1, self.next_place.shape[-1])[place, token])
                )
                total = so_far + log_p
                ahead = 0.0 if stop else float(to_go[t + 1][after])
                heapq.heappush(heap, (-(total + ahead), depth - 1, (*words, token), after, total))
        filler = end if self.space.eos else 0
        rows = [list(words) + [filler] * (self.space.max_length - len(words)) for words, _ in found]
        return WeightedSequences(
            self.space,
            torch.tensor(rows),
            torch.tensor([log_p for _, log_p in found], dtype=torch.float64),
            exact=True,
        )

    def _best_to_go(self, tables: list[Tensor]) -> list[Tensor]:
        """max over what may follow of its log-probability [C·S], for t = 0 … L."""
        words, best = (
            self.next_place.shape[-1],
            [self.log_start.new_zeros(self.lattice.contexts * self.lattice.states)],
        )
        place = self.next_place.view(-1, words)
        for table in reversed(tables):
            ahead = table[:, :words] + best[-1][place]
            best.append(
                torch.maximum(ahead.amax(-1), table[:, -1]) if self.space.eos else ahead.amax(-1)
            )
        return best[::-1]


def _dot(prob: Tensor, values: Tensor) -> Tensor:
    """Σ prob·values [M] -> scalar, where what has no probability does not count."""
    return (prob * torch.where(prob > 0, values, 0.0)).sum()


def _uniform_where_dead(log_weights: Tensor) -> Tensor:
    return torch.where((log_weights == -math.inf).all(-1, keepdim=True), 0.0, log_weights)


def _normalised(log_weights: Tensor) -> Tensor:
    """Probabilities [M,V]; 0 throughout where a row has no mass."""
    return _log_normalised(log_weights).exp()


def _log_normalised(log_weights: Tensor) -> Tensor:
    total = logspace.logsumexp(log_weights)[..., None]
    return log_weights - torch.where(total > -math.inf, total, 0.0)


def _mixture(weights: Tensor, mean: Tensor, covariance: Tensor, pick: int | None) -> Moments:
    """Mean and covariance of mixtures: weights [M,J], means [M,J,D], covariances [M,J,D,D]."""
    together = torch.einsum("mj,mjd->md", weights, mean)
    away = (mean - together[:, None]) * weights.sqrt()[..., None]
    within = torch.einsum("mj,mjde->mde", weights, covariance)
    moments = Moments(together, within + away.mT @ away)
    return moments if pick is None else Moments(moments.mean[pick], moments.covariance[pick])
