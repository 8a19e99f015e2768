"""The parameters in which a gradient is printed, and the geometry of the gradients φ_e = ∇ log
π(v|prefix) of single edges.

    prefix logits     φ_(n,v) = 1_(n,v) − π(·|n),
    <φ_(n,v), φ_(n,w)> = 1{v=w} − π_v − π_w + Σ π²                                               (1)
    sequence logits   φ_(n,v) = π_|nv − π_|n,
    π_|b = π(·|b) on the sequences below b, 0 elsewhere                                          (2)
                      <π_|a, π_|b> = e^{log m_b − log m_a} R_b where b lies below a (0 where neither
                      does),  R_b = Σ π_|b²
    any other model   φ_e by one backward pass an edge, and their Gram matrix

(1) and (2) need no matrix of Jacobians [E,P]. E edges, M nodes, S sequences, P parameters.
"""

import time
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from klrl_edu.audit.tree import SupportTree
from klrl_edu.core.errors import TooLargeError
from klrl_edu.models.contract import LanguageModel, token_log_probs
from klrl_edu.models.restricted import RestrictedModel
from klrl_edu.models.table import PrefixTable, SequenceTable

_BLOCK = 1 << 25  # numbers in one block of Jacobian rows: 256 MiB
_MAX_GRAM = 1 << 26  # numbers in the Gram matrix of a model without a closed form: 512 MiB
_FORWARD_ROWS = 256  # sequences in one forward pass
_MAX_ENTRIES = 10_000  # parameters with names; more are not read


class Coordinates(Protocol):
    """A basis of the parameters, as the φ_e see it.

    Attributes:
        name: what the entries of a gradient are derivatives by.
        size: P.
        squares_are_cheap: whether `squared_norms` costs about as much as a few numbers a parameter.
        depths_are_orthogonal: whether <φ_e, φ_e'> = 0 wherever e and e' predict different
            positions.
    """

    name: str
    size: int
    squares_are_cheap: bool
    depths_are_orthogonal: bool

    @property
    def entries(self) -> tuple[str, ...] | None:
        """What each of the P entries belongs to, in words; None for a network's."""

    @property
    def cost(self) -> str | None:
        """What backward passes through a model cost, in words; None where there are none."""

    def kernel(self, left: Tensor, right: Tensor) -> Tensor:
        """<φ_e, φ_e'> for edges of the same shape."""

    def combine(self, coefficients: Tensor) -> Tensor:
        """Σ_e c_e φ_e: [K,E] -> [K,P]."""

    def squared_norms(self, coefficients: Tensor) -> Tensor:
        """‖Σ_e c_e φ_e‖²: [K,E] -> [K], without the cancellation of the sum of kernels."""


def coordinates_of(policy: LanguageModel, tree: SupportTree) -> Coordinates:
    """The closed form where the policy is a table (a subclass may compute something else), else
    backward passes.
    """
    if type(policy) is SequenceTable:
        return SequenceLogits(policy, tree)
    inner = policy
    # masked logits have no mass, so (1) holds as it stands with the restricted conditional
    while type(inner) is RestrictedModel:
        inner = inner.policy
    if type(inner) is PrefixTable:
        return PrefixLogits(inner, tree)
    return NetworkParameters(policy, tree)


class PrefixLogits:
    """Equation (1): the logits [rows, V] of a PrefixTable, restricted or not, flattened."""

    squares_are_cheap = depths_are_orthogonal = True
    cost = None

    def __init__(self, table: PrefixTable, tree: SupportTree):
        trie = tree.trie
        self.size, self.name = table.logits.numel(), "prefix logits"
        # the row of the table for each node of the support; −1 where a prefix has none, or a row
        # of −inf alone: such a prefix is uniform, and nothing moves it
        row = torch.full((trie.nodes,), -1, device=tree.tokens.device)
        on_path = trie.node_of >= 0
        rows, _ = table.trie.find(tree.tokens)
        row[trie.node_of[on_path]] = rows[on_path]
        dead = (table.logits.detach() == -torch.inf).all(-1)
        row[(row >= 0) & dead[row.clamp(min=0)]] = -1
        self.node = trie.parent
        self.movable = (row >= 0)[trie.parent]
        # the flat index of each edge's logit; that of an edge which cannot move is never used
        self.parameter = row[trie.parent].clamp(min=0) * table.space.vocab_size + trie.token
        self.probs = tree.edge_log_probs.exp()
        self.square = self._node_sums(self.probs.square())[trie.parent]
        self.entries = _prefix_entries(table)

    def kernel(self, left: Tensor, right: Tensor) -> Tensor:
        """<φ_e, φ_e'> by (1); 0 for edges of different nodes, which share no logit."""
        same = (left == right).to(self.probs.dtype)
        value = same - self.probs[left] - self.probs[right] + self.square[left]
        siblings = self.node[left] == self.node[right]
        return torch.where(siblings & self.movable[left], value, 0.0)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Σ c (1_v − π): the coefficient of each edge minus π_v times its node's sum."""
        moved = self._on_edges(coefficients)
        out = torch.zeros(len(coefficients), self.size, dtype=moved.dtype, device=moved.device)
        return out.index_add(1, self.parameter, moved)

    def squared_norms(self, coefficients: Tensor) -> Tensor:
        """Each edge is a parameter of its own, so the squares are those of `combine`."""
        return self._on_edges(coefficients).square().sum(-1)

    def _on_edges(self, coefficients: Tensor) -> Tensor:
        moved = coefficients - self.probs * self._node_sums(coefficients)[..., self.node]
        return torch.where(self.movable, moved, 0.0)

    def _node_sums(self, values: Tensor) -> Tensor:
        nodes = int(self.node[-1]) + 1  # edges stand in the order of their nodes
        sums = torch.zeros(*values.shape[:-1], nodes, dtype=values.dtype, device=values.device)
        return sums.index_add(-1, self.node, values)


class SequenceLogits:
    """Equation (2): the logits [K] of a SequenceTable, in its own order; sequences without mass
    have gradient 0.
    """

    squares_are_cheap, depths_are_orthogonal = True, False
    cost = None

    def __init__(self, table: SequenceTable, tree: SupportTree):
        trie = tree.trie
        self.size, self.name = len(table.logits), "sequence logits"
        few = self.size <= _MAX_ENTRIES
        self.entries = tuple(table.space.decode(table.tokens)) if few else None
        self.tree = tree
        _, edges = table.trie.find(tree.tokens)
        # the edge of its last live token leads to the row of a sequence in the table
        last_place = table.space.live(tree.tokens).sum(-1, keepdim=True) - 1
        last = edges.gather(1, last_place).squeeze(-1)
        self.row = table.trie.leaf[last]  # [S], where each supported sequence stands in the table
        on_path = trie.edge_of >= 0
        place = torch.arange(tree.tokens.shape[1], device=tree.tokens.device)
        depth = place.expand_as(tree.tokens)[on_path]
        # an edge's block of sequences lies one deeper than the node that it leaves
        edge_blocks = self._blocks(trie.edge_of[on_path], tree.edge_log_mass, depth + 1)
        node_blocks = self._blocks(trie.node_of[on_path], tree.node_log_mass, depth)
        # a block of sequences a row: first the edges, then the nodes
        self.first, self.last, self.depth, self.log_mass, self.concentration = (
            torch.cat(pair) for pair in zip(edge_blocks, node_blocks, strict=True)
        )

    def _blocks(self, index: Tensor, log_mass: Tensor, depth: Tensor) -> tuple[Tensor, ...]:
        """First and last sequence below each block, its depth, log m and R of (2), from the
        (sequence, block) pairs along all paths.
        """
        tree, count = self.tree, len(log_mass)
        every = torch.arange(len(tree.tokens), device=index.device)[:, None]
        sequence = every.expand_as(tree.tokens)[tree.trie.edge_of >= 0]
        # sequences stand in lexicographic order, so those below a block are a range
        beyond = torch.full((count,), len(tree.tokens), device=index.device)
        first = beyond.scatter_reduce(0, index, sequence, "amin")
        none = torch.full((count,), -1, device=index.device)
        last = none.scatter_reduce(0, index, sequence, "amax")
        depths = torch.zeros(count, dtype=torch.long, device=index.device)
        depths = depths.index_put((index,), depth)  # all pairs of a block write one depth
        # in logs until the quotient: masses of long sequences underflow, their shares do not
        squares = torch.exp(2 * (tree.log_probs[sequence] - log_mass[index]))
        concentration = torch.zeros_like(log_mass).index_add(0, index, squares)
        return first, last, depths, log_mass, concentration

    def kernel(self, left: Tensor, right: Tensor) -> Tensor:
        """<φ_e, φ_e'> = <π_|e − π_|n, π_|e' − π_|n'>, four inner products of (2)."""
        edges, parent = self.tree.edges, self.tree.trie.parent
        # among the blocks nodes stand behind the edges
        node_left, node_right = edges + parent[left], edges + parent[right]
        return (
            self._inner(left, right)
            - self._inner(left, node_right)
            - self._inner(node_left, right)
            + self._inner(node_left, node_right)
        )

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        """<π_|a, π_|b> of blocks: 0 unless one lies within the other."""
        deeper = self.depth[b] >= self.depth[a]
        upper, lower = torch.where(deeper, a, b), torch.where(deeper, b, a)
        # blocks of a tree are nested or apart, so their ends tell which
        nested = (self.first[upper] <= self.first[lower]) & (self.last[lower] <= self.last[upper])
        log_share = self.log_mass[lower] - self.log_mass[upper]
        # masked before exp: of blocks that are apart the quotient may overflow
        share = torch.exp(torch.where(nested, log_share, -torch.inf))
        return share * self.concentration[lower]

    def combine(self, coefficients: Tensor) -> Tensor:
        """∂/∂θ_y = Σ_t π(y|edge_t) c_t − π(y|node_t) Σ_{edges of node_t} c, along the path of y."""
        trie, tree = self.tree.trie, self.tree
        count = len(coefficients)
        sums = coefficients.new_zeros(count, trie.nodes).index_add(1, trie.parent, coefficients)
        moved = coefficients.new_zeros(count, len(tree.tokens))
        # a token position at a time: [K,S] numbers, where all positions at once would take T times
        # as many
        for edge, node in zip(trie.edge_of.unbind(1), trie.node_of.unbind(1), strict=True):
            live = edge >= 0
            edge, node = edge.clamp(min=0), node.clamp(min=0)  # −1 after EOS, where 0 is added
            within = torch.where(live, torch.exp(tree.log_probs - tree.edge_log_mass[edge]), 0.0)
            before = torch.where(live, torch.exp(tree.log_probs - tree.node_log_mass[node]), 0.0)
            moved += within * coefficients[:, edge] - before * sums[:, node]
        out = coefficients.new_zeros(count, self.size)
        return out.index_copy(1, self.row, moved)

    def squared_norms(self, coefficients: Tensor) -> Tensor:
        """‖Σ_e c_e φ_e‖² from the entries of `combine`."""
        return self.combine(coefficients).square().sum(-1)


class NetworkParameters:
    """All trainable parameters of a model, by backward passes of single sequences; memory stays
    bounded whatever P is.
    """

    squares_are_cheap = depths_are_orthogonal = False  # [E,E] products an execution
    entries = None

    def __init__(self, policy: LanguageModel, tree: SupportTree):
        self.policy, self.tree, self.device = policy, tree, tree.tokens.device
        self.parameters = [
            parameter for parameter in policy.parameters() if parameter.requires_grad
        ]
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.name = f"{self.size} parameters of {type(policy).__name__}"
        self.passes, self.seconds = 0, 0.0

    @property
    def cost(self) -> str:
        """Backward passes, sizes and seconds."""
        sizes = f"{self.tree.edges:,} edges × {self.size:,} parameters"
        return (
            f"{self.passes:,} backward passes through {type(self.policy).__name__} ({sizes}) in"
            f" {self.seconds:.2g} s"
        )

    def kernel(self, left: Tensor, right: Tensor) -> Tensor:
        """<φ_e, φ_e'>, looked up in the Gram matrix."""
        return self.gram[left, right]

    def squared_norms(self, coefficients: Tensor) -> Tensor:
        """‖Σ_e c_e φ_e‖² = cᵀ K c, K the Gram matrix."""
        return ((coefficients @ self.gram) * coefficients).sum(-1)

    @cached_property
    def gram(self) -> Tensor:
        """K [E,E]; where the Jacobian [E,P] is too large to hold, its rows stream by in blocks, and
        are computed once a pair of blocks.

        Raises:
            TooLargeError: K itself is too large.
        """
        edges = self.tree.edges
        if edges**2 > _MAX_GRAM:
            raise TooLargeError(
                f"the support has {edges:,} edges; their Gram matrix for a"
                f" {type(self.policy).__name__} would hold {edges**2:,} numbers, more than"
                f" {_MAX_GRAM:,}. Audit a table (PrefixTable.from_model(policy)), or take a smaller"
                " space."
            )
        if self.whole_jacobian is not None:
            return self.whole_jacobian @ self.whole_jacobian.T
        started = time.perf_counter()
        blocks = torch.arange(edges, device=self.device).split(max(1, _BLOCK // self.size))
        # two blocks of rows are held at a time; by symmetry each pair of them is met once
        gram = torch.zeros(edges, edges, dtype=torch.float64, device=self.device)
        for index, block in enumerate(blocks):
            rows = self.jacobian(block)
            gram[block[:, None], block] = rows @ rows.T
            for other in blocks[index + 1 :]:
                product = rows @ self.jacobian(other).T
                gram[block[:, None], other], gram[other[:, None], block] = product, product.T
        self.seconds += time.perf_counter() - started
        return gram

    @cached_property
    def whole_jacobian(self) -> Tensor | None:
        """All φ_e [E,P], where they can be held."""
        if self.tree.edges * self.size > _BLOCK:
            return None
        started = time.perf_counter()
        rows = self.jacobian(torch.arange(self.tree.edges, device=self.device))
        self.seconds += time.perf_counter() - started
        return rows

    def jacobian(self, edges: Tensor) -> Tensor:
        """φ_e for edges [b] -> [b,P], float64: one forward pass a sequence, one backward pass an
        edge.
        """
        length = self.tree.tokens.shape[1]
        # φ_e is the same in every sequence through the edge, so the first serves
        places = self.tree.first_use[edges]
        sequences, positions = places // length, places % length
        out = torch.empty(len(edges), self.size, dtype=torch.float64, device=self.device)
        for sequence in torch.unique(sequences).tolist():
            log_probs = self._log_probs(slice(sequence, sequence + 1))[0]
            for row in (sequences == sequence).nonzero().squeeze(-1).tolist():
                out[row] = self._backward(log_probs[positions[row]])
        return out

    def combine(self, coefficients: Tensor) -> Tensor:
        """Σ c ℓ over the edges, differentiated: one forward pass a block of sequences, one backward
        pass a row; a product where φ is held.
        """
        if self.whole_jacobian is not None:
            return coefficients @ self.whole_jacobian
        started = time.perf_counter()
        total = torch.zeros(len(coefficients), self.size, dtype=torch.float64, device=self.device)
        for block, weights in self._weighted_blocks(coefficients):
            log_probs = self._log_probs(block)
            for row, weight in enumerate(weights):
                total[row] += self._backward((weight * log_probs).sum())
        self.seconds += time.perf_counter() - started
        return total

    def _log_probs(self, block: slice) -> Tensor:
        """log π(y_t|y_<t) [b,T] of some of the sequences, each after its prompt."""
        prompt = None if self.tree.prompt is None else self.tree.prompt[block]
        return token_log_probs(self.policy, self.tree.tokens[block], prompt)

    def _weighted_blocks(self, coefficients: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of sequences and the weights [K,b,T] of their tokens: each edge's coefficient
        stands where the edge does first.
        """
        tokens = self.tree.tokens
        weights = coefficients.new_zeros(len(coefficients), tokens.numel(), device=tokens.device)
        weights[:, self.tree.first_use] = coefficients
        weight_blocks = weights.view(-1, *tokens.shape).split(_FORWARD_ROWS, 1)
        starts = range(0, len(tokens), _FORWARD_ROWS)
        return zip([slice(a, a + _FORWARD_ROWS) for a in starts], weight_blocks, strict=True)

    def _backward(self, value: Tensor) -> Tensor:
        """∇value [P] in float64; 0 where the value is certain and nothing moves it."""
        if not value.requires_grad:
            return torch.zeros(self.size, dtype=torch.float64, device=self.device)
        self.passes += 1
        # retained: one forward pass serves many backward passes
        gradients = torch.autograd.grad(
            value, self.parameters, retain_graph=True, materialize_grads=True
        )
        return torch.cat([gradient.reshape(-1).double() for gradient in gradients])


def _prefix_entries(table: PrefixTable) -> tuple[str, ...] | None:
    """Prefix → token for each logit [rows·V] of a table; None where they are too many to read."""
    if table.logits.numel() > _MAX_ENTRIES:
        return None
    space, trie = table.space, table.trie
    words = [*space.vocabulary, *(["EOS"] if space.eos else [])]
    texts = [""] * trie.nodes
    # edges stand in the order of their nodes, so a node has its text before its edges are met
    edges = zip(trie.parent.tolist(), trie.token.tolist(), trie.child.tolist(), strict=True)
    for parent, token, child in edges:
        if child >= 0:
            before = texts[parent] + space.separator if texts[parent] else ""
            texts[child] = before + words[token]
    return tuple(f"{text} → {word}" for text in texts for word in words)
