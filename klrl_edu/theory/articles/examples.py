"""What the claims are tried on: the four sentences, a few random problems of the same kind, and
processes of two decisions.

    ∂ log π(y)/∂θ = e_y − π,    ∇E_π[f] = π ∘ (f − E_π[f])
    in sequence logits, f held fixed                                                             (1)

K sentences of T words over a vocabulary of V; A actions, S states. Logs in nats, rewards in reward
units. The random ones come from fixed seeds.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.draws import as_generator
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.enumeration import tilt
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import (
    FOUR_POLICY,
    FOUR_REWARDS,
    FOUR_SENTENCES,
    four_sentences_space,
)
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward

FOUR_AUXILIARY = {"the cat": 0.3, "the dog": 0.4, "a cat": 0.2, "a dog": 0.1}
_RANDOM = ((1, 2, 2, 0.5), (2, 3, 2, 2.0), (3, 2, 3, 0.7))  # seed, words, length, λ


class Sentences(NamedTuple):
    """Distributions over the same K sentences: prior q, policy π, auxiliary model p, each as
    log-probabilities [K]; tokens [K,T], rewards [K], λ.
    """

    space: SequenceSpace
    tokens: Tensor
    log_prior: Tensor
    log_policy: Tensor
    log_auxiliary: Tensor
    rewards: Tensor
    kl_coef: float

    def table(self, log_probs: Tensor) -> SequenceTable:
        """A distribution [K] over the sentences as a language model, without gradient."""
        return SequenceTable(self.space, self.tokens, log_probs).requires_grad_(False)

    def problem(self, kl_coef: float | None = None) -> Problem:
        """Prior and reward as a problem, at the example's λ or another."""
        rewards = table_reward(
            dict(zip(self.space.decode(self.tokens), self.rewards.tolist(), strict=True)),
            self.space,
        )
        return Problem(
            self.table(self.log_prior), rewards, self.kl_coef if kl_coef is None else kl_coef
        )

    def posterior(self) -> Tensor:
        """log π* [K]."""
        return tilt(self.log_prior, self.rewards, self.kl_coef).log_posterior


def four_sentences() -> Sentences:
    """The course's q, π, p and r at λ = 1."""
    space = four_sentences_space()
    tables = (FOUR_SENTENCES, FOUR_POLICY, FOUR_AUXILIARY, FOUR_REWARDS)
    prior, policy, auxiliary, rewards = (
        torch.tensor(list(table.values()), dtype=torch.float64) for table in tables
    )
    return Sentences(
        space,
        space.encode(list(FOUR_SENTENCES)),
        prior.log(),
        policy.log(),
        auxiliary.log(),
        rewards,
        kl_coef=1.0,
    )


@cache
def sentences() -> tuple[Sentences, ...]:
    """The four sentences, then random problems."""
    return (four_sentences(), *(_random_sentences(*shape) for shape in _RANDOM))


def _random_sentences(seed: int, words: int, length: int, kl_coef: float) -> Sentences:
    generator = as_generator(seed)
    space = SequenceSpace(tuple("abc"[:words]), max_length=length, eos=False)
    tokens = space.all_tokens()
    prior, policy, auxiliary = torch.log_softmax(_normal(generator, 3, len(tokens)), -1)
    return Sentences(
        space, tokens, prior, policy, auxiliary, _normal(generator, len(tokens)), kl_coef
    )


class TwoSteps(NamedTuple):
    """A process of two decisions: action a, a state s ~ p(s|a), action b.

    Logits of the policy [A] and [S,A]; transition p(s|a) [A,S]; rewards r(a) [A] and r(s,b) [S,A];
    discount γ.
    """

    first_logits: Tensor
    then_logits: Tensor
    transition: Tensor
    first_reward: Tensor
    then_reward: Tensor
    discount: float

    def policy(self) -> tuple[Tensor, Tensor]:
        """π(a) [A] and π(b|s) [S,A]."""
        return torch.softmax(self.first_logits, -1), torch.softmax(self.then_logits, -1)

    def state_law(self) -> Tensor:
        """The probability [S] of each state at the second decision."""
        return self.policy()[0] @ self.transition

    def expected_return(self) -> Tensor:
        """E[r(a) + γ r(s,b)] over all A·S·A trajectories, a scalar with gradient to the logits."""
        first, then = self.policy()
        law = first[:, None, None] * self.transition[:, :, None] * then
        return (law * (self.first_reward[:, None, None] + self.discount * self.then_reward)).sum()

    def best_action_values(self) -> Tensor:
        """Q*(a) then Q*(s,b) [A + S·A], by trying each of the A^S ways to act at the second
        decision.
        """
        states, actions = self.then_reward.shape
        plans = torch.cartesian_prod(*[torch.arange(actions)] * states)  # [A^S, S]
        gained = self.then_reward[torch.arange(states), plans]  # [A^S, S]
        first = (self.first_reward[:, None] + self.discount * self.transition @ gained.T).amax(-1)
        return torch.cat([first, self.then_reward.reshape(-1)])


@cache
def processes() -> tuple[TwoSteps, ...]:
    """Three random processes: two actions and two states, three and two, two and three; γ = 0.9."""
    return tuple(_random_process(*shape) for shape in ((4, 2, 2), (5, 3, 2), (6, 2, 3)))


def _random_process(seed: int, actions: int, states: int) -> TwoSteps:
    generator = as_generator(seed)
    return TwoSteps(
        first_logits=_normal(generator, actions),
        then_logits=_normal(generator, states, actions),
        transition=torch.softmax(_normal(generator, actions, states), -1),
        first_reward=_normal(generator, actions),
        then_reward=_normal(generator, states, actions),
        discount=0.9,
    )


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mean_score(log_policy: Tensor, values: Tensor) -> Tensor:
    """E_π[f ∇log π] [K] in sequence logits by (1), exactly: log π and f [K]."""
    probs = log_policy.exp()
    return probs * (values - probs @ values)


def scores(log_policy: Tensor) -> Tensor:
    """∇log π(y), a row [K] each sentence y: [K,K]."""
    return torch.eye(len(log_policy), dtype=log_policy.dtype) - log_policy.exp()


def gradient(function: Callable[[Tensor], Tensor], log_policy: Tensor) -> Tensor:
    """∇ function(log π) [K] in sequence logits, by autograd."""
    logits = log_policy.clone().requires_grad_()
    return torch.autograd.grad(function(torch.log_softmax(logits, 0)), logits)[0]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q), a scalar in nats, of [K] and [K]."""
    return logspace.kl_divergence(log_p, log_q)


def log_mass(example: Sentences, log_probs: Tensor, positions: Sequence[int]) -> Tensor:
    """log-probability [K] of the words that each sentence has at some positions, the other words
    being free: [K] of sentences -> [K].
    """
    words = example.tokens[:, list(positions)]
    same = (words[:, None] == words).all(-1)
    return logspace.logsumexp(log_probs.expand(len(words), -1).masked_fill(~same, -torch.inf))


def marginal_log_probs(example: Sentences, log_probs: Tensor) -> Tensor:
    """log-probability [K,T] of each word of each sentence whatever stands at the other
    positions.
    """
    return torch.stack(
        [log_mass(example, log_probs, [t]) for t in range(example.space.max_length)], -1
    )


def climb(
    log_prior: Tensor,
    rewards: Tensor,
    kl_coef: float,
    log_start: Tensor,
    step_size: float = 0.2,
    steps: int = 200,
) -> Tensor:
    """log π [K] after natural-gradient ascent of J: log π ← log π + ηλ (r/λ − log π/q) + const,
    with ηλ = `step_size`.

    The distance to the maximum shrinks by 1 − ηλ a step; nothing here knows what the maximum is.
    """
    log_policy = log_start
    for _ in range(steps):
        log_policy = logspace.log_normalize(
            log_policy + step_size * (rewards / kl_coef - (log_policy - log_prior))
        )
    return log_policy
