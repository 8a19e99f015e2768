"""The plain-dictionary theory against the course's hand numbers, which were computed
independently.
"""

import ast
import inspect
import math

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu import reference as ref

THE_CAT, THE_DOG, A_CAT, A_DOG = ("the", "cat"), ("the", "dog"), ("a", "cat"), ("a", "dog")
SENTENCES = (THE_CAT, THE_DOG, A_CAT, A_DOG)
Q = dict(zip(SENTENCES, (0.4, 0.3, 0.2, 0.1), strict=True))
PI = dict(zip(SENTENCES, (0.5, 0.2, 0.1, 0.2), strict=True))
R = dict(zip(SENTENCES, (1.0, 0.0, 0.0, 2.0), strict=True))


def anchor(value):
    """A number of the course, printed with twelve decimals."""
    return pytest.approx(value, rel=0, abs=5.1e-13)


def anchors(*values):
    return [anchor(value) for value in values]


def test_it_stays_short_and_imports_only_math_and_types():
    source = inspect.getsource(ref)
    assert len(source.splitlines()) <= 120
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert plain | named <= {"math", "typing", "collections.abc"}


def test_t01_divergences_entropy_and_mutual_information():
    assert ref.kl(PI, Q) == anchor(0.099793472091)
    assert ref.kl(Q, PI) == anchor(0.101696829963)
    assert ref.entropy(Q) == anchor(1.279854225834)
    second = {"cat": Q[THE_CAT] + Q[A_CAT], "dog": Q[THE_DOG] + Q[A_DOG]}
    assert ref.entropy(ref.next_token(Q, ())) + ref.entropy(second) - ref.entropy(Q) == anchor(
        0.004021743230
    )


def test_t01_the_chain_rule_adds_up():
    terms = ref.chain_rule(PI, Q, 2)
    assert math.fsum(terms) == pytest.approx(ref.kl(PI, Q), rel=1e-14)
    assert min(terms) >= 0


def test_t03_posterior_evidence_and_the_gap():
    posterior, log_z = ref.posterior(Q, R, 1.0)
    assert math.exp(log_z) == anchor(2.326218341277)
    assert list(posterior.values()) == anchors(
        0.467416455322, 0.128964678284, 0.085976452189, 0.317642414206
    )
    assert log_z - ref.objective(PI, Q, R, 1.0) == anchor(0.044037391635)
    assert ref.kl(PI, posterior) == anchor(0.044037391635)


def test_t03_log_evidence_differentiates_to_the_expected_reward():
    def log_z(beta):
        return mpmath.log(
            mpmath.fsum(mpmath.mpf(Q[y]) * mpmath.exp(beta * R[y]) for y in SENTENCES)
        )

    for beta in (0.1, 1.0, 5.0):
        posterior, _ = ref.posterior(Q, R, 1 / beta)
        mean, variance = ref.mean_and_variance(posterior, lambda y: R[y])
        with mpmath.workdps(50):
            assert mean == pytest.approx(float(mpmath.diff(log_z, beta)), rel=1e-13)
            assert variance == pytest.approx(float(mpmath.diff(log_z, beta, 2)), rel=1e-13)


def test_t04_soft_values_and_the_first_token():
    assert ref.soft_value(Q, R, 1.0, ("the",)) == anchor(0.684043533096)
    assert ref.soft_value(Q, R, 1.0, ("a",)) == anchor(1.140932477554)
    posterior, log_z = ref.posterior(Q, R, 1.0)
    assert list(ref.next_token(posterior, ()).values()) == anchors(0.596381133605, 0.403618866395)
    assert ref.soft_value(Q, R, 1.0) == pytest.approx(log_z, rel=1e-14)


def test_t05_the_gradient_of_the_objective():
    gradient = ref.objective_gradient(PI, Q, R, 1.0)
    assert list(gradient.values()) == anchors(
        -0.011675039611, -0.078948283960, -0.010705934735, 0.101329258306
    )
    posterior, _ = ref.posterior(Q, R, 1.0)
    divergence = ref.gradient(PI, lambda y: math.log(PI[y] / posterior[y]))
    assert [-divergence[y] for y in SENTENCES] == pytest.approx(list(gradient.values()), abs=1e-15)


def test_t05_the_gradient_of_the_objective_is_its_derivative_in_sequence_logits():
    for y in SENTENCES:

        def moved(shift, y=y):
            weight = {z: PI[z] * (mpmath.exp(shift) if z == y else 1) for z in SENTENCES}
            total = mpmath.fsum(weight.values())
            return mpmath.fsum(
                w / total * (R[z] - mpmath.log(w / total / Q[z])) for z, w in weight.items()
            )

        with mpmath.workdps(50):
            assert ref.objective_gradient(PI, Q, R, 1.0)[y] == pytest.approx(
                float(mpmath.diff(moved, 0)), abs=1e-15
            )


def test_t06_moments_of_the_estimators():
    truth = ref.kl(PI, Q)
    (k1_mean, k1_variance), (k2_mean, _), (k3_mean, k3_variance) = (
        ref.mean_and_variance(PI, k(PI, Q)) for k in (ref.k1, ref.k2, ref.k3)
    )
    assert k1_mean == pytest.approx(truth, rel=1e-14)
    assert k3_mean == pytest.approx(truth, rel=1e-14)
    assert (k1_variance, k3_variance) == (anchor(0.191954080129), anchor(0.008973476020))
    assert k2_mean - truth == anchor(0.001162936509)


def test_t06_k3_as_a_loss_follows_the_forward_divergence():
    assert list(ref.gradient(PI, lambda y: 1 - Q[y] / PI[y]).values()) == pytest.approx(
        [0.1, -0.1, -0.1, 0.1], abs=1e-15
    )


def test_t11_without_a_divergence_the_gradient_is_that_of_the_reward():
    assert list(ref.gradient(PI, lambda y: R[y]).values()) == pytest.approx(
        [0.05, -0.18, -0.09, 0.22], abs=1e-15
    )


def test_an_outcome_without_mass_does_not_count():
    p = {"yes": 1.0, "no": 0.0}
    assert ref.expectation(p, lambda y: 3.0 if y == "yes" else math.nan) == 3.0
    assert ref.kl({"yes": 0.5, "no": 0.5}, p) == math.inf
    assert ref.posterior(p, {"yes": 7.0, "no": math.nan}, 1.0) == ({"yes": 1.0, "no": 0.0}, 7.0)


def test_a_large_reward_does_not_overflow():
    posterior, log_z = ref.posterior({"a": 0.5, "b": 0.5}, {"a": 1e300, "b": 0.0}, 1.0)
    assert posterior == {"a": 1.0, "b": 0.0}
    assert log_z == 1e300


weights = st.lists(st.floats(0.01, 1), min_size=2, max_size=6)


@given(
    q=weights,
    p=weights,
    r=st.lists(st.floats(-3, 3), min_size=6, max_size=6),
    lam=st.floats(0.1, 10),
)
def test_the_objective_is_the_evidence_less_the_divergence(q, p, r, lam):
    size = min(len(p), len(q))
    q, p = (
        {i: w / math.fsum(values[:size]) for i, w in enumerate(values[:size])} for values in (q, p)
    )
    posterior, log_z = ref.posterior(q, dict(enumerate(r)), lam)
    terms = lam * log_z, lam * ref.kl(p, posterior)
    scale = max(1, *map(abs, terms), *map(abs, r[:size]), lam * ref.kl(p, q))
    assert (
        abs(ref.objective(p, q, dict(enumerate(r)), lam) - (terms[0] - terms[1])) <= 1e-13 * scale
    )
