"""What estimators that are not unbiased follow instead, in closed form, for the catalogue.

    E_{y,y'}[A(r, r') c(L, L') ∇log π(y)],    E_π[Σ_t g(u_t) ∇log π_t],    ∇D_f(π‖π*),
    E_π[g(u)]                                                                                    (1)

A prediction is a function of (policy, problem, behaviour) and gives [P] in the order of the
policy's parameters, or [1] for a value. All are sums over the support, one sequence or one pair at
a time; the audit enumerates batches. S sequences, T tokens, P parameters, u = log π/q, w = 1/t =
q/π, L live tokens, μ the behaviour policy.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.learning.batches import Batch, score_batch
from klrl_edu.models.contract import LanguageModel, enumerate_support, token_log_probs
from klrl_edu.problems.problem import Problem

Prediction = Callable[[LanguageModel, Problem, LanguageModel], Tensor]

# --- a group of two: its advantages, and its means over tokens ------------------------------------


def sample_score(difference: Tensor) -> Tensor:
    """(r − mean)/(std + 1e-4) of the first of two, by the sample std |r − r'|/√2."""
    return difference / 2 / (difference.abs() / math.sqrt(2) + 1e-4)


def own_tokens(length: Tensor, other: Tensor) -> Tensor:
    """1/L: the mean over a sequence's own tokens."""
    return 1 / length + 0 * other  # 0 · other: the shape of pairs


def all_tokens(length: Tensor, other: Tensor) -> Tensor:
    """2/(L + L'): the mean over the tokens of both, each sequence counted half."""
    return 2 / (length + other)


# --- gradients ------------------------------------------------------------------------------------


def of_dr_grpo(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """½ ∇(−E r)/T, of a group of two."""
    whole = _whole(policy, problem, behaviour)
    expected_reward = (whole.log_probs.sum(-1).exp() * whole.rewards.sum(-1)).sum()
    return _slope(-expected_reward, policy) / (2 * problem.space.max_length)


def of_winning(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """−E[sign(r − r') s(y)]: the z-score of a group of two by the population std."""
    return _of_pairs(policy, problem, behaviour, torch.sign, lambda a, b: torch.ones_like(a + b))


def of_grpo_without_kl(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """−E[A s(y)/L], A = (r − r')/2/(|r − r'|/√2 + 1e-4): the z-score of a group of two by the
    sample std, and the token mean of each.
    """
    return _of_pairs(policy, problem, behaviour, sample_score, own_tokens)


def of_grpo(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """That of `of_grpo_without_kl`, plus λ E_π[(1/L) Σ_t (1 − w_t) s_t]."""
    whole = _whole(policy, problem, behaviour)
    # a weight of s_t, without gradient
    log_weight = whole.prior_log_probs - whole.log_probs.detach()
    slopes = -torch.expm1(log_weight) / whole.live.sum(-1, keepdim=True)  # (1 − w_t)/L
    penalty = problem.kl_coef * _of_tokens(whole, slopes, policy)
    return of_grpo_without_kl(policy, problem, behaviour) + penalty


def of_dapo(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """−E[2A s(y)/(L + L')]: all tokens of a group of two weigh alike."""
    return _of_pairs(policy, problem, behaviour, sample_score, all_tokens)


def of_clipped_ppo(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """−E_μ[Σ_t ρ_t A_t s_t] over the tokens whose ratio the clip of 0.2 leaves alone, A_t =
    Σ_{t'≥t} (r_t' − λ log μ_t'/q_t').
    """
    whole = _whole(policy, problem, behaviour)
    penalty = problem.kl_coef * (whole.behaviour_log_probs - whole.prior_log_probs)
    rewards = torch.where(whole.live, whole.rewards - penalty, 0.0)
    # the penalty is of the policy that drew, and fixed with the sample: no gradient goes through
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    weight = whole.behaviour_log_probs.sum(-1).exp()[:, None] * to_go
    return _of_unclipped(whole, _ratio(whole), weight.clamp(min=0), weight.clamp(max=0), policy)


def of_clipped_pairs(
    advantage: Callable[[Tensor], Tensor],
    share: Callable[[Tensor, Tensor], Tensor],
    low: float = 0.2,
    high: float = 0.2,
    *,
    sequence_ratio: bool = False,
) -> Prediction:
    """−E_μ[A(r − r') c(L, L') Σ_t ρ_t s_t], over the tokens of pairs from μ where 1 − low < ρ_t for
    A < 0 and ρ_t < 1 + high for A > 0; ρ^{1/L} of the sequence for each ρ_t if `sequence_ratio`.
    """

    def predicted(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
        whole = _whole(policy, problem, behaviour)
        rewards, length = whole.rewards.sum(-1), whole.live.sum(-1).double()
        drawn = whole.behaviour_log_probs.sum(-1).exp()
        weight = drawn[:, None] * drawn * advantage(rewards[:, None] - rewards)
        weight = weight * share(length[:, None], length)  # [S,S]: the first of a pair down
        ratio = _ratio(whole)
        if sequence_ratio:
            # after EOS log ρ is 0
            ratio = (ratio.log().sum(-1) / length).exp()[:, None].expand_as(ratio)
        # which clip acts hangs on the sign of a pair's A, so gains and losses are summed apart
        gained, lost = (
            part.sum(1, keepdim=True) for part in (weight.clamp(min=0), weight.clamp(max=0))
        )
        return _of_unclipped(whole, ratio, gained, lost, policy, low, high)

    return predicted


def of_clipped_grpo(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """−E_μ[A Σ_t ρ_t s_t/L] over the tokens that the clip of 0.2 leaves alone, plus λ E_μ[(1/L) Σ_t
    (1 − w_t) s_t], which is not weighed by ρ.
    """
    whole = _whole(policy, problem, behaviour)
    log_weight = whole.prior_log_probs - whole.log_probs.detach()
    slopes = -torch.expm1(log_weight) / whole.live.sum(-1, keepdim=True)  # (1 − w_t)/L
    drawn = whole.behaviour_log_probs.sum(-1).exp()
    penalty = problem.kl_coef * (drawn * (slopes * whole.log_probs).sum(-1)).sum()
    clipped = of_clipped_pairs(sample_score, own_tokens)(policy, problem, behaviour)
    return clipped + _slope(penalty, policy)


def of_clipped_dr_grpo(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """−E_μ[(r − r')/2 Σ_t ρ_t s_t]/T over the tokens that the clip of 0.2 leaves alone."""
    clipped = of_clipped_pairs(lambda difference: difference / 2, lambda a, b: 0 * (a + b) + 1)
    return clipped(policy, problem, behaviour) / problem.space.max_length


def of_capped_pairs(cap: float) -> Prediction:
    """−E_μ[2A/(L + L') Σ_t min(ρ_t, 1 + cap) s_t]: no token is dropped."""

    def predicted(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
        whole = _whole(policy, problem, behaviour)
        rewards, length = whole.rewards.sum(-1), whole.live.sum(-1).double()
        drawn = whole.behaviour_log_probs.sum(-1).exp()
        weight = drawn[:, None] * drawn * sample_score(rewards[:, None] - rewards)
        weight = (weight * all_tokens(length[:, None], length)).sum(1, keepdim=True)
        capped = torch.where(_ratio(whole) > 1 + cap, 1 + cap, _ratio(whole))
        return _slope(-(weight * capped * whole.log_probs).sum(), policy)

    return predicted


def of_variation(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """∇Σ|π − q|, twice that of the total variation."""
    whole = _whole(policy, problem, behaviour)
    difference = whole.log_probs.sum(-1).exp() - whole.prior_log_probs.sum(-1).exp()
    return _slope(difference.abs().sum(), policy)


def of_token_variation(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """E_π Σ_t ∇Σ_v|π_t − q_t| with prefixes held fixed."""
    log_dists, prior, frozen, _ = _conditionals(policy, problem, behaviour)
    along_sequence = (log_dists.exp() - prior.exp()).abs().sum((-1, -2))
    return _slope((frozen * along_sequence).sum(), policy)


def of_mean_k2(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """∇E_π[u²/2]."""
    whole = _whole(policy, problem, behaviour)
    log_pi = whole.log_probs.sum(-1)
    log_ratio = log_pi - whole.prior_log_probs.sum(-1)
    return _slope((log_pi.exp() * log_ratio.square() / 2).sum(), policy)


def of_mean_k2_elsewhere(
    policy: LanguageModel, problem: Problem, behaviour: LanguageModel
) -> Tensor:
    """∇E_μ[u²/2]."""
    whole = _whole(policy, problem, behaviour)
    log_ratio = whole.log_probs.sum(-1) - whole.prior_log_probs.sum(-1)
    return _slope((whole.behaviour_log_probs.sum(-1).exp() * log_ratio.square() / 2).sum(), policy)


def of_reverse_kl_elsewhere(
    policy: LanguageModel, problem: Problem, behaviour: LanguageModel
) -> Tensor:
    """E_{prefixes of μ} Σ_t ∇KL(π_t‖q_t)."""
    log_dists, prior, _, drawn = _conditionals(policy, problem, behaviour)
    return _slope((drawn * logspace.kl_divergence(log_dists, prior).sum(-1)).sum(), policy)


def of_forward_kl_elsewhere(
    policy: LanguageModel, problem: Problem, behaviour: LanguageModel
) -> Tensor:
    """E_{prefixes of μ} Σ_t ∇KL(q_t‖π_t)."""
    log_dists, prior, _, drawn = _conditionals(policy, problem, behaviour)
    return _slope((drawn * logspace.kl_divergence(prior, log_dists).sum(-1)).sum(), policy)


def of_clamped_k3(bound: float) -> Prediction:
    """E_π Σ_t 1{k3(u_t) < b} (1 − w_t) s_t."""

    def predicted(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
        whole = _whole(policy, problem, behaviour)
        log_weight = whole.prior_log_probs - whole.log_probs.detach()
        below = torch.expm1(log_weight) - log_weight < bound  # k3(u_t) < b
        return _of_tokens(whole, torch.where(below, -torch.expm1(log_weight), 0.0), policy)

    return predicted


def of_divergence_to_posterior(generator: Callable[[Tensor], Tensor]) -> Prediction:
    """∇Σ_y π* f(π/π*), for f(t)."""

    def predicted(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
        whole = _whole(policy, problem, behaviour)
        tilted = whole.prior_log_probs.sum(-1) + whole.rewards.sum(-1) / problem.kl_coef
        log_star = logspace.log_normalize(tilted)
        ratio = torch.exp(whole.log_probs.sum(-1) - log_star)  # π/π*
        return _slope((log_star.exp() * generator(ratio)).sum(), policy)

    return predicted


# --- values ---------------------------------------------------------------------------------------


def mean_of(function: Callable[[Tensor, Tensor], Tensor]) -> Prediction:
    """Σ_y function(π, q), a plain sum over probabilities [S]."""

    def predicted(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
        whole = _whole(policy, problem, behaviour)
        pi, prior = whole.log_probs.detach().sum(-1).exp(), whole.prior_log_probs.sum(-1).exp()
        return function(pi, prior).sum().reshape(1)

    return predicted


def per_token_elsewhere(
    policy: LanguageModel, problem: Problem, behaviour: LanguageModel
) -> Tensor:
    """E_{prefixes of μ} Σ_t KL_t."""
    log_dists, prior, _, drawn = _conditionals(policy, problem, behaviour)
    return (drawn * logspace.kl_divergence(log_dists.detach(), prior).sum(-1)).sum().reshape(1)


def of_kept_terms(k: int, *, bucket: bool) -> Prediction:
    """E_π Σ_t of π log π/q over the k most probable tokens, with the others in one more term if
    `bucket`; a loop over positions.
    """

    def predicted(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
        log_dists, prior, frozen, _ = _conditionals(policy, problem, behaviour)
        # plain numbers and a sort, so that nothing is shared with the estimators
        columns = frozen.tolist(), log_dists.exp().tolist(), prior.exp().tolist()
        total = 0.0
        for probability, rows, prior_rows in zip(*columns, strict=True):
            for row, prior_row in zip(rows, prior_rows, strict=True):
                pairs = sorted(zip(row, prior_row, strict=True), key=lambda pair: -pair[0])
                kept, tail = pairs[:k], pairs[k:]
                if bucket:
                    kept = [*kept, (math.fsum(p for p, _ in tail), math.fsum(q for _, q in tail))]
                total += probability * math.fsum(p * math.log(p / q) for p, q in kept if p > 0)
        return torch.tensor([total], dtype=torch.float64)

    return predicted


def of_ratio_of_sums(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """E[(u + u')/(L + L')] of two samples."""
    pi, log_ratio, length = _sampled(policy, problem, behaviour)
    pairs = (log_ratio[:, None] + log_ratio) / (length[:, None] + length)
    return (pi[:, None] * pi * pairs).sum().reshape(1)


def of_ratios(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """The mean E[u/L] of the log-ratio a token."""
    pi, log_ratio, length = _sampled(policy, problem, behaviour)
    return (pi @ (log_ratio / length)).reshape(1)


def of_fixed_length(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """The sequence KL over the fixed length, KL(π‖q)/T."""
    pi, log_ratio, _ = _sampled(policy, problem, behaviour)
    return (pi @ log_ratio).reshape(1) / problem.space.max_length


def of_evidence(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """The evidence Z."""
    return _posterior(policy, problem, behaviour)[1].exp().reshape(1)


def of_log_importance_sampling(
    policy: LanguageModel, problem: Problem, behaviour: LanguageModel
) -> Tensor:
    """E log ½(w + w') of two samples, w = q e^{r/λ}/π."""
    log_star, log_evidence, log_pi, _ = _posterior(policy, problem, behaviour)
    log_weight = log_star + log_evidence - log_pi
    pairs = torch.logaddexp(log_weight[:, None], log_weight) - math.log(2)
    return (log_pi.exp()[:, None] * log_pi.exp() * pairs).sum().reshape(1)


def of_lower_bound(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """log Z − KL(π‖π*)."""
    log_star, log_evidence, log_pi, _ = _posterior(policy, problem, behaviour)
    return (log_evidence - logspace.kl_divergence(log_pi, log_star)).reshape(1)


def of_upper_bound(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """log Z + KL(π*‖π)."""
    log_star, log_evidence, log_pi, _ = _posterior(policy, problem, behaviour)
    return (log_evidence + logspace.kl_divergence(log_star, log_pi)).reshape(1)


def of_inverse_evidence(
    policy: LanguageModel, problem: Problem, behaviour: LanguageModel
) -> Tensor:
    """The reciprocal 1/Z of the evidence."""
    return 1 / of_evidence(policy, problem, behaviour)


def of_self_normalised(policy: LanguageModel, problem: Problem, behaviour: LanguageModel) -> Tensor:
    """E[(w r + w' r')/(w + w')] of two samples."""
    log_star, _, log_pi, rewards = _posterior(policy, problem, behaviour)
    weight = (log_star - log_pi).exp()  # up to Z, which cancels
    pairs = ((weight * rewards)[:, None] + weight * rewards) / (weight[:, None] + weight)
    return (log_pi.exp()[:, None] * log_pi.exp() * pairs).sum().reshape(1)


# --- the support ----------------------------------------------------------------------------------


def _whole(
    policy: LanguageModel,
    problem: Problem,
    behaviour: LanguageModel,
    *,
    distributions: bool = False,
) -> Batch:
    """Every sequence of the policy once; `log_probs` with gradient, `behaviour_log_probs` of μ."""
    tokens = enumerate_support(policy, prompt=problem.prompt).tokens
    batch = score_batch(policy, [problem], [tokens], distributions=distributions)
    return dataclasses.replace(
        batch, behaviour_log_probs=token_log_probs(behaviour, tokens, problem.prompt).detach()
    )


def _conditionals(
    policy: LanguageModel, problem: Problem, behaviour: LanguageModel
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distributions [S,T,V] of π (with gradient) and q, and the frozen probabilities [S] of the
    sequences under π and μ.
    """
    whole = _whole(policy, problem, behaviour, distributions=True)
    assert whole.prior_log_dists is not None
    return (
        whole.log_dists,
        whole.prior_log_dists,
        whole.log_probs.detach().sum(-1).exp(),
        whole.behaviour_log_probs.sum(-1).exp(),
    )


def _sampled(
    policy: LanguageModel, problem: Problem, behaviour: LanguageModel
) -> tuple[Tensor, Tensor, Tensor]:
    """π, u and L of each sequence [S]."""
    whole = _whole(policy, problem, behaviour)
    log_pi = whole.log_probs.detach().sum(-1)
    return log_pi.exp(), log_pi - whole.prior_log_probs.sum(-1), whole.live.sum(-1).double()


def _posterior(
    policy: LanguageModel, problem: Problem, behaviour: LanguageModel
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log π* [S], log Z [], log π [S], r [S], where π has all of q's support."""
    whole = _whole(policy, problem, behaviour)
    tilted = whole.prior_log_probs.sum(-1) + whole.rewards.sum(-1) / problem.kl_coef
    return (
        logspace.log_normalize(tilted),
        logspace.logsumexp(tilted),
        whole.log_probs.detach().sum(-1),
        whole.rewards.sum(-1),
    )


def _of_pairs(
    policy: LanguageModel,
    problem: Problem,
    behaviour: LanguageModel,
    advantage: Callable[[Tensor], Tensor],
    share: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """−E_{y,y'}[A(r − r') c(L, L') s(y)], for A odd and c of the two lengths."""
    whole = _whole(policy, problem, behaviour)
    log_pi, rewards = whole.log_probs.sum(-1), whole.rewards.sum(-1)
    length = whole.live.sum(-1).double()
    pi = log_pi.detach().exp()
    # [S,S]: the first of a pair down, the second across
    advantages = advantage(rewards[:, None] - rewards)
    shares = share(length[:, None], length[None])
    weight = pi[:, None] * pi * advantages * shares
    # the two of a pair are exchangeable, so their mean is that of the first
    return _slope(-(weight.sum(1) * log_pi).sum(), policy)


def _ratio(whole: Batch) -> Tensor:
    """ρ_t = π/μ [S,T] without gradient."""
    return torch.exp(whole.log_probs.detach() - whole.behaviour_log_probs)


def _of_unclipped(
    whole: Batch,
    ratio: Tensor,
    gained: Tensor,
    lost: Tensor,
    policy: LanguageModel,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """−Σ ρ_t (gained + lost) s_t, advantages above 0 with their weights where ρ_t < 1 + high, those
    below where ρ_t > 1 − low: elsewhere the minimum is the clip's constant.
    """
    # a gain is clipped from above and a loss from below only: min takes the smaller of both
    kept = gained * (ratio < 1 + high) + lost * (ratio > 1 - low)
    return _slope(-(ratio * kept * whole.log_probs).sum(), policy)


def _of_tokens(whole: Batch, slopes: Tensor, policy: LanguageModel) -> Tensor:
    """E_π[Σ_t g_t s_t] for g [S,T] without gradient."""
    pi = whole.log_probs.detach().sum(-1).exp()
    return _slope((pi * (slopes * whole.log_probs).sum(-1)).sum(), policy)


def _slope(value: Tensor, policy: LanguageModel) -> Tensor:
    """The gradient of a scalar by the policy's trainable parameters, in their order: [P]."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    # a parameter that the value does not touch counts 0
    gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
    return torch.cat([gradient.reshape(-1).double() for gradient in gradients])
