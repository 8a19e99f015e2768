"""Where results go: numbered, never over an old one, and to one caller alone."""

import threading

import pytest

from klrl_edu.core.errors import InputError
from klrl_edu.experiments import cli, directories
from klrl_edu.experiments.directories import new_directory, owned_directory


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_directory_that_is_asked_for_is_won_by_one_caller(tmp_path, monkeypatch):
    barrier = threading.Barrier(8)
    win = directories._won
    monkeypatch.setattr(
        directories, "_won", lambda place, command: (barrier.wait(20), win(place, command))[1]
    )
    got = []

    def call():
        try:
            got.append(new_directory(tmp_path / "run", "train"))
        except InputError as error:
            got.append(str(error))

    run_together(call)
    assert sum(one == tmp_path / "run" for one in got) == 1
    assert sum("was taken by another call" in str(one) for one in got) == 7


def test_numbered_directories_are_all_different(tmp_path):
    got = []
    run_together(lambda: got.append(new_directory(None, "train")))
    assert {path.name for path in got} == {"train", *(f"train-{k}" for k in range(2, 9))}


def run_together(call):
    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_former_result_is_kept_whatever_command_asks(tmp_path):
    first = new_directory(tmp_path / "out", "posterior")
    (first / "result.json").write_text("1")
    with pytest.raises(InputError, match="holds a former result of `klrl posterior`"):
        new_directory(tmp_path / "out", "posterior")
    with pytest.raises(InputError, match="`klrl train` did not write"):
        new_directory(tmp_path / "out", "train")
    assert (first / "result.json").read_text() == "1"


def test_a_figure_s_directory_is_renewed_by_the_same_figure_alone(tmp_path):
    assert owned_directory(tmp_path / "f", "figure 01") == owned_directory(
        tmp_path / "f", "figure 01"
    )
    with pytest.raises(InputError, match="`klrl figure 02` did not write"):
        owned_directory(tmp_path / "f", "figure 02")


@pytest.mark.parametrize(
    "words",
    [
        ["posterior", "four-sentences"],
        ["train", "four-sentences", "--steps", "1"],
        ["audit", "kl_values.k1"],
        ["check", "--name", "c-kl-example"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_numbers_its_runs(words, tmp_path, capsys):
    name = words[0]
    for _ in range(2):
        assert cli.main([*words, "--quiet"]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {name, f"{name}-2"}
    assert cli.main([*words, "--out", f"runs/{name}", "--quiet"]) == 2
    assert "results are not overwritten; choose another directory" in capsys.readouterr().err


def test_compare_numbers_inside_the_run(tmp_path):
    assert cli.main(["train", "four-sentences", "--steps", "1", "--out", "run", "--quiet"]) == 0
    for _ in range(2):
        assert cli.main(["compare", "run", "--quiet"]) == 0
    assert (tmp_path / "run" / "compare-2" / "result.json").exists()
