"""check() says what is right and, in words of its own for each known mistake, what is wrong; and it
leaves a record.
"""

import json
import math
import random

import numpy as np
import pytest
import torch

from klrl_edu import exercises, reference
from klrl_edu.closed_forms import regularizers
from klrl_edu.core.errors import InputError
from klrl_edu.exercises import EXERCISES, check, judging, t01
from klrl_edu.exercises.judging import Exercise, Mistake, judge
from klrl_edu.problems.examples import FOUR_POLICY, FOUR_REWARDS, FOUR_SENTENCES

MISTAKES = [(exercise, mistake) for exercise in EXERCISES.values() for mistake in exercise.mistakes]


@pytest.fixture(autouse=True)
def answers(tmp_path, monkeypatch):
    path = tmp_path / "answers.json"
    monkeypatch.setenv("KLRL_ANSWERS", str(path))
    return path


def said(capsys, name, answer):
    assert check(name, answer) is None
    return capsys.readouterr().out


def as_answer(exercise, compute):
    """A reader's answer: the function itself, or its value."""
    return compute if exercise.inputs else compute()


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda one: one.name)
def test_the_reference_is_right(exercise):
    assert judge(exercise, as_answer(exercise, exercise.reference)) is None


@pytest.mark.parametrize(
    ("exercise", "mistake"), MISTAKES, ids=[f"{e.name}-{i}" for i, (e, _) in enumerate(MISTAKES)]
)
def test_each_known_mistake_is_told_in_its_own_words(exercise, mistake):
    assert judge(exercise, as_answer(exercise, mistake.value)) == mistake.says


def test_every_exercise_has_mistakes_of_its_own_and_they_say_different_things():
    assert all(
        len({mistake.says for mistake in exercise.mistakes}) == len(exercise.mistakes) >= 2
        for exercise in EXERCISES.values()
    )


def test_references_hold_the_numbers_of_the_course():
    value = {
        name: exercise.reference()
        for name, exercise in EXERCISES.items()
        if exercise.inputs is None
    }
    assert value["t01.mutual"] == pytest.approx(0.004021743230, abs=1e-12)
    assert value["t02.limit"] == pytest.approx(math.log(10), abs=1e-12)
    assert value["t02.tie"] == pytest.approx(
        {"the cat": 0.8, "the dog": 0, "a cat": 0, "a dog": 0.2}, abs=1e-12
    )
    half = reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, 0.5)
    assert value["t03.gap"] == pytest.approx(
        0.5 * half[1] - reference.objective(FOUR_POLICY, FOUR_SENTENCES, FOUR_REWARDS, 0.5),
        abs=1e-12,
    )
    star, _ = reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, 0.5)
    assert value["t04.first"] == pytest.approx(
        {"the": star["the cat"] + star["the dog"], "a": star["a cat"] + star["a dog"]}, abs=1e-12
    )
    root = EXERCISES["t04.value"].reference({"the": 0.7, "a": 0.3}, value["t04.prefixes"], 0.5)
    assert root == pytest.approx(0.5 * half[1], abs=1e-12)  # V(∅) = λ log Z
    assert value["t08.predictive"] == pytest.approx(
        dict(zip(FOUR_SENTENCES, (5 / 14, 4 / 14, 3 / 14, 2 / 14), strict=True)), abs=1e-15
    )
    assert EXERCISES["t08.even"].reference(0.3, 9) == pytest.approx((1 + 0.4**9) / 2, abs=1e-14)
    assert sum(value["t01.chain"]) == pytest.approx(
        reference.kl(t01.CORRELATED, FOUR_SENTENCES), abs=1e-12
    )


def test_references_of_routes_estimators_and_auxiliary_models_hold_numbers_found_another_way():
    value = {
        name: exercise.reference()
        for name, exercise in EXERCISES.items()
        if exercise.inputs is None
    }
    star = reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, 1.0)[0]
    first = {"the": star["the cat"] + star["the dog"], "a": star["a cat"] + star["a dog"]}
    by_maximum = {"the": 0.7 * math.e, "a": 0.3 * math.exp(2)}
    total = sum(by_maximum.values())
    assert value["t05.hard"] == pytest.approx(
        reference.kl({a: x / total for a, x in by_maximum.items()}, first), abs=1e-12
    )
    assert value["t06.noise"] == pytest.approx(
        math.sqrt(0.191954080129 / 64) / 0.099793472091, abs=1e-9
    )
    reverse, forward = (0.061675, -0.101052, -0.079294, 0.118671), (0.1, -0.1, -0.1, 0.1)
    assert list(value["t06.reward"].values()) == pytest.approx(
        [a - b for a, b in zip(reverse, forward, strict=True)], abs=1e-6
    )
    q, r = (
        torch.tensor(list(table.values()), dtype=torch.float64)
        for table in (FOUR_SENTENCES, FOUR_REWARDS)
    )
    end = EXERCISES["t06.end"].reference(FOUR_SENTENCES, FOUR_REWARDS, 1.0)
    assert list(end.values()) == pytest.approx(
        regularizers.forward_kl(q.log(), r, 1.0).log_probs.exp().tolist(), abs=1e-11
    )
    auxiliary = dict(zip(FOUR_SENTENCES, (0.3, 0.4, 0.2, 0.1), strict=True))
    assert value["t07.variance"] == pytest.approx(0.3 * 16 / 9 + 0.1 * 4 - 0.36, abs=1e-12)
    assert EXERCISES["t07.pair"].reference(
        auxiliary, FOUR_SENTENCES, FOUR_REWARDS
    ) == pytest.approx(0.6 - 0.050685714286, abs=1e-11)
    pi, p = (np.array(list(table.values())) for table in (FOUR_POLICY, auxiliary))
    weight = pi * (1 - 2 * pi + (pi**2).sum())
    assert value["t07.constant"] == pytest.approx(
        -(weight @ np.log(pi / p)) / weight.sum(), abs=1e-12
    )
    assert EXERCISES["t07.regret"].reference(
        auxiliary, FOUR_SENTENCES, FOUR_REWARDS, 1.0
    ) == pytest.approx(0.021255347883, abs=1e-11)


def test_dots_are_not_answered_yet_and_leave_no_record(capsys, answers):
    assert "not answered yet" in said(capsys, "t03.gap", ...)
    assert not answers.exists()


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(
        InputError,
        match=r"'t03\.gpa' is not known\. Did you mean 't03\.gap'\?.*t01\.kl.*t03\.reward",
    ):
        check("t03.gpa", 1.0)


POSTERIOR = EXERCISES["t03.posterior"].reference()
GAP = EXERCISES["t03.gap"].reference()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("t03.gap", np.float64(GAP)),
        ("t03.gap", torch.tensor([GAP], dtype=torch.float64, requires_grad=True)),
        ("t03.gap", [GAP]),
        ("t03.gap", GAP + 5e-10),
        ("t02.steps", 60.0),
        ("t03.posterior", {tuple(y.split()): np.float64(p) for y, p in POSTERIOR.items()}),
        ("t03.posterior", dict(reversed(POSTERIOR.items()))),
        ("t03.posterior", torch.tensor(list(POSTERIOR.values()), dtype=torch.float64)),
        ("t01.chain", tuple(EXERCISES["t01.chain"].reference())),
        ("t01.chain", np.array(EXERCISES["t01.chain"].reference())),
        ("t01.kl", lambda p, q: torch.tensor(reference.kl(p, q), dtype=torch.float64)),
    ],
)
def test_a_right_answer_may_come_in_many_forms(capsys, name, answer):
    assert said(capsys, name, answer) == f"{name}: right.\n"


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("t01.mutual", EXERCISES["t01.mutual"].reference() / math.log(2), "in bits"),
        ("t01.chain", [x / math.log(2) for x in EXERCISES["t01.chain"].reference()], "At [0]"),
        ("t01.kl", lambda p, q: reference.kl(p, q) / math.log(2), "in bits"),
        ("t01.kl", lambda p, q: -reference.kl(p, q), "sign is wrong"),
        ("t03.gap", -GAP, "sign is wrong"),
        ("t03.gap", 1e9, "too large. Hint: λ log Z"),
        ("t03.gap", 0.0, "too small"),
        ("t03.gap", round(GAP, 4), "close but"),
        ("t03.gap", GAP + 2e-9, "close but too large"),
        ("t03.gap", math.nan, "somewhere 0 · log 0"),
        ("t03.gap", "0.24", "A number is expected"),
        ("t03.gap", True, "A number is expected"),
        ("t03.gap", None, "A number is expected"),
        ("t03.gap", lambda: GAP, "call it"),
        ("t03.posterior", {y: 3.7 * p for y, p in POSTERIOR.items()}, "do not sum to 1"),
        ("t03.posterior", {**POSTERIOR, "a dog": 0.1}, "At 'a dog': 0.1 is too small"),
        (
            "t03.posterior",
            {y: p for y, p in POSTERIOR.items() if y != "a cat"},
            "no entry for 'a cat'",
        ),
        ("t03.posterior", {**POSTERIOR, "a cow": 0.0}, "too many: 'a cow'"),
        ("t03.posterior", 0.5, "A dict with the keys 'the cat'"),
        ("t01.chain", [0.1], "A sequence of 2 is expected; your answer has 1"),
        ("t01.chain", [0.1, 0.2], "(2 entries are off)"),
        ("t01.kl", 0.0998, "asks for a function"),
        ("t01.kl", lambda p, q: None, "does it end with a return?"),
        ("t01.kl", lambda p, q: sum(p[y] * math.log(p[y] / q[y]) for y in p), "raised ValueError"),
        ("t01.kl", lambda p: 0.0, "raised TypeError"),
        (
            "t01.kl",
            lambda p, q: min(reference.kl(p, q), 99.0),
            "99 is not it: the answer is infinite",
        ),
        (
            "t02.step",
            lambda pi, r, eta: {y: pi[y] * math.exp(eta * r[y]) for y in pi},
            "do not sum to 1",
        ),
        ("t02.steps", 3, "3 is too small. Hint: a loop from q"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(capsys, answers, name, answer, words):
    text = said(capsys, name, answer)
    assert text.startswith(f"{name}: not yet. ")
    assert words in text
    assert json.loads(answers.read_text())[name]["correct"] is False


def test_a_readers_function_cannot_spoil_the_inputs(capsys):
    def spoils(p, q):
        value = reference.kl(p, q)
        p.clear()
        q.clear()
        return value

    assert "right" in said(capsys, "t01.kl", spoils)


def test_a_mistake_that_is_right_would_be_noticed():
    """The broken twin of the tests above: a 'mistake' that gives the reference is never told, and
    its exercise fails the test.
    """
    twin = Exercise("t99.twin", lambda: 1.0, mistakes=(Mistake("wrong", lambda: 1.0),))
    assert judge(twin, 1.0) is None != twin.mistakes[0].says


def test_random_inputs_are_the_same_at_every_call_and_reach_both_hard_cases():
    inputs = [list(judging._inputs(EXERCISES["t01.kl"])) for _ in range(2)]
    assert inputs[0] == inputs[1]
    values = [reference.kl(p, q) for p, q in inputs[0]]
    assert any(
        math.isfinite(value) and min(p.values()) == 0
        for value, (p, _) in zip(values, inputs[0], strict=True)
    )
    assert math.inf in values
    assert inputs[0][0] != EXERCISES["t01.kl"].inputs(random.Random(21))


def test_the_record_keeps_the_latest_result_of_each(answers, capsys):
    check("t03.gap", 0.0)
    check("t02.steps", 60)
    check("t03.gap", GAP)
    found = exercises.read_answers()
    assert {name: one["correct"] for name, one in found.items()} == {
        "t03.gap": True,
        "t02.steps": True,
    }
    assert all(one["time"].endswith("+00:00") for one in found.values())


def test_the_record_stands_in_the_working_directory_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KLRL_ANSWERS")
    monkeypatch.chdir(tmp_path)
    assert exercises.read_answers() == {}
    check("t02.steps", 60)
    assert (
        json.loads((tmp_path / ".klrl" / "answers.json").read_text())["t02.steps"]["correct"]
        is True
    )


def test_a_folder_that_cannot_be_written_to_does_not_stop_the_tutorial(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KLRL_ANSWERS", str(tmp_path / "file" / "answers.json"))
    text = said(capsys, "t02.steps", 60)
    assert text.startswith("t02.steps: right.\n(not recorded: ")


@pytest.mark.parametrize(
    "content", ["[1, 2]", "not json", '{"t01.kl": 3}', '{"other": {"correct": "yes"}}']
)
def test_a_file_that_is_no_record_is_left_alone(answers, capsys, content):
    answers.write_text(content)
    assert "(not recorded: " in said(capsys, "t02.steps", 60)
    assert answers.read_text() == content
