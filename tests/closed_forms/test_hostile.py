"""Every number of every public function here, replaced by what is no such number: a right value or
one clear line.
"""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from klrl_edu.closed_forms import (
    acceptance,
    best_of_n,
    budget,
    gaussian_kl,
    moments,
    preferences,
    regularizers,
    tilt,
)
from klrl_edu.core.errors import InputError
from klrl_edu.exact.enumeration import problem_support
from klrl_edu.exact.posterior import posterior
from klrl_edu.exact.soft_bellman import soft_bellman
from klrl_edu.problems.examples import four_sentences
from tests.closed_forms.vectors import Q, R

NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 0, True, 1e30, 10**30, 1j, "1"]
GAME = preferences.bradley_terry(R)
FEATURES = torch.stack([R, R**2], 1)
VECTORS = {"log_prior": Q, "rewards": R, "kl_coef": 0.5}
LAWS = {"log_policy": Q.roll(1), "log_prior": Q, "preferences": GAME}
CALLS: dict[Any, dict[str, Any]] = {
    tilt.tilt: VECTORS,
    tilt.tilt_log_ratio: VECTORS,
    acceptance.rejection_acceptance: VECTORS,
    acceptance.metropolis_matrix: VECTORS,
    acceptance.metropolis_second_eigenvalue: VECTORS,
    acceptance.effective_sample_size: VECTORS,
    acceptance.quasi_rejection: VECTORS | {"log_beta": 0.3},
    acceptance.importance_sampling_mean: VECTORS | {"values": R, "n": 2},
    best_of_n.best_of_n: {"log_prior": Q, "rewards": R, "n": 3},
    best_of_n.kl_bound: {"n": 3},
    budget.kl_coef_for_budget: {"log_prior": Q, "rewards": R, "budget": 0.2},
    budget.kl_coef_for_reward: {"log_prior": Q, "rewards": R, "target": 1.0},
    budget.mirror_descent_kl_coefs: {"kl_coef": 0.5, "step_size": 0.1, "steps": 3},
    budget.proximal_kl_coefs: {"kl_coef": 0.5, "step_size": 0.1, "steps": 3},
    budget.frontier: {"log_prior": Q, "rewards": R, "kl_coefs": [0.5]},
    gaussian_kl.k1: {"kl": 0.5},
    gaussian_kl.k2: {"kl": 0.5},
    gaussian_kl.k3: {"kl": 0.5},
    gaussian_kl.control_variate: {"kl": 0.5, "coefficient": 1.0},
    gaussian_kl.best_coefficient: {"kl": 0.5},
    moments.match_moments: {"log_prior": Q, "features": FEATURES, "targets": Q.exp() @ FEATURES},
    preferences.bradley_terry: {"rewards": R},
    preferences.dpo_loss: LAWS | {"kl_coef": 0.5},
    preferences.ipo_loss: LAWS | {"tau": 0.5},
    preferences.ipo_optimum: {"log_prior": Q, "preferences": GAME, "tau": 0.5},
    preferences.duality_gap: LAWS | {"tau": 0.5},
    preferences.nash_equilibrium: {
        "log_prior": Q,
        "preferences": GAME,
        "tau": 0.5,
        "tolerance": 1e-10,
    },
    regularizers.alpha_divergence: VECTORS | {"alpha": 0.5},
} | dict.fromkeys(regularizers.DIVERGENCES.values(), VECTORS)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every number in a result."""
    if isinstance(value, Tensor | float | int):
        yield torch.as_tensor(value, dtype=torch.float64)
    elif isinstance(value, tuple):
        for one in value:
            yield from tensors_of(one)


def hostile_vectors(good: Tensor) -> Iterator[Any]:
    """What is no such vector or matrix."""
    for value in (math.nan, math.inf):
        bad = good.clone()
        bad.view(-1)[1] = value
        yield bad
    yield from (good[None], good[..., 0], good[:0], good.view(-1)[0])


def answers(function: Any, arguments: dict[str, Any]) -> str:
    """What is wrong with the answer; "" for a number, or for one line that explains."""
    try:
        found = function(**arguments)
    except InputError as error:
        return "" if "\n" not in str(error) and len(str(error)) > 20 else f"unclear: {error}"
    bad = [one for one in tensors_of(found) if bool(torch.isnan(one).any())]
    return "NaN" if bad else ""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("function", CALLS, ids=lambda one: one.__name__)
def test_a_number_that_is_none_gives_a_right_value_or_one_clear_line(function):
    good = CALLS[function]
    assert set(good) <= set(inspect.signature(function).parameters)
    for name, value in good.items():
        numbers = hostile_vectors(value) if isinstance(value, Tensor) else NUMBERS
        for number in numbers:
            if name == "kl_coefs":
                number = [number]
            wrong = answers(function, good | {name: number})
            assert not wrong, f"{name} = {number!r}: {wrong}"


@pytest.mark.parametrize(
    "function",
    [
        one
        for one, arguments in CALLS.items()
        if "rewards" in arguments
        and "log_prior" in arguments
        and not one.__module__.endswith("tilt")
    ],
    ids=lambda one: one.__name__,
)
def test_what_is_no_law_is_refused_by_all_alike(function):
    good = CALLS[function]
    for prior in (torch.zeros(4), torch.zeros(4, dtype=torch.long), Q + 0.1, Q[None]):
        with pytest.raises(InputError, match=r"sums to|must both be"):
            function(**good | {"log_prior": prior})
    for rewards in (R[0], R[None], R[:3]):
        with pytest.raises(InputError, match="must both be"):
            function(**good | {"rewards": rewards})
    with pytest.raises(InputError, match=r"rewards\[0\] = nan where the prior has mass"):
        function(**good | {"rewards": R.clone().index_fill(0, torch.tensor(0), math.nan)})


@pytest.mark.parametrize("number", NUMBERS)
def test_posteriors_take_numbers_alike(number):
    target = posterior(four_sentences())
    support = problem_support(four_sentences())
    for call in (
        lambda: posterior(four_sentences(), max_sequences=number),
        lambda: target.rows(number) and None,
        lambda: target.text(number) and None,
        lambda: soft_bellman(support, number).state_values,
    ):
        assert not answers(call, {})
