"""Pictures in one publication style: readable at column width, vector output, colours that colour-blind readers can tell apart.

Every function takes `ax=None` and returns the Axes; none shows a window. Import sets nothing global.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from klrl_edu.evaluation.records import History
from klrl_edu.exact.posterior import Posterior
from klrl_edu.models.contract import LanguageModel, sequence_log_probs

# Okabe & Ito (2008)
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
PRIOR_COLOUR, POSTERIOR_COLOUR = "#9A9A9A", BLUE
POLICY_COLOURS = (VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
}


@contextmanager
def publication_style() -> Iterator[None]:
    """The style of every picture here, for the length of a `with` block."""
    with mpl.rc_context(_STYLE):
        yield


def new_figure(columns: int = 1, width: float = 3.4, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    """A figure with `columns` panels side by side, each `width` × `height` inches; call it inside `publication_style()`."""
    figure = Figure(figsize=(columns * width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Writes `path` as .png and, beside it, as vector .pdf; returns both."""
    paths = [path.with_suffix(".png"), path.with_suffix(".pdf")]
    for one in paths:
        figure.savefig(one, metadata={"CreationDate": None} if one.suffix == ".pdf" else None)
    return paths


def plot_posterior(posterior: Posterior, policies: Mapping[str, LanguageModel] | None = None, ax: Axes | None = None, count: int = 12) -> Axes:
    """Bars of prior, posterior and policies for the `count` sequences that prior or posterior finds most probable, with their rewards.

    Args:
        posterior: an enumerated one.
        policies: name -> model, drawn beside.
    """
    ax = _axes(ax)
    support, problem = posterior.enumerated(), posterior.problem
    order = (support.log_prior.exp() + posterior.log_probs.exp()).argsort(descending=True, stable=True)[:count]
    order = order[posterior.log_probs[order].argsort(descending=True, stable=True)]
    tokens = support.tokens[order]
    bars = [("prior q", support.log_prior[order], PRIOR_COLOUR), ("posterior π*", posterior.log_probs[order], POSTERIOR_COLOUR)]
    for (name, model), colour in zip((policies or {}).items(), POLICY_COLOURS, strict=False):
        bars.append((name, sequence_log_probs(model, tokens, problem.prompt).detach(), colour))
    height = 0.8 / len(bars)
    for index, (name, log_probs, colour) in enumerate(bars):
        places = [row + (index - (len(bars) - 1) / 2) * height for row in range(len(order))]
        ax.barh(places, log_probs.exp().tolist(), height, label=name, color=colour)
    rewards = support.rewards[order].tolist()
    ax.set_yticks(range(len(order)), [f"{text or '(empty)'}  (r = {r:g})" for text, r in zip(problem.space.decode(tokens), rewards, strict=True)])
    ax.invert_yaxis()
    ax.set_xlabel("probability")
    ax.legend(loc="lower right")
    return ax


def plot_metric(
    histories: Mapping[str, History], metric: str = "reverse_kl", ax: Axes | None = None, *, label: str | None = None, log: bool = True
) -> Axes:
    """One metric of several runs against the step.

    Args:
        histories: name -> History.
        metric: a name that the histories recorded, e.g. "reverse_kl" (nats a sequence).
        label: of the vertical axis; the metric's name by default.
    """
    ax = _axes(ax)
    for (name, history), colour, marker in zip(histories.items(), POLICY_COLOURS, _MARKERS, strict=False):
        steps = history.steps(metric)
        ax.plot(steps, history[metric], label=name, color=colour, marker=marker, markersize=3, markevery=max(1, len(steps) // 8))
    if log:
        ax.set_yscale("log")
    ax.set_xlabel("training step")
    ax.set_ylabel(label or metric)
    ax.legend()
    return ax


def plot_lines(x: Sequence[float], lines: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Named lines over one horizontal axis, told apart by colour and marker."""
    ax = _axes(ax)
    for (name, values), colour, marker in zip(lines.items(), POLICY_COLOURS, _MARKERS, strict=False):
        ax.plot(x, values, label=name, color=colour, marker=marker, markersize=3, markevery=max(1, len(x) // 8))
    ax.legend()
    return ax


def _axes(ax: Axes | None) -> Axes:
    return new_figure()[1][0] if ax is None else ax
