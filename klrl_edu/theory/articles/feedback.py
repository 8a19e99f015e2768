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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from klrl_edu.core.draws import as_generator
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.enumeration import problem_support, tilt
from klrl_edu.exact.preferences import bradley_terry
from klrl_edu.exact.soft_bellman import soft_bellman
from klrl_edu.models.contract import token_log_probs
from klrl_edu.models.table import PrefixTable
from klrl_edu.theory.articles.claim import Claim, shown
from klrl_edu.theory.articles.examples import (
    Sentences,
    TwoSteps,
    four_sentences,
    kl,
    processes,
    sentences,
)

_RATE, _SWEEPS = 0.5, 100  # after n sweeps of two decisions an error of order n·2^−n is left


def printed_fixed_point(process: TwoSteps) -> Tensor:
    """Q(a) then Q(s,b) [A + S·A] of Q = α r + (1 − α) max Q'."""
    last = _RATE * process.then_reward
    return torch.cat(
        [
            _RATE * process.first_reward + (1 - _RATE) * process.transition @ last.amax(-1),
            last.reshape(-1),
        ]
    )


def updated_values(process: TwoSteps) -> Tensor:
    """Q(a) then Q(s,b) [A + S·A] after many sweeps of the update (1), from 0."""
    first, last = torch.zeros_like(process.first_reward), torch.zeros_like(process.then_reward)
    for _ in range(_SWEEPS):
        target = process.first_reward + process.discount * process.transition @ last.amax(-1)
        first, last = (
            (1 - _RATE) * first + _RATE * target,
            (1 - _RATE) * last + _RATE * process.then_reward,
        )
    return torch.cat([first, last.reshape(-1)])


def soft_update_value(example: Sentences) -> Tensor:
    """V(∅) after many sweeps of (1) with λ log Σ q e^{Q/λ} in the place of the maximum, over the
    tree of words: a scalar.
    """
    support = problem_support(example.problem())
    trie, log_prior = support.trie, soft_bellman(support, example.kl_coef).log_prior
    reward = torch.zeros_like(log_prior)
    reward[trie.edge_of[:, -1]] = support.rewards
    values = torch.zeros_like(log_prior)
    for _ in range(_SWEEPS):
        weights = torch.exp(log_prior + values / example.kl_coef)
        state_values = (
            example.kl_coef
            * torch.zeros(trie.nodes, dtype=torch.float64).index_add(0, trie.parent, weights).log()
        )
        later = torch.where(trie.child >= 0, state_values[trie.child.clamp(min=0)], 0.0)
        values = (1 - _RATE) * values + _RATE * (reward + later)
    return state_values[0]


def _says_q_update() -> str:
    process, example = processes()[0], four_sentences()
    seen, true = (
        ", ".join(f"{value:.4f}" for value in found[:2].tolist())
        for found in (printed_fixed_point(process), process.best_action_values())
    )
    soft = float(soft_update_value(example))
    return (
        f"at α = ½ the printed update settles at {seen} for the two first actions, and their best"
        f" returns are {true}; its soft form on the four sentences settles at V(∅) = {soft:.9f} = λ"
        " log Z"
    )


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

    def token_log_probs(self) -> Tensor:
        """log π(a_t|s_t) [K,T] with gradient, 0 after EOS."""
        return token_log_probs(self.policy, self.tokens)

    def gradient(self, value: Tensor) -> Tensor:
        """∇ of a scalar in the policy's logits, [prefixes·V]."""
        return torch.autograd.grad(value, self.policy.logits)[0].reshape(-1)


@cache
def texts() -> tuple[Texts, ...]:
    """Two words: up to three tokens with EOS, up to four, and exactly two."""
    return tuple(_random_texts(*shape) for shape in ((8, 3, True), (9, 4, True), (10, 2, False)))


def _random_texts(seed: int, length: int, eos: bool) -> Texts:
    generator = as_generator(seed)
    space = SequenceSpace(("a", "b"), max_length=length, eos=eos)
    tokens, shape = space.all_tokens(), PrefixTable(space).logits.shape
    policy = PrefixTable(space, logits=torch.randn(shape, generator=generator, dtype=torch.float64))
    return Texts(policy, tokens, torch.randn(len(tokens), generator=generator, dtype=torch.float64))


def mean_score_a_token(case: Texts) -> Tensor:
    """E_π[(1/T) Σ_t ∇log π(a_t|s_t)] [prefixes·V], by enumeration."""
    scores = case.token_log_probs().sum(-1)
    return case.gradient((scores.detach().exp() / case.lengths) @ scores)


def rewarded_score(case: Texts) -> Tensor:
    """E_π[r Σ_t ∇log π(a_t|s_t)] [prefixes·V], by enumeration."""
    scores = case.token_log_probs().sum(-1)
    return case.gradient((scores.detach().exp() * case.rewards) @ scores)


def gradient_of_mean(case: Texts, values: Tensor) -> Tensor:
    """∇E_π[f] [prefixes·V] by autograd, for values f [K]."""
    return case.gradient(case.token_log_probs().sum(-1).exp() @ values)


def _says_score() -> str:
    ending, _, fixed = texts()
    none = float(mean_score_a_token(fixed).abs().max())
    law = ending.token_log_probs().detach().sum(-1).exp()
    pushed = PrefixTable(
        ending.policy.space,
        logits=ending.policy.logits.detach()
        + mean_score_a_token(ending).reshape_as(ending.policy.logits),
    )
    later = ending._replace(policy=pushed).token_log_probs().detach().sum(-1).exp()
    before, after = (float(probs @ ending.lengths) for probs in (law, later))
    difference = float(
        (mean_score_a_token(ending) - gradient_of_mean(ending, 1 / ending.lengths)).abs().max()
    )
    return (
        f"without a return its mean at fixed T is {shown(none)}; where texts end themselves it is"
        f" ∇E[1/T] (difference {shown(difference)}), and one step along it shortens the mean length"
        f" from {before:.4f} to {after:.4f}"
    )


def _bias(example: Sentences) -> Tensor:
    """What this judge adds to the reward [K]: one unit for a sentence that starts with the first
    word of the vocabulary.
    """
    return (example.tokens[:, 0] == 0).double()


def recovered_reward(preferences: Tensor) -> Tensor:
    """r(y) − r(first sentence) [K], from preferences [K,K] of a Bradley–Terry judge."""
    return torch.logit(preferences)[:, 0]


def posterior_by_judge(example: Sentences) -> Tensor:
    """The posterior [K] of the reward that the judge's preferences show."""
    reward = recovered_reward(bradley_terry(example.rewards + _bias(example)))
    return tilt(example.log_prior, reward, example.kl_coef).log_posterior.exp()


def posterior_without_bias(example: Sentences) -> Tensor:
    """The posterior [K] of that reward less the judge's bias."""
    reward = recovered_reward(bradley_terry(example.rewards + _bias(example))) - _bias(example)
    return tilt(example.log_prior, reward, example.kl_coef).log_posterior.exp()


def _says_feedback() -> str:
    example = four_sentences()
    regret = example.kl_coef * float(kl(posterior_by_judge(example).log(), example.posterior()))
    fair = tilt(
        example.log_prior, recovered_reward(bradley_terry(example.rewards)), example.kl_coef
    ).log_posterior
    fair_regret = example.kl_coef * float(kl(fair, example.posterior()))
    return (
        f"a judge who adds 1 to what starts with 'the' costs λ KL(π_judge‖π*) = {regret:.6f} reward"
        " units of the gold reward; a Bradley–Terry judge of the gold reward costs"
        f" {shown(fair_regret)}"
    )


FEEDBACK: tuple[Claim[Any], ...] = (
    Claim(
        name="e-q-update",
        article="E",
        section="4.1",
        printed=r"$Q(s,a) = \sum_k \alpha r_k + (1 - \alpha) \max_{a'} Q(s',a')$",
        corrected=(
            r"$Q(s,a) \leftarrow (1 - \alpha)\, Q(s,a) + \alpha \left( r + \gamma \max_{a'}"
            r" Q(s',a') \right)$"
        ),
        verdict="holds with a correction",
        tutorial="t05",
        unit="reward units",
        examples=processes,
        truth=TwoSteps.best_action_values,
        asserted=printed_fixed_point,
        repaired=updated_values,
        says=_says_q_update,
    ),
    Claim(
        name="e-score",
        article="E",
        section="4.2",
        printed=(
            r"$\partial \log \pi(a \mid s) / \partial \theta \approx \frac{1}{T} \sum_t \partial"
            r" \log \pi(a_t \mid s_t) / \partial \theta$"
        ),
        corrected=(
            r"$\nabla E_\pi[r] = E_\pi \left[ r \sum_t \partial \log \pi(a_t \mid s_t) / \partial"
            r" \theta \right]$"
        ),
        verdict="false",
        tutorial="t05",
        unit="reward units",
        examples=texts,
        truth=lambda case: gradient_of_mean(case, case.rewards),
        asserted=mean_score_a_token,
        repaired=rewarded_score,
        says=_says_score,
    ),
    Claim(
        name="e-feedback",
        article="E",
        section="1, 3 (3)",
        printed=r"a judge's preferences give the reward: $\hat r(y) = \sigma^{-1}(P(y \succ y_0))$",
        corrected=(
            r"$r(y) = \sigma^{-1}(P(y \succ y_0)) - b(y)$ up to a constant, $b$ what the judge adds"
            r" to the gold reward"
        ),
        verdict="holds with a correction",
        tutorial="t12",
        unit="probability",
        examples=sentences,
        truth=lambda example: example.posterior().exp(),
        asserted=posterior_by_judge,
        repaired=posterior_without_bias,
        says=_says_feedback,
    ),
)
