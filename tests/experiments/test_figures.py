"""The registry and `klrl figure`: numbers, one's own files, and one line for what is wrong with
them.
"""

import json
from pathlib import Path

import matplotlib as mpl
import pytest

from klrl_edu.experiments import cli, figures

OWN = '''"""Squares.

Source: Euclid, book II
"""

from dataclasses import dataclass

from klrl_edu import plots


@dataclass(frozen=True)
class Config:
    count: int = 4


def compute(config):
    x = list(range(config.count))
    return {"x": x, "y": [float(k * k) for k in x], "largest": 9.0}


def draw(data):
    figure, (ax,) = plots.new_figure(1)
    plots.plot_lines({"squares": (data["x"], data["y"])}, ax, xlabel="x", ylabel="x²")
    return figure
'''


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")


def test_a_registered_figure_writes_data_result_and_vector_picture(tmp_path, capsys):
    assert cli.main(["figure", "1", "--out", "out"]) == 0
    entry = figures.find_figure("01")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(
            "config.json",
            "data.json",
            "result.json",
            "fig01_lambda_sweep.png",
            "fig01_lambda_sweep.pdf",
        )
    }
    data = json.loads((tmp_path / "out" / "data.json").read_text(encoding="utf-8"))
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert list(result) == [
        "command",
        "number",
        "title",
        "source",
        "script",
        "config",
        "seconds",
        "data",
    ]
    assert result["data"] == data
    assert (result["number"], result["script"], result["config"]["points"]) == (
        "01",
        "fig01_lambda_sweep.py",
        79,
    )
    assert data.keys() == json.loads(entry.data.read_text(encoding="utf-8")).keys()
    pdf = (tmp_path / "out" / "fig01_lambda_sweep.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Subtype /Image" not in pdf
    assert b"/Type3" not in pdf
    said = capsys.readouterr().out
    assert entry.title in said
    assert str(tmp_path / "out") in said


def test_an_own_file_is_drawn_where_figures_go_by_default_and_again_over_itself(tmp_path, capsys):
    for _ in range(2):
        assert cli.main(["figure", "own.py"]) == 0
    out = tmp_path / "runs" / "figure-own"
    assert json.loads((out / "data.json").read_text())["y"] == [0, 1, 4, 9]
    assert (out / "own.pdf").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "Euclid" in said
    assert "largest" in said
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_folder_of_another_figure_is_left_alone(tmp_path, capsys):
    assert cli.main(["figure", "own.py", "--out", "out", "--quiet"]) == 0
    (tmp_path / "other.py").write_text(OWN, encoding="utf-8")
    refused(["figure", "other.py", "--out", "out"], "`klrl figure other` did not write", capsys)


def test_the_same_picture_comes_from_python(tmp_path):
    made = figures.make_figure(Path("own.py"))
    assert made.config.count == 4
    assert made.data["largest"] == 9
    assert mpl.rcParams["pdf.fonttype"] != 42  # the style stays inside


def test_without_a_name_the_registry_is_listed_and_nothing_written(tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["figure"]) == 0
    printed = capsys.readouterr().out
    said = " ".join(printed.split())
    assert all(
        f"{entry.number} {entry.title} {entry.source}" in said for entry in figures.find_figures()
    )
    assert max(map(len, printed.splitlines())) <= 100
    assert sorted(tmp_path.rglob("*")) == before


def test_listing_runs_no_figure(monkeypatch):
    monkeypatch.setattr(figures, "load_module", lambda script: pytest.fail(f"{script} was run"))
    assert {"01", "02", "15", "19"} <= {entry.number for entry in figures.find_figures()}


def test_infinities_are_texts_in_the_files_and_numbers_in_the_picture(tmp_path):
    (tmp_path / "own.py").write_text(
        OWN.replace('"largest": 9.0', '"largest": float("inf")').replace(
            "    figure, (ax,)", "    assert data['largest'] > 9\n    figure, (ax,)"
        )
    )
    assert cli.main(["figure", "own.py", "--out", "out", "--quiet"]) == 0
    assert json.loads((tmp_path / "out" / "data.json").read_text())["largest"] == "inf"


def test_figures_of_an_installed_package_come_before_a_checkout_s(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_PACKAGE", tmp_path / "klrl_edu")
    (tmp_path / "klrl_edu").mkdir()
    with pytest.raises(figures.InputError, match="no figures are in"):
        figures.figures_folder()
    for place in (tmp_path / "figures", tmp_path / "klrl_edu" / "figures"):
        place.mkdir()
        (place / "fig01_own.py").write_text(OWN, encoding="utf-8")
        assert figures.figures_folder() == place
    entry = figures.find_figure("1")
    assert (entry.number, entry.title, entry.source) == ("01", "Squares.", "Euclid, book II")
    assert entry.data == place / "data" / "fig01.json"


BAD_FILES = {
    "syntax error": (
        OWN.replace("def draw(data):", "def draw(data)"),
        "own.py is not Python: line 21: expected ':'",
    ),
    "null byte": ("\0", "own.py is not Python"),
    "no compute": (
        OWN.replace("def compute", "def compte"),
        "own.py defines no compute; a figure's file has",
    ),
    "nothing": ("", "own.py defines no Config, compute, draw"),
    "compute is a number": (OWN + "\n\ncompute = 3\n", "own.py defines no compute"),
    "Config is plain": (OWN.replace("@dataclass(frozen=True)\n", ""), "Config is not a dataclass"),
    "Config needs an argument": (
        OWN.replace("count: int = 4", "count: int"),
        "own.py: Config() failed: TypeError",
    ),
    "import fails": (
        OWN.replace("from dataclasses", "import no_such_module\nfrom dataclasses"),
        "running it failed at line 6: ModuleNotFoundError",
    ),
    "compute fails": (
        OWN.replace('"largest": 9.0', '"largest": 1 / 0'),
        "compute(Config()) failed at line 18: ZeroDivisionError",
    ),
    "compute refuses": (
        OWN.replace(
            "    return {",
            "    plots.four_sentences = __import__('klrl_edu').four_sentences(-1)\n    return {",
        ),
        "compute(Config()): kl_coef = -1.0 must be",
    ),
    "compute exits": (
        OWN.replace('"largest": 9.0', '"largest": exit(3)'),
        "compute(Config()) failed at line",
    ),
    "compute returns a list": (
        OWN.replace("return {", "return 3, {"),
        "compute returned a tuple; return a dict",
    ),
    "an array": (
        OWN.replace('"largest": 9.0', '"largest": __import__("numpy").zeros(2)'),
        "JSON cannot hold",
    ),
    "draw fails": (
        OWN.replace('data["y"]', 'data["z"]'),
        "draw(data) failed at line 23: KeyError: 'z'",
    ),
    "draw returns Axes": (
        OWN.replace("return figure", "return ax"),
        "draw returned a Axes; return the matplotlib Figure",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_line_exit_2_and_nothing_written(kind, tmp_path, capsys):
    text, words = BAD_FILES[kind]
    (tmp_path / "own.py").write_text(text, encoding="utf-8")
    refused(["figure", "own.py", "--out", "out"], words, capsys)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["own.py"]


BAD_ARGUMENTS = {
    "figure 77": "figure '77' is not known; choose from 01, 02, ",
    "figure -1": "figure",
    "figure own": "figure 'own' is not known",
    "figure nowhere.py": "cannot read nowhere.py: No such file or directory",
    "figure folder.py": "cannot read folder.py: Is a directory",
    "figure own.py --out own.py": "is a file; name a directory",
    "figure own.py --out .": "did not write",
    "figure own.py --out /proc/none": "cannot be written",
    "figure own.py --outt x": "Perhaps you meant: --out",
}


@pytest.mark.parametrize("line", BAD_ARGUMENTS)
def test_a_bad_argument_is_one_line_exit_2_and_nothing_written(line, tmp_path, capsys):
    (tmp_path / "folder.py").mkdir()
    before = sorted(tmp_path.rglob("*"))
    refused(line.split(), BAD_ARGUMENTS[line], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_taken_folder_is_refused_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "make_figure", lambda script: pytest.fail("computed first"))
    refused(["figure", "own.py", "--out", "."], "did not write", capsys)


def refused(arguments, words, capsys):
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("klrl: ")
    assert said.err.count("\n") == 1, said.err
    assert words in said.err
    assert "Traceback" not in said.err


def test_the_committed_files_are_renewed_by_the_module(tmp_path, monkeypatch):
    place = tmp_path / "klrl_edu" / "figures"
    place.mkdir(parents=True)
    (place / "fig07_own.py").write_text(OWN, encoding="utf-8")
    monkeypatch.setattr(figures, "_PACKAGE", tmp_path / "klrl_edu")
    assert figures.main([]) == 0
    assert {path.name for path in place.iterdir()} == {
        "fig07_own.py",
        "fig07_own.png",
        "fig07_own.pdf",
        "data",
        "README.md",
    }
    assert json.loads((place / "data" / "fig07.json").read_text())["largest"] == 9
    assert "| 07 | Squares. | Euclid, book II |" in (place / "README.md").read_text(
        encoding="utf-8"
    )


def test_renewing_says_what_is_unknown(capsys):
    assert figures.main(["99"]) == 2
    assert "figure '99' is not known" in capsys.readouterr().err
