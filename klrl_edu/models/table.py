"""Tables as language models: one logit a sequence, or one row of logits a prefix.

    SequenceTable:  π(y) = e^{θ_y} / Σ_y′ e^{θ_y′},
    π(v|prefix) = mass(prefix v) / mass(prefix)                                                  (1)
    PrefixTable:    π(v|prefix) = softmax(θ_prefix)_v                                            (2)

Both keep their sequences in a prefix trie. Off the trie a SequenceTable has mass 0. The course's
gradients are in the coordinates θ_y of (1), `sequence logits`. K sequences, T tokens, V columns, E
trie edges.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.core.validation import check_finite_vector, check_probabilities
from klrl_edu.models.contract import MAX_SEQUENCES, LanguageModel, check_room, conditional_log_probs


class SequenceState(NamedTuple):
    """Where each row stands.

    Attributes:
        node: of the trie [N], −1 off it.
        position: of the last logits.
        edge_log_mass: [E] in nats, computed once a decoding run.
    """

    node: Tensor
    position: int
    edge_log_mass: Tensor


class SequenceTable(LanguageModel):
    """A table with one logit a sequence.

    Args:
        space: where the sequences live.
        tokens: [K,T], each sequence once.
        logits: [K] in nats, unnormalised log-masses; −inf is zero mass. They become the parameter
            `logits`, float64.

    Raises:
        InputError: duplicate sequences, NaN or +inf logits, no mass at all.
    """

    def __init__(self, space: SequenceSpace, tokens: Tensor, logits: Tensor):
        super().__init__()
        self.space = space
        space.check_tokens(tokens)
        logits = check_finite_vector(logits, "logits", len(tokens))
        if not len(tokens):
            raise InputError("tokens hold no sequence; give at least one.")
        # −inf in some is a table with zeros, in all of them no distribution
        logspace.log_normalize(logits)  # raises where there is no mass
        self.trie = PrefixTrie(space, tokens.long())
        self.register_buffer("tokens", tokens.long().clone(), persistent=False)
        if int((self.trie.leaf >= 0).sum()) < len(tokens):
            twice = _first_duplicate(space, tokens)
            raise InputError(
                f"tokens hold {twice!r} twice; list each sequence once, or merge them"
                " (SequenceTable.from_texts, merge='sum')."
            )
        self.logits = nn.Parameter(logits.detach().clone())

    tokens: Tensor

    @torch.no_grad()
    def facts(self) -> list[str]:
        log_p = torch.log_softmax(self.logits, 0)
        return [
            f"{len(self.tokens):,} sequence{'s' * (len(self.tokens) != 1)}",
            f"H = {float(logspace.entropy(log_p)) + 0.0:.4g} nats",  # no −0
        ]

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str] | Mapping[str, float],
        probs: Sequence[float] | Tensor | None = None,
        *,
        space: SequenceSpace | None = None,
        separator: str = " ",
        normalize: bool = False,
        merge: Literal["error", "sum"] = "error",
    ) -> "SequenceTable":
        """A table from texts and their probabilities.

        Args:
            texts: K texts, or a mapping text -> probability.
            probs: K probabilities that sum to one within 1e-9.
            space: where they live; by default the smallest space that holds them.
            separator: between words, when no space is given; "" spells texts as characters.
            normalize: accept weights, and divide by their sum.
            merge: what to do with a text that stands twice: "error", or "sum" its probabilities.

        Raises:
            InputError: bad probabilities, duplicates, texts outside `space`.
        """
        if isinstance(texts, Mapping):
            probs, texts = list(texts.values()), list(texts)
        if probs is None or len(texts) != len(probs):
            given = "none" if probs is None else len(probs)
            raise InputError(
                f"texts has {len(texts)} entries and probs {given}; give one probability a text."
            )
        values = check_probabilities(probs, normalize=normalize)
        space = SequenceSpace.from_texts(texts, separator=separator) if space is None else space
        tokens = space.encode(texts)
        unique, which = torch.unique(tokens, dim=0, return_inverse=True)
        if len(unique) < len(tokens):
            if merge != "sum":
                raise InputError(
                    f"texts hold {_first_duplicate(space, tokens)!r} twice; remove one, or pass"
                    " merge='sum' to add their probabilities."
                )
            tokens = unique
            values = torch.zeros(len(unique), dtype=torch.float64).index_add(0, which, values)
        return cls(space, tokens, torch.log(values))

    @property
    def log_probs(self) -> Tensor:
        """log π(y) [K] of the table's own sequences, in their order, in nats."""
        return logspace.log_normalize(self.logits)

    def edge_log_mass(self) -> Tensor:
        """log-mass [E] below each edge of the trie, unnormalised."""
        trie = self.trie
        on_path = trie.edge_of >= 0
        spread = self.logits.unsqueeze(1).expand_as(trie.edge_of)[on_path]
        return logspace.segment_logsumexp(spread, trie.edge_of[on_path], len(trie.key))

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        node, _ = self.trie.find(tokens)
        return self._rows(node.reshape(-1), self.edge_log_mass()).reshape(*tokens.shape, -1)

    def token_log_prob(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        """log π(y_t|y_<t) [N,T] by two look-ups a token, without the V columns of `forward`."""
        mass = self.edge_log_mass()
        node_mass = logspace.segment_logsumexp(mass, self.trie.parent, self.trie.nodes)
        node, edge = self.trie.find(tokens)
        known = node.clamp(min=0)
        on_trie = (node >= 0) & (node_mass[known] > -torch.inf)
        zero = torch.zeros((), dtype=mass.dtype, device=mass.device)
        edge_mass = torch.where(on_trie & (edge >= 0), mass[edge.clamp(min=0)], zero - torch.inf)
        # off the trie the conditional is uniform; masked before the subtraction, where −inf −
        # (−inf) would be NaN
        within = edge_mass - torch.where(on_trie, node_mass[known], zero)
        log_probs = torch.where(on_trie, within, zero - math.log(self.space.vocab_size))
        if not self.space.eos:
            return log_probs
        # the trie holds no token after EOS, and the one at T is no choice
        forced = ~self.space.live(tokens)
        forced[:, -1] = True
        return torch.where(forced, zero, log_probs)

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, SequenceState]:
        self.check_prompt(prompt)
        node = torch.zeros(n, dtype=torch.long, device=self.logits.device)
        mass = self.edge_log_mass()  # carried in the state: every step would sum it anew
        return self._rows(node, mass), SequenceState(node, 0, mass)

    def step(self, state: SequenceState, token: Tensor) -> tuple[Tensor, SequenceState]:
        check_room(self.space, state.position + 1)
        _, node = self.trie.follow(state.node, token)
        after = SequenceState(node, state.position + 1, state.edge_log_mass)
        return self._rows(node, state.edge_log_mass), after

    def select(self, state: SequenceState, index: Tensor) -> SequenceState:
        return state._replace(node=state.node[index])

    def _rows(self, node: Tensor, edge_log_mass: Tensor) -> Tensor:
        """Logits [M,V] of nodes [M]; uniform off the trie and where a node has no mass."""
        logits = self.trie.scatter_edges(edge_log_mass, node, -torch.inf)
        return logspace.uniform_where_dead(logits)

    def get_extra_state(self) -> Tensor:
        """The sequences, so that logits are never loaded onto others."""
        return self.tokens

    def set_extra_state(self, state: Tensor) -> None:
        if not torch.equal(state.to(self.tokens.device), self.tokens):
            raise InputError(
                "this state_dict belongs to a SequenceTable over other sequences; build the table"
                " from the same texts, in order."
            )


class NodeState(NamedTuple):
    """The trie node of each row, −1 off the trie."""

    node: Tensor
    position: int


class PrefixTable(LanguageModel):
    """A table with one row of logits a prefix.

    Args:
        space: where the sequences live.
        tokens: [K,T], the sequences whose prefixes get a row; by default all of the space.
        logits: [nodes, V], rows in the order of `trie`; zeros (uniform) by default. −inf is zero
            mass. They become the parameter `logits`.

    Prefixes without a row are uniform, and so are rows of −inf only, which no sequence with mass
    may reach.

    Raises:
        InputError: NaN or +inf logits, or a prefix with mass whose logits are all −inf.
    """

    def __init__(
        self, space: SequenceSpace, tokens: Tensor | None = None, logits: Tensor | None = None
    ):
        super().__init__()
        self.space = space
        tokens = space.all_tokens() if tokens is None else space.check_tokens(tokens).long()
        self.trie = PrefixTrie(space, tokens)
        shape = (self.trie.nodes, space.vocab_size)
        if logits is None:
            logits = torch.zeros(shape, dtype=torch.float64, device=tokens.device)
        if logits.shape != shape:
            raise InputError(
                f"logits has shape {list(logits.shape)}; expected [prefixes, V] = {list(shape)}."
            )
        self._check(logits.detach())
        self.logits = nn.Parameter(logits.detach().double().clone())

    def facts(self) -> list[str]:
        return [f"{int((self.trie.leaf >= 0).sum()):,} sequences", f"{self.trie.nodes:,} prefixes"]

    def _check(self, logits: Tensor) -> None:
        bad = torch.isnan(logits) | (logits == torch.inf)
        if bool(bad.any()):
            node, token = bad.nonzero()[0].tolist()
            raise InputError(
                f"logits[{node}, {token}] = {float(logits[node, token])} is not allowed; give a"
                " number, or -inf for zero mass."
            )
        dead = (logits == -torch.inf).all(-1) & self._reachable(logits > -torch.inf)
        if bool(dead.any()):
            raise InputError(
                f"logits[{int(dead.nonzero()[0])}] are all -inf at a prefix that has mass; give at"
                " least one finite logit."
            )

    def _reachable(self, alive: Tensor) -> Tensor:
        """Which nodes have mass [nodes], where alive [nodes,V] says which tokens do."""
        trie = self.trie
        reached = torch.zeros(trie.nodes, dtype=torch.bool, device=alive.device)
        reached[0] = True
        for first, last in zip(trie.depth_edges, trie.depth_edges[1:], strict=False):
            edges = slice(first, last)
            parent, token, child = trie.parent[edges], trie.token[edges], trie.child[edges]
            passed = (child >= 0) & reached[parent] & alive[parent, token]
            reached[child[passed]] = True
        return reached

    @classmethod
    def from_model(cls, model: LanguageModel, tokens: Tensor | None = None) -> "PrefixTable":
        """A table with the conditionals of a model that takes no prompt.

        Args:
            tokens: [K,T], the sequences that get rows; by default all, of at most a million.
        """
        table = cls(model.space, tokens)
        tokens = model.space.all_tokens(MAX_SEQUENCES) if tokens is None else tokens
        with torch.no_grad():
            log_probs = conditional_log_probs(model, tokens)
            on_path = table.trie.node_of >= 0
            table.logits[table.trie.node_of[on_path]] = log_probs[on_path]
        return table

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        return self._rows(self.trie.find(tokens)[0])

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, NodeState]:
        self.check_prompt(prompt)
        node = torch.zeros(n, dtype=torch.long, device=self.logits.device)
        return self._rows(node), NodeState(node, 0)

    def step(self, state: NodeState, token: Tensor) -> tuple[Tensor, NodeState]:
        check_room(self.space, state.position + 1)
        _, node = self.trie.follow(state.node, token)
        return self._rows(node), NodeState(node, state.position + 1)

    def _rows(self, node: Tensor) -> Tensor:
        """Logits [..., V] of nodes [...]; uniform off the trie and where a row is all −inf."""
        rows = self.logits[node.clamp(min=0)]
        dead = (node < 0) | (rows.detach() == -torch.inf).all(-1)
        return logspace.uniform_where_dead(rows, dead)


def _first_duplicate(space: SequenceSpace, tokens: Tensor) -> str:
    """The text that stands twice, known to be there."""
    seen: set[tuple[int, ...]] = set()
    for row in tokens.tolist():
        if tuple(row) in seen:
            return space.decode([row])[0]
        seen.add(tuple(row))
    raise AssertionError("no duplicate")
