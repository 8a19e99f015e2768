"""The bench's arithmetic and its table; never a time."""

import pytest
import torch

from klrl_edu.audit.claims.catalogue import markdown_table
from klrl_edu.core.draws import seeded_draw
from klrl_edu.models.contract import sample
from klrl_edu.problems.examples import count_threes_prior
from tests.benchmarks import bench, exact_sizes
from tests.benchmarks.measure import ROUNDS, Ratio, ratio


def test_a_ratio_is_the_median_over_interleaved_rounds(monkeypatch):
    seconds = iter([value for k in range(ROUNDS) for value in (4.0 + k, 2.0)])
    monkeypatch.setattr("tests.benchmarks.measure.cpu_seconds", lambda work: next(seconds))
    assert ratio("a", "b", "≥ 4", lambda: None, lambda: None).value == (4 + ROUNDS // 2) / 2


@pytest.mark.parametrize(
    ("bar", "value", "reached"),
    [
        ("≥ 2", 2.0, True),
        ("≥ 2", 1.9, False),
        ("≤ 3e-4", 2e-4, True),
        ("≤ 3", 3.1, False),
        ("–", None, None),
        ("–", 1.0, None),
    ],
)
def test_a_bar_is_read_both_ways(bar, value, reached):
    assert Ratio("a", "b", bar, value, "").reached is reached


def test_both_samplers_of_the_bench_draw_the_same_tokens():
    prior = count_threes_prior()
    assert torch.equal(
        bench.cached_sample(prior, 100, seeded_draw(5)), sample(prior, 100, draw=seeded_draw(5))
    )


def test_a_missing_library_is_said_and_not_measured(capsys):
    def needs_another():
        """Something against a library."""
        raise ModuleNotFoundError("no", name="another")

    (row,) = bench.run([needs_another])
    assert (row.value, row.reached) == (None, None)
    assert "another is not installed" in capsys.readouterr().out


def test_the_page_shows_the_last_results_and_the_readme_five_rows_of_them():
    page = (bench.PAGES / "bench.md").read_text(encoding="utf-8")
    readme = bench.README.read_text(encoding="utf-8")
    results = bench.read_results()
    assert bench.with_table(page, bench.table(*results)) == page
    assert bench.with_table(readme, bench.headlines(*results)) == readme
    rows = [line for line in bench.headlines(*results).splitlines() if " ÷ " in line]
    assert len(rows) == len(bench.HEADLINES) == 5


def test_a_headline_that_was_not_measured_is_left_out():
    rows, measured_on = bench.read_results()
    kept = [row for row in rows if not row.against.startswith("Hugging Face")]
    assert len(bench.headlines(kept, measured_on).splitlines()) == 8
    assert "1 of the 2 bars" in bench.headlines(
        [Ratio("a", "b", "≥ 2", 3.0, ""), Ratio("c", "d", "≤ 2", 3.0, "")], measured_on
    )


def test_results_come_back_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results.json")
    rows = [Ratio("a", "b ÷ c", "≥ 2", 2.5, "π"), Ratio("d", "–", "–", None, "not measured")]
    bench.write_results(rows, "here")
    assert bench.read_results() == (rows, "here")


def test_a_table_is_put_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"a {bench.MARKS[0]} old {bench.MARKS[1]} b", encoding="utf-8")
    bench.put_table(page, "new\n")
    assert page.read_text(encoding="utf-8") == f"a {bench.MARKS[0]}\n\nnew\n\n{bench.MARKS[1]} b"


def test_the_page_of_estimators_is_what_the_audit_finds():
    page = (bench.PAGES / "estimators.md").read_text(encoding="utf-8")
    assert bench.with_table(page, f"{markdown_table()}\n", bench.ESTIMATOR_MARKS) == page


def test_the_page_of_what_is_exact_shows_every_row_that_is_measured():
    page = exact_sizes.PAGE.read_text(encoding="utf-8")
    table = page.partition(exact_sizes.MARKS[0])[2].partition(exact_sizes.MARKS[1])[0]
    shown = [line.split(" | ")[:3] for line in table.splitlines() if line.startswith("| ")][1:]
    rows = exact_sizes.rows()
    assert shown == [[f"| {row.what}", row.method, row.size] for row in rows]
