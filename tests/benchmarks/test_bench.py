"""The bench's arithmetic and its table; never a time."""

from pathlib import Path

import pytest
import torch

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


def test_the_readme_shows_what_is_exact():
    assert exact_sizes.RESULTS.read_text(encoding="utf-8") in bench.README.read_text(
        encoding="utf-8"
    )


def test_the_readme_shows_the_last_results():
    results = (Path(bench.__file__).parent / "results.md").read_text(encoding="utf-8")
    assert results in bench.README.read_text(encoding="utf-8")
    assert (
        bench.with_table(f"a {bench.MARKS[0]} old {bench.MARKS[1]} b", "new\n")
        == f"a {bench.MARKS[0]}\n\nnew\n\n{bench.MARKS[1]} b"
    )
