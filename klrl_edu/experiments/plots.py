"""Pictures in one publication style: readable at column width, vector output, colours that
colour-blind readers can tell apart.

Every function takes `ax=None` and returns the Axes; none shows a window. Import sets nothing
global.
"""

import builtins
import io
import math
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from klrl_edu.audit.report import AuditReport
from klrl_edu.audit.staleness import StalenessReport
from klrl_edu.audit.verdict import LOWERS, RAISES, direction
from klrl_edu.evaluation.records import History, write_atomically
from klrl_edu.exact.posterior import Posterior
from klrl_edu.models.contract import LanguageModel, sequence_log_probs

# Okabe & Ito (2008)
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
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
}
# matplotlib's own font lacks these scripts; it asks the next family for a glyph that one does not
# have
_OTHER_SCRIPTS = (
    # Chinese, Japanese and Korean, free
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    # the same, of Windows and macOS
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "SimHei",
    "Malgun Gothic",
    "Arial Unicode MS",
    # other scripts
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
)
_LONGEST_LABEL = 40  # characters
_FEW_ENTRIES = 12  # of a gradient that are drawn by name
_LABEL_WIDTH = 24  # characters
_MISSING_GLYPH = re.compile(r"Glyph (\d+) .*missing from")


@contextmanager
def publication_style() -> Iterator[None]:
    """The style of every picture here, for the length of a `with` block."""
    installed = set(font_manager.get_font_names())
    families = ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in installed)]
    with mpl.rc_context({**_STYLE, "font.family": families}):
        yield


def new_figure(
    columns: int = 1, width: float = 3.4, height: float = 2.8
) -> tuple[Figure, list[Axes]]:
    """A figure with `columns` panels side by side, each `width` × `height` inches; call it inside
    `publication_style()`.
    """
    figure = Figure(figsize=(columns * width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Writes `path` as .png and, beside it, as vector .pdf; returns both. Warns once where no
    installed font has a character.
    """
    paths = [path.with_suffix(".png"), path.with_suffix(".pdf")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        png, pdf = paths
        write_atomically(png, _drawn(figure, format="png"))
        # without its date: the same bytes at every run
        write_atomically(pdf, _drawn(figure, format="pdf", metadata={"CreationDate": None}))
    matches = [_MISSING_GLYPH.match(str(one.message)) for one in caught]
    missing = dict.fromkeys(match[1] for match in matches if match)  # both files warn of each
    if missing:
        characters = [chr(int(code)) for code in missing]
        shown = "".join(characters[:8])
        warnings.warn(
            f"no installed font has {shown!r}: {path.name} shows boxes there. Install"
            f" {_font_for(characters[0])}, and draw again.",
            stacklevel=2,
        )
    for one in caught:
        if not _MISSING_GLYPH.match(str(one.message)):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return paths


def _drawn(figure: Figure, **options: Any) -> bytes:
    """A picture in memory: a full disk then leaves no half of one, and says which did not fit."""
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return buffer.getvalue()


def _font_for(character: str) -> str:
    """A free font that has a character, and where a Debian or Ubuntu keeps it."""
    script = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
    if script in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "FULLWIDTH", "BOPOMOFO"):
        return "the font Noto Sans CJK (apt install fonts-noto-cjk)"
    if script in ("ARABIC", "HEBREW", "DEVANAGARI", "THAI"):
        return f"the font Noto Sans {script.title()} (apt install fonts-noto-core)"
    return "a font that has them, such as those of Noto (apt install fonts-noto-core)"


@dataclass(frozen=True)
class Picture:
    """A figure that a notebook shows where it stands at the end of a cell.

    Attributes:
        png: the picture.
        paths: the files that plain Python wrote; empty in a notebook.
    """

    png: bytes
    paths: tuple[Path, ...]

    def _repr_png_(self) -> bytes:
        return self.png


def picture(figure: Figure, path: str | Path) -> Picture:
    """The figure of a script that is also a notebook: a notebook shows it, plain Python writes
    `path`.png and .pdf and says so.
    """
    paths: tuple[Path, ...] = ()
    with publication_style():
        png = _drawn(figure, format="png")
        if not hasattr(builtins, "get_ipython"):
            paths = _try_to_save(figure, Path(path))
    return Picture(png, paths)


def _try_to_save(figure: Figure, path: Path) -> tuple[Path, ...]:
    """A folder that cannot be written to costs the picture, not the script."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        paths = tuple(save_figure(figure, path))
    except OSError as error:
        print(f"(picture not saved: {path}: {error.strerror or error})")
        return ()
    print(f"picture: {' and '.join(str(one) for one in paths)}")
    return paths


def plot_posterior(
    posterior: Posterior,
    policies: Mapping[str, LanguageModel] | None = None,
    ax: Axes | None = None,
    count: int = 12,
) -> Axes:
    """Bars of prior, posterior and policies for the `count` sequences that prior or posterior finds
    most probable, with their rewards.

    Args:
        posterior: an enumerated one.
        policies: name -> model, drawn beside.
    """
    ax = _axes(ax)
    support, problem = posterior.enumerated(), posterior.problem
    # those that either finds probable, and of these the posterior's order
    mass = support.log_prior.exp() + posterior.log_probs.exp()
    order = mass.argsort(descending=True, stable=True)[:count]
    order = order[posterior.log_probs[order].argsort(descending=True, stable=True)]
    tokens = support.tokens[order]
    bars = [
        ("prior q", support.log_prior[order], PRIOR_COLOUR),
        ("posterior π*", posterior.log_probs[order], POSTERIOR_COLOUR),
    ]
    for (name, model), colour in zip((policies or {}).items(), POLICY_COLOURS, strict=False):
        bars.append((name, sequence_log_probs(model, tokens, problem.prompt).detach(), colour))
    height = 0.8 / len(bars)
    for index, (name, log_probs, colour) in enumerate(bars):
        offset = (index - (len(bars) - 1) / 2) * height  # the group is centred on its row
        places = [row + offset for row in range(len(order))]
        ax.barh(places, log_probs.exp().tolist(), height, label=name, color=colour)
    texts, rewards = problem.space.decode(tokens), support.rewards[order].tolist()
    labels = [
        f"{literal(_shortened(text)) or '(empty)'}  (r = {r:g})"
        for text, r in zip(texts, rewards, strict=True)
    ]
    ax.set_yticks(range(len(order)), labels)
    ax.invert_yaxis()
    ax.set_xlabel("probability")
    ax.legend(loc="lower right")
    return ax


def plot_runs(
    histories: Mapping[str, History],
    metric: str = "reverse_kl",
    ax: Axes | None = None,
    *,
    ylabel: str,
    log: bool = True,
) -> Axes:
    """One metric of several runs against the step.

    Args:
        histories: name -> History.
        metric: a name that the histories recorded, e.g. "reverse_kl" (nats a sequence).
        log: a logarithmic axis, where there is anything positive to show.
    """
    lines = {name: (history.steps(metric), history[metric]) for name, history in histories.items()}
    return plot_lines(lines, ax, xlabel="training step", ylabel=ylabel, log=log)


def plot_metrics(
    history: History,
    metrics: Mapping[str, str],
    ax: Axes | None = None,
    *,
    ylabel: str,
    log: bool = False,
) -> Axes:
    """Several metrics (name -> label) of one run against the step."""
    lines = {label: (history.steps(metric), history[metric]) for metric, label in metrics.items()}
    return plot_lines(lines, ax, xlabel="training step", ylabel=ylabel, log=log)


def plot_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> Axes:
    """Named lines (x, y), told apart by colour and marker; infinities leave gaps."""
    ax = _axes(ax)
    styled = zip(lines.items(), POLICY_COLOURS, _MARKERS, strict=False)
    for (name, (x, y)), colour, marker in styled:
        shown = [value if math.isfinite(value) else math.nan for value in y]
        ax.plot(
            x,
            shown,
            label=name,
            color=colour,
            marker=marker,
            markersize=3,
            markevery=max(1, len(x) // 8),
        )
    if log and any(0 < value < math.inf for _, y in lines.values() for value in y):
        ax.set_yscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend()
    return ax


def plot_audit(report: AuditReport, ax: Axes | None = None) -> Axes:
    """A bar a target: for a gradient the cosine to its mean, for a value the targets beside the
    mean; with the relative bias in words. A gradient whose mean is 0 has no angle: then what the
    targets would be, entry by entry.

    Args:
        report: of `audit_gradient` or `audit_value`.
    """
    ax = _axes(ax)
    if not report.is_value and float(report.mean.norm()) <= report.rounding:
        return _plot_zero_mean(report, ax)
    names, value = list(report.targets), report.is_value
    if value:
        lengths = [float(target) for target in report.targets.values()]
    else:
        lengths = list(report.cosine.values())
    shown = [length if math.isfinite(length) else 0.0 for length in lengths]
    ax.barh(range(len(names)), shown, 0.6, color=[_match(report, name)[1] for name in names])
    ax.set_yticks(range(len(names)), [_target_label(name) for name in names])
    ax.invert_yaxis()
    ax.axvline(0, color=BLACK, linewidth=0.8)
    if value:
        ax.axvline(float(report.mean), color=VERMILION, linestyle="--")
    for place, name in enumerate(names):
        ax.annotate(
            _match(report, name)[0],
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
        )
    if not value:
        ax.set_xlim(-1.05, 1.05)
    ax.set_xlabel(
        f"nats (dashed: the mean, {float(report.mean):.4g})"
        if value
        else "cosine between E[gradient] and target"
    )
    return ax


def _plot_zero_mean(report: AuditReport, ax: Axes) -> Axes:
    """The mean 0 beside what the first target that is not 0 is in every entry; where entries are
    many or have no names, beside the length of every target.
    """
    nonzero = [name for name in report.targets if not _is_zero(report, name)]
    if report.entries and len(report.entries) <= _FEW_ENTRIES and nonzero:
        labels = [literal(_shortened(entry)) or "(empty)" for entry in report.entries]
        lengths, words = report.targets[nonzero[0]].tolist(), f"what {direction(nonzero[0])}"
        ax.set_xlabel(f"derivative by {report.coordinates}, to descend")
    else:
        labels = [_target_label(name) for name in report.targets]
        lengths, words = [float(target.norm()) for target in report.targets.values()], "target"
        ax.set_xlabel("length of a gradient")
    places = range(len(labels))
    shown = [length if math.isfinite(length) else 0.0 for length in lengths]
    ax.barh(places, shown, 0.6, color=PRIOR_COLOUR, label=words)
    ax.plot([0.0] * len(labels), places, "o", color=POSTERIOR_COLOUR, label="E[gradient], 0 here")
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return ax


def plot_staleness(report: StalenessReport, ax: Axes | None = None) -> Axes:
    """A bar a behaviour policy: the relative bias for the target that the loss follows under the
    first, with KL(π‖μ) and the variance in words.

    Args:
        report: of `audit_staleness`.
    """
    ax = _axes(ax)
    biases = [row.report.relative_bias[report.target] for row in report.rows]
    shown = [100 * bias if math.isfinite(bias) else 0.0 for bias in biases]
    ax.barh(range(len(shown)), shown, 0.6, color=POSTERIOR_COLOUR)
    labels = [f"{literal(row.label)}\nKL(π‖μ) = {row.divergence:.3g} nats" for row in report.rows]
    ax.set_yticks(range(len(shown)), labels)
    ax.invert_yaxis()
    for place, row in enumerate(report.rows):
        ax.annotate(
            f"{_match(row.report, report.target)[0]}\nvariance {row.report.variance:.3g}",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
        )
    ax.set_xlim(0, max([*shown, 1.0]))
    ax.set_xlabel(f"bias in % of {report.target}")
    return ax


def _target_label(name: str) -> str:
    """A target's name over as many lines as a picture's margin wants."""
    words = name.replace("_per_token", "\nper token").replace("_kl", " KL")
    if name in RAISES or name in LOWERS:
        return words.replace("_", " ")
    return literal(textwrap.fill(name, _LABEL_WIDTH))  # a file's or a function's: as it is spelt


def _is_zero(report: AuditReport, name: str) -> bool:
    return name in report.zero_targets or not bool(report.targets[name].any())


def _match(report: AuditReport, name: str) -> tuple[str, str]:
    """How well a report's mean meets a target, in words and as a colour."""
    if _is_zero(report, name):
        return "0 here", PRIOR_COLOUR
    size = float(report.targets[name].norm())
    if report.distances is not None:
        return _sampled_match(*report.distances[name], size)
    bias, scale = report.relative_bias[name], report.scale[name]
    if bias * size <= report.rounding + report.precision * size:
        return "unbiased", POSTERIOR_COLOUR
    # a gradient that is only too long or too short is off by |scale − 1| of its target, no more
    scaled = abs(bias - abs(scale - 1)) < report.precision * bias
    if len(report.mean) > 1 and scaled:
        return f"{scale:.4g} × exactly", SKY
    return "infinite" if math.isinf(bias) else f"off by {100 * bias:.3g} %", PRIOR_COLOUR


def _sampled_match(low: float, high: float, size: float) -> tuple[str, str]:
    """The same where draws leave a distance between two numbers open."""
    if math.isinf(size):
        return "infinite", PRIOR_COLOUR
    if low == 0:
        return f"may be it, to {100 * high / size:.3g} %", SKY
    return f"off by {100 * low / size:.3g} to {100 * high / size:.3g} %", PRIOR_COLOUR


def literal(text: str) -> str:
    """A reader's text as matplotlib shows it letter by letter: a price in dollars is no formula."""
    return text.replace("$", r"\$")


def _shortened(text: str) -> str:
    """A text of many words by its beginning and its end, so that a picture has room for bars."""
    half = _LONGEST_LABEL // 2
    return text if len(text) <= _LONGEST_LABEL else f"{text[:half]} … {text[-half:]}"


def _axes(ax: Axes | None) -> Axes:
    return new_figure()[1][0] if ax is None else ax
