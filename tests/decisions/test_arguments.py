"""Every number argument of the decision processes: a right value, or one line that names it."""

import math

import pytest
import torch

from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import InputError
from klrl_edu.decisions import decision_learning, dialogue, model_error, soft_control
from klrl_edu.decisions.decision_process import DecisionProcess, token_process
from klrl_edu.problems.examples import four_sentences
from tests.decisions.processes import loop

INF = math.inf
HOSTILE = (math.nan, INF, -INF, -1.0, 0, True, 1e30, 10**30, 10**400, 1 + 1j, "1", None)
PROCESS = loop(-0.5, 0.5)
PRIOR = PROCESS.log_prior
ONE = (10,)  # a checkpoint
EPISODES = decision_learning.sample_transitions(PROCESS, PRIOR, 3, seeded_draw(0))
COUNTS = torch.ones(2, 2)
ANY_KL_COEF = {INF, 0, 1e30, 10**30}


def learn(learner, kl_coef=1.0, checkpoints=ONE, **options):
    return learner(PROCESS, kl_coef, checkpoints, seeded_draw(0), **options)


def process_with(**changed):
    arguments = {
        "prior": [[0.5, 0.5], [0, 0]],
        "transitions": [[[0, 1]] * 2, [[0, 0]] * 2],
        "rewards": [[1.0, 0.0], [0, 0]],
        "initial": [1.0, 0.0],
        "terminal": [False, True],
    }
    return DecisionProcess.from_probabilities(**(arguments | changed))


# the argument, the call, and which of the hostile values mean something
ARGUMENTS = {
    "discount": (lambda x: dialogue.dialogue(discount=x), {0}),
    "discount of lists": (lambda x: process_with(discount=x), {0}),
    "kl_coef": (lambda x: soft_control.value_iteration(PROCESS, x), ANY_KL_COEF),
    "kl_coef of policies": (lambda x: soft_control.policy_iteration(PROCESS, x), ANY_KL_COEF),
    "kl_coef of a value": (
        lambda x: soft_control.policy_evaluation(PROCESS, PRIOR, x),
        ANY_KL_COEF,
    ),
    "kl_coef of a gradient": (
        lambda x: soft_control.policy_gradient(PROCESS, PRIOR, x),
        ANY_KL_COEF - {INF},
    ),
    "kl_coef of plans": (lambda x: dialogue.compare_plans(PROCESS, x), ANY_KL_COEF),
    "kl_coef of trajectories": (lambda x: model_error.trajectory_value(PROCESS, x), ANY_KL_COEF),
    "kl_coef of a learner": (
        lambda x: learn(decision_learning.soft_q_learning, x),
        {1e30, 10**30},
    ),
    "kl_coef of a table": (lambda x: decision_learning.SoftQTable(PROCESS, x, 0.8), {1e30, 10**30}),
    "kl_coef of episodes": (
        lambda x: decision_learning.reinforce_gradient(PROCESS, PRIOR, x, EPISODES, torch.zeros(2)),
        ANY_KL_COEF - {INF},
    ),
    "tolerance": (lambda x: soft_control.value_iteration(PROCESS, 1.0, x), set()),
    "tolerance of policies": (lambda x: soft_control.policy_iteration(PROCESS, 1.0, x), set()),
    "max_entries": (lambda x: token_process(four_sentences(), x), {INF, 1e30, 10**30}),
    "max_entries of trajectories": (
        lambda x: model_error.trajectory_value(PROCESS, 1.0, x),
        {INF, 1e30, 10**30},
    ),
    "exponent": (lambda x: learn(decision_learning.soft_q_learning, exponent=x), set()),
    "exponent of a table": (lambda x: decision_learning.SoftQTable(PROCESS, 1.0, x), set()),
    "confidence": (lambda x: learn(decision_learning.plan_on_estimate, confidence=x), set()),
    "confidence of counts": (
        lambda x: decision_learning.sampling_bound(PROCESS, COUNTS, x),
        set(),
    ),
    "episodes": (lambda x: learn(decision_learning.policy_gradient_learning, episodes=x), set()),
    "episodes of a sample": (
        lambda x: decision_learning.sample_transitions(PROCESS, PRIOR, x, seeded_draw(0)),
        set(),
    ),
    "learning_rate": (
        lambda x: learn(decision_learning.policy_gradient_learning, learning_rate=x),
        {1e30, 10**30},
    ),
    "checkpoints": (
        lambda x: learn(decision_learning.soft_q_learning, checkpoints=(x,)),
        set(),
    ),
    "reward": (lambda x: process_with(rewards=[[x, 0.0], [0, 0]]), {-1.0, -INF, 0, 1e30, 10**30}),
    "initial": (lambda x: process_with(initial=[x, 0.0]), set()),
    "transition": (lambda x: process_with(transitions=[[[0, x]] * 2, [[0, 0]] * 2]), set()),
    "prior|action": (lambda x: process_with(prior=[[x, 0.0], [0, 0]]), set()),
    "counts": (
        lambda x: decision_learning.sampling_bound(PROCESS, torch.tensor([[1.0, x], [0, 0]])),
        {0, 1e30},
    ),
    "log_policy": (
        lambda x: soft_control.policy_evaluation(
            PROCESS, torch.tensor([[0.0, x], [0, 0]], dtype=torch.complex128), 1.0
        ),
        set(),
    ),
}
MASSES = {"initial", "transition", "prior|action", "counts", "reward"}  # arrays: true is 1 there
TENSORS = {"counts": (True, "1", None, 10**30, 10**400, 1 + 1j), "log_policy": ("1", None, 10**400)}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_number_is_taken_for_what_it_is_or_refused_in_one_line(argument):
    call, meant = ARGUMENTS[argument]
    for value in HOSTILE:
        if (argument in MASSES and value is True) or value in TENSORS.get(argument, ()):
            continue
        if value is not True and value in meant:
            call(value)
            continue
        with pytest.raises(InputError) as refusal:
            call(value)
        message = str(refusal.value)
        assert any(name in message for name in argument.split(" of ")[0].split("|")), value
        assert "\n" not in message


@pytest.mark.parametrize("tolerance", [1e-15, 1.0])
def test_the_ends_of_what_a_tolerance_may_be_are_allowed(tolerance):
    for solve in (soft_control.value_iteration, soft_control.policy_iteration):
        assert solve(PROCESS, 1.0, tolerance).value == pytest.approx(
            soft_control.policy_iteration(PROCESS, 1.0).value, rel=2 * tolerance + 1e-12, abs=1
        )


def test_a_gap_to_an_optimum_of_minus_infinity_is_refused():
    forbidding = soft_control.value_iteration(loop(-INF, 0.5), INF)
    with pytest.raises(InputError, match="the optimum's value is -inf, so no policy has a gap"):
        soft_control.objective_gap(forbidding, forbidding.process.log_prior)
