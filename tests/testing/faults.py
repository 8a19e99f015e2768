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

import torch
from torch import Tensor

from klrl_edu.audit.cases import AuditCase
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from klrl_edu.models.contract import enumerate_support, token_log_probs

# --- losses ---------------------------------------------------------------------------------------


def log_ratio(batch):
    return (batch.log_probs - batch.prior_log_probs).sum(-1)


def reinforce_reverse_kl(batch):
    """Sound: KL(π‖q) as a reward to pay; mean reverse_kl."""
    return (log_ratio(batch).detach() * batch.log_probs.sum(-1)).mean()


def self_including_mean(batch):
    """The baseline is the mean over the batch, the sequence itself included: mean (B − 1)/B ·
    objective.
    """
    reward = losses.penalised_reward(batch)
    return -((reward - reward.mean()) * batch.log_probs.sum(-1)).mean()


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
    """Sound: VarGrad, λ/2 times the sample variance of u − r/λ; mean objective."""
    return batch.kl_coef[0] / 2 * (log_ratio(batch) - batch.rewards.sum(-1) / batch.kl_coef).var()


def n_for_n_minus_one(batch):
    """VarGrad with a variance over B: mean (B − 1)/B · objective."""
    return (
        batch.kl_coef[0]
        / 2
        * (log_ratio(batch) - batch.rewards.sum(-1) / batch.kl_coef).var(correction=0)
    )


def reversed_kl(batch):
    """k3 is differentiated: mean forward_kl = −E[(q/π) s] instead of reverse_kl."""
    return kl_values.k3(log_ratio(batch)).mean()


def prior_omitted(batch):
    """An entropy bonus for the KL: mean −E[(r − λ log π) s]."""
    log_prob = batch.log_probs.sum(-1)
    return -((batch.rewards.sum(-1) - batch.kl_coef * log_prob.detach()) * log_prob).mean()


def summed_batch(batch):
    """A sum over the batch for the mean: mean B · objective."""
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


@dataclass(frozen=True)
class Faulty:
    """A loss with a fault.

    Attributes:
        loss: what is wrong.
        target: what it was meant to follow.
        twin: the same without the fault.
        weight: (log π, log q, r, λ, |y|, B) -> w such that the mean is E[w s]; None where it is
            written out below.
    """

    loss: Callable
    target: str
    twin: Callable
    weight: Callable | None


def paid(p, q, r, kl):
    """−R."""
    return kl * (p - q) - r


FAULTS = [
    Faulty(
        self_including_mean,
        "objective",
        losses.rloo,
        lambda p, q, r, kl, n, b: (b - 1) / b * paid(p, q, r, kl),
    ),
    Faulty(k1_as_a_loss, "reverse_kl", reinforce_reverse_kl, lambda p, q, r, kl, n, b: 0 * p),
    Faulty(dropped_eos, "objective", losses.reinforce, None),
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
    Faulty(summed_batch, "objective", losses.rloo, lambda p, q, r, kl, n, b: b * paid(p, q, r, kl)),
    Faulty(kl_left_out, "objective", losses.reinforce, lambda p, q, r, kl, n, b: -r),
    Faulty(detached_score, "objective", losses.reinforce, lambda p, q, r, kl, n, b: kl * p),
    Faulty(wrong_sign, "objective", losses.rloo, lambda p, q, r, kl, n, b: -paid(p, q, r, kl)),
]


def known_mean(fault: Faulty, case: AuditCase, batch_size: int) -> Tensor:
    """E[w s] [P], by one backward pass through Σ_y π w log π with π and w held fixed."""
    policy, problem = case.policy, case.problem
    tokens = enumerate_support(policy).tokens
    log_pi = token_log_probs(policy, tokens)
    p, q, r = (
        log_pi.sum(-1).detach(),
        problem.prior.log_prob(tokens).detach(),
        problem.rewards(tokens),
    )
    live = problem.space.live(tokens)
    if fault.weight is not None:
        terms = (
            p.exp()
            * fault.weight(p, q, r, problem.kl_coef, live.sum(-1), batch_size)
            * log_pi.sum(-1)
        )
    else:  # dropped_eos
        terms = p.exp() * paid(p, q, r, problem.kl_coef) * (log_pi * before_last(live)).sum(-1)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(terms.sum(), parameters, materialize_grads=True)
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
