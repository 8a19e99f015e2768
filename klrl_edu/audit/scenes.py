"""What an audit looks at: the policy's support, everything a batch can say of it, and the law that
draws the batches.

S supported sequences, T tokens.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from klrl_edu.audit.targets import missed_log_mass
from klrl_edu.audit.tree import SupportTree
from klrl_edu.core import logspace
from klrl_edu.core.errors import TooLargeError, UnsupportedPolicyError
from klrl_edu.core.validation import check_same_space
from klrl_edu.evaluation.compare import support_log_mass
from klrl_edu.learning.batches import Batch, score_batch
from klrl_edu.models.contract import (
    LanguageModel,
    batch_prompt,
    conditional_log_probs,
    enumerate_support,
    readable_count,
    token_log_probs,
)
from klrl_edu.problems.problem import Problem


@dataclass(frozen=True)
class Scene:
    """The support of a policy, and who draws from it.

    Attributes:
        problem: prior, reward, λ.
        whole: the Batch of all S sequences, without gradient.
        tree: their trie.
        sampler: log-probability [S] with which a sequence of a batch is drawn.
        missed: log of the prior's mass where the policy has none.
        undrawn: the policy's mass where a behaviour policy has none.
    """

    problem: Problem
    whole: Batch
    tree: SupportTree
    sampler: Tensor
    missed: float
    undrawn: float

    def notes(self) -> list[str]:
        """What is missed by targets or by sampling, in words."""
        notes = []
        if self.missed > -math.inf:
            mass = math.exp(self.missed)
            notes.append(
                f"the prior holds mass {mass:.6g} where the policy has none, so KL(q‖π), per"
                " sequence and per token, is infinite."
            )
        outside = self.whole.prior_log_probs.sum(-1) == -math.inf
        if bool(outside.any()):
            mass = float(self.tree.log_probs[outside].exp().sum())
            notes.append(
                f"the policy gives mass {mass:.6g} where the prior has none, so KL(π‖q), per"
                " sequence and per token, is infinite."
            )
        if self.undrawn > 0:
            notes.append(
                f"the behaviour policy never draws sequences that hold {self.undrawn:.6g} of the"
                " policy's mass; no weight makes up for it."
            )
        return notes


@torch.no_grad()
def build_scene(
    policy: LanguageModel,
    problem: Problem,
    behaviour: LanguageModel | None,
    max_sequences: int,
    *,
    distributions: bool,
    supported: bool,
) -> Scene:
    """Enumerates and scores the policy's support.

    Args:
        max_sequences: the most sequences to hold.
        distributions: score full next-token distributions as well.
        supported: insist on prior mass and a finite reward everywhere, without which gradients are
            undefined.

    Raises:
        TooLargeError: a larger support.
        UnsupportedPolicyError: the policy leaves the prior's support, or the behaviour policy the
            policy's.
    """
    check_same_space(policy.space, problem.space, "policy and problem")
    tokens = _support(policy, problem, max_sequences)
    whole = (
        score_batch(policy, [problem], [tokens], distributions=distributions)
        if supported
        else _scored_anyway(policy, problem, tokens)
    )
    tree = SupportTree.build(policy.space, tokens, whole.log_probs)
    sampler, undrawn = tree.log_probs, 0.0
    if behaviour is not None:
        check_same_space(behaviour.space, problem.space, "behaviour and problem")
        _refuse_stray(behaviour, tree, problem)
        whole = dataclasses.replace(
            whole, behaviour_log_probs=token_log_probs(behaviour, tokens, problem.prompt)
        )
        sampler = whole.behaviour_log_probs.sum(-1)
        undrawn = math.exp(
            float(logspace.logsumexp(torch.where(sampler == -math.inf, tree.log_probs, -math.inf)))
        )
    return Scene(problem, whole, tree, sampler, missed_log_mass(problem, tree), undrawn)


def _support(policy: LanguageModel, problem: Problem, max_sequences: int) -> Tensor:
    try:
        return enumerate_support(policy, max_sequences, problem.prompt).tokens
    except TooLargeError:
        raise TooLargeError(
            f"the policy's support holds more than {max_sequences:,} sequences (the whole space:"
            f" {readable_count(problem.space.size)}), as many as max_executions allows; raise it,"
            " shorten the space, or sample up to a million sequences: monte_carlo=n with draw= and"
            " bound=."
        ) from None


def _refuse_stray(behaviour: LanguageModel, tree: SupportTree, problem: Problem) -> None:
    stray = float(support_log_mass(behaviour, tree.tokens, tree.trie, problem.prompt)[1])
    if stray > -math.inf:
        raise UnsupportedPolicyError(
            f"the behaviour policy gives mass {math.exp(stray):.6g} to sequences where the policy"
            " has none, so log π has no gradient there. Wrap it: restrict_to_support(behaviour,"
            " policy)."
        )


def _scored_anyway(policy: LanguageModel, problem: Problem, tokens: Tensor) -> Batch:
    """As `score_batch` with distributions, but −inf where the prior has no mass; rewards count 0
    there.
    """
    prompt = batch_prompt(problem.prompt, len(tokens))
    log_dists, prior_log_dists = (
        conditional_log_probs(model, tokens, prompt) for model in (policy, problem.prior)
    )
    log_probs, prior_log_probs = (
        token_log_probs(model, tokens, prompt) for model in (policy, problem.prior)
    )
    inside = prior_log_probs.sum(-1) > -math.inf
    rewards = torch.zeros_like(log_probs)
    if bool(inside.any()):
        rewards[inside] = problem.token_rewards(tokens[inside])
    return Batch(
        tokens=tokens,
        live=problem.space.live(tokens),
        log_probs=log_probs,
        prior_log_probs=prior_log_probs,
        behaviour_log_probs=log_probs,
        rewards=rewards,
        group=torch.zeros(len(tokens), dtype=torch.long, device=tokens.device),
        kl_coef=torch.full(
            (len(tokens),), problem.kl_coef, dtype=torch.float64, device=tokens.device
        ),
        log_dists=log_dists,
        prior_log_dists=prior_log_dists,
    )
