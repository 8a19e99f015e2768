"""The posterior of a lattice as a language model, with exact samples.

    π*(v|y_<t) ∝ Σ_c π*(c|y_<t) p_t(v|c,s)                                                       (1)

p_t are the conditionals of `chain.py`; where contexts are not hidden, c is known and (1) is p_t
itself. Its moments, its best sequences and its comparison with an n-gram policy are opened here,
and stand in files of their own. C contexts, S automaton states, K words, V columns, L words at
most, D features.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.arguments import check_draw
from klrl_edu.core.draws import Draw
from klrl_edu.core.validation import check_count
from klrl_edu.core.weighted import WeightedSequences
from klrl_edu.exact import chain_moments
from klrl_edu.exact.best_sequences import best_sequences
from klrl_edu.exact.chain import posterior_chain
from klrl_edu.exact.chain_moments import FeatureMoments
from klrl_edu.exact.context_sums import sums_by_context
from klrl_edu.exact.enumeration import not_enumerated
from klrl_edu.exact.forward_backward import Messages
from klrl_edu.exact.lattice import Lattice
from klrl_edu.exact.support_sums import ExactSums
from klrl_edu.models.contract import LanguageModel, check_room
from klrl_edu.models.ngram import NGramModel


class LatticeState(NamedTuple):
    """Where each row stands.

    Attributes:
        context: [N], or the log-law [N,C] of a hidden one given what was read.
        state: [N], of the automaton.
        position: of the last logits.
    """

    context: Tensor
    state: Tensor
    position: int


class StructuredPosterior(LanguageModel):
    """π* of a finite-state prior and an automaton's reward, whatever the number of sequences.

    Args:
        lattice: prior times automaton.
        messages: of `backward(lattice)`.

    Attributes:
        chain: π* as a Markov chain over the lattice's pairs, from which all else is summed.

    Raises:
        InfeasibleError: no sequence with prior mass satisfies the reward's constraint.
    """

    def __init__(self, lattice: Lattice, messages: Messages):
        super().__init__()
        self.space, self.chain = lattice.space, posterior_chain(lattice, messages)

    def _apply(self, fn: Any, recurse: bool = True) -> "StructuredPosterior":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.chain = self.chain.moved(fn)
        return self

    @property
    def lattice(self) -> Lattice:
        """Prior times automaton."""
        return self.chain.lattice

    @property
    def hidden(self) -> bool:
        """Whether contexts are hidden: drawn by the prior, not determined by the words."""
        return self.chain.lattice.hidden

    @property
    def anchor(self) -> Tensor:
        """A return in reach, a scalar in reward units, and the best one at λ = 0.

        It is 0 where the messages are numbers, which hold the rewards themselves.
        """
        return self.chain.anchor

    @property
    def log_mass(self) -> Tensor:
        """log Z less anchor/λ, a scalar in nats."""
        return self.chain.log_mass

    # --- as a language model ---

    def facts(self) -> list[str]:
        return [f"{self.lattice.contexts:,} contexts × {self.lattice.states:,} states"]

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        logits, state = self.start(len(tokens))
        columns = [logits]
        for t in range(self.space.max_length - 1):
            logits, state = self.step(state, tokens[:, t].long())
            columns.append(logits)
        return torch.stack(columns, 1)

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, LatticeState]:
        self.check_prompt(prompt)
        lattice = self.lattice
        if lattice.hidden:
            context = lattice.log_initial.expand(n, -1)
        else:  # every text starts in one context
            context = lattice.log_initial.argmax().expand(n)
        state = LatticeState(context, torch.full((n,), lattice.start, device=context.device), 0)
        return self._logits(state), state

    def step(self, state: LatticeState, token: Tensor) -> tuple[Tensor, LatticeState]:
        check_room(self.space, state.position + 1)
        lattice = self.lattice
        # EOS is no word: what is read after it is nothing to the contract, which forces EOS
        word = token.clamp(max=lattice.successor.shape[1] - 1)
        if lattice.log_transition is not None:
            joint = state.context + lattice.log_emission.T[token]  # log q(c, y_{≤t}) [N,C]
            moved = torch.logsumexp(joint[:, :, None] + lattice.log_transition, 1)
            context = logspace.log_normalize_alive(moved)
        else:
            context = lattice.successor[state.context, word]
        after = LatticeState(context, lattice.next_state[state.state, word], state.position + 1)
        return self._logits(after), after

    def _logits(self, at: LatticeState) -> Tensor:
        """log p(v|prefix) [N,V] up to a constant a row.

        Uniform where nothing feasible lies ahead, and where EOS is forced.
        """
        if at.position >= self.lattice.words:
            return self.log_mass.new_zeros(len(at.state), self.space.vocab_size)
        conditional = self.chain.hidden_word_log_weights if self.hidden else self.chain.log_weights
        return logspace.uniform_where_dead(conditional(at.position, at.context, at.state))

    # --- exact samples ---

    @torch.no_grad()
    def sample(self, n: int, *, draw: Draw, prompt: Tensor | None = None) -> Tensor:
        """n exact, independent sequences [n,T], by one table of conditionals a step."""
        check_count(n, "n")
        check_draw(draw)
        self.check_prompt(prompt)
        chain, lattice, states = self.chain, self.lattice, self.lattice.states
        device = chain.log_start.device
        context = draw(chain.log_start[None], torch.zeros(n, dtype=torch.long, device=device))
        pair = context * states + lattice.start
        end = self.space.vocab_size - 1
        tokens = torch.full((n, self.space.max_length), end, dtype=torch.long, device=device)
        live = torch.arange(n, device=device)  # rows that have not ended
        for t in range(lattice.words):
            token = self._draw_words(t, pair, draw)
            tokens[live, t] = token
            if self.space.eos:
                going = token != end
                live, pair, token = live[going], pair[going], token[going]
                if not len(live):
                    break
            pair = lattice.next_pair[pair, token]
            if lattice.hidden and t + 1 < lattice.words:  # no word follows the last move
                distinct, row = torch.unique(pair, return_inverse=True)
                context = draw(chain.hidden_log_weights(t + 1)[distinct], row)
                pair = context * states + pair % states
        return tokens

    def _draw_words(self, t: int, pair: Tensor, draw: Draw) -> Tensor:
        """A token for each row that stands at a pair [N]."""
        # from the conditionals of the pairs in use, or of all where rows are many
        chain, states = self.chain, self.lattice.states
        if len(pair) < self.lattice.pairs:
            distinct, row = torch.unique(pair, return_inverse=True)
            return draw(chain.log_weights(t, distinct // states, distinct % states), row)
        table = chain.word_log_weights(t)
        # a row without mass, where no sample stands, is no law to draw from
        dead = chain.messages.log_mass[t].reshape(-1) == -math.inf
        if bool(dead.any()):
            table = logspace.uniform_where_dead(table, dead)
        return draw(table, pair)

    # --- moments ---

    @torch.no_grad()
    def moments(self, word_features: Tensor, final_features: Tensor) -> FeatureMoments:
        """Mean and covariance under π* of φ(y) = Σ_t φ(s_t, y_t) + φ_end(s_end), without sampling.

        Args:
            word_features: φ(s,k) [S,K,D], finite; final_features: φ_end(s) [S,D].

        Raises:
            TooLargeError: the C·S·max(K·D, D²) numbers that this needs are too many.
        """
        return chain_moments.feature_moments(self.chain, word_features, final_features)

    @torch.no_grad()
    def reward_moments(self) -> tuple[Tensor, Tensor]:
        """E[r] and Var[r] under π*, scalars in reward units and their square."""
        return chain_moments.reward_moments(self.chain)

    @torch.no_grad()
    def count_moments(self, words: list[str]) -> FeatureMoments:
        """Mean [D] and covariance [D,D] of how often each of D words occurs under π*.

        Raises:
            InputError: a word is not in the vocabulary.
        """
        return chain_moments.count_moments(self.chain, words)

    @torch.no_grad()
    def kl_to_prior(self) -> Tensor:
        """KL(π*‖q) in nats, a scalar."""
        return chain_moments.kl_to_prior(self.chain)

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """H(π*) in nats, a scalar.

        Raises:
            InputError: the prior has hidden contexts, whose entropy given the words is no sum over
                steps.
        """
        return chain_moments.entropy(self.chain)

    @torch.no_grad()
    def length_law(self) -> Tensor:
        """P(the text has ℓ words) under π* [L+1], ℓ = 0 … L; all at L where it is fixed."""
        return chain_moments.length_law(self.chain)

    def forbids(self) -> bool:
        """Whether the prior gives mass to a sequence with reward −inf."""
        return self.lattice.forbids()

    # --- search and comparison ---

    @torch.no_grad()
    def top_sequences(self, k: int) -> WeightedSequences:
        """The k most probable sequences with log π*(y), best first.

        They are fewer than k where the support is smaller.

        Raises:
            InputError: k < 1, or hidden contexts, under which a sequence is a sum over paths.
        """
        return best_sequences(self.chain, k)

    @torch.no_grad()
    def against(self, approximation: LanguageModel | WeightedSequences) -> ExactSums:
        """Exact sums over all sequences of an n-gram policy against π*.

        Raises:
            InputError: any other approximation, or hidden contexts, which no finite set of triples
                sums out.
        """
        if not isinstance(approximation, NGramModel):
            raise not_enumerated("forward_backward")
        return sums_by_context(self.chain, approximation)
