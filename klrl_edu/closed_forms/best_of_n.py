"""Best-of-n: draw n from q, keep one of highest reward.

    π_n(y) = q(y)/q(level) · [F(level)^n − F₋(level)^n],    KL(π_n‖q) ≤ log n − (n − 1)/n        (1)
    F^n − F₋^n = F^n (1 − (F₋/F)^n),
    log F₋/F = log(1 − q(level)/F) where the level is the smaller part of F                      (2)

F is the prior's mass of rewards up to a level, F₋ of those below it; of several best draws the
first is kept, which shares a level's mass as q does. Equality in the bound holds only without ties
and atoms. (2) keeps the digits of levels of any mass at any n. Stiennon et al. (2020); Beirami et
al. (2024), Theorem 1. K outcomes; log q in nats (−inf is zero mass), rewards in reward units.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.outcomes import check_outcomes
from klrl_edu.core.validation import check_count

_MOST_DRAWS = 10**300  # a float holds it


class BestOfN(NamedTuple):
    """The law of the best of n, and what it costs and gains.

    Attributes:
        log_probs: log π_n [K] in nats.
        kl: KL(π_n‖q) in nats.
        kl_bound: what it never exceeds, in nats.
        expected_reward: E[r] in reward units.
        win_rate: the probability of beating a draw from q, a tie counting half.
    """

    log_probs: Tensor
    kl: float
    kl_bound: float
    expected_reward: float
    win_rate: float


@takes_numbers
def best_of_n(log_prior: Tensor, rewards: Tensor, n: int) -> BestOfN:
    """The exact law (1) of the best of n draws: log_prior and rewards [K].

    Args:
        log_prior: normalised; where it is −inf the reward is ignored.
        rewards: −inf is the worst level; with mass there E[r] is −inf at every n.
        n: draws, a whole number ≥ 1.

    Raises:
        InputError: n < 1, shapes that differ, a prior that does not sum to one, or a NaN or +inf
            reward where it has mass.
    """
    _check_draws(n)
    check_outcomes(log_prior, rewards)
    supported = log_prior > -math.inf
    log_q, r = log_prior[supported], rewards[supported]
    _, level = torch.unique(r, return_inverse=True)  # in rising order
    log_level = logspace.segment_logsumexp(log_q, level, int(level.max()) + 1)
    log_below, log_up_to = _cumulative(log_level)
    # log F₋/F, from the level's share of F where that is the smaller part
    share = (log_level - log_up_to).clamp(max=0)
    log_rest = torch.where(share < -math.log(2), logspace.log1mexp(share), log_below - log_up_to)
    log_gain = float(n) * log_up_to + logspace.log1mexp(float(n) * log_rest.clamp(max=0))  # (2)
    log_pi = torch.full_like(log_prior, -math.inf)
    log_pi[supported] = log_q - log_level[level] + log_gain[level]
    if bool((r == -math.inf).any()):
        # said outright: at large n the worst outcomes' mass underflows, and 0·(−inf) is no number
        mean = -math.inf
    else:
        mean = float(logspace.expectation(log_pi[supported], r))
    wins = log_below.exp() + log_level.exp() / 2
    win_rate = float((log_pi[supported].exp() * wins[level]).sum())
    kl = float(logspace.kl_divergence(log_pi, log_prior))
    return BestOfN(log_pi, kl, kl_bound(n), mean, win_rate)


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n in nats, which KL(π_n‖q) never exceeds; n is a whole number ≥ 1."""
    _check_draws(n)
    return math.log(n) - (n - 1) / n


def _check_draws(n: int) -> None:
    check_count(n, "n")
    if n > _MOST_DRAWS:
        raise InputError(f"n is about 2^{n.bit_length()}; give at most 1e300 draws.")


def _cumulative(log_level: Tensor) -> tuple[Tensor, Tensor]:
    """log F₋ and log F of each level, rising."""
    nothing = log_level.new_full((1,), -math.inf)
    log_from_here = torch.logcumsumexp(log_level.flip(0), 0).flip(0)
    log_above = torch.cat([log_from_here[1:], nothing])
    # F from the side that keeps its digits: a mass near 1 comes from its complement
    by_complement = logspace.log1mexp(log_above.clamp(max=0))
    by_sum = torch.logcumsumexp(log_level, 0)
    log_up_to = torch.where(log_above < -math.log(2), by_complement, by_sum)
    return torch.cat([nothing, log_up_to[:-1]]), log_up_to
