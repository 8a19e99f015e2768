"""Article E, rewards from AI feedback, Q-learning and a Transformer policy: three claims.

    Q ← (1 − α) Q + α (r + γ max Q'):
    its fixed point is the best return; soft, with prior q: λ log Σ q e^{Q'/λ} for max Q'        (1)
    E_π[(1/T) Σ_t ∇log π(a_t|s_t)] = ∇E_π[1/T]:  0 where T is fixed;
    ∇E_π[r] = E_π[r Σ_t ∇log π(a_t|s_t)]                                                         (2)
    preferences of a judge who sees r + b give the posterior of r + b: λ KL(π_{r+b}‖π*) worse    (3)

Two decisions with A actions and S states; K texts of up to T tokens, EOS counted; logs in nats,
values in reward units.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.closed_forms.preferences import bradley_terry
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core.draws import as_generator
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.soft_bellman import soft_bellman
from klrl_edu.models.contract import token_log_probs
from klrl_edu.models.table import PrefixTable
from klrl_edu.theory.articles.examples import TwoSteps, course_case, processes, sentences
from klrl_edu.theory.cases import Case
from klrl_edu.theory.gradients import kl
from klrl_edu.theory.verdicts import Formulas, corrected, false, shown

_RATE, _SWEEPS = 0.5, 100  # after n sweeps of two decisions an error of order n·2^−n is left


@corrected(
    "E",
    "4.1",
    r"$Q(s,a) = \sum_k \alpha r_k + (1 - \alpha) \max_{a'} Q(s',a')$",
    r"$Q(s,a) \leftarrow (1 - \alpha)\, Q(s,a) + \alpha \left( r + \gamma \max_{a'}"
    r" Q(s',a') \right)$",
    "reward units",
    "t05",
    processes,
)
def e_q_update(process: TwoSteps) -> Formulas:
    """The values Q(a) then Q(s,b) [A + S·A]: the fixed point of Q = α r + (1 − α) max Q', and what
    many sweeps of (1) from 0 end at.
    """
    fixed = _RATE * process.then_reward
    fixed_first = _RATE * process.first_reward + (1 - _RATE) * process.transition @ fixed.amax(-1)
    first, last = torch.zeros_like(process.first_reward), torch.zeros_like(process.then_reward)
    for _ in range(_SWEEPS):
        target = process.first_reward + process.discount * process.transition @ last.amax(-1)
        first = (1 - _RATE) * first + _RATE * target
        last = (1 - _RATE) * last + _RATE * process.then_reward
    return Formulas(
        truth=process.best_action_values(),
        printed=torch.cat([fixed_first, fixed.reshape(-1)]),
        corrected=torch.cat([first, last.reshape(-1)]),
    )


def soft_update_value(case: Case) -> Tensor:
    """The soft value of the start, V(∅), after many sweeps of (1) with λ log Σ q e^{Q/λ} in the
    place of the maximum, over the tree of words: a scalar.
    """
    trie, log_prior = case.support.trie, soft_bellman(case.support, case.kl_coef).log_prior
    reward = torch.zeros_like(log_prior)
    reward[trie.edge_of[:, -1]] = case.rewards
    values = torch.zeros_like(log_prior)
    for _ in range(_SWEEPS):
        weights = torch.exp(log_prior + values / case.kl_coef)
        totals = torch.zeros(trie.nodes, dtype=torch.float64).index_add(0, trie.parent, weights)
        state_values = case.kl_coef * totals.log()
        later = torch.where(trie.child >= 0, state_values[trie.child.clamp(min=0)], 0.0)
        values = (1 - _RATE) * values + _RATE * (reward + later)
    return state_values[0]


@e_q_update.says
def _(process: TwoSteps, found: Formulas) -> str:
    seen, true = (
        ", ".join(f"{value:.4f}" for value in values[:2].tolist())
        for values in (found.printed, found.truth)
    )
    soft = float(soft_update_value(course_case()))
    return (
        f"at α = ½ the printed update settles at {seen} for the two first actions, and their best"
        f" returns are {true}; its soft form on the four sentences settles at V(∅) = {soft:.9f} = λ"
        " log Z"
    )


e_q_update.broken("γ left out", lambda process: e_q_update(process._replace(discount=1.0)).right)


class Texts(NamedTuple):
    """Every text of a space under a policy with one row of logits a prefix: tokens [K,T], rewards
    [K].
    """

    policy: PrefixTable
    tokens: Tensor
    rewards: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text [K], EOS counted."""
        return self.policy.space.live(self.tokens).sum(-1).double()

    def log_probs(self) -> Tensor:
        """Each text's log-probability, log π(y) = Σ_t log π(a_t|s_t) [K], with gradient."""
        return token_log_probs(self.policy, self.tokens).sum(-1)

    def gradient_of_mean(self, values: Tensor) -> Tensor:
        """The gradient of E_π[f] by autograd, for values f [K]: [prefixes·V]."""
        return self._gradient(self.log_probs().exp() @ values)

    def mean_score(self, values: Tensor) -> Tensor:
        """The mean score E_π[f Σ_t ∇log π(a_t|s_t)] by enumeration, for values f [K]:
        [prefixes·V].
        """
        scores = self.log_probs()
        return self._gradient((scores.detach().exp() * values) @ scores)

    def _gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.policy.logits)[0].reshape(-1)


@cache
def two_word_texts() -> tuple[Texts, ...]:
    """Two words: up to three tokens with EOS, up to four, and exactly two."""
    return tuple(_random_texts(*shape) for shape in ((8, 3, True), (9, 4, True), (10, 2, False)))


def _random_texts(seed: int, length: int, eos: bool) -> Texts:
    generator = as_generator(seed)
    space = SequenceSpace(("a", "b"), max_length=length, eos=eos)
    tokens, shape = space.all_tokens(), PrefixTable(space).logits.shape
    policy = PrefixTable(space, logits=torch.randn(shape, generator=generator, dtype=torch.float64))
    return Texts(policy, tokens, torch.randn(len(tokens), generator=generator, dtype=torch.float64))


@false(
    "E",
    "4.2",
    r"$\partial \log \pi(a \mid s) / \partial \theta \approx \frac{1}{T} \sum_t \partial"
    r" \log \pi(a_t \mid s_t) / \partial \theta$",
    r"$\nabla E_\pi[r] = E_\pi \left[ r \sum_t \partial \log \pi(a_t \mid s_t) / \partial"
    r" \theta \right]$",
    "reward units",
    "t05",
    two_word_texts,
)
def e_score(case: Texts) -> Formulas:
    """The gradient of the mean reward [prefixes·V]: the printed mean score a token knows no reward;
    (2) weighs the score by it.
    """
    return Formulas(
        truth=case.gradient_of_mean(case.rewards),
        printed=case.mean_score(1 / case.lengths),
        corrected=case.mean_score(case.rewards),
    )


@e_score.says
def _(ending: Texts, found: Formulas) -> str:
    fixed = two_word_texts()[-1]
    none = float(fixed.mean_score(1 / fixed.lengths).abs().max())
    logits = ending.policy.logits.detach()
    pushed = PrefixTable(ending.policy.space, logits=logits + found.printed.reshape_as(logits))
    before, after = (
        float(case.log_probs().detach().exp() @ ending.lengths)
        for case in (ending, ending._replace(policy=pushed))
    )
    difference = (found.printed - ending.gradient_of_mean(1 / ending.lengths)).abs().max()
    return (
        f"without a return its mean at fixed T is {shown(none)}; where texts end themselves it is"
        f" ∇E[1/T] (difference {shown(float(difference))}), and one step along it shortens the mean"
        f" length from {before:.4f} to {after:.4f}"
    )


e_score.broken("the reward a token", lambda case: case.mean_score(case.rewards / case.lengths))


@corrected(
    "E",
    "1, 3 (3)",
    r"a judge's preferences give the reward: $\hat r(y) = \sigma^{-1}(P(y \succ y_0))$",
    r"$r(y) = \sigma^{-1}(P(y \succ y_0)) - b(y)$ up to a constant, $b$ what the judge adds"
    r" to the gold reward",
    "probability",
    "t12",
    sentences,
)
def e_feedback(case: Case) -> Formulas:
    """The posterior [K] of the reward that a judge's preferences show: with what the judge adds,
    and less it.
    """
    bias = _bias(case)
    shown_reward = recovered_reward(bradley_terry(case.rewards + bias))
    return Formulas(
        truth=case.log_star.exp(),
        printed=_posterior_of(case, shown_reward).exp(),
        corrected=_posterior_of(case, shown_reward - bias).exp(),
    )


def _bias(case: Case) -> Tensor:
    """What this judge adds to the reward [K]: one unit for a sentence that starts with the first
    word of the vocabulary.
    """
    return (case.tokens[:, 0] == 0).double()


def recovered_reward(preferences: Tensor) -> Tensor:
    """The reward less that of the first sentence [K], from preferences [K,K] of a Bradley–Terry
    judge.
    """
    return torch.logit(preferences)[:, 0]


def _posterior_of(case: Case, rewards: Tensor) -> Tensor:
    return tilt(case.log_prior, rewards, case.kl_coef).log_posterior


@e_feedback.says
def _(case: Case, found: Formulas) -> str:
    fair = _posterior_of(case, recovered_reward(bradley_terry(case.rewards)))
    regret, fair_regret = (
        case.kl_coef * float(kl(log_policy, case.log_star))
        for log_policy in (found.printed.log(), fair)
    )
    return (
        f"a judge who adds 1 to what starts with 'the' costs λ KL(π_judge‖π*) = {regret:.6f} reward"
        " units of the gold reward; a Bradley–Terry judge of the gold reward costs"
        f" {shown(fair_regret)}"
    )


e_feedback.broken(
    "the bias added again",
    lambda case: _posterior_of(case, case.rewards + 2 * _bias(case)).exp(),
)
