"""Best-of-n: its exact divergence is capped, the formula's is not

    π_n(y) = q(y)/q(level) · [F^n − F₋^n],    KL(π_n‖q) ≤ log n − (n − 1)/n                      (1)
    KL(π_n‖q) → −log q(best level) as n → ∞                                                      (2)

Seen: for every prior the exact KL follows the formula while n is small against 1/q(best level),
then stops at (2), where the formula grows without end; at one KL, best-of-n earns almost what the
posterior, the most that can be had, earns.

Source: Beirami et al. (2024), Theorem 1 and figure 2; (1) with ties is closed_forms/best_of_n.py

Data:
    n                 draws [N]
    bound             log n − (n − 1)/n [N], nats
    priors            a list: name, kl [N] exact in nats, limit (2) in nats
    best_of_n         on the problem of the right panel: kl [N], expected_reward [N]
    posterior         of the same problem along λ: kl [M], expected_reward [M]
    problem           that problem: log_prior [K] in nats, rewards [K]
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

import klrl_edu as klrl
from klrl_edu import plots


@dataclass(frozen=True)
class Config:
    """The numbers of draws, the sizes of the uniform priors, and the right panel's problem."""

    largest: int = 3000
    sizes: tuple[int, ...] = (4, 20, 100)
    outcomes: int = 12
    seed: int = 0


def compute(config: Config) -> dict[str, Any]:
    """Exact best-of-n for each prior, and its frontier beside the posterior's."""
    draws = sorted({round(config.largest ** (i / 40)) for i in range(41)})
    sentences = klrl.posterior(klrl.four_sentences()).enumerated()
    priors = [("four sentences", sentences.log_prior, sentences.rewards)]
    for size in config.sizes:
        uniform = torch.full((size,), -math.log(size), dtype=torch.float64)
        priors.append((f"uniform over {size}", uniform, torch.arange(float(size))))
    generator = torch.Generator().manual_seed(config.seed)
    logits = torch.randn(config.outcomes, generator=generator, dtype=torch.float64)
    log_q = torch.log_softmax(logits, 0)
    rewards = torch.randn(config.outcomes, generator=generator, dtype=torch.float64)
    mine = [klrl.best_of_n(log_q, rewards, n) for n in draws]
    spread = klrl.budget.frontier(log_q, rewards, [0.02 * 1.15**i for i in range(70)])
    return {
        "n": draws,
        "bound": [math.log(n) - (n - 1) / n for n in draws],
        "priors": [
            {
                "name": name,
                "kl": [klrl.best_of_n(q, r, n).kl for n in draws],
                "limit": -float(q[r == r.max()].logsumexp(0)),
            }
            for name, q, r in priors
        ],
        "best_of_n": {
            "kl": [side.kl for side in mine],
            "expected_reward": [side.expected_reward for side in mine],
        },
        "posterior": {"kl": spread.kl.tolist(), "expected_reward": spread.expected_reward.tolist()},
        "problem": {"log_prior": log_q.tolist(), "rewards": rewards.tolist()},
    }


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """KL against n with its limits dashed; reward against KL."""
    figure, (divergence, frontier) = plots.new_figure(2, 3.6, 3.0)
    divergence.plot(
        data["n"], data["bound"], color=plots.BLACK, linestyle=":", label="log n − (n−1)/n"
    )
    for prior, colour in zip(data["priors"], plots.POLICY_COLOURS, strict=False):
        divergence.plot(data["n"], prior["kl"], color=colour, label=prior["name"])
        divergence.axhline(prior["limit"], color=colour, linestyle="--", linewidth=0.8)
    divergence.set(
        xscale="log",
        xlabel="n draws",
        ylabel="KL(π$_n$‖q) in nats",
        title="The exact KL is capped",
        ylim=(0, 9),
    )
    divergence.legend(loc="upper left")
    frontier.plot(
        data["posterior"]["kl"],
        data["posterior"]["expected_reward"],
        color=plots.POSTERIOR_COLOUR,
        label="π* along λ: the most there is",
    )
    best = data["best_of_n"]
    frontier.plot(
        best["kl"],
        best["expected_reward"],
        "o",
        color=plots.VERMILION,
        markersize=3.5,
        fillstyle="none",
        label=f"best-of-n, {len(data['problem']['rewards'])} random outcomes",
    )
    frontier.set(xlabel="KL(·‖q) in nats", ylabel="E[r]", title="Close to the frontier")
    frontier.legend(loc="lower right")
    return figure
