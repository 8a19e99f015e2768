"""The path of the natural gradient: every iterate is the posterior at a λ of its own

    π_{t+1} ∝ π_t^{1−ηλ} (q e^{r/λ})^{ηλ},    π_0 = q:    π_t = π*_{λ_t},
    λ_t = λ/(1 − (1 − ηλ)^t)                                                                     (1)
    proximal: π_{t+1} ∝ (π_t (q e^{r/λ})^{ηλ})^{1/(1+ηλ)},
    λ_t = λ/(1 − (1 + ηλ)^{−t})                                                                  (2)
    reward only (λ = 0): π_{t+1} ∝ π_t e^{ηr},                             λ_t = 1/(ηt)          (3)

Seen: the iterates of three updates, taken one multiplication at a time, on the lines of the λ
sweep; the same in the simplex, where the gradient in sequence logits takes another way to the same
π*.

Source: Natural policy gradient on sequence logits = mirror descent, Kakade (2001), Beck & Teboulle
(2003); (1)–(3) follow by induction

Data (probabilities in the order of `sentences`):
    sentences          [4]
    kl_coef, rate      λ and η
    sweep              kl_coef [K], posterior [K][4]: the exact posteriors
    runs               a row an update: name, step [M], kl_coef λ_t [M], probabilities [M][4]
    plain_gradient     step [M], probabilities [M][4]: exact gradient ascent on J in sequence logits
    one_step           (1) at ηλ = 1 after one step: probabilities [4]
    largest_deviation  max |π_t − π*_{λ_t}| over runs, steps and sentences, and one_step from π*_λ
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

import klrl_edu as klrl
from klrl_edu import plots


@dataclass(frozen=True)
class Config:
    """λ, the step size η, and lengths."""

    kl_coef: float = 1.0
    rate: float = 0.1
    steps: int = 60
    reward_only_steps: int = 200
    plain_rate: float = 1.0
    plain_steps: int = 60
    points: int = 79


def compute(config: Config) -> dict[str, Any]:
    """The three updates step by step, each iterate held against the exact posterior at λ_t."""
    target = klrl.posterior(klrl.four_sentences(config.kl_coef))
    support = target.enumerated()
    log_q, r, lam = support.log_prior, support.rewards, config.kl_coef
    mix = config.rate * lam  # ηλ
    tilted = log_q + r / lam  # q e^{r/λ}
    # each: the update of log π, and the λ_t whose posterior the t-th iterate is
    runs = [
        # (1)
        _run(
            "natural gradient",
            log_q,
            lambda p: (1 - mix) * p + mix * tilted,
            lambda t: lam / (1 - (1 - mix) ** t),
            config.steps,
        ),
        # (2)
        _run(
            "proximal",
            log_q,
            lambda p: (p + mix * tilted) / (1 + mix),
            lambda t: lam / (1 - (1 + mix) ** -t),
            config.steps,
        ),
        # (3)
        _run(
            "reward only",
            log_q,
            lambda p: p + config.rate * r,
            lambda t: 1 / (config.rate * t),
            config.reward_only_steps,
        ),
    ]
    one_step = _run("one step", log_q, lambda p: tilted, lambda t: lam, 1)
    sweep = [20.0 * (0.05 / 20.0) ** (i / (config.points - 1)) for i in range(config.points)]
    return {
        "sentences": target.problem.space.decode(support.tokens),
        "kl_coef": lam,
        "rate": config.rate,
        "sweep": {"kl_coef": sweep, "posterior": [_exact(kl_coef) for kl_coef in sweep]},
        "runs": runs,
        "plain_gradient": _plain_gradient(log_q, r, config),
        "one_step": one_step["probabilities"][0],
        "largest_deviation": max(_deviation(run) for run in [*runs, one_step]),
    }


def _exact(kl_coef: float) -> list[float]:
    return klrl.posterior(klrl.four_sentences(kl_coef)).log_probs.exp().tolist()


def _run(
    name: str,
    log_prior: Tensor,
    update: Callable[[Tensor], Tensor],
    kl_coef: Callable[[int], float],
    steps: int,
) -> dict[str, Any]:
    """Multiplicative updates of log π from q, normalised after each."""
    run: dict[str, Any] = {"name": name, "step": [], "kl_coef": [], "probabilities": []}
    log_pi = log_prior
    for t in range(1, steps + 1):
        log_pi = klrl.logspace.log_normalize(update(log_pi))
        run["step"].append(t)
        run["kl_coef"].append(kl_coef(t))
        run["probabilities"].append(log_pi.exp().tolist())
    return run


def _deviation(run: dict[str, Any]) -> float:
    """The most by which any probability of a run is off the posterior at its λ_t."""
    worst = 0.0
    for kl_coef, row in zip(run["kl_coef"], run["probabilities"], strict=True):
        for p, star in zip(row, _exact(kl_coef), strict=True):
            worst = max(worst, abs(p - star))
    return worst


def _plain_gradient(log_prior: Tensor, rewards: Tensor, config: Config) -> dict[str, Any]:
    """θ ← θ + η π (r − λu − J), u = log π/q: gradient ascent on J in sequence logits."""
    log_pi, rows = log_prior, [log_prior.exp().tolist()]
    for _ in range(config.plain_steps):
        worth = rewards - config.kl_coef * (log_pi - log_prior)  # r − λu, whose mean is J
        advantage = worth - log_pi.exp() @ worth
        log_pi = klrl.logspace.log_normalize(log_pi + config.plain_rate * log_pi.exp() * advantage)
        rows.append(log_pi.exp().tolist())
    return {"step": list(range(config.plain_steps + 1)), "probabilities": rows}


# steps to mark, apart from each other
_SHOWN = {
    "natural gradient": (1, 2, 4, 8, 16),
    "proximal": (3, 6, 12, 40),
    "reward only": (13, 16, 20, 28, 40, 64, 128),
}
_OPEN: dict[str, Any] = {"markersize": 4.5, "fillstyle": "none"}


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """Probabilities against λ_t, and the way through the simplex."""
    figure, (against, simplex) = plots.new_figure(2, 3.4, 3.0)
    sweep = data["sweep"]
    for k, (text, colour) in enumerate(zip(data["sentences"], plots.POLICY_COLOURS, strict=False)):
        against.plot(
            sweep["kl_coef"],
            [row[k] for row in sweep["posterior"]],
            color=colour,
            linewidth=1,
            label=text,
        )
        for run, marker in zip(data["runs"], "osx", strict=True):
            shown = _SHOWN[run["name"]]
            against.plot(
                [run["kl_coef"][t - 1] for t in shown],
                [run["probabilities"][t - 1][k] for t in shown],
                marker,
                color=colour,
                **_OPEN,
            )
    against.set(
        xscale="log",
        xlim=(25, 0.05),
        ylim=(-0.02, 1.02),
        xlabel="λ$_t$, falling with the step t",
        ylabel="π$_t$(y)",
        title="Iterates lie on the sweep",
    )
    against.legend(loc="upper left")
    x, y = (data["sentences"].index(text) for text in ("the cat", "a dog"))
    simplex.plot(
        [row[x] for row in sweep["posterior"]],
        [row[y] for row in sweep["posterior"]],
        color=plots.BLACK,
        linewidth=1,
        label="λ sweep: all π*$_λ$",
    )
    colours = (plots.BLUE, plots.ORANGE, plots.VERMILION)
    for run, marker, colour in zip(data["runs"], "osx", colours, strict=True):
        rows = [run["probabilities"][t - 1] for t in _SHOWN[run["name"]]]
        simplex.plot(
            [row[x] for row in rows],
            [row[y] for row in rows],
            marker,
            color=colour,
            label=run["name"],
            **_OPEN,
        )
    plain = data["plain_gradient"]["probabilities"]
    simplex.plot(
        [row[x] for row in plain],
        [row[y] for row in plain],
        ".-",
        color=plots.GREEN,
        markersize=3,
        linewidth=0.7,
        label="plain gradient",
    )
    simplex.plot(
        *(data["one_step"][k] for k in (x, y)),
        "*",
        color=plots.BLACK,
        markersize=8,
        label=f"π* at λ = {data['kl_coef']:g}",
    )
    simplex.set(xlabel="π(the cat)", ylabel="π(a dog)", title="The plain gradient leaves it")
    simplex.legend(loc="lower left")
    return figure
