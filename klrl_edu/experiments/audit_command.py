"""`klrl audit`: anyone's loss or estimator by its name, or the package's own against what they
claim.

A name is `module:function`, `file.py:function`, or a function of this package such as
`kl_values.k3` or `losses.rloo`.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from klrl_edu.audit.adapting import name_of, parameters_of
from klrl_edu.audit.audit import MAX_EXECUTIONS, audit_gradient, audit_value
from klrl_edu.audit.report import AuditReport
from klrl_edu.core.errors import InputError, KlrlError
from klrl_edu.exact.posterior import posterior
from klrl_edu.experiments import plots
from klrl_edu.experiments.console import CHECK_FAILED, Quiet, Say, TableArgument, speaker
from klrl_edu.experiments.directories import check_new, new_directory
from klrl_edu.experiments.loading import find_function, line_of, said
from klrl_edu.experiments.parsing import Word
from klrl_edu.experiments.runner import ProblemSource, write_json
from klrl_edu.learning.batches import Batch
from klrl_edu.models.contract import LanguageModel
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences_policy
from klrl_edu.problems.problem import Problem

_SHOWN = 12  # sequences that a vector's entries are listed for


def audit(
    target: Annotated[str, Word("FUNCTION")] = "own",
    /,
    *,
    problem: TableArgument = "four-sentences",
    kl_coef: float = 1.0,
    batch_size: int = 1,
    kind: Literal["auto", "value", "gradient"] = "auto",
    max_executions: int = MAX_EXECUTIONS,
    out: Path | None = None,
    quiet: Quiet = False,
) -> None:
    """The exact bias and variance of a loss or an estimator; without a name, of every one of this
    package, against what it claims.

    The policy of four-sentences is (.5, .2, .1, .2); of another problem it is the prior tilted by
    cos k, k = 1, 2, …, in the order of its sequences, so that no formula is right because policy
    and prior agree. Writes result.json (the report: mean, variance, targets, bias, relative_bias,
    cosine, scale, verdict, …; entries: the sequences that a vector belongs to; without a name:
    rows, a claim each) and audit.png/.pdf.

    Args:
        target: module:function, file.py:function, or a name such as kl_values.k3 or losses.rloo.
        problem: four-sentences, another standing problem, or a table (CSV or JSON).
        kl_coef: λ, at least 0.
        batch_size: sequences an estimate.
        kind: gradient (a loss) or value (an estimator of KL); auto takes for a loss what takes a
            Batch or is called one.
        max_executions: the most batches to enumerate.
        out: a new or empty directory; by default the first free of runs/audit, runs/audit-2, …
    """
    check_new(out, "audit")
    say = speaker(quiet)
    if target == "own":
        _audit_catalogue(out, say)
        return
    function = find_function(target)
    audited = ProblemSource(problem, kl_coef).load()
    policy = four_sentences_policy() if problem == "four-sentences" else tilted_prior(audited)
    kind = _kind_of(function) if kind == "auto" else kind
    report = _run(
        target,
        kind,
        function,
        policy,
        audited,
        batch_size=batch_size,
        max_executions=max_executions,
    )
    result = {
        "command": "audit",
        "target": target,
        "problem": problem,
        "kl_coef": kl_coef,
        **report.to_dict(),
        "entries": _entries(report, policy),
    }
    directory = new_directory(out, "audit")
    write_json(directory / "result.json", result)
    _draw(report, directory / "audit")
    say(f"{report}{_order_of_entries(report, policy)}")
    say(f"\nresult.json, audit.png and .pdf are in {directory}")


def tilted_prior(problem: Problem) -> SequenceTable:
    """A policy that is neither prior nor posterior: log π = log q + cos k + constant, k = 1, 2, …
    on the feasible support.
    """
    support = posterior(problem).enumerated()
    kept = support.rewards > -torch.inf
    tokens, log_prior = support.tokens[kept], support.log_prior[kept]
    tilt = torch.cos(torch.arange(1, len(tokens) + 1, dtype=torch.float64))
    return SequenceTable(problem.space, tokens, log_prior + tilt)


def _entries(report: AuditReport, policy: SequenceTable) -> list[str] | None:
    """The sequence that each entry of a gradient belongs to; None for a value."""
    return None if len(report.mean) == 1 else policy.space.decode(policy.tokens)


def _order_of_entries(report: AuditReport, policy: SequenceTable) -> str:
    """The same for the reader of a terminal."""
    texts = _entries(report, policy)
    if texts is None:
        return ""
    more = f", … ({len(texts):,} in all)" if len(texts) > _SHOWN else ""
    listed = ", ".join(repr(text) for text in texts[:_SHOWN])
    return f"\nThe entries of the mean belong to the sequences {listed}{more}."


def _kind_of(function: Callable[..., Any]) -> Literal["value", "gradient"]:
    """A loss takes a Batch, or has "loss" or "gradient" in its name or in that of its file;
    everything else estimates a value.
    """
    first = next(iter(parameters_of(function).values()), None)
    if first is not None and (first.name == "batch" or first.annotation in (Batch, "Batch")):
        return "gradient"
    words = f"{getattr(function, '__module__', '')}.{name_of(function)}".lower()
    return "gradient" if "loss" in words or "gradient" in words else "value"


def _run(
    target: str,
    kind: str,
    function: Callable[..., Any],
    policy: LanguageModel,
    audited: Problem,
    **options: Any,
) -> AuditReport:
    """The audit; whatever the function itself raises becomes one line."""
    try:
        audit_it = audit_gradient if kind == "gradient" else audit_value
        return audit_it(function, policy, audited, **options)
    except KlrlError:
        raise
    except (Exception, SystemExit) as error:  # of the user's function
        meant = "loss" if kind == "gradient" else "value"
        raise InputError(
            f"{target}{line_of(error)} failed as a {meant}: {said(error)}; try it on one Batch, or"
            " --kind."
        ) from None


def _draw(report: AuditReport, path: Path) -> None:
    with plots.publication_style():
        figure, (ax,) = plots.new_figure(1, 4.6, 3.2)
        plots.plot_audit(report, ax=ax)
        ax.set_title(plots.literal(textwrap.fill(report.verdict, 56)), fontsize=8)
        plots.save_figure(figure, path)


def _audit_catalogue(out: Path | None, say: Say) -> None:
    """Every claim of the package; exit 1 where one fails."""
    from klrl_edu.audit.claims.catalogue import catalogue_text, check_catalogue

    rows = check_catalogue()
    directory = new_directory(out, "audit")
    listed = [
        {
            "name": row.entry.name,
            "case": row.case,
            "claim": row.entry.words,
            "error": row.error,
            "variance": row.variance,
            "holds": row.holds,
        }
        for row in rows
    ]
    write_json(directory / "result.json", {"command": "audit", "target": "own", "rows": listed})
    say(f"{catalogue_text(rows)}\n\nresult.json is in {directory}")
    if not all(row.holds for row in rows):
        raise SystemExit(CHECK_FAILED)
