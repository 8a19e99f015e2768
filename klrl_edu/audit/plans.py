"""What an audit enumerates: a problem, or a source of training batches whose law is known.

    a Problem, sources.on_policy     multisets of π's sequences
    sources.behaviour                multisets of μ's sequences
    sources.support                  one batch, the whole support
    sources.texts, sources.pairs     multisets of the table's rows, by their weights

What a source gives next may also depend on what came before (`replay`), or on code that nobody can
enumerate (one's own function): those are refused.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from klrl_edu.audit.scenes import Scene, build_scene, table_scene
from klrl_edu.audit.targets import gradient_targets
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import check_count
from klrl_edu.learning.sources import PolicySamples, Source, Table, WholeSupport
from klrl_edu.models.contract import LanguageModel
from klrl_edu.problems.problem import Problem


@dataclass(frozen=True)
class Plan:
    """What is enumerated.

    Attributes:
        origin: the problem whose sequences a policy draws, or the table whose rows are drawn.
        batch_size: units (sequences, or pairs) a batch.
        behaviour: who draws sequences; None for the policy itself.
        distributions: whether batches hold full next-token distributions.
        complete: whether the one batch is the whole support.
    """

    origin: Problem | Table
    batch_size: int
    behaviour: LanguageModel | None
    distributions: bool
    complete: bool

    @property
    def prompt(self) -> Tensor | None:
        """The prompt's tokens [S]; None where there is none."""
        return self.origin.prompt

    def scene(self, policy: LanguageModel, max_sequences: int) -> tuple[Scene, dict[str, Tensor]]:
        """The enumerated support and the targets, name -> coefficients [E]."""
        if isinstance(self.origin, Table):
            return table_scene(policy, self.origin, max_sequences)
        scene = build_scene(
            policy,
            self.origin,
            self.behaviour,
            max_sequences,
            distributions=self.distributions,
            supported=True,
            complete=self.complete,
        )
        kl_coef = self.origin.kl_coef
        return scene, gradient_targets(scene.whole, scene.tree, kl_coef, scene.missed)


def planned(
    source: Problem | Source,
    batch_size: int | None,
    behaviour: LanguageModel | None,
    needs: frozenset[str],
) -> Plan:
    """What to enumerate for a problem or a source, given what the loss needs.

    Raises:
        InputError: a source whose law is not known, several problems, λ = inf, or an argument that
            the source has itself.
    """
    distributions = "distributions" in needs
    if isinstance(source, Problem):
        size = 1 if batch_size is None else check_count(batch_size, "batch_size")
        problem = _one([source])
        return Plan(problem, size, behaviour, distributions, "support" in needs)
    for name, given in (("batch_size", batch_size), ("behaviour", behaviour)):
        if given is not None:
            raise InputError(f"{name} belongs to the source: give it there, not to the audit.")
    if isinstance(source, PolicySamples):
        distributions |= source.distributions
        return Plan(_one(source.problems), source.size, source.behaviour, distributions, False)
    if isinstance(source, WholeSupport):
        distributions |= source.distributions
        return Plan(_one(source.problems), 1, None, distributions, True)
    if isinstance(source, Table):
        return Plan(source, source.size or len(source.rows), None, False, source.size is None)
    raise InputError(
        f"the law of this source ({type(source).__name__}) is not known, so its batches cannot be"
        " enumerated; audit a Problem, or sources.on_policy, behaviour, support, texts or pairs."
    )


def _one(problems: list[Problem] | tuple[Problem, ...]) -> Problem:
    """The only problem, with a finite λ."""
    if len(problems) > 1:
        raise InputError(
            f"the source has {len(problems)} problems, and an audit is of one; audit each."
        )
    if problems[0].kl_coef == math.inf:
        raise InputError(
            "kl_coef = inf: J is −inf for every policy but the prior; give a finite kl_coef."
        )
    return problems[0]
