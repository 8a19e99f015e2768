"""What an update moves, and what takes a broken one back.

    θ ← θ − lr · optimiser(∇ loss),    all θ that the loss reaches, none of them forgotten

A parameter that no optimiser holds would stay where it is without a word, while its gradient still
counts for clipping; an update that leaves a NaN would lose the policy.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from klrl_edu.core.errors import DivergedError, InputError
from klrl_edu.core.validation import check_number
from klrl_edu.learning.batches import Batch, Loss
from klrl_edu.models.contract import LanguageModel, token_log_probs

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
_TRIED = 16  # sequences, one a group, on which an update is tried
LOST = 745.0  # nats: e^−745 is the smallest float above 0


def optimizers_of(
    policy: LanguageModel, loss: Loss, optimizer: Optimizers | None, lr: float
) -> list[torch.optim.Optimizer]:
    """The given ones, or Adam over what policy and loss own."""
    owned = _owned(policy, loss)
    if optimizer is None:
        return [_adam(owned, lr)]
    given = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    if not given or not all(isinstance(each, torch.optim.Optimizer) for each in given):
        raise InputError(
            f"optimizer = {optimizer!r}; expected a torch.optim.Optimizer, or a sequence of them."
        )
    # by identity: == of tensors compares their entries
    held = {id(parameter) for each in given for parameter in _held(each)}
    missing = [name for name, parameter in _named(policy, loss) if id(parameter) not in held]
    if missing:
        raise InputError(
            f"{missing[0]} is trainable and in no optimizer ({len(missing)} of {len(owned)} are"
            " not), so it would never move and its gradient would still count for clipping; give"
            " optimizers that hold policy.parameters() and those of the loss, or call"
            " requires_grad_(False) on what stays."
        )
    return given


def _named(policy: LanguageModel, loss: Loss) -> list[tuple[str, Tensor]]:
    """Every trainable parameter of policy and loss, with the words for it."""
    owners: list[tuple[str, nn.Module]] = [("the policy's", policy)]
    if isinstance(loss, nn.Module):
        owners.append(("the loss's", loss))
    return [
        (f"{owner} {name}", parameter)
        for owner, module in owners
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def _owned(policy: LanguageModel, loss: Loss) -> list[Tensor]:
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise InputError(
            "the policy has no trainable parameters; call policy.requires_grad_(True), or train a"
            " copy."
        )
    return _distinct([parameter for _, parameter in _named(policy, loss)])


def moved_by(
    policy: LanguageModel, loss: Loss, optimizers: Sequence[torch.optim.Optimizer]
) -> list[Tensor]:
    """What is clipped, and put back after a broken update: everything that an optimiser moves."""
    held = [parameter for each in optimizers for parameter in _held(each)]
    # an optimiser may hold more, such as a module that a loss closes over
    return _distinct([*_owned(policy, loss), *held])


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _distinct(parameters: Sequence[Tensor]) -> list[Tensor]:
    # a tied weight counts once for the norm, and is clipped once
    return list({id(parameter): parameter for parameter in parameters}.values())


def _adam(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    lr = check_number(lr, "lr", "a positive number", lambda x: 0 < x < math.inf)
    return torch.optim.Adam(
        parameters,
        lr=lr,
        fused=all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters),
    )


def refuse_unheld(value: Tensor, parameters: Sequence[Tensor]) -> None:
    """Refuses a loss that reaches a trainable tensor which no optimiser holds.

    By a walk of its graph: a lambda around a module, say, hides its parameters from all else.
    """
    held = {id(parameter) for parameter in parameters}
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of AccumulateGrad, where a leaf is reached
        if leaf is not None and id(leaf) not in held:
            raise InputError(
                f"the loss reaches a trainable tensor of shape {list(leaf.shape)} that no optimizer"
                " holds; pass the nn.Module that owns it as the loss itself, or an optimizer over"
                " it and the policy."
            )
        waiting.extend(parent for parent, _ in node.next_functions)


def check_max_grad_norm(max_grad_norm: float | None) -> float:
    """The norm to clip to, inf for none; a negative one would turn the gradient round."""
    if max_grad_norm is None:
        return math.inf
    rule = "a positive number, or None"
    return check_number(max_grad_norm, "max_grad_norm", rule, lambda x: x > 0)


class LastGoodWeights:
    """The weights before the last update, put back if that update left a policy that gives NaN."""

    def __init__(self, policy: LanguageModel, parameters: Sequence[Tensor]):
        self.policy, self.parameters = policy, parameters
        self.kept: list[Tensor] = []
        self.tried: tuple[Tensor, Tensor | None] | None = None

    def keep(self, batch: Batch) -> None:
        """Before an update: the weights, and one sequence a group to try the policy on."""
        # copies, as optimisers write in place
        self.kept = [parameter.detach().clone() for parameter in self.parameters]
        first = _first_of_each(batch.group)
        self.tried = (batch.tokens[first], None if batch.prompt is None else batch.prompt[first])

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Raises DivergedError if update `step` broke the policy or left weights not finite.

        The kept weights are back in place then.
        """
        # no update yet, so none is to blame
        if self.tried is None:
            return
        # weights first: the pass of the policy costs more
        finite = all(bool(torch.isfinite(moved).all()) for moved in self._moved())
        if not finite or self._gives_nan():
            self._take_back(step, "made the policy NaN or infinite")

    @torch.no_grad()
    def check_jump(self, step: int) -> None:
        """Raises DivergedError if update `step` moved a weight of the policy too far to come back.

        The policy is lost then, finite though it is; the kept weights are back in place.
        """
        self.check(step)
        # of a loss's own weights, such as a baseline, any size may be right
        own = {id(parameter) for parameter in self.policy.parameters()}
        jump = 0.0
        for parameter, old, moved in zip(self.parameters, self.kept, self._moved(), strict=True):
            if id(parameter) in own:
                # an old −inf is 0 on both sides: no jump
                before = torch.where(torch.isfinite(old), old, 0.0)
                jump = max(jump, float((moved - before).abs().max()))
        if jump > LOST:
            self._take_back(
                step,
                f"moved a weight by {jump:.3g}, and a logit that far below another has probability"
                " 0, which no later step raises again",
            )

    def _gives_nan(self) -> bool:
        """Whether the policy's log-probabilities are NaN."""
        assert self.tried is not None
        try:
            return bool(torch.isnan(token_log_probs(self.policy, *self.tried)).any())
        except InputError:  # it gave these sequences before: now the policy is broken
            return True

    def _take_back(self, step: int, what: str) -> NoReturn:
        for parameter, old in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(old)
        raise DivergedError(
            f"step {step}: its update {what}; the last good weights are back in place. Lower lr.",
            step,
        )

    def _moved(self) -> Iterator[Tensor]:
        """Each parameter where it was finite before: a table may hold −inf for what it forbids."""
        for parameter, old in zip(self.parameters, self.kept, strict=True):
            yield torch.where(torch.isfinite(old), parameter, 0.0)


def _first_of_each(group: Tensor) -> Tensor:
    """The first row of each group, at most a few [m]."""
    change = torch.ones_like(group, dtype=torch.bool)
    # the rows of a group stand together
    change[1:] = group[1:] != group[:-1]
    return change.nonzero().squeeze(-1)[:_TRIED]
