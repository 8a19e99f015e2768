"""λ for a budget or a reward, the frontier's slope, its limits, and mirror descent's path."""

import math

import mpmath
import pytest
import torch

from klrl_edu.closed_forms.budget import (
    frontier,
    kl_coef_for_budget,
    kl_coef_for_reward,
    mirror_descent_kl_coefs,
    proximal_kl_coefs,
)
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from tests.closed_forms.vectors import Q, R, random_problem

INF = math.inf


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kl_coef", [1e-2, 0.3, 1.0, 50.0])
def test_a_budget_or_a_reward_gives_back_its_coefficient(seed, kl_coef):
    log_q, rewards = random_problem(seed)
    (point,) = zip(*frontier(log_q, rewards, [kl_coef]), strict=True)
    _, reward, kl, _ = (float(value) for value in point)
    spread = float(rewards.max() - rewards.min())
    if (
        kl_coef > 0.05 * spread
    ):  # below, the posterior is a point mass to rounding, and many λ share one KL
        assert kl_coef_for_budget(log_q, rewards, kl) == pytest.approx(kl_coef, rel=1e-9)
        assert kl_coef_for_reward(log_q, rewards, reward) == pytest.approx(kl_coef, rel=1e-9)
    found = kl_coef_for_budget(log_q, rewards, kl)
    assert float(frontier(log_q, rewards, [found]).kl[0]) == pytest.approx(kl, rel=1e-12, abs=1e-15)


def test_the_scale_of_rewards_carries_over():
    for scale in (1e-300, 1e300):
        assert kl_coef_for_budget(Q, R * scale, 0.1) / scale == pytest.approx(
            kl_coef_for_budget(Q, R, 0.1), rel=1e-9
        )


def test_the_slope_of_the_frontier_is_the_coefficient():
    for kl_coef in (0.2, 1.0, 3.0):
        h = 1e-4 * kl_coef
        near = frontier(Q, R, [kl_coef - h, kl_coef + h])
        slope = float(
            (near.expected_reward[1] - near.expected_reward[0]) / (near.kl[1] - near.kl[0])
        )
        assert slope == pytest.approx(kl_coef, rel=1e-6)  # central differences: error of order h²


def test_the_value_is_reward_less_priced_divergence():
    points = frontier(Q, R, [0.1, 1.0, 7.0])
    torch.testing.assert_close(
        points.value, points.expected_reward - points.kl_coef * points.kl, rtol=1e-13, atol=1e-14
    )


def test_large_coefficients_follow_the_variance():
    mean = float(Q.exp() @ R)
    variance = float(Q.exp() @ (R - mean) ** 2)
    errors = []
    for kl_coef in (1e3, 2e3):
        (point,) = zip(*frontier(Q, R, [kl_coef]), strict=True)
        errors.append(
            (
                abs((float(point[1]) - mean) * kl_coef / variance - 1),
                abs(float(point[2]) * 2 * kl_coef**2 / variance - 1),
            )
        )
    for first, second in zip(
        *errors, strict=True
    ):  # the next term is of order 1/λ: halved when λ doubles
        assert first / second == pytest.approx(2, rel=0.01)


def test_the_ends_of_the_ranges_are_the_limits():
    assert kl_coef_for_budget(Q, R, 0.0) == INF
    assert kl_coef_for_budget(Q, R, -math.log(0.1)) == pytest.approx(0, abs=1e-300)
    assert kl_coef_for_reward(Q, R, 2.0) == 0.0
    assert kl_coef_for_reward(Q, R, float(Q.exp() @ R)) > 1e6
    hard = torch.tensor([1.0, -INF, 0.0, 2.0], dtype=torch.float64)
    assert kl_coef_for_budget(Q, hard, -math.log(0.7) + 1e-15) > 1e6


@pytest.mark.parametrize("kl_coef", [3.0, 1e4, 1e10, 1e50, 1e140])
def test_a_small_budget_or_gain_has_its_large_coefficient(kl_coef):
    # two even outcomes of reward ±1: E[r] = tanh(1/λ), KL = tanh(1/λ)/λ − log cosh(1/λ)
    log_q = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    rewards = torch.tensor([1.0, -1.0], dtype=torch.float64)
    with mpmath.workdps(400):
        x = 1 / mpmath.mpf(kl_coef)
        mean, kl = mpmath.tanh(x), x * mpmath.tanh(x) - mpmath.log(mpmath.cosh(x))
    assert kl_coef_for_reward(log_q, rewards, float(mean)) == pytest.approx(kl_coef, rel=1e-12)
    assert kl_coef_for_budget(log_q, rewards, float(kl)) == pytest.approx(kl_coef, rel=1e-12)
    point = frontier(log_q, rewards, [kl_coef])
    assert float(point.expected_reward[0]) == pytest.approx(float(mean), rel=1e-12, abs=0)
    assert float(point.kl[0]) == pytest.approx(float(kl), rel=1e-12, abs=0)


def test_a_budget_counts_from_what_is_forbidden():
    hard = torch.tensor([1.0, -INF, 0.0, 2.0], dtype=torch.float64)
    for kl_coef in (0.5, 1e5):
        kl = float(frontier(Q, hard, [kl_coef]).kl[0])
        assert kl_coef_for_budget(Q, hard, kl) == pytest.approx(kl_coef, rel=1e-4)
    mean = float(frontier(Q, hard, [2.0]).expected_reward[0])
    assert kl_coef_for_reward(Q, hard, mean) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_coef_for_budget(Q, R, -0.1), "budget = -0.1 is below 0 nats"),
        (lambda: kl_coef_for_budget(Q, R, math.nan), "budget = nan"),
        (
            lambda: kl_coef_for_budget(Q, R, 2.4),
            r"above the most attainable, −log q\(argmax r\) = 2.30258509299",
        ),
        (lambda: kl_coef_for_reward(Q, R, 2.1), r"outside the attainable range \[0.6, 2\]"),
        (lambda: kl_coef_for_reward(Q, R, 0.5), "outside the attainable range"),
        (lambda: mirror_descent_kl_coefs(1.0, 1.5, 3), "step_size = 1.5"),
        (lambda: mirror_descent_kl_coefs(1.0, 0.0, 3), "step_size = 0.0"),
        (lambda: mirror_descent_kl_coefs(1.0, 0.5, -3), "steps = -3"),
        (lambda: proximal_kl_coefs(0.0, 1.0, 3), "kl_coef = 0.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("kl_coef", "step_size"), [(1.0, 0.1), (0.5, 1.0), (2.0, 0.5), (0.0, 0.1), (3.0, 1e-9)]
)
def test_mirror_descent_walks_through_posteriors(kl_coef, step_size):
    log_policy = Q.clone()
    for kl_coef_t in mirror_descent_kl_coefs(kl_coef, step_size, 12)[1:].tolist():
        # argmax of <∇J, π> − KL(π‖π_t)/η with ∇J = r − λ(log π/q + 1)
        log_policy = logspace.log_normalize(
            log_policy + step_size * (R - kl_coef * (log_policy - Q))
        )
        torch.testing.assert_close(
            log_policy, tilt(Q, R, kl_coef_t).log_posterior, rtol=0, atol=1e-13
        )


def test_the_proximal_path_solves_its_own_step():
    log_policy, kl_coef, eta = Q.clone(), 0.7, 2.0
    for kl_coef_t in proximal_kl_coefs(kl_coef, eta, 8)[1:].tolist():
        # argmax of J(π) − KL(π‖π_t)/η: π^{1 + ηλ} ∝ π_t (q e^{r/λ})^{ηλ}
        log_policy = logspace.log_normalize(
            (log_policy + eta * kl_coef * (Q + R / kl_coef)) / (1 + eta * kl_coef)
        )
        torch.testing.assert_close(
            log_policy, tilt(Q, R, kl_coef_t).log_posterior, rtol=0, atol=1e-13
        )


def test_paths_of_no_step_stand_at_the_prior():
    assert mirror_descent_kl_coefs(0.5, 0.1, 0).tolist() == [INF]
    assert proximal_kl_coefs(0.5, 0.1, 0).tolist() == [INF]


def test_the_courses_collapse_without_kl():
    kl_coef = float(mirror_descent_kl_coefs(0.0, 0.1, 200)[-1])
    assert float(tilt(Q, R, kl_coef).log_posterior[3].exp()) == pytest.approx(
        0.999999991755, abs=5e-13
    )
