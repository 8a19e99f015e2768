"""A dialogue with a user who may or may not be clear: where γ, the user's replies and planning each
decide what the best policy is.

The user's request can be read in two ways. The assistant's prior mostly answers at once, which
earns a little now; a question costs a little now and usually makes the request clear; a bold guess
now and then delights. The user's replies are P(s'|s,a), which no policy chooses: that is what a
dialogue has and a token process has not. Rewards in units of one fully satisfactory answer.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from klrl_edu.core.display import Cell, html_table, text_table
from klrl_edu.decisions.decision_process import DecisionProcess
from klrl_edu.decisions.model_error import trajectory_value
from klrl_edu.decisions.soft_control import policy_evaluation, value_iteration

STATES = ("vague", "puzzled", "clear", "delighted", "annoyed", "over")
ACTIONS = ("answer", "ask", "guess", "close")

# state: action -> (prior, reward, {reply: probability})
_DIALOGUE: dict[str, dict[str, tuple[float, float, dict[str, float]]]] = {
    "vague": {
        "answer": (0.7, 0.3, {"over": 0.8, "annoyed": 0.2}),
        "ask": (0.15, -0.1, {"clear": 0.7, "puzzled": 0.3}),
        "guess": (0.15, 0.0, {"delighted": 0.15, "annoyed": 0.85}),
    },
    "puzzled": {
        "answer": (0.5, 0.3, {"over": 0.8, "annoyed": 0.2}),
        "ask": (0.4, -0.1, {"clear": 0.4, "annoyed": 0.35, "puzzled": 0.25}),
        "close": (0.1, 0.0, {"over": 1.0}),
    },
    "clear": {
        "answer": (0.8, 1.0, {"over": 0.95, "annoyed": 0.05}),
        "guess": (0.2, 0.4, {"delighted": 0.3, "annoyed": 0.7}),
    },
    "delighted": {"close": (1.0, 2.0, {"over": 1.0})},
    "annoyed": {
        "answer": (0.5, -0.2, {"over": 0.7, "annoyed": 0.3}),
        "close": (0.5, -0.3, {"over": 1.0}),
    },
}


def dialogue(discount: float = 0.95) -> DecisionProcess:
    """Six states, four actions: an assistant that mostly answers at once, and a user whose replies
    are a matter of chance.

    Args:
        discount: γ, the user's patience: at 0 only the next reply counts, at 1 the whole dialogue.
    """
    S, A = len(STATES), len(ACTIONS)
    prior = torch.zeros(S, A, dtype=torch.float64)
    rewards = torch.zeros_like(prior)
    transitions = torch.zeros(S, A, S, dtype=torch.float64)
    for state, choices in _DIALOGUE.items():
        for action, (chance, reward, replies) in choices.items():
            place = STATES.index(state), ACTIONS.index(action)
            prior[place], rewards[place] = chance, reward
            for reply, probability in replies.items():
                transitions[(*place, STATES.index(reply))] = probability
    index = torch.arange(S)
    return DecisionProcess.from_probabilities(
        prior,
        transitions,
        rewards,
        initial=index == 0,
        terminal=index == S - 1,
        discount=discount,
        states=STATES,
        actions=ACTIONS,
    )


def most_likely_replies(process: DecisionProcess) -> DecisionProcess:
    """The model of the world in which every action has its most likely reply (the first, of
    several), from every state that is not terminal.

    It starts everywhere, because from the process's own start such a world may leave states
    unreached; values and policies do not depend on it.
    """
    # argmax takes the first of equals, so that the model is one and the same everywhere
    certain = torch.nn.functional.one_hot(process.transitions.argmax(-1), len(process.states))
    live = ~process.terminal
    return replace(process, transitions=certain, initial=live.double() / live.sum())


@dataclass(frozen=True, eq=False)
class Plans:
    """What policies earn in a process that were planned with something wrong, by name of the plan.

    Attributes:
        log_policies: log π [S,A] in nats.
        promised: the value that the plan expects, in reward units.
        earned: J(π) in the process, in reward units.
        process: where they are held against each other.
    """

    log_policies: dict[str, Tensor] = field(repr=False)
    promised: dict[str, float]
    earned: dict[str, float]
    process: DecisionProcess = field(repr=False)

    def loss(self, plan: str) -> float:
        """J(π*) − J(π), in reward units."""
        return self.earned["optimal"] - self.earned[plan]

    def to_dict(self) -> dict[str, Any]:
        """promised, earned and lost by plan."""
        return {
            name: {
                "promised": self.promised[name],
                "earned": self.earned[name],
                "lost": self.loss(name),
            }
            for name in self.earned
        }

    def _table(self) -> tuple[list[str], list[list[Cell]]]:
        process = self.process
        # of the policies only what they do first, in the likeliest start
        start = int(process.initial.argmax())
        offered = process.available[start].nonzero().squeeze(-1).tolist()
        choices = [f"π({process.actions[action]}|{process.states[start]})" for action in offered]
        rows: list[list[Cell]] = []
        for name, row in self.to_dict().items():
            probabilities = self.log_policies[name][start, offered].exp().tolist()
            rows.append([name, *row.values(), *probabilities])
        return ["plan", "promised", "earned", "lost", *choices], rows

    def __str__(self) -> str:
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())


def compare_plans(process: DecisionProcess, kl_coef: float) -> Plans:
    """The optimum against the prior and three plans with something wrong, each earning in the
    process as it is.

    optimal: π*. prior: q. myopic: planned with γ = 0. most likely reply: planned as if each action
    had only that. chosen replies: the actions of the trajectory posterior, which tilts the replies
    as well (`trajectory_value`).

    Args:
        kl_coef: λ > 0; at 0 a plan may never end.
    """
    optimum = value_iteration(process, kl_coef)
    myopic = value_iteration(replace(process, discount=0.0), kl_coef)
    likely = value_iteration(most_likely_replies(process), kl_coef)
    chosen = trajectory_value(process, kl_coef)
    # each plan's policy, and the value it expects; the model of likely replies starts everywhere,
    # so its promise is taken at the start of the process
    plans = {
        "optimal": (optimum.log_policy, optimum.value),
        # what a plan promises beside: for the prior what it earns, as nothing was planned
        "prior": (process.log_prior, policy_evaluation(process, process.log_prior, kl_coef).value),
        "myopic": (myopic.log_policy, myopic.value),
        "most likely reply": (likely.log_policy, float(process.initial @ likely.state_values)),
        "chosen replies": (chosen.log_policy, chosen.value),
    }
    policies = {name: log_policy for name, (log_policy, _) in plans.items()}
    promised = {name: value for name, (_, value) in plans.items()}
    # whatever a plan believed, it is the process as it is that pays
    earned = {
        name: policy_evaluation(process, log_policy, kl_coef).value
        for name, log_policy in policies.items()
    }
    return Plans(policies, promised, earned, process)
