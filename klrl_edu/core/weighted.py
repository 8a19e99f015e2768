"""Sequences with log-weights, exact tables and particles alike.

The logsumexp of the weights is log Z, or its estimate.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace


@dataclass(frozen=True)
class WeightedSequences:
    """A weighted set of sequences.

    Args:
        space: the space they belong to.
        tokens: [N,T].
        log_weights: [N] in nats, unnormalised; −inf is zero mass.
        exact: True for a table in which each sequence stands once with its true weight; False for
            particles.
    """

    space: SequenceSpace
    tokens: Tensor
    log_weights: Tensor
    exact: bool

    in_words: ClassVar[str] = "WeightedSequences"

    def __post_init__(self) -> None:
        self.space.check_tokens(self.tokens)
        if self.log_weights.shape != self.tokens.shape[:1]:
            raise InputError(
                f"log_weights has shape {list(self.log_weights.shape)}; expected"
                f" [{len(self.tokens)}], one a sequence."
            )
        # they may sum to anything: their sum is the estimate of Z
        if bool(torch.isnan(self.log_weights).any()) or bool((self.log_weights == torch.inf).any()):
            raise InputError(
                "log_weights hold NaN or +inf; give finite numbers, or -inf for zero mass."
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def log_evidence(self) -> Tensor:
        """log Z, or its estimate, in nats."""
        return logspace.logsumexp(self.log_weights)

    @property
    def log_probs(self) -> Tensor:
        """Normalised log-weights [N] in nats; raises InfeasibleError where all are zero."""
        return logspace.log_normalize(self.log_weights)

    @property
    def effective_sample_size(self) -> Tensor:
        """(Σ w)² / Σ w², in [1, N]."""
        return logspace.effective_sample_size(self.log_weights)

    @property
    def texts(self) -> list[str]:
        """The sequences as texts."""
        return self.space.decode(self.tokens)
