"""Moment constraints (GDC): the distribution nearest to q whose features have given means.

    min KL(p‖q)  with  E_p[φ] = μ;    p ∝ q e^{β·φ},    β = argmin log Z(β) − β·μ                (1)

Newton's method with the exact covariance, ∇² log Z = Cov_p[φ]. Khalifa, Elsahar & Dymetman (2021),
§2; Csiszár (1975). K outcomes, D features; log q in nats.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InfeasibleError, InputError
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.outcomes import check_law

_STEPS, _TOLERANCE = 200, 1e-13
# a target nearer than this to the edge of what is attainable needs infinite coefficients
_MARGIN = 1e-9


class MomentMatch(NamedTuple):
    """β [D], log p [K] in nats, KL(p‖q) in nats, and Cov_p[φ] [D,D]."""

    coefficients: Tensor
    log_probs: Tensor
    kl: float
    covariance: Tensor


@takes_numbers
def match_moments(log_prior: Tensor, features: Tensor, targets: Tensor) -> MomentMatch:
    """The distribution (1) nearest to q whose features have the means μ.

    Args:
        log_prior: [K], normalised; −inf is zero mass.
        features: φ [K,D]; targets: μ [D].

    Where features are linearly dependent under q, β is the one of least norm.

    Raises:
        InfeasibleError: no distribution on q's support has these means, or only one on the edge of
            what is attainable; the message has the range of each feature and the distance.
        InputError: shapes that do not fit, or values that are not finite.
    """
    check_law(log_prior, "log_prior")
    fits = features.ndim == 2 and len(features) == len(log_prior)
    if not fits or targets.shape != features.shape[1:]:
        raise InputError(
            f"features {list(features.shape)} and targets {list(targets.shape)} must be [K, D] and"
            f" [D] with K = {len(log_prior)}."
        )
    supported = log_prior > -math.inf
    phi, log_q, mu = features[supported].double(), log_prior[supported], targets.double()
    if not bool(torch.isfinite(phi).all() and torch.isfinite(mu).all()):
        raise InputError("features and targets must be finite on the prior's support.")
    _check_attainable(phi, mu)
    beta = _newton(log_q, phi, mu)
    log_p, _, covariance = _tilted(log_q, phi, beta)
    log_probs = torch.full_like(log_prior, -math.inf)
    log_probs[supported] = log_p
    kl = float(logspace.kl_divergence(log_probs, log_prior))
    return MomentMatch(beta, log_probs, kl, covariance)


def _tilted(log_q: Tensor, phi: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p ∝ q e^{β·φ} as log p [K], with its mean E_p[φ] [D] and its covariance Cov_p[φ] [D,D]."""
    log_p = logspace.log_normalize(log_q + phi @ beta)
    mean = log_p.exp() @ phi
    away = phi - mean
    return log_p, mean, (away * log_p.exp()[:, None]).T @ away


def _newton(log_q: Tensor, phi: Tensor, mu: Tensor) -> Tensor:
    """The minimum of log Z(β) − β·μ, convex: Newton steps, halved until they descend."""
    centred = phi - mu  # log Z(β) − β·μ = log Σ q e^{β·(φ − μ)}
    beta = torch.zeros_like(mu)
    scale = centred.abs().amax(0).clamp(min=1e-300)

    def log_evidence(at: Tensor) -> float:
        return float(logspace.logsumexp(log_q + centred @ at))

    for _ in range(_STEPS):
        _, mean, covariance = _tilted(log_q, centred, beta)
        if bool((mean.abs() <= _TOLERANCE * scale).all()):
            break
        # by least squares of least norm, as dependent features make the covariance singular
        step = -torch.linalg.lstsq(covariance, mean[:, None], driver="gelsd").solution.squeeze(-1)
        size, here, slope = 1.0, log_evidence(beta), float(mean @ step)
        # Armijo's rule; where the gain is of the size of rounding the whole step is right, and a
        # comparison would only see the rounding
        while -slope > 1e-10 and log_evidence(beta + size * step) > here + 1e-4 * size * slope:
            size /= 2
        beta = beta + size * step
    return beta


def _check_attainable(phi: Tensor, mu: Tensor) -> None:
    """Refuses targets outside the convex hull of the supported features, or on its edge."""
    distance = _distance(phi.numpy(), mu.numpy())
    ends = zip(phi.amin(0).tolist(), phi.amax(0).tolist(), strict=True)
    ranges = ", ".join(f"[{low:.6g}, {high:.6g}]" for low, high in ends)
    if distance > _MARGIN:
        raise InfeasibleError(
            f"targets = {mu.tolist()} are not attainable: the nearest means of a distribution on"
            f" the prior's support are {distance:.6g} away (largest difference of a feature). The"
            f" features range over {ranges}."
        )
    if _interior(phi.numpy(), mu.numpy()) <= _MARGIN:
        raise InfeasibleError(
            f"targets = {mu.tolist()} lie on the edge of what is attainable, where some outcomes"
            " need mass 0 and the coefficients are infinite; move them inside. The features range"
            f" over {ranges}."
        )


def _distance(phi: np.ndarray, mu: np.ndarray) -> float:
    """How far μ is from what is attainable: min over distributions p of max_d |E_p[φ_d] − μ_d|."""
    k, d = phi.shape
    # variables: p, and a bound on every |E_p[φ_d] − μ_d|, which is minimised
    cost = np.append(np.zeros(k), 1.0)
    bound = -np.ones((d, 1))
    both_signs = np.block([[phi.T, bound], [-phi.T, bound]])
    sums_to_one = np.append(np.ones(k), 0.0)[None]
    limits = np.concatenate([mu, -mu])
    found = linprog(cost, A_ub=both_signs, b_ub=limits, A_eq=sums_to_one, b_eq=[1.0])
    return float(found.fun)


def _interior(phi: np.ndarray, mu: np.ndarray) -> float:
    """The largest K·min p over distributions p with E_p[φ] = μ.

    It is positive where some such p has mass on every outcome: where μ is no point of the edge.
    """
    k, d = phi.shape
    # variables: p, and m ≤ K·p_k for every k, which is maximised
    cost = np.append(np.zeros(k), -1.0)
    at_least = np.hstack([-np.eye(k), np.ones((k, 1)) / k])
    limits = [(0, None)] * k + [(None, 1)]
    # E_p[φ − μ] = 0, features on one scale, and Σ p = 1
    scale = np.abs(phi - mu).max(0).clip(1e-300)
    means = np.hstack([((phi - mu) / scale).T, np.zeros((d, 1))])
    equal = np.vstack([means, np.append(np.ones(k), 0.0)])
    target = np.append(np.zeros(d), 1.0)
    found = linprog(cost, A_ub=at_least, b_ub=np.zeros(k), A_eq=equal, b_eq=target, bounds=limits)
    return float(-found.fun) if found.success else 0.0
