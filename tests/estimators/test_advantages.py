"""Baselines, z-scores, GAE and pseudo-rewards: by hand, in plain Python, and as the gradients they
promise.
"""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from klrl_edu.audit.claims.catalogue import answers_case, four_sentences_case
from klrl_edu.core.errors import InfeasibleError, InputError
from klrl_edu.estimators import advantages
from klrl_edu.models.contract import conditional_log_probs
from tests.estimators.cases import flat_gradient, vector, whole_batch
from tests.exact.dictionaries import INF, assert_close

GROUPS = st.lists(st.floats(-10, 10), min_size=2, max_size=6)


def interleaved(one, other):
    """Two groups, mixed: values [N] and group [N]."""
    everything = [(value, 0) for value in one] + [(value, 1) for value in other]
    everything = everything[::2] + everything[1::2]
    return vector(*(value for value, _ in everything)), torch.tensor(
        [group for _, group in everything]
    )


# --- groups ---------------------------------------------------------------------------------------


@given(one=GROUPS, other=GROUPS)
def test_each_advantage_is_that_of_its_group_in_plain_python(one, other):
    values, group = interleaved(one, other)
    for i, (value, g) in enumerate(zip(values.tolist(), group.tolist(), strict=True)):
        mine = one if g == 0 else other
        n, mean = len(mine), math.fsum(mine) / len(mine)
        assert float(advantages.centred(values, group)[i]) == pytest.approx(value - mean, abs=1e-13)
        assert float(advantages.leave_one_out_advantage(values, group)[i]) == pytest.approx(
            (value - mean) * n / (n - 1), abs=1e-12
        )
        if statistics.pstdev(mine) > 1e-6:
            population, sample = (
                (value - mean) / statistics.pstdev(mine),
                (value - mean) / (statistics.stdev(mine) + 1e-4),
            )
            assert float(advantages.population_z_score(values, group)[i]) == pytest.approx(
                population, rel=1e-6, abs=1e-9
            )
            assert float(advantages.sample_z_score(values, group)[i]) == pytest.approx(
                sample, rel=1e-6, abs=1e-9
            )


@given(value=st.floats(-1e6, 1e6), n=st.integers(2, 9))
def test_equal_rewards_have_no_advantage_whatever_rounding_does(value, n):
    """0.1 seven times has a mean that is not 0.1 in floating point; divided by the std of its own
    rounding it would be ±1.
    """
    values, group = torch.full((n,), value, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
    for z_score in (advantages.population_z_score, advantages.sample_z_score):
        assert z_score(values, group, 0.0).tolist() == [0] * n


def test_one_equal_group_beside_another():
    values, group = vector(0.3, 1.0, 0.3, 3.0, 0.3), torch.tensor([0, 1, 0, 1, 0])
    assert advantages.population_z_score(values, group).tolist() == pytest.approx(
        [0, -1, 0, 1, 0], abs=1e-15
    )


def test_two_of_a_kind_score_plus_and_minus_one_or_a_root_of_half():
    values, group = vector(5.0, -3.0), torch.tensor([0, 0])
    assert advantages.population_z_score(values, group).tolist() == [1, -1]
    assert advantages.sample_z_score(values, group, 0.0).tolist() == pytest.approx(
        [math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-15
    )
    assert float(advantages.sample_z_score(values, group)[0]) == pytest.approx(
        4 / (4 * math.sqrt(2) + 1e-4), rel=1e-14
    )


@pytest.mark.parametrize(
    "name",
    ["leave_one_out_mean", "leave_one_out_advantage", "population_z_score", "sample_z_score"],
)
def test_a_group_of_one_is_named(name):
    with pytest.raises(InputError, match=r"group 1 holds one sequence.*batch_size >= 2"):
        getattr(advantages, name)(vector(1.0, 2.0, 3.0), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("value", [-INF, INF, math.nan])
@pytest.mark.parametrize("name", ["population_z_score", "sample_z_score"])
def test_a_reward_that_is_not_finite_is_named(name, value):
    with pytest.raises(InputError, match=r"values\[1\] = (-?inf|nan) is not finite"):
        getattr(advantages, name)(vector(0.0, value, 1.0), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    "name", ["leave_one_out_advantage", "centred", "population_z_score", "sample_z_score"]
)
def test_groups_run_under_vmap(name):
    values, group = (
        vector(1.0, 2.0, 2.0, 5.0, 0.1, 0.1, 0.1, 3.0).reshape(2, 4),
        torch.tensor([0, 0, 1, 1]),
    )
    function = getattr(advantages, name)
    together = torch.func.vmap(lambda row: function(row, group))(values)
    assert torch.equal(together, torch.stack([function(row, group) for row in values]))


# --- the best constant ----------------------------------------------------------------------------


def reinforce_variance(probs, rewards, baseline):
    """Var of (R − b)s in sequence logits, s = e_y − π, in plain Python."""
    k = len(probs)
    gradients = [
        [(rewards[y] - baseline) * ((j == y) - probs[j]) for j in range(k)] for y in range(k)
    ]
    mean = [math.fsum(probs[y] * gradients[y][j] for y in range(k)) for j in range(k)]
    return math.fsum(
        probs[y] * (gradients[y][j] - mean[j]) ** 2 for y in range(k) for j in range(k)
    )


@given(data=st.data(), size=st.integers(2, 5), shift=st.floats(-3, 3))
def test_no_other_constant_has_less_variance(data, size, shift):
    weights = data.draw(st.lists(st.floats(0.1, 1), min_size=size, max_size=size))
    probs, rewards = (
        [w / sum(weights) for w in weights],
        data.draw(st.lists(st.floats(-3, 3), min_size=size, max_size=size)),
    )
    norms = vector(*(1 - 2 * p + math.fsum(other * other for other in probs) for p in probs))
    best = float(advantages.best_scalar_baseline(vector(*rewards), norms, vector(*weights).log()))
    assert (
        reinforce_variance(probs, rewards, best)
        <= reinforce_variance(probs, rewards, best + shift) + 1e-12
    )


def test_without_mass_there_is_no_best_constant():
    with pytest.raises(InfeasibleError):
        advantages.best_scalar_baseline(vector(1.0, 2.0), vector(1.0, 1.0), vector(-INF, -INF))
    assert (
        float(
            advantages.best_scalar_baseline(vector(1.0, -INF), vector(1.0, 1.0), vector(0.0, -INF))
        )
        == 1
    )


# --- GAE ------------------------------------------------------------------------------------------


@given(data=st.data(), length=st.integers(1, 4), discount=st.floats(0, 1), decay=st.floats(0, 1))
def test_gae_is_the_sum_of_its_equation(data, length, discount, decay):
    numbers = st.lists(st.floats(-3, 3), min_size=4, max_size=4)
    rewards, values = data.draw(numbers), data.draw(numbers)
    live = [t < length for t in range(4)]
    seen = advantages.gae(
        vector(*rewards)[None],
        vector(*values)[None],
        torch.tensor([live]),
        discount=discount,
        decay=decay,
    )[0].tolist()
    known = [*values[:length], 0.0]
    delta = [rewards[t] + discount * known[t + 1] - known[t] for t in range(length)]
    expected = [
        math.fsum((discount * decay) ** (s - t) * delta[s] for s in range(t, length))
        for t in range(length)
    ] + [0.0] * (4 - length)
    assert seen == pytest.approx(expected, abs=1e-12)


def test_without_decay_gae_is_the_reward_to_go_minus_the_value():
    rewards, values, live = (
        vector(1.0, 0.0, 2.0)[None],
        vector(0.3, 0.2, 0.1)[None],
        torch.ones(1, 3, dtype=torch.bool),
    )
    assert_close(
        advantages.gae(rewards, values, live, decay=1.0), advantages.to_go(rewards) - values
    )
    assert advantages.to_go(rewards).tolist() == [[3, 2, 2]]


def followed(case, values, decay):
    """E[Σ_t A_t s_t] over all sequences, by plain autograd."""
    whole = whole_batch(case)
    advantage = advantages.gae(whole.rewards, values, whole.live, decay=decay)
    weight = whole.log_probs.detach().sum(-1).exp()
    return flat_gradient((weight * (advantage * whole.log_probs).sum(-1)).sum(), case.policy)


def true_values(case):
    """V(y_<t) = E[r | y_<t] by summing over the sequences that share a prefix."""
    whole = whole_batch(case)
    tokens, pi, total = (
        whole.tokens.tolist(),
        whole.log_probs.detach().sum(-1).exp().tolist(),
        whole.rewards.sum(-1).tolist(),
    )
    columns = []
    for row in tokens:
        known = [
            [j for j, other in enumerate(tokens) if other[:t] == row[:t]] for t in range(len(row))
        ]
        columns.append(
            [
                math.fsum(pi[j] * total[j] for j in below) / math.fsum(pi[j] for j in below)
                for below in known
            ]
        )
    return torch.tensor(columns, dtype=torch.float64)


@pytest.mark.parametrize("case", [four_sentences_case, answers_case])
def test_gae_is_right_for_any_values_at_decay_one_and_for_exact_values_at_any_decay(case):
    case = case()
    whole = whole_batch(case)
    truth = flat_gradient(
        (whole.log_probs.sum(-1).exp() * whole.rewards.sum(-1)).sum(), case.policy
    )
    exact = true_values(case)
    wrong = (
        conditional_log_probs(case.problem.prior, whole.tokens)[..., 0].exp().detach()
    )  # any function of the prefix
    assert_close(followed(case, wrong, 1.0), truth)
    for decay in (0.0, 0.5, 0.95, 1.0):
        assert_close(followed(case, exact, decay), truth)
    assert float((followed(case, wrong, 0.5) - truth).norm()) > 1e-2


def test_gae_runs_under_vmap():
    whole = whole_batch(answers_case())
    fields = [
        value.unflatten(0, (3, 2))
        for value in (whole.rewards, true_values(answers_case()), whole.live)
    ]
    together = torch.func.vmap(advantages.gae)(*fields)
    assert torch.equal(
        together, torch.stack([advantages.gae(*(field[i] for field in fields)) for i in range(3)])
    )


# --- f-DPG ----------------------------------------------------------------------------------------

DIVERGENCES = {  # pseudo-reward -> D(π, p) by its definition, differentiable in π
    "fdpg_reverse_kl": lambda pi, p: (pi * (pi / p).log()).sum(),
    "fdpg_forward_kl": lambda pi, p: (p * (p / pi).log()).sum(),
    "fdpg_total_variation": lambda pi, p: (pi - p).abs().sum() / 2,
    "fdpg_jensen_shannon": (
        lambda pi, p: (
            ((pi * (2 * pi / (pi + p)).log()).sum() + (p * (2 * p / (pi + p)).log()).sum()) / 2
        )
    ),
    "fdpg_chi_squared": lambda pi, p: (p * (pi / p - 1).square()).sum() / 2,
    "fdpg_squared_hellinger": lambda pi, p: (pi.sqrt() - p.sqrt()).square().sum() / 2,
}


@given(data=st.data(), size=st.integers(2, 5))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_policy_gradient_of_each_pseudo_reward_descends_its_divergence(name, data, size):
    logits = [
        vector(*data.draw(st.lists(st.floats(-2, 2), min_size=size, max_size=size))) for _ in "pq"
    ]
    theta = logits[0].requires_grad_()
    log_pi, p = theta.log_softmax(-1), logits[1].softmax(-1)
    assume(float((log_pi.detach() - p.log()).abs().min()) > 1e-9)  # TV has a kink where they agree
    reward = getattr(advantages, name)(log_pi.detach() - p.log())
    (ascent,) = torch.autograd.grad(
        (log_pi.detach().exp() * reward * log_pi).sum(), theta, retain_graph=True
    )
    (slope,) = torch.autograd.grad(DIVERGENCES[name](log_pi.exp(), p), theta)
    assert_close(-ascent, slope, 100.0)


def test_pseudo_rewards_where_policy_and_target_agree_are_constants():
    expected = {
        "reverse_kl": -1,
        "forward_kl": 1,
        "total_variation": 0,
        "jensen_shannon": 0,
        "chi_squared": 0,
        "squared_hellinger": 0,
    }
    for name, value in expected.items():
        assert float(getattr(advantages, f"fdpg_{name}")(vector(0.0))) == pytest.approx(
            value, abs=1e-16
        )


def test_the_formula_of_binary_rewards_needs_every_group_size():
    """E[A s] = E_k[√(k/n (1 − k/n))] ∇p/(p(1 − p)) at p = 0.3 in one logit (∇p = p(1 − p)), over
    all 2^n groups.
    """
    p = 0.3
    for n in (2, 3, 5):
        seen = 0.0
        for wins in itertools.product((0, 1), repeat=n):
            probability = math.prod(p if win else 1 - p for win in wins)
            score = advantages.population_z_score(
                vector(*map(float, wins)), torch.zeros(n, dtype=torch.long)
            )
            seen += probability * float(score @ vector(*(win - p for win in wins))) / n
        expected = sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k) * math.sqrt(k / n * (1 - k / n))
            for k in range(n + 1)
        )
        assert seen == pytest.approx(expected, rel=1e-13)
