"""One visible loop: a source gives a batch, the loss is differentiated, the optimisers step.

    θ ← θ − lr · optimiser(∇ loss(batch)),    batch = source(policy)

`train_steps` yields after each update; `train` runs it to the end. An update that would bring a NaN
or an infinity is refused, and the policy keeps its last good weights.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from klrl_edu.core.arguments import check_arguments, check_draw, check_loss_function
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import DivergedError, InputError
from klrl_edu.core.validation import check_count
from klrl_edu.evaluation.compare import compare
from klrl_edu.evaluation.records import History, Record
from klrl_edu.exact.posterior import Posterior
from klrl_edu.learning.batches import Batch, Loss, check_loss, needs_of
from klrl_edu.learning.sources import Source, check_policy, on_policy, support
from klrl_edu.learning.updates import (
    LOST,
    LastGoodWeights,
    Optimizers,
    check_max_grad_norm,
    moved_by,
    optimizers_of,
    refuse_unheld,
)
from klrl_edu.models.contract import LanguageModel
from klrl_edu.problems.problem import Problem, check_problems

Schedule = Callable[[float], float]
"""Fraction of the run done, in [0, 1) -> factor of the learning rate."""
_BATCH_SIZE = 64
_WARM_UP = 0.1  # of the run
_HUGE = 1e150  # a reward above it squares to infinity


def constant(done: float) -> float:
    """The learning rate as given."""
    return 1.0


def linear(done: float) -> float:
    """Falls on a line to 0."""
    return 1 - done


def cosine(done: float) -> float:
    """Falls along half a cosine to 0."""
    return (1 + math.cos(math.pi * done)) / 2


def warmup_cosine(done: float) -> float:
    """Rises on a line over the first tenth, then falls along half a cosine to 0."""
    if done < _WARM_UP:
        return max(done, _WARM_UP / 100) / _WARM_UP  # a first step of rate 0 would be none
    return cosine((done - _WARM_UP) / (1 - _WARM_UP))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "warmup_cosine": warmup_cosine,
}


def train_steps(
    policy: LanguageModel,
    source: Problem | Sequence[Problem] | Source,
    loss: Loss,
    *,
    steps: int,
    draw: Draw | None = None,
    batch_size: int | None = None,
    lr: float = 1e-2,
    optimizer: Optimizers | None = None,
    schedule: Schedule = constant,
    max_grad_norm: float | None = None,
) -> Iterator[Record]:
    """The training loop, one update an iteration; the policy is changed in place.

    Args:
        policy: what to train, on the source's space.
        source: what gives the next batch (see `sources`). A Problem, or several that share a prior
            and over which J is averaged, is short for the policy's own samples, or for the whole
            support where the loss is marked `@needs("support")`.
        loss: Batch -> scalar to minimise; an nn.Module may own parameters.
        steps: updates.
        draw: the randomness of a Problem's samples, e.g. `seeded_draw(0)`; a source has its own.
        batch_size: sequences a problem and step, 64 by default; a source has its own.
        lr: learning rate of the default Adam, over the policy's and the loss's parameters.
        optimizer: another optimiser, or several; together they hold every trainable parameter that
            the loss reaches, and `lr` is then ignored.
        schedule: factor of the learning rates by the fraction of the run done.
        max_grad_norm: clip the gradient, over all parameters, to this norm.

    Yields:
        step (from 1), loss, grad_norm, lr (of the first optimiser), and of the batch what it has:
        reward, kl (of u, nats a sequence), objective, kl_per_token as means under π; for sequences
        that another policy drew, reward and log_behaviour_ratio (log μ/π, nats a sequence) as means
        of the batch.

    Raises:
        UnsupportedPolicyError: the policy gives mass where the prior has none or the reward is
            −inf.
        InputError: an argument, the source or the loss is not what it should be; names the step
            where a batch is at fault.
        DivergedError: loss, gradient or weights turned NaN or infinite, or an update moved a weight
            so far that probabilities underflow to 0; names the step, last good weights kept.
            Weights are looked at when they are next used and after the last step, so a loop that is
            left early may leave with a broken last update.
    """
    _check_nouns(policy, source, loss)
    check_count(steps, "steps", 0)
    next_batch = _source(source, loss, batch_size, draw)
    check_policy(next_batch, policy)
    optimizers = optimizers_of(policy, loss, optimizer, lr)
    parameters = moved_by(policy, loss, optimizers)
    clip = check_max_grad_norm(max_grad_norm)
    # as given: a schedule multiplies these, and not what the last step left
    rates = [[group["lr"] for group in each.param_groups] for each in optimizers]
    weights = LastGoodWeights(policy, parameters)
    for step in range(1, steps + 1):
        # the share done before this step, below 1: a rate that falls to 0 moves the last step too
        factor = _factor(schedule, (step - 1) / steps)
        for each, own_rates in zip(optimizers, rates, strict=True):
            for group, rate in zip(each.param_groups, own_rates, strict=True):
                group["lr"] = rate * factor
        try:
            batch = _next(next_batch, policy, step)
            value = loss(batch)
            check_loss(value)
            _refuse_not_finite(value, "the loss", batch, step)
            # once: a walk of the graph is slow, and at each step it would find the same tensors
            if step == 1:
                refuse_unheld(value, parameters)
            for each in optimizers:
                each.zero_grad()
            value.backward()
            # a clip of inf clips nothing, and the norm is still told
            norm = nn.utils.clip_grad_norm_(parameters, clip)
            _refuse_not_finite(norm, "the gradient's norm", batch, step)
        except (InputError, DivergedError) as error:
            weights.check(step - 1)  # did the last update break the policy?
            # a DivergedError names its step already
            if not isinstance(error, DivergedError):
                error.args = (f"step {step}: {error}", *error.args[1:])
            raise
        # only now: loss and gradient are sound, and the weights are about to change
        weights.keep(batch)
        for each in optimizers:
            each.step()
        reach = max(1.0, min(float(norm), clip))  # Adam moves by its rate, descent by rate · norm
        # asked first, as the check itself runs a pass of the policy
        if reach * max(group["lr"] for each in optimizers for group in each.param_groups) > LOST:
            weights.check_jump(step)
        # no later step would look at the last update
        if step == steps:
            weights.check(step)
        yield {
            "step": step,
            "loss": float(value.detach()),
            "grad_norm": float(norm),
            "lr": rates[0][0] * factor,
            **_means(batch),
        }


def train(
    policy: LanguageModel | None,
    source: Problem | Sequence[Problem] | Source,
    loss: Loss,
    *,
    steps: int,
    draw: Draw | None = None,
    batch_size: int | None = None,
    lr: float = 1e-2,
    optimizer: Optimizers | None = None,
    schedule: Schedule = constant,
    max_grad_norm: float | None = None,
    target: Posterior | Sequence[Posterior] | None = None,
    evaluate_every: int = 0,
) -> History:
    """Trains a policy to the end.

    Args:
        policy: changed in place; None starts from a copy of the prior.
        target: exact posterior(s) to compare with before the first step, every `evaluate_every`
            steps and after the last one; the comparison's metrics join the records.
        evaluate_every: steps between comparisons; 0 for before and after only.
        Others: as in `train_steps`, which also lists what is raised.

    Returns:
        The History of the steps, with the trained policy as `history.policy`.
    """
    check_count(evaluate_every, "evaluate_every", 0)
    policy = copy_of_prior(source) if policy is None else policy
    # here too: a generator's own checks wait until its first step
    _check_nouns(policy, source, loss)
    history = History(policy=policy)
    stream = train_steps(
        policy,
        source,
        loss,
        steps=steps,
        draw=draw,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        max_grad_norm=max_grad_norm,
    )
    # the generator has not begun: these are the weights before the first step
    if target is not None:
        history.records.append({"step": 0, **comparison_metrics(policy, target)})
    for record in stream:
        due = record["step"] == steps or (evaluate_every and record["step"] % evaluate_every == 0)
        if target is not None and due:
            record.update(comparison_metrics(policy, target))
        history.records.append(record)
    return history


def copy_of_prior(source: Problem | Sequence[Problem] | Source) -> LanguageModel:
    """A trainable copy of the prior of a problem or of a source that has one.

    Raises:
        InputError: the source has no prior.
    """
    if _gives_batches(source):
        prior = getattr(source, "prior", None)
        if not isinstance(prior, LanguageModel):
            raise InputError(
                "policy = None starts from a copy of the prior, and this source has none; give a"
                " policy."
            )
    else:
        prior = check_problems(source)[0].prior  # type: ignore[arg-type]
    # a prior is often frozen, and a copy of it would be
    return copy.deepcopy(prior).requires_grad_(True)


def comparison_metrics(policy: LanguageModel, target: Posterior | Sequence[Posterior]) -> Record:
    """The exact comparison as a flat record; the mean over several targets. `objective` becomes
    `exact_objective`, beside the batch's.
    """
    result = compare(policy, [target] if isinstance(target, Posterior) else target).mean
    return {
        ("exact_objective" if name == "objective" else name): value
        for name, value in result.items()
    }


def _check_nouns(policy: Any, source: Any, loss: Any) -> None:
    """What was mixed up, by name."""
    call = "train(policy, source, loss)"
    check_arguments(call, policy=(policy, LanguageModel), source=(source, object))
    check_loss_function(loss)


def _gives_batches(source: Any) -> TypeGuard[Source]:
    """Whether it is a function; models and posteriors can be called too, and are none."""
    return callable(source) and not hasattr(source, "in_words")


# --- the source -----------------------------------------------------------------------------------


def _source(
    source: Problem | Sequence[Problem] | Source,
    loss: Loss,
    batch_size: int | None,
    draw: Draw | None,
) -> Source:
    """What gives the batches; a Problem becomes the source that the loss needs."""
    if _gives_batches(source):
        for name, value in (("batch_size", batch_size), ("draw", draw)):
            if value is not None:
                raise InputError(f"{name} belongs to the source: give it there, not to train.")
        return source
    problems = check_problems(source)  # type: ignore[arg-type]
    if draw is not None:
        check_draw(draw)
    for index, problem in enumerate(problems):
        if problem.kl_coef == math.inf:
            where = "" if len(problems) == 1 else f" (problems[{index}])"
            raise InputError(
                f"kl_coef = inf{where}: the posterior is the prior itself, and there is nothing to"
                " train; give a finite kl_coef."
            )
    size = _BATCH_SIZE if batch_size is None else check_count(batch_size, "batch_size")
    wanted = needs_of(loss)
    distributions = "distributions" in wanted
    if "support" in wanted:
        return support(problems, distributions=distributions)
    if draw is None:
        raise InputError("training on samples needs its randomness: draw=seeded_draw(0).")
    return on_policy(problems, size, draw=draw, distributions=distributions)


def _next(source: Source, policy: LanguageModel, step: int) -> Batch:
    """The next batch, looked at: a Batch of sequences of the policy's space, with their log π."""
    try:
        batch = source(policy)
    # out of a generator it would come as a RuntimeError that names no source
    except StopIteration:
        raise InputError(
            f"the source ended after {step - 1} batches; let it go on, or train fewer steps."
        ) from None
    if not isinstance(batch, Batch):
        raise InputError(
            f"the source gave {type(batch).__name__}; a source maps the policy to a Batch (see"
            " sources.on_policy and its neighbours)."
        )
    policy.space.check_tokens(batch.tokens, "the source's batch.tokens")
    if batch.log_probs.shape != batch.tokens.shape:
        raise InputError(
            f"the source's batch.log_probs has shape {list(batch.log_probs.shape)}; expected that"
            f" of its tokens, {list(batch.tokens.shape)}."
        )
    return batch


def _factor(schedule: Schedule, done: float) -> float:
    factor = schedule(done)
    number = isinstance(factor, float | int) and not isinstance(factor, bool)
    if not number or not 0 <= factor < math.inf:
        raise InputError(
            f"schedule({done:.4g}) = {factor!r}; expected a factor of the learning rate, at least"
            " 0."
        )
    return float(factor)


# --- the loss and the record ----------------------------------------------------------------------


def _refuse_not_finite(value: Tensor, what: str, batch: Batch, step: int) -> None:
    """A loss or gradient that is not finite has diverged, or the rewards are too large for it."""
    if bool(torch.isfinite(value)):
        return
    number = float(value.detach())
    rewards = batch.tensors().get("rewards")
    largest = 0.0 if rewards is None else float(rewards.abs().max())
    if _HUGE < largest < math.inf:
        raise InputError(
            f"{what} is {number}, as rewards reach {largest:g} and their products overflow; divide"
            " reward and kl_coef by one number, which leaves the posterior as it is."
        )
    raise DivergedError(
        f"step {step}: {what} is {number}; the last good weights are kept. Lower lr, or look at the"
        " loss.",
        step,
    )


@torch.no_grad()
def _means(batch: Batch) -> Record:
    """Of a batch that π drew or that is its whole support: means under π. Of one that another
    policy drew: means of the batch.
    """
    given = batch.tensors()
    if "behaviour_log_probs" not in given or "rewards" not in given:
        return {}
    reward = batch.rewards.sum(-1)
    behind = (batch.behaviour_log_probs - batch.log_probs).sum(-1)
    # samples of π itself have log μ = log π to the last bit; later epochs on them do not
    if not batch.complete and bool((behind != 0).any()):
        return {"reward": float(reward.mean()), "log_behaviour_ratio": float(behind.mean())}
    kl = (batch.log_probs - batch.prior_log_probs).sum(-1)
    if batch.complete:
        weight = batch.log_probs.sum(-1).exp() / (batch.group.max() + 1)
    else:
        weight = torch.full_like(reward, 1 / len(reward))
    kl = torch.where(weight > 0, kl, 0)  # a sequence that π never gives has u = −inf: it counts 0
    objective = weight @ (reward - batch.kl_coef * kl)
    length = weight @ batch.live.double().sum(-1)
    means = {"reward": weight @ reward, "kl": weight @ kl, "objective": objective}
    numbers = {name: float(value) for name, value in means.items()}
    # a ratio of means: a mean of ratios would weigh short texts more
    return {**numbers, "kl_per_token": float(weight @ kl / length)}
