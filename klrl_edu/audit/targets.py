"""What a loss or an estimator may be meant to follow, exactly, as values and as gradients to
descend.

    objective              −J = −E_π[r] + λ KL(π‖q)
    expected_reward        −E_π[r], what is left of −J when the KL term is forgotten
    reverse_kl             KL(π‖q)          = Σ_y π (log π − log q)
    forward_kl             KL(q‖π)
    reverse_kl_per_token   E_{y~π} Σ_t KL(π(·|y_<t)‖q(·|y_<t)),
    its gradient with the prefixes' distribution frozen                                          (1)
    forward_kl_per_token   E_{y~π} Σ_t KL(q(·|y_<t)‖π(·|y_<t)),  likewise                        (2)

As a value (1) is KL(π‖q), by the chain rule; as a gradient it lacks the effect of a token on later
KL. Gradients are coefficients [E] of φ_e = ∇log π(v|prefix); adding a constant to a node's
coefficients per unit of π changes nothing, and is used to centre them.
"""

import math

import torch
from torch import Tensor

from klrl_edu.audit.tree import SupportTree
from klrl_edu.core import logspace
from klrl_edu.exact.support_sums import support_log_mass
from klrl_edu.learning.batches import Batch
from klrl_edu.models.contract import LanguageModel


@torch.no_grad()
def missed_log_mass(prior: LanguageModel, tree: SupportTree, prompt: Tensor | None) -> float:
    """The log of q's mass where π has none, −inf for none; however little, it makes both forward
    divergences infinite.
    """
    return float(support_log_mass(prior, tree.tokens, tree.trie, prompt)[1])


def gradient_targets(
    whole: Batch, tree: SupportTree, kl_coef: float, missed: float
) -> dict[str, Tensor]:
    """Name -> coefficients [E] of the gradient to descend; without the forward divergences where
    they are infinite.
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
    }


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
    parent = tree.trie.parent
    ratio = tree.edge_log_probs - tree.on_edges(whole.prior_log_probs)
    probs = tree.edge_log_probs.exp()
    divergence = torch.zeros_like(tree.node_log_mass).index_add(0, parent, probs * ratio)
    return tree.edge_log_mass.exp() * (ratio - divergence[parent])


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
        "reverse_kl_per_token": reverse,
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
