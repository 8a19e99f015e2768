"""The exact mean, bias and variance of any estimator, by enumerating everything that can be drawn.

    E[g] = Σ_batches P(batch) · ∇loss(batch),    Var g = E‖g − E g‖²                             (1)

Batches are multisets with their multiplicities (`executions`); the loss is differentiated by its
token log-probabilities, all batches at once where it allows (`differentiation`), and that is
contracted with the policy's Jacobian in closed form (`coordinates`). B batch size.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from klrl_edu.audit.adapting import (
    Adapter,
    adapted,
    draws_random_numbers,
    name_of,
    notes_of,
    takes_a_batch,
)
from klrl_edu.audit.checks import (
    average_over_draws,
    check_rotated,
    no_global_randomness,
    probe,
)
from klrl_edu.audit.comparisons import Against, other_losses, other_reports, others_of
from klrl_edu.audit.coordinates import Coordinates, coordinates_of
from klrl_edu.audit.decomposition import fits, is_sum_over_pairs, pair_moments, whole_batches
from klrl_edu.audit.differentiation import LossOnSupport, reach_of
from klrl_edu.audit.executions import check_executions
from klrl_edu.audit.moments import (
    Contributions,
    GradientMoments,
    contributions_of,
    dense_coefficients,
    gradient_moments,
)
from klrl_edu.audit.monte_carlo import (
    FAILURE_PROBABILITY,
    PARTS,
    check_monte_carlo,
    distance_interval,
    sampled_moments,
    standard_errors,
)
from klrl_edu.audit.plans import Plan, planned
from klrl_edu.audit.report import AuditReport
from klrl_edu.audit.rounding import (
    SAFETY,
    arithmetic_of,
    nudged_batches,
    relative_precision,
    type_name,
)
from klrl_edu.audit.scenes import Scene, View, build_scene
from klrl_edu.audit.targets import value_targets
from klrl_edu.audit.values import (
    enumerated_value,
    missing_mass_notes,
    sampled_value,
    value_on_support,
)
from klrl_edu.core.arguments import check_arguments, check_function, check_loss_function
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.multisets import count_blocks
from klrl_edu.core.validation import check_count
from klrl_edu.learning.batches import Loss, needs_of
from klrl_edu.learning.sources import Source
from klrl_edu.models.contract import MAX_SEQUENCES, LanguageModel
from klrl_edu.problems.problem import Problem, check_problems

MAX_EXECUTIONS = 100_000  # batches by default, one by one
MAX_AT_ONCE = 1_000_000  # the same where they run all at once, by vmap
_CHUNK = 1 << 22  # numbers in one block of sampled gradients: 32 MiB


def audit_gradient(
    loss: Loss | Callable[..., Any],
    policy: LanguageModel,
    source: Problem | Sequence[Problem] | Source,
    *,
    batch_size: int | None = None,
    behaviour: LanguageModel | None = None,
    adapt: Adapter | None = None,
    against: Against | Mapping[str, Against] | None = None,
    micro_batches: int | None = None,
    ordered: bool = False,
    max_executions: int | None = None,
    monte_carlo: int | None = None,
    draw: Draw | None = None,
    bound: float | None = None,
) -> AuditReport:
    """What a loss descends on average, exactly, and with what variance.

    Args:
        loss: Batch -> scalar, as `train` takes it; a parameter `draw` gets a Draw, whose every
            outcome is enumerated. Or a function of tensors by name: a Batch's, verl's, TRL's and
            OpenRLHF's names are understood.
        policy: π, on the prior's support; its trainable parameters are the coordinates.
        source: prior, reward and λ; several problems of one prior, whose sequences stand in one
            batch as in training, and over which the targets are averaged; or a source of
            `sources`, as training takes it, whose batches are enumerated by its law: samples of π
            or of a behaviour policy, the whole support, texts, preference pairs.
        batch_size: B sequences a problem, 1 by default; a loss that needs the support is run once
            on it. A source has its own.
        behaviour: the policy that draws the batches, on π's support; π itself by default. A source
            has its own.
        adapt: what parameters of other names are: parameter -> name, value or function of the
            Batch; or Batch -> keyword arguments.
        against: what the mean is held against besides the targets: another loss, with its mean over
            the same batches (one marked `@needs("support")` is a function of the policy itself,
            differentiated exactly); an AuditReport or the file of one; or several by name.
        micro_batches: the loss splits each problem's sequences into so many parts in a row: which
            part a sequence falls into counts, its place within does not.
        ordered: every place counts, so all S^B orders are enumerated.
        max_executions: the most batches (multisets of sequences, times the outcomes of the loss's
            own draws) to enumerate; by default a million where they run at once, by vmap, and
            100,000 one by one. A loss that is a sum over the pairs of its batch, as seen on a few
            of them, needs the pairs alone (`decomposition`), up to 64 sequences a batch.
        monte_carlo: draw this many batches instead, with `draw`; the report then has intervals for
            the distance to each target. The same seed draws the same batches for another loss.
        bound: the largest |entry| that a gradient can have: with it every entry of the mean gets an
            interval that holds for every distribution.

    Returns:
        Mean and variance of ∇loss beside the targets of `targets`: objective (∇(−J)),
        expected_reward (∇(−E r)), the divergences of π and q per sequence and, with frozen
        prefixes, per token, the entropy likewise, and with a behaviour policy what losses without
        weights follow. For preference pairs the divergences alone; for texts
        negative_log_likelihood, −E[log π] over the source's weights.

    Raises:
        TooLargeError: more executions than `max_executions`; the message has the count.
        UnsupportedPolicyError: the policy leaves the prior's support, or the behaviour policy the
            policy's.
        InputError: what the loss must not do: return anything but a finite scalar with a finite
            gradient, change its inputs, draw from a global generator, depend on the order of the
            batch; a source whose law is not known.
    """
    started = time.perf_counter()
    check_arguments(
        "audit_gradient(loss, policy, source)",
        loss=(loss, object),
        policy=(policy, LanguageModel),
        source=(source, object),
    )
    check_loss_function(loss)
    check_monte_carlo(monte_carlo, draw, bound)
    if max_executions is not None:
        check_count(max_executions, "max_executions")
    _check_policy(policy)
    others = others_of(against)
    function = loss if adapt is None and takes_a_batch(loss) else adapted(loss, adapt)
    asked = needs_of(function)
    plan = planned(source, batch_size, behaviour, asked, micro_batches, ordered=ordered)
    # one scene serves all, so it is scored with everything that any of the losses reads
    for other in other_losses(others).values():
        plan = dataclasses.replace(
            plan, distributions=plan.distributions or "distributions" in needs_of(other)
        )
    # enumerated multisets are no fewer than the sequences; batches that are drawn may be
    limit = MAX_SEQUENCES if max_executions is None or monte_carlo else max_executions
    scene, targets_of = plan.scene(policy, limit)
    coordinates = coordinates_of(policy, scene.tree)
    run = _Run(policy, scene, coordinates, max_executions, monte_carlo, draw, bound)
    found = run(loss, function, plan)

    coefficients = scene.mean_over_problems(targets_of)
    zero = _zero_targets(scene, targets_of, coefficients)
    # stacked, so that each forward pass of a network serves all of them
    vectors = coordinates.combine(torch.stack(list(coefficients.values())))
    targets = dict(zip(coefficients, vectors, strict=True))
    targets |= other_reports(others, coordinates.name, len(vectors[0]))
    compared: dict[str, Tensor] = dict(targets)  # parts [K,P] where a target is sampled itself
    for name, other in other_losses(others).items():
        theirs = planned(source, batch_size, behaviour, needs_of(other))
        # the whole support is one batch, which has no parts to split
        if not theirs.complete:
            theirs = dataclasses.replace(theirs, micro_batches=plan.micro_batches)
        seen = run(other, other, theirs)
        targets[name], compared[name] = seen["mean"], seen.get("parts", seen["mean"])
    parts = found.pop("parts", None)  # no field of a report
    if parts is not None:
        found["distances"] = {n: distance_interval(parts, other) for n, other in compared.items()}
        found["size"] = distance_interval(parts, torch.zeros_like(vectors[0]))
    return AuditReport(
        name=name_of(loss),
        targets=targets,
        coordinates=coordinates.name,
        entries=coordinates.entries,
        batch_size=plan.batch_size,
        cost=coordinates.cost,
        zero_targets=zero,
        notes=(*scene.remarks, *notes_of(function)),
        precision=relative_precision(_parameter_type(policy)),
        seconds=time.perf_counter() - started,
        **found,
    )


def audit_value(
    estimator: Callable[..., Any],
    policy: LanguageModel,
    problem: Problem | Sequence[Problem],
    *,
    batch_size: int = 1,
    behaviour: LanguageModel | None = None,
    adapt: Adapter | None = None,
    max_executions: int | None = None,
    monte_carlo: int | None = None,
    draw: Draw | None = None,
    bound: float | None = None,
) -> AuditReport:
    """The exact mean and variance of an estimator of KL(π‖q) from samples.

    Args:
        estimator: sequence log-ratios u = log π/q [N] in nats -> estimates [N], e.g.
            `kl_values.k3`; or a function of a `batch`, or of tensors by name as for
            `audit_gradient`, that returns a value a sequence [N], a token [N,T] (summed over live
            tokens) or a batch (scalar).
        policy: π. Where it has mass and the prior none, KL(π‖q) is infinite, and the report says
            so.
        problem: its prior is q; of several, over which KL is averaged, each gives its samples.
        batch_size: estimates are averaged over this many independent samples a problem.
        behaviour: the policy that draws the samples, on π's support; π itself by default.
        adapt: what parameters of other names are.
        max_executions: the most batches to enumerate, 100,000 by default, which only estimators of
            whole batches and P(estimate < 0) need.
        monte_carlo, draw, bound: as for `audit_gradient`.

    Returns:
        Targets reverse_kl and forward_kl, per sequence and per token, in nats; P(estimate < 0),
        None with a note where it has too many outcomes.

    Raises:
        TooLargeError: more executions than `max_executions`; the message has the count.
        InputError: the estimator returns NaN or another shape, or does what a loss must not do.
    """
    started = time.perf_counter()
    check_arguments(
        "audit_value(estimator, policy, problem)",
        estimator=(estimator, object),
        policy=(policy, LanguageModel),
        problem=(problem, object),
    )
    problems = check_problems(problem)
    check_function(estimator, "estimator", "kl_values.k3")
    check_count(batch_size, "batch_size")
    if max_executions is not None:
        check_count(max_executions, "max_executions")
    check_monte_carlo(monte_carlo, draw, bound)
    # KL reads no reward, and where q has no mass it is infinite: a result, and no error
    scene = build_scene(
        policy, problems, behaviour, MAX_SEQUENCES, distributions=True, supported=False
    )
    subject = value_on_support(estimator, scene, adapt, batch_size)
    with no_global_randomness(f"the estimator {subject.name}"):
        if monte_carlo is not None:
            assert draw is not None  # checked above
            found = sampled_value(subject, scene, batch_size, monte_carlo, draw, bound)
        else:
            limit = MAX_EXECUTIONS if max_executions is None else max_executions
            found = enumerated_value(subject, scene, batch_size, limit)
    each = [value_targets(view.whole, view.tree, view.missed) for view in scene.views]
    targets = {name: torch.stack([found[name] for found in each]).mean(0) for name in each[0]}
    notes = scene.remarks
    # E_π[q/π], of which the note speaks, is a mean over π's own samples of one problem
    if behaviour is None and len(each) == 1:
        bias = float(found["mean"] - targets["reverse_kl"])
        notes += tuple(missing_mass_notes(subject.name, scene.views[0].missed, bias))
    found["notes"] = (*notes, *notes_of(subject.function), *found["notes"])
    parts = found.pop("parts", None)
    if parts is not None:
        found["distances"] = {n: distance_interval(parts, other) for n, other in targets.items()}
        found["size"] = distance_interval(parts, torch.zeros_like(parts[0]))
    return AuditReport(
        name=subject.name,
        targets=targets,
        coordinates="nats",
        batch_size=batch_size,
        seconds=time.perf_counter() - started,
        **found,
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """How losses are averaged over the batches of one scene."""

    policy: LanguageModel
    scene: Scene
    coordinates: Coordinates
    max_executions: int | None
    monte_carlo: int | None
    draw: Draw | None
    bound: float | None
    seen: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def __call__(self, loss: Any, function: Loss, plan: Plan) -> dict[str, Any]:
        """Mean, variance and how they were found, of `loss` as a `function` of a Batch."""
        whole = self.scene.whole
        subject = LossOnSupport(
            function,
            name_of(loss),
            # another loss may read the whole support where the audited one does not, or the reverse
            dataclasses.replace(whole, complete=plan.lists_support),
            self.scene.tree,
            draws_random_numbers(function),
            self.scene.place,
            self.scene.width,
            plan.block * self.scene.width,
            reaches=reach_of(self.policy, self.scene.tree),
        )
        with no_global_randomness(f"the loss {subject.name}"):
            # beside a sampled loss, a function of the policy itself is still exact
            if self.monte_carlo is None or (plan.complete and self.seen):
                return self._enumerated(subject, plan)
            return self._sampled(subject, plan)

    def _enumerated(self, loss: LossOnSupport, plan: Plan) -> dict[str, Any]:
        """Moments over every execution."""
        if plan.complete:
            # one batch, with probability 1; its order is the support's, so nothing is tried out
            device = loss.whole.tokens.device
            rows = torch.arange(len(loss.whole.tokens), device=device)[None]
            log_weight = torch.zeros(1, dtype=torch.float64, device=device)
            return self._over(dataclasses.replace(loss, block=loss.width), rows, log_weight)
        shape = self.scene.drawn, plan.block, plan.micro_batches
        # pairs only where batches are many: that (1) of `decomposition` holds is tried, not proved
        if count_blocks(*shape) > MAX_EXECUTIONS:
            found = self._over_pairs(loss, plan)
            if found is not None:
                return found
        # only now, as a sum over pairs needs few batches, however many there are
        check_executions(self.scene.drawn, plan.block, self._limit, plan.micro_batches)
        rows, log_weight = self.scene.every_batch(plan.block, plan.micro_batches)
        return self._over(loss, rows, log_weight)

    @property
    def _limit(self) -> int:
        return MAX_AT_ONCE if self.max_executions is None else self.max_executions

    def _over(self, loss: LossOnSupport, rows: Tensor, log_weight: Tensor) -> dict[str, Any]:
        """Moments over batches [X,B] with log-probabilities [X]."""
        # plain results first: they are what vmap is held against
        loss, picked, gradients = _looked_at(loss, rows)
        reason = loss.why_not_vmap(picked, gradients)
        # a million is meant for batches at once; a limit that was given holds either way
        if reason is not None and self.max_executions is None and len(rows) > MAX_EXECUTIONS:
            raise TooLargeError(
                f"{len(rows):,} batches one by one ({reason}) take long; give max_executions ="
                f" {len(rows)} to wait for them, or sample: monte_carlo=n with draw=."
            )
        check_rotated(loss, picked, gradients, vmap=reason is None)
        passes = iter((True, False))  # of two passes over the batches one looks at their order
        kept: list[Contributions] = []

        def contributions() -> Iterable[Contributions]:
            if kept:
                return kept
            parts = loss.executions(
                rows,
                log_weight,
                vmap=reason is None,
                max_executions=self._limit,
                look_at_order=next(passes),
            )
            if reason is None:
                return contributions_of(loss, parts)
            kept.extend(contributions_of(loss, parts))  # one by one is slow: a second pass reads it
            return kept

        edges = self.scene.tree.edges
        moments = gradient_moments(contributions, self.coordinates, edges, rows.device)
        noise = _noise(loss, picked, gradients, vmap=reason is None)
        return self._report(loss, moments, noise, _how(reason))

    def _over_pairs(self, loss: LossOnSupport, plan: Plan) -> dict[str, Any] | None:
        """Moments over all batches of a loss that is a sum over their pairs; None for others."""
        # (1) of `decomposition` is of one law and without draws; of two sequences nothing is saved
        single = len(self.scene.views) == 1 and plan.micro_batches == 1 and loss.width == 1
        if not single or loss.draws or plan.block < 3:
            return None
        (view,), limit = self.scene.views, self._limit
        drawn = (view.law > -math.inf).nonzero().squeeze(-1)
        if not fits(loss, len(drawn), plan.block, limit):
            return None
        rows = whole_batches(drawn, plan.block)
        loss, picked, gradients = _looked_at(loss, rows)
        # the trial of (1) runs by vmap itself
        if loss.why_not_vmap(picked, gradients) is not None:
            return None
        if not is_sum_over_pairs(loss, rows, drawn[0]):
            return None
        check_rotated(loss, picked, gradients, vmap=True)
        moments = pair_moments(loss, view.law, plan.block, self.coordinates)
        noise = _noise(loss, picked, gradients, vmap=True)
        how = f"vmap, on pairs: on {len(rows)} batches of {plan.block} it was a sum over pairs"
        return self._report(loss, moments, noise, how)

    def _report(
        self, loss: LossOnSupport, moments: GradientMoments, noise: float, how: str
    ) -> dict[str, Any]:
        # sums lose an ε of their size, the loss its noise; ‖Σ c φ‖ ≤ Σ|c| max ‖φ‖
        unresolved = torch.finfo(torch.float64).eps * moments.size + noise
        return {
            "mean": self.coordinates.combine(moments.coefficients[None])[0],
            "variance": moments.variance,
            "executions": moments.executions,
            "differentiation": how,
            "rounding": SAFETY * unresolved * moments.longest,
            "arithmetic": type_name(loss.arithmetic),
        }

    def _sampled(self, loss: LossOnSupport, plan: Plan) -> dict[str, Any]:
        """Moments over batches drawn, and the means of independent parts of them."""
        count, draw, bound = self.monte_carlo, self.draw, self.bound
        assert count is not None  # checked on entry
        assert draw is not None
        if plan.complete:
            raise InputError(
                f"the loss {loss.name} reads the whole support, so there is nothing to draw; leave"
                " monte_carlo out."
            )
        rows = self._drawn(count, plan.batch_size, draw)
        # batches come in the order in which they were drawn, so order may mean something
        loss, picked, gradients = _looked_at(dataclasses.replace(loss, block=loss.width), rows)
        reason = loss.why_not_vmap(picked, gradients)
        # the part of each batch, in the order of the draws; sizes differ by one at most
        part = torch.arange(count, device=rows.device) * PARTS // count
        edges, sums = self.scene.tree.edges, []

        def estimates() -> Iterator[Tensor]:
            """Gradients [x,E], counted into their parts on the way."""
            parts = contributions_of(loss, loss.sampled(rows, draw, vmap=reason is None))
            total, seen = torch.zeros(PARTS, edges, dtype=torch.float64, device=rows.device), 0
            for dense, _ in dense_coefficients(parts, edges):
                total.index_add_(0, part[seen : seen + len(dense)], dense)
                seen += len(dense)
                yield dense
            # through the list, as a generator hands on only what it yields
            sums.append(total)

        found: dict[str, Any] = {}
        if bound is None:
            # without a bound no entry needs an interval, and norms alone give the variance
            norms = [float(self.coordinates.squared_norms(dense).sum()) for dense in estimates()]
            mean = self.coordinates.combine(sums[0].sum(0, keepdim=True) / count)[0]
            variance = (math.fsum(norms) - count * float(mean @ mean)) / (count - 1)
        else:
            at_once = max(1, _CHUNK // self.coordinates.size)  # wider than batches
            vectors = (
                self.coordinates.combine(some)
                for each in estimates()
                for some in each.split(at_once)
            )
            moments = sampled_moments(vectors, bound)
            mean, variance = moments.mean, moments.variance
            found = {"interval": moments.interval, "failure_probability": FAILURE_PROBABILITY}
        sizes = torch.bincount(part)[:, None]
        parts = self.coordinates.combine(sums[0] / sizes)
        return {
            "mean": mean,
            "variance": variance,
            "executions": count,
            "differentiation": _how(reason),
            "arithmetic": type_name(loss.arithmetic),
            "standard_error": standard_errors(parts),
            "parts": parts,
            **found,
        }

    def _drawn(self, count: int, size: int, draw: Draw) -> Tensor:
        """The batches of this audit [count,B]: the same for every loss, so that two are told
        apart by what they do and not by what they saw.
        """
        if size not in self.seen:
            self.seen[size] = self.scene.drawn_batches(count, size, draw)
        return self.seen[size]


def _looked_at(loss: LossOnSupport, rows: Tensor) -> tuple[LossOnSupport, Tensor, Tensor]:
    """The loss with the precision of its arithmetic, and some batches with their gradients."""
    if not loss.draws:  # one that draws needs its Draw to run, and counts as float64
        arithmetic = arithmetic_of(lambda: loss.call(loss.fields(rows[0])))
        loss = dataclasses.replace(loss, arithmetic=arithmetic)
    return loss, *probe(loss, rows)


def _noise(loss: LossOnSupport, picked: Tensor, gradients: Tensor, *, vmap: bool) -> float:
    """The most that a rounding of the inputs moves the gradient on some batches [x,B], where it is
    `gradients` [x,n]: Σ_e |Δc_e|.
    """
    # every outcome of its draws is run for each batch and each nudge, so one batch must do
    if loss.draws:
        picked = picked[:1]
        gradients = average_over_draws(loss, picked[0])[None]
    # the sequences of these batches alone are nudged, and numbered anew by their places
    sequences = picked.flatten()
    places = torch.arange(len(sequences), device=picked.device).view_as(picked)
    moved = [0.0]
    for batch in nudged_batches(loss.whole.pick(sequences), loss.arithmetic):
        nudged = dataclasses.replace(
            loss,
            whole=dataclasses.replace(batch, complete=loss.whole.complete),  # which pick unsets
            place=loss.in_tree(sequences),
        )
        if loss.draws:
            again = average_over_draws(nudged, places[0])[None]
        else:
            again = nudged.results(places, None, vmap)
        moved.append(float((again - gradients).abs().sum(-1).max()))
    return max(moved)


_CLEARLY = 1e-10  # of a nat or a unit of reward: what is larger is no rounding of 0


def _zero_targets(
    scene: Scene,
    targets_of: Callable[[View], dict[str, Tensor]],
    targets: Mapping[str, Tensor],
) -> tuple[str, ...]:
    """The targets [E] that are 0 here: no larger than what rounding makes of them."""
    largest = {name: float(target.abs().max()) for name, target in targets.items()}
    size = float(scene.tree.edge_log_probs.abs().max())  # nats, of which u may lose an ε
    # plainly larger than rounding can be: no need to nudge the views and sum again
    if min(largest.values()) > _CLEARLY * (1 + size):
        return ()
    moved = [scene.nudged(torch.float64, way).mean_over_problems(targets_of) for way in range(2)]

    def unresolved(name: str) -> float:
        return max(float((other[name] - targets[name]).abs().max()) for other in moved)

    return tuple(name for name in targets if largest[name] <= SAFETY * unresolved(name))


def _how(reason: str | None) -> str:
    return "vmap" if reason is None else f"one backward pass an execution: {reason}"


def _check_policy(policy: LanguageModel) -> None:
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise InputError(
            "the policy has no trainable parameters, so there is no gradient; call"
            " policy.requires_grad_(True)."
        )


def _parameter_type(policy: LanguageModel) -> torch.dtype:
    """The least precise type of the trained parameters: backward passes add up in it."""
    trained = {parameter.dtype for parameter in policy.parameters() if parameter.requires_grad}
    return max(trained, key=lambda dtype: torch.finfo(dtype).eps)
