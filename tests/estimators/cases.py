"""Expectations over everything that can be drawn on a small case: a second audit, in a few plain
lines.

Batches are enumerated in every order, and each gradient is taken through the model itself; the
audit does neither.
"""

import dataclasses
import inspect
import itertools
import math

import torch

from klrl_edu.core import logspace
from klrl_edu.exact.enumeration import problem_support
from klrl_edu.learning import losses
from klrl_edu.learning.batches import Batch, score_batch


def whole_batch(case):
    """Every sequence once, with distributions, and μ's log-probabilities as behaviour."""
    tokens = problem_support(case.problem).tokens
    batch = score_batch(case.policy, [case.problem], [tokens], distributions=True)
    drawn_by = score_batch(case.behaviour, [case.problem], [tokens]).log_probs.detach()
    return dataclasses.replace(batch, behaviour_log_probs=drawn_by)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def flat_gradient(value, model):
    gradients = torch.autograd.grad(
        value, list(model.parameters()), retain_graph=True, materialize_grads=True
    )
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def called(function, batch):
    """An estimator called by the names of its parameters, a loss with the batch."""
    names = inspect.signature(function).parameters
    if "batch" in names:
        return function(batch)
    return function(
        **{name: getattr(batch, name) for name in names if name in Batch.__dataclass_fields__}
    )


def expectations(function, case, size=1, off_policy=False):
    """(E[g], E‖g − E g‖²) of the gradient of a surrogate or loss over all ordered batches of `size`
    sequences.
    """
    whole = whole_batch(case)
    log_weight = (
        whole.behaviour_log_probs.sum(-1) if off_policy else whole.log_probs.detach().sum(-1)
    )
    if not off_policy:
        whole = dataclasses.replace(whole, behaviour_log_probs=whole.log_probs.detach())
    mean, square = 0.0, 0.0
    for rows in itertools.product(range(len(whole.tokens)), repeat=size):
        probability = math.exp(float(log_weight[list(rows)].sum()))
        gradient = flat_gradient(called(function, whole.pick(torch.tensor(rows))), case.policy)
        mean, square = (
            mean + probability * gradient,
            square + probability * float(gradient.square().sum()),
        )
    return mean, square - float(mean.square().sum())


def truths(case):
    """Name -> the gradient that may be followed, by autograd through the enumerated divergences."""
    whole = whole_batch(case)
    log_pi, log_q = whole.log_probs.sum(-1), whole.prior_log_probs.sum(-1)
    frozen = {"π": log_pi.detach().exp(), "μ": whole.behaviour_log_probs.sum(-1).exp()}
    reverse = logspace.kl_divergence(whole.log_dists, whole.prior_log_dists).sum(-1)
    forward = logspace.kl_divergence(whole.prior_log_dists, whole.log_dists).sum(-1)
    values = {
        "objective": losses.exact(dataclasses.replace(whole, complete=True)),
        "expected_reward": -(log_pi.exp() * whole.rewards.sum(-1)).sum(),
        "reverse_kl": logspace.kl_divergence(log_pi, log_q),
        "forward_kl": logspace.kl_divergence(log_q, log_pi),
        "reverse_kl_per_token": (frozen["π"] * reverse).sum(),
        "forward_kl_per_token": (frozen["π"] * forward).sum(),
        "reverse_kl_per_token on μ's prefixes": (frozen["μ"] * reverse).sum(),
        "forward_kl_per_token on μ's prefixes": (frozen["μ"] * forward).sum(),
        "total_variation": (log_pi.exp() - log_q.exp()).abs().sum() / 2,
        "half_square": (log_pi.exp() * (log_pi - log_q).square() / 2).sum(),
        "half_square of μ": (frozen["μ"] * (log_pi - log_q).square() / 2).sum(),
    }
    return {name: flat_gradient(value, case.policy) for name, value in values.items()}
