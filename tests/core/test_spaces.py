"""Sequence spaces against plain Python: counting, texts, liveness, checks."""

import ast
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.testing import spaces


def texts_of(space: SequenceSpace) -> list[str]:
    """Every text by itertools, shorter ones first."""
    lengths = range(space.max_length) if space.eos else [space.max_length]
    return [
        space.separator.join(words)
        for k in lengths
        for words in itertools.product(space.vocabulary, repeat=k)
    ]


@given(space=spaces(max_words=4, max_length=4))
def test_all_tokens_are_every_text_once(space):
    tokens = space.check_tokens(space.all_tokens())
    assert len(tokens) == space.size
    assert space.decode(tokens) == texts_of(space)


@given(space=spaces(max_words=4, max_length=4))
def test_encode_inverts_decode(space):
    tokens = space.all_tokens()
    assert torch.equal(space.encode(space.decode(tokens)), tokens)
    assert torch.equal(space.encode(space.decode(tokens)[-1]), tokens[-1])


@pytest.mark.parametrize("eos", [True, False])
def test_size_is_exact_where_int64_would_wrap(eos):
    space = SequenceSpace(tuple(map(str, range(50257))), 20, eos)
    assert space.size == (sum(50257**k for k in range(20)) if eos else 50257**20)
    assert space.size > 2**63


def test_a_space_too_large_to_list_says_its_exact_count():
    space = SequenceSpace(tuple(map(str, range(50257))), 20, eos=False)
    with pytest.raises(TooLargeError, match=f"{50257**20:,} sequences"):
        space.all_tokens()


def test_one_word_with_eos_makes_as_many_texts_as_positions():
    assert SequenceSpace(("a",), 5).size == 5


def test_live_includes_the_first_eos_and_nothing_after():
    space = SequenceSpace(("a", "b"), 4)
    tokens = torch.tensor([[0, 1, 2, 2], [2, 2, 2, 2], [0, 0, 0, 2]])
    assert space.live(tokens).int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_without_eos_every_token_is_live():
    assert SequenceSpace(("a", "b"), 2, eos=False).live(torch.tensor([[0, 1]])).all()


def test_a_word_that_stands_twice_is_refused_by_index():
    with pytest.raises(InputError, match=r"vocabulary\[2\] = 'a' appears twice"):
        SequenceSpace(("a", "b", "a"), 2)


def test_a_composed_and_a_decomposed_accent_are_one_word():
    with pytest.raises(InputError, match="appears twice"):
        SequenceSpace(("\u00e9", "e\u0301"), 2)
    space = SequenceSpace(("caf\u00e9",), 2)
    assert torch.equal(space.encode("cafe\u0301"), space.encode("caf\u00e9"))


def test_from_texts_normalises_before_it_splits_into_characters():
    space = SequenceSpace.from_texts(["\u00e9", "e\u0301a"], separator="")
    assert space.vocabulary == ("\u00e9", "a")


@pytest.mark.parametrize("separator", [" ", "", ","])
def test_an_empty_word_is_refused(separator):
    with pytest.raises(InputError, match=r"vocabulary\[1\] = '' is empty"):
        SequenceSpace(("a", ""), 2, separator=separator)


@pytest.mark.parametrize(
    ("vocabulary", "separator"),
    [
        ((" the", " th", "e", "a"), ""),  # byte-pair tokens
        (("ab", "a", "b"), ""),
        (("a b", "a", "b"), " "),
        (("a,b", "a", "b"), ","),
    ],
)
def test_words_that_run_together_decode_always_and_encode_where_one_sequence_spells_the_text(
    vocabulary, separator
):
    """Every sequence of the space: a text to which two sequences decode is ambiguous, and two are
    named; any other comes back.
    """
    space = SequenceSpace(vocabulary, 4, separator=separator)
    tokens = space.all_tokens()
    texts = space.decode(tokens)
    assert space.spelled
    assert len(set(texts)) < len(texts)
    for row, text in zip(tokens.tolist(), texts, strict=True):
        if texts.count(text) == 1:
            assert space.encode(text).tolist() == row
            continue
        with pytest.raises(InputError, match=r"is ambiguous: .* both spell it") as refused:
            space.encode(text)
        named = re.findall(r"\['[^\]]*\]", str(refused.value).partition("ambiguous")[2])
        first, second = map(ast.literal_eval, named)
        assert first != second
        assert separator.join(first) == separator.join(second) == text
    with pytest.raises(InputError, match="is not spelled by at most 3 words"):
        space.encode("xyz")


def test_tokens_of_a_tokenizer_are_a_vocabulary_with_the_separator_that_words_have_by_default():
    space = SequenceSpace((" the", "a"), 2)
    assert space.decode(space.all_tokens()) == ["", " the", "a"]
    assert space.encode([" the", "a"]).tolist() == [[0, 2], [1, 2]]
    with pytest.raises(InputError, match="not spelled by at most 1 words"):
        space.encode("the")


def test_exactly_t_words_spell_a_text_where_there_is_no_end():
    space = SequenceSpace(("a", "aa"), 2, eos=False, separator="")
    assert space.encode("aaaa").tolist() == [1, 1]
    assert space.encode("aa").tolist() == [0, 0]
    with pytest.raises(InputError, match=r"'aaa' is ambiguous"):
        space.encode("aaa")
    with pytest.raises(InputError, match="not spelled by exactly 2 words"):
        space.encode("a")


def test_a_long_text_of_repeated_tokens_is_answered_at_once():
    """Tried one by one, its 2^100 spellings would take for ever."""
    space = SequenceSpace(("a", "aa"), 201, separator="")
    with pytest.raises(InputError, match="ambiguous"):
        space.encode("a" * 150)
    with pytest.raises(InputError, match="not spelled"):
        space.encode("a" * 150 + "b")


def test_a_prompt_as_text_has_any_length_and_comes_back():
    space = SequenceSpace(("a", "b"), 2)
    assert space.encode_prompt("a b b a b").tolist() == [0, 1, 1, 0, 1]
    assert space.encode_prompt("").tolist() == []
    assert space.decode_prompt(torch.tensor([-1, -1, 0, 1])) == "a b"
    assert space.decode_prompt([1, 2]) == "b <2>"
    with pytest.raises(InputError, match="word 'c' is not in the vocabulary"):
        space.encode_prompt("a c")


def test_an_empty_vocabulary_and_a_length_of_zero_are_refused():
    with pytest.raises(InputError, match="vocabulary is empty"):
        SequenceSpace((), 2)
    with pytest.raises(InputError, match="max_length = 0"):
        SequenceSpace(("a",), 0)


def test_from_texts_takes_eos_only_where_lengths_differ():
    same, mixed = (
        SequenceSpace.from_texts(["a b", "b b"]),
        SequenceSpace.from_texts(["a b", "b", ""]),
    )
    assert (same.eos, same.max_length, same.size) == (False, 2, 4)
    assert (mixed.eos, mixed.max_length, mixed.vocabulary) == (True, 3, ("a", "b"))
    assert SequenceSpace.from_texts(["a b"], eos=True).max_length == 3


@pytest.mark.parametrize("texts", [[], [""], ["", " "]])
def test_from_texts_without_a_word_is_refused(texts):
    with pytest.raises(InputError):
        SequenceSpace.from_texts(texts)


def test_an_unknown_word_and_a_wrong_length_are_refused_by_text():
    space = SequenceSpace(("a", "b"), 2, eos=False)
    with pytest.raises(InputError, match="'a c': word 'c' is not in the vocabulary"):
        space.encode("a c")
    with pytest.raises(InputError, match="has 1 words; this space takes exactly 2"):
        space.encode("a")
    with pytest.raises(InputError, match="has 2 words; this space takes at most 1"):
        SequenceSpace(("a", "b"), 2).encode("a b")


@given(space=spaces(eos=True, max_length=4), data=st.data())
def test_check_tokens_accepts_exactly_the_sequences_of_the_space(space, data):
    row = data.draw(
        st.lists(
            st.integers(-1, space.vocab_size), min_size=space.max_length, max_size=space.max_length
        )
    )
    if row in space.all_tokens().tolist():
        space.check_tokens(torch.tensor([row]))
    else:
        with pytest.raises(InputError, match=r"tokens\[0, \d\] = -?\d does not belong"):
            space.check_tokens(torch.tensor([row]))


def test_check_tokens_refuses_shapes_and_floats():
    space = SequenceSpace(("a", "b"), 2, eos=False)
    with pytest.raises(InputError, match=r"tokens has shape \[1, 3\]; expected \[N, 2\]"):
        space.check_tokens(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(InputError, match="dtype"):
        space.check_tokens(torch.zeros(1, 2))


def test_the_repr_of_a_huge_space_is_short():
    assert len(repr(SequenceSpace(tuple(map(str, range(50257))), 20))) < 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("abc", 3), "vocabulary = 'abc' must be a list of words"),
        ((("a", 1), 3), "must be a list of words, each a text"),
        ((("a",), 3, True, None), "separator = None must be a text"),
        ((("a",), 3, 1), "eos = 1 must be True"),
        ((("a", "b"), 10**30), "max_length = about 10.30 is too large; at most 1,000,000"),
    ],
)
def test_arguments_of_another_kind_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        SequenceSpace(*arguments)


def test_a_size_that_python_does_not_write_out_is_refused_all_the_same():
    long = SequenceSpace(("a", "b"), 20_000, eos=False)
    assert long.size == 2**20_000
    with pytest.raises(TooLargeError, match=r"holds about 10\^6020 sequences"):
        long.all_tokens()


def test_a_list_of_few_sequences_may_be_too_long_for_the_memory():
    with pytest.raises(TooLargeError, match="all 200,000 sequences of 200,000 tokens take"):
        SequenceSpace(("a",), 200_000).all_tokens()
