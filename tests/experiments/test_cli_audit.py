"""`klrl audit`: anyone's function by its name, the package's own against its claims, and one line
for whatever is wrong.
"""

import dataclasses
import json

import pytest
from matplotlib.axes import Axes

from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.audit.claims import catalogue
from klrl_edu.audit.report import AuditReport
from klrl_edu.audit.staleness import audit_staleness
from klrl_edu.core.draws import seeded_draw
from klrl_edu.estimators import kl_gradients, kl_values
from klrl_edu.experiments import audit_command, cli, plots
from klrl_edu.experiments.audit_arguments import problems_of, tilted_prior
from klrl_edu.experiments.loading import audited_functions
from klrl_edu.learning import losses
from klrl_edu.models.distorted import nucleus, tempered
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy

LIBRARY = """
import torch

def token_tis(old_log_prob, log_prob, advantages, response_mask, cliprange=0.2):
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    worst = torch.max(-advantages * ratio, -advantages * clipped)
    return (worst * response_mask).sum() / response_mask.sum()
"""

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

def first(batch):
    return batch.log_probs[0].sum()

def broken(batch):
    return batch.nothing

class Unspeakable(BaseException):
    pass

def flees(batch):
    raise Unspeakable

class NeedsMore:
    def __init__(self, more):
        pass

class Module(torch.nn.Module):
    def forward(self, batch):
        return centred(batch)
"""


OF_ONE = ["losses.reinforce"]  # what stands before options that are wrong


@pytest.fixture
def unseen(monkeypatch):
    """No pictures, which take most of the time."""
    monkeypatch.setattr(audit_command, "_draw", lambda report, path: None)


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
def test_losses_and_values_are_told_apart(target, verdict, tmp_path, unseen):
    assert cli.main(["audit", target, "--out", "out", "--quiet"]) == 0
    assert result(tmp_path)["verdict"] == verdict


def test_kind_overrules_and_kl_coef_counts(tmp_path, unseen):
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


def test_other_problems_get_a_policy_that_is_neither_prior_nor_posterior(tmp_path, unseen):
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
            "has no function 'nope'; it has centred, policy_loss, kl_penalty, first, broken",
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
        (["an_audited_module:flees"], "failed as a loss: Unspeakable"),
        (
            ["an_audited_module:NeedsMore"],
            "is a class and cannot be made without arguments: TypeError",
        ),
        (["torch:exp"], "torch:exp may be a loss or an estimator of KL"),
        (["torch:exp", "--kind", "value"], "failed as a value: "),
        (["losses.nope"], "'losses.nope' is no function of this package"),
        (["nonsense"], "'nonsense' is no function of this package; klrl audit --list"),
        (["grpo"], "'grpo' is no function of this package; did you mean losses.grpo?"),
        (["losses.grp"], "did you mean losses.grpo?"),
        (["rlo"], "did you mean losses.rloo?"),
        (["--behaviour", "prior"], "--behaviour belongs to the audit of one function"),
        (["--batch-size", "2"], "--batch-size belongs to the audit of one function"),
        (["losses.rloo"], "batch_size >= 2"),
        (
            ["losses.rloo", "--batch-size", "2", "--max-executions", "9"],
            "10 multisets, more than max_executions = 9; take a smaller batch_size or space, raise"
            " --max-executions, or sample: --monte-carlo N.",
        ),
        (["losses.f_dpg"], "or say what it is: --adapt pseudo_reward=NAME. Known names: tokens"),
        (["an_audited_module:first", "--batch-size", "2"], "say --micro-batches K (it splits"),
        (["kl_values.k1", "--problem", "nope"], "neither a file nor a standing problem"),
        (["kl_values.k1", "--kind", "nope"], "kind"),
        (["kl_values.k1", "--against", "losses.rloo"], "--against is for losses"),
        (["kl_values.k1", "--micro-batches", "2"], "--micro-batches is for losses"),
        (["kl_values.k1", "--ordered"], "--ordered is for losses"),
        (["kl_values.k1", "--stale", "0", "--stale", "1"], "are a table for losses"),
        ([*OF_ONE, "--behaviour", "warm"], "--behaviour 'warm' names no policy; give temperature"),
        ([*OF_ONE, "--behaviour", "top_k"], "--behaviour 'top_k' names no policy"),
        ([*OF_ONE, "--behaviour", "temperature=hot"], "'hot' is no number, such as 0.6"),
        ([*OF_ONE, "--behaviour", "temperature=0"], "temperature = 0"),
        ([*OF_ONE, "--behaviour", "top_k=1.5"], "k = 1.5"),
        ([*OF_ONE, "--behaviour", "nucleus=2"], "p = 2"),
        ([*OF_ONE, "--behaviour", "prior", "--behaviour", "prior"], "'prior' is given twice"),
        ([*OF_ONE, "--stale", "1.5"], "--stale 1.5 is no share"),
        ([*OF_ONE, "--stale", "nan"], "--stale nan is no share"),
        ([*OF_ONE, "--adapt", "clip"], "--adapt 'clip' cannot be read; write parameter=name"),
        ([*OF_ONE, "--adapt", "clip="], "--adapt 'clip=' cannot be read"),
        ([*OF_ONE, "--adapt", "clip=1"], "adapt names 'clip', which is no parameter of reinforce"),
        ([*OF_ONE, "--adapt", "a=1", "--adapt", "a=2"], "--adapt gives a twice"),
        (
            [*OF_ONE, "--adapt", "baseline=log_prbs"],
            "is no name of a field; did you mean log_probs",
        ),
        ([*OF_ONE, "--against", "losses.grp"], "did you mean losses.grpo?"),
        ([*OF_ONE, "--against", "none.json"], "none.json: no report can be read there"),
        ([*OF_ONE, "--micro-batches", "2"], "micro_batches = 2 does not divide batch_size = 1"),
        ([*OF_ONE, "--seed", "1"], "--seed is of --monte-carlo"),
        ([*OF_ONE, "--monte-carlo", "1"], "monte_carlo = 1 must be a whole number"),
        ([*OF_ONE, "--kl-coef", "inf"], "kl_coef = inf"),
        (
            [*OF_ONE, *(2 * ["--problem", "four-sentences"]), *(3 * ["--kl-coef", "1"])],
            "--problem is given 2 times and --kl-coef 3 times",
        ),
        (
            [*OF_ONE, "--problem", "four-sentences", "--problem", "one.csv"],
            "--problem one.csv: its sentences or their probabilities are not those of",
        ),
        (
            [*OF_ONE, "--problem", "one.csv", "--problem", "two.csv"],
            "--problem two.csv: its sentences or their probabilities are not those of one.csv",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, said, tmp_path, capsys):
    (tmp_path / "does_not_import.py").write_text("import not_installed\n", encoding="utf-8")
    (tmp_path / "does_not_parse.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "one.csv").write_text("sentence,prob,reward\nx,.5,1\ny,.5,0\n", encoding="utf-8")
    (tmp_path / "two.csv").write_text("sentence,prob,reward\nx,.4,1\ny,.6,0\n", encoding="utf-8")
    assert cli.main(["audit", *arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_function_of_a_librarys_names_is_a_loss_and_the_first_line_says_why(
    tmp_path, capsys, unseen
):
    (tmp_path / "names.py").write_text(LIBRARY, encoding="utf-8")
    assert cli.main(["audit", "names.py:token_tis", "--out", "out"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        "token_tis, taken for a loss (its parameter advantages); --kind value"
    )
    assert said[1] == "token_tis follows expected_reward, scaled by 0.5."
    assert said[2].startswith("Note: advantages: the sequence's reward r(y), without baseline and")
    assert result(tmp_path)["kind"] == "gradient"
    given = ["--adapt", "advantages=leave_one_out", "--batch-size", "2", "--quiet"]
    assert cli.main(["audit", "names.py:token_tis", *given, "--out", "loo"]) == 0
    (note,) = result(tmp_path, "loo")["notes"]
    assert note.startswith("advantages: r(y) less the mean of the others in its group")
    assert cli.main(["audit", "names.py:token_tis", "--kind", "value", "--out", "value"]) == 0
    assert capsys.readouterr().out.startswith("token_tis, audited as an estimator of KL (--kind")


def test_who_draws_and_what_it_is_held_against_are_words(tmp_path, capsys, unseen):
    first = ["audit", "losses.rloo", "--batch-size", "2", "--out", "first", "--quiet"]
    assert cli.main(first) == 0
    words = ["--kl-coef", "0.5", "--kl-coef", "2", "--behaviour", "temperature=0.6"]
    others = ["--against", "losses.z_score", "--against", "first/result.json"]
    again = ["audit", "losses.rloo", "--batch-size", "2", *words, *others, "--out", "out"]
    assert cli.main(again) == 0
    assert "Batches are drawn by temperature=0.6." in capsys.readouterr().out.splitlines()[0]
    problems = problems_of(["four-sentences"], [0.5, 2.0])
    policy = four_sentences_policy()
    report = audit_gradient(
        losses.rloo,
        policy,
        problems,
        batch_size=2,
        behaviour=tempered(policy, 0.6),
        against={
            "the mean of losses.z_score": losses.z_score,
            "the mean of first/result.json": AuditReport.load("first/result.json"),
        },
    )
    saved = result(tmp_path)
    assert saved["mean"] == report.mean.tolist()
    assert saved["bias"] == report.bias
    assert (saved["kl_coef"], saved["problem"]) == ([0.5, 2.0], "four-sentences")
    assert saved["entries"] == ["the cat", "the dog", "a cat", "a dog"]


def test_several_policies_that_draw_are_a_table_of_staleness(tmp_path, capsys):
    words = ["--behaviour", "policy", "--behaviour", "nucleus=0.8", "--stale", "0.5"]
    assert cli.main(["audit", "losses.reinforce", *words, "--out", "out"]) == 0
    problem, policy = four_sentences(), four_sentences_policy()
    half = SequenceTable(
        policy.space, policy.tokens, (policy.logits + problem.prior.log_prob(policy.tokens)) / 2
    )
    drawn_by = {"policy": policy, "nucleus=0.8": nucleus(policy, 0.8), "stale 0.5": half}
    report = audit_staleness(losses.reinforce, policy, problem, drawn_by)
    saved, said = result(tmp_path), capsys.readouterr().out
    assert [row["label"] for row in saved["rows"]] == list(drawn_by)
    assert saved["nearest_target"] == report.target == "objective"
    for row, expected in zip(saved["rows"], report.rows, strict=True):
        assert row["mean"] == pytest.approx(expected.report.mean.tolist(), abs=1e-15)
    assert "drawn by" in said
    assert (tmp_path / "out" / "audit.png").exists()


def test_tables_of_one_prior_stand_in_one_batch_whatever_the_order_of_their_rows(tmp_path, unseen):
    (tmp_path / "a.csv").write_text("sentence,prob,reward\nx,.5,1\ny,.3,0\nz z,.2,2\n", "utf-8")
    (tmp_path / "b.csv").write_text("sentence,prob,reward\nz z,.2,0\nx,.5,-1\ny,.3,-inf\n", "utf-8")
    words = ["--problem", "a.csv", "--problem", "b.csv", "--kl-coef", "0.5", "--batch-size", "2"]
    assert cli.main(["audit", "losses.rloo", *words, "--out", "out", "--quiet"]) == 0
    saved = result(tmp_path)
    assert saved["verdict"] == "rloo is unbiased for objective."
    assert saved["entries"] == ["x", "z z"]  # y is forbidden in one of them
    problems = problems_of(["a.csv", "b.csv"], [0.5])
    policy = tilted_prior(problems)
    each = [audit_gradient(losses.rloo, policy, one, batch_size=2) for one in problems]
    mean = sum(one.targets["objective"] for one in each) / 2
    assert saved["targets"]["objective"] == pytest.approx(mean.tolist(), abs=1e-15)
    rewards = [one.reward(policy.tokens, None).tolist() for one in problems]
    assert rewards == [[1.0, 2.0], [-1.0, 0.0]]


def test_batches_are_drawn_where_they_are_too_many(tmp_path, unseen):
    words = ["losses.rloo", "--batch-size", "2", "--monte-carlo", "40", "--seed", "3"]
    assert cli.main(["audit", *words, "--out", "out", "--quiet"]) == 0
    report = audit_gradient(
        losses.rloo,
        four_sentences_policy(),
        four_sentences(),
        batch_size=2,
        monte_carlo=40,
        draw=seeded_draw(3),
    )
    assert result(tmp_path)["mean"] == report.mean.tolist()


def test_the_list_has_every_name_that_the_audit_takes(capsys, tmp_path):
    assert cli.main(["audit", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kinds = {line.split()[0]: line for line in lines[2:]}
    assert kinds.keys() == audited_functions().keys()
    assert " loss " in kinds["losses.grpo"]
    assert "GRPO as published" in kinds["losses.grpo"]
    assert " value " in kinds["kl_values.k3"]
    assert "kl_values.clamped_k1 --adapt bound=…" in kinds["kl_values.clamped_k1"]
    assert not list(tmp_path.glob("runs"))


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


def test_the_picture_of_a_mean_of_zero_shows_what_a_target_is_in_every_sentence():
    policy, problem = four_sentences_policy(), four_sentences()
    report = audit_gradient(kl_gradients.loss_k1, policy, problem)
    assert report.verdict == "loss_k1 has expectation 0."
    ax = plots.plot_audit(report)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(report.entries)
    assert [bar.get_width() for bar in ax.patches] == report.targets["objective"].tolist()
    assert ax.lines[0].get_xdata().tolist() == [0.0] * 4
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["E[gradient], 0 here", "what raises objective"]
    unnamed = plots.plot_audit(dataclasses.replace(report, entries=None))
    sizes = [float(target.norm()) for target in report.targets.values()]
    assert [bar.get_width() for bar in unnamed.patches] == sizes


def test_the_picture_says_which_targets_are_zero_and_what_draws_leave_open():
    problem = four_sentences()
    prior = SequenceTable(problem.space, problem.prior.tokens, problem.prior.logits.detach())
    ax = plots.plot_audit(audit_gradient(losses.rloo, prior, problem, batch_size=2))
    words = ["unbiased", "unbiased", *["0 here"] * 4]
    assert [note.get_text() for note in ax.texts][:6] == words
    value = plots.plot_audit(audit_value(kl_values.k3, prior, problem))
    assert [note.get_text() for note in value.texts] == ["0 here"] * 4
    drawn = audit_gradient(
        losses.rloo,
        four_sentences_policy(),
        problem,
        batch_size=2,
        monte_carlo=400,
        draw=seeded_draw(0),
    )
    said = [note.get_text() for note in plots.plot_audit(drawn).texts]
    reach = 100 * drawn.distances["objective"][1] / float(drawn.targets["objective"].norm())
    assert said[0] == f"may be it, to {reach:.3g} %"
    assert said[2].startswith("off by 1")


def test_the_picture_of_staleness_has_a_bar_a_policy():
    policy, problem = four_sentences_policy(), four_sentences()
    behaviours = {"fresh": policy, "flat": tempered(policy, 2.0)}
    report = audit_staleness(losses.reinforce, policy, problem, behaviours)
    ax = plots.plot_staleness(report)
    bias = report.rows[1].report.relative_bias["objective"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0, 100 * bias], abs=1e-12)
    assert ax.texts[0].get_text().startswith("unbiased\nvariance ")
    assert ax.texts[1].get_text().startswith(f"off by {100 * bias:.3g} %\nvariance ")
    assert ax.get_yticklabels()[1].get_text().startswith("flat\nKL(π‖μ) = 0.")
