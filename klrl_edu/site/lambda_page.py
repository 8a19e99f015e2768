"""The λ page: one HTML file that needs no server, no network and no Python, where a slider moves λ.

    π*_λ(y) = q(y) e^{r(y)/λ} / Z_λ,    λ = 20^s with the slider at s ∈ [−1, 1]                  (1)

Python lays the page out; `lambda_page.js` beside this file computes (1) in the reader's browser,
for the four sentences or for a table that the reader types.
`python -m klrl_edu.site.lambda_page OUT.html` writes it.
"""

import sys
from pathlib import Path

from klrl_edu.evaluation.records import write_atomically
from klrl_edu.exact.enumeration import problem_support
from klrl_edu.experiments.plots import POSTERIOR_COLOUR, PRIOR_COLOUR
from klrl_edu.problems.examples import four_sentences
from klrl_edu.problems.problem import Problem

SCRIPT = Path(__file__).with_suffix(".js")
TITLE = "Move λ"
SLIDER_STEP = 0.01  # of log₂₀ λ: 201 stops from 0.05 to 20, with 1 in the middle

_TEMPLATE = """
{% block preamble %}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  main { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff;
         max-width: 52rem; margin: 1rem auto; padding: 0 1rem; }
  h1 { font-size: 1.6rem; margin: .5rem 0; }
  .formula span { display: inline-block; padding: 0 1rem; }
  .formula { text-align: center; font-size: 1.15rem; }
</style>
{% endblock %}
{% block contents %}
<main>
<p><a href="index.html">← klrl_edu</a></p>
<h1>Move λ</h1>
<p>A prior q, a reward r and a KL coefficient λ define a posterior, the best policy there is.
Move λ to the right and it returns to the prior;
to the left, and it keeps only what the reward likes most. Everything is computed in this page.</p>
<p class="formula"><span>π*(y) = q(y) · exp(r(y)/λ) / Z</span>
<span>max<sub>π</sub> E<sub>π</sub>[r] − λ KL(π‖q) = λ log Z</span></p>
{{ super() }}
</main>
{% endblock %}
"""

_TABLE_STYLE = """
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 2px 14px 2px 0; text-align: right; border-bottom: 1px solid #ddd;
         overflow-wrap: anywhere; }
th:first-child { text-align: left; }
.unit { color: #555; text-align: left; }
.error { color: #a11; font-weight: 600; font-size: 15px; }
@media (max-width: 520px) { table { font-size: 12px; } th, td { padding-right: 6px; } }
"""


def typed_table(problem: Problem) -> str:
    """A problem with a table for a prior -> the lines `sentence, prob, reward` that a reader would
    type.
    """
    support = problem_support(problem)
    texts = problem.space.decode(support.tokens)
    rows = zip(texts, support.log_prior.exp().tolist(), support.rewards.tolist(), strict=True)
    return "\n".join(f"{text}, {prob:.12g}, {reward:g}" for text, prob, reward in rows)


def lambda_page() -> str:
    """The page as one string of HTML with all its scripts inside."""
    from bokeh.document import Document
    from bokeh.embed import file_html
    from bokeh.layouts import column
    from bokeh.models import (
        CheckboxGroup,
        ColumnDataSource,
        CustomJS,
        CustomJSTickFormatter,
        Div,
        InlineStyleSheet,
        NumericInput,
        Slider,
        TextAreaInput,
    )
    from bokeh.plotting import figure
    from bokeh.resources import INLINE
    from bokeh.transform import dodge

    style = InlineStyleSheet(css=_TABLE_STYLE)
    text = {"sizing_mode": "stretch_width", "stylesheets": [style]}
    format_lambda = CustomJSTickFormatter(code="return (20 ** tick).toPrecision(4)")
    slider = Slider(
        start=-1,
        end=1,
        value=0,
        step=SLIDER_STEP,
        title="λ",
        format=format_lambda,
        sizing_mode="stretch_width",
        name="slider",
    )
    typed = NumericInput(value=1.0, mode="float", title="or type λ", width=160, name="lambda")
    source = ColumnDataSource({"sentence": [], "q": [], "posterior": [], "reward": []})
    bars = figure(
        y_range=["…"],
        x_range=(0, 1),
        height=250,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="hover",
        x_axis_label="probability",
    )
    bars.hover.tooltips = [
        ("sentence", "@sentence"),
        ("q", "@q"),
        ("π*", "@posterior"),
        ("r", "@reward"),
    ]
    for name, label, colour, shift in (
        ("q", "prior q", PRIOR_COLOUR, 0.18),
        ("posterior", "posterior π*", POSTERIOR_COLOUR, -0.18),
    ):
        place = dodge("sentence", shift, range=bars.y_range)
        bars.hbar(y=place, right=name, height=0.34, color=colour, legend_label=label, source=source)
    bars.ygrid.grid_line_color = None
    bars.add_layout(bars.legend[0], "above")
    bars.legend.orientation = "horizontal"
    numbers = Div(name="numbers", **text)
    listing = Div(name="listing", **text)
    message = Div(name="message", **text)
    opening = typed_table(four_sentences())
    table = TextAreaInput(
        value=opening,
        value_input=opening,
        title="Your own table: sentence, prob, reward (-inf forbids)",
        rows=8,
        max_length=1_000_000,
        sizing_mode="stretch_width",
        name="table",
    )
    normalise = CheckboxGroup(labels=["divide by their sum"], active=[], name="normalise")
    outputs = {"numbers": numbers, "listing": listing, "message": message}
    inputs = {"slider": slider, "typed": typed, "table": table, "normalise": normalise}
    update = CustomJS(
        args={**inputs, **outputs, "source": source, "bars": bars},
        code=SCRIPT.read_text(encoding="utf-8"),
    )
    slider.js_on_change("value", update)
    typed.js_on_change("value", update)
    # `value` changes when the reader leaves the box, `value_input` at every key
    at_every_key = CustomJS(args={"table": table}, code="table.value = table.value_input")
    table.js_on_change("value_input", at_every_key)
    table.js_on_change("value", update)
    normalise.js_on_change("active", update)
    document = Document()
    parts = [slider, typed, message, bars, numbers, table, normalise, listing]
    document.add_root(column(*parts, sizing_mode="stretch_width"))
    document.js_on_event("document_ready", update)
    return str(file_html(document, INLINE, title=f"{TITLE} · klrl_edu", template=_TEMPLATE))


def write_lambda_page(path: Path) -> Path:
    """Writes the page to `path`, whole or not at all; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda_page().encode())
    return path


if __name__ == "__main__":
    print(write_lambda_page(Path(sys.argv[1] if len(sys.argv) > 1 else "lambda.html")))
