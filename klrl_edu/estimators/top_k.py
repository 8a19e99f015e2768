"""The per-token KL when only the k largest probabilities of π are kept, as stored log-probabilities
of an inference engine are.

    KL_t = Σ_{v∈S} π_v log π_v/q_v + Σ_{v∉S} π_v log π_v/q_v,
    S = the k most probable tokens of π(·|y_<t)                                                  (1)

Each function gives [N,T] in nats; sum over T for the sequence. N sequences, T tokens, V vocabulary.
"""

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import takes_numbers


@takes_numbers
def top_k_truncated(log_dists: Tensor, prior_log_dists: Tensor, k: int) -> Tensor:
    """The first sum of (1) alone: [N,T,V] twice -> [N,T] in nats.

    Biased by minus the second sum; may be negative, and is not a divergence. Without the sampled
    token, so its variance comes from prefixes only.
    """
    return _known_part(log_dists, prior_log_dists, _largest(log_dists, k))


@takes_numbers
def top_k_tail_sampled(
    log_dists: Tensor, prior_log_dists: Tensor, tokens: Tensor, k: int
) -> Tensor:
    """The first sum of (1) plus log π/q of the sampled token if it lies in the tail.

    [N,T,V] twice, tokens [N,T] -> [N,T] in nats. Unbiased for KL_t: E[1{y∉S} u(y)] is the second
    sum. k = 0 is k1 and k = V the full KL_t; given the prefix its variance is that of 1{y∉S} u(y).
    """
    chosen = _largest(log_dists, k)
    known = _known_part(log_dists, prior_log_dists, chosen)
    taken = tokens.long().unsqueeze(-1)
    log_ratio = (log_dists.gather(-1, taken) - prior_log_dists.gather(-1, taken)).squeeze(-1)
    in_tail = ~chosen.gather(-1, taken).squeeze(-1)
    return known + torch.where(in_tail, log_ratio, torch.zeros_like(log_ratio))


@takes_numbers
def top_k_tail_bucket(log_dists: Tensor, prior_log_dists: Tensor, k: int) -> Tensor:
    """The KL of the distributions that put all the tail into one bucket.

    [N,T,V] twice -> [N,T] in nats. Biased downwards (a coarser view: data processing inequality),
    between 0 and KL_t, and equal to KL_t where π/q is constant over the tail.
    """
    chosen = _largest(log_dists, k)  # of π: q's bucket holds the same tokens
    coarse, prior_coarse = _with_bucket(log_dists, chosen), _with_bucket(prior_log_dists, chosen)
    return logspace.kl_divergence(coarse, prior_coarse)


def _largest(log_dists: Tensor, k: int) -> Tensor:
    """Which tokens are among the k most probable, bool [N,T,V]; ties are broken without looking at
    the sample.
    """
    size = log_dists.shape[-1]
    whole = isinstance(k, int) and not isinstance(k, bool)
    if not whole or not 0 <= k <= size:
        raise InputError(
            f"k = {k!r} must lie between 0 and the vocabulary's size {size}, a whole number."
        )
    order = torch.sort(log_dists.detach(), dim=-1, descending=True, stable=True).indices
    rank = order.argsort(-1)  # the inverse of the permutation: where each token stands in it
    return rank < k


def _known_part(log_dists: Tensor, prior_log_dists: Tensor, chosen: Tensor) -> Tensor:
    """The first sum of (1), over the chosen tokens: [N,T,V] three times -> [N,T] in nats."""
    terms = logspace.mul_exp(log_dists - prior_log_dists, log_dists)  # 0 where π_v = 0
    return torch.where(chosen, terms, torch.zeros_like(terms)).sum(-1)


def _with_bucket(log_dists: Tensor, chosen: Tensor) -> Tensor:
    """The chosen entries, and the log-mass of the others in one more column: [N,T,V+1]."""
    nothing = torch.full_like(log_dists, -torch.inf)
    tail = logspace.logsumexp(torch.where(chosen, nothing, log_dists))
    return torch.cat([torch.where(chosen, log_dists, nothing), tail.unsqueeze(-1)], -1)
