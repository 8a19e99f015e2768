"""Everything that a loss on sampled sequences can move: log π(v|prefix), one number an edge of the
support's trie.

    log π(y) = Σ_t ℓ_{e(y,t)},    ∇(anything) = Σ_e c_e φ_e,    φ_e = ∇ℓ_e                       (1)

A gradient is a vector of coefficients c [E] here; what φ_e is, and so the parameters, is the
business of `coordinates`. S supported sequences in lexicographic order, T tokens, V columns, E
edges, M nodes (prefixes with a next token).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.spaces import SequenceSpace


class Paths(Protocol):
    """What a support needs of a `core.tries.PrefixTrie`; a forest of several has it too."""

    @property
    def space(self) -> SequenceSpace:
        """Where the sequences live."""

    @property
    def nodes(self) -> int:
        """The number M of nodes."""

    @property
    def node_of(self) -> Tensor:
        """[S,T], the node that predicts each token; −1 after EOS."""

    @property
    def edge_of(self) -> Tensor:
        """[S,T], the edge that each token takes; −1 after EOS."""

    @property
    def parent(self) -> Tensor:
        """[E], the node that an edge leaves."""

    @property
    def token(self) -> Tensor:
        """[E]."""


@dataclass(frozen=True)
class Forest:
    """The tries of several prompts side by side, each with nodes and edges of its own."""

    space: SequenceSpace
    nodes: int
    node_of: Tensor
    edge_of: Tensor
    parent: Tensor
    token: Tensor


@dataclass(frozen=True)
class SupportTree:
    """The trie of the policy's support with the policy on its edges.

    Attributes:
        tokens: [S,T].
        trie: their prefix trie; every edge has mass.
        prompt: the prompt [S,L] that each sequence follows, or None.
        log_probs: log π(y) [S] in nats.
        edge_log_probs: ℓ_e = log π(v|prefix) [E].
        edge_log_mass, node_log_mass: log-probability that a sequence passes an edge [E], a node
            [M].
        edge_at: [M·V], the edge of node n and token v at n·V + v; −1 where there is none.
    """

    tokens: Tensor
    trie: Paths
    prompt: Tensor | None
    log_probs: Tensor
    edge_log_probs: Tensor
    edge_log_mass: Tensor
    node_log_mass: Tensor
    edge_at: Tensor

    @classmethod
    def build(
        cls, trie: Paths, tokens: Tensor, token_log_probs: Tensor, prompt: Tensor | None = None
    ) -> "SupportTree":
        """From the support [S,T], its trie, and log π(y_t|y_<t) [S,T] on it, all finite; after a
        prompt [L].
        """
        on_path = trie.edge_of >= 0
        log_probs = token_log_probs.sum(-1)
        edges, columns = trie.edge_of[on_path], trie.space.vocab_size
        # all sequences through an edge write the same number there
        edge_log_probs = log_probs.new_zeros(len(trie.parent))
        edge_log_probs[edges] = token_log_probs[on_path]
        of_sequence = log_probs[:, None].expand_as(tokens)[on_path]
        mass = logspace.segment_logsumexp(of_sequence, edges, len(trie.parent))
        # every sequence through a node leaves it by one edge
        node_mass = logspace.segment_logsumexp(mass, trie.parent, trie.nodes)
        edge_at = torch.full((trie.nodes * columns,), -1, device=tokens.device)
        edge_at[trie.parent * columns + trie.token] = torch.arange(
            len(trie.parent), device=tokens.device
        )
        prompts = None if prompt is None else prompt.expand(len(tokens), -1)
        return cls(tokens, trie, prompts, log_probs, edge_log_probs, mass, node_mass, edge_at)

    def with_log_probs(self, token_log_probs: Tensor) -> "SupportTree":
        """The same sequences under another policy [S,T]."""
        # the prompts [S,L] are a row a sequence already, and build takes one prompt [L]
        built = SupportTree.build(self.trie, self.tokens, token_log_probs)
        return replace(built, prompt=self.prompt)

    @classmethod
    def side_by_side(cls, trees: "Sequence[SupportTree]") -> "SupportTree":
        """The supports after several prompts as one: sequences, nodes and edges are numbered on
        from tree to tree.
        """
        if len(trees) == 1:
            return trees[0]
        edges = starts_of([tree.edges for tree in trees])
        nodes = starts_of([tree.trie.nodes for tree in trees])

        def numbered_on(name: str, starts: list[int]) -> Tensor:
            arrays = [getattr(tree.trie, name) for tree in trees]
            # not strict: starts has the end as well
            return torch.cat([_shifted(a, by) for a, by in zip(arrays, starts, strict=False)])

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(tree, name) for tree in trees])

        forest = Forest(
            space=trees[0].trie.space,
            nodes=nodes[-1],
            node_of=numbered_on("node_of", nodes),
            edge_of=numbered_on("edge_of", edges),
            parent=numbered_on("parent", nodes),
            token=torch.cat([tree.trie.token for tree in trees]),
        )
        edge_at = [_shifted(tree.edge_at, by) for tree, by in zip(trees, edges, strict=False)]
        return cls(
            tokens=joined("tokens"),
            trie=forest,
            prompt=_padded([tree.prompt for tree in trees]),
            log_probs=joined("log_probs"),
            edge_log_probs=joined("edge_log_probs"),
            edge_log_mass=joined("edge_log_mass"),
            node_log_mass=joined("node_log_mass"),
            edge_at=torch.cat(edge_at),
        )

    @property
    def edges(self) -> int:
        """The number E of edges."""
        return len(self.trie.parent)

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
        # by the least: which of several plain writes stays is not defined
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
        # after EOS any node will do, as the next line masks it
        key = node.clamp(min=0) * columns + torch.arange(columns, device=node.device)
        return torch.where(node >= 0, self.edge_at[key], -1)


def starts_of(sizes: list[int]) -> list[int]:
    """Where each part begins when they stand in a row, and where the last one ends."""
    return [sum(sizes[:k]) for k in range(len(sizes) + 1)]


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """Numbers moved on by a start; −1, which stands for none, stays."""
    return torch.where(numbers >= 0, numbers + by, -1)


def _padded(prompts: "Sequence[Tensor | None]") -> Tensor | None:
    """Prompts [S_m,L_m] as one [ΣS_m,L], −1 to the left of shorter ones."""
    given = [prompt for prompt in prompts if prompt is not None]
    if not given:
        return None
    width = max(prompt.shape[1] for prompt in given)
    return torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0), value=-1) for p in given])
