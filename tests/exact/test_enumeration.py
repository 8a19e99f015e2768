"""Posteriors by enumeration against mpmath, the identities of the theory, and the limits of λ."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu import reference
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.core.errors import InfeasibleError, InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.estimators.kl_values import per_token_kl
from klrl_edu.exact.enumeration import problem_support
from klrl_edu.exact.posterior import posterior
from klrl_edu.models.contract import LanguageModel, conditional_log_probs, sequence_log_probs
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward, text_reward
from klrl_edu.testing import KL_COEFS, policies, problems
from tests.exact.dictionaries import (
    INF,
    assert_close,
    live_tuples,
    mpmath_posterior,
    reward_dict,
    table_dict,
    text_dict,
)

positive = st.sampled_from((*KL_COEFS, 5e-324, 1e-300, 1e300)) | st.floats(0.01, 100)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def three(*values, kl_coef, probs=(0.5, 0.3, 0.2)):
    """Three texts, of which a zero probability leaves two, with their rewards."""
    space = SequenceSpace(("a", "b", "c"), 1, eos=False)
    prior = SequenceTable.from_texts(["a", "b", "c"], probs, space=space)
    return Problem(prior, table_reward(dict(zip("abc", values, strict=True)), space), kl_coef)


def probabilities(problem, method="auto"):
    target = posterior(problem, method)
    seen = text_dict(problem.space, target.enumerated().tokens, target.log_probs.exp())
    return [seen.get(text, 0.0) for text in problem.space.vocabulary]


# --- the identities -------------------------------------------------------------------------------


@given(data=st.data())
def test_the_posterior_agrees_with_mpmath_also_at_extremes(data):
    problem = data.draw(problems(kl_coefs=positive, extremes=True))
    expected, value, scale = mpmath_posterior(problem)
    target = posterior(problem, "enumeration")
    support = target.enumerated()
    keys = live_tuples(problem.space, support.tokens)
    assert set(keys) == set(expected)
    assert_close(support.log_prior, [float(expected[key][0]) for key in keys])
    assert_close(target.log_probs, [float(expected[key][1]) for key in keys], float(scale))
    top = max(r for r in reward_dict(problem).values() if not math.isnan(r))
    assert_close(float(target.value), float(value), max(abs(top), problem.kl_coef * float(scale)))


@given(data=st.data())
def test_the_posterior_agrees_with_the_reference(data):
    problem = data.draw(problems())
    target = posterior(problem, "enumeration")
    expected, log_z = reference.posterior(
        table_dict(problem.prior), reward_dict(problem), problem.kl_coef
    )
    support = target.enumerated()
    assert_close(
        target.log_probs.exp(),
        [expected[key] for key in live_tuples(problem.space, support.tokens)],
    )
    assert_close(float(target.log_evidence), log_z)
    assert_close(float(target.value), problem.kl_coef * log_z)
    assert_close(sequence_log_probs(target.model, support.tokens).detach(), target.log_probs)


@given(data=st.data())
def test_the_objective_is_the_evidence_less_the_divergence(data):
    """J(π) = λ log Z − λ KL(π‖π*), within 1e-12 of the largest term; both are −inf where π meets a
    forbidden text.
    """
    problem = data.draw(problems())
    policy = data.draw(policies(problem))
    target = posterior(problem)
    support, lam = target.enumerated(), problem.kl_coef
    log_pi = sequence_log_probs(policy, support.tokens).detach()
    reward, divergence = (
        logspace.expectation(log_pi, support.rewards),
        logspace.kl_divergence(log_pi, support.log_prior),
    )
    gap = lam * logspace.kl_divergence(log_pi, target.log_probs)
    terms = [float(x.abs()) for x in (target.value, reward, lam * divergence, gap)]
    assert_close(reward - lam * divergence, target.value - gap, max(x for x in terms if x < INF))


@given(data=st.data())
def test_the_divergence_of_sequences_is_the_sum_over_tokens(data):
    """KL(π‖q) = Σ_t E_π[KL(π(·|y_<t)‖q(·|y_<t))], along enumerated prefixes."""
    problem = data.draw(problems())
    policy = data.draw(policies(problem))
    tokens = problem_support(problem).tokens
    log_pi, log_q = (
        sequence_log_probs(model, tokens).detach() for model in (policy, problem.prior)
    )
    per_token = per_token_kl(
        *(conditional_log_probs(model, tokens).detach() for model in (policy, problem.prior))
    )
    assert per_token.shape == tokens.shape
    assert_close(
        logspace.expectation(log_pi, per_token.sum(-1)), logspace.kl_divergence(log_pi, log_q)
    )
    seen = {
        key: math.exp(x)
        for key, x in zip(live_tuples(problem.space, tokens), log_pi.tolist(), strict=True)
    }
    assert_close(
        logspace.kl_divergence(log_pi, log_q), reference.kl(seen, table_dict(problem.prior))
    )


@given(data=st.data())
def test_log_evidence_differentiates_to_the_expected_reward(data):
    """d log Z/d(1/λ) = E_π*[r], by mpmath's numerical derivative in 50 digits."""
    problem = data.draw(problems(forbid=False))
    q, r = table_dict(problem.prior), reward_dict(problem)

    def log_z(beta):
        return mpmath.log(
            mpmath.fsum(
                mpmath.mpf(q[y]) * mpmath.exp(beta * mpmath.mpf(r[y])) for y in q if q[y] > 0
            )
        )

    target = posterior(problem)
    with mpmath.workdps(50):
        slope = float(mpmath.diff(log_z, 1 / mpmath.mpf(problem.kl_coef)))
    assert_close(float(logspace.expectation(target.log_probs, target.enumerated().rewards)), slope)


@given(data=st.data())
def test_tilting_differentiates_to_posterior_and_posterior_over_prior(data):
    """∂ value/∂r = π* and ∂ value/∂ log q = λπ*, also through −inf entries."""
    problem = data.draw(problems())
    support = problem_support(problem)
    log_prior, rewards = (
        torch.cat([x, vector(-INF)]).requires_grad_() for x in (support.log_prior, support.rewards)
    )
    tilted = tilt(log_prior, rewards, problem.kl_coef)
    by_prior, by_reward = torch.autograd.grad(tilted.value, (log_prior, rewards))
    star = tilted.log_posterior.detach().exp()
    assert_close(by_reward, star)
    assert_close(by_prior, problem.kl_coef * star)


def test_the_course_numbers_of_the_four_sentences():
    target = posterior(four_sentences())
    assert float(target.log_evidence.exp()) == pytest.approx(2.326218341277, abs=5.1e-13)
    expected = {
        "the cat": 0.467416455322,
        "the dog": 0.128964678284,
        "a cat": 0.085976452189,
        "a dog": 0.317642414206,
    }
    seen = text_dict(target.problem.space, target.enumerated().tokens, target.log_probs.exp())
    assert seen == pytest.approx(expected, abs=5.1e-13)


# --- limits and hazards ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
def test_at_zero_the_posterior_is_the_prior_on_the_best(method):
    problem = three(2.0, 2.0, 1.0, kl_coef=0.0)
    assert probabilities(problem, method) == pytest.approx([0.625, 0.375, 0.0], abs=1e-15)
    target = posterior(problem, method)
    assert (float(target.value), float(target.log_evidence)) == (2.0, INF)


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
@pytest.mark.parametrize(("top", "log_evidence"), [(-2.0, -INF), (0.0, math.log(0.8)), (3.0, INF)])
def test_at_zero_the_evidence_overflows_unless_the_best_reward_is_zero(method, top, log_evidence):
    target = posterior(three(top, top, top - 1, kl_coef=0), method)
    assert float(target.value) == top
    assert float(target.log_evidence) == pytest.approx(log_evidence, abs=1e-15)


def test_at_zero_rewards_an_ulp_apart_are_no_tie():
    assert probabilities(three(1.0, math.nextafter(1.0, 2.0), 0.0, kl_coef=0)) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
def test_at_infinity_the_posterior_is_the_prior(method):
    problem = three(2.0, -1.0, 0.5, kl_coef=INF)
    assert probabilities(problem, method) == pytest.approx([0.5, 0.3, 0.2], abs=1e-15)
    target = posterior(problem, method)
    assert float(target.value) == pytest.approx(0.5 * 2 - 0.3 + 0.1, abs=1e-15)
    assert float(target.log_evidence) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
def test_at_infinity_a_forbidden_text_stays_forbidden(method):
    problem = three(2.0, -INF, 0.5, kl_coef=INF)
    assert probabilities(problem, method) == pytest.approx([5 / 7, 0.0, 2 / 7], abs=1e-15)
    assert float(posterior(problem, method).log_evidence) == pytest.approx(math.log(0.7), abs=1e-15)


@pytest.mark.parametrize(
    ("kl_coef", "expected"), [(1e-9, [0.625, 0.375, 0.0]), (1e12, [0.5, 0.3, 0.2])]
)
def test_the_limits_are_where_finite_coefficients_go(kl_coef, expected):
    assert probabilities(three(2.0, 2.0, 1.0, kl_coef=kl_coef)) == pytest.approx(
        expected, abs=1e-11
    )


@pytest.mark.parametrize("bad", [-1.0, -5e-324, math.nan, -INF, "much", None])
def test_a_bad_coefficient_is_refused(bad):
    with pytest.raises(InputError, match="kl_coef"):
        four_sentences(bad)
    with pytest.raises(InputError, match="kl_coef"):
        tilt(vector(0.0), vector(0.0), bad)


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
@pytest.mark.parametrize(
    ("high", "kl_coef"), [(1e308, 0.1), (1.0, 5e-324), (1e308, 5e-324), (-1e308, 0.1)]
)
def test_huge_rewards_and_tiny_coefficients_stay_finite(method, high, kl_coef):
    problem = three(high, high, math.nextafter(high, -INF), kl_coef=kl_coef)
    assert probabilities(problem, method) == pytest.approx([0.625, 0.375, 0.0], abs=1e-14)
    target = posterior(problem, method)
    assert float(target.value) == high
    assert float(target.log_evidence) == math.copysign(INF, high)


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
@pytest.mark.parametrize("kl_coef", [0.0, 1.0, INF])
def test_a_forbidden_text_has_exactly_no_mass(method, kl_coef):
    problem = three(-INF, 1.0, 1.0, kl_coef=kl_coef)
    assert probabilities(problem, method) == pytest.approx([0.0, 0.6, 0.4], abs=1e-15)
    target = posterior(problem, method)
    assert sequence_log_probs(target.model, problem.space.encode(["a"])).tolist() == [-INF]


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
@pytest.mark.parametrize("kl_coef", [0.0, 1.0, INF])
def test_nothing_allowed_is_infeasible_and_says_how_many(method, kl_coef):
    with pytest.raises(InfeasibleError, match=r"2 of 2.*empty.*Relax"):
        posterior(three(-INF, -INF, 1.0, kl_coef=kl_coef, probs=(0.5, 0.5, 0.0)), method)
    with pytest.raises(InfeasibleError, match=r"2 of 2"):
        tilt(vector(-0.7, -0.7, -INF), vector(-INF, -INF, 1.0), kl_coef)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_bad_reward_on_the_support_raises_with_the_text(bad):
    space = SequenceSpace(("the", "cat", "dog"), 2, eos=False)
    prior = SequenceTable.from_texts({"the cat": 0.5, "the dog": 0.5}, space=space)
    with pytest.raises(InputError, match=r"'the dog', is (nan|inf).*-inf to forbid"):
        posterior(
            Problem(prior, text_reward(lambda text: bad if text == "the dog" else 0.0, space), 1.0)
        )


@pytest.mark.parametrize("bad", [math.nan, INF, -INF, 1e308])
@pytest.mark.parametrize("kl_coef", [0.0, 1.0, INF])
def test_a_reward_off_the_support_is_ignored(bad, kl_coef):
    assert probabilities(
        three(1.0, 1.0, bad, kl_coef=kl_coef, probs=(0.25, 0.75, 0.0))
    ) == pytest.approx([0.25, 0.75, 0.0], abs=1e-15)
    tilted = tilt(vector(0.25, 0.75, 0.0).log(), vector(1.0, 1.0, bad), kl_coef)
    assert tilted.log_posterior.exp().tolist() == pytest.approx([0.25, 0.75, 0.0], abs=1e-15)


class Uniform(LanguageModel):
    """Equal logits that cost no memory."""

    def __init__(self, space):
        super().__init__()
        self.space = space

    def forward(self, tokens, prompt=None):
        return torch.zeros((), dtype=torch.float64).expand(*tokens.shape, self.space.vocab_size)


def test_a_space_of_50257_to_the_20_is_refused_with_its_count():
    space = SequenceSpace(tuple(f"w{i}" for i in range(50257)), 20, eos=False)
    assert space.size == 50257**20
    with pytest.raises(TooLargeError, match=r"max_sequences = 1,000,000.*about 10\^94.*by samples"):
        posterior(Problem(Uniform(space), lambda tokens, prompt: torch.zeros(len(tokens)), 1.0))


def test_the_limit_on_sequences_is_the_callers():
    assert len(problem_support(four_sentences(), max_sequences=4).tokens) == 4
    with pytest.raises(TooLargeError, match="max_sequences = 3"):
        posterior(four_sentences(), max_sequences=3)
