"""Targets against autograd with prefixes frozen by hand, finite differences, and numbers
by hand.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.core import logspace
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from klrl_edu.models.contract import conditional_log_probs, enumerate_support
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.problem import Problem
from klrl_edu.testing import policies, problems
from tests.audit.scenes import PI, REWARDS, Q, answers, answers_policy

TARGETS = [
    "objective",
    "expected_reward",
    "reverse_kl",
    "forward_kl",
    "reverse_kl_per_token",
    "forward_kl_per_token",
    "entropy",
    "entropy_per_token",
]


def by_autograd(policy, problem):
    """Every target as a differentiable sum over the support."""
    tokens = enumerate_support(policy).tokens
    log_dists, prior = (
        conditional_log_probs(policy, tokens),
        conditional_log_probs(problem.prior, tokens).detach(),
    )
    taken = tokens[..., None]
    log_pi, log_q = log_dists.gather(-1, taken).sum((-1, -2)), prior.gather(-1, taken).sum((-1, -2))
    frozen, reward = log_pi.detach().exp(), problem.rewards(tokens)
    live = problem.space.live(tokens)
    values = {
        "objective": -logspace.expectation(log_pi, reward - problem.kl_coef * (log_pi - log_q)),
        "expected_reward": -logspace.expectation(log_pi, reward),
        "reverse_kl": logspace.kl_divergence(log_pi, log_q),
        "forward_kl": logspace.kl_divergence(log_q, log_pi),
        "reverse_kl_per_token": (
            (frozen * (logspace.kl_divergence(log_dists, prior) * live).sum(-1)).sum()
        ),
        "forward_kl_per_token": (
            (frozen * (logspace.kl_divergence(prior, log_dists) * live).sum(-1)).sum()
        ),
        "entropy": logspace.expectation(log_pi, log_pi),
        "entropy_per_token": (
            (frozen * (logspace.expectation(log_dists, log_dists) * live).sum(-1)).sum()
        ),
    }
    parameters = list(policy.parameters())
    return {
        n: (float(v.detach()), torch.autograd.grad(v, parameters, retain_graph=True)[0].reshape(-1))
        for n, v in values.items()
    }


@settings(max_examples=25)
@given(data=st.data())
def test_targets_are_autograds_on_any_problem(data):
    problem = data.draw(problems(max_words=2, forbid=False))
    policy = data.draw(policies(problem))
    expected = by_autograd(policy, problem)
    gradients, values = (
        audit_gradient(losses.reinforce, policy, problem),
        audit_value(kl_values.k1, policy, problem),
    )
    assert list(gradients.targets) == TARGETS
    for name, (value, gradient) in expected.items():
        assert torch.allclose(gradients.targets[name], gradient, rtol=0, atol=1e-12)
        if "kl" in name:
            assert float(values.targets[name]) == pytest.approx(value, rel=1e-11, abs=1e-14)


def test_per_token_targets_by_hand():
    """The root and the words after it, one table each: π(a) = .45, π(b) = .35, π(end) = .2 and so
    on.
    """
    pi, q = (
        dict(zip(["", "a", "b", "a a", "a b", "b a"], PI, strict=True)),
        dict(zip(["", "a", "b", "a a", "a b", "b a"], Q, strict=True)),
    )
    nodes = [
        [("",), ("a", "a a", "a b"), ("b", "b a")],
        [("a",), ("a a",), ("a b",)],
        [("b",), ("b a",)],
    ]
    reverse = forward = 0.0
    for node in nodes:
        mass, q_mass = (sum(law[text] for edge in node for text in edge) for law in (pi, q))
        for edge in node:
            p, r = sum(pi[text] for text in edge) / mass, sum(q[text] for text in edge) / q_mass
            reverse += mass * p * math.log(p / r)
            forward += mass * r * math.log(r / p)
    report = audit_value(kl_values.k1, answers_policy(), answers())
    assert float(report.targets["forward_kl_per_token"]) == pytest.approx(forward, rel=1e-13)
    assert float(report.targets["reverse_kl_per_token"]) == pytest.approx(reverse, rel=1e-13)
    assert reverse == pytest.approx(
        sum(p * math.log(p / r) for p, r in zip(PI, Q, strict=True)), rel=1e-13
    )  # the chain rule
    assert forward != pytest.approx(
        sum(r * math.log(r / p) for p, r in zip(PI, Q, strict=True)), rel=1e-3
    )


def test_the_objective_and_the_reward_gradient_by_central_differences():
    """Steps of 1e-5 err by about 1e-10."""
    logits = [math.log(p) for p in PI]

    def value(theta, kl_coef):
        total = sum(map(math.exp, theta))
        return -sum(
            math.exp(t) / total * (r - kl_coef * (t - math.log(total) - math.log(b)))
            for t, r, b in zip(theta, REWARDS, Q, strict=True)
        )

    report = audit_gradient(losses.reinforce, answers_policy(), answers())
    for name, kl_coef in (("objective", 0.7), ("expected_reward", 0.0)):
        for k in range(6):
            up, down = ([t + h * (i == k) for i, t in enumerate(logits)] for h in (1e-5, -1e-5))
            assert float(report.targets[name][k]) == pytest.approx(
                (value(up, kl_coef) - value(down, kl_coef)) / 2e-5, abs=1e-9
            )


def test_infinite_divergences_are_said_and_not_averaged():
    space = SequenceSpace(("a", "b", "c"), 1, eos=False)
    tokens = space.all_tokens()
    problem = Problem(
        SequenceTable(space, tokens, torch.tensor([0.5, 0.3, 0.2]).log().double()),
        lambda t, p: torch.zeros(len(t)),
        1.0,
    )
    policy = SequenceTable(space, tokens[:2], torch.tensor([0.0, 1.0]).double())
    report = audit_gradient(losses.reinforce, policy, problem)
    assert list(report.targets) == [
        "objective",
        "expected_reward",
        "reverse_kl",
        "reverse_kl_per_token",
        "entropy",
        "entropy_per_token",
    ]
    assert "the prior holds mass 0.2 where the policy has none" in report.notes[0]
    assert "infinite" in str(report)
