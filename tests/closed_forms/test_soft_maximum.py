"""The soft maximum of groups: its digits, its limits, its ties and its gradients."""

import math
import sys

import mpmath
import pytest
import torch

from klrl_edu.closed_forms.soft_maximum import find_anchor, soft_maximum, soft_value
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core.groups import Rows, Segments

INF = math.inf


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def value_of(log_q, rewards, kl_coef, ahead=None):
    zeros = torch.zeros_like(rewards)
    found = soft_maximum(Rows(), log_q, rewards, zeros if ahead is None else ahead, kl_coef, zeros)
    return float(soft_value(found.anchor, found.log_mass, kl_coef))


@pytest.mark.parametrize("kl_coef", [1e-8, 0.02, 0.3, 1.0, 40.0, 1e6, 1e30, 1e100, 1e300])
@pytest.mark.parametrize("rare", [0.5, 1e-9, 1e-25])
def test_a_rare_reward_keeps_its_digits(kl_coef, rare):
    log_q = torch.log_softmax(vector(math.log(rare), math.log1p(-rare)), 0)
    with mpmath.workdps(400):
        q = [mpmath.exp(mpmath.mpf(x)) for x in log_q.tolist()]
        q = [x / mpmath.fsum(q) for x in q]
        lam = mpmath.mpf(kl_coef)
        expected = lam * mpmath.log(q[0] * mpmath.exp(1 / lam) + q[1])
    # at tiny λ 1 + λ log q is known as well as log q
    assert value_of(log_q, vector(1.0, 0.0), kl_coef) == pytest.approx(float(expected), rel=1e-12)


def test_segments_are_rows():
    generator = torch.Generator().manual_seed(0)
    log_q = torch.log_softmax(torch.randn(5, 4, generator=generator, dtype=torch.float64), -1)
    rewards = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    rewards[0] = -INF
    rewards[1, 1:] = -INF
    segments = Segments(torch.arange(5).repeat_interleave(4), 5)
    for kl_coef in (0.0, 1e-3, 0.7, 1e9, INF):
        rows = soft_maximum(Rows(), log_q, rewards, rewards * 0.01, kl_coef, rewards * 0)
        flat = (part.reshape(-1) for part in (log_q, rewards, rewards * 0.01))
        listed = soft_maximum(segments, *flat, kl_coef, torch.zeros(20, dtype=torch.float64))
        for one, other in zip(rows[:2], listed[:2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=0)
        assert rows.log_mass[0] == -INF == rows.anchor[0]


def test_the_anchor_is_the_mean_where_rewards_span_few_coefficients_and_the_best_elsewhere():
    log_q, rewards = vector(0.25, 0.75).log(), vector(0.0, 64.0)
    for kl_coef, anchor in ((1.0, 48.0), (0.999, 64.0), (INF, 48.0), (0.0, 64.0)):
        assert float(find_anchor(Rows(), log_q, rewards, kl_coef)) == pytest.approx(anchor)


def test_rewards_at_both_ends_of_the_floats_have_a_mean():
    ends = vector(1.7e308, -1.7e308)
    assert value_of(vector(0.5, 0.5).log(), ends, INF) == 0
    assert value_of(vector(0.5, 0.5).log(), ends, 1e308) == pytest.approx(
        1e308 * math.log(math.cosh(1.7)), rel=1e-12
    )
    assert value_of(vector(1.0, 0.0).log(), ends, 1e-300) == 1.7e308
    most = torch.full((3,), sys.float_info.max, dtype=torch.float64)
    assert value_of(vector(0.7, 0.2, 0.1).log(), most, INF) == sys.float_info.max


def test_at_infinity_forbidden_mass_costs_everything_however_small():
    log_q = vector(1e-30, 1.0).log()
    assert value_of(log_q, vector(-INF, 2.0), INF) == -INF
    assert value_of(log_q, vector(-INF, 2.0), 1e30) == pytest.approx(2 - 1.0, rel=1e-12)
    assert value_of(vector(0.0, 1.0).log(), vector(-INF, 2.0), INF) == 2


@pytest.mark.parametrize("kl_coef", [1e-3, 0.4, 50.0, 1e8])
def test_its_gradients_are_the_posterior_at_every_scale(kl_coef):
    """∂ value/∂r = π*, ∂ value/∂ log q = λπ*, and ∂²value/∂r² = (diag π* − π*π*ᵀ)/λ."""
    log_q = vector(0.2, 0.5, 0.3, 0.0).log().requires_grad_()
    rewards = vector(1.0, 1.5, -2.0, 0.0).requires_grad_()
    tilted = tilt(log_q, rewards, kl_coef)
    by_prior, by_reward = torch.autograd.grad(tilted.value, (log_q, rewards), create_graph=True)
    star = tilted.log_posterior.detach().exp()
    torch.testing.assert_close(by_reward, star, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_prior / kl_coef, star, rtol=1e-12, atol=0)
    (second,) = torch.autograd.grad(by_reward[0], rewards)
    expected = (star * vector(1.0, 0.0, 0.0, 0.0) - star * star[0]) / kl_coef
    torch.testing.assert_close(second, expected, rtol=1e-11, atol=1e-16 / kl_coef)


def test_equal_rewards_pass_their_gradient_too():
    rewards = vector(2.0, 2.0).requires_grad_()
    (by_reward,) = torch.autograd.grad(tilt(vector(0.25, 0.75).log(), rewards, 1.0).value, rewards)
    assert by_reward.tolist() == pytest.approx([0.25, 0.75], abs=1e-15)


@pytest.mark.parametrize("kl_coef", [0.5, 3.0, 1e5])
def test_unnormalised_weights_keep_their_sum(kl_coef):
    # near log Z = 0 too, where normalised ones are read as such
    log_weights = vector(0.4, 0.5).log()
    expected = math.log(0.4 * math.exp(1 / kl_coef) + 0.5)
    for gradient in (False, True):
        rewards = vector(1.0, 0.0).requires_grad_(gradient)
        tilted = tilt(log_weights, rewards, kl_coef)
        assert float(tilted.log_evidence.detach()) == pytest.approx(expected, rel=1e-12)
        assert float(tilted.log_posterior.detach().exp().sum()) == pytest.approx(1, abs=1e-15)
