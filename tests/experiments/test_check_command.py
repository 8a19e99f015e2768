"""`klrl check`: exit codes, result.json, and what a wrong statement or a wrong word gets."""

import json
from dataclasses import replace

import pytest

from klrl_edu.experiments import cli
from klrl_edu.theory import claims, identities


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_everything_holds_and_is_saved(tmp_path, capsys):
    assert cli.main(["check", "--examples", "3"]) == 0
    said = capsys.readouterr().out
    result = saved(tmp_path / "runs/check")
    assert {row["name"] for row in result["identities"]} == set(identities.IDENTITIES)
    assert {row["name"] for row in result["claims"]} == set(claims.CLAIMS)
    assert all(name in said for name in (*identities.IDENTITIES, *claims.CLAIMS))
    assert result["wrong"] == []
    assert (result["examples"], result["seed"]) == (3, 0)
    assert f"{len(identities.IDENTITIES)} statements hold" in said
    assert {"latex", "source", "largest_error", "twin", "tutorial"} <= set(result["identities"][0])


@pytest.mark.slow
def test_the_default_run_keeps_within_a_minute(tmp_path):
    assert cli.main(["check", "--quiet"]) == 0
    result = saved(tmp_path / "runs/check")
    assert result["examples"] == 120
    assert len(result["identities"]) >= 40
    assert result["seconds"] < 60  # of CPU time on one thread


def test_one_statement_and_one_claim_by_name(tmp_path, capsys):
    assert cli.main(["check", "--name", "pinsker", "--examples", "5", "--seed", "3"]) == 0
    assert [row["name"] for row in saved(tmp_path / "runs/check")["identities"]] == ["pinsker"]
    assert saved(tmp_path / "runs/check")["claims"] == []
    assert cli.main(["check", "--name", "c-kl-example"]) == 0
    assert [row["name"] for row in saved(tmp_path / "runs/check-2")["claims"]] == ["c-kl-example"]
    assert "0.0998 nats = 0.1440 bits" in capsys.readouterr().out


def test_the_claims_alone_say_what_was_seen(tmp_path, capsys):
    assert cli.main(["check", "--claims", "--out", "c"]) == 0
    assert saved(tmp_path / "c")["identities"] == []
    assert "0.0998 nats = 0.1440 bits" in capsys.readouterr().out


def test_another_seed_tries_other_problems(tmp_path):
    errors = []
    for seed in ("0", "1"):
        assert (
            cli.main(
                [
                    "check",
                    "--name",
                    "frontier_slope",
                    "--examples",
                    "20",
                    "--seed",
                    seed,
                    "--out",
                    seed,
                    "--quiet",
                ]
            )
            == 0
        )
        errors.append(saved(tmp_path / seed)["identities"][0]["largest_error"])
    assert errors[0] != errors[1]


def test_a_false_statement_is_exit_1_by_name(tmp_path, monkeypatch, capsys):
    twin = identities.IDENTITIES["elbo"].twin
    wrong = replace(identities.IDENTITIES["elbo"], function=twin.function)
    monkeypatch.setitem(identities.IDENTITIES, "elbo", wrong)
    assert cli.main(["check", "--name", "elbo", "--examples", "20"]) == 1
    assert "WRONG: elbo" in capsys.readouterr().out
    assert saved(tmp_path / "runs/check")["wrong"] == ["elbo"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--name", "pinskre"], "'pinskre' is not known. Did you mean pinsker?"),
        (["--name", "pinsker", "--claims"], "do not go together"),
        (["--examples", "0"], "examples = 0 must be a whole number of at least 1"),
        (["--examples", "many"], "examples"),
        (["--seed", "-1"], "seed = -1 must be a whole number"),
        (["--out", "taken"], "holds files that `klrl check` did not write"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(tmp_path, capsys, words, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("x")
    assert cli.main(["check", *words]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert says in said.err
    assert said.out == ""
    assert not (tmp_path / "runs").exists()
