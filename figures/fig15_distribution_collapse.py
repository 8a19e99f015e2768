"""Distribution collapse: without the KL term a policy ends on one sequence, with it on π*_λ

    H(π_t) → 0 for λ = 0 (one best sequence),    H(π_t) → H(π*_λ),  π*_λ ∝ q e^{r/λ}  for λ > 0  (1)

Seen: the entropy during training, from the same prior and with the same samples, with and without
the KL term; and the probabilities in order of rank where training ended, circles, on the exact
π*_λ, lines. The published setting is a language model; here the prior is 100 surnames, the reward
their Scrabble score over ten, and π*_λ is exact.

Source: Korbak, Perez & Buckley (2022), the argument on distribution collapse; π* is their eq. 3

Data:
    prior_entropy    H(q), nats
    prior            q [K] in falling order
    runs             a row a λ: kl_coef, step [M], entropy [M] in nats, expected_reward [M] in
    reward units, posterior_entropy H(π*_λ),
                     best (the most probable sequence at the end), posterior [K] in falling order,
                     probabilities [K] of the same sequences at the end of training
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

import klrl_edu as klrl
from klrl_edu import plots

LETTER_SCORES = {1: "aeilnorstu", 2: "dg", 3: "bcmp", 4: "fhvwy", 5: "k", 8: "jx", 10: "qz"}


@dataclass(frozen=True)
class Config:
    """Problem, the λ of each run, and how they train (Adam)."""

    surnames: int = 100
    kl_coefs: tuple[float, ...] = (0.5, 0.25, 0.0)
    steps: int = 160
    every: int = 4
    batch_size: int = 64
    lr: float = 0.1
    seed: int = 0


def compute(config: Config) -> dict[str, Any]:
    """A run a λ, each with its exact posterior."""
    prior = klrl.surnames(count=config.surnames).prior
    score = {letter: value / 10 for value, letters in LETTER_SCORES.items() for letter in letters}
    reward = klrl.text_reward(lambda name: sum(score[letter] for letter in name), prior.space)
    runs = [
        _train(klrl.posterior(klrl.Problem(prior, reward, kl_coef)), config)
        for kl_coef in config.kl_coefs
    ]
    log_q = klrl.problem_support(klrl.Problem(prior, reward, 1.0)).log_prior
    return {
        "prior_entropy": float(klrl.logspace.entropy(log_q)),
        "prior": log_q.exp().sort(descending=True).values.tolist(),
        "runs": runs,
    }


def _train(target: klrl.Posterior, config: Config) -> dict[str, Any]:
    """RLOO from the prior, one row of logits a prefix; looked at every few steps."""
    problem, support = target.problem, target.enumerated()
    # logits of −inf where q has no mass, which no step moves
    policy = klrl.PrefixTable.from_model(problem.prior, support.tokens)
    run: dict[str, Any] = {
        "kl_coef": problem.kl_coef,
        "step": [],
        "entropy": [],
        "expected_reward": [],
    }

    @torch.no_grad()
    def look(step: int) -> torch.Tensor:
        log_pi = klrl.sequence_log_probs(policy, support.tokens)
        run["step"].append(step)
        run["entropy"].append(float(klrl.logspace.entropy(log_pi)))
        run["expected_reward"].append(float(klrl.logspace.expectation(log_pi, support.rewards)))
        return log_pi

    log_pi = look(0)
    options: dict[str, Any] = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "draw": klrl.seeded_draw(config.seed),
    }
    for record in klrl.train_steps(policy, problem, klrl.losses.rloo, **options):
        if record["step"] % config.every == 0:
            log_pi = look(int(record["step"]))
    # names of one frequency and score tie, and rounding must not order them
    order = (target.log_probs * 1e9).round().argsort(descending=True, stable=True)
    run["posterior_entropy"] = float(klrl.logspace.entropy(target.log_probs)) + 0.0  # never −0
    run["best"] = problem.space.decode(support.tokens[log_pi.argmax()][None])[0]
    run["posterior"] = target.log_probs[order].exp().tolist()
    run["probabilities"] = log_pi[order].exp().tolist()
    return run


@plots.publication_style()
def draw(data: dict[str, Any]) -> Figure:
    """Entropy against the step, and the probabilities by rank at the end."""
    figure, (course, ranks) = plots.new_figure(2)
    course.axhline(data["prior_entropy"], color=plots.PRIOR_COLOUR, linewidth=0.8, linestyle="--")
    course.annotate(
        "H(q)",
        (0, data["prior_entropy"]),
        (2, 3),
        textcoords="offset points",
        color=plots.PRIOR_COLOUR,
        fontsize=8,
    )
    ranks.plot(range(1, len(data["prior"]) + 1), data["prior"], color=plots.PRIOR_COLOUR)
    for run, colour in zip(data["runs"], plots.POLICY_COLOURS, strict=False):
        name = f"λ = {run['kl_coef']:g}" + ("" if run["kl_coef"] else " (no KL term)")
        course.plot(run["step"], run["entropy"], color=colour, label=name)
        course.axhline(run["posterior_entropy"], color=colour, linewidth=0.8, linestyle="--")
        shown = range(0, len(run["posterior"]), 4)
        ranks.plot(
            [k + 1 for k in shown],
            [run["probabilities"][k] for k in shown],
            "o",
            color=colour,
            markersize=3,
        )
        ranks.plot(
            range(1, len(run["posterior"]) + 1),
            [p or math.nan for p in run["posterior"]],
            color=colour,
        )
        if not run["kl_coef"]:
            ranks.annotate(
                f"{run['best']}: {run['probabilities'][0]:.3f}",
                (1, run["probabilities"][0]),
                (6, -2),
                textcoords="offset points",
                color=colour,
            )
    course.annotate("dashed: H(π*)", (0.97, 0.33), xycoords="axes fraction", ha="right", fontsize=8)
    course.set(
        xlabel="training step",
        ylabel="entropy in nats",
        ylim=(-0.1, 4.85),
        title="Without the KL term entropy goes to 0",
    )
    ranks.set(
        yscale="log",
        ylim=(1e-8, 2),
        xlabel="rank under π*",
        ylabel="probability",
        title="End of training (circles) on π* (lines)",
    )
    ranks.annotate(
        "prior q",
        (len(data["prior"]), data["prior"][-1]),
        (0, 5),
        textcoords="offset points",
        ha="right",
        color=plots.PRIOR_COLOUR,
    )
    course.legend(loc="lower right", bbox_to_anchor=(1, 0.04))
    return figure
