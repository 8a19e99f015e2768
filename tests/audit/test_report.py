"""What a report derives from its moments, and its printed forms."""

import json
import math

import pytest
import torch

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.audit.report import AuditReport, total_variance
from klrl_edu.core.errors import InputError
from klrl_edu.learning import losses
from klrl_edu.problems.examples import four_sentences, four_sentences_policy


def report(mean, coordinates="sequence logits", rounding=1e-15, **targets):
    vectors = {name: torch.tensor(values, dtype=torch.float64) for name, values in targets.items()}
    return AuditReport(
        "mine",
        torch.tensor(mean, dtype=torch.float64),
        1.0,
        vectors,
        coordinates,
        2,
        16,
        0.01,
        rounding=rounding,
    )


def test_bias_cosine_and_scale_by_hand():
    seen = report([3.0, 4.0], a=[6.0, 8.0], b=[4.0, -3.0], c=[0.0, 0.0])
    assert seen.bias == pytest.approx({"a": 5.0, "b": math.hypot(1, 7), "c": 5.0})
    assert seen.relative_bias == pytest.approx(
        {"a": 0.5, "b": math.hypot(1, 7) / 5, "c": math.nan}, nan_ok=True
    )
    assert seen.cosine == pytest.approx({"a": 1.0, "b": 0.0, "c": math.nan}, nan_ok=True)
    assert seen.scale == pytest.approx({"a": 0.5, "b": 0.0, "c": math.nan}, nan_ok=True)
    assert seen.verdict == "mine follows a, scaled by 0.5."


@pytest.mark.parametrize(
    ("mean", "targets", "verdict"),
    [
        ([0.0, 0.0], {"a": [1.0, 0.0]}, "mine has expectation 0."),
        ([1e-16, 0.0], {"a": [1.0, 0.0]}, "mine has expectation 0."),
        ([1e-12, 0.0], {"a": [1.0, 0.0]}, "mine follows a, scaled by 1e-12."),
        ([0.0, 0.0], {"a": [0.0, 0.0]}, "mine has expectation 0, as has a here."),
        (
            [1e-16, 0.0],
            {"a": [0.0, 1e-16], "b": [1.0, 0.0]},
            "mine is unbiased for a, as far as rounding tells: here it is 0 but for 1e-15.",
        ),
        (
            [1.0, 2.0],
            {"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [2.0, 1.0]},
            "mine is unbiased for a and b.",
        ),
        (
            [1.0, 0.0],
            {"a": [-1.0, 0.0], "b": [1.0, 0.1]},
            "mine follows a, scaled by -1: it raises a.",
        ),
        (
            [1.0, 0.0],
            {"a": [-1.0, 0.5], "b": [1.0, 0.1]},
            "mine is biased for all targets; nearest is b: 0.9950 along it (cosine), scaled by"
            " 0.9901, relative bias 0.0995.",
        ),
        (
            [1.0, 0.0],
            {"a": [-1.0, 0.5], "b": [-1.0, 0.1]},
            "mine is biased for all targets and points away from each; least from a, cosine"
            " -0.8944.",
        ),
    ],
)
def test_the_verdict_in_words(mean, targets, verdict):
    assert report(mean, **targets).verdict == verdict


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [
        ([1.0, -1.0, 0.0], "mine descends a − b."),
        ([1.0, 0.3, 0.0], "mine descends a + 0.3·b."),
        ([-2.0, 0.0, 5.0], "mine descends 5·c − 2·a."),
        ([2.0, 1.0, 0.0], "mine descends 2·a + b."),
        (
            [1.0, 2.0, 3.0],
            "mine is biased for all targets; nearest is c: 0.8018 along it (cosine), scaled by 3,"
            " relative bias 3.",
        ),
    ],
)
def test_exact_combinations_of_two_targets_are_found(mean, verdict):
    assert report(mean, a=[1.0, 0.0, 0.0], b=[0.0, 1.0, 0.0], c=[0.0, 0.0, 1.0]).verdict == verdict


def test_the_plainest_of_several_combinations_is_named():
    """c = a + b, so that a + 2b is also c + b."""
    seen = report(
        [1.0, 2.0, 0.0], a=[1.0, 0.0, 0.0], b=[0.0, 1.0, 0.0], c=[1.0, 1.0, 0.0], d=[0.0, 0.0, 1.0]
    )
    assert seen.verdict == "mine descends b + c."


def test_two_targets_that_span_everything_are_no_finding():
    assert "biased for all" in report([1.0, 2.0], a=[1.0, 0.0], b=[0.0, 1.0]).verdict


def test_a_direction_almost_right_is_not_called_parallel():
    """A cosine of 1 − 5e-11 hides an angle of 1e-5."""
    assert "biased for all" in report([1.0, 1e-5], a=[2.0, 0.0], b=[0.0, 1.0]).verdict


def test_infinite_targets_are_strict_json():
    seen = report([1.0], "nats", a=[math.inf], b=[2.0])
    assert seen.verdict == "mine is biased for all targets; nearest is b, relative bias 0.5."
    data = json.loads(json.dumps(seen.to_dict(), allow_nan=False))
    assert data["targets"]["a"] == ["inf"]
    assert data["bias"] == {"a": "-inf", "b": -1.0}
    assert "infinite" not in seen._repr_html_()


def test_names_are_escaped_in_notebooks():
    vector = torch.zeros(1, dtype=torch.float64)
    assert (
        "&lt;lambda&gt;"
        in AuditReport("<lambda>", vector, 0.0, {"a": vector}, "nats", 1, 1, 0.0)._repr_html_()
    )


def test_one_number_is_never_called_parallel():
    assert report([2.0], "nats", a=[1.0]).verdict == (
        "mine is biased for all targets; nearest is a, relative bias 1."
    )
    assert report([2.0], a=[1.0], b=[4.0]).verdict == (
        "mine is biased for all targets; its gradient is one number, which is a multiple of any"
        " other: 2·a, 0.5·b."
    )


def test_total_variance_is_the_trace_of_the_covariance():
    log_weight = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    values = torch.tensor([[0.0, 4.0], [4.0, 0.0]], dtype=torch.float64)
    assert total_variance(
        log_weight, values, torch.tensor([3.0, 1.0], dtype=torch.float64)
    ) == pytest.approx(6.0)


def test_a_report_prints_and_serialises():
    seen = audit_gradient(losses.rloo, four_sentences_policy(), four_sentences(), batch_size=2)
    text = str(seen)
    assert text.startswith("rloo is unbiased for objective.")
    assert "sequence logits" in text
    assert "10 outcomes enumerated" in text
    assert "<table>" in seen._repr_html_()
    data = json.loads(json.dumps(seen.to_dict(), allow_nan=False))
    assert data["targets"]["objective"] == seen.targets["objective"].tolist()
    assert data["verdict"] == seen.verdict


@pytest.mark.parametrize(
    ("coefficients", "said"),
    [
        ((0.5, 0.02), "climbs 0.5·E[r] − 0.02·KL(q‖π)"),
        ((-0.5, 0.02), "climbs −0.5·E[r] − 0.02·KL(q‖π)"),
        ((0.5, -0.02), "climbs 0.5·E[r] + 0.02·KL(q‖π)"),
    ],
)
def test_a_sum_says_what_goes_up_and_what_goes_down(coefficients, said):
    """Targets are gradients to descend: a step along expected_reward raises E[r]."""
    a, b = coefficients
    seen = report([a, b, 0.0], expected_reward=[1.0, 0, 0], forward_kl=[0, 1.0, 0], c=[0, 0, 1.0])
    assert seen.verdict == f"mine {said}."


def test_targets_of_zero_are_said_and_not_divided_by():
    seen = report([3.0, 4.0], objective=[6.0, 8.0], reverse_kl=[0.0, 0.0])
    text = str(seen)
    assert "the target is 0 here" in text
    assert "raises objective" in text
    assert "lowers reverse_kl" in text
    assert "nan" not in text


def test_a_report_is_what_it_was_after_its_file(tmp_path):
    seen = audit_gradient(losses.rloo, four_sentences_policy(), four_sentences(), batch_size=2)
    seen.save(tmp_path / "report.json")
    again = AuditReport.load(tmp_path / "report.json")
    assert again.to_dict() == seen.to_dict()
    assert again.verdict == seen.verdict
    (tmp_path / "other.json").write_text('{"name": 3}', "utf-8")
    for path in (tmp_path / "other.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="report"):
            AuditReport.load(path)


def test_nearly_parallel_targets_are_not_combined():
    """27.1·a − 26.1·b of two directions a hundredth apart would be exact, and would mean
    nothing.
    """
    a, b = [1.0, 0.0, 0.0], [1.0, 0.01, 0.0]
    assert "biased for all" in report([1.0, 0.271, 0.0], a=a, b=b, c=[0.0, 0.0, 1.0]).verdict
    b = [0.0, 1.0, 0.0]
    assert "descends" in report([1.0, 0.271, 0.0], a=a, b=b, c=[0.0, 0.0, 1.0]).verdict
