"""Everything that a loss on sampled sequences can move: log π(v|prefix), one number an edge of the
support's trie.

    log π(y) = Σ_t ℓ_{e(y,t)},    ∇(anything) = Σ_e c_e φ_e,    φ_e = ∇ℓ_e                       (1)

A gradient is a vector of coefficients c [E] here; what φ_e is, and so the parameters, is the
business of `coordinates`. S supported sequences in lexicographic order, T tokens, V columns, E
edges, M nodes (prefixes with a next token).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.tries import PrefixTrie


@dataclass(frozen=True)
class SupportTree:
    """The trie of the policy's support with the policy on its edges.

    Attributes:
        tokens: [S,T].
        trie: their prefix trie; every edge has mass.
        log_probs: log π(y) [S] in nats.
        edge_log_probs: ℓ_e = log π(v|prefix) [E].
        edge_log_mass, node_log_mass: log-probability that a sequence passes an edge [E], a node
            [M].
        edge_at: [M·V], the edge of node n and token v at n·V + v; −1 where there is none.
    """

    tokens: Tensor
    trie: PrefixTrie
    log_probs: Tensor
    edge_log_probs: Tensor
    edge_log_mass: Tensor
    node_log_mass: Tensor
    edge_at: Tensor

    @classmethod
    def build(cls, space: SequenceSpace, tokens: Tensor, token_log_probs: Tensor) -> "SupportTree":
        """From the support [S,T] and log π(y_t|y_<t) [S,T] on it, all finite."""
        trie = PrefixTrie(space, tokens)
        on_path = trie.edge_of >= 0
        log_probs = token_log_probs.sum(-1)
        edges = trie.edge_of[on_path]
        # all sequences through an edge write the same number there
        edge_log_probs = log_probs.new_zeros(len(trie.key))
        edge_log_probs[edges] = token_log_probs[on_path]
        of_sequence = log_probs[:, None].expand_as(tokens)[on_path]
        mass = logspace.segment_logsumexp(of_sequence, edges, len(trie.key))
        node_mass = logspace.segment_logsumexp(mass, trie.parent, trie.nodes)
        edge_at = torch.full((trie.nodes * space.vocab_size,), -1, device=tokens.device)
        edge_at[trie.key] = torch.arange(len(trie.key), device=tokens.device)
        return cls(tokens, trie, log_probs, edge_log_probs, mass, node_mass, edge_at)

    @property
    def edges(self) -> int:
        """The number E of edges."""
        return len(self.trie.key)

    def path_sums(self, weights: Tensor) -> Tensor:
        """Coefficients [E] of Σ_y w_y log π(y) for weights [S]: c_e = Σ_{y through e} w_y."""
        on_path = self.trie.edge_of >= 0
        of_sequence = weights[:, None].expand_as(self.tokens)[on_path]
        return weights.new_zeros(self.edges).index_add(0, self.trie.edge_of[on_path], of_sequence)

    def on_edges(self, values: Tensor) -> Tensor:
        """Per-token values [S,T] that depend on the prefix and the token alone, read off once an
        edge -> [E].
        """
        return values.flatten()[self.first_use]

    @cached_property
    def first_use(self) -> Tensor:
        """The first place [E] at which each edge stands, as s·T + t."""
        place = torch.arange(self.tokens.numel(), device=self.tokens.device).view_as(self.tokens)
        on_path = self.trie.edge_of >= 0
        first = torch.full((self.edges,), self.tokens.numel(), device=self.tokens.device)
        return first.scatter_reduce(0, self.trie.edge_of[on_path], place[on_path], "amin")

    def taken_edges(self, rows: Tensor) -> Tensor:
        """The edges that sequences `rows` [...] take -> [...,T]; −1 after EOS."""
        return self.trie.edge_of[rows]

    def all_edges(self, rows: Tensor) -> Tensor:
        """The edges that sequences `rows` [...] could take at each position -> [...,T,V]; −1 where
        there is no mass, and after EOS.
        """
        node = self.trie.node_of[rows].unsqueeze(-1)
        columns = self.trie.space.vocab_size
        key = node.clamp(min=0) * columns + torch.arange(columns, device=node.device)
        return torch.where(node >= 0, self.edge_at[key], -1)
