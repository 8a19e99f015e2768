"""Batches: what they hold, what they refuse to make up, and what a loss asks for."""

import functools
import math
from functools import partial

import pytest
import torch
from torch import nn

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import InputError, UnsupportedPolicyError
from klrl_edu.estimators import kl_values
from klrl_edu.evaluation.compare import compare
from klrl_edu.exact.posterior import posterior
from klrl_edu.learning import losses
from klrl_edu.learning.batches import Batch, absent, needs, needs_of, score_batch
from klrl_edu.learning.sources import on_policy, support, texts
from klrl_edu.learning.training import train, train_steps
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import count_reward, table_reward

INF = math.inf


def test_a_batch_says_what_policy_prior_and_reward_say():
    problem, policy = four_sentences(0.25), four_sentences_policy()
    batch = score_batch(
        policy, [problem], [problem.space.encode(["a dog", "the cat"])], distributions=True
    )
    assert batch.log_probs.exp().tolist() == [
        pytest.approx([0.3, 2 / 3]),
        pytest.approx([0.7, 5 / 7]),
    ]
    assert batch.prior_log_probs.exp().tolist() == [
        pytest.approx([0.3, 1 / 3]),
        pytest.approx([0.7, 4 / 7]),
    ]
    assert batch.rewards.tolist() == [[0.0, 2.0], [0.0, 1.0]]
    assert batch.kl_coef.tolist() == [0.25, 0.25]
    assert batch.group.tolist() == [0, 0]
    assert bool(batch.live.all())
    assert batch.log_probs.requires_grad
    assert not batch.behaviour_log_probs.requires_grad
    assert torch.equal(batch.behaviour_log_probs, batch.log_probs)
    taken = batch.log_dists.gather(-1, batch.tokens[..., None]).squeeze(-1)
    assert torch.allclose(taken, batch.log_probs, rtol=0, atol=1e-15)


def test_after_the_end_a_batch_holds_zeros():
    prior = SequenceTable.from_texts({"a": 0.5, "a b b": 0.5})
    problem = Problem(prior, count_reward("a", prior.space), 1.0)
    batch = score_batch(prior, [problem], [prior.space.encode(["a", "a b b"])])
    assert batch.live.tolist() == [[True, True, False, False], [True, True, True, True]]
    for name in ("log_probs", "prior_log_probs", "rewards"):
        assert getattr(batch, name)[0, 2:].tolist() == [0, 0]
    assert batch.rewards.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]


def test_truncated_texts_are_those_that_the_limit_ended():
    prior = SequenceTable.from_texts({"": 0.2, "a": 0.2, "a b": 0.2, "a b b": 0.2, "b b b": 0.2})
    problem = Problem(prior, count_reward("a", prior.space), 1.0)
    batch = support(problem)(prior)
    by_text = dict(zip(prior.space.decode(batch.tokens), batch.truncated.tolist(), strict=True))
    # T = 4: after three words the EOS is forced, after fewer it was chosen
    assert by_text == {"": False, "a": False, "a b": False, "a b b": True, "b b b": True}
    assert batch.pick(torch.tensor([0, 0])).truncated.tolist() == [batch.truncated[0].item()] * 2
    data = texts(["a b b", "a b"], prior.space)(prior)
    assert data.truncated.tolist() == [True, False]


def test_without_eos_every_sequence_is_whole():
    problem, policy = four_sentences(), four_sentences_policy()
    assert problem.space.eos is False
    assert support(problem)(policy).truncated.tolist() == [False] * 4


def masking_truncated(batch):
    """TRL's mask_truncated_completions in a REINFORCE loss with the KL in the reward."""
    mask = batch.live & ~batch.truncated[:, None]
    reward = losses.penalised_reward(batch)
    return -((reward[:, None] * batch.log_probs * mask).sum() / mask.sum().clamp(min=1))


def masking_of_sequences(batch):
    """The same with each sequence's own mean, so that a batch averages what one sample gives."""
    mask = batch.live & ~batch.truncated[:, None]
    reward = losses.penalised_reward(batch)
    each = (reward[:, None] * batch.log_probs * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return -each.mean()


def test_a_loss_that_masks_truncated_completions_trains_and_is_audited():
    prior = SequenceTable.from_texts({"a": 0.3, "b": 0.3, "a a": 0.4})
    problem = Problem(prior, count_reward("a", prior.space), 0.5)
    policy = SequenceTable.from_texts({"a": 0.5, "b": 0.3, "a a": 0.2}, space=prior.space)
    probabilities, rewards = [0.5, 0.3, 0.2], [1.0, 0.0, 2.0]
    kept, length = [True, True, False], 2
    advantage = [
        r - 0.5 * math.log(p / q)
        for r, p, q in zip(rewards, probabilities, [0.3, 0.3, 0.4], strict=True)
    ]
    # −E over one sample of A(y)·1{y kept}·s(y)/L, in sequence logits: s_k(y) = 1{y = k} − p_k
    terms = [p * a * k / length for p, a, k in zip(probabilities, advantage, kept, strict=True)]
    expected = [p * sum(terms) - t for p, t in zip(probabilities, terms, strict=True)]
    report = audit_gradient(masking_truncated, policy, problem, batch_size=1)
    assert report.mean.tolist() == pytest.approx(expected, abs=1e-15)
    assert audit_gradient(masking_truncated, policy, problem, batch_size=3).variance > 0
    # training averages the same gradient: many samples of it in one step (4 standard errors)
    before = policy.logits.detach().clone()
    descent = torch.optim.SGD(policy.parameters(), lr=1.0)
    source = on_policy(problem, 4000, draw=seeded_draw(0))
    train(policy, source, masking_of_sequences, steps=1, optimizer=descent)
    error = 4 * math.sqrt(float(report.variance) / 4000)
    assert float((before - policy.logits.detach() - report.mean).norm()) < error


def test_a_batch_made_by_hand_says_where_truncated_comes_from():
    whole = support(four_sentences())(four_sentences_policy())
    fields = {name: value for name, value in whole.tensors().items() if name != "truncated"}
    with pytest.raises(InputError, match=r"reads batch\.truncated.*space\.truncated\(tokens\)"):
        masking_truncated(Batch(**fields))


def test_problems_are_batched_in_groups():
    base = four_sentences()
    shared = [base, Problem(base.prior, lambda tokens, prompt: torch.zeros(len(tokens)), 3.0)]
    batch = on_policy(shared, 5, draw=seeded_draw(0))(four_sentences_policy())
    assert batch.group.tolist() == [0] * 5 + [1] * 5
    assert batch.kl_coef.tolist() == [1.0] * 5 + [3.0] * 5
    assert batch.tokens.shape == (10, 2)
    assert float(batch.rewards[5:].abs().max()) == 0
    assert isinstance(batch, Batch)
    assert "log_dists" not in batch.tensors()
    assert batch.prompt is None


def test_a_sequence_without_prior_mass_or_with_a_forbidden_reward_names_text_and_remedy():
    problem, policy = four_sentences(), four_sentences_policy()
    free = PrefixTable(problem.space)
    with pytest.raises(
        UnsupportedPolicyError,
        match=r"'dog dog'.*prior gives it no mass.*restrict_to_support\(policy, problem.prior\)",
    ):
        score_batch(free, [problem], [problem.space.encode(["a dog", "dog dog"])])
    hard = Problem(
        problem.prior,
        table_reward({"the cat": 1, "the dog": -INF, "a cat": 0, "a dog": 0}, problem.space),
        1.0,
    )
    with pytest.raises(
        UnsupportedPolicyError, match=r"'the dog'.*reward is -inf.*feasible_prior\(problem\)"
    ):
        score_batch(policy, [hard], [policy.tokens])


def test_needs_are_seen_through_partial():
    @needs("distributions", "support")
    def loss(batch, weight):
        return batch.log_probs.sum() * weight

    assert needs_of(partial(partial(loss, 1.0))) == {"distributions", "support"}
    assert needs_of(losses.exact) == {"support"}
    assert needs_of(partial(losses.reinforce, baseline=1.0)) == frozenset()


class ExactModule(nn.Module):
    @needs("support")
    def forward(self, batch):
        return losses.exact(batch)


@functools.wraps(losses.exact)
def logged(batch):
    return losses.exact(batch)


@pytest.mark.parametrize(
    "loss",
    [losses.exact, partial(losses.exact), partial(partial(losses.exact)), ExactModule(), logged],
    ids=["itself", "partial", "partial of partial", "module", "wraps"],
)
def test_a_wrapper_that_shows_the_mark_gets_the_support(loss):
    assert needs_of(loss) == {"support"}
    problem, policy = four_sentences(), four_sentences_policy()
    record = next(train_steps(policy, problem, loss, steps=1, lr=1e-9))
    assert record["objective"] == pytest.approx(-record["loss"], abs=1e-14)


class Silent(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, batch):
        return self.inner(batch)


@pytest.mark.parametrize(
    "wrapped", [lambda batch: losses.exact(batch), Silent(losses.exact)], ids=["lambda", "module"]
)
def test_a_wrapper_that_hides_the_need_of_the_support_is_refused_and_works_on_that_source(wrapped):
    problem, policy = four_sentences(), four_sentences_policy()
    draw = seeded_draw(0)
    with pytest.raises(InputError, match=r"step 1: losses\.exact sums over .*sources\.support"):
        train(policy, problem, wrapped, steps=1, draw=draw)
    with pytest.raises(InputError, match=r"losses\.exact sums over .*sources\.support"):
        audit_gradient(wrapped, policy, problem, batch_size=2)
    train(policy, support(problem), wrapped, steps=200, lr=0.05)
    assert compare(policy, posterior(problem)).reverse_kl < 1e-6
    report = audit_gradient(wrapped, four_sentences_policy(), support(problem))
    assert report.variance == 0
    assert report.relative_bias["objective"] < 1e-12


def test_a_hidden_need_of_distributions_is_refused_with_the_remedy():
    def full_kl(batch):
        return kl_values.per_token_kl(batch.log_dists, batch.prior_log_dists).sum(-1).mean()

    problem, policy = four_sentences(), four_sentences_policy()
    with pytest.raises(InputError, match=r"batch\.log_dists.*@needs\('distributions'\)"):
        train(policy, problem, full_kl, steps=1, draw=seeded_draw(0))
    source = on_policy(problem, 4, draw=seeded_draw(0), distributions=True)
    assert len(train(policy, source, full_kl, steps=1)) == 1
    assert len(
        train(policy, problem, needs("distributions")(full_kl), steps=1, draw=seeded_draw(0))
    )


def test_a_need_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"needs\('everything'\).*'support' or 'distributions'"):
        needs("everything")


# --- what a source does not give ------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum(-1),
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: torch.ones(2) * x,
        lambda x: torch.exp(x),
        lambda x: torch.stack([torch.ones(2), x]),
        lambda x: x[0],
        lambda x: -x,
        lambda x: x > 0,
        lambda x: torch.where(torch.tensor([True]), x, 0.0),
    ],
)
def test_whatever_reads_what_is_absent_is_told_so(read):
    with pytest.raises(InputError, match=r"reads batch\.rewards, which texts do not have"):
        read(absent("rewards", "which texts do not have."))


def test_what_is_absent_can_be_printed_copied_and_looked_for():
    nothing = absent("rewards", "which texts do not have.")
    assert repr(nothing) == "<no rewards>"
    assert not hasattr(nothing, "__array__")
    assert not isinstance(nothing, torch.Tensor)
