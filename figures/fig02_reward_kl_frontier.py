"""The reward–KL frontier: what any policy can earn for its divergence from the prior

    max {E_π[r] : KL(π‖q) = k} is reached by π*_λ with KL(π*_λ‖q) = k, and the frontier's slope
    there is λ          (1)
    E_π[r] ≤ λ log Z_λ + λ KL(π‖q)   for every π and λ: the tangents                             (2)

Seen: the exact frontier with tangents of slope λ; policies trained from the prior by plain policy
gradient (RLOO) pass below it on their way to π*_λ; without the KL term each early stop lies below
it too, the further the longer. The published setting trains GPT-2 on film reviews; the prior here
is 100 surnames, the reward their Scrabble score over ten, and the frontier is exact instead of
traced by runs.

Source: Rafailov et al. (2023), figure 2, left

Data:
    frontier     kl_coef λ [K] (falling), kl_to_prior [K] in nats, expected_reward [K] in reward
    units; from q to argmax r
    end          the frontier's end at λ → 0: kl_to_prior, expected_reward
    tangents     a row a trained λ > 0: kl_coef, kl_to_prior, expected_reward, value (λ log Z, the
    intercept of (2))
    runs         a row a run: kl_coef, step [M], kl_to_prior [M], expected_reward [M], shortfall [M]
    (frontier minus E[r] at the
                 run's own KL, in reward units)
    smallest_shortfall, largest_shortfall    over all runs: the smallest is not negative
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.optimize import brentq

import klrl_edu as klrl
from klrl_edu import plots
from klrl_edu.closed_forms.tilt import tilt

LETTER_SCORES = {1: "aeilnorstu", 2: "dg", 3: "bcmp", 4: "fhvwy", 5: "k", 8: "jx", 10: "qz"}


@dataclass(frozen=True)
class Config:
    """Problem, λ of the runs, and how they train (plain gradient ascent)."""

    surnames: int = 100
    kl_coefs: tuple[float, ...] = (1.0, 0.5, 0.25, 0.0)
    steps: int = 120
    every: int = 4
    batch_size: int = 64
    lr: float = 3.0
    seed: int = 0
    points: int = 81


def compute(config: Config) -> dict[str, Any]:
    """The exact frontier, and the runs held against it."""
    problem = surnames_by_score(config.surnames)
    support = klrl.problem_support(problem)
    point = _frontier_point(support)
    height = _frontier_height(point)
    frontier = [point(lam) for lam in _grid(20.0, 0.05, config.points)]
    end = point(0.0)
    runs = [
        _train(klrl.Problem(problem.prior, problem.reward, lam), support, config)
        for lam in config.kl_coefs
    ]
    for run in runs:
        run["shortfall"] = [
            height(k) - r for k, r in zip(run["kl_to_prior"], run["expected_reward"], strict=True)
        ]
    shortfalls = [value for run in runs for value in run["shortfall"]]
    return {
        "frontier": {
            name: [row[name] for row in frontier]
            for name in ("kl_coef", "kl_to_prior", "expected_reward")
        },
        "end": {name: end[name] for name in ("kl_to_prior", "expected_reward")},
        "tangents": [point(lam) for lam in config.kl_coefs if lam > 0],
        "runs": runs,
        "smallest_shortfall": min(shortfalls),
        "largest_shortfall": max(shortfalls),
    }


def surnames_by_score(count: int) -> klrl.Problem:
    """Surnames rewarded by their Scrabble score over ten."""
    prior = klrl.surnames(count=count).prior
    score = {letter: value / 10 for value, letters in LETTER_SCORES.items() for letter in letters}
    reward = klrl.text_reward(lambda name: sum(score[letter] for letter in name), prior.space)
    return klrl.Problem(prior, reward, 1.0)


def _grid(first: float, last: float, points: int) -> list[float]:
    return [first * (last / first) ** (i / (points - 1)) for i in range(points)]


def _frontier_point(support: klrl.Support) -> Callable[[float], dict[str, float]]:
    """λ -> where π*_λ stands."""

    def point(kl_coef: float) -> dict[str, float]:
        log_star, value, _ = tilt(support.log_prior, support.rewards, kl_coef)
        numbers = {
            "kl_to_prior": klrl.logspace.kl_divergence(log_star, support.log_prior),
            "expected_reward": klrl.logspace.expectation(log_star, support.rewards),
            "value": value,
        }
        return {"kl_coef": kl_coef, **{name: float(number) for name, number in numbers.items()}}

    return point


def _frontier_height(point: Callable[[float], dict[str, float]]) -> Callable[[float], float]:
    """KL -> the frontier's E[r] there: (1) by a root in log λ; E_q[r] where the KL is next to
    nothing, and flat beyond the frontier's end.
    """
    smallest, largest = 0.01, 1e6
    start, end = point(math.inf), point(0.0)
    least, most = point(largest)["kl_to_prior"], point(smallest)["kl_to_prior"]
    between = math.log(smallest), math.log(largest)

    def height(kl: float) -> float:
        if not least < kl < most:
            return (end if kl > least else start)["expected_reward"]
        root = brentq(
            lambda x: point(math.exp(x))["kl_to_prior"] - kl, *between, xtol=1e-14, rtol=1e-14
        )
        at = point(math.exp(root))
        # along the tangent, which takes up the root's last digits
        return at["expected_reward"] + at["kl_coef"] * (kl - at["kl_to_prior"])

    return height


def _train(problem: klrl.Problem, support: klrl.Support, config: Config) -> dict[str, Any]:
    """RLOO from the prior, one row of logits a prefix; looked at every few steps."""
    # logits of −inf where q has no mass, which no step moves
    policy = klrl.PrefixTable.from_model(problem.prior, support.tokens)
    run: dict[str, Any] = {
        "kl_coef": problem.kl_coef,
        "step": [],
        "kl_to_prior": [],
        "expected_reward": [],
    }

    @torch.no_grad()
    def look(step: int) -> None:
        log_pi = klrl.sequence_log_probs(policy, support.tokens)
        run["step"].append(step)
        run["kl_to_prior"].append(float(klrl.logspace.kl_divergence(log_pi, support.log_prior)))
        run["expected_reward"].append(float(klrl.logspace.expectation(log_pi, support.rewards)))

    look(0)
    options: dict[str, Any] = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "draw": klrl.seeded_draw(config.seed),
    }
    optimizer = torch.optim.SGD(policy.parameters(), lr=config.lr)
    loop = klrl.train_steps(policy, problem, klrl.losses.rloo, optimizer=optimizer, **options)
    for record in loop:
        if record["step"] % config.every == 0:
            look(int(record["step"]))
    return run


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """Frontier, tangents and runs in the plane of KL and reward; how far each run is below."""
    figure, (plane, below) = plots.new_figure(2, 3.4, 3.0)
    frontier, end = data["frontier"], data["end"]
    x, y = ([*frontier[name], end[name]] for name in ("kl_to_prior", "expected_reward"))
    plane.plot(x, y, color=plots.BLACK, label="exact frontier")
    for tangent, colour in zip(data["tangents"], plots.POLICY_COLOURS, strict=False):
        # all tangents of about one length on the page, where a nat is half as long as a reward unit
        width = 0.9 / math.hypot(1, 2 * tangent["kl_coef"])
        around = [max(0, tangent["kl_to_prior"] - width), tangent["kl_to_prior"] + width]
        plane.plot(
            around,
            [tangent["value"] + tangent["kl_coef"] * k for k in around],
            color=colour,
            linewidth=0.9,
            linestyle="--",
        )
    for run, colour, marker in zip(data["runs"], plots.POLICY_COLOURS, "os^D", strict=False):
        name = f"λ = {run['kl_coef']:g}" if run["kl_coef"] else "reward only (λ = 0)"
        style: dict[str, Any] = {
            "color": colour,
            "linewidth": 0.7,
            "marker": marker,
            "markersize": 2.5,
            "label": name,
        }
        plane.plot(run["kl_to_prior"], run["expected_reward"], **style)
        # without step 0, where the policy is the prior, on the frontier: no logarithm shows 0
        below.plot(run["step"][1:], run["shortfall"][1:], **style)
    plane.set(
        xlabel="KL(π‖q) in nats",
        ylabel="E[r] in reward units",
        title="Nothing lies above the frontier",
    )
    below.set(
        yscale="log",
        xlabel="training step",
        ylabel="reward below the frontier",
        title="How far below, at the same KL",
    )
    plane.legend(loc="lower right")
    plane.annotate(
        "dashed: tangents\nof slope λ", (0.03, 0.86), xycoords="axes fraction", fontsize=8
    )
    return figure
