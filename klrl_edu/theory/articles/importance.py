"""Article C, an RNN policy with a KL penalty, and importance sampling on four sentences: eight
rows, nine claims.

    J(π) = E_π[r] − λ KL(π‖q) = λ log Z − λ KL(π‖π*)                                             (1)
    ∇E_π[r] = E_π[r s],    ∇KL(π‖q) = E_π[s log π/q],    s = ∇log π                              (2)
    E_π[s (log π/p + c)] = ∇KL(π‖p) = ∇KL(π‖q) + E_π[s log q/p]
    for any c: biased unless p = q                                                               (3)
    its total variance is least at c* = −E[‖s‖² log π/p]/E[‖s‖²]                                 (4)
    d KL(π*‖q)/dλ = −Var_{π*}(r)/λ³ ≤ 0                                                          (5)

K sentences; gradients in sequence logits; logs in nats.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core import logspace
from klrl_edu.exact.enumeration import tilt
from klrl_edu.learning import losses
from klrl_edu.theory.articles.claim import Claim, shown
from klrl_edu.theory.articles.examples import (
    Sentences,
    four_sentences,
    gradient,
    kl,
    mean_score,
    scores,
    sentences,
)
from klrl_edu.theory.articles.tabular import objective, sentence_kl

_CONSTANTS = (0.0, 1.0, -2.0)


def _vector(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values.tolist()) + ")"


def objective_of_policy(example: Sentences) -> Tensor:
    """J(π) = E_π[r] − λ KL(π‖q), a scalar in reward units."""
    return objective(example, example.log_policy)


def value_less_gap(example: Sentences) -> Tensor:
    """λ log Z − λ KL(π‖π*), a scalar in reward units."""
    best = tilt(example.log_prior, example.rewards, example.kl_coef)
    return best.value - example.kl_coef * kl(example.log_policy, best.log_posterior)


def _says_objective() -> str:
    example = four_sentences()
    best = tilt(example.log_prior, example.rewards, example.kl_coef)
    gap = float(best.value - objective_of_policy(example))
    return (
        f"J(π) = {float(objective_of_policy(example)):.6f}; its maximiser, which the article leaves"
        f" out, is π* ∝ q e^(r/λ) = {_vector(best.log_posterior.exp())}, better by λ KL(π‖π*) ="
        f" {gap:.12f}"
    )


def sampled_reward_gradient(example: Sentences) -> Tensor:
    """The mean [K] of (1/N) Σ r(x_i) ∇log π(x_i) over every batch of N = 2, by enumeration."""
    policy = example.table(example.log_policy).requires_grad_()
    return -audit_gradient(losses.reinforce, policy, example.problem(0.0), batch_size=2).mean


def reward_gradient(example: Sentences) -> Tensor:
    """∇E_π[r] [K] by autograd."""
    return gradient(
        lambda log_policy: logspace.expectation(log_policy, example.rewards), example.log_policy
    )


def _says_reinforce() -> str:
    return (
        "over every batch of two sentences its mean is"
        f" {_vector(sampled_reward_gradient(four_sentences()))} = ∇E[r]"
    )


def kl_score_gradient(example: Sentences) -> Tensor:
    """E_π[s (log π − log q)] [K]."""
    return mean_score(example.log_policy, example.log_policy - example.log_prior)


def kl_gradient(example: Sentences) -> Tensor:
    """∇KL(π‖q) [K] by autograd."""
    return gradient(lambda log_policy: kl(log_policy, example.log_prior), example.log_policy)


def _says_kl_gradient() -> str:
    example = four_sentences()
    extra = float(mean_score(example.log_policy, torch.ones_like(example.log_policy)).abs().max())
    return (
        f"∇KL(π‖q) = {_vector(kl_score_gradient(example))}; the 1 that differentiating log π adds"
        f" has mean {shown(extra)}"
    )


def auxiliary_gradient(example: Sentences, constant: float = 0.0) -> Tensor:
    """E_π[s (log π/p + c)] [K], with an auxiliary model p in the place of q."""
    return mean_score(example.log_policy, example.log_policy - example.log_auxiliary + constant)


def auxiliary_bias(example: Sentences) -> Tensor:
    """E_π[s log q/p] [K], by which (3) misses ∇KL(π‖q)."""
    return mean_score(example.log_policy, example.log_prior - example.log_auxiliary)


def _says_auxiliary() -> str:
    example = four_sentences()
    bias = auxiliary_bias(example)
    return (
        "the samples come from π, so nothing is importance-weighted; the mean is"
        f" {_vector(auxiliary_gradient(example))} where ∇KL(π‖q) = {_vector(kl_gradient(example))}:"
        f" a bias {_vector(bias)} of norm {float(bias.norm()):.6f} for any number of samples"
    )


def best_constant(example: Sentences) -> float:
    """c* of (4), in nats."""
    weight = example.log_policy.exp() * scores(example.log_policy).square().sum(-1)
    return -float(weight @ (example.log_policy - example.log_auxiliary) / weight.sum())


def constant_variance(example: Sentences, constant: float) -> Tensor:
    """E‖s (log π/p + c)‖² − ‖E s (log π/p + c)‖², a scalar: the total variance of one sample's
    gradient.
    """
    each = (
        scores(example.log_policy)
        * (example.log_policy - example.log_auxiliary + constant)[:, None]
    )
    probs = example.log_policy.exp()
    return probs @ each.square().sum(-1) - (probs @ each).square().sum()


def gradients_with_constants(example: Sentences) -> Tensor:
    """E_π[s (log π/p + c)] for several c, then the variance at c*: [C·K + 1]."""
    means = [auxiliary_gradient(example, constant) for constant in _CONSTANTS]
    return torch.cat([*means, constant_variance(example, best_constant(example))[None]])


def one_gradient_and_least_variance(example: Sentences) -> Tensor:
    """∇KL(π‖p) by autograd, once for each c, then the lowest point of the variance, a parabola in c
    through three of its points: [C·K + 1].
    """
    truth = gradient(lambda log_policy: kl(log_policy, example.log_auxiliary), example.log_policy)
    left, middle, right = (constant_variance(example, c) for c in (-1.0, 0.0, 1.0))
    slope, curvature = (right - left) / 2, right - 2 * middle + left
    return torch.cat([truth.repeat(len(_CONSTANTS)), (middle - slope**2 / (2 * curvature))[None]])


def _says_constant() -> str:
    example = four_sentences()
    best = best_constant(example)
    at_best, at_zero, at_one = (float(constant_variance(example, c)) for c in (best, 0.0, 1.0))
    return (
        f"no c changes the mean; the variance of one sample is least, {at_best:.6f}, at c* ="
        f" {best:.6f} nats ({at_zero:.6f} at c = 0, {at_one:.6f} at c = 1)"
    )


def kl_in_nats_and_bits(example: Sentences) -> Tensor:
    """KL(π‖q) in nats and in bits [2]."""
    divergence = sentence_kl(example)
    return torch.stack([divergence, divergence / math.log(2)])


def _says_kl_example() -> str:
    nats, bits = kl_in_nats_and_bits(four_sentences()).tolist()
    return f"printed 0.22; KL(π‖q) = {nats:.4f} nats = {bits:.4f} bits"


def auxiliary_kl(example: Sentences) -> Tensor:
    """KL(π‖p), a scalar in nats."""
    return kl(example.log_policy, example.log_auxiliary)


def auxiliary_kl_corrected(example: Sentences) -> Tensor:
    """KL(π‖p) − E_π[log q/p], a scalar in nats."""
    return auxiliary_kl(example) - logspace.expectation(
        example.log_policy, example.log_prior - example.log_auxiliary
    )


def _says_auxiliary_example() -> str:
    example = four_sentences()
    seen, true = float(auxiliary_kl(example)), float(sentence_kl(example))
    return f"KL(π‖p) = {seen:.4f} nats where KL(π‖q) = {true:.4f}: an error of {seen - true:+.12f}"


class Weighting(NamedTuple):
    """Two distributions [K] as log-probabilities, and a function [K]."""

    log_p: Tensor
    log_q: Tensor
    values: Tensor


def weightings() -> list[Weighting]:
    """f = r under P = π from Q = q, with the last sentence taken out of Q, and with full
    support.
    """
    plain = [
        Weighting(example.log_policy, example.log_prior, example.rewards) for example in sentences()
    ]
    return [_without_last(case) for case in plain] + plain


def _without_last(case: Weighting) -> Weighting:
    return case._replace(
        log_q=logspace.log_normalize(
            torch.cat([case.log_q[:-1], torch.tensor([-math.inf], dtype=torch.float64)])
        )
    )


def weighted_mean(case: Weighting) -> Tensor:
    """E_Q[f P/Q], a scalar; an outcome with Q = 0 is never drawn."""
    log_weight = torch.where(case.log_q > -math.inf, case.log_p - case.log_q, 0.0)
    return logspace.expectation(case.log_q, case.values * log_weight.exp())


def weighted_mean_and_missed(case: Weighting) -> Tensor:
    """E_Q[f P/Q] + Σ_{Q = 0} P f, a scalar."""
    return weighted_mean(case) + (case.log_p.exp() * case.values)[case.log_q == -math.inf].sum()


def _says_importance() -> str:
    zero, full = weightings()[0], weightings()[len(sentences())]
    true = float(logspace.expectation(full.log_p, full.values))
    return (
        f"E_π[r] = {true:.4g}, and with Q = q weighting gives {float(weighted_mean(full)):.4g};"
        f" with Q(a dog) = 0 it gives {float(weighted_mean(zero)):.4g}, the mass that Q never draws"
        " being lost"
    )


_KL_COEFS = (0.2, 0.5, 1.0, 3.0)


def kl_slopes(example: Sentences) -> Tensor:
    """d KL(π*‖q)/dλ at several λ by autograd through the posterior."""
    kl_coefs = torch.tensor(_KL_COEFS, dtype=torch.float64, requires_grad=True)
    log_posterior = torch.log_softmax(example.log_prior + example.rewards / kl_coefs[:, None], -1)
    return torch.autograd.grad(kl(log_posterior, example.log_prior).sum(), kl_coefs)[0]


def variance_slopes(example: Sentences) -> Tensor:
    """−Var_{π*}(r)/λ³ at the same λ, by (5)."""
    slopes = []
    for kl_coef in _KL_COEFS:
        log_posterior = tilt(example.log_prior, example.rewards, kl_coef).log_posterior
        mean = logspace.expectation(log_posterior, example.rewards)
        slopes.append(
            -logspace.expectation(log_posterior, (example.rewards - mean).square()) / kl_coef**3
        )
    return torch.stack(slopes)


def _says_stays_close() -> str:
    example = four_sentences()
    found = [
        float(
            kl(tilt(example.log_prior, example.rewards, kl_coef).log_posterior, example.log_prior)
        )
        for kl_coef in (0.0, *_KL_COEFS)
    ]
    listed = ", ".join(f"{value:.4f}" for value in found)
    return (
        f"at the optimum KL(π*‖q) = {listed} nats at λ = 0,"
        f" {', '.join(f'{kl_coef:g}' for kl_coef in _KL_COEFS)}: close by that much, no more"
    )


IMPORTANCE: tuple[Claim[Any], ...] = (
    Claim(
        name="c-objective",
        article="C",
        section="3.1",
        printed=r"$J(\theta) = E_\pi[r] - \lambda D_{KL}(\pi_\theta \Vert q)$",
        corrected="",
        verdict="holds",
        tutorial="t03",
        unit="reward units",
        examples=sentences,
        truth=value_less_gap,
        asserted=objective_of_policy,
        repaired=None,
        says=_says_objective,
    ),
    Claim(
        name="c-reinforce",
        article="C",
        section="3.2 (3)",
        printed=r"$\nabla E[r] \approx \frac{1}{N} \sum_i r(x_i) \nabla \log \pi(x_i)$",
        corrected="",
        verdict="holds",
        tutorial="t05",
        unit="reward units",
        examples=sentences,
        truth=reward_gradient,
        asserted=sampled_reward_gradient,
        repaired=None,
        says=_says_reinforce,
    ),
    Claim(
        name="c-kl-gradient",
        article="C",
        section="3.2 (4)",
        printed=r"$\nabla D_{KL} = E_\pi[\nabla \log \pi\, (\log \pi - \log q)]$",
        corrected="",
        verdict="holds",
        tutorial="t06",
        unit="nats",
        examples=sentences,
        truth=kl_gradient,
        asserted=kl_score_gradient,
        repaired=None,
        says=_says_kl_gradient,
    ),
    Claim(
        name="c-auxiliary",
        article="C",
        section="3.3, 4.2",
        printed=(
            r"$\nabla D_{KL} \approx E_\pi[\nabla \log \pi\, (\log \frac{\pi}{p} + c)]$, unbiased"
            r" importance sampling"
        ),
        corrected=(
            r"$\nabla D_{KL} = E_\pi[\nabla \log \pi\, \log \frac{\pi}{p}] - E_\pi[\nabla \log"
            r" \pi\, \log \frac{q}{p}]$"
        ),
        verdict="false",
        tutorial="t07",
        unit="nats",
        examples=sentences,
        truth=kl_gradient,
        asserted=auxiliary_gradient,
        repaired=lambda example: auxiliary_gradient(example) - auxiliary_bias(example),
        says=_says_auxiliary,
    ),
    Claim(
        name="c-constant",
        article="C",
        section="3.3, 4.2",
        printed=r"$E_\pi[\nabla \log \pi\, (\log \frac{\pi}{p} + c)]$ for any constant $c$",
        corrected="",
        verdict="holds",
        tutorial="t07",
        unit="nats",
        examples=sentences,
        truth=one_gradient_and_least_variance,
        asserted=gradients_with_constants,
        repaired=None,
        says=_says_constant,
    ),
    Claim(
        name="c-kl-example",
        article="C",
        section="4.1, example",
        printed=r"$D_{KL} \approx 0.22$ for $q = (.4, .3, .2, .1)$, $\pi = (.5, .2, .1, .2)$",
        corrected=r"$D_{KL} \approx 0.0998$ nats $= 0.1440$ bits",
        verdict="false",
        tutorial="t01",
        unit="nats or bits",
        examples=lambda: (four_sentences(),),
        truth=kl_in_nats_and_bits,
        asserted=lambda example: torch.tensor([0.22, 0.22], dtype=torch.float64),
        repaired=lambda example: torch.tensor([0.0998, 0.1440], dtype=torch.float64),
        says=_says_kl_example,
        tolerance=5e-5,
    ),
    Claim(
        name="c-auxiliary-example",
        article="C",
        section="4.2, example",
        printed=(
            r"$D_{KL}(\pi \Vert p)$ with $p = (.3, .4, .2, .1)$ in the place of $D_{KL}(\pi"
            r" \Vert q)$"
        ),
        corrected=r"$D_{KL}(\pi \Vert q) = D_{KL}(\pi \Vert p) - E_\pi[\log \frac{q}{p}]$",
        verdict="holds with a correction",
        tutorial="t07",
        unit="nats",
        examples=sentences,
        truth=sentence_kl,
        asserted=auxiliary_kl,
        repaired=auxiliary_kl_corrected,
        says=_says_auxiliary_example,
    ),
    Claim(
        name="c-importance",
        article="C",
        section="4.2",
        printed=r"$E_P[f] = E_Q[f\, P/Q]$",
        corrected=(
            r"$E_P[f] = E_Q[f\, P/Q] + \sum_{Q(y) = 0} P(y) f(y)$, no more to add where $Q > 0$"
            r" wherever $P f \neq 0$"
        ),
        verdict="holds with a correction",
        tutorial="t07",
        unit="reward units",
        examples=weightings,
        truth=lambda case: logspace.expectation(case.log_p, case.values),
        asserted=weighted_mean,
        repaired=weighted_mean_and_missed,
        says=_says_importance,
    ),
    Claim(
        name="c-stays-close",
        article="C",
        section="1.3",
        printed=(
            r"the KL penalty keeps text close to the corpus: $D_{KL}(\pi^* \Vert q)$ falls as"
            r" $\lambda$ grows"
        ),
        corrected="",
        verdict="holds",
        tutorial="t03",
        unit="nats a reward unit",
        examples=sentences,
        truth=kl_slopes,
        asserted=variance_slopes,
        repaired=None,
        says=_says_stays_close,
    ),
)
