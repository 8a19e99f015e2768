"""What an audit is held against besides its standard targets: other losses, functions of the policy
itself, former reports.

    the mean of another loss over the same batches,    ∇f(π) of a loss that needs the support,
    the mean of an AuditReport                                                                   (1)
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from klrl_edu.audit.adapting import adapted, name_of, takes_a_batch
from klrl_edu.audit.report import AuditReport
from klrl_edu.core.arguments import describe
from klrl_edu.core.errors import InputError
from klrl_edu.learning.batches import Loss, needs_of

Against = Callable[..., Any] | AuditReport | str | Path


def others_of(against: Against | Mapping[str, Against] | None) -> dict[str, Loss | AuditReport]:
    """By name: losses as functions of a Batch, and reports; files of reports are read.

    Raises:
        InputError: anything else.
    """
    if against is None:
        return {}
    given = against if isinstance(against, Mapping) else {None: against}  # named after itself below
    found: dict[str, Loss | AuditReport] = {}
    for name, other in given.items():
        if isinstance(other, str | Path):
            other = AuditReport.load(other)
        if isinstance(other, AuditReport):
            found[name or f"the mean of {other.name}"] = other
        elif callable(other):
            function = other if takes_a_batch(other) else adapted(other, None)
            # a sum over the support has no sampling to average over
            mean = "" if "support" in needs_of(function) else "the mean of "
            found[name or f"{mean}{name_of(other)}"] = function
        else:
            raise InputError(
                f"against is {describe(other)}; expected a loss, an AuditReport, the file of one,"
                " or several by name: {'mine': loss}."
            )
    return found


def other_losses(others: Mapping[str, Loss | AuditReport]) -> dict[str, Loss]:
    """Those that are averaged anew."""
    return {name: other for name, other in others.items() if not isinstance(other, AuditReport)}


def other_reports(
    others: Mapping[str, Loss | AuditReport], coordinates: str, size: int
) -> dict[str, Tensor]:
    """The means [P] of those that are reports.

    Raises:
        InputError: a report in other coordinates.
    """
    means = {name: other.mean for name, other in others.items() if isinstance(other, AuditReport)}
    for name, other in others.items():
        if not isinstance(other, AuditReport):
            continue
        # derivatives by other parameters do not compare, even where there are as many
        if other.coordinates != coordinates or len(other.mean) != size:
            raise InputError(
                f"against: {name} is a vector of {len(other.mean)} {other.coordinates}, and this"
                f" audit's has {size} {coordinates}; audit both on one policy and problem."
            )
    return means
