"""The strategies give what they promise, and reach every corner that they name."""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from klrl_edu import testing
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.contract import sequence_log_probs
from klrl_edu.models.restricted import RestrictedModel
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.problem import Problem

INF = math.inf


@given(space=testing.spaces(max_words=2, max_length=3))
def test_spaces_stay_within_their_bounds(space):
    assert len(space.vocabulary) <= 2
    assert space.max_length <= 3


@pytest.mark.parametrize(
    "of_size",
    [
        lambda n: testing.spaces(max_words=n),
        lambda n: testing.spaces(max_length=n),
        testing.log_weights,
        testing.distributions,
        lambda n: testing.sequence_tables(SequenceSpace(("a", "b"), 2), max_sequences=n),
    ],
)
def test_a_size_is_a_whole_number_above_zero(of_size):
    for size in (math.nan, math.inf, -math.inf, -1, 0, True, 1e30, 1j):
        with pytest.raises(InputError, match=r"= .* must be a whole number of at least 1\."):
            find(of_size(size), lambda _: True)
    with pytest.raises(InputError, match="max_words = 13 must be at most 12"):
        find(testing.spaces(max_words=13), lambda _: True)


@given(log_p=testing.log_probs(4), p=testing.distributions())
def test_distributions_sum_to_one(log_p, p):
    assert log_p.shape == (4,)
    assert math.fsum(log_p.exp().tolist()) == pytest.approx(1, abs=1e-12)
    assert math.fsum(p.tolist()) == pytest.approx(1, abs=1e-12)
    assert not log_p.isnan().any()


@given(problem=testing.problems(extremes=True))
def test_problems_have_a_supported_sequence_with_a_finite_reward(problem):
    supported = problem.prior.tokens[problem.prior.log_probs > -INF]
    assert (problem.rewards(supported) > -INF).any()
    assert problem.kl_coef >= 0


@given(problem=testing.problems(forbid=False))
def test_problems_that_forbid_nothing_have_finite_rewards_and_positive_kl_coefs(problem):
    supported = problem.prior.tokens[problem.prior.log_probs > -INF]
    assert torch.isfinite(problem.rewards(supported)).all()
    assert 0 < problem.kl_coef < INF


@given(problem=testing.problems(), data=st.data())
def test_policies_have_exactly_the_support_of_the_prior(problem, data):
    policy = data.draw(testing.policies(problem))
    tokens = problem.space.all_tokens()
    assert torch.equal(
        sequence_log_probs(policy, tokens) > -INF, sequence_log_probs(problem.prior, tokens) > -INF
    )


def rewards_of(problem: Problem) -> torch.Tensor:
    return problem.rewards(problem.prior.tokens[problem.prior.log_probs > -INF])


SEARCHED = {
    "a row of the prior without mass": lambda p: bool((p.prior.log_probs == -INF).any()),
    "tied prior rows": lambda p: len(set(p.prior.log_probs.tolist())) < len(p.prior.tokens),
    "a forbidden sequence": lambda p: bool((rewards_of(p) == -INF).any()),
    "equal rewards": (
        lambda p: len(rewards_of(p)) > 2 and bool((rewards_of(p) == rewards_of(p)[0]).all())
    ),
    "a causal reward": lambda p: p.reward(p.prior.tokens, None).ndim == 2,
    "a huge reward": lambda p: bool((rewards_of(p) > 1e299).any()),
    "lambda zero": lambda p: p.kl_coef == 0,
    "lambda inf": lambda p: p.kl_coef == INF,
    "texts of several lengths": lambda p: p.space.eos and p.space.max_length == 3,
}


@pytest.mark.parametrize("what", SEARCHED)
def test_problems_reach(what):
    checks = list(HealthCheck)
    quick = settings(
        derandomize=True,
        max_examples=400,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=checks,
    )
    find(testing.problems(extremes=True), SEARCHED[what], settings=quick)


OFTEN = (
    *(
        "a row of the prior without mass",
        "tied prior rows",
        "a forbidden sequence",
        "equal rewards",
    ),
    *("a huge reward", "lambda zero", "lambda inf"),
)


def test_hard_cases_occur_often_by_construction():
    """At least eight of 400 problems each; Hypothesis gave 6 to 43 % over twelve runs, and repeats
    itself only on the same installation.
    """
    seen = []

    @settings(
        derandomize=True,
        max_examples=400,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(problem=testing.problems(extremes=True))
    def look(problem):
        seen.append({what for what in OFTEN if SEARCHED[what](problem)})

    look()
    counts = {what: sum(what in case for case in seen) for what in OFTEN}
    assert {what: count for what, count in counts.items() if count < 8} == {}


@pytest.mark.parametrize("kind", [SequenceTable, RestrictedModel])
def test_policies_reach_both_kinds(kind):
    problem = Problem(
        SequenceTable.from_texts({"a": 0.5, "b": 0.5}),
        lambda tokens, prompt: tokens[:, 0].double(),
        1.0,
    )
    assert isinstance(
        find(testing.policies(problem), lambda policy: isinstance(policy, kind)), kind
    )
