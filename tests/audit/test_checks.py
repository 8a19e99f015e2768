"""Each thing that a loss must not do is named, with the batch that shows it."""

import math
import random

import numpy as np
import pytest
import torch

from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.core.draws import as_generator
from klrl_edu.core.errors import InputError, UnsupportedPolicyError
from klrl_edu.learning import losses
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from tests.audit.scenes import answers, answers_policy, k2_loss, log_ratio


def refused(loss, match, batch_size=2, **options):
    with pytest.raises(InputError, match=match):
        audit_gradient(
            loss, four_sentences_policy(), four_sentences(), batch_size=batch_size, **options
        )


def test_nan_and_infinity_are_named_with_their_batch():
    refused(
        lambda batch: k2_loss(batch) * math.nan,
        r"the loss <lambda> is nan on the batch \['the cat', 'the dog'\]",
    )
    refused(lambda batch: k2_loss(batch) + math.inf, r"is inf on the batch")
    refused(
        lambda batch: (log_ratio(batch) - log_ratio(batch)).abs().sqrt().sum(),
        r"is 0 and the gradient's norm is nan on the batch",
    )


def test_nan_on_one_batch_alone_is_found_among_all():
    """A z-score by the sample std divides by 0 where both rewards are alike."""

    def z_score(batch):
        reward = batch.rewards.sum(-1)
        return -((reward - reward.mean()) / reward.std() * batch.log_probs.sum(-1)).mean()

    refused(
        z_score,
        r"the loss z_score is nan on the batch \['the dog', 'a cat'\]; look for .* a deviation"
        r" of 0",
    )


def test_what_is_no_scalar_or_has_no_gradient_is_named():
    refused(
        lambda batch: batch.log_probs.sum(-1),
        r"returned shape \[2\]; a Loss maps a Batch to a scalar tensor",
    )
    refused(lambda batch: batch.log_probs, r"returned shape \[2, 2\]")
    refused(lambda batch: 1.0, "returned float")
    refused(lambda batch: batch.rewards.sum(), "carries no gradient")


@pytest.mark.parametrize("name", ["rewards", "prior_log_probs", "log_probs"])
def test_a_loss_that_changes_its_inputs_is_named(name):
    def in_place(batch):
        getattr(batch, name).mul_(2)
        return k2_loss(batch)

    def behind_the_back(batch):
        getattr(batch, name).detach().numpy()[:] = 0.5
        return k2_loss(batch)

    for loss in (in_place, behind_the_back):
        refused(loss, rf"the loss {loss.__name__} changes its input batch.{name} in place")


@pytest.mark.parametrize(
    ("generator", "number"),
    [
        ("torch", lambda: float(torch.rand(()))),
        ("numpy", lambda: np.random.random()),
        ("Python", lambda: random.random()),
    ],
)
def test_a_loss_that_draws_from_a_global_generator_is_named(generator, number):
    refused(
        lambda batch: number() * k2_loss(batch),
        rf"draws from the global generator of {generator}.*take a parameter `draw`",
    )


def test_a_generator_used_late_is_still_noticed():
    """Only on batches of two like sequences, which are not among those looked at closely."""

    def sometimes(batch):
        rewards = batch.rewards.sum(-1).tolist()
        return k2_loss(batch) * (float(torch.rand(())) if rewards[0] == rewards[-1] == 2 else 1.0)

    refused(sometimes, "global generator of torch")


def test_a_loss_with_a_state_or_a_generator_of_its_own_is_named():
    own = as_generator(3)
    refused(
        lambda batch: k2_loss(batch) * float(torch.rand((), generator=own)),
        r"gives two results for one batch \['the cat', 'the dog'\]",
    )


def test_a_loss_that_depends_on_the_order_of_its_batch_is_named():
    refused(
        lambda batch: log_ratio(batch)[0] ** 2,
        r"depends on the order of its batch: \['the cat', 'the dog'\] reversed gives another"
        r" result",
    )
    refused(
        lambda batch: (log_ratio(batch) * torch.arange(3.0).double()).square().sum(),
        "depends on the order",
        batch_size=3,
    )

    def rotation_only(batch):
        u = log_ratio(batch)
        return u[0] * u[3] + u[1] * u[2]  # the same reversed

    refused(rotation_only, r"depends on the order.*rotated", batch_size=4)


def test_order_within_a_symmetric_loss_is_no_fault():
    audit_gradient(losses.rloo, four_sentences_policy(), four_sentences(), batch_size=4)
    audit_gradient(
        lambda batch: log_ratio(batch)[0] ** 2, four_sentences_policy(), four_sentences()
    )  # a batch of one has no order


def test_an_order_hidden_behind_draws_is_named():
    def first_or_second(batch, draw):
        return log_ratio(batch)[draw(torch.tensor([[0.9, 0.1]]).double().log())].square().sum()

    refused(first_or_second, "depends on the order")


def test_estimators_are_held_to_the_same():
    def audit(estimator, **options):
        return audit_value(estimator, four_sentences_policy(), four_sentences(), **options)

    with pytest.raises(
        InputError, match=r"the estimator <lambda> is NaN on the batch \['the cat'\]"
    ):
        audit(lambda u: u * math.nan)
    with pytest.raises(InputError, match="global generator of torch"):
        audit(lambda u: u * torch.rand(()))
    with pytest.raises(InputError, match=r"changes its input batch\.log_probs in place"):
        audit(lambda log_probs, prior_log_probs: log_probs.sub_(prior_log_probs).sum(-1))
    with pytest.raises(InputError, match=r"returned float"):
        audit(lambda log_probs, live: 1.0)
    with pytest.raises(InputError, match=r"returned shape \[3\]; expected a scalar, \[N\]"):
        audit(lambda log_probs, live: torch.zeros(3))
    with pytest.raises(InputError, match="depends on the order"):
        audit(lambda log_probs, live: log_probs[0].sum(), batch_size=2)


def test_batches_drawn_off_the_policys_support_are_refused_and_the_converse_is_said():
    some = SequenceTable.from_texts({"": 0.5, "a": 0.5}, space=answers().space)
    with pytest.raises(
        UnsupportedPolicyError,
        match=(
            r"the behaviour policy gives mass 0.7 to sequences where the policy has"
            r" none.*restrict_to_support"
        ),
    ):
        audit_gradient(k2_loss, some, answers(), behaviour=answers_policy())
    report = audit_gradient(k2_loss, answers_policy(), answers(), behaviour=some)
    assert any(
        "never draws sequences that hold 0.7 of the policy's mass" in note for note in report.notes
    )
    assert report.executions == 2


def test_an_infinite_kl_coef_is_refused():
    with pytest.raises(InputError, match="finite kl_coef"):
        audit_gradient(k2_loss, answers_policy(), answers(math.inf))
