"""The four parts of `klrl demo`: a posterior by hand, networks trained to it, real text, and a
space nobody can eyeball.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from klrl_edu.core import logspace
from klrl_edu.core.display import Cell, text_table
from klrl_edu.core.draws import seeded_draw
from klrl_edu.evaluation.compare import compare
from klrl_edu.evaluation.records import History, Record
from klrl_edu.exact.posterior import Posterior, looked_up, posterior
from klrl_edu.exact.structured import StructuredPosterior
from klrl_edu.exact.support_sums import support_log_mass
from klrl_edu.experiments import plots
from klrl_edu.experiments.console import Progress, Say
from klrl_edu.learning import losses
from klrl_edu.learning.training import comparison_metrics, copy_of_prior, cosine, train_steps
from klrl_edu.models.contract import LanguageModel, enumerate_support, sequence_log_probs
from klrl_edu.models.ngram import NGramModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.automata import accept_reward
from klrl_edu.problems.corpora import surname_frequencies
from klrl_edu.problems.examples import (
    SURNAME_PATTERN,
    count_threes,
    four_sentences,
    four_sentences_policy,
    surnames,
)
from klrl_edu.problems.patterns import regular_expression
from klrl_edu.problems.problem import Problem

ARTICLE_KL = 0.22  # what article C (theory/articles/sources.py) prints for KL(π‖q)
EVALUATE_EVERY, EVALUATE_LARGE_EVERY = 10, 50
_SURNAMES_SHOWN = 12


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train."""

    steps: int
    batch_size: int
    lr: float


SMALL = Recipe(steps=500, batch_size=64, lr=3e-3)
SURNAMES = Recipe(steps=300, batch_size=256, lr=2e-2)
COUNT_THREES = Recipe(steps=300, batch_size=256, lr=1e-3)


@dataclass
class Trained:
    """A policy, its metrics, and the course of its probabilities on the support."""

    policy: LanguageModel
    history: History
    steps: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)


def run_demo(out: Path, seed: int, say: Say, progress: Progress) -> dict[str, Any]:
    """All four parts; tables go to `say`, pictures to `out`. Returns every printed number."""
    target = posterior(four_sentences())
    first = show_four_sentences(target, say)
    space = target.problem.space
    networks = {
        "LSTM": RecurrentModel(space, hidden_size=32, seed=seed),
        "Transformer": TransformerModel(space, width=32, layers=1, seed=seed),
    }
    runs = {
        name: _train_small(name, target, network, seed, progress)
        for name, network in networks.items()
    }
    collapsed_target = posterior(four_sentences(kl_coef=0.0))
    # of the same seed, so that both LSTMs start alike and differ in λ alone
    same_network = RecurrentModel(space, hidden_size=32, seed=seed)
    collapsed = _train_small("LSTM, λ = 0", collapsed_target, same_network, seed, progress)
    second = show_networks(target, runs, collapsed, say)
    draw_four_sentences(target, runs, collapsed, out / "four-sentences")
    third = show_surnames(out / "surnames", seed, say, progress)
    fourth = show_count_threes(out / "count-threes", seed, say, progress)
    return {"four_sentences": first, "networks": second, "surnames": third, "count_threes": fourth}


def show_four_sentences(target: Posterior, say: Say) -> dict[str, Any]:
    """Part 1: prior, reward, π*, log Z, and the policy (.5, .2, .1, .2) held against q and π*."""
    policy, support = four_sentences_policy(), target.enumerated()
    comparison = compare(policy, target)
    sentences = target.problem.space.decode(support.tokens)
    q, r = support.log_prior.exp().tolist(), support.rewards.tolist()
    star = target.log_probs.exp().tolist()
    pi = sequence_log_probs(policy, support.tokens).exp().tolist()
    say(
        "1. Four sentences: the prior q, the reward r, and the posterior π* ∝ q·exp(r/λ) at λ = 1\n"
    )
    header = ["sentence", "prior q", "reward r", "posterior π*", "policy π"]
    say(text_table(header, list(zip(sentences, q, r, star, pi, strict=True)), digits=12))
    z = float(target.log_evidence.exp())
    say(
        f"\nZ = {z:.12f},  log Z = {float(target.log_evidence):.12f} nats,  λ log Z ="
        f" {float(target.value):.12f} = the best J there is"
    )
    kl = comparison.kl_to_prior
    bits = kl / float(torch.log(torch.tensor(2.0, dtype=torch.float64)))
    say(
        f"KL(π‖q)  = {kl:.11f} nats = {bits:.4f} bits (article C of `klrl check --claims` prints ≈"
        f" {ARTICLE_KL}, which is neither)"
    )
    say(
        f"KL(π‖π*) = {comparison.reverse_kl:.11f} nats;  J(π) = {comparison.objective:.11f} = λ log"
        " Z − λ KL(π‖π*)\n"
    )
    return {
        **target.to_dict(),
        "evidence": z,
        "posterior": dict(zip(sentences, star, strict=True)),
        **comparison.metrics(),
    }


def show_networks(
    target: Posterior, runs: dict[str, Trained], collapsed: Trained, say: Say
) -> dict[str, Any]:
    """Part 2: how far each network ended from π*, and the collapse without the KL term."""
    say(
        "2. The same problem learned by networks from samples alone (RLOO, λ·log π/q in the"
        " reward)\n"
    )
    header = ["policy", "KL(π‖π*) at the start", f"after {SMALL.steps} steps", "total variation"]
    rows: list[list[Cell]] = []
    for name, run in runs.items():
        divergence, variation = run.history["reverse_kl"], run.history["total_variation"]
        rows.append([name, divergence[0], divergence[-1], variation[-1]])
    say(text_table(header, rows))
    best = collapsed.history["expected_reward"][-1]
    entropy = float(logspace.entropy(target.log_probs))
    say(
        "\nWithout the KL term (λ = 0) the same LSTM collapses on one sentence: entropy"
        f" {collapsed.entropy[0]:.4f} ->"
    )
    say(
        f"{collapsed.entropy[-1]:.2g} nats, E[r] = {best:.6f}; π* at λ = 1 keeps {entropy:.4f}"
        " nats.\n"
    )
    out: dict[str, Any] = {
        name: {
            "reverse_kl_start": run.history["reverse_kl"][0],
            "reverse_kl": run.history["reverse_kl"][-1],
            "steps": SMALL.steps,
        }
        for name, run in runs.items()
    }
    out["posterior_entropy"] = entropy
    out["collapse"] = {
        "entropy_start": collapsed.entropy[0],
        "entropy": collapsed.entropy[-1],
        "expected_reward": best,
    }
    return out


def draw_four_sentences(
    target: Posterior, runs: dict[str, Trained], collapsed: Trained, path: Path
) -> list[Path]:
    """The picture of parts 1 and 2."""
    with plots.publication_style():
        figure, (bars, curves, collapse) = plots.new_figure(3, 3.6, 3.0)
        plots.plot_posterior(
            target, {f"trained {name}": run.policy for name, run in runs.items()}, bars
        )
        bars.set_title("Posterior π* ∝ q·exp(r/λ), λ = 1")
        plots.plot_runs(
            {name: run.history for name, run in runs.items()}, ax=curves, ylabel="KL(π‖π*) in nats"
        )
        curves.set_title("RLOO reaches it from samples")
        entropies = {
            "λ = 1": (runs["LSTM"].steps, runs["LSTM"].entropy),
            "λ = 0 (no KL term)": (collapsed.steps, collapsed.entropy),
        }
        plots.plot_lines(
            entropies, collapse, xlabel="training step", ylabel="entropy of the LSTM in nats"
        )
        collapse.axhline(
            float(logspace.entropy(target.log_probs)),
            color=plots.POSTERIOR_COLOUR,
            linestyle="--",
            linewidth=1,
            label="entropy of π*",
        )
        collapse.legend()
        collapse.set_ylim(0, None)
        collapse.set_title("Reward alone collapses")
        return plots.save_figure(figure, path)


def show_surnames(path: Path, seed: int, say: Say, progress: Progress) -> dict[str, Any]:
    """Part 3: the posterior of US surnames under a reward on their spelling, and a network trained
    to it.
    """
    problem = surnames(kl_coef=0.5)
    target = posterior(problem)
    support = target.enumerated()
    say(
        f"3. Real text: the {len(support.tokens):,} most frequent US surnames (census 1990),"
        " spelled as characters; reward 1 where the spelling"
    )
    say(
        f"   matches /{SURNAME_PATTERN}/, λ = {problem.kl_coef:g}. The space holds"
        f" {problem.space.size:,} spellings; π* is exact on all of them.\n"
    )
    policy = restrict_to_support(
        RecurrentModel(problem.space, hidden_size=64, seed=seed, dtype=torch.float32), problem.prior
    )
    run = _train(policy, target, SURNAMES, seed, progress, "LSTM on surnames")
    q_side, star_side, network_side = (
        compare(model, target) for model in (problem.prior, target.model, policy)
    )
    rows = target.rows(_SURNAMES_SHOWN)
    shown = problem.space.encode([text for text, *_ in rows])
    learned = sequence_log_probs(policy, shown).exp().tolist()
    # stable: ties keep their order, and a run prints what the last one did
    by_prior = support.log_prior.argsort(descending=True, stable=True)[:_SURNAMES_SHOWN]
    names = problem.space.decode(support.tokens[by_prior])
    top = list(zip(names, support.log_prior[by_prior].exp().tolist(), strict=True))
    header = ["top of the prior", "q", "top of the posterior", "reward", "π*", "network"]
    table = [
        [*first, text, reward, star, pi]
        for first, (text, _, reward, star), pi in zip(top, rows, learned, strict=True)
    ]
    say(text_table(header, table))
    rewards = [side.expected_reward for side in (q_side, star_side, network_side)]
    say(
        f"\nlog Z = {float(target.log_evidence):.12f} nats,  KL(π*‖q) ="
        f" {star_side.kl_to_prior:.12f} nats"
    )
    say("E[r]: prior {:.6f}, posterior {:.6f}, network {:.6f}".format(*rewards))
    start = run.history["reverse_kl"][0]
    say(
        f"network: KL(π‖π*) {start:.4f} -> {network_side.reverse_kl:.4f} nats, total variation"
        f" {network_side.total_variation:.4f}"
    )
    _draw_surnames(target, run, path)
    spelled = show_spelling(problem, say)
    return {
        **target.to_dict(),
        "trigram": spelled,
        "kl_posterior_to_prior": star_side.kl_to_prior,
        "expected_reward": dict(zip(("prior", "posterior", "network"), rewards, strict=True)),
        "top": [
            {"name": text, "prior": q, "reward": r, "posterior": p, "network": pi}
            for (text, q, r, p), pi in zip(rows, learned, strict=True)
        ],
        "top_of_prior": [{"name": name, "prior": q} for name, q in top],
        "network_start": {"reverse_kl": start},
        "network": network_side.metrics(),
        "steps": SURNAMES.steps,
    }


def show_spelling(problem: Problem, say: Say) -> dict[str, Any]:
    """The same reward under a trigram of the names' letters, which spells names that nobody has:
    exact over every spelling there is.
    """
    table = surname_frequencies(len(enumerate_support(problem.prior)))
    # people of 100,000: smoothing weighs counts, not shares
    people = [1e3 * percent for percent in table.values()]
    prior = NGramModel.fit(problem.space, list(table), 3, weights=people)
    reward = accept_reward(regular_expression(SURNAME_PATTERN, problem.space))
    target = posterior(Problem(prior, reward, problem.kl_coef))
    model = target.model
    assert isinstance(model, StructuredPosterior)
    # at λ = inf the posterior is the trigram, with the same exact moments
    before, (mean, _) = posterior(Problem(prior, reward, math.inf)).model, model.reward_moments()
    assert isinstance(before, StructuredPosterior)
    top = model.top_sequences(_SURNAMES_SHOWN)
    names = list(zip(problem.space.decode(top.tokens), top.log_weights.exp().tolist(), strict=True))
    say(
        f"\n   A trigram of their letters gives mass to all {problem.space.size:,} spellings; by"
        f" {target.method} its posterior is exact too:"
    )
    prior_mean, kl = float(before.reward_moments()[0]), float(model.kl_to_prior())
    say(
        f"   log Z = {float(target.log_evidence):.12f} nats, KL(π*‖q) = {kl:.6f}, E[r]:"
        f" {prior_mean:.6f} under the trigram, {float(mean):.6f} under"
    )
    say(
        "   its posterior, whose most probable names are"
        f" {', '.join(f'{name} {p:.4f}' for name, p in names[:6])}"
    )
    numbers = {"kl_posterior_to_prior": kl, "expected_reward": float(mean)}
    return {
        **target.to_dict(),
        **numbers,
        "top": [{"name": name, "posterior": p} for name, p in names],
    }


def _draw_surnames(target: Posterior, run: Trained, path: Path) -> list[Path]:
    with plots.publication_style():
        figure, (bars, curve) = plots.new_figure(2, 4.4, 4.2)
        plots.plot_posterior(target, {"trained LSTM": run.policy}, bars, count=16)
        bars.set_title("US surnames, rewarded for -son, -sen, -man")
        plots.plot_runs({"LSTM": run.history}, ax=curve, ylabel="KL(π‖π*) in nats, over all names")
        curve.set_title("An LSTM trained by RLOO, λ = ½")
        return plots.save_figure(figure, path)


def show_count_threes(path: Path, seed: int, say: Say, progress: Progress) -> dict[str, Any]:
    """Part 4: a Transformer prior over 262,144 sequences; a copy of it trained on samples only,
    held against the exact π*.
    """
    problem = count_threes()
    target = posterior(problem)
    support = target.enumerated()
    say(
        f"\n4. A Transformer prior over {len(support.tokens):,} sequences of digits, r = number of"
        f" 3s − ½·adjacent repeats, λ = {problem.kl_coef:g};"
    )
    entropy = float(logspace.entropy(support.log_prior))
    divergence = float(logspace.kl_divergence(support.log_prior, target.log_probs))
    say(
        f"   H(q) = {entropy:.4f} of {math.log(len(support.tokens)):.4f} nats, KL(q‖π*) ="
        f" {divergence:.4f}, exact by walking the prefix trie;"
    )
    say("   training reads log q and r from the table that the walk left\n")
    # from q itself, so the first divergence is KL(q‖π*)
    policy, label = copy_of_prior(problem), "Transformer on count-threes"
    before = compare(policy, target)
    run = _train(policy, target, COUNT_THREES, seed, progress, label, EVALUATE_LARGE_EVERY)
    after = compare(policy, target)
    shown = ["reverse_kl", "forward_kl", "total_variation"]
    shown += ["expected_reward", "objective", "objective_gap"]
    rows: list[list[Cell]] = [
        [name, before.metrics()[name], after.metrics()[name]] for name in shown
    ]
    trained = f"after {COUNT_THREES.steps} RLOO steps of {COUNT_THREES.batch_size}"
    say(text_table(["exact", "copy of the prior", trained], rows))
    say(f"   the best objective there is: λ log Z = {float(target.value):.6f}")
    _draw_count_threes(target, run, path)
    return {
        **target.to_dict(),
        "entropy": entropy,
        "before": before.metrics(),
        "after": after.metrics(),
        "steps": COUNT_THREES.steps,
    }


def _draw_count_threes(target: Posterior, run: Trained, path: Path) -> list[Path]:
    with plots.publication_style():
        figure, (divergence, objective) = plots.new_figure(2, 3.6, 3.0)
        plots.plot_metrics(
            run.history,
            {"reverse_kl": "KL(π‖π*)", "forward_kl": "KL(π*‖π)"},
            divergence,
            ylabel="nats, over 262,144 sequences",
            log=True,
        )
        divergence.set_title("A Transformer trained on samples only")
        plots.plot_metrics(
            run.history,
            {"exact_objective": "J(π)", "expected_reward": "E[r]"},
            objective,
            ylabel="reward units",
        )
        objective.axhline(
            float(target.value),
            color=plots.POSTERIOR_COLOUR,
            linestyle="--",
            label="λ log Z, the most J there is",
        )
        objective.legend()
        objective.set_title("Its objective, exactly")
        return plots.save_figure(figure, path)


def _train_small(
    name: str, target: Posterior, network: LanguageModel, seed: int, progress: Progress
) -> Trained:
    """A network trained on the four sentences, kept to the prior's support."""
    policy = restrict_to_support(network, target.problem.prior)
    return _train(policy, target, SMALL, seed, progress, f"{name} on four sentences")


def _train(
    policy: LanguageModel,
    target: Posterior,
    recipe: Recipe,
    seed: int,
    progress: Progress,
    label: str,
    every: int = EVALUATE_EVERY,
) -> Trained:
    """RLOO with an exact look at the distribution every few steps; log q and r come from the
    enumerated table.
    """
    trained = Trained(policy, History())
    support = target.enumerated()

    def look(record: Record) -> None:
        trained.history.records.append({**record, **comparison_metrics(policy, target)})
        trained.steps.append(record["step"])
        with torch.no_grad():
            log_probs, _ = support_log_mass(policy, support.tokens, support.trie)
        trained.entropy.append(float(logspace.entropy(log_probs)))

    # before the first step, where every curve begins
    look({"step": 0})
    loop = train_steps(
        policy,
        looked_up(target),
        losses.rloo,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        draw=seeded_draw(seed),
        schedule=cosine,
        max_grad_norm=1.0,
    )
    for record in progress(loop, recipe.steps, label):
        if record["step"] % every == 0:
            look(record)
    return trained
