"""DPO's and IPO's population optima by their gradients, and the equilibrium by its duality gap."""

import math

import pytest
import torch

from klrl_edu.closed_forms.preferences import (
    bradley_terry,
    dpo_loss,
    duality_gap,
    ipo_loss,
    ipo_optimum,
    nash_equilibrium,
)
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from tests.closed_forms.vectors import Q, R, random_problem

CYCLE = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]], dtype=torch.float64)
ONE_OUT = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log()
UNIFORM = torch.full((3,), -math.log(3), dtype=torch.float64)
ORDER = torch.tensor([[0.5, 1.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.5]], dtype=torch.float64)


def gradient(loss, log_policy):
    logits = log_policy.detach().clone().requires_grad_(True)
    loss(logspace.log_normalize(logits)).backward()
    return logits.grad


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kl_coef", [0.3, 1.0, 4.0])
def test_the_posterior_is_where_dpos_gradient_vanishes(seed, kl_coef):
    log_q, rewards = random_problem(seed)
    preferences, star = bradley_terry(rewards), tilt(log_q, rewards, kl_coef).log_posterior
    assert (
        float(gradient(lambda p: dpo_loss(p, log_q, preferences, kl_coef), star).abs().max())
        < 1e-14
    )
    elsewhere = torch.full_like(log_q, -math.log(len(log_q)))  # other comparisons, the same optimum
    assert (
        float(
            gradient(lambda p: dpo_loss(p, log_q, preferences, kl_coef, elsewhere), star)
            .abs()
            .max()
        )
        < 1e-14
    )
    assert (
        float(gradient(lambda p: dpo_loss(p, log_q, preferences, kl_coef), log_q).abs().max())
        > 1e-4
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_ipos_gradient_vanishes_at_its_closed_form(seed, tau):
    log_q, rewards = random_problem(seed)
    preferences = bradley_terry(rewards)
    best = ipo_optimum(log_q, preferences, tau)
    assert float(gradient(lambda p: ipo_loss(p, log_q, preferences, tau), best).abs().max()) < 1e-13
    assert float(gradient(lambda p: ipo_loss(p, log_q, preferences, tau), log_q).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(0.1, (0.964, 0.034, 0.001)), (0.5, (0.563, 0.289, 0.148)), (1.0, (0.448, 0.321, 0.230))],
)
def test_deterministic_preferences_leave_ipo_a_distribution_and_push_dpo_on(tau, expected):
    assert ipo_optimum(UNIFORM, ORDER, tau).exp().tolist() == pytest.approx(expected, abs=6e-4)
    further = torch.tensor(
        [0.0, -30.0, -60.0], dtype=torch.float64
    )  # DPO's loss falls without end towards the best outcome
    near = ipo_optimum(UNIFORM, ORDER, tau)
    losses = [
        float(dpo_loss(logspace.log_normalize(policy), UNIFORM, ORDER, tau))
        for policy in (near, near + further, near + 100 * further)
    ]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] == pytest.approx(
        math.log(2) / 6, rel=1e-6
    )  # what is left compares an outcome with itself


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_equilibrium_is_its_own_best_response_and_nobody_beats_it(seed, tau):
    generator = torch.Generator().manual_seed(seed)
    wins = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    preferences = (wins + 1 - wins.T) / 2
    found = nash_equilibrium(Q, preferences, tau)
    # the tolerance bounds the policy, and not the gap, which is quadratic in it
    assert found.residual <= 1e-13
    assert 0 <= found.duality_gap <= 1e-20
    response = logspace.log_normalize(Q + preferences @ found.log_probs.exp() / tau)
    torch.testing.assert_close(found.log_probs.exp(), response.exp(), rtol=0, atol=2e-13)

    def payoff(one, other):
        kl = [float(logspace.kl_divergence(side, Q)) for side in (one, other)]
        return float(one.exp() @ preferences @ other.exp()) - tau * kl[0] + tau * kl[1]

    value = payoff(found.log_probs, found.log_probs)
    for _ in range(50):
        rival = torch.log_softmax(2 * torch.randn(4, generator=generator, dtype=torch.float64), 0)
        assert payoff(rival, found.log_probs) <= value + 1e-12
        assert payoff(found.log_probs, rival) >= value - 1e-12


def test_the_gap_is_what_best_responses_gain():
    preferences, tau, policy = (
        bradley_terry(R),
        0.7,
        torch.log_softmax(torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64), 0),
    )
    kl = float(logspace.kl_divergence(policy, Q))
    log_z = float(torch.logsumexp(Q + preferences @ policy.exp() / tau, 0))
    assert float(duality_gap(policy, Q, preferences, tau)) == pytest.approx(
        2 * (tau * log_z + tau * kl - 0.5), abs=1e-14
    )


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_rock_paper_scissors_ends_in_the_middle(tau):
    assert nash_equilibrium(UNIFORM, CYCLE, tau).log_probs.exp().tolist() == pytest.approx(
        [1 / 3] * 3, abs=1e-12
    )
    skewed = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    assert nash_equilibrium(skewed, CYCLE, tau).duality_gap <= 1e-13


def test_the_equilibrium_keeps_to_the_priors_support():
    found = nash_equilibrium(ONE_OUT, bradley_terry(R), 0.5)
    small = nash_equilibrium(ONE_OUT[:3], bradley_terry(R[:3]), 0.5)
    assert found.log_probs[3] == -math.inf
    torch.testing.assert_close(found.log_probs[:3], small.log_probs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_outcomes_without_prior_mass_do_not_count(loss):
    policy = Q.clone().requires_grad_()
    whole = loss(policy, ONE_OUT, bradley_terry(R), 0.7)
    few = loss(Q[:3], ONE_OUT[:3], bradley_terry(R[:3]), 0.7)
    assert float(whole.detach()) == pytest.approx(float(few), rel=1e-14)
    (gradient,) = torch.autograd.grad(whole, policy)
    assert gradient[3] == 0
    assert bool(torch.isfinite(gradient).all())
    # a policy that rules an outcome out loses every comparison with it, without bound
    assert float(loss(ONE_OUT, Q, bradley_terry(R), 0.7)) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nash_equilibrium(UNIFORM, CYCLE + 0.1, 1.0), r"preferences\[0, 0\] = 0.6"),
        (lambda: nash_equilibrium(UNIFORM, CYCLE[:2], 1.0), r"expected \[K, K\]"),
        (lambda: nash_equilibrium(UNIFORM, CYCLE, 0.0), "tau = 0.0"),
        (lambda: nash_equilibrium(UNIFORM, CYCLE, 1.0, 0), "tolerance = 0 must be from 1e-15 to 1"),
        (lambda: nash_equilibrium(UNIFORM, CYCLE, 1.0, -1.0), "tolerance = -1.0 must be"),
        (lambda: nash_equilibrium(UNIFORM, CYCLE, 1.0, math.nan), "tolerance = nan must be"),
        (lambda: nash_equilibrium(UNIFORM, CYCLE, 1.0, 1e-16), "tolerance = 1e-16 must be"),
        (lambda: dpo_loss(Q, Q, bradley_terry(R), 0.0), "kl_coef = 0.0 must be a positive number"),
        (lambda: ipo_loss(Q, Q, bradley_terry(R), -1.0), "tau = -1.0 must be a positive number"),
        (lambda: dpo_loss(Q, ONE_OUT, bradley_terry(R), 1.0, Q), "where the prior has none"),
        (lambda: duality_gap(UNIFORM, UNIFORM, bradley_terry(R), 1.0), r"expected \[3, 3\]"),
        (lambda: ipo_optimum(UNIFORM, CYCLE * math.nan, 1.0), r"preferences\[0, 0\] = nan"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
