"""The prefix trie against dictionaries of prefixes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.testing import spaces


@st.composite
def tables(draw):
    """A space and some of its sequences, each once."""
    space = draw(spaces(max_length=4))
    everything = space.all_tokens()
    rows = draw(st.lists(st.integers(0, len(everything) - 1), min_size=1, max_size=8, unique=True))
    return space, everything[rows]


def live_prefixes(space, tokens):
    """Every live prefix of the sequences (with its next token, every edge), as Python tuples."""
    nodes, edges = set(), set()
    for row, live in zip(tokens.tolist(), space.live(tokens).tolist(), strict=True):
        for t in range(sum(live)):
            nodes.add(tuple(row[:t]))
            edges.add(tuple(row[: t + 1]))
    return nodes, edges


@given(table=tables())
def test_nodes_and_edges_are_the_live_prefixes_by_depth_then_order(table):
    space, tokens = table
    trie, (nodes, edges) = PrefixTrie(space, tokens), live_prefixes(*table)
    assert (trie.nodes, len(trie.key)) == (len(nodes), len(edges))
    ordered_nodes = sorted(nodes, key=lambda prefix: (len(prefix), prefix))
    ordered_edges = sorted(edges, key=lambda prefix: (len(prefix), prefix))
    assert [
        ordered_nodes[p] + (t,)
        for p, t in zip(trie.parent.tolist(), trie.token.tolist(), strict=True)
    ] == ordered_edges
    assert [
        sum(len(e) <= t for e in edges) for t in range(space.max_length + 1)
    ] == trie.depth_edges
    for edge, child in zip(ordered_edges, trie.child.tolist(), strict=True):
        assert (ordered_nodes[child] == edge) if edge in nodes else child == -1


@given(table=tables())
def test_each_sequence_ends_in_its_own_leaf(table):
    space, tokens = table
    trie = PrefixTrie(space, tokens)
    for row, length in enumerate(space.live(tokens).sum(1).tolist()):
        assert trie.leaf[trie.edge_of[row, length - 1]] == row
    assert (trie.leaf >= 0).sum() == len(tokens)


@given(table=tables())
def test_find_follows_known_sequences_and_leaves_the_trie_with_unknown_ones(table):
    space, tokens = table
    trie, (nodes, edges) = PrefixTrie(space, tokens), live_prefixes(*table)
    everything = space.all_tokens()
    found_nodes, found_edges = trie.find(everything)
    assert torch.equal(trie.find(tokens)[0], trie.node_of)
    assert torch.equal(trie.find(tokens)[1], trie.edge_of)
    for row, node_row, edge_row in zip(
        everything.tolist(), found_nodes.tolist(), found_edges.tolist(), strict=True
    ):
        for t in range(space.max_length):
            assert (node_row[t] >= 0) == (tuple(row[:t]) in nodes)
            assert (edge_row[t] >= 0) == (tuple(row[: t + 1]) in edges)


@given(table=tables())
def test_find_takes_narrow_integers(table):
    space, tokens = table
    trie = PrefixTrie(space, tokens)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        for narrow, wide in zip(
            trie.find(space.all_tokens().to(dtype)), trie.find(space.all_tokens()), strict=True
        ):
            assert torch.equal(narrow, wide)


@given(table=tables())
def test_scatter_edges_lays_the_edges_of_a_node_over_its_columns(table):
    space, tokens = table
    trie = PrefixTrie(space, tokens)
    values = torch.arange(1.0, len(trie.key) + 1)
    rows = trie.scatter_edges(values, torch.arange(-1, trie.nodes), 0.0)
    expected = torch.zeros(trie.nodes + 1, space.vocab_size)
    expected[trie.parent + 1, trie.token] = values
    assert torch.equal(rows, expected)


def test_a_trie_of_depth_5000_needs_no_recursion():
    space = SequenceSpace(("a", "b"), 5000, eos=False)
    tokens = torch.randint(2, (2, 5000), generator=torch.Generator().manual_seed(0))
    trie = PrefixTrie(space, tokens)
    assert torch.equal(trie.find(tokens)[1], trie.edge_of)
    assert len(trie.depth_edges) == 5001


def test_a_trie_moves_and_saves_without_weights_of_its_own():
    trie = PrefixTrie(SequenceSpace(("a", "b"), 2, eos=False), torch.tensor([[0, 1], [1, 1]]))
    assert not trie.state_dict()
    assert {name for name, _ in trie.named_buffers()} >= {
        "node_of",
        "edge_of",
        "parent",
        "token",
        "child",
        "leaf",
        "first_edge",
    }
