"""Functions of named tensors, as people and libraries write them."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import nn

from klrl_edu.audit.adapting import FIELDS, adapted
from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.core.errors import InputError
from klrl_edu.learning import losses
from klrl_edu.learning.batches import Batch, score_batch
from tests.audit.scenes import MU, answers, answers_policy, k2_loss


def gradient(loss, **options):
    return audit_gradient(loss, answers_policy(), answers(), **options)


def value(estimator, **options):
    return audit_value(estimator, answers_policy(), answers(), **options)


def verl_policy_loss(old_log_prob, log_prob, advantages, response_mask, cliprange=0.2):
    """As verl's: the loss and a statistic; a sum over the mask, so that it is the sequence's."""
    ratio = torch.exp(log_prob - old_log_prob)
    per_token = torch.maximum(
        -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    )
    return (per_token * response_mask).sum() / len(log_prob), (ratio > 1 + cliprange).float().mean()


def trl_loss(
    per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, completion_mask, beta
):
    """As TRL's GRPO with its k3 in the loss; summed over the mask."""
    ratio = torch.exp(per_token_logps - old_per_token_logps)
    kl = (
        torch.exp(ref_per_token_logps - per_token_logps)
        - (ref_per_token_logps - per_token_logps)
        - 1
    )
    return ((-ratio * advantages.unsqueeze(1) + beta * kl) * completion_mask).sum(-1).mean()


def test_verl_names_are_understood_and_the_advantage_is_the_bare_reward():
    report = gradient(verl_policy_loss, batch_size=2)
    assert report.name == "verl_policy_loss"
    assert report.verdict == "verl_policy_loss is unbiased for expected_reward."
    assert report.differentiation == "vmap"


def test_trl_names_are_understood_and_k3_in_the_loss_is_forward_kl_per_token():
    assert (
        gradient(trl_loss, batch_size=2).verdict == "trl_loss climbs E[r] − 0.7·KL(q‖π) per token."
    )


def test_own_names_take_the_fields_of_a_batch():
    def mine(log_probs, prior_log_probs, rewards, kl_coef):
        u = (log_probs - prior_log_probs).sum(-1)
        return -((rewards.sum(-1) - kl_coef * u.detach()) * log_probs.sum(-1)).mean()

    assert gradient(mine, batch_size=2).relative_bias["objective"] < 1e-12
    assert gradient(
        lambda log_dists, prior_log_dists: (
            (log_dists.exp() * (log_dists - prior_log_dists).nan_to_num(0, 0, 0)).sum() * 1.0
        )
    ).targets


def test_every_field_has_its_documented_shape():
    tokens = answers().prior.tokens
    batch = score_batch(answers_policy(), [answers()], [tokens], distributions=True)
    sequence, number, full = (
        {"group", "kl_coef", "truncated", "log_ratio", "advantages"},
        {"beta"},
        {"log_dists", "prior_log_dists"},
    )
    for name, reader in FIELDS.items():
        wanted = (
            (6,)
            if name in sequence
            else ()
            if name in number
            else (6, 3, 3)
            if name in full
            else (6, 3)
        )
        if name != "prompt":  # of which this problem has none
            assert tuple(reader(batch).shape) == wanted, name
    assert FIELDS["prompt"](batch) is None
    assert FIELDS["completion_mask"](batch).dtype == torch.long


def test_beta_is_one_number_or_an_error():
    base = answers()
    both = [dataclasses.replace(base, kl_coef=kl_coef) for kl_coef in (0.5, 2.0)]
    tokens = base.prior.tokens
    assert float(FIELDS["beta"](score_batch(answers_policy(), both[:1], [tokens]))) == 0.5
    mixed = score_batch(answers_policy(), both, [tokens, tokens])
    with pytest.raises(InputError, match=r"beta is one number, .* \[0\.5, 2\.0\]; take kl_coef"):
        FIELDS["beta"](mixed)


def test_adapt_says_what_other_names_are():
    def odd(lp, ref, mask, weight):
        return weight * ((lp - ref).sum(-1).square() * mask[:, 0]).mean()

    report = gradient(
        odd, adapt={"lp": "log_probs", "ref": "ref_log_prob", "mask": "live", "weight": 0.5}
    )
    assert report.verdict == "odd is unbiased for reverse_kl."
    by_function = gradient(
        odd,
        adapt=lambda b: {
            "lp": b.log_probs,
            "ref": b.prior_log_probs,
            "mask": b.live,
            "weight": 0.5,
        },
    )
    assert torch.equal(by_function.mean, report.mean)


def test_adapt_replaces_an_advantage_and_a_default():
    report = gradient(verl_policy_loss, adapt={"advantages": 2.0, "cliprange": 0.1})
    assert report.verdict == "verl_policy_loss has expectation 0."


def test_a_default_is_kept():
    def with_default(log_probs, prior_log_probs, beta=3.0):
        return beta * (log_probs - prior_log_probs).sum(-1).square().mean() / 2

    assert gradient(with_default).scale["reverse_kl"] == pytest.approx(3, rel=1e-12)


def test_unknown_names_are_refused_with_those_that_are_known():
    def f(log_prob, logits):
        return log_prob.sum()

    with pytest.raises(
        InputError,
        match=(
            r"f takes 'logits', which is not understood.*adapt=\{'logits'.*Known names: tokens,"
            r" .*response_mask"
        ),
    ):
        gradient(f)
    with pytest.raises(
        InputError, match=r"adapt names 'nope', which is no parameter of f; it has log_prob, logits"
    ):
        gradient(f, adapt={"nope": 1, "logits": 1})


def test_a_loss_a_token_is_refused_with_the_ways_to_average_it():
    with pytest.raises(
        InputError, match=r"returned shape \[2, 3\]; a Loss maps a Batch to a scalar"
    ):
        gradient(lambda log_prob, ref_log_prob: log_prob - ref_log_prob, batch_size=2)


def test_losses_of_a_batch_partials_and_modules_stay_what_they_are():
    def of_anything(b):
        return k2_loss(b)

    def annotated(x: Batch, power: float = 2.0):
        return ((x.log_probs - x.prior_log_probs).sum(-1) ** power).mean() / 2

    class Module(nn.Module):
        def forward(self, batch):
            return k2_loss(batch)

    for loss in (of_anything, annotated, Module(), partial(annotated, power=2)):
        assert gradient(loss).relative_bias["reverse_kl"] < 1e-12
    assert gradient(partial(losses.reinforce, baseline=3.0)).name == "reinforce"


def test_estimators_take_log_ratios_batches_or_names_and_give_sequences_or_tokens():
    for estimator in (
        lambda u: u,
        lambda log_ratio: log_ratio,
        lambda batch: (batch.log_probs - batch.prior_log_probs).sum(-1),
        lambda logprob, ref_logprob: logprob - ref_logprob,  # [N,T] is summed
        lambda log_probs, prior_log_probs: (log_probs - prior_log_probs).sum(-1),
        lambda per_token_logps, ref_per_token_logps: (per_token_logps - ref_per_token_logps, None),
        lambda log_dists, prior_log_dists: torch.where(
            log_dists > -math.inf, log_dists.exp() * (log_dists - prior_log_dists), 0.0
        ).sum(-1),
    ):
        report = value(estimator, batch_size=2)
        assert report.relative_bias["reverse_kl"] < 1e-12


def test_padding_of_an_estimator_a_token_does_not_count():
    assert (
        value(
            lambda logprob, ref_logprob, live: torch.where(live, logprob - ref_logprob, 1e6)
        ).relative_bias["reverse_kl"]
        < 1e-12
    )


def test_a_verl_estimator_with_a_switch_needs_its_value():
    def kl_penalty(logprob, ref_logprob, kl_penalty):
        return (logprob - ref_logprob).abs() if kl_penalty == "abs" else logprob - ref_logprob

    with pytest.raises(InputError, match="takes 'kl_penalty'"):
        value(kl_penalty)
    assert value(kl_penalty, adapt={"kl_penalty": "k1"}).relative_bias["reverse_kl"] < 1e-12
    assert value(kl_penalty, adapt={"kl_penalty": "abs"}).bias["reverse_kl"] > 0.1


def test_old_log_probs_are_the_behaviour_policys():
    def weighted(log_prob, old_log_prob, ref_log_prob):
        return (log_prob - old_log_prob).sum(-1).exp() * (log_prob - ref_log_prob).sum(-1)

    report = value(weighted, behaviour=answers_policy(MU))
    assert report.relative_bias["reverse_kl"] < 1e-12
    assert report.variance > 0


def test_an_adapted_loss_is_a_loss_for_training():
    batch = score_batch(answers_policy(), [answers()], [answers().prior.tokens])
    assert adapted(trl_loss, None)(batch).shape == ()
