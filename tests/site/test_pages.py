"""The sources of the site: nothing is left out, and the code of "add your own" runs."""

import importlib.util
import re
from functools import partial
from pathlib import Path

import pytest

import klrl_edu
from klrl_edu import audit_gradient, compare, posterior
from klrl_edu.theory import identities

TUTORIALS = Path(klrl_edu.__file__).parents[1] / "tutorials"
STUB = (Path(klrl_edu.__file__).parent / "__init__.pyi").read_text(encoding="utf-8")
PAGES = sorted(
    path.relative_to(TUTORIALS).with_suffix("").as_posix() for path in TUTORIALS.rglob("*.md")
)
CELLS = re.compile(r"^```\{code-cell\} python\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def conf():
    """tutorials/conf.py as a module."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    spec = importlib.util.spec_from_file_location("klrl_site_conf", TUTORIALS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed(markdown: str) -> set[str]:
    """What the toctrees of a page list."""
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", markdown, re.S)
    return {
        line for block in blocks for line in block.splitlines() if line and not line.startswith(":")
    }


def test_every_page_is_in_the_table_of_contents():
    found = listed((TUTORIALS / "index.md").read_text(encoding="utf-8")) | listed(
        (TUTORIALS / "api.md").read_text(encoding="utf-8")
    )
    assert found == {*PAGES, "t[0-9][0-9]_*"} - {"index"}


def test_every_folder_with_a_public_name_has_a_reference_page():
    rooms = {
        (module or name).partition(".")[0]
        for module, name in re.findall(r"^from klrl_edu\.?([\w.]*) import (\w+)", STUB, re.M)
    }
    marks = {
        page: re.findall(
            r"<!-- fill: api (\w+) -->", (TUTORIALS / f"{page}.md").read_text(encoding="utf-8")
        )
        for page in PAGES
    }
    assert marks == {
        page: [page.removeprefix("api/")] if page.startswith("api/") else [] for page in PAGES
    }
    assert {page.removeprefix("api/") for page in PAGES if page.startswith("api/")} == rooms


def test_every_public_name_is_on_its_reference_page_once(conf):
    pages = [page.removeprefix("api/") for page in PAGES if page.startswith("api/")]
    text = "\n".join(conf.api(page) for page in pages)
    documented = re.findall(
        r"^\.\. (?:autoclass|autofunction|py:data):: klrl_edu\.(\w+)$|^\.\. automodule::"
        r" klrl_edu\.(?:\w+\.)*(\w+)$",
        text,
        re.M,
    )
    assert sorted(a or b for a, b in documented) == klrl_edu.__all__


def test_an_alias_brings_the_text_below_it(conf):
    assert "one contract for training and for the audit" in conf.alias_docstring(
        "klrl_edu.learning.batches", "Loss"
    )


def test_a_plain_docstring_becomes_what_it_says(conf):
    lines = ["π* of |y|, E_π[r], π_ and `x*`.", "", "    π* = q/Z", "", "Then text*."]
    assert conf.plain_to_rst(lines) == [
        r"π\* of \|y\|, E_π[r], π\_ and `x*`.",
        "",
        "::",
        "",
        "    π* = q/Z",
        "",
        r"Then text\*.",
    ]


def test_a_page_that_did_not_run_is_noticed(conf, tmp_path):
    page = tmp_path / "t01_page.py"
    page.write_text("1 + 1\n")
    ran = {"runtime": 1.5, "succeeded": True}
    assert conf.not_run(ran, page) == []
    assert conf.not_run(None, page) == ["it was not executed"]
    assert conf.not_run({**ran, "runtime": 0.0004}, page) == ["it ran in 0.000 s"]
    assert conf.not_run({**ran, "runtime": None}, page) == ["it ran in 0.000 s"]
    assert conf.not_run({**ran, "succeeded": False}, page) == ["it failed"]
    page.write_text('# %% tags=["skip-execution"]\n1 + 1\n')
    assert conf.not_run(ran, page) == ["a tag excludes a cell from execution"]


def test_nothing_is_excluded_from_execution(conf):
    assert conf.nb_execution_mode == "force"
    assert conf.nb_execution_raise_on_error
    assert not hasattr(conf, "nb_execution_excludepatterns")
    assert not hasattr(conf, "exclude_patterns")
    for path in TUTORIALS.glob("t[0-9][0-9]_*.py"):
        assert not re.search(
            r"skip-execution|raises-exception", path.read_text(encoding="utf-8")
        ), path.name


def test_mathjax_is_ours_with_its_licence(conf):
    assert "://" not in conf.mathjax_path
    script = TUTORIALS / "_static" / conf.mathjax_path
    assert script.stat().st_size > 1_000_000
    assert "Apache License" in (script.parent / "LICENSE").read_text(encoding="utf-8")
    assert (
        conf.mathjax3_config["options"]["enableMenu"] is False
    )  # the menu can load a speech engine from a CDN
    assert conf.nb_ipywidgets_js == {}


def test_the_code_of_add_your_own_runs_and_says_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (TUTORIALS / "add_your_own.md").read_text(encoding="utf-8")
    code = CELLS.findall(page)
    assert len(code) == page.count("{code-cell}")
    scope: dict = {}
    for cell in code:
        exec(cell, scope)
    assert "log_variance follows objective, scaled by 0.5" in capsys.readouterr().out
    assert scope["comparison"].reverse_kl < 1e-6
    at_the_posterior = audit_gradient(scope["dpo"], scope["star"], scope["one_pair"])
    assert float(at_the_posterior.mean.abs().max()) < 1e-15
    judged = compare(scope["learner"], posterior(scope["judged"]))
    assert judged.reverse_kl < 0.01
    assert scope["data"]["expected_reward"] == sorted(
        scope["data"]["expected_reward"], reverse=True
    )
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_the_code_of_the_theory_page_runs_and_its_bound_holds(capsys):
    page = (TUTORIALS / "theory.md").read_text(encoding="utf-8")
    (cell,) = CELLS.findall(page)
    scope: dict = {}
    exec(cell, scope)
    assert (
        scope["try_statement"](scope["mean_reward_bound"], scope["random_cases"](1, 20)).error
        < 1e-12
    )
    assert "Trial(examples=100, error=" in capsys.readouterr().out


def test_the_code_of_the_verify_page_says_what_the_page_says(capsys):
    page = (TUTORIALS / "verify.md").read_text(encoding="utf-8")
    scope: dict = {}
    for cell in CELLS.findall(page):
        exec(cell, scope)
    said = capsys.readouterr().out
    assert "centred follows objective, scaled by 0.666667" in said
    assert (
        "kl_penalty is unbiased for forward_kl and forward_kl_per_token" in said
    )  # on two words whose first has the prior's law they are one
    assert "kl_value is unbiased for reverse_kl and reverse_kl_per_token" in said


def test_the_pytest_example_of_the_verify_page_is_the_one_that_the_tests_run():
    page = (TUTORIALS / "verify.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    run = (Path(__file__).parents[1] / "testing" / "test_pytest_example.py").read_text("utf-8")
    assert shown.strip() == run.partition("# the page: begin")[2].partition("# the page")[0].strip()
    assert len([line for line in shown.splitlines() if line]) <= 10


def test_the_code_of_write_your_own_model_runs_and_says_what_the_page_says(capsys):
    page = (TUTORIALS / "write_your_own_model.md").read_text(encoding="utf-8")
    model, *rest = CELLS.findall(page)
    scope: dict = {}
    for cell in [model, *rest]:
        exec(cell, scope)
    said = capsys.readouterr().out
    unpadded, padded = re.search(r"^(-[\d.]+) (-[\d.]+)$", said, re.M).groups()
    assert float(unpadded) == pytest.approx(float(padded), rel=1e-12)
    assert "Peeking breaks the law 'causal: row t = 1" in said
    before, after, noiseless = (
        scope[name].mean["reverse_kl"] for name in ("before", "after", "noiseless")
    )
    assert noiseless < after < 0.02 < 2 < before
    body = model.partition("class PromptedBigram")[2].splitlines()
    assert len([line for line in body if line.strip()]) <= 16


def test_the_theory_page_is_filled_with_every_statement_and_claim(conf, monkeypatch):
    # the page itself tries 120 examples, most of a minute; so does the slow test of `klrl check`
    fewer = partial(identities.identities_markdown, examples=40)
    monkeypatch.setattr(identities, "identities_markdown", fewer)
    source = ["<!-- fill: identities -->\n\n<!-- fill: claims -->"]
    conf.fill(None, "theory", source)
    assert all(
        f"`{name}`" in source[0]
        for name in [*klrl_edu.identities.IDENTITIES, *klrl_edu.claims.CLAIMS]
    )
    assert "FAILS" not in source[0]


@pytest.mark.parametrize("page", ["add_your_own", "theory", "verify", "write_your_own_model"])
def test_the_code_of_a_page_fits_its_boxes(page):
    cells = CELLS.findall((TUTORIALS / f"{page}.md").read_text(encoding="utf-8"))
    assert [line for cell in cells for line in cell.splitlines() if len(line) > 105] == []
