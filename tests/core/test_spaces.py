"""Sequence spaces against plain Python: counting, texts, liveness, checks."""

import itertools

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


@pytest.mark.parametrize(("word", "separator"), [("a b", " "), ("", " "), ("ab", ""), ("a,b", ",")])
def test_a_word_that_its_separator_would_split_is_refused(word, separator):
    with pytest.raises(InputError, match="splits at separator"):
        SequenceSpace((word,), 2, separator=separator)


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
