"""Rewards: r(y) in reward units, on tokens.

    reward(tokens [N,T], prompt) -> [N]      the whole sequence's reward, or
                                 -> [N,T]    a causal one: column t depends on tokens[:, :t+1], and
                                 is 0 after the first EOS

−inf is a hard constraint (posterior mass 0). NaN and +inf raise where the prior has mass; elsewhere
a reward is ignored.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klrl_edu.core.arguments import describe
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import brief, check_number

Reward = Callable[[Tensor, Tensor | None], Tensor]


def _below_infinity(value: float) -> bool:
    return value < math.inf


def reward_value(value: float, name: str, fits: Callable[[float], bool] = _below_infinity) -> float:
    """What a text or a word earns, in reward units; True is 1, and −inf forbids.

    Raises:
        InputError: no real number, or one that does not fit: by default NaN or +inf.
    """
    number = float(value) if isinstance(value, bool) else value
    return check_number(number, name, "a number, or -inf to forbid", fits)


@dataclass(frozen=True)
class TextReward:
    """A function of the text; see `text_reward`."""

    fn: Callable[[str], float]
    space: SequenceSpace
    name: str = "text reward"
    # two equal rewards may have seen different texts
    _cache: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        values = [self._one(text) for text in self.space.decode(tokens)]
        return torch.tensor(values, dtype=torch.float64, device=tokens.device)

    def _one(self, text: str) -> float:
        # the user's function is slow, and samples repeat
        if text not in self._cache:
            value = self.fn(text)
            try:
                self._cache[text] = float(value)
            except (TypeError, ValueError, OverflowError):
                raise InputError(
                    f"{self.name} of {text!r} = {value!r} is not a number; the function must return"
                    " one float a text."
                ) from None
        return self._cache[text]

    def __str__(self) -> str:
        return self.name


def text_reward(
    fn: Callable[[str], float], space: SequenceSpace, name: str | None = None
) -> TextReward:
    """A reward [N] from one's own `str -> float`, called once a distinct text (values are cached).

    Args:
        fn: a deterministic function of the text, in reward units; −inf forbids a text.
        space: decodes the tokens.
        name: how errors and tables call it.
    """
    return TextReward(fn, space, name or str(getattr(fn, "__name__", "text reward")))


def table_reward(
    values: Mapping[str, float], space: SequenceSpace, default: float = math.nan
) -> TextReward:
    """A reward [N] looked up by text; texts without an entry get `default`.

    NaN, the default, is an error where the prior gives such a text mass.

    Raises:
        InputError: a text of the table is not in the space, or stands twice in its normal form.
    """
    # by the normal form that decoding gives, which is what the reward will be asked for
    texts = space.decode(space.encode(values))
    # NaN and +inf pass: they matter only where the prior has mass, and are refused there
    table = {
        text: reward_value(value, f"values[{key!r}]", lambda _: True)
        for text, (key, value) in zip(texts, values.items(), strict=True)
    }
    default = reward_value(default, "default", lambda _: True)
    if len(table) < len(values):
        raise InputError(
            "values hold one text twice (after NFC and spacing are normalised); remove one."
        )
    return TextReward(lambda text: table.get(text, default), space, "table reward")


def regex_reward(
    pattern: str, space: SequenceSpace, value: float = 1.0, otherwise: float = 0.0
) -> TextReward:
    """A reward [N]: `value` where Python's `re.search(pattern, text)` finds a match.

    Args:
        otherwise: what other texts earn; −inf makes the pattern a hard constraint.

    Raises:
        InputError: the pattern does not compile; the message shows where.
    """
    compiled = compiled_pattern(pattern)
    value, otherwise = reward_value(value, "value"), reward_value(otherwise, "otherwise")
    name = f"{value:g} where /{pattern}/ matches, else {otherwise:g}"
    return TextReward(lambda text: value if compiled.search(text) else otherwise, space, name)


def compiled_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression of texts, by Python's own parser.

    Raises:
        InputError: the pattern does not compile; the message shows where.
    """
    if not isinstance(pattern, str):
        raise InputError(f"pattern is {describe(pattern)}; expected a text, such as 'ab*$'.")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"pattern {brief(pattern)} is not a regular expression: {error.msg} at position"
            f" {error.pos}."
        ) from None
    except (OverflowError, RecursionError) as error:
        raise InputError(f"pattern {brief(pattern)} is too deep or too long: {error}.") from None


@dataclass(frozen=True)
class TokenReward:
    """A reward [N,T] with one value a word; see `token_reward`."""

    values: tuple[float, ...]
    space: SequenceSpace

    def __call__(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        table = torch.tensor(self.values, dtype=torch.float64, device=tokens.device)
        return torch.where(self.space.live(tokens), table[tokens.long()], 0.0)


def token_reward(
    values: Mapping[str, float] | Sequence[float], space: SequenceSpace
) -> TokenReward:
    """A causal reward [N,T]: each live token earns its own value, in reward units.

    Args:
        values: word -> value (others 0), or one value a column of logits [V] (the last one for
            EOS).
    """
    if isinstance(values, Mapping):
        unknown = [word for word in values if word not in space.word_ids]
        if unknown:
            raise InputError(
                f"values name the words {unknown}, which are not in the vocabulary of {space!r}."
            )
        earned = {word: reward_value(value, f"values[{word!r}]") for word, value in values.items()}
        table = [earned.get(word, 0.0) for word in space.vocabulary] + [0.0] * space.eos
    else:
        table = [reward_value(value, f"values[{i}]") for i, value in enumerate(values)]
    if len(table) != space.vocab_size:
        raise InputError(
            f"values has {len(table)} entries; expected V = {space.vocab_size}, one a column of"
            " logits."
        )
    return TokenReward(tuple(table), space)


def count_reward(word: str, space: SequenceSpace, value: float = 1.0) -> TokenReward:
    """`value` for each occurrence of a word: a causal reward [N,T]."""
    return token_reward({word: reward_value(value, "value")}, space)


def length_reward(space: SequenceSpace, value: float = 1.0) -> TokenReward:
    """`value` for each word, EOS not counted: a causal reward [N,T]; below 0 it shortens texts."""
    value = reward_value(value, "value")
    return token_reward([value] * len(space.vocabulary) + [0.0] * space.eos, space)


@dataclass(frozen=True)
class RepeatReward:
    """A reward [N,T] for repeating the word before; see `repeat_reward`."""

    space: SequenceSpace
    value: float

    def __call__(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        # EOS after EOS is no repeat
        is_word = tokens[:, 1:] < len(self.space.vocabulary)
        repeats = (tokens[:, 1:] == tokens[:, :-1]) & is_word
        earned = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        earned[:, 1:].masked_fill_(repeats, self.value)  # a product would make 0 · −inf of the rest
        return earned


def repeat_reward(space: SequenceSpace, value: float = -1.0) -> RepeatReward:
    """`value` for each word equal to the one before it, EOS not counted: a causal reward [N,T]."""
    return RepeatReward(space, reward_value(value, "value"))


@dataclass(frozen=True)
class SumReward:
    """A weighted sum of rewards; see `add` and `scale`."""

    parts: tuple[Reward, ...]
    weights: tuple[float, ...]

    def __call__(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        weighted = zip(self.parts, self.weights, strict=True)
        values = [_scaled(part(tokens, prompt), weight) for part, weight in weighted]
        # one of them speaks of the whole sequence: so must all. Columns after EOS are 0, so a row's
        # sum is its sequence's reward
        if any(value.ndim == 1 for value in values):
            values = [value.sum(-1) if value.ndim == 2 else value for value in values]
        return torch.stack(values).sum(0)

    def __str__(self) -> str:
        weighted = zip(self.parts, self.weights, strict=True)
        return " + ".join(f"{weight:g}·({reward_name(part)})" for part, weight in weighted)


def add(*rewards: Reward) -> SumReward:
    """r₁ + r₂ + …: [N,T] if all are causal, otherwise [N].

    Posteriors compose: adding a reward updates the posterior of the others.
    """
    if not rewards:
        raise InputError("add() takes at least one reward.")
    return SumReward(rewards, (1.0,) * len(rewards))


def scale(reward: Reward, factor: float) -> SumReward:
    """factor · r, where 0 · (−inf) = 0.

    A negative factor turns −inf into +inf, which raises where the prior has mass.
    """
    return SumReward((reward,), (check_number(factor, "factor", "finite", math.isfinite),))


def _scaled(values: Tensor, weight: float) -> Tensor:
    return torch.zeros_like(values) if weight == 0 else weight * values


def check_reward(reward: Reward) -> None:
    """A reward can be called as reward(tokens, prompt).

    Raises:
        InputError: it cannot; with the remedy.
    """
    # a class can be called too, and would give an object
    if isinstance(reward, type) or not callable(reward):
        raise InputError(
            f"reward is {describe(reward)}; expected a function of (tokens, prompt), or"
            " text_reward(fn, space)."
        )
    try:
        signature = inspect.signature(reward)
    except ValueError:  # a builtin may have none
        return
    try:
        # whether the call fits, without making it
        signature.bind(None, None)
    except TypeError:
        raise InputError(
            f"reward {reward_name(reward)!r} takes {signature}; expected (tokens, prompt). A"
            " function of the text: text_reward(fn, space). A function of the tokens: add"
            " prompt=None."
        ) from None


def reward_name(reward: Reward) -> str:
    """A short text for error messages."""
    # the one of `object` would print an address
    if "__str__" in vars(type(reward)):
        return str(reward)
    return str(getattr(reward, "__name__", type(reward).__name__))
