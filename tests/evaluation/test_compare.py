"""Comparisons against the course's numbers, the reference, brute force over whole spaces, and every
outcome of sampling.
"""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klrl_edu import reference
from klrl_edu.core.draws import enumerate_executions, seeded_draw
from klrl_edu.core.errors import InfeasibleError, InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.weighted import WeightedSequences
from klrl_edu.evaluation.compare import Comparisons, compare
from klrl_edu.exact import support_sums
from klrl_edu.exact.posterior import Posterior, posterior
from klrl_edu.models.contract import enumerate_support, sequence_log_probs
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.examples import four_sentences, four_sentences_policy, four_sentences_space
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import count_reward, table_reward, text_reward
from klrl_edu.testing import policies, problems
from tests.exact.dictionaries import INF, assert_close, live_tuples, reward_dict, table_dict


def anchor(value):
    return pytest.approx(value, rel=0, abs=5.1e-13)


def table(texts):
    return SequenceTable.from_texts(texts, space=four_sentences_space())


def shannon(p, q):
    middle = {y: (p[y] + q[y]) / 2 for y in p}
    return (reference.kl(p, middle) + reference.kl(q, middle)) / 2


# --- exact ----------------------------------------------------------------------------------------


def test_the_course_numbers_of_t01_and_t03():
    seen = compare(four_sentences_policy(), posterior(four_sentences()))
    assert seen.exact
    assert seen.kl_to_prior == anchor(0.099793472091)
    assert seen.reverse_kl == seen.objective_gap == anchor(0.044037391635)
    assert seen.expected_reward == pytest.approx(0.9, abs=1e-15)
    assert seen.objective == anchor(0.9 - 0.099793472091)
    to_prior = compare(four_sentences_policy(), posterior(four_sentences(INF)))
    assert (to_prior.reverse_kl, to_prior.forward_kl) == (
        anchor(0.099793472091),
        anchor(0.101696829963),
    )


def test_the_course_numbers_of_t07():
    """p = (.3, .4, .2, .1) as a proposal for q, and its own posterior as a policy."""
    auxiliary = table({"the cat": 0.3, "the dog": 0.4, "a cat": 0.2, "a dog": 0.1})
    assert compare(auxiliary, posterior(four_sentences(INF))).effective_sample_size == anchor(
        0.944881889764
    )
    course = four_sentences()
    misled = posterior(Problem(auxiliary, course.reward, 1.0))
    assert compare(misled.model, posterior(course)).objective_gap == anchor(0.021255347883)
    targets = [posterior(Problem(prior, course.reward, 1.0)) for prior in (auxiliary, course.prior)]
    wrong, right = (compare(four_sentences_policy(), target).kl_to_prior for target in targets)
    assert wrong - right == anchor(0.086304621736)


@given(data=st.data())
def test_an_exact_comparison_is_the_references(data):
    problem = data.draw(problems(forbid=False))
    policy = data.draw(policies(problem))
    target, lam = posterior(problem), problem.kl_coef
    tokens = target.enumerated().tokens
    q, r = table_dict(problem.prior), reward_dict(problem)
    star, log_z = reference.posterior(q, r, lam)
    pi = dict.fromkeys(q, 0.0)
    pi |= dict(
        zip(
            live_tuples(problem.space, tokens),
            sequence_log_probs(policy, tokens).exp().tolist(),
            strict=True,
        )
    )
    seen = compare(policy, target)
    scale = max(1.0, abs(lam * log_z), lam * reference.kl(pi, star), lam * reference.kl(pi, q))
    assert_close(seen.reverse_kl, reference.kl(pi, star))
    assert_close(seen.forward_kl, reference.kl(star, pi))
    assert_close(seen.total_variation, math.fsum(abs(pi[y] - star[y]) for y in q) / 2)
    assert_close(seen.jensen_shannon, shannon(pi, star))
    assert_close(seen.expected_reward, reference.expectation(pi, lambda y: r[y]))
    assert_close(seen.kl_to_prior, reference.kl(pi, q))
    assert_close(seen.objective, reference.objective(pi, q, r, lam), scale)
    assert_close(seen.objective_gap, lam * log_z - reference.objective(pi, q, r, lam), scale)
    assert_close(
        seen.effective_sample_size, 1 / math.fsum(star[y] ** 2 / pi[y] for y in q if star[y] > 0)
    )
    assert (seen.uncovered_mass, seen.violating_mass, seen.log_evidence_error) == (0, 0, None)


@given(data=st.data())
def test_the_posterior_compared_with_itself_has_no_distance(data):
    problem = data.draw(problems(extremes=True, kl_coefs=st.sampled_from((0.0, 0.5, 1.0, 5e-324))))
    target = posterior(problem)
    seen = compare(target.model, target)
    assert (
        max(seen.reverse_kl, seen.forward_kl, seen.total_variation, abs(seen.jensen_shannon)) < 1e-9
    )
    assert (seen.uncovered_mass, seen.violating_mass) == (0, 0)
    assert seen.effective_sample_size == pytest.approx(1, abs=1e-9)


def test_at_zero_the_gap_is_the_best_reward_less_the_objective():
    seen = compare(four_sentences_policy(), posterior(four_sentences(0.0)))
    assert seen.reverse_kl == INF
    assert seen.objective == seen.expected_reward == pytest.approx(0.9, abs=1e-15)
    assert seen.objective_gap == pytest.approx(1.1, abs=1e-15)
    assert seen.violating_mass == pytest.approx(0.8, abs=1e-15)


@pytest.mark.parametrize("kind", ["lstm", "gru", "transformer"])
def test_the_stray_mass_of_a_full_softmax_is_that_of_every_other_sequence(kind):
    """A prior with EOS and zeros: brute force over all sequences of the space."""
    space = SequenceSpace(("a", "b", "c"), 4)
    prior = SequenceTable.from_texts(
        {"": 0.1, "a": 0.2, "a b": 0.3, "a b c": 0.15, "c c c": 0.25}, space=space
    )
    model = (
        TransformerModel(space, width=8, heads=2, seed=1)
        if kind == "transformer"
        else RecurrentModel(space, cell=kind, hidden_size=6, seed=1)
    )
    forbidden = {"a b": -INF, "": 0.5, "a": 1.0, "a b c": 0.0, "c c c": -1.0}
    target = posterior(Problem(prior, table_reward(forbidden, space), 1.0))
    seen = compare(model, target)
    everything = space.all_tokens()
    assert len(everything) == space.size == 40
    log_pi = sequence_log_probs(model, everything).detach()
    on_posterior = sequence_log_probs(target.model, everything).detach() > -INF
    assert float(log_pi.exp().sum()) == pytest.approx(1, abs=1e-13)
    assert seen.violating_mass == pytest.approx(float(log_pi[~on_posterior].exp().sum()), rel=1e-12)
    assert (seen.reverse_kl, seen.kl_to_prior, seen.objective, seen.objective_gap) == (
        INF,
        INF,
        -INF,
        INF,
    )
    star, pi = (
        sequence_log_probs(target.model, everything[on_posterior]).detach(),
        log_pi[on_posterior],
    )
    assert seen.forward_kl == pytest.approx(float((star.exp() * (star - pi)).sum()), rel=1e-12)
    assert seen.total_variation == pytest.approx(
        float(((pi.exp() - star.exp()).abs().sum() + seen.violating_mass) / 2), rel=1e-12
    )


def test_a_policy_off_the_support_is_reported_and_not_silently_restricted():
    policy = RecurrentModel(four_sentences_space(), hidden_size=4)
    target = posterior(four_sentences())
    raw, restricted = (
        compare(policy, target),
        compare(restrict_to_support(policy, target.problem.prior), target),
    )
    assert raw.reverse_kl == INF
    assert 0.5 < raw.violating_mass < 1
    assert restricted.violating_mass == 0.0
    assert 0 < restricted.reverse_kl < 1


@settings(max_examples=15)
@given(data=st.data())
def test_a_restricted_policy_strays_exactly_nowhere(data):
    problem = data.draw(problems())
    target = posterior(problem)
    policy = RecurrentModel(problem.space, hidden_size=3, seed=data.draw(st.integers(0, 9)))
    seen = compare(restrict_to_support(policy, target.model), target)
    assert seen.violating_mass == 0.0
    assert seen.uncovered_mass == 0.0
    assert 0 <= seen.reverse_kl < INF


def test_tiny_stray_mass_is_not_lost_in_rounding():
    """1 − Σ on the support would say 0 or a rounding error; the mass off it is e^{−80}·(1 +
    e^{−5}).
    """
    space = four_sentences_space()
    logits = torch.full((5, 4), -INF, dtype=torch.float64)
    policy = PrefixTable(space)
    with torch.no_grad():
        policy.logits.copy_(logits)
        policy.logits[0, :2] = 0.0  # the, a
        policy.logits[1:3, 2:] = 0.0  # cat, dog
        policy.logits[1, 0] = math.log(2) - 80  # 'the the'
        policy.logits[2, 1] = math.log(2) - 85  # 'a a'
    seen = compare(policy, posterior(four_sentences()))
    assert seen.violating_mass == pytest.approx((math.exp(-80) + math.exp(-85)) / 2, rel=1e-12)
    assert seen.reverse_kl == INF


def test_missing_mass_is_uncovered_and_the_forward_divergence_infinite():
    target = posterior(four_sentences())
    seen = compare(table({"the cat": 0.5, "the dog": 0.5}), target)
    assert seen.uncovered_mass == pytest.approx(0.085976452189 + 0.317642414206, abs=1e-11)
    assert (seen.forward_kl, seen.effective_sample_size) == (INF, 0.0)
    assert seen.reverse_kl == pytest.approx(
        0.5 * math.log(0.5 / 0.467416455322) + 0.5 * math.log(0.5 / 0.128964678284), abs=1e-11
    )
    assert seen.violating_mass == 0


def test_particles_are_merged_before_they_are_compared():
    space = four_sentences_space()
    texts, weights = (
        ["the cat", "a dog", "the cat", "a a", "the dog"],
        torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]).double(),
    )
    particles = WeightedSequences(space, space.encode(texts), weights.log(), exact=False)
    target = posterior(four_sentences())
    seen = compare(particles, target)
    merged = {"the cat": 3 / 8, "a dog": 3 / 8}
    star = dict(
        zip(
            ["the cat", "the dog", "a cat", "a dog"],
            (0.467416455322, 0.128964678284, 0.085976452189, 0.317642414206),
            strict=True,
        )
    )
    assert seen.total_variation == pytest.approx(
        (sum(abs(merged.get(y, 0) - star[y]) for y in star) + 2 / 8) / 2, abs=1e-11
    )
    assert seen.violating_mass == pytest.approx(2 / 8, abs=1e-15)
    assert seen.uncovered_mass == pytest.approx(star["the dog"] + star["a cat"], abs=1e-11)
    assert seen.reverse_kl == INF
    assert seen.log_evidence_error == pytest.approx(
        math.log(8) - math.log(2.326218341277), abs=1e-11
    )
    assert seen.effective_sample_size == pytest.approx(64 / 18 / 5, abs=1e-15)


def test_an_exact_table_of_weights_is_the_posterior_it_came_from():
    target = posterior(four_sentences())
    support = target.enumerated()
    weights = WeightedSequences(
        target.problem.space, support.tokens, support.log_prior + support.rewards, exact=True
    )
    seen = compare(weights, target)
    assert abs(seen.log_evidence_error) < 1e-15
    assert max(abs(x) for x in (seen.reverse_kl, seen.forward_kl, seen.objective_gap)) < 1e-15
    assert seen.effective_sample_size == pytest.approx(1, abs=1e-14)


def test_particles_without_any_weight_are_refused():
    space = four_sentences_space()
    dead = WeightedSequences(
        space, space.encode(["a dog"]), torch.tensor([-INF]).double(), exact=False
    )
    with pytest.raises(InfeasibleError):
        compare(dead, posterior(four_sentences()))


def test_several_targets_give_a_row_each_and_the_mean():
    targets = [posterior(four_sentences(lam)) for lam in (0.5, 1.0, 2.0)]
    seen = compare(four_sentences_policy(), targets)
    assert isinstance(seen, Comparisons)
    single = [compare(four_sentences_policy(), target) for target in targets]
    assert list(seen.rows) == single
    assert seen.mean["reverse_kl"] == pytest.approx(
        sum(row.reverse_kl for row in single) / 3, abs=1e-16
    )
    assert "log_evidence_error" not in seen.mean
    assert seen.to_dict()["rows"][1]["reverse_kl"] == single[1].reverse_kl
    assert "problem 2" in str(seen)


def test_it_prints_what_it_knows():
    target = posterior(four_sentences())
    exact, sampled = (
        compare(four_sentences_policy(), target),
        compare(four_sentences_policy(), target, n=5, draw=seeded_draw(0)),
    )
    assert "exact value" in str(exact)
    assert "mean of 5" in str(sampled)
    assert "standard error" in sampled._repr_html_()
    assert exact.to_dict()["standard_error"] == {}


def test_its_summary_says_how_far_and_why():
    problem = four_sentences()
    exact = compare(four_sentences_policy(), posterior(problem))
    assert exact.summary in str(exact)
    assert f"{exact.reverse_kl:.4g} nats from the posterior" in exact.summary
    assert "it covers the posterior" in exact.summary
    argmax = compare(four_sentences_policy(), posterior(four_sentences(0.0))).summary
    assert "KL(π‖π*) is infinite because 0.8 of the policy's mass (violating_mass)" in argmax
    assert "as at λ = 0" in argmax
    assert "read objective_gap = 1.1 instead" in argmax
    half = SequenceTable.from_texts(
        {"the cat": 0.5, "the dog": 0.5, "a cat": 0, "a dog": 0},
        space=four_sentences().prior.space,
    )
    missing = compare(half, posterior(four_sentences())).summary
    assert "it never gives sequences that hold 0.404 of the posterior" in missing
    outside = compare(four_sentences_policy(), posterior(Problem(half, problem.reward, 1.0)))
    assert "lies where the prior has none: restrict_to_support" in outside.summary
    forbids = table_reward({"the cat": 1, "the dog": 0, "a cat": 0, "a dog": -INF}, problem.space)
    hard = compare(four_sentences_policy(), posterior(Problem(problem.prior, forbids, 1.0)))
    assert "0.2 of the policy's mass" in hard.summary
    assert "lies on sequences that the reward forbids (-inf)" in hard.summary


# --- refusals -------------------------------------------------------------------------------------


def test_another_space_is_refused():
    other = SequenceTable.from_texts({"the cat": 0.5, "a cat": 0.5})
    with pytest.raises(InputError, match="different spaces"):
        compare(other, posterior(four_sentences()))


def test_samples_need_a_model_a_draw_and_at_least_two():
    target, policy = posterior(four_sentences()), four_sentences_policy()
    with pytest.raises(InputError, match="draw=seeded_draw"):
        compare(policy, target, n=10)
    support = target.enumerated()
    with pytest.raises(InputError, match="weighted sequences are compared exactly"):
        compare(
            WeightedSequences(policy.space, support.tokens, support.log_prior, exact=True),
            target,
            n=10,
            draw=seeded_draw(0),
        )
    with pytest.raises(InputError, match="n = 1"):
        compare(policy, target, n=1, draw=seeded_draw(0))


def test_an_exact_comparison_needs_the_support_and_samples_do_not():
    whole = posterior(four_sentences())
    bare = Posterior(whole.problem, whole.model, whole.value, whole.log_evidence, "elsewhere")
    with pytest.raises(InputError, match="n=, draw="):
        compare(four_sentences_policy(), bare)
    assert compare(four_sentences_policy(), bare, n=4, draw=seeded_draw(0)).sequences == 4


# --- by samples -----------------------------------------------------------------------------------

UNBIASED = (
    "reverse_kl",
    "forward_kl",
    "total_variation",
    "jensen_shannon",
    "expected_reward",
    "kl_to_prior",
    "objective",
    "objective_gap",
    "uncovered_mass",
    "violating_mass",
)


def every_outcome(policy, target):
    """All comparisons by two samples a side, with their probabilities."""
    executions = enumerate_executions(lambda draw: compare(policy, target, n=2, draw=draw))
    weights = [math.exp(execution.log_prob) for execution in executions]
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    return [execution.result for execution in executions], weights


@pytest.mark.parametrize("kl_coef", [0.5, 1.0])
def test_sampled_means_are_unbiased_over_every_outcome(kl_coef):
    policy, target = four_sentences_policy(), posterior(four_sentences(kl_coef))
    results, weights = every_outcome(policy, target)
    assert len(results) == 4**4
    exact = compare(policy, target)
    for name in UNBIASED:
        mean = math.fsum(
            w * getattr(result, name) for w, result in zip(weights, results, strict=True)
        )
        assert mean == pytest.approx(getattr(exact, name), abs=1e-12), name


def test_squared_standard_errors_are_unbiased_for_the_variance():
    """E[se²] = Var[mean]: the sample variance over n, metric by metric (with n = 2 the sample
    variance itself is unbiased).
    """
    results, weights = every_outcome(four_sentences_policy(), posterior(four_sentences()))
    for name in UNBIASED:
        values = [getattr(result, name) for result in results]
        mean = math.fsum(w * v for w, v in zip(weights, values, strict=True))
        variance = math.fsum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
        reported = math.fsum(
            w * result.standard_error[name] ** 2 for w, result in zip(weights, results, strict=True)
        )
        assert reported == pytest.approx(variance, abs=1e-12), name


def test_sampled_means_find_the_mass_that_one_side_lacks():
    space = SequenceSpace(("a", "b", "c"), 1, eos=False)
    prior = SequenceTable.from_texts({"a": 0.5, "b": 0.5}, space=space)
    target = posterior(Problem(prior, text_reward(lambda text: 0.0, space), 1.0))
    policy = SequenceTable.from_texts({"a": 0.25, "c": 0.75}, space=space)
    results, weights = every_outcome(policy, target)
    for name, expected in (
        ("violating_mass", 0.75),
        ("uncovered_mass", 0.5),
        ("total_variation", 0.75),
    ):
        assert math.fsum(
            w * getattr(result, name) for w, result in zip(weights, results, strict=True)
        ) == pytest.approx(expected, abs=1e-12)
    assert {result.reverse_kl for result in results if result.violating_mass > 0} == {INF}
    assert {
        result.standard_error["reverse_kl"] for result in results if result.violating_mass > 0
    } == {INF}


def test_at_zero_the_sampled_objective_is_the_reward():
    target = posterior(four_sentences(0.0))
    results, weights = every_outcome(four_sentences_policy(), target)
    assert math.fsum(
        w * result.objective for w, result in zip(weights, results, strict=True)
    ) == pytest.approx(0.9, abs=1e-12)
    assert math.fsum(
        w * result.objective_gap for w, result in zip(weights, results, strict=True)
    ) == pytest.approx(1.1, abs=1e-12)


def test_the_same_seed_gives_the_same_comparison():
    target = posterior(four_sentences())
    first, second = (
        compare(four_sentences_policy(), target, n=50, draw=seeded_draw(3)).to_dict()
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("kl_coef", [0.0, 1.0])
def test_a_policy_off_the_prior_s_support_has_no_objective_at_any_kl_coef(kl_coef):
    problem = four_sentences(kl_coef)
    found = compare(RecurrentModel(problem.space, hidden_size=4), posterior(problem))
    assert (found.objective, found.objective_gap, found.kl_to_prior) == (
        -math.inf,
        math.inf,
        math.inf,
    )


def test_sampled_numbers_at_infinite_kl_coef_are_infinite_and_never_nan():
    found = compare(
        four_sentences_policy(), posterior(four_sentences(math.inf)), n=50, draw=seeded_draw(0)
    )
    assert found.objective == -math.inf
    assert not any(math.isnan(value) for value in found.metrics().values() if value is not None)


def test_the_error_of_a_sampled_sample_size_is_that_of_a_reciprocal():
    target, policy, n = posterior(four_sentences()), four_sentences_policy(), 50
    seen = compare(policy, target, n=n, draw=seeded_draw(3))
    draw = seeded_draw(3)
    policy.sample(n, draw=draw)  # the policy's come first
    theirs = target.model.sample(n, draw=draw)
    logs = (sequence_log_probs(model, theirs).detach() for model in (target.model, policy))
    weights = [
        math.exp(star - mine) for star, mine in zip(*(x.tolist() for x in logs), strict=True)
    ]
    mean, error = statistics.fmean(weights), statistics.stdev(weights) / math.sqrt(n)
    assert seen.effective_sample_size == pytest.approx(1 / mean, rel=1e-12)
    # by the delta method: |d(1/m)/dm| = 1/m²
    assert seen.standard_error["effective_sample_size"] == pytest.approx(error / mean**2, rel=1e-12)


# --- what is no number, and what is too small for one ---------------------------------------------


@pytest.mark.parametrize("weights", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [RecurrentModel, PrefixTable])
def test_a_policy_of_nan_is_refused_and_gives_no_table(kind, weights):
    problem = four_sentences()
    policy = kind(problem.space)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(weights)
    with pytest.raises(InputError, match=r"NaN"):
        compare(policy, posterior(problem))
    with pytest.raises(InputError, match=r"NaN"):
        compare(policy, posterior(problem), n=4, draw=seeded_draw(0))


def test_each_number_of_a_sampled_comparison_is_refused_or_meant():
    target, policy = posterior(four_sentences()), four_sentences_policy()
    for n in (math.nan, INF, -1, 0, 1, True, 2.0, 1e30, 1j, "2"):
        with pytest.raises(InputError, match=r"n = .* must be a whole number of at least 2"):
            compare(policy, target, n=n, draw=seeded_draw(0))


@pytest.mark.parametrize("log_mass", [-700.0, -744.0, -800.0, -1e300])
def test_a_forbidden_sequence_costs_everything_however_little_mass_it_has(log_mass):
    space = SequenceTable.from_texts({"a": 0.5, "b": 0.5}).space
    prior = SequenceTable.from_texts({"a": 0.5, "b": 0.5})
    hard = Problem(prior, table_reward({"a": 1.0, "b": -INF}, space), 1.0)
    faint = SequenceTable(space, prior.tokens, torch.tensor([0.0, log_mass], dtype=torch.float64))
    seen = compare(faint, posterior(hard))
    assert (seen.expected_reward, seen.objective) == (-INF, -INF)
    assert (seen.objective_gap, seen.reverse_kl) == (INF, INF)
    little = "too little for a float" if log_mass < -750 else f"{math.exp(log_mass):.3g} of the pol"
    assert little in seen.summary


@pytest.mark.parametrize("mass", [4e-18, 1e-300, 1e-3])
def test_a_total_variation_of_almost_nothing_keeps_its_digits(mass):
    space = SequenceTable.from_texts({"a": 0.5, "b": 0.5}).space

    def with_rest_on_a(p):
        logs = torch.tensor([math.log1p(-p), math.log(p)], dtype=torch.float64)
        return SequenceTable(space, space.encode(["a", "b"]), logs)

    # at λ = inf the posterior is the prior
    target = posterior(Problem(with_rest_on_a(2 * mass), count_reward("a", space), INF))
    seen = compare(with_rest_on_a(mass), target)
    assert seen.total_variation == pytest.approx(mass, rel=1e-12, abs=0)


def test_an_exact_table_that_sums_to_one_says_nothing_of_the_evidence():
    target = posterior(four_sentences())
    assert compare(enumerate_support(target.model), target).log_evidence_error is None
    assert compare(target.model, target).log_evidence_error is None


def test_a_total_variation_is_taken_from_the_side_that_rounding_leaves_alone():
    # the normaliser's rounding, 1e-16, stands on the large outcome of q
    log_p = torch.tensor([0.0, math.log(4e-18)], dtype=torch.float64)
    log_q = torch.tensor([-1.2e-16, math.log(8e-18)], dtype=torch.float64)
    for one, other in ((log_p, log_q), (log_q, log_p)):
        seen = float(support_sums._total_variation(one, other))
        assert seen == pytest.approx(4e-18, rel=1e-12, abs=0)
    assert float(support_sums._total_variation(log_p, log_p)) == 0
