"""Six regularisers, six optima of one problem, and where mass is truly zero

    max_π E_π[r] − λ D_f(π‖q):    f'(π/q) = (r − ν)/λ where π > 0                                (1)

Seen: all six move mass to the reward, each by its own curve of π/q against r: exponential for
reverse KL, a pole for forward KL, Jensen–Shannon and Hellinger, a straight line for χ², which alone
gives outcomes up (a mass of exactly 0, drawn as hollow marks).

Source: Wang et al. (2023), f-DPO, Table 1; KL + χ² is Huang et al. (2024);
closed_forms/regularizers.py derives each

Data:
    prior, rewards       q [K] and r [K] in reward units
    kl_coef              λ
    optima               a list: name, probabilities [K], zeros (indices of mass 0),
    expected_reward, objective
    curve_rewards        a grid of rewards [M]
    curves               name -> π/q at each reward of the grid [M], with the ν of the problem
"""

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

import klrl_edu as klrl
from klrl_edu import plots

NAMES = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "chi_squared": "χ²",
    "kl_plus_chi_squared": "KL + χ²",
    "jensen_shannon": "Jensen–Shannon",
    "squared_hellinger": "Hellinger²",
}


@dataclass(frozen=True)
class Config:
    """Eight outcomes with rewards from −2 to 1.5, at one λ."""

    rewards: tuple[float, ...] = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
    prior: tuple[float, ...] = (0.08, 0.12, 0.18, 0.22, 0.17, 0.12, 0.07, 0.04)
    kl_coef: float = 1.0
    points: int = 71


def compute(config: Config) -> dict[str, Any]:
    """Each optimum, and its ratio π/q as a function of the reward with the same ν."""
    log_q = torch.tensor(config.prior, dtype=torch.float64).log()
    rewards = torch.tensor(config.rewards, dtype=torch.float64)
    ends = min(config.rewards), max(config.rewards)
    grid = torch.linspace(*ends, config.points, dtype=torch.float64)
    optima, curves = [], {}
    for name, label in NAMES.items():
        found = klrl.regularizers.optimum(name, log_q, rewards, config.kl_coef)
        probabilities = found.log_probs.exp()
        optima.append(
            {
                "name": label,
                "probabilities": probabilities.tolist(),
                "zeros": (found.log_probs == -torch.inf).nonzero().squeeze(-1).tolist(),
                "expected_reward": float(probabilities @ rewards),
                "objective": found.objective,
            }
        )
        advantage = (grid - found.normaliser) / config.kl_coef
        curves[label] = klrl.regularizers.density_ratio(name, advantage).tolist()
    return {
        "prior": list(config.prior),
        "rewards": list(config.rewards),
        "kl_coef": config.kl_coef,
        "optima": optima,
        "curve_rewards": grid.tolist(),
        "curves": curves,
    }


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """The probabilities against the reward, and the ratio π/q."""
    figure, (mass, ratio) = plots.new_figure(2, 3.7, 3.2)
    mass.plot(data["rewards"], data["prior"], "--", color=plots.PRIOR_COLOUR, label="prior q")
    colours = (plots.POSTERIOR_COLOUR, *plots.POLICY_COLOURS)
    for side, colour, marker in zip(data["optima"], colours, "osD^vP", strict=False):
        alive = [k for k in range(len(data["rewards"])) if k not in side["zeros"]]
        x, y = data["rewards"], side["probabilities"]
        mass.plot(
            [x[k] for k in alive],
            [y[k] for k in alive],
            color=colour,
            marker=marker,
            markersize=3.5,
            linewidth=1,
            label=side["name"],
        )
        mass.plot(
            [x[k] for k in side["zeros"]],
            [0.0] * len(side["zeros"]),
            marker,
            color=colour,
            fillstyle="none",
            markersize=7,
            linestyle="none",
        )
        ratio.plot(
            data["curve_rewards"], data["curves"][side["name"]], color=colour, label=side["name"]
        )
        ratio.plot(
            x,
            [p / q for p, q in zip(y, data["prior"], strict=True)],
            marker,
            color=colour,
            markersize=3,
        )
    mass.set(
        xlabel="reward of the outcome", ylabel="probability", title="Six optima (hollow: exactly 0)"
    )
    mass.legend(loc="upper left", fontsize=7)
    ratio.axhline(1, color=plots.PRIOR_COLOUR, linewidth=0.8, linestyle="--")
    ratio.set(xlabel="reward r", ylabel="π/q", title="Each tilts in its own way", ylim=(-0.3, 9))
    return figure
