"""Each optimum solves its KKT condition, beats every other distribution, and is zero only where its
divergence says.
"""

import math

import pytest
import torch

from klrl_edu.closed_forms import regularizers
from klrl_edu.closed_forms.regularizers import DIVERGENCES, alpha_divergence, density_ratio, optimum
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core.errors import InfeasibleError, InputError
from tests.closed_forms.vectors import Q, R, random_problem

INF = math.inf
GENERATORS = {  # f(t), written independently of the package
    "reverse_kl": lambda t: torch.xlogy(t, t),
    "forward_kl": lambda t: -t.log(),
    "chi_squared": lambda t: (t - 1) ** 2 / 2,
    "kl_plus_chi_squared": lambda t: torch.xlogy(t, t) + (t - 1) ** 2 / 2,
    "alpha": lambda t: 4 * (1 + t) / 2 - 4 * t.sqrt(),  # α = ½: (√t − t/2 − ½)/(−¼)
    "jensen_shannon": lambda t: (torch.xlogy(t, t) - (1 + t) * ((1 + t) / 2).log()) / 2,
    "squared_hellinger": lambda t: (t.sqrt() - 1) ** 2 / 2,
}
CASES = [(seed, kl_coef) for seed in range(6) for kl_coef in (0.05, 0.5, 1.0, 20.0)]


def objective(name, log_q, rewards, kl_coef, pi):
    q = log_q.exp()
    return float((pi * rewards).sum() - kl_coef * (q * GENERATORS[name](pi / q)).sum())


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("seed", "kl_coef"), CASES)
def test_the_optimum_solves_its_kkt_condition(name, seed, kl_coef):
    log_q, rewards = random_problem(seed, ties=seed % 2 == 0)
    found = optimum(name, log_q, rewards, kl_coef)
    pi = found.log_probs.exp()
    assert float(pi.sum()) == pytest.approx(1, abs=1e-14)
    t = (found.log_probs - log_q).exp().requires_grad_(True)
    (slope,) = torch.autograd.grad(GENERATORS[name](t).sum(), t)  # f'(t)
    multiplier = rewards - kl_coef * slope
    alive = pi > 0
    scale = max(1.0, float((kl_coef * slope[alive]).abs().max()))
    assert float((multiplier[alive] - multiplier[alive][0]).abs().max()) <= 1e-11 * scale
    if not bool(alive.all()):  # zero mass: no gain in giving it any
        assert float(multiplier[~alive].max()) <= float(multiplier[alive].min()) + 1e-12
    if name not in ("reverse_kl",):
        assert float(multiplier[alive][0]) == pytest.approx(found.normaliser, rel=1e-9, abs=1e-9)
    assert objective(name, log_q, rewards, kl_coef, pi) == pytest.approx(
        found.objective, rel=1e-11, abs=1e-11
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_other_distribution_does_better(name):
    generator = torch.Generator().manual_seed(7)
    log_q, rewards = random_problem(3)
    best = optimum(name, log_q, rewards, 0.7)
    for size in (1e-3, 1e-2, 0.3):
        for _ in range(100):
            other = torch.softmax(
                best.log_probs.clamp(min=-40)
                + size * torch.randn(5, generator=generator, dtype=torch.float64),
                0,
            )
            assert objective(name, log_q, rewards, 0.7, other) <= best.objective + 1e-13


def test_only_chi_squared_gives_up_an_outcome():
    log_q, rewards = Q, torch.tensor([5.0, 0.0, -5.0, 4.0], dtype=torch.float64)
    zeros = {
        name: int((optimum(name, log_q, rewards, 0.5).log_probs == -INF).sum())
        for name in DIVERGENCES
    }
    assert zeros == {name: 2 if name == "chi_squared" else 0 for name in DIVERGENCES}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kl_coef", [0.0, INF])
def test_the_limits_are_those_of_the_posterior(name, kl_coef):
    rewards = torch.tensor([2.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    found = optimum(name, Q, rewards, kl_coef).log_probs.exp()
    assert found.tolist() == pytest.approx(
        [0.8, 0, 0, 0.2] if kl_coef == 0 else Q.exp().tolist(), abs=1e-15
    )
    near = optimum(name, Q, rewards, 1e-4 if kl_coef == 0 else 1e6).log_probs.exp()
    assert near.tolist() == pytest.approx(found.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("scale", [1e-300, 1e-6, 1e6, 1e300])
def test_only_the_ratio_of_reward_to_coefficient_matters(name, scale):
    here, there = optimum(name, Q, R, 0.5), optimum(name, Q, R * scale, 0.5 * scale)
    torch.testing.assert_close(here.log_probs, there.log_probs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_forbidden_outcome_has_no_mass_or_makes_the_problem_infeasible(name):
    rewards = torch.tensor([1.0, -INF, 0.0, 2.0], dtype=torch.float64)
    if name == "forward_kl":
        with pytest.raises(InfeasibleError, match=r"rewards\[1\] is -inf"):
            optimum(name, Q, rewards, 1.0)
        return
    found = optimum(name, Q, rewards, 1.0).log_probs
    assert found[1] == -INF
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-14)
    with pytest.raises(InfeasibleError, match="reward -inf"):
        optimum(name, Q, torch.full_like(R, -INF), 1.0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_rewards_off_the_support_are_ignored(name):
    log_q = torch.cat([Q, torch.tensor([-INF], dtype=torch.float64)])
    found = optimum(
        name, log_q, torch.cat([R, torch.tensor([math.nan], dtype=torch.float64)]), 1.0
    ).log_probs
    torch.testing.assert_close(found[:4], optimum(name, Q, R, 1.0).log_probs, rtol=1e-14, atol=0)
    assert found[4] == -INF


def test_alpha_runs_from_forward_to_reverse_kl():
    forward, reverse = regularizers.forward_kl(Q, R, 1.0).log_probs, tilt(Q, R, 1.0).log_posterior
    torch.testing.assert_close(
        alpha_divergence(Q, R, 1.0, 1e-7).log_probs, forward, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        alpha_divergence(Q, R, 1.0, 1 - 1e-7).log_probs, reverse, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "curvature"),  # f''(1)
    [
        ("reverse_kl", 1),
        ("forward_kl", 1),
        ("chi_squared", 1),
        ("kl_plus_chi_squared", 2),
        ("alpha", 1),
        ("jensen_shannon", 0.25),
        ("squared_hellinger", 0.25),
    ],
)
@pytest.mark.parametrize("kl_coef", [1e8, 1e16, 1e100])
def test_near_the_prior_every_optimum_keeps_its_digits(name, curvature, kl_coef):
    # two even outcomes of reward ±1: E_q[r] = 0, and the objective is Var_q(r)/2λf''(1) + O(λ⁻³)
    log_q = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    found = optimum(name, log_q, torch.tensor([1.0, -1.0], dtype=torch.float64), kl_coef)
    expected = 1 / (2 * kl_coef * curvature)
    # pi itself is known to 1e-16, and E_π[r] with it; the rest of the objective is λ·D_f
    assert found.objective == pytest.approx(expected, rel=1e-12, abs=3e-16)
    shifted = optimum(name, log_q, torch.tensor([3.0, 1.0], dtype=torch.float64), kl_coef)
    assert shifted.objective == pytest.approx(2 + expected, rel=1e-15)


def test_the_ratio_of_kl_plus_chi_squared_is_lamberts_w_at_every_size():
    sizes = [-800.0, -40.0, -1.0, 0.0, 1.0, 1 + 1e-9, 5.0, 600.0, 1e6, 1e300]
    t = density_ratio("kl_plus_chi_squared", torch.tensor(sizes, dtype=torch.float64)).tolist()
    for size, ratio in zip(sizes, t, strict=True):
        if size > -700:  # w + log w = x; the digits of log w are those of w
            assert ratio + math.log(ratio) == pytest.approx(size, rel=2e-13, abs=1e-14)
        else:
            assert ratio == pytest.approx(math.exp(size), rel=1e-12)


def test_rare_outcomes_keep_their_digits():
    # a reward on one outcome in 1e13: 1 + that is 1, to a float
    log_q = torch.tensor([1e-13, 1 - 1e-13], dtype=torch.float64).log()
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    chi = optimum("chi_squared", log_q, rewards, 1.0)
    assert chi.objective == pytest.approx(1e-13 + 0.5e-13, rel=1e-12)


def test_a_ratio_that_is_no_number_is_refused():
    for name, x in (("forward_kl", 0.1), ("squared_hellinger", 0.5), ("alpha", math.nan)):
        with pytest.raises(InputError, match=r"x holds"):
            density_ratio(name, torch.tensor([-1.0, x], dtype=torch.float64))
    with pytest.raises(InputError, match="'renyi' is not known"):
        density_ratio("renyi", R)
    at_one = {"forward_kl": -1.0, "kl_plus_chi_squared": 1.0}
    for name in DIVERGENCES:
        x = torch.tensor([at_one.get(name, 0.0)], dtype=torch.float64)
        assert float(density_ratio(name, x)) == pytest.approx(1, abs=1e-15)


def test_unknown_names_and_bad_parameters_are_named():
    with pytest.raises(
        InputError, match=r"'renyi' is not known; choose from reverse_kl, forward_kl"
    ):
        optimum("renyi", Q, R, 1.0)
    with pytest.raises(InputError, match=r"alpha = 1\.0"):
        alpha_divergence(Q, R, 1.0, 1.0)
    with pytest.raises(InputError, match="kl_coef = -1"):
        optimum("chi_squared", Q, R, -1.0)
