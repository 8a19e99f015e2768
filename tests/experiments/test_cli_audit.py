"""`klrl audit`: anyone's function by its name, the package's own against its claims, and one line
for whatever is wrong.
"""

import json

import pytest
from matplotlib.axes import Axes

from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.audit.claims import catalogue
from klrl_edu.estimators import kl_values
from klrl_edu.experiments import cli, plots
from klrl_edu.learning import losses
from klrl_edu.problems.examples import four_sentences, four_sentences_policy

MINE = """
import torch

def centred(batch):
    u = batch.log_probs.sum(-1) - batch.prior_log_probs.sum(-1)
    reward = batch.rewards.sum(-1) - batch.kl_coef * u.detach()
    return -((reward - reward.mean()) * batch.log_probs.sum(-1)).mean()

def policy_loss(log_prob, ref_log_prob):
    return (log_prob - ref_log_prob).sum(-1).square().mean() / 2

def kl_penalty(logprob, ref_logprob):
    return logprob - ref_logprob

def broken(batch):
    return batch.nothing

class NeedsMore:
    def __init__(self, more):
        pass

class Module(torch.nn.Module):
    def forward(self, batch):
        return centred(batch)
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "an_audited_module.py").write_text(MINE, encoding="utf-8")
    return tmp_path


def result(folder, out="out"):
    def refuse(name):
        raise AssertionError(f"{name} in result.json")

    return json.loads(
        (folder / out / "result.json").read_text(encoding="utf-8"), parse_constant=refuse
    )


@pytest.mark.parametrize(
    "target",
    ["an_audited_module:centred", "an_audited_module.py:centred", "an_audited_module:Module"],
)
def test_a_users_loss_is_audited_by_its_name(target, tmp_path, capsys):
    assert cli.main(["audit", target, "--batch-size", "3", "--out", "out"]) == 0
    saved = result(tmp_path)
    assert saved["scale"]["objective"] == pytest.approx(2 / 3, rel=1e-12)
    assert "follows objective, scaled by 0.666667" in saved["verdict"]
    assert (saved["target"], saved["problem"], saved["executions"]) == (
        target,
        "four-sentences",
        20,
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "result.json",
        "audit.png",
        "audit.pdf",
    }
    assert saved["verdict"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        ("an_audited_module:policy_loss", "policy_loss is unbiased for reverse_kl."),
        (
            "an_audited_module:kl_penalty",
            "kl_penalty is unbiased for reverse_kl and reverse_kl_per_token.",
        ),
        ("kl_values.k3", "k3 is unbiased for reverse_kl and reverse_kl_per_token."),
        ("losses.reinforce", "reinforce is unbiased for objective."),
    ],
)
def test_losses_and_values_are_told_apart(target, verdict, tmp_path):
    assert cli.main(["audit", target, "--out", "out", "--quiet"]) == 0
    assert result(tmp_path)["verdict"] == verdict


def test_kind_overrules_and_kl_coef_counts(tmp_path):
    assert (
        cli.main(
            ["audit", "an_audited_module:policy_loss", "--kind", "value", "--out", "out", "--quiet"]
        )
        == 0
    )
    assert result(tmp_path)["coordinates"] == "nats"
    assert (
        cli.main(["audit", "losses.reinforce", "--kl-coef", "0.3", "--out", "again", "--quiet"])
        == 0
    )
    assert result(tmp_path, "again")["kl_coef"] == 0.3


def test_other_problems_get_a_policy_that_is_neither_prior_nor_posterior(tmp_path):
    rows = "sentence,prob,reward\nx y,0.5,1\nx z,0.3,0\nu y,0.1,2\nu z,0.1,-inf\n"
    (tmp_path / "table.csv").write_text(rows, encoding="utf-8")
    assert (
        cli.main(["audit", "losses.reinforce", "--problem", "table.csv", "--out", "out", "--quiet"])
        == 0
    )
    saved = result(tmp_path)
    assert saved["verdict"] == "reinforce is unbiased for objective."
    assert saved["relative_bias"]["reverse_kl"] > 0.01
    assert len(saved["mean"]) == 3  # what is forbidden has no logit


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["an_audited_module:nope"],
            "has no function 'nope'; it has centred, policy_loss, kl_penalty, broken",
        ),
        (["nowhere_at_all:f"], "there is no module 'nowhere_at_all'"),
        (["nowhere_at_all.py:f"], "there is no file nowhere_at_all.py"),
        (
            ["does_not_import:f"],
            "does not import: ModuleNotFoundError: No module named 'not_installed'; install",
        ),
        (["does_not_import.py:f"], "does not import: ModuleNotFoundError"),
        (["does_not_parse.py:f"], "does not import: SyntaxError"),
        (["an_audited_module:broken"], "failed as a loss: AttributeError"),
        (
            ["an_audited_module:NeedsMore"],
            "is a class and cannot be made without arguments: TypeError",
        ),
        (["torch:exp"], "failed as a value: "),
        (["losses.nope"], "'losses.nope' is no function of this package"),
        (["nonsense"], "'nonsense' is no function of this package"),
        (["losses.rloo"], "batch_size >= 2"),
        (["losses.rloo", "--batch-size", "2", "--problem", "surnames"], "500,500 multisets"),
        (["kl_values.k1", "--problem", "nope"], "neither a file nor a standing problem"),
        (["kl_values.k1", "--kind", "nope"], "kind"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, said, tmp_path, capsys):
    (tmp_path / "does_not_import.py").write_text("import not_installed\n", encoding="utf-8")
    (tmp_path / "does_not_parse.py").write_text("def f(:\n", encoding="utf-8")
    assert cli.main(["audit", *arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_name_the_packages_own_claims_are_checked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(catalogue, "CATALOGUE", catalogue.CATALOGUE[:2])
    monkeypatch.setattr(catalogue.check_catalogue, "__defaults__", (catalogue.CATALOGUE, None))
    assert cli.main(["audit", "--out", "out"]) == 0
    assert {row["holds"] for row in result(tmp_path)["rows"]} == {True}
    assert "kl_values.k1" in capsys.readouterr().out


def test_a_claim_that_fails_is_exit_1(tmp_path, monkeypatch):
    rows = [row._replace(error=0.5) for row in catalogue.check_catalogue(catalogue.CATALOGUE[:1])]
    monkeypatch.setattr(catalogue, "check_catalogue", lambda: rows)
    assert cli.main(["audit", "--out", "out", "--quiet"]) == 1
    assert not result(tmp_path)["rows"][0]["holds"]


def test_the_picture_has_a_bar_a_target_and_marks_what_is_unbiased():
    report = audit_gradient(losses.rloo, four_sentences_policy(), four_sentences(), batch_size=2)
    ax = plots.plot_audit(report)
    assert isinstance(ax, Axes)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(list(report.cosine.values()))
    assert [note.get_text() for note in ax.texts][:2] == ["unbiased", "off by 61.3 %"]
    halved = plots.plot_audit(
        audit_gradient(
            lambda batch: losses.rloo(batch) / 2,
            four_sentences_policy(),
            four_sentences(),
            batch_size=2,
        )
    )
    assert [note.get_text() for note in halved.texts][:2] == ["0.5 × exactly", "off by 80.1 %"]
    values = plots.plot_audit(audit_value(kl_values.k2, four_sentences_policy(), four_sentences()))
    assert values.get_xlabel() == "nats (dashed: the mean, 0.101)"
