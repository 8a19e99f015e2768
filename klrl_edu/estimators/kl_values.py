"""Estimators of KL(π‖q) from samples of π (Schulman 2020), from samples of another policy, and the
exact per-token KL.

    u = log π/q,    k1 = u,    k2 = u²/2,    k3 = e^{−u} − 1 + u                                 (1)
    k_c = u + c(e^{−u} − 1),    c* = (KL(π‖q) + KL(q‖π))/χ²(q‖π)                                 (2)
    KL(π‖q) = E_π Σ_t KL_t,    KL_t = KL(π(·|y_<t)‖q(·|y_<t))                                    (3)
    E_π[f(y_≤t)] = E_μ[ρ_≤t f(y_≤t)],    ρ_≤t = Π_{s≤t} π(y_s|y_<s)/μ(y_s|y_<s)                  (4)

Functions of log-ratios take any shape, in nats; sum per-token log-ratios over a sequence first for
the sequence's KL. χ²(q‖π) is E_π[(q/π − 1)²]. N sequences, T tokens, V vocabulary; after the first
EOS log-probabilities are 0.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import takes_numbers
from klrl_edu.core.validation import any_known, check_number
from klrl_edu.estimators.aggregation import token_mean

# --- functions of the log-ratio -------------------------------------------------------------------


@takes_numbers
def k1(log_ratio: Tensor) -> Tensor:
    """u [...]: unbiased, variance Var_π(u); may be negative. Schulman (2020)."""
    return log_ratio


@takes_numbers
def k2(log_ratio: Tensor) -> Tensor:
    """u²/2 [...]: biased by ½E[u²] − E[u]; its gradient on-policy is that of KL(π‖q).

    Variance ¼Var_π(u²). Schulman (2020).
    """
    return log_ratio.square() / 2


@takes_numbers
def k3(log_ratio: Tensor) -> Tensor:
    """e^{−u} − 1 + u ≥ 0 [...]: unbiased where q's support lies in π's. Schulman (2020).

    Exact to the last digits near u = 0. Its variance is Var_π(u) + χ²(q‖π) − 2[KL(π‖q) + KL(q‖π)]:
    below k1's only while χ²(q‖π) is less than twice the symmetric KL. At u = −inf (π = 0, never
    sampled) and u = +inf (q = 0, KL infinite) it is +inf. Where e^{−u} overflows it is +inf with a
    RuntimeWarning that gives its log (none inside `torch.func.vmap`).
    """
    values = logspace.expm1_minus_identity(-log_ratio)
    overflow = torch.isinf(values) & torch.isfinite(log_ratio)
    if any_known(overflow):
        lowest = float(log_ratio.detach()[overflow].min())
        warnings.warn(
            f"k3 overflows {log_ratio.dtype} at log-ratio {lowest:g}: its log is {-lowest:g} nats;"
            " use k1.",
            RuntimeWarning,
            3,  # past `takes_numbers`, to whoever called
        )
    return values


@takes_numbers
def control_variate(log_ratio: Tensor, coefficient: float | Tensor) -> Tensor:
    """k_c = u + c(e^{−u} − 1) [...] of (2): unbiased for every constant c.

    Where q's support lies in π's, as then E_π[e^{−u}] = 1. c = 0 is k1 and c = 1 is k3. Variance
    Var(u) − 2c[KL(π‖q) + KL(q‖π)] + c²χ²(q‖π), least at `best_coefficient`. May be negative for c ≠
    1. At u = −inf the exponential decides.

    Raises:
        InputError: a coefficient that is not a finite number.
    """
    coefficient = torch.as_tensor(coefficient, dtype=log_ratio.dtype, device=log_ratio.device)
    if any_known(~torch.isfinite(coefficient)):
        raise InputError(f"coefficient = {coefficient.tolist()} must be finite.")
    zero = torch.zeros_like(log_ratio)
    # masked before the exponential: c = 0 is k1 also where e^{−u} overflows
    correction = coefficient * torch.expm1(-torch.where(coefficient == 0, zero, log_ratio))
    # u = −inf is the slower of two infinities, and gives way to e^{−u}
    outdone = (log_ratio == -math.inf) & (correction == math.inf)
    return torch.where(outdone, zero, log_ratio) + correction


@takes_numbers
def best_coefficient(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """c* = −Cov_π(u, w)/Var_π(w), w = e^{−u}: log-probabilities [..., K] twice -> [...].

    From those of every outcome under π and q. It is (2) where π covers q, as then E_π[w] = 1 and
    E_π[uw] = −KL(q‖π). NaN where π = q, when every c has variance 0.
    """
    drawn = log_probs > -torch.inf
    # −inf − (−inf) is NaN; any number does where π has no mass
    log_ratio = torch.where(drawn, log_probs - prior_log_probs, torch.zeros_like(log_probs))
    excess = torch.expm1(-log_ratio)  # w − 1, to the last digits near u = 0
    centred = excess - logspace.expectation(log_probs, excess).unsqueeze(-1)
    covariance = logspace.expectation(log_probs, log_ratio * centred)
    return -covariance / logspace.expectation(log_probs, centred.square())


@takes_numbers
def fitted_coefficient(log_ratio: Tensor) -> Tensor:
    """c* fitted to samples, −Σ(u − ū)(w − w̄)/Σ(w − w̄)², w = e^{−u}: u [n] -> scalar.

    1 (k3) where all u are equal. Used on the samples it was fitted to it makes `control_variate`
    biased, at order 1/n; fit it on others.

    Raises:
        InputError: no samples, or a log-ratio that is not finite.
    """
    if log_ratio.numel() == 0 or any_known(~torch.isfinite(log_ratio)):
        raise InputError(
            "log_ratio holds no number, or one that is not finite: there is no slope to fit; leave"
            " out samples that the prior never gives."
        )
    # w by its largest value, which c* is divided by again: e^{−u} itself overflows below −709
    lowest = log_ratio.min()
    weight = torch.expm1(lowest - log_ratio)
    centred = weight - weight.mean()
    spread = centred.square().sum()
    # masked twice: a division by 0 would leave NaN in the gradient of the branch not taken
    divisor = torch.where(spread > 0, spread, torch.ones_like(spread))
    slope = -(centred * (log_ratio - log_ratio.mean())).sum() / divisor
    return torch.where(spread > 0, slope * torch.exp(lowest), torch.ones_like(slope))


@takes_numbers
def absolute_k1(log_ratio: Tensor) -> Tensor:
    """|u| [...] (verl's `abs`): biased upwards, E|u| = KL + 2E[max(−u, 0)].

    Variance E[u²] − (E|u|)².
    """
    return log_ratio.abs()


@takes_numbers
def opposite_k3(log_ratio: Tensor) -> Tensor:
    """e^u − 1 − u [...], k3 with its ratio upside down, a trap: its mean is χ²(π‖q) − KL(π‖q).

    As E_π[π/q] − 1 = χ²(π‖q) = E_q[(π/q − 1)²].
    """
    return logspace.expm1_minus_identity(log_ratio)


@takes_numbers
def clamped_k1(log_ratio: Tensor, bound: float) -> Tensor:
    """min(max(u, −b), b) [...]: biased by the tails, E[(−b − u)₊] − E[(u − b)₊].

    Its gradient is 0 where |u| > b.

    Raises:
        InputError: a bound below 0.
    """
    bound = _checked_bound(bound)
    return log_ratio.clamp(-bound, bound)


@takes_numbers
def clamped_k3(log_ratio: Tensor, bound: float = 10.0) -> Tensor:
    """min(k3, b) [...], as verl's `low_var_kl`, NeMo-RL and others clamp the output.

    Biased downwards by E[(k3 − b)₊]. Beyond b the gradient is 0, just where π is furthest below q:
    at b = 10 from q/π = 13.6 on. A token that the policy has lost is not pulled back.

    Raises:
        InputError: a bound below 0.
    """
    return k3(log_ratio).clamp(max=_checked_bound(bound))


@takes_numbers
def input_clamped_k3(log_ratio: Tensor, bound: float = 20.0) -> Tensor:
    """k3(min(max(u, −b), b)) [...]: finite for every u, biased by the tails.

    Its gradient is 0 where |u| > b.

    Raises:
        InputError: a bound below 0.
    """
    return k3(clamped_k1(log_ratio, bound))


def _checked_bound(bound: float) -> float:
    """b ≥ 0; inf clamps nothing."""
    return check_number(bound, "bound", "at least 0", lambda x: x >= 0)


# --- over the full vocabulary ---------------------------------------------------------------------


@takes_numbers
def per_token_kl(log_dists: Tensor, prior_log_dists: Tensor) -> Tensor:
    """KL_t of (3) at each position, over the full vocabulary.

    Args:
        log_dists, prior_log_dists: next-token log-probabilities [N,T,V] of policy and prior, in
            nats.

    Returns:
        [N,T] in nats; summed over T and averaged over prefixes from π it is the sequence KL (chain
        rule). +inf where q = 0 < π.
    """
    return logspace.kl_divergence(log_dists, prior_log_dists)


@takes_numbers
def rao_blackwell(log_dists: Tensor, prior_log_dists: Tensor) -> Tensor:
    """Σ_t KL_t of (3) along each sampled sequence: [N,T,V] twice -> [N] in nats.

    Unbiased for the sequence KL. Each term is E[u_t|y_<t], so it has less variance than u_t; the
    *sum* need not: Var(Σ_t KL_t) counts how KL_s of later prefixes follows from earlier tokens,
    which Σ_t u_t may cancel. (P₁ = (.5,.5), Q₁ = (.25,.75); after 0 P = Q; after 1 P = (.01,.99),
    Q = (.99,.01): 5.07 against k1's 3.32.) Source: Amini et al. (2025).
    """
    return per_token_kl(log_dists, prior_log_dists).sum(-1)


@takes_numbers
def kl_per_token(log_ratio: Tensor, live: Tensor) -> Tensor:
    """The masked token mean of u that TRL logs as `kl`: Σ live·u / Σ live for u [N,T] -> scalar.

    In nats a token, and 0 where no token is live. Not the sequence KL, and as a ratio of two sums
    not linear in the sequences: its expectation depends on N where lengths vary.

    Raises:
        InputError: no sequence.
    """
    return token_mean(log_ratio, live)


# --- from samples of another policy μ -------------------------------------------------------------


@takes_numbers
def off_policy_token(
    log_probs: Tensor,
    prior_log_probs: Tensor,
    behaviour_log_probs: Tensor,
    estimator: Callable[[Tensor], Tensor] = k1,
) -> Tensor:
    """Σ_t ρ_t k(u_t) with the token ratio ρ_t = π/μ: three [N,T] -> [N] in nats.

    Biased: it corrects the token but not its prefix, so its expectation is E_{prefixes of μ} Σ_t
    KL_t for k1 or k3.
    """
    log_weight = log_probs - behaviour_log_probs
    # `mul_exp` counts 0 · inf as 0: where π_t = 0 the ratio is 0 and k(u_t) infinite
    return logspace.mul_exp(estimator(log_probs - prior_log_probs), log_weight).sum(-1)


@takes_numbers
def off_policy_prefix(
    log_probs: Tensor,
    prior_log_probs: Tensor,
    behaviour_log_probs: Tensor,
    estimator: Callable[[Tensor], Tensor] = k1,
) -> Tensor:
    """Σ_t ρ_≤t k(u_t) with the cumulative ratio of (4): three [N,T] -> [N] in nats.

    Unbiased for the sequence KL with k1 or k3, where π's support lies in μ's. Tokens after t do not
    weigh on the term of t.
    """
    log_weight = (log_probs - behaviour_log_probs).cumsum(-1)
    return logspace.mul_exp(estimator(log_probs - prior_log_probs), log_weight).sum(-1)


@takes_numbers
def off_policy_sequence(
    log_probs: Tensor,
    prior_log_probs: Tensor,
    behaviour_log_probs: Tensor,
    estimator: Callable[[Tensor], Tensor] = k1,
) -> Tensor:
    """ρ k(u) with u = Σ_t u_t and ρ = Π_t π/μ: three [N,T] -> [N] in nats.

    Unbiased for the sequence KL with k1 or k3, where π's support lies in μ's. Variance E_π[ρ k(u)²]
    − KL².
    """
    log_weight = (log_probs - behaviour_log_probs).sum(-1)
    log_ratio = (log_probs - prior_log_probs).sum(-1)
    return logspace.mul_exp(estimator(log_ratio), log_weight)


@takes_numbers
def off_policy_rao_blackwell(
    log_probs: Tensor, behaviour_log_probs: Tensor, log_dists: Tensor, prior_log_dists: Tensor
) -> Tensor:
    """Σ_t ρ_<t KL_t: log-probabilities [N,T] twice, distributions [N,T,V] twice -> [N] in nats.

    Unbiased where π's support lies in μ's. KL_t depends on the prefix alone, so the token's own
    ratio is not needed.
    """
    log_ratio = log_probs - behaviour_log_probs
    none_yet = torch.zeros_like(log_ratio[..., :1])
    log_weight = torch.cat([none_yet, log_ratio.cumsum(-1)[..., :-1]], -1)  # log ρ_<t
    return logspace.mul_exp(per_token_kl(log_dists, prior_log_dists), log_weight).sum(-1)
