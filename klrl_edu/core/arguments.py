"""Arguments of another kind: what was given, what belongs there, and the remedy.

A noun (model, problem, posterior, …) says in its class attribute `in_words` what it is and how it
is made; the checks here need no more of it, so they stand above all nouns.
"""

from typing import Any

from torch import Generator, Tensor, nn

from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace

Kinds = type | tuple[type, ...]
_PARTS = ("model", "problem", "prior")  # of a posterior and a problem, which are given in its place


def describe(value: Any) -> str:
    """What a value is, in a few words."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, bool | int | float):
        return f"the number {value!r}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, list | tuple):
        kinds = sorted({type(one).__name__ for one in value})
        return f"a {type(value).__name__} of {' and '.join(kinds) or 'nothing'}"
    name = getattr(value, "__name__", None)
    if name is not None:
        return "a lambda" if name == "<lambda>" else f"the function {name}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def check_arguments(call: str, **given: tuple[Any, Kinds]) -> None:
    """Refuses arguments of another kind.

    Args:
        call: how the function is called, e.g. "compare(policy, target)".
        given: a name of the call -> the value, and the class(es) that belong there.

    Raises:
        InputError: with what was given, what belongs there, and whether two were swapped.
    """
    for name, (value, kinds) in given.items():
        if not isinstance(value, kinds):
            swapped = [
                other
                for other, (one, place) in given.items()
                if other != name and isinstance(one, kinds) and isinstance(value, place)
            ]
            expected = f"{call}: {name} is {describe(value)}; expected {_in_words(kinds)}."
            raise InputError(expected + _remedy(value, kinds, name, swapped))
        # a LanguageModel of one's own may have forgotten its space
        is_model = isinstance(value, nn.Module) and hasattr(value, "in_words")
        if is_model and not isinstance(getattr(value, "space", None), SequenceSpace):
            raise InputError(
                f"{call}: {name}, {describe(value)}, has no space; set self.space ="
                " SequenceSpace(vocabulary, max_length) in its __init__."
            )


def _in_words(kinds: Kinds) -> str:
    """The kinds as a message names them: by their own words, else by their class."""
    listed = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(getattr(kind, "in_words", kind.__name__) for kind in listed)


def _remedy(value: Any, kinds: Kinds, name: str, swapped: list[str]) -> str:
    """One sentence more, where it is plain what was meant."""
    if swapped:
        return f" Did you swap {name} and {swapped[0]}?"
    part = next((part for part in _PARTS if isinstance(getattr(value, part, None), kinds)), None)
    if part is not None:
        return f" Did you mean its .{part}?"
    if isinstance(value, list | tuple) and value and all(isinstance(one, kinds) for one in value):
        return " Give one of them at a time."
    if isinstance(value, type) and issubclass(value, kinds):
        return f" Make one: {value.__name__}(…)."
    if isinstance(value, nn.Module):
        return " A network of your own becomes one as a subclass of LanguageModel."
    return ""


def check_draw(draw: Any, name: str = "draw") -> None:
    """The randomness is a function, not a seed.

    Raises:
        InputError: with the call that makes one.
    """
    if not callable(draw):
        # the remedy repeats the seed or the generator that was given in its place
        seed = "generator" if isinstance(draw, Generator) else draw if type(draw) is int else 0
        raise InputError(
            f"{name} is {describe(draw)}; expected the source of randomness:"
            f" {name}=seeded_draw({seed})."
        )


def check_function(value: Any, name: str, example: str) -> None:
    """A loss or an estimator is a function, not the name of one, nor a model.

    Args:
        example: one that stands in the package, with its module, e.g. "losses.rloo".

    Raises:
        InputError: with the remedy.
    """
    if isinstance(value, type) or not callable(value) or hasattr(value, "in_words"):
        if isinstance(value, str) and value.isidentifier():
            example = f"{example.partition('.')[0]}.{value}"
        raise InputError(
            f"{name} is {describe(value)}; expected a function, without quotes or brackets, such as"
            f" {example}."
        )


def check_loss_function(loss: Any) -> None:
    """A loss is a function Batch -> scalar; see `check_function`."""
    check_function(loss, "loss", "losses.rloo")
