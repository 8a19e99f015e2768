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

_STEPS, _TOLERANCE = 200, 1e-13
_MARGIN = (
    1e-9  # a target nearer than this to the edge of what is attainable needs infinite coefficients
)


class MomentMatch(NamedTuple):
    """β [D], log p [K] in nats, KL(p‖q) in nats, and Cov_p[φ] [D,D]."""

    coefficients: Tensor
    log_probs: Tensor
    kl: float
    covariance: Tensor


@takes_numbers
def match_moments(log_prior: Tensor, features: Tensor, targets: Tensor) -> MomentMatch:
    """(1).

    Args:
        log_prior: [K]; −inf is zero mass.
        features: φ [K,D]; targets: μ [D].

    Where features are linearly dependent under q, β is the one of least norm.

    Raises:
        InfeasibleError: no distribution on q's support has these means, or only one on the edge of
            what is attainable; the message has the range of each feature and the distance.
        InputError: shapes that do not fit, or values that are not finite.
    """
    if (
        features.ndim != 2
        or features.shape[0] != len(log_prior)
        or targets.shape != features.shape[1:]
    ):
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
    return MomentMatch(
        beta, log_probs, float(logspace.kl_divergence(log_probs, log_prior)), covariance
    )


def _tilted(log_q: Tensor, phi: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p [K], E_p[φ] [D], Cov_p[φ] [D,D]."""
    log_p = logspace.log_normalize(log_q + phi @ beta)
    mean = log_p.exp() @ phi
    away = phi - mean
    return log_p, mean, (away * log_p.exp()[:, None]).T @ away


def _newton(log_q: Tensor, phi: Tensor, mu: Tensor) -> Tensor:
    """The minimum of log Z(β) − β·μ, convex: Newton steps, halved until they descend."""
    centred = phi - mu  # log Z(β) − β·μ = log Σ q e^{β·(φ − μ)}
    beta = torch.zeros_like(mu)
    scale = centred.abs().amax(0).clamp(min=1e-300)
    for _ in range(_STEPS):
        _, mean, covariance = _tilted(log_q, centred, beta)
        if bool((mean.abs() <= _TOLERANCE * scale).all()):
            break
        step = -torch.linalg.lstsq(covariance, mean[:, None], driver="gelsd").solution.squeeze(-1)
        size, here, slope = (
            1.0,
            float(logspace.logsumexp(log_q + centred @ beta)),
            float(mean @ step),
        )
        # where the gain is of the size of rounding the whole step is right, and a comparison would
        # only see the rounding
        while (
            -slope > 1e-10
            and float(logspace.logsumexp(log_q + centred @ (beta + size * step)))
            > here + 1e-4 * size * slope
        ):
            size /= 2
        beta = beta + size * step
    return beta


def _check_attainable(phi: Tensor, mu: Tensor) -> None:
    """Refuses targets outside the convex hull of the supported features, or on its edge, by two
    linear programmes.
    """
    distance = _distance(phi.numpy(), mu.numpy())
    ranges = ", ".join(
        f"[{float(low):.6g}, {float(high):.6g}]"
        for low, high in zip(phi.amin(0), phi.amax(0), strict=True)
    )
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
    """min over distributions p of max_d |E_p[φ_d] − μ_d|."""
    k, d = phi.shape
    cost = np.append(np.zeros(k), 1.0)
    both = np.block([[phi.T, -np.ones((d, 1))], [-phi.T, -np.ones((d, 1))]])
    found = linprog(
        cost,
        A_ub=both,
        b_ub=np.concatenate([mu, -mu]),
        A_eq=np.append(np.ones(k), 0.0)[None],
        b_eq=[1.0],
    )
    return float(found.fun)


def _interior(phi: np.ndarray, mu: np.ndarray) -> float:
    """max over distributions p with E_p[φ] = μ of K·min p: positive iff some such p has mass on
    every outcome.
    """
    k, d = phi.shape
    scale = np.abs(phi - mu).max(0).clip(1e-300)
    equal = np.vstack(
        [np.hstack([((phi - mu) / scale).T, np.zeros((d, 1))]), np.append(np.ones(k), 0.0)]
    )
    at_least = np.hstack([-np.eye(k), np.ones((k, 1)) / k])
    limits = [(0, None)] * k + [(None, 1)]
    target = np.append(np.zeros(d), 1.0)
    found = linprog(
        np.append(np.zeros(k), -1.0),
        A_ub=at_least,
        b_ub=np.zeros(k),
        A_eq=equal,
        b_eq=target,
        bounds=limits,
    )
    return float(-found.fun) if found.success else 0.0
