"""What the dialogue is for: exact numbers that say what γ, the user's replies and planning are
worth.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from klrl_edu.decisions.dialogue import (
    ACTIONS,
    STATES,
    compare_plans,
    dialogue,
    most_likely_replies,
)
from klrl_edu.decisions.soft_control import policy_evaluation, policy_iteration, value_iteration

KL_COEF = 0.1
ANSWER, ASK, GUESS = (ACTIONS.index(name) for name in ("answer", "ask", "guess"))


def opening(discount: float) -> torch.Tensor:
    """π*(·|vague), probabilities."""
    return policy_iteration(dialogue(discount), KL_COEF).log_policy[0].exp()


def test_the_myopic_optimum_answers_and_the_planned_one_asks_first():
    assert opening(0.0)[ANSWER] > 0.98
    assert opening(0.95)[ASK] > 0.88
    assert dialogue().log_prior[0].exp()[ANSWER] == pytest.approx(0.7)


def test_the_more_the_future_counts_the_more_it_asks():
    asks = [float(opening(discount / 20)[ASK]) for discount in range(21)]
    assert all(later > earlier for earlier, later in itertools.pairwise(asks))
    assert opening(0.6)[ANSWER] > opening(0.6)[ASK]
    assert opening(0.7)[ANSWER] < opening(0.7)[ASK]


def test_replies_that_the_plan_thinks_its_own_promise_more_than_is_attainable_and_earn_less():
    plans = compare_plans(dialogue(), KL_COEF)
    assert plans.promised["chosen replies"] > 3 * plans.promised["optimal"]
    assert plans.loss("chosen replies") > 0.34
    guesses = {
        name: float(log_policy[0, GUESS].exp()) for name, log_policy in plans.log_policies.items()
    }
    assert (
        guesses["chosen replies"] > 0.3 > 0.01 > guesses["optimal"]
    )  # it bets on the user's delight


def test_a_user_who_always_gives_the_most_likely_reply_is_a_model_that_loses():
    plans = compare_plans(dialogue(), KL_COEF)
    assert plans.promised["most likely reply"] > plans.promised["optimal"]
    assert plans.loss("most likely reply") == pytest.approx(0.042446, abs=5e-7)
    puzzled = STATES.index("puzzled")
    wrong, right = (
        plans.log_policies[name][puzzled, ASK].exp() for name in ("most likely reply", "optimal")
    )
    assert wrong > 0.9 > 0.4 > right  # it asks a puzzled user again, sure to be understood


@pytest.mark.parametrize("kl_coef", [0.05, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("discount", [0.5, 0.95, 1.0])
def test_every_wrong_plan_earns_strictly_less(discount, kl_coef):
    plans = compare_plans(dialogue(discount), kl_coef)
    assert plans.promised["optimal"] == pytest.approx(plans.earned["optimal"], abs=1e-12)
    assert all(plans.loss(name) > 1e-4 for name in plans.earned if name != "optimal")
    assert plans.promised["chosen replies"] > plans.promised["optimal"] + 1e-4


def test_the_numbers_of_the_dialogue():
    """Pinned, so that a change of the example is seen: J of each plan at γ = 0.95, λ = 0.1."""
    plans = compare_plans(dialogue(), KL_COEF)
    expected = {
        "optimal": 0.429887,
        "prior": 0.266675,
        "myopic": 0.212608,
        "most likely reply": 0.387441,
        "chosen replies": 0.081885,
    }
    assert plans.earned == pytest.approx(expected, abs=1e-6)


def test_the_most_likely_reply_is_certain_and_the_first_of_several():
    likely = most_likely_replies(dialogue())
    assert likely.transitions[0, ASK, STATES.index("clear")] == 1
    assert bool(((likely.transitions == 0) | (likely.transitions == 1)).all())
    assert float(likely.initial.sum()) == pytest.approx(1)


def test_where_the_start_lies_changes_no_policy():
    process = dialogue()
    elsewhere = replace(process, initial=most_likely_replies(process).initial)
    assert torch.equal(
        value_iteration(process, KL_COEF).log_policy, value_iteration(elsewhere, KL_COEF).log_policy
    )


def test_a_simulated_dialogue_by_hand_earns_the_value_of_answering_at_once():
    """Answering always: 0.3 now, and with probability 0.2 an annoyed user."""
    process = dialogue()
    answers = process.log_prior.clone()
    answers[0] = torch.where(torch.arange(len(ACTIONS)) == ANSWER, 0.0, -torch.inf)
    after = policy_evaluation(process, process.log_prior, 0.0).state_values[STATES.index("annoyed")]
    annoyed = (0.5 * -0.2 + 0.5 * -0.3) / (1 - 0.95 * 0.5 * 0.3)
    assert float(after) == pytest.approx(annoyed, abs=1e-14)
    assert policy_evaluation(process, answers, 0.0).value == pytest.approx(
        0.3 + 0.95 * 0.2 * annoyed, abs=1e-14
    )


def test_plans_have_a_table_and_a_dictionary():
    plans = compare_plans(dialogue(), KL_COEF)
    assert "π(ask|vague)" in str(plans)
    assert "<table>" in plans._repr_html_()
    assert plans.to_dict()["prior"]["lost"] == plans.loss("prior")
