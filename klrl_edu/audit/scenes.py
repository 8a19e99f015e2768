"""What an audit looks at: the policy's support, everything a batch can say of it, and the law that
draws the batches.

A batch is made of units: of one sequence each where a policy draws them, of the two of a preference
pair where a table does. Each problem has a support and a law of its own; its units stand in blocks,
within which order is nothing to the loss. M problems, S supported sequences, W rows that units are
made of, U units of k, T tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klrl_edu.audit.rounding import nudged_batches
from klrl_edu.audit.targets import divergence_targets, missed_log_mass, targets_of_problem
from klrl_edu.audit.tree import SupportTree, starts_of
from klrl_edu.core import logspace
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError, TooLargeError, UnsupportedPolicyError
from klrl_edu.core.multisets import blocks
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.core.validation import check_same_space
from klrl_edu.exact.support_sums import support_log_mass
from klrl_edu.learning.batches import Batch, score_batch, stacked_prompts
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
class View:
    """One problem of a scene.

    Attributes:
        whole: the Batch of its S sequences, without gradient.
        tree: the trie of its S sequences.
        law: log-probability [U] with which a unit is drawn.
        missed: log of the prior's mass where the policy has none.
        remarks: what targets or sampling miss, in words.
        kl_coef: λ; None where there is no reward.
    """

    whole: Batch
    tree: SupportTree
    law: Tensor
    missed: float
    remarks: tuple[str, ...]
    kl_coef: float | None = None


Targets = Callable[[View], dict[str, Tensor]]
"""A problem -> name -> coefficients [E_m] of a gradient to descend."""


@dataclass(frozen=True)
class Scene:
    """The supports of a policy on one problem or several, and who draws from them.

    Attributes:
        whole: the Batch of all W rows, without gradient; where a policy draws, the sequences of
            each problem, one problem after the other.
        tree: the tries of their sequences, a prompt after the other.
        views: each problem on its own.
        starts: the first unit of each problem.
        first_edges: the first edge of each problem's tree.
        place: which sequence of the tree each row is [W]; None where they are the same.
        width: k, the rows of a unit, which lie one after the other in `whole`.
    """

    whole: Batch
    tree: SupportTree
    views: tuple[View, ...]
    starts: tuple[int, ...] = (0,)
    first_edges: tuple[int, ...] = (0,)
    place: Tensor | None = None
    width: int = 1

    @property
    def remarks(self) -> tuple[str, ...]:
        """What targets or sampling miss, in words; of several problems each says its number."""
        if len(self.views) == 1:
            return self.views[0].remarks
        every = [
            f"problems[{m}]: {remark}" for m, v in enumerate(self.views) for remark in v.remarks
        ]
        return tuple(every)

    @property
    def drawn(self) -> list[int]:
        """How many units each problem can draw."""
        return [int((view.law > -math.inf).sum()) for view in self.views]

    def rows(self, units: Tensor) -> Tensor:
        """The rows [..., B·k] of batches of units [..., B]."""
        if self.width == 1:
            return units
        own = torch.arange(self.width, device=units.device)
        return (units.unsqueeze(-1) * self.width + own).flatten(-2)

    def every_batch(self, size: int, times: int = 1) -> tuple[Tensor, Tensor]:
        """All batches of `times` blocks of `size` units a problem: rows [X,B] and
        log-probabilities [X].
        """
        units, log_weight = blocks([view.law for view in self.views], self.starts, size, times)
        return self.rows(units), log_weight

    def drawn_batches(self, count: int, size: int, draw: Draw) -> Tensor:
        """`count` batches of `size` units a problem, as they are drawn: rows [count,B]."""
        parts = []
        for view, start in zip(self.views, self.starts, strict=True):
            # the law's one row
            every = torch.zeros(count * size, dtype=torch.long, device=view.law.device)
            parts.append(draw(view.law[None], every).view(count, size) + start)
        return self.rows(torch.cat(parts, 1))

    def nudged(self, dtype: torch.dtype, way: int) -> "Scene":
        """The views with their numbers moved by a rounding of `dtype`, in one of two ways."""
        views = []
        for view in self.views:
            whole = nudged_batches(view.whole, dtype)[way]
            tree = view.tree.with_log_probs(whole.log_probs)
            # π's own law moves with π; that of μ or of a table does not depend on it
            on_policy = torch.equal(view.law, view.tree.log_probs)
            law = tree.log_probs if on_policy else view.law
            views.append(dataclasses.replace(view, whole=whole, tree=tree, law=law))
        return dataclasses.replace(self, views=tuple(views))

    def mean_over_problems(self, of_view: Targets) -> dict[str, Tensor]:
        """Named coefficients [E_m] of each problem's edges as their mean [E]; a name that one
        problem lacks is left out.
        """
        each = [of_view(view) for view in self.views]
        names = [name for name in each[0] if all(name in found for found in each)]
        mean = {name: self.tree.log_probs.new_zeros(self.tree.edges) for name in names}
        for found, start in zip(each, self.first_edges, strict=True):
            for name in names:
                # problems of one prompt share their edges, on which they add up
                mean[name][start : start + len(found[name])] += found[name] / len(each)
        return mean


def gradient_targets(view: View) -> dict[str, Tensor]:
    """The targets of a problem with a reward and a λ."""
    assert view.kl_coef is not None  # problems have one
    return targets_of_problem(view.whole, view.tree, view.kl_coef, view.missed, view.law)


@torch.no_grad()
def build_scene(
    policy: LanguageModel,
    problems: Sequence[Problem],
    behaviour: LanguageModel | None,
    max_sequences: int,
    *,
    distributions: bool,
    supported: bool,
    complete: bool = False,
) -> Scene:
    """Enumerates and scores the policy's support, for each problem after its prompt.

    Args:
        max_sequences: the most sequences to hold for each problem.
        distributions: score full next-token distributions as well.
        complete: batches are the whole support, once.
        supported: insist on prior mass and a finite reward everywhere, without which gradients are
            undefined.

    Raises:
        TooLargeError: a larger support.
        UnsupportedPolicyError: the policy leaves the prior's support, or the behaviour policy the
            policy's.
    """
    space = problems[0].space
    check_same_space(policy.space, space, "policy and problem")
    # problems of one prompt share the policy's support, and so its tree
    prompts = [problem.prompt for problem in problems]
    first = [next(k for k, p in enumerate(prompts) if _same(p, prompt)) for prompt in prompts]
    support = {k: _support(policy, space, prompts[k], max_sequences) for k in set(first)}
    tokens = [support[k] for k in first]
    if supported:
        whole = score_batch(
            policy, problems, tokens, distributions=distributions, complete=complete
        )
    else:
        whole = _scored_anyway(policy, problems, tokens)
    starts = starts_of([len(part) for part in tokens])
    if behaviour is not None:
        check_same_space(behaviour.space, space, "behaviour and problem")
        drawn_at = token_log_probs(behaviour, whole.tokens, whole.prompt)
        whole = dataclasses.replace(whole, behaviour_log_probs=drawn_at)

    views, tries, trees = [], {}, {}
    for m, problem in enumerate(problems):
        own = torch.arange(starts[m], starts[m + 1], device=whole.tokens.device)
        mine = whole.pick(own)
        if first[m] == m:
            tries[m] = PrefixTrie(space, tokens[m])
            trees[m] = SupportTree.build(tries[m], tokens[m], mine.log_probs, problem.prompt)
        tree, trie = trees[first[m]], tries[first[m]]
        missed = missed_log_mass(problem.prior, tokens[m], trie, problem.prompt)
        law, remarks = tree.log_probs, _missing_mass(mine, tree, missed)
        if behaviour is not None:
            # what μ draws beyond π is an error, what it never draws a remark
            _refuse_stray(behaviour, tokens[m], trie, problem)
            law = mine.behaviour_log_probs.sum(-1)
            remarks += _undrawn_mass(tree, law, space)
        views.append(View(mine, tree, law, missed, remarks, problem.kl_coef))

    heads = sorted(trees)  # the problem that brought each tree
    # not strict: _starts also says where the last one ends
    sequences = dict(zip(heads, starts_of([len(tokens[k]) for k in heads]), strict=False))
    edges = dict(zip(heads, starts_of([trees[k].edges for k in heads]), strict=False))
    counts = [torch.arange(len(part), device=part.device) for part in tokens]
    place = torch.cat([count + sequences[k] for count, k in zip(counts, first, strict=True)])
    return Scene(
        whole,
        SupportTree.side_by_side([trees[k] for k in heads]),
        tuple(views),
        starts=tuple(starts[:-1]),
        first_edges=tuple(edges[k] for k in first),
        place=place if len(problems) > 1 else None,
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two prompts are the same."""
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


@torch.no_grad()
def table_scene(policy: LanguageModel, table: Table, max_sequences: int) -> tuple[Scene, Targets]:
    """The rows of a table of texts or of preference pairs, on the policy's support.

    Args:
        max_sequences: the most sequences of the policy's support to hold.

    Returns:
        The scene, and its targets. Texts: −E[log π] under the table's weights; pairs: the
        divergences from the prior that they were given.

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
    trie = PrefixTrie(table.space, tokens)
    tree = SupportTree.build(trie, tokens, log_probs, prompt)
    whole = table.batch(policy, torch.arange(len(table.rows)))
    place = trie.rows_of(whole.tokens)  # all are there: the table refused others
    # the divergences are sums over the support, and `whole` holds the table's rows
    support = dataclasses.replace(whole, tokens=tokens, log_probs=log_probs)
    missed = -math.inf
    remarks: tuple[str, ...] = ()
    if table.prior is not None:
        prior_log_probs = token_log_probs(table.prior, tokens, prompt)
        support = dataclasses.replace(support, prior_log_probs=prior_log_probs)
        missed = missed_log_mass(table.prior, tokens, trie, prompt)
        remarks = _missing_mass(support, tree, missed)

    def targets(view: View) -> dict[str, Tensor]:
        if table.prior is not None:
            return divergence_targets(view.whole, view.tree, view.missed)
        # the table's share of each sequence [S]; Σ π ∇log π = 0 is added, as for forward_kl
        mass = view.tree.log_probs.exp()
        share = torch.zeros_like(mass).index_add(0, place, table.log_weights.exp())
        return {"negative_log_likelihood": view.tree.path_sums(mass - share)}

    view = View(support, tree, table.log_weights, missed, remarks)
    return Scene(whole, tree, (view,), place=place, width=table.rows.shape[1]), targets


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


_NAMED = 4  # sequences that a remark lists


def _undrawn_mass(tree: SupportTree, law: Tensor, space: SequenceSpace) -> tuple[str, ...]:
    """What a behaviour policy never draws, in words."""
    never = law == -math.inf
    undrawn = math.exp(float(logspace.logsumexp(torch.where(never, tree.log_probs, -math.inf))))
    if undrawn == 0:
        return ()
    # one more than is listed, to know whether there are more
    texts = [repr(text) for text in space.decode(tree.tokens[never][: _NAMED + 1])]
    listed = ", ".join(texts[:_NAMED]) + (", …" if len(texts) > _NAMED else "")
    return (
        f"the behaviour policy never draws sequences that hold {undrawn:.6g} of the policy's mass"
        f" ({listed}); no importance weight makes up for it.",
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
            " shorten the space, or sample up to a million sequences: monte_carlo=n with draw=."
        ) from None


def _refuse_stray(
    behaviour: LanguageModel, tokens: Tensor, trie: PrefixTrie, problem: Problem
) -> None:
    stray = float(support_log_mass(behaviour, tokens, trie, problem.prompt)[1])
    if stray > -math.inf:
        raise UnsupportedPolicyError(
            f"the behaviour policy gives mass {math.exp(stray):.6g} to sequences where the policy"
            " has none, so log π has no gradient there. Wrap it: restrict_to_support(behaviour,"
            " policy)."
        )


def _scored_anyway(
    policy: LanguageModel, problems: Sequence[Problem], groups: Sequence[Tensor]
) -> Batch:
    """As `score_batch` with distributions, but −inf where the prior has no mass; rewards count 0
    there.
    """
    tokens = torch.cat(list(groups))
    group = torch.cat([torch.full_like(part[:, 0], m) for m, part in enumerate(groups)])
    prompts = stacked_prompts(problems)
    prompt = None if prompts is None else prompts[group]
    prior = problems[0].prior
    log_dists, prior_log_dists = (
        conditional_log_probs(model, tokens, prompt) for model in (policy, prior)
    )
    log_probs, prior_log_probs = (
        token_log_probs(model, tokens, prompt) for model in (policy, prior)
    )
    # a reward need not be defined where the prior has no mass
    inside = prior_log_probs.sum(-1) > -math.inf
    rewards = torch.zeros_like(log_probs)
    for m, problem in enumerate(problems):
        mine = inside & (group == m)
        if bool(mine.any()):
            rewards[mine] = problem.token_rewards(tokens[mine])
    kl_coef = torch.tensor([p.kl_coef for p in problems], dtype=torch.float64, device=tokens.device)
    return Batch(
        tokens=tokens,
        live=problems[0].space.live(tokens),
        log_probs=log_probs,
        prior_log_probs=prior_log_probs,
        # as if π drew: where μ does, build_scene puts it in place
        behaviour_log_probs=log_probs,
        rewards=rewards,
        group=group,
        kl_coef=kl_coef[group],
        truncated=problems[0].space.truncated(tokens),
        prompt=prompt,
        log_dists=log_dists,
        prior_log_dists=prior_log_dists,
    )
