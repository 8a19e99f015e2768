"""Every kind of reward, against values written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.problems.rewards import (
    add,
    count_reward,
    length_reward,
    regex_reward,
    reward_name,
    scale,
    table_reward,
    text_reward,
    token_reward,
)
from klrl_edu.testing import check_causal_reward, spaces

SPACE = SequenceSpace(("a", "b", "c"), 4)
TEXTS = ["", "a", "b a", "a b a", "c c c"]
TOKENS = SPACE.encode(TEXTS)
INF = math.inf


def values(reward):
    return reward(TOKENS, None).tolist()


# --- rewards of a text ----------------------------------------------------------------------------


def test_a_function_of_the_text_is_called_once_a_distinct_text():
    calls = []

    def words(text):
        calls.append(text)
        return len(text.split())

    reward = text_reward(words, SPACE)
    again = torch.cat([TOKENS, TOKENS])
    assert reward(again, None).tolist() == [0, 1, 2, 3, 3] * 2
    assert reward(TOKENS[2:3], None).tolist() == [2]
    assert sorted(calls) == sorted(TEXTS)
    assert reward_name(reward) == "words"


@pytest.mark.parametrize("bad", [None, "high", [1.0], object()])
def test_a_text_reward_that_is_no_number_names_text_and_value(bad):
    with pytest.raises(
        InputError,
        match=r"judge of 'b a' = .* is not a number; the function must return one float a text",
    ):
        text_reward(lambda text: bad if text == "b a" else 0.0, SPACE, "judge")(TOKENS, None)


def test_a_table_gives_its_values_and_the_default_elsewhere():
    table = {"a": 1.5, " b   a ": -INF, "": 2}
    assert values(table_reward(table, SPACE, default=-1.0)) == [2, 1.5, -INF, -1, -1]
    assert math.isnan(values(table_reward(table, SPACE))[3])


def test_a_table_with_an_unknown_word_or_one_text_twice_is_refused():
    with pytest.raises(InputError, match="word 'd' is not in the vocabulary"):
        table_reward({"a d": 1.0}, SPACE)
    with pytest.raises(InputError, match="one text twice"):
        table_reward({"a b": 1.0, "a  b": 2.0}, SPACE)
    accents = SequenceSpace(("é",), 2)
    with pytest.raises(InputError, match="one text twice"):
        table_reward({"é": 1.0, "e\u0301": 2.0}, accents)


def test_a_regular_expression_is_searched_anywhere():
    assert values(regex_reward("a$", SPACE)) == [0, 1, 1, 1, 0]
    assert values(regex_reward("^(a|c)", SPACE, value=2.0, otherwise=-INF)) == [-INF, 2, -INF, 2, 2]
    assert reward_name(regex_reward("a$", SPACE)) == "1 where /a$/ matches, else 0"


@pytest.mark.parametrize(("pattern", "position"), [("(a", 0), ("a**", 2), ("[z-a]", 1)])
def test_a_broken_regular_expression_shows_where(pattern, position):
    with pytest.raises(
        InputError, match=rf"is not a regular expression: .* at position {position}\."
    ):
        regex_reward(pattern, SPACE)


# --- rewards a token ------------------------------------------------------------------------------


def test_each_live_token_earns_its_own_value():
    assert values(token_reward({"a": 1.0, "c": -0.5}, SPACE)) == [
        [0] * 4,
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 1, 0],
        [-0.5, -0.5, -0.5, 0],
    ]
    with_end = token_reward([0.0, 0.0, 0.0, 7.0], SPACE)
    assert values(with_end) == [
        [7, 0, 0, 0],
        [0, 7, 0, 0],
        [0, 0, 7, 0],
        [0, 0, 0, 7],
        [0, 0, 0, 7],
    ]


def test_counts_and_lengths():
    assert torch.tensor(values(count_reward("a", SPACE, 0.5))).sum(-1).tolist() == [
        0,
        0.5,
        0.5,
        1,
        0,
    ]
    assert torch.tensor(values(length_reward(SPACE, -2.0))).sum(-1).tolist() == [0, -2, -4, -6, -6]
    fixed = SequenceSpace(("a", "b"), 2, eos=False)
    assert length_reward(fixed)(fixed.encode(["a b"]), None).tolist() == [[1, 1]]


@given(data=st.data())
def test_token_rewards_are_causal(data):
    space = data.draw(spaces())
    numbers = data.draw(
        st.lists(
            st.sampled_from((0.0, 1.0, -2.5, -INF)),
            min_size=space.vocab_size,
            max_size=space.vocab_size,
        )
    )
    check_causal_reward(token_reward(numbers, space), space)
    check_causal_reward(add(count_reward("a", space), length_reward(space, 0.5)), space)
    check_causal_reward(scale(length_reward(space), -3.0), space)


def test_unknown_words_and_a_wrong_number_of_values_are_refused():
    with pytest.raises(InputError, match=r"words \['d'\], which are not in the vocabulary"):
        token_reward({"a": 1.0, "d": 2.0}, SPACE)
    with pytest.raises(InputError, match=r"values has 3 entries; expected V = 4"):
        token_reward([1.0, 2.0, 3.0], SPACE)


# --- sums -----------------------------------------------------------------------------------------


def test_causal_rewards_add_to_a_causal_one_and_others_to_whole_sequences():
    causal = add(count_reward("a", SPACE), length_reward(SPACE))
    assert values(causal)[3] == [2, 1, 2, 0]
    mixed = add(count_reward("a", SPACE), regex_reward("b", SPACE, 10.0))
    assert values(mixed) == [0, 1, 11, 12, 0]
    assert reward_name(mixed).startswith("1·(TokenReward) + 1·(10 where /b/")


def test_zero_times_forbidden_is_nothing():
    hard = regex_reward("a", SPACE, -INF)
    assert values(scale(hard, 0.0)) == [0, 0, 0, 0, 0]
    assert values(scale(hard, 2.0)) == [0, -INF, -INF, -INF, 0]
    assert values(scale(hard, -1.0)) == [0, INF, INF, INF, 0]
    assert values(add(hard, length_reward(SPACE))) == [0, -INF, -INF, -INF, 3]
    assert values(add(scale(hard, 0.0), length_reward(SPACE))) == [0, 1, 2, 3, 3]


def test_sums_nest():
    total = scale(add(scale(length_reward(SPACE), 2.0), count_reward("c", SPACE, -1.0)), 0.5)
    assert torch.tensor(values(total)).sum(-1).tolist() == [0, 1, 2, 3, 1.5]


@pytest.mark.parametrize("factor", [math.nan, INF, -INF])
def test_a_factor_must_be_finite(factor):
    with pytest.raises(InputError, match="must be finite"):
        scale(length_reward(SPACE), factor)


def test_adding_nothing_is_refused():
    with pytest.raises(InputError, match="at least one reward"):
        add()
