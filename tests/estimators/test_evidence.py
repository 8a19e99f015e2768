"""Estimators of log Z by enumerating every set of samples, and the numbers of t07."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu import reference
from klrl_edu.core import logspace
from klrl_edu.core.errors import InfeasibleError
from klrl_edu.estimators import evidence
from tests.estimators.cases import vector
from tests.exact.dictionaries import INF

Q, R, PI = [0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 0.0, 2.0], [0.5, 0.2, 0.1, 0.2]
LOG_Z = math.log(2.326218341277)
LOG_W = vector(*(math.log(q / p) + r for q, p, r in zip(Q, PI, R, strict=True)))
STAR = [q * math.exp(r - LOG_Z) for q, r in zip(Q, R, strict=True)]


def mean(function, *sampled):
    """E of function(indices…) over independent draws; `sampled` gives (probabilities, how many) of
    each argument.
    """
    axes = [(probs, range(len(probs))) for probs, n in sampled for _ in range(n)]
    total = 0.0
    for picks in itertools.product(*(support for _, support in axes)):
        probability = math.prod(probs[pick] for (probs, _), pick in zip(axes, picks, strict=True))
        total += probability * float(function(list(picks)))
    return total


def divergence(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_estimate_of_z_is_right_on_average_and_its_log_is_low_but_less_and_less(n):
    estimate = mean(lambda picks: evidence.importance_sampling(LOG_W[picks]).exp(), (PI, n))
    assert math.log(estimate) == pytest.approx(LOG_Z, abs=1e-12)
    square = mean(lambda picks: (2 * evidence.importance_sampling(LOG_W[picks])).exp(), (PI, n))
    chi = math.fsum(s * s / p for s, p in zip(STAR, PI, strict=True)) - 1
    assert square - estimate**2 == pytest.approx(math.exp(2 * LOG_Z) * chi / n, rel=1e-9)


def test_bounds_lie_on_both_sides_and_close_in():
    low = [
        mean(lambda picks: evidence.importance_sampling(LOG_W[picks]), (PI, n)) for n in (1, 2, 4)
    ]
    high = [
        mean(
            lambda picks: evidence.reverse_importance_sampling(LOG_W[picks[0]], LOG_W[picks[1:]]),
            (STAR, 1),
            (PI, n - 1),
        )
        for n in (1, 2, 4)
    ]
    assert low[0] < low[1] < low[2] < LOG_Z < high[2] < high[1] < high[0]
    assert low[0] == pytest.approx(LOG_Z - divergence(PI, STAR), abs=1e-12)
    assert high[0] == pytest.approx(LOG_Z + divergence(STAR, PI), abs=1e-12)


@pytest.mark.parametrize("n", [1, 3])
def test_single_sample_bounds_do_not_tighten_with_more_samples(n):
    assert mean(lambda picks: evidence.lower_bound(LOG_W[picks]), (PI, n)) == pytest.approx(
        LOG_Z - divergence(PI, STAR), abs=1e-12
    )
    assert mean(lambda picks: evidence.upper_bound(LOG_W[picks]), (STAR, n)) == pytest.approx(
        LOG_Z + divergence(STAR, PI), abs=1e-12
    )


def test_the_lower_bound_of_a_policy_is_its_objective():
    """J = λ(log Z − KL(π‖π*)) at λ = 1, the anchor of t03."""
    assert mean(lambda picks: evidence.lower_bound(LOG_W[picks]), (PI, 1)) == pytest.approx(
        0.9 - 0.099793472091, abs=1e-12
    )


@pytest.mark.parametrize("n", [1, 2])
def test_the_harmonic_mean_is_right_for_one_over_z(n):
    estimate = mean(lambda picks: (-evidence.harmonic_mean(LOG_W[picks])).exp(), (STAR, n))
    assert estimate == pytest.approx(math.exp(-LOG_Z), rel=1e-12)
    assert mean(lambda picks: evidence.harmonic_mean(LOG_W[picks]), (STAR, n)) > LOG_Z


@pytest.mark.parametrize(("n", "bias"), [(1, -0.1), (2, -0.050685714286), (4, -0.025115379609)])
def test_the_self_normalised_bias_of_t07(n, bias):
    """E_q[r] from samples of the auxiliary p = (.3, .4, .2, .1)."""
    auxiliary, rewards = [0.3, 0.4, 0.2, 0.1], vector(*R)
    log_w = vector(*(math.log(q / p) for q, p in zip(Q, auxiliary, strict=True)))
    seen = mean(
        lambda picks: evidence.self_normalised(rewards[picks], log_w[picks]), (auxiliary, n)
    )
    assert seen - 0.6 == pytest.approx(bias, abs=5.1e-13)


def test_to_first_order_the_self_normalised_bias_is_that_of_the_docstring():
    rewards = vector(*R)
    target = math.fsum(s * r for s, r in zip(STAR, R, strict=True))
    first = -math.fsum(s * s / p * (r - target) for s, p, r in zip(STAR, PI, R, strict=True))
    seen = (
        mean(lambda picks: evidence.self_normalised(rewards[picks], LOG_W[picks]), (PI, 6)) - target
    )
    assert seen * 6 == pytest.approx(first, rel=0.1)


@given(
    logs=st.lists(st.floats(-1e4, 1e4) | st.just(-INF), min_size=1, max_size=5),
    shift=st.sampled_from((0.0, 1e5, -1e5)),
)
def test_weights_of_any_size_stay_in_logs(logs, shift):
    seen = float(evidence.importance_sampling(vector(*logs) + shift))
    finite = [x for x in logs if x > -INF]
    if not finite:
        assert seen == -INF
    else:
        top = max(finite)
        exact = top + shift + math.log(math.fsum(math.exp(x - top) for x in finite) / len(logs))
        assert seen == pytest.approx(exact, rel=1e-12, abs=1e-9)


def test_without_weight_there_is_no_self_normalised_estimate():
    with pytest.raises(InfeasibleError):
        evidence.self_normalised(vector(1.0, 2.0), vector(-INF, -INF))
    assert float(evidence.self_normalised(vector(1.0, INF), vector(0.0, -INF))) == 1  # 0 · inf = 0


def test_a_perfect_proposal_has_no_variance():
    star, _ = reference.posterior(dict(enumerate(Q)), dict(enumerate(R)), 1.0)
    log_w = vector(
        *(math.log(q) + r - math.log(star[y]) for y, (q, r) in enumerate(zip(Q, R, strict=True)))
    )
    assert log_w.tolist() == pytest.approx([LOG_Z] * 4, abs=1e-12)
    assert (
        logspace.expectation(vector(*(star[y] for y in range(4))).log(), (log_w - LOG_Z).square())
        < 1e-24
    )
    assert torch.func.vmap(evidence.importance_sampling)(
        log_w.reshape(2, 2)
    ).tolist() == pytest.approx([LOG_Z] * 2, abs=1e-12)
