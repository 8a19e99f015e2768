"""What samplers cost: against simulation by enumeration, eigenvalues and multisets."""

import itertools
import math

import pytest
import torch

from klrl_edu.closed_forms import acceptance
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core.errors import InputError, TooLargeError
from tests.closed_forms.vectors import Q, R, random_problem

INF = math.inf
SEEDS = pytest.mark.parametrize("seed", range(5))


def test_the_courses_numbers():
    assert acceptance.rejection_acceptance(Q, R, 1.0) == pytest.approx(0.314819418087, abs=5e-13)
    assert acceptance.metropolis_second_eigenvalue(Q, R, 1.0) == pytest.approx(
        0.685180581913, abs=5e-13
    )


@SEEDS
@pytest.mark.parametrize("kl_coef", [0.3, 1.0, 10.0])
def test_rejection_accepts_as_often_as_its_draws_are_kept(seed, kl_coef):
    log_q, rewards = random_problem(seed)
    kept = float((log_q.exp() * ((rewards - rewards.max()) / kl_coef).exp()).sum())
    assert acceptance.rejection_acceptance(log_q, rewards, kl_coef) == pytest.approx(
        kept, rel=1e-13
    )


@SEEDS
def test_the_metropolis_chain_keeps_the_posterior_and_has_that_second_eigenvalue(seed):
    log_q, rewards = random_problem(seed)
    matrix, star = (
        acceptance.metropolis_matrix(log_q, rewards, 0.8),
        tilt(log_q, rewards, 0.8).log_posterior.exp(),
    )
    torch.testing.assert_close(
        matrix.sum(-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(star @ matrix, star, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        star[:, None] * matrix, (star[:, None] * matrix).T, rtol=0, atol=1e-15
    )
    eigenvalues = torch.linalg.eigvals(matrix).real.sort(descending=True).values
    assert float(eigenvalues[0]) == pytest.approx(1, abs=1e-12)
    assert float(eigenvalues[1]) == pytest.approx(
        acceptance.metropolis_second_eigenvalue(log_q, rewards, 0.8), abs=1e-12
    )


@pytest.mark.parametrize("kl_coef", [1e6, 1e15, 1e100])
def test_a_chain_that_mixes_at_once_keeps_the_digits_of_its_eigenvalue(kl_coef):
    # 1 − Z e^{−max r/λ} = E_q[max r − r]/λ + O(1/λ²)
    gap = float(Q.exp() @ (2 - R))
    found = acceptance.metropolis_second_eigenvalue(Q, R, kl_coef)
    assert found == pytest.approx(gap / kl_coef, rel=2 / kl_coef + 1e-14, abs=0)


@pytest.mark.parametrize(
    ("log_beta", "acceptance_rate"), [(-1e30, 1.0), (1e30, 0.0), (-40.0, 1.0), (40.0, None)]
)
def test_quasi_rejection_at_extreme_bounds_draws_from_the_prior_or_the_posterior(
    log_beta, acceptance_rate
):
    found = acceptance.quasi_rejection(Q, R, 0.5, log_beta)
    target = Q if log_beta < 0 else tilt(Q, R, 0.5).log_posterior
    torch.testing.assert_close(found.log_probs, target, rtol=0, atol=1e-15)
    if acceptance_rate is None:
        acceptance_rate = math.exp(float(tilt(Q, R, 0.5).log_evidence) - log_beta)
    assert found.acceptance == pytest.approx(acceptance_rate, rel=1e-13)


def test_a_forbidden_outcome_is_left_and_never_entered():
    matrix = acceptance.metropolis_matrix(
        Q, torch.tensor([1.0, -INF, 0.0, 2.0], dtype=torch.float64), 1.0
    )
    assert matrix[:, 1].tolist() == pytest.approx([0, 0.3, 0, 0])
    assert matrix[1].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])


@SEEDS
def test_quasi_rejection_is_its_definition_and_exact_from_the_top_on(seed):
    log_q, rewards = random_problem(seed)
    q, top = log_q.exp(), float(rewards.max() / 0.8)
    unnormalised = q * (rewards / 0.8).exp()
    for log_beta in (-3.0, 0.0, top - 0.5, top, top + 2):
        found = acceptance.quasi_rejection(log_q, rewards, 0.8, log_beta)
        kept = torch.minimum(torch.ones_like(q), unnormalised / (math.exp(log_beta) * q))
        assert found.acceptance == pytest.approx(float(q @ kept), rel=1e-12)
        torch.testing.assert_close(found.log_probs.exp(), q * kept / (q @ kept), rtol=1e-12, atol=0)
        star = unnormalised / unnormalised.sum()
        assert found.total_variation == pytest.approx(
            float((found.log_probs.exp() - star).abs().sum() / 2), abs=1e-14
        )
        assert (found.total_variation < 1e-14) is (log_beta >= top - 1e-12)


@SEEDS
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_mean_of_importance_sampling_is_over_every_tuple(seed, n):
    log_q, rewards = random_problem(seed, outcomes=4)
    values = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    weight, total = (rewards / 0.8).exp(), 0.0
    for draws in itertools.product(range(4), repeat=n):
        row = list(draws)
        total += float(log_q[row].sum().exp() * (weight[row] @ values[row]) / weight[row].sum())
    assert acceptance.importance_sampling_mean(log_q, rewards, 0.8, values, n) == pytest.approx(
        total, rel=1e-12
    )


def test_the_effective_sample_size_is_the_inverse_second_moment():
    star = tilt(Q, R, 1.0).log_posterior.exp()
    assert acceptance.effective_sample_size(Q, R, 1.0) == pytest.approx(
        1 / float((star**2 / Q.exp()).sum()), rel=1e-13
    )


def test_bad_input_is_named():
    with pytest.raises(InputError, match="n = 0"):
        acceptance.importance_sampling_mean(Q, R, 1.0, R, 0)
    with pytest.raises(TooLargeError, match="multisets"):
        acceptance.importance_sampling_mean(Q, R, 1.0, R, 1000)
    with pytest.raises(InputError, match="no weight"):
        acceptance.importance_sampling_mean(
            Q, torch.tensor([1.0, -INF, 0, 0], dtype=torch.float64), 1.0, R, 2
        )
    with pytest.raises(InputError, match="log_beta = inf"):
        acceptance.quasi_rejection(Q, R, 1.0, INF)
