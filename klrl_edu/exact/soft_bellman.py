"""The posterior by backward induction over prefixes (soft Bellman).

    Q(s,a) = r(s,a) + V(sa),    V(s) = λ log Σ_a q(a|s) e^{Q(s,a)/λ},
    π*(a|s) = q(a|s) e^{(Q(s,a) − V(s))/λ}                                                       (1)
    V(∅) = λ log Z                                                                               (2)

Each V is carried as m + λℓ, a soft maximum of those ahead (`closed_forms/soft_maximum.py`), so that
(1) keeps its digits at any λ > 0, and its limits need no other code. Todorov (2006); Levine (2018),
§2; Korbak et al. (2022). Nodes s and edges (s,a) are those of the support's trie; values in reward
units.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.closed_forms.soft_maximum import soft_maximum, soft_value
from klrl_edu.core import logspace, ties
from klrl_edu.core.errors import InputError
from klrl_edu.core.groups import Segments
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.core.validation import check_kl_coef
from klrl_edu.exact.enumeration import Support


class SoftValues(NamedTuple):
    """Soft values on a trie.

    Attributes:
        trie: nodes are prefixes, edges prefix and next token.
        state_values: V [nodes] in reward units; V[0] = λ log Z.
        action_values: Q [E] in reward units.
        log_prior: log q(a|s) [E] in nats.
        log_policy: log π*(a|s) [E] in nats; uniform over a node's edges where no continuation is
            feasible.
        log_mass: ℓ at the root in nats: log Z = m/λ + ℓ.
        anchor: m at the root in reward units: the best return at λ = 0.
    """

    trie: PrefixTrie
    state_values: Tensor
    action_values: Tensor
    log_prior: Tensor
    log_policy: Tensor
    log_mass: Tensor
    anchor: Tensor


def soft_bellman(support: Support, kl_coef: float) -> SoftValues:
    """Soft values of every prefix by (1), one backward sweep over T depths.

    Args:
        support: the prior's sequences with `token_rewards` [K,T]; a whole-sequence reward stands on
            the last live token.
        kl_coef: λ ≥ 0; 0 and inf by their limits, with the ties of `core/ties.py` at 0.

    Raises:
        InputError: the rewards [K,T] are not causal.
    """
    kl_coef = check_kl_coef(kl_coef)
    trie = support.trie
    log_prior, rewards = edge_log_prior(support), edge_rewards(support)
    # of the next depth's nodes; below the deepest there are none
    ahead = _Values(*(rewards.new_zeros(0) for _ in range(3)))
    state_values, action_values, log_policy = [], [], []
    depths = zip(trie.depth_edges, trie.depth_edges[1:], strict=False)
    # no edge is that deep where every sequence has ended before
    for first, last in reversed([(first, last) for first, last in depths if first < last]):
        log_q, reward = log_prior[first:last], rewards[first:last]
        q_values = _action_values(reward, trie.child[first:last], ahead, kl_coef)
        # the nodes of one depth are numbered one after the other, and each has an edge
        parent = trie.parent[first:last] - trie.parent[first]
        groups = Segments(parent, int(parent[-1]) + 1)
        best = soft_maximum(groups, log_q, *q_values[:2], kl_coef, q_values.slack)
        ahead = _Values(*best[:3])
        state_values.append(soft_value(ahead.anchor, ahead.log_mass, kl_coef))
        action_values.append(soft_value(q_values.anchor, q_values.log_mass, kl_coef))
        log_policy.append(_normalise(log_q + best.log_gain, groups))
    depth_first = (torch.cat(part[::-1]) for part in (state_values, action_values, log_policy))
    values, actions, policy = depth_first
    root = ahead.log_mass[0], ahead.anchor[0]
    return SoftValues(trie, values, actions, log_prior, policy, *root)


class _Values(NamedTuple):
    """V or Q of one depth's nodes or edges: m and ℓ, and how far rounding may have moved m."""

    anchor: Tensor
    log_mass: Tensor
    slack: Tensor


def _action_values(reward: Tensor, child: Tensor, ahead: _Values, kl_coef: float) -> _Values:
    """Q = r + V(sa) of one depth's edges, from V of the next depth's nodes; 0 follows the end."""
    inner = child >= 0
    if not bool(inner.any()):
        return _Values(reward, torch.zeros_like(reward), torch.zeros_like(reward))
    # the children of one depth are numbered one after the other too
    place = (child - child[inner][0]).clamp(min=0)
    anchor, log_mass, slack = (torch.where(inner, part[place], 0) for part in ahead)
    if kl_coef == 0:
        slack = slack + ties.addition_slack(reward, anchor)
    return _Values(reward + anchor, log_mass, slack)


def edge_log_prior(support: Support) -> Tensor:
    """log q(a|s) [E] from log q(y): the mass below the edge over the mass below its node."""
    trie = support.trie
    on_path = trie.edge_of >= 0
    spread = support.log_prior[:, None].expand_as(trie.edge_of)[on_path]
    log_mass = logspace.segment_logsumexp(spread, trie.edge_of[on_path], len(trie.key))
    return _normalise(log_mass, Segments(trie.parent, trie.nodes))


def edge_rewards(support: Support) -> Tensor:
    """r(s,a) [E]: a causal reward is the same for all sequences through an edge."""
    trie = support.trie
    on_path = trie.edge_of >= 0
    rewards = support.log_prior.new_zeros(len(trie.key))
    # of the sequences through an edge one is kept; the others must agree with it
    rewards[trie.edge_of[on_path]] = support.token_rewards[on_path]
    differs = on_path & (rewards[trie.edge_of.clamp(min=0)] != support.token_rewards)
    if bool(differs.any()):
        n, t = differs.nonzero()[0].tolist()
        raise InputError(
            f"the reward is not causal: sequence {n} has {float(support.token_rewards[n, t])} at"
            f" position {t}, and another sequence with the same tokens up to there has another"
            " value. Return [N] for a whole-sequence reward."
        )
    return rewards


def _normalise(log_mass: Tensor, groups: Segments) -> Tensor:
    """Log-masses [E] normalised over each group; uniform where a group has none."""
    total = groups.logsumexp(log_mass)
    dead = total == -math.inf
    log_mass = torch.where(groups.spread(dead), torch.zeros_like(log_mass), log_mass)
    count = groups.sum(torch.ones_like(log_mass))
    return log_mass - groups.spread(torch.where(dead, torch.log(count), total))
