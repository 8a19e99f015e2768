"""The catalogue holds, would notice if it did not, and says what the docstrings say."""

import dataclasses
import inspect
import itertools
import math
import re
import statistics
from functools import partial

import pytest
import torch

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.audit.claims import catalogue, gradients, predictions
from klrl_edu.audit.claims.catalogue import (
    CATALOGUE,
    answers_case,
    catalogue_text,
    check_catalogue,
    check_entry,
    four_sentences_case,
)
from klrl_edu.estimators import (
    advantages,
    aggregation,
    divergences,
    evidence,
    kl_gradients,
    kl_values,
    top_k,
)
from klrl_edu.learning import losses
from klrl_edu.learning.batches import needs_of

MODULES = (kl_values, top_k, divergences, kl_gradients, aggregation, advantages, evidence, losses)
TOOLS = {  # no estimators: what they are made of, and one whose samples have two laws
    "kl_values.best_coefficient",
    "kl_values.fitted_coefficient",
    "kl_values.per_token_kl",
    "evidence.reverse_importance_sampling",
    "losses.penalised_reward",
}


def public(module):
    home = module.__name__.rsplit(".", 1)[-1]
    return {
        f"{home}.{name}": f
        for name, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and name[0] != "_"
    }


FUNCTIONS = {name: function for module in MODULES for name, function in public(module).items()}


def named(name):
    (entry,) = (entry for entry in CATALOGUE if entry.name == name)
    return entry


@pytest.mark.parametrize("case", [four_sentences_case, answers_case])
@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_each_claim_holds_to_twelve_digits(entry, case):
    row = check_entry(entry, case())
    assert row.error <= 1e-12
    assert row.holds


SINGLE = [
    entry
    for entry in CATALOGUE
    if entry.kind == "gradient"
    and entry.batch_size == 1
    and "support" not in needs_of(entry.function)
]


@pytest.mark.parametrize("entry", SINGLE, ids=lambda entry: entry.name)
def test_two_sequences_give_the_mean_of_both(entry):
    """Averaged over a batch: the same mean and half the variance. A sum over sequences would double
    the mean, and no single one would tell.
    """
    case = answers_case()
    one, two = (check_entry(dataclasses.replace(entry, batch_size=size), case) for size in (1, 2))
    assert two.error <= 1e-12
    assert two.variance == pytest.approx(one.variance / 2, rel=1e-10)


def z_of_three(rewards, deviation, epsilon=0.0):
    """The z-score of the first of a group."""
    spread = deviation(rewards) + epsilon
    return (rewards[0] - statistics.fmean(rewards)) / spread if spread else 0.0


def centred(rewards):
    return rewards[0] - statistics.fmean(rewards)


@pytest.mark.parametrize(
    ("loss", "advantage", "share"),
    [
        (losses.z_score, lambda r: z_of_three(r, statistics.pstdev), lambda lengths: 1),
        (
            losses.grpo_without_kl,
            lambda r: z_of_three(r, statistics.stdev, 1e-4),
            lambda lengths: 1 / lengths[0],
        ),
        (
            losses.dapo,
            lambda r: z_of_three(r, statistics.stdev, 1e-4),
            lambda lengths: 3 / sum(lengths),
        ),
        (losses.dr_grpo, centred, lambda lengths: 1 / 3),
        (losses.z_score, centred, None),
    ],
)
def test_groups_of_three_have_the_mean_of_their_definition(loss, advantage, share):
    """In a group of two every deviation is the same: only a third tells a standard deviation from
    half the range; the last row is the one that is wrong.
    """
    case = answers_case()
    tokens, rewards = case.problem.prior.tokens, [0.0, 1.0, 0.0, 2.0, 0.5, 1.0]
    log_probs = case.policy.log_prob(tokens)
    scores = torch.stack(
        [torch.autograd.grad(one, case.policy.logits, retain_graph=True)[0] for one in log_probs]
    )
    by_text = dict(zip(["", "a", "b", "a a", "a b", "b a"], rewards, strict=True))
    rewards = [by_text[text] for text in case.problem.space.decode(tokens)]
    lengths = case.problem.space.live(tokens).sum(-1).tolist()
    probs, mean = log_probs.detach().exp().tolist(), torch.zeros_like(scores[0])
    for group in itertools.product(range(6), repeat=3):
        weight = math.prod(probs[k] for k in group) * advantage([rewards[k] for k in group])
        mean -= weight * (share([lengths[k] for k in group]) if share else 1) * scores[group[0]]
    report = audit_gradient(loss, case.policy, case.problem, batch_size=3)
    error = float((report.mean - mean).norm() / mean.norm())
    assert error < 1e-12 if share else error > 1e-3


@pytest.mark.parametrize("entry", gradients.CLIPPED, ids=lambda entry: entry.name)
def test_another_clip_is_noticed(entry):
    others = {
        losses.ppo_clip: {"clip": 0.3},
        losses.grpo: {"clip": 0.3},
        losses.dr_grpo: {"clip": 0.3},
        losses.grpo_without_kl: {"clip": 0.3},
        losses.dapo: {"clip_high": 0.2},
        losses.gspo: {"clip_low": 0.1, "clip_high": 0.3},
        losses.cispo: {"clip_high": 0.2},
    }
    wrong = dataclasses.replace(entry, constants=lambda *_: others[entry.function])
    assert not all(row.holds for row in check_catalogue([wrong]))


@pytest.mark.parametrize("bucket", [False, True])
def test_two_kept_terms_are_claimed_as_one_is(bucket):
    entry = named("top_k.top_k_tail_bucket" if bucket else "top_k.top_k_truncated")
    two = dataclasses.replace(
        entry, claim=predictions.of_kept_terms(2, bucket=bucket), constants=lambda *_: {"k": 2}
    )
    assert all(row.holds for row in check_catalogue([two]))
    assert not check_entry(dataclasses.replace(two, claim=entry.claim), answers_case()).holds


DEFAULTS = {
    losses.ppo_clip: {"clip": 0.2},  # Schulman et al. (2017)
    losses.grpo: {"clip": 0.2, "epsilon": 1e-4},  # TRL's epsilon
    losses.dapo: {"clip_low": 0.2, "clip_high": 0.28},  # Yu et al. (2025)
    kl_values.clamped_k3: {"bound": 10.0},  # verl's two clamps
    kl_values.input_clamped_k3: {"bound": 20.0},
}


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda function: function.__name__)
def test_defaults_are_the_published_ones(function):
    parameters = inspect.signature(function).parameters
    assert {key: parameters[key].default for key in DEFAULTS[function]} == DEFAULTS[function]


def test_every_estimator_and_loss_is_in_the_catalogue():
    listed = {id(entry.function) for entry in CATALOGUE}
    missing = {name for name, function in FUNCTIONS.items() if id(function) not in listed}
    assert missing == TOOLS | set(public(advantages))


def test_docstrings_say_unbiased_exactly_where_the_catalogue_does():
    says = {name for name, function in FUNCTIONS.items() if claims_unbiased(function)}
    declared = {
        name
        for name, function in FUNCTIONS.items()
        if any(entry.unbiased and entry.function is function for entry in CATALOGUE)
    }
    assert says == declared


def claims_unbiased(function):
    return bool(re.search(r"\bunbiased\b", inspect.getdoc(function), re.IGNORECASE))


def test_a_docstring_that_only_says_biased_claims_nothing():
    def modest():
        """Biased, and not better for it."""

    def proud():
        """Unbiased for everything."""

    assert (claims_unbiased(modest), claims_unbiased(proud)) == (False, True)


def test_a_target_that_is_claimed_unbiased_stands_alone_with_one():
    for entry in CATALOGUE:
        if entry.unbiased and not callable(entry.claim):
            assert list(entry.claim.values()) == [1.0]
    assert len({entry.name for entry in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("kl_gradients.loss_k3", {"reverse_kl": 1.0}),
        ("kl_gradients.loss_k1", {"reverse_kl": 1.0}),
        ("kl_values.k2", {"reverse_kl": 1.0}),
        ("losses.group_mean", {"objective": 1.0}),
        ("losses.grpo", {"objective": 1.0}),
        ("kl_gradients.loss_k2_token", {"reverse_kl": 1.0}),
        ("kl_gradients.live_ratio_k3_token (off-policy)", {"reverse_kl": 1.0}),
    ],
)
def test_a_wrong_claim_is_noticed_on_both_cases(name, claim):
    wrong = dataclasses.replace(named(name), claim=claim)
    rows = check_catalogue([wrong])
    assert [row.holds for row in rows] == [False, False]
    assert min(row.error for row in rows) > 1e-3
    text = catalogue_text(rows)
    assert "FAILS" in text
    assert text.endswith("2 of 2 checks fail.")


def test_a_broken_twin_of_an_estimator_is_noticed():
    def half_forgotten(log_probs, prior_log_probs):
        return (
            kl_values.k3((log_probs - prior_log_probs).sum(-1)).detach() * log_probs.sum(-1)
        ).mean()

    twin = dataclasses.replace(named("kl_gradients.reward_and_loss_k3"), audited=half_forgotten)
    assert not any(row.holds for row in check_catalogue([twin]))


def test_variances_are_those_of_t06():
    for name, variance in (("kl_values.k1", 0.191954080129), ("kl_values.k3", 0.008973476020)):
        assert check_entry(named(name), four_sentences_case()).variance == pytest.approx(
            variance, abs=5.1e-13
        )


def test_the_best_constant_and_the_best_coefficient_have_the_least_variance():
    case = answers_case()
    variance = {
        name: check_entry(named(f"kl_gradients.{name}"), case).variance
        for name in ("rao_blackwell_to_go", "reward_rao_blackwell_to_go", "reward_k1")
    }
    assert list(variance.values()) == sorted(variance.values())
    for name in ("losses.reinforce (best constant)", "kl_values.control_variate"):
        assert vertex(named(name), case) == pytest.approx(0, abs=1e-9)


def vertex(entry, case):
    """How far from its constant an entry has its least variance, by a parabola through three."""
    ((name, constant),) = entry.constants(case.policy, case.problem).items()

    def variance(step):
        moved = dataclasses.replace(entry, constants=lambda *_: {name: constant + step})
        return check_entry(moved, case).variance

    below, at, above = map(variance, (-1, 0, 1))
    return (below - above) / (below - 2 * at + above) / 2


@pytest.mark.parametrize(
    "entry",
    [entry for entry in CATALOGUE if entry.kind == "gradient"],
    ids=lambda entry: entry.name,
)
def test_every_loss_is_audited_in_one_vmapped_pass(entry):
    case = answers_case()
    constants = {} if entry.constants is None else entry.constants(case.policy, case.problem)
    report = audit_gradient(
        partial(entry.audited or entry.function, **constants),
        case.policy,
        case.problem,
        batch_size=max(2, entry.batch_size),
    )
    assert report.differentiation == "vmap"


def test_the_text_counts_what_holds():
    text = catalogue_text(check_catalogue(CATALOGUE[:2]))
    assert "unbiased for KL(π‖q)" in text
    assert text.endswith("2 claims hold to 1e-12 on four sentences and answers.")


def test_the_readme_table_has_a_row_an_entry_and_keeps_its_bars(monkeypatch):
    def only_some(entry, case):  # the others have been audited above
        if entry.name in ("kl_values.k1", "kl_gradients.loss_absolute_k1"):
            return check_entry(entry, case)
        return catalogue.CheckedEntry(entry, case.name, 0.0, 0.0, 0.0)

    monkeypatch.setattr(catalogue, "check_entry", only_some)
    table = catalogue.markdown_table()
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) == len(CATALOGUE)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert "| `kl_values.k1` | u | unbiased for KL(π‖q) | 0.191954 |" in rows
    assert "| `kl_gradients.loss_absolute_k1` | \\|u\\| | 2∇TV(π, q) |" in table


def test_the_worlds_are_told_apart_by_their_lengths():
    for case, even in ((four_sentences_case(), True), (answers_case(), False)):
        tokens = case.problem.prior.tokens
        assert (len(torch.unique(case.problem.space.live(tokens).sum(-1))) == 1) == even
