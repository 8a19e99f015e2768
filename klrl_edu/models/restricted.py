"""Policies kept to the support of a prior or posterior.

    π(v|prefix) ∝ π₀(v|prefix) · 1[reference(v|prefix) > 0]                                      (1)

A softmax gives mass to every sequence, so KL(π‖q) is infinite where q has zeros; (1) gives exactly
0 there. N sequences, T tokens, V columns.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import check_same_space
from klrl_edu.models.contract import LanguageModel, ended_and_last, force_eos


class RestrictedState(NamedTuple):
    """Where a restricted policy stands: both models' states, and which rows the reference can
    reach.
    """

    policy: Any
    reference: Any
    reference_log_probs: Tensor
    reachable: Tensor
    position: int


class RestrictedModel(LanguageModel):
    """A policy whose next-token logits are −inf where the reference has no mass; see
    `restrict_to_support`.
    """

    def __init__(self, policy: LanguageModel, reference: LanguageModel):
        super().__init__()
        check_same_space(policy.space, reference.space, "policy and reference")
        self.space = policy.space
        self.policy = policy
        # outside the module tree: the reference is fixed, belongs to the problem and not to this
        # policy's parameters
        self._reference = (reference,)

    @property
    def reference(self) -> LanguageModel:
        """The model whose support this policy keeps to."""
        return self._reference[0]

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            allowed_log_probs = force_eos(
                self.reference(tokens, prompt), *ended_and_last(self.space, tokens), self.space
            )
            taken = allowed_log_probs.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
            reached = (
                torch.nn.functional.pad((taken > -math.inf).long().cumprod(-1), (1, -1), value=1)
                > 0
            )
        return _mask(self.policy(tokens, prompt), allowed_log_probs, reached)

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, RestrictedState]:
        logits, state = self.policy.start(n, prompt)
        reference_logits, reference_state = self.reference.start(n, prompt)
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
        with torch.no_grad():
            last = position == self.space.max_length - 1
            log_probs = force_eos(reference_logits, torch.zeros_like(reachable), last, self.space)
        state = RestrictedState(policy_state, reference_state, log_probs, reachable, position)
        return _mask(logits, log_probs, reachable), state


def _mask(logits: Tensor, reference_log_probs: Tensor, reachable: Tensor) -> Tensor:
    """Logits with −inf where the reference has none; uniform where its prefix is out of reach
    (never a row of −inf, which is NaN).
    """
    kept = logits.masked_fill(reference_log_probs == -math.inf, -math.inf)
    if bool((reachable & (kept.detach() == -math.inf).all(-1)).any()):
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
        reference: the prior, or `feasible_prior(problem)` for hard rewards, on the same space; its
            gradient is not followed.

    Raises:
        InputError: another space; or, when a prefix is read after which the two have no next token
            in common.
    """
    return RestrictedModel(policy, reference)
