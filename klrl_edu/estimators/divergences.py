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
from klrl_edu.core.validation import check_number


@takes_numbers
def forward_kl(log_ratio: Tensor) -> Tensor:
    """KL(q‖π) by w log w = −u e^{−u} [...]: unbiased; may be negative, and is 0 where q = 0.

    Variance E_q[w u²] − KL(q‖π)².
    """
    return logspace.mul_exp(-log_ratio, -log_ratio)


@takes_numbers
def forward_kl_nonnegative(log_ratio: Tensor) -> Tensor:
    """KL(q‖π) by f = t − 1 − log t: w log w − w + 1 ≥ 0 [...], what k3 is to k1.

    Unbiased, exact to the last digits near u = 0, and 1 where q = 0.
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
    """½χ²(q‖π) = ½E_π(w − 1)² by ½(e^{−u} − 1)² [...]: unbiased.

    Twice it is the variance of an importance weight w.
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
    """½KL(π‖m) + ½KL(q‖m), m = (π + q)/2, by ½[log 2t/(1+t) + w log 2/(1+t)] [...]: unbiased.

    At least 0, and ½ log 2 where q = 0; the divergence is at most log 2.
    """
    return generalised_jensen_shannon(log_ratio, 0.5)


@takes_numbers
def generalised_jensen_shannon(log_ratio: Tensor, weight: float) -> Tensor:
    """β KL(π‖m) + (1 − β) KL(q‖m), m = βπ + (1 − β)q, by β log π/m + (1 − β) w log q/m [...].

    Unbiased; β log 1/β where q = 0, and +inf at u = −inf, which π never gives. Divided by β it
    tends to KL(π‖q) as β → 0, divided by 1 − β to KL(q‖π) as β → 1.

    Args:
        log_ratio: u [...].
        weight: β in (0, 1), the share of π in the mixture.

    Raises:
        InputError: a weight outside (0, 1).

    Source: Agarwal et al. (2024), eq. 1.
    """
    rule = "between 0 and 1: the share of the policy in the mixture"
    weight = check_number(weight, "weight", rule, lambda x: 0 < x < 1)
    share, rest = math.log(weight), math.log1p(-weight)
    never = log_ratio == -math.inf  # w = inf outgrows log π/m = −inf
    u = torch.where(never, torch.zeros_like(log_ratio), log_ratio)
    policy = -torch.logaddexp(torch.full_like(u, share), rest - u)  # log π/m
    prior = -torch.logaddexp(share + u, torch.full_like(u, rest))  # log q/m
    values = weight * policy + (1 - weight) * logspace.mul_exp(prior, -u)
    return torch.where(never, torch.full_like(values, math.inf), values)


@takes_numbers
def alpha_divergence(log_ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """f = (t^α − αt − (1 − α))/(α(α − 1)) by (e^{(α−1)u} − α − (1 − α)e^{−u})/(α(α − 1)) [...].

    Unbiased for every α but 0 and 1, and at least 0; where q = 0 it is 1/(1 − α) for α < 1 and +inf
    for α > 1. α → 1 is k3 of KL(π‖q), α → 0 `forward_kl_nonnegative` of KL(q‖π), α = 2
    `chi_squared`, α = ½ four times `squared_hellinger`.

    Raises:
        InputError: an α that is 0, 1 or not finite.
    """
    alpha = check_number(alpha, "alpha", "a finite number, neither 0 nor 1", math.isfinite)
    if alpha in (0, 1):
        raise InputError(
            f"alpha = {alpha:g} is a limit: take divergences.forward_kl_nonnegative (0) or"
            " kl_values.k3 (1)."
        )
    # three forms of one function, each where it loses no digits; each sees only its own u, so that
    # no NaN of the others reaches the gradient
    zero = torch.zeros_like(log_ratio)
    high, low = log_ratio >= 1, log_ratio <= -1
    u = torch.where(high, log_ratio, zero + 1)
    at_high = torch.exp((alpha - 1) * u) - alpha - (1 - alpha) * torch.exp(-u)
    u = torch.where(low, log_ratio, zero - 1)
    # e^{−u} outside the bracket, which stays between bounds where both exponentials overflow
    bracket = torch.exp(alpha * u) - alpha * torch.exp(u) - (1 - alpha)
    at_low = torch.exp(-u) * (bracket / alpha / (alpha - 1))
    u = torch.where(high | low, zero, log_ratio)
    # near 0 the linear terms of both exponentials cancel, so each is taken without its own
    power = logspace.expm1_minus_identity((alpha - 1) * u)
    near = power - (1 - alpha) * logspace.expm1_minus_identity(-u)
    # divided by one factor at a time: their product may overflow
    return torch.where(low, at_low, torch.where(high, at_high, near) / alpha / (alpha - 1))
