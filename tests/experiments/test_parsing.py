"""The words of a command line: help, misspelt words, and what is missing."""

import os
import sys

import pytest

from klrl_edu.experiments import cli


def refused(line, capsys):
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("klrl: ")
    assert error.count("\n") == 1, error
    return error


def test_klrl_alone_prints_its_help(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert "usage: klrl" in said
    assert "klrl COMMAND --help" in said
    assert all(name in said for name in cli.COMMANDS)


def test_a_misspelt_command_gets_the_nearest_and_the_list(capsys):
    error = refused("tarin four-sentences", capsys)
    assert "unknown command 'tarin'. Perhaps you meant: train; the commands are demo, " in error


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("train t --lambda 1", "--kl-coef"),
        ("train t --beta=1", "--kl-coef"),
        ("train --learning-rate 1 t", "--lr"),
        ("train t --epochs 3", "--steps"),
        ("train t --batch 3", "--batch-size"),
        ("train t --stepz 3", "--steps"),
        ("train t --output x", "--out"),
        ("posterior t --normalise", "--normalize"),
        ("posterior t --top 3", "--count"),
        ("check --trials 3", "--examples"),
        ("compare r --silent", "--quiet"),
    ],
)
def test_an_option_of_another_tool_gets_its_name_here(words, meant, capsys):
    error = refused(words, capsys)
    command = words.split()[0]
    assert f"Perhaps you meant: {meant}; it takes --" in error
    assert f"(klrl {command} --help)" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train", "Missing: klrl train TABLE (klrl train --help)"),
        ("compare", "Missing: klrl compare RUN"),
        ("train t --lr", "--lr lacks its value"),
        ("train --lr --seed 1 t", "--lr lacks its value"),
        ("train t --steps 1e3", "--steps '1e3' is not a whole number, such as 100"),
        ("train t --lr fast", "--lr 'fast' is not a number, such as 0.5"),
        ("train t --device gpu", "invalid choice 'gpu' for --device; choose from auto, cpu, cuda"),
        ("train t u", "'u' is one word too many for klrl train"),
        ("train t --nonsense", "train has no option --nonsense; it takes --model"),
        ("train t --out -dir", "--out lacks its value"),
        ("train -table.csv", "train has no option -table.csv; it takes --model"),
        ("train -table.csv", "and a file is written ./-table.csv"),
        ("train -- t --steps 1", "'--steps' comes after --, where nothing is an option"),
        ("train t --quiet=1", "--quiet takes no value: leave '1' out"),
        ("train t --normalize no", "--normalize takes no value: leave 'no' out"),
        ("--tyro-print-completion", "--tyro-print-completion needs a shell: bash, zsh, tcsh"),
        ("--tyro-print-completion zz", "needs a shell: bash, zsh, tcsh"),
        ("--tyro-nonsense", "unknown command '--tyro-nonsense'"),
    ],
)
def test_what_is_missing_or_cannot_be_read_is_named(words, said, capsys):
    assert said in refused(words, capsys)


def test_a_name_after_two_hyphens_is_a_name(capsys):
    assert "'t' is neither a file nor" in refused("train --steps 1 -- t", capsys)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_values_are_called_by_words_in_the_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert not any(word in said for word in (" STR", "{None}", " FLOAT", " PATH", " INT", "None)"))


def test_a_pipe_that_closes_early_is_no_error_and_the_work_is_done(tmp_path, monkeypatch, capsys):
    for words in (["posterior", "four-sentences", "--out", str(tmp_path / "out")], ["--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w", encoding="utf-8", buffering=1) as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            assert cli.main(words) == 0
    assert (tmp_path / "out" / "result.json").exists()
    assert capsys.readouterr().err == ""
