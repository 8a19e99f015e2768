"""What the claims are tried on: the four sentences, a few random problems of the same kind, and
processes of two decisions.

    ∂ log π(y)/∂θ = e_y − π,    ∇E_π[f] = π ∘ (f − E_π[f])
    in sequence logits, f held fixed                                                             (1)

K sentences of T words over a vocabulary of V; A actions, S states. Logs in nats, rewards in reward
units. The random ones come from fixed seeds.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.draws import as_generator
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.decisions.decision_process import DecisionProcess
from klrl_edu.exact.posterior import posterior
from klrl_edu.models.contract import sequence_log_probs
from klrl_edu.problems.examples import (
    FOUR_POLICY,
    FOUR_REWARDS,
    FOUR_SENTENCES,
    four_sentences_space,
)
from klrl_edu.theory.cases import Case

FOUR_AUXILIARY = {"the cat": 0.3, "the dog": 0.4, "a cat": 0.2, "a dog": 0.1}
_RANDOM = ((1, 2, 2, 0.5), (2, 3, 2, 2.0), (3, 2, 3, 0.7))  # seed, words, length, λ


class Auxiliary(NamedTuple):
    """A case, and the auxiliary model p that stands in the place of its prior, log p [K]."""

    case: Case
    log_auxiliary: Tensor


@cache
def with_auxiliary() -> tuple[Auxiliary, ...]:
    """The course's q, π, p and r of the four sentences at λ = 1, then random problems."""
    space = four_sentences_space()
    tables = (FOUR_SENTENCES, FOUR_POLICY, FOUR_AUXILIARY, FOUR_REWARDS)
    prior, policy, auxiliary, rewards = (
        torch.tensor(list(table.values()), dtype=torch.float64) for table in tables
    )
    tokens = space.encode(list(FOUR_SENTENCES))
    four = Case.of(space, tokens, prior.log(), rewards, 1.0, policy.log())
    return (Auxiliary(four, auxiliary.log()), *(random_sentences(*shape) for shape in _RANDOM))


def random_sentences(seed: int, words: int, length: int, kl_coef: float) -> Auxiliary:
    """Every sentence of so many words, with random q, π, p and r from a fixed seed."""
    generator = as_generator(seed)
    space = SequenceSpace(tuple("abc"[:words]), max_length=length, eos=False)
    tokens = space.all_tokens()
    prior, policy, auxiliary = torch.log_softmax(_normal(generator, 3, len(tokens)), -1)
    rewards = _normal(generator, len(tokens))
    return Auxiliary(Case.of(space, tokens, prior, rewards, kl_coef, policy), auxiliary)


def sentences() -> tuple[Case, ...]:
    """The four sentences, then random problems."""
    return tuple(example.case for example in with_auxiliary())


def course_case() -> Case:
    """The course's q, π and r at λ = 1."""
    return sentences()[0]


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
        """The policy of both decisions, π(a) [A] and π(b|s) [S,A]."""
        return torch.softmax(self.first_logits, -1), torch.softmax(self.then_logits, -1)

    def state_law(self) -> Tensor:
        """The probability [S] of each state at the second decision."""
        return self.policy()[0] @ self.transition

    def expected_return(self) -> Tensor:
        """The return E[r(a) + γ r(s,b)] over all A·S·A trajectories, a scalar with gradient to the
        logits.
        """
        first, then = self.policy()
        law = first[:, None, None] * self.transition[:, :, None] * then
        return (law * (self.first_reward[:, None, None] + self.discount * self.then_reward)).sum()

    def as_decision_process(self) -> DecisionProcess:
        """The same for the package: the start, the S states of the second decision, the end."""
        actions, states = self.transition.shape
        number = torch.arange(states + 2)
        end = (number == states + 1).double().expand(actions, -1)
        start = torch.nn.functional.pad(self.transition, (1, 1))
        nothing = torch.zeros(1, actions, dtype=torch.float64)
        return DecisionProcess(
            # uniform: at λ = 0 only the support of the prior counts
            log_prior=torch.full((states + 2, actions), -math.log(actions), dtype=torch.float64),
            transitions=torch.stack([start, *[end] * (states + 1)]),
            rewards=torch.cat([self.first_reward[None], self.then_reward, nothing]),
            initial=(number == 0).double(),
            terminal=number == states + 1,
            discount=self.discount,
        )

    def log_policy(self) -> Tensor:
        """Log-probabilities [S + 2, A] for the package; the end's row means nothing."""
        first, then = self.policy()
        return torch.cat([first[None], then, torch.ones_like(first[None])]).log().detach()

    def decisions(self, values: Tensor) -> Tensor:
        """Of values [S + 2, A] those of the two decisions, [A + S·A]: without the end's."""
        return values[:-1].reshape(-1)

    def gradient(self) -> Tensor:
        """The gradient of the expected return in the logits of both decisions [A + S·A], by
        autograd.
        """
        logits = [self.first_logits.clone(), self.then_logits.clone()]
        value = self._replace(
            first_logits=logits[0].requires_grad_(), then_logits=logits[1].requires_grad_()
        ).expected_return()
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(value, logits)])

    def best_action_values(self) -> Tensor:
        """The best values, Q*(a) then Q*(s,b) [A + S·A], by trying each of the A^S ways to act at
        the second decision.
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


def plain_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence KL(p‖q) = Σ p log p/q by its definition, for [K] with mass everywhere."""
    return (log_p.exp() * (log_p - log_q)).sum()


def by_states(case: Case) -> Tensor:
    """The posterior's log-probabilities [K] by the soft values of every prefix, from the last word
    back.
    """
    model = posterior(case.problem, method="soft_bellman").model
    return sequence_log_probs(model, case.tokens).detach()


def mean_score(case: Case, values: Tensor) -> Tensor:
    """The mean score weighed by f [K]: E_π[f ∇log π] [K] in sequence logits, exactly by (1)."""
    probs = case.log_policy.exp()
    return probs * (values - probs @ values)


def log_mass(case: Case, log_probs: Tensor, positions: Sequence[int]) -> Tensor:
    """The log-probability [K] of the words that each sentence has at some positions, the other
    words being free: [K] of sentences -> [K].
    """
    # no positions at all: every sentence is alike, and the mass is that of all
    words = case.tokens[:, list(positions)]
    same = (words[:, None] == words).all(-1)
    return logspace.logsumexp(log_probs.expand(len(words), -1).masked_fill(~same, -torch.inf))


def marginal_log_probs(case: Case, log_probs: Tensor) -> Tensor:
    """The log-probability [K,T] of each word of each sentence whatever stands at the other
    positions.
    """
    return torch.stack([log_mass(case, log_probs, [t]) for t in range(case.space.max_length)], -1)


def climb(case: Case, log_start: Tensor, step_size: float = 0.2, steps: int = 200) -> Tensor:
    """The policy, log π [K], after natural-gradient ascent of J: log π ← log π + ηλ (r/λ − log π/q)
    + const, with ηλ = `step_size`.

    The distance to the maximum shrinks by 1 − ηλ a step; nothing here knows what the maximum is.
    """
    log_policy = log_start
    for _ in range(steps):
        penalised = case.rewards / case.kl_coef - (log_policy - case.log_prior)
        log_policy = torch.log_softmax(log_policy + step_size * penalised, 0)
    return log_policy


def uniform(case: Case) -> Tensor:
    """The uniform distribution over a case's sentences, as log-probabilities [K]."""
    return torch.full_like(case.log_prior, -math.log(len(case.tokens)))
