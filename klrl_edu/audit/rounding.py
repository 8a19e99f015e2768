"""How far rounding alone can move what an audit computes: found by moving the inputs by a rounding,
and never assumed.

    x → x (1 ± ε),    the same for equal x, so that ties stay ties and π = q stays π = q         (1)

What a result moves by under (1) is what its arithmetic cannot tell apart: 10⁻¹⁶ for u near the
prior, however small u itself is. ε is that of the least precise arithmetic met inside the function.
After Vignes' stochastic arithmetic (1993), with a fixed sign for each number in place of a random
one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from klrl_edu.learning.batches import Batch

SAFETY = 16  # few nudges, few batches: what was seen may be less than the most there can be
_SEEDS = (-7046029254386353131, 5871781006564002453)  # odd: each mixes the bits of a number anew
_NUMBERS = (
    "log_probs",
    "prior_log_probs",
    "behaviour_log_probs",
    "rewards",
    "log_dists",
    "prior_log_dists",
)


def relative_precision(dtype: torch.dtype) -> float:
    """Relative error below which two computations in `dtype` agree: 10⁻⁹ in float64, 10⁻⁵ in
    float32, 0.03 in bfloat16.
    """
    return {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)


def type_name(dtype: torch.dtype) -> str:
    """As a report names it: "float32"."""
    return str(dtype).removeprefix("torch.")


def arithmetic_of(run: Callable[[], Any]) -> torch.dtype:
    """The least precise floating type in which `run` computes: of a result that is not whole
    numbers, which masks and counts are and which lose nothing.
    """
    seen = _Results()
    with seen:
        run()
    return seen.lowest


class _Results(TorchFunctionMode):
    """Looks at what every call of torch gives."""

    def __init__(self) -> None:
        super().__init__()
        self.lowest = torch.float64

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            lower = torch.finfo(value.dtype).eps > torch.finfo(self.lowest).eps
            if lower and not bool((value.detach() == value.detach().round()).all()):
                self.lowest = value.dtype
        return result


def nudged_batches(whole: Batch, dtype: torch.dtype) -> list[Batch]:
    """The batch with its numbers moved by a rounding of `dtype`, in two ways, by (1)."""
    given = {name: value for name, value in whole.tensors().items() if name in _NUMBERS}
    batches = []
    for seed in _SEEDS:
        moved: dict[str, Any] = {name: _nudged(v, dtype, seed) for name, v in given.items()}
        batches.append(dataclasses.replace(whole, **moved))
    return batches


def _nudged(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    # the sign comes from the bits of the number itself
    # widened first, which is exact, so that equal numbers have equal bits
    bits = values.detach().double().contiguous().view(torch.int64)
    # the product wraps, so that its sign hangs on all bits of the number
    sign = (1 + 2 * ((bits * seed) >> 63)).double()  # 1, or −1 where the product is negative
    moved = values * (1 + torch.finfo(dtype).eps * sign)
    # whole numbers are exact, and losses ask whether a reward is 1
    return torch.where(values == values.round(), values, moved)
