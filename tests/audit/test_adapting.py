"""Functions of named tensors, as people and libraries write them."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import nn

from klrl_edu.audit.adapting import ADVANTAGES, FIELDS, adapted, kind_and_reason, kind_of, notes_of
from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.core.errors import InputError
from klrl_edu.estimators import divergences, kl_gradients, kl_values, top_k
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


class PolicyLoss(nn.Module):
    """As OpenRLHF's: a mask that may be left out, an advantage a token, and a statistic."""

    def forward(self, log_probs, old_log_probs, advantages, action_mask=None):
        assert advantages.shape == log_probs.shape
        per_token = -(log_probs - old_log_probs).exp() * advantages
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        return (per_token * mask).sum() / mask.sum(), mask.sum()


def test_openrlhf_names_are_understood():
    def penalty(action_log_probs, base_action_log_probs, action_mask):
        return (action_log_probs - base_action_log_probs) * action_mask

    def approximate(log_probs, log_probs_base, old_action_log_probs, loss_mask):
        return (log_probs - log_probs_base) * loss_mask + 0 * old_action_log_probs

    for estimator in (penalty, approximate):
        assert value(estimator, batch_size=2).relative_bias["reverse_kl"] < 1e-12


def test_a_mask_that_may_be_none_is_given_and_said():
    """Without it the mean would run over padding too."""

    def by_hand(batch):
        reward = batch.rewards.sum(-1, keepdim=True)
        ratio = (batch.log_probs - batch.behaviour_log_probs).exp()
        return -(ratio * reward * batch.live).sum() / batch.live.sum()

    report = gradient(PolicyLoss(), batch_size=2)
    assert torch.equal(report.mean, gradient(by_hand, batch_size=2).mean)
    assert report.notes[1].startswith("action_mask: the live tokens, and not its default None")
    unmasked = gradient(PolicyLoss(), batch_size=2, adapt={"action_mask": None})
    assert not torch.allclose(unmasked.mean, report.mean, rtol=1e-3)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_by_name_are_those_of_each_group(name):
    """On two problems, so that a group is less than the batch; against the formulas of the words.

    [N] for TRL's names and [N,T] for verl's.
    """

    def of_trl(per_token_logps, advantages):
        return -(advantages * per_token_logps.sum(-1)).mean()

    def of_verl(log_prob, advantages, response_mask):
        return -(advantages * log_prob * response_mask).sum() / len(log_prob)

    def by_hand(batch):
        total = 0.0
        for g in (0, 1):
            r, own = batch.rewards.sum(-1), batch.group == g
            r, log_prob = r[own], batch.log_probs.sum(-1)[own]
            n, mean = len(r), r.mean()
            others = (r.sum() - r) / (n - 1)
            std = ((r - mean).square().sum() / (n - 1)).sqrt()
            advantage = {
                "reward": r,
                "group_mean": r - mean,
                "leave_one_out": r - others,
                "z_score": (r - mean) / (std + 1e-4),
            }[name]
            total = total - (advantage * log_prob).sum()
        return total / len(batch.rewards)

    base = answers()
    problems = [base, dataclasses.replace(base, kl_coef=2.0)]
    policy = answers_policy()
    expected = audit_gradient(by_hand, policy, problems, batch_size=2)
    for function in (of_trl, of_verl):
        adapt = {"advantages": name}
        report = audit_gradient(function, policy, problems, batch_size=2, adapt=adapt)
        assert torch.allclose(report.mean, expected.mean, rtol=0, atol=1e-14)
        # a baseline of another group would leave the mean as it is
        assert report.variance == pytest.approx(expected.variance, rel=1e-12)
        assert report.notes[0].startswith(f"advantages: {ADVANTAGES[name].words}")


def test_what_stands_for_advantages_is_said_right_after_the_verdict():
    report = gradient(trl_loss, batch_size=2)
    note = (
        "advantages: the sequence's reward r(y), without baseline and KL penalty;"
        " adapt={'advantages': 'leave_one_out'} gives another."
    )
    assert report.notes == (note,)
    assert str(report).splitlines()[1] == f"Note: {note}"
    html = report._repr_html_()
    assert html.index("without baseline") < html.index("<table>")
    verl = gradient(verl_policy_loss, batch_size=2).notes[0]
    assert "KL penalty, on every live token; adapt=" in verl
    assert notes_of(adapted(trl_loss, {"advantages": 1.0})) == ()


def test_entries_of_adapt_may_be_functions_of_the_batch():
    def odd(lp, weight, limit):
        return -(weight * lp.sum(-1)).mean() + 0 * limit

    report = gradient(
        odd,
        batch_size=2,
        adapt={
            "lp": "log_probs",
            "weight": lambda batch: batch.rewards.sum(-1) * ~batch.truncated,
            "limit": lambda batch: batch.tokens.shape[1],
        },
    )

    def by_hand(batch):
        return -(batch.rewards.sum(-1) * ~batch.truncated * batch.log_probs.sum(-1)).mean()

    assert torch.equal(report.mean, gradient(by_hand, batch_size=2).mean)


def test_a_loss_of_a_batch_takes_adapt_for_its_other_parameters():
    def scaled(batch, factor):
        return factor * k2_loss(batch)

    assert gradient(scaled, adapt={"factor": 3.0}).scale["reverse_kl"] == pytest.approx(3)
    by_name = gradient(losses.grpo, batch_size=2, adapt={"epsilon": 1.0})
    assert torch.equal(by_name.mean, gradient(partial(losses.grpo, epsilon=1.0), batch_size=2).mean)


def test_names_decide_what_kind_of_function_it_is_where_they_can():
    def loo32(log_prob, token_level_rewards):
        pass

    def centred(batch):
        pass

    def annotated(x: Batch):
        pass

    def my_loss(log_prob, ref_log_prob):
        pass

    def kl_penalty(logprob, ref_logprob):
        pass

    def of_ratios(log_ratio):
        pass

    def objective(b):
        pass

    def mean_of(log_prob, ref_log_prob):
        pass

    kinds = {
        **dict.fromkeys((verl_policy_loss, trl_loss, loo32, centred, annotated), "gradient"),
        **dict.fromkeys((my_loss, PolicyLoss(), losses.rloo, losses.exact), "gradient"),
        **dict.fromkeys((kl_gradients.reward_k1, kl_gradients.loss_k3), "gradient"),
        **dict.fromkeys((kl_penalty, of_ratios, kl_values.k3, kl_values.rao_blackwell), "value"),
        **dict.fromkeys((divergences.chi_squared, top_k.top_k_truncated), "value"),
        **dict.fromkeys((objective, mean_of, torch.exp), None),
    }
    for function, kind in kinds.items():
        assert kind_of(function) == kind, function
    assert kind_and_reason(loo32)[1] == "its parameter token_level_rewards"
    assert kind_and_reason(kl_penalty)[1] == "'kl' in its name"
    assert kind_and_reason(losses.rloo)[1] == "it takes a Batch"
    assert kind_and_reason(kl_gradients.reward_k1)[1] == "'gradient' in its module"
