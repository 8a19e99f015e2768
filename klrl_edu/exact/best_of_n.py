"""Best-of-n: draw n from q, keep one of highest reward.

    π_n(y) = q(y)/q(level) · [F(level)^n − F₋(level)^n],    KL(π_n‖q) ≤ log n − (n − 1)/n                        (1)

F is the prior's mass of rewards up to a level, F₋ of those below it; of several best draws the first is kept, which shares a level's mass
as q does. Equality in the bound holds only without ties and atoms. Stiennon et al. (2020); Beirami et al. (2024), Theorem 1.
K outcomes; log q in nats (−inf is zero mass), rewards in reward units.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import check_count


class BestOfN(NamedTuple):
    """log π_n [K] in nats; KL(π_n‖q) and its bound in nats; E[r] in reward units; the probability of beating a draw from q, ties half."""

    log_probs: Tensor
    kl: float
    kl_bound: float
    expected_reward: float
    win_rate: float


def best_of_n(log_prior: Tensor, rewards: Tensor, n: int) -> BestOfN:
    """The exact law (1) of the best of n draws: log_prior and rewards [K].

    Args:
        n: draws, a whole number ≥ 1.

    Raises:
        InputError: n < 1, or a NaN or +inf reward where the prior has mass.
    """
    check_count(n, "n")
    supported = log_prior > -math.inf
    bad = supported & (torch.isnan(rewards) | (rewards == math.inf))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise InputError(f"rewards[{index}] = {float(rewards[index])} where the prior has mass; give a number, or -inf for the worst.")
    log_q, r = log_prior[supported], rewards[supported]
    _, level = torch.unique(r, return_inverse=True)  # in rising order
    log_level = logspace.segment_logsumexp(log_q, level, int(level.max()) + 1)
    log_below, log_up_to = _cumulative(log_level)
    # F^n − F₋^n = F^n (1 − (F₋/F)^n), without cancellation for large n
    log_gain = n * log_up_to + logspace.log1mexp(n * (log_below - log_up_to))
    log_pi = torch.full_like(log_prior, -math.inf)
    log_pi[supported] = log_q - log_level[level] + log_gain[level]
    mean = float(logspace.expectation(log_pi, torch.where(supported, rewards, 0.0)))
    wins = log_below.exp() + log_level.exp() / 2
    kl = float(logspace.kl_divergence(log_pi, log_prior))
    return BestOfN(log_pi, kl, kl_bound(n), mean, float((log_pi[supported].exp() * wins[level]).sum()))


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n in nats, which KL(π_n‖q) never exceeds."""
    check_count(n, "n")
    return math.log(n) - (n - 1) / n


def _cumulative(log_level: Tensor) -> tuple[Tensor, Tensor]:
    """log F₋ and log F of each level, rising; F from the side that keeps its digits, so that masses near 1 come from their complement."""
    log_below = torch.cat([log_level.new_full((1,), -math.inf), torch.logcumsumexp(log_level, 0)[:-1]])
    log_above = torch.cat([torch.logcumsumexp(log_level.flip(0), 0).flip(0)[1:], log_level.new_full((1,), -math.inf)])
    log_up_to = torch.where(log_above < -math.log(2), logspace.log1mexp(log_above.clamp(max=0)), torch.logaddexp(log_below, log_level))
    first = torch.full_like(log_below, -math.inf)
    below = torch.where(torch.isinf(log_below), first, torch.cat([first[:1], log_up_to[:-1]]))
    return below, log_up_to
