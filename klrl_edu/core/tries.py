"""The prefix trie of a set of sequences, as flat arrays.

Every table and every backward sweep runs on it.
A node is a live prefix (a row from which a next token is predicted), node 0 the empty one; an edge
is a node and a token. Nodes are numbered by depth and edges are sorted by (node, token), so a
look-up is a binary search over all sequences at once and a backward sweep is a loop over T depths.
K sequences, T tokens, E edges, V columns.
"""

import torch
from torch import Tensor, nn

from klrl_edu.core.spaces import SequenceSpace


class PrefixTrie(nn.Module):
    """The trie of tokens [K,T].

    It is a module without parameters, so that its arrays move with the table that owns it.

    Attributes:
        node_of, edge_of: [K,T], the node that predicts token t of sequence k and the edge it takes;
            −1 after EOS.
        parent, token, child: [E]; child is −1 where the sequence ends.
        first_edge: [nodes + 1]; the edges of node i are first_edge[i] … first_edge[i+1] − 1.
        depth_edges: T + 1 offsets; the edges of depth t are depth_edges[t] … depth_edges[t+1] − 1.
        leaf: [E], the sequence that ends with this edge, −1 for none.
        key: [E], node · V + token, ascending; what look-ups search.
    """

    node_of: Tensor
    edge_of: Tensor
    key: Tensor
    parent: Tensor
    token: Tensor
    child: Tensor
    leaf: Tensor
    first_edge: Tensor

    def __init__(self, space: SequenceSpace, tokens: Tensor):
        super().__init__()
        self.space = space
        rows, length = tokens.shape
        end, columns = space.eos_id, space.vocab_size
        node = torch.zeros(rows, dtype=torch.long, device=tokens.device)
        self.nodes, keys, children, leaves = 1, [], [], []
        self.depth_edges = [0]
        node_of, edge_of = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
        for t in range(length):
            live = node >= 0
            # the sequences that share a node and a token share an edge: `which` says whose it is
            key, which = torch.unique(node[live] * columns + tokens[live, t], return_inverse=True)
            continues = torch.full_like(key, t < length - 1, dtype=torch.bool)
            if end is not None:
                continues &= key % columns != end
            # edges that continue get the next numbers of nodes, in their order
            child = torch.where(continues, self.nodes - 1 + continues.cumsum(0), -1)
            leaf = torch.full_like(key, -1).index_put((which,), live.nonzero().squeeze(-1))
            node_of[live, t], edge_of[live, t] = node[live], self.depth_edges[-1] + which
            node = node.masked_scatter(live, child[which])
            self.nodes += int(continues.sum())
            self.depth_edges.append(self.depth_edges[-1] + len(key))
            keys.append(key)
            children.append(child)
            leaves.append(torch.where(continues, -1, leaf))
        key = torch.cat(keys)
        bounds = torch.arange(self.nodes + 1, device=tokens.device) * columns
        arrays = {
            "node_of": node_of,
            "edge_of": edge_of,
            "key": key,
            "parent": key // columns,
            "token": key % columns,
            "child": torch.cat(children),
            "leaf": torch.cat(leaves),
            "first_edge": torch.searchsorted(key, bounds),
        }
        for name, array in arrays.items():
            self.register_buffer(name, array, persistent=False)

    def follow(self, node: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """From nodes [...] along tokens [...]: the edges and the next nodes, −1 where none is."""
        key = node * self.space.vocab_size + token
        place = torch.searchsorted(self.key, key).clamp(max=len(self.key) - 1)
        found = (self.key[place] == key) & (node >= 0)
        return torch.where(found, place, -1), torch.where(found, self.child[place], -1)

    def find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes and edges [N,T] along tokens [N,T]; −1 off the trie, and after EOS."""
        tokens = tokens.long()  # −1 and large node numbers fit no narrower type
        node = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        nodes, edges = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
        for t in range(tokens.shape[1]):
            nodes[:, t] = node
            edges[:, t], node = self.follow(node, tokens[:, t])
        return nodes, edges

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Which of the K sequences each of `tokens` [N,T] is [N]; −1 for none of them."""
        edge = self.find(tokens)[1]
        leaf = torch.where(edge >= 0, self.leaf[edge], -1)
        return leaf.amax(-1)  # the only edge of a path with a leaf is its last

    def scatter_edges(self, values: Tensor, node: Tensor, fill: float) -> Tensor:
        """The edge values [E] of nodes [M] as rows [M,V]; `fill` where a node has no edge."""
        known = node.clamp(min=0)
        first = self.first_edge[known]
        count = torch.where(node >= 0, self.first_edge[known + 1] - first, 0)
        # one entry for each edge of each node: the row it belongs to, and its place among the
        # node's edges
        row = torch.repeat_interleave(torch.arange(len(node), device=node.device), count)
        before = torch.repeat_interleave(count.cumsum(0) - count, count)
        offset = torch.arange(len(row), device=node.device) - before
        edge = first[row] + offset
        out = values.new_full((len(node), self.space.vocab_size), fill)
        return out.index_put((row, self.token[edge]), values[edge])
