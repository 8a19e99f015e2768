"""What is exact, by which method, at what size and in what time: the table of tutorials/exact.md,
from `python3 dev.py bench --exact`.
"""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

import klrl_edu as klrl
from klrl_edu.closed_forms.acceptance import metropolis_second_eigenvalue
from klrl_edu.problems.automata import at_least, constraint, exactly
from tests.benchmarks import bench
from tests.benchmarks.measure import cpu_seconds
from tests.benchmarks.structured import SAMPLES, lattice

MARKS = ("<!-- exact: written by python3 dev.py bench --exact -->", "<!-- end of exact -->")
PAGE = bench.PAGES / "exact.md"


class Row(NamedTuple):
    """What is computed, how, on what, and the work to time."""

    what: str
    method: str
    size: str
    work: Callable[[], object]


def rows() -> list[Row]:
    """Every line of the table."""
    threes, names = klrl.count_threes(), klrl.surnames(kl_coef=0.5, count=5000)
    texts = klrl.problems.corpora.surname_frequencies(5000)
    fitted = klrl.NGramModel.fit(
        names.space, list(texts), 3, weights=[1e3 * percent for percent in texts.values()]
    )
    spelled = klrl.Problem(
        fitted, constraint(klrl.regular_expression("(son|sen|man)$", names.space)), 1.0
    )
    hidden = klrl.Problem(
        klrl.HiddenMarkovModel.random(names.space, 8),
        constraint(at_least("a", 2, names.space)),
        1.0,
    )
    big, small = lattice(), klrl.posterior(threes)
    log_prior, rewards, _ = bench.vectors()
    huge = klrl.exact.structured.StructuredPosterior(big, klrl.exact.forward_backward.backward(big))
    space = klrl.SequenceSpace(tuple("abcdefgh"), 40, eos=False)
    network = klrl.Problem(
        klrl.NGramModel(space, 2),
        klrl.add(klrl.count_reward("a", space), constraint(exactly("b", 5, space))),
        1.0,
    )
    million = "10⁶ outcomes"
    return [
        Row(
            "π*, log Z, value of a table",
            "enumeration",
            million,
            lambda: klrl.exact.enumeration.tilt(log_prior, rewards, 0.5),
        ),
        Row(
            "π* of 5,000 surnames, a reward on the spelling",
            "enumeration",
            "5,000 sequences",
            lambda: klrl.posterior(names),
        ),
        Row(
            "π*, V(s), Q(s,a) under a Transformer prior",
            "soft Bellman on its prefix trie",
            "262,144 sequences",
            lambda: klrl.posterior(threes),
        ),
        Row(
            "KL(π‖π*), KL(π*‖π), TV, J of a Transformer",
            "walk of the trie",
            "262,144 sequences",
            lambda: klrl.compare(threes.prior, small),
        ),
        Row(
            "π* of a trigram of surnames, -son, -sen or -man",
            "forward–backward",
            _power(names.space.size),
            lambda: klrl.posterior(spelled),
        ),
        Row(
            "π* of a hidden Markov model (8), ≥ 2 × 'a'",
            "forward–backward",
            _power(names.space.size),
            lambda: klrl.posterior(hidden),
        ),
        Row(
            "π* of a bigram, counts rewarded and fixed",
            "forward–backward",
            _power(space.size),
            lambda: klrl.posterior(network),
        ),
        Row(
            "log Z, 100 words, T = 50, 10 states",
            "forward–backward",
            "10¹⁰⁰ sequences",
            lambda: klrl.exact.forward_backward.backward(big),
        ),
        Row(
            "10,000 exact samples of it",
            "its conditionals, step by step",
            "10¹⁰⁰ sequences",
            lambda: huge.sample(SAMPLES, draw=klrl.seeded_draw(0)),
        ),
        Row("E[r], Var[r] of it", "total covariance", "10¹⁰⁰ sequences", huge.reward_moments),
        Row("KL(π*‖q) of it", "chain rule", "10¹⁰⁰ sequences", huge.kl_to_prior),
        Row(
            "its 10 most probable sequences",
            "A*",
            "10¹⁰⁰ sequences",
            lambda: huge.top_sequences(10),
        ),
        Row(
            "optimum under a χ² penalty",
            "one root",
            million,
            lambda: klrl.regularizers.chi_squared(log_prior, rewards, 0.5),
        ),
        Row(
            "λ for a KL budget",
            "one root",
            million,
            lambda: klrl.budget.kl_coef_for_budget(log_prior, rewards, 0.5),
        ),
        Row(
            "law of best-of-64, its KL and win rate",
            "closed form",
            million,
            lambda: klrl.best_of_n(log_prior, rewards, 64),
        ),
        Row(
            "Metropolis–Hastings' second eigenvalue",
            "closed form",
            million,
            lambda: metropolis_second_eigenvalue(log_prior, rewards, 0.5),
        ),
    ]


def _power(size: int) -> str:
    return f"about 10^{round(math.log10(size))} sequences"


def table() -> str:
    """Markdown: the median of three runs each, CPU seconds on one thread."""
    lines = ["| exact | method | size | CPU time |", "|---|---|---|---|"]
    for row in rows():
        row.work()
        seconds = statistics.median(cpu_seconds(row.work) for _ in range(3))
        shown = f"{seconds:.2g} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"
        print(f"{row.what}: {shown}", flush=True)
        lines.append(f"| {row.what} | {row.method} | {row.size} | {shown} |")
    return f"Median of three runs, one thread; {bench.where()}.\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    """Measures, and writes the table to its page."""
    torch.set_num_threads(1)
    bench.put_table(PAGE, table(), MARKS)
    return 0
