"""Best-of-n against every n-tuple of draws."""

import itertools
import math

import pytest
import torch

from klrl_edu.closed_forms.best_of_n import best_of_n, kl_bound
from klrl_edu.core.errors import InputError
from tests.closed_forms.vectors import Q, R, random_problem

INF = math.inf


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_law_of_the_first_best_draw(seed, n, ties):
    log_q, rewards = random_problem(seed, outcomes=4, ties=ties)
    rewards = rewards.masked_fill(torch.arange(4) == seed, -INF)
    expected = torch.zeros(4, dtype=torch.float64)
    for draws in itertools.product(range(4), repeat=n):
        best = max(draws, key=lambda k: float(rewards[k]))  # max keeps the first
        expected[best] += math.exp(sum(float(log_q[k]) for k in draws))
    found = best_of_n(log_q, rewards, n)
    torch.testing.assert_close(found.log_probs.exp(), expected, rtol=1e-13, atol=1e-15)
    wins = sum(
        expected[i]
        * log_q[j].exp()
        * (1.0 if rewards[i] > rewards[j] else 0.5 if rewards[i] == rewards[j] else 0.0)
        for i in range(4)
        for j in range(4)
    )
    assert found.win_rate == pytest.approx(float(wins), abs=1e-14)


def test_the_courses_numbers():
    found = best_of_n(Q, R, 4)
    assert found.kl == pytest.approx(0.529131900711, abs=5e-13)
    assert found.kl_bound == pytest.approx(0.636294361120, abs=5e-13)


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 10**9])
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_and_mass_is_one_for_any_n(seed, n):
    log_q, rewards = random_problem(seed, outcomes=50, ties=seed % 2 == 0)
    found = best_of_n(log_q, rewards, n)
    assert float(found.log_probs.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert -1e-15 <= found.kl <= found.kl_bound + 1e-12


def test_many_draws_end_on_the_best_level_whose_mass_caps_the_divergence():
    uniform = torch.full((20,), -math.log(20), dtype=torch.float64)
    found = best_of_n(uniform, torch.arange(20.0, dtype=torch.float64), 100)
    assert found.kl == pytest.approx(math.log(20), abs=0.04)
    assert best_of_n(uniform, torch.arange(20.0, dtype=torch.float64), 10**6).kl == pytest.approx(
        math.log(20), abs=1e-12
    )
    assert kl_bound(10**6) > 12


def test_without_ties_the_bound_is_approached_by_many_small_outcomes():
    k = 200_000
    uniform = torch.full((k,), -math.log(k), dtype=torch.float64)
    found = best_of_n(uniform, torch.arange(float(k), dtype=torch.float64), 8)
    assert found.kl == pytest.approx(found.kl_bound, abs=1e-4)
    assert found.win_rate == pytest.approx(8 / 9, abs=1e-4)


def test_a_small_mass_keeps_its_digits():
    log_q = torch.tensor([math.log1p(-1e-20), math.log(1e-20)], dtype=torch.float64)
    found = best_of_n(log_q, torch.tensor([0.0, 1.0], dtype=torch.float64), 1000)
    assert float(found.log_probs[1]) == pytest.approx(math.log(1e-17), rel=1e-13)


@pytest.mark.parametrize("n", [0, -1, 2.5, True])
def test_fewer_than_one_draw_is_refused(n):
    with pytest.raises(InputError, match=f"n = {n}"):
        best_of_n(Q, R, n)


def test_bad_rewards_are_named_and_ignored_off_the_support():
    for bad in (math.nan, INF):
        with pytest.raises(InputError, match=r"rewards\[1\]"):
            best_of_n(Q, torch.tensor([0, bad, 0, 0], dtype=torch.float64), 2)
    log_q = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    assert best_of_n(
        log_q, torch.tensor([0, 1, math.nan], dtype=torch.float64), 2
    ).log_probs.exp().tolist() == pytest.approx([0.25, 0.75, 0])
