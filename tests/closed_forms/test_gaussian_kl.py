"""The closed forms against Gauss–Hermite quadrature of the estimators themselves, and Schulman's
table.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.closed_forms import gaussian_kl
from klrl_edu.estimators import kl_values


def by_quadrature(estimator, kl):
    """Mean and variance of an estimator over x ~ N(0, 1), with log π/q = −μx + μ²/2, to about 1e-12
    for μ below 2.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    probability = torch.from_numpy(weights / weights.sum())
    mu = (2 * kl) ** 0.5
    values = estimator(torch.from_numpy(-mu * nodes) + kl)
    mean = float(probability @ values)
    return mean, float(probability @ (values - mean).square())


@given(kl=st.floats(1e-4, 1.5))
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_moments_are_those_of_quadrature(name, kl):
    mean, variance = by_quadrature(getattr(kl_values, name), kl)
    seen = getattr(gaussian_kl, name)(kl)
    assert float(seen.mean) == pytest.approx(mean, rel=1e-10)
    assert float(seen.variance) == pytest.approx(variance, rel=1e-9)


@given(kl=st.floats(1e-3, 1.5), coefficient=st.floats(-1, 2))
def test_the_control_variates_moments_are_those_of_quadrature(kl, coefficient):
    mean, variance = by_quadrature(lambda u: kl_values.control_variate(u, coefficient), kl)
    seen = gaussian_kl.control_variate(kl, coefficient)
    assert float(seen.mean) == pytest.approx(mean, rel=1e-9)
    assert float(seen.variance) == pytest.approx(variance, rel=1e-8, abs=1e-10)


def test_the_table_of_schulman():
    """std/KL of k1, k2, k3 and the relative bias of k2, at KL 0.005 and 0.5."""
    for kl, stds, bias in (
        (0.005, (20.0, 1.4177, 1.4166), 0.0025),
        (0.5, (2.0, 1.7321, 1.6950), 0.25),
    ):
        table = [getattr(gaussian_kl, name)(kl) for name in ("k1", "k2", "k3")]
        assert [float(row.relative_std) for row in table] == pytest.approx(stds, abs=5.1e-5)
        assert float(table[1].relative_bias) == pytest.approx(bias, rel=1e-12)
        assert [float(table[k].relative_bias) for k in (0, 2)] == [0, 0]


def test_above_the_crossing_k3_is_worse_than_k1():
    d = gaussian_kl.crossing()
    assert d == pytest.approx(0.628, abs=5.1e-4)
    assert float(gaussian_kl.k3(d).variance) == pytest.approx(
        float(gaussian_kl.k1(d).variance), rel=1e-13
    )
    for kl, worse in ((d * 0.99, False), (d * 1.01, True)):
        assert (float(gaussian_kl.k3(kl).variance) > float(gaussian_kl.k1(kl).variance)) == worse


@given(kl=st.floats(1e-3, 5), shift=st.floats(-1, 1))
def test_no_other_coefficient_has_less_variance(kl, shift):
    best = gaussian_kl.best_coefficient(kl)
    least = float(gaussian_kl.control_variate(kl, best).variance)
    assert least <= float(gaussian_kl.control_variate(kl, best + shift).variance) * (1 + 1e-12)
    assert 0 < float(best) < 1


def test_a_tensor_of_divergences_is_taken_at_once():
    kl = torch.tensor([1e-12, 0.005, 0.5], dtype=torch.float64)
    assert gaussian_kl.k3(kl).relative_std.tolist() == pytest.approx(
        [2**0.5, 1.4166, 1.6950], abs=5.1e-5
    )  # no cancellation near 0
