"""The posterior by backward induction over prefixes (soft Bellman).

    Q(s,a) = r(s,a) + V(sa),    V(s) = λ log Σ_a q(a|s) e^{Q(s,a)/λ},
    π*(a|s) = q(a|s) e^{(Q(s,a) − V(s))/λ}                                                       (1)
    V(∅) = λ log Z                                                                               (2)

Each V is carried as m + λℓ: m the best return still in reach, ℓ ≤ 0 the log-mass left, so that (1)
stays finite for any λ > 0 and its limit λ = 0 needs no other code. Todorov (2006); Levine (2018),
§2; Korbak et al. (2022). Nodes s and edges (s,a) are those of the support's trie; values in reward
units.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.closed_forms.tilt import scaled_advantage
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
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
        best_return: m at the root in reward units.
    """

    trie: PrefixTrie
    state_values: Tensor
    action_values: Tensor
    log_prior: Tensor
    log_policy: Tensor
    log_mass: Tensor
    best_return: Tensor


def soft_bellman(support: Support, kl_coef: float) -> SoftValues:
    """Soft values of every prefix by (1), one backward sweep over T depths.

    Args:
        support: the prior's sequences with `token_rewards` [K,T]; a whole-sequence reward stands on
            the last live token.
        kl_coef: λ ≥ 0; 0 and inf by their limits, where ties at λ = 0 are exact equalities of
            summed token rewards (summed from the end, where enumeration sums from the start:
            rewards that are not exact in binary may tie in one and not in the other).

    Raises:
        InputError: the rewards [K,T] are not causal.
    """
    check_kl_coef(kl_coef)
    trie = support.trie
    log_prior = edge_log_prior(support)
    reward = edge_rewards(support)
    # V = m + λℓ of each node, and E_q of what follows, which is V at λ = inf
    best = reward.new_full((trie.nodes,), -math.inf)
    mass = reward.new_full((trie.nodes,), -math.inf)
    mean = reward.new_zeros(trie.nodes)
    # the same for Q of each edge, where ℓ holds log q(a|s) too
    edge_best, edge_mass, edge_mean = reward.clone(), log_prior.clone(), reward.clone()
    depths = list(zip(trie.depth_edges, trie.depth_edges[1:], strict=False))
    for first, last in reversed(depths):
        edges, child = slice(first, last), trie.child[first:last]
        # Q = r + V(sa); nothing follows the last token
        inner = child >= 0
        edge_best[edges] += torch.where(inner, best[child], 0)
        edge_mass[edges] += torch.where(inner, mass[child], 0)
        edge_mean[edges] += torch.where(inner, mean[child], 0)
        # V = λ log Σ_a q e^{Q/λ}, with the best Q of each node taken out
        parent = trie.parent[edges]
        best = best.scatter_reduce(0, parent, edge_best[edges], "amax")
        lifted = edge_mass[edges] + scaled_advantage(edge_best[edges], best[parent], kl_coef)
        nodes = torch.unique(parent)
        mass[nodes] = logspace.segment_logsumexp(lifted, parent, trie.nodes)[nodes]
        mean = mean.index_add(0, parent, logspace.mul_exp(edge_mean[edges], log_prior[edges]))
    lifted = edge_mass + scaled_advantage(edge_best, best[trie.parent], kl_coef)
    log_policy = _normalise_edges(lifted, trie)
    if kl_coef == math.inf:
        state_values, action_values = mean, edge_mean
    else:
        # without mass m is −inf already, and 0·(−inf) at λ = 0 would be NaN
        state_values = best + torch.where(mass == -math.inf, 0, kl_coef * mass)
        log_after = edge_mass - log_prior
        action_values = edge_best + torch.where(edge_mass == -math.inf, 0, kl_coef * log_after)
    return SoftValues(trie, state_values, action_values, log_prior, log_policy, mass[0], best[0])


def edge_log_prior(support: Support) -> Tensor:
    """log q(a|s) [E] from log q(y): the mass below the edge over the mass below its node."""
    trie = support.trie
    on_path = trie.edge_of >= 0
    spread = support.log_prior[:, None].expand_as(trie.edge_of)[on_path]
    log_mass = logspace.segment_logsumexp(spread, trie.edge_of[on_path], len(trie.key))
    return _normalise_edges(log_mass, trie)


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


def _normalise_edges(log_mass: Tensor, trie: PrefixTrie) -> Tensor:
    """Edge log-masses [E] normalised over the edges of each node; uniform where a node has none."""
    total = logspace.segment_logsumexp(log_mass, trie.parent, trie.nodes)
    dead = total == -math.inf
    log_mass = torch.where(dead[trie.parent], torch.zeros_like(log_mass), log_mass)
    count = (trie.first_edge[1:] - trie.first_edge[:-1]).double()
    return log_mass - torch.where(dead, torch.log(count), total)[trie.parent]
