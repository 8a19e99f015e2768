"""The articles' claims: each verdict is what the numbers say, each number is the course's, and each
claim has a twin that the same check refuses.
"""

import math
import re
from collections import Counter
from dataclasses import is_dataclass, replace
from functools import wraps

import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import dirichlet
from torch import Tensor

from klrl_edu import reference
from klrl_edu.core import logspace
from klrl_edu.estimators import kl_gradients
from klrl_edu.exercises.pieces import independent, marginals, mean_field, words
from klrl_edu.learning import losses
from klrl_edu.problems.examples import FOUR_POLICY, FOUR_REWARDS, FOUR_SENTENCES
from klrl_edu.theory.articles import control, feedback, importance, tabular, transformers
from klrl_edu.theory.articles.examples import (
    FOUR_AUXILIARY,
    Auxiliary,
    course_case,
    processes,
    sentences,
    with_auxiliary,
)
from klrl_edu.theory.articles.sources import ARTICLES
from klrl_edu.theory.claims import (
    CLAIMS,
    TABLE_HEADER,
    check_claims,
    claims_markdown,
    claims_table,
    claims_text,
)
from klrl_edu.theory.verdicts import Claim, Finding, worst_error

FOUR = course_case()
FOUND = {name: [claim(example) for example in claim.examples()] for name, claim in CLAIMS.items()}


def instead(name: str, **formulas) -> Claim:
    """The claim with other formulas in the places of some of its own, each a function of all."""

    def function(found):
        return replace(found, **{key: formula(found) for key, formula in formulas.items()})

    return replace(CLAIMS[name], examples=lambda: FOUND[name], function=function)


CHECKS = {name: instead(name).check() for name in CLAIMS}


def vector(table: dict) -> Tensor:
    """A dictionary over the four sentences as [4], in their order."""
    return torch.tensor([table[text] for text in FOUR_SENTENCES], dtype=torch.float64)


# What the registry promises


@pytest.mark.parametrize("name", CLAIMS)
def test_every_declared_verdict_is_what_the_numbers_say(name):
    check = CHECKS[name]
    assert check.passed, check.refusal
    assert (check.claim.verdict == "holds") == (
        check.finding.printed_error <= check.claim.tolerance
    )
    assert check.finding.corrected_error <= check.claim.tolerance


def test_every_row_of_the_articles_is_there():
    # 27 rows; one of B (positions, one-hot target) and one of C (auxiliary model, constant) make
    # two claims each
    assert Counter(claim.source for claim in CLAIMS.values()) == {
        "A": 6,
        "B": 6,
        "C": 9,
        "D": 5,
        "E": 3,
    }
    assert list(ARTICLES) == sorted({claim.source for claim in CLAIMS.values()})
    articles = [claim.source for claim in CLAIMS.values()]
    assert articles == sorted(articles)


def test_names_are_unique_stable_and_carry_their_article():
    listed = [
        thing.name
        for room in (tabular, transformers, importance, control, feedback)
        for thing in vars(room).values()
        if isinstance(thing, Claim)
    ]
    assert listed == list(CLAIMS)
    for name, claim in CLAIMS.items():
        assert re.fullmatch(r"[a-e](-[a-z]+)+", name)
        assert name[0] == claim.source.lower()
        assert re.fullmatch(r"t(0[1-9]|1[0-4])", claim.tutorial)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_that_holds_has_no_correction_and_any_other_has_one(name):
    claim = CLAIMS[name]
    assert (claim.corrected == "") == (claim.verdict == "holds")
    for found in FOUND[name]:
        assert (found.corrected is None) == (claim.verdict == "holds")


@pytest.mark.parametrize("name", CLAIMS)
def test_formulas_are_closed_mathematics_without_bars(name):
    for text in (CLAIMS[name].printed, CLAIMS[name].corrected):
        assert text.count("$") % 2 == 0
        assert (
            "|" not in text
        )  # \mid and \Vert: a bar would end a cell of a table, and an escaped one is a double bar
        assert text.count("{") == text.count("}")


def test_running_the_claims_again_says_the_same():
    for check in check_claims():
        assert check.claim is CLAIMS[check.claim.name]
        assert check.finding == CHECKS[check.claim.name].finding


# The broken twins: an error planted in the mathematics, which the same check refuses


TWINS = [(name, slip) for name in CLAIMS for slip in FOUND[name][0].broken]


def twin(name: str, slip: str | None = None) -> Claim:
    """The claim with a broken twin, the first by default, in the place of the formula that is
    right.
    """
    place = "printed" if CLAIMS[name].verdict == "holds" else "corrected"
    slip = next(iter(FOUND[name][0].broken)) if slip is None else slip
    return instead(name, **{place: lambda found: found.broken[slip]})


@pytest.mark.parametrize(("name", "slip"), TWINS)
def test_every_broken_twin_is_refused(name, slip):
    check = twin(name, slip).check()
    assert not check.passed
    assert math.isfinite(check.finding.corrected_error)  # it gives numbers, and they are wrong
    assert check.finding.corrected_error > 1e-4
    assert check.finding.corrected_error == CHECKS[name].finding.twin_errors[slip]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_twin_without_a_slip_is_noticed_and_so_is_a_claim_without_a_twin(name):
    tame = instead(name, broken=lambda found: {**found.broken, "no slip at all": found.right})
    assert tame.check().refusal == "its broken twin passes too: no slip at all"
    assert instead(name, broken=lambda found: {}).check().refusal == "it has no broken twin"


@pytest.mark.parametrize(
    "name", [name for name, claim in CLAIMS.items() if claim.verdict != "holds"]
)
def test_a_claim_that_would_hold_as_printed_may_not_be_declared_wrong(name):
    mild = instead(name, printed=lambda found: found.right)
    assert "it holds as printed" in mild.check().refusal


@pytest.mark.parametrize("name", CLAIMS)
def test_a_flipped_verdict_is_refused(name):
    claim = CLAIMS[name]
    flipped = "false" if claim.verdict == "holds" else "holds"
    assert not replace(instead(name), verdict=flipped).check().passed


def test_a_number_that_is_missing_is_an_infinite_error_and_equal_infinities_are_none():
    inf, nan = torch.tensor([math.inf, 1.0]), torch.tensor([math.nan, 1.0])
    assert worst_error([inf], [inf]) == 0
    assert worst_error([nan], [inf]) == math.inf
    assert worst_error([nan], [nan]) == math.inf
    assert worst_error([inf], [-inf]) == math.inf
    assert worst_error([torch.zeros(2), torch.ones(2)], [torch.zeros(2), torch.zeros(2)]) == 1
    with pytest.raises(AssertionError, match="shape"):
        worst_error([torch.zeros(2)], [torch.zeros(1)])
    assert CLAIMS["a-program"].refusal(Finding(math.inf, math.nan, "", "", {"": 1.0})) != ""


# A wrong package: what it gives is one part in a hundred too large, and the claims that stand on
# it say so


def stretched(result):
    """1.01 times a number or a tensor, and of a result of several the same of each."""
    if isinstance(result, float | Tensor):
        return 1.01 * result
    if is_dataclass(result):
        return replace(result, action_values=stretched(result.action_values))
    return type(result)(*map(stretched, result))


def longer(result):
    """The values of an extra state."""
    return result._replace(state_values=torch.cat([result.state_values, torch.zeros(1)]))


def surer(preferences):
    """Preferences whose log-odds are one part in a hundred larger."""
    return torch.sigmoid(1.01 * torch.logit(preferences))


@pytest.mark.parametrize(
    ("place", "function", "wrong", "names"),
    [
        (logspace, "kl_divergence", stretched, ["a-kl-states", "b-positions"]),
        (transformers, "kl", stretched, ["b-one-hot", "b-compact"]),
        (tabular, "per_token_kl", stretched, ["a-kl-states", "b-positions"]),
        (tabular, "policy_evaluation", stretched, ["a-value"]),
        (transformers, "token_log_probs", stretched, ["b-autoregressive"]),
        (losses, "reinforce", stretched, ["c-reinforce"]),
        (kl_gradients, "reward_k1", stretched, ["c-kl-gradient"]),
        (importance, "best_scalar_baseline", stretched, ["c-constant"]),
        (losses, "exact", stretched, ["d-step"]),
        (control, "value_iteration", stretched, ["d-backup"]),
        (control, "policy_gradient", stretched, ["d-actor"]),
        (control, "soft_bellman", longer, ["d-search"]),
        (feedback, "token_log_probs", stretched, ["e-score"]),
        (feedback, "bradley_terry", surer, ["e-feedback"]),
    ],
)
def test_a_wrong_package_does_not_pass(monkeypatch, place, function, wrong, names):
    right = getattr(place, function)
    monkeypatch.setattr(place, function, wraps(right)(lambda *a, **k: wrong(right(*a, **k))))
    for name in names:
        assert not CLAIMS[name].check().passed


# The course's numbers, each from another source


def test_the_kl_of_the_example_is_not_022():
    nats = reference.kl(FOUR_POLICY, FOUR_SENTENCES)
    assert nats == pytest.approx(0.099793472091, abs=5e-13)
    torch.testing.assert_close(
        importance.c_kl_example(FOUR).truth.tolist(),
        [nats, nats / math.log(2)],
        rtol=1e-13,
        atol=0,
    )
    assert (
        CHECKS["c-kl-example"].finding.says == "printed 0.22; KL(π‖q) = 0.0998 nats = 0.1440 bits"
    )
    assert CHECKS["c-kl-example"].finding.printed_error == pytest.approx(0.22 - nats, rel=1e-12)


def test_the_auxiliary_model_is_off_by_the_courses_number():
    seen = reference.kl(FOUR_POLICY, FOUR_AUXILIARY)
    error = seen - reference.kl(FOUR_POLICY, FOUR_SENTENCES)
    assert (seen, error) == (
        pytest.approx(0.1861, abs=5e-5),
        pytest.approx(0.086304621736, abs=5e-13),
    )
    found = importance.c_auxiliary_example(with_auxiliary()[0])
    assert float(found.printed - found.truth) == pytest.approx(error, rel=1e-12)
    assert "0.1861 nats" in CHECKS["c-auxiliary-example"].finding.says
    assert "+0.086304621736" in CHECKS["c-auxiliary-example"].finding.says


def test_the_bias_of_the_auxiliary_gradient_by_the_reference():
    with_p, with_q = (
        reference.gradient(FOUR_POLICY, lambda y, other=other: math.log(FOUR_POLICY[y] / other[y]))
        for other in (FOUR_AUXILIARY, FOUR_SENTENCES)
    )
    torch.testing.assert_close(
        importance.auxiliary_bias(with_auxiliary()[0]),
        vector(with_p) - vector(with_q),
        rtol=0,
        atol=1e-15,
    )
    assert (
        f"norm {math.dist(with_p.values(), with_q.values()):.6f}"
        in CHECKS["c-auxiliary"].finding.says
    )


def test_without_an_auxiliary_model_there_is_no_bias():
    found = importance.c_auxiliary(Auxiliary(FOUR, FOUR.log_prior))
    torch.testing.assert_close(found.printed, found.truth, rtol=0, atol=1e-15)


def test_the_best_constant_is_where_the_variance_is_least():
    for example in with_auxiliary():
        found = minimize(
            lambda c, example=example: float(importance.constant_variance(example, float(c[0]))),
            [0.0],
            tol=1e-12,
        )
        assert importance.best_constant(example) == pytest.approx(float(found.x[0]), abs=1e-5)


def test_the_four_sentences_have_the_courses_gradients():
    reward = reference.gradient(FOUR_POLICY, lambda y: FOUR_REWARDS[y])
    torch.testing.assert_close(
        vector(reward), torch.tensor([0.05, -0.18, -0.09, 0.22], dtype=torch.float64)
    )
    torch.testing.assert_close(
        importance.c_reinforce(FOUR).printed, vector(reward), rtol=0, atol=1e-15
    )
    ascent = reference.objective_gradient(FOUR_POLICY, FOUR_SENTENCES, FOUR_REWARDS, 1.0)
    torch.testing.assert_close(control.d_step(FOUR).truth, vector(ascent), rtol=0, atol=1e-15)
    assert [round(value, 12) for value in vector(ascent).tolist()] == [
        -0.011675039611,
        -0.078948283960,
        -0.010705934735,
        0.101329258306,
    ]


def test_the_posterior_and_the_gap_are_the_references():
    star, log_evidence = reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, 1.0)
    assert math.exp(log_evidence) == pytest.approx(2.326218341277, abs=5e-13)
    for law in control.d_families(FOUR).printed:
        torch.testing.assert_close(law, vector(star), rtol=0, atol=1e-14)
    gap = reference.kl(FOUR_POLICY, star)
    assert gap == pytest.approx(0.044037391635, abs=5e-13)
    assert "0.044037391635" in CHECKS["c-objective"].finding.says
    assert float(feedback.soft_update_value(FOUR)) == pytest.approx(log_evidence, rel=1e-13)
    assert f"{log_evidence:.9f}" in CHECKS["e-q-update"].finding.says


def test_per_position_sums_miss_all_of_the_kl_of_the_four_sentences():
    first, second = (marginals(table) for table in (FOUR_POLICY, FOUR_SENTENCES))
    apart = math.fsum(reference.kl(p, q) for p, q in zip(first, second, strict=True))
    assert abs(apart) < 1e-15
    assert float(transformers.b_positions(FOUR).printed) == pytest.approx(apart, abs=1e-15)
    assert math.fsum(
        reference.chain_rule(words(FOUR_POLICY), words(FOUR_SENTENCES), 2)
    ) == pytest.approx(float(tabular.chain_rule_kl(FOUR, FOUR.log_policy)), rel=1e-13)


def test_the_masked_loss_is_half_the_pseudo_log_likelihood():
    information = reference.kl(FOUR_SENTENCES, independent(FOUR_SENTENCES))
    pseudo = reference.entropy(FOUR_SENTENCES) - information
    assert (information, pseudo) == (
        pytest.approx(0.004021743230, abs=5e-13),
        pytest.approx(1.275832482603, abs=5e-13),
    )
    assert float(transformers.b_masked(FOUR).truth) == pytest.approx(pseudo / 2, rel=1e-13)
    assert "1.275832482603" in CHECKS["b-masked"].finding.says


def test_the_two_fits_of_independent_words_have_the_references_entropies():
    target = {"the cat": 0.5, "the dog": 0.02, "a cat": 0.02, "a dog": 0.46}
    seeking, covering = (
        reference.entropy(mean_field(target)),
        reference.entropy(independent(target)),
    )
    assert seeking < reference.entropy(target) < covering
    assert transformers.mode_seeking_entropy(vector(target).log()) == pytest.approx(
        seeking, rel=1e-9
    )
    found = transformers.b_compact(replace(FOUR, log_policy=vector(target).log()))
    assert float(found.truth) == pytest.approx(covering, rel=1e-13)


def test_a_tables_parameters_have_the_dirichlet_moments_of_scipy():
    law = dirichlet([5, 4, 3, 2])
    counts = torch.tensor([4, 3, 2, 1], dtype=torch.float64)
    expected = torch.stack(
        [torch.tensor([5, 4, 3, 2], dtype=torch.float64) / 14, torch.from_numpy(law.var())]
    )
    torch.testing.assert_close(tabular.a_parameters(counts).printed, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        tabular.a_parameters(counts).printed[0], torch.from_numpy(law.mean()), rtol=1e-13, atol=0
    )
    assert "(5, 4, 3, 2)/14" in CHECKS["a-parameters"].finding.says


def test_the_printed_program_raises_and_the_corrected_one_collapses_as_in_the_course():
    with pytest.raises(TypeError):
        tabular.printed_program(FOUR)
    policy = FOUR_SENTENCES
    for _ in range(200):
        policy = reference.posterior(policy, FOUR_REWARDS, 10.0)[
            0
        ]  # one multiplicative step: e^{0.1 r}
    assert policy["a dog"] == pytest.approx(0.999999991755, abs=5e-13)
    torch.testing.assert_close(
        tabular.mirror_descent(FOUR, 0.0, 200), vector(policy), rtol=0, atol=1e-13
    )
    assert "raises TypeError" in CHECKS["a-program"].finding.says
    assert "0.999999991755" in CHECKS["a-program"].finding.says


def test_the_objective_without_its_coefficient_loses_what_the_reference_says():
    star = reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, 0.5)[0]
    loss = 0.5 * reference.kl(reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, 1.0)[0], star)
    half = FOUR.at(0.5)
    lost = half.tilted.value - tabular.a_objective(half).printed
    assert float(lost) == pytest.approx(loss, rel=1e-12)


def test_the_printed_objective_over_states_is_least_at_the_posterior_of_coefficient_one():
    half = FOUR.at(0.5)

    def over_states(logits):
        log_policy = torch.log_softmax(torch.from_numpy(logits), 0)
        divergence = tabular.chain_rule_kl(replace(half, log_policy=log_policy), log_policy)
        return float(divergence - log_policy.exp() @ half.support.token_rewards.sum(-1))

    found = minimize(over_states, torch.zeros(4, dtype=torch.float64).numpy(), tol=1e-8)
    least = torch.log_softmax(torch.from_numpy(found.x), 0)
    assert float(half.objective(least)) == pytest.approx(
        float(tabular.a_objective(half).printed), abs=1e-8
    )


def test_the_highest_objective_is_what_a_general_optimiser_finds():
    for example in sentences():

        def loss(logits, example=example):
            return -float(example.objective(torch.log_softmax(torch.from_numpy(logits), 0)))

        found = minimize(
            loss, torch.zeros(len(example.tokens), dtype=torch.float64).numpy(), tol=1e-6
        )
        assert -found.fun == pytest.approx(float(tabular.a_objective(example).truth), abs=1e-8)


def test_values_and_gradients_of_a_process_agree_with_plain_loops():
    for process in processes():
        first, then = (law.tolist() for law in process.policy())
        total = 0.0
        for a, probability in enumerate(first):
            for s, reached in enumerate(process.transition[a].tolist()):
                for b, chosen in enumerate(then[s]):
                    total += (
                        probability
                        * reached
                        * chosen
                        * float(process.first_reward[a] + 0.9 * process.then_reward[s, b])
                    )
        assert float(process.expected_return()) == pytest.approx(total, rel=1e-13)
        step = 1e-5
        nudged = [
            process._replace(
                first_logits=process.first_logits
                + sign * step * torch.eye(len(first), dtype=torch.float64)[0]
            )
            for sign in (1, -1)
        ]
        slope = float(nudged[0].expected_return() - nudged[1].expected_return()) / (2 * step)
        assert float(control.d_actor(process).truth[0]) == pytest.approx(
            slope, abs=1e-9
        )  # central differences: error of order step²


def test_the_printed_backup_never_sees_the_reward():
    process = processes()[0]
    other = process._replace(
        first_reward=process.first_reward + 5, then_reward=-process.then_reward
    )
    assert torch.equal(control.d_backup(process).printed, control.d_backup(other).printed)


def test_search_returns_the_sentences_in_the_order_of_their_posterior():
    for example in CLAIMS["d-search"].examples():
        rows, opened = zip(*control.best_first(example), strict=True)
        assert list(rows) == example.log_star.argsort(descending=True).tolist()
        assert opened == tuple(sorted(opened))
        prefixes = {tuple(row[:t]) for row in example.tokens.tolist() for t in range(len(row))}
        assert control.d_search(example).truth == control.d_search(example).right == len(prefixes)


def test_importance_weights_lose_what_is_never_drawn_only_where_the_function_is_not_zero():
    lost = importance.weighed_mean(importance.without_last(FOUR))
    kept = math.fsum(FOUR_POLICY[text] * FOUR_REWARDS[text] for text in list(FOUR_SENTENCES)[:3])
    assert float(lost) == pytest.approx(kept, rel=1e-13)
    *_, left_out = CLAIMS["c-importance"].examples()
    assert left_out.log_auxiliary[-1] == -math.inf
    assert left_out.case.rewards[-1] == 0 != left_out.case.rewards[0]


def test_a_score_without_a_return_follows_one_over_the_length():
    ending, longer, fixed = feedback.two_word_texts()
    for case in (ending, longer):
        seen = feedback.e_score(case).printed
        torch.testing.assert_close(
            seen, case.gradient_of_mean(1 / case.lengths), rtol=0, atol=1e-15
        )
        assert float(seen.norm()) > 0.01
    seen = feedback.e_score(fixed).printed
    torch.testing.assert_close(seen, torch.zeros_like(seen), rtol=0, atol=1e-15)
    before, after = map(
        float, re.findall(r"length from ([\d.]+) to ([\d.]+)", CHECKS["e-score"].finding.says)[0]
    )
    assert after < before


def test_a_biased_judge_costs_what_the_reference_says():
    judged = {text: reward + text.startswith("the") for text, reward in FOUR_REWARDS.items()}
    regret = reference.kl(
        reference.posterior(FOUR_SENTENCES, judged, 1.0)[0],
        reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, 1.0)[0],
    )
    assert f"= {regret:.6f} reward units" in CHECKS["e-feedback"].finding.says


def test_the_penalty_keeps_text_closer_the_larger_the_coefficient():
    for example in sentences():
        assert bool((importance.c_stays_close(example).truth < 0).all())
    found = [
        reference.kl(reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, kl_coef)[0], FOUR_SENTENCES)
        for kl_coef in (0.2, 0.5, 1.0, 3.0)
    ]
    assert ", ".join(f"{value:.4f}" for value in found) in CHECKS["c-stays-close"].finding.says


# The tables


def test_the_table_has_a_row_a_claim_and_says_what_is_refused():
    rows = claims_table(CHECKS.values())
    assert [row[0] for row in rows] == list(CLAIMS)
    assert {len(row) for row in rows} == {len(TABLE_HEADER)}
    assert {row[-1] for row in rows} == {"agrees"}
    refused = claims_table([twin("c-auxiliary").check()])[0][-1]
    assert refused.startswith("the corrected formula is off by")
    assert len(claims_text(CHECKS.values()).splitlines()) == len(CLAIMS) + 2 + 1 + len(ARTICLES)


def test_the_details_name_the_articles_and_say_what_was_seen():
    text = claims_text([CHECKS["c-kl-example"], CHECKS["e-score"]], details=True)
    title = "《大语言模型原理基础与前沿 带有KL惩罚的强化学习：贝叶斯推理观点》"
    assert f"C  {title}, 002_eba1d912e35743ba: four sentences" in text
    assert "E  004_7fa0d3502c9ccd8c (neither title nor name in our copy): feedback" in text
    assert "000_91836c92fc3d3449" not in text
    assert "c-kl-example: printed 0.22; KL(π‖q) = 0.0998 nats = 0.1440 bits" in text


def test_a_check_is_plain_numbers_and_texts():
    record = CHECKS["c-kl-example"].to_dict()
    assert record["passed"]
    assert record["printed_error"] == CHECKS["c-kl-example"].finding.printed_error
    assert {type(value) for value in record.values()} == {str, float, bool}
    assert twin("d-step").check().to_dict()["refusal"]


def test_the_page_has_a_row_a_claim_with_as_many_cells_each():
    lines = claims_markdown(CHECKS.values()).splitlines()
    assert [line[:4] for line in lines[: len(ARTICLES)]] == [f"- {letter}:" for letter in ARTICLES]
    rows = lines[len(ARTICLES) + 1 :]
    assert len(rows) == len(CLAIMS) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {4}
    for name, line in zip(CLAIMS, rows[2:], strict=True):
        assert f"`{name}`" in line
        assert CLAIMS[name].printed in line
        assert CHECKS[name].finding.says in re.sub(r"\\([|*_\[\]])", r"\1", line)


def test_the_page_shows_a_refusal():
    assert "**refused: the corrected formula is off by" in claims_markdown([twin("d-step").check()])
