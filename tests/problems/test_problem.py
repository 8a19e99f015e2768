"""What a problem accepts, and where its rewards stand."""

import copy
import math

import pytest
import torch

from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.posterior import posterior
from klrl_edu.models.ngram import NGramModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences
from klrl_edu.problems.problem import Problem, check_problems
from klrl_edu.problems.rewards import length_reward

PRIOR = SequenceTable.from_texts({"": 0.25, "a": 0.25, "a b": 0.5})
TOKENS = PRIOR.space.encode(["", "a", "a b"])


def problem(reward, **options):
    return Problem(PRIOR, reward, **{"kl_coef": 1.0} | options)


def constant(values):
    return lambda tokens, prompt: torch.tensor(values, dtype=torch.float64)


def test_a_whole_sequence_reward_stands_on_the_last_live_token():
    seen = problem(constant([1.0, 2.0, 3.0]))
    assert seen.token_rewards(TOKENS).tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 3]]
    assert seen.rewards(TOKENS).tolist() == [1, 2, 3]


def test_without_an_end_it_stands_on_the_last_token():
    course = four_sentences()
    assert course.token_rewards(course.space.encode(["the cat", "a dog"])).tolist() == [
        [0, 1],
        [0, 2],
    ]


def test_a_reward_a_token_stays_where_it_is():
    values = [[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 3.0]]
    assert problem(constant(values)).token_rewards(TOKENS).tolist() == values


def test_forbidding_is_allowed_and_rewards_become_float64():
    seen = problem(
        lambda tokens, prompt: torch.tensor([-math.inf, 1, 2], dtype=torch.float32)
    ).rewards(TOKENS)
    assert seen.tolist() == [-math.inf, 1, 2]
    assert seen.dtype == torch.float64


def test_a_reward_with_a_gradient_is_detached():
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert not problem(lambda tokens, prompt: weight * 2).rewards(TOKENS).requires_grad


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ([1.0, 2.0], r"\[2\]"),
        ([[1.0, 2.0]] * 3, r"\[3, 2\]"),
        (1.0, r"\[\]"),
        ([[[1.0]]] * 3, r"\[3, 1, 1\]"),
    ],
)
def test_a_wrong_shape_says_what_was_given_and_expected(values, given):
    with pytest.raises(
        InputError,
        match=rf"returned {given}; expected a tensor \[N\] or \[N, T\], \[N, T\] = \[3, 3\]",
    ):
        problem(constant(values)).token_rewards(TOKENS)


def test_a_reward_that_is_no_tensor_is_refused_by_its_name():
    def length(tokens, prompt):
        return [1.0, 2.0, 3.0]

    with pytest.raises(InputError, match=r"'length' returned list"):
        problem(length).token_rewards(TOKENS)


def test_a_value_after_the_end_is_refused_with_its_place():
    with pytest.raises(
        InputError,
        match=r"gives 5.0 at \[1, 2\], after the first EOS; multiply by space.live\(tokens\)",
    ):
        problem(constant([[0.0, 0.0, 0.0], [1.0, 0.0, 5.0], [0.0, 0.0, 0.0]])).token_rewards(TOKENS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", ["sequence", "token"])
def test_nan_and_plus_infinity_are_refused_with_the_text(bad, shape):
    values = [0.0, 0.0, bad] if shape == "sequence" else [[0.0] * 3, [0.0] * 3, [0.0, bad, 0.0]]
    with pytest.raises(
        InputError, match=rf"of sequence 2, 'a b', is {bad}; give a number, or -inf to forbid it"
    ):
        problem(constant(values)).token_rewards(TOKENS)


def test_a_prompt_reaches_the_reward_once_a_row():
    seen = []

    def reward(tokens, prompt):
        seen.append(prompt)
        return torch.zeros(len(tokens))

    prior = copy.deepcopy(PRIOR).for_prompt(torch.tensor([1, 0]))
    Problem(prior, reward, 1.0, prompt=torch.tensor([1, 0])).rewards(TOKENS)
    problem(reward).rewards(TOKENS)
    assert seen[0].tolist() == [[1, 0]] * 3
    assert seen[1] is None


def test_arguments_are_checked_by_name():
    for arguments, message in (
        (
            (None, constant([0.0]), 1.0),
            r"prior is None; expected a model \(a LanguageModel such as",
        ),
        ((PRIOR, 3.0, 1.0), "reward is the number 3.0; expected a function"),
        ((PRIOR, constant([0.0]), -1.0), "kl_coef = -1.0 must be at least 0"),
        ((PRIOR, constant([0.0]), math.nan), "kl_coef = nan"),
        ((PRIOR, constant([0.0]), 1.0, torch.zeros(1, 2).long()), r"prompt has shape \[1, 2\]"),
    ):
        with pytest.raises(InputError, match=message):
            Problem(*arguments)


def test_the_coefficient_becomes_a_float():
    assert isinstance(problem(constant([0.0]), kl_coef=1).kl_coef, float)
    assert problem(constant([0.0]), kl_coef=torch.tensor(0.5)).kl_coef == 0.5


def test_several_problems_must_share_the_prior_object():
    one, other = problem(constant([0.0])), problem(constant([1.0]), kl_coef=2.0)
    assert check_problems([one, other]) == [one, other]
    assert check_problems(one) == [one]
    with pytest.raises(InputError, match="share one prior"):
        check_problems([one, four_sentences()])
    for bad in ([], [one, "two"]):
        with pytest.raises(InputError, match=r"expected a Problem\(prior, reward, kl_coef\)"):
            check_problems(bad)


def test_a_printed_problem_says_what_it_is_of():
    course = four_sentences()
    assert repr(course) == (
        "Problem(prior=SequenceTable(4 sequences, H = 1.28 nats, 4 words, T = 2, no EOS),"
        " reward='table reward', kl_coef=1)"
    )
    assert repr(posterior(course)) == (
        f"Posterior({course!r}, method='enumeration', value=0.844244)"
    )


EOS_SPACE = SequenceSpace(("a", "b"), 3)
UNIFORM = NGramModel(EOS_SPACE, 1)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[-1, 2, 2]]), r"tokens\[0, 0\] = -1 does not belong"),
        (torch.tensor([[0, 3, 2]]), r"tokens\[0, 1\] = 3 does not belong"),
        (torch.tensor([[2, 0, 2]]), r"tokens\[0, 1\] = 0 does not belong"),
        (torch.tensor([[0, 2]]), r"shape \[1, 2\]; expected \[N, 3\]"),
        (torch.tensor([[0.0, 2.0, 2.0]]), "dtype torch.float32"),
        ([[0, 2, 2]], "expected"),
    ],
)
def test_rewards_of_what_is_no_sequence_are_refused(tokens, message):
    problem = Problem(UNIFORM, length_reward(EOS_SPACE), 1.0)
    for ask in (problem.rewards, problem.token_rewards):
        with pytest.raises(InputError, match=message):
            ask(tokens)


def test_a_complex_reward_is_refused_and_keeps_no_real_part():
    problem = Problem(UNIFORM, lambda tokens, prompt: torch.ones(len(tokens)) * 1j, 1.0)
    with pytest.raises(InputError, match="returned complex numbers"):
        problem.rewards(EOS_SPACE.all_tokens())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([-5], "ids run from 0"), ([0, -1], "padding on the left"), ([0, 1, -1, 1], "padding on")],
)
def test_a_prompt_of_ids_that_are_none_is_refused(prompt, message):
    reader = RecurrentModel(EOS_SPACE, hidden_size=2)
    with pytest.raises(InputError, match=message):
        Problem(reader, length_reward(EOS_SPACE), 1.0, prompt=torch.tensor(prompt))
