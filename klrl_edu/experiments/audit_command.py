"""`klrl audit`: anyone's loss or estimator by its name, or the package's own against what they
claim.

A name is `module:function`, `file.py:function`, or a function of this package such as
`kl_values.k3` or `losses.rloo`.
"""

import importlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
import tyro

from klrl_edu.audit.adapting import name_of, parameters_of
from klrl_edu.audit.audit import MAX_EXECUTIONS, audit_gradient, audit_value
from klrl_edu.audit.report import AuditReport
from klrl_edu.core.errors import InputError, KlrlError
from klrl_edu.exact.posterior import posterior
from klrl_edu.experiments import plots
from klrl_edu.experiments.console import CHECK_FAILED, Quiet, speaker
from klrl_edu.experiments.runner import ProblemSource, claim_directory, write_json
from klrl_edu.learning.batches import Batch
from klrl_edu.models.contract import LanguageModel
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences_policy
from klrl_edu.problems.problem import Problem

_ROOMS = ("estimators", "learning")  # where functions of this package are looked for


def audit(
    target: Annotated[str, tyro.conf.Positional] = "own",
    /,
    *,
    problem: str = "four-sentences",
    kl_coef: float = 1.0,
    batch_size: int = 1,
    kind: Literal["auto", "value", "gradient"] = "auto",
    max_executions: int = MAX_EXECUTIONS,
    out: Path = Path("runs/audit"),
    quiet: Quiet = False,
) -> None:
    """The exact bias and variance of a loss or an estimator; without a name, of every one of this
    package, against what it claims.

    The policy of four-sentences is (.5, .2, .1, .2); of another problem it is the prior tilted by
    cos k, k = 1, 2, …, in the order of its sequences, so that no formula is right because policy
    and prior agree. Writes result.json (the report: mean, variance, targets, bias, relative_bias,
    cosine, scale, verdict, …; without a name: rows, a claim each) and audit.png/.pdf.

    Args:
        target: module:function, file.py:function, or a name such as kl_values.k3 or losses.rloo.
        problem: four-sentences, another standing problem, or a table (CSV or JSON).
        kl_coef: λ, at least 0.
        batch_size: sequences an estimate.
        kind: gradient (a loss) or value (an estimator of KL); auto takes for a loss what takes a
            Batch or is called one.
        max_executions: the most batches to enumerate.
        out: where to write.
    """
    say = speaker(quiet)
    if target == "own":
        _audit_catalogue(out, say)
        return
    function = find_function(target)
    world = ProblemSource(problem, kl_coef).load()
    policy = four_sentences_policy() if problem == "four-sentences" else tilted_prior(world)
    kind = _kind_of(function) if kind == "auto" else kind
    report = _run(
        target, kind, function, policy, world, batch_size=batch_size, max_executions=max_executions
    )
    directory = claim_directory(out, "audit")
    write_json(
        directory / "result.json",
        {
            "command": "audit",
            "target": target,
            "problem": problem,
            "kl_coef": kl_coef,
            **report.to_dict(),
        },
    )
    _draw(report, directory / "audit")
    say(f"{report}\n\nresult.json, audit.png and .pdf are in {directory}")


def find_function(target: str) -> Callable[..., Any]:
    """The function that a name stands for.

    Raises:
        InputError: no such module, file or function, or its file does not import; says which.
    """
    place, colon, name = target.rpartition(":")
    if not colon:
        return _own_function(target)
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_of_name(place)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and not key.startswith("_")
        ]
        raise InputError(
            f"{place} has no function {name!r}; it has {', '.join(functions) or 'none'}."
        )
    return _made(function, target) if inspect.isclass(function) else function


def tilted_prior(problem: Problem) -> SequenceTable:
    """A policy that is neither prior nor posterior: log π = log q + cos k + constant, k = 1, 2, …
    on the feasible support.
    """
    support = posterior(problem).enumerated()
    kept = support.rewards > -torch.inf
    tokens, log_prior = support.tokens[kept], support.log_prior[kept]
    return SequenceTable(
        problem.space,
        tokens,
        log_prior + torch.cos(torch.arange(1, len(tokens) + 1, dtype=torch.float64)),
    )


def _own_function(target: str) -> Callable[..., Any]:
    """`file.function` of estimators/ or learning/."""
    file, _, name = target.rpartition(".")
    for room in _ROOMS:
        if file and importlib.util.find_spec(f"klrl_edu.{room}.{file}") is not None:
            function = getattr(importlib.import_module(f"klrl_edu.{room}.{file}"), name, None)
            if callable(function):
                return function
    raise InputError(
        f"{target!r} is no function of this package; give one such as kl_values.k3 or losses.rloo,"
        " or module:function, file.py:function."
    )


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give file.py:function with a path from here.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(
        0, str(path.parent.resolve())
    )  # its neighbours can be imported, as when Python runs the file
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # anything can go wrong in a user's file
        raise InputError(f"{path} does not import: {_said(error)}; fix the file.") from None
    finally:
        sys.path.pop(0)
    return module


def _module_of_name(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"there is no module {name!r} here or installed; give module:function, or"
                " file.py:function with a path."
            ) from None
        raise InputError(
            f"module {name!r} does not import: {_said(error)}; install what is missing."
        ) from None
    except (Exception, SystemExit) as error:  # anything can go wrong in a user's file
        raise InputError(f"module {name!r} does not import: {_said(error)}; fix it.") from None
    finally:
        sys.path.pop(0)


def _made(cls: Callable[..., Any], target: str) -> Callable[..., Any]:
    """A loss that is a module, with whatever it starts from."""
    try:
        made: Callable[..., Any] = cls()
    except Exception as error:  # of the user's constructor
        raise InputError(
            f"{target} is a class and cannot be made without arguments: {_said(error)}; name a"
            " function."
        ) from None
    return made


def _kind_of(function: Callable[..., Any]) -> Literal["value", "gradient"]:
    """A loss takes a Batch, or has "loss" or "gradient" in its name or in that of its file;
    everything else estimates a value.
    """
    first = next(iter(parameters_of(function).values()), None)
    takes_batch = first is not None and (
        first.name == "batch" or first.annotation in (Batch, "Batch")
    )
    words = f"{getattr(function, '__module__', '')}.{name_of(function)}".lower()
    return "gradient" if takes_batch or "loss" in words or "gradient" in words else "value"


def _run(
    target: str,
    kind: str,
    function: Callable[..., Any],
    policy: LanguageModel,
    world: Problem,
    **options: Any,
) -> AuditReport:
    """The audit; whatever the function itself raises becomes one line."""
    try:
        audit_it = audit_gradient if kind == "gradient" else audit_value
        return audit_it(function, policy, world, **options)
    except KlrlError:
        raise
    except Exception as error:  # of the user's function
        raise InputError(
            f"{target} failed as a {'loss' if kind == 'gradient' else 'value'}: {_said(error)}; try"
            " it on one Batch, or --kind."
        ) from None


def _said(error: BaseException) -> str:
    return (
        f"{type(error).__name__}:"
        f" {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    )


def _draw(report: AuditReport, path: Path) -> None:
    with plots.publication_style():
        figure, (ax,) = plots.new_figure(1, 4.6, 3.2)
        plots.plot_audit(report, ax=ax)
        ax.set_title(textwrap.fill(report.verdict, 56), fontsize=8)
        plots.save_figure(figure, path)


def _audit_catalogue(out: Path, say: Callable[[str], None]) -> None:
    """Every claim of the package; exit 1 where one fails."""
    from klrl_edu.audit.claims.catalogue import catalogue_text, check_catalogue

    rows = check_catalogue()
    directory = claim_directory(out, "audit")
    listed = [
        {
            "name": row.entry.name,
            "world": row.world,
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
