"""Article A, tabular policies with a KL penalty and Bayesian inference: six claims.

    V(s) = Σ_a π(a|s) (r(s,a) + γ Σ_s' p(s'|s,a) V(s'))                                          (1)
    KL over a process = Σ_t E_{s_t}[Σ_a π(a|s) log π(a|s)/π'(a|s)]                               (2)
    π ← π e^{η(r − λ log π/q)}, normalised: mirror descent, through the posteriors at λ_t        (3)

A state s of a sentence is a prefix, at which its next word a is chosen; π(s) is how often π comes
there. K sentences, T words, V vocabulary; logs in nats.
"""

import math
from typing import Any

import torch
from torch import Tensor

from klrl_edu.closed_forms.budget import mirror_descent_kl_coefs
from klrl_edu.core.draws import as_generator
from klrl_edu.decisions.soft_control import policy_evaluation
from klrl_edu.estimators.kl_values import per_token_kl
from klrl_edu.models.contract import conditional_log_probs
from klrl_edu.theory.articles.examples import (
    TwoSteps,
    by_states,
    climb,
    course_case,
    log_mass,
    plain_kl,
    processes,
    sentences,
    uniform,
)
from klrl_edu.theory.cases import Case
from klrl_edu.theory.verdicts import ClaimsOf, Formulas, shown

article = ClaimsOf("A", sentences)
_FORMULAS = "数学模型和公式 (model and formulas)"
_STEPS, _STEP_SIZE = 20, 0.1


@article.at(f"{_FORMULAS}, 4", "probability", "t04").holds(r"$\pi(a \mid s) = p(a \mid s)$")
def a_policy(case: Case) -> Formulas:
    """A policy is a language model's conditional probability [K,T,V], at every prefix of every
    sentence; the truth is p(s,a)/p(s), by adding up sentences.
    """
    model = case.table(case.log_policy)
    return Formulas(
        truth=_next_words(case, given_state=True),
        printed=conditional_log_probs(model, case.tokens).exp(),
        broken={
            "the word's marginal, whatever stands before it": _next_words(case, given_state=False)
        },
        says=lambda found: (
            f"a definition; π(the|∅) = {found.printed[0, 0, 0]:.6g} and π(cat|the) ="
            f" {found.printed[0, 1, 2]:.6g}, whose product is π(the cat) ="
            f" {found.printed[0, 0, 0] * found.printed[0, 1, 2]:.6g}"
        ),
    )


def _next_words(case: Case, *, given_state: bool) -> Tensor:
    """How often each word comes next [K,T,V], among the sentences in the same state or among all,
    by their masses.
    """
    rows = torch.zeros(*case.tokens.shape, case.space.vocab_size, dtype=torch.float64)
    for k, sentence in enumerate(case.tokens):
        for t in range(len(sentence)):
            # the state is all words before; none of them given, every sentence is alike
            given = list(range(t)) if given_state else []
            alike = (case.tokens[:, given] == sentence[given]).all(-1)
            rows[k, t].index_add_(0, case.tokens[alike, t], case.log_policy.exp()[alike])
    return rows / rows.sum(-1, keepdim=True)


@article.at(f"{_FORMULAS}, 5", "reward units", "t05", on=processes).corrected(
    r"$V(s) = \sum_a \pi(a \mid s)\, R(s,a)$",
    r"$V(s) = \sum_a \pi(a \mid s) \left[ R(s,a) + \gamma \sum_{s'} p(s' \mid s,a)\, V(s')"
    r" \right]$",
)
def a_value(process: TwoSteps) -> Formulas:
    """The value of the start: the printed sum is that of a bandit, the corrected one is (1), solved
    by the package; the truth is the mean over all trajectories.
    """
    printed = process.policy()[0] @ process.first_reward
    bandit = process._replace(then_reward=torch.zeros_like(process.then_reward))
    return Formulas(
        truth=process.expected_return(),
        printed=printed,
        corrected=_value(process),
        broken={"γ left out": _value(process._replace(discount=1.0))},
        says=lambda found: (
            "a bandit (no second reward): error"
            f" {shown(float(printed - bandit.expected_return()))}; with a second decision the value"
            f" is {found.truth:.6g}, printed {printed:.6g}"
        ),
    )


def _value(process: TwoSteps) -> Tensor:
    """The value of the start by the package, a scalar; λ = 0, for no KL is charged here."""
    found = policy_evaluation(process.as_decision_process(), process.log_policy(), kl_coef=0.0)
    return torch.tensor(found.value, dtype=torch.float64)


@article.at(f"{_FORMULAS}, 6", "nats", "t01").corrected(
    r"$D_{KL}(\pi \Vert \pi') = \sum_s \pi(s) \log \frac{\pi(s)}{\pi'(s)}$",
    r"$D_{KL}(\pi \Vert \pi') = \sum_t E_{s_t \sim \pi} \sum_a \pi(a \mid s_t) \log"
    r" \frac{\pi(a \mid s_t)}{\pi'(a \mid s_t)}$",
)
def a_kl_states(case: Case) -> Formulas:
    """The KL of two policies over whole sentences, from how often they come to each state or, by
    (2), from what they choose there.
    """
    # after the last word comes no state, so the printed sum cannot see how it is chosen
    states = [range(t) for t in range(case.space.max_length)]
    own, prior = (
        torch.stack([log_mass(case, log_probs, state) for state in states])
        for log_probs in (case.log_policy, case.log_prior)
    )
    return Formulas(
        truth=plain_kl(case.log_policy, case.log_prior),
        printed=(case.log_policy.exp() * (own - prior)).sum(),
        corrected=chain_rule_kl(case, case.log_policy),
        broken={
            "prefixes averaged under q": chain_rule_kl(case, case.log_prior),
            "in bits": chain_rule_kl(case, case.log_policy) / math.log(2),
        },
        says=lambda found: (
            "π and q reach each first word equally often, so the sum over states is"
            f" {abs(found.printed):.4f}; KL(π‖q) = {found.truth:.6f} nats, all of it in the choice"
            " of the second word"
        ),
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


def _from_half() -> tuple[Case, ...]:
    """The four sentences at λ = ½, where the printed formula's missing λ shows, then the others."""
    return (course_case().at(0.5), *sentences())


@article.at(f"{_FORMULAS}, 7", "reward units", "t03", on=_from_half).corrected(
    r"$\min_\pi D_{KL}(\pi \Vert \pi') - \sum_s \pi(s)\, R(s,a)$",
    r"$\max_\pi E_\pi[R] - \lambda D_{KL}(\pi \Vert \pi') = \lambda \log \sum_y \pi'(y)\,"
    r" e^{R(y)/\lambda}$",
)
def a_objective(case: Case) -> Formulas:
    """The highest J, with states as in 6. Where π chooses the free a in each state and D_KL is 6
    corrected, the printed minimiser is the posterior at λ = 1, whatever λ is: here by the soft
    values of the states. The truth is where climbing from the uniform policy ends.
    """
    return Formulas(
        truth=case.objective(climb(case, uniform(case))),
        printed=case.objective(by_states(case.at(1.0))),
        corrected=case.tilted.value,
        broken={"log Z without its λ": case.tilted.log_evidence},
        says=lambda found: (
            "with a left free it has a value for each a, and with π's own a in each state its"
            f" minimiser is π* at λ = 1 whatever λ is: at λ = ½ that has J = {found.printed:.6f},"
            f" and max J = {found.truth:.6f}"
        ),
    )


@article.at("代码 (code)", "probability", "t02").false(
    r"`policy_prime = policy`, then policy + $0.1\,(R - \text{scalar})$, where `policy` is"
    r" a function",
    r"$\pi_{t+1}(y) \propto \pi_t(y)\, e^{\eta (R(y) - \lambda \log \pi_t(y)/q(y))}$",
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
        printed, raised = printed_program(case), "nothing"
    except TypeError as error:
        printed, raised = torch.full_like(case.log_prior, math.nan), type(error).__name__
    prior = case.log_prior.exp()
    added = prior + 10 * _STEP_SIZE * (case.rewards - prior @ case.rewards)
    return Formulas(
        truth=torch.stack([case.at(kl_coef).log_star.exp() for kl_coef in reached]),
        printed=printed.expand(2, -1),
        corrected=torch.stack([mirror_descent(case, kl_coef) for kl_coef in penalties]),
        broken={"a sum, clamped and normalised, as it was meant": _clamped_sum(case)},
        says=lambda found: (
            f"it raises {raised} (function + array); added to an array instead, ten steps sum to"
            f" {added.sum():.4g} with a smallest entry of {added.min():.4g}; multiplied and"
            " normalised, each iterate is a posterior, and 200 steps give P(a dog) ="
            f" {mirror_descent(case, 0.0, 200)[3]:.12f}"
        ),
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
        penalised = case.rewards - kl_coef * (log_policy - case.log_prior)
        log_policy = torch.log_softmax(log_policy + _STEP_SIZE * penalised, 0)
    return log_policy.exp()


def _clamped_sum(case: Case) -> Tensor:
    policy = case.log_prior.exp()
    for _ in range(_STEPS):
        policy = policy + _STEP_SIZE * (case.rewards - policy @ case.rewards)
        # the reading that would give probabilities: entries below 0 cut, the rest rescaled
        policy = policy.clamp(min=0) / policy.clamp(min=0).sum()
    return policy.expand(2, -1)


def _all_counts() -> list[Tensor]:
    generator = as_generator(7)
    four = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    drawn = (torch.randint(0, 9, (size,), generator=generator).double() for size in (2, 5))
    return [four, 10 * four, *drawn]


@article.at(
    "5. 贝叶斯推理应用 (uses of Bayesian inference)", "probability", "t08", on=_all_counts
).holds(
    "the posterior over a model's parameters shows its uncertainty: for a table, $P(\\theta"
    " \\mid n) \\propto \\prod_k \\theta_k^{n_k}$"
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
    (mean, variance), later = dirichlet_moments(counts + 1), dirichlet_moments(10 * counts + 1)
    return Formulas(
        truth=torch.stack([first, second - first.square()]),
        printed=torch.stack([mean, variance]),
        broken={"the prior left out": dirichlet_moments(counts)},
        says=lambda found: (
            "after counts 4, 3, 2, 1 a table's parameters have mean"
            f" ({', '.join(f'{14 * m:.0f}' for m in mean)})/14 and P(the cat) = {mean[0]:.4f} ±"
            f" {variance[0].sqrt():.4f}; with ten times the data ± {later[1, 0].sqrt():.4f}"
        ),
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
