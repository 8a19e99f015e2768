"""From a value a token to one number: which mean over tokens and sequences a loss takes.

    seq-mean-token-sum   (1/N) Σ_i Σ_t x_it                 fixed length   (1/NL) Σ_i Σ_t x_it
    seq-mean-token-mean  (1/N) Σ_i (1/L_i) Σ_t x_it         token-mean
    Σ_i Σ_t x_it / Σ_i L_i                                                                       (1)

x values [N,T], live bool [N,T] (True up to the first EOS), L_i = Σ_t live_it, result a scalar in
the unit of x. Values that are not live are ignored, whatever they hold. A mask may leave nothing of
a sequence, as one that drops truncated texts does: it counts 0, in the libraries too (a sum divided
by at least 1). No sequence at all is an error. Only the sum over tokens of
a sequence keeps a sequence objective (log π is a sum); the others weigh sequences by their lengths,
and agree with it up to a constant where all lengths are equal. Liu et al. (2025), Dr. GRPO; Yu et
al. (2025), DAPO.
"""

import torch
from torch import Tensor

from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.validation import check_count, check_some


@takes_numbers
def seq_mean_token_sum(values: Tensor, live: Tensor) -> Tensor:
    """(1/N) Σ_i Σ_t x_it: values and live [N,T] -> scalar.

    A mean over sequences, so unbiased for the sequence's expected sum E_π Σ_t x_t.
    """
    return check_some(_sums(values, live)).mean()


@takes_numbers
def fixed_length(values: Tensor, live: Tensor, length: int | None = None) -> Tensor:
    """(1/NL) Σ_i Σ_t x_it with a constant L, by default T: values and live [N,T] -> scalar.

    Its mean is 1/L of the sum's, whatever the lengths.

    Source: Liu et al. (2025), Dr. GRPO.
    """
    constant = values.shape[-1] if length is None else check_count(length, "length")
    return check_some(_sums(values, live)).mean() / constant


@takes_numbers
def seq_mean_token_mean(values: Tensor, live: Tensor) -> Tensor:
    """(1/N) Σ_i (1/L_i) Σ_t x_it: values and live [N,T] -> scalar, of mean E_π[Σ_t x_t/L].

    A token of a long sequence counts less there.

    Source: GRPO, Shao et al. (2024), eq. 3.
    """
    # of a sequence without a live token the sum is 0 too
    return check_some(_sums(values, live) / live.sum(-1).clamp(min=1)).mean()


@takes_numbers
def token_mean(values: Tensor, live: Tensor) -> Tensor:
    """Σ_i Σ_t x_it / Σ_i L_i: values and live [N,T] -> scalar.

    A ratio of two sums, hence not a mean over sequences: its expectation depends on N where lengths
    vary. At N = 1 it is `seq_mean_token_mean`; as N grows it tends to E_π[Σ_t x_t]/E_π[L], with a
    bias of order 1/N. Source: Yu et al. (2025), DAPO.
    """
    return check_some(_sums(values, live)).sum() / live.sum().clamp(min=1)


def _sums(values: Tensor, live: Tensor) -> Tensor:
    """Σ_t x_it over live tokens [N]."""
    # chosen, not multiplied: a value of inf or NaN after EOS times 0 would be NaN
    return torch.where(live, values, torch.zeros_like(values)).sum(-1)
