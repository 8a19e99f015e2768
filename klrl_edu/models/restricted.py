"""Policies kept to the support of a prior or posterior.

    π(v|prefix) ∝ π₀(v|prefix) · 1[reference(v|prefix) > 0]                                      (1)

A softmax gives mass to every sequence, so KL(π‖q) is infinite where q has zeros; (1) gives exactly
0 there. N sequences, T tokens, V columns.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.arguments import check_arguments
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import check_same_space
from klrl_edu.models.contract import LanguageModel, ended_and_last, force_eos


class RestrictedState(NamedTuple):
    """Where a restricted policy stands: both models' states, and which rows are in reach."""

    policy: Any
    reference: Any
    reference_log_probs: Tensor
    reachable: Tensor
    position: int


class RestrictedModel(LanguageModel):
    """A policy with logits of −inf where the reference has no mass; see `restrict_to_support`."""

    def __init__(self, policy: LanguageModel, reference: LanguageModel):
        super().__init__()
        check_arguments(
            "restrict_to_support(policy, reference)",
            policy=(policy, LanguageModel),
            reference=(reference, LanguageModel),
        )
        check_same_space(policy.space, reference.space, "policy and reference")
        self.space = policy.space
        self.policy, self.reads_prompt = policy, policy.reads_prompt
        # outside the module tree: the reference is fixed, belongs to the problem and not to this
        # policy's parameters
        self._reference = (reference,)

    @property
    def reference(self) -> LanguageModel:
        """The model whose support this policy keeps to."""
        return self._reference[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves (`.to`, `.float`) take the reference along.

        It is a copy where anything moves, as the problem and other policies may share the original.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held = [*self.reference.parameters(), *self.reference.buffers()]
        stays = bool(held) and all(fn(tensor) is tensor for tensor in held)
        if not stays:
            self._reference = (copy.deepcopy(self.reference)._apply(fn),)  # type: ignore[no-untyped-call]
        return self

    @property
    def knows_prompts(self) -> bool:
        return self.policy.knows_prompts or self.reference.knows_prompts

    def check_prompt(self, prompt: Tensor | None) -> None:
        self.policy.check_prompt(prompt)
        self.reference.check_prompt(self._for_reference(prompt))

    def _for_reference(self, prompt: Tensor | None) -> Tensor | None:
        """A reference to which prompts say nothing restricts the policy under every prompt."""
        return prompt if self.reference.knows_prompts else None

    def for_prompt(self, prompt: Tensor | str | None) -> Self:
        self.policy.for_prompt(prompt)
        return self

    def facts(self) -> list[str]:
        return [repr(self.policy), f"on the support of {self.reference!r}"]

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        self.check_prompt(prompt)
        with torch.no_grad():
            reference_logits = self.reference(tokens, self._for_reference(prompt))
            ended, last = ended_and_last(self.space, tokens)
            log_probs = force_eos(reference_logits, ended, last, self.space)
            taken = log_probs.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
            # row t is in reach where every token before t had mass: the products, one place later
            so_far = (taken > -math.inf).long().cumprod(-1)
            reachable = torch.nn.functional.pad(so_far, (1, -1), value=1) > 0
        return _mask(self.policy(tokens, prompt), log_probs, reachable)

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, RestrictedState]:
        logits, state = self.policy.start(n, prompt)
        reference_logits, reference_state = self.reference.start(n, self._for_reference(prompt))
        reachable = torch.ones(n, dtype=torch.bool, device=logits.device)
        return self._restrict(logits, state, reference_logits, reference_state, reachable, 0)

    def step(self, state: RestrictedState, token: Tensor) -> tuple[Tensor, RestrictedState]:
        logits, policy_state = self.policy.step(state.policy, token)
        reference_logits, reference_state = self.reference.step(state.reference, token)
        taken = state.reference_log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        reachable = state.reachable & (taken > -math.inf)
        return self._restrict(
            logits, policy_state, reference_logits, reference_state, reachable, state.position + 1
        )

    def select(self, state: RestrictedState, index: Tensor) -> RestrictedState:
        return RestrictedState(
            self.policy.select(state.policy, index),
            self.reference.select(state.reference, index),
            state.reference_log_probs[index],
            state.reachable[index],
            state.position,
        )

    def _restrict(
        self,
        logits: Tensor,
        policy_state: Any,
        reference_logits: Tensor,
        reference_state: Any,
        reachable: Tensor,
        position: int,
    ) -> tuple[Tensor, RestrictedState]:
        """The masked logits [n,V] and the state that gives them."""
        with torch.no_grad():
            last = position == self.space.max_length - 1
            ended = torch.zeros_like(reachable)  # rows that ended are the contract's to force
            log_probs = force_eos(reference_logits, ended, last, self.space)
        state = RestrictedState(policy_state, reference_state, log_probs, reachable, position)
        return _mask(logits, log_probs, reachable), state


def _mask(logits: Tensor, reference_log_probs: Tensor, reachable: Tensor) -> Tensor:
    """Logits [..., V] with −inf where the reference has none; uniform where it is out of reach.

    There a row of −inf would be NaN.
    """
    kept = logits.masked_fill(reference_log_probs == -math.inf, -math.inf)
    nothing_left = (kept.detach() == -math.inf).all(-1)
    if bool((reachable & nothing_left).any()):
        raise InputError(
            "restrict_to_support: after some prefix that both can reach, policy and reference have"
            " no next token in common."
        )
    return logspace.uniform_where_dead(kept, ~reachable)


def restrict_to_support(policy: LanguageModel, reference: LanguageModel) -> RestrictedModel:
    """The policy renormalised, token by token, on the support of a reference.

    A softmax gives mass to every sequence, so KL(π‖q) is infinite where the prior (or a posterior
    under a hard reward) has zeros; the restricted policy gives exactly 0 there and shares the
    parameters of `policy`. A prefix that the reference cannot reach has uniform logits (never NaN);
    its sequences keep mass 0. This is a new distribution, not the policy conditioned on the
    support.

    Args:
        policy: the model to restrict, logits [N,T,V].
        reference: the prior, or `feasible_prior(problem)` for hard rewards (of a list of problems
            where their prompts differ: it picks the support by prompt), on the same space; its
            gradient is not followed. One to which prompts say nothing restricts under every prompt.

    Raises:
        InputError: another space, a prompt that the reference does not know; or, when a prefix is
            read after which the two have no next token in common.
    """
    return RestrictedModel(policy, reference)
