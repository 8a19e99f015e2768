"""A policy and a problem, as models: what the catalogue, the assertions of `testing` and the tests
try an estimator on.

    π, (q, r, λ), and μ, which draws the samples of what is off-policy                           (1)

The theory tries its statements on cases of its own (`theory.cases.Case`): there both are vectors
over enumerated sequences, with random numbers beside them; here they are models in any coordinates.
"""

from typing import NamedTuple

from klrl_edu.models.contract import LanguageModel
from klrl_edu.problems.problem import Problem


class AuditCase(NamedTuple):
    """A policy and a problem to try an estimator on.

    Attributes:
        name: in words, for messages and tables.
        policy: π.
        problem: with the prior q, the reward and λ.
        behaviour: the policy μ that draws the samples of what is off-policy; None where π draws.
        others: further problems of the same prior, whose sequences stand in the same batch.
    """

    name: str
    policy: LanguageModel
    problem: Problem
    behaviour: LanguageModel | None = None
    others: tuple[Problem, ...] = ()

    @property
    def problems(self) -> list[Problem]:
        """All of them, as the audit takes them."""
        return [self.problem, *self.others]
