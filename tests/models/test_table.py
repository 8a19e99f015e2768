"""Tables: masses, gradients in their coordinates, dead prefixes, refusals, saving."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.core.errors import InfeasibleError, InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.contract import conditional_log_probs, sequence_log_probs, token_log_probs
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.testing import sequence_tables, spaces
from tests.models.toys import BigramToy, words

INF = math.inf
FOUR = {"the cat": 0.4, "the dog": 0.3, "a cat": 0.2, "a dog": 0.1}


# SequenceTable


@given(space=spaces(max_length=4), data=st.data())
def test_a_sequence_table_gives_each_row_its_probability_and_everything_else_zero(space, data):
    table = data.draw(sequence_tables(space))
    tokens = space.all_tokens()
    rows = dict(
        zip(map(tuple, table.tokens.tolist()), table.logits.softmax(0).tolist(), strict=True)
    )
    expected = [rows.get(tuple(row), 0.0) for row in tokens.tolist()]
    assert sequence_log_probs(table, tokens).exp().tolist() == pytest.approx(
        expected, rel=1e-12, abs=0
    )
    assert table.log_probs.exp().tolist() == pytest.approx(list(rows.values()), rel=1e-13, abs=0)


@given(space=spaces(max_length=4), data=st.data())
def test_token_log_probs_of_a_table_are_those_of_its_conditionals_extremes_included(space, data):
    table = data.draw(sequence_tables(space, extremes=True))
    tokens = space.all_tokens()
    conditional = conditional_log_probs(table, tokens)
    assert not conditional.isnan().any()
    expected = conditional.gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(token_log_probs(table, tokens), expected, rtol=1e-12, atol=1e-12)


def test_conditionals_of_the_four_sentences_are_ratios_of_masses():
    table = SequenceTable.from_texts(FOUR)
    the, a, cat = (table.space.word_ids[word] for word in ("the", "a", "cat"))
    log_probs = conditional_log_probs(table, table.space.encode(["the cat", "a cat"]))
    assert log_probs[0, 0, [the, a, cat]].exp().tolist() == pytest.approx(
        [0.7, 0.3, 0.0], rel=1e-14
    )
    assert log_probs[:, 1, cat].exp().tolist() == pytest.approx([4 / 7, 2 / 3], rel=1e-14)


def test_the_gradient_of_a_sequence_log_prob_in_sequence_logits_is_one_hot_minus_probabilities():
    table = SequenceTable.from_texts(FOUR)
    for row in range(4):
        (gradient,) = torch.autograd.grad(
            sequence_log_probs(table, table.tokens[row : row + 1]).sum(), table.logits
        )
        expected = torch.eye(4, dtype=torch.float64)[row] - torch.tensor(
            list(FOUR.values()), dtype=torch.float64
        )
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-14)


@given(space=spaces(max_length=4), data=st.data())
def test_gradients_of_both_routes_agree_and_stay_finite_where_mass_is_zero(space, data):
    table = data.draw(sequence_tables(space))
    tokens = table.tokens[table.log_probs > -INF]
    weight = torch.linspace(-1, 2, len(tokens), dtype=torch.float64)
    direct, conditional = (
        token_log_probs(table, tokens).sum(-1),
        conditional_log_probs(table, tokens).gather(-1, tokens[..., None]).sum((1, 2)),
    )
    one, two = (
        torch.autograd.grad((weight * route).sum(), table.logits)[0]
        for route in (direct, conditional)
    )
    p = table.log_probs.detach().exp()
    expected = torch.zeros_like(p).index_put((p > 0,), weight) - p * weight.sum()
    for gradient in (one, two):
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-13)


def test_a_dead_prefix_has_uniform_logits_and_mass_exactly_zero():
    table = SequenceTable.from_texts({"a a": 1.0, "b a": 0.0, "b b": 0.0})
    tokens = table.space.encode(["b a", "b b"])
    assert conditional_log_probs(table, tokens)[:, 1].exp().flatten().tolist() == pytest.approx(
        [0.5] * 4, rel=1e-15
    )
    assert sequence_log_probs(table, tokens).exp().tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(
        conditional_log_probs(table, tokens)[:, 1].sum(), table.logits
    )
    assert torch.isfinite(gradient).all()


def test_a_zero_probability_is_minus_inf_where_torch_says_minus_sixteen():
    assert (
        torch.distributions.Categorical(probs=torch.tensor([0.0, 1.0]))
        .log_prob(torch.tensor(0))
        .item()
        > -17
    )
    table = SequenceTable.from_texts({"a": 0.0, "b": 1.0})
    assert sequence_log_probs(table, table.tokens).tolist() == [-INF, 0.0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_tables_of_many_nodes_read_narrow_integers(dtype):
    space = words(16, 3, eos=False)
    tokens = space.all_tokens()
    for table in (
        SequenceTable(space, tokens, torch.linspace(0, 9, len(tokens))),
        PrefixTable.from_model(BigramToy(space)),
    ):
        assert torch.equal(
            sequence_log_probs(table, tokens.to(dtype)), sequence_log_probs(table, tokens)
        )


def test_logits_of_e_to_the_800_keep_their_ratios():
    space = words(2, 2, eos=False)
    table = SequenceTable(space, space.all_tokens(), torch.tensor([800.0, 800.0, -800.0, -INF]))
    assert sequence_log_probs(table, space.all_tokens()).tolist() == pytest.approx(
        [-math.log(2)] * 2 + [-1600 - math.log(2), -INF], rel=1e-12
    )


def test_a_text_that_stands_twice_is_refused_or_summed():
    with pytest.raises(InputError, match="texts hold 'a b' twice"):
        SequenceTable.from_texts(["a b", "b a", "a b"], [0.25, 0.5, 0.25])
    table = SequenceTable.from_texts(["a b", "b a", "a b"], [0.2, 0.5, 0.3], merge="sum")
    assert table.space.decode(table.tokens) == ["a b", "b a"]
    assert table.log_probs.exp().tolist() == pytest.approx([0.5, 0.5], rel=1e-14)


def test_one_text_in_two_normal_forms_is_a_duplicate():
    with pytest.raises(InputError, match="twice"):
        SequenceTable.from_texts(["\u00e9", "e\u0301"], [0.5, 0.5])


def test_duplicate_token_rows_are_refused():
    with pytest.raises(InputError, match="tokens hold 'b' twice"):
        SequenceTable(words(2, 1, eos=False), torch.tensor([[0], [1], [1]]), torch.zeros(3))


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_logits_of_nan_or_inf_are_refused_by_index(bad):
    space = words(2, 2, eos=False)
    with pytest.raises(InputError, match=rf"logits\[1\] = {bad}"):
        SequenceTable(space, space.all_tokens()[:2], torch.tensor([0.0, bad]))
    with pytest.raises(InputError, match=rf"logits\[2, 1\] = {bad}"):
        PrefixTable(space, None, torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, bad]]))


def test_a_table_without_sequences_or_without_mass_is_refused():
    space = words(2, 2, eos=False)
    with pytest.raises(InputError, match="no sequence"):
        SequenceTable(space, space.all_tokens()[:0], torch.zeros(0))
    with pytest.raises(InfeasibleError):
        SequenceTable(space, space.all_tokens()[:1], torch.tensor([-INF]))


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ([0.5], "give one probability a text"),
        ([0.6, 0.6], "sum to 1.2"),
        ([1.1, -0.1], r"probs\[1\] = -0.1 is negative"),
    ],
)
def test_bad_probabilities_of_texts_are_refused(probs, message):
    with pytest.raises(InputError, match=message):
        SequenceTable.from_texts(["a", "b"], probs)


def test_state_of_other_sequences_is_refused():
    one, two = (
        SequenceTable.from_texts({"a b": 0.5, "b a": 0.5}),
        SequenceTable.from_texts({"a b": 0.5, "b b": 0.5}),
    )
    with pytest.raises((InputError, RuntimeError), match="other sequences"):
        two.load_state_dict(one.state_dict())


def test_a_table_of_depth_5000_needs_no_recursion():
    space = SequenceSpace(("a", "b"), 5000, eos=False)
    tokens = torch.randint(2, (2, 5000), generator=torch.Generator().manual_seed(0))
    table = SequenceTable(space, tokens, torch.log(torch.tensor([0.25, 0.75], dtype=torch.float64)))
    assert sequence_log_probs(table, tokens).exp().tolist() == pytest.approx(
        [0.25, 0.75], rel=1e-11
    )


# PrefixTable


@pytest.mark.parametrize("eos", [True, False])
def test_a_prefix_table_of_a_model_is_that_model(eos):
    model = BigramToy(words(3, 3, eos))
    table = PrefixTable.from_model(model)
    tokens = model.space.all_tokens()
    assert torch.allclose(
        conditional_log_probs(table, tokens),
        conditional_log_probs(model, tokens),
        rtol=0,
        atol=1e-14,
    )


@given(space=spaces(max_length=4), data=st.data())
def test_a_prefix_table_of_a_table_with_zeros_is_that_table(space, data):
    table = data.draw(sequence_tables(space, extremes=True))
    tokens = space.all_tokens()
    copy = PrefixTable.from_model(table)
    assert torch.allclose(
        sequence_log_probs(copy, tokens), sequence_log_probs(table, tokens), rtol=1e-12, atol=1e-12
    )


def test_a_prefix_table_has_a_row_of_logits_a_live_prefix_and_the_rest_is_uniform():
    space = words(2, 3)
    assert PrefixTable(space).logits.shape == (1 + 2 + 4, 3)
    table = PrefixTable(
        space,
        space.encode(["a a"]),
        torch.tensor([[0.0, -INF, -INF], [-INF, -INF, 0.0], [0.0, 0.0, 0.0]]),
    )
    assert sequence_log_probs(table, space.encode(["a", "a a", "b"])).tolist() == [0.0, -INF, -INF]
    assert conditional_log_probs(table, space.encode(["b b"]))[
        0, 1
    ].exp().tolist() == pytest.approx([1 / 3] * 3, rel=1e-15)


def test_a_row_of_minus_inf_is_uniform_where_nothing_reaches_it_and_refused_where_something_does():
    space = words(2, 2, eos=False)
    table = PrefixTable(space, None, torch.tensor([[0.0, -INF], [0.0, 0.0], [-INF, -INF]]))
    tokens = space.encode(["b a", "b b"])
    log_probs = conditional_log_probs(table, tokens)
    assert log_probs[:, 1].exp().flatten().tolist() == pytest.approx([0.5] * 4, rel=1e-15)
    assert sequence_log_probs(table, tokens).tolist() == [-INF, -INF]
    (gradient,) = torch.autograd.grad(log_probs[:, 1].sum(), table.logits)
    assert not gradient.isnan().any()
    with pytest.raises(InputError, match=r"logits\[2\] are all -inf at a prefix that has mass"):
        PrefixTable(space, None, torch.tensor([[0.0, 0.0], [0.0, 0.0], [-INF, -INF]]))
    with pytest.raises(InputError, match=r"logits\[0\] are all -inf"):
        PrefixTable(space, None, torch.full((3, 2), -INF))


def test_logits_that_become_nan_show_as_nan():
    table = PrefixTable(words(2, 2, eos=False))
    with torch.no_grad():
        table.logits[0] = math.nan
    assert conditional_log_probs(table, table.space.all_tokens())[:, 0].isnan().all()


def test_logits_of_a_wrong_shape_are_refused():
    with pytest.raises(InputError, match=r"expected \[prefixes, V\] = \[3, 2\]"):
        PrefixTable(words(2, 2, eos=False), None, torch.zeros(2, 2))


def test_the_gradient_in_prefix_logits_is_one_hot_minus_conditionals_at_each_prefix():
    model = PrefixTable.from_model(BigramToy(words(2, 2, eos=False)))
    (gradient,) = torch.autograd.grad(
        sequence_log_probs(model, torch.tensor([[1, 0]])).sum(), model.logits
    )
    conditional = model.logits.detach().softmax(-1)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    expected[0] = torch.tensor([0.0, 1.0], dtype=torch.float64) - conditional[0]
    expected[2] = torch.tensor([1.0, 0.0], dtype=torch.float64) - conditional[2]
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-15)
