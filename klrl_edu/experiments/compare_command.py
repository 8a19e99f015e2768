"""`klrl compare`: the policy of a run held against its exact posterior again."""

from pathlib import Path
from typing import Annotated

from klrl_edu.evaluation.compare import compare as compare_models
from klrl_edu.experiments.console import LEGEND, Quiet, speaker
from klrl_edu.experiments.directories import check_new, new_directory
from klrl_edu.experiments.loading import blaming
from klrl_edu.experiments.parsing import Word
from klrl_edu.experiments.runner import check_inside, load_run, write_json


def compare(
    run: Annotated[Path, Word("RUN")],
    /,
    *,
    model: Annotated[str | None, Word("MODEL")] = None,
    out: Path | None = None,
    quiet: Quiet = False,
) -> None:
    """Holds the policy of a training run against its exact posterior again, from the files of the
    run alone.

    Writes result.json (the comparison's metrics, and the step of the weights).

    Args:
        run: the --out of a `klrl train`.
        model: the file.py:Class of a run whose model is one's own; code is run only by its name.
        out: a new or empty directory; by default the first free of RUN/compare, RUN/compare-2, …
    """
    check_new(out, "compare")
    default = run / "compare"
    # a run from elsewhere may hold a link in the place of compare/
    if out is None:
        check_inside(run, default)
    with blaming("" if model is None else f"--model {model}"):
        loaded = load_run(run, model)
        comparison = compare_models(loaded.policy, loaded.target)
    directory = new_directory(out, "compare", default)
    write_json(
        directory / "result.json",
        {
            "command": "compare",
            "run": str(run.resolve()),
            "step": loaded.step,
            **comparison.metrics(),
        },
    )
    say = speaker(quiet)
    steps = loaded.config["steps"]
    if loaded.step < steps:
        missing = "" if (run / "result.json").exists() else "; it has no result.json of its own"
        say(f"weights of step {loaded.step:,} of {steps:,}: the run was stopped early{missing}\n")
    say(f"{comparison}\n{LEGEND}")
    say(f"\nresult.json is in {directory}")
