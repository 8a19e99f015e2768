"""What a policy gradient multiplies log π by: baselines, standardised rewards, GAE, and the
pseudo-rewards of f-DPG.

    ∇E_π[R] = E_π[(R − b) s],    s = ∇log π,    for every b that does not depend on the sample   (1)
    b* = E_π[R‖s‖²]/E_π[‖s‖²]                                                                    (2)
    A_t = Σ_{l≥0} (γλ)^l δ_{t+l},    δ_t = r_t + γV_{t+1} − V_t                                  (3)
    ∇D_f(π‖p) = E_π[f'(π/p) s],      D_f(π‖p) = E_p[f(π/p)]                                      (4)

N sequences, T tokens; `group` [N] names each sequence's prompt 0 … M−1, n_g of which share it.
Rewards, baselines and advantages in reward units (z-scores have none). Williams (1992); Kool et al.
(2019); Schulman et al. (2016); Shao et al. (2024); Go et al. (2023).
"""

import math

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.validation import any_known, check_number

# --- one advantage a sequence, from its group -----------------------------------------------------


@takes_numbers
def leave_one_out_mean(values: Tensor, group: Tensor) -> Tensor:
    """The mean of the other values in each one's group: [N] and group [N] -> [N].

    It is independent of the value it is subtracted from, as (1) asks: of −∞, 1, 2 the first has
    1.5, and the others −∞.

    Raises:
        InputError: a group of one.

    Source: Kool et al. (2019).
    """
    label, count = _groups(values, group)
    _refuse_lone(group, count, "there is no other to average")
    scale = _scale(values, label)
    scaled = torch.where(torch.isinf(values), torch.zeros_like(values), values / scale)
    mean = (_totals(scaled, label) - scaled) / (count - 1) * scale
    # −∞ minus itself would be NaN; whether one stands among the others is counted instead
    for infinity in (-math.inf, math.inf):
        here = (values == infinity).to(values.dtype)
        mean = torch.where(_totals(here, label) > here, mean + infinity, mean)
    return mean


@takes_numbers
def leave_one_out_advantage(values: Tensor, group: Tensor) -> Tensor:
    """R − leave-one-out mean: [N] and group [N] -> [N], n/(n − 1) times `centred`.

    Source: RLOO, Ahmadian et al. (2024), eq. 8.
    """
    return values - leave_one_out_mean(values, group)


@takes_numbers
def centred(values: Tensor, group: Tensor) -> Tensor:
    """R − the group's mean, which contains R itself: [N] and group [N] -> [N].

    The gradient shrinks to (n − 1)/n of ∇E[R], in the same direction.

    Raises:
        InputError: a value that is not finite.
    """
    label, count = _groups(values, group)
    _refuse_infinite(values, "mean to be measured from")
    scale = _scale(values, label)
    return values - _totals(values / scale, label) / count * scale


@takes_numbers
def population_z_score(values: Tensor, group: Tensor, epsilon: float = 0.0) -> Tensor:
    """(R − mean)/(std + ε) in each group, with the population std (divided by n).

    [N] and group [N] -> [N], without unit. Dividing by a std that contains R changes the direction:
    with rewards 0 and 1 of mean p and ε = 0, E[A s] = E_{k~Bin(n,p)}[√(k/n (1 − k/n))] ∇p/(p(1 −
    p)), which as n → ∞ ascends 2 arcsin √p. Equal rewards give 0, never 0/0.

    Raises:
        InputError: a group of one, a reward that is not finite, or ε below 0.

    Source: Shao et al. (2024), section 4.1.2, up to n or n − 1 in the std.
    """
    return _z_score(values, group, epsilon, 0)


@takes_numbers
def sample_z_score(values: Tensor, group: Tensor, epsilon: float = 1e-4) -> Tensor:
    """(R − mean)/(std + ε) in each group, with the sample std (divided by n − 1).

    [N] and group [N] -> [N], without unit. What TRL (ε = 1e-4) and verl (ε = 1e-6) compute: √((n −
    1)/n) times `population_z_score` for ε = 0, and less where ε is not small beside the std. Equal
    rewards give 0.

    Raises:
        InputError: a group of one, a reward that is not finite, or ε below 0.
    """
    return _z_score(values, group, epsilon, 1)


@takes_numbers
def best_scalar_baseline(values: Tensor, squared_norms: Tensor, log_weights: Tensor) -> Tensor:
    """b* of (2), the constant that minimises the variance of (R − b)s: a scalar in reward units.

    Args:
        values: R [K], reward units.
        squared_norms: ‖s‖² [K] of the score by whatever parameters the gradient is taken.
        log_weights: log-weights [K] of the outcomes, normalised here; zeros for samples of π.
            Estimated from the samples it is used on, b* depends on them and (1) fails at order 1/n.

    Raises:
        InfeasibleError: every weight is 0.
        InputError: every norm is 0, so that no constant changes the variance.

    Source: Greensmith et al. (2004).
    """
    log_p = logspace.log_normalize(log_weights)
    weighted = logspace.expectation(log_p, values * squared_norms)
    total = logspace.expectation(log_p, squared_norms)
    if any_known(total == 0):
        raise InputError(
            "squared_norms are 0 wherever there is weight: the variance is 0 with every baseline."
        )
    return weighted / total  # (2)


# --- one advantage a token ------------------------------------------------------------------------


@takes_numbers
def to_go(rewards: Tensor) -> Tensor:
    """Σ_{t'≥t} r_t' [N,T] -> [N,T]: what a token can still change, in reward units.

    A token's earlier rewards are a constant b of (1).
    """
    return rewards.flip(-1).cumsum(-1).flip(-1)


@takes_numbers
def gae(
    rewards: Tensor, values: Tensor, live: Tensor, *, discount: float = 1.0, decay: float = 0.95
) -> Tensor:
    """Generalised advantage estimation (3).

    Args:
        rewards: r_t [N,T], reward units.
        values: V(y_<t) [N,T], the critic's guess of the rewards still to come before token t; it is
            0 after the last token.
        live: bool [N,T].
        discount: γ, from 0 to 1; language models take 1 (optima of tokens and sequences agree only
            there).
        decay: the λ of GAE, from 0 to 1.

    Returns:
        A_t [N,T], 0 after the first EOS. With γ = 1, E[Σ_t A_t s_t] = ∇E[Σ r] for any V where decay
        = 1 (then A_t = Σ_{t'≥t} r_t' − V_t), and for any decay where V is exact; otherwise δ
        bootstraps from a wrong V and the gradient is biased.

    Source: Schulman et al. (2016), eq. 16.
    """
    discount, decay = (
        check_number(value, name, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        for name, value in (("discount", discount), ("decay", decay))
    )
    zeros = torch.zeros_like(values)
    # what a critic says after the first EOS counts neither in V_t nor in V_{t+1}
    values = torch.where(live, values, zeros)
    after = torch.cat([values[..., 1:], zeros[..., :1]], -1)  # V_{t+1}, 0 at the end
    delta = torch.where(live, rewards + discount * after - values, zeros)
    # (3) from the last token backwards: A_t = δ_t + γλ A_{t+1}
    advantage, columns = torch.zeros_like(delta[..., 0]), []
    for t in range(delta.shape[-1] - 1, -1, -1):
        advantage = delta[..., t] + discount * decay * advantage
        columns.append(advantage)
    latest_first = columns[::-1]
    return torch.where(live, torch.stack(latest_first, -1), torch.zeros_like(delta))


# --- f-DPG: rewards whose policy gradient descends a divergence to a target p ---------------------


@takes_numbers
def fdpg_reverse_kl(log_ratio: Tensor) -> Tensor:
    """−f' = −(log t + 1), f = t log t, of log t = log π/p [...]: the reward of KL(π‖p).

    Constants are baselines, so p need not be normalised.
    """
    return -(log_ratio + 1)


@takes_numbers
def fdpg_forward_kl(log_ratio: Tensor) -> Tensor:
    """−f' = 1/t, f = −log t, of log t = log π/p [...]: the reward p/π of KL(p‖π).

    This is DPG (Khalifa et al., 2021); it needs p normalised.
    """
    return torch.exp(-log_ratio)


@takes_numbers
def fdpg_total_variation(log_ratio: Tensor) -> Tensor:
    """−f' = −½ sign(log t), f = ½|t − 1|, of log t = log π/p [...]: the reward of TV(π, p).

    It only says whether π has too much.
    """
    # the sign of NaN is 0 to torch
    return torch.where(torch.isnan(log_ratio), log_ratio, -torch.sign(log_ratio) / 2)


@takes_numbers
def fdpg_jensen_shannon(log_ratio: Tensor) -> Tensor:
    """−f' = −½ log 2t/(1 + t), f = ½[t log t − (1 + t) log (1 + t)/2], of log t = log π/p [...]:
    the reward of JS, at least −½ log 2.

    Go et al. (2023), Table 1, leave out the ½.
    """
    zero, two = torch.zeros_like(log_ratio), torch.full_like(log_ratio, 2.0)
    # log (1 + t)/2t = log(1 + e^{−log t}) − log 2, finite where t overflows
    return (torch.logaddexp(zero, -log_ratio) - torch.log(two)) / 2


@takes_numbers
def fdpg_chi_squared(log_ratio: Tensor) -> Tensor:
    """−f' = 1 − t, f = ½(t − 1)², of log t = log π/p [...]: the reward of ½E_p(t − 1)²."""
    return -torch.expm1(log_ratio)


@takes_numbers
def fdpg_squared_hellinger(log_ratio: Tensor) -> Tensor:
    """−f' = ½(t^{−½} − 1), f = ½(√t − 1)², of log t = log π/p [...]: the reward of ½Σ(√π − √p)²."""
    return torch.expm1(-log_ratio / 2) / 2


def _groups(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Each one's group as a label 0 … M−1 [N], and its size [N]."""
    if values.ndim != 1 or values.shape != group.shape:
        raise InputError(
            f"values have shape {list(values.shape)} and group {list(group.shape)}; expected [N]"
            " each, a value and a group a sequence."
        )
    # labels, so that a group may have any number as its name
    label = torch.unique(group, return_inverse=True)[1]
    return label, torch.bincount(label)[label]


def _totals(values: Tensor, label: Tensor) -> Tensor:
    """The sum over each one's group: [N] and labels [N] -> [N]."""
    totals = torch.zeros(len(label), dtype=values.dtype, device=values.device)
    return totals.index_add(0, label, values)[label]


def _scale(values: Tensor, label: Tensor) -> Tensor:
    """A power of two near the largest finite |value| of each one's group [N].

    Values divided by it, which is exact, have sums and squares that neither overflow nor vanish.
    """
    size = torch.where(torch.isfinite(values), values.detach().abs(), 0.0)
    largest = torch.zeros_like(size).scatter_reduce(0, label, size, "amax")[label]
    return torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), 1.0)


def _refuse_lone(group: Tensor, count: Tensor, why: str) -> None:
    """Refuses a group of one."""
    if bool((count < 2).any()):
        lone = int(group[count < 2][0])
        raise InputError(
            f"group {lone} holds one sequence, so {why}; draw at least 2 a prompt"
            " (batch_size >= 2)."
        )


def _refuse_infinite(values: Tensor, what: str) -> None:
    """Refuses values [N] whose group has no `what`."""
    if any_known(~torch.isfinite(values)):
        index = int((~torch.isfinite(values)).nonzero()[0])
        raise InputError(
            f"values[{index}] = {float(values[index])} is not finite, so its group has no {what};"
            " leave it out."
        )


def _z_score(values: Tensor, group: Tensor, epsilon: float, lost: int) -> Tensor:
    """(R − mean)/(std + ε) [N], 0 where all of a group are equal; the variance is a sum of squares
    divided by n − `lost`.
    """
    epsilon = check_number(epsilon, "epsilon", "at least 0", lambda x: 0 <= x < math.inf)
    label, count = _groups(values, group)
    _refuse_lone(group, count, "its standard deviation is not defined")
    _refuse_infinite(values, "standard deviation")
    # where each group's first value stands: written from the last to the first, the first stays
    first = torch.zeros(len(label), dtype=torch.long, device=label.device)
    first[label.flip(0)] = torch.arange(len(label), device=label.device).flip(0)
    scale = _scale(values, label)
    scaled = values / scale
    # measured from that value, so that equal rewards differ by exactly 0, where R − mean could
    # leave a rounding error of its own size
    shifted = scaled - scaled[first[label]]
    deviation = shifted - _totals(shifted, label) / count
    variance = _totals(deviation.square(), label) / (count - lost)
    spread = variance > 0
    # masked before the root and after the division: a gradient of √ at 0 would be NaN
    std = torch.sqrt(torch.where(spread, variance, torch.ones_like(variance)))
    # a tensor: torch divides a number by the reciprocal, which may overflow
    added = torch.full_like(scale, epsilon) / scale
    return torch.where(spread, deviation / (std + added), torch.zeros_like(deviation))
