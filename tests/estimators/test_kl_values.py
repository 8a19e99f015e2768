"""The k-estimators against mpmath and the course's numbers, and the exact per-token KL."""

import math
import re
import warnings

import mpmath
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from klrl_edu.audit.claims.catalogue import answers_case, four_sentences_case
from klrl_edu.core import logspace
from klrl_edu.estimators import kl_values
from klrl_edu.estimators.kl_values import k1, k2, k3, kl_per_token, per_token_kl
from klrl_edu.testing import log_probs
from tests.estimators.cases import whole_batch
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
    log_p, log_q = (
        logspace.log_normalize(
            vector(*data.draw(st.lists(st.floats(-5, 5), min_size=size, max_size=size)))
        )
        for _ in "pq"
    )
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


@pytest.mark.parametrize(
    ("u", "dtype"), [(-710.0, torch.float64), (-89.0, torch.float32), (-1e300, torch.float64)]
)
def test_k3_overflows_with_a_warning_that_gives_its_log(u, dtype):
    with pytest.warns(
        RuntimeWarning, match=re.escape(f"at log-ratio {u:g}: its log is {-u:g} nats; use k1")
    ):
        assert k3(torch.tensor([u, 0.0], dtype=dtype)).tolist() == [INF, 0.0]


def test_k3_of_a_value_in_range_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        k3(vector(-709.0, 709.0, 1e300))
        k3(torch.tensor([-88.0]))


def test_inside_vmap_k3_overflows_without_a_warning_and_its_gradients_are_those_outside():
    u = vector(-800.0, -1.0, 1e-7, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.func.vmap(k3)(u[:, None]).squeeze(-1).tolist()[0] == INF
        slopes = torch.func.vmap(torch.func.grad(lambda x: k3(x)))(u[1:])
    assert slopes.tolist() == pytest.approx([-math.expm1(-x) for x in u[1:].tolist()], rel=1e-13)
    assert torch.func.grad(lambda x: k3(x).sum())(u[1:]).tolist() == pytest.approx(
        slopes.tolist(), rel=1e-15
    )


def test_where_mass_is_zero_k1_and_k2_and_k3_are_infinite_without_a_warning():
    """u = +inf: the prior has none; u = −inf: the policy has none, and such a sequence is never
    drawn.
    """
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
        terms = [
            mpmath.exp(mpmath.mpf(a)) * (mpmath.mpf(a) - mpmath.mpf(b))
            for a, b in zip(p.tolist(), q.tolist(), strict=True)
            if a > -INF
        ]
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


def test_the_token_mean_of_nothing_is_0_as_in_trl():
    assert float(kl_per_token(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))) == 0


# --- the control-variate family -------------------------------------------------------------------


@given(data=st.data(), size=st.integers(2, 6), c=st.floats(-3, 3))
def test_every_constant_coefficient_keeps_the_mean_and_has_the_variance_of_the_docstring(
    data, size, c
):
    log_p, log_q = (
        logspace.log_normalize(
            vector(*data.draw(st.lists(st.floats(-3, 3), min_size=size, max_size=size)))
        )
        for _ in "pq"
    )
    u, largest = log_p - log_q, float((log_q - log_p).max().exp())
    values = kl_values.control_variate(u, c)
    reverse, forward = logspace.kl_divergence(log_p, log_q), logspace.kl_divergence(log_q, log_p)
    assert_close(logspace.expectation(log_p, values), reverse, largest)
    chi = logspace.expectation(log_p, torch.expm1(-u).square())
    plain = logspace.expectation(log_p, (u - reverse).square())
    assert_close(
        logspace.expectation(log_p, (values - reverse).square()),
        plain - 2 * c * (reverse + forward) + c * c * chi,
        9 * largest**2,
    )


def test_the_ends_of_the_family_are_k1_and_k3():
    assert torch.equal(kl_values.control_variate(U, 0.0), k1(U))
    assert torch.allclose(kl_values.control_variate(U, 1.0), k3(U), rtol=1e-12, atol=1e-16)


@given(data=st.data(), size=st.integers(2, 6), shift=st.floats(-1, 1))
def test_the_best_coefficient_is_best_and_is_the_fit_to_every_outcome(data, size, shift):
    log_p, log_q = (
        logspace.log_normalize(
            vector(*data.draw(st.lists(st.floats(-3, 3), min_size=size, max_size=size)))
        )
        for _ in "pq"
    )
    assume(float((log_p - log_q).abs().max()) > 1e-3)
    best = kl_values.best_coefficient(log_p, log_q)

    def variance(c):
        values = kl_values.control_variate(log_p - log_q, c)
        return float(
            logspace.expectation(log_p, (values - logspace.expectation(log_p, values)).square())
        )

    assert variance(best) <= variance(best + shift) * (1 + 1e-9) + 1e-15
    uniform = torch.full_like(
        log_p, -math.log(size)
    )  # equally likely outcomes are a sample that holds each once
    assume(float((uniform - log_q).abs().max()) > 1e-3)
    exact = kl_values.best_coefficient(uniform, log_q)
    assert float(kl_values.fitted_coefficient(uniform - log_q)) == pytest.approx(
        float(exact), rel=1e-6
    )


def test_the_best_coefficient_for_the_four_sentences():
    best = kl_values.best_coefficient(PI.log(), Q.log())
    by_hand = (0.099793472091 + 0.101696829963) / float(PI @ (Q / PI - 1).square())
    assert float(best) == pytest.approx(by_hand, rel=1e-11)
    assert moments(kl_values.control_variate(U, best))[1] < moments(k3(U))[1]


def test_a_coefficient_cannot_be_fitted_to_equal_samples():
    assert float(kl_values.fitted_coefficient(vector(0.3, 0.3, 0.3))) == 1
    assert math.isnan(float(kl_values.best_coefficient(Q.log(), Q.log())))


def test_a_prior_without_some_of_the_policys_words_has_a_best_coefficient_all_the_same():
    """π = 0 where q = ½ does not count: such a sequence is never drawn."""
    assert math.isfinite(
        float(kl_values.best_coefficient(vector(0.5, 0.5, 0.0).log(), vector(0.2, 0.3, 0.5).log()))
    )


def test_fitting_on_the_same_two_samples_biases_the_estimate():
    total = 0.0
    for i in range(4):
        for j in range(4):
            pair = U[[i, j]]
            total += float(
                PI[i]
                * PI[j]
                * kl_values.control_variate(pair, kl_values.fitted_coefficient(pair)).mean()
            )
    assert abs(total - 0.099793472091) > 1e-3


# --- traps ----------------------------------------------------------------------------------------


def test_the_absolute_value_is_high_by_twice_the_negative_part():
    assert moments(kl_values.absolute_k1(U))[0] == pytest.approx(
        0.099793472091 + 2 * float(PI @ (-U).clamp(min=0)), abs=1e-12
    )


def test_k3_upside_down_estimates_something_else():
    chi = float(((PI - Q) ** 2 / Q).sum())
    assert moments(kl_values.opposite_k3(U))[0] == pytest.approx(chi - 0.099793472091, abs=1e-12)


def test_a_reversed_reference_makes_k2_visibly_wrong():
    p = vector(0.4, 0.3, 0.2, 0.1)
    u = p.log() - p.flip(0).log()
    assert float(p @ k1(u)) == pytest.approx(0.4564, abs=5.1e-5)
    assert float(p @ k2(u)) == pytest.approx(0.5216, abs=5.1e-5)


def test_clamps_bias_by_the_tail_they_cut():
    tail = (k3(U) - 0.05).clamp(min=0)
    assert moments(kl_values.clamped_k3(U, 0.05))[0] == pytest.approx(
        0.099793472091 - float(PI @ tail), abs=1e-12
    )
    low, high = (-0.3 - U).clamp(min=0), (U - 0.3).clamp(min=0)
    assert moments(kl_values.clamped_k1(U, 0.3))[0] == pytest.approx(
        0.099793472091 + float(PI @ low) - float(PI @ high), abs=1e-12
    )
    assert kl_values.input_clamped_k3(vector(-INF, INF), 20.0).tolist() == pytest.approx(
        [math.exp(20) - 21, math.exp(-20) + 19], rel=1e-12
    )


# --- along sequences ------------------------------------------------------------------------------


def along(case, values, behaviour=False):
    """E of [S] values under the policy (or the behaviour policy), and the variance."""
    whole = whole_batch(case)
    log_p = (whole.behaviour_log_probs if behaviour else whole.log_probs.detach()).sum(-1)
    mean = logspace.expectation(log_p, values)
    return float(mean), float(logspace.expectation(log_p, (values - mean).square()))


@pytest.mark.parametrize("case", [four_sentences_case, answers_case])
def test_rao_blackwell_has_the_mean_of_k1(case):
    whole = whole_batch(case())
    u = (whole.log_probs - whole.prior_log_probs).detach().sum(-1)
    mean, variance = along(
        case(), kl_values.rao_blackwell(whole.log_dists, whole.prior_log_dists).detach()
    )
    assert mean == pytest.approx(along(case(), u)[0], rel=1e-13)
    assert variance < along(case(), u)[1]


def test_rao_blackwell_per_token_can_have_more_variance_than_monte_carlo():
    """P₁ = (½, ½), Q₁ = (¼, ¾); after 0 P = Q; after 1 P = (.01, .99), Q = (.99, .01): the surprise
    of token 1 hides that of token 2.
    """
    first, second = (
        {0: (0.5, 0.25), 1: (0.5, 0.75)},
        {
            0: [(0.5, 0.5), (0.5, 0.5)],
            1: [(0.01, 0.99), (0.99, 0.01)],
        },
    )
    dists = {
        word: [vector(*(pair[side] for pair in rows)).log() for side in (0, 1)]
        for word, rows in second.items()
    }
    start = [vector(*(first[word][side] for word in (0, 1))).log() for side in (0, 1)]
    outcomes = [(word, v, first[word][0] * second[word][v][0]) for word in (0, 1) for v in (0, 1)]
    p = vector(*(probability for _, _, probability in outcomes))
    log_dists, prior = (
        torch.stack([torch.stack([start[side], dists[word][side]]) for word, _, _ in outcomes])
        for side in (0, 1)
    )
    exact = kl_values.rao_blackwell(log_dists, prior)
    sampled = vector(
        *(
            math.log(first[w][0] / first[w][1]) + math.log(second[w][v][0] / second[w][v][1])
            for w, v, _ in outcomes
        )
    )
    for values, variance in ((sampled, 3.31591), (exact, 5.06974)):
        mean = float(p @ values)
        assert mean == pytest.approx(2.39545, abs=5.1e-6)
        assert float(p @ (values - mean).square()) == pytest.approx(variance, abs=5.1e-6)


@pytest.mark.parametrize("estimator", [k1, k3])
@pytest.mark.parametrize("case", [four_sentences_case, answers_case])
def test_off_policy_the_prefix_and_the_sequence_ratio_keep_the_mean_and_the_token_ratio_does_not(
    case, estimator
):
    case = case()
    whole = whole_batch(case)
    given = (whole.log_probs.detach(), whole.prior_log_probs, whole.behaviour_log_probs, estimator)
    truth = along(case, (whole.log_probs - whole.prior_log_probs).detach().sum(-1))[0]
    for name in ("off_policy_prefix", "off_policy_sequence"):
        assert along(case, getattr(kl_values, name)(*given), behaviour=True)[0] == pytest.approx(
            truth, rel=1e-13
        )
    frozen = per_token_kl(whole.log_dists, whole.prior_log_dists).detach().sum(-1)
    token = along(case, kl_values.off_policy_token(*given), behaviour=True)[0]
    assert token == pytest.approx(along(case, frozen, behaviour=True)[0], rel=1e-13)
    assert abs(token - truth) > 1e-3


@pytest.mark.parametrize("case", [four_sentences_case, answers_case])
def test_off_policy_rao_blackwell_needs_only_the_ratio_of_the_prefix(case):
    case = case()
    whole = whole_batch(case)
    values = kl_values.off_policy_rao_blackwell(
        whole.log_probs, whole.behaviour_log_probs, whole.log_dists, whole.prior_log_dists
    ).detach()
    truth = along(case, (whole.log_probs - whole.prior_log_probs).detach().sum(-1))[0]
    assert along(case, values, behaviour=True)[0] == pytest.approx(truth, rel=1e-13)


def test_a_sample_that_the_policy_never_gives_weighs_nothing():
    """π = 0 where μ is not: log-ratio −inf, k3 = +inf, and 0·inf = 0."""
    log_probs, prior, behaviour = (
        vector(-INF, -1.0)[None],
        vector(-1.0, -1.0)[None],
        vector(-2.0, -1.0)[None],
    )
    assert kl_values.off_policy_token(log_probs, prior, behaviour, k3).tolist() == [0]
    assert kl_values.off_policy_sequence(log_probs, prior, behaviour).tolist() == [0]
    assert kl_values.off_policy_prefix(log_probs, prior, behaviour).tolist() == [0]
