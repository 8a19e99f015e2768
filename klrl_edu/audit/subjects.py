"""A function of a batch under audit, run on any batch of a support: one at a time, all at once by
vmap, or through its own draws.

`differentiation` makes gradients of it and `values` numbers; what both share is here. S supported
sequences, X batches of B, T tokens, n numbers a batch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from klrl_edu.audit.rounding import relative_precision
from klrl_edu.audit.tree import SupportTree
from klrl_edu.core.draws import Draw, enumerate_executions
from klrl_edu.core.errors import InputError, KlrlError, TooLargeError
from klrl_edu.learning.batches import Batch

_CHUNK = 1 << 20  # numbers of one field that a chunk of batches holds: 8 MiB
# the same for every batch, and left unbatched under vmap so that bincount and the like work
SHARED = ("group", "kl_coef")


class Executions(NamedTuple):
    """Batches as rows [X,B] of the support, what the function gives on them [X,n], and their
    log-probabilities [X].
    """

    rows: Tensor
    results: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class Subject(ABC):
    """A function of a Batch, and every sequence that its batches can hold.

    Attributes:
        function: of a Batch, and of `draw` where `draws`.
        name: for messages.
        whole: the Batch of all S sequences, without gradient.
        tree: their trie.
        draws: whether the function draws random numbers, by a parameter `draw`.
        place: which sequence of the tree each row of `whole` is; None where they are the same.
        width: rows that belong together, two in a preference pair; each such unit is a group.
        block: rows within which the order of units must not matter; a batch is blocks in a row.
        arithmetic: the least precise type that the function computes in.
    """

    kind: ClassVar[str]
    function: Callable[..., Any]
    name: str
    whole: Batch
    tree: SupportTree
    draws: bool
    place: Tensor | None = None
    width: int = 1
    block: int = 1
    arithmetic: torch.dtype = torch.float64

    @property
    def precision(self) -> float:
        """Relative error below which two of its results agree."""
        return relative_precision(self.arithmetic)

    @abstractmethod
    def one(self, rows: Tensor, draw: Draw | None = None) -> Tensor:
        """What the function gives on the batch `rows` [B] -> [n]."""

    @abstractmethod
    def many(self, rows: Tensor) -> Tensor:
        """The same for batches [X,B] -> [X,n], by one vmapped pass."""

    @abstractmethod
    def unordered(self, rows: Tensor, result: Tensor) -> Tensor:
        """What of a result [n] must not change with the order of its batch [B]."""

    @abstractmethod
    def reordered(self, result: Tensor, order: Tensor) -> Tensor:
        """Results of batches in their own order, from those [..., n] of the batches put into the
        order [B].
        """

    @abstractmethod
    def changed_input(self, rows: Tensor) -> str | None:
        """The field of a batch [B] that the function changes in place, if any."""

    def fields(self, rows: Tensor) -> dict[str, Tensor]:
        """The fields of the batches of sequences `rows` [B] or [X,B]; `group` and `kl_coef` [B]
        always.
        """
        # all batches have the same problems at the same places, so the first speaks for each
        alike = rows if rows.ndim == 1 else rows[0]
        found = {
            name: value[alike if name in SHARED else rows]
            for name, value in self.whole.tensors().items()
        }
        # each unit of a batch is a group, numbered anew
        if self.width > 1:
            found["group"] = torch.arange(len(alike), device=rows.device) // self.width
        return found

    def in_tree(self, rows: Tensor) -> Tensor:
        """Which sequences of the tree rows of `whole` are."""
        return rows if self.place is None else self.place[rows]

    def call(self, fields: dict[str, Tensor], draw: Draw | None = None) -> Any:
        """The function itself."""
        given: dict[str, Any] = dict(fields)
        batch = replace(self.whole, **given)
        return self.function(batch, **({"draw": draw} if self.draws else {}))

    def describe(self, rows: Tensor) -> str:
        """The sequences of a batch [B], for messages."""
        texts = self.tree.trie.space.decode(self.whole.tokens[rows[:4]])
        return f"[{', '.join(map(repr, texts))}{', …' if len(rows) > 4 else ''}]"

    def executions(
        self,
        rows: Tensor,
        log_weight: Tensor,
        *,
        vmap: bool,
        max_executions: int,
        look_at_order: bool = True,
    ) -> Iterator[Executions]:
        """All executions on batches [X,B] with log-probabilities [X], a chunk at a time.

        Args:
            vmap: all of a chunk at once.
            max_executions: the most outcomes of its own draws, over all batches.
            look_at_order: refuse a function to which the order within a block means something.

        Raises:
            TooLargeError: with the outcomes of its own draws the function has more than
                `max_executions`.
        """
        left = max_executions  # of the outcomes of its own draws, over all batches together
        order = self.orders(rows.shape[1]).get("reversed") if look_at_order else None
        chunks = zip(self._chunks(rows), self._chunks(rows, log_weight), strict=True)
        for some_rows, some_weight in chunks:
            if not self.draws:
                results = self.results(some_rows, None, vmap)
                if order is not None:
                    self.check_order(some_rows, results, order, "reversed", vmap)
                yield Executions(some_rows, results, some_weight)
                continue
            found = []
            for batch in some_rows:
                found.append(self.outcomes(batch, left, max_executions))
                left -= len(found[-1][0])
                if order is not None:
                    moved = batch[order]
                    # not counted against what is left: it is the same batch, and no execution
                    again = self.outcomes(moved, max_executions, max_executions)
                    if not self.same(
                        self._average(moved, *again), self._average(batch, *found[-1])
                    ):
                        self.refuse_order(batch, "reversed")
            # a batch stands once for each outcome of the draws on it
            repeats = torch.tensor([len(results) for results, _ in found], device=rows.device)
            results = torch.cat([results for results, _ in found])
            own_weight = torch.cat([weight for _, weight in found])
            weight = some_weight.repeat_interleave(repeats) + own_weight
            yield Executions(some_rows.repeat_interleave(repeats, 0), results, weight)

    def orders(self, size: int) -> dict[str, Tensor]:
        """Other orders [B] of a batch of `size` rows that are nothing to the function: within each
        block its units reversed, and rotated.
        """
        place = torch.arange(size, device=self.whole.tokens.device)
        if self.block <= self.width:
            return {}
        units = place.view(-1, self.block // self.width, self.width)
        return {"reversed": units.flip(1).flatten(), "rotated": units.roll(1, 1).flatten()}

    def check_order(
        self, rows: Tensor, results: Tensor, order: Tensor, what: str, vmap: bool
    ) -> None:
        """Batches [X,B] must give what they gave [X,n] when they stand in another order [B].

        Every batch is tried, not a few: what breaks ties by their place differs where something
        ties, and nowhere else.

        Raises:
            InputError: one does not.
        """
        again = self.reordered(self.results(rows[:, order], None, vmap), order)
        # relative to the largest entry, as small ones may be what is left of large ones
        rounding = self.precision * (1 + float(results.abs().max()))
        apart = ((again - results).abs() > rounding).any(-1)
        # of two copies of one sequence the other may have got what the first got before
        for place in apart.nonzero().squeeze(-1).tolist():
            batch, seen, before = rows[place], again[place], results[place]
            if not self.same(self.unordered(batch, seen), self.unordered(batch, before)):
                self.refuse_order(batch, what)

    def _average(self, rows: Tensor, results: Tensor, log_probs: Tensor) -> Tensor:
        """What the outcomes [K,n] on a batch [B] do together, whatever its order."""
        return self.unordered(rows, torch.exp(log_probs) @ results)

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Whether two results are equal but for rounding."""
        rounding = self.precision * (1 + float(other.abs().max()))
        return torch.allclose(one, other, rtol=self.precision, atol=rounding)

    def refuse_order(self, rows: Tensor, what: str) -> NoReturn:
        """A batch [B] gave another result in another order."""
        raise InputError(
            f"the {self.kind} {self.name} depends on the order of its batch:"
            f" {self.describe(rows)} {what} gives another result. Batches are enumerated without"
            " order: make it symmetric (a mean over all sequences, or over all pairs); or, where"
            " places mean something, say micro_batches=k (it splits the batch into k parts) or"
            " ordered=True (every order is enumerated)."
        )

    def sampled(self, rows: Tensor, draw: Draw, *, vmap: bool) -> Iterator[Executions]:
        """Batches [X,B] that were drawn, each of weight 1/X; the function's own draws are drawn
        too.
        """
        each = -math.log(len(rows))
        for some_rows in self._chunks(rows):
            log_weight = torch.full_like(some_rows[:, 0], each, dtype=torch.float64)
            yield Executions(some_rows, self.results(some_rows, draw, vmap), log_weight)

    def results(self, rows: Tensor, draw: Draw | None, vmap: bool) -> Tensor:
        """What the function gives on batches [X,B] -> [X,n], at once or one by one."""
        if vmap:
            return self.many(rows)
        return torch.stack([self.one(batch, draw) for batch in rows])

    def outcomes(self, rows: Tensor, left: int, max_executions: int) -> tuple[Tensor, Tensor]:
        """Every outcome of the function's own draws on one batch [B]: results [K,n] and
        log-probabilities [K].

        Raises:
            TooLargeError: more than are `left` of `max_executions`.
        """
        try:
            outcomes = enumerate_executions(lambda draw: self.one(rows, draw), left)
        except TooLargeError:
            raise TooLargeError(
                f"with its own draws the {self.kind} {self.name} has more than max_executions ="
                f" {max_executions:,} outcomes; take a smaller batch_size or space, raise"
                " max_executions, or sample: monte_carlo=n with draw=."
            ) from None
        results = torch.stack([outcome.result for outcome in outcomes])
        log_probs = [outcome.log_prob for outcome in outcomes]
        return results, torch.tensor(log_probs, dtype=torch.float64, device=rows.device)

    def why_not_vmap(self, rows: Tensor, expected: Tensor) -> str | None:
        """None where vmap gives the plain results `expected` [X,n] on the batches rows [X,B]; else
        the reason why it does not.
        """
        if self.draws:
            return f"the {self.kind} draws random numbers"
        try:
            seen = self.many(rows)
        except KlrlError:  # a fault of the function, and no limit of vmap
            raise
        except Exception as error:  # whatever a user's code raises under vmap; without vmap it ran
            return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        # nearly without an absolute part: small gradients must agree in digits of their own
        if not torch.allclose(seen, expected, rtol=self.precision, atol=self.precision / 1000):
            return "under vmap it gives other results"
        return None

    def _chunks(self, rows: Tensor, values: Tensor | None = None) -> Sequence[Tensor]:
        """Batches [X,B], or values [X] of them, in chunks whose fields stay small."""
        fields = self.whole.tensors()
        widest = fields.get("log_dists", self.whole.log_probs)
        batches = max(1, _CHUNK // (rows.shape[1] * widest[0].numel()))
        return (rows if values is None else values).split(batches)
