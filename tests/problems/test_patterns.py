"""The automaton of a pattern accepts what Python's `re.search` finds."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.problems import patterns as patterns_module
from klrl_edu.problems.patterns import regular_expression
from klrl_edu.problems.rewards import regex_reward

CHARACTERS = SequenceSpace(("a", "b", "1"), 5, separator="")
WORDS = SequenceSpace(("ab", "a", "b1"), 4)
FIXED = SequenceSpace(("a", "b"), 3, eos=False, separator="")

atoms = st.sampled_from(
    ["a", "b", "1", ".", "[ab]", "[^a]", r"\d", r"\w", r"\s", r"\D", " ", "[a-b1]"]
)
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(
            inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,1}", "{1,}", "*?"])
        ).map(lambda pair: f"({pair[0]}){pair[1]}"),
    ),
    max_leaves=5,
)
anchored = st.tuples(st.sampled_from(["", "^"]), patterns, st.sampled_from(["", "$"])).map("".join)


def agrees(pattern, space):
    tokens = space.all_tokens()
    expected = [re.search(pattern, text) is not None for text in space.decode(tokens)]
    assert regular_expression(pattern, space).accepts(tokens).tolist() == expected, pattern


@given(anchored)
def test_it_accepts_what_search_finds_in_characters(pattern):
    agrees(pattern, CHARACTERS)


@given(anchored)
def test_it_accepts_what_search_finds_in_words_with_spaces_between(pattern):
    agrees(pattern, WORDS)


@pytest.mark.parametrize("space", [CHARACTERS, WORDS, FIXED], ids=["characters", "words", "fixed"])
@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "^$",
        "^",
        "$",
        "^a|b$",
        "a|",
        "(^a|b)*1",
        "a$|^b",
        "()",
        "[^b]$",
        r"\Aa",
        r"a\Z",
        "^(ab )*a$",
        "a{3}",
        "(a|b){2,3}$",
    ],
)
def test_anchors_and_empty_parts_hold_as_in_python(pattern, space):
    agrees(pattern, space)


def test_a_letter_that_can_be_spelled_two_ways_is_one():
    space = SequenceSpace(
        ("e\u0301", "a"), 3, separator=""
    )  # e and a combining accent: the vocabulary holds its composed form
    agrees("\u00e9a", space)


def test_it_agrees_with_the_reward_of_the_same_pattern():
    tokens = CHARACTERS.all_tokens()
    assert (
        regular_expression("a1|b$", CHARACTERS).accepts(tokens).double().tolist()
        == regex_reward("a1|b$", CHARACTERS)(tokens).tolist()
    )


@pytest.mark.parametrize(
    ("pattern", "place"),
    [
        ("a(?=b)", r"position 1 \('\(\?='\)"),
        ("ab(?!b)", "position 2"),
        ("(?<=a)b", "position 0"),
        (r"(a)\1", "position 3"),
        (r"a\b", "position 1"),
        ("(?i)a", "position 0"),
        ("b(?i:a)", "position 1"),
        ("a(", "position 1"),
        ("a**", "position 2"),
        ("(?>a)", "position 0"),
        ("a*+b", "position 1"),
    ],
)
def test_what_is_not_supported_or_does_not_compile_is_refused_with_its_place(pattern, place):
    with pytest.raises(InputError, match=place):
        regular_expression(pattern, CHARACTERS)


def test_too_long_repeats_are_refused():
    with pytest.raises(TooLargeError, match="repeats up to 2000 times"):
        regular_expression("a{0,2000}", CHARACTERS)


LINES = SequenceSpace(("a", "\n"), 4, separator="")
LINE_ENDS = SequenceSpace(("a", "b\n", "\n"), 3)


@pytest.mark.parametrize("space", [LINES, LINE_ENDS], ids=["characters", "words"])
@pytest.mark.parametrize(
    "pattern",
    [
        "a$",
        "^$",
        "$",
        r"a\Z",
        "a$\n",
        "$\n",
        "(a|\n)$",
        "(a$)\n$",
        "$a",
        "$^",
        "(\n|a)*$",
        "\n$",
        r"$\n\Z",
    ],
)
def test_a_dollar_holds_before_the_newline_that_ends_a_text(pattern, space):
    agrees(pattern, space)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("ab" * 5000, "more than 20,000 steps"),
        ("(" * 5000 + "a" + ")" * 5000, "too deep or too long"),
        ("a{1,99999999999999}", "too deep or too long"),
        (3, "pattern is the number 3; expected a text"),
        (b"a", "expected a text"),
    ],
)
def test_patterns_that_would_take_forever_are_refused_in_one_line(pattern, message, monkeypatch):
    monkeypatch.setattr(patterns_module, "_MOST_WORK", 20_000)
    for make in (regular_expression, regex_reward):
        if message.startswith("more than") and make is regex_reward:
            continue
        with pytest.raises(InputError, match=message) as refusal:
            make(pattern, FIXED)
        assert len(str(refusal.value)) < 300


def test_a_long_pattern_is_no_matter():
    word = "abbaab" * 50
    automaton = regular_expression(f"^{word}$", SequenceSpace(("a", "b"), 301, separator=""))
    assert len(automaton) == len(word) + 2  # one state a letter, the end, and all that is wrong
    tokens = automaton.space.encode([word, word[1:]])
    assert automaton.accepts(tokens).tolist() == [True, False]


def test_repeats_up_to_the_limit_are_unrolled_and_no_further(monkeypatch):
    monkeypatch.setattr(patterns_module, "_REPEAT_LIMIT", 3)
    agrees("^a{0,3}$", FIXED)
    with pytest.raises(TooLargeError, match="repeats up to 4 times; at most 3"):
        regular_expression("^a{0,4}$", FIXED)
