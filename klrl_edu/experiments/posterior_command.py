"""`klrl posterior`: the exact posterior of a table or of a standing problem."""

import csv
import io
from pathlib import Path

from klrl_edu.core.validation import check_count
from klrl_edu.evaluation.compare import compare
from klrl_edu.evaluation.records import write_atomically
from klrl_edu.exact.posterior import Posterior
from klrl_edu.exact.posterior import posterior as exact_posterior
from klrl_edu.experiments import plots
from klrl_edu.experiments.console import Quiet, TableArgument, speaker
from klrl_edu.experiments.directories import check_new, new_directory
from klrl_edu.experiments.runner import ProblemSource, spreadsheet_cell, write_json


def posterior(
    file: TableArgument,
    /,
    *,
    kl_coef: float = 1.0,
    separator: str = " ",
    normalize: bool = False,
    count: int = 20,
    out: Path | None = None,
    quiet: Quiet = False,
) -> None:
    """The exact posterior of a table (CSV with the header sentence,prob,reward, or JSON) or of a
    standing problem.

    Writes result.json (value, log_evidence, method, support_size, expected_reward,
    kl_posterior_to_prior, prior), posterior.csv with every sequence, and posterior.png/.pdf.

    Args:
        file: the table, or four-sentences, surnames, count-threes.
        kl_coef: λ, at least 0 (0: reward only; inf: the prior).
        separator: between words; "" reads sentences as characters.
        normalize: the table holds weights, not probabilities.
        count: sequences to print and draw.
        out: a new or empty directory; by default the first free of runs/posterior,
            runs/posterior-2, …
    """
    # before a posterior that may take its time
    check_new(out, "posterior")
    source = ProblemSource(file, kl_coef, separator, normalize)
    check_count(count, "count")
    target = exact_posterior(source.load())
    directory = new_directory(out, "posterior")
    say = speaker(quiet)
    rows = target.rows()
    # π* against itself: its numbers come by the same sums as those of q
    prior_side, self_side = compare(target.problem.prior, target), compare(target.model, target)
    kl = float(target.kl_to_prior())  # not as a difference of log π* and log q
    say(target.text(count))
    say(
        f"E[r]: prior {prior_side.expected_reward:.12g}, posterior"
        f" {self_side.expected_reward:.12g};  KL(π*‖q) = {kl:.12g} nats"
    )
    _write_csv(directory / "posterior.csv", rows)
    _draw(target, directory / "posterior", count)
    result = {
        "command": "posterior",
        "problem": file,
        **target.to_dict(),
        "expected_reward": self_side.expected_reward,
        "kl_posterior_to_prior": kl,
        "prior": prior_side.metrics(),
    }
    write_json(directory / "result.json", result)
    say(f"All {len(rows):,} sequences, the picture and result.json are in {directory}")


def _write_csv(path: Path, rows: list[tuple[str, float, float, float]]) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["sentence", "prior", "reward", "posterior"])
    writer.writerows([spreadsheet_cell(text), *numbers] for text, *numbers in rows)
    write_atomically(path, out.getvalue().encode())


def _draw(target: Posterior, path: Path, count: int) -> None:
    with plots.publication_style():
        shown = min(count, len(target.enumerated().tokens))
        figure, (ax,) = plots.new_figure(1, 5.5, max(2.2, 0.32 * shown + 1))
        plots.plot_posterior(target, ax=ax, count=count)
        ax.set_title(
            f"λ = {target.problem.kl_coef:g}, log Z = {float(target.log_evidence):.4g} nats"
        )
        plots.save_figure(figure, path)
