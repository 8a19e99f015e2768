"""Which returns tie at λ = 0: one rule for every method.

    a return is a sum of rewards, known to ± slack;  a + b adds ε(|a| + |b|) to it, ε = 2⁻⁵²     (1)
    y ties with the best  ⇔  r(y) + slack(y) ≥ max_y' [r(y') − slack(y')]                        (2)

Decimal rewards are rounded to binary ones (.1 + .2 + .3 and .3 + .2 + .1 differ in their last bit),
and methods add in different orders. (1) bounds, addition by addition, what rounding of the two
numbers and of their sum can have changed; adding 0 changes nothing. A single reward is what it is:
its slack is 0, and two of them tie only where they are equal. Higham (2002), §3.3, running error
bounds. Values and slacks in reward units.
"""

import math

import torch
from torch import Tensor

EPSILON = 2.0**-52


def addition_slack(a: Tensor, b: Tensor) -> Tensor:
    """What rounding may change in a + b [...] by (1): 0 where either is 0, or −inf."""
    counts = (a != 0) & (b != 0) & (a > -math.inf) & (b > -math.inf)
    # each by itself: |a| + |b| may overflow
    return torch.where(counts, EPSILON * a.abs() + EPSILON * b.abs(), 0.0)


def summed(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The returns Σ_t r_t [N] of token rewards [N,T], added from the start, and their slack [N]."""
    totals = rewards.cumsum(-1)
    slack = addition_slack(totals[..., :-1], rewards[..., 1:]).sum(-1)
    return totals[..., -1], slack


def floor_of(values: Tensor, slack: Tensor) -> Tensor:
    """The least that each value may be [...]; the largest of them is the right side of (2)."""
    return values - slack


def reaches(values: Tensor, slack: Tensor, floor: Tensor) -> Tensor:
    """(2) where `floor` is the largest of `floor_of`: whether a value [...] ties with the best."""
    return values + slack >= floor


def level_ties(values: Tensor, slack: Tensor) -> Tensor:
    """Values [K] in which whatever ties with the best by (2) is equal to it."""
    tied = reaches(values, slack, floor_of(values, slack).amax())
    return torch.where(tied, values.amax(), values)
