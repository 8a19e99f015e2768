"""Gradients of KL: what each placement follows on average, with what noise, and what happens when
its samples grow old

    E_π[∇k] + E_π[k s] = ∇E_π[k],    s = ∇log π;
    in the loss the first half, in the reward the second                                         (1)
    bias = ‖E[g] − ∇KL(π‖q)‖ / ‖∇KL(π‖q)‖,    std = √(E‖g − E g‖²) of one sample,
    in sequence logits                                                                           (2)
    ρ_t = π/μ of a token, prefix weight Π_{s≤t} ρ_s, sequence weight Π_s ρ_s, where μ drew the
    samples               (3)

Seen: of the three estimators in the loss only k2 follows ∇KL(π‖q); k1 follows nothing and is the
noisiest of all, k3 follows ∇KL(q‖π). Per token with frozen prefixes a loss misses how a token
changes later KL, even with the exact KL of each position. A live ratio puts the other half of (1)
back, a detached one does not. As samples grow old the unweighted gradients drift, k1 in the loss
from nothing to away from μ; a token weight corrects too little; prefix and sequence weights stay
exact and pay in noise. The published settings are large models; here all is enumerated.

Source: Tang & Munos (2025); Shah et al. (2025); their placements on the course's four sentences, by
audit_gradient

Data (π is the posterior at `kl_coef`, what training would end on; older policies are those on its
way from the prior):
    sentences, prior, policy     [4]
    kl_coef                      λ in reward units a nat
    on_policy                    a row a placement: estimator (its name in kl_gradients), label,
    group, bias, std
    age                          a [M] in [0, 1]: μ_a is the posterior at λ/(1 − a), π itself at 0
    and the prior at 1
    staleness                    KL(π‖μ_a) [M] in nats
    off_policy                   a row a weight: estimator, label, bias [M], std [M]
"""

import math
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import klrl_edu as klrl
from klrl_edu import plots
from klrl_edu.audit.staleness import audit_staleness

PLACEMENTS = {
    "reward_k1": ("k1", "in the reward"),
    "reward_k1_to_go": ("k1 to go", "in the reward"),
    "reward_k3": ("k3", "in the reward"),
    "loss_k1": ("k1", "in the loss"),
    "loss_k2": ("k2", "in the loss"),
    "loss_k3": ("k3", "in the loss"),
    "loss_k2_token": ("k2 per token", "in the loss"),
    "loss_k3_token": ("k3 per token", "in the loss (GRPO)"),
    "loss_full_kl": ("exact KL per token", "in the loss"),
    "rao_blackwell_to_go": ("exact KL, and KL to go", "in both"),
    "live_ratio_k3": ("k3, live ratio", "in both"),
    "live_ratio_k3_token": ("k3, live token ratio", "in both"),
    "detached_ratio_k3": ("k3, detached ratio", "in the loss"),
}
WEIGHTS = {
    "loss_k1": "k1 in the loss",
    "loss_k3": "k3 in the loss",
    "off_policy_unweighted": "k1 in the reward, no weight",
    "off_policy_token": "token weight",
    "off_policy_prefix": "prefix weight",
    "off_policy_sequence": "sequence weight",
    "live_ratio_k3_prefix": "k3, live prefix ratio",
    "detached_ratio_k3": "k3, detached ratio",
}
COLOURS = {
    "loss_k1": plots.BLACK,
    "loss_k3": plots.PURPLE,
    "off_policy_unweighted": plots.VERMILION,
    "off_policy_token": plots.ORANGE,
    "off_policy_prefix": plots.SKY,
    "off_policy_sequence": plots.POSTERIOR_COLOUR,
    "live_ratio_k3_prefix": plots.GREEN,
    "detached_ratio_k3": plots.PURPLE,
}
# estimator -> text at the end of its line, and points to shift it by; the other exact weights lie
# under the last
BIAS_SHOWN = {
    "loss_k1": ("k1 in the loss", 0),
    "loss_k3": ("k3 in the loss", 0),
    "off_policy_unweighted": ("k1 in the reward,\nor k2 in the loss", 0),
    "detached_ratio_k3": ("k3, detached ratio", 4),
    "off_policy_token": ("token weight", -6),
    "off_policy_sequence": ("prefix and\nsequence weight", 0),
}
NOISE_SHOWN = {
    "off_policy_sequence": ("sequence weight", 0),
    "off_policy_prefix": ("prefix weight", 0),
    "off_policy_unweighted": ("no weight (biased)", 3),
    "live_ratio_k3_prefix": ("live prefix ratio, k3", -5),
    "off_policy_token": ("token weight (biased)", 0),
}


@dataclass(frozen=True)
class Config:
    """The policy's λ, and how many older policies."""

    kl_coef: float = 1.0
    ages: int = 13


def compute(config: Config) -> dict[str, Any]:
    """One exact audit a placement, and one a weight and age."""
    problem, policy = klrl.four_sentences(), _posterior_table(config.kl_coef)
    reports = {
        name: klrl.audit_gradient(getattr(klrl.kl_gradients, name), policy, problem)
        for name in PLACEMENTS
    }
    ages = [k / (config.ages - 1) for k in range(config.ages)]
    older = [_posterior_table(config.kl_coef / (1 - age) if age < 1 else math.inf) for age in ages]
    sweeps = {
        name: audit_staleness(getattr(klrl.kl_gradients, name), policy, problem, older).rows
        for name in WEIGHTS
    }
    rows = {
        name: {
            "estimator": name,
            "label": label,
            "bias": [row.report.relative_bias["reverse_kl"] for row in sweeps[name]],
            "std": [math.sqrt(row.report.variance) for row in sweeps[name]],
        }
        for name, label in WEIGHTS.items()
    }
    return {
        "sentences": problem.space.decode(policy.tokens),
        "prior": klrl.problem_support(problem).log_prior.exp().tolist(),
        "policy": policy.log_probs.exp().tolist(),
        "kl_coef": config.kl_coef,
        "on_policy": [
            {
                "estimator": name,
                "label": label,
                "group": group,
                "bias": reports[name].relative_bias["reverse_kl"],
                "std": math.sqrt(reports[name].variance),
            }
            for name, (label, group) in PLACEMENTS.items()
        ],
        "age": ages,
        "staleness": [row.divergence for row in sweeps["loss_k1"]],
        "off_policy": list(rows.values()),
    }


def _posterior_table(kl_coef: float) -> klrl.SequenceTable:
    target = klrl.posterior(klrl.four_sentences(kl_coef))
    return klrl.SequenceTable(target.problem.space, target.enumerated().tokens, target.log_probs)


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """Above: bias and noise of every placement. Below: both against the age of the samples."""
    figure = Figure(figsize=(7.4, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    _draw_placements(data["on_policy"], *above.subplots(1, 2, sharey=True))
    _draw_ages(data, *below.subplots(1, 2))
    return figure


def _draw_placements(rows: list[dict[str, Any]], bias: Axes, noise: Axes) -> None:
    """A bar a placement, blue where the bias is 0."""
    exact = [row["bias"] < 1e-9 for row in rows]
    names = [f"{row['label']}, {row['group']}" for row in rows]
    colours = [plots.POSTERIOR_COLOUR if hit else plots.VERMILION for hit in exact]
    for ax, quantity in ((bias, "bias"), (noise, "std")):
        ax.barh(names, [row[quantity] for row in rows], 0.65, color=colours)
        for place, (row, hit) in enumerate(zip(rows, exact, strict=True)):
            said, end = f"{row[quantity]:.2f}", row[quantity]
            if hit and quantity == "bias":
                said, end = "unbiased", 0.0
            ax.annotate(
                said, (end, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5
            )
        ax.set_ylabel("estimator, and where it stands")
    noise.yaxis.label.set_visible(False)
    noise.tick_params(axis="y", left=False, labelleft=False)
    bias.invert_yaxis()
    bias.set(xlabel="‖E[g] − ∇KL(π‖q)‖ / ‖∇KL(π‖q)‖", xlim=(0, 1.2), title="On-policy: bias")
    noise.set(xlabel="std of one sample (blue: unbiased)", xlim=(0, 0.95), title="On-policy: noise")


def _draw_ages(data: dict[str, Any], drift: Axes, price: Axes) -> None:
    """A line a weight, named at its end."""
    for ax, quantity, shown in ((drift, "bias", BIAS_SHOWN), (price, "std", NOISE_SHOWN)):
        for row in data["off_policy"]:
            name = row["estimator"]
            if name not in shown:
                continue
            text, shift = shown[name]
            ax.plot(
                data["staleness"],
                row[quantity],
                "--" if name == "detached_ratio_k3" else "-",
                color=COLOURS[name],
            )
            end = (data["staleness"][-1], row[quantity][-1])
            ax.annotate(
                text,
                end,
                (4, shift),
                textcoords="offset points",
                va="center",
                color=COLOURS[name],
                fontsize=7.5,
                annotation_clip=False,
            )
        ax.set(xlabel="age of the samples: KL(π‖μ) in nats", xlim=(0, data["staleness"][-1]))
    drift.set(ylabel="bias, as above", ylim=(-0.08, 2), title="Off-policy: bias by age")
    price.set(ylabel="std of one sample", ylim=(0, 1.05), title="Off-policy: noise by age")
