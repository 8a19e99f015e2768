"""∇ of a loss by the log-probabilities of its batch: all batches at once where the loss allows,
else one backward pass each.

    ∂loss/∂log π(y_t|y_<t) [B,T], and ∂loss/∂log π(v|y_<t) [B,T,V] for losses that read full
    distributions        (1)

`torch.func.vmap` runs the loss itself, never the network behind it. X batches of B sequences, T
tokens, V columns, n = BT (+ BTV).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from klrl_edu.audit.subjects import SHARED, Subject
from klrl_edu.audit.tree import SupportTree
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError
from klrl_edu.learning.batches import check_loss, needs_of
from klrl_edu.models.contract import LanguageModel, conditional_log_probs


@dataclass(frozen=True, kw_only=True)
class LossOnSupport(Subject):
    """A loss; what it gives on a batch is its gradient (1), [n].

    Attributes:
        reaches: whether gradients at given entries of the next-token distributions reach a weight
            (`reach_of`).
        unreachable: nodes of the tree where they were seen not to.
    """

    kind: ClassVar[str] = "loss"
    reaches: Callable[[Tensor, Tensor], bool]
    unreachable: set[int] = field(default_factory=set)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The fields that carry a gradient."""
        if "distributions" in needs_of(self.function):
            return "log_probs", "log_dists"
        return ("log_probs",)

    @property
    def widths(self) -> list[int]:
        """How many entries of a gradient a sequence has in each field."""
        length = self.whole.tokens.shape[1]
        return [length, length * self.tree.trie.space.vocab_size][: len(self.leaves)]

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
        # fresh from indexing, so leaves
        leaves = [fields[name].requires_grad_() for name in self.leaves]
        value = self.call(fields, draw)
        check_loss(value)
        # a field that the loss does not read counts 0
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

    def reordered(self, result: Tensor, order: Tensor) -> Tensor:
        """Gradients of batches in their own order, from those [..., n] of the batches put into the
        order [B].
        """
        size = len(order)
        parts = result.split([size * width for width in self.widths], -1)
        back = torch.argsort(order)  # the inverse of a permutation
        by_sequence = [part.unflatten(-1, (size, -1))[..., back, :] for part in parts]
        return torch.cat([part.flatten(-2) for part in by_sequence], -1)

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
        """Gradients [X,n] with 0 where nothing can move.

        Raises:
            InputError: what a training step would refuse too: a value [X] or a gradient that is
                not finite; or a push on tokens without mass.
        """
        edges, gradients = self.edges(rows), gradients.detach().double()
        # after EOS log π is a constant, so what the loss does there, NaN included, moves nothing
        movable = torch.where(edges >= 0, gradients, 0.0)
        bad = ~(torch.isfinite(values) & torch.isfinite(movable).all(-1))
        if bool(bad.any()):
            place = int(bad.nonzero()[0])
            self._refuse(float(values[place]), float(movable[place].norm()), rows[place])
        stray = (edges < 0) & (gradients != 0)  # NaN among them
        if "log_dists" in self.leaves and bool(stray.any()):
            self._look_at_tokens_without_mass(values, gradients, stray, rows)
        return movable

    def _refuse(self, value: float, norm: float, rows: Tensor) -> NoReturn:
        """Names what is not finite, as training does."""
        what = f"{value:.6g} and the gradient's norm is {norm}" if math.isfinite(value) else value
        raise InputError(
            f"the loss {self.name} is {what} on the batch {self.describe(rows)}; look for log 0,"
            " 0/0, or a deviation of 0."
        )

    def _look_at_tokens_without_mass(
        self, values: Tensor, gradients: Tensor, stray: Tensor, rows: Tensor
    ) -> None:
        """Gradients at log-probabilities of −inf [X,n] are nothing where the policy has no
        weight behind them (a forced EOS), and reach every weight where it has (a logit of −inf).
        """
        length, columns = self.whole.tokens.shape[1], self.tree.trie.space.vocab_size
        for place in stray.any(-1).nonzero().squeeze(-1).tolist():
            batch = rows[place]
            sequences = self.in_tree(batch)
            pushed = stray[place, len(batch) * length :].view(len(batch), length, columns)
            nodes = set(self.tree.trie.node_of[sequences][pushed.any(-1)].tolist()) - {-1}
            # what was found out of reach is not tried again: a try costs a backward pass
            if nodes <= self.unreachable:
                continue
            if not self.reaches(sequences, pushed):
                self.unreachable.update(nodes)
                continue
            if not bool(torch.isfinite(gradients[place][stray[place]]).all()):
                self._refuse(float(values[place]), math.nan, batch)
            raise InputError(
                f"the loss {self.name} pushes log-probabilities of tokens without mass, which are"
                f" -inf, on the batch {self.describe(batch)}; leave them out:"
                " torch.where(batch.log_dists > -math.inf, …, 0)."
            )


def reach_of(policy: LanguageModel, tree: SupportTree) -> Callable[[Tensor, Tensor], bool]:
    """Whether gradients at entries [B,T,V] of the next-token distributions of sequences [B] reach a
    weight of the policy.
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def reaches(sequences: Tensor, entries: Tensor) -> bool:
        prompt = None if tree.prompt is None else tree.prompt[sequences]
        log_dists = conditional_log_probs(policy, tree.tokens[sequences], prompt)
        if not log_dists.requires_grad:
            return False
        # a NaN put in comes out wherever there is a way, and nowhere else
        marked = torch.zeros_like(log_dists).masked_fill(entries, math.nan)
        gradients = torch.autograd.grad(log_dists, parameters, marked, materialize_grads=True)
        return any(bool(torch.isnan(gradient).any()) for gradient in gradients)

    return reaches
