"""The k-estimators against mpmath and the course's numbers, and the exact per-token KL."""

import math
import re
import warnings

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.core import logspace
from klrl_edu.estimators.kl_values import k1, k2, k3, kl_per_token, per_token_kl
from klrl_edu.testing import log_probs
from tests.exact.dictionaries import INF, assert_close

PI = torch.tensor([0.5, 0.2, 0.1, 0.2], dtype=torch.float64)
Q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
U = PI.log() - Q.log()


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def moments(estimates):
    mean = float(PI @ estimates)
    return mean, float(PI @ (estimates - mean).square())


def anchor(value):
    return pytest.approx(value, rel=0, abs=5.1e-13)


def test_moments_are_those_of_t06():
    truth = anchor(0.099793472091)
    assert moments(k1(U)) == (truth, anchor(0.191954080129))
    assert moments(k3(U)) == (truth, anchor(0.008973476020))
    assert moments(k2(U))[0] - moments(k1(U))[0] == anchor(0.001162936509)


@given(data=st.data(), size=st.integers(1, 6))
def test_k1_and_k3_average_to_the_divergence(data, size):
    log_p, log_q = (logspace.log_normalize(vector(*data.draw(st.lists(st.floats(-5, 5), min_size=size, max_size=size)))) for _ in "pq")
    truth = logspace.kl_divergence(log_p, log_q)
    for estimator in (k1, k3):
        assert_close(logspace.expectation(log_p, estimator(log_p - log_q)), truth)


@given(u=st.floats(-700, 700) | st.floats(-1e-6, 1e-6) | st.floats(-1, 1))
def test_k3_has_full_relative_accuracy(u):
    with mpmath.workdps(700):  # sees u²/2 beside 1 down to the smallest double
        exact = float(mpmath.exp(-mpmath.mpf(u)) - 1 + mpmath.mpf(u))
    assert float(k3(vector(u))) == pytest.approx(exact, rel=1e-13, abs=1e-307)


@pytest.mark.parametrize("u", [1e-9, -1e-9, 1e-5, -1e-100])
def test_k3_near_zero_is_half_a_square_and_not_noise(u):
    assert float(k3(vector(u))) == pytest.approx(u * u / 2 - u**3 / 6, rel=1e-9)
    assert float(k3(vector(u))) >= 0


@given(u=st.floats(-30, 30) | st.floats(-1e-6, 1e-6))
def test_k3_differentiates_to_one_minus_the_ratio(u):
    x = vector(u).requires_grad_()
    (slope,) = torch.autograd.grad(k3(x).sum(), x)
    assert float(slope) == pytest.approx(-math.expm1(-u), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("u", "dtype"), [(-710.0, torch.float64), (-89.0, torch.float32), (-1e300, torch.float64)])
def test_k3_overflows_with_a_warning_that_gives_its_log(u, dtype):
    with pytest.warns(RuntimeWarning, match=re.escape(f"at log-ratio {u:g}: its log is {-u:g} nats; use k1")):
        assert k3(torch.tensor([u, 0.0], dtype=dtype)).tolist() == [INF, 0.0]


def test_k3_of_a_value_in_range_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        k3(vector(-709.0, 709.0, 1e300))
        k3(torch.tensor([-88.0]))


def test_where_mass_is_zero_k1_and_k2_and_k3_are_infinite_without_a_warning():
    """u = +inf: the prior has none; u = −inf: the policy has none, and such a sequence is never drawn."""
    ends = vector(INF, -INF)
    assert k1(ends).tolist() == [INF, -INF]
    assert k2(ends).tolist() == [INF, INF]
    assert k3(ends).tolist() == [INF, INF]


def test_estimators_keep_shape_and_dtype():
    for estimator in (k1, k2, k3):
        seen = estimator(torch.zeros(2, 3, dtype=torch.float32))
        assert (seen.shape, seen.dtype) == ((2, 3), torch.float32)


@given(data=st.data(), size=st.integers(1, 5))
def test_per_token_kl_is_the_plain_sum_in_mpmath(data, size):
    p, q = data.draw(log_probs(size)), data.draw(log_probs(size))
    with mpmath.workdps(50):
        terms = [mpmath.exp(mpmath.mpf(a)) * (mpmath.mpf(a) - mpmath.mpf(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > -INF]
        exact = float(mpmath.fsum(terms))
    seen = per_token_kl(p.expand(2, 3, -1), q.expand(2, 3, -1))
    assert seen.shape == (2, 3)
    assert_close(seen[1, 2], exact, float(q[q > -INF].abs().max()))
    assert bool((seen >= 0).all())


def test_per_token_kl_at_zeros():
    p, q = vector(1.0, 0.0).log(), vector(0.5, 0.5).log()
    assert float(per_token_kl(p, q)) == pytest.approx(math.log(2), abs=1e-16)
    assert float(per_token_kl(q, p)) == INF
    assert float(per_token_kl(p, p)) == 0


def test_the_token_mean_leaves_padding_out():
    log_ratio = vector(1.0, 2.0, math.nan, 3.0, math.nan, math.nan).reshape(2, 3)
    live = torch.tensor([[True, True, False], [True, False, False]])
    assert float(kl_per_token(log_ratio, live)) == 2.0


def test_the_token_mean_of_nothing_is_nan():
    assert math.isnan(float(kl_per_token(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))))
