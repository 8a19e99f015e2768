"""Wrong models: the bound against exact errors, and the trajectory posterior against every path."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.decisions.decision_process import DecisionProcess, token_process
from klrl_edu.decisions.model_error import simulation_bound, trajectory_value
from klrl_edu.decisions.soft_control import policy_evaluation, policy_iteration
from klrl_edu.problems.examples import four_sentences
from tests.decisions.processes import loop, normalised, paths, processes
from tests.exact.dictionaries import INF, assert_close

KL_COEFS = st.sampled_from((0.05, 0.5, 1.0, 10.0))


@given(data=st.data())
def test_a_wrong_model_is_no_further_off_than_the_bound(data):
    process, lam = data.draw(processes()), data.draw(KL_COEFS)
    S, A = process.log_prior.shape
    noise = torch.rand(
        S,
        A,
        S,
        generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))),
        dtype=torch.float64,
    )
    amount = data.draw(st.sampled_from((0.01, 1.0)))
    wrong = normalised(
        torch.where(process.transitions > 0, process.transitions + amount * noise, 0)
    )
    model = replace(
        process, transitions=wrong, rewards=process.rewards + amount * (noise[:, :, 0] - 0.5)
    )
    planned, optimum = policy_iteration(model, lam), policy_iteration(process, lam)
    bound = simulation_bound(process, model, planned.state_values)
    assert float((planned.state_values - optimum.state_values).abs().max()) <= bound + 1e-12
    earned = policy_evaluation(process, planned.log_policy, lam)
    assert float((planned.state_values - earned.state_values).abs().max()) <= bound + 1e-12
    assert optimum.value - earned.value <= 2 * bound + 1e-12


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9])
def test_the_bound_is_reached_where_every_reward_is_off_by_the_same(discount):
    process = DecisionProcess.from_probabilities(
        [[0.4, 0.6]],
        [[[1.0], [1.0]]],
        [[1.0, 0.0]],
        initial=[1.0],
        terminal=[False],
        discount=discount,
        continuing=True,
    )
    model = replace(process, rewards=process.rewards + 0.1)
    planned, optimum = (policy_iteration(one, 1.0) for one in (model, process))
    bound = simulation_bound(process, model, planned.state_values)
    assert bound == pytest.approx(0.1 / (1 - discount), rel=1e-12)
    assert planned.value - optimum.value == pytest.approx(bound, rel=1e-12)


def test_without_discount_the_bound_counts_steps_and_a_return_leaves_none():
    process = token_process(four_sentences())
    model = replace(process, rewards=process.rewards + 0.1)
    planned = policy_iteration(model, 1.0)
    assert simulation_bound(process, model, planned.state_values) == pytest.approx(0.2, rel=1e-12)
    assert planned.value - policy_iteration(process, 1.0).value == pytest.approx(0.2, rel=1e-12)
    model = loop(-0.4)
    values = policy_iteration(model, 1.0).state_values
    assert simulation_bound(loop(-0.5), model, values) == INF
    assert simulation_bound(model, model, values) == 0


def test_models_that_cannot_be_held_against_each_other_are_refused():
    values = torch.zeros(2, dtype=torch.float64)
    for model in (loop(discount=0.9), token_process(four_sentences())):
        with pytest.raises(
            InputError, match="must share states, terminal states, discount and available actions"
        ):
            simulation_bound(loop(), model, values)
    with pytest.raises(InputError, match="model_values holds NaN or an infinity"):
        simulation_bound(loop(), loop(), values - INF)


@given(data=st.data())
def test_the_trajectory_posterior_is_the_prior_s_paths_tilted_by_their_rewards(data):
    process, lam = data.draw(processes(returns=False, discounts=())), data.draw(KL_COEFS)
    start = int(data.draw(st.sampled_from((~process.terminal).nonzero().squeeze(-1).tolist())))
    listed = [
        (math.log(weight) + reward / lam, steps)
        for weight, reward, _, steps in paths(process, process.log_prior)
        if steps[0][0] == start
    ]
    masses = torch.tensor([log_mass for log_mass, _ in listed], dtype=torch.float64)
    log_evidence = torch.logsumexp(masses, 0) - process.initial[start].log()
    chosen = trajectory_value(process, lam)
    assert_close(chosen.state_values[start], lam * log_evidence)
    posterior = torch.softmax(masses, 0)
    for action in process.available[start].nonzero().squeeze(-1).tolist():
        expected = sum(
            (
                float(p)
                for p, (_, steps) in zip(posterior, listed, strict=True)
                if steps[0][1] == action
            ),
            0.0,
        )
        assert_close(chosen.log_policy[start, action].exp(), expected)


@given(data=st.data())
def test_chosen_replies_promise_more_than_can_be_earned(data):
    process, lam = data.draw(processes()), data.draw(KL_COEFS)
    chosen, optimum = trajectory_value(process, lam), policy_iteration(process, lam)
    assert bool((chosen.state_values >= optimum.state_values - 1e-12 * (1 + lam)).all())
    certain = bool(((process.transitions == 0) | (process.transitions == 1)).all())
    if certain:
        assert_close(chosen.value, optimum.value, 1 + lam)
        assert_close(chosen.log_policy.exp(), optimum.log_policy.exp(), tolerance=1e-10)
    replies = chosen.log_replies.exp().sum(-1)[process.available & (chosen.log_policy > -INF)]
    assert_close(replies, torch.ones_like(replies))


def test_in_a_token_process_nothing_is_chosen_for_the_world():
    process = token_process(four_sentences())
    assert trajectory_value(process, 1.0).value == pytest.approx(
        math.log(2.326218341277), abs=1e-12
    )


def test_a_process_whose_replies_cannot_be_listed_is_refused():
    with pytest.raises(
        TooLargeError, match="2 states and 2 actions make 16 entries, more than max_entries = 15"
    ):
        trajectory_value(loop(), 1.0, max_entries=15)
