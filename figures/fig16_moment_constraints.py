"""Moment constraints: the optimum hits its target exactly, a policy trained to it falls short

    p = argmin KL(p‖q) with E_p[dog] = μ,    p ∝ q e^{β·dog}                                     (1)
    distributional policy gradient (DPG):  ∇ −E_{y∼π}[(p(y)/π(y)) log π(y)]                      (2)

Seen: the exact optimum lies on the diagonal for every target, at the least KL there is; an LSTM
trained by (2) on samples stops near it, and the shortfall is measured.

Source: Khalifa, Elsahar & Dymetman (2021), §2 and figure 3, on the course's four sentences

Data:
    target                μ [M], the wanted probability of 'dog'
    exact                 of (1): coefficient β [M], kl KL(p‖q) [M] in nats, attained [M]
    trained               at some targets: target, attained P(dog), kl_to_optimum KL(p‖π) in nats,
    kl_to_prior KL(π‖q) in nats
    prior                 P(dog) under q
"""

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

import klrl_edu as klrl
from klrl_edu import plots


@dataclass(frozen=True)
class Config:
    """Targets, and how long the network trains on each of a few."""

    targets: tuple[float, ...] = tuple(i / 40 for i in range(2, 39))
    trained: tuple[float, ...] = (0.15, 0.5, 0.7, 0.85, 0.95)
    steps: int = 150
    batch_size: int = 64
    lr: float = 0.02
    seed: int = 0


def compute(config: Config) -> dict[str, Any]:
    """(1) at every target; (2) at some."""
    support = klrl.posterior(klrl.four_sentences()).enumerated()
    texts = klrl.four_sentences().space.decode(support.tokens)
    dog = torch.tensor([[float("dog" in text)] for text in texts], dtype=torch.float64)
    exact = [
        klrl.match_moments(support.log_prior, dog, torch.tensor([mu], dtype=torch.float64))
        for mu in config.targets
    ]
    return {
        "target": list(config.targets),
        "exact": {
            "coefficient": [float(found.coefficients) for found in exact],
            "kl": [found.kl for found in exact],
            "attained": [float(found.log_probs.exp() @ dog[:, 0]) for found in exact],
        },
        "trained": [_train(config, mu, support.log_prior, dog) for mu in config.trained],
        "prior": float(support.log_prior.exp() @ dog[:, 0]),
    }


def dpg(batch: klrl.Batch) -> torch.Tensor:
    """(2): −mean (p/π) log π with p ∝ q e^{r/λ} normalised by the batch's own estimate of Z."""
    log_pi = batch.log_probs.sum(-1)
    log_p = batch.prior_log_probs.sum(-1) + batch.rewards.sum(-1) / batch.kl_coef  # up to log Z
    log_weight = log_p - log_pi.detach()
    # the softmax divides by the sum of the weights: the batch's Z, and its size, at once
    return -(torch.softmax(log_weight, 0) * log_pi).sum()


def _train(
    config: Config, mu: float, log_prior: torch.Tensor, dog: torch.Tensor
) -> dict[str, float]:
    """A network trained to the optimum under one constraint, and how near it came."""
    wanted = torch.tensor([mu], dtype=torch.float64)
    beta = float(klrl.match_moments(log_prior, dog, wanted).coefficients)
    base = klrl.four_sentences()
    problem = klrl.Problem(base.prior, klrl.scale(klrl.count_reward("dog", base.space), beta), 1.0)
    network = klrl.RecurrentModel(base.space, hidden_size=16, seed=config.seed)
    policy = klrl.restrict_to_support(network, base.prior)
    options = {"steps": config.steps, "batch_size": config.batch_size, "lr": config.lr}
    klrl.train(policy, problem, dpg, draw=klrl.seeded_draw(config.seed), **options)
    side = klrl.compare(policy, klrl.posterior(problem))
    return {
        "target": mu,
        "attained": side.expected_reward / beta,
        "kl_to_optimum": side.forward_kl,
        "kl_to_prior": side.kl_to_prior,
    }


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """Attained against wanted, and the KL that it costs."""
    figure, (means, cost) = plots.new_figure(2, 3.5, 3.0)
    trained = data["trained"]
    means.plot(
        data["target"],
        data["exact"]["attained"],
        color=plots.POSTERIOR_COLOUR,
        label="exact optimum",
    )
    means.plot(
        [t["target"] for t in trained],
        [t["attained"] for t in trained],
        "o",
        color=plots.VERMILION,
        label="LSTM, DPG on samples",
    )
    for t in trained:
        means.annotate(
            f"{t['attained'] - t['target']:+.3f}",
            (t["target"], t["attained"]),
            (6, -9),
            textcoords="offset points",
            fontsize=7,
        )
    means.axhline(
        data["prior"], color=plots.PRIOR_COLOUR, linestyle="--", linewidth=0.8, label="prior"
    )
    means.set(xlabel="wanted P(dog)", ylabel="attained P(dog)", title="The target, hit and missed")
    means.legend(loc="upper left")
    cost.plot(
        data["target"],
        data["exact"]["kl"],
        color=plots.POSTERIOR_COLOUR,
        label="least KL with these means",
    )
    cost.plot(
        [t["target"] for t in trained],
        [t["kl_to_prior"] for t in trained],
        "o",
        color=plots.VERMILION,
        label="LSTM: KL(π‖q)",
    )
    cost.axvline(data["prior"], color=plots.PRIOR_COLOUR, linestyle="--", linewidth=0.8)
    cost.set(
        xlabel="wanted P(dog)",
        ylabel="KL from the prior in nats",
        title="What the constraint costs",
        ylim=(-0.03, None),
    )
    cost.legend(loc="upper left")
    return figure
