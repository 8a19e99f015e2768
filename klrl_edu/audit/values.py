"""Estimators of a divergence as random values: one a sequence, or one a batch.

    k on sequences:  E = Σ_y π(y) k(y),  Var/B for the mean of B of them;      k on batches:
    E = Σ_multisets P · k                                                                        (1)

Whether the value of a sequence depends on that sequence alone is tried out, on half of the support.
S supported sequences, X batches of B.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from klrl_edu.audit.adapting import (
    Adapter,
    adapted,
    draws_random_numbers,
    is_of_log_ratio,
    name_of,
    takes_a_batch,
    takes_a_log_ratio,
)
from klrl_edu.audit.checks import average_over_draws, check_rotated, probe
from klrl_edu.audit.executions import check_executions
from klrl_edu.audit.monte_carlo import (
    FAILURE_PROBABILITY,
    PARTS,
    sampled_moments,
    standard_errors,
)
from klrl_edu.audit.report import total_variance
from klrl_edu.audit.rounding import SAFETY, arithmetic_of, nudged_batches, type_name
from klrl_edu.audit.scenes import Scene
from klrl_edu.audit.subjects import SHARED, Subject
from klrl_edu.core import logspace
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError
from klrl_edu.core.multisets import blocks, count_blocks
from klrl_edu.learning.batches import Batch
from klrl_edu.models.contract import readable_count

_AGREE = 1e-9  # of a sequence's value in one batch and in another
_ROUNDING = 1e-14  # of the largest estimate: what lies this little below 0 is 0


@dataclass(frozen=True, kw_only=True)
class ValueOnSupport(Subject):
    """An estimator: a scalar, a value a sequence [N], or a token [N,T], summed over live tokens;
    [N] is averaged over the batch. n = 1.

    Attributes:
        of_token: the estimator itself where it maps log-ratios [N] to estimates [N], of tokens as
            of sequences; None for others.
    """

    kind: ClassVar[str] = "estimator"
    of_token: Callable[..., Any] | None = None

    def values(self, fields: dict[str, Tensor], draw: Draw | None = None) -> Tensor:
        """A scalar of the batch, or a value a sequence [N].

        Raises:
            InputError: another shape.
        """
        value, live = self.call(fields, draw), fields["live"]
        if isinstance(value, Tensor) and value.shape == live.shape:
            # after EOS an estimator may give anything: there its inputs are 0
            value = torch.where(live, value, 0.0).sum(-1)
        if not isinstance(value, Tensor) or value.shape not in ((), live.shape[:1]):
            raise InputError(
                f"the estimator {self.name} returned {_shape(value)}; expected a scalar, [N] ="
                f" {list(live.shape[:1])}, or [N, T]."
            )
        return value.detach().double()

    def one(self, rows: Tensor, draw: Draw | None = None) -> Tensor:
        """The estimate on one batch, rows [B] -> [1]; refuses NaN."""
        values = self.values(self.fields(rows), draw)
        if values.ndim:
            self._checked(values[:, None], rows[:, None])  # names the sequence
        return self._checked(values.mean().reshape(1, 1), rows[None])[0]

    def many(self, rows: Tensor) -> Tensor:
        """The estimates on batches rows [X,B] -> [X,1]."""
        fields = self.fields(rows)
        shared = {name: fields.pop(name) for name in SHARED}
        estimates = torch.func.vmap(lambda moving: self.values({**moving, **shared}).mean())(fields)
        return self._checked(estimates[:, None], rows)

    def unordered(self, rows: Tensor, result: Tensor) -> Tensor:
        """The estimate itself."""
        return result

    def reordered(self, result: Tensor, order: Tensor) -> Tensor:
        """The estimates themselves."""
        return result

    def changed_input(self, rows: Tensor) -> str | None:
        """The field of a batch [B] that the estimator changes in place, if any."""
        fields = self.fields(rows)
        kept = {name: value.clone() for name, value in fields.items()}
        self.call(fields)
        for name, value in fields.items():
            # the version counts changes made through torch; one through numpy shows in the value
            if value._version or not torch.equal(value, kept[name]):
                return name
        return None

    def by_sequence(self, rows: Tensor) -> Tensor | None:
        """The values of all sequences `rows` [S] of the support; None where they depend on the rest
        of their batch, or on draws.
        """
        if self.draws:
            return None
        values = self.values(self.fields(rows))
        if values.ndim == 0:
            return None
        # every second sequence, from the last: other neighbours, another place, another batch size
        half = torch.arange(len(rows) - 1, -1, -2, device=rows.device)
        again = self.values(self.fields(rows[half]))
        # a NaN is refused below, by the name of its sequence
        if not torch.allclose(again, values[half], rtol=_AGREE, atol=_AGREE, equal_nan=True):
            return None
        self._checked(values[:, None], rows[:, None])
        return values

    def negative_tokens(self, log_law: Tensor) -> float | None:
        """The probability under the law [S] of each problem that the estimate at a live token is
        below 0; None where the estimator has none of single tokens.
        """
        fields = self.fields(torch.arange(len(self.whole.tokens), device=log_law.device))
        live = fields["live"]
        if self.of_token is not None:
            # live tokens alone, in a row, as an estimator of u sees sequences
            ratio = (fields["log_probs"] - fields["prior_log_probs"])[live]
            estimates = self.of_token(ratio)
            if not isinstance(estimates, Tensor) or estimates.shape != ratio.shape:
                return None
            at_token = torch.zeros(live.shape, dtype=torch.float64, device=live.device)
            at_token[live] = estimates.detach().double()
        else:
            at_token = self.call(fields)
            if not isinstance(at_token, Tensor) or at_token.shape != live.shape:
                return None
        weight = log_law.exp()
        below = (at_token < -_ROUNDING * _largest(at_token[live])) & live
        # a quotient of expected numbers of tokens, so that each token counts alike
        return float(weight @ below.double().sum(-1)) / float(weight @ live.double().sum(-1))

    def _checked(self, estimates: Tensor, rows: Tensor) -> Tensor:
        """Estimates [X,1] on batches [X,B]; infinite ones are values, NaN is none."""
        bad = torch.isnan(estimates.squeeze(-1))
        if bool(bad.any()):
            batch = rows[int(bad.nonzero()[0])]
            raise InputError(
                f"the estimator {self.name} is NaN on the batch {self.describe(batch)}; look for"
                " 0/0 or inf − inf."
            )
        return estimates


def value_on_support(
    estimator: Callable[..., Any], scene: Scene, adapt: Adapter | None, batch_size: int
) -> ValueOnSupport:
    """An estimator of log-ratios u [N] -> [N], of a Batch, or of tensors by name."""
    function, draws = estimator, draws_random_numbers(estimator)
    of_token = estimator if adapt is None and is_of_log_ratio(estimator) else None
    if adapt is None and takes_a_log_ratio(estimator):
        function = _of_log_ratio(estimator)
    elif adapt is not None or not takes_a_batch(estimator):
        function = adapted(estimator, adapt)
    return ValueOnSupport(
        function,
        name_of(estimator),
        scene.whole,
        scene.tree,
        draws,
        block=batch_size,
        of_token=of_token,
    )


def _of_log_ratio(estimator: Callable[..., Any]) -> Callable[..., Tensor]:
    def on_batch(batch: Batch, **draw: Draw) -> Tensor:
        log_ratio = (batch.log_probs - batch.prior_log_probs).sum(-1)
        values = estimator(log_ratio, **draw)
        if not isinstance(values, Tensor) or values.shape != log_ratio.shape:
            raise InputError(
                f"the estimator returned {_shape(values)}; expected {list(log_ratio.shape)}, one"
                " estimate a log-ratio."
            )
        return values

    return on_batch


def _shape(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def enumerated_value(
    subject: ValueOnSupport, scene: Scene, batch_size: int, max_executions: int
) -> dict[str, Any]:
    """Moments over every sequence, or over every batch where the estimator needs that."""
    laws = [view.law for view in scene.views]
    drawn = [(law > -math.inf).nonzero().squeeze(-1) for law in laws]
    every = torch.cat([rows + start for rows, start in zip(drawn, scene.starts, strict=True)])
    if not subject.draws:
        arithmetic = arithmetic_of(lambda: subject.call(subject.fields(every)))
        subject = dataclasses.replace(subject, arithmetic=arithmetic)
        # faults first, on the whole support as one batch
        probe(dataclasses.replace(subject, block=1), every[None])
    values = subject.by_sequence(every)
    # an estimate that depends on the rest of its batch says nothing of a token either
    per_token = None if values is None else subject.negative_tokens(torch.cat(laws))
    if values is not None:
        own = values.split([len(rows) for rows in drawn])
        log_probs = [law[rows] for law, rows in zip(laws, drawn, strict=True)]
        found = _of_sequences([*own], log_probs, batch_size, max_executions)
        moved = [nudged.by_sequence(every) for nudged in _nudged(subject)]
        weight = torch.cat(log_probs).exp() / len(laws)
        noise = max(
            (_weighted(weight, again - values) for again in moved if again is not None), default=0.0
        )
        size = _weighted(weight, values)
    else:
        check_executions(scene.drawn, batch_size, max_executions)
        rows, log_weight = scene.every_batch(batch_size)
        picked, expected = probe(subject, rows)
        vmap = subject.why_not_vmap(picked, expected) is None
        check_rotated(subject, picked, expected, vmap=vmap)
        parts = list(subject.executions(rows, log_weight, vmap=vmap, max_executions=max_executions))
        estimates = torch.cat([part.results[:, 0] for part in parts])
        weights = torch.cat([part.log_weight for part in parts])
        mean = _mean(weights, estimates)
        found = {
            "mean": mean,
            "variance": _variance(weights, estimates, mean),
            "executions": len(estimates),
            "probability_negative": _probability_negative(weights, estimates),
            "notes": (),
        }
        noise = max(
            float((average_over_draws(nudged, batch) - average_over_draws(subject, batch)).abs())
            for nudged in _nudged(subject)
            for batch in picked
        )
        size = _weighted(weights.exp(), estimates)
    # inf − inf, where both estimates are infinite, says nothing of rounding
    unresolved = noise + torch.finfo(torch.float64).eps * size
    return {
        **found,
        "probability_negative_token": per_token,
        "rounding": SAFETY * unresolved if math.isfinite(unresolved) else 0.0,
        "arithmetic": type_name(subject.arithmetic),
    }


def _nudged(subject: ValueOnSupport) -> list[ValueOnSupport]:
    """The estimator on inputs that are moved by a rounding."""
    batches = nudged_batches(subject.whole, subject.arithmetic)
    return [dataclasses.replace(subject, whole=batch) for batch in batches]


def _weighted(weight: Tensor, values: Tensor) -> float:
    """Σ p |value|, over what is finite."""
    return float(weight @ torch.where(torch.isfinite(values), values.abs(), 0.0))


def _of_sequences(
    values: Sequence[Tensor], log_probs: Sequence[Tensor], batch_size: int, max_executions: int
) -> dict[str, Any]:
    """Moments of the mean over the problems of the means of B independent values [S_m]; only
    P(estimate < 0) needs the batches themselves.
    """
    problems = len(values)
    means = [_mean(law, each) for law, each in zip(log_probs, values, strict=True)]
    spread = math.fsum(
        _variance(law, each, mean) for law, each, mean in zip(log_probs, values, means, strict=True)
    )
    batches = count_blocks([len(each) for each in values], batch_size)
    negative: float | None = None
    notes: tuple[str, ...] = ()
    if batches <= max_executions:
        starts = [sum(len(each) for each in values[:k]) for k in range(problems)]
        rows, log_weight = blocks(log_probs, starts, batch_size)
        negative = _probability_negative(log_weight, torch.cat([*values])[rows].mean(-1))
    else:
        notes = (
            (
                f"P(estimate < 0) was not computed: it takes {readable_count(batches)} batches,"
                f" more than max_executions = {max_executions:,}."
            ),
        )
    return {
        "mean": torch.stack(means).mean(0),
        # problems are independent, so their mean has 1/M² of the summed variances
        "variance": spread / (batch_size * problems**2),
        # the moments need the values of single sequences alone
        "executions": sum(map(len, values)) if negative is None else batches,
        "probability_negative": negative,
        "notes": notes,
    }


def sampled_value(
    subject: ValueOnSupport,
    scene: Scene,
    batch_size: int,
    count: int,
    draw: Draw,
    bound: float | None,
) -> dict[str, Any]:
    """Moments over `count` batches drawn, and the means of independent parts of them."""
    rows = scene.drawn_batches(count, batch_size, draw)
    subject = dataclasses.replace(subject, block=1)
    picked, expected = probe(subject, rows)
    vmap = subject.why_not_vmap(picked, expected) is None
    estimates = torch.cat([part.results for part in subject.sampled(rows, draw, vmap=vmap)])
    parts = torch.stack([some.mean(0) for some in estimates.tensor_split(PARTS)])
    found: dict[str, Any] = {}
    if bound is not None:
        interval = sampled_moments([estimates], bound).interval
        found = {"interval": interval, "failure_probability": FAILURE_PROBABILITY}
    return {
        "mean": estimates.mean(0),
        "variance": float(estimates.var(0).sum()),
        "executions": count,
        "probability_negative": float((estimates < 0).double().mean()),
        "standard_error": standard_errors(parts),
        "parts": parts,
        "notes": (),
        **found,
    }


def _mean(log_weight: Tensor, values: Tensor) -> Tensor:
    return logspace.expectation(log_weight, values).reshape(1)


def _variance(log_weight: Tensor, values: Tensor, mean: Tensor) -> float:
    if not bool(torch.isfinite(mean)):
        return math.inf  # inf − inf would be NaN
    return total_variance(log_weight, values[:, None], mean)


def _probability_negative(log_weight: Tensor, estimates: Tensor) -> float:
    below = estimates < -_ROUNDING * _largest(estimates)
    return float(torch.exp(log_weight[below]).sum())


def _largest(values: Tensor) -> float:
    """The largest finite |value|; 0 where there is none."""
    finite = values[torch.isfinite(values)]
    return float(finite.abs().max()) if len(finite) else 0.0


def missing_mass_notes(name: str, missed: float, bias: float) -> list[str]:
    """What support mismatch does to an on-policy mean of q/π, as in k3; nothing where no mass is
    missed.

    Args:
        missed: log of the prior's mass where the policy has none.
        bias: of the estimator for KL(π‖q), in nats.
    """
    if missed == -math.inf:
        return []
    mass = math.exp(missed)
    whole = (
        f" That is the whole bias of {name} for reverse_kl."
        if abs(bias + mass) < _AGREE * (1 + mass)
        else ""
    )
    return [
        f"E_π[q/π] = {1 - mass:.6g} instead of 1: an estimator with the term q/π − 1, such as k3,"
        f" is {mass:.6g} nats too low.{whole}"
    ]
