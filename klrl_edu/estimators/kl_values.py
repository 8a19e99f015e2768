"""Estimators of KL(π‖q) from samples of π (Schulman 2020), and the exact per-token KL.

    u = log π/q,    k1 = u,    k2 = u²/2,    k3 = e^{−u} − 1 + u                                                  (1)

E_π[k1] = E_π[k3] = KL(π‖q); k2 is biased. Pure functions of log-ratios u of any shape, in nats; sum per-token log-ratios
over a sequence first for the sequence's KL.
"""

import math
import warnings

import torch
from torch import Tensor

from klrl_edu.core import logspace


def k1(log_ratio: Tensor) -> Tensor:
    """u [...]: unbiased, variance Var_π(u); may be negative. Schulman (2020)."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """u²/2 [...]: biased by ½E[u²] − E[u]; its gradient on-policy is that of KL(π‖q). Schulman (2020)."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """e^{−u} − 1 + u ≥ 0 [...]: unbiased where q's support lies in π's; exact to the last digits near u = 0. Schulman (2020).

    At u = −inf (π = 0, never sampled) and u = +inf (q = 0, KL infinite) it is +inf. Where e^{−u} overflows it is +inf with a
    RuntimeWarning that gives its log.
    """
    values = logspace.expm1_minus_identity(-log_ratio)
    overflow = torch.isinf(values) & torch.isfinite(log_ratio)
    if bool(overflow.any()):
        lowest = float(log_ratio.detach()[overflow].min())
        warnings.warn(f"k3 overflows {log_ratio.dtype} at log-ratio {lowest:g}: its log is {-lowest:g} nats; use k1.", RuntimeWarning, 2)
    return values


def per_token_kl(log_dists: Tensor, prior_log_dists: Tensor) -> Tensor:
    """KL(π(·|y_<t)‖q(·|y_<t)) at each position, over the full vocabulary.

    Args:
        log_dists, prior_log_dists: next-token log-probabilities [N,T,V] of policy and prior, in nats.

    Returns:
        [N,T] in nats; summed over T and averaged over prefixes from π it is the sequence KL (chain rule). +inf where q = 0 < π.
    """
    return logspace.kl_divergence(log_dists, prior_log_dists)


def kl_per_token(log_ratio: Tensor, live: Tensor) -> Tensor:
    """The masked token mean of u that TRL logs as `kl`: Σ live·u / Σ live for u [N,T] -> scalar, nats a token. Not the sequence KL."""
    total = torch.where(live, log_ratio, torch.zeros_like(log_ratio)).sum()
    return total / live.sum() if bool(live.any()) else torch.full_like(total, math.nan)
