"""The exact mean, bias and variance of any estimator, by enumerating everything that can be drawn.

    E[g] = Σ_batches P(batch) · ∇loss(batch),    Var g = E‖g − E g‖²                             (1)

Batches are multisets with their multiplicities (`executions`); the loss is differentiated by its
token log-probabilities, all batches at once where it allows (`differentiation`), and that is
contracted with the policy's Jacobian in closed form (`coordinates`). B batch size.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from klrl_edu.audit.adapting import Adapter, adapted, draws_random_numbers, name_of, takes_a_batch
from klrl_edu.audit.checks import no_global_randomness, probe
from klrl_edu.audit.coordinates import Coordinates, coordinates_of
from klrl_edu.audit.differentiation import LossOnSupport
from klrl_edu.audit.executions import check_executions
from klrl_edu.audit.moments import (
    Contributions,
    contributions_of,
    dense_coefficients,
    gradient_moments,
)
from klrl_edu.audit.monte_carlo import FAILURE_PROBABILITY, check_monte_carlo, sampled_moments
from klrl_edu.audit.plans import Plan, planned
from klrl_edu.audit.report import AuditReport
from klrl_edu.audit.scenes import Scene, build_scene
from klrl_edu.audit.targets import value_targets
from klrl_edu.audit.values import (
    enumerated_value,
    missing_mass_notes,
    sampled_value,
    value_on_support,
)
from klrl_edu.core.arguments import check_arguments, check_function, check_loss_function
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError
from klrl_edu.core.multisets import multisets
from klrl_edu.core.validation import check_count
from klrl_edu.learning.batches import Loss, needs_of
from klrl_edu.learning.sources import Source
from klrl_edu.models.contract import MAX_SEQUENCES, LanguageModel
from klrl_edu.problems.problem import Problem

MAX_EXECUTIONS = 100_000
_CHUNK = 1 << 22  # numbers in one block of sampled gradients: 32 MiB


def audit_gradient(
    loss: Loss | Callable[..., Any],
    policy: LanguageModel,
    source: Problem | Source,
    *,
    batch_size: int | None = None,
    behaviour: LanguageModel | None = None,
    adapt: Adapter | None = None,
    max_executions: int = MAX_EXECUTIONS,
    monte_carlo: int | None = None,
    draw: Draw | None = None,
    bound: float | None = None,
) -> AuditReport:
    """What a loss descends on average, exactly, and with what variance.

    Args:
        loss: Batch -> scalar, as `train` takes it; a parameter `draw` gets a Draw, whose every
            outcome is enumerated. Or a function of tensors by name: a Batch's, verl's and TRL's
            names are understood.
        policy: π, on the prior's support; its trainable parameters are the coordinates.
        source: prior, reward and λ; or a source of `sources`, as training takes it, whose batches
            are enumerated by its law: samples of π or of a behaviour policy for one problem, the
            whole support, texts, preference pairs.
        batch_size: B, 1 by default; a loss that needs the support is run once on it. A source has
            its own.
        behaviour: the policy that draws the batches, on π's support; π itself by default. A source
            has its own.
        adapt: what parameters of other names are: parameter -> name or value, or Batch -> keyword
            arguments.
        max_executions: the most batches (multisets of sequences, times the outcomes of the loss's
            own draws) to enumerate.
        monte_carlo: draw this many batches instead; with `draw`, and `bound`, the largest |entry|
            that a gradient can have.

    Returns:
        Mean and variance of ∇loss beside the targets of `targets`: objective (∇(−J)),
        expected_reward (∇(−E r)), and the divergences of π and q per sequence and, with frozen
        prefixes, per token. For preference pairs the divergences alone; for texts
        negative_log_likelihood, −E[log π] over the source's weights.

    Raises:
        TooLargeError: more executions than `max_executions`; the message has the count.
        UnsupportedPolicyError: the policy leaves the prior's support, or the behaviour policy the
            policy's.
        InputError: what the loss must not do: return anything but a finite scalar with a gradient,
            change its inputs, draw from a global generator, depend on the order of the batch; a
            source whose law is not known.
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
    _check_policy(policy)
    function = loss if adapt is None and takes_a_batch(loss) else adapted(loss, adapt)
    plan = planned(source, batch_size, behaviour, needs_of(function))
    limit = max_executions if monte_carlo is None else MAX_SEQUENCES
    scene, targets = plan.scene(policy, limit)
    on_support = LossOnSupport(
        function,
        name_of(loss),
        scene.whole,
        scene.tree,
        draws_random_numbers(function),
        scene.place,
        scene.width,
    )
    coordinates = coordinates_of(policy, scene.tree, plan.prompt)
    with no_global_randomness(f"the loss {on_support.name}"):
        if monte_carlo is None:
            found = _enumerated(on_support, scene, coordinates, plan, max_executions)
        else:
            assert draw is not None  # checked above
            assert bound is not None
            found = _sampled(on_support, scene, coordinates, plan, monte_carlo, draw, bound)
    vectors = coordinates.combine(torch.stack(list(targets.values())))
    return AuditReport(
        name=on_support.name,
        targets=dict(zip(targets, vectors, strict=True)),
        coordinates=coordinates.name,
        batch_size=plan.batch_size,
        cost=coordinates.cost,
        notes=scene.remarks,
        precision=_precision(policy),
        seconds=time.perf_counter() - started,
        **found,
    )


def audit_value(
    estimator: Callable[..., Any],
    policy: LanguageModel,
    problem: Problem,
    *,
    batch_size: int = 1,
    behaviour: LanguageModel | None = None,
    adapt: Adapter | None = None,
    max_executions: int = MAX_EXECUTIONS,
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
        problem: its prior is q.
        batch_size: estimates are averaged over this many independent samples.
        behaviour: the policy that draws the samples, on π's support; π itself by default.
        adapt: what parameters of other names are.
        max_executions: the most batches to enumerate, which only estimators of whole batches and
            P(estimate < 0) need.
        monte_carlo: draw this many batches instead; with `draw`, and `bound`, the largest
            |estimate| there can be.

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
        problem=(problem, Problem),
    )
    check_function(estimator, "estimator", "kl_values.k3")
    check_count(batch_size, "batch_size")
    check_monte_carlo(monte_carlo, draw, bound)
    scene = build_scene(
        policy, problem, behaviour, MAX_SEQUENCES, distributions=True, supported=False
    )
    subject = value_on_support(estimator, scene, adapt)
    with no_global_randomness(f"the estimator {subject.name}"):
        if monte_carlo is not None:
            assert draw is not None  # checked above
            assert bound is not None
            found = sampled_value(subject, scene, batch_size, monte_carlo, draw, bound)
        else:
            found = enumerated_value(subject, scene, batch_size, max_executions)
    targets = value_targets(scene.whole, scene.tree, scene.missed)
    notes = scene.remarks
    if behaviour is None:
        bias = float(found["mean"] - targets["reverse_kl"])
        notes += tuple(missing_mass_notes(subject.name, scene.missed, bias))
    found["notes"] = (*notes, *found["notes"])
    return AuditReport(
        name=subject.name,
        targets=targets,
        coordinates="nats",
        batch_size=batch_size,
        seconds=time.perf_counter() - started,
        **found,
    )


def _enumerated(
    loss: LossOnSupport,
    scene: Scene,
    coordinates: Coordinates,
    plan: Plan,
    max_executions: int,
) -> dict[str, Any]:
    """Moments over every execution, and how they were found."""
    if plan.complete:
        # one batch, with probability 1; its order is the support's, so nothing is tried out
        rows = torch.arange(len(scene.whole.tokens), device=scene.sampler.device)[None]
        log_weight = torch.zeros(1, dtype=torch.float64, device=rows.device)
        picked, gradients = rows, loss.one(rows[0])[None]
    else:
        drawn = int((scene.sampler > -math.inf).sum())
        check_executions(drawn, plan.batch_size, max_executions)
        units, log_weight = multisets(scene.sampler, plan.batch_size)
        rows = scene.rows(units)
        picked, gradients = probe(loss, rows)
    reason = loss.why_not_vmap(picked, gradients)

    def contributions() -> Iterator[Contributions]:
        parts = loss.executions(
            rows, log_weight, vmap=reason is None, max_executions=max_executions
        )
        return contributions_of(loss, parts)

    moments = gradient_moments(contributions, coordinates, scene.tree.edges, rows.device)
    return {
        "mean": coordinates.combine(moments.coefficients[None])[0],
        "variance": moments.variance,
        "executions": moments.executions,
        "differentiation": _how(reason),
    }


def _sampled(
    loss: LossOnSupport,
    scene: Scene,
    coordinates: Coordinates,
    plan: Plan,
    count: int,
    draw: Draw,
    bound: float,
) -> dict[str, Any]:
    """Moments over `count` batches drawn, with an interval."""
    if plan.complete:
        raise InputError(
            f"the loss {loss.name} reads the whole support, so there is nothing to draw; leave"
            " monte_carlo out."
        )
    every = torch.zeros(count * plan.batch_size, dtype=torch.long, device=scene.sampler.device)
    rows = scene.rows(draw(scene.sampler[None], every).view(count, plan.batch_size))
    picked, gradients = probe(loss, rows)
    reason = loss.why_not_vmap(picked, gradients)

    def estimates() -> Iterator[Tensor]:
        parts = contributions_of(loss, loss.sampled(rows, draw, vmap=reason is None))
        at_once = max(1, _CHUNK // coordinates.size)  # gradients [x,P] are wider than batches
        for dense, _ in dense_coefficients(parts, scene.tree.edges):
            yield from map(coordinates.combine, dense.split(at_once))

    moments = sampled_moments(estimates(), bound)
    return {
        "mean": moments.mean,
        "variance": moments.variance,
        "executions": moments.draws,
        "differentiation": _how(reason),
        "interval": moments.interval,
        "failure_probability": FAILURE_PROBABILITY,
    }


def _how(reason: str | None) -> str:
    return "vmap" if reason is None else f"one backward pass an execution: {reason}"


def _check_policy(policy: LanguageModel) -> None:
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise InputError(
            "the policy has no trainable parameters, so there is no gradient; call"
            " policy.requires_grad_(True)."
        )


def _precision(policy: LanguageModel) -> float:
    """Relative error below which two gradients count as equal: float32 parameters round what
    backward passes add up.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return 1e-9 if all(parameter.dtype == torch.float64 for parameter in trained) else 1e-5
