"""Functions of numbers take what `torch.as_tensor` takes: arrays, lists, integers, tensors.

A tensor of floats passes as it is, gradient and dtype included; everything else becomes float64.
Groups and tokens are whole numbers, and masks are truth values, by their names. Complex numbers are
refused: a log-probability has no imaginary part that could be dropped without a word.
"""

import functools
import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from klrl_edu.core.arguments import describe
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import any_known

Function = TypeVar("Function", bound=Callable[..., Any])
_DTYPES = {"group": torch.long, "tokens": torch.long, "live": torch.bool}


def takes_numbers(function: Function) -> Function:
    """Every argument that is annotated as a Tensor may be given as numbers; see `as_numbers`."""
    parameters = inspect.signature(function).parameters
    order = list(parameters)
    numbers = {name for name, one in parameters.items() if _is_tensor(one.annotation)}

    @functools.wraps(function)
    def with_tensors(*args: Any, **options: Any) -> Any:
        # the common call first: the package's own, of float tensors by place
        if not options and all(isinstance(one, Tensor) and one.is_floating_point() for one in args):
            return function(*args)
        # lists and arrays go where the first tensor of the call is
        given = [*args, *options.values()]
        device = next((value.device for value in given if isinstance(value, Tensor)), None)

        def ready(name: str, value: Any) -> Any:
            return as_numbers(value, name, device) if name in numbers else value

        names = [*order, *[""] * len(args)]  # as many as it takes for Python's own complaint
        ready_options = {name: ready(name, value) for name, value in options.items()}
        return function(*map(ready, names, args), **ready_options)

    return with_tensors  # type: ignore[return-value]


def _is_tensor(annotation: Any) -> bool:
    """Tensor, or a union with it."""
    return annotation is Tensor or (
        isinstance(annotation, UnionType) and Tensor in get_args(annotation)
    )


def as_numbers(value: Any, name: str, device: torch.device | None = None) -> Any:
    """A tensor [...] of what `torch.as_tensor` takes; None, where a default is meant, passes.

    Args:
        name: of the argument; "group", "tokens" and "live" have dtypes of their own.
        device: where numbers that are no tensor yet go.

    Raises:
        InputError: no numbers, or rows of different lengths.
    """
    if value is None:
        return value
    if isinstance(value, Tensor):
        return _in_dtype(value, name)
    if _holds_tensors(value):  # torch.tensor would cut their gradients off
        return torch.stack([as_numbers(one, name, device) for one in value])
    # an array knows whether it is complex; a list of floats would become float32
    known = hasattr(value, "dtype") or name in _DTYPES
    try:
        given = torch.tensor(value, dtype=None if known else torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{name} is {describe(value)}; expected numbers, as a tensor, an array or a list"
            f" ({error})."
        ) from None
    ready = _in_dtype(given, name)
    return ready if name in _DTYPES else ready.double()


def _in_dtype(value: Tensor, name: str) -> Tensor:
    """The same numbers in the dtype that the name asks for, where that loses nothing."""
    if value.is_complex():
        raise InputError(
            f"{name} is complex, {describe(value)}; expected real numbers: take .real."
        )
    wanted = _DTYPES.get(name)
    if wanted is None:
        return value if value.is_floating_point() else value.double()
    ready = value.to(wanted)
    if ready is not value and any_known(ready != value):
        index = (ready != value).nonzero()[0].tolist()
        kind = "0 or 1" if wanted is torch.bool else "a whole number"
        raise InputError(f"{name}{index} = {value[tuple(index)].item()!r} is not {kind}.")
    return ready


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(
        isinstance(one, Tensor) or _holds_tensors(one) for one in value
    )
