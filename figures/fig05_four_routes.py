"""Four routes on a decision process: gap against samples

    V* − J(π) = λ Σ_s d_π(s) KL(π(·|s)‖π*(·|s))                                                  (1)
    V* − J(plan on P̂) ≤ 2/(1 − γ) · max_{s,a} |γ Σ_s' (P − P̂)(s'|s,a) V̂(s')|                  (2)

An assistant has to clear six points, one question each, before its answer is worth 2; at once it is
worth 0.3. A question may fail, and may annoy the user, who then has to be let go. The prior asks
three times in four. λ = 0.1, γ = 0.95; nine states, two actions.

Seen: dynamic programming has the optimum without a sample. Planning on the estimated model does
worse than the prior on a handful of episodes, but once each reply was seen a few times it carries
the worth of the answer back over all six points at once, and is ten times sooner at a small gap
than soft Q-learning, which learns from the same episodes of the prior and carries that worth back a
point at a time; late in the run the two meet. The policy gradient, on episodes of its own, climbs
from the first batch and is the slowest in the end. The bound (2) holds for every plan and is far
above its gap: it counts the worst pair at every step, however rarely that pair is visited.

Source: Levine (2018), §2; Sutton & Barto (2018), ch. 6, 8 and 13; of the five articles of
`klrl check --claims` D (§3.2, three families of methods) and E (§4.1, Q-learning)

Data:
    value                V*, the optimum's J, in reward units
    sweeps               of value iteration until V* stands
    prior_value          J(q), where Q-learning and the policy gradient start
    learners             name, transitions [seeds, M] consumed, gaps [seeds, M] by (1) in reward
    units; planning also bounds [seeds, M] by (2)
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from klrl_edu import plots, seeded_draw
from klrl_edu.decisions import decision_learning
from klrl_edu.decisions.decision_learning import LearningCurve
from klrl_edu.decisions.decision_process import DecisionProcess
from klrl_edu.decisions.soft_control import policy_evaluation, value_iteration

PLANNING = "planning on the estimated model"
Q_LEARNING = "soft Q-learning"
POLICY_GRADIENT = "policy gradient"


@dataclass(frozen=True)
class Config:
    """The process, and how the three learn."""

    points: int = 6
    kl_coef: float = 0.1
    discount: float = 0.95
    seeds: int = 5
    shortest: int = 5  # log2 of the first checkpoint
    shortest_of_gradient: int = 8  # the same for the policy gradient, whose batches are longer
    longest: int = 15  # log2 of the last
    exponent: float = 0.8  # of the steps of Q-learning
    learning_rate: float = 4.0
    episodes: int = 32


def clearing(points: int, discount: float) -> DecisionProcess:
    """States by points still open, then annoyed and over; actions ask and answer."""
    S = points + 3
    annoyed, over = S - 2, S - 1
    ask, answer = 0, 1
    # while points are open: a question mostly clears one, an answer earns little and ends it
    prior, rewards = [[0.75, 0.25] for _ in range(S)], [[-0.02, 0.3] for _ in range(S)]
    transitions = torch.zeros(S, 2, S, dtype=torch.float64)
    transitions[:, answer, over] = 1
    for state in range(points):
        for after, chance in ((state + 1, 0.7), (state, 0.22), (annoyed, 0.08)):
            transitions[state, ask, after] = chance
    # all is clear: the answer is worth most, and one more question is idle
    prior[points], rewards[points] = [0.2, 0.8], [-0.02, 2.0]
    transitions[points, ask, points], transitions[points, ask, annoyed] = 0.8, 0.2
    prior[annoyed], rewards[annoyed] = [0.5, 0.5], [-0.2, -0.1]
    transitions[annoyed, ask, annoyed] = transitions[annoyed, ask, over] = 0.5
    places = torch.arange(S)
    names = (*(f"{count} open" for count in range(points, -1, -1)), "annoyed", "over")
    return DecisionProcess.from_probabilities(
        prior,
        transitions,
        rewards,
        initial=(places == 0).double(),
        terminal=places == over,
        discount=discount,
        states=names,
        actions=("ask", "answer"),
    )


def compute(config: Config) -> dict[str, Any]:
    """The exact optimum, and the exact gap of each learner along its way."""
    process = clearing(config.points, config.discount)
    optimum = value_iteration(process, config.kl_coef)
    after = [2**power for power in range(config.shortest, config.longest + 1)]
    later = [2**power for power in range(config.shortest_of_gradient, config.longest + 1)]
    gradient: dict[str, Any] = {"learning_rate": config.learning_rate, "episodes": config.episodes}
    routes: dict[str, Callable[[Any], LearningCurve]] = {
        PLANNING: lambda draw: decision_learning.plan_on_estimate(
            process, config.kl_coef, after, draw
        ),
        Q_LEARNING: lambda draw: decision_learning.soft_q_learning(
            process, config.kl_coef, after, draw, exponent=config.exponent
        ),
        POLICY_GRADIENT: lambda draw: decision_learning.policy_gradient_learning(
            process, config.kl_coef, later, draw, **gradient
        ),
    }
    return {
        "value": optimum.value,
        "sweeps": optimum.iterations,
        "prior_value": policy_evaluation(process, process.log_prior, config.kl_coef).value,
        "learners": [
            _learner(name, [learn(seeded_draw(seed)) for seed in range(config.seeds)])
            for name, learn in routes.items()
        ],
    }


def _learner(name: str, curves: list[LearningCurve]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name,
        "transitions": [list(curve.transitions) for curve in curves],
        "gaps": [list(curve.gaps) for curve in curves],
    }
    if curves[0].model_bounds:
        found["bounds"] = [list(curve.model_bounds) for curve in curves]
    return found


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """What each earns, and what it lacks, against transitions."""
    figure, (earned, lacking) = plots.new_figure(2, 3.5, 3.3)
    colours = (plots.GREEN, plots.VERMILION, plots.PURPLE)
    for learner, colour, marker in zip(data["learners"], colours, "os^", strict=True):
        samples = [
            statistics.median(column) for column in zip(*learner["transitions"], strict=True)
        ]
        gaps = list(zip(*learner["gaps"], strict=True))
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 3,
            "label": learner["name"],
        }
        for ax, height in ((earned, lambda gap: data["value"] - gap), (lacking, lambda gap: gap)):
            ax.plot(samples, [height(statistics.median(column)) for column in gaps], **style)
            low, high = ([height(end(column)) for column in gaps] for end in (min, max))
            ax.fill_between(samples, low, high, color=colour, alpha=0.18, linewidth=0)
        if "bounds" in learner:
            bounds = [statistics.median(column) for column in zip(*learner["bounds"], strict=True)]
            lacking.plot(
                samples,
                bounds,
                color=colour,
                linestyle="--",
                linewidth=1,
                label="bound on planning's gap",
            )
    earned.axhline(data["value"], color=plots.POSTERIOR_COLOUR, label="V*, by values: no samples")
    earned.axhline(
        data["prior_value"], color=plots.PRIOR_COLOUR, linestyle=":", linewidth=1, label="prior"
    )
    earned.set(
        xscale="log", ylabel="J(π) in reward units", title="Three climb, one stands at the top"
    )
    lacking.set(
        xscale="log",
        yscale="log",
        ylabel="V* − J(π) in reward units",
        title="What each still lacks",
    )
    lines = {str(line.get_label()): line for ax in (earned, lacking) for line in ax.get_lines()}
    for ax in (earned, lacking):
        ax.set_xlabel("transitions consumed")
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=3)
    return figure
