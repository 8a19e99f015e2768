"""What a loss or an estimator may be meant to follow, exactly, as values and as gradients to
descend.

    objective              −J = −E_π[r] + λ KL(π‖q)
    expected_reward        −E_π[r], what is left of −J when the KL term is forgotten
    reverse_kl             KL(π‖q)          = Σ_y π (log π − log q)
    forward_kl             KL(q‖π)
    reverse_kl_per_token   E_{y~π} Σ_t KL(π(·|y_<t)‖q(·|y_<t)),
    its gradient with the prefixes' distribution frozen                                          (1)
    forward_kl_per_token   E_{y~π} Σ_t KL(q(·|y_<t)‖π(·|y_<t)),  likewise                        (2)
    entropy                −H(π) = E_π[log π];  entropy_per_token with frozen prefixes           (3)

and where a behaviour policy μ draws

    behaviour_reward       −E_μ[(r − E_μ r) log π], what REINFORCE without weights follows
    behaviour_kl           KL(μ‖π)
    truncated_reward       −E[r] under π cut to the tokens that μ can draw, where it leaves some out

As a value (1) is KL(π‖q), by the chain rule; as a gradient it lacks the effect of a token on later
KL. Gradients are coefficients [E] of φ_e = ∇log π(v|prefix); adding a constant to a node's
coefficients per unit of π changes nothing, and is used to centre them.
"""

import math

import torch
from torch import Tensor

from klrl_edu.audit.tree import SupportTree
from klrl_edu.core import logspace
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.exact.support_sums import support_log_mass
from klrl_edu.learning.batches import Batch
from klrl_edu.models.contract import LanguageModel


@torch.no_grad()
def missed_log_mass(
    prior: LanguageModel, tokens: Tensor, trie: PrefixTrie, prompt: Tensor | None
) -> float:
    """The log of q's mass off the policy's support tokens [S,T], −inf for none; however little, it
    makes both forward divergences infinite.
    """
    return float(support_log_mass(prior, tokens, trie, prompt)[1])


def targets_of_problem(
    whole: Batch, tree: SupportTree, kl_coef: float, missed: float, law: Tensor
) -> dict[str, Tensor]:
    """Name -> coefficients [E] of the gradient to descend; without the forward divergences where
    they are infinite.

    Args:
        whole: the support, with prior and rewards.
        missed: log of the prior's mass where the policy has none.
        law: log-probability [S] with which each sequence is drawn.
    """
    pi, log_pi, log_q = tree.log_probs.exp(), tree.log_probs, whole.prior_log_probs.sum(-1)
    rewards = whole.rewards.sum(-1)
    ratio = log_pi - log_q  # u [S], nats
    # less their means, which changes no gradient (E_π[∇log π] = 0) and keeps the digits near π*
    centred_ratio = ratio - logspace.expectation(log_pi, ratio)
    centred_reward = rewards - logspace.expectation(log_pi, rewards)
    return {
        "objective": tree.path_sums(pi * (kl_coef * centred_ratio - centred_reward)),
        "expected_reward": tree.path_sums(-pi * centred_reward),
        **divergence_targets(whole, tree, missed),
        "entropy": tree.path_sums(pi * (log_pi - logspace.expectation(log_pi, log_pi))),
        "entropy_per_token": _frozen(tree, tree.edge_log_probs),
        # on-policy they would repeat expected_reward, and a KL of 0
        **({} if torch.equal(law, log_pi) else _behaviour_targets(tree, law, rewards)),
    }


def _behaviour_targets(tree: SupportTree, law: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """What the law of the samples [S] makes of losses that forget to correct for it."""
    mu = law.exp()
    found = {
        "behaviour_reward": tree.path_sums(-mu * (rewards - logspace.expectation(law, rewards))),
        # −Σ μ ∇log π, with Σ π ∇log π = 0 added, which keeps the digits near μ = π
        "behaviour_kl": tree.path_sums(tree.log_probs.exp() - mu),
    }
    drawn = tree.path_sums(mu) > 0
    if not bool(drawn.all()):
        found["truncated_reward"] = _truncated_reward(tree, drawn, rewards)
    return found


@torch.enable_grad()
def _truncated_reward(tree: SupportTree, drawn: Tensor, rewards: Tensor) -> Tensor:
    """∇(−E[r]) under π with the edges that are not `drawn` [E] cut out and each node renormalised:
    log π̃(v|n) = ℓ_v − log Σ_{drawn} e^ℓ, by autograd in ℓ.
    """
    log_probs = tree.edge_log_probs.detach().clone().requires_grad_()
    kept = torch.where(drawn, log_probs, -math.inf)
    alive = torch.zeros_like(tree.node_log_mass).index_add(0, tree.trie.parent, drawn.double()) > 0
    total = logspace.segment_logsumexp(log_probs[drawn], tree.trie.parent[drawn], tree.trie.nodes)
    # a node below a cut edge is never reached: any number does there
    total = torch.where(alive, total, 0.0)
    edges = tree.trie.edge_of
    step = torch.where(edges >= 0, (kept - total[tree.trie.parent])[edges.clamp(min=0)], 0.0)
    reached = torch.isfinite(step).all(-1)  # a sequence with a cut edge has no mass left
    log_cut = step[reached].sum(-1)
    value = -(log_cut.exp() @ rewards[reached])
    (gradient,) = torch.autograd.grad(value, log_probs)
    return gradient


def divergence_targets(whole: Batch, tree: SupportTree, missed: float) -> dict[str, Tensor]:
    """The divergences of π and q among the targets: name -> coefficients [E]."""
    pi, log_pi, log_q = tree.log_probs.exp(), tree.log_probs, whole.prior_log_probs.sum(-1)
    ratio = log_pi - log_q
    found = {
        "reverse_kl": tree.path_sums(pi * (ratio - logspace.expectation(log_pi, ratio))),
        "reverse_kl_per_token": _reverse_per_token(whole, tree),
    }
    if missed == -math.inf:
        # −Σ q ∇log π, and Σ π ∇log π = 0 added so that it is 0 where π = q, exactly
        found["forward_kl"] = tree.path_sums(pi - log_q.exp())
        prefix_mass = tree.node_log_mass[tree.trie.parent].exp()
        edge_log_q = tree.on_edges(whole.prior_log_probs)
        difference = tree.edge_log_probs.exp() - edge_log_q.exp()
        found["forward_kl_per_token"] = prefix_mass * difference
    return {name: found[name] for name in _ORDER if name in found}


_ORDER = ("reverse_kl", "forward_kl", "reverse_kl_per_token", "forward_kl_per_token")


def _reverse_per_token(whole: Batch, tree: SupportTree) -> Tensor:
    """π(prefix) π(v|prefix) (u_v − KL at the prefix) [E]."""
    return _frozen(tree, tree.edge_log_probs - tree.on_edges(whole.prior_log_probs))


def _frozen(tree: SupportTree, values: Tensor) -> Tensor:
    """The gradient of E_π Σ_t Σ_v π(v|y_<t) values_v with prefixes and values [E] held fixed,
    centred at each prefix: π(prefix) π(v|prefix) (values_v − their mean) [E].
    """
    parent = tree.trie.parent
    weighted = tree.edge_log_probs.exp() * values
    mean = torch.zeros_like(tree.node_log_mass).index_add(0, parent, weighted)
    return tree.edge_log_mass.exp() * (values - mean[parent])


def value_targets(whole: Batch, tree: SupportTree, missed: float) -> dict[str, Tensor]:
    """Name -> the divergence in nats [1]; inf where one side has mass and the other none."""
    log_q = whole.prior_log_probs.sum(-1)
    reverse = logspace.kl_divergence(tree.log_probs, log_q)
    forward = per_token = torch.full_like(reverse, math.inf)
    if missed == -math.inf:
        forward = logspace.kl_divergence(log_q, tree.log_probs)
        if bool(torch.isfinite(log_q).all()):
            per_token = _forward_per_token(whole, tree)
    found = {
        "reverse_kl": reverse,
        "forward_kl": forward,
        "reverse_kl_per_token": reverse,  # by the chain rule
        "forward_kl_per_token": per_token,
    }
    return {name: value.reshape(1) for name, value in found.items()}


def _forward_per_token(whole: Batch, tree: SupportTree) -> Tensor:
    """(2) where π and q have the same next tokens, with its digits near zero: Σ_n π(n) Σ_v q (e^d −
    1 − d), d = log π − log q.
    """
    log_q = tree.on_edges(whole.prior_log_probs)
    terms = log_q.exp() * logspace.expm1_minus_identity(tree.edge_log_probs - log_q)
    return (tree.node_log_mass[tree.trie.parent].exp() * terms).sum()
