"""Article E, rewards from AI feedback, Q-learning and a Transformer policy: three claims.

    Q ← (1 − α) Q + α (r + γ max Q'):
    its fixed point is the best return; soft, with prior q: λ log Σ q e^{Q'/λ} for max Q'        (1)
    E_π[(1/T) Σ_t ∇log π(a_t|s_t)] = ∇E_π[1/T]:  0 where T is fixed;
    ∇E_π[r] = E_π[r Σ_t ∇log π(a_t|s_t)]                                                         (2)
    P(y ≻ y₀) = σ(r + b − r₀ − b₀) for a judge who adds b: its logit is the reward r + b up to a
    constant, whose posterior is λ KL(π_{r+b}‖π*) worse                                          (3)

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
from klrl_edu.theory.verdicts import ClaimsOf, Formulas, shown

article = ClaimsOf("E", sentences)

_RATE, _SWEEPS = 0.5, 100  # after n sweeps of two decisions an error of order n·2^−n is left


@article.at("4.1", "reward units", "t05", on=processes).corrected(
    r"$Q(s,a) = \sum_k \alpha r_k + (1 - \alpha) \max_{a'} Q(s',a')$",
    r"$Q(s,a) \leftarrow (1 - \alpha)\, Q(s,a) + \alpha \left( r + \gamma \max_{a'}"
    r" Q(s',a') \right)$",
)
def e_q_update(process: TwoSteps) -> Formulas:
    """The values Q(a) then Q(s,b) [A + S·A]: the fixed point of Q = α r + (1 − α) max Q', and what
    many sweeps of (1) from 0 end at.
    """
    last = _RATE * process.then_reward
    first = _RATE * process.first_reward + (1 - _RATE) * process.transition @ last.amax(-1)
    return Formulas(
        truth=process.best_action_values(),
        printed=torch.cat([first, last.reshape(-1)]),
        corrected=_swept(process),
        broken={"γ left out": _swept(process._replace(discount=1.0))},
        says=lambda found: (
            f"at α = ½ the printed update settles at {found.printed[0]:.4f}, {found.printed[1]:.4f}"
            " for the two first actions, and their best returns are"
            f" {found.truth[0]:.4f}, {found.truth[1]:.4f}; its soft form on the four sentences"
            f" settles at V(∅) = {soft_update_value(course_case()):.9f} = λ log Z"
        ),
    )


def _swept(process: TwoSteps) -> Tensor:
    """The values of both decisions [A + S·A] after many sweeps of (1)."""
    first, last = torch.zeros_like(process.first_reward), torch.zeros_like(process.then_reward)
    # each sweep reads the last one's values: the first decision settles after the second
    for _ in range(_SWEEPS):
        target = process.first_reward + process.discount * process.transition @ last.amax(-1)
        first = (1 - _RATE) * first + _RATE * target
        last = (1 - _RATE) * last + _RATE * process.then_reward
    return torch.cat([first, last.reshape(-1)])


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
        # nothing follows a sentence's last word, which has no child
        later = torch.where(trie.child >= 0, state_values[trie.child.clamp(min=0)], 0.0)
        values = (1 - _RATE) * values + _RATE * (reward + later)
    return state_values[0]


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
        # normalised again, so that log-probabilities of no distribution are not hidden: they would
        # have the same gradient here as in `mean_score`
        return self._gradient(torch.softmax(self.log_probs(), 0) @ values)

    def mean_score(self, values: Tensor) -> Tensor:
        """The mean score E_π[f Σ_t ∇log π(a_t|s_t)] by enumeration, for values f [K]:
        [prefixes·V].
        """
        scores = self.log_probs()
        # the law is held fixed: what is differentiated is log π alone
        return self._gradient((scores.detach().exp() * values) @ scores)

    def mean_length(self) -> Tensor:
        """The mean number of tokens of a text, a scalar."""
        return self.log_probs().detach().exp() @ self.lengths

    def moved(self, step: Tensor) -> "Texts":
        """The same with [prefixes·V] added to the policy's logits."""
        logits = self.policy.logits.detach()
        return self._replace(
            policy=PrefixTable(self.policy.space, logits=logits + step.reshape_as(logits))
        )

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


@article.at("4.2", "reward units", "t05", on=two_word_texts).false(
    r"$\partial \log \pi(a \mid s) / \partial \theta \approx \frac{1}{T} \sum_t \partial"
    r" \log \pi(a_t \mid s_t) / \partial \theta$",
    r"$\nabla E_\pi[r] = E_\pi \left[ r \sum_t \partial \log \pi(a_t \mid s_t) / \partial"
    r" \theta \right]$",
)
def e_score(case: Texts) -> Formulas:
    """The gradient of the mean reward [prefixes·V]: the printed mean score a token knows no reward;
    (2) weighs the score by it.
    """
    printed, fixed = case.mean_score(1 / case.lengths), two_word_texts()[-1]
    difference = (printed - case.gradient_of_mean(1 / case.lengths)).abs().max()
    return Formulas(
        truth=case.gradient_of_mean(case.rewards),
        printed=printed,
        corrected=case.mean_score(case.rewards),
        broken={"the reward a token": case.mean_score(case.rewards / case.lengths)},
        says=lambda found: (
            "without a return its mean at fixed T is"
            f" {shown(float(fixed.mean_score(1 / fixed.lengths).abs().max()))}; where texts end"
            f" themselves it is ∇E[1/T] (difference {shown(float(difference))}), and one step along"
            f" it shortens the mean length from {case.mean_length():.4f} to"
            f" {case.moved(printed).mean_length():.4f}"
        ),
    )


@article.at("1, 3 (3)", "reward units", "t12").corrected(
    r"a judge's preferences give the reward: $\hat r(y) = \sigma^{-1}(P(y \succ y_0))$",
    r"$r(y) = \sigma^{-1}(P(y \succ y_0)) - b(y)$ up to a constant, $b$ what the judge adds"
    r" to the gold reward",
)
def e_feedback(case: Case) -> Formulas:
    """The reward [K] less that of the first sentence, from a judge's preferences: with what the
    judge adds, and less it.
    """
    bias = (case.tokens[:, 0] == 0).double()  # one unit for the vocabulary's first word
    judged, fair = (recovered_reward(bradley_terry(case.rewards + b)) for b in (bias, 0 * bias))
    added = bias - bias[0]
    return Formulas(
        truth=case.rewards - case.rewards[0],
        printed=judged,
        corrected=judged - added,
        broken={
            "the bias added again": judged + added,
            "log-odds twice as large": 2 * (judged - added),
        },
        says=lambda found: (
            "a judge who adds 1 to what starts with 'the' costs λ KL(π_judge‖π*) ="
            f" {_regret(case, judged):.6f} reward units of the gold reward; a Bradley–Terry judge"
            f" of the gold reward costs {shown(_regret(case, fair))}"
        ),
    )


def recovered_reward(preferences: Tensor) -> Tensor:
    """The reward less that of the first sentence [K], from preferences [K,K] of a Bradley–Terry
    judge.
    """
    return torch.logit(preferences)[:, 0]


def _regret(case: Case, rewards: Tensor) -> float:
    """What the posterior of other rewards [K] costs by the case's own, λ KL(·‖π*)."""
    judged = tilt(case.log_prior, rewards, case.kl_coef).log_posterior
    return case.kl_coef * float(kl(judged, case.log_star))
