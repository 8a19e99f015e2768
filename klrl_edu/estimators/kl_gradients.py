"""Surrogates whose gradient estimates that of a KL: scalars of which only the gradient is meant.

    ∇E_π[k] = E_π[k s] + E_π[∇k],    s = ∇log π(y) = Σ_t s_t                                     (1)
    E_π[u s] = ∇KL(π‖q),   E_π[∇u] = 0;    E_π[∇k2] = ∇KL(π‖q);    E_π[∇k3] = ∇KL(q‖π),
    E_π[∇k1] = 0                                                                                 (2)
    ∇KL(π‖q) = E_π Σ_t s_t Σ_{t'≥t} u_t'  = E_π Σ_t [∇KL_t + s_t Σ_{t'>t} KL_t']                 (3)

(1) is the product rule; (2) follows from E_π[s] = 0 and E_π[w s] = E_q[∇log π], w = q/π; (3) from
E[u_t' s_t] = 0 for t' < t. In the reward k counts as a number and gives the first half of (1); in
the loss it is differentiated and gives the second. *Per token* KL means E_π Σ_t ∇KL_t with prefixes
held fixed: it misses how a token changes later KLs, the second term of (3).

`log_probs`, `prior_log_probs`, `behaviour_log_probs`: log π, log q, log μ of the sampled tokens
[N,T] in nats, 0 after the first EOS; μ drew the sequences, and elsewhere π did. `log_dists`,
`prior_log_dists`: full next-token distributions [N,T,V]. u_t = log π/q of a token and u = Σ_t u_t,
ρ_t = π/μ of a token, ρ_≤t and ρ their products. N sequences, T tokens, V vocabulary. Everything is
averaged over N, which is at least 1, and summed over T; other means over tokens are in
`aggregation`. Schulman (2020);
Tang and Munos (2025); Amini et al. (2025).
"""

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.validation import check_some
from klrl_edu.estimators.advantages import to_go
from klrl_edu.estimators.kl_values import clamped_k3, k2, k3, per_token_kl

# --- in the reward: the first half of (1) ---------------------------------------------------------


@takes_numbers
def reward_k1(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean sg(u) log π, two [N,T] -> scalar: unbiased for ∇KL(π‖q), REINFORCE on −u.

    Variance E[u²‖s‖²] − ‖∇KL‖², over N.

    Source: Ziegler et al. (2019), eq. 2, where u stands in the reward of PPO; (2).
    """
    log_ratio = (log_probs.detach() - prior_log_probs).sum(-1)
    return check_some(log_ratio * log_probs.sum(-1)).mean()


@takes_numbers
def reward_k1_to_go(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean Σ_t sg(Σ_{t'≥t} u_t') log π_t, two [N,T] -> scalar: unbiased for ∇KL(π‖q) by (3).

    A token is not charged for what came before it.
    """
    penalty = to_go(log_probs.detach() - prior_log_probs)
    return check_some((penalty * log_probs).sum(-1)).mean()


@takes_numbers
def reward_rao_blackwell_to_go(
    log_probs: Tensor, prior_log_probs: Tensor, log_dists: Tensor, prior_log_dists: Tensor
) -> Tensor:
    """mean Σ_t sg(u_t + Σ_{t'>t} KL_t') log π_t, [N,T] and [N,T,V] twice -> scalar.

    Unbiased for ∇KL(π‖q) by (3). The sampled u_t is kept for the token itself: KL_t depends on the
    prefix alone, so E[KL_t s_t] = 0 and it would carry no signal there.
    """
    ahead = to_go(per_token_kl(log_dists, prior_log_dists).detach())  # Σ_{t'≥t} KL_t'
    later = torch.cat([ahead[..., 1:], torch.zeros_like(ahead[..., :1])], -1)  # without t itself
    penalty = log_probs.detach() - prior_log_probs + later
    return check_some((penalty * log_probs).sum(-1)).mean()


@takes_numbers
def reward_full_kl(log_probs: Tensor, log_dists: Tensor, prior_log_dists: Tensor) -> Tensor:
    """mean sg(Σ_t KL_t) log π, [N,T] and [N,T,V] twice -> scalar: the exact KL_t in the reward.

    A trap: it follows ∇KL(π‖q) − E_π Σ_t ∇KL_t, the second term of (3) alone, which is 0 for
    sequences of one token.
    """
    divergence = per_token_kl(log_dists, prior_log_dists).detach().sum(-1)
    return check_some(divergence * log_probs.sum(-1)).mean()


@takes_numbers
def reward_k3(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean sg(k3(u)) log π, two [N,T] -> scalar: follows ∇KL(π‖q) − ∇KL(q‖π).

    The second comes from the term w of k3, as E_π[w s] = −∇KL(q‖π).
    """
    value = k3((log_probs.detach() - prior_log_probs).sum(-1))
    return check_some(value * log_probs.sum(-1)).mean()


@takes_numbers
def reward_k3_token(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean sg(Σ_t k3(u_t)) log π, two [N,T] -> scalar: follows ∇KL(π‖q) − E_π Σ_t ∇KL(q_t‖π_t)."""
    value = k3(log_probs.detach() - prior_log_probs).sum(-1)
    return check_some(value * log_probs.sum(-1)).mean()


# --- in the loss: the second half of (1) ----------------------------------------------------------


@takes_numbers
def loss_k1(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean u, two [N,T] -> scalar: its gradient s has expectation 0.

    Pure noise, of variance E‖s‖² over N. Per token it is the same.
    """
    return check_some((log_probs - prior_log_probs).sum(-1)).mean()


@takes_numbers
def loss_k2(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean u²/2 of the sequence, two [N,T] -> scalar: unbiased for ∇KL(π‖q).

    The gradient u s is that of `reward_k1`, sample by sample.
    """
    return check_some(k2((log_probs - prior_log_probs).sum(-1))).mean()


@takes_numbers
def loss_k3(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean k3(u) of the sequence, two [N,T] -> scalar: unbiased for ∇KL(q‖π), the *forward* KL.

    The gradient is (1 − w)s.
    """
    return check_some(k3((log_probs - prior_log_probs).sum(-1))).mean()


@takes_numbers
def loss_absolute_k1(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean |u| of the sequence, two [N,T] -> scalar: follows 2∇TV(π, q) = ∇Σ|π − q|.

    The gradient is sign(u) s.
    """
    return check_some((log_probs - prior_log_probs).sum(-1).abs()).mean()


@takes_numbers
def loss_k2_token(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean Σ_t u_t²/2, two [N,T] -> scalar: unbiased for the per-token E_π Σ_t ∇KL(π_t‖q_t).

    Prefixes are held fixed there. The gradient is Σ_t u_t s_t.
    """
    return check_some(k2(log_probs - prior_log_probs).sum(-1)).mean()


@takes_numbers
def loss_k3_token(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean Σ_t k3(u_t), two [N,T] -> scalar: unbiased for a per-token *forward* KL.

    That is E_π Σ_t ∇KL(q_t‖π_t), with prefixes held fixed. The KL term of GRPO: Shao et al. (2024),
    eq. 4.
    """
    return check_some(k3(log_probs - prior_log_probs).sum(-1)).mean()


@takes_numbers
def loss_absolute_k1_token(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean Σ_t |u_t|, two [N,T] -> scalar: follows 2 E_π Σ_t ∇TV(π_t, q_t), prefixes held fixed."""
    return check_some((log_probs - prior_log_probs).abs().sum(-1)).mean()


@takes_numbers
def loss_clamped_k3_token(
    log_probs: Tensor, prior_log_probs: Tensor, bound: float = 10.0
) -> Tensor:
    """mean Σ_t min(k3(u_t), b), two [N,T] -> scalar: `loss_k3_token` with clamped values.

    Follows E_π Σ_t ∇KL(q_t‖π_t) without the tokens with k3 > b, whose pull back is lost.
    """
    return check_some(clamped_k3(log_probs - prior_log_probs, bound).sum(-1)).mean()


@takes_numbers
def loss_full_kl(log_dists: Tensor, prior_log_dists: Tensor) -> Tensor:
    """mean Σ_t KL(π_t‖q_t), two [N,T,V] -> scalar: unbiased for the per-token reverse KL.

    That is E_π Σ_t ∇KL(π_t‖q_t), here with the noise of the prefixes only: each term is the
    expectation of that of `loss_k2_token` given the prefix (Rao–Blackwell).
    """
    return check_some(per_token_kl(log_dists, prior_log_dists).sum(-1)).mean()


@takes_numbers
def loss_full_forward_kl(log_dists: Tensor, prior_log_dists: Tensor) -> Tensor:
    """mean Σ_t KL(q_t‖π_t), two [N,T,V] -> scalar: unbiased for the per-token forward KL.

    That is E_π Σ_t ∇KL(q_t‖π_t), with prefixes held fixed.
    """
    return check_some(logspace.kl_divergence(prior_log_dists, log_dists).sum(-1)).mean()


# --- in both: all of (1) --------------------------------------------------------------------------


@takes_numbers
def reward_and_loss_k1(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean sg(u) log π + u, two [N,T] -> scalar: unbiased for ∇KL(π‖q).

    The second term adds noise only: the gradient is (u + 1)s.
    """
    return reward_k1(log_probs, prior_log_probs) + loss_k1(log_probs, prior_log_probs)


@takes_numbers
def reward_and_loss_k2(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean sg(u²/2) log π + u²/2, two [N,T] -> scalar: follows ∇E_π[u²/2], which is not ∇KL.

    k2's value is biased, and now its gradient is too.
    """
    value = k2((log_probs - prior_log_probs).sum(-1))
    return check_some(value.detach() * log_probs.sum(-1) + value).mean()


@takes_numbers
def reward_and_loss_k3(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean sg(k3(u)) log π + k3(u), two [N,T] -> scalar: unbiased for ∇KL(π‖q).

    The gradient is (u + q/π − q/π)s = u s, that of `reward_k1`.
    """
    value = k3((log_probs - prior_log_probs).sum(-1))
    return check_some(value.detach() * log_probs.sum(-1) + value).mean()


@takes_numbers
def reward_and_loss_k3_token(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean Σ_t [sg(Σ_{t'≥t} k3(u_t')) log π_t + k3(u_t)], two [N,T] -> scalar.

    Unbiased for ∇KL(π‖q), as E[k3(u_t)|y_<t] = KL_t.
    """
    values = k3(log_probs - prior_log_probs)
    return check_some((to_go(values.detach()) * log_probs + values).sum(-1)).mean()


@takes_numbers
def rao_blackwell_to_go(log_probs: Tensor, log_dists: Tensor, prior_log_dists: Tensor) -> Tensor:
    """mean Σ_t [KL_t + sg(Σ_{t'>t} KL_t') log π_t], [N,T] and [N,T,V] twice -> scalar.

    Unbiased for ∇KL(π‖q), the right side of (3). Source: Amini et al. (2025).
    """
    divergence = per_token_kl(log_dists, prior_log_dists)
    later = to_go(divergence.detach()) - divergence.detach()
    return check_some((divergence + later * log_probs).sum(-1)).mean()


# --- bias-corrected: a value in front, another gradient behind ------------------------------------


@takes_numbers
def straight_through_k2(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean Σ_t of k3(u_t) in value and u_t²/2 in gradient (verl's `k3+`), two [N,T] -> scalar.

    Unbiased for the per-token E_π Σ_t ∇KL(π_t‖q_t).
    """
    log_ratio = log_probs - prior_log_probs
    forward, backward = k3(log_ratio).detach(), k2(log_ratio)
    # what is added is 0 in value and has k2's gradient
    return check_some((forward + backward - backward.detach()).sum(-1)).mean()


@takes_numbers
def live_ratio_k3_token(
    log_probs: Tensor, prior_log_probs: Tensor, behaviour_log_probs: Tensor
) -> Tensor:
    """mean Σ_t ρ_t k3(u_t), ρ_t = π/μ with its gradient, three [N,T] -> scalar.

    On-policy unbiased for the per-token E_π Σ_t ∇KL(π_t‖q_t): the live ratio supplies the first
    half of (1) for each token, but not for the tokens that follow it. Off-policy the same over
    prefixes from μ. Given the prefix the gradient is ρ_t u_t s_t.
    Source: DeepSeek-V3.2 (2025), "unbiased KL estimate"; TRL's `use_bias_correction_kl`.
    """
    ratio = torch.exp(log_probs - behaviour_log_probs)
    return check_some((ratio * k3(log_probs - prior_log_probs)).sum(-1)).mean()


@takes_numbers
def live_ratio_k3_prefix(
    log_probs: Tensor, prior_log_probs: Tensor, behaviour_log_probs: Tensor
) -> Tensor:
    """mean Σ_t ρ_≤t k3(u_t) with the gradient of the cumulative ratio, three [N,T] -> scalar.

    Unbiased for ∇KL(π‖q), on- and off-policy. What `live_ratio_k3_token` leaves out is in the
    ratios of earlier tokens.
    """
    ratio = torch.exp((log_probs - behaviour_log_probs).cumsum(-1))
    return check_some((ratio * k3(log_probs - prior_log_probs)).sum(-1)).mean()


@takes_numbers
def live_ratio_k3(
    log_probs: Tensor, prior_log_probs: Tensor, behaviour_log_probs: Tensor
) -> Tensor:
    """mean ρ k3(u) of the sequence with the ratio's gradient, three [N,T] -> scalar.

    Unbiased for ∇KL(π‖q), on- and off-policy; the gradient is ρ u s.
    """
    ratio = torch.exp((log_probs - behaviour_log_probs).sum(-1))
    return check_some(ratio * k3((log_probs - prior_log_probs).sum(-1))).mean()


@takes_numbers
def detached_ratio_k3_token(
    log_probs: Tensor, prior_log_probs: Tensor, behaviour_log_probs: Tensor
) -> Tensor:
    """mean Σ_t sg(ρ_t) k3(u_t), three [N,T] -> scalar: on-policy a *forward* KL per token.

    Unbiased for E_π Σ_t ∇KL(q_t‖π_t). A detached ratio moves the samples from μ to π and no more;
    on-policy it is `loss_k3_token`. Off-policy the same over prefixes from μ.
    Source: NeMo-RL's `use_on_policy_kl_approximation`.
    """
    ratio = torch.exp(log_probs - behaviour_log_probs).detach()
    return check_some((ratio * k3(log_probs - prior_log_probs)).sum(-1)).mean()


@takes_numbers
def detached_ratio_k3(
    log_probs: Tensor, prior_log_probs: Tensor, behaviour_log_probs: Tensor
) -> Tensor:
    """mean sg(ρ) k3(u) of the sequence, three [N,T] -> scalar: unbiased for ∇KL(q‖π).

    That is the *forward* KL, on- and off-policy.
    """
    ratio = torch.exp((log_probs - behaviour_log_probs).sum(-1)).detach()
    return check_some(ratio * k3((log_probs - prior_log_probs).sum(-1))).mean()


# --- off-policy weights at each level -------------------------------------------------------------


@takes_numbers
def off_policy_unweighted(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """mean sg(u) log π on samples of μ, two [N,T] -> scalar: `reward_k1` as if they were π's.

    Follows E_μ[u s], which is ∇½E_μ[u²].
    """
    return reward_k1(log_probs, prior_log_probs)


@takes_numbers
def off_policy_token(
    log_probs: Tensor, prior_log_probs: Tensor, behaviour_log_probs: Tensor
) -> Tensor:
    """mean Σ_t sg(ρ_t u_t) log π_t, three [N,T] -> scalar: a per-token KL on μ's prefixes.

    Follows E_{prefixes of μ} Σ_t ∇KL(π_t‖q_t), on-policy the per-token reverse KL.
    """
    ratio = torch.exp(log_probs - behaviour_log_probs)
    penalty = (ratio * (log_probs - prior_log_probs)).detach()
    return check_some((penalty * log_probs).sum(-1)).mean()


@takes_numbers
def off_policy_prefix(
    log_probs: Tensor, prior_log_probs: Tensor, behaviour_log_probs: Tensor
) -> Tensor:
    """mean Σ_t sg(Σ_{t'≥t} ρ_≤t' u_t') log π_t, three [N,T] -> scalar: unbiased for ∇KL(π‖q).

    By (3), where π's support lies in μ's.
    """
    ratio = torch.exp((log_probs - behaviour_log_probs).cumsum(-1))  # ρ_≤t
    penalty = (ratio * (log_probs - prior_log_probs)).detach()
    return check_some((to_go(penalty) * log_probs).sum(-1)).mean()


@takes_numbers
def off_policy_sequence(
    log_probs: Tensor, prior_log_probs: Tensor, behaviour_log_probs: Tensor
) -> Tensor:
    """mean sg(ρ u) log π, three [N,T] -> scalar: unbiased for ∇KL(π‖q).

    Where π's support lies in μ's. Variance E_π[ρ u²‖s‖²] − ‖∇KL‖², over N.
    """
    ratio = torch.exp((log_probs - behaviour_log_probs).sum(-1))
    log_ratio = (log_probs - prior_log_probs).sum(-1)
    return check_some((ratio * log_ratio).detach() * log_probs.sum(-1)).mean()
