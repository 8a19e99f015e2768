"""A stand-in accelerator for machines without one: CPU arithmetic behind tensors that report device
simgpu:0.

Mixing them with CPU tensors, or drawing from a CPU generator onto them, raises as CUDA would;
numbers and scalar tensors pass. The backend's name belongs to the whole process, so import this
only in a process of its own. nn.GRU is known to fail on it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("simgpu")
torch.__future__.set_overwrite_module_params_on_conversion(True)

CPU, DEVICE = torch.device("cpu"), torch.device("simgpu", 0)
_aten = torch.ops.aten
_CROSS = {_aten._to_copy.default, _aten.copy_.default}  # what may see both devices
_INDEX = {
    _aten.index.Tensor,
    _aten._unsafe_index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}  # CUDA takes indices from the CPU too


class SimulatedTensor(torch.Tensor):
    """A CPU tensor that says it lives elsewhere."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "SimulatedTensor":
        layout = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
            "layout": held.layout,
        }
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), **layout, device=DEVICE, requires_grad=held.requires_grad
        )
        wrapper.held = held.detach() if held.requires_grad else held
        return wrapper

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.held})"

    def tolist(self) -> Any:
        """As on any device: the numbers come to the CPU."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class SimulatedDevice(TorchDispatchMode):
    """The mode under which factories with device=simgpu:0 give simulated tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __enter__(self) -> "SimulatedDevice":
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs one operation on the CPU; wraps what it gives if it belongs on the device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = any(isinstance(tensor, SimulatedTensor) for tensor in tensors)
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if on_device and func not in _CROSS:
        _refuse_strangers(func, args, tensors)
    if kwargs.get("generator") is not None and (
        on_device or (asked is not None and asked.type == DEVICE.type)
    ):
        raise RuntimeError(
            f"{func}: Expected a '{DEVICE.type}' device type for generator but found 'cpu'"
        )
    result = _ON_CPU.get(func, func)(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if func is _aten.copy_.default or (_is_in_place(func) and isinstance(args[0], SimulatedTensor)):
        return args[0]
    stays = asked.type == DEVICE.type if asked is not None else on_device
    return tree_map(_wrap, result) if stays else result


def _refuse_strangers(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raises where a CPU tensor of some dimension meets the device."""
    if func in _INDEX:
        values = args[2] if len(args) > 2 and isinstance(args[2], Tensor) else args[0]
        tensors = [args[0], values]
    if any(not isinstance(tensor, SimulatedTensor) and tensor.dim() > 0 for tensor in tensors):
        raise RuntimeError(
            f"{func}: Expected all tensors to be on the same device, but found at least two"
            f" devices, {DEVICE} and cpu!"
        )


def _is_in_place(func: Any) -> bool:
    name = func._schema.name
    return name.endswith("_") and not name.endswith("__")


def _unwrap(leaf: Any) -> Any:
    if isinstance(leaf, SimulatedTensor):
        return leaf.held
    return CPU if isinstance(leaf, torch.device) and leaf.type == DEVICE.type else leaf


def _lstm_cell(
    inputs: Tensor, hidden: Tensor, cell: Tensor, *biases: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What accelerators run as one kernel, and the CPU does not have: h', c' and the activated
    gates (i, f, g, o).
    """
    gates = inputs + hidden + sum(bias for bias in biases if bias is not None)
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    after = f * cell + i * g
    return o * after.tanh(), after, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(
    to_hidden: Tensor | None,
    to_cell: Tensor | None,
    cell: Tensor,
    after: Tensor,
    gates: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients to the gates before activation, to c, and to the biases."""
    i, f, g, o = gates.chunk(4, 1)
    to_hidden = torch.zeros_like(cell) if to_hidden is None else to_hidden
    through = to_hidden * o * (1 - after.tanh() ** 2) + (0 if to_cell is None else to_cell)
    parts = [
        through * g * i * (1 - i),
        through * cell * f * (1 - f),
        through * i * (1 - g**2),
        to_hidden * after.tanh() * o * (1 - o),
    ]
    to_gates = torch.cat(parts, 1)
    return to_gates, through * f, to_gates.sum(0) if has_bias else None


_ON_CPU = {
    _aten._thnn_fused_lstm_cell.default: _lstm_cell,
    _aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_cell_backward,
}


def _wrap(leaf: Any) -> Any:
    return (
        SimulatedTensor(leaf)
        if isinstance(leaf, Tensor) and not isinstance(leaf, SimulatedTensor)
        else leaf
    )
