"""Estimators with one well-known fault each, the mean that the fault makes, and the twin without
it; and samplers likewise.

    u = log π/q,   R = r − λu,   s = ∇log π,   objective = ∇(−J) = −E[R s],
    reverse_kl = E[u s]                                                                          (1)

Expectations are over π; the mean is of the gradient of a loss on batches of B, or of a value. The
means are computed here from (1) by sums over the support, without the audit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.audit.cases import AuditCase
from klrl_edu.estimators import kl_values
from klrl_edu.estimators.advantages import centred
from klrl_edu.learning import losses
from klrl_edu.models.contract import enumerate_support, token_log_probs

# --- losses ---------------------------------------------------------------------------------------


def log_ratio(batch):
    return (batch.log_probs - batch.prior_log_probs).sum(-1)


def reinforce_reverse_kl(batch):
    """Sound: KL(π‖q) as a reward to pay; mean reverse_kl."""
    return (log_ratio(batch).detach() * batch.log_probs.sum(-1)).mean()


def self_including_mean(batch):
    """The baseline is the mean over the group, the sequence itself included: mean (B − 1)/B ·
    objective.
    """
    advantage = centred(losses.penalised_reward(batch), batch.group)
    return -(advantage * batch.log_probs.sum(-1)).mean()


def k1_as_a_loss(batch):
    """The mean log-ratio is differentiated: mean E[s] = 0 instead of reverse_kl."""
    return log_ratio(batch).mean()


def dropped_eos(batch):
    """The log-probability of the last live token, EOS, is masked out: mean −E[R Σ_{t<|y|} s_t], so
    that stopping is never learnt.
    """
    return -(
        losses.penalised_reward(batch) * (batch.log_probs * before_last(batch.live)).sum(-1)
    ).mean()


def before_last(live):
    """Live tokens but the last: [N,T] -> [N,T]."""
    return torch.nn.functional.pad(live[:, 1:], (0, 1), value=False)


def missing_detach(batch):
    """R keeps its gradient: mean objective + λ E[log π s]."""
    return -(
        (batch.rewards.sum(-1) - batch.kl_coef * log_ratio(batch)) * batch.log_probs.sum(-1)
    ).mean()


def swapped_ratio(batch):
    """π_old/π for π/π_old: on-policy mean −objective."""
    ratio = torch.exp(batch.behaviour_log_probs.sum(-1) - batch.log_probs.sum(-1))
    return -(losses.penalised_reward(batch) * ratio).mean()


def mean_over_tokens(batch):
    """The mean token log-probability for the sum: mean −E[R s/|y|]."""
    return -(losses.penalised_reward(batch) * batch.log_probs.sum(-1) / batch.live.sum(-1)).mean()


def dropped_kl_coef(batch):
    """λ is forgotten: mean −E[(r − u) s] = expected_reward + reverse_kl."""
    return -((batch.rewards.sum(-1) - log_ratio(batch).detach()) * batch.log_probs.sum(-1)).mean()


def log_variance(batch):
    """Sound: VarGrad, λ/2 times the sample variance of u − r/λ in each group; mean objective."""
    return mean_over_groups(batch, lambda gap, kl_coef: kl_coef / 2 * gap.var())


def n_for_n_minus_one(batch):
    """VarGrad with a variance over B: mean (B − 1)/B · objective."""
    return mean_over_groups(batch, lambda gap, kl_coef: kl_coef / 2 * gap.var(correction=0))


def mean_over_groups(batch, function):
    """Of function(u − r/λ [B], λ)."""
    gap = log_ratio(batch) - batch.rewards.sum(-1) / batch.kl_coef
    members = [(batch.group == group).nonzero()[:, 0] for group in batch.group.unique()]
    return torch.stack([function(gap[rows], batch.kl_coef[rows[0]]) for rows in members]).mean()


def reversed_kl(batch):
    """k3 is differentiated: mean forward_kl = −E[(q/π) s] instead of reverse_kl."""
    return kl_values.k3(log_ratio(batch)).mean()


def prior_omitted(batch):
    """An entropy bonus for the KL: mean −E[(r − λ log π) s]."""
    log_prob = batch.log_probs.sum(-1)
    return -((batch.rewards.sum(-1) - batch.kl_coef * log_prob.detach()) * log_prob).mean()


def summed_batch(batch):
    """A sum over the batch for the mean: mean MB · objective of M problems."""
    return batch.tokens.shape[0] * losses.rloo(batch)


def kl_left_out(batch):
    """The penalty is forgotten: mean −E[r s] = expected_reward."""
    return -(batch.rewards.sum(-1) * batch.log_probs.sum(-1)).mean()


def detached_score(batch):
    """R is differentiated and log π detached: mean λ E[log π s], which knows no reward."""
    return -(
        (batch.rewards.sum(-1) - batch.kl_coef * log_ratio(batch))
        * batch.log_probs.sum(-1).detach()
    ).mean()


def wrong_sign(batch):
    """Climbs what it should descend: mean −objective."""
    return -losses.rloo(batch)


# the next ones show only on large numbers, on long texts, or on several problems in one batch


def clamped(limit):
    """The log-ratio is clamped at ±`limit`: mean −E[(r − λ clamp(u)) s]."""

    def loss(batch):
        reward = batch.rewards.sum(-1) - batch.kl_coef * log_ratio(batch).detach().clamp(
            -limit, limit
        )
        return -(reward * batch.log_probs.sum(-1)).mean()

    loss.__name__, loss.__doc__ = f"log_ratios_clamped_at_{limit}", clamped.__doc__
    return loss


def rewards_clipped_at(limit):
    """The reward is clipped at ±`limit`: mean −E[(clip(r) − λu) s]."""

    def loss(batch):
        reward = batch.rewards.sum(-1).clamp(-limit, limit)
        reward = reward - batch.kl_coef * log_ratio(batch).detach()
        return -(reward * batch.log_probs.sum(-1)).mean()

    loss.__name__, loss.__doc__ = f"rewards_clipped_at_{limit}", rewards_clipped_at.__doc__
    return loss


def first_two_tokens(batch):
    """Tokens from the third on are cut off: mean −E[(r − λ(u_0 + u_1)) (s_0 + s_1)]."""
    log_prob, prior_log_prob = batch.log_probs[:, :2].sum(-1), batch.prior_log_probs[:, :2].sum(-1)
    reward = batch.rewards.sum(-1) - batch.kl_coef * (log_prob.detach() - prior_log_prob)
    return -(reward * log_prob).mean()


def kl_to_go_of(window):
    """KL-to-go that ends after `window` tokens: mean E[Σ_t (u_t + … + u_{t+window−1}) s_t], which
    leaves out what a token does to later ones.
    """

    def loss(batch):
        token = (batch.log_probs - batch.prior_log_probs).detach()
        return (ahead(token, window) * batch.log_probs).sum(-1).mean()

    loss.__name__, loss.__doc__ = f"kl_to_go_of_{window}_tokens", kl_to_go_of.__doc__
    return loss


def ahead(token, window):
    """u_t + … + u_{t+window−1} [N,T]."""
    padded = torch.nn.functional.pad(token, (0, window - 1))
    return sum(padded[:, k : k + token.shape[1]] for k in range(window))


def mean_of_all_groups(batch):
    """The groups are forgotten: less the mean of the whole batch, times B/(B − 1) for the sequence
    itself; with M problems the mean is (M − 1/B)/M · B/(B − 1) · objective.
    """
    size = int((batch.group == 0).sum())
    reward = losses.penalised_reward(batch)
    advantage = (reward - reward.mean()) * size / (size - 1)
    return -(advantage * batch.log_probs.sum(-1)).mean()


def one_kl_coef(batch):
    """The first problem's λ for all: mean −E[(r − λ_0 u) s]."""
    reward = batch.rewards.sum(-1) - batch.kl_coef[0] * log_ratio(batch).detach()
    return -(reward * batch.log_probs.sum(-1)).mean()


def variance_over_all_groups(batch):
    """VarGrad of the whole batch at once, with the first λ: mean λ_0 E[(u − r/λ) s]."""
    gap = log_ratio(batch) - batch.rewards.sum(-1) / batch.kl_coef
    return batch.kl_coef[0] / 2 * gap.var()


class Seen(NamedTuple):
    """What the mean of a fault on one problem is made of: the support's log-probabilities by token
    [S,T], rewards [S], λ; B, M, and λ of the first problem.
    """

    log_pi: Tensor
    log_q: Tensor
    live: Tensor
    reward: Tensor
    kl_coef: float
    batch_size: int
    problems: int
    first_kl_coef: float


@dataclass(frozen=True)
class Faulty:
    """A loss with a fault.

    Attributes:
        loss: what is wrong.
        target: what it was meant to follow.
        twin: the same without the fault.
        weight: (log π, log q, r, λ, |y|, B) -> w [S] such that the mean is E[w s].
        token_weight: in its place Seen -> w [S,T] or [S,1] such that the mean is E[Σ_t w_t s_t].
    """

    loss: Callable
    target: str
    twin: Callable
    weight: Callable | None = None
    token_weight: Callable | None = None


def paid(p, q, r, kl):
    """−R."""
    return kl * (p - q) - r


def paid_over_two_tokens(seen):
    """−(r − λ(u_0 + u_1)) at the first two tokens, 0 at others."""
    p, q = seen.log_pi[:, :2].sum(-1), seen.log_q[:, :2].sum(-1)
    first = torch.arange(seen.log_pi.shape[1]) < 2
    return paid(p, q, seen.reward, seen.kl_coef)[:, None] * first


def paid_to(seen, kl_coef, reward):
    """−(r − λu) [S,1] with another λ and r."""
    return paid(seen.log_pi.sum(-1), seen.log_q.sum(-1), reward, kl_coef)[:, None]


FAULTS = [
    Faulty(
        self_including_mean,
        "objective",
        losses.rloo,
        lambda p, q, r, kl, n, b: (b - 1) / b * paid(p, q, r, kl),
    ),
    Faulty(k1_as_a_loss, "reverse_kl", reinforce_reverse_kl, lambda p, q, r, kl, n, b: 0 * p),
    Faulty(
        dropped_eos,
        "objective",
        losses.reinforce,
        token_weight=lambda s: paid_to(s, s.kl_coef, s.reward) * before_last(s.live),
    ),
    Faulty(
        missing_detach,
        "objective",
        losses.reinforce,
        lambda p, q, r, kl, n, b: paid(p, q, r, kl) + kl * p,
    ),
    Faulty(
        swapped_ratio, "objective", losses.reinforce, lambda p, q, r, kl, n, b: -paid(p, q, r, kl)
    ),
    Faulty(
        mean_over_tokens,
        "objective",
        losses.reinforce,
        lambda p, q, r, kl, n, b: paid(p, q, r, kl) / n,
    ),
    Faulty(
        dropped_kl_coef, "objective", losses.reinforce, lambda p, q, r, kl, n, b: paid(p, q, r, 1.0)
    ),
    Faulty(
        n_for_n_minus_one,
        "objective",
        log_variance,
        lambda p, q, r, kl, n, b: (b - 1) / b * paid(p, q, r, kl),
    ),
    Faulty(
        reversed_kl, "reverse_kl", reinforce_reverse_kl, lambda p, q, r, kl, n, b: -torch.exp(q - p)
    ),
    Faulty(prior_omitted, "objective", losses.reinforce, lambda p, q, r, kl, n, b: kl * p - r),
    Faulty(
        summed_batch,
        "objective",
        losses.rloo,
        token_weight=lambda s: s.batch_size * s.problems * paid_to(s, s.kl_coef, s.reward),
    ),
    Faulty(kl_left_out, "objective", losses.reinforce, lambda p, q, r, kl, n, b: -r),
    Faulty(detached_score, "objective", losses.reinforce, lambda p, q, r, kl, n, b: kl * p),
    Faulty(wrong_sign, "objective", losses.rloo, lambda p, q, r, kl, n, b: -paid(p, q, r, kl)),
    *(
        Faulty(
            clamped(limit),
            "objective",
            losses.reinforce,
            lambda p, q, r, kl, n, b, limit=limit: kl * (p - q).clamp(-limit, limit) - r,
        )
        for limit in (2, 5, 10, 20)
    ),
    *(
        Faulty(
            rewards_clipped_at(limit),
            "objective",
            losses.reinforce,
            lambda p, q, r, kl, n, b, limit=limit: kl * (p - q) - r.clamp(-limit, limit),
        )
        for limit in (2, 5, 10)
    ),
    Faulty(first_two_tokens, "objective", losses.reinforce, token_weight=paid_over_two_tokens),
    Faulty(
        kl_to_go_of(2),
        "reverse_kl",
        reinforce_reverse_kl,
        token_weight=lambda s: ahead(s.log_pi - s.log_q, 2),
    ),
    Faulty(
        mean_of_all_groups,
        "objective",
        losses.rloo,
        token_weight=lambda s: (
            (s.problems * s.batch_size - 1)
            / (s.problems * (s.batch_size - 1))
            * paid_to(s, s.kl_coef, s.reward)
        ),
    ),
    Faulty(
        one_kl_coef,
        "objective",
        losses.reinforce,
        token_weight=lambda s: paid_to(s, s.first_kl_coef, s.reward),
    ),
    Faulty(
        variance_over_all_groups,
        "objective",
        log_variance,
        token_weight=lambda s: paid_to(s, s.first_kl_coef, s.first_kl_coef * s.reward / s.kl_coef),
    ),
]


def known_mean(fault: Faulty, case: AuditCase, batch_size: int) -> Tensor:
    """E[w s] [P] averaged over the problems, by one backward pass through Σ_y π w log π with π and
    w held fixed.
    """
    policy, total = case.policy, 0.0
    tokens = enumerate_support(policy).tokens
    log_pi = token_log_probs(policy, tokens)
    log_q = token_log_probs(case.problem.prior, tokens).detach()
    for problem in case.problems:
        seen = Seen(
            log_pi.detach(),
            log_q,
            problem.space.live(tokens),
            problem.rewards(tokens),
            problem.kl_coef,
            batch_size,
            len(case.problems),
            case.problem.kl_coef,
        )
        p = seen.log_pi.sum(-1)
        if fault.weight is None:
            weight = fault.token_weight(seen)
        else:
            length = seen.live.sum(-1)
            weight = fault.weight(
                p, log_q.sum(-1), seen.reward, problem.kl_coef, length, batch_size
            )[:, None]
        total = total + p.exp() @ (weight * log_pi).sum(-1) / len(case.problems)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(total, parameters, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


# --- values ---------------------------------------------------------------------------------------


def opposite_k3(u):
    """k3 of the opposite ratio: mean χ²(π‖q) − KL(π‖q) = E[e^u − 1 − u]."""
    return torch.exp(u) - 1 - u


def reversed_value(u):
    """Mean KL(q‖π) = −E[u e^{−u}]."""
    return -u * torch.exp(-u)


def half_k1(u):
    """Mean ½ KL(π‖q)."""
    return u / 2


def absolute_k1(u):
    """Clamped below at 0, as a divergence is: mean E[max(u, 0)]."""
    return u.clamp(min=0)


def clipped_k1(u):
    """Clipped at ±0.3: mean E[clip(u)]."""
    return u.clamp(-0.3, 0.3)


def second_order(u):
    """k3 cut after its first term: mean ½E[u²]; so has k2."""
    return kl_values.k2(u)


def bits(u):
    """In bits for nats: mean KL(π‖q)/log 2."""
    return u / math.log(2)


def offset(u):
    """e^{−u} + u, the −1 forgotten: mean 1 + KL(π‖q)."""
    return torch.exp(-u) + u


def wrong_sign_value(u):
    """Mean −KL(π‖q)."""
    return -u


def normalised(u):
    """Divided by the number of samples instead of averaged later: mean KL(π‖q)/N, here N = the
    support's size.
    """
    return u / len(u)


VALUE_FAULTS = [
    opposite_k3,
    reversed_value,
    half_k1,
    absolute_k1,
    clipped_k1,
    second_order,
    bits,
    offset,
    wrong_sign_value,
    normalised,
]
