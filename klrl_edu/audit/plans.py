"""What an audit enumerates: a problem or several, or a source of training batches whose law is
known.

    a Problem, sources.on_policy     multisets of π's sequences, for each problem
    sources.behaviour                multisets of μ's sequences, for each problem
    sources.support                  one batch, the whole support
    sources.texts, sources.pairs     multisets of the table's rows, by their weights

Where order means something, a batch is enumerated as blocks of multisets in a row, down to blocks
of one. What a source gives next may also depend on what came before (`replay`), or on code that
nobody can enumerate (one's own function): those are refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from klrl_edu.audit.scenes import Scene, Targets, build_scene, gradient_targets, table_scene
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import check_count
from klrl_edu.learning.sources import PolicySamples, Source, Table, WholeSupport
from klrl_edu.models.contract import LanguageModel
from klrl_edu.problems.problem import Problem, check_problems


@dataclass(frozen=True)
class Plan:
    """What is enumerated.

    Attributes:
        origin: the problems whose sequences a policy draws, or the table whose rows are drawn.
        batch_size: units (sequences, or pairs) a problem and batch.
        behaviour: who draws sequences; None for the policy itself.
        distributions: whether batches hold full next-token distributions.
        complete: whether the one batch is the whole support.
        micro_batches: parts of a problem's units whose places mean something; order within a part
            does not.
    """

    origin: tuple[Problem, ...] | Table
    batch_size: int
    behaviour: LanguageModel | None
    distributions: bool
    complete: bool
    micro_batches: int = 1

    @property
    def lists_support(self) -> bool:
        """Whether the one batch is that of `sources.support`; all rows of a table are none."""
        return self.complete and not isinstance(self.origin, Table)

    @property
    def block(self) -> int:
        """Units within which order is nothing to the loss."""
        return self.batch_size // self.micro_batches

    def scene(self, policy: LanguageModel, max_sequences: int) -> tuple[Scene, Targets]:
        """The enumerated support, and the targets of each of its views."""
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
        return scene, gradient_targets


def planned(
    source: Problem | Sequence[Problem] | Source,
    batch_size: int | None,
    behaviour: LanguageModel | None,
    needs: frozenset[str],
    micro_batches: int | None = None,
    *,
    ordered: bool = False,
) -> Plan:
    """What to enumerate for problems or a source, given what the loss needs.

    Raises:
        InputError: a source whose law is not known, λ = inf, or an argument that the source has
            itself; a batch that cannot be split as asked.
    """
    distributions = "distributions" in needs
    if isinstance(source, Problem | list | tuple):
        size = 1 if batch_size is None else check_count(batch_size, "batch_size")
        plan = Plan(_finite(source), size, behaviour, distributions, "support" in needs)
        return _split(plan, micro_batches, ordered)
    for name, given in (("batch_size", batch_size), ("behaviour", behaviour)):
        if given is not None:
            raise InputError(f"{name} belongs to the source: give it there, not to the audit.")
    if isinstance(source, PolicySamples):
        # training would score them for this source, asked for by the loss or not
        distributions |= source.distributions
        plan = Plan(_finite(source.problems), source.size, source.behaviour, distributions, False)
    elif isinstance(source, WholeSupport):
        distributions |= source.distributions
        plan = Plan(_finite(source.problems), 1, None, distributions, True)
    elif isinstance(source, Table):
        # no size: the whole table
        plan = Plan(source, source.size or len(source.rows), None, False, source.size is None)
    else:
        raise InputError(
            f"the law of this source ({type(source).__name__}) is not known, so its batches cannot"
            " be enumerated; audit a Problem, or sources.on_policy, behaviour, support, texts or"
            " pairs."
        )
    return _split(plan, micro_batches, ordered)


def _finite(source: Problem | Sequence[Problem]) -> tuple[Problem, ...]:
    """The problems, each with a finite λ."""
    problems = check_problems(source)
    for m, problem in enumerate(problems):
        if problem.kl_coef == math.inf:
            where = f" (problems[{m}])" if len(problems) > 1 else ""
            raise InputError(
                f"kl_coef = inf{where}: J is −inf for every policy but the prior; give a finite"
                " kl_coef."
            )
    return tuple(problems)


def _split(plan: Plan, micro_batches: int | None, ordered: bool) -> Plan:
    """The plan with the places that mean something."""
    if micro_batches is None:
        if not ordered:
            return plan
        parts = plan.batch_size  # blocks of one unit: all orders
    elif ordered:
        raise InputError("ordered=True gives every place its meaning; leave micro_batches out.")
    else:
        parts = check_count(micro_batches, "micro_batches")
    if plan.complete:
        raise InputError(
            "the one batch is the whole support, so there is no order to enumerate; leave"
            " micro_batches and ordered out."
        )
    if plan.batch_size % parts:
        raise InputError(
            f"micro_batches = {parts} does not divide batch_size = {plan.batch_size} evenly."
        )
    return replace(plan, micro_batches=parts)
