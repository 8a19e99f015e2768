"""Estimators of the evidence Z = Σ_y q(y) e^{r(y)/λ} and of expectations under the posterior, from
samples of a proposal.

    w(y) = q(y) e^{r(y)/λ}/π(y),    E_π[w] = Z,    π*(y) = q(y) e^{r(y)/λ}/Z = w(y) π(y)/Z       (1)
    log Z − E_π[log w] = KL(π‖π*),    E_π*[log w] − log Z = KL(π*‖π)                             (2)

`log_weights` are log w [n] of n independent samples of the proposal π, in nats; −inf is a sample of
zero mass under the target; n is at least 1. Everything stays in logs. π has mass wherever π* has.
Burda et al. (2016); Grosse et al. (2015); Brekelmans et al. (2022).
"""

import math

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import takes_numbers


@takes_numbers
def importance_sampling(log_weights: Tensor) -> Tensor:
    """log Ẑ, Ẑ = (1/n) Σ w: [..., n] -> [...] in nats.

    Ẑ itself is unbiased for Z, with variance Z²χ²(π*‖π)/n. Its log is low on average (Jensen):
    E[log Ẑ] ≤ log Z, by about χ²(π*‖π)/2n; it rises with n.
    Source: (1); Burda et al. (2016), eq. 8.
    """
    return logspace.logsumexp(_some(log_weights)) - math.log(log_weights.shape[-1])


@takes_numbers
def lower_bound(log_weights: Tensor) -> Tensor:
    """(1/n) Σ log w: [..., n] -> [...] in nats, of mean log Z − KL(π‖π*), the ELBO.

    For every n; variance Var_π(log w)/n. J(π)/λ is its mean, so the best policy's bound is tight.
    Source: (2).
    """
    return _some(log_weights).mean(-1)


@takes_numbers
def upper_bound(posterior_log_weights: Tensor) -> Tensor:
    """(1/n) Σ log w at n exact samples of π*: [..., n] -> [...] in nats.

    Its mean is log Z + KL(π*‖π), at least log Z. Source: (2).
    """
    return _some(posterior_log_weights).mean(-1)


@takes_numbers
def reverse_importance_sampling(posterior_log_weight: Tensor, log_weights: Tensor) -> Tensor:
    """log (1/n)(w* + Σ w) with one exact sample of π* among n − 1 of the proposal.

    [...] and [..., n−1] -> [...] in nats. High on average: E ≥ log Z, falling to it as n grows; n =
    1 is `upper_bound`. With `importance_sampling` at the same n it brackets log Z.
    Source: Grosse et al. (2015), without annealing; Brekelmans et al. (2022).
    """
    return importance_sampling(torch.cat([posterior_log_weight.unsqueeze(-1), log_weights], -1))


@takes_numbers
def harmonic_mean(posterior_log_weights: Tensor) -> Tensor:
    """−log (1/n) Σ 1/w at n exact samples of π*: [..., n] -> [...] in nats.

    e^{−result} is unbiased for 1/Z where π's support lies in π*'s. Its variance E_π[1/w]/Z − 1/Z²
    over n is often infinite in large spaces. The result is high on average. Source: Newton and
    Raftery (1994).
    """
    return -importance_sampling(-posterior_log_weights)


@takes_numbers
def self_normalised(values: Tensor, log_weights: Tensor) -> Tensor:
    """Σ w f/Σ w, an estimate of E_π*[f] that needs no Z.

    Values f and log-weights [..., n] -> [...] in the unit of f. A ratio, biased towards E_π[f],
    which is its mean at n = 1. To first order in 1/n the bias is −E_π[(w/Z)²(f − E_π*[f])]/n, the
    variance E_π[(w/Z)²(f − E_π*[f])²]/n.

    Raises:
        InfeasibleError: every weight is 0.
    """
    return logspace.expectation(logspace.log_normalize(_some(log_weights)), values)


def _some(log_weights: Tensor) -> Tensor:
    """The weights [..., n] themselves, if there are any."""
    if log_weights.ndim == 0 or log_weights.shape[-1] == 0:
        raise InputError(
            f"log-weights have shape {list(log_weights.shape)}; expected [..., n], at least one"
            " sample."
        )
    return log_weights
