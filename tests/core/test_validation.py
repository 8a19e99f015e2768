"""Checks of arguments: each names argument, index, value and remedy."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from klrl_edu.core.errors import (
    CheckpointError,
    DivergedError,
    InfeasibleError,
    InputError,
    KlrlError,
    TooLargeError,
    UnsupportedPolicyError,
)
from klrl_edu.core.validation import (
    any_known,
    check_count,
    check_entries,
    check_finite_vector,
    check_kl_coef,
    check_number,
    check_probabilities,
    check_same_space,
)

INF = math.inf


def test_probabilities_that_sum_to_one_but_for_rounding_pass():
    assert check_probabilities([0.4, 0.3, 0.2, 0.1]).tolist() == [0.4, 0.3, 0.2, 0.1]


def test_three_times_333_is_refused_with_its_sum_and_the_remedy():
    with pytest.raises(InputError, match=r"probs sum to 0.999, not 1.*normalize=True"):
        check_probabilities([0.333] * 3)
    assert check_probabilities([0.333] * 3, normalize=True).tolist() == pytest.approx(
        [1 / 3] * 3, rel=1e-15
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("value", "why"), [(-0.1, "is negative"), (math.nan, "is not finite"), (INF, "is not finite")]
)
def test_a_bad_probability_is_refused_by_its_index(value, why, normalize):
    with pytest.raises(InputError, match=rf"probs\[2\] = {value} {why}"):
        check_probabilities([0.5, 0.5, value], normalize=normalize)


@pytest.mark.parametrize("scale", [1e308, 5e-324, 1e-300, 1.0])
def test_huge_and_tiny_weights_normalise_without_overflow(scale):
    assert check_probabilities([scale, 0.0, scale], normalize=True).tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("scale", [1e308, 5e-324])
def test_huge_and_tiny_weights_are_refused_without_normalize(scale):
    with pytest.raises(InputError, match="not 1"):
        check_probabilities([scale, scale])


def test_weights_that_are_all_zero_cannot_be_normalised():
    with pytest.raises(InputError, match="all 0"):
        check_probabilities([0.0, 0.0], normalize=True)


@pytest.mark.parametrize("probs", [[], [[0.5, 0.5]], 1.0])
def test_probabilities_of_another_shape_are_refused(probs):
    with pytest.raises(InputError, match="shape"):
        check_probabilities(probs)


@pytest.mark.parametrize("value", [0, 0.0, 5e-324, 1, INF, torch.tensor(2.0)])
def test_kl_coef_from_zero_to_inf_is_a_float(value):
    assert check_kl_coef(value) == float(value)


@pytest.mark.parametrize("value", [-1e-300, -1, -INF, math.nan, "much", None])
def test_a_negative_or_meaningless_kl_coef_is_refused(value):
    with pytest.raises(InputError, match="kl_coef"):
        check_kl_coef(value)


@pytest.mark.parametrize("value", [0, -3, 1.0, True, "2", None])
def test_a_count_is_a_whole_number_of_at_least_one(value):
    with pytest.raises(InputError, match="steps = "):
        check_count(value, "steps")


def test_a_vector_may_hold_minus_inf_but_not_nan_or_inf():
    assert check_finite_vector([0, -INF], "logits").tolist() == [0, -INF]
    for bad in (math.nan, INF):
        with pytest.raises(InputError, match=rf"logits\[1\] = {bad}"):
            check_finite_vector([0, bad], "logits")
    with pytest.raises(InputError, match=r"expected \[3\]"):
        check_finite_vector([0.0, 0.0], "logits", 3)


def test_different_spaces_are_refused_by_name():
    check_same_space(1, 1, "policy and prior")
    with pytest.raises(InputError, match="policy and prior live on different spaces"):
        check_same_space(1, 2, "policy and prior")


def test_every_error_is_a_klrl_error_and_the_input_ones_are_value_errors():
    for kind in (InputError, InfeasibleError, TooLargeError, UnsupportedPolicyError):
        assert issubclass(kind, KlrlError)
        assert issubclass(kind, ValueError)
    assert issubclass(CheckpointError, RuntimeError)
    assert DivergedError("NaN", step=7).step == 7


def test_whether_a_condition_holds_is_unknown_inside_vmap_only():
    seen = []
    aside = torch.tensor([False, True])

    def look(x):
        seen.append(any_known(x > 0))
        return x.sum()

    points = torch.tensor([[1.0], [-1.0]])
    torch.func.vmap(look)(points)
    torch.func.vmap(torch.func.grad(look))(points)
    torch.func.grad(lambda x: torch.func.vmap(look)(x).sum())(points)
    assert seen == [None, None, None]
    torch.func.grad(look)(points)
    torch.func.vmap(lambda x: (seen.append(any_known(aside)), x)[1])(points)  # not what is mapped
    assert seen[3:] == [True, True]
    assert any_known(points[1] > 0) is False


def test_an_error_of_looking_is_no_answer():
    with pytest.raises(RuntimeError, match="meta"):
        any_known(torch.zeros(2, dtype=torch.bool, device="meta"))


def test_a_number_is_real_and_fits_its_rule():
    def above_zero(number):
        return number > 0

    accepted = [2, 2.5, np.float32(2), torch.tensor(3), torch.tensor([0.5]), Fraction(1, 2)]
    assert [check_number(one, "x", "above 0", above_zero) for one in accepted] == [
        2,
        2.5,
        2,
        3,
        0.5,
        0.5,
    ]
    for bad in (True, torch.tensor(True), "1", 1j, None, [1], math.nan, 0, 10**400, torch.ones(2)):
        with pytest.raises(InputError, match=r"^x = .* must be above 0\.$") as refusal:
            check_number(bad, "x", "above 0", above_zero)
        assert len(str(refusal.value)) < 200


def test_sizes_are_refused_before_the_allocator_sees_them():
    check_entries(1 << 30, "these", "take fewer")
    with pytest.raises(TooLargeError, match=r"^these take 1,073,741,825 numbers, .* take fewer\.$"):
        check_entries((1 << 30) + 1, "these", "take fewer")
    with pytest.raises(TooLargeError, match="n = 11 is too large; at most 10 will do"):
        check_count(11, "n", maximum=10)
    assert check_count(10, "n", maximum=10) == 10


@pytest.mark.parametrize("probs", [[0.5, 0.5j], torch.tensor([0.5, 0.5j]), ["a"], [[0.5], []]])
def test_probabilities_that_are_no_real_numbers_are_refused(probs):
    with pytest.raises(InputError, match="probs are no real numbers"):
        check_probabilities(probs)
    with pytest.raises(InputError, match="x are no real numbers"):
        check_finite_vector(probs, "x")
