"""f-divergences between π and q from samples of π, as functions of the log-ratio u = log π/q.

    D_f(π‖q) = E_q[f(t)] = E_π[f(t)/t],    t = π/q = e^u,    w = 1/t                             (1)
    Var_π[f(t)/t] = E_q[f(t)²/t] − D_f²                                                          (2)

The generators f are those of `closed_forms.regularizers`. Each estimator is f(t)/t: its mean is the
divergence and its variance (2), both only where every sequence of q has mass under π (E_π[w] = 1).
Any shape, in nats; sum per-token log-ratios over a sequence first. They are values: the gradient of
one of them is not, on average, that of its divergence. Csiszár (1967); Rubenstein et al. (2019).
"""

import math

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import takes_numbers


@takes_numbers
def forward_kl(log_ratio: Tensor) -> Tensor:
    """KL(q‖π) by w log w = −u e^{−u} [...]: unbiased; may be negative, and is 0 where q = 0.

    Variance E_q[w u²] − KL(q‖π)².
    """
    return logspace.mul_exp(-log_ratio, -log_ratio)


@takes_numbers
def forward_kl_nonnegative(log_ratio: Tensor) -> Tensor:
    """KL(q‖π) by f = t − 1 − log t: w log w − w + 1 ≥ 0 [...], what k3 is to k1; unbiased, exact to
    the last digits near u = 0, 1 where q = 0.
    """
    zero = torch.zeros_like(log_ratio)
    # w (e^u − 1 − u) keeps the digits near u = 0 and overflows for large u; 1 − (1 + u) w does the
    # opposite. Each form sees only its own u, so that no NaN of the other reaches the gradient.
    near = log_ratio < 1
    small = torch.where(near, log_ratio, zero)
    large = torch.where(near, zero, log_ratio)
    at_small = torch.exp(-small) * logspace.expm1_minus_identity(small)
    at_large = 1 - logspace.mul_exp(1 + large, -large)
    return torch.where(near, at_small, at_large)


@takes_numbers
def chi_squared(log_ratio: Tensor) -> Tensor:
    """½E_q(t − 1)² by cosh u − 1 = 2 sinh²(u/2) [...]: unbiased.

    Heavy-tailed upwards, as (2) holds E_π[t²].
    """
    return 2 * torch.sinh(log_ratio / 2).square()


@takes_numbers
def reverse_chi_squared(log_ratio: Tensor) -> Tensor:
    """½χ²(q‖π) = ½E_π(w − 1)² by ½(e^{−u} − 1)² [...]: unbiased; twice it is the variance of an
    importance weight w.
    """
    return torch.expm1(-log_ratio).square() / 2


@takes_numbers
def total_variation(log_ratio: Tensor) -> Tensor:
    """½Σ|π − q| by ½|1 − e^{−u}| [...]: unbiased; between 0 and ½ where π > q.

    Variance ¼E_π(w − 1)² − TV².
    """
    return torch.expm1(-log_ratio).abs() / 2


@takes_numbers
def squared_hellinger(log_ratio: Tensor) -> Tensor:
    """½Σ(√π − √q)² by ½(1 − e^{−u/2})² [...]: unbiased."""
    return torch.expm1(-log_ratio / 2).square() / 2


@takes_numbers
def jensen_shannon(log_ratio: Tensor) -> Tensor:
    """½KL(π‖m) + ½KL(q‖m), m = (π + q)/2, by ½[log 2t/(1+t) + w log 2/(1+t)] [...]: unbiased, at
    least 0; the divergence is at most log 2.
    """
    return generalised_jensen_shannon(log_ratio, 0.5)


@takes_numbers
def generalised_jensen_shannon(log_ratio: Tensor, weight: float) -> Tensor:
    """β KL(π‖m) + (1 − β) KL(q‖m), m = βπ + (1 − β)q, by β log π/m + (1 − β) w log q/m [...]:
    unbiased.

    Args:
        log_ratio: u [...].
        weight: β in (0, 1), the share of π in the mixture.

    Divided by β it tends to KL(π‖q) as β → 0, divided by 1 − β to KL(q‖π) as β → 1. Source: Agarwal
    et al. (2024), eq. 1.
    """
    if not 0 < weight < 1:
        raise InputError(
            f"weight = {weight!r} must lie between 0 and 1: the share of the policy in the mixture."
        )
    share, rest = math.log(weight), math.log1p(-weight)
    policy = -torch.logaddexp(torch.full_like(log_ratio, share), rest - log_ratio)  # log π/m
    prior = -torch.logaddexp(share + log_ratio, torch.full_like(log_ratio, rest))  # log q/m
    return weight * policy + (1 - weight) * logspace.mul_exp(prior, -log_ratio)


@takes_numbers
def alpha_divergence(log_ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """f = (t^α − αt − (1 − α))/(α(α − 1)) by (e^{(α−1)u} − α − (1 − α)e^{−u})/(α(α − 1)) ≥ 0 [...]:
    unbiased for every α but 0 and 1.

    α → 1 is k3 of KL(π‖q), α → 0 `forward_kl_nonnegative` of KL(q‖π), α = 2 `chi_squared`, α = ½
    four times `squared_hellinger`.
    """
    if alpha in (0, 1):
        raise InputError(
            f"alpha = {alpha!r} is a limit: take divergences.forward_kl_nonnegative (0) or"
            " kl_values.k3 (1)."
        )
    # the linear terms of both exponentials cancel, so each is taken without its own
    power = logspace.expm1_minus_identity((alpha - 1) * log_ratio)
    weight = logspace.expm1_minus_identity(-log_ratio)
    return (power - (1 - alpha) * weight) / (alpha * (alpha - 1))
