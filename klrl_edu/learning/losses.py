"""Losses, one flat function a method: each takes a Batch and returns a scalar to minimise, in
reward units.

    J(π) = E_π[r − λu],    u = log π/q,    ∇J = E_π[(r − λu) ∇log π] = −λ ∇KL(π‖π*)              (1)
    ρ = π/μ,    L = −E_μ[min(ρA, clip(ρ, 1 − ε, 1 + ε) A)],    ∇L = −E_π[A ∇log π] at π = μ      (2)

Where samples come from the policy itself (ρ = 1, as in the first step on a batch) clipping does
nothing, and a method's expected gradient is decided by its advantage, its mean over tokens and the
place of its KL; that is what the docstrings state. N sequences, T tokens, L_i live tokens of
sequence i, G sequences a group (prompt), μ the behaviour policy that drew them. Williams (1992);
Schulman et al. (2017); Kool et al. (2019); Ahmadian et al. (2024); Shao et al. (2024).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError, UnsupportedPolicyError
from klrl_edu.core.validation import any_known, check_number, check_some
from klrl_edu.estimators.advantages import (
    centred,
    gae,
    leave_one_out_mean,
    population_z_score,
    sample_z_score,
)
from klrl_edu.estimators.aggregation import (
    fixed_length,
    seq_mean_token_mean,
    token_mean,
)
from klrl_edu.estimators.kl_values import k3
from klrl_edu.learning.batches import Batch, check_complete, needs


@needs("support")
def exact(batch: Batch) -> Tensor:
    """−J(π), exactly: its gradient is −∇J by autograd, without sampling.

    Args:
        batch: every supported sequence once a problem (`train` and the audit give it that),
            `log_probs` [N,T] with gradient.

    Returns:
        −J averaged over the problems, a scalar in reward units.

    Raises:
        InputError: the batch holds drawn sequences; give it `sources.support(problem)`.
        UnsupportedPolicyError: a sequence that π gives has reward −inf or no prior mass.

    Source: (1).
    """
    check_complete(batch, "losses.exact")
    log_prob = batch.log_probs.sum(-1)
    reward = batch.rewards.sum(-1)
    log_ratio = log_prob - batch.prior_log_probs.sum(-1)  # u [N], nats
    _refuse_undefined(reward - batch.kl_coef * log_ratio, batch, given=log_prob > -math.inf)
    # a sequence that π never gives counts 0
    objective = logspace.expectation(log_prob, reward - batch.kl_coef * log_ratio)
    # the sum runs over all problems, J is their mean
    return -objective / (batch.group.max() + 1)


# --- REINFORCE and its baselines, with the KL in the reward ---------------------------------------


def reinforce(batch: Batch, baseline: float | Tensor = 0.0) -> Tensor:
    """REINFORCE with the KL penalty in the reward: unbiased for −∇J with any constant baseline.

    Args:
        batch: `log_probs` [N,T] with gradient, `rewards` [N,T].
        baseline: b in reward units, a number or [N]; must not depend on the sequence that it is
            subtracted from.

    Returns:
        −mean (r − λu − b) log π, a scalar in reward units; only its gradient is meant.

    Raises:
        InputError: a baseline that is not a finite number.
        UnsupportedPolicyError: as `penalised_reward`.

    Source: Williams (1992); (1).
    """
    if not isinstance(baseline, Tensor):
        baseline = check_number(baseline, "baseline", "a finite number", math.isfinite)
    return -check_some((penalised_reward(batch) - baseline) * batch.log_probs.sum(-1)).mean()


def rloo(batch: Batch) -> Tensor:
    """REINFORCE with a leave-one-out baseline and the KL penalty in the reward: unbiased for −∇J.

    Args:
        batch: `log_probs` [N,T] with gradient (nats), `rewards` [N,T]; `group` [N] names each
            sequence's prompt, at least two sequences a group.

    Returns:
        −mean (r − λu − leave-one-out mean) log π, a scalar in reward units. Its variance vanishes
        at π = π*, where r − λu = λ log Z.

    Raises:
        InputError: a group holds one sequence, which leaves nothing to average.
        UnsupportedPolicyError: as `penalised_reward`.

    Source: Kool et al. (2019); Ahmadian et al. (2024), eq. 8.
    """
    reward = penalised_reward(batch)
    # the mean of the others does not depend on y_i, so it shifts no expectation
    advantage = reward - leave_one_out_mean(reward, batch.group)
    return -check_some(advantage * batch.log_probs.sum(-1)).mean()


def group_mean(batch: Batch) -> Tensor:
    """REINFORCE minus the mean of the whole group: its gradient expects −(G − 1)/G · ∇J.

    The mean holds the sequence itself, which the factor comes from.

    Args:
        batch: as for `rloo`; at G = 1 the loss is 0.

    Returns:
        −mean (r − λu − mean) log π, a scalar in reward units: (G − 1)/G times `rloo`, sample by
        sample.

    Raises:
        UnsupportedPolicyError: as `penalised_reward`.
    """
    advantage = centred(penalised_reward(batch), batch.group)
    return -check_some(advantage * batch.log_probs.sum(-1)).mean()


def z_score(batch: Batch) -> Tensor:
    """REINFORCE on the reward's z-score in its group (population std, no ε), without KL.

    GRPO's gradient in its simplest form.

    Args:
        batch: as for `rloo`; λ is not used.

    Returns:
        −mean A log π with A = (r − mean)/std, a scalar. At G = 2, A = sign(r − r'): it follows the
        probability of beating another sample. For rewards 0 and 1: E_{k~Bin(G,p)}[√(k/G (1 − k/G))]
        ∇p/(p(1 − p)), p = E_π[r].

    Raises:
        InputError: a group of one, or a reward that is not finite.
    """
    advantage = population_z_score(batch.rewards.sum(-1), batch.group)
    return -check_some(advantage * batch.log_probs.sum(-1)).mean()


# --- clipped ratios -------------------------------------------------------------------------------


def ppo_clip(
    batch: Batch, values: Tensor | float = 0.0, *, clip: float = 0.2, decay: float = 1.0
) -> Tensor:
    """PPO with the KL penalty in each token's reward and given values.

    Unbiased for −∇J on-policy with decay = 1, whatever the values.

    Args:
        batch: `log_probs` [N,T] with gradient, `behaviour_log_probs` and `rewards` [N,T].
        values: V(y_<t) [N,T] in reward units, or a number; with decay < 1 the gradient is biased
            unless they are exact.
        clip: ε ≥ 0 of (2); inf clips nothing.
        decay: the λ of GAE; γ is 1.

    Returns:
        −mean Σ_t min(ρ_t A_t, clip(ρ_t) A_t), a scalar in reward units. The penalty λ log μ/q is
        fixed when the sequences are drawn. Off-policy, or after the first step on a batch, ρ_t
        corrects the token and not its prefix, and clipping adds its own bias.

    Raises:
        InputError: a clip below 0, a decay outside [0, 1], or a value that is not a finite number.
        UnsupportedPolicyError: a reward of −inf, or a sequence without prior mass.

    Source: Schulman et al. (2017), eq. 7; Ziegler et al. (2019) for the reward.
    """
    if not isinstance(values, Tensor):
        values = check_number(values, "values", "finite", math.isfinite)
    # by μ, not π: part of the reward, so it must carry no gradient
    penalty = batch.kl_coef.unsqueeze(-1) * (batch.behaviour_log_probs - batch.prior_log_probs)
    rewards = batch.rewards - penalty
    _refuse_undefined(rewards.sum(-1), batch)
    advantage = gae(
        rewards,
        torch.as_tensor(values, dtype=rewards.dtype).expand_as(rewards),
        batch.live,
        decay=decay,
    )
    ratio = torch.exp(batch.log_probs - batch.behaviour_log_probs)
    # a sum over tokens: a mean of each text's own would tilt towards short ones
    return -check_some(_clipped(ratio, advantage, clip=clip).sum(-1)).mean()


def grpo(batch: Batch, *, clip: float = 0.2, epsilon: float = 1e-4) -> Tensor:
    """GRPO as published and as TRL's loss_type="grpo".

    Z-scored reward, per-token clipping, mean over each sequence's tokens, k3 in the loss.

    Args:
        batch: `log_probs` [N,T] with gradient, `prior_log_probs`, `behaviour_log_probs`, `rewards`
            [N,T], `live`, `group`, `kl_coef`.
        clip: ε ≥ 0 of (2); inf clips nothing.
        epsilon: added to the sample std (TRL 1e-4, verl 1e-6).

    Returns:
        −mean_i (1/L_i) Σ_t [min(ρ_t A_i, clip(ρ_t) A_i) − λ k3(u_t)], a scalar. On-policy it
        follows −E[A s/L] of `grpo_without_kl` plus λ E_π[(1/L) Σ_t (1 − q_t/π_t) s_t]: at one
        length λ/T times the per-token *forward* ∇KL(q_t‖π_t), at several not even that, as L
        depends on the tokens. It is not 0 at π*.

    Raises:
        InputError: a group of one, a reward that is not finite, or a clip or epsilon below 0.
        UnsupportedPolicyError: a sequence without prior mass.

    Source: Shao et al. (2024), eq. 3 and 4.
    """
    advantage = sample_z_score(batch.rewards.sum(-1), batch.group, epsilon).unsqueeze(-1)
    ratio = torch.exp(batch.log_probs - batch.behaviour_log_probs)
    _refuse_undefined(batch.prior_log_probs.sum(-1), batch)  # λ k3 would be inf, and NaN at λ = 0
    # differentiated through log π_t as libraries do, hence the forward gradient
    penalty = batch.kl_coef.unsqueeze(-1) * k3(batch.log_probs - batch.prior_log_probs)
    return -seq_mean_token_mean(_clipped(ratio, advantage, clip=clip) - penalty, batch.live)


def grpo_without_kl(batch: Batch, *, clip: float = 0.2, epsilon: float = 1e-4) -> Tensor:
    """`grpo` with no KL at all, as most recipes for verifiable rewards run it.

    Args:
        batch, clip, epsilon: as for `grpo`; λ and the prior are not used.

    Returns:
        −mean_i (1/L_i) Σ_t min(ρ_t A_i, clip(ρ_t) A_i), a scalar. On-policy it follows −E[A s/L]:
        at one length 1/T of that of `z_score` times √((G − 1)/G) and a little less for ε, otherwise
        tilted towards short answers.

    Raises:
        InputError: a group of one, a reward that is not finite, or a clip or epsilon below 0.
    """
    advantage = sample_z_score(batch.rewards.sum(-1), batch.group, epsilon).unsqueeze(-1)
    ratio = torch.exp(batch.log_probs - batch.behaviour_log_probs)
    return -seq_mean_token_mean(_clipped(ratio, advantage, clip=clip), batch.live)


def dr_grpo(batch: Batch, *, clip: float = 0.2) -> Tensor:
    """GRPO done right: the reward minus the group's mean, no std, and a fixed length.

    The expected gradient on-policy is −(G − 1)/(GT) · ∇E[r].

    Args:
        batch: as for `grpo`; λ and the prior are not used, so λ = 0 is the objective.
        clip: ε ≥ 0 of (2); inf clips nothing.

    Returns:
        −(1/NT) Σ_i Σ_t min(ρ_t A_i, clip(ρ_t) A_i), a scalar in reward units a token.

    Raises:
        InputError: a reward that is not finite, or a clip below 0.

    Source: Liu et al. (2025).
    """
    advantage = centred(batch.rewards.sum(-1), batch.group).unsqueeze(-1)
    ratio = torch.exp(batch.log_probs - batch.behaviour_log_probs)
    # by T, one number for all: an L_i each would weigh texts by their length
    return -fixed_length(_clipped(ratio, advantage, clip=clip), batch.live)


def dapo(
    batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.28, epsilon: float = 1e-4
) -> Tensor:
    """DAPO's loss: GRPO without KL, with a higher upper clip and the mean over the batch's tokens.

    Its dynamic sampling is the sampler's.

    Args:
        batch: as for `grpo`; λ and the prior are not used.
        clip_low, clip_high: the ratio is held in [1 − clip_low, 1 + clip_high].
        epsilon: added to the sample std.

    Returns:
        −Σ_i Σ_t min(ρ_t A_i, clip(ρ_t) A_i)/Σ_i L_i, a scalar; a ratio of sums, so not a mean over
        sequences where lengths vary.

    Raises:
        InputError: a group of one, a reward that is not finite, or a clip or epsilon below 0.

    Source: Yu et al. (2025).
    """
    advantage = sample_z_score(batch.rewards.sum(-1), batch.group, epsilon).unsqueeze(-1)
    ratio = torch.exp(batch.log_probs - batch.behaviour_log_probs)
    return -token_mean(
        _clipped(ratio, advantage, clip_low=clip_low, clip_high=clip_high), batch.live
    )


def gspo(
    batch: Batch, *, clip_low: float = 3e-4, clip_high: float = 4e-4, epsilon: float = 1e-4
) -> Tensor:
    """GSPO: one ratio a sequence, the geometric mean of its tokens' ratios, clipped as a whole.

    Args:
        batch: as for `grpo`; λ and the prior are not used.
        clip_low, clip_high: the ratio is held in [1 − clip_low, 1 + clip_high].
        epsilon: added to the sample std.

    Returns:
        −mean_i min(s_i A_i, clip(s_i) A_i), s_i = ρ_i^{1/L_i}, a scalar. On-policy its gradient is
        that of `grpo_without_kl`, sample by sample. s is no density ratio, so off-policy it
        corrects for μ only in part.

    Raises:
        InputError: a group of one, a reward that is not finite, or a clip or epsilon below 0.

    Source: Zheng et al. (2025), eq. 5 to 7.
    """
    advantage = sample_z_score(batch.rewards.sum(-1), batch.group, epsilon)
    # log-ratios are 0 after the first EOS, so sum/L is the mean over live tokens
    ratio = torch.exp((batch.log_probs - batch.behaviour_log_probs).sum(-1) / batch.live.sum(-1))
    return -check_some(_clipped(ratio, advantage, clip_low=clip_low, clip_high=clip_high)).mean()


def cispo(batch: Batch, *, clip_high: float = 4.0, epsilon: float = 1e-4) -> Tensor:
    """CISPO: REINFORCE with the token ratio as a weight, clipped from above and without gradient.

    So no token is dropped.

    Args:
        batch: as for `grpo`; λ and the prior are not used.
        clip_high: the weight is at most 1 + clip_high.
        epsilon: added to the sample std.

    Returns:
        −Σ_i Σ_t sg(min(ρ_t, 1 + clip_high)) A_i log π_t/Σ_i L_i, a scalar. On-policy its gradient
        is that of `dapo`, sample by sample.

    Raises:
        InputError: a group of one, a reward that is not finite, or a clip or epsilon below 0.

    Source: MiniMax-M1 (2025).
    """
    advantage = sample_z_score(batch.rewards.sum(-1), batch.group, epsilon).unsqueeze(-1)
    clip_high = _checked_clip(clip_high, "clip_high")
    ratio = torch.exp(batch.log_probs - batch.behaviour_log_probs)
    # detached: the gradient passes by log π_t, also where the weight is clipped
    weight = ratio.detach().clamp(max=1 + clip_high)
    return -token_mean(weight * advantage * batch.log_probs, batch.live)


# --- distribution matching ------------------------------------------------------------------------


def f_dpg(
    batch: Batch, pseudo_reward: Callable[[Tensor], Tensor], log_evidence: float | Tensor
) -> Tensor:
    """REINFORCE on a pseudo-reward −f'(π/π*): unbiased for ∇D_f(π‖π*), by samples of π.

    Args:
        batch: `log_probs` [N,T] with gradient, `prior_log_probs`, `rewards` [N,T]; λ > 0.
        pseudo_reward: log π/π* [N] -> [N], one of `advantages.fdpg_…`.
        log_evidence: log Z in nats, exact or an estimate, for log π* = log q + r/λ − log Z; the
            reverse KL alone does not need it.

    Returns:
        −mean sg(−f') log π, a scalar.

    Raises:
        InputError: λ = 0, where π* is no tilt of q, or a log_evidence that is not a finite number.

    Source: Go et al. (2023), theorem 1.
    """
    if any_known(batch.kl_coef == 0):
        raise InputError("kl_coef = 0: f_dpg needs log π* = log q + r/λ − log Z; give λ above 0.")
    if not isinstance(log_evidence, Tensor):
        log_evidence = check_number(log_evidence, "log_evidence", "a finite number", math.isfinite)
    log_prior, reward = batch.prior_log_probs.sum(-1), batch.rewards.sum(-1)
    log_target = log_prior + reward / batch.kl_coef - log_evidence
    log_prob = batch.log_probs.sum(-1)
    # −f' only weighs the score: ∇D_f = E_π[f'(π/π*) ∇log π] has no term of f''
    return -check_some(pseudo_reward(log_prob.detach() - log_target) * log_prob).mean()


def penalised_reward(batch: Batch) -> Tensor:
    """r − λu [N] in reward units, without gradient.

    Raises:
        UnsupportedPolicyError: a reward of −inf, or a sequence without prior mass, where the
            gradient of J is undefined at every λ.
    """
    # detached, as (r − λu) is a weight: E_π[∇u] = 0, but E_π[log π ∇u] need not be
    log_ratio = batch.log_probs.detach().sum(-1) - batch.prior_log_probs.sum(-1)  # u [N], nats
    reward = batch.rewards.sum(-1) - batch.kl_coef * log_ratio
    _refuse_undefined(reward, batch)
    return reward


def _refuse_undefined(reward: Tensor, batch: Batch, given: Tensor | None = None) -> None:
    """Refuses a batch in which r − λu [N] is not finite; with `given` [N] only where that holds."""
    bad = ~torch.isfinite(reward)
    bad = bad if given is None else bad & given
    if not any_known(bad):
        return
    i = int(bad.nonzero()[0])
    fields = {"reward": "rewards", "log q": "prior_log_probs", "log π": "log_probs"}
    numbers = {word: float(getattr(batch, name)[i].detach().sum()) for word, name in fields.items()}
    given_numbers = ", ".join(f"{word} {number:g}" for word, number in numbers.items())
    raise UnsupportedPolicyError(
        f"sequence {i} of the batch has {given_numbers} and kl_coef {float(batch.kl_coef[i]):g}, so"
        " r − λu is not finite and J has no gradient. Where a reward or log q is -inf, keep the"
        " policy off there: restrict_to_support(policy, feasible_prior(problem))."
    )


def _checked_clip(clip: float, name: str) -> float:
    """How far a ratio may lie from 1."""
    return check_number(clip, name, "at least 0 (inf: no clipping)", lambda x: x >= 0)


def _clipped(ratio: Tensor, advantage: Tensor, **clips: float) -> Tensor:
    """min(ρA, clip(ρ, 1 − low, 1 + high) A) of (2), by `clip` or by `clip_low` and `clip_high`."""
    bounds = [_checked_clip(value, name) for name, value in clips.items()]
    # the smaller one: a ratio outside that makes things worse is still pulled back
    return torch.minimum(ratio * advantage, ratio.clamp(1 - bounds[0], 1 + bounds[-1]) * advantage)
