"""Closed forms against the Jacobians that autograd gives, edge by edge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klrl_edu.audit import coordinates
from klrl_edu.audit.audit import audit_gradient
from klrl_edu.audit.coordinates import NetworkParameters, PrefixLogits, SequenceLogits
from klrl_edu.core.errors import TooLargeError
from klrl_edu.learning import losses
from klrl_edu.models.contract import token_log_probs
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.examples import four_sentences
from klrl_edu.testing import policies, problems, sequence_tables, spaces
from tests.audit.scenes import answers, binary, k2_loss, random_prefix_table, tree_and_coordinates


def jacobian(policy, tree):
    """∂ log π(v|prefix)/∂θ, a row an edge [E,P], by one backward pass each."""
    log_probs = token_log_probs(policy, tree.tokens).reshape(-1)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    rows = []
    for place in tree.first_use.tolist():
        entry = log_probs[place]
        gradients = (
            torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
            if entry.requires_grad
            else parameters
        )
        rows.append(
            torch.cat(
                [
                    (gradient if entry.requires_grad else 0 * gradient.detach())
                    .reshape(-1)
                    .double()
                    for gradient in gradients
                ]
            )
        )
    return torch.stack(rows)


def assert_agrees_with_autograd(policy, kind):
    tree, seen = tree_and_coordinates(policy)
    assert type(seen) is kind
    expected = jacobian(policy, tree)
    index = torch.arange(tree.edges)
    gram = seen.kernel(index[:, None].expand(-1, tree.edges), index[None].expand(tree.edges, -1))
    assert torch.allclose(gram, expected @ expected.T, rtol=0, atol=1e-12)
    weights = torch.randn(
        3, tree.edges, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert torch.allclose(seen.combine(weights), weights @ expected, rtol=0, atol=1e-12)
    assert torch.allclose(
        seen.squared_norms(weights), (weights @ expected).square().sum(-1), rtol=1e-11, atol=1e-12
    )
    assert seen.size == expected.shape[1]


@settings(max_examples=40)
@given(data=st.data())
def test_sequence_logits_have_the_jacobian_of_autograd(data):
    assert_agrees_with_autograd(data.draw(spaces().flatmap(sequence_tables)), SequenceLogits)


@settings(max_examples=40)
@given(space=spaces(max_words=2), seed=st.integers(0, 99))
def test_prefix_logits_have_the_jacobian_of_autograd(space, seed):
    assert_agrees_with_autograd(random_prefix_table(space, seed), PrefixLogits)


@settings(max_examples=20)
@given(data=st.data())
def test_restricted_prefix_logits_have_the_jacobian_of_autograd(data):
    problem = data.draw(problems(max_words=2, forbid=False))
    policy = data.draw(policies(problem))
    assert_agrees_with_autograd(
        policy, SequenceLogits if isinstance(policy, SequenceTable) else PrefixLogits
    )


def test_prefixes_without_a_row_are_moved_by_nothing():
    space = answers().space
    assert_agrees_with_autograd(
        random_prefix_table(space, 0, space.encode(["a a", "b"])), PrefixLogits
    )


def test_a_table_in_another_order_with_dead_rows_keeps_its_own_order():
    space = answers().space
    table = SequenceTable(
        space,
        space.encode(["b a", "", "a", "b b", "a a"]),
        torch.tensor([0.3, -1.0, 0.2, -torch.inf, 2.0]),
    )
    assert_agrees_with_autograd(table, SequenceLogits)


def test_zero_logits_inside_a_prefix_table_are_no_edges():
    space = answers().space
    logits = torch.zeros(PrefixTable(space).logits.shape)
    logits[0, 1] = -torch.inf
    assert_agrees_with_autograd(PrefixTable(space, logits=logits), PrefixLogits)


@pytest.mark.parametrize("block", [1 << 25, 100, 1])
def test_a_network_streams_its_rows_in_blocks_and_says_what_it_costs(monkeypatch, block):
    monkeypatch.setattr(coordinates, "_BLOCK", block)
    monkeypatch.setattr(coordinates, "_FORWARD_ROWS", 2)
    policy = RecurrentModel(answers().space, hidden_size=2, seed=3)
    rows, plain = [], NetworkParameters.jacobian
    monkeypatch.setattr(
        NetworkParameters,
        "jacobian",
        lambda self, edges: (rows.append(len(edges)), plain(self, edges))[1],
    )
    assert_agrees_with_autograd(policy, NetworkParameters)
    assert max(rows) <= max(1, block // sum(parameter.numel() for parameter in policy.parameters()))
    report = audit_gradient(k2_loss, restrict_to_support(policy, answers().prior), answers())
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    assert f"edges × {parameters} parameters" in report.cost
    assert "backward passes through RestrictedModel" in report.cost


def test_a_network_whose_edges_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(coordinates, "_MAX_GRAM", 100)
    policy = restrict_to_support(
        RecurrentModel(answers().space, hidden_size=2, seed=3), answers().prior
    )
    with pytest.raises(TooLargeError, match=r"11 edges.*121 numbers.*PrefixTable.from_model"):
        audit_gradient(k2_loss, policy, answers())


def test_subclasses_of_tables_and_restricted_sequence_tables_take_the_general_way():
    class Doubled(SequenceTable):
        pass

    table = four_sentences().prior
    assert (
        type(tree_and_coordinates(Doubled(table.space, table.tokens, table.logits.detach()))[1])
        is NetworkParameters
    )
    assert (
        type(tree_and_coordinates(restrict_to_support(four_sentences().prior, table))[1])
        is NetworkParameters
    )


def test_table_network_and_brute_force_agree_on_mean_and_variance():
    """The same policy as a table (closed form, Gram path) and behind a wrapper (backward passes); g
    of each batch summed for the oracle.
    """
    policy, problem = binary(4)

    class Wrapped(PrefixTable):
        pass

    wrapped = Wrapped(policy.space, None, policy.logits.detach())
    for loss, size in ((losses.reinforce, 1), (losses.rloo, 2)):
        table, network = (
            audit_gradient(loss, model, problem, batch_size=size) for model in (policy, wrapped)
        )
        assert table.cost is None
        assert network.cost is not None
        assert torch.allclose(table.mean, network.mean, rtol=0, atol=1e-12)
        assert table.variance == pytest.approx(network.variance, rel=1e-11)
        assert all(
            torch.allclose(table.targets[name], network.targets[name], rtol=0, atol=1e-12)
            for name in table.targets
        )
