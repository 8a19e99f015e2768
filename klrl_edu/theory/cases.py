"""Random problems on which statements of the theory are tried.

    q on K sequences,  r,  λ,  another policy π on the same K sequences                          (1)

Small enough for everything to be enumerated; with and without EOS, with sequences of no prior mass,
ties, equal and large rewards, policies near q and far from it. K supported sequences, T tokens;
logs in nats.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from klrl_edu.closed_forms.tilt import Tilted, tilt
from klrl_edu.core import logspace
from klrl_edu.core.draws import as_generator
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.core.validation import check_count
from klrl_edu.exact.enumeration import Support, problem_support
from klrl_edu.exact.posterior import Posterior, posterior
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import Reward, table_reward, token_reward

_SHAPES = ((2, 2, False), (2, 3, True), (3, 2, False), (2, 3, False), (3, 3, True))  # words, T, EOS
_MOST = 8  # sequences with mass


@dataclass(frozen=True)
class Case:
    """One problem and one policy on its K sequences, all enumerated: the theory's one noun for it.

    Attributes:
        problem: a SequenceTable prior, some of whose rows may have no mass; a reward by text or by
            token; λ.
        support: its sequences with mass.
        log_policy: log π [K] in nats, on the support, full.
        key: of the case, "seed/index"; with a statement's name it seeds `noise`.
        noise: the case's own numbers, started anew for every statement.
    """

    problem: Problem
    support: Support
    log_policy: Tensor
    key: str = ""
    noise: random.Random = field(default_factory=lambda: random.Random(0), repr=False)

    @classmethod
    def of(
        cls,
        space: SequenceSpace,
        tokens: Tensor,
        log_prior: Tensor,
        rewards: Tensor,
        kl_coef: float,
        log_policy: Tensor,
    ) -> "Case":
        """A case from its numbers: tokens [K,T] in lexicographic order, each other tensor [K]."""
        texts = space.decode(tokens)
        reward = table_reward(dict(zip(texts, rewards.tolist(), strict=True)), space)
        prior = SequenceTable(space, tokens, log_prior).requires_grad_(False)
        problem = Problem(prior, reward, kl_coef)
        support = Support(
            tokens, log_prior, problem.token_rewards(tokens), PrefixTrie(space, tokens)
        )
        return cls(problem, support, log_policy)

    @property
    def space(self) -> SequenceSpace:
        """Where the sequences live."""
        return self.problem.space

    @property
    def tokens(self) -> Tensor:
        """The sequences with mass, as token ids [K,T]."""
        return self.support.tokens

    @property
    def log_prior(self) -> Tensor:
        """The prior's log-probabilities, log q [K] in nats."""
        return self.support.log_prior

    @cached_property
    def rewards(self) -> Tensor:
        """The reward of each sequence, r [K] in reward units."""
        return self.support.rewards

    @property
    def kl_coef(self) -> float:
        """The KL coefficient λ > 0, in reward units a nat."""
        return self.problem.kl_coef

    @cached_property
    def tilted(self) -> Tilted:
        """The posterior by enumeration: log π* [K], value λ log Z, log Z."""
        return tilt(self.log_prior, self.rewards, self.kl_coef)

    @property
    def log_star(self) -> Tensor:
        """The posterior's log-probabilities, log π* [K] in nats."""
        return self.tilted.log_posterior

    @cached_property
    def log_ratio(self) -> Tensor:
        """The log-ratio of policy and prior, u = log π/q [K] in nats."""
        return self.log_policy - self.log_prior

    @cached_property
    def target(self) -> Posterior:
        """The posterior as the package gives it."""
        return posterior(self.problem)

    @cached_property
    def policy(self) -> SequenceTable:
        """The policy π as a table, in sequence logits."""
        return self.table(self.log_policy).requires_grad_()

    def table(self, log_probs: Tensor) -> SequenceTable:
        """A distribution [K] over the sequences as a language model, without gradient."""
        return SequenceTable(self.space, self.tokens, log_probs).requires_grad_(False)

    def objective(self, log_probs: Tensor) -> Tensor:
        """The objective of a distribution [K], J = E[r] − λ KL(·‖q), by its definition: a scalar in
        reward units.
        """
        expected = logspace.expectation(log_probs, self.rewards)
        return expected - self.kl_coef * logspace.kl_divergence(log_probs, self.log_prior)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Gaussian numbers of this case."""
        size = torch.Size(shape).numel()
        return torch.tensor(
            [self.noise.gauss(0, scale) for _ in range(size)], dtype=torch.float64
        ).reshape(shape)

    def distribution(self, *shape: int) -> Tensor:
        """Random log-probabilities, normalised over the last axis."""
        return torch.log_softmax(self.normal(*shape), -1)

    def draws(self, count: int, size: int) -> Tensor:
        """Random row numbers [size], each below `count`."""
        return torch.tensor([self.noise.randrange(count) for _ in range(size)])

    def at(self, kl_coef: float) -> "Case":
        """The same at another λ."""
        return replace(self, problem=replace(self.problem, kl_coef=kl_coef))

    def rewarded(self, rewards: Tensor) -> "Case":
        """The same with other rewards [K]."""
        other = Case.of(
            self.space, self.tokens, self.log_prior, rewards, self.kl_coef, self.log_policy
        )
        return replace(other, key=self.key, noise=self.noise)

    def small(self, count: int) -> "Case":
        """The first `count` outcomes (at most K) of the case, q and π renormalised on them: what
        enumerating batches can afford.
        """
        if count not in self._first:
            part = Case.of(
                self.space,
                self.tokens[:count],
                logspace.log_normalize(self.log_prior[:count]),
                self.rewards[:count],
                self.kl_coef,
                logspace.log_normalize(self.log_policy[:count]),
            )
            self._first[count] = replace(part, key=self.key, noise=self.noise)
        return self._first[count]

    @cached_property
    def _first(self) -> dict[int, "Case"]:
        """Parts of the case that were asked for: a dozen statements share two of them."""
        return {}


def random_cases(seed: int, count: int) -> Iterator[Case]:
    """`count` cases, the same for the same seed; case i does not depend on `count`.

    Raises:
        InputError: a seed that is no seed, a count below 1.
    """
    as_generator(seed)  # refuses what is no seed
    for index in range(check_count(count, "examples")):
        yield _case(f"{seed}/{index}")


def _case(key: str) -> Case:
    # from a text: the same numbers on every machine
    noise = random.Random(key)
    words, length, eos = noise.choice(_SHAPES)
    space = SequenceSpace(tuple("abc"[:words]), length, eos)
    everything = space.all_tokens()
    # two more, as up to two lose their mass below
    count = noise.randint(3, min(len(everything), _MOST + 2))
    # in lexicographic order, as a support lists them
    tokens = everything[sorted(noise.sample(range(len(everything)), count))]
    logits = [noise.gauss(0, 1) for _ in range(count)]
    for row in range(noise.randint(0, min(2, count - 3))):  # sequences without mass
        logits[row] = float("-inf")
    prior = SequenceTable(space, tokens, torch.tensor(logits, dtype=torch.float64)).requires_grad_(
        False
    )
    kl_coef = noise.choice((0.1, 0.5, 1.0, 2.0, 5.0)) * noise.uniform(0.8, 1.25)
    problem = Problem(prior, _reward(noise, space, tokens), kl_coef)
    support = problem_support(problem)
    spread = noise.choice((0.1, 1.0, 3.0))
    # about q, so that a small spread is a policy near it
    logits_of_policy = support.log_prior + torch.tensor(
        [noise.gauss(0, spread) for _ in support.tokens], dtype=torch.float64
    )
    return Case(problem, support, logspace.log_normalize(logits_of_policy), key, noise)


def _reward(noise: random.Random, space: SequenceSpace, tokens: Tensor) -> Reward:
    """By token, or by text: spread out, tied, all equal, or large."""
    kind = noise.choice(("token", "text", "text", "ties", "equal", "large"))
    if kind == "token":
        return token_reward([noise.gauss(0, 1) for _ in range(space.vocab_size)], space)
    draws: dict[str, Callable[[], float]] = {
        "text": lambda: noise.gauss(0, 1),
        "ties": lambda: float(noise.randint(0, 1)),
        "equal": lambda: 1.5,
        "large": lambda: noise.gauss(0, 20),
    }
    return table_reward({text: draws[kind]() for text in space.decode(tokens)}, space)
