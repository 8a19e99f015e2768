"""What a loss sees: sequences, and what the policy, the prior and the reward say of them.

N sequences, T tokens, V columns, S prompt tokens; log-probabilities in nats, rewards in reward
units. After the first EOS log-probabilities and rewards are 0, so sums over T are sums over the
sequence. Where the sequences come from is the business of `sources`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from klrl_edu.core.errors import InputError, UnsupportedPolicyError
from klrl_edu.models.contract import LanguageModel, conditional_log_probs, token_log_probs
from klrl_edu.problems.problem import Problem


class Absent:
    """Stands in a batch for what its source does not give: whatever reads it is told so.

    A zero would train on numbers that nobody gave, and None would fail far from the reason.
    """

    def __init__(self, name: str, why: str):
        self._name, self._why = name, why

    def _refuse(self, *_: Any) -> NoReturn:
        raise InputError(f"the loss reads batch.{self._name}, {self._why}")

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):  # what Python itself looks up
            raise AttributeError(attribute)
        self._refuse()

    def __repr__(self) -> str:
        return f"<no {self._name}>"

    @classmethod
    def __torch_function__(cls, _: Any, __: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        # torch.exp(field) and the like arrive here
        given = [*args, *(kwargs or {}).values()]
        # as in torch.stack([field, …])
        nested = [part for value in given if isinstance(value, list | tuple) for part in value]
        next(value for value in given + nested if isinstance(value, cls))._refuse()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __neg__ = __abs__ = __matmul__ = _refuse
    __lt__ = __gt__ = __le__ = __ge__ = __getitem__ = __len__ = __iter__ = __bool__ = _refuse


def absent(name: str, why: str) -> Tensor:
    """An `Absent` where the type says Tensor: reading it is an error and never a number."""
    return cast(Tensor, Absent(name, why))


_NO_DISTRIBUTIONS = (
    "which holds full next-token distributions and was not asked for; mark the loss"
    " @needs('distributions'), or give its source distributions=True."
)


_NO_TRUNCATED = absent(
    "truncated", "which whoever made it did not give; it is space.truncated(tokens)."
)
_NO_LOG_DISTS = absent("log_dists", _NO_DISTRIBUTIONS)
_NO_PRIOR_LOG_DISTS = absent("prior_log_dists", _NO_DISTRIBUTIONS)


@dataclass(frozen=True)
class Batch:
    """Sequences, and what the policy, the prior and the reward say of them.

    A source gives what it has; where it has no prior, no reward or no law that drew the sequences,
    the field is there and reading it is an InputError that says why.

    Attributes:
        tokens: [N,T].
        live: bool [N,T], True up to the first EOS.
        log_probs: log π(y_t|y_<t) [N,T]; carries the gradient.
        prior_log_probs: log q(y_t|y_<t) [N,T].
        behaviour_log_probs: [N,T] of the policy that drew the sequences, without gradient; on the
            policy's own samples it equals `log_probs`, on later epochs it stays as it was.
        rewards: [N,T]; a whole-sequence reward stands on the last live token. In a preference pair
            1 stands there for the one that won, and 0 for the other.
        group: [N], which problem (prompt) each sequence belongs to; two sequences of one group are
            a preference pair where `sources.pairs` gave them.
        kl_coef: λ of each sequence's problem [N].
        prompt: [N,S] with −1 as left padding, or None without prompts.
        truncated: bool [N], True where the limit T ended the text and no EOS of its own did
            (`SequenceSpace.truncated`): with EOS, texts of T − 1 words; without, none. What TRL's
            `mask_truncated_completions` leaves out: `live & ~truncated[:, None]`.
        log_dists, prior_log_dists: full next-token log-probabilities [N,T,V], for losses marked
            `@needs("distributions")`.
        complete: whether the batch lists every supported sequence of each problem once, so that a
            sum over it is a sum over the space.
    """

    tokens: Tensor
    live: Tensor
    log_probs: Tensor
    prior_log_probs: Tensor
    behaviour_log_probs: Tensor
    rewards: Tensor
    group: Tensor
    kl_coef: Tensor
    prompt: Tensor | None = None
    truncated: Tensor = _NO_TRUNCATED
    log_dists: Tensor = _NO_LOG_DISTS
    prior_log_dists: Tensor = _NO_PRIOR_LOG_DISTS
    complete: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there: name -> tensor, each with the N sequences as its first
        axis.
        """
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        # what is absent, a prompt of None and the flag are no tensors
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def pick(self, rows: Tensor) -> "Batch":
        """The batch of some of its sequences `rows` [B], in this order, repeated or not."""
        # some rows, or one twice: a sum over them is none over the space, so complete is False
        picked: dict[str, Any] = {name: value[rows] for name, value in self.tensors().items()}
        return replace(self, **picked, complete=False)


Loss = Callable[[Batch], Tensor]
"""Batch -> scalar to minimise; one contract for training and for the audit. A loss with parameters
of its own is an nn.Module."""


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
    """Marks a loss that asks for more than sampled token log-probabilities, so that `train` and the
    audit, given a Problem, take the source that it needs.

    A wrapper that hides the mark (a lambda, say) trains on nothing wrong: the batch refuses.

    Args:
        what: "support" (the batch lists every supported sequence once, instead of samples) or
            "distributions" (`log_dists`).

    Raises:
        InputError: another word.
    """
    unknown = [word for word in what if word not in ("support", "distributions")]
    if unknown:
        raise InputError(f"needs({unknown[0]!r}): a loss can need 'support' or 'distributions'.")

    def mark(loss: AnyLoss) -> AnyLoss:
        setattr(loss, _NEEDS, frozenset(what))
        return loss

    return mark


def needs_of(loss: Any) -> frozenset[str]:
    """What a loss asked for by `needs`; looks through functools.partial, functools.wraps and a
    module's `forward`.
    """
    # partial does not hand on the attributes of what it wraps
    while isinstance(loss, partial):
        loss = loss.func
    asked: frozenset[str] | None = getattr(loss, _NEEDS, None)
    if asked is None and isinstance(loss, nn.Module):
        asked = getattr(loss.forward, _NEEDS, None)
    # functools.wraps copies a mark, but not that of a partial or a module further in
    if asked is None and hasattr(loss, "__wrapped__"):
        return needs_of(loss.__wrapped__)
    return frozenset() if asked is None else asked


def check_complete(batch: Batch, name: str) -> None:
    """Refuses drawn sequences where a loss sums over the space.

    Raises:
        InputError: the batch does not list the whole support.
    """
    if not batch.complete:
        raise InputError(
            f"{name} sums over every supported sequence, and this batch holds drawn ones: give it"
            " the whole support, train(policy, sources.support(problem), …), or mark what wraps it"
            " @needs('support')."
        )


# --- scoring --------------------------------------------------------------------------------------


def score_batch(
    policy: LanguageModel,
    problems: Sequence[Problem],
    groups: Sequence[Tensor],
    *,
    log_probs: Tensor | None = None,
    distributions: bool = False,
    complete: bool = False,
    drawn_by: str = "the policy",
) -> Batch:
    """Sequences [n,T] of each problem, scored by policy and prior in one pass each.

    Args:
        policy: its gradient is in `log_probs` of the batch.
        problems: one, or several that share a prior.
        groups: the sequences of each problem.
        log_probs: log π(y_t|y_<t) [N,T] of all of them, where the pass that drew them gave it.
        distributions: score full next-token distributions too.
        complete: say that the groups are the problems' whole supports.
        drawn_by: who gave the sequences, for messages.

    Raises:
        UnsupportedPolicyError: a sequence with no prior mass, or with reward −inf, where no
            gradient is defined.
    """
    tokens = torch.cat(list(groups))
    sizes = torch.tensor([len(part) for part in groups], device=tokens.device)
    group = torch.arange(len(groups), device=tokens.device).repeat_interleave(sizes)
    prompts = stacked_prompts(problems)
    prompt = None if prompts is None else prompts[group]
    prior = problems[0].prior
    log_dists, prior_log_dists = _NO_LOG_DISTS, _NO_PRIOR_LOG_DISTS
    if distributions:
        # both from one pass, so that their gradients share a graph
        log_dists = conditional_log_probs(policy, tokens, prompt)
        log_probs = log_dists.gather(-1, tokens[..., None]).squeeze(-1)
    elif log_probs is None:
        log_probs = token_log_probs(policy, tokens, prompt)
    with torch.no_grad():
        # prior and reward stay fixed: log π alone carries a gradient
        prior_log_probs = token_log_probs(prior, tokens, prompt)
        if distributions:
            prior_log_dists = conditional_log_probs(prior, tokens, prompt)
        rewards = torch.cat(
            [
                _supported_rewards(problem, part, log_q, drawn_by)
                for problem, part, log_q in zip(
                    problems, groups, prior_log_probs.split(sizes.tolist()), strict=True
                )
            ]
        )
    kl_coef = torch.tensor([p.kl_coef for p in problems], dtype=torch.float64, device=tokens.device)
    return Batch(
        tokens=tokens,
        live=problems[0].space.live(tokens),
        log_probs=log_probs,
        prior_log_probs=prior_log_probs,
        # as if the policy had drawn them: ρ is 1, and its gradient ∇log π
        behaviour_log_probs=log_probs.detach(),
        rewards=rewards,
        group=group,
        kl_coef=kl_coef[group],
        prompt=prompt,
        truncated=problems[0].space.truncated(tokens),
        log_dists=log_dists,
        prior_log_dists=prior_log_dists,
        complete=complete,
    )


def stacked_prompts(problems: Sequence[Problem]) -> Tensor | None:
    """The problems' prompts as rows [M,S], −1 to the left of shorter ones; None where there are
    none.
    """
    prompts = [problem.prompt for problem in problems]
    given = [prompt for prompt in prompts if prompt is not None]
    if not given:
        return None
    if len(given) < len(prompts):
        index = prompts.index(None)
        raise InputError(
            f"problems[{index}] has no prompt and others have one; problems of one run all have a"
            " prompt, or none has."
        )
    width = max(len(prompt) for prompt in given)
    # on the left, so that every prompt ends where its text begins
    return torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=-1) for p in given])


def _supported_rewards(
    problem: Problem, tokens: Tensor, prior_log_probs: Tensor, drawn_by: str
) -> Tensor:
    """Rewards [n,T] of sequences that the posterior supports."""

    def refuse(values: Tensor, why: str, reference: str) -> None:
        bad = values == -math.inf
        if bool(bad.any()):
            text = problem.space.decode(tokens[bad][:1])[0]
            raise UnsupportedPolicyError(
                f"{drawn_by} gives mass to {text!r}, but {why}, so KL(policy‖posterior) is"
                f" infinite. Wrap it: restrict_to_support(policy, {reference})."
            )

    # the prior first: where it has no mass a reward need not exist
    refuse(prior_log_probs.sum(-1), "the prior gives it no mass", "problem.prior")
    rewards = problem.token_rewards(tokens)
    refuse(rewards.sum(-1), "its reward is -inf", "feasible_prior(problem)")
    return rewards
