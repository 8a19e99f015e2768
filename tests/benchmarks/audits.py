"""Exact audits against one backward pass through the policy for each execution, and the memory they
take.
"""

import dataclasses
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core.multisets import multisets
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.learning import losses
from klrl_edu.learning.batches import Batch, score_batch
from klrl_edu.models.contract import LanguageModel, enumerate_support, token_log_probs
from klrl_edu.models.table import PrefixTable
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import count_reward
from tests.benchmarks.measure import Ratio, ratio

SHARE = 32  # one backward pass an execution is timed on 1/32 of the executions and scaled
SECONDS, MEGABYTES = 1.0, 1024.0


def binary_sequences() -> tuple[LanguageModel, Problem]:
    """All 4,096 binary sequences of length 12."""
    return _random_case(SequenceSpace(("a", "b"), 12, eos=False))


def fifteen_sequences() -> tuple[LanguageModel, Problem]:
    """All 15 texts of at most three words of two, which end in EOS."""
    return _random_case(SequenceSpace(("a", "b"), 4))


def _random_case(space: SequenceSpace) -> tuple[LanguageModel, Problem]:
    generator = torch.Generator().manual_seed(0)
    shape = PrefixTable(space).logits.shape
    policy, prior = (
        PrefixTable(space, logits=torch.randn(shape, generator=generator, dtype=torch.float64))
        for _ in range(2)
    )
    return policy, Problem(prior, count_reward("b", space), 0.5)


def grpo_like(batch: Batch) -> Tensor:
    """z-scores of the group by the population std, and λ·k3 in the loss: what GRPO does."""
    reward = batch.rewards.sum(-1)
    centred = reward - reward.mean()
    advantage = centred / (centred.square().mean().sqrt() + 1e-4)
    log_weight = (batch.prior_log_probs - batch.log_probs).sum(-1)
    kl = torch.expm1(log_weight) - log_weight
    return -(advantage * batch.log_probs.sum(-1)).mean() + (batch.kl_coef * kl).mean()


def audit_against_backward_passes(
    what: str,
    case: Callable[[], tuple[LanguageModel, Problem]],
    loss: Callable[[Batch], Tensor],
    size: int,
) -> Ratio:
    """A whole audit, targets and verdict included, against the bare backward passes that it
    replaces.
    """
    policy, problem = case()
    support = enumerate_support(policy)
    batches = [
        score_batch(policy, [problem], [support.tokens[rows]])
        for rows in multisets(support.log_weights, size)[0][::SHARE]
    ]

    def one_by_one() -> None:
        for (
            batch
        ) in batches:  # prior and rewards are known; the policy is read again, as its graph must be
            loss(
                dataclasses.replace(batch, log_probs=token_log_probs(policy, batch.tokens))
            ).backward()

    def audited() -> str:
        return audit_gradient(loss, policy, problem, batch_size=size).verdict

    found = ratio(
        what,
        "a backward pass through the table for each ÷ own, targets included",
        "≥ 50",
        one_by_one,
        audited,
        scale=SHARE,
    )
    started = time.perf_counter()
    audited()
    seconds = time.perf_counter() - started
    return Ratio(
        found.measured,
        found.against,
        found.bar,
        found.value,
        f"{found.note}; {seconds:.2g} s warm (bar: {SECONDS:g} s)",
    )


single_samples = partial(
    audit_against_backward_passes,
    "audit of REINFORCE over 4,096 sequences of 12",
    binary_sequences,
    losses.reinforce,
    1,
)
groups_of_rloo = partial(
    audit_against_backward_passes,
    "audit of RLOO, 3,060 groups of 4 over 15",
    fifteen_sequences,
    losses.rloo,
    4,
)
groups_of_grpo = partial(
    audit_against_backward_passes,
    "audit of GRPO with k3, 3,060 groups of 4 over 15",
    fifteen_sequences,
    grpo_like,
    4,
)


def stubborn(batch: Batch) -> Tensor:
    """RLOO with a look at its own value, which vmap cannot run: one backward pass an execution,
    through the loss alone.
    """
    value = losses.rloo(batch)
    return value if float(value.detach()) < math.inf else -value


def groups_without_vmap() -> Ratio:
    """Seconds where the loss does not vmap."""
    policy, problem = fifteen_sequences()
    started = time.perf_counter()
    report = audit_gradient(stubborn, policy, problem, batch_size=4)
    names = ("audit of a loss that vmap cannot run, 3,060 groups of 4 over 15", "seconds")
    return Ratio(*names, "≤ 10", time.perf_counter() - started, report.differentiation or "")


PROGRAM = """
import torch
torch.set_num_threads(1)
from klrl_edu.audit.audit import audit_gradient
from klrl_edu.learning import losses
from tests.benchmarks import audits
def peak():  # of this program alone
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
audit_gradient(losses.rloo, *audits.fifteen_sequences(), batch_size=2)  # first use allocates
before = peak()
audit_gradient(losses.rloo, *audits.fifteen_sequences(), batch_size=4)
groups = peak()
audit_gradient(losses.reinforce, *audits.binary_sequences())
print(groups - before, peak() - before)
"""


def peak_memory() -> Ratio:
    """Peak memory of both audits above the start, in megabytes."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    groups, single = (int(kilobytes) / 1024 for kilobytes in run.stdout.split())
    return Ratio(
        "peak memory of the audit over 4,096 sequences",
        "megabytes above the start",
        f"≤ {MEGABYTES:g}",
        single,
        f"{groups:.0f} for groups",
    )


AUDITS: list[Callable[[], Ratio]] = [
    single_samples,
    groups_of_rloo,
    groups_of_grpo,
    groups_without_vmap,
    peak_memory,
]
