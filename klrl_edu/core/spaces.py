"""A finite set of token sequences.

W words have ids 0 … W−1. With `eos`, id W is the end of a sequence: it is absorbing (every later
token is EOS again, with log-probability 0; there is no PAD) and forced at position T, so a space
holds Σ_{k<T} W^k texts of 0 … T−1 words. Without it every sequence has exactly T words. V = W + eos
columns of logits; tokens are [N, T] integers.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from klrl_edu.core.display import readable_count
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.validation import brief, check_count, check_entries

MAX_LENGTH = 1_000_000


@dataclass(frozen=True)
class SequenceSpace:
    """All sequences over a vocabulary up to a length.

    Args:
        vocabulary: the words, NFC-normalised, each once; ids 0 … W−1 in this order.
        max_length: T, counting the EOS when there is one.
        eos: True for texts of varying length, False for exactly T words.
        separator: between the words of a text; "" makes every character a word.

    Words may hold the separator, or with "" be longer than a character, as byte-pair tokens such as
    " the" are: the space is then `spelled`, and a text is split by trying which words spell it.
    Decoding always works; encoding refuses a text that several sequences of words spell.
    """

    vocabulary: tuple[str, ...]
    max_length: int
    eos: bool = True
    separator: str = " "

    def __post_init__(self) -> None:
        self._check_kinds()
        # one text, one spelling: "é" is one character, not an e and its accent
        vocabulary = tuple(unicodedata.normalize("NFC", word) for word in self.vocabulary)
        object.__setattr__(self, "vocabulary", vocabulary)
        check_count(self.max_length, "max_length", maximum=MAX_LENGTH)
        if not self.vocabulary:
            raise InputError("vocabulary is empty; give at least one word.")
        seen: set[str] = set()
        for index, word in enumerate(self.vocabulary):
            if word in seen:
                raise InputError(
                    f"vocabulary[{index}] = {word!r} appears twice (after NFC normalisation); list"
                    " each word once."
                )
            if not word:
                raise InputError(
                    f"vocabulary[{index}] = '' is empty; EOS is no word (eos=True adds it), so"
                    " remove it."
                )
            seen.add(word)

    def _check_kinds(self) -> None:
        vocabulary: object = self.vocabulary  # a text would pass as a tuple of its characters
        if isinstance(vocabulary, str) or not all(isinstance(w, str) for w in self.vocabulary):
            raise InputError(
                f"vocabulary = {brief(self.vocabulary)} must be a list of words, each a text."
            )
        if not isinstance(self.eos, bool):
            raise InputError(
                f"eos = {brief(self.eos)} must be True (texts of varying length) or False."
            )
        if not isinstance(self.separator, str):
            raise InputError(f"separator = {brief(self.separator)} must be a text, such as ' '.")

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], *, separator: str = " ", eos: bool | None = None
    ) -> "SequenceSpace":
        """The smallest space that holds `texts`, its words in order of appearance.

        It has EOS only where the lengths differ, unless `eos` says.
        """
        if not texts:
            raise InputError("texts is empty; give at least one text.")
        # the separator alone decides here: there is no vocabulary yet to spell with
        split = [_split(unicodedata.normalize("NFC", text), separator) for text in texts]
        lengths = {len(words) for words in split}
        # texts of one length need no EOS, but a lone empty text is made of nothing else
        with_eos = len(lengths) > 1 or lengths == {0} if eos is None else eos
        vocabulary = tuple(dict.fromkeys(word for words in split for word in words))
        if not vocabulary:
            raise InputError("texts hold no words; give at least one text that is not empty.")
        return cls(vocabulary, max(lengths) + with_eos, with_eos, separator)

    @property
    def vocab_size(self) -> int:
        """V: the words and, with `eos`, the EOS."""
        return len(self.vocabulary) + self.eos

    @property
    def eos_id(self) -> int | None:
        """The id of EOS, or None where every sequence has exactly T words."""
        return len(self.vocabulary) if self.eos else None

    @property
    def size(self) -> int:
        """How many sequences there are, as an exact Python int."""
        words, length = len(self.vocabulary), self.max_length
        if not self.eos:
            return words**length
        # Σ_{k<T} W^k, a geometric series but for W = 1
        return length if words == 1 else (words**length - 1) // (words - 1)

    @cached_property
    def spelled(self) -> bool:
        """Whether words are found by spelling, as the separator alone does not tell them apart."""
        return any(_split(word, self.separator) != [word] for word in self.vocabulary)

    @cached_property
    def word_ids(self) -> dict[str, int]:
        """Word -> id."""
        return {word: index for index, word in enumerate(self.vocabulary)}

    def in_short(self) -> str:
        """The numbers of words and tokens, for the line that describes a model."""
        ends = "EOS" if self.eos else "no EOS"
        return f"{len(self.vocabulary):,} words, T = {self.max_length}, {ends}"

    def __repr__(self) -> str:
        count = len(self.vocabulary)
        words = ", ".join(map(repr, self.vocabulary[:4])) + (", …" if count > 4 else "")
        ends = "EOS" if self.eos else "no EOS"
        return f"SequenceSpace({count} words: {words}; T = {self.max_length}, {ends})"

    def live(self, tokens: Tensor) -> Tensor:
        """Which tokens count: up to and including the first EOS. [N,T] -> bool [N,T]."""
        if not self.eos:
            return torch.ones_like(tokens, dtype=torch.bool)
        ended = tokens.eq(len(self.vocabulary))
        # no EOS so far, the token itself not counted
        return (ended.cumsum(-1) - ended.long()) == 0

    def last(self, tokens: Tensor) -> Tensor:
        """The last token that counts, the first EOS where there is one. [N,T] -> bool [N,T]."""
        live = self.live(tokens)
        # live, with nothing live behind it
        live_after = torch.nn.functional.pad(live[:, 1:], (0, 1), value=False)
        return live & ~live_after

    def truncated(self, tokens: Tensor) -> Tensor:
        """Which texts the limit T ended, and no EOS of their own. [N,T] -> bool [N].

        T − 1 words leave no choice at T, where EOS is forced: the text would have gone on, or would
        have ended just there, and nobody knows. Without EOS none is: T words are a whole sequence.
        """
        if not self.eos:
            return torch.zeros_like(tokens[:, 0], dtype=torch.bool)
        chosen = tokens[:, :-1].eq(len(self.vocabulary))  # the last one is forced
        return ~chosen.any(-1)

    @overload
    def encode(self, text: str) -> Tensor: ...
    @overload
    def encode(self, text: Iterable[str]) -> Tensor: ...
    def encode(self, text: str | Iterable[str]) -> Tensor:
        """A text -> tokens [T], or many -> [N,T].

        Raises:
            InputError: a word outside the vocabulary, a text of the wrong length, or one that
                several sequences spell (see `spelled`).
        """
        if isinstance(text, str):
            return torch.tensor(self._ids(text), dtype=torch.long)
        rows = [self._ids(one) for one in text]
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), self.max_length)

    @overload
    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]: ...
    @overload
    def decode(self, tokens: Tensor) -> list[str]: ...
    def decode(self, tokens: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Tokens [N,T] -> N texts, without the EOS."""
        rows = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        end = self.eos_id
        texts = []
        for row in rows:
            words = row[: row.index(end)] if end in row else row
            texts.append(self.separator.join(self.vocabulary[i] for i in words))
        return texts

    def encode_prompt(self, text: str) -> Tensor:
        """A prompt as text -> token ids [S]: its words, of any number, without EOS or padding.

        Raises:
            InputError: as `encode`, lengths apart.
        """
        return torch.tensor(self._word_ids(text, 0, len(text)), dtype=torch.long)

    def decode_prompt(self, prompt: Tensor | Sequence[int]) -> str:
        """A prompt [S] -> its text, without padding; an id that is no word is shown as <id>."""
        ids = [int(token) for token in prompt if token >= 0]
        words = (self.vocabulary[i] if i < len(self.vocabulary) else f"<{i}>" for i in ids)
        return self.separator.join(words)

    def check_tokens(self, tokens: Tensor, name: str = "tokens") -> Tensor:
        """Returns `tokens` [N,T] if they are sequences of this space; says which entry is not."""
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[1] != self.max_length:
            raise InputError(
                f"{name} has shape {list(getattr(tokens, 'shape', []))}; expected [N,"
                f" {self.max_length}] (see space.encode)."
            )
        if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise InputError(
                f"{name} has dtype {tokens.dtype}; expected whole numbers such as torch.long."
            )
        bad = (tokens < 0) | (tokens >= self.vocab_size)
        if self.eos:
            bad = bad | (~self.live(tokens) & (tokens != self.eos_id))
            # EOS is forced at T: no sequence ends in a word
            bad[:, -1] |= tokens[:, -1] != self.eos_id
        if bool(bad.any()):
            n, t = bad.nonzero()[0].tolist()
            rule = f"ids run from 0 to {self.vocab_size - 1}"
            if self.eos:
                rule += ", every token after EOS is EOS, and the last one is EOS"
            raise InputError(
                f"{name}[{n}, {t}] = {int(tokens[n, t])} does not belong to {self!r}: {rule}."
            )
        return tokens

    def all_tokens(self, max_sequences: int = 1_000_000) -> Tensor:
        """Every sequence of the space, [size, T], shorter ones first.

        Raises:
            TooLargeError: there are more than `max_sequences`.
        """
        check_count(max_sequences, "max_sequences")
        if self.size > max_sequences:
            # Python writes out no number of more than 4,300 digits
            written = self.size.bit_length() < 4096
            count = f"{self.size:,}" if written else readable_count(self.size)
            raise TooLargeError(
                f"the space holds {count} sequences, max_sequences is {max_sequences:,}; sample"
                " instead, or shorten it."
            )
        what = f"all {self.size:,} sequences of {self.max_length:,} tokens"
        check_entries(self.size * self.max_length, what, "sample instead, or shorten the space")
        lengths = range(self.max_length) if self.eos else [self.max_length]
        return torch.cat([self._all_of_length(length) for length in lengths])

    def _all_of_length(self, length: int) -> Tensor:
        """The sequences [W^length,T] of `length` words, filled up with EOS."""
        count = len(self.vocabulary)
        words = torch.arange(count)
        if length:
            grid = torch.cartesian_prod(*[words] * length).reshape(-1, length)
        else:  # cartesian_prod takes at least one factor
            grid = words.new_zeros(1, 0)
        return torch.nn.functional.pad(grid, (0, self.max_length - length), value=count)

    def _ids(self, text: str) -> list[int]:
        """The T tokens of a text."""
        room = self.max_length - self.eos
        ids = self._word_ids(text, 0 if self.eos else room, room)
        return ids + [len(self.vocabulary)] * (self.max_length - len(ids))

    def _word_ids(self, text: str, least: int, most: int) -> list[int]:
        """The ids of a text of `least` to `most` words."""
        text = unicodedata.normalize("NFC", text)
        if self.spelled:
            return self._spelling(text, least, most)
        words = _split(text, self.separator)
        unknown = next((word for word in words if word not in self.word_ids), None)
        if unknown is not None:
            raise InputError(
                f"text {text!r}: word {unknown!r} is not in the vocabulary of {self!r}; add it, or"
                " remove the text."
            )
        if not least <= len(words) <= most:
            wanted = f"at most {most}" if self.eos else f"exactly {most}"
            raise InputError(f"text {text!r} has {len(words)} words; this space takes {wanted}.")
        return [self.word_ids[word] for word in words]

    def _spelling(self, text: str, least: int, most: int) -> list[int]:
        """The only sequence of words that spells a text, and an error where there are more."""
        found = self._spellings(text, least, most)
        if not found:
            wanted = f"at most {most}" if least < most else f"exactly {most}"
            raise InputError(
                f"text {text!r} is not spelled by {wanted} words of {self!r}; add words, or remove"
                " the text."
            )
        if len(found) > 1:
            one, other = ([self.vocabulary[i] for i in ids] for ids in found)
            raise InputError(
                f"text {text!r} is ambiguous: {one} and {other} both spell it; give tokens (a"
                " tokenizer's ids) instead of the text."
            )
        return found[0]

    def _spellings(self, text: str, least: int, most: int) -> list[list[int]]:
        """Up to two sequences of words that spell a text: two already make it ambiguous.

        Depth-first. A state is a place in the text and a number of words: one that was opened twice
        is not opened again, as two ways through it would have been found, or none leads to the end.
        """
        lengths = sorted({len(word) for word in self.vocabulary}, reverse=True)
        gap, found = self.separator, list[list[int]]()
        stack: list[tuple[int, list[int]]] = [(0, [])]
        visits: dict[tuple[int, int], int] = {}
        while stack and len(found) < 2:
            place, ids = stack.pop()
            if place == len(text) and least <= len(ids):
                found.append(ids)
            opened = visits.get((place, len(ids)), 0)
            if len(ids) == most or opened > 1:
                continue
            visits[place, len(ids)] = opened + 1
            start = place + len(gap) if ids else place
            if ids and not text.startswith(gap, place):
                continue
            for length in lengths:
                word = text[start : start + length]
                if len(word) == length and word in self.word_ids:
                    stack.append((start + length, [*ids, self.word_ids[word]]))
        return found


def _split(text: str, separator: str) -> list[str]:
    """The words of a text, where the separator alone tells them apart."""
    if separator == "":
        return list(text)
    if separator == " ":  # several blanks, or a line's end, are one separator
        return text.split()
    return text.split(separator) if text else []
