"""Exact assertions about estimators: every batch is enumerated and nothing is drawn, so that a
false alarm has probability 0.

    E[g] = target,     g_a = g_b on every batch,     E‖g − E g‖² ≤ bound                         (1)

An estimator is a loss (Batch -> scalar, of which the gradient is meant) or a function of log-ratios
u [N] -> estimates [N]. Without a policy and a problem of one's own, an assertion goes through
`standard_cases`. B batch size, N samples, S sequences, P parameters.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from klrl_edu.audit.adapting import adapted, draws_random_numbers, name_of, takes_a_batch
from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.audit.cases import AuditCase
from klrl_edu.audit.report import AuditReport
from klrl_edu.core.errors import InputError
from klrl_edu.learning.batches import needs_of, score_batch
from klrl_edu.models.contract import LanguageModel, enumerate_support, token_log_probs
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward, token_reward

Estimator = Callable[..., Tensor]  # Batch -> scalar, or u [N] -> [N]

TOLERANCE = 1e-12
_SMALLEST_SCALE = 1e-3  # reward units: where target and noise are both 0, rounding alone is left


def standard_cases() -> list[AuditCase]:
    """Three small problems, none with λ = 1: sequences of zero mass, several lengths with EOS,
    ties, rewards by token, logits by prefix.
    """
    texts = {"": 0.15, "a": 0.25, "b": 0.2, "a b": 0.4, "b b": 0.0}
    values = {"": 1.0, "a": -0.5, "b": 1.0, "a b": 2.0, "b b": 0.0}
    varied = SequenceTable.from_texts(texts)
    lengths = Problem(varied, table_reward(values, varied.space), 2.0)
    supported = varied.tokens[:4]  # all but "b b", where the prior has no mass
    covering = SequenceTable(varied.space, supported, torch.tensor([0.3, -0.2, 0.0, 0.5]))

    prefixes = SequenceTable.from_texts({"": 0.1, "x": 0.3, "x x": 0.2, "x y": 0.4})
    by_token = Problem(prefixes, token_reward([0.5, -1.0, 0.25], prefixes.space), 0.25)
    table = PrefixTable(prefixes.space, prefixes.tokens)
    logits = torch.linspace(-1, 1, table.logits.numel(), dtype=torch.float64)
    table.logits.data.copy_(logits.reshape(table.logits.shape))
    restricted = restrict_to_support(table, prefixes)

    return [
        AuditCase("four sentences at λ = 0.5", four_sentences_policy(), four_sentences(0.5)),
        AuditCase("texts of 0 to 2 words at λ = 2", covering, lengths),
        AuditCase("a row of logits a prefix at λ = 0.25", restricted, by_token),
    ]


def assert_unbiased(
    estimator: Estimator,
    target: str | float | Tensor,
    policy: LanguageModel | None = None,
    problem: Problem | None = None,
    *,
    batch_size: int = 2,
    behaviour: LanguageModel | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """The expectation over all batches is the target.

    Args:
        estimator: a loss, or a function of log-ratios.
        target: a name among the audit's targets ("objective", "expected_reward", "reverse_kl",
            "forward_kl", …: for a loss the gradient to descend, for a function of log-ratios the
            value in nats), or the gradient [P] or number itself.
        policy, problem: what to try it on; by default each of `standard_cases`.
        batch_size: B; a leave-one-out baseline needs 2.
        behaviour: the policy that draws the batches; by default `policy`.
        tolerance: of the bias, relative to the larger of ‖target‖ and the estimator's standard
            deviation; about 1e-5 for a policy in float32.

    Raises:
        AssertionError: the estimator is biased; the message says by how much and what it follows
            instead.
        InputError: an unknown target, or one that is infinite here.
    """
    name = target if isinstance(target, str) else "the target given"
    for case in _cases(policy, problem, behaviour):
        report = _audit(estimator, case, batch_size)
        _check_mean(report, _target(report, target), name, case, tolerance)


def assert_same_gradient(
    loss: Estimator,
    other: Estimator,
    policy: LanguageModel | None = None,
    problem: Problem | None = None,
    *,
    batch_size: int = 2,
    behaviour: LanguageModel | None = None,
    in_expectation: bool = False,
    tolerance: float = TOLERANCE,
) -> None:
    """Two losses have the same gradient on every batch, or `in_expectation` only.

    Args:
        loss, other: Batch -> scalar.
        policy, problem, batch_size, behaviour: as in `assert_unbiased`.
        in_expectation: compare the means over batches instead, which leaves the variances free.
        tolerance: of the difference, relative to the largest gradient of `other` (or to its
            standard deviation, in expectation).

    Raises:
        AssertionError: they differ; the message has the batch and both gradients.
    """
    for case in _cases(policy, problem, behaviour):
        if in_expectation:
            expected = _audit(other, case, batch_size)
            report = _audit(loss, case, batch_size)
            what = f"the mean gradient of {expected.name}"
            _check_mean(report, expected.mean, what, case, tolerance)
            continue
        # both go through the batches in the same order
        pairs = zip(
            _gradients(loss, case, batch_size),
            _gradients(other, case, batch_size),
            strict=True,
        )
        texts, mine, theirs = [], [], []
        for (text, one), (_, two) in pairs:
            texts.append(text)
            mine.append(one)
            theirs.append(two)
        difference = (torch.stack(mine) - torch.stack(theirs)).norm(dim=-1)
        size = torch.stack(theirs).norm(dim=-1).max()
        allowed = tolerance * max(float(size), _SMALLEST_SCALE)
        bad = (~(difference <= allowed)).nonzero()  # a NaN is bad too
        if len(bad):
            k = int(bad[0])
            raise AssertionError(
                f"{name_of(loss)} and {name_of(other)} differ on {len(bad)} of {len(difference)}"
                f" batches ({case.name}); on {texts[k]} the gradients are {_numbers(mine[k])} and"
                f" {_numbers(theirs[k])}; allowed {allowed:.2g}.\nRemedy: compare the advantage of"
                " each sequence in this batch; in_expectation=True compares the means"
                f" only.\n{_exact(len(difference))}"
            )


def assert_variance_at_most(
    estimator: Estimator,
    bound: float | Estimator,
    policy: LanguageModel | None = None,
    problem: Problem | None = None,
    *,
    batch_size: int = 2,
    behaviour: LanguageModel | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """The total variance E‖g − E g‖² over all batches is at most a number, or at most another
    estimator's on the same batches.

    Args:
        estimator: a loss, or a function of log-ratios.
        bound: a variance (reward units squared a squared coordinate, or nats²), or another
            estimator.
        policy, problem, batch_size, behaviour: as in `assert_unbiased`.
        tolerance: relative to the bound, for rounding.

    Raises:
        AssertionError: the variance is larger.
    """
    for case in _cases(policy, problem, behaviour):
        report = _audit(estimator, case, batch_size)
        limit = _audit(bound, case, batch_size).variance if callable(bound) else bound
        if not report.variance <= limit + tolerance * max(limit, _SMALLEST_SCALE**2):
            raise AssertionError(
                f"{report.name} has variance {report.variance:.9g} ({case.name}, batches of"
                f" {batch_size}); expected at most"
                f" {limit:.9g}{f', that of {name_of(bound)}' if callable(bound) else ''}.\nRemedy:"
                " subtract a baseline that does not depend on the sequence itself, or raise"
                f" batch_size.\n{_exact(report.executions)}"
            )


# --- what the assertions share --------------------------------------------------------------------


def _cases(
    policy: LanguageModel | None, problem: Problem | None, behaviour: LanguageModel | None
) -> list[AuditCase]:
    if policy is not None and problem is not None:
        return [AuditCase("the problem given", policy, problem, behaviour)]
    if policy is not None or problem is not None:
        raise InputError("give both policy and problem, or neither for the standard cases.")
    return [case._replace(behaviour=behaviour) for case in standard_cases()]


def _audit(estimator: Estimator, case: AuditCase, batch_size: int) -> AuditReport:
    audit = audit_value if _reads_log_ratios(estimator) else audit_gradient
    return audit(
        estimator, case.policy, case.problem, batch_size=batch_size, behaviour=case.behaviour
    )


def _reads_log_ratios(estimator: Estimator) -> bool:
    """Whether it maps u [N] rather than a Batch: a loss asks its argument for fields, which a
    tensor has not.
    """
    try:
        estimator(torch.zeros(2, dtype=torch.float64))
    except (AttributeError, TypeError):
        return False
    return True


def _target(report: AuditReport, target: str | float | Tensor) -> Tensor:
    if isinstance(target, str):
        if not bool(torch.isfinite(report.targets.get(target, torch.tensor(math.inf))).all()):
            raise InputError(
                f"target {target!r} is unknown or infinite here; choose from"
                f" {', '.join(report.targets)}, or give the numbers."
            )
        return report.targets[target]
    expected = torch.as_tensor(target, dtype=torch.float64).reshape(-1)
    if expected.shape != report.mean.shape:
        raise InputError(
            f"target has {expected.numel()} entries; expected {report.mean.numel()}"
            f" ({report.coordinates})."
        )
    return expected


def _check_mean(
    report: AuditReport, expected: Tensor, target: str, case: AuditCase, tolerance: float
) -> None:
    bias, size = float((report.mean - expected).norm()), float(expected.norm())
    allowed = tolerance * max(size, math.sqrt(report.variance), _SMALLEST_SCALE)
    assert bias <= allowed, (  # which a NaN is not
        f"{report.name} is biased for {target} ({case.name}, batches of {report.batch_size}): ‖E g"
        f" − target‖ = {bias:.6g}, ‖target‖ = {size:.6g}; allowed {allowed:.2g}."
        f" {report.verdict}\nRemedy: {_remedy(report, expected)}\n{_exact(report.executions)}"
    )


def _gradients(loss: Estimator, case: AuditCase, batch_size: int) -> Iterator[tuple[str, Tensor]]:
    """Every batch's texts and ∇loss [P]; one batch, the whole support, where the loss
    needs that.
    """
    if draws_random_numbers(loss):
        raise InputError(
            f"{name_of(loss)} draws random numbers, so a batch has no one gradient; compare with"
            " in_expectation=True."
        )
    loss = loss if takes_a_batch(loss) else adapted(loss, None)
    drawn_by = case.policy if case.behaviour is None else case.behaviour
    support = enumerate_support(drawn_by, prompt=case.problem.prompt).tokens
    wanted = needs_of(loss)
    distributions = "distributions" in wanted
    # scored once, with its graph: each batch is a few of these rows
    whole = score_batch(case.policy, [case.problem], [support], distributions=distributions)
    if case.behaviour is not None:
        drawn_at = token_log_probs(case.behaviour, support, case.problem.prompt).detach()
        whole = dataclasses.replace(whole, behaviour_log_probs=drawn_at)
    parameters = [parameter for parameter in case.policy.parameters() if parameter.requires_grad]
    everything = tuple(range(len(support)))
    complete = "support" in wanted
    batches = [everything] if complete else itertools.product(everything, repeat=batch_size)
    for rows in batches:
        batch = whole.pick(torch.tensor(rows))
        value = loss(dataclasses.replace(batch, complete=complete))
        gradients = torch.autograd.grad(
            value, parameters, retain_graph=True, materialize_grads=True
        )
        texts = str(case.problem.space.decode(support[list(rows)]))
        yield texts, torch.cat([gradient.reshape(-1).double() for gradient in gradients])


def _remedy(report: AuditReport, expected: Tensor) -> str:
    """What usually makes this bias."""
    size, batch_size = float(expected.norm()), report.batch_size
    rounding = TOLERANCE * max(size, math.sqrt(report.variance), _SMALLEST_SCALE)
    scale = float(report.mean @ expected) / size**2 if size else math.nan
    if float(report.mean.norm()) <= rounding:
        return (
            "its mean is 0, as that of ∇log π is on-policy: put the term into the reward, detached,"
            " times log π."
        )
    if len(expected) == 1 or not float((report.mean - scale * expected).norm()) <= rounding:
        return "audit_gradient or audit_value prints bias, angle and best scale for every target."
    usual = {
        -1.0: "the sign is wrong, or the ratio is upside down (π_old/π for π/π_old).",
        (batch_size - 1) / batch_size: (
            "the baseline includes the sequence itself, or a sum of squares is divided by B: leave"
            " it out, or use B − 1."
        ),
        float(batch_size): "the batch is summed; take the mean.",
    }
    found = [text for factor, text in usual.items() if math.isclose(scale, factor, rel_tol=1e-9)]
    hint = found[0] if found else "look for a factor that is too many or missing."
    return f"it follows the target times {scale:.6g}: {hint}"


def _exact(executions: int) -> str:
    return (
        f"Exact: {executions:,} outcomes enumerated, false-alarm probability 0; any bias above the"
        " tolerance is found."
    )


def _numbers(values: Tensor) -> str:
    """A vector for messages, its first six entries."""
    shown = ", ".join(f"{value:.6g}" for value in values[:6].tolist())
    return f"({shown}, …)" if len(values) > 6 else f"({shown})"
