"""One visible loop: sample, score, differentiate, step.

    θ ← θ − lr · optimiser(∇ loss(batch))

`train_steps` yields after each update; `train` runs it to the end. An update that would bring a NaN
or an infinity is refused, and the policy keeps its last good weights.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import DivergedError, InputError, UnsupportedPolicyError
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.core.validation import check_count, check_same_space
from klrl_edu.evaluation.compare import compare, support_log_mass
from klrl_edu.evaluation.records import History, Record
from klrl_edu.exact.enumeration import problem_support
from klrl_edu.exact.posterior import Posterior
from klrl_edu.learning.batches import Batch, Loss, check_loss, needs_of, sample_batch, score_batch
from klrl_edu.models.contract import LanguageModel, conditional_log_probs, token_log_probs
from klrl_edu.problems.problem import Problem, check_problems

# sequences of the prior along which an unrestricted policy is looked for before the first step
_LOOKED_AT = 16
Schedule = Callable[[float], float]
"""Fraction of the run done, in [0, 1) -> factor of the learning rate."""


def constant(done: float) -> float:
    """The learning rate as given."""
    return 1.0


def linear(done: float) -> float:
    """Falls on a line to 0."""
    return 1 - done


def cosine(done: float) -> float:
    """Falls along half a cosine to 0."""
    return (1 + math.cos(math.pi * done)) / 2


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine}


def train_steps(
    policy: LanguageModel,
    problem: Problem | Sequence[Problem],
    loss: Loss,
    *,
    steps: int,
    draw: Draw,
    batch_size: int = 64,
    lr: float = 1e-2,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Schedule = constant,
    max_grad_norm: float | None = None,
) -> Iterator[Record]:
    """The training loop, one update an iteration; the policy is changed in place.

    Args:
        policy: what to train, on the problem's space.
        problem: one, or several that share a prior, over which J is averaged.
        loss: Batch -> scalar to minimise.
        steps: updates.
        draw: the randomness, e.g. `seeded_draw(0)`.
        batch_size: sequences a problem and step; a loss that needs the support gets every sequence
            instead.
        lr: learning rate of the default Adam.
        optimizer: another optimiser, over the policy's parameters; `lr` is then ignored.
        schedule: factor of the learning rate by the fraction of the run done.
        max_grad_norm: clip the gradient to this norm.

    Yields:
        step (from 1), loss, grad_norm, lr, and the batch means reward, kl (of u, nats a sequence),
        objective, kl_per_token.

    Raises:
        UnsupportedPolicyError: the policy gives mass where the prior has none or the reward is
            −inf.
        DivergedError: loss, gradient or weights turned NaN or infinite; names the step, last good
            weights kept. Weights are looked at when they are next used and after the last step, so
            a loop that is left early may leave with a broken last update.
    """
    problems = check_problems(problem)
    check_same_space(policy.space, problems[0].space, "policy and problem")
    check_count(steps, "steps", 0)
    check_count(batch_size, "batch_size")
    if any(p.kl_coef == math.inf for p in problems):
        raise InputError(
            "kl_coef = inf: the posterior is the prior itself, and there is nothing to train; give"
            " a finite kl_coef."
        )
    parameters = _parameters(policy, loss)
    optimizer = _adam(parameters, lr) if optimizer is None else optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    next_batch = _batches(policy, problems, loss, batch_size, draw)
    weights = _LastGoodWeights(policy, problems, parameters)
    for step in range(1, steps + 1):
        factor = schedule((step - 1) / steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        try:
            batch = next_batch()
            value = loss(batch)
            _check_loss(value, step)
        except (InputError, DivergedError) as error:
            weights.check(step - 1)  # did the last update break the policy?
            if not isinstance(error, DivergedError):
                error.args = (f"step {step}: {error}", *error.args[1:])
            raise
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(
            parameters, math.inf if max_grad_norm is None else max_grad_norm
        )
        if not bool(torch.isfinite(norm)):
            raise DivergedError(
                f"step {step}: the gradient's norm is {float(norm)}; the last good weights are"
                " kept. Lower lr, or look at the loss.",
                step,
            )
        weights.keep(batch)
        optimizer.step()
        if step == steps:
            weights.check(step)
        yield {
            "step": step,
            "loss": float(value.detach()),
            "grad_norm": float(norm),
            "lr": rates[0] * factor,
            **_means(batch, loss),
        }


def train(
    policy: LanguageModel | None,
    problem: Problem | Sequence[Problem],
    loss: Loss,
    *,
    steps: int,
    draw: Draw,
    batch_size: int = 64,
    lr: float = 1e-2,
    optimizer: torch.optim.Optimizer | None = None,
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
    policy = copy_of_prior(problem) if policy is None else policy
    history = History(policy=policy)
    if target is not None:
        history.records.append({"step": 0, **comparison_metrics(policy, target)})
    options = {
        "batch_size": batch_size,
        "lr": lr,
        "optimizer": optimizer,
        "schedule": schedule,
        "max_grad_norm": max_grad_norm,
    }
    for record in train_steps(policy, problem, loss, steps=steps, draw=draw, **options):  # type: ignore[arg-type]
        due = record["step"] == steps or (evaluate_every and record["step"] % evaluate_every == 0)
        if target is not None and due:
            record.update(comparison_metrics(policy, target))
        history.records.append(record)
    return history


def copy_of_prior(problem: Problem | Sequence[Problem]) -> LanguageModel:
    """A trainable copy of the prior."""
    return copy.deepcopy(check_problems(problem)[0].prior).requires_grad_(True)


def comparison_metrics(policy: LanguageModel, target: Posterior | Sequence[Posterior]) -> Record:
    """The exact comparison as a flat record; the mean over several targets. `objective` becomes
    `exact_objective`, beside the batch's.
    """
    result = compare(policy, [target] if isinstance(target, Posterior) else target).mean
    return {
        ("exact_objective" if name == "objective" else name): value
        for name, value in result.items()
    }


def _parameters(policy: LanguageModel, loss: Loss) -> list[Tensor]:
    owned = [*policy.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else [])]
    trainable: list[Tensor] = [parameter for parameter in owned if parameter.requires_grad]
    if not trainable:
        raise InputError(
            "the policy has no trainable parameters; call policy.requires_grad_(True), or train a"
            " copy."
        )
    return trainable


def _adam(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    if not (isinstance(lr, float | int) and 0 < lr < math.inf):
        raise InputError(f"lr = {lr!r} must be a positive number.")
    return torch.optim.Adam(
        parameters,
        lr=lr,
        fused=all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters),
    )


def _batches(
    policy: LanguageModel, problems: list[Problem], loss: Loss, size: int, draw: Draw
) -> Callable[[], Batch]:
    """What gives the next batch: the whole support where the loss needs it, else fresh samples;
    refuses an unsupported policy first.
    """
    wanted = needs_of(loss)
    distributions = "distributions" in wanted
    if "support" in wanted:
        groups = [_feasible_sequences(p) for p in problems]
        for p, tokens in zip(problems, groups, strict=True):
            _refuse_stray_mass(policy, p, tokens)
        return lambda: score_batch(policy, problems, groups, distributions=distributions)
    for p in problems:
        _refuse_unrestricted(policy, p, draw)
    return lambda: sample_batch(policy, problems, size, draw, distributions=distributions)


def _feasible_sequences(problem: Problem) -> Tensor:
    """The sequences [K,T] of the prior's support whose reward is not −inf."""
    support = problem_support(problem)
    return support.tokens[support.rewards > -math.inf]


@torch.no_grad()
def _refuse_stray_mass(policy: LanguageModel, problem: Problem, tokens: Tensor) -> None:
    stray = float(
        support_log_mass(policy, tokens, PrefixTrie(problem.space, tokens), problem.prompt)[1].exp()
    )
    if stray > 0:
        raise UnsupportedPolicyError(
            f"the policy gives mass {stray:.2g} to sequences where the prior has none or the reward"
            " is -inf, so KL(policy‖posterior) is infinite. Wrap it: restrict_to_support(policy,"
            " problem.prior), or feasible_prior(problem) in its place where rewards are -inf."
        )


@torch.no_grad()
def _refuse_unrestricted(policy: LanguageModel, problem: Problem, draw: Draw) -> None:
    """Looks at every next token along some sequences of the prior, so that a missing restriction
    shows before the first step.
    """
    tokens = problem.prior.sample(_LOOKED_AT, draw=draw, prompt=problem.prompt)
    prior, mine = (
        conditional_log_probs(model, tokens, problem.prompt) for model in (problem.prior, policy)
    )
    taken = mine.gather(-1, tokens[..., None]).squeeze(-1)
    reached = torch.nn.functional.pad(taken.cumsum(-1), (1, -1)) > -math.inf
    stray = (
        torch.where(
            (prior == -math.inf) & (reached & problem.space.live(tokens))[..., None],
            mine,
            -math.inf,
        )
        .exp()
        .sum(-1)
    )
    if bool((stray > 0).any()):
        n, t = (stray > 0).nonzero()[0].tolist()
        prefix = problem.space.separator.join(
            problem.space.vocabulary[i] for i in tokens[n, :t].tolist()
        )
        raise UnsupportedPolicyError(
            f"after {prefix!r} the policy gives mass {float(stray[n, t]):.2g} to tokens where the"
            " prior has none, so KL is infinite. Wrap it: restrict_to_support(policy,"
            " problem.prior)."
        )


def _check_loss(value: Tensor, step: int) -> None:
    check_loss(value)
    if not bool(torch.isfinite(value)):
        number = float(value.detach())
        raise DivergedError(
            f"step {step}: the loss is {number}; the last good weights are kept. Lower lr, or look"
            " at the loss.",
            step,
        )


class _LastGoodWeights:
    """The weights before the last update, put back if that update left a policy that gives NaN."""

    def __init__(
        self, policy: LanguageModel, problems: Sequence[Problem], parameters: Sequence[Tensor]
    ):
        self.policy, self.problems, self.parameters = policy, problems, parameters
        self.kept: list[Tensor] = []
        self.tokens: list[Tensor] = []

    def keep(self, batch: Batch) -> None:
        """Before an update: the weights, and one sequence a problem to try the policy on."""
        self.kept = [parameter.detach().clone() for parameter in self.parameters]
        self.tokens = [
            batch.tokens[batch.group == index][:1] for index in range(len(self.problems))
        ]

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Raises DivergedError, with the kept weights back in place, if update `step` broke the
        policy or left a NaN among the weights.
        """
        tried = [
            token_log_probs(self.policy, tokens, p.prompt)
            for p, tokens in zip(self.problems, self.tokens, strict=False)
        ]
        if not any(bool(torch.isnan(values).any()) for values in [*tried, *self.parameters]):
            return
        for parameter, old in zip(self.parameters, self.kept, strict=False):
            parameter.copy_(old)
        raise DivergedError(
            f"step {step}: its update made the policy NaN; the last good weights are back in place."
            " Lower lr.",
            step,
        )


@torch.no_grad()
def _means(batch: Batch, loss: Loss) -> Record:
    """Batch means: under π for samples; weighted by π where the batch is the whole support."""
    log_ratio = batch.log_probs - batch.prior_log_probs
    reward, kl = batch.rewards.sum(-1), log_ratio.sum(-1)
    enumerated = "support" in needs_of(loss)
    weight = (
        batch.log_probs.sum(-1).exp() / (batch.group.max() + 1)
        if enumerated
        else torch.full_like(reward, 1 / len(reward))
    )
    kl = torch.where(
        weight > 0, kl, 0
    )  # a listed sequence that π never gives has log-ratio −inf, and does not count
    means = {
        "reward": weight @ reward,
        "kl": weight @ kl,
        "objective": weight @ (reward - batch.kl_coef * kl),
    }
    length = weight @ batch.live.double().sum(-1)
    return {
        **{name: float(value) for name, value in means.items()},
        "kl_per_token": float(weight @ kl / length),
    }
