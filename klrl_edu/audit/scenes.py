"""What an audit looks at: the policy's support, everything a batch can say of it, and the law that
draws the batches.

A batch is made of units: of one sequence each where a policy draws them, of the two of a preference
pair where a table does. S supported sequences, W rows that units are made of, U units of k, T
tokens.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from klrl_edu.audit.targets import divergence_targets, missed_log_mass
from klrl_edu.audit.tree import SupportTree
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError, TooLargeError, UnsupportedPolicyError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import check_same_space
from klrl_edu.exact.support_sums import support_log_mass
from klrl_edu.learning.batches import Batch, score_batch
from klrl_edu.learning.sources import Table
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
        whole: the Batch of all W rows, without gradient; where a policy draws, the S sequences.
        tree: the trie of the S sequences.
        sampler: log-probability [U] with which a unit of a batch is drawn.
        missed: log of the prior's mass where the policy has none.
        remarks: what targets or sampling miss, in words.
        place: which of the S sequences each row is [W]; None where they are the same.
        width: k, the rows of a unit, which lie one after the other in `whole`.
    """

    whole: Batch
    tree: SupportTree
    sampler: Tensor
    missed: float
    remarks: tuple[str, ...]
    place: Tensor | None = None
    width: int = 1

    def rows(self, units: Tensor) -> Tensor:
        """The rows [..., B·k] of batches of units [..., B]."""
        if self.width == 1:
            return units
        own = torch.arange(self.width, device=units.device)
        return (units.unsqueeze(-1) * self.width + own).flatten(-2)


@torch.no_grad()
def build_scene(
    policy: LanguageModel,
    problem: Problem,
    behaviour: LanguageModel | None,
    max_sequences: int,
    *,
    distributions: bool,
    supported: bool,
    complete: bool = False,
) -> Scene:
    """Enumerates and scores the policy's support.

    Args:
        max_sequences: the most sequences to hold.
        distributions: score full next-token distributions as well.
        complete: batches are the whole support, once.
        supported: insist on prior mass and a finite reward everywhere, without which gradients are
            undefined.

    Raises:
        TooLargeError: a larger support.
        UnsupportedPolicyError: the policy leaves the prior's support, or the behaviour policy the
            policy's.
    """
    check_same_space(policy.space, problem.space, "policy and problem")
    tokens = _support(policy, problem.space, problem.prompt, max_sequences)
    if supported:
        whole = score_batch(
            policy, [problem], [tokens], distributions=distributions, complete=complete
        )
    else:
        whole = _scored_anyway(policy, problem, tokens)
    tree = SupportTree.build(policy.space, tokens, whole.log_probs)
    missed = missed_log_mass(problem.prior, tree, problem.prompt)
    sampler, remarks = tree.log_probs, _missing_mass(whole, tree, missed)
    if behaviour is not None:
        check_same_space(behaviour.space, problem.space, "behaviour and problem")
        _refuse_stray(behaviour, tree, problem)
        drawn_at = token_log_probs(behaviour, tokens, problem.prompt)
        whole = dataclasses.replace(whole, behaviour_log_probs=drawn_at)
        sampler = drawn_at.sum(-1)
        remarks += _undrawn_mass(tree, sampler)
    return Scene(whole, tree, sampler, missed, remarks)


@torch.no_grad()
def table_scene(
    policy: LanguageModel, table: Table, max_sequences: int
) -> tuple[Scene, dict[str, Tensor]]:
    """The rows of a table of texts or of preference pairs, on the policy's support.

    Args:
        max_sequences: the most sequences of the policy's support to hold.

    Returns:
        The scene, and its targets: name -> coefficients [E]. Texts: −E[log π] under the table's
        weights; pairs: the divergences from the prior that they were given.

    Raises:
        TooLargeError: a larger support.
        UnsupportedPolicyError: the policy never gives a text of the table.
        InputError: the table has several prompts.
    """
    check_same_space(policy.space, table.space, "policy and source")
    prompt = table.prompt
    if prompt is not None and prompt.ndim == 2:
        raise InputError(
            f"the source has {len(prompt)} prompts, and an audit is of one; give prompt=[S], the"
            " same for all rows, or audit them one by one."
        )
    tokens = _support(policy, table.space, prompt, max_sequences)
    log_probs = token_log_probs(policy, tokens, batch_prompt(prompt, len(tokens)))
    tree = SupportTree.build(policy.space, tokens, log_probs)
    whole = table.batch(policy, torch.arange(len(table.rows)))
    place = tree.trie.rows_of(whole.tokens)  # all are there: the table refused others
    width = table.rows.shape[1]
    if table.prior is None:
        # the table's share of each sequence [S]; Σ π ∇log π = 0 is added, as for forward_kl
        share = torch.zeros_like(tree.log_probs).index_add(0, place, table.log_weights.exp())
        targets = {"negative_log_likelihood": tree.path_sums(tree.log_probs.exp() - share)}
        missed = -math.inf
        remarks: tuple[str, ...] = ()
    else:
        # the divergences are sums over the support, and `whole` holds the table's rows
        prior_log_probs = token_log_probs(table.prior, tokens, prompt)
        scored = dataclasses.replace(whole, tokens=tokens, prior_log_probs=prior_log_probs)
        missed = missed_log_mass(table.prior, tree, prompt)
        remarks = _missing_mass(scored, tree, missed)
        targets = divergence_targets(scored, tree, missed)
    return Scene(whole, tree, table.log_weights, missed, remarks, place, width), targets


def _missing_mass(whole: Batch, tree: SupportTree, missed: float) -> tuple[str, ...]:
    """What makes a divergence infinite, in words."""
    notes = []
    if missed > -math.inf:
        notes.append(
            f"the prior holds mass {math.exp(missed):.6g} where the policy has none, so KL(q‖π),"
            " per sequence and per token, is infinite."
        )
    outside = whole.prior_log_probs.sum(-1) == -math.inf
    if bool(outside.any()):
        mass = float(tree.log_probs[outside].exp().sum())
        notes.append(
            f"the policy gives mass {mass:.6g} where the prior has none, so KL(π‖q), per sequence"
            " and per token, is infinite."
        )
    return tuple(notes)


def _undrawn_mass(tree: SupportTree, sampler: Tensor) -> tuple[str, ...]:
    """What a behaviour policy never draws, in words."""
    never = torch.where(sampler == -math.inf, tree.log_probs, -math.inf)
    undrawn = math.exp(float(logspace.logsumexp(never)))
    if undrawn == 0:
        return ()
    return (
        f"the behaviour policy never draws sequences that hold {undrawn:.6g} of the policy's mass;"
        " no weight makes up for it.",
    )


def _support(
    policy: LanguageModel, space: SequenceSpace, prompt: Tensor | None, max_sequences: int
) -> Tensor:
    try:
        return enumerate_support(policy, max_sequences, prompt).tokens
    except TooLargeError:
        raise TooLargeError(
            f"the policy's support holds more than {max_sequences:,} sequences (the whole space:"
            f" {readable_count(space.size)}), as many as max_executions allows; raise it,"
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
