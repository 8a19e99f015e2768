"""The bench: every speed ratio that the README and the pages quote.

python3 dev.py bench                a few minutes on one thread; writes results.json, and from it
                                    the table of tutorials/bench.md and the README's five rows
python3 dev.py bench --long         with the thousand-step training runs as well
python3 dev.py bench --estimators   only the table of tutorials/estimators.md
python3 dev.py bench --exact        only the table of tutorials/exact.md: what is exact, at what
                                    size and in what time
"""

import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from klrl_edu.audit.claims.catalogue import markdown_table
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.core.draws import Draw, seeded_draw
from klrl_edu.evaluation.compare import compare
from klrl_edu.exact.posterior import Posterior, looked_up, posterior
from klrl_edu.learning import losses
from klrl_edu.learning.optimizers import MuonWithAdam
from klrl_edu.learning.training import copy_of_prior, linear, train_steps
from klrl_edu.models.contract import LanguageModel, enumerate_support, force_eos, sample
from klrl_edu.models.precision import autocast
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.examples import count_threes
from tests.benchmarks import audits, structured
from tests.benchmarks.measure import ROUNDS, Ratio, ratio

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
README, PAGES = ROOT / "README.md", ROOT / "tutorials"
RESULTS = HERE / "results.json"
MARKS = ("<!-- bench: written by python3 dev.py bench -->", "<!-- end of bench -->")
ESTIMATOR_MARKS = (
    "<!-- estimators: written by python3 dev.py bench --estimators -->",
    "<!-- end of estimators -->",
)
# The README's rows, by what is measured and the first words of what it is measured against.
HEADLINES = (
    ("log q of all 262,144 sequences", "Hugging Face"),
    ("one RLOO step, batch 256", "TRL"),
    ("CPU seconds to KL(π‖π*) ≤ 0.05, batch 256", "TRL"),
    ("10,000 exact samples of 10¹⁰⁰ sequences", "loop with torch.multinomial"),
    ("audit of RLOO, 3,060 groups of 4 over 15", "a backward pass"),
)
BATCH, SHARE = 256, 16  # the full forward is timed on 1/16 of the batches and scaled


def enumeration_against_hugging_face() -> Ratio:
    """log q of all 262,144 sequences: full forwards ÷ one walk of the prefix trie."""
    from tests.benchmarks.hugging_face import build_gpt2, log_probs

    prior, other = count_threes().prior, build_gpt2()
    batches = prior.space.all_tokens().split(BATCH)[::SHARE]

    def full() -> None:
        with torch.no_grad():
            for batch in batches:
                log_probs(other, batch).double().sum(-1)

    names = (
        "log q of all 262,144 sequences",
        "Hugging Face GPT-2, full forward in batches of 256 ÷ own",
    )
    return ratio(*names, "≥ 40", full, lambda: enumerate_support(prior), scale=SHARE)


def rloo_step_against_hugging_face() -> Ratio:
    """One RLOO step of batch 256; own reads log q and r from the enumerated table, as `klrl train`
    and the demo do.
    """
    from tests.benchmarks.hugging_face import MinimalRloo

    problem = count_threes()
    options = {"steps": 10_000, "draw": seeded_draw(0), "batch_size": BATCH, "lr": 1e-3}
    steps = train_steps(
        copy_of_prior(problem), looked_up(posterior(problem)), losses.rloo, **options
    )
    other = MinimalRloo(problem, BATCH)
    names = (
        "one RLOO step, batch 256",
        "minimal Hugging Face loop with past_key_values ÷ own, which looks log q up",
    )
    return ratio(*names, "≥ 1.5", other.step, lambda: next(steps))


def vectors(n: int = 1_000_000) -> tuple[Tensor, Tensor, Tensor]:
    """log q, r, log p [n] of a million outcomes."""
    generator = torch.Generator().manual_seed(0)
    logits, rewards, others = (
        torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return torch.log_softmax(logits, 0), rewards, torch.log_softmax(others, 0)


def posterior_of_a_million() -> Ratio:
    """π* and log Z, validation and −inf handling included."""
    log_prior, rewards, _ = vectors()
    names = ("posterior of 10⁶ outcomes, float64", "own ÷ torch.log_softmax")
    return ratio(
        *names,
        "≤ 2",
        lambda: tilt(log_prior, rewards, 0.5),
        lambda: torch.log_softmax(log_prior, 0),
    )


def kl_of_a_million() -> Ratio:
    """KL, exact near zero and where mass is zero."""
    log_q, _, log_p = vectors()
    names = ("KL of 10⁶ outcomes, float64", "own ÷ torch.log_softmax")
    return ratio(
        *names,
        "≤ 3",
        lambda: logspace.kl_divergence(log_p, log_q),
        lambda: torch.log_softmax(log_q, 0),
    )


@torch.no_grad()
def cached_sample(model: LanguageModel, n: int, draw: Draw) -> Tensor:
    """n sequences [n,T] with a KV cache and a row for each from the start."""
    logits, state = model.start(n)
    columns = []
    for t in range(model.space.max_length):
        columns.append(
            draw(force_eos(logits, torch.zeros(n, dtype=torch.bool), False, model.space), None)
        )
        if t < model.space.max_length - 1:
            logits, state = model.step(state, columns[-1])
    return torch.stack(columns, 1)


def sampling() -> Ratio:
    """1024 samples: the same law, and with one seed the same tokens."""
    prior = count_threes().prior
    assert torch.equal(
        cached_sample(prior, 1024, seeded_draw(5)), sample(prior, 1024, draw=seeded_draw(5))
    )
    one, other = seeded_draw(0), seeded_draw(0)
    names = ("1024 samples from count-threes", "KV-cached sampler ÷ prefix-sharing sampler")
    return ratio(
        *names,
        "≥ 2.3",
        lambda: cached_sample(prior, 1024, one),
        lambda: sample(prior, 1024, draw=other),
    )


def half_precision(dtype: torch.dtype) -> Ratio:
    """What autocast does to a distribution: KL of the float32 prior from the same weights in half
    precision.
    """
    prior = count_threes().prior
    exact, rounded = (
        enumerate_support(model).log_weights for model in (prior, autocast(prior, dtype))
    )
    worst = float((exact - rounded).abs().max())
    names = (
        f"KL(float32‖{str(dtype).removeprefix('torch.')} autocast) of count-threes' prior",
        "nats a sequence",
    )
    return Ratio(
        *names,
        "–",
        float(logspace.kl_divergence(exact, rounded)),
        f"exact over 262,144 sequences; largest change of a log q: {worst:.2g}",
    )


def thousand_steps() -> Ratio:
    """Exact KL(π_end‖π*) ÷ KL(q‖π*) after 1000 RLOO steps of 256 from a copy of the prior, median
    of 3 seeds; a fresh start beside it.
    """
    problem = count_threes()
    target = posterior(problem)
    start = compare(problem.prior, target).reverse_kl
    copies = [_after_a_thousand(copy_of_prior(problem), target, seed) / start for seed in range(3)]
    fresh = [_after_a_thousand(untrained(seed), target, seed) / start for seed in range(3)]
    note = "seeds 0–2: " + "; fresh start: ".join(
        ", ".join(f"{end:.2g}" for end in ends) for ends in (copies, fresh)
    )
    names = (
        "exact KL(π‖π*) after 1000 RLOO steps of 256",
        "÷ KL(q‖π*), policy started as a copy of the prior",
    )
    return Ratio(*names, "≤ 3e-4", statistics.median(copies), note)


def untrained(seed: int) -> TransformerModel:
    """A policy of the prior's size with fresh weights."""
    return TransformerModel(
        count_threes().space, width=64, heads=4, layers=2, seed=seed, dtype=torch.float32
    )


def _after_a_thousand(policy: LanguageModel, target: Posterior, seed: int) -> float:
    options = {
        "steps": 1000,
        "batch_size": BATCH,
        "optimizer": MuonWithAdam(policy),
        "schedule": linear,
        "max_grad_norm": 1.0,
    }
    for _ in train_steps(policy, looked_up(target), losses.rloo, draw=seeded_draw(seed), **options):
        pass
    return compare(policy, target).reverse_kl


def rloo_step_against_trl(batch_size: int, bar: str) -> Ratio:
    """One RLOO step against TRL's RLOOTrainer."""
    from tests.benchmarks.trl_rloo import step_ratio

    return step_ratio(batch_size, bar)


def time_to_a_kl_against_trl() -> Ratio:
    """CPU seconds to KL(π‖π*) ≤ 0.05 against TRL's RLOOTrainer."""
    from tests.benchmarks.trl_rloo import seconds_to_a_kl

    return seconds_to_a_kl()


SHORT: list[Callable[[], Ratio]] = [
    enumeration_against_hugging_face,
    rloo_step_against_hugging_face,
    partial(rloo_step_against_trl, 64, "≥ 3.5"),
    partial(rloo_step_against_trl, 256, "≥ 3"),
    time_to_a_kl_against_trl,
    posterior_of_a_million,
    kl_of_a_million,
    sampling,
    structured.evidence_against_products,
    structured.evidence_against_dense,
    structured.samples_against_multinomial,
    structured.peak_memory,
    *audits.AUDITS,
    partial(half_precision, torch.bfloat16),
    partial(half_precision, torch.float16),
]


def run(benches: list[Callable[[], Ratio]]) -> Iterator[Ratio]:
    """Each ratio in turn; one whose other side is not installed has no value, and says so."""
    for bench in benches:
        try:
            row = bench()
        except ModuleNotFoundError as error:
            what = (getattr(bench, "func", bench).__doc__ or "").split("\n")[0].rstrip(".")
            row = Ratio(
                what,
                "–",
                "–",
                None,
                f"not measured: {error.name} is not installed (extras `hf` and `trl`)",
            )
        print(
            f"{row.measured}: {'–' if row.value is None else format(row.value, '.3g')} (bar"
            f" {row.bar}; {row.note})",
            flush=True,
        )
        yield row


def where() -> str:
    """Date and machine."""
    return (
        f"{datetime.date.today()}, {platform.machine()}, {platform.system()}, Python"
        f" {platform.python_version()}, torch {torch.__version__}"
    )


def table(rows: list[Ratio], measured_on: str) -> str:
    """Markdown, with date and machine."""
    head = f"Median of {ROUNDS} interleaved rounds, CPU time, one thread; {measured_on}.\n\n"
    lines = ["| measured | ratio | to reach | reached | detail |", "|---|---|---|---|---|"]
    for row in rows:
        reached = {True: "yes", False: "**no**", None: "–"}[row.reached]
        lines.append(
            f"| {row.measured}: {row.against} | {_shown(row)} | {row.bar} | {reached} |"
            f" {row.note} |"
        )
    return head + "\n".join(lines) + "\n"


def headlines(rows: list[Ratio], measured_on: str) -> str:
    """The README's rows in Markdown, below how many of all the bars were reached."""
    judged = [row.reached for row in rows if row.reached is not None]
    head = (
        f"Ratios of CPU time; {sum(judged)} of the {len(judged)} bars of"
        f" [the whole table](tutorials/bench.md) were reached; {measured_on}.\n\n"
    )
    lines = ["| measured | ratio | detail |", "|---|---|---|"]
    for measured, against in HEADLINES:
        lines += [  # none where the other library was not installed
            f"| {row.measured}: {row.against} | {_shown(row)} | {row.note} |"
            for row in rows
            if row.measured == measured and row.against.startswith(against)
        ]
    return head + "\n".join(lines) + "\n"


def _shown(row: Ratio) -> str:
    return "–" if row.value is None else f"{row.value:.3g}"


def write_results(rows: list[Ratio], measured_on: str) -> None:
    """The file that the tables are made of."""
    results = {"where": measured_on, "rows": [vars(row) for row in rows]}
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_results() -> tuple[list[Ratio], str]:
    """The rows of the last run, and date and machine."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return [Ratio(**row) for row in results["rows"]], results["where"]


def with_table(page: str, written: str, marks: tuple[str, str] = MARKS) -> str:
    """A page with a new table between two marks."""
    before, _, rest = page.partition(marks[0])
    return f"{before}{marks[0]}\n\n{written}\n{marks[1]}{rest.partition(marks[1])[2]}"


def put_table(path: Path, written: str, marks: tuple[str, str] = MARKS) -> None:
    """Writes a table into its page, between its marks."""
    page = with_table(path.read_text(encoding="utf-8"), written, marks)
    path.write_text(page, encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Measures, prints and writes the tables; exit 1 where a bar was missed."""
    if "--exact" in arguments:
        from tests.benchmarks import exact_sizes

        return exact_sizes.main()
    if "--estimators" in arguments:
        put_table(PAGES / "estimators.md", f"{markdown_table()}\n", ESTIMATOR_MARKS)
        return 0
    torch.set_num_threads(1)
    rows = list(run(SHORT + ([thousand_steps] if "--long" in arguments else [])))
    write_results(rows, where())
    put_table(PAGES / "bench.md", table(*read_results()))
    put_table(README, headlines(*read_results()))
    return int(any(row.reached is False for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
