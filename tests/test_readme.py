"""What the README says runs, and prints what it says."""

import importlib.util
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

import klrl_edu as klrl
from klrl_edu.estimators import kl_gradients
from klrl_edu.experiments import cli
from klrl_edu.problems.examples import four_sentences_policy
from klrl_edu.theory.claims import CLAIMS
from klrl_edu.theory.identities import IDENTITIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON, AUDIT = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
KLRL = [line for line in COMMANDS if line.startswith("klrl ")]
DEV = sorted(set(re.findall(r"(?:python3|py) (dev\.py(?: [a-z]+)?)", README)))


def test_it_fits_two_screens_after_the_picture():
    assert len(README.splitlines()) <= 130


def test_the_ten_lines_run_and_end_near_the_posterior(capsys):
    scope: dict = {}
    exec(PYTHON, scope)
    said = capsys.readouterr().out
    assert "posterior at kl_coef = 0.1 by enumeration" in said
    assert "my_loss follows objective, scaled by 0.666667" in said
    assert "the target is 0 here" not in said  # the policy differs from the prior
    assert scope["klrl"].compare(scope["policy"], scope["target"]).reverse_kl < 1e-3


def test_the_audit_of_three_prompts_says_what_the_readme_says(capsys):
    scope: dict = {"klrl": klrl}
    exec(AUDIT, scope)
    said = capsys.readouterr().out
    assert "weighted is biased for all targets; nearest is objective: 0.9945 along it" in said
    assert "relative bias 0.105" in said
    assert "follows the mean of reinforce" in said
    plain = klrl.audit_gradient(
        klrl.losses.reinforce, scope["policy"], scope["problems"], behaviour=scope["rollout"]
    )
    assert f"{plain.relative_bias['objective']:.1%}" == "20.8%"
    assert f"{plain.cosine['objective']:.4f}" == "0.9802"
    assert "10.5 % of ∇J (cosine 0.9945), no weights at all 20.8 % (0.9802)" in README


@pytest.mark.parametrize("example", [PYTHON, AUDIT])
def test_the_examples_are_as_short_as_promised(example):
    statements = [
        line
        for line in example.splitlines()
        if line and not line.startswith((" ", ")", "print", "import"))
    ]
    assert len(statements) <= 10


def test_the_answer_about_k3_is_what_the_audit_finds():
    policy, problem = four_sentences_policy(), klrl.four_sentences()
    in_loss, in_reward, k2 = (
        klrl.audit_gradient(estimator, policy, problem)
        for estimator in (kl_gradients.loss_k3, kl_gradients.reward_k3, kl_gradients.loss_k2)
    )
    assert max(in_loss.relative_bias["forward_kl"], k2.relative_bias["reverse_kl"]) < 1e-12
    answer = " ".join(README.partition("*Is k3 in the loss")[2].partition("##")[0].split())
    assert (
        f"unbiased for ∇KL(q‖π), off ∇KL(π‖q) by {in_loss.relative_bias['reverse_kl']:.1%}"
        f" (cosine {in_loss.cosine['reverse_kl']:.3f})"
    ) in answer.replace(" %", "%")
    away = f"(cosine {in_reward.cosine['reverse_kl']:.3f})".replace("-", "−")
    assert f"k3 in the reward points away from ∇KL(π‖q) {away}" in answer
    assert "k2 in the loss is unbiased for it" in answer


def test_the_readme_has_commands_to_try():
    assert len(KLRL) == 6
    assert {"python3 dev.py demo", "python3 dev.py test"} <= set(COMMANDS)
    assert set(COMMANDS) == {*KLRL, *(line for line in COMMANDS if line[8:] in DEV)}


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


def test_the_example_of_a_json_table_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (row,) = re.findall(r"`(\{\"sentence\".*?\})`", README)
    Path("table.json").write_text(f"[{row}]", encoding="utf-8")
    assert cli.main(["posterior", "table.json"]) == 0


def test_the_audit_that_the_readme_quotes_runs_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"`(klrl audit kl_gradients[^`]*)`", README)
    assert cli.main(shlex.split(line)[1:]) == 0
    assert "loss_k3 is unbiased for forward_kl" in capsys.readouterr().out


@pytest.fixture
def dev(monkeypatch):
    """dev.py as a module, in this environment instead of one that it sets up."""
    spec = importlib.util.spec_from_file_location("klrl_dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PYTHON", sys.executable)
    monkeypatch.setattr(module, "set_up", lambda extra="": None)
    return module


@pytest.mark.parametrize("line", DEV)
def test_a_target_of_dev_py_that_the_readme_names_runs_modules_that_exist(
    line, dev, monkeypatch, tmp_path
):
    ran = []
    monkeypatch.setattr(dev, "run", lambda *words: ran.append(words) or 0)
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    assert dev.main(line.split()[1:]) == 0
    for flag, module, *_ in ran:
        assert flag == "-m"
        if module.startswith(("klrl_edu", "tests")):
            assert importlib.util.find_spec(module) is not None


@pytest.mark.slow
def test_the_two_commands_run_as_typed(dev, tmp_path):
    assert dev.main(["demo", "--out", str(tmp_path / "demo"), "--quiet"]) == 0
    assert (tmp_path / "demo" / "result.json").exists()
    assert dev.main(["test", "tests/core/test_spaces.py"]) == 0


@pytest.mark.parametrize("path", re.findall(r"`((?:klrl_edu|figures|tutorials)/[\w./]*)`", README))
def test_a_path_that_the_readme_names_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)", README))
def test_a_link_of_the_readme_leads_to_a_file(link):
    assert (ROOT / link).is_file()


def test_every_folder_of_the_package_has_its_line():
    folders = {path.parent.name for path in (ROOT / "klrl_edu").glob("*/__init__.py")}
    table = README.partition("| in `klrl_edu/`")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row[:60])}
    assert folders - {"exercises"} <= named


def test_the_counts_of_statements_and_claims_are_right():
    statements, claims = map(
        int,
        re.search(r"(\d+) identities and bounds on random problems, (\d+) claims", README).groups(),
    )
    assert (statements, claims) == (len(IDENTITIES), len(CLAIMS))


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert {project["version"], cited[1], newest[1]} == {klrl.__version__}
