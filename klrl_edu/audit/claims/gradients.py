"""What every surrogate and loss claims to follow: KL in the reward, in the loss and in both; policy
gradients; f-DPG.

    u = log π/q,   w = q/π,   ρ = π/μ,   s = ∇log π,   ⟦x⟧ = x without gradient,   A an advantage,
    L live tokens                                                                                (1)

Symbols as in the estimators' modules; a formula is averaged over the sequences of a batch, and its
gradient is the estimate.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from klrl_edu.audit.claims import predictions
from klrl_edu.audit.claims.entries import (
    FORWARD,
    FORWARD_PER_TOKEN,
    NOTHING,
    OBJECTIVE,
    REVERSE,
    REVERSE_PER_TOKEN,
    ClaimedMean,
    Entry,
    gradient_entry,
)
from klrl_edu.audit.claims.predictions import (
    all_tokens,
    of_clipped_pairs,
    of_divergence_to_posterior,
    own_tokens,
    sample_score,
)
from klrl_edu.estimators import advantages
from klrl_edu.estimators import kl_gradients as kl
from klrl_edu.exact.posterior import posterior
from klrl_edu.learning import losses
from klrl_edu.models.contract import LanguageModel
from klrl_edu.problems.problem import Problem

_LESS_FORWARD = {"reverse_kl": 1.0, "forward_kl": -1.0}
_LESS_FORWARD_PER_TOKEN = {"reverse_kl": 1.0, "forward_kl_per_token": -1.0}
_LATER_ALONE = {"reverse_kl": 1.0, "reverse_kl_per_token": -1.0}  # what a token does to later KL
_PER_TOKEN, _PER_TOKEN_FORWARD = "Σ_t ∇KL(π_t‖q_t)", "Σ_t ∇KL(q_t‖π_t)"


def _clamp(policy: LanguageModel, problem: Problem) -> dict[str, Any]:
    return {"bound": 0.05}  # some k3 of both cases lie above it


KL_GRADIENTS: tuple[Entry, ...] = (
    gradient_entry(kl.reward_k1, "⟦u⟧ log π", REVERSE, "∇KL(π‖q)", unbiased=True),
    gradient_entry(
        kl.reward_k1_to_go, "Σ_t ⟦Σ_{t'≥t} u⟧ log π_t", REVERSE, "∇KL(π‖q)", unbiased=True
    ),
    gradient_entry(
        kl.reward_rao_blackwell_to_go,
        "Σ_t ⟦u_t + Σ_{t'>t} KL_t'⟧ log π_t",
        REVERSE,
        "∇KL(π‖q)",
        unbiased=True,
    ),
    # Σ_t KL_t counts as a reward alone: its own gradient, the part per token, is missing
    gradient_entry(
        kl.reward_full_kl, "⟦Σ_t KL_t⟧ log π", _LATER_ALONE, "∇KL(π‖q) − Σ_t ∇KL(π_t‖q_t)"
    ),
    # k3 = u + (w − 1), and E_π[(w − 1)s] = Σ q s = −∇KL(q‖π)
    gradient_entry(kl.reward_k3, "⟦k3(u)⟧ log π", _LESS_FORWARD, "∇KL(π‖q) − ∇KL(q‖π)"),
    gradient_entry(
        kl.reward_k3_token,
        "⟦Σ_t k3(u_t)⟧ log π",
        _LESS_FORWARD_PER_TOKEN,
        "∇KL(π‖q) − Σ_t ∇KL(q_t‖π_t)",
    ),
    # ∇u = s, and E_π[s] = 0: as a loss it pushes nothing on average
    gradient_entry(kl.loss_k1, "u", NOTHING, "0"),
    gradient_entry(kl.loss_k2, "u²/2", REVERSE, "∇KL(π‖q)", unbiased=True),
    gradient_entry(kl.loss_k3, "k3(u)", FORWARD, "∇KL(q‖π)", unbiased=True),
    gradient_entry(kl.loss_absolute_k1, "|u|", predictions.of_variation, "2∇TV(π, q)"),
    gradient_entry(kl.loss_k2_token, "Σ_t u_t²/2", REVERSE_PER_TOKEN, _PER_TOKEN, unbiased=True),
    gradient_entry(
        kl.loss_k3_token, "Σ_t k3(u_t)", FORWARD_PER_TOKEN, _PER_TOKEN_FORWARD, unbiased=True
    ),
    gradient_entry(
        kl.loss_absolute_k1_token, "Σ_t |u_t|", predictions.of_token_variation, "2Σ_t ∇TV(π_t, q_t)"
    ),
    gradient_entry(
        kl.loss_clamped_k3_token,
        "Σ_t min(k3(u_t), 0.05)",
        predictions.of_clamped_k3(0.05),
        "Σ_t ∇KL(q_t‖π_t) where k3 is below",
        constants=_clamp,
    ),
    gradient_entry(
        kl.loss_full_kl, "Σ_t KL(π_t‖q_t)", REVERSE_PER_TOKEN, _PER_TOKEN, unbiased=True
    ),
    gradient_entry(
        kl.loss_full_forward_kl,
        "Σ_t KL(q_t‖π_t)",
        FORWARD_PER_TOKEN,
        _PER_TOKEN_FORWARD,
        unbiased=True,
    ),
    gradient_entry(kl.reward_and_loss_k1, "⟦u⟧ log π + u", REVERSE, "∇KL(π‖q)", unbiased=True),
    gradient_entry(
        kl.reward_and_loss_k2, "⟦u²/2⟧ log π + u²/2", predictions.of_mean_k2, "∇E_π[u²/2]"
    ),
    # as a loss k3 follows ∇KL(q‖π), which is what it lacks as a reward
    gradient_entry(
        kl.reward_and_loss_k3, "⟦k3(u)⟧ log π + k3(u)", REVERSE, "∇KL(π‖q)", unbiased=True
    ),
    gradient_entry(
        kl.reward_and_loss_k3_token,
        "Σ_t [⟦Σ_{t'≥t} k3(u_t')⟧ log π_t + k3(u_t)]",
        REVERSE,
        "∇KL(π‖q)",
        unbiased=True,
    ),
    gradient_entry(
        kl.rao_blackwell_to_go,
        "Σ_t [KL_t + ⟦Σ_{t'>t} KL_t'⟧ log π_t]",
        REVERSE,
        "∇KL(π‖q)",
        unbiased=True,
    ),
    # ⟦ ⟧ makes the value k3, and leaves the gradient of u²/2
    gradient_entry(
        kl.straight_through_k2,
        "Σ_t [u_t²/2 + ⟦k3 − u_t²/2⟧]",
        REVERSE_PER_TOKEN,
        _PER_TOKEN,
        unbiased=True,
    ),
    # on-policy ρ = 1, and its gradient brings the score back: k3 in the reward and in the loss
    gradient_entry(
        kl.live_ratio_k3_token, "Σ_t ρ_t k3(u_t)", REVERSE_PER_TOKEN, _PER_TOKEN, unbiased=True
    ),
    gradient_entry(kl.live_ratio_k3_prefix, "Σ_t ρ_≤t k3(u_t)", REVERSE, "∇KL(π‖q)", unbiased=True),
    gradient_entry(kl.live_ratio_k3, "ρ k3(u)", REVERSE, "∇KL(π‖q)", unbiased=True),
    # on-policy a ratio without gradient is 1, and leaves the loss k3
    gradient_entry(
        kl.detached_ratio_k3_token,
        "Σ_t ⟦ρ_t⟧ k3(u_t)",
        FORWARD_PER_TOKEN,
        _PER_TOKEN_FORWARD,
        unbiased=True,
    ),
    gradient_entry(kl.detached_ratio_k3, "⟦ρ⟧ k3(u)", FORWARD, "∇KL(q‖π)", unbiased=True),
)

OFF_POLICY: tuple[Entry, ...] = (
    # ρ_t weighs the token right, and leaves the prefix as μ drew it
    gradient_entry(
        kl.live_ratio_k3_token,
        "Σ_t ρ_t k3(u_t)",
        predictions.of_reverse_kl_elsewhere,
        f"{_PER_TOKEN} over μ's prefixes",
        drawn_by="behaviour",
        label="off-policy",
    ),
    gradient_entry(
        kl.live_ratio_k3_prefix,
        "Σ_t ρ_≤t k3(u_t)",
        REVERSE,
        "∇KL(π‖q)",
        unbiased=True,
        drawn_by="behaviour",
        label="off-policy",
    ),
    gradient_entry(
        kl.live_ratio_k3,
        "ρ k3(u)",
        REVERSE,
        "∇KL(π‖q)",
        unbiased=True,
        drawn_by="behaviour",
        label="off-policy",
    ),
    gradient_entry(
        kl.detached_ratio_k3_token,
        "Σ_t ⟦ρ_t⟧ k3(u_t)",
        predictions.of_forward_kl_elsewhere,
        f"{_PER_TOKEN_FORWARD} over μ's prefixes",
        drawn_by="behaviour",
        label="off-policy",
    ),
    gradient_entry(
        kl.detached_ratio_k3,
        "⟦ρ⟧ k3(u)",
        FORWARD,
        "∇KL(q‖π)",
        unbiased=True,
        drawn_by="behaviour",
        label="off-policy",
    ),
    # u ∇u = ∇½u², whoever draws
    gradient_entry(
        kl.off_policy_unweighted,
        "⟦u⟧ log π",
        predictions.of_mean_k2_elsewhere,
        "∇½E_μ[u²]",
        drawn_by="behaviour",
    ),
    gradient_entry(
        kl.off_policy_token,
        "Σ_t ⟦ρ_t u_t⟧ log π_t",
        predictions.of_reverse_kl_elsewhere,
        f"{_PER_TOKEN} over μ's prefixes",
        drawn_by="behaviour",
    ),
    gradient_entry(
        kl.off_policy_prefix,
        "Σ_t ⟦Σ_{t'≥t} ρ_≤t' u_t'⟧ log π_t",
        REVERSE,
        "∇KL(π‖q)",
        unbiased=True,
        drawn_by="behaviour",
    ),
    gradient_entry(
        kl.off_policy_sequence,
        "⟦ρu⟧ log π",
        REVERSE,
        "∇KL(π‖q)",
        unbiased=True,
        drawn_by="behaviour",
    ),
)


def _squared_score_norms(policy: LanguageModel, tokens: Tensor) -> Tensor:
    """‖∇log π(y)‖² [S]."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    # sequence by sequence: norms do not add up as gradients do
    rows = [
        torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True)
        for one in policy.log_prob(tokens)
    ]
    return torch.stack(
        [torch.stack([gradient.double().square().sum() for gradient in row]).sum() for row in rows]
    )


def _best_baseline(policy: LanguageModel, problem: Problem) -> dict[str, Any]:
    """b* for r − λu."""
    support = posterior(problem).enumerated()
    log_pi = policy.log_prob(support.tokens).detach()
    penalised = support.rewards - problem.kl_coef * (log_pi - support.log_prior)
    return {
        "baseline": float(
            advantages.best_scalar_baseline(
                penalised, _squared_score_norms(policy, support.tokens), log_pi
            )
        )
    }


POLICY_GRADIENTS: tuple[Entry, ...] = (
    gradient_entry(losses.exact, "−J", OBJECTIVE, "−∇J, without noise"),
    gradient_entry(losses.reinforce, "−⟦r − λu⟧ log π", OBJECTIVE, "−∇J", unbiased=True),
    gradient_entry(
        losses.reinforce,
        "−⟦r − λu − b*⟧ log π",
        OBJECTIVE,
        "−∇J",
        unbiased=True,
        label="best constant",
        constants=_best_baseline,
    ),
    gradient_entry(
        losses.rloo, "−⟦R − mean of others⟧ log π", OBJECTIVE, "−∇J", unbiased=True, batch_size=2
    ),
    # a reward's own share 1/G of the mean goes off its advantage; G = 2
    gradient_entry(
        losses.group_mean, "−⟦R − mean⟧ log π", {"objective": 0.5}, "−(G − 1)/G ∇J", batch_size=2
    ),
    # on-policy all ratios are 1, which no clip touches
    gradient_entry(
        losses.ppo_clip, "−Σ_t min(ρ_t A_t, clip(ρ_t) A_t)", OBJECTIVE, "−∇J", unbiased=True
    ),
    gradient_entry(
        losses.z_score,
        "−⟦(r − mean)/std⟧ log π",
        predictions.of_winning,
        "−∇ of winning against π held fixed (G = 2)",
        batch_size=2,
    ),
    gradient_entry(
        losses.grpo,
        "−(1/L) Σ_t [ρ_t A − λ k3(u_t)]",
        predictions.of_grpo,
        "−E[As/L] + λE[Σ_t (1 − w_t)s_t/L]",
        batch_size=2,
    ),
    gradient_entry(
        losses.grpo_without_kl,
        "−(1/L) Σ_t ρ_t A",
        predictions.of_grpo_without_kl,
        "−E[As/L]",
        batch_size=2,
    ),
    gradient_entry(
        losses.dr_grpo,
        "−(1/T) Σ_t ρ_t (r − mean)",
        predictions.of_dr_grpo,
        "−(G − 1)/(GT) ∇E[r]",
        batch_size=2,
    ),
    gradient_entry(
        losses.dapo, "−Σ_i Σ_t ρ_t A / Σ_i L", predictions.of_dapo, "−E[ΣAs/ΣL]", batch_size=2
    ),
    # at ρ = 1 the gradient of ρ^{1/L} is s/L, as GRPO's is
    gradient_entry(
        losses.gspo, "−ρ^{1/L} A", predictions.of_grpo_without_kl, "−E[As/L]", batch_size=2
    ),
    # at ρ = 1 ∇log π_t = ∇ρ_t, so it is DAPO's
    gradient_entry(
        losses.cispo,
        "−Σ_i Σ_t ⟦ρ_t⟧ A log π_t / Σ_i L",
        predictions.of_dapo,
        "−E[ΣAs/ΣL]",
        batch_size=2,
    ),
)


def _clipped(
    loss: Any, formula: str, claim: ClaimedMean, words: str, size: int = 2, **constants: float
) -> Entry:
    """A loss from samples of μ, where its clip acts."""
    return gradient_entry(
        loss,
        formula,
        claim,
        words,
        drawn_by="behaviour",
        label="off-policy",
        batch_size=size,
        constants=(lambda policy, problem: dict(constants)) if constants else None,
    )


_UNCLIPPED = "where the clip leaves ρ alone"

CLIPPED: tuple[Entry, ...] = (
    _clipped(
        losses.ppo_clip,
        "−Σ_t min(ρ_t A_t, clip(ρ_t) A_t)",
        predictions.of_clipped_ppo,
        f"−E_μ[Σ_t ρ_t A_t s_t] {_UNCLIPPED}",
        size=1,
    ),
    _clipped(
        losses.grpo,
        "−(1/L) Σ_t [min(ρ_t A, clip(ρ_t) A) − λ k3(u_t)]",
        predictions.of_clipped_grpo,
        f"−E_μ[A Σ_t ρ_t s_t/L] {_UNCLIPPED}, + λE_μ[Σ_t (1 − w_t)s_t/L]",
    ),
    _clipped(
        losses.dr_grpo,
        "−(1/T) Σ_t min(ρ_t (r − mean), clip(ρ_t) (r − mean))",
        predictions.of_clipped_dr_grpo,
        f"−E_μ[(r − mean) Σ_t ρ_t s_t]/T {_UNCLIPPED}",
    ),
    _clipped(
        losses.grpo_without_kl,
        "−(1/L) Σ_t min(ρ_t A, clip(ρ_t) A)",
        of_clipped_pairs(sample_score, own_tokens),
        f"−E_μ[A Σ_t ρ_t s_t/L] {_UNCLIPPED}",
    ),
    _clipped(
        losses.dapo,
        "−Σ_i Σ_t min(ρ_t A, clip(ρ_t) A) / Σ_i L",
        of_clipped_pairs(sample_score, all_tokens, 0.2, 0.28),  # DAPO's defaults
        f"−E_μ[ΣA Σ_t ρ_t s_t/ΣL] {_UNCLIPPED}",
    ),
    _clipped(
        losses.gspo,
        "−min(ρ^{1/L} A, clip(ρ^{1/L}) A)",
        of_clipped_pairs(sample_score, own_tokens, 0.2, 0.3, sequence_ratio=True),
        f"−E_μ[ρ^{{1/L}} A s/L] {_UNCLIPPED}",
        # its own clips, 3e-4 and 4e-4, would leave no ratio of these small cases alone
        clip_low=0.2,
        clip_high=0.3,
    ),
    _clipped(
        losses.cispo,
        "−Σ_i Σ_t ⟦min(ρ_t, 1.1)⟧ A log π_t / Σ_i L",
        predictions.of_capped_pairs(0.1),
        "−E_μ[ΣA Σ_t min(ρ_t, 1.1) s_t/ΣL]",
        # its own cap, 5, would leave every ratio of these small cases alone
        clip_high=0.1,
    ),
)


def _log_evidence(policy: LanguageModel, problem: Problem) -> dict[str, Any]:
    return {"log_evidence": float(posterior(problem).log_evidence)}


def _f_dpg(pseudo_reward: Any, formula: str, generator: Any, words: str) -> Entry:
    """f-DPG with one pseudo-reward."""
    return gradient_entry(
        losses.f_dpg,
        f"−⟦{formula}⟧ log π",
        of_divergence_to_posterior(generator),
        words,
        unbiased=True,
        label=pseudo_reward.__name__.removeprefix("fdpg_"),
        audited=partial(losses.f_dpg, pseudo_reward=pseudo_reward),
        constants=_log_evidence,
    )


def _js(t: Tensor) -> Tensor:
    return (t * torch.log(t) - (1 + t) * torch.log((1 + t) / 2)) / 2


F_DPG: tuple[Entry, ...] = (
    _f_dpg(advantages.fdpg_reverse_kl, "−log t − 1", lambda t: t * torch.log(t), "∇KL(π‖π*)"),
    _f_dpg(advantages.fdpg_forward_kl, "1/t", lambda t: -torch.log(t), "∇KL(π*‖π)"),
    _f_dpg(
        advantages.fdpg_total_variation, "−½ sign log t", lambda t: (t - 1).abs() / 2, "∇TV(π, π*)"
    ),
    _f_dpg(advantages.fdpg_jensen_shannon, "−½ log 2t/(1 + t)", _js, "∇JS(π, π*)"),
    _f_dpg(advantages.fdpg_chi_squared, "1 − t", lambda t: (t - 1) ** 2 / 2, "∇½χ²(π‖π*)"),
    _f_dpg(
        advantages.fdpg_squared_hellinger,
        "½(1/√t − 1)",
        lambda t: (t.sqrt() - 1) ** 2 / 2,
        "∇½Σ(√π − √π*)²",
    ),
)
