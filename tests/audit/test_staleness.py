"""A staleness sweep: exact moments, a row a behaviour policy."""

import dataclasses
import json
import math

import pytest

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.audit.staleness import audit_staleness
from klrl_edu.core.errors import InputError
from klrl_edu.learning import losses
from klrl_edu.models.table import SequenceTable
from tests.audit.scenes import MU, PI, Q, answers, answers_policy


def weighted(batch):
    """REINFORCE with the exact importance weight: unbiased whoever draws, at a price in
    variance.
    """
    ratio = (batch.log_probs.detach() - batch.behaviour_log_probs).sum(-1).exp()
    return -(ratio * losses.penalised_reward(batch) * batch.log_probs.sum(-1)).mean()


def sweep(loss, **options):
    return audit_staleness(
        loss,
        answers_policy(),
        answers(),
        {"now": answers_policy(), "before": answers_policy(MU)},
        **options,
    )


def test_rows_are_the_audits_under_each_behaviour_policy():
    report = sweep(losses.rloo, batch_size=2)
    alone = audit_gradient(
        losses.rloo, answers_policy(), answers(), batch_size=2, behaviour=answers_policy(MU)
    )
    assert [row.label for row in report.rows] == ["now", "before"]
    assert report.rows[1].report.mean.tolist() == alone.mean.tolist()
    assert report.rows[0].divergence == pytest.approx(0, abs=1e-15)
    assert report.rows[1].divergence == pytest.approx(
        sum(p * math.log(p / m) for p, m in zip(PI, MU, strict=True)), rel=1e-12
    )
    assert report.target == "objective"
    assert (
        report.rows[0].report.relative_bias["objective"]
        < 1e-12
        < 0.1
        < report.rows[1].report.relative_bias["objective"]
    )


def test_importance_weights_keep_it_unbiased_and_cost_variance():
    report = sweep(weighted)
    assert all(row.report.relative_bias["objective"] < 1e-12 for row in report.rows)
    assert report.rows[1].report.variance > report.rows[0].report.variance


def test_a_sweep_prints_and_serialises():
    some = SequenceTable.from_texts({"": 0.5, "a": 0.5}, space=answers().space)
    report = audit_staleness(
        losses.reinforce, answers_policy(), answers(), [answers_policy(), some]
    )
    text = str(report)
    assert text.splitlines()[0].split("  ")[0] == "drawn by"
    assert "KL(π‖μ)" in text
    assert "0: reinforce is unbiased for objective." in text
    assert "<table>" in report._repr_html_()
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["target"] == "objective"
    assert [row["divergence"] for row in data["rows"]] == [pytest.approx(0, abs=1e-15), "inf"]


def test_no_behaviour_policy_is_refused():
    with pytest.raises(InputError, match="behaviours is empty"):
        audit_staleness(losses.reinforce, answers_policy(), answers(), [])


def test_notes_stand_once_and_of_single_rows_with_their_label():
    def of_trl(per_token_logps, advantages):
        return -(advantages * per_token_logps.sum(-1)).mean()

    some = SequenceTable.from_texts({"": 0.5, "a": 0.5}, space=answers().space)
    behaviours = {"now": answers_policy(), "some": some}
    report = audit_staleness(of_trl, answers_policy(), answers(), behaviours)
    notes = [line for line in str(report).splitlines() if line.startswith("Note")]
    assert notes[0].startswith("Note: advantages: the sequence's reward r(y)")
    assert notes[1].startswith("Note (some): ")
    assert len(notes) == 2
    assert "Note (some): " in report._repr_html_()
    named = audit_staleness(
        of_trl, answers_policy(), answers(), behaviours, adapt={"advantages": lambda batch: 0.0}
    )
    assert named.rows[0].report.verdict == "of_trl has expectation 0."


def test_several_problems_are_swept_together():
    base = answers()
    problems = [base, dataclasses.replace(base, kl_coef=2.0)]
    behaviours = {"now": answers_policy(), "before": answers_policy(MU)}
    report = audit_staleness(losses.rloo, answers_policy(), problems, behaviours, batch_size=2)
    assert report.rows[0].report.verdict == "rloo is unbiased for objective."
    single = sweep(losses.rloo, batch_size=2)
    assert report.rows[1].divergence == pytest.approx(single.rows[1].divergence, rel=1e-12)


def test_a_target_of_zero_is_not_what_a_sweep_is_held_against():
    prior = answers_policy(Q)
    report = audit_staleness(losses.rloo, prior, answers(), {"now": prior}, batch_size=2)
    assert report.target == "expected_reward"
    report = audit_staleness(
        lambda batch: losses.rloo(batch) * 1e-9, prior, answers(), {"now": prior}, batch_size=2
    )
    assert report.target not in report.rows[0].report.zero_targets
