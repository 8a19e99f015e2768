"""Losses, one flat function a method: each takes a Batch and returns a scalar to minimise, in reward units.

    J(π) = E_π[r − λu],    u = log π/q,    ∇J = E_π[(r − λu) ∇log π] = −λ ∇KL(π‖π*)                               (1)

N sequences, T tokens. Williams (1992); Kool et al. (2019); Ahmadian et al. (2024).
"""

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.learning.batches import Batch, needs


@needs("support")
def exact(batch: Batch) -> Tensor:
    """−J(π), exactly: its gradient is −∇J by autograd, without sampling.

    Args:
        batch: every supported sequence once a problem (`train` and the audit give it that), `log_probs` [N,T] with gradient.

    Returns:
        −J averaged over the problems, a scalar in reward units.

    Source: (1).
    """
    log_prob = batch.log_probs.sum(-1)
    log_ratio = log_prob - batch.prior_log_probs.sum(-1)  # u [N], nats
    objective = logspace.expectation(log_prob, batch.rewards.sum(-1) - batch.kl_coef * log_ratio)  # a sequence that π never gives counts 0
    return -objective / (batch.group.max() + 1)


def reinforce(batch: Batch, baseline: float | Tensor = 0.0) -> Tensor:
    """REINFORCE with the KL penalty in the reward: the expected gradient is −∇J for any constant baseline.

    Args:
        batch: `log_probs` [N,T] with gradient, `rewards` [N,T].
        baseline: b in reward units, a number or [N]; must not depend on the sequence that it is subtracted from.

    Returns:
        −mean (r − λu − b) log π, a scalar in reward units; only its gradient is meant.

    Source: Williams (1992); (1).
    """
    return -((penalised_reward(batch) - baseline) * batch.log_probs.sum(-1)).mean()


def rloo(batch: Batch) -> Tensor:
    """REINFORCE with a leave-one-out baseline and the KL penalty in the reward: the expected gradient is −∇J.

    Args:
        batch: `log_probs` [N,T] with gradient (nats), `rewards` [N,T]; `group` [N] names each sequence's prompt, at least two sequences a group.

    Returns:
        −mean (r − λu − leave-one-out mean) log π, a scalar in reward units. Its variance vanishes at π = π*, where r − λu = λ log Z.

    Raises:
        InputError: a group holds one sequence, which leaves nothing to average.

    Source: Kool et al. (2019); Ahmadian et al. (2024), eq. 8.
    """
    reward = penalised_reward(batch)
    advantage = reward - leave_one_out_mean(reward, batch.group)
    return -(advantage * batch.log_probs.sum(-1)).mean()


def penalised_reward(batch: Batch) -> Tensor:
    """r − λu [N] in reward units, without gradient."""
    log_ratio = batch.log_probs.detach().sum(-1) - batch.prior_log_probs.sum(-1)  # u [N], nats
    return batch.rewards.sum(-1) - batch.kl_coef * log_ratio


def leave_one_out_mean(values: Tensor, group: Tensor) -> Tensor:
    """The mean of the other values in each one's group: [N] and group [N] -> [N].

    Raises:
        InputError: a group of one.
    """
    count = torch.bincount(group)[group]
    if bool((count < 2).any()):
        lone = int(group[count < 2][0])
        raise InputError(f"group {lone} holds one sequence, so there is no other to average; draw at least 2 a prompt (batch_size >= 2).")
    total = torch.zeros(int(group.max()) + 1, dtype=values.dtype, device=values.device).index_add(0, group, values)
    return (total[group] - values) / (count - 1)
