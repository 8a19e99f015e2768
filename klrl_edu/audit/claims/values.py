"""What every estimator of a number claims: divergences from samples of π or μ, means over tokens,
the evidence.

    u = log π/q,   w = q/π = e^{−u},   m a mixture of π and q,   ρ = π/μ,   L live tokens,
    N sequences of a batch                                                                       (1)

Symbols as in the estimators' modules. Closed forms are sums over π and q [S], by definition and not
by estimator.
"""

import math
from typing import Any

import torch
from torch import Tensor

from klrl_edu.audit.claims import predictions
from klrl_edu.audit.claims.entries import FORWARD, REVERSE, Entry, value_entry
from klrl_edu.audit.claims.predictions import Prediction, mean_of
from klrl_edu.estimators import divergences, evidence
from klrl_edu.estimators.aggregation import (
    fixed_length,
    seq_mean_token_mean,
    seq_mean_token_sum,
    token_mean,
)
from klrl_edu.estimators.kl_values import (
    absolute_k1,
    best_coefficient,
    clamped_k1,
    clamped_k3,
    control_variate,
    input_clamped_k3,
    k1,
    k2,
    k3,
    kl_per_token,
    off_policy_prefix,
    off_policy_rao_blackwell,
    off_policy_sequence,
    off_policy_token,
    opposite_k3,
    rao_blackwell,
)
from klrl_edu.estimators.top_k import top_k_tail_bucket, top_k_tail_sampled, top_k_truncated
from klrl_edu.exact.enumeration import problem_support
from klrl_edu.models.contract import LanguageModel
from klrl_edu.problems.problem import Problem

# --- estimators as the audit takes them: by the names of a batch's fields -------------------------


def _log_ratio_per_token(log_probs: Tensor, prior_log_probs: Tensor, live: Tensor) -> Tensor:
    return kl_per_token(log_probs - prior_log_probs, live)


def _token_sum(log_probs: Tensor, prior_log_probs: Tensor, live: Tensor) -> Tensor:
    return seq_mean_token_sum(log_probs - prior_log_probs, live)


def _fixed_length(log_probs: Tensor, prior_log_probs: Tensor, live: Tensor) -> Tensor:
    return fixed_length(log_probs - prior_log_probs, live)


def _sequence_mean(log_probs: Tensor, prior_log_probs: Tensor, live: Tensor) -> Tensor:
    return seq_mean_token_mean(log_probs - prior_log_probs, live)


def _token_mean(log_probs: Tensor, prior_log_probs: Tensor, live: Tensor) -> Tensor:
    return token_mean(log_probs - prior_log_probs, live)


def _log_weights(
    log_probs: Tensor, prior_log_probs: Tensor, rewards: Tensor, kl_coef: Tensor
) -> Tensor:
    """log w = log q + r/λ − log π [N]."""
    return (prior_log_probs + rewards / kl_coef.unsqueeze(-1) - log_probs).sum(-1)


def _evidence(
    log_probs: Tensor, prior_log_probs: Tensor, rewards: Tensor, kl_coef: Tensor
) -> Tensor:
    log_weights = _log_weights(log_probs, prior_log_probs, rewards, kl_coef)
    return evidence.importance_sampling(log_weights).exp()  # Ẑ is unbiased, its log is not


def _log_evidence(
    log_probs: Tensor, prior_log_probs: Tensor, rewards: Tensor, kl_coef: Tensor
) -> Tensor:
    return evidence.importance_sampling(_log_weights(log_probs, prior_log_probs, rewards, kl_coef))


def _lower_bound(
    log_probs: Tensor, prior_log_probs: Tensor, rewards: Tensor, kl_coef: Tensor
) -> Tensor:
    return evidence.lower_bound(_log_weights(log_probs, prior_log_probs, rewards, kl_coef))


def _upper_bound(
    log_probs: Tensor, prior_log_probs: Tensor, rewards: Tensor, kl_coef: Tensor
) -> Tensor:
    return evidence.upper_bound(_log_weights(log_probs, prior_log_probs, rewards, kl_coef))


def _inverse_evidence(
    log_probs: Tensor, prior_log_probs: Tensor, rewards: Tensor, kl_coef: Tensor
) -> Tensor:
    log_weights = _log_weights(log_probs, prior_log_probs, rewards, kl_coef)
    # 1/Z is what the mean of 1/w is unbiased for
    return (-evidence.harmonic_mean(log_weights)).exp()


def _self_normalised(
    log_probs: Tensor, prior_log_probs: Tensor, rewards: Tensor, kl_coef: Tensor
) -> Tensor:
    log_weights = _log_weights(log_probs, prior_log_probs, rewards, kl_coef)
    return evidence.self_normalised(rewards.sum(-1), log_weights)


# --- constants ------------------------------------------------------------------------------------


def _best_coefficient(policy: LanguageModel, problem: Problem) -> dict[str, Any]:
    tokens = problem_support(problem).tokens
    log_pi, log_q = policy.log_prob(tokens).detach(), problem.prior.log_prob(tokens).detach()
    return {"coefficient": float(best_coefficient(log_pi, log_q))}


def _bound(bound: float) -> Any:
    return lambda policy, problem: {"bound": bound}


def _top_one(policy: LanguageModel, problem: Problem) -> dict[str, Any]:
    return {"k": 1}


def _one_tenth(policy: LanguageModel, problem: Problem) -> dict[str, Any]:
    return {"weight": 0.1}


# --- expectations by definition -------------------------------------------------------------------

_HALF_SQUARE = mean_of(lambda pi, q: pi * torch.log(pi / q) ** 2 / 2)
_ABSOLUTE = mean_of(lambda pi, q: pi * torch.log(pi / q).abs())
_CHI_LESS_KL = mean_of(lambda pi, q: (pi - q) ** 2 / q - pi * torch.log(pi / q))
_CHI, _REVERSE_CHI = (
    mean_of(lambda pi, q: (pi - q) ** 2 / q / 2),
    mean_of(lambda pi, q: (pi - q) ** 2 / pi / 2),
)
_VARIATION, _HELLINGER = (
    mean_of(lambda pi, q: (pi - q).abs() / 2),
    mean_of(lambda pi, q: (pi.sqrt() - q.sqrt()) ** 2 / 2),
)
_ALPHA = mean_of(lambda pi, q: 2 * (pi + q) - 4 * (pi * q).sqrt())


def _clamped_mean(pi: Tensor, q: Tensor) -> Tensor:
    """KL with u cut at ±0.3."""
    u = torch.log(pi / q)
    # by what is cut off, not by a clamp of u as the estimator does it
    return pi * (u + (-0.3 - u).clamp(min=0) - (u - 0.3).clamp(min=0))


def _clamped_k3_mean(pi: Tensor, q: Tensor) -> Tensor:
    """KL less what k3 has above 0.05."""
    return pi * torch.log(pi / q) - pi * (q / pi - 1 - torch.log(q / pi) - 0.05).clamp(min=0)


def _input_clamped_mean(pi: Tensor, q: Tensor) -> Tensor:
    """k3 of a ratio within e^{±0.3}."""
    ratio = (q / pi).clamp(math.exp(-0.3), math.exp(0.3))
    return pi * (ratio - 1 - torch.log(ratio))


def _jensen_shannon(share: float) -> Prediction:
    """β KL(π‖m) + (1 − β) KL(q‖m)."""

    def mean(pi: Tensor, q: Tensor) -> Tensor:
        middle = share * pi + (1 - share) * q
        return share * pi * torch.log(pi / middle) + (1 - share) * q * torch.log(q / middle)

    return mean_of(mean)


KL_VALUES: tuple[Entry, ...] = (
    value_entry(k1, "u", REVERSE, "KL(π‖q)", unbiased=True),
    value_entry(k2, "u²/2", _HALF_SQUARE, "½E[u²]"),
    value_entry(k3, "w − 1 + u", REVERSE, "KL(π‖q)", unbiased=True),
    value_entry(
        control_variate,
        "u + c*(w − 1)",
        REVERSE,
        "KL(π‖q)",
        unbiased=True,
        constants=_best_coefficient,
    ),
    value_entry(absolute_k1, "|u|", _ABSOLUTE, "KL(π‖q) + 2E[max(−u, 0)]"),
    value_entry(opposite_k3, "1/w − 1 − u", _CHI_LESS_KL, "χ²(π‖q) − KL(π‖q)"),
    value_entry(
        clamped_k1,
        "u within ±0.3",
        mean_of(_clamped_mean),
        "KL(π‖q) without tails",
        constants=_bound(0.3),
    ),
    value_entry(
        clamped_k3,
        "min(k3, 0.05)",
        mean_of(_clamped_k3_mean),
        "KL(π‖q) − E[(k3 − 0.05)₊]",
        constants=_bound(0.05),
    ),
    value_entry(
        input_clamped_k3,
        "k3 of u within ±0.3",
        mean_of(_input_clamped_mean),
        "E[k3] without tails",
        constants=_bound(0.3),
    ),
    value_entry(rao_blackwell, "Σ_t KL_t", REVERSE, "KL(π‖q)", unbiased=True),
    value_entry(
        top_k_truncated,
        "Σ_t Σ_top1 π log π/q",
        predictions.of_kept_terms(1, bucket=False),
        "the head of KL(π‖q)",
        constants=_top_one,
    ),
    value_entry(
        top_k_tail_bucket,
        "Σ_t KL of top 1 and rest",
        predictions.of_kept_terms(1, bucket=True),
        "less than KL(π‖q)",
        constants=_top_one,
    ),
    value_entry(
        top_k_tail_sampled,
        "Σ_t [Σ_top1 π log π/q + tail u_t]",
        REVERSE,
        "KL(π‖q)",
        unbiased=True,
        constants=_top_one,
    ),
    value_entry(
        off_policy_token,
        "Σ_t ρ_t u_t",
        predictions.per_token_elsewhere,
        "Σ_t KL_t over μ's prefixes",
        drawn_by="behaviour",
    ),
    value_entry(
        off_policy_prefix, "Σ_t ρ_≤t u_t", REVERSE, "KL(π‖q)", unbiased=True, drawn_by="behaviour"
    ),
    value_entry(off_policy_sequence, "ρu", REVERSE, "KL(π‖q)", unbiased=True, drawn_by="behaviour"),
    value_entry(
        off_policy_rao_blackwell,
        "Σ_t ρ_<t KL_t",
        REVERSE,
        "KL(π‖q)",
        unbiased=True,
        drawn_by="behaviour",
    ),
)

DIVERGENCES: tuple[Entry, ...] = (
    value_entry(divergences.forward_kl, "−uw", FORWARD, "KL(q‖π)", unbiased=True),
    value_entry(
        divergences.forward_kl_nonnegative, "−uw − w + 1", FORWARD, "KL(q‖π)", unbiased=True
    ),
    value_entry(divergences.chi_squared, "cosh u − 1", _CHI, "½χ²(π‖q)", unbiased=True),
    value_entry(
        divergences.reverse_chi_squared, "½(w − 1)²", _REVERSE_CHI, "½χ²(q‖π)", unbiased=True
    ),
    value_entry(divergences.total_variation, "½|1 − w|", _VARIATION, "TV(π, q)", unbiased=True),
    value_entry(
        divergences.squared_hellinger, "½(1 − √w)²", _HELLINGER, "½Σ(√π − √q)²", unbiased=True
    ),
    value_entry(
        divergences.jensen_shannon,
        "½ log π/m + ½w log q/m",
        _jensen_shannon(0.5),
        "JS(π, q)",
        unbiased=True,
    ),
    value_entry(
        divergences.generalised_jensen_shannon,
        "β log π/m + (1 − β)w log q/m, β = 0.1",
        _jensen_shannon(0.1),
        "JS_β(π, q)",
        unbiased=True,
        constants=_one_tenth,
    ),
    value_entry(
        divergences.alpha_divergence, "2(1 − √w)²", _ALPHA, "D_α(π‖q), α = ½", unbiased=True
    ),
)

AGGREGATES: tuple[Entry, ...] = (
    value_entry(
        seq_mean_token_sum,
        "(1/N) Σ_i Σ_t u",
        REVERSE,
        "E[Σ_t u]",
        unbiased=True,
        batch_size=2,
        audited=_token_sum,
    ),
    value_entry(
        fixed_length,
        "(1/NT) Σ_i Σ_t u",
        predictions.of_fixed_length,
        "E[Σ_t u]/T",
        batch_size=2,
        audited=_fixed_length,
    ),
    value_entry(
        seq_mean_token_mean,
        "(1/N) Σ_i (1/L) Σ_t u",
        predictions.of_ratios,
        "E[Σ_t u/L]",
        batch_size=2,
        audited=_sequence_mean,
    ),
    value_entry(
        token_mean,
        "Σ_i Σ_t u / Σ_i L",
        predictions.of_ratio_of_sums,
        "E[ΣΣu/ΣL], moving with N",
        batch_size=2,
        audited=_token_mean,
    ),
    value_entry(
        kl_per_token,
        "Σ_i Σ_t u / Σ_i L",
        predictions.of_ratio_of_sums,
        "E[ΣΣu/ΣL], moving with N",
        batch_size=2,
        audited=_log_ratio_per_token,
    ),
)

EVIDENCE: tuple[Entry, ...] = (
    value_entry(
        evidence.importance_sampling,
        "Ẑ = (1/N) Σ w",
        predictions.of_evidence,
        "Z",
        unbiased=True,
        batch_size=2,
        audited=_evidence,
    ),
    value_entry(
        evidence.importance_sampling,
        "log Ẑ",
        predictions.of_log_importance_sampling,
        "E[log Ẑ] ≤ log Z",
        label="log",
        batch_size=2,
        audited=_log_evidence,
    ),
    value_entry(
        evidence.lower_bound,
        "(1/N) Σ log w",
        predictions.of_lower_bound,
        "log Z − KL(π‖π*)",
        batch_size=2,
        audited=_lower_bound,
    ),
    value_entry(
        evidence.upper_bound,
        "(1/N) Σ log w",
        predictions.of_upper_bound,
        "log Z + KL(π*‖π)",
        batch_size=2,
        drawn_by="posterior",
        audited=_upper_bound,
    ),
    value_entry(
        evidence.harmonic_mean,
        "(1/N) Σ 1/w",
        predictions.of_inverse_evidence,
        "1/Z",
        unbiased=True,
        batch_size=2,
        drawn_by="posterior",
        audited=_inverse_evidence,
    ),
    value_entry(
        evidence.self_normalised,
        "Σwr/Σw",
        predictions.of_self_normalised,
        "between E_π[r] and E_π*[r]",
        batch_size=2,
        audited=_self_normalised,
    ),
)
