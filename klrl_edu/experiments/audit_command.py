"""`klrl audit`: anyone's loss or estimator by its name, or the package's own against what they
claim.

A name is `module:function`, `file.py:function`, or a function of this package such as
`kl_values.k3` or `losses.rloo`; `--list` prints them.
"""

import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from klrl_edu.audit.adapting import Kind, kind_and_reason, name_of, needed_of
from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.audit.report import AuditReport
from klrl_edu.audit.staleness import StalenessReport, audit_staleness
from klrl_edu.core.display import Cell, text_table
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import InputError, KlrlError
from klrl_edu.experiments import plots
from klrl_edu.experiments.audit_arguments import (
    adapt_of,
    against_of,
    behaviours_of,
    policy_for,
    problems_of,
)
from klrl_edu.experiments.console import CHECK_FAILED, Quiet, Say, speaker
from klrl_edu.experiments.directories import check_new, new_directory
from klrl_edu.experiments.loading import audited_functions, find_function, line_of, said
from klrl_edu.experiments.parsing import Word
from klrl_edu.experiments.runner import write_json

_MEANT: dict[Kind, str] = {"gradient": "a loss", "value": "an estimator of KL"}
_SUMMARY = 72  # characters of a docstring in the list
# what messages advise, as arguments of Python -> as options
_REMEDIES = {
    "raise max_executions": "raise --max-executions",
    "monte_carlo=n with draw=": "--monte-carlo N",
    "micro_batches=k": "--micro-batches K",
    "ordered=True": "--ordered",
}
_OF_LOSSES = ("against", "micro_batches", "ordered")  # options that mean nothing for a value


def audit(
    target: Annotated[str, Word("FUNCTION")] = "own",
    /,
    *,
    problem: Annotated[tuple[str, ...], Word("TABLE")] = (),
    kl_coef: tuple[float, ...] = (),
    batch_size: int = 1,
    kind: Literal["auto", "value", "gradient"] = "auto",
    behaviour: Annotated[tuple[str, ...], Word("MODEL")] = (),
    stale: Annotated[tuple[float, ...], Word("SHARE")] = (),
    adapt: Annotated[tuple[str, ...], Word("PARAMETER=NAME")] = (),
    against: Annotated[tuple[str, ...], Word("LOSS|FILE")] = (),
    micro_batches: int | None = None,
    ordered: bool = False,
    max_executions: int | None = None,
    monte_carlo: int | None = None,
    seed: int | None = None,
    list: bool = False,
    out: Path | None = None,
    quiet: Quiet = False,
) -> None:
    """The exact bias and variance of a loss or an estimator; without a name, of every one of this
    package, against what it claims.

    The policy of four-sentences is (.5, .2, .1, .2); of another problem it is the prior tilted by
    cos k, k = 1, 2, …, in the order of its sequences, so that no formula is right because policy
    and prior agree. Writes result.json (what was asked, and the report: mean, variance, targets,
    bias, relative_bias, cosine, scale, verdict, entries, …, which --against takes; of several
    behaviour policies rows, a report each; without a name rows, a claim each) and audit.png/.pdf.

    Args:
        target: module:function, file.py:function, or a name that --list prints, such as
            kl_values.k3 or losses.rloo.
        problem: four-sentences (by default), another standing problem, or a table (CSV or JSON);
            several stand in one batch, as in training: tables of the same sentences and
            probabilities that differ in rewards.
        kl_coef: λ, at least 0, by default 1; one for all problems, or one each in their order.
        batch_size: sequences a problem and estimate.
        kind: gradient (a loss) or value (an estimator of KL); auto goes by the function's names,
            and asks where they do not say.
        behaviour: the policy that draws: temperature=0.6, top_k=2 or nucleus=0.9 (of the policy
            under audit), prior, or policy; several give a table of how a loss degrades.
        stale: how far the policy that draws lies behind, from 0 (the policy itself) to 1 (the
            prior), in log-probabilities; several as for --behaviour.
        adapt: what a parameter of another name is, such as lp=log_probs, advantages=leave_one_out
            or clip=0.1.
        against: a second loss by its name, or the result.json of another audit, to hold the mean
            against.
        micro_batches: the loss splits its batch into so many parts, and which part a sequence is in
            counts.
        ordered: every place in the batch counts.
        max_executions: the most batches to enumerate; by default a million where a loss runs on
            all at once, and 100,000 one by one.
        monte_carlo: draw this many batches instead.
        seed: of --monte-carlo, by default 0; one seed draws the same batches for every loss.
        list: print the package's own losses and estimators by their names, and stop.
        out: a new or empty directory; by default the first free of runs/audit, runs/audit-2, …
    """
    say = speaker(quiet)
    if list:
        say(_list_of_functions())
        return
    # before the audit, which may take minutes
    check_new(out, "audit")
    asked = {
        "problem": problem,
        "kl_coef": kl_coef,
        "batch_size": batch_size,
        "kind": kind,
        "behaviour": behaviour,
        "stale": stale,
        "adapt": adapt,
        "against": against,
        "micro_batches": micro_batches,
        "ordered": ordered,
        "monte_carlo": monte_carlo,
        "seed": seed,
    }
    if target == "own":
        _refuse(asked, asked, "belongs to the audit of one function: klrl audit FUNCTION …")
        _audit_catalogue(out, say)
        return
    function = find_function(target)
    taken_for, first_line = _taken_for(target, function, kind)
    names, kl_coefs = problem or ("four-sentences",), kl_coef or (1.0,)
    problems = problems_of(names, kl_coefs)
    policy = policy_for(problems, names[0])
    drawn_by = behaviours_of(behaviour, stale, policy, problems[0].prior)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "adapt": adapt_of(adapt),
        "max_executions": max_executions,
    }
    if monte_carlo is not None:
        options |= {"monte_carlo": monte_carlo, "draw": seeded_draw(seed or 0)}
    else:
        _refuse(asked, ["seed"], "is of --monte-carlo: the exact audit draws nothing.")
    if taken_for == "gradient":
        options |= {
            "against": against_of(against),
            "micro_batches": micro_batches,
            "ordered": ordered,
        }
    else:
        _refuse(asked, _OF_LOSSES, f"is for losses, and {target} is taken for a value.")
    if len(drawn_by) == 1:
        options["behaviour"] = next(iter(drawn_by.values()))

    audit_it: Callable[..., AuditReport | StalenessReport]
    if len(drawn_by) < 2:
        audit_it = audit_gradient if taken_for == "gradient" else audit_value
    elif taken_for == "gradient":
        audit_it, options["behaviours"] = audit_staleness, drawn_by
    else:
        raise InputError(
            f"several --behaviour and --stale are a table for losses, and {target} is taken for a"
            " value; give one at a time."
        )
    report = _run(target, taken_for, lambda: audit_it(function, policy, problems, **options))

    shown = {**asked, "problem": names, "kl_coef": kl_coefs, "kind": taken_for}
    result = {
        **report.to_dict(),
        "command": "audit",
        "target": target,
        **{name: _alone(value) for name, value in shown.items()},
    }
    if isinstance(report, StalenessReport):
        result["nearest_target"] = report.target
    # only now: an audit that fails leaves no directory behind
    directory = new_directory(out, "audit")
    write_json(directory / "result.json", result)
    _draw(report, directory / "audit")
    drawn = f" Batches are drawn by {', '.join(drawn_by)}." if drawn_by else ""
    say(f"{first_line}{drawn}\n{report}")
    say(f"\nresult.json, audit.png and .pdf are in {directory}")


def _refuse(asked: Mapping[str, Any], names: Collection[str], why: str) -> None:
    """Refuses options that would be read and do nothing.

    Raises:
        InputError: one of them was given.
    """
    defaults = inspect.signature(audit).parameters
    given = [name for name in names if asked[name] != defaults[name].default]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} {why}")


def _alone(value: Any) -> Any:
    """What was asked for once as itself, and not as a list of one."""
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _taken_for(
    target: str, function: Callable[..., Any], asked: Literal["auto", "value", "gradient"]
) -> tuple[Kind, str]:
    """What the function is audited as, and a line that says why.

    Raises:
        InputError: its names do not say, and nobody did.
    """
    name = name_of(function)
    if asked != "auto":
        return asked, f"{name}, audited as {_MEANT[asked]} (--kind {asked})."
    kind, reason = kind_and_reason(function)
    if kind is None:
        raise InputError(
            f"{target} may be a loss or an estimator of KL, its names do not say which; give --kind"
            " gradient (a loss) or --kind value (an estimator)."
        )
    other: Kind = "value" if kind == "gradient" else "gradient"
    return kind, (
        f"{name}, taken for {_MEANT[kind]} ({reason}); --kind {other} audits it as {_MEANT[other]}."
    )


def _list_of_functions() -> str:
    """The package's own, by the names that `klrl audit` takes."""
    rows: list[list[Cell]] = []
    for name, function in audited_functions().items():
        kind, _ = kind_and_reason(function)
        summary = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
        needed = "".join(f" --adapt {one}=…" for one in needed_of(function))
        shown = textwrap.shorten(summary, _SUMMARY, placeholder=" …")
        rows.append([f"{name}{needed}", "loss" if kind == "gradient" else "value", shown])
    return text_table(["klrl audit …", "kind", "what it is"], rows)


def _run(
    target: str, kind: Kind, audit_it: Callable[[], AuditReport | StalenessReport]
) -> AuditReport | StalenessReport:
    """The audit; whatever the function itself raises becomes one line."""
    try:
        return audit_it()
    except KlrlError as error:
        error.args = (_as_options(str(error)), *error.args[1:])
        raise
    except KeyboardInterrupt:  # Ctrl-C is not the function's doing
        raise
    except BaseException as error:  # whatever a user's function raises, sys.exit included
        meant = "loss" if kind == "gradient" else "value"
        raise InputError(
            f"{target}{line_of(error)} failed as a {meant}: {said(error)}; try it on one Batch, or"
            " --kind."
        ) from None


def _as_options(message: str) -> str:
    """A message with its remedies as they are spelt on a command line."""
    for argument, option in _REMEDIES.items():
        message = message.replace(argument, option)
    return re.sub(r"adapt=\{'(\w+)': [^}]*\}", r"--adapt \1=NAME", message)


def _draw(report: AuditReport | StalenessReport, path: Path) -> None:
    with plots.publication_style():
        if isinstance(report, StalenessReport):
            figure, (ax,) = plots.new_figure(1, 5.2, 1.2 + 0.4 * len(report.rows))
            plots.plot_staleness(report, ax=ax)
            name = plots.literal(report.rows[0].report.name)
            ax.set_title(f"{name}, by the policy that draws its batches")
        else:
            figure, (ax,) = plots.new_figure(1, 5.2, 1.6 + 0.26 * len(report.targets))
            plots.plot_audit(report, ax=ax)
            ax.set_title(plots.literal(textwrap.fill(report.verdict, 62)), fontsize=8)
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
    # last, so that file and table say which claim failed
    if not all(row.holds for row in rows):
        raise SystemExit(CHECK_FAILED)
