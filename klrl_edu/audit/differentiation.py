"""∇ of a loss by the log-probabilities of its batch: all batches at once where the loss allows,
else one backward pass each.

    ∂loss/∂log π(y_t|y_<t) [B,T], and ∂loss/∂log π(v|y_<t) [B,T,V] for losses that read full
    distributions        (1)

`torch.func.vmap` runs the loss itself, never the network behind it. X batches of B sequences, T
tokens, V columns, n = BT (+ BTV).
"""

from typing import ClassVar

import torch
from torch import Tensor

from klrl_edu.audit.subjects import SHARED, Subject
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError
from klrl_edu.learning.batches import check_loss, needs_of


class LossOnSupport(Subject):
    """A loss; what it gives on a batch is its gradient (1), [n]."""

    kind: ClassVar[str] = "loss"

    @property
    def leaves(self) -> tuple[str, ...]:
        """The fields that carry a gradient."""
        if "distributions" in needs_of(self.function):
            return "log_probs", "log_dists"
        return ("log_probs",)

    def edges(self, rows: Tensor) -> Tensor:
        """The edge of the support's trie that each entry of a gradient belongs to, −1 for none:
        rows [X,B] -> [X,n].
        """
        sequences = self.in_tree(rows)
        parts = [self.tree.taken_edges(sequences).flatten(1)]
        if len(self.leaves) > 1:
            parts.append(self.tree.all_edges(sequences).flatten(1))
        return torch.cat(parts, 1)

    def depths(self, rows: Tensor) -> Tensor:
        """The position in its sequence of each entry of a gradient: rows [X,B] -> [n]."""
        place, size = torch.arange(self.whole.tokens.shape[1], device=rows.device), rows.shape[1]
        parts = [place.repeat(size)]  # [B,T], flattened
        if len(self.leaves) > 1:
            each_column = place.repeat_interleave(self.tree.trie.space.vocab_size)
            parts.append(each_column.repeat(size))  # [B,T,V], flattened
        return torch.cat(parts)

    def one(self, rows: Tensor, draw: Draw | None = None) -> Tensor:
        """The gradient on one batch, rows [B] -> [n], by one backward pass.

        Raises:
            InputError: the loss returns anything but a finite scalar with a gradient.
        """
        fields = self.fields(rows)
        leaves = [fields[name].requires_grad_() for name in self.leaves]
        value = self.call(fields, draw)
        check_loss(value)
        gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        return self._checked(value.detach()[None], flat[None], rows[None])[0]

    def many(self, rows: Tensor) -> Tensor:
        """The gradients on batches rows [X,B] -> [X,n]."""
        fields = self.fields(rows)
        shared = {name: fields.pop(name) for name in SHARED}
        leaves = [fields[name].requires_grad_() for name in self.leaves]
        values = torch.func.vmap(lambda moving: self.call({**moving, **shared}))(fields)
        # batches do not touch one another, so the gradient of the sum is that of each
        gradients = torch.autograd.grad(values.sum(), leaves, materialize_grads=True)
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
        return self._checked(values, flat, rows)

    def unordered(self, rows: Tensor, result: Tensor) -> Tensor:
        """How the gradient on a batch [B] pushes each edge [E], in whatever order the
        batch stood.
        """
        edges = self.edges(rows[None])[0]
        live = edges >= 0
        pushed = torch.zeros(self.tree.edges, dtype=result.dtype, device=rows.device)
        return pushed.index_add(0, edges[live], result[live])

    def changed_input(self, rows: Tensor) -> str | None:
        """The field of a batch [B] that the loss changes in place, if any."""
        fields = self.fields(rows)
        kept = {name: value.clone() for name, value in fields.items()}
        for name in self.leaves:
            # a clone: changing a leaf in place would stop the loss before we can say so
            fields[name] = fields[name].requires_grad_().clone()
        versions = {name: value._version for name, value in fields.items()}
        self.call(fields)
        for name, value in fields.items():
            # the version counts changes made through torch; one through numpy shows in the value
            if value._version != versions[name] or not torch.equal(value.detach(), kept[name]):
                return name
        return None

    def _checked(self, values: Tensor, gradients: Tensor, rows: Tensor) -> Tensor:
        """Gradients [X,n] with 0 where nothing can move; refuses values [X] and entries elsewhere
        that are not finite.
        """
        gradients = torch.where(self.edges(rows) >= 0, gradients.detach(), 0.0).double()
        sound = torch.isfinite(values)
        bad = ~(sound & torch.isfinite(gradients).all(-1))
        if bool(bad.any()):
            place = int(bad.nonzero()[0])
            value = float(values[place])
            what = (
                f"{value:.6g} with a gradient that is not finite"
                if bool(sound[place])
                else f"{value}"
            )
            raise InputError(
                f"the loss {self.name} is {what} on the batch {self.describe(rows[place])}; look"
                " for log 0, 0/0, or a deviation of 0."
            )
        return gradients
