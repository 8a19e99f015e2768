"""Samples of π against sums over all outcomes: every f-divergence, its variance, its limits, and
where mass is zero.
"""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.estimators import divergences, kl_values
from tests.estimators.cases import vector
from tests.exact.dictionaries import INF, assert_close

LOGS = st.lists(st.floats(-4, 4), min_size=2, max_size=6)


def kl(p, q):
    return mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))


def mixed(p, q, beta):
    middle = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def alpha_sum(p, q, alpha):
    return (mpmath.fsum(a**alpha * b ** (1 - alpha) for a, b in zip(p, q, strict=True)) - 1) / (
        alpha * (alpha - 1)
    )


BY_DEFINITION = {  # estimator of u -> D(p, q) as a plain sum
    "forward_kl": (divergences.forward_kl, lambda p, q: kl(q, p)),
    "forward_kl_nonnegative": (divergences.forward_kl_nonnegative, lambda p, q: kl(q, p)),
    "chi_squared": (
        divergences.chi_squared,
        lambda p, q: mpmath.fsum((a - b) ** 2 / b for a, b in zip(p, q, strict=True)) / 2,
    ),
    "reverse_chi_squared": (
        divergences.reverse_chi_squared,
        lambda p, q: mpmath.fsum((a - b) ** 2 / a for a, b in zip(p, q, strict=True)) / 2,
    ),
    "total_variation": (
        divergences.total_variation,
        lambda p, q: mpmath.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    ),
    "squared_hellinger": (
        divergences.squared_hellinger,
        lambda p, q: (
            mpmath.fsum((mpmath.sqrt(a) - mpmath.sqrt(b)) ** 2 for a, b in zip(p, q, strict=True))
            / 2
        ),
    ),
    "jensen_shannon": (divergences.jensen_shannon, lambda p, q: mixed(p, q, mpmath.mpf(1) / 2)),
    "generalised_jensen_shannon": (
        lambda u: divergences.generalised_jensen_shannon(u, 0.1),
        lambda p, q: mixed(p, q, mpmath.mpf(0.1)),
    ),
    "alpha_divergence": (
        divergences.alpha_divergence,
        lambda p, q: alpha_sum(p, q, mpmath.mpf(1) / 2),
    ),
    "alpha_divergence of −1": (
        lambda u: divergences.alpha_divergence(u, -1.0),
        lambda p, q: alpha_sum(p, q, mpmath.mpf(-1)),
    ),
    "alpha_divergence of 2.5": (
        lambda u: divergences.alpha_divergence(u, 2.5),
        lambda p, q: alpha_sum(p, q, mpmath.mpf(2.5)),
    ),
}


def distributions(data):
    size = data.draw(st.integers(2, 6))
    return [
        logspace.log_normalize(
            vector(*data.draw(st.lists(st.floats(-4, 4), min_size=size, max_size=size)))
        )
        for _ in "pq"
    ]


def in_mpmath(*log_ps):
    """As exactly normalised numbers."""
    found = []
    for log_p in log_ps:
        weights = [mpmath.exp(mpmath.mpf(x)) for x in log_p.tolist()]
        found.append([w / mpmath.fsum(weights) for w in weights])
    return found


@given(data=st.data())
@pytest.mark.parametrize("name", BY_DEFINITION)
def test_the_mean_over_samples_is_the_divergence(name, data):
    estimator, definition = BY_DEFINITION[name]
    log_p, log_q = distributions(data)
    seen = logspace.expectation(log_p, estimator(log_p - log_q))
    with mpmath.workdps(40):
        exact = float(definition(*in_mpmath(log_p, log_q)))
    assert_close(seen, exact, float((2.5 * (log_p - log_q).abs().max()).exp()))


@given(data=st.data())
def test_variances_are_those_of_the_docstrings(data):
    log_p, log_q = distributions(data)
    u, largest = log_p - log_q, float((2 * (log_p - log_q).abs().max()).exp())

    def variance(values):
        return logspace.expectation(log_p, (values - logspace.expectation(log_p, values)).square())

    forward = logspace.kl_divergence(log_q, log_p)
    assert_close(
        variance(divergences.forward_kl(u)),
        logspace.expectation(log_q, torch.exp(-u) * u**2) - forward**2,
        largest,
    )
    chi, distance = (
        2 * logspace.expectation(log_p, divergences.reverse_chi_squared(u)),
        logspace.expectation(log_p, divergences.total_variation(u)),
    )
    assert_close(variance(divergences.total_variation(u)), chi / 4 - distance**2, largest)
    assert_close(variance(torch.exp(-u)), chi, largest)


@given(u=st.floats(-30, 30) | st.floats(-1e-6, 1e-6))
def test_each_value_is_its_formula_to_the_last_digits(u):
    with mpmath.workdps(700):  # sees u²/2 beside 1 down to the smallest double
        w = mpmath.exp(-mpmath.mpf(u))
        exact = {
            "forward_kl_nonnegative": -u * w - w + 1,
            "chi_squared": mpmath.cosh(u) - 1,
            "reverse_chi_squared": (w - 1) ** 2 / 2,
        }
        exact |= {
            "squared_hellinger": (1 - mpmath.sqrt(w)) ** 2 / 2,
            "total_variation": abs(1 - w) / 2,
            "forward_kl": -u * w,
        }
        exact = {name: float(value) for name, value in exact.items()}
    for name, value in exact.items():
        assert float(getattr(divergences, name)(vector(u))) == pytest.approx(
            value, rel=1e-13, abs=1e-300
        )


@given(u=st.floats(-20, 20))
def test_none_but_the_plain_forward_kl_is_negative(u):
    for name, (estimator, _) in BY_DEFINITION.items():
        if name != "forward_kl":
            assert float(estimator(vector(u))) >= -1e-15 * math.exp(abs(u)), name


@given(u=st.floats(-3, 3))
def test_the_alpha_family_ends_in_both_divergences_and_passes_the_others(u):
    x = vector(u)
    largest = math.exp(2 * abs(u))
    assert_close(divergences.alpha_divergence(x, 1 - 1e-7), kl_values.k3(x), largest, 1e-6)
    assert_close(
        divergences.alpha_divergence(x, 1e-7), divergences.forward_kl_nonnegative(x), largest, 1e-6
    )
    assert_close(divergences.alpha_divergence(x, 2.0), divergences.chi_squared(x), largest)
    assert_close(
        divergences.alpha_divergence(x, 0.5), 4 * divergences.squared_hellinger(x), largest
    )
    assert_close(
        divergences.generalised_jensen_shannon(x, 1e-9) / 1e-9, kl_values.k3(x), 1e3 * largest, 1e-8
    )


def test_where_the_prior_has_no_mass_values_are_those_of_the_limit():
    """u = +inf: π has what q has not."""
    x = vector(INF)
    expected = {
        "forward_kl": 0,
        "forward_kl_nonnegative": 1,
        "chi_squared": INF,
        "reverse_chi_squared": 0.5,
        "total_variation": 0.5,
    }
    expected |= {"squared_hellinger": 0.5, "jensen_shannon": math.log(2) / 2}
    for name, value in expected.items():
        assert float(getattr(divergences, name)(x)) == pytest.approx(value, rel=1e-15)


def test_shares_and_orders_outside_the_family_are_refused():
    for weight in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match=r"weight = .* between 0 and 1"):
            divergences.generalised_jensen_shannon(vector(0.0), weight)
    for alpha in (0, 1.0):
        with pytest.raises(
            InputError,
            match=(
                r"is a limit: take divergences.forward_kl_nonnegative \(0\) or kl_values.k3 \(1\)"
            ),
        ):
            divergences.alpha_divergence(vector(0.0), alpha)
