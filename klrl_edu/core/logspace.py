"""Arithmetic on log-probabilities: exact where mass is zero, with finite gradients there.

    log Σ e^x,    0 · (±inf) = 0,    KL(p‖q) = Σ_{p>0} p (e^d − 1 − d) + q{p = 0},
    d = log q − log p                                                                            (1)

The terms of (1) are non-negative, so a KL near zero keeps its sign and its digits; summed over
normalised p and q they equal Σ p log p/q. A single `torch.where` hides a NaN from the value but not
from the gradient, hence the double masks: the operand is made harmless first. K outcomes along
`dim`; logs in nats.
"""

import math

import torch
from torch import Tensor

from klrl_edu.core.errors import InfeasibleError
from klrl_edu.core.validation import any_known

# below this |x|, e^x − 1 − x loses digits to cancellation and the series takes over
_SERIES_RADIUS = 0.5
_SERIES_TERMS = 18  # 0.5^18/20! is far below 2^-53 of the leading ½
# a KL above this loses under 1e-13 of itself to the cancellation of terms of both signs
_WELL_ABOVE_ZERO = 1e-2
# outcomes worked on at once: what lies between two passes stays in the processor's cache
IN_CACHE = 1 << 16


def logsumexp(x: Tensor, dim: int = -1) -> Tensor:
    """log Σ e^x along `dim`; −inf, with a zero gradient, where every entry is −inf.

    There torch's own gradient is NaN.

    Args:
        x: log-weights [..., K] in nats; −inf is zero mass.

    Returns:
        [...] in nats.
    """
    alive = x.amax(dim, keepdim=True) != -math.inf  # NaN stays NaN
    total = torch.logsumexp(torch.where(alive, x, torch.zeros_like(x)), dim)
    return torch.where(alive.squeeze(dim), total, torch.full_like(total, -math.inf))


def log_normalize(log_weights: Tensor, dim: int = -1) -> Tensor:
    """log-weights minus their logsumexp: log-probabilities [..., K] in nats.

    Raises:
        InfeasibleError: every weight along `dim` is zero, so there is nothing to normalise (NaN
            inside `torch.func.vmap`, which cannot look).
    """
    top = log_weights.detach().amax(dim, keepdim=True)
    if any_known(top == -math.inf):
        raise InfeasibleError(
            "every log-weight is -inf (total mass 0), so it cannot be normalised; give at least one"
            " finite log-weight."
        )
    # first by the largest, so that weights around e^800 keep the digits of their ratios
    shifted = log_weights - top
    return shifted - logsumexp(shifted, dim).unsqueeze(dim)


def log_normalize_alive(log_weights: Tensor, dim: int = -1) -> Tensor:
    """`log_normalize` where some rows may have no mass: those stay −inf throughout."""
    total = logsumexp(log_weights, dim).unsqueeze(dim)
    return log_weights - torch.where(total > -math.inf, total, 0.0)


def uniform_where_dead(log_weights: Tensor, dead: Tensor | None = None) -> Tensor:
    """Log-weights [..., K] with 0 throughout in rows that nothing can reach.

    Any law will do there, and a row of −inf is none: its softmax is NaN, and nothing can be drawn
    from it.

    Args:
        dead: which rows [...]; by default those without mass.
    """
    if dead is None:
        dead = (log_weights.detach() == -math.inf).all(-1)
    return torch.where(dead.unsqueeze(-1), torch.zeros_like(log_weights), log_weights)


def segment_logsumexp(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """log Σ e^x over each segment's entries [segments]; −inf where a segment has no mass.

    Args:
        x: [E] in nats.
        index: [E], the segment of each entry, in 0 … segments − 1.
    """
    # the shift is any number near the largest entry: no gradient passes through it
    top = x.new_full((segments,), -math.inf).scatter_reduce(0, index, x.detach(), "amax")
    alive = top != -math.inf  # NaN stays NaN
    shift = torch.where(alive, top, torch.zeros_like(top))
    total = x.new_zeros(segments).index_add(0, index, torch.exp(x - shift[index]))
    logs = torch.log(torch.where(alive, total, torch.ones_like(total))) + shift
    return torch.where(alive, logs, torch.full_like(logs, -math.inf))


def mul_exp(x: Tensor, log_p: Tensor) -> Tensor:
    """x · e^{log p}; 0 where p = 0, whatever x is, with a zero gradient to both; broadcasts.

    An infinite x stays infinite where p > 0, also where e^{log p} is too small for a float.
    """
    x, log_p = torch.broadcast_tensors(x, log_p)
    dead = log_p == -math.inf
    endless = torch.isinf(x) & ~dead
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    # both factors are masked before the product: 0 · inf there would send NaN into the gradient
    tame = torch.where(dead | endless, zero, x)
    product = tame * torch.exp(torch.where(dead, zero, log_p))
    return torch.where(endless, x, product)


def expectation(log_p: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """E_p[x] = Σ p·x along `dim`; outcomes of zero mass do not count, whatever x is there."""
    return mul_exp(x, log_p).sum(dim)


def entropy(log_p: Tensor, dim: int = -1) -> Tensor:
    """H(p) = −Σ p log p in nats, with a finite gradient where p = 0."""
    return -expectation(log_p, log_p, dim)


def expm1_minus_identity(x: Tensor) -> Tensor:
    """e^x − 1 − x ≥ 0 to full relative accuracy, also near zero, where the subtraction cancels."""
    near = x.abs() < _SERIES_RADIUS
    # near zero: x²/2 · (1 + x/3 (1 + x/4 (…))), by Horner's rule from the last term
    small = torch.where(near, x, torch.zeros_like(x))
    series = torch.ones_like(x)
    for k in range(_SERIES_TERMS, 2, -1):
        series = 1 + small / k * series
    # elsewhere as it stands; x = −inf gives −1 + inf = inf, and x = +inf must not be inf − inf
    large = torch.where(near, torch.ones_like(x), x)
    infinite = large == math.inf
    subtracted = torch.where(infinite, torch.zeros_like(large), large)
    direct = torch.where(infinite, large, torch.expm1(large) - subtracted)
    return torch.where(near, small * small / 2 * series, direct)


def kl_divergence(log_p: Tensor, log_q: Tensor, dim: int = -1) -> Tensor:
    """KL(p‖q) in nats along `dim` by (1): never negative, and +inf where q = 0 < p.

    Args:
        log_p, log_q: normalised log-probabilities [..., K]; −inf is zero mass.

    Gradients follow both arguments and agree with those of Σ p log p/q for normalised inputs.
    """
    log_p, log_q = torch.broadcast_tensors(log_p, log_q)
    plain = _kl_away_from_zero(log_p, log_q, dim)
    if plain is not None:
        return plain
    dead_p, dead_q = log_p == -math.inf, log_q == -math.inf
    zero = torch.zeros((), dtype=log_p.dtype, device=log_p.device)
    # where both have mass: p (e^d − 1 − d)
    both = ~dead_p & ~dead_q
    safe_p, safe_q = torch.where(both, log_p, zero), torch.where(both, log_q, zero)
    terms = torch.where(both, _kl_terms(safe_p, safe_q, safe_q - safe_p), zero)
    # where p alone is zero: q{p = 0}; where q alone is: inf; where both are: 0
    q_alone = torch.exp(torch.where(dead_q, zero, log_q))
    terms = terms + torch.where(dead_p & ~dead_q, q_alone, zero)
    return torch.where(dead_q & ~dead_p, torch.full_like(terms, math.inf), terms).sum(dim)


def kl_of_tilt(log_q: Tensor, log_ratio: Tensor, dim: int = -1) -> Tensor:
    """KL(p‖q) in nats along `dim` of p = q e^u, from u itself.

    log p − log q would have lost the digits of a small u, and those of KL ≈ ½ E_q[u²] with them.

    Args:
        log_q: normalised [..., K]; log_ratio: u = log p/q, −inf where p = 0.
    """
    log_q, log_ratio = torch.broadcast_tensors(log_q, log_ratio)
    zero = torch.zeros((), dtype=log_q.dtype, device=log_q.device)
    dead_p, dead_q = log_ratio == -math.inf, log_q == -math.inf
    both = ~dead_p & ~dead_q
    safe_q, safe_u = torch.where(both, log_q, zero), torch.where(both, log_ratio, zero)
    terms = torch.where(both, _kl_terms(safe_q + safe_u, safe_q, -safe_u), zero)
    q_alone = torch.exp(torch.where(dead_q, zero, log_q))
    return (terms + torch.where(dead_p & ~dead_q, q_alone, zero)).sum(dim)


def _kl_terms(log_p: Tensor, log_q: Tensor, d: Tensor) -> Tensor:
    """p (e^d − 1 − d) of finite log p, log q and d = log q − log p."""
    close = d < 1  # p·e^d = q; for larger d the product form would overflow where p underflows
    near = torch.exp(log_p) * expm1_minus_identity(torch.where(close, d, torch.zeros_like(d)))
    far = torch.exp(log_q) - torch.exp(log_p) * (1 + d)
    return torch.where(close, near, far)


def _kl_away_from_zero(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor | None:
    """The fast path: −Σ p·d, which is (1) for normalised p and q; None where it loses digits.

    It keeps them in float64 where no mass is zero and every KL is above a hundredth.
    """
    if log_p.dtype != torch.float64 or log_p.numel() == 0:  # nothing has no least element
        return None
    least_p, least_q = log_p.detach().amin(), log_q.detach().amin()
    # "is not False": under vmap the answer is None, and the general path is taken
    if any_known(~((least_p > -math.inf) & (least_q > -math.inf))) is not False:
        return None
    parts = []
    for part_p, part_q in zip(log_p.split(IN_CACHE, dim), log_q.split(IN_CACHE, dim), strict=True):
        parts.append((torch.exp(part_p) * (part_p - part_q)).sum(dim))
    total = torch.stack(parts).sum(0)
    return total if any_known(~(total.detach() > _WELL_ABOVE_ZERO)) is False else None


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x ≤ 0: the log of a complement, exact for x near 0 and for x far below."""
    near = x > -math.log(2)
    # −1 stands in where the other form is taken: harmless to both, and to their gradients
    elsewhere = -torch.ones_like(x)
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, elsewhere)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, elsewhere, x)))
    return torch.where(near, by_expm1, by_log1p)


def effective_sample_size(log_weights: Tensor, dim: int = -1) -> Tensor:
    """(Σ w)² / Σ w² of unnormalised log-weights [..., n], in [1, n]. Kong (1992).

    Raises:
        InfeasibleError: every weight is zero.
    """
    log_p = log_normalize(log_weights, dim)
    return torch.exp(-logsumexp(2 * log_p, dim)).clamp(1, log_weights.shape[dim])
