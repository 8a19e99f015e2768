"""Schulman's estimators of KL: k3 beats k1 near the prior and loses to it beyond 0.628 nats

    π = N(0, 1), q = N(μ, 1):   d = KL(π‖q) = μ²/2,   u = log π/q ~ N(d, 2d),   w = e^{−u}       (1)
    k1 = u            std/d = √(2/d)                 k2 = u²/2    bias/d = d/2,   std/d = √(2 + 2d)
    k3 = w − 1 + u    std/d = √(e^{2d} − 1 − 2d)/d                                               (2)
    best u + c(w − 1) with c* = 2d/(e^{2d} − 1);     k3 is better than k1 while e^{2d} − 1 < 4d  (3)

Seen: near the prior one sample of k1 is noise many times the KL, and k2 and k3 are off by √2 of it;
k3's noise then explodes as e^d, and from 0.628 nats on k1 is the better unbiased estimator, while
k2 pays with a bias of d/2 of the KL. The best control variate is never above k1 or k3. Squares: the
two rows of the published table.

Source: Schulman (2020), table; (2) and (3) are closed_forms/gaussian_kl.py

Data:
    kl                   d [M] in nats
    relative_std         std/d of one sample [M] of k1, k2, k3 and the best control variate
    relative_bias        (mean − d)/d [M] of k1, k2, k3
    crossing             d in nats where k1 and k3 have equal variance, and their common std/d there
    published            Schulman's table: kl, and relative_std and relative_bias of k1, k2, k3
    (bias of k2 at d = 0.005: 0.002)
"""

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from klrl_edu import gaussian_kl, plots

COLOURS = {
    "k1": plots.VERMILION,
    "k2": plots.GREEN,
    "k3": plots.POSTERIOR_COLOUR,
    "best": plots.BLACK,
}
PUBLISHED = {
    "kl": [0.005, 0.5],
    "relative_std": {"k1": [20.0, 2.0], "k2": [1.42, 1.73], "k3": [1.42, 1.7]},
    "relative_bias": {"k1": [0.0, 0.0], "k2": [0.002, 0.25], "k3": [0.0, 0.0]},
}


@dataclass(frozen=True)
class Config:
    """KL on a logarithmic grid, in nats."""

    smallest: float = 0.002
    largest: float = 3.0
    points: int = 81


def compute(config: Config) -> dict[str, Any]:
    """Everything in closed form."""
    ratio = (config.largest / config.smallest) ** (1 / (config.points - 1))
    grid = [config.smallest * ratio**i for i in range(config.points)]
    kl = torch.tensor(grid, dtype=torch.float64)
    moments = {"k1": gaussian_kl.k1(kl), "k2": gaussian_kl.k2(kl), "k3": gaussian_kl.k3(kl)}
    best = gaussian_kl.control_variate(kl, gaussian_kl.best_coefficient(kl))
    with_best = moments | {"best": best}  # unbiased too, hence not among the biases
    crossing = gaussian_kl.crossing()
    return {
        "kl": kl.tolist(),
        "relative_std": {name: one.relative_std.tolist() for name, one in with_best.items()},
        "relative_bias": {name: one.relative_bias.tolist() for name, one in moments.items()},
        "crossing": {"kl": crossing, "relative_std": float(gaussian_kl.k1(crossing).relative_std)},
        "published": PUBLISHED,
    }


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """Noise and bias of one sample, relative to the KL."""
    figure, (noise, bias) = plots.new_figure(2, 3.6, 3.1)
    kl, published, crossing = data["kl"], data["published"], data["crossing"]
    for name, line in data["relative_std"].items():
        noise.plot(
            kl,
            line,
            color=COLOURS[name],
            linestyle="--" if name == "best" else "-",
            linewidth=1.2 if name == "best" else 1.5,
        )
    for name, line in data["relative_bias"].items():
        # k3 dashed, as it lies on k1: both 0
        style: Any = (0, (4, 4)) if name == "k3" else "-"
        bias.plot(kl, line, color=COLOURS[name], linestyle=style)
    for name in ("k1", "k2", "k3"):
        for ax, quantity in ((noise, "relative_std"), (bias, "relative_bias")):
            ax.plot(
                published["kl"],
                published[quantity][name],
                "s",
                color=COLOURS[name],
                fillstyle="none",
                markersize=6,
                markeredgewidth=1,
            )
    noise.plot(crossing["kl"], crossing["relative_std"], "o", color=plots.BLACK, markersize=5)
    noise.annotate(
        f"above {crossing['kl']:.3f} nats\nk3 is the noisier",
        (crossing["kl"], crossing["relative_std"]),
        (0.5, 8.0),
        textcoords="data",
        ha="center",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": plots.BLACK, "linewidth": 0.8},
    )
    for ax, text, place, name in (
        (noise, "k1 = u", (0.012, 14.5), "k1"),
        (noise, "k2 = u²/2", (0.0022, 1.72), "k2"),
        (noise, "k3", (2.05, 5.2), "k3"),
        (noise, "best u + c(w − 1)", (0.055, 0.72), "best"),
        (bias, "k2: bias/KL = KL/2", (0.075, 0.55), "k2"),
        (bias, "k1 and k3: unbiased", (0.0022, 0.05), "k3"),
    ):
        ax.annotate(
            text, place, color=COLOURS[name], fontsize=8, ha="right" if text == "k3" else "left"
        )
    noise.set(
        xscale="log",
        yscale="log",
        ylim=(0.5, 40),
        xlabel="KL(π‖q) in nats",
        ylabel="std of one sample / KL",
        title="Noise",
    )
    noise.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    noise.set_yticks([], minor=True)
    bias.set(
        xscale="log",
        ylim=(-0.1, 1.6),
        xlabel="KL(π‖q) in nats",
        ylabel="bias / KL",
        title="Bias (squares: Schulman's table)",
    )
    for ax in (noise, bias):
        ax.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    return figure
