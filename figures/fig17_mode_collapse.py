"""Mode collapse at low λ: both directions of KL lose the minor mode, at different rates

    reverse KL:  π(minor)/π(major) = [q(minor)/q(major)] e^{−Δr/λ}                               (1)
    forward KL:  π(minor) ≈ λ q(minor)/Δr as λ → 0                                               (2)

Seen: with a small advantage Δr of the major mode the minor one vanishes under either regulariser as
λ falls, exponentially in 1/λ under reverse KL, in proportion to λ under forward KL; where both earn
the same, both keep q's ratio at any λ, and no choice of direction restores balance.

Source: GX-Chen et al. (2025), figures 1 and 3; closed_forms/regularizers.py

Data:
    kl_coef              λ [M] in reward units a nat
    prior                q of major, minor and the rest
    advantage            Δr in reward units
    unequal, equal       for reverse_kl and forward_kl: the minor mode's share of both modes [M]
    reverse_law, forward_law     (1) as a share of both modes, and (2) [M]
"""

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

import klrl_edu as klrl
from klrl_edu import plots


@dataclass(frozen=True)
class Config:
    """Two modes and the rest; rewards 1 + Δr and 1 for the modes, 0 for the rest."""

    prior: tuple[float, float, float] = (0.3, 0.2, 0.5)
    advantage: float = 0.1
    smallest: float = 0.004
    largest: float = 2.0
    points: int = 61


def compute(config: Config) -> dict[str, Any]:
    """Exact shares of the minor mode."""
    log_q = torch.tensor(config.prior, dtype=torch.float64).log()
    ratio = (config.largest / config.smallest) ** (1 / (config.points - 1))
    grid = [config.smallest * ratio**i for i in range(config.points)]
    unequal = torch.tensor([1.0 + config.advantage, 1.0, 0.0], dtype=torch.float64)
    equal = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    major, minor, _ = config.prior
    tilts = [torch.tensor(-config.advantage / x, dtype=torch.float64).exp().item() for x in grid]
    odds = [minor / major * tilt for tilt in tilts]
    names = ("reverse_kl", "forward_kl")
    return {
        "kl_coef": grid,
        "prior": list(config.prior),
        "advantage": config.advantage,
        "unequal": {name: [_share(name, log_q, unequal, x) for x in grid] for name in names},
        "equal": {name: [_share(name, log_q, equal, x) for x in grid] for name in names},
        "reverse_law": [odd / (1 + odd) for odd in odds],
        "forward_law": [x * config.prior[1] / config.advantage for x in grid],
    }


def _share(name: str, log_q: torch.Tensor, rewards: torch.Tensor, kl_coef: float) -> float:
    """The minor mode's share of the two modes' mass in the optimum."""
    log_pi = klrl.regularizers.optimum(name, log_q, rewards, kl_coef).log_probs
    return float((log_pi[1] - log_pi[:2].logsumexp(0)).exp())


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """The minor mode's share against λ."""
    figure, (lost, kept) = plots.new_figure(2, 3.5, 3.0)
    lam, share = data["kl_coef"], data["prior"][1] / (data["prior"][0] + data["prior"][1])
    labels = {
        "reverse_kl": ("reverse KL", plots.POSTERIOR_COLOUR),
        "forward_kl": ("forward KL", plots.VERMILION),
    }
    for name, (label, colour) in labels.items():
        lost.plot(lam, data["unequal"][name], color=colour, label=label)
        kept.plot(
            lam,
            data["equal"][name],
            color=colour,
            label=label,
            linestyle="-" if name == "reverse_kl" else (0, (4, 3)),
        )
    lost.plot(
        lam,
        data["reverse_law"],
        "o",
        color=plots.POSTERIOR_COLOUR,
        markersize=3,
        fillstyle="none",
        markevery=3,
        label="∝ e$^{−Δr/λ}$",
    )
    near = [k for k, law in enumerate(data["forward_law"]) if law < share / 2]  # (2) is for small λ
    lost.plot(
        [lam[k] for k in near],
        [data["forward_law"][k] for k in near],
        "s",
        color=plots.VERMILION,
        markersize=3,
        fillstyle="none",
        markevery=3,
        label="λq/Δr",
    )
    for ax in (lost, kept):
        ax.axhline(share, color=plots.PRIOR_COLOUR, linestyle=":", linewidth=1, label="under q")
        ax.set(xscale="log", xlabel="KL coefficient λ", ylabel="minor mode's share of the two")
        ax.legend(loc="lower right")
    lost.set(
        yscale="log", ylim=(1e-10, 1.5), title=f"Lost at a difference of Δr = {data['advantage']:g}"
    )
    kept.set(ylim=(0, 1), title="Kept where rewards are equal")
    return figure
