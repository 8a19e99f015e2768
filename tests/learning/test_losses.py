"""Losses: what each needs, the gradient of the exact one, and the baselines."""

import math
from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klrl_edu import reference
from klrl_edu.core import logspace
from klrl_edu.exact.enumeration import problem_support
from klrl_edu.exact.posterior import posterior
from klrl_edu.learning import losses
from klrl_edu.learning.batches import score_batch
from klrl_edu.models.contract import sequence_log_probs
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.testing import policies, problems
from tests.exact.dictionaries import INF, assert_close, live_tuples, reward_dict, table_dict

GRADIENT = [
    -0.011675039611,
    -0.078948283960,
    -0.010705934735,
    0.101329258306,
]  # ∇J of t05, in sequence logits


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def whole_batch(policy, problem, **options):
    tokens = problem_support(problem).tokens
    return score_batch(policy, [problem], [tokens], complete=True, **options)


def flat_gradient(value, model):
    gradients = torch.autograd.grad(
        value, list(model.parameters()), retain_graph=True, materialize_grads=True
    )
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


# --- the exact loss -------------------------------------------------------------------------------


def test_the_exact_loss_has_the_gradient_of_t05():
    policy = four_sentences_policy()
    loss = losses.exact(score_batch(policy, [four_sentences()], [policy.tokens], complete=True))
    assert float(loss.detach()) == pytest.approx(-(0.9 - 0.099793472091), abs=5.1e-13)
    assert flat_gradient(loss, policy).tolist() == pytest.approx(
        [-x for x in GRADIENT], abs=5.1e-13
    )


@given(data=st.data())
def test_the_gradient_of_the_objective_is_that_of_the_divergence_to_the_posterior(data):
    """∇J = −λ∇KL(π‖π*), in whatever coordinates the policy has, for every problem without a hard
    reward.
    """
    problem = data.draw(problems(forbid=False))
    policy = data.draw(policies(problem))
    target = posterior(problem)
    ours = flat_gradient(-losses.exact(whole_batch(policy, problem)), policy)
    log_pi = sequence_log_probs(policy, target.enumerated().tokens)
    theirs = flat_gradient(
        -problem.kl_coef * logspace.kl_divergence(log_pi, target.log_probs), policy
    )
    largest = float(
        (
            target.enumerated().rewards.abs()
            + problem.kl_coef * target.enumerated().log_prior.abs()
        ).max()
    )
    assert_close(ours, theirs, largest)


@settings(max_examples=25)
@given(data=st.data())
def test_the_gradient_is_the_references_and_the_derivative_of_j(data):
    """In sequence logits: plain dictionaries to 1e-12, and mpmath's derivative of J(θ) in 40
    digits.
    """
    problem = data.draw(problems(max_words=2, max_length=2, forbid=False))
    tokens = problem_support(problem).tokens
    logits = data.draw(st.lists(st.floats(-2, 2), min_size=len(tokens), max_size=len(tokens)))
    policy = SequenceTable(problem.space, tokens, vector(*logits))
    seen = flat_gradient(-losses.exact(whole_batch(policy, problem)), policy)
    keys, q, r = live_tuples(problem.space, tokens), table_dict(problem.prior), reward_dict(problem)
    pi = reference.softmax(dict(zip(keys, logits, strict=True)))
    by_hand = reference.objective_gradient(pi, q, r, problem.kl_coef)
    assert_close(seen, [by_hand[key] for key in keys])

    def objective(shift, moved):
        weight = {
            key: mpmath.exp(mpmath.mpf(x) + (shift if key == moved else 0))
            for key, x in zip(keys, logits, strict=True)
        }
        total = mpmath.fsum(weight.values())
        lam = mpmath.mpf(problem.kl_coef)
        return mpmath.fsum(
            w / total * (mpmath.mpf(r[key]) - lam * mpmath.log(w / total / mpmath.mpf(q[key])))
            for key, w in weight.items()
        )

    with mpmath.workdps(40):
        slopes = [float(mpmath.diff(partial(objective, moved=key), 0)) for key in keys]
    assert_close(seen, slopes, max(abs(x) for x in r.values() if not math.isnan(x)))


@settings(max_examples=15)
@given(data=st.data())
def test_the_gradient_by_next_token_logits_is_the_central_difference(data):
    """PrefixTable coordinates; h = 1e-5 leaves an error of about 1e-9 for J of order 10."""
    problem = data.draw(problems(max_words=2, max_length=2, forbid=False))
    policy = PrefixTable(problem.space, problem_support(problem).tokens)
    shape = policy.logits.shape
    with torch.no_grad():
        policy.logits.copy_(
            vector(
                *data.draw(
                    st.lists(st.floats(-1, 1), min_size=shape.numel(), max_size=shape.numel())
                )
            ).reshape(shape)
        )
        edges = torch.full(shape, False)
        edges[policy.trie.parent, policy.trie.token] = True
        policy.logits.masked_fill_(~edges, -INF)  # on the prior's support
    seen = flat_gradient(-losses.exact(whole_batch(policy, problem)), policy)
    assert bool(torch.isfinite(seen).all())
    h = 1e-5
    for index, (logit, slope) in enumerate(
        zip(policy.logits.detach().view(-1), seen.tolist(), strict=True)
    ):
        if float(logit) == -INF:
            assert slope == 0
            continue
        values = []
        for shift in (h, -h):
            moved = PrefixTable(
                problem.space, problem_support(problem).tokens, policy.logits.detach()
            )
            with torch.no_grad():
                moved.logits.view(-1)[index] += shift
            values.append(float(-losses.exact(whole_batch(moved, problem)).detach()))
        assert slope == pytest.approx((values[0] - values[1]) / (2 * h), abs=1e-7)


def test_a_policy_with_zeros_on_the_support_has_a_finite_objective_and_gradient():
    """0·(−inf) = 0: sequences that the policy never gives count nothing, at any λ."""
    for lam in (0.0, 1.0):
        problem = four_sentences(lam)
        policy = SequenceTable(
            problem.space, problem.prior.tokens, vector(0.0, math.log(3), -INF, -INF)
        )
        loss = losses.exact(whole_batch(policy, problem))
        assert float(loss.detach()) == pytest.approx(
            -(0.25 - lam * (0.25 * math.log(0.25 / 0.4) + 0.75 * math.log(0.75 / 0.3))), abs=1e-15
        )
        assert bool(torch.isfinite(flat_gradient(loss, policy)).all())


def test_the_exact_loss_averages_over_problems():
    policy, parts = four_sentences_policy(), [four_sentences(lam) for lam in (0.5, 2.0)]
    shared = [Problem(parts[0].prior, part.reward, part.kl_coef) for part in parts]
    tokens = policy.tokens
    joint = losses.exact(score_batch(policy, shared, [tokens, tokens], complete=True))
    single = [losses.exact(score_batch(policy, [part], [tokens], complete=True)) for part in parts]
    assert float(joint.detach()) == pytest.approx(float(sum(single).detach()) / 2, abs=1e-15)


# --- baselines ------------------------------------------------------------------------------------


def test_the_penalised_reward_carries_no_gradient():
    policy = four_sentences_policy()
    batch = score_batch(policy, [four_sentences(2.0)], [policy.tokens])
    reward = losses.penalised_reward(batch)
    assert not reward.requires_grad
    u = [math.log(p / q) for p, q in zip((0.5, 0.2, 0.1, 0.2), (0.4, 0.3, 0.2, 0.1), strict=True)]
    assert reward.tolist() == pytest.approx(
        [1 - 2 * u[0], -2 * u[1], -2 * u[2], 2 - 2 * u[3]], abs=1e-14
    )
