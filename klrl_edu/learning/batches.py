"""What a loss sees: sampled sequences with their log-probabilities and rewards.

N sequences, T tokens, V columns; log-probabilities in nats, rewards in reward units. After the
first EOS log-probabilities and rewards are 0, so sums over T are sums over the sequence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError, UnsupportedPolicyError
from klrl_edu.models.contract import (
    LanguageModel,
    batch_prompt,
    conditional_log_probs,
    sample_scored,
    token_log_probs,
)
from klrl_edu.problems.problem import Problem


@dataclass(frozen=True)
class Batch:
    """Sequences, and what the policy, the prior and the reward say of them.

    Attributes:
        tokens: [N,T].
        live: bool [N,T], True up to the first EOS.
        log_probs: log π(y_t|y_<t) [N,T]; carries the gradient.
        prior_log_probs: log q(y_t|y_<t) [N,T].
        behaviour_log_probs: [N,T] of the policy that drew the sequences; on-policy it equals
            `log_probs` without gradient.
        rewards: [N,T]; a whole-sequence reward stands on the last live token.
        group: [N], which problem (prompt) each sequence belongs to.
        kl_coef: λ of each sequence's problem [N].
        log_dists, prior_log_dists: full next-token log-probabilities [N,T,V], for losses marked
            `@needs("distributions")`; else None.
    """

    tokens: Tensor
    live: Tensor
    log_probs: Tensor
    prior_log_probs: Tensor
    behaviour_log_probs: Tensor
    rewards: Tensor
    group: Tensor
    kl_coef: Tensor
    log_dists: Tensor | None = None
    prior_log_dists: Tensor | None = None


Loss = Callable[[Batch], Tensor]
"""Batch -> scalar to minimise; one contract for training and for the audit. A loss with parameters
of its own is an nn.Module.
"""


def check_loss(value: Tensor) -> None:
    """Refuses what a loss must not return: anything but a scalar tensor that carries a gradient."""
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the loss returned {got}; a Loss maps a Batch to a scalar tensor.")
    if not value.requires_grad:
        raise InputError(
            "the loss carries no gradient; build it from batch.log_probs without .detach()."
        )


AnyLoss = TypeVar("AnyLoss", bound=Loss)
_NEEDS = "_klrl_needs"


def needs(*what: str) -> Callable[[AnyLoss], AnyLoss]:
    """Marks a loss that asks for more than sampled token log-probabilities.

    Args:
        what: "support" (the batch lists every supported sequence once, instead of samples) or
            "distributions" (`log_dists`).
    """

    def mark(loss: AnyLoss) -> AnyLoss:
        setattr(loss, _NEEDS, frozenset(what))
        return loss

    return mark


def needs_of(loss: Loss) -> frozenset[str]:
    """What a loss asked for by `needs`; looks through functools.partial."""
    while isinstance(loss, partial):
        loss = loss.func
    asked: frozenset[str] = getattr(loss, _NEEDS, frozenset())
    return asked


def sample_batch(
    policy: LanguageModel,
    problems: Sequence[Problem],
    size: int,
    draw: Draw,
    *,
    distributions: bool = False,
) -> Batch:
    """`size` sequences a problem from the policy -> the batch, grouped by problem; `log_probs`
    carry the gradient of the pass that drew them.
    """
    parts = []
    for index, problem in enumerate(problems):
        tokens, log_probs = sample_scored(
            policy,
            size,
            draw=draw,
            prompts=None if problem.prompt is None else problem.prompt[None],
        )
        parts.append(_score(policy, problem, tokens, index, distributions, log_probs))
    return _joined(parts)


def score_batch(
    policy: LanguageModel,
    problems: Sequence[Problem],
    groups: Sequence[Tensor],
    *,
    distributions: bool = False,
) -> Batch:
    """Given sequences [n,T] a problem -> the batch; `log_probs` carry the policy's gradient.

    Raises:
        UnsupportedPolicyError: a sequence with no prior mass, or with reward −inf, where no
            gradient is defined.
    """
    return _joined(
        [
            _score(policy, *pair, index, distributions)
            for index, pair in enumerate(zip(problems, groups, strict=True))
        ]
    )


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    names = [name for name in Batch.__dataclass_fields__ if getattr(parts[0], name) is not None]
    return Batch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _score(
    policy: LanguageModel,
    problem: Problem,
    tokens: Tensor,
    index: int,
    distributions: bool,
    log_probs: Tensor | None = None,
) -> Batch:
    """The batch of given sequences; `log_probs` where the policy's are known already."""
    prompt = batch_prompt(problem.prompt, len(tokens))
    log_dists = conditional_log_probs(policy, tokens, prompt) if distributions else None
    if log_dists is not None:
        log_probs = log_dists.gather(-1, tokens[..., None]).squeeze(-1)
    elif log_probs is None:
        log_probs = token_log_probs(policy, tokens, prompt)
    with torch.no_grad():
        prior_log_dists = (
            conditional_log_probs(problem.prior, tokens, prompt) if distributions else None
        )
        prior_log_probs = token_log_probs(problem.prior, tokens, prompt)
        _refuse_unsupported(
            problem,
            tokens,
            prior_log_probs.sum(-1),
            "the prior gives it no mass",
            "restrict_to_support(policy, problem.prior)",
        )
        rewards = problem.token_rewards(tokens)
        _refuse_unsupported(
            problem,
            tokens,
            rewards.sum(-1),
            "its reward is -inf",
            "restrict_to_support(policy, feasible_prior(problem))",
        )
    return Batch(
        tokens=tokens,
        live=problem.space.live(tokens),
        log_probs=log_probs,
        prior_log_probs=prior_log_probs,
        behaviour_log_probs=log_probs.detach(),
        rewards=rewards,
        group=torch.full((len(tokens),), index, device=tokens.device),
        kl_coef=torch.full(
            (len(tokens),), problem.kl_coef, dtype=torch.float64, device=tokens.device
        ),
        log_dists=log_dists,
        prior_log_dists=prior_log_dists,
    )


def _refuse_unsupported(
    problem: Problem, tokens: Tensor, values: Tensor, why: str, remedy: str
) -> None:
    bad = values == -math.inf
    if bool(bad.any()):
        text = problem.space.decode(tokens[bad][:1])[0]
        raise UnsupportedPolicyError(
            f"the policy gives mass to {text!r}, but {why}, so KL(policy‖posterior) is infinite."
            f" Wrap it: {remedy}."
        )
