"""Checks of arguments at the boundary: name, index, value, remedy."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from klrl_edu.core.display import readable_count
from klrl_edu.core.errors import InputError, TooLargeError

SUM_TOLERANCE = 1e-9  # .4 + .3 + .2 + .1 passes, three times .333 does not
MAX_ENTRIES = 1 << 30  # of one tensor: 8 GiB in float64


def check_kl_coef(kl_coef: float, name: str = "kl_coef") -> float:
    """λ ≥ 0, where 0 and inf are the documented limits; returns it as a float."""
    value = real_number(kl_coef)
    if value is None:
        raise InputError(
            f"{name} = {kl_coef!r} is not a number; give λ in reward units per nat, at least 0."
        )
    if not value >= 0:  # also catches NaN
        raise InputError(
            f"{name} = {value!r} must be at least 0 (0: reward only; inf: the prior); a negative λ"
            " would reward divergence."
        )
    return value


def real_number(value: Any) -> float | None:
    """A number as a float; None for truth values, texts, complex numbers and 10^400."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None


def check_number(value: Any, name: str, rule: str, fits: Callable[[float], bool]) -> float:
    """A real number that fits a rule, as a float.

    Args:
        rule: what it must be, and the remedy, as the message says it: "above 0; …".
        fits: whether a float keeps the rule; NaN comes here too.
    """
    number = real_number(value)
    if number is None or not fits(number):
        raise InputError(f"{name} = {brief(value)} must be {rule}.")
    return number


def check_count(value: int, name: str, minimum: int = 1, maximum: int | None = None) -> int:
    """A whole number of at least `minimum`, and at most `maximum` where there is one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"{name} = {brief(value)} must be a whole number of at least {minimum}.")
    if maximum is not None and value > maximum:
        raise TooLargeError(f"{name} = {brief(value)} is too large; at most {maximum:,} will do.")
    return value


def check_entries(entries: int, what: str, remedy: str) -> None:
    """Refuses what would fill the memory, before the allocator does.

    Args:
        entries: numbers in the largest tensor, an exact count.
        what: what they are for, as the message says it: "10 samples of 20 tokens".

    Raises:
        TooLargeError: more than MAX_ENTRIES.
    """
    if entries > MAX_ENTRIES:
        raise TooLargeError(
            f"{what} take {readable_count(entries)} numbers, more than {MAX_ENTRIES:,} (8 GiB in"
            f" float64); {remedy}."
        )


def brief(value: Any) -> str:
    """A value as a message shows it: in one line, and neither long numbers nor texts in full."""
    if isinstance(value, int) and abs(value) >= 10**15:
        return "-" * (value < 0) + readable_count(abs(value))
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}…"


def check_probabilities(
    probs: Sequence[float] | Tensor, name: str = "probs", *, normalize: bool = False
) -> Tensor:
    """Probabilities [K] as float64: finite, non-negative, summing to one within 1e-9.

    Args:
        normalize: accept any non-negative weights with a positive sum, and divide by the sum.
    """
    values = _as_float64(probs, name).detach()
    if values.ndim != 1 or values.numel() == 0:
        raise InputError(
            f"{name} has shape {list(values.shape)}; expected one probability a sequence, [K] with"
            " K at least 1."
        )
    not_finite = ~torch.isfinite(values)
    _refuse(not_finite, values, name, "is not finite; probabilities are numbers from 0 to 1.")
    _refuse(values < 0, values, name, "is negative; probabilities are at least 0.")
    # by the largest, so that huge or tiny weights neither overflow nor vanish
    top = float(values.max())
    total = top * math.fsum((values / top).tolist()) if top > 0 else 0.0
    if normalize:
        if total == 0:
            raise InputError(
                f"{name} are all 0, so they cannot be normalised; give at least one positive"
                " weight."
            )
        scaled = values / top
        return scaled / math.fsum(scaled.tolist())
    if abs(total - 1) > SUM_TOLERANCE:
        raise InputError(f"{name} sum to {total:.12g}, not 1. Raw weights? Pass normalize=True.")
    return values


def check_finite_vector(values: Any, name: str, length: int | None = None) -> Tensor:
    """Numbers [K] as float64 without NaN or +inf; −inf (zero mass) is allowed."""
    vector = _as_float64(values, name)
    if vector.ndim != 1 or (length is not None and len(vector) != length):
        expected = "K" if length is None else length
        raise InputError(f"{name} has shape {list(vector.shape)}; expected [{expected}].")
    bad = torch.isnan(vector) | (vector == math.inf)
    _refuse(bad, vector, name, "is not allowed; give a number, or -inf for zero mass.")
    return vector


def check_same_space(left: Any, right: Any, what: str) -> None:
    """Two models that are to be compared or combined must share one space."""
    if left != right:
        raise InputError(
            f"{what} live on different spaces: {left} and {right}; build both on the same"
            " SequenceSpace."
        )


def check_some(values: Tensor) -> Tensor:
    """The values [N] of a batch that holds a sequence: the mean of nothing is no number."""
    if values.numel() == 0:
        raise InputError("the batch holds no sequence, so there is no mean; give at least one.")
    return values


def any_known(condition: Tensor) -> bool | None:
    """Whether a condition [...] holds anywhere; None inside `torch.func.vmap`.

    There one tensor stands for many, and no branch can be taken.
    """
    # under vmap a tensor hides the dimension along which it stands for many; under grad it does not
    if torch.func.debug_unwrap(condition).ndim > condition.ndim:
        return None
    return bool(condition.any())


def _as_float64(values: Any, name: str) -> Tensor:
    """Numbers as a float64 tensor; complex ones would lose their imaginary part without a word."""
    try:
        if isinstance(values, Tensor) and values.is_complex():
            raise TypeError("complex numbers")
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{name} are no real numbers ({brief(error)}); give a list or a tensor of floats."
        ) from None


def _refuse(bad: Tensor, values: Tensor, name: str, why: str) -> None:
    """Raises for the first entry where `bad` [K] holds."""
    if bool(bad.any()):
        index = int(bad.nonzero()[0, 0])
        raise InputError(f"{name}[{index}] = {float(values[index])!r} {why}")
