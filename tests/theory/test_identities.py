"""The registry of identities: every statement holds, every broken twin is caught, and what the
check itself does with NaN and misfits.
"""

import math
from dataclasses import fields, replace

import pytest
import torch

from klrl_edu import reference
from klrl_edu.core.errors import InputError
from klrl_edu.theory import identities
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
        errors = [error(statement.relation, *statement.twin_sides(case)) for case in CASES]
        assert max(errors) > 1e-4, statement.name


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
        assert not twin_is_caught(sound, CASES)


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
