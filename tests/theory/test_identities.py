"""The registry of identities: every statement holds, every broken twin is caught, and what the
check itself does with NaN and misfits.
"""

import math
from dataclasses import fields, replace

import pytest
import torch

from klrl_edu import reference
from klrl_edu.closed_forms import acceptance, regularizers
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.estimators import divergences as sample_divergences
from klrl_edu.estimators import evidence, kl_gradients, kl_values
from klrl_edu.learning import losses
from klrl_edu.theory import (
    cases,
    decisions,
    divergences,
    gradients,
    identities,
    posteriors,
    preferences,
    sampling,
    sequences,
)
from klrl_edu.theory.cases import Case, random_cases
from klrl_edu.theory.identities import (
    IDENTITIES,
    check_identities,
    find_identity,
    identities_markdown,
    table_math,
)
from klrl_edu.theory.statements import Statement, error, identity, try_statement, twin_is_caught

CASES = list(random_cases(2, 25))
ASKED_FOR = {
    *(
        "elbo",
        "chain_rule",
        "bellman_root",
        "bellman_policy",
        "sequential_bayes",
        "pythagoras",
        "three_points",
        "reward_fluctuation",
    ),
    *(
        "score_has_mean_zero",
        "mirror_descent_path",
        "rloo_is_vargrad",
        "trajectory_balance",
        "path_consistency",
        "dpo_optimum",
    ),
    *(
        "best_of_n_divergence",
        "pinsker",
        "data_processing",
        "potential_shaping",
        "pseudo_log_likelihood",
        "importance_sampling",
    ),
    "sequential_monte_carlo",
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_statement_holds_on_problems_of_another_seed(name):
    assert try_statement(IDENTITIES[name], CASES).error <= IDENTITIES[name].tolerance


@pytest.mark.parametrize("name", IDENTITIES)
def test_its_broken_twin_is_caught(name):
    assert IDENTITIES[name].twin.slip
    assert twin_is_caught(IDENTITIES[name], CASES)


@pytest.mark.parametrize("name", IDENTITIES)
def test_it_says_what_it_is_and_where_it_comes_from(name):
    statement = IDENTITIES[name]
    assert statement.about.endswith((".", ")"))
    assert "\n" not in statement.about
    assert statement.latex.count("{") == statement.latex.count("}")
    assert statement.source
    assert statement.tutorial in {f"t{n:02}" for n in range(1, 15)}
    assert statement.tolerance == 1e-12  # no tolerance was widened


def test_what_the_theory_rests_on_is_there():
    assert len(IDENTITIES) >= 40
    assert set(IDENTITIES) >= ASKED_FOR


def test_a_twin_fails_by_more_than_rounding():
    """A twin that failed by a hair would show a tolerance, not a mistake."""
    for statement in IDENTITIES.values():
        errors = (error(statement.relation, *statement.twin_sides(case)) for case in CASES)
        assert any(found > 1e-4 for found in errors), statement.name


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_twin_without_a_slip_is_noticed_under_whatever_name(name):
    """The statement itself for a twin, renamed, its sides asked for before or after numbers are
    drawn: nothing but a slip may make a twin fail.
    """
    sound = replace(IDENTITIES[name], twin=None, name="renamed")

    def sides_first(case):
        return sound.sides(case)[0], sound.function(case)[1]

    def draws_first(case):
        _, right = sound.function(case)
        return sound.sides(case)[0], right

    for no_slip in (sound.function, sound.sides, sides_first, draws_first):
        sound.broken("no slip at all", no_slip)
        assert not twin_is_caught(sound, CASES[:8])


class SameDraws(Case):
    """A case whose every draw starts its noise again, so that a twin that draws more or less than
    its statement, or in another order, still sees the statement's numbers.
    """

    def normal(self, *shape, scale=1.0):
        self.noise.seed(self.key)
        return super().normal(*shape, scale=scale)

    def draws(self, count, size):
        self.noise.seed(self.key)
        return super().draws(count, size)


SAME_DRAWS = [
    SameDraws(**{field.name: getattr(case, field.name) for field in fields(case)}) for case in CASES
]


ONE_POLICY_FOR_TWO = "performance_difference"  # what it compares is one where draws are the same


@pytest.mark.parametrize("name", [name for name in IDENTITIES if name != ONE_POLICY_FOR_TWO])
def test_a_twin_fails_by_its_slip_and_not_by_other_numbers(name):
    assert twin_is_caught(IDENTITIES[name], SAME_DRAWS)


def test_a_twin_that_fails_by_other_numbers_alone_is_told():
    drifting = replace(IDENTITIES["rloo_is_vargrad"], twin=None)
    once = drifting.function  # run twice on one noise, it sees other numbers the second time
    drifting.broken("no slip at all", lambda case: (once(case)[0], once(case)[1]))
    assert twin_is_caught(drifting, CASES)
    assert not twin_is_caught(drifting, SAME_DRAWS)


# --- a wrong package ------------------------------------------------------------------------------


def times(factor, part=None):
    """What a function returns, or a part of it, stretched."""

    def wrap(function):
        def stretched(*args, **options):
            found = function(*args, **options)
            if part is None:
                return factor * found
            return with_part(found, part, factor * getattr(found, part))

        return stretched

    return wrap


def with_part(found, part, value):
    """A result, a NamedTuple or a dataclass, with another value of one part."""
    return (
        found._replace(**{part: value})
        if hasattr(found, "_replace")
        else replace(found, **{part: value})
    )


def spread_out(function):
    """log-probabilities that lie wider apart than they should, normalised again."""
    return lambda *args, **options: torch.log_softmax(1.1 * function(*args, **options), -1)


def wider(part, factor=1.1):
    """The same, of a part of what is returned."""

    def wrap(function):
        def stretched(*args, **options):
            found = function(*args, **options)
            wide = factor * getattr(found, part)
            return with_part(found, part, wide - torch.logsumexp(wide, -1, keepdim=True))

        return stretched

    return wrap


def argument(place, factor):
    """The function called with one argument stretched."""

    def wrap(function):
        def stretched(*args, **options):
            changed = list(args)
            changed[place] = factor * changed[place]
            return function(*changed, **options)

        return stretched

    return wrap


def instead(other):
    """Another function in its place."""
    return lambda function: other


def unnormalised(function):
    """Under forward KL λq/(ν − r) balances for every ν, and sums to one for one of them."""

    def stretched(log_prior, rewards, kl_coef):
        found = function(log_prior, rewards, kl_coef)
        nu = rewards.amax() + 3 * kl_coef
        return found._replace(log_probs=log_prior + torch.log(kl_coef / (nu - rewards)))

    return stretched


def another_threshold(function):
    """Under χ² the same, with ν moved."""

    def stretched(log_prior, rewards, kl_coef):
        found = function(log_prior, rewards, kl_coef)
        nu = found.normaliser - kl_coef / 10
        linear = (1 + (rewards - nu) / kl_coef).clamp(min=0)
        return found._replace(log_probs=log_prior + linear.log(), normaliser=nu)

    return stretched


def path_of_another_shape(function):
    """The last λ_t of mirror descent is right, and those before it are not."""

    def stretched(*args):
        found = function(*args).clone()
        found[1:-1] *= 1.1
        return found

    return stretched


def lazy(function):
    """A chain that stays where it is every other time is reversible too."""

    def stretched(*args):
        found = function(*args)
        return (found + torch.eye(len(found), dtype=found.dtype)) / 2

    return stretched


def through_float32(function):
    def rounded(automaton, value, otherwise):
        return function(automaton, *torch.tensor([value, otherwise]).tolist())

    return rounded


def baseline_of_the_sample(function):
    """The baseline's part of the loss, weighed by the sample."""
    return lambda batch, baseline=0.0: function(batch, baseline * batch.prior_log_probs.sum(-1))


def at_the_limit_as_near_it(function):
    return lambda log_prior, rewards, kl_coef: function(log_prior, rewards, max(kl_coef, 0.3))


def at_another_kl_coef(function):
    return lambda problem: function(replace(problem, kl_coef=1.1 * problem.kl_coef))


# statement: where the package is broken, and how
WRONG_PACKAGES = {
    "elbo": (cases, "tilt", times(1.1, "value")),
    "evidence_is_attained": (cases, "tilt", wider("log_posterior")),
    "variational_bound": (cases, "posterior", times(0.9, "value")),
    "sequential_bayes": (posteriors, "tilt", argument(1, 1.1)),
    "evidence_chain_rule": (posteriors, "tilt", times(1.1, "value")),
    "reward_shift": (posteriors, "tilt", times(1.1, "value")),
    "reward_scale": (posteriors, "tilt", argument(2, 1.1)),
    "posterior_odds": (cases, "posterior", at_another_kl_coef),
    "value_gradient": (posteriors, "tilt", times(1.1, "value")),
    "evidence_derivative": (cases, "tilt", wider("log_posterior")),
    "reward_fluctuation": (cases, "tilt", wider("log_posterior")),
    "frontier_slope": (cases, "tilt", wider("log_posterior")),
    "thermodynamic_integral": (cases, "tilt", times(1.1, "log_evidence")),
    "mirror_descent_path": (posteriors, "mirror_descent_kl_coefs", path_of_another_shape),
    "large_kl_coef": (posteriors, "tilt", argument(1, 1.1)),
    "divergence_is_capped": (posteriors, "tilt", at_the_limit_as_near_it),
    "soft_maximum": (cases, "posterior", times(1.1, "value")),
    "chain_rule": (sequences, "conditional_log_probs", spread_out),
    "entropy_chain_rule": (sequences, "conditional_log_probs", spread_out),
    "bellman_root": (sequences, "soft_bellman", times(1.1, "state_values")),
    "bellman_policy": (sequences, "soft_bellman", times(1.1, "log_policy")),
    "path_consistency": (sequences, "soft_bellman", times(1.1, "state_values")),
    "value_of_a_prefix": (sequences, "soft_bellman", times(1.1, "state_values")),
    "forward_backward": (sequences, "accept_reward", through_float32),
    "potential_shaping": (sequences, "soft_bellman", argument(1, 1.1)),
    "score_has_mean_zero": (losses, "reinforce", baseline_of_the_sample),
    "policy_gradient": (losses, "reinforce", times(1.1)),
    "gradient_of_the_gap": (cases, "tilt", wider("log_posterior")),
    "distributional_gradient": (losses, "f_dpg", times(1.1)),
    "natural_gradient": (logspace, "kl_divergence", times(1.1)),
    "best_baseline": (gradients, "best_scalar_baseline", times(1.1)),
    "k1_as_loss": (kl_gradients, "loss_k1", instead(kl_gradients.loss_absolute_k1)),
    "k2_as_loss": (kl_gradients, "loss_k2", times(1.1)),
    "k3_as_loss": (kl_gradients, "loss_k3", times(1.1)),
    "k1_in_reward": (kl_gradients, "reward_k1", times(1.1)),
    "k3_in_reward": (kl_gradients, "reward_k3", times(1.1)),
    "placements_add_up": (kl_gradients, "reward_and_loss_k2", times(1.1)),
    "rloo_is_unbiased": (losses, "rloo", times(1.1)),
    "group_mean_shrinks": (losses, "group_mean", times(1.1)),
    "rloo_is_vargrad": (losses, "rloo", times(1.1)),
    "grpo_on_binary_rewards": (losses, "z_score", times(1.1)),
    "trajectory_balance": (cases, "tilt", wider("log_posterior")),
    "trust_pcl_is_balance": (gradients, "soft_bellman", times(1.1, "state_values")),
    "three_points": (divergences, "kl", times(1.1)),
    "pythagoras": (divergences, "match_moments", wider("log_probs")),
    "moment_covariance": (divergences, "tilt", argument(1, 1.1)),
    "pinsker": (sample_divergences, "total_variation", times(1.1)),
    "bretagnolle_huber": (sample_divergences, "total_variation", times(1.1)),
    "chi_squared_bound": (sample_divergences, "chi_squared", times(1.1)),
    "jensen_shannon_bound": (sample_divergences, "jensen_shannon", times(1.1)),
    "forward_kl_optimum": (regularizers, "forward_kl", unnormalised),
    "chi_squared_optimum": (regularizers, "chi_squared", another_threshold),
    "unbiased_estimators": (kl_values, "k3", times(1.1)),
    "swapped_ratio": (kl_values, "k3", times(1.1)),
    "best_control_variate": (kl_values, "best_coefficient", times(1.1)),
    "effective_samples": (acceptance, "effective_sample_size", times(1.1)),
    "best_of_n_law": (sampling, "best_of_n", wider("log_probs")),
    "best_of_n_divergence": (sampling, "best_of_n", times(0.9, "kl")),
    "rejection_acceptance": (acceptance, "rejection_acceptance", times(1.1)),
    "detailed_balance": (acceptance, "metropolis_matrix", times(1.1)),
    "second_eigenvalue": (acceptance, "metropolis_matrix", lazy),
    "importance_sampling": (evidence, "importance_sampling", times(1.1)),
    "evidence_sandwich": (evidence, "reverse_importance_sampling", times(1.1)),
    "more_samples_are_tighter": (evidence, "importance_sampling", times(0.9)),
    "optimal_twist": (sampling, "soft_bellman", times(1.1, "state_values")),
    "dpo_optimum": (preferences, "dpo_loss", argument(3, 1.1)),
    "implicit_reward": (cases, "posterior", at_another_kl_coef),
    "ipo_optimum_is_stationary": (preferences, "ipo_loss", argument(3, 1.1)),
    "duality_gap_is_a_divergence": (preferences, "duality_gap", times(1.1)),
    "dpo_minimum": (preferences, "dpo_loss", argument(3, 3.0)),
    "win_rate_gradient": (losses, "reinforce", times(1.1)),
    "tokens_are_decisions": (decisions, "value_iteration", times(1.1, "value")),
    "gap_of_a_policy": (decisions, "objective_gap", times(1.1)),
    "performance_difference": (decisions, "visits", times(1.1)),
    "process_policy_gradient": (decisions, "policy_gradient", times(1.1)),
    "bellman_contracts": (decisions, "value_iteration", times(1.01, "state_values")),
    "policy_improvement": (decisions, "value_iteration", wider("log_policy", 0.3)),
    "model_error": (decisions, "simulation_bound", times(1.1)),
    "chosen_replies_promise_more": (decisions, "trajectory_value", times(1.1, "state_values")),
}
# what these say is of probabilities alone, with sums that no other function of the package makes
OF_PROBABILITIES = {
    "data_processing",
    "pseudo_log_likelihood",
    "mutual_information",
    "sequential_monte_carlo",
    "speculative_sampling",
}


def test_every_statement_has_its_wrong_package():
    assert WRONG_PACKAGES.keys() | OF_PROBABILITIES == IDENTITIES.keys()


@pytest.mark.parametrize("name", WRONG_PACKAGES)
def test_a_package_that_stretches_does_not_pass(name, monkeypatch):
    """Where a twin has a slip of the statement, here the package has one, and the statement as it
    stands must notice.
    """
    place, function, how = WRONG_PACKAGES[name]
    monkeypatch.setattr(place, function, how(getattr(place, function)))
    assert any(
        error(IDENTITIES[name].relation, *IDENTITIES[name].sides(case)) > 1e-10
        for case in random_cases(5, 25)
    )


# --- the cases ------------------------------------------------------------------------------------


def drawn_by(name, case):
    """What a statement of that name draws."""

    def function(case):
        return case.normal(3), case.normal(3)

    function.__name__ = name
    return identity("", "", "")(function).sides(case)[0]


def test_a_case_is_the_same_whatever_came_before_it():
    three, five = list(random_cases(7, 3)), list(random_cases(7, 5))
    for one, other in zip(three, five, strict=False):
        assert torch.equal(one.log_prior, other.log_prior)
        assert torch.equal(drawn_by("x", one), drawn_by("x", other))
    one = five[0]
    alone = drawn_by("elbo", one)
    one.normal(9)
    drawn_by("pinsker", one)
    assert torch.equal(alone, drawn_by("elbo", one))
    assert not torch.equal(alone, drawn_by("pinsker", one))


def test_parts_of_a_case_and_other_rewards_keep_what_they_do_not_change():
    for case in CASES[:5]:
        part = case.small(3)
        assert part is case.small(3)
        assert len(part.tokens) == len(part.log_prior) == len(part.log_policy) == 3
        assert float(part.log_prior.exp().sum()) == pytest.approx(1)
        assert torch.equal(part.rewards, case.rewards[:3])
        other = part.rewarded(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
        assert other.rewards.tolist() == [1, 0, 0]
        assert other.key == part.key == case.key
        assert other.noise is part.noise is case.noise
        assert torch.equal(other.log_policy, part.log_policy)
        star, _ = reference.posterior(
            dict(enumerate(other.log_prior.exp().tolist())), {0: 1.0, 1: 0.0, 2: 0.0}, 2.0
        )
        assert other.at(2.0).target.model.log_prob(other.tokens).exp().tolist() == pytest.approx(
            list(star.values()), abs=1e-13
        )


def test_cases_differ_in_what_matters():
    cases = list(random_cases(0, 200))
    assert {case.problem.space.eos for case in cases} == {True, False}
    assert any(
        len(case.support.tokens) < len(case.problem.prior.tokens) for case in cases
    )  # sequences without mass
    assert any(len(set(case.rewards.tolist())) == 1 for case in cases)
    assert any(1 < len(set(case.rewards.tolist())) < len(case.rewards) for case in cases)
    assert any(float(case.rewards.abs().max()) > 20 for case in cases)
    assert all(len(case.rewards) >= 3 for case in cases)
    assert min(case.kl_coef for case in cases) < 0.15 < 4 < max(case.kl_coef for case in cases)


def test_a_cases_posterior_is_that_of_plain_dictionaries():
    for case in CASES:
        q = dict(enumerate(case.log_prior.exp().tolist()))
        star, log_z = reference.posterior(q, dict(enumerate(case.rewards.tolist())), case.kl_coef)
        assert case.log_star.exp().tolist() == pytest.approx(list(star.values()), abs=1e-13)
        assert float(case.tilted.log_evidence) == pytest.approx(log_z, rel=1e-13)
        assert torch.allclose(
            case.policy.log_prob(case.support.tokens), case.log_policy, atol=1e-13, rtol=0
        )


@pytest.mark.parametrize(
    ("seed", "count", "says"),
    [(-1, 3, "seed = -1"), (0, 0, "examples = 0"), (0.5, 3, "seed = 0.5")],
)
def test_bad_seeds_and_counts_are_named(seed, count, says):
    with pytest.raises(InputError, match=says):
        list(random_cases(seed, count))


# --- the check ------------------------------------------------------------------------------------


def test_errors_are_relative_to_the_right_side_where_that_is_large():
    assert error("=", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == pytest.approx(0.2)
    assert error("=", 1e-3, 2e-3) == pytest.approx(1e-3)
    assert error("≤", torch.tensor([1.0, 2.0]), torch.tensor([5.0, 2.0])) == 0
    assert error("≤", 3.0, 2.0) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("relation", ["=", "≤"])
def test_what_is_not_a_number_never_holds(value, relation):
    assert error(relation, value, 1.0) == math.inf
    assert error("=", 1.0, value) == math.inf
    assert error(relation, torch.tensor([0.0, math.nan]), torch.zeros(2)) == math.inf


def test_sides_of_different_shapes_are_a_mistake_of_the_statement():
    with pytest.raises(AssertionError, match=r"shapes \[2\] and \[1\]"):
        error("=", torch.zeros(2), torch.zeros(1))


def false_statement() -> Statement:
    @identity(r"J(\pi) = 0", "nowhere", "t01")
    def false_statement(case):
        """Wrong on purpose."""
        return case.tilted.value + 1e-9, case.tilted.value

    false_statement.broken("none", lambda case: (0.0, 0.0))
    return false_statement


def test_a_false_statement_fails_and_a_twin_that_holds_is_told(monkeypatch):
    monkeypatch.setitem(identities.IDENTITIES, "false_statement", false_statement())
    (checked,) = check_identities(["false_statement"], examples=3)
    assert not checked.holds
    assert checked.verdict.startswith("FAILS (case ")
    assert 1e-10 < checked.trial.error < 1e-8
    assert not checked.caught
    sound = IDENTITIES["elbo"]
    tame = replace(sound, twin=None)
    tame.broken("no slip at all", sound.sides)
    monkeypatch.setitem(identities.IDENTITIES, "elbo", tame)
    (checked,) = check_identities(["elbo"], examples=3)
    assert (checked.holds, checked.verdict) == (False, "TWIN NOT CAUGHT")


def test_an_unknown_name_has_its_nearest():
    with pytest.raises(InputError, match=r"'pinskre' is not known. Did you mean pinsker\?"):
        find_identity("pinskre")


def test_the_table_of_the_site_has_every_statement_and_no_bar_inside_a_formula():
    table = identities_markdown(examples=2)
    rows = table.splitlines()[2:]
    assert len(rows) == len(IDENTITIES)
    assert all(row.replace("\\|", "").count("|") == 4 for row in rows)
    assert table_math(r"\mathrm{KL}(\pi\|q(\cdot|s))") == r"\mathrm{KL}(\pi\Vert q(\cdot\vert s))"


def test_everything_about_a_statement_is_plain_data():
    (checked,) = check_identities(["elbo"], examples=3)
    saved = checked.to_dict()
    assert saved["name"] == "elbo"
    assert saved["holds"] is True
    assert saved["twin_caught"] is True
    assert saved["examples"] == 3
    assert 0 <= saved["largest_error"] <= saved["tolerance"] == 1e-12
