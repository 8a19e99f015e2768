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

from klrl_edu.closed_forms.budget import mirror_descent_kl_coefs
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.core.draws import as_generator
from klrl_edu.estimators.kl_values import per_token_kl
from klrl_edu.models.contract import conditional_log_probs
from klrl_edu.theory.articles.examples import (
    TwoSteps,
    climb,
    course_case,
    log_mass,
    processes,
    sentences,
    uniform,
)
from klrl_edu.theory.cases import Case
from klrl_edu.theory.gradients import kl
from klrl_edu.theory.verdicts import Formulas, corrected, false, holds, shown

_FORMULAS = "数学模型和公式 (model and formulas)"
_STEPS, _STEP_SIZE = 20, 0.1


@holds("A", f"{_FORMULAS}, 4", r"$\pi(a \mid s) = p(a \mid s)$", "probability", "t04", sentences)
def a_policy(case: Case) -> Formulas:
    """A policy is a language model's conditional probability [K,T,V], at every prefix of every
    sentence.
    """
    model = case.table(case.log_policy)
    return Formulas(
        truth=_mass_ratios(case), printed=conditional_log_probs(model, case.tokens).exp()
    )


def _mass_ratios(case: Case) -> Tensor:
    """The conditional p(s,a)/p(s) [K,T,V], by adding up the sentences that start with s, and with s
    a.
    """
    rows = torch.zeros(*case.tokens.shape, case.space.vocab_size, dtype=torch.float64)
    probs = case.log_policy.exp()
    for k, sentence in enumerate(case.tokens):
        for t in range(len(sentence)):
            starts = (case.tokens[:, :t] == sentence[:t]).all(-1)
            mass = torch.zeros(case.space.vocab_size, dtype=torch.float64).index_add(
                0, case.tokens[starts, t], probs[starts]
            )
            rows[k, t] = mass / mass.sum()
    return rows


@a_policy.says
def _(case: Case, found: Formulas) -> str:
    first, second = found.printed[0].tolist()
    return (
        f"a definition; π(the|∅) = {first[0]:.6g} and π(cat|the) = {second[2]:.6g}, whose product"
        f" is π(the cat) = {first[0] * second[2]:.6g}"
    )


def _rows_without_state(case: Case) -> Tensor:
    """The marginal of each position in the place of π(a|s)."""
    rows = torch.zeros(case.space.max_length, case.space.vocab_size, dtype=torch.float64)
    for sentence, probability in zip(case.tokens, case.log_policy.exp(), strict=True):
        rows[torch.arange(len(sentence)), sentence] += probability
    return rows.expand(len(case.tokens), -1, -1)


a_policy.broken("the word's marginal, whatever stands before it", _rows_without_state)


@corrected(
    "A",
    f"{_FORMULAS}, 5",
    r"$V(s) = \sum_a \pi(a \mid s)\, R(s,a)$",
    r"$V(s) = \sum_a \pi(a \mid s) \left[ R(s,a) + \gamma \sum_{s'} p(s' \mid s,a)\, V(s')"
    r" \right]$",
    "reward units",
    "t05",
    processes,
)
def a_value(process: TwoSteps) -> Formulas:
    """The value of the start: the printed sum is that of a bandit, the corrected one is (1)."""
    first, then = process.policy()
    later = (then * process.then_reward).sum(-1)  # V(s) [S]
    return Formulas(
        truth=process.expected_return(),
        printed=first @ process.first_reward,
        corrected=first @ (process.first_reward + process.discount * process.transition @ later),
    )


@a_value.says
def _(process: TwoSteps, found: Formulas) -> str:
    bandit = a_value(process._replace(then_reward=torch.zeros_like(process.then_reward)))
    return (
        "a bandit (no second reward): error"
        f" {shown(float(bandit.printed - bandit.truth))}; with a second decision the value is"
        f" {found.truth:.6g}, printed {found.printed:.6g}"
    )


a_value.broken("γ left out", lambda process: a_value(process._replace(discount=1.0)).right)


@corrected(
    "A",
    f"{_FORMULAS}, 6",
    r"$D_{KL}(\pi \Vert \pi') = \sum_s \pi(s) \log \frac{\pi(s)}{\pi'(s)}$",
    r"$D_{KL}(\pi \Vert \pi') = \sum_t E_{s_t \sim \pi} \sum_a \pi(a \mid s_t) \log"
    r" \frac{\pi(a \mid s_t)}{\pi'(a \mid s_t)}$",
    "nats",
    "t01",
    sentences,
)
def a_kl_states(case: Case) -> Formulas:
    """The KL of two policies over whole sentences; states are the prefixes at which a word is
    chosen, π(s) how often π comes there.
    """
    prefixes = [range(t) for t in range(case.space.max_length)]
    own, prior = (
        torch.stack([log_mass(case, log_probs, prefix) for prefix in prefixes])
        for log_probs in (case.log_policy, case.log_prior)
    )
    return Formulas(
        truth=kl(case.log_policy, case.log_prior),
        printed=(case.log_policy.exp() * (own - prior)).sum(),
        corrected=chain_rule_kl(case, case.log_policy),
    )


def chain_rule_kl(case: Case, log_prefixes: Tensor) -> Tensor:
    """The sum (2), the KL of each word given its prefix, prefixes averaged under a distribution
    [K]: a scalar.
    """
    own, prior = (
        conditional_log_probs(case.table(log_probs), case.tokens)
        for log_probs in (case.log_policy, case.log_prior)
    )
    return log_prefixes.exp() @ per_token_kl(own, prior).sum(-1)


a_kl_states.says(
    lambda case, found: (
        "π and q reach each first word equally often, so the sum over states is"
        f" {abs(found.printed):.4f}; KL(π‖q) = {found.truth:.6f} nats, all of it in the choice of"
        " the second word"
    )
)
a_kl_states.broken("prefixes averaged under q", lambda case: chain_rule_kl(case, case.log_prior))


def _from_half() -> tuple[Case, ...]:
    """The four sentences at λ = ½, where the printed formula's missing λ shows, then the others."""
    return (course_case().at(0.5), *sentences())


@corrected(
    "A",
    f"{_FORMULAS}, 7",
    r"$\min_\pi D_{KL}(\pi \Vert \pi') - \sum_s \pi(s)\, R(s,a)$",
    r"$\max_\pi E_\pi[R] - \lambda D_{KL}(\pi \Vert \pi') = \lambda \log \sum_y \pi'(y)\,"
    r" e^{R(y)/\lambda}$",
    "reward units",
    "t03",
    _from_half,
)
def a_objective(case: Case) -> Formulas:
    """The highest J: with one state and a sum over actions the printed objective's minimiser is the
    posterior at λ = 1, whatever λ is; the truth is where climbing from the uniform policy ends.
    """
    at_one = tilt(case.log_prior, case.rewards, 1.0).log_posterior
    return Formulas(
        truth=case.objective(climb(case, uniform(case))),
        printed=case.objective(at_one),
        corrected=case.tilted.value,
    )


a_objective.says(
    lambda case, found: (
        "with a left free it has a value for each a, and summed over a its minimiser is π* at λ ="
        f" 1 whatever λ is: at λ = ½ that has J = {found.printed:.6f}, and max J ="
        f" {found.truth:.6f}"
    )
)
a_objective.broken("log Z without its λ", lambda case: case.tilted.log_evidence)


@false(
    "A",
    "代码 (code)",
    r"`policy_prime = policy`, then policy + $0.1\,(R - \text{scalar})$, where `policy` is"
    r" a function",
    r"$\pi_{t+1}(y) \propto \pi_t(y)\, e^{\eta (R(y) - \lambda \log \pi_t(y)/q(y))}$",
    "probability",
    "t02",
    sentences,
)
def a_program(case: Case) -> Formulas:
    """What the program computes [2,K]: NaN, for it raises. Corrected it is (3), without and with
    the KL penalty; the truth are the posteriors at λ_t = 1/(ηt) and at λ_t = λ/(1 − (1 − ηλ)^t).
    """
    penalties = (0.0, case.kl_coef)
    reached = (
        float(mirror_descent_kl_coefs(kl_coef, _STEP_SIZE, _STEPS)[-1]) for kl_coef in penalties
    )
    try:
        printed = printed_program(case).expand(2, -1)
    except TypeError:
        printed = torch.full((2, len(case.tokens)), math.nan, dtype=torch.float64)
    return Formulas(
        truth=torch.stack([case.at(kl_coef).log_star.exp() for kl_coef in reached]),
        printed=printed,
        corrected=torch.stack([mirror_descent(case, kl_coef) for kl_coef in penalties]),
    )


def printed_program(case: Case) -> Tensor:
    """The program in two lines of its own kind, with the lengths made right: a policy that is a
    function, and 0.1 (reward − baseline) added to it.

    Raises:
        TypeError: a function and an array have no sum.
    """

    def policy(state: int) -> Tensor:
        return case.log_prior.exp()

    new_policy: Any = policy
    for _ in range(_STEPS):
        new_policy = new_policy + _STEP_SIZE * (case.rewards - case.log_prior.exp() @ case.rewards)
    result: Tensor = new_policy
    return result


def mirror_descent(case: Case, kl_coef: float, steps: int = _STEPS) -> Tensor:
    """The corrected program (3), started at q: π [K]; `kl_coef` 0 ascends the reward alone."""
    log_policy = case.log_prior
    for _ in range(steps):
        log_policy = logspace.log_normalize(
            log_policy + _STEP_SIZE * (case.rewards - kl_coef * (log_policy - case.log_prior))
        )
    return log_policy.exp()


@a_program.says
def _(case: Case, found: Formulas) -> str:
    try:
        printed_program(case)
        raised = "nothing"
    except TypeError as error:
        raised = type(error).__name__
    prior = case.log_prior.exp()
    added = prior + 10 * _STEP_SIZE * (case.rewards - prior @ case.rewards)
    last = float(mirror_descent(case, 0.0, 200)[3])
    return (
        f"it raises {raised} (function + array); added to an array instead, ten steps sum to"
        f" {float(added.sum()):.4g} with a smallest entry of {float(added.min()):.4g}; multiplied"
        f" and normalised, each iterate is a posterior, and 200 steps give P(a dog) = {last:.12f}"
    )


def _clamped_sum(case: Case) -> Tensor:
    policy = case.log_prior.exp()
    for _ in range(_STEPS):
        policy = policy + _STEP_SIZE * (case.rewards - policy @ case.rewards)
        policy = policy.clamp(min=0) / policy.clamp(min=0).sum()
    return policy.expand(2, -1)


a_program.broken("a sum, clamped and normalised, as it was meant", _clamped_sum)

_COUNTS = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)


def _all_counts() -> list[Tensor]:
    generator = as_generator(7)
    return [
        _COUNTS,
        10 * _COUNTS,
        *(torch.randint(0, 9, (size,), generator=generator).double() for size in (2, 5)),
    ]


@holds(
    "A",
    "5. 贝叶斯推理应用 (uses of Bayesian inference)",
    "the posterior over a model's parameters shows its uncertainty: for a table, $P(\\theta"
    " \\mid n) \\propto \\prod_k \\theta_k^{n_k}$",
    "probability",
    "t08",
    _all_counts,
)
def a_parameters(counts: Tensor) -> Formulas:
    """Mean m and variance m(1 − m)/(Σα + 1) [2,K] of the parameters of a table, under a uniform
    prior; the truth is Bayes' rule alone: E[θ_k^n | data] = evidence(data and n more of k) /
    evidence(data).
    """
    more = torch.eye(len(counts), dtype=torch.float64)
    first, second = (
        (_log_evidence(counts + n * more) - _log_evidence(counts)).exp() for n in (1, 2)
    )
    return Formulas(
        truth=torch.stack([first, second - first.square()]),
        printed=dirichlet_moments(counts + 1),
    )


def dirichlet_moments(alpha: Tensor) -> Tensor:
    """Mean m and variance m(1 − m)/(Σα + 1) of a Dirichlet law's K parameters: [2,K]."""
    mean = alpha / alpha.sum()
    return torch.stack([mean, mean * (1 - mean) / (alpha.sum() + 1)])


def _log_evidence(counts: Tensor) -> Tensor:
    """The evidence of counts [..., K], log ∫ Π θ_k^{n_k} dθ over the simplex up to a constant:
    [...].
    """
    return torch.lgamma(counts + 1).sum(-1) - torch.lgamma((counts + 1).sum(-1))


@a_parameters.says
def _(counts: Tensor, found: Formulas) -> str:
    (mean, variance), (_, later) = found.printed, a_parameters(10 * counts).printed
    shares = ", ".join(f"{14 * float(m):.0f}" for m in mean)
    return (
        f"after counts 4, 3, 2, 1 a table's parameters have mean ({shares})/14 and P(the cat) ="
        f" {float(mean[0]):.4f} ± {float(variance[0]) ** 0.5:.4f}; with ten times the data ±"
        f" {float(later[0]) ** 0.5:.4f}"
    )


a_parameters.broken("the prior left out", dirichlet_moments)
