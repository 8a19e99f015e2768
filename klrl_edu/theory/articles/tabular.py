"""Article A, tabular policies with a KL penalty and Bayesian inference: six claims.

    V(s) = Σ_a π(a|s) (r(s,a) + γ Σ_s' p(s'|s,a) V(s'))                                          (1)
    KL over a process = Σ_t E_{s_t}[Σ_a π(a|s) log π(a|s)/π'(a|s)]                               (2)
    π ← π e^{η(r − λ log π/q)}, normalised: mirror descent, through the posteriors at λ_t        (3)

K sentences, T words, V vocabulary; logs in nats.
"""

import math
from typing import Any

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.draws import as_generator
from klrl_edu.estimators.kl_values import per_token_kl
from klrl_edu.exact.budget import mirror_descent_kl_coefs
from klrl_edu.exact.enumeration import tilt
from klrl_edu.models.contract import conditional_log_probs
from klrl_edu.theory.articles.claim import Claim, shown
from klrl_edu.theory.articles.examples import (
    Sentences,
    TwoSteps,
    climb,
    four_sentences,
    kl,
    log_mass,
    processes,
    sentences,
)

_STEPS, _STEP_SIZE = 20, 0.1


def policy_rows(example: Sentences) -> Tensor:
    """π(a|s) [K,T,V] at every prefix s of every sentence, as the language model gives it."""
    return conditional_log_probs(example.table(example.log_policy), example.tokens).exp()


def mass_ratios(example: Sentences) -> Tensor:
    """p(s,a)/p(s) [K,T,V], by adding up the sentences that start with s, and with s a."""
    rows = torch.zeros(*example.tokens.shape, example.space.vocab_size, dtype=torch.float64)
    probs = example.log_policy.exp()
    for k, sentence in enumerate(example.tokens):
        for t in range(len(sentence)):
            starts = (example.tokens[:, :t] == sentence[:t]).all(-1)
            mass = torch.zeros(example.space.vocab_size, dtype=torch.float64).index_add(
                0, example.tokens[starts, t], probs[starts]
            )
            rows[k, t] = mass / mass.sum()
    return rows


def _says_policy() -> str:
    example = four_sentences()
    first, second = policy_rows(example)[0].tolist()
    return (
        f"a definition; π(the|∅) = {first[0]:.6g} and π(cat|the) = {second[2]:.6g}, whose product"
        f" is π(the cat) = {first[0] * second[2]:.6g}"
    )


def one_step_value(process: TwoSteps) -> Tensor:
    """Σ_a π(a) r(a), a scalar: the reward of the first decision only."""
    return process.policy()[0] @ process.first_reward


def backed_up_value(process: TwoSteps) -> Tensor:
    """V of the start by (1), from the last decision back."""
    first, then = process.policy()
    later = (then * process.then_reward).sum(-1)  # V(s) [S]
    return first @ (process.first_reward + process.discount * process.transition @ later)


def _says_value() -> str:
    process = processes()[0]
    bandit = process._replace(then_reward=torch.zeros_like(process.then_reward))
    error = float((one_step_value(bandit) - bandit.expected_return()).abs())
    return (
        f"a bandit (no second reward): error {shown(error)}; with a second decision the value is"
        f" {float(process.expected_return()):.6g}, printed {float(one_step_value(process)):.6g}"
    )


def state_kl(example: Sentences) -> Tensor:
    """Σ_s π(s) log π(s)/π'(s) over the prefixes s at which a word is chosen, π(s) being how often π
    comes there: a scalar.
    """
    own, other = (
        torch.stack(
            [log_mass(example, log_probs, range(t)) for t in range(example.space.max_length)]
        )
        for log_probs in (example.log_policy, example.log_prior)
    )
    return (example.log_policy.exp() * (own - other)).sum()


def chain_rule_kl(example: Sentences) -> Tensor:
    """(2) for a policy π and prior q that choose words: a scalar."""
    own, other = (
        conditional_log_probs(example.table(log_probs), example.tokens)
        for log_probs in (example.log_policy, example.log_prior)
    )
    return example.log_policy.exp() @ per_token_kl(own, other).sum(-1)


def sentence_kl(example: Sentences) -> Tensor:
    """KL(π‖q) over whole sentences, a scalar."""
    return kl(example.log_policy, example.log_prior)


def _says_state_kl() -> str:
    example = four_sentences()
    return (
        "π and q reach each first word equally often, so the sum over states is"
        f" {abs(float(state_kl(example))):.4f}; KL(π‖q) = {float(sentence_kl(example)):.6f} nats,"
        " all of it in the choice of the second word"
    )


def objective(example: Sentences, log_probs: Tensor) -> Tensor:
    """J = E[r] − λ KL(·‖q) of a distribution [K], a scalar in reward units."""
    return logspace.expectation(log_probs, example.rewards) - example.kl_coef * kl(
        log_probs, example.log_prior
    )


def value_without_coefficient(example: Sentences) -> Tensor:
    """J at the minimiser of KL(π‖q) − E_π[r] (one state, the sum over actions): the posterior at λ
    = 1, whatever λ is.
    """
    return objective(example, tilt(example.log_prior, example.rewards, 1.0).log_posterior)


def _highest_objective(example: Sentences) -> Tensor:
    """max J, by climbing from the uniform distribution."""
    uniform = torch.full_like(example.log_prior, -math.log(len(example.log_prior)))
    return objective(example, climb(example.log_prior, example.rewards, example.kl_coef, uniform))


def _at_half() -> Sentences:
    return four_sentences()._replace(kl_coef=0.5)


def _says_objective() -> str:
    best, printed = (
        float(_highest_objective(_at_half())),
        float(value_without_coefficient(_at_half())),
    )
    return (
        "with a left free it has a value for each a, and summed over a its minimiser is π* at λ ="
        f" 1 whatever λ is: at λ = ½ that has J = {printed:.6f}, and max J = {best:.6f}"
    )


def printed_program(example: Sentences) -> Tensor:
    """The program in two lines of its own kind, with the lengths made right: a policy that is a
    function, and 0.1 (reward − baseline) added to it.

    Raises:
        TypeError: a function and an array have no sum.
    """

    def policy(state: int) -> Tensor:
        return example.log_prior.exp()

    new_policy: Any = policy
    for _ in range(_STEPS):
        new_policy = new_policy + _STEP_SIZE * (
            example.rewards - example.log_prior.exp() @ example.rewards
        )
    result: Tensor = new_policy
    return result


def outcome_of_printed_program(example: Sentences) -> Tensor:
    """What it computes [2,K]: NaN, for it raises."""
    try:
        return printed_program(example).expand(2, -1)
    except TypeError:
        return torch.full((2, len(example.tokens)), math.nan, dtype=torch.float64)


def mirror_descent(example: Sentences, kl_coef: float, steps: int = _STEPS) -> Tensor:
    """The corrected program (3), started at q: π [K]; `kl_coef` 0 ascends the reward alone."""
    log_policy = example.log_prior
    for _ in range(steps):
        log_policy = logspace.log_normalize(
            log_policy + _STEP_SIZE * (example.rewards - kl_coef * (log_policy - example.log_prior))
        )
    return log_policy.exp()


def corrected_program(example: Sentences) -> Tensor:
    """(3) without and with the KL penalty [2,K]."""
    return torch.stack([mirror_descent(example, kl_coef) for kl_coef in (0.0, example.kl_coef)])


def posteriors_on_the_way(example: Sentences) -> Tensor:
    """The posteriors [2,K] at λ_t = 1/(ηt) and at λ_t = λ/(1 − (1 − ηλ)^t)."""
    kl_coefs = (
        float(mirror_descent_kl_coefs(kl_coef, _STEP_SIZE, _STEPS)[-1])
        for kl_coef in (0.0, example.kl_coef)
    )
    return torch.stack(
        [
            tilt(example.log_prior, example.rewards, kl_coef).log_posterior.exp()
            for kl_coef in kl_coefs
        ]
    )


def _says_program() -> str:
    example = four_sentences()
    try:
        printed_program(example)
        raised = "nothing"
    except TypeError as error:
        raised = type(error).__name__
    prior = example.log_prior.exp()
    added = prior + 10 * _STEP_SIZE * (example.rewards - prior @ example.rewards)
    last = float(mirror_descent(example, 0.0, 200)[3])
    return (
        f"it raises {raised} (function + array); added to an array instead, ten steps sum to"
        f" {float(added.sum()):.4g} with a smallest entry of {float(added.min()):.4g}; multiplied"
        f" and normalised, each iterate is a posterior, and 200 steps give P(a dog) = {last:.12f}"
    )


_COUNTS = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)


def _all_counts() -> list[Tensor]:
    generator = as_generator(7)
    return [
        _COUNTS,
        10 * _COUNTS,
        *(torch.randint(0, 9, (size,), generator=generator).double() for size in (2, 5)),
    ]


def dirichlet_moments(counts: Tensor) -> Tensor:
    """Mean m and variance m(1 − m)/(Σα + 1) [2,K] of the parameters of a table, under a uniform
    prior (α = counts + 1).
    """
    alpha = counts + 1
    mean = alpha / alpha.sum()
    return torch.stack([mean, mean * (1 - mean) / (alpha.sum() + 1)])


def moments_by_evidence(counts: Tensor) -> Tensor:
    """The same [2,K] from Bayes' rule alone: E[θ_k^n | data] = evidence(data and n more of k) /
    evidence(data).
    """
    more = torch.eye(len(counts), dtype=torch.float64)
    first, second = (
        (_log_evidence(counts + n * more) - _log_evidence(counts)).exp() for n in (1, 2)
    )
    return torch.stack([first, second - first.square()])


def _log_evidence(counts: Tensor) -> Tensor:
    """log ∫ Π θ_k^{n_k} dθ over the simplex, up to a constant: counts [..., K] -> [...]."""
    return torch.lgamma(counts + 1).sum(-1) - torch.lgamma((counts + 1).sum(-1))


def _says_parameters() -> str:
    (mean, variance), (_, later) = dirichlet_moments(_COUNTS), dirichlet_moments(10 * _COUNTS)
    shares = ", ".join(f"{14 * float(m):.0f}" for m in mean)
    return (
        f"after counts 4, 3, 2, 1 a table's parameters have mean ({shares})/14 and P(the cat) ="
        f" {float(mean[0]):.4f} ± {float(variance[0]) ** 0.5:.4f}; with ten times the data ±"
        f" {float(later[0]) ** 0.5:.4f}"
    )


TABULAR: tuple[Claim[Any], ...] = (
    Claim(
        name="a-policy",
        article="A",
        section="数学模型和公式 (model and formulas), 4",
        printed=r"$\pi(a \mid s) = p(a \mid s)$",
        corrected="",
        verdict="holds",
        tutorial="t04",
        unit="probability",
        examples=sentences,
        truth=mass_ratios,
        asserted=policy_rows,
        repaired=None,
        says=_says_policy,
    ),
    Claim(
        name="a-value",
        article="A",
        section="数学模型和公式 (model and formulas), 5",
        printed=r"$V(s) = \sum_a \pi(a \mid s)\, R(s,a)$",
        corrected=(
            r"$V(s) = \sum_a \pi(a \mid s) \left[ R(s,a) + \gamma \sum_{s'} p(s' \mid s,a)\, V(s')"
            r" \right]$"
        ),
        verdict="holds with a correction",
        tutorial="t05",
        unit="reward units",
        examples=processes,
        truth=TwoSteps.expected_return,
        asserted=one_step_value,
        repaired=backed_up_value,
        says=_says_value,
    ),
    Claim(
        name="a-kl-states",
        article="A",
        section="数学模型和公式 (model and formulas), 6",
        printed=r"$D_{KL}(\pi \Vert \pi') = \sum_s \pi(s) \log \frac{\pi(s)}{\pi'(s)}$",
        corrected=(
            r"$D_{KL}(\pi \Vert \pi') = \sum_t E_{s_t \sim \pi} \sum_a \pi(a \mid s_t) \log"
            r" \frac{\pi(a \mid s_t)}{\pi'(a \mid s_t)}$"
        ),
        verdict="holds with a correction",
        tutorial="t01",
        unit="nats",
        examples=sentences,
        truth=sentence_kl,
        asserted=state_kl,
        repaired=chain_rule_kl,
        says=_says_state_kl,
    ),
    Claim(
        name="a-objective",
        article="A",
        section="数学模型和公式 (model and formulas), 7",
        printed=r"$\min_\pi D_{KL}(\pi \Vert \pi') - \sum_s \pi(s)\, R(s,a)$",
        corrected=(
            r"$\max_\pi E_\pi[R] - \lambda D_{KL}(\pi \Vert \pi') = \lambda \log \sum_y \pi'(y)\,"
            r" e^{R(y)/\lambda}$"
        ),
        verdict="holds with a correction",
        tutorial="t03",
        unit="reward units",
        examples=lambda: (_at_half(), *sentences()),
        truth=_highest_objective,
        asserted=value_without_coefficient,
        repaired=lambda example: tilt(example.log_prior, example.rewards, example.kl_coef).value,
        says=_says_objective,
    ),
    Claim(
        name="a-program",
        article="A",
        section="代码 (code)",
        printed=(
            r"`policy_prime = policy`, then policy + $0.1\,(R - \text{scalar})$, where `policy` is"
            r" a function"
        ),
        corrected=r"$\pi_{t+1}(y) \propto \pi_t(y)\, e^{\eta (R(y) - \lambda \log \pi_t(y)/q(y))}$",
        verdict="false",
        tutorial="t02",
        unit="probability",
        examples=sentences,
        truth=posteriors_on_the_way,
        asserted=outcome_of_printed_program,
        repaired=corrected_program,
        says=_says_program,
    ),
    Claim(
        name="a-parameters",
        article="A",
        section="5. 贝叶斯推理应用 (uses of Bayesian inference)",
        printed=(
            "the posterior over a model's parameters shows its uncertainty: for a table, $P(\\theta"
            " \\mid n) \\propto \\prod_k \\theta_k^{n_k}$"
        ),
        corrected="",
        verdict="holds",
        tutorial="t08",
        unit="probability",
        examples=_all_counts,
        truth=moments_by_evidence,
        asserted=dirichlet_moments,
        repaired=None,
        says=_says_parameters,
    ),
)
