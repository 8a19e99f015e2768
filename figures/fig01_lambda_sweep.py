"""Four sentences, every λ: from the argmax of the reward to the prior

    π*_λ(y) = q(y) e^{r(y)/λ} / Z,    λ → 0: q restricted to argmax r,    λ → ∞: q               (1)
    λ → ∞:  E[r] − E_q[r] ≈ Var_q(r)/λ,    KL(π*_λ‖q) ≈ Var_q(r)/2λ²                             (2)

Seen: each sentence's probability moves from its limit at λ → 0 to its prior; E[r] falls from max r
to E_q[r], and KL(π*_λ‖q) from −log q(argmax r) to 0. Dotted: the expansion (2).

Source: The course's four sentences; (1) is Korbak, Perez & Buckley (2022), eq. 3

Data (probabilities in the order of `sentences`):
    sentences, prior, rewards   [4]
    kl_coef                     λ [K], reward units a nat
    posterior                   π*_λ [K][4]
    expected_reward             E[r] [K], reward units
    kl_to_prior                 KL(π*_λ‖q) [K], nats
    at_zero, at_infinity        the limits: probabilities [4], expected_reward, kl_to_prior
    prior_variance              Var_q(r), for (2)
"""

import math
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

import klrl_edu as klrl
from klrl_edu import plots


@dataclass(frozen=True)
class Config:
    """λ on a logarithmic grid."""

    smallest: float = 0.05
    largest: float = 20.0
    points: int = 79


def compute(config: Config) -> dict[str, Any]:
    """Exact posteriors along the grid and at both limits."""
    ratio = (config.largest / config.smallest) ** (1 / (config.points - 1))
    kl_coefs = [config.smallest * ratio**i for i in range(config.points)]
    rows = [_posterior(kl_coef) for kl_coef in kl_coefs]
    support = klrl.posterior(klrl.four_sentences()).enumerated()
    prior = support.log_prior.exp()
    return {
        "sentences": klrl.four_sentences().space.decode(support.tokens),
        "prior": prior.tolist(),
        "rewards": support.rewards.tolist(),
        "kl_coef": kl_coefs,
        "posterior": [row["probabilities"] for row in rows],
        "expected_reward": [row["expected_reward"] for row in rows],
        "kl_to_prior": [row["kl_to_prior"] for row in rows],
        "at_zero": _posterior(0.0),
        "at_infinity": _posterior(math.inf),
        "prior_variance": float(prior @ (support.rewards - prior @ support.rewards) ** 2),
    }


def _posterior(kl_coef: float) -> dict[str, Any]:
    target = klrl.posterior(klrl.four_sentences(kl_coef))
    side = klrl.compare(target.model, target)
    return {
        "probabilities": target.log_probs.exp().tolist(),
        "expected_reward": side.expected_reward,
        "kl_to_prior": side.kl_to_prior,
    }


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """Probabilities, E[r] and KL against λ, with the limits dashed."""
    figure, (sentences, reward, kl) = plots.new_figure(3, 3.5)
    figure.set_layout_engine("constrained", wspace=0.08)  # room for the names at the lines' ends
    lam, zero, infinity = data["kl_coef"], data["at_zero"], data["at_infinity"]
    for k, (text, colour) in enumerate(zip(data["sentences"], plots.POLICY_COLOURS, strict=False)):
        sentences.plot(lam, [row[k] for row in data["posterior"]], color=colour)
        sentences.plot(
            lam[0] / 1.35,
            zero["probabilities"][k],
            marker="<",
            color=colour,
            markersize=5,
            clip_on=False,
        )
        sentences.plot(
            lam[-1] * 1.35,
            infinity["probabilities"][k],
            marker=">",
            color=colour,
            markersize=5,
            clip_on=False,
        )
        sentences.annotate(
            f"{text}, r = {data['rewards'][k]:g}",
            (lam[-1] * 1.35, data["prior"][k]),
            (7, -3),
            textcoords="offset points",
            color=colour,
            fontsize=8,
        )
    sentences.set(ylabel="π*(y)", ylim=(-0.02, 1.02), title="Posterior probabilities")
    for ax, name, symbol in ((reward, "expected_reward", "E[r]"), (kl, "kl_to_prior", "KL(π*‖q)")):
        ax.plot(lam, data[name], color=plots.POSTERIOR_COLOUR)
        ax.axhline(zero[name], color=plots.BLACK, linestyle="--", linewidth=0.8)
        ax.axhline(infinity[name], color=plots.PRIOR_COLOUR, linestyle="--", linewidth=0.8)
        ax.set(ylabel=symbol + (" in nats" if name == "kl_to_prior" else " in reward units"))
    far = [x for x in lam if x >= 0.7]
    reward.plot(
        far,
        [infinity["expected_reward"] + data["prior_variance"] / x for x in far],
        ":",
        color=plots.VERMILION,
        label="E$_q$[r] + Var$_q$(r)/λ",
    )
    kl.plot(
        far,
        [data["prior_variance"] / (2 * x * x) for x in far],
        ":",
        color=plots.VERMILION,
        label="Var$_q$(r)/2λ²",
    )
    reward.annotate(
        "max r",
        (lam[-1], zero["expected_reward"]),
        (0, -10),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    reward.annotate(
        "E$_q$[r]",
        (lam[0], infinity["expected_reward"]),
        (0, 4),
        textcoords="offset points",
        fontsize=8,
    )
    kl.annotate(
        "−log q(argmax r)",
        (lam[-1], zero["kl_to_prior"]),
        (0, -10),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    reward.set(ylim=(0.45, 2.1), title="Expected reward")
    kl.set(ylim=(-0.08, 2.5), title="Divergence from the prior")
    for ax in (sentences, reward, kl):
        ax.set(xscale="log", xlabel="KL coefficient λ")
    for ax in (reward, kl):
        ax.legend(loc="upper right", bbox_to_anchor=(1, 0.85))
    return figure
