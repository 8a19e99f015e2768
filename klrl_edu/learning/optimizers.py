"""An optimiser for Transformers: Muon for the matrices between layers, Adam for the rest.

    W ← W − lr·(U Vᵀ),    U Σ Vᵀ the averaged gradient of W                                      (1)

Jordan et al. (2024); torch.optim.Muon. Every direction of a matrix moves at the same speed, which
brings down the slow tail of a divergence that Adam leaves: see the bench's row on a thousand steps.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from klrl_edu.core.validation import check_number


class MuonWithAdam(torch.optim.Optimizer):
    """One optimiser of two parts, for `train(..., optimizer=)`.

    Args:
        model: the policy; its Linear weights in a list of blocks (nn.ModuleList) get Muon,
            everything else Adam.
        lr: of Muon, at least 0.
        adam_lr: of Adam, at least 0.

    Raises:
        InputError: a rate that is not a finite number of at least 0.
    """

    def __init__(self, model: nn.Module, *, lr: float = 1e-3, adam_lr: float = 3e-4):
        for name, rate in (("lr", lr), ("adam_lr", adam_lr)):
            check_number(rate, name, "at least 0", lambda x: 0 <= x < math.inf)
        matrices = {id(parameter) for parameter in _block_matrices(model)}
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # the base class gives zero_grad and hooks; the state of the steps is in the parts
        super().__init__(trainable, {})
        inner, outer = (
            [p for p in trainable if (id(p) in matrices) is side] for side in (True, False)
        )
        self.parts: list[torch.optim.Optimizer] = []
        if inner:
            # torch's default decay of 0.1 would move the optimum away from the loss's own
            self.parts.append(torch.optim.Muon(inner, lr=lr, weight_decay=0.0))
        if outer:
            self.parts.append(torch.optim.Adam(outer, lr=adam_lr))
        # the parts' own dictionaries: a rate that a schedule sets here reaches them
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of each part."""
        for part in self.parts:
            part.step()
        return None


def _block_matrices(model: nn.Module) -> list[torch.Tensor]:
    # embeddings and the head stand outside the blocks: their rows are words, not directions
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = {
        layer for blocks in lists for layer in blocks.modules() if isinstance(layer, nn.Linear)
    }
    return [layer.weight for layer in layers if layer.weight.requires_grad]
