"""Mean and variance of gradients against loops over every order of every batch, in plain Python and
autograd.
"""

import dataclasses
import itertools
import math

import pytest
import torch

from klrl_edu.audit import moments
from klrl_edu.audit.audit import audit_gradient
from klrl_edu.audit.coordinates import PrefixLogits, SequenceLogits
from klrl_edu.core import logspace
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from klrl_edu.learning.batches import needs, score_batch
from klrl_edu.models.contract import enumerate_support, sequence_log_probs, token_log_probs
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from tests.audit.scenes import (
    MU,
    answers,
    answers_policy,
    batch_mean_baseline,
    binary,
    k2_loss,
    log_ratio,
    random_prefix_table,
)

PI, Q, R = [0.5, 0.2, 0.1, 0.2], [0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 0.0, 2.0]


def brute_force(loss, policy, problem, size, behaviour=None, distributions=False):
    """E g and Var g over all S^B orders, one backward pass through the policy each."""
    tokens = enumerate_support(policy, prompt=problem.prompt).tokens
    weights = sequence_log_probs(behaviour or policy, tokens).detach().exp().tolist()
    gradients, probabilities = [], []
    for order in itertools.product(range(len(tokens)), repeat=size):
        chosen = tokens[list(order)]
        batch = score_batch(policy, [problem], [chosen], distributions=distributions)
        if behaviour is not None:
            batch = dataclasses.replace(
                batch, behaviour_log_probs=token_log_probs(behaviour, chosen).detach()
            )
        (gradient,) = torch.autograd.grad(
            loss(batch), list(policy.parameters()), materialize_grads=True
        )
        gradients.append(gradient.reshape(-1))
        probabilities.append(math.prod(weights[y] for y in order))
    stacked, weight = torch.stack(gradients), torch.tensor(probabilities, dtype=torch.float64)
    mean = weight @ stacked
    return mean, float(weight @ (stacked - mean).square().sum(-1))


@needs("distributions")
def per_token_kl(batch):
    return kl_values.per_token_kl(batch.log_dists, batch.prior_log_dists).sum(
        -1
    ).mean() + losses.reinforce(batch)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("loss", [losses.rloo, batch_mean_baseline, k2_loss, per_token_kl])
def test_moments_over_multisets_are_those_over_all_orders(loss, size):
    policy, problem = answers_policy(), answers()
    mean, variance = brute_force(loss, policy, problem, size, distributions=loss is per_token_kl)
    report = audit_gradient(loss, policy, problem, batch_size=size)
    assert torch.allclose(report.mean, mean, rtol=0, atol=1e-13)
    assert report.variance == pytest.approx(variance, rel=1e-12)
    assert report.executions == math.comb(6 + size - 1, size)


def test_a_large_table_takes_the_kernel_and_agrees_with_brute_force(monkeypatch):
    """n² = 16 products against P = 30 logits: the variance comes from inner products of edges."""
    policy, problem = binary(4)
    mean, variance = brute_force(losses.reinforce, policy, problem, 1)
    monkeypatch.setattr(
        moments, "_about_the_mean", lambda *_: pytest.fail("the kernel was meant to serve")
    )
    monkeypatch.setattr(moments, "_CHUNK", 64)  # no look-up table
    monkeypatch.setattr(moments, "_PAIRS", 64)  # several chunks
    report = audit_gradient(losses.reinforce, policy, problem)
    assert torch.allclose(report.mean, mean, rtol=0, atol=1e-13)
    assert report.variance == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("loss", [losses.rloo, k2_loss, per_token_kl])
@pytest.mark.parametrize("kind", [SequenceLogits, PrefixLogits])
def test_kernels_of_pairs_give_the_variance_of_brute_force_for_groups(monkeypatch, kind, loss):
    monkeypatch.setattr(kind, "squares_are_cheap", False)
    monkeypatch.setattr(
        moments, "_about_the_mean", lambda *_: pytest.fail("the kernel was meant to serve")
    )
    problem = answers()
    policy = (
        answers_policy()
        if kind is SequenceLogits
        else restrict_to_support(random_prefix_table(problem.space, 0), problem.prior)
    )
    _, variance = brute_force(loss, policy, problem, 2, distributions=loss is per_token_kl)
    assert audit_gradient(loss, policy, problem, batch_size=2).variance == pytest.approx(
        variance, rel=1e-12
    )


def test_a_variance_of_nothing_is_nothing_on_either_path():
    """At π = π*, RLOO's every gradient is 0; an exact loss has one execution. Neither may leave a
    rest of cancelled squares.
    """
    policy, problem = binary(9)  # n² = 324 and P = 512
    tokens = enumerate_support(policy).tokens
    log_star = logspace.log_normalize(
        sequence_log_probs(problem.prior, tokens).detach()
        + problem.rewards(tokens) / problem.kl_coef
    )
    star = SequenceTable(problem.space, tokens, log_star)
    at_star = audit_gradient(losses.rloo, star, problem, batch_size=2, max_executions=200_000)
    assert at_star.variance < 1e-27
    assert at_star.verdict == "rloo has expectation 0, as has objective here."
    assert audit_gradient(losses.exact, policy, problem).variance == 0


def test_a_small_variance_beside_a_large_mean_keeps_its_digits():
    """A thousand times one direction, the same for every batch, plus a thousandth of REINFORCE, of
    which the variance is 1e-6.
    """
    policy, problem = binary(10)  # n² = 900 and P = 2,046: the kernel is tried first

    @needs("distributions")
    def nearly_constant(batch):
        # every batch pushes the first prefix's distribution, which all sequences share, in one
        # direction
        return 1e3 * batch.log_dists[:, 0, 0].mean() + 1e-3 * losses.reinforce(batch)

    report = audit_gradient(nearly_constant, policy, problem)
    assert report.variance == pytest.approx(
        1e-6 * audit_gradient(losses.reinforce, policy, problem).variance, rel=1e-9
    )
    assert float(report.mean.norm()) > 1e2


def test_off_policy_moments_by_hand():
    """Importance-weighted REINFORCE from μ on four sentences: E = ∇(−J) whatever μ, and the
    variance Σ μ ρ² (r − u)² ‖e_y − π‖² − ‖E‖².
    """
    mu = [0.25, 0.3, 0.35, 0.1]
    behaviour = SequenceTable.from_texts(
        dict(zip(["the cat", "the dog", "a cat", "a dog"], mu, strict=True)),
        space=four_sentences().space,
    )

    def weighted(batch):
        ratio = (batch.log_probs.detach() - batch.behaviour_log_probs).sum(-1).exp()
        return -(ratio * losses.penalised_reward(batch) * batch.log_probs.sum(-1)).mean()

    reward = [r - math.log(p / q) for r, p, q in zip(R, PI, Q, strict=True)]
    weight = [m * (p / m * a) ** 2 for m, p, a in zip(mu, PI, reward, strict=True)]
    norms = [sum(((k == y) - PI[k]) ** 2 for k in range(4)) for y in range(4)]
    report = audit_gradient(
        weighted, four_sentences_policy(), four_sentences(), behaviour=behaviour
    )
    assert report.relative_bias["objective"] < 1e-12
    second = sum(w * n for w, n in zip(weight, norms, strict=True))
    assert report.variance == pytest.approx(
        second - float(report.targets["objective"].square().sum()), rel=1e-12
    )


def test_off_policy_batches_are_those_of_the_behaviour_policy():
    policy, problem, behaviour = answers_policy(), answers(), answers_policy(MU)

    def clipped(batch):
        ratio = (batch.log_probs - batch.behaviour_log_probs).sum(-1).exp()
        reward = losses.penalised_reward(batch)
        return -torch.minimum(ratio * reward, ratio.clamp(0.8, 1.2) * reward).mean()

    for size in (1, 2):
        mean, variance = brute_force(clipped, policy, problem, size, behaviour)
        report = audit_gradient(clipped, policy, problem, batch_size=size, behaviour=behaviour)
        assert torch.allclose(report.mean, mean, rtol=0, atol=1e-13)
        assert report.variance == pytest.approx(variance, rel=1e-12)


def test_grpo_of_two_with_the_population_std_follows_who_wins():
    """E = −Σ_{y,y'} π π' sign(r − r')/2 · (s − s')/… on E[r] alone: (0.05, −0.14, −0.07, 0.16), to
    be climbed.
    """

    def grpo(batch):
        reward = batch.rewards.sum(-1)
        centred = reward - reward.mean()
        spread = centred.square().mean().sqrt()
        advantage = centred / torch.where(spread > 0, spread, torch.ones_like(spread))
        return -(advantage * batch.log_probs.sum(-1)).mean()

    report = audit_gradient(grpo, four_sentences_policy(), four_sentences(), batch_size=2)
    assert report.mean.tolist() == pytest.approx([-0.05, 0.14, 0.07, -0.16], abs=1e-13)
    assert report.differentiation == "vmap"


def test_the_anchors_of_the_issue():
    assert (
        float(
            audit_gradient(
                lambda b: log_ratio(b).mean(), four_sentences_policy(), four_sentences()
            ).mean.norm()
        )
        < 1e-15
    )
    k2 = audit_gradient(k2_loss, four_sentences_policy(), four_sentences())
    assert k2.mean.tolist() == pytest.approx([0.061675, -0.101052, -0.079294, 0.118671], abs=5e-7)
    k3 = audit_gradient(
        lambda b: kl_values.k3(log_ratio(b)).mean(), four_sentences_policy(), four_sentences()
    )
    assert k3.mean.tolist() == pytest.approx([0.1, -0.1, -0.1, 0.1], abs=1e-13)
