"""Planning, evaluation and gradients against enumerated paths, plain recursions, closed forms,
finite differences and scipy.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klrl_edu.core.errors import InfeasibleError, InputError, UnsupportedPolicyError
from klrl_edu.decisions.decision_process import DecisionProcess, token_process
from klrl_edu.decisions.soft_control import (
    objective_gap,
    policy_evaluation,
    policy_gradient,
    policy_iteration,
    value_iteration,
    visits,
)
from klrl_edu.exact.enumeration import problem_support
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.testing import problems
from tests.decisions.processes import (
    loop,
    paths,
    policies,
    processes,
    soft_values_by_recursion,
    softmax_policy,
)
from tests.exact.dictionaries import INF, assert_close

mpmath = pytest.importorskip("mpmath")
KL_COEFS = st.sampled_from((0.05, 0.5, 1.0, 10.0))
FINITE = st.sampled_from((0.0, 0.05, 0.5, 1.0, 10.0))


# --- planning -------------------------------------------------------------------------------------


@given(data=st.data())
def test_values_are_the_plain_recursion(data):
    process, lam = data.draw(processes(returns=False)), data.draw(KL_COEFS)
    solved = value_iteration(process, lam)
    assert_close(
        solved.state_values,
        torch.tensor(
            soft_values_by_recursion(process, lam, int(process.horizon)), dtype=torch.float64
        ),
    )
    assert solved.error_bound == 0
    assert solved.iterations == process.horizon


@given(data=st.data())
def test_both_iterations_agree_within_the_error_bounds(data):
    process, lam = data.draw(processes()), data.draw(FINITE)
    swept, improved = value_iteration(process, lam), policy_iteration(process, lam)
    assert_close(
        improved.value,
        swept.value,
        abs(swept.value) + 1e12 * (swept.error_bound + improved.error_bound),
    )
    assert float((improved.log_policy.exp() - swept.log_policy.exp()).abs().max()) < 1e-10


@given(data=st.data())
def test_the_policy_of_the_optimum_earns_its_value_and_satisfies_the_soft_equations(data):
    process, lam = data.draw(processes(forbid=True)), data.draw(FINITE)
    solved = policy_iteration(process, lam)
    assert_close(
        policy_evaluation(process, solved.log_policy, lam).value, solved.value, tolerance=1e-11
    )
    if lam > 0:
        live = ~process.terminal
        lifted = process.log_prior + solved.action_values / lam
        assert_close(lam * torch.logsumexp(lifted[live], -1), solved.state_values[live])
        assert_close(
            solved.log_policy[live],
            lifted[live] - solved.state_values[live][:, None] / lam,
            float(solved.log_policy[process.available].abs().max()),
        )


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("discount", [0.5, 0.9, 0.99])
def test_the_error_bound_holds_at_every_tolerance(tolerance, discount):
    process = loop(1.0, discount)
    rough, exact = value_iteration(process, 1.0, tolerance), policy_iteration(process, 1.0)
    error = abs(rough.value - exact.value)
    assert 0 < error <= rough.error_bound + 1e-12
    assert rough.error_bound < 300 * tolerance * exact.value
    before, last = (b - a for a, b in itertools.pairwise(rough.values[-3:]))
    allowed = tolerance * (rough.value + 1)  # of the value and λ = 1
    assert last <= allowed
    assert before > 0.99 * allowed


def test_where_nothing_is_paid_nothing_is_improved():
    assert policy_iteration(loop(0.0, 0.5, leaving=0.0), 0.0).iterations == 2


def test_a_policy_in_single_precision_is_evaluated_in_double():
    leaves = torch.tensor([[-INF, 0.0], [-INF, -INF]])
    found = policy_evaluation(loop(-0.5, 0.9), leaves, 1.0)
    assert found.state_values.dtype == torch.float64
    assert found.value == pytest.approx(0.3 - math.log(2), abs=1e-15)


@pytest.mark.parametrize("kl_coef", [10.0, 1e6])
def test_values_far_below_kl_coef_settle_too(kl_coef):
    """λ log Σ q e^{Q/λ} rounds in units of λ, which sweeps must not chase: without λ in the scale
    they go on for a million.
    """
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        moves = torch.softmax(torch.randn(4, 5, 4, generator=generator, dtype=torch.float64), -1)
        log_prior, rewards = (
            torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        ends, start = torch.arange(4) == 3, torch.tensor([1.0, 0, 0, 0])
        process = DecisionProcess(
            torch.log_softmax(log_prior, -1), moves, 1e-3 * rewards, start, ends, 0.9
        )
        assert value_iteration(process, kl_coef).iterations < 1_000


def three_rewards(prior) -> DecisionProcess:
    """One state that pays 0, 1 or 2 and then stays or ends, evenly."""
    return DecisionProcess.from_probabilities(
        [prior, [0, 0, 0]],
        [[[0.5, 0.5]] * 3, [[0, 0]] * 3],
        [[0.0, 1.0, 2.0], [0, 0, 0]],
        initial=[1.0, 0.0],
        terminal=[False, True],
    )


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
@pytest.mark.parametrize(("prior", "value"), [((0.3, 0.3, 0.4), 2.2), ((0.1, 0.2, 0.7), 3.2)])
def test_at_an_infinite_kl_coef_a_loop_is_one_linear_solve(solve, prior, value):
    solved = solve(three_rewards(prior), INF)
    assert solved.value == pytest.approx(value, rel=1e-14)
    assert_close(solved.log_policy[0].exp(), torch.tensor(prior, dtype=torch.float64))
    assert (solved.iterations, solved.error_bound) == (1, 0)


def test_at_an_infinite_kl_coef_every_loop_is_solved():
    """Random processes with γ = 1, some actions forbidden: the value is E_q of the return, and
    log π/q is what a λ far above the rewards gives.
    """
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        moves = torch.softmax(torch.randn(4, 3, 4, generator=generator, dtype=torch.float64), -1)
        log_prior = torch.log_softmax(
            torch.randn(4, 3, generator=generator, dtype=torch.float64), -1
        )
        rewards = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        ends, start = torch.arange(4) == 3, torch.tensor([1.0, 0, 0, 0])
        process = DecisionProcess(log_prior, moves, rewards, start, ends)
        inner = process.moves(process.log_prior.exp())[:3, :3].numpy()
        paid = (process.log_prior.exp() * rewards)[:3].sum(-1).numpy()
        expected = np.linalg.solve(np.eye(3) - inner, paid)
        assert_close(value_iteration(process, INF).state_values[:3], torch.tensor(expected))
        rewards[1, 0] = -INF
        forbidding = replace(process, rewards=rewards)
        limit, near = (policy_iteration(forbidding, lam).log_policy for lam in (INF, 1e14))
        assert float((limit.exp() - near.exp()).abs().max()) < 1e-12


MP_DIGITS = 150


def soft_values_in_mpmath(process: DecisionProcess, kl_coef: float, sweeps: int) -> list[float]:
    """V by plain sweeps of 150 digits, which no λ up to 1e100 exhausts."""
    with mpmath.workdps(MP_DIGITS):
        lam, gamma = mpmath.mpf(kl_coef), mpmath.mpf(process.discount)
        exact = {
            name: [
                [mpmath.mpf(x) for x in row] for row in getattr(process, name).flatten(1).tolist()
            ]
            for name in ("rewards", "transitions")
        }
        S, A = process.rewards.shape
        weights = [[mpmath.exp(mpmath.mpf(x)) for x in row] for row in process.log_prior.tolist()]
        prior = [[w / max(mpmath.fsum(row), 1e-9) for w in row] for row in weights]
        values = [mpmath.mpf(0)] * S
        for _ in range(sweeps):
            ahead = [
                mpmath.fdot(exact["transitions"][s][a * S : (a + 1) * S], values)
                for s in range(S)
                for a in range(A)
            ]
            values = [
                lam
                * mpmath.log(
                    mpmath.fsum(
                        prior[s][a]
                        * mpmath.exp((exact["rewards"][s][a] + gamma * ahead[s * A + a]) / lam)
                        for a in range(A)
                    )
                )
                if not process.terminal[s]
                else mpmath.mpf(0)
                for s in range(S)
            ]
        return [float(value) for value in values]


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
@pytest.mark.parametrize("kl_coef", [1e-8, 0.1, 1.0, 3.0, 1e3, 1e6, 1e12, 1e16, 1e40, 1e100])
def test_values_keep_their_digits_however_large_or_small_kl_coef(solve, kl_coef):
    generator = torch.Generator().manual_seed(0)
    moves = torch.softmax(torch.randn(4, 3, 4, generator=generator, dtype=torch.float64), -1)
    log_prior = torch.log_softmax(torch.randn(4, 3, generator=generator, dtype=torch.float64), -1)
    rewards = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    ends, start = torch.arange(4) == 3, torch.tensor([1.0, 0, 0, 0])
    process = DecisionProcess(log_prior, moves, rewards, start, ends, 0.3)
    expected = soft_values_in_mpmath(process, kl_coef, sweeps=30)
    found = solve(process, kl_coef)
    assert found.state_values.tolist() == pytest.approx(expected, rel=1e-12)
    assert found.error_bound < 1e-13


@settings(max_examples=15)
@given(problem=problems(), kl_coef=st.sampled_from((1e6, 1e16, 1e100)))
def test_a_large_kl_coef_leaves_a_token_process_the_prior_s_mean(problem, kl_coef):
    """Forbidden texts cost λ times their mass; of the rest, λ log Z is E_q r + Var/2λ + …"""
    process = token_process(replace(problem, kl_coef=kl_coef))
    swept, improved = value_iteration(process, kl_coef), policy_iteration(process, kl_coef)
    support = problem_support(problem)
    allowed = support.rewards > -INF
    with mpmath.workdps(MP_DIGITS):
        q = [mpmath.exp(mpmath.mpf(x)) for x in support.log_prior.tolist()]
        kept = [
            p / mpmath.fsum(q) * mpmath.exp(mpmath.mpf(r) / mpmath.mpf(kl_coef))
            for p, r, fine in zip(q, support.rewards.tolist(), allowed.tolist(), strict=True)
            if fine
        ]
        expected = float(mpmath.mpf(kl_coef) * mpmath.log(mpmath.fsum(kept)))
    size = float(support.rewards[allowed].abs().max())
    for solved in (swept, improved):
        assert solved.value == pytest.approx(expected, rel=1e-12, abs=1e-13 * size + 1e-30)


@given(data=st.data())
def test_every_policy_of_policy_iteration_is_better_than_the_last(data):
    process, lam = data.draw(processes()), data.draw(FINITE)
    values = policy_iteration(process, lam).values
    assert values[0] == pytest.approx(
        policy_evaluation(process, process.log_prior, lam).value, abs=1e-12
    )
    assert all(
        later >= earlier - 1e-12 * (1 + abs(earlier))
        for earlier, later in itertools.pairwise(values)
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_no_softmax_policy_that_scipy_finds_earns_more(seed):
    generator = torch.Generator().manual_seed(seed)
    S, A = 4, 3
    rows = torch.rand(S, A, S, generator=generator, dtype=torch.float64) + 0.05
    process = DecisionProcess(
        torch.log_softmax(torch.randn(S, A, generator=generator, dtype=torch.float64), -1),
        rows / rows.sum(-1, keepdim=True),
        torch.randn(S, A, generator=generator, dtype=torch.float64),
        torch.tensor([1.0, 0, 0, 0]),
        torch.tensor([False, False, False, True]),
        0.9,
    )

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        log_policy = softmax_policy(process, torch.tensor(theta).reshape(S, A))
        return (
            -policy_evaluation(process, log_policy, 0.4).value,
            -policy_gradient(process, log_policy, 0.4).numpy().ravel(),
        )

    best = scipy.optimize.minimize(
        loss, np.zeros(S * A), jac=True, method="BFGS", options={"gtol": 1e-10}
    )
    solved = policy_iteration(process, 0.4)
    assert -best.fun == pytest.approx(solved.value, abs=1e-12)
    found = softmax_policy(process, torch.tensor(best.x).reshape(S, A))
    assert float((found.exp() - solved.log_policy.exp()).abs().max()) < 1e-6


@pytest.mark.parametrize("reward", [-3.0, -0.5, 0.0, 0.5, 0.66])
def test_an_undiscounted_loop_that_costs_more_than_it_earns_has_its_closed_form(reward):
    """V = λ log(q e^{r/λ} e^{V/λ} + q e^{c/λ}), a geometric series in e^{V/λ}."""
    expected = math.log(0.5 * math.exp(0.3) / (1 - 0.5 * math.exp(reward)))
    assert policy_iteration(loop(reward), 1.0).value == pytest.approx(expected, abs=1e-12)
    swept = value_iteration(loop(reward), 1.0)
    assert swept.value == pytest.approx(expected, abs=1e-11 if reward == 0.66 else 1e-12)
    assert abs(swept.value - expected) <= 3 * swept.error_bound + 1e-13


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
@pytest.mark.parametrize(
    ("reward", "kl_coef"), [(math.log(2), 1.0), (0.7, 1.0), (50.0, 1.0), (0.01, 0.01), (1.0, 0.0)]
)
def test_values_that_grow_without_bound_are_an_error_and_not_an_endless_loop(
    solve, reward, kl_coef
):
    with pytest.raises(
        InputError, match=r"grow without bound.*state 's0'.*Raise kl_coef, lower the discount"
    ):
        solve(loop(reward), kl_coef)


@pytest.mark.parametrize("seed", range(24))
def test_values_are_bounded_exactly_where_the_loops_soft_mass_is_below_one(seed):
    """Deterministic and undiscounted, e^{V/λ} = M e^{V/λ} + b is linear, M = Σ_a q e^{r/λ} P:
    bounded where its spectral radius is below 1.
    """
    generator, lam, live = torch.Generator().manual_seed(seed), 0.5, 3
    goes = torch.randint(0, live + 1, (live + 1, 2), generator=generator)
    goes[:, 1] = torch.tensor([1, 2, 3, 3])  # the second action leads on to the end
    moves = torch.nn.functional.one_hot(goes, live + 1)
    log_prior = torch.log_softmax(
        torch.randn(live + 1, 2, generator=generator, dtype=torch.float64), -1
    )
    rewards = 0.6 * torch.randn(live + 1, 2, generator=generator, dtype=torch.float64)
    process = DecisionProcess(
        log_prior,
        moves,
        rewards,
        torch.tensor([1.0, 0, 0, 0]),
        torch.tensor([False] * live + [True]),
    )
    weighed = process.moves((process.log_prior + rewards / lam).exp()).numpy()
    inner, out = weighed[:live, :live], weighed[:live, live]
    if np.abs(np.linalg.eigvals(inner)).max() < 1:
        expected = lam * np.log(np.linalg.solve(np.eye(live) - inner, out))
        assert_close(policy_iteration(process, lam).state_values[:live], torch.tensor(expected))
    else:
        with pytest.raises(InputError, match="grow without bound"):
            policy_iteration(process, lam)


def test_the_edge_of_boundedness_is_where_the_soft_mass_of_the_loop_is_one():
    assert policy_iteration(loop(math.log(2) - 1e-6), 1.0).value == pytest.approx(
        math.log(0.5 * math.exp(0.3) / -math.expm1(-1e-6)), abs=1e-8
    )


@given(data=st.data())
def test_forbidding_an_action_is_not_having_it_but_for_its_cost(data):
    """π* is that of the prior without the action; V pays λ log of the mass that is left."""
    process, lam = data.draw(processes(forbid=True)), data.draw(KL_COEFS)
    allowed = process.available & (process.rewards > -INF)
    kept = torch.where(allowed, process.log_prior, -INF)
    left = torch.where(process.terminal, 0, torch.logsumexp(kept, -1))[:, None]
    without = replace(
        process,
        log_prior=kept - left,
        rewards=torch.where(allowed, process.rewards + lam * left, 0),
    )
    seen, expected = policy_iteration(process, lam), policy_iteration(without, lam)
    assert_close(seen.state_values, expected.state_values)
    assert_close(seen.log_policy.exp(), expected.log_policy.exp(), tolerance=1e-11)


def test_a_state_without_a_feasible_path_is_avoided_with_mass_exactly_zero():
    """'there' forbids its only action: every action that may lead there is out, also by a reply of
    small probability.
    """
    process = DecisionProcess.from_probabilities(
        [[0.25, 0.25, 0.5], [1, 0, 0], [0, 0, 0]],
        [[[0, 1, 0], [0, 1e-300, 1], [0, 0, 1]], [[0, 0, 1]] * 3, [[0, 0, 0]] * 3],
        [[9.0, 9.0, 1.0], [-INF, 0, 0], [0, 0, 0]],
        initial=[1, 0, 0],
        terminal=[False, False, True],
    )
    for lam in (0.0, 0.5, INF):
        solved = value_iteration(process, lam)
        assert solved.log_policy.exp()[0].tolist() == [0, 0, 1]
        assert solved.log_policy[1].tolist() == [0, -INF, -INF]
        assert solved.state_values[1] == -INF
    assert value_iteration(process, 0.5).value == pytest.approx(1 + 0.5 * math.log(0.5), abs=1e-14)
    assert value_iteration(process, INF).value == -INF  # E_q of the return
    assert (
        value_iteration(replace(process, discount=0.0), 0.5).state_values[0] > 8
    )  # without a future nothing is lost


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
def test_a_process_that_cannot_end_without_the_forbidden_is_infeasible(solve):
    with pytest.raises(
        InfeasibleError, match="from every initial state the reward -inf cannot be avoided"
    ):
        solve(loop(0.0, leaving=-INF), 1.0)
    with pytest.raises(InfeasibleError):
        solve(loop(-INF, 0.9, leaving=-INF), 1.0)
    assert solve(loop(0.0, 0.9, leaving=-INF), 1.0).value == pytest.approx(
        math.log(0.5) / 0.1, abs=1e-11
    )


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
def test_the_limits_of_kl_coef_are_limits(solve):
    process = loop(-1.0, 0.9)
    assert solve(process, 0.0).value == pytest.approx(solve(process, 1e-9).value, abs=1e-8)
    assert solve(process, 0.0).log_policy.exp()[0].tolist() == [0, 1]
    assert solve(process, INF).value == pytest.approx(solve(process, 1e5).value, abs=1e-5)
    assert torch.equal(solve(process, INF).log_policy, process.log_prior)
    assert solve(process, 5e-324).value == solve(process, 0.0).value


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
@pytest.mark.parametrize(("stays", "discount"), [(0.7, 1.0), (0.9, 0.9), (0.35, 0.99)])
def test_actions_that_rounding_alone_splits_share_the_limit(solve, stays, discount):
    """Every action pays 1 and ends with one probability, so all are worth 1/(1 − γp): V = m + λℓ
    exactly, and the policy is the same at every λ.
    """
    here, there, both = [stays, 0], [0, stays], [0.25 * stays, 0.75 * stays]
    moves = torch.tensor([[here, there, both], [there] * 3, [[0, 0]] * 3], dtype=torch.float64)
    ends = (1 - stays) * torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64).expand(3, 3)
    process = DecisionProcess.from_probabilities(
        [[0.2, 0.3, 0.5], [1, 0, 0], [0, 0, 0]],
        torch.cat([moves, ends[..., None]], -1),
        [[1.0] * 3, [1.0, 0, 0], [0.0] * 3],
        initial=[1.0, 0, 0],
        terminal=[False, False, True],
        discount=discount,
    )
    limit, soft = solve(process, 0.0), policy_iteration(process, 1.0)
    assert limit.value == pytest.approx(1 / (1 - discount * stays), rel=1e-12)
    assert float((limit.log_policy.exp() - soft.log_policy.exp()).abs().max()) < 1e-12


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
def test_actions_that_differ_by_more_than_rounding_do_not_tie(solve):
    process = loop(1.0 + 1e-11, 0.7, leaving=1 / 0.3)
    assert solve(process, 0.0).log_policy.exp()[0].tolist() == [1, 0]


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
def test_a_free_loop_is_worth_what_can_be_earned_by_leaving_it(solve):
    """At λ = 0 staying for ever costs nothing, but every λ > 0 makes it cost: the limit is −1, not
    0.
    """
    assert solve(loop(0.0, leaving=-1.0), 0.0).value == pytest.approx(-1, abs=1e-14)
    assert solve(loop(0.0, leaving=-1.0), 0.01).value == pytest.approx(-1, abs=1e-12)


def test_rewards_at_the_end_of_floats_stay_finite():
    process = loop(-1e308, 0.5, leaving=1e307)
    for lam in (5e-324, 0.1, 1e6):
        assert value_iteration(process, lam).value == pytest.approx(1e307, rel=1e-12)


def test_a_solution_shows_its_policy_and_gives_a_dictionary():
    solved = value_iteration(loop(-0.5, 0.9), 1.0)
    assert "π*(a1)" in str(solved)
    assert "<table>" in solved._repr_html_()
    assert solved.to_dict()["states"]["s0"]["policy"]["a1"] == pytest.approx(
        float(solved.log_policy[0, 1].exp())
    )
    assert solved.to_dict()["states"]["s1"] == {"value": 0.0, "policy": {}}


@pytest.mark.parametrize("kl_coef", [-1.0, math.nan])
def test_a_kl_coef_below_zero_is_refused(kl_coef):
    for solve in (value_iteration, policy_iteration):
        with pytest.raises(InputError, match="kl_coef"):
            solve(loop(), kl_coef)


# --- policies -------------------------------------------------------------------------------------


@given(data=st.data())
def test_the_value_of_a_policy_is_the_sum_over_its_paths(data):
    process, lam = data.draw(processes(returns=False)), data.draw(FINITE)
    log_policy = data.draw(policies(process))
    expected = math.fsum(
        weight * (reward - lam * ratio) for weight, reward, ratio, _ in paths(process, log_policy)
    )
    assert_close(policy_evaluation(process, log_policy, lam).value, expected)


@given(data=st.data())
def test_visits_are_the_sum_of_the_chain_s_powers(data):
    process = data.draw(processes())
    log_policy = data.draw(policies(process))
    chain = process.discount * np.einsum(
        "sa,sat->st", log_policy.exp().numpy(), process.transitions.numpy()
    )
    total = now = process.initial.numpy()
    for _ in range(600):
        now = now @ chain
        total = total + now
    assert_close(visits(process, log_policy), torch.tensor(total), float(total.max()))


@given(data=st.data())
def test_the_gradient_is_that_of_finite_differences(data):
    process, lam = data.draw(processes()), data.draw(FINITE)
    logits = torch.where(process.available, data.draw(policies(process)), 0)
    gradient, step = policy_gradient(process, softmax_policy(process, logits), lam), 1e-5
    for s, a in process.available.nonzero().tolist():
        moved = [
            logits.index_put(
                (torch.tensor(s), torch.tensor(a)),
                torch.tensor(sign * step, dtype=torch.float64),
                accumulate=True,
            )
            for sign in (1, -1)
        ]
        up, down = (
            policy_evaluation(process, softmax_policy(process, one), lam).value for one in moved
        )
        assert float(gradient[s, a]) == pytest.approx(
            (up - down) / (2 * step), abs=1e-7 * (1 + lam)
        )
    assert_close(gradient.sum(-1), torch.zeros_like(process.initial), 1 + lam)
    assert bool((gradient[~process.available] == 0).all())


def test_the_gradient_of_the_token_process_is_the_course_s_in_sequence_logits():
    problem, policy = four_sentences(), four_sentences_policy()
    process, trie = token_process(problem), problem_support(problem).trie
    mass = policy.edge_log_mass()
    total = torch.stack(
        [torch.logsumexp(mass[trie.parent == node], 0) for node in range(trie.nodes)]
    )
    log_edges = mass - total[trie.parent]
    log_policy = torch.full_like(process.log_prior, -INF).index_put(
        (trie.parent, trie.token), log_edges.detach()
    )
    by_state = policy_gradient(process, log_policy, 1.0)[trie.parent, trie.token]
    (gradient,) = torch.autograd.grad((by_state * log_edges).sum(), policy.logits)
    by_text = dict(zip(policy.space.decode(policy.tokens), gradient.tolist(), strict=True))
    expected = {
        "the cat": -0.011675039611,
        "the dog": -0.078948283960,
        "a cat": -0.010705934735,
        "a dog": 0.101329258306,
    }
    assert by_text == pytest.approx(expected, abs=5.1e-13)


def test_the_gradient_vanishes_at_the_optimum_and_only_there():
    process = loop(0.5, 0.9)
    solved = policy_iteration(process, 0.7)
    assert float(policy_gradient(process, solved.log_policy, 0.7).abs().max()) < 1e-12
    assert float(policy_gradient(process, process.log_prior, 0.7).abs().max()) > 0.1


@given(data=st.data())
def test_the_gap_is_the_difference_of_values_and_keeps_its_digits(data):
    process, lam = data.draw(processes()), data.draw(FINITE)
    log_policy, optimum = data.draw(policies(process)), policy_iteration(process, lam)
    assert_close(
        objective_gap(optimum, log_policy),
        optimum.value - policy_evaluation(process, log_policy, lam).value,
        10 * (1 + lam),
    )
    assert 0 <= objective_gap(optimum, optimum.log_policy) <= (1e-20 if lam else 1e-12) * (1 + lam)


def test_an_undiscounted_policy_that_never_ends_is_an_error_and_a_discounted_one_is_not():
    stays = torch.tensor([[0.0, -INF], [-INF, -INF]], dtype=torch.float64)
    for use in (
        lambda process: policy_evaluation(process, stays, 1.0),
        lambda process: visits(process, stays),
    ):
        with pytest.raises(
            InputError,
            match=(
                "from state 's0' the policy never ends, and with discount 1 its value need not"
                " exist"
            ),
        ):
            use(loop())
    assert policy_evaluation(loop(-0.5, 0.9), stays, 1.0).value == pytest.approx(
        (-0.5 - math.log(2)) / 0.1, abs=1e-12
    )


def test_a_policy_with_mass_where_the_prior_has_none_is_named():
    process = replace(loop(), log_prior=torch.tensor([[-INF, 0.0], [0, 0]]))
    with pytest.raises(
        UnsupportedPolicyError,
        match=r"mass 0.5 to state 's0', action 'a0', where the prior has none",
    ):
        policy_evaluation(
            process, torch.tensor([[0.5, 0.5], [0, 0]], dtype=torch.float64).log(), 1.0
        )


@pytest.mark.parametrize(
    ("log_policy", "message"),
    [
        (torch.zeros(2, 3), r"log_policy has shape \[2, 3\]; expected \[S, A\] = \[2, 2\]"),
        (torch.zeros(2, 2), "actions in state 's0' sum to 2, not 1; apply log_softmax"),
        (torch.full((2, 2), math.nan), "actions in state 's0' sum to nan"),
    ],
)
def test_what_is_no_policy_is_refused(log_policy, message):
    for use in (
        lambda: policy_evaluation(loop(), log_policy, 1.0),
        lambda: visits(loop(), log_policy),
        lambda: policy_gradient(loop(), log_policy, 1.0),
    ):
        with pytest.raises(InputError, match=message):
            use()


def test_a_policy_that_takes_the_forbidden_has_value_minus_infinity_and_no_gradient():
    process = loop(-INF, 0.9)
    assert policy_evaluation(process, process.log_prior, 1.0).value == -INF
    with pytest.raises(InputError, match="value at state 's0' is -inf, so J has no gradient"):
        policy_gradient(process, process.log_prior, 1.0)
    leaves = torch.tensor([[-INF, 0.0], [-INF, -INF]], dtype=torch.float64)
    assert policy_evaluation(process, leaves, 1.0).value == pytest.approx(
        0.3 - math.log(2), abs=1e-15
    )
    assert policy_gradient(process, leaves, 1.0).tolist() == [[0, 0], [0, 0]]


def test_at_an_infinite_kl_coef_only_the_prior_has_a_value():
    process = loop(-0.5)
    assert policy_evaluation(process, process.log_prior, INF).value == pytest.approx(
        -0.2, abs=1e-15
    )
    assert (
        policy_evaluation(
            process, torch.tensor([[0.4, 0.6], [0, 0]], dtype=torch.float64).log(), INF
        ).value
        == -INF
    )
    with pytest.raises(InputError, match="kl_coef = inf leaves only the prior"):
        policy_gradient(process, process.log_prior, INF)
