"""The built site: every page ran, nothing is loaded from elsewhere, every page fits a narrow
screen.
"""

import os
import re
import subprocess
import sys
import time

import pytest

from tests.site.test_pages import TUTORIALS

pytestmark = pytest.mark.slow


def sphinx(out, *options):
    """Runs sphinx-build as `dev.py docs` does; returns the finished process."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    pytest.importorskip("furo")
    pytest.importorskip("bokeh")
    words = [
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        "-j",
        "auto",
        *options,
        str(TUTORIALS),
        str(out),
    ]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *words],
        capture_output=True,
        text=True,
        env=environment,
        encoding="utf-8",
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(folder of the built site, what the build said, seconds)."""
    out = tmp_path_factory.mktemp("site") / "html"
    start = time.monotonic()
    process = sphinx(out)
    assert process.returncode == 0, process.stderr[-3000:]
    return out, process.stdout, time.monotonic() - start


def test_every_tutorial_ran(site):
    _, said, seconds = site
    ran = dict(re.findall(r"(\w+) ([\d.]+) s", said.partition("executed:")[2]))
    assert set(ran) == {
        "add_your_own",
        "theory",
        "verify",
        "write_your_own_model",
        *(path.stem for path in TUTORIALS.glob("t[0-9][0-9]_*.py")),
    }
    assert min(map(float, ran.values())) > 0
    print(f"built in {seconds:.0f} s")


def test_a_build_that_does_not_execute_fails(tmp_path):
    process = sphinx(tmp_path / "html", "-D", "nb_execution_mode=off")
    assert process.returncode != 0
    assert "add_your_own: it was not executed" in process.stderr


def test_solutions_are_folded_and_named(site):
    out, *_ = site
    for path in TUTORIALS.glob("t[0-9][0-9]_*.py"):
        solutions = path.read_text(encoding="utf-8").count('"solution"')
        assert (
            (out / f"{path.stem}.html").read_text(encoding="utf-8").count("Show the solution")
            == solutions
            > 0
        )


def test_no_page_names_a_foreign_script_style_or_picture(site):
    out, *_ = site
    loads = re.compile(
        r"""<(?:script|img|iframe|source)[^>]+src=["'](?:https?:)?//|<link(?![^>]+rel="canonical")[^>]+href=["'](?:https?:)?//"""
    )
    assert [
        path.name
        for path in out.rglob("*.html")
        if path.name != "lambda.html" and loads.search(path.read_text(encoding="utf-8"))
    ] == []
    for style in out.rglob("*.css"):
        assert not re.search(
            r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")
        ), style.name


def test_every_page_opens_without_a_request_to_elsewhere_and_fits_a_narrow_screen(site, page):
    out, *_ = site
    pages = sorted(out.rglob("*.html"))
    assert len(pages) > 15
    for path in pages:
        page.asked.clear()
        page.goto(path.as_uri(), wait_until="load")
        if page.locator(".math").count():
            page.wait_for_selector("mjx-container svg", state="attached")
        assert page.asked
        assert [
            url for url in page.asked if not url.startswith(("file://", "data:", "blob:"))
        ] == [], path.name
        assert page.wrong == [], path.name
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, path.name


def test_the_first_page_leads_to_the_slider(site, page):
    out, *_ = site
    page.goto((out / "index.html").as_uri())
    page.get_by_role("link", name="Move λ").click()
    page.wait_for_function("document.body.dataset.klrl")
    assert page.title() == "Move λ · klrl_edu"
