"""The prior's support, enumerated: every supported sequence with its prior and its rewards.

K supported sequences of T tokens; logs in nats, rewards in reward units. The posterior over them is
`closed_forms.tilt`, with the ties of `core.ties` at λ = 0.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from klrl_edu.closed_forms.tilt import Tilted, tilt
from klrl_edu.core import ties
from klrl_edu.core.errors import InfeasibleError, InputError
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.models.contract import MAX_SEQUENCES, enumerate_support
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import reward_name


@dataclass(frozen=True)
class Support:
    """What an exact computation needs, on the prior's support, in lexicographic order of tokens.

    Attributes:
        tokens: [K,T].
        log_prior: log q [K] in nats.
        token_rewards: [K,T] in reward units.
        trie: the prefix trie of `tokens`.
    """

    tokens: Tensor
    log_prior: Tensor
    token_rewards: Tensor
    trie: PrefixTrie

    @property
    def rewards(self) -> Tensor:
        """The reward r(y) of each sequence [K] in reward units."""
        return self.token_rewards.sum(-1)

    def tilted(self, kl_coef: float) -> Tilted:
        """The posterior on the support; returns that rounding alone may have split tie at λ = 0."""
        rewards = self.rewards
        if kl_coef == 0:
            rewards = ties.level_ties(*ties.summed(self.token_rewards))
        return tilt(self.log_prior, rewards, kl_coef)


def problem_support(problem: Problem, max_sequences: int = MAX_SEQUENCES) -> Support:
    """The supported sequences of a problem with their prior and rewards.

    Raises:
        TooLargeError: more than `max_sequences`.
        InputError: a reward is NaN or +inf on the support.
        InfeasibleError: all rewards are −inf.
    """
    weighted = enumerate_support(problem.prior, max_sequences, problem.prompt)
    rewards = problem.token_rewards(weighted.tokens)
    if not bool((rewards.sum(-1) > -math.inf).any()):
        count = len(weighted)
        raise InfeasibleError(
            f"every supported sequence has reward -inf ({count} of {count}): the posterior is"
            f" empty. Relax the reward {reward_name(problem.reward)!r}."
        )
    trie = PrefixTrie(problem.space, weighted.tokens)
    return Support(weighted.tokens, weighted.log_weights, rewards, trie)


def not_enumerated(method: str) -> InputError:
    """What to raise where a support is asked for that the method did not enumerate."""
    return InputError(
        f"this posterior was computed by {method}, without enumerating its support;"
        " ask its `model`, or compare(..., n=, draw=)."
    )
