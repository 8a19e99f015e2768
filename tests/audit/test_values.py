"""Estimators of values: by sequence, by batch, with draws, and where supports differ."""

import itertools
import math

import pytest
import torch

from klrl_edu.audit.audit import audit_value
from klrl_edu.core.errors import TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.estimators import kl_values
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from tests.audit.scenes import PI, Q, answers, answers_policy

U = [math.log(p / q) for p, q in zip(PI, Q, strict=True)]


def value(estimator, **options):
    return audit_value(estimator, answers_policy(), answers(), **options)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_chance_of_a_negative_estimate_is_that_over_all_orders(size):
    orders = list(itertools.product(range(6), repeat=size))
    expected = math.fsum(
        math.prod(PI[y] for y in order) for order in orders if sum(U[y] for y in order) < -1e-12
    )
    report = value(kl_values.k1, batch_size=size)
    assert report.probability_negative == pytest.approx(expected, abs=1e-14)
    assert f"P(estimate < 0) = {expected:.6g}" in str(report)
    assert value(kl_values.k3, batch_size=size).probability_negative == 0


def test_zero_reached_through_rounding_is_not_negative():
    assert (
        audit_value(
            lambda u: u, four_sentences().prior, four_sentences(), batch_size=3
        ).probability_negative
        == 0
    )


def test_means_of_many_need_no_enumeration_but_say_what_was_not_computed():
    report = value(kl_values.k1, batch_size=1000)
    assert report.variance == pytest.approx(value(kl_values.k1).variance / 1000, rel=1e-12)
    assert report.probability_negative is None
    assert "P(estimate < 0) was not computed: it takes 8,459,043,543,951 batches" in " ".join(
        report.notes
    )


def test_estimators_of_whole_batches_are_enumerated():
    """The log of a mean ratio is biased by Jensen: E log ½(w + w'), against a loop over pairs."""

    def log_mean(log_probs, prior_log_probs):
        return (prior_log_probs - log_probs).sum(-1).exp().mean().log()

    expected = math.fsum(
        PI[a] * PI[b] * math.log((math.exp(-U[a]) + math.exp(-U[b])) / 2)
        for a in range(6)
        for b in range(6)
    )
    report = value(log_mean, batch_size=2)
    assert float(report.mean) == pytest.approx(expected, rel=1e-12)
    assert report.executions == 21
    with pytest.raises(TooLargeError, match="21 multisets"):
        value(log_mean, batch_size=2, max_executions=20)


def test_values_that_depend_on_the_rest_of_their_batch_are_found_out():
    """[N] values centred by the batch mean look like one a sequence; their mean is 0 on every
    batch.
    """
    report = value(
        lambda log_probs, prior_log_probs: (lambda u: u - u.mean())(
            (log_probs - prior_log_probs).sum(-1)
        ),
        batch_size=2,
    )
    assert report.executions == 21
    assert float(report.mean) == pytest.approx(0, abs=1e-15)


def test_an_estimator_that_draws_is_enumerated():
    def one_of_them(log_probs, prior_log_probs, draw):
        chosen = draw(torch.full((1, len(log_probs)), 0.0, dtype=torch.float64))
        return (log_probs - prior_log_probs).sum(-1)[chosen].sum()

    report = value(one_of_them, batch_size=2)
    assert report.relative_bias["reverse_kl"] < 1e-12
    assert report.variance == pytest.approx(value(kl_values.k1).variance, rel=1e-12)
    assert report.executions == 42


def mismatch(prior, policy):
    space = SequenceSpace(("a", "b", "c"), 1, eos=False)
    tokens = space.all_tokens()
    problem = Problem(
        SequenceTable(space, tokens, torch.tensor(prior).double().log()),
        lambda t, p: torch.zeros(len(t)),
        1.0,
    )
    return SequenceTable(space, tokens, torch.tensor(policy).double().log()), problem


def test_k3_misses_exactly_the_priors_mass_off_the_policys_support():
    """E_π[k3] = KL + Q(supp π) − 1."""
    report = audit_value(kl_values.k3, *mismatch([0.5, 0.3, 0.2], [0.6, 0.4, 0.0]))
    assert report.bias["reverse_kl"] == pytest.approx(-0.2, abs=1e-14)
    said = " ".join(report.notes)
    assert "the prior holds mass 0.2 where the policy has none" in said
    assert "E_π[q/π] = 0.8 instead of 1" in said
    assert "That is the whole bias of k3 for reverse_kl." in said
    k1 = audit_value(kl_values.k1, *mismatch([0.5, 0.3, 0.2], [0.6, 0.4, 0.0]))
    assert "whole bias" not in " ".join(k1.notes)
    assert k1.verdict == "k1 is unbiased for reverse_kl and reverse_kl_per_token."
    assert k1.targets["forward_kl"].tolist() == [math.inf]


def test_a_policy_off_the_priors_support_has_an_infinite_divergence_and_the_report_says_so():
    report = audit_value(kl_values.k1, *mismatch([0.5, 0.5, 0.0], [0.5, 0.25, 0.25]))
    assert report.targets["reverse_kl"].tolist() == report.mean.tolist() == [math.inf]
    assert report.variance == math.inf
    assert "the policy gives mass 0.25 where the prior has none" in " ".join(report.notes)
    assert (
        report.verdict == "k1 has an infinite mean, as have reverse_kl and reverse_kl_per_token and"
        " forward_kl_per_token."
    )
    assert audit_value(kl_values.k1, four_sentences_policy(), four_sentences()).notes == ()


def test_the_probability_below_zero_is_also_one_of_tokens():
    """Of the four sentences the first words are as likely under π as under q; of the second ones
    (dog after the, cat after a) are rarer: (.2 + .1) of two words.
    """
    report = audit_value(kl_values.k1, four_sentences_policy(), four_sentences())
    assert report.probability_negative_token == pytest.approx(0.15, abs=1e-14)
    assert "of a token's 0.15" in str(report)
    k3 = audit_value(kl_values.k3, four_sentences_policy(), four_sentences())
    assert k3.probability_negative_token == 0

    def by_token(log_probs, prior_log_probs):
        return log_probs - prior_log_probs

    again = audit_value(by_token, four_sentences_policy(), four_sentences())
    assert again.probability_negative_token == report.probability_negative_token
    whole = audit_value(
        lambda log_probs, prior_log_probs: (log_probs - prior_log_probs).sum(-1),
        four_sentences_policy(),
        four_sentences(),
    )
    assert whole.probability_negative_token is None
