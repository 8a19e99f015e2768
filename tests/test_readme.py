"""What the README says runs, and prints what it says."""

import re
import shlex
from pathlib import Path

import pytest

from klrl_edu.audit.claims.catalogue import markdown_table
from klrl_edu.experiments import cli
from klrl_edu.theory.claims import CLAIMS
from klrl_edu.theory.identities import IDENTITIES
from tests.benchmarks.bench import ESTIMATOR_MARKS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
]


def test_the_ten_lines_run_and_end_near_the_posterior(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(PYTHON[0], scope)
    said = capsys.readouterr().out
    assert "posterior at kl_coef = 0.1 by enumeration" in said
    assert "my_loss follows objective, scaled by 0.666667" in said
    assert scope["klrl"].compare(scope["policy"], scope["target"]).reverse_kl < 1e-3
    assert (tmp_path / "mine.png").stat().st_size > 10_000


def test_the_example_is_as_short_as_promised():
    statements = [
        line
        for line in PYTHON[0].splitlines()
        if line and not line.startswith((" ", "print", "import"))
    ]
    assert len(statements) <= 10


KLRL = [line for line in COMMANDS if line.startswith("klrl ") and "demo" not in line]


def test_the_readme_has_commands_to_try():
    assert len(KLRL) == 7
    assert {"python3 dev.py demo", "python3 dev.py test"} <= set(COMMANDS)


def test_the_commands_run_as_typed_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text(
        "sentence,prob,reward\nthe cat,0.4,1\nthe dog,0.3,0\na cat,0.2,0\na dog,0.1,2\n",
        encoding="utf-8",
    )
    for line in KLRL:
        words = shlex.split(line)[1:]
        faster = {"train": ["--steps", "40"], "check": ["--examples", "5"]}.get(words[0], [])
        assert cli.main(words + faster) == 0, line
    assert "reverse_kl" in capsys.readouterr().out


@pytest.mark.parametrize("path", re.findall(r"`(klrl_edu/[\w./]+)`", README))
def test_a_path_that_the_readme_names_exists(path):
    assert (Path(__file__).parents[1] / path).exists()


def test_the_counts_of_statements_and_claims_are_right():
    statements, claims = map(
        int,
        re.search(r"(\d+) identities and bounds on random problems, (\d+) claims", README).groups(),
    )
    assert (statements, claims) == (len(IDENTITIES), len(CLAIMS))


def test_the_pytest_example_is_the_one_that_the_tests_run_and_has_ten_lines():
    example = (Path(__file__).parent / "testing" / "test_readme_example.py").read_text(
        encoding="utf-8"
    )
    lines = [line for line in PYTHON[1].splitlines() if line]
    assert len(lines) <= 10
    assert lines == [
        line
        for line in (
            example.partition("# README: begin")[2].partition("# README: end")[0].splitlines()
        )
        if line
    ]


def test_the_table_of_estimators_is_what_the_audit_finds():
    before, after = ESTIMATOR_MARKS
    assert README.partition(before)[2].partition(after)[0].strip() == markdown_table()
