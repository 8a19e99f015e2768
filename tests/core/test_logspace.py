"""Log-space arithmetic against mpmath, scipy, gradcheck and the plain sums."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from klrl_edu.core import logspace
from klrl_edu.core.errors import InfeasibleError
from klrl_edu.testing import distributions, log_probs, log_weights

INF = math.inf


def vector(*values: float, dtype: torch.dtype = torch.float64, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def high_precision() -> Any:
    mpmath = pytest.importorskip("mpmath")
    context = mpmath.mp.clone()
    context.dps = 60
    return context


def exact_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Σ p (e^d − 1 − d) + q{p=0} of the given numbers in 60 digits."""
    mp = high_precision()
    total = mp.mpf(0)
    for a, b in zip(log_p.tolist(), log_q.tolist(), strict=True):
        p, q = mp.exp(mp.mpf(a)), mp.exp(mp.mpf(b))
        if a == -INF:
            total += q
        elif b == -INF:
            return INF
        else:
            total += q - p - p * (mp.mpf(b) - mp.mpf(a))
    return float(total)


# logsumexp and log_normalize


def test_logsumexp_of_all_minus_inf_is_minus_inf_with_a_zero_gradient():
    x = vector(-INF, -INF, grad=True)
    total = logspace.logsumexp(x)
    total.backward()
    assert total.item() == -INF
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0]


def test_rows_without_mass_stay_so_beside_others_that_are_normalised():
    rows = torch.stack([vector(1.0, 1.0, -INF), vector(-INF, -INF, -INF)])
    seen = logspace.log_normalize_alive(rows)
    assert seen[0].tolist() == pytest.approx([-math.log(2), -math.log(2), -INF])
    assert seen[1].tolist() == [-INF, -INF, -INF]
    torch.testing.assert_close(seen[0], logspace.log_normalize(rows[0]), rtol=1e-15, atol=0)


def test_a_row_that_nothing_reaches_becomes_uniform_and_no_other():
    rows = torch.stack([vector(1.0, -INF), vector(-INF, -INF), vector(-2.0, 3.0)]).requires_grad_()
    alive = logspace.uniform_where_dead(rows)
    assert alive.tolist() == [[1.0, -INF], [0.0, 0.0], [-2.0, 3.0]]
    torch.log_softmax(alive, -1)[:, 0].sum().backward()
    assert bool(torch.isfinite(rows.grad).all())
    assert rows.grad[1].tolist() == [0.0, 0.0]
    told = logspace.uniform_where_dead(rows, torch.tensor([False, False, True]))
    assert told.tolist() == [[1.0, -INF], [-INF, -INF], [0.0, 0.0]]


def test_nan_stays_nan_and_is_never_zero_mass():
    x = vector(0.0, math.nan, -INF)
    assert logspace.logsumexp(x).isnan()
    assert logspace.log_normalize(x).isnan().any()
    assert logspace.segment_logsumexp(x, torch.tensor([0, 1, 1]), 2).isnan().tolist() == [
        False,
        True,
    ]


def test_torch_logsumexp_of_all_minus_inf_has_the_nan_gradient_that_ours_avoids():
    x = vector(-INF, -INF, grad=True)
    torch.logsumexp(x, -1).backward()
    assert x.grad is not None
    assert x.grad.isnan().all()


@given(x=st.integers(1, 6).flatmap(log_weights))
def test_logsumexp_agrees_with_scipy(x):
    with np.errstate(divide="ignore"):
        expected = special.logsumexp(x.numpy())
    assert logspace.logsumexp(x).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_logsumexp_works_along_any_dim_and_passes_gradcheck():
    x = torch.randn(
        2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    for dim in (0, 1, -1):
        assert logspace.logsumexp(x, dim).shape == torch.logsumexp(x, dim).shape
        assert torch.autograd.gradcheck(lambda y, dim=dim: logspace.logsumexp(y, dim), x)


def test_log_normalize_of_no_mass_raises_infeasible():
    with pytest.raises(InfeasibleError, match="every log-weight is -inf"):
        logspace.log_normalize(torch.tensor([[0.0, 0.0], [-INF, -INF]]))


@given(log_p=st.integers(1, 6).flatmap(log_probs))
def test_log_normalized_weights_sum_to_one(log_p):
    assert math.fsum(log_p.exp().tolist()) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("offset", [0.0, 800.0, -1e6, 2.0**60, 1e308])
def test_log_normalize_keeps_the_ratios_of_weights_far_from_one(offset):
    log_weights = vector(0.0, 0.0, -INF) + offset
    assert logspace.log_normalize(log_weights).tolist() == [-math.log(2), -math.log(2), -INF]


def test_the_gradient_of_log_normalize_is_that_of_log_softmax():
    x = torch.randn(
        3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    ours = torch.autograd.functional.jacobian(logspace.log_normalize, x)
    theirs = torch.autograd.functional.jacobian(lambda y: torch.log_softmax(y, -1), x)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-15)


def test_segment_logsumexp_is_logsumexp_of_each_segment_and_minus_inf_for_an_empty_or_dead_one():
    x = vector(1.0, -800.0, -INF, 2.0, -801.0, -INF, grad=True)
    index = torch.tensor([0, 1, 0, 0, 1, 3])
    out = logspace.segment_logsumexp(x, index, 4)
    expected = [np.logaddexp(1, 2), np.logaddexp(-800, -801), -INF, -INF]
    assert out.tolist() == pytest.approx(expected, rel=1e-15)
    out[:2].sum().backward()
    assert x.grad is not None
    odds = special.softmax([1, 2])
    assert x.grad.tolist() == pytest.approx(
        [odds[0], special.expit(1), 0, odds[1], special.expit(-1), 0], rel=1e-14
    )


def test_gradient_of_a_dead_segment_is_zero():
    x = vector(-INF, -INF, grad=True)
    logspace.segment_logsumexp(x, torch.tensor([0, 0]), 2).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0]


# mul_exp, expectation, entropy


@pytest.mark.parametrize("x", [INF, -INF, math.nan, 3.0])
def test_zero_mass_times_anything_is_zero_with_zero_gradients(x):
    value, log_p = vector(x, grad=True), vector(-INF, grad=True)
    product = logspace.mul_exp(value, log_p)
    product.sum().backward()
    assert product.tolist() == [0.0]
    assert value.grad is not None
    assert log_p.grad is not None
    assert value.grad.tolist() == [0.0]
    assert log_p.grad.tolist() == [0.0]


def test_mul_exp_broadcasts_and_passes_gradcheck():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    log_p = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(logspace.mul_exp(x, log_p), x * log_p.exp(), rtol=1e-15, atol=0)
    assert torch.autograd.gradcheck(logspace.mul_exp, (x, log_p))


def test_expectation_ignores_infinite_values_of_zero_mass_only():
    log_p = vector(math.log(0.25), math.log(0.75), -INF)
    assert logspace.expectation(log_p, vector(4.0, 8.0, math.nan)).item() == pytest.approx(
        7.0, rel=1e-15
    )
    assert logspace.expectation(log_p, vector(4.0, -INF, INF)).item() == -INF


def test_entropy_gradient_with_a_minus_inf_logit_is_finite_and_that_of_the_other_logits():
    logits = vector(0.3, -INF, 1.1, grad=True)
    entropy = logspace.entropy(torch.log_softmax(logits, -1))
    (gradient,) = torch.autograd.grad(entropy, logits)
    log_p = torch.log_softmax(vector(0.3, 1.1), -1)
    expected = -log_p.exp() * (log_p + entropy.detach())  # ∂H/∂θ_i = −p_i (log p_i + H)
    assert gradient.tolist() == pytest.approx(
        [expected[0].item(), 0, expected[1].item()], rel=1e-13
    )


@given(p=distributions())
def test_entropy_agrees_with_scipy(p):
    assert logspace.entropy(p.log()).item() == pytest.approx(
        special.entr(p.numpy()).sum(), rel=1e-13, abs=1e-15
    )


# e^x − 1 − x


@pytest.mark.parametrize(
    "x",
    [1e-9, -1e-9, 1e-300, -1e-160, 0.4999999, 0.5, -0.5, 0.51, -3.0, 20.0, -745.0, -1e10, 709.0],
)
def test_expm1_minus_identity_has_full_relative_accuracy(x):
    mp = high_precision()
    expected = float(mp.expm1(mp.mpf(x)) - mp.mpf(x)) if abs(x) > 1e-100 else x * x / 2
    assert logspace.expm1_minus_identity(vector(x)).item() == pytest.approx(expected, rel=4e-16)


@pytest.mark.parametrize("x", [710.0, INF, -INF])
def test_expm1_minus_identity_overflows_to_inf_never_nan(x):
    assert logspace.expm1_minus_identity(vector(x)).item() == INF


@given(x=st.floats(-600, 600))
def test_expm1_minus_identity_is_never_negative_and_has_derivative_expm1(x):
    point = vector(x, grad=True)
    value = logspace.expm1_minus_identity(point)
    (slope,) = torch.autograd.grad(value.sum(), point)
    assert value.item() >= 0
    assert slope.item() == pytest.approx(math.expm1(x), rel=1e-13, abs=1e-300)


# KL


def test_kl_where_p_is_zero_is_log_two():
    log_p, log_q = vector(0.0, -INF), vector(math.log(0.5), math.log(0.5))
    assert logspace.kl_divergence(log_p, log_q).item() == pytest.approx(math.log(2), rel=1e-15)


def test_kl_where_q_is_zero_below_p_is_inf():
    assert (
        logspace.kl_divergence(vector(math.log(0.5), math.log(0.5)), vector(0.0, -INF)).item()
        == INF
    )


def test_kl_where_both_are_zero_ignores_the_outcome():
    p, q = vector(math.log(0.25), math.log(0.75), -INF), vector(math.log(0.5), math.log(0.5), -INF)
    assert logspace.kl_divergence(p, q).item() == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-14
    )


@given(log_p=st.integers(1, 6).flatmap(log_probs))
def test_kl_of_equal_distributions_is_zero_to_the_last_bit(log_p):
    assert logspace.kl_divergence(log_p, log_p.clone()).item() == 0.0


@pytest.mark.parametrize("scale", [1e-6, 1e-3])
def test_kl_of_near_equal_float32_is_never_negative_in_2000_cases(scale):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 50, generator=generator)
    log_p = torch.log_softmax(logits, -1)
    log_q = torch.log_softmax(logits + scale * torch.randn(2000, 50, generator=generator), -1)
    assert (logspace.kl_divergence(log_p, log_q) >= 0).all()
    if scale == 1e-6:
        assert ((log_p.exp() * (log_p - log_q)).sum(-1) < 0).sum() > 100  # the plain sum is, often


@given(pair=st.integers(1, 5).flatmap(lambda k: st.tuples(log_probs(k), log_probs(k))))
def test_kl_agrees_with_sixty_digits(pair):
    expected = exact_kl(*pair)
    assert logspace.kl_divergence(*pair).item() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-8])
def test_kl_keeps_its_digits_near_zero(gap):
    mp = high_precision()
    p = vector(0.0, 0.0).log_softmax(-1)
    log_q = torch.stack(
        [
            torch.log1p(torch.tensor(gap, dtype=torch.float64)),
            torch.log1p(torch.tensor(-gap, dtype=torch.float64)),
        ]
    ) - math.log(2)
    expected = float(-mp.log1p(-(mp.mpf(gap) ** 2)) / 2)  # KL(½,½ ‖ ½(1 ± gap)) = −½ log(1 − gap²)
    assert logspace.kl_divergence(p, log_q).item() == pytest.approx(
        expected, rel=1e-16 / gap + 1e-12
    )


def test_kl_stays_finite_where_p_underflows_and_the_log_ratio_overflows():
    log_p, log_q = vector(0.0, -1e5), vector(math.log(0.5), math.log(0.5))
    assert logspace.kl_divergence(log_p, log_q).item() == pytest.approx(math.log(2), rel=1e-15)


def test_gradients_of_kl_pass_gradcheck_and_are_finite_at_zeros():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    assert torch.autograd.gradcheck(
        lambda x, y: logspace.kl_divergence(x.log_softmax(-1), y.log_softmax(-1)), (a, b)
    )
    zeros = vector(0.5, -INF, 2.0, -INF, grad=True)
    others = vector(1.0, 0.0, 0.0, -INF, grad=True)
    logspace.kl_divergence(zeros.log_softmax(-1), others.log_softmax(-1)).backward()
    assert zeros.grad is not None
    assert others.grad is not None
    p, q = zeros.detach().softmax(-1), others.detach().softmax(-1)
    u = torch.where(p > 0, p.log() - q.log(), 0)
    assert torch.allclose(zeros.grad, p * (u - (p * u).sum()), rtol=0, atol=1e-14)  # p_i (u_i − KL)
    assert torch.allclose(others.grad, q - p, rtol=0, atol=1e-14)


# log(1 − e^x)


@pytest.mark.parametrize("x", [-1e-20, -1e-10, -0.5, -math.log(2), -0.7, -1.0, -40.0, -700.0])
def test_log1mexp_agrees_with_sixty_digits(x):
    mp = high_precision()
    assert logspace.log1mexp(vector(x)).item() == pytest.approx(
        float(mp.log(-mp.expm1(mp.mpf(x)))), rel=1e-15
    )


def test_log1mexp_at_its_ends_is_the_log_of_zero_and_of_one():
    x = vector(0.0, -INF)
    assert logspace.log1mexp(x).tolist() == [-INF, 0.0]


def test_the_gradient_of_log1mexp_is_finite_on_both_branches():
    x = vector(-1e-20, -0.1, -5.0, -800.0, -INF, grad=True)
    logspace.log1mexp(x).sum().backward()
    assert x.grad is not None
    expected = [-1 / math.expm1(1e-20), -1 / math.expm1(0.1), -1 / math.expm1(5.0), 0.0, 0.0]
    assert x.grad.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-300)


# effective sample size


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((800.0, 0.0, 0.0), 1.0),
        ((-800.0, -800.0, -800.0), 3.0),
        ((0.0, -INF), 1.0),
        ((0.0, math.log(3)), 1.6),
        ((1e308, 1e308), 2.0),
    ],
)
def test_effective_sample_size_of_huge_tiny_and_plain_weights(weights, expected):
    assert logspace.effective_sample_size(vector(*weights)).item() == pytest.approx(
        expected, rel=1e-13
    )


def test_effective_sample_size_without_any_mass_raises_infeasible():
    with pytest.raises(InfeasibleError):
        logspace.effective_sample_size(vector(-INF, -INF))


@given(x=st.integers(1, 8).flatmap(log_weights))
def test_effective_sample_size_lies_between_one_and_n(x):
    assert 1 <= logspace.effective_sample_size(x).item() <= len(x)
