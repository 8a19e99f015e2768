"""The course's running example, and random problems, as vectors."""

import torch
from torch import Tensor

Q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
R = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64)


def random_problem(seed: int, outcomes: int = 5, ties: bool = False) -> tuple[Tensor, Tensor]:
    """log q and r [K]."""
    generator = torch.Generator().manual_seed(seed)
    log_q = torch.log_softmax(
        1.5 * torch.randn(outcomes, generator=generator, dtype=torch.float64), 0
    )
    rewards = 2 * torch.randn(outcomes, generator=generator, dtype=torch.float64)
    return log_q, rewards.round() if ties else rewards
