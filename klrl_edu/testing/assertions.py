"""Exact assertions about estimators: every batch is enumerated and nothing is drawn, so that a
false alarm has probability 0.

    E[g] = target,     g_a = g_b on every batch,     E‖g − E g‖² ≤ bound                         (1)

An estimator is a loss (Batch -> scalar, of which the gradient is meant) or a function of log-ratios
u [N] -> estimates [N]. Without a policy and a problem of one's own, an assertion goes through
`standard_cases`. B batch size, N samples, S sequences, P parameters.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from klrl_edu.audit.adapting import (
    Adapter,
    adapted,
    draws_random_numbers,
    name_of,
    parameters_of,
    takes_a_batch,
)
from klrl_edu.audit.audit import MAX_EXECUTIONS, audit_gradient, audit_value
from klrl_edu.audit.cases import AuditCase
from klrl_edu.audit.executions import check_executions
from klrl_edu.audit.plans import planned
from klrl_edu.audit.report import AuditReport
from klrl_edu.audit.rounding import SAFETY, nudged_batches
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import as_numbers
from klrl_edu.core.validation import check_number
from klrl_edu.learning.batches import Batch, check_loss, needs_of
from klrl_edu.models.contract import LanguageModel, conditional_log_probs, token_log_probs
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem, check_problems
from klrl_edu.problems.rewards import table_reward, token_reward

__tracebackhide__ = True  # pytest shows the line that asserts, and no frame of this module

Estimator = Callable[..., Tensor]  # Batch -> scalar, or u [N] -> [N]

TOLERANCE = 1e-12


def standard_cases() -> list[AuditCase]:
    """Four small ones, none with λ = 1: sequences of zero mass, several lengths with EOS, four free
    tokens, ties, rewards from −11 to 12, log-ratios from −12 to 22 nats, rewards by token, logits
    by prefix, two problems in one batch.
    """
    return [
        AuditCase("four sentences at λ = 0.5", four_sentences_policy(), four_sentences(0.5)),
        _long_texts(),
        _rows_of_logits(),
        _two_problems(),
    ]


def _long_texts() -> AuditCase:
    """Four tokens that are free where they come, and numbers that no clamp in use leaves alone."""
    #         the prior's probability, log π/q but for a constant, the reward
    rows = {
        "b": (0.3, -12.0, 1.0),
        "a": (0.25, 0.2, -11.0),
        "a a b": (0.45, -0.5, 12.0),
        "a a a": (1e-6, 12.5, 0.5),
        "a a a a": (1e-10, 22.0, 0.5),
    }
    prior = SequenceTable.from_texts(
        # a sequence in the prior's table, and without mass there
        {"b b": 0.0, **{text: mass for text, (mass, _, _) in rows.items()}},
        normalize=True,
    )
    values = {text: value for text, (_, _, value) in rows.items()}
    problem = Problem(prior, table_reward({"b b": 0.0, **values}, prior.space), 2.0)
    # clamps in use stand at 2, 5, 10 and 20 nats, so u goes past all of them; e^{−u} does not go
    # beyond e^{12}, which keeps twelve digits of every mean
    tilt = torch.tensor([log_ratio for _, log_ratio, _ in rows.values()], dtype=torch.float64)
    # without "b b", where the prior has no mass
    policy = SequenceTable(prior.space, prior.tokens[1:], prior.logits.detach()[1:] + tilt)
    return AuditCase("texts of 1 to 4 words at λ = 2", policy, problem)


def _rows_of_logits() -> AuditCase:
    prior = SequenceTable.from_texts({"": 0.1, "x": 0.3, "x x": 0.2, "x y": 0.4})
    problem = Problem(prior, token_reward([0.5, -1.0, 0.25], prior.space), 0.25)
    table = PrefixTable(prior.space, prior.tokens)
    logits = torch.linspace(-1, 1, table.logits.numel(), dtype=torch.float64)
    table.logits.data.copy_(logits.reshape(table.logits.shape))
    policy = restrict_to_support(table, prior)
    return AuditCase("a row of logits a prefix at λ = 0.25", policy, problem)


def _two_problems() -> AuditCase:
    """Rewards of another level and another λ: a baseline, a mean or a λ that belongs to one problem
    does not fit the other.
    """
    prior = SequenceTable.from_texts({"": 0.2, "u": 0.3, "u v": 0.5})
    of_one = table_reward({"": 3.0, "u": 1.0, "u v": 2.5}, prior.space)
    of_other = table_reward({"": -4.0, "u": -1.5, "u v": -4.0}, prior.space)
    policy = SequenceTable(prior.space, prior.tokens, torch.tensor([0.4, -0.6, 0.1]))
    return AuditCase(
        "two problems in a batch, at λ = 0.5 and 3",
        policy,
        Problem(prior, of_one, 0.5),
        others=(Problem(prior, of_other, 3.0),),
    )


@dataclasses.dataclass(frozen=True)
class _Batches:
    """How batches are made: the arguments that all assertions share."""

    size: int
    adapt: Adapter | None = None
    micro_batches: int | None = None
    ordered: bool = False

    @property
    def places_count(self) -> bool:
        return self.micro_batches is not None or self.ordered


def assert_unbiased(
    estimator: Estimator,
    target: str | float | Tensor,
    policy: LanguageModel | None = None,
    problem: Problem | Sequence[Problem] | None = None,
    *,
    batch_size: int = 2,
    behaviour: LanguageModel | None = None,
    adapt: Adapter | None = None,
    micro_batches: int | None = None,
    ordered: bool = False,
    tolerance: float = TOLERANCE,
) -> None:
    """The expectation over all batches is the target.

    Args:
        estimator: a loss, or a function of log-ratios.
        target: a name among the audit's targets ("objective", "expected_reward", "reverse_kl",
            "forward_kl", …: for a loss the gradient to descend, for a function of log-ratios the
            value in nats), or the gradient [P] or number itself.
        policy, problem: what to try it on; by default each of `standard_cases`. Several problems
            stand in one batch, and the target is the mean over them.
        batch_size: B sequences a problem; a leave-one-out baseline needs 2.
        behaviour: the policy that draws the batches; by default `policy`.
        adapt: what parameters of other names of a loss are, as for `audit_gradient`.
        micro_batches: the loss splits each problem's sequences into so many parts in a row.
        ordered: every place in a batch counts.
        tolerance: of the bias, from 0 to 1, relative to the larger of ‖target‖ and the estimator's
            standard deviation; about 1e-5 for a policy in float32. What rounding alone may have
            done (`AuditReport.rounding`) is no bias.

    Raises:
        AssertionError: the estimator is biased; the message says by how much, and holds the
            audit's report.
        InputError: an unknown target, or one that is infinite here.
    """
    _check_tolerance(tolerance)
    name = target if isinstance(target, str) else "the target given"
    expected = target if isinstance(target, str) else _numbers_given(target)
    batches = _Batches(batch_size, adapt, micro_batches, ordered)
    for case in _cases(policy, problem, behaviour, estimator):
        report = _audit(estimator, case, batches)
        _check_mean(report, _target(report, expected), name, case, tolerance)


def assert_same_gradient(
    loss: Estimator,
    other: Estimator,
    policy: LanguageModel | None = None,
    problem: Problem | Sequence[Problem] | None = None,
    *,
    batch_size: int = 2,
    behaviour: LanguageModel | None = None,
    adapt: Adapter | None = None,
    micro_batches: int | None = None,
    ordered: bool = False,
    in_expectation: bool = False,
    tolerance: float = TOLERANCE,
) -> None:
    """Two losses have the same gradient on every batch, or `in_expectation` only.

    Args:
        loss, other: Batch -> scalar.
        policy, problem, batch_size, behaviour, micro_batches: as in `assert_unbiased`.
        adapt: what parameters of `loss` are; those of `other` go by their names.
        ordered: compare in every order of a batch; by default it stands in two, one the reverse of
            the other.
        in_expectation: compare the means over batches instead, which leaves the variances free.
        tolerance: of the difference, relative to the largest gradient of `other` (or to its
            standard deviation, in expectation).

    Raises:
        AssertionError: they differ; the message has the batch and both gradients, or the audit's
            report.
    """
    _check_tolerance(tolerance)
    batches = _Batches(batch_size, adapt, micro_batches, ordered)
    for case in _cases(policy, problem, behaviour, loss, other):
        if not in_expectation:
            _check_every_batch(loss, other, case, batches, tolerance)
            continue
        expected = _audit(other, case, dataclasses.replace(batches, adapt=None))
        report = _audit(loss, case, batches)
        _check_mean(report, expected.mean, f"the mean gradient of {expected.name}", case, tolerance)


def assert_variance_at_most(
    estimator: Estimator,
    bound: float | Estimator,
    policy: LanguageModel | None = None,
    problem: Problem | Sequence[Problem] | None = None,
    *,
    batch_size: int = 2,
    behaviour: LanguageModel | None = None,
    adapt: Adapter | None = None,
    micro_batches: int | None = None,
    ordered: bool = False,
    tolerance: float = TOLERANCE,
) -> None:
    """The total variance E‖g − E g‖² over all batches is at most a number, or at most another
    estimator's on the same batches.

    Args:
        estimator: a loss, or a function of log-ratios.
        bound: a variance (reward units squared a squared coordinate, or nats²), or another
            estimator.
        policy, problem, batch_size, behaviour, micro_batches, ordered: as in `assert_unbiased`.
        adapt: what parameters of `estimator` are; those of `bound` go by their names.
        tolerance: relative to the bound, for rounding.

    Raises:
        AssertionError: the variance is larger; the message holds the audit's report.
    """
    _check_tolerance(tolerance)
    if not callable(bound):
        rule = "a variance, at least 0 and finite, or an estimator to be no noisier than"
        bound = check_number(bound, "bound", rule, lambda value: 0 <= value < math.inf)
    batches = _Batches(batch_size, adapt, micro_batches, ordered)
    others = [bound] if callable(bound) else []
    for case in _cases(policy, problem, behaviour, estimator, *others):
        report = _audit(estimator, case, batches)
        limit = (
            _audit(bound, case, dataclasses.replace(batches, adapt=None)).variance
            if callable(bound)
            else bound
        )
        if not report.variance <= limit + max(tolerance * limit, report.rounding**2):
            raise AssertionError(
                f"{report.name} has variance {report.variance:.9g} ({case.name}, batches of"
                f" {batch_size}); expected at most"
                f" {limit:.9g}{f', that of {name_of(bound)}' if callable(bound) else ''}."
                f"\n{report}\nRemedy: subtract a baseline that does not depend on the sequence"
                f" itself, or raise batch_size.\n{_exact(report.executions)}"
            )


# --- what the assertions share --------------------------------------------------------------------


def _check_tolerance(tolerance: float) -> None:
    # from 1 on, an estimator that is 0 would pass for any target
    rule = "a relative error, at least 0 and below 1, such as 1e-12 (1e-5 in float32)"
    check_number(tolerance, "tolerance", rule, lambda value: 0 <= value < 1)


def _cases(
    policy: LanguageModel | None,
    problem: Problem | Sequence[Problem] | None,
    behaviour: LanguageModel | None,
    *estimators: Estimator,
) -> list[AuditCase]:
    if policy is not None and problem is not None:
        first, *others = check_problems(problem)
        return [AuditCase("the problem given", policy, first, behaviour, tuple(others))]
    if policy is not None or problem is not None:
        raise InputError("give both policy and problem, or neither for the standard cases.")
    cases = [case._replace(behaviour=behaviour) for case in standard_cases()]
    if any("beta" in parameters_of(estimator) for estimator in estimators):
        # one number for the whole batch: rewards may differ between its problems, λ may not
        return [_with_one_kl_coef(case) for case in cases]
    return cases


def _with_one_kl_coef(case: AuditCase) -> AuditCase:
    kl_coef = case.problem.kl_coef
    others = tuple(dataclasses.replace(other, kl_coef=kl_coef) for other in case.others)
    return case._replace(others=others)


def _audit(estimator: Estimator, case: AuditCase, batches: _Batches) -> AuditReport:
    options: dict[str, Any] = {
        "batch_size": batches.size,
        "behaviour": case.behaviour,
        "adapt": batches.adapt,
    }
    if batches.adapt is not None or not _reads_log_ratios(estimator):
        return audit_gradient(
            estimator,
            case.policy,
            case.problems,
            micro_batches=batches.micro_batches,
            ordered=batches.ordered,
            **options,
        )
    if batches.places_count:
        raise InputError(
            f"{name_of(estimator)} is a function of log-ratios, where places mean nothing; leave"
            " micro_batches and ordered out."
        )
    return audit_value(estimator, case.policy, case.problems, **options)


def _reads_log_ratios(estimator: Estimator) -> bool:
    """Whether it maps u [N] rather than a Batch: a loss asks its argument for fields, which a
    tensor has not.
    """
    # two of them, equal to 0: every divergence estimator is defined there
    try:
        estimator(torch.zeros(2, dtype=torch.float64))
    except (AttributeError, TypeError):
        return False
    return True


def _numbers_given(target: float | Tensor) -> Tensor:
    """A target of the user's own as a vector."""
    if isinstance(target, Tensor | list | tuple):
        is_complex = isinstance(target, Tensor) and target.is_complex()
        # a cast would drop the imaginary part
        expected = torch.tensor(math.nan) if is_complex else as_numbers(target, "target").detach()
        if not bool(torch.isfinite(expected).all()):
            raise InputError(f"target = {target!r} must be finite real numbers.")
        return expected.reshape(-1).double()
    rule = "a finite number, a gradient, or the name of a target"
    return torch.tensor([check_number(target, "target", rule, math.isfinite)], dtype=torch.float64)


def _target(report: AuditReport, target: str | Tensor) -> Tensor:
    if isinstance(target, Tensor):
        if target.shape != report.mean.shape:
            raise InputError(
                f"target has {target.numel()} entries; expected {report.mean.numel()}"
                f" ({report.coordinates})."
            )
        return target
    if not bool(torch.isfinite(report.targets.get(target, torch.tensor(math.inf))).all()):
        raise InputError(
            f"target {target!r} is unknown or infinite here; choose from"
            f" {', '.join(report.targets)}, or give the numbers."
        )
    return report.targets[target]


def _check_mean(
    report: AuditReport, expected: Tensor, target: str, case: AuditCase, tolerance: float
) -> None:
    bias, size = float((report.mean - expected).norm()), float(expected.norm())
    # where target and noise are both 0, rounding is all that is left of them
    allowed = max(tolerance * max(size, math.sqrt(report.variance)), report.rounding)
    if not bias <= allowed:  # as of a NaN
        raise AssertionError(
            f"{report.name} is biased for {target} ({case.name}, batches of {report.batch_size}):"
            f" ‖E g − target‖ = {bias:.6g}, ‖target‖ = {size:.6g}; allowed {allowed:.2g}.\n{report}"
            f"\nRemedy: {_remedy(report, expected, len(case.problems))}"
            f"\n{_exact(report.executions)}"
        )


def _check_every_batch(
    loss: Estimator, other: Estimator, case: AuditCase, batches: _Batches, tolerance: float
) -> None:
    """Two losses, batch by batch."""
    comparison = _Comparison.of(loss, other, case, batches)
    mine, theirs = comparison.gradients()
    difference = (mine - theirs).norm(dim=-1)
    allowed = tolerance * float(theirs.norm(dim=-1).max())
    if bool((difference <= allowed).all()):
        return
    # dear, and hardly ever wanted: only now
    allowed = max(allowed, comparison.rounding(theirs))
    bad = (~(difference <= allowed)).nonzero()  # a NaN is bad too
    if len(bad):
        k = int(bad[0])
        raise AssertionError(
            f"{name_of(loss)} and {name_of(other)} differ on {len(bad)} of {len(difference)}"
            f" batches ({case.name}); on {comparison.texts(k)} the gradients are"
            f" {_numbers(mine[k])} and {_numbers(theirs[k])}; allowed {allowed:.2g}.\nRemedy:"
            " compare the advantage of each sequence in this batch; in_expectation=True compares"
            f" the means only.\n{_exact(len(difference))}"
        )


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Two losses on the same batches.

    Attributes:
        functions: both, of a Batch.
        case: policy and problems.
        whole: every sequence that can be drawn, with the policy's graph, scored once: a batch is a
            few of its rows.
        rows: the batches [X,B].
        complete: there is one batch, the whole support.
    """

    functions: tuple[Estimator, Estimator]
    case: AuditCase
    whole: Batch
    rows: Tensor
    complete: bool

    @classmethod
    def of(
        cls, loss: Estimator, other: Estimator, case: AuditCase, batches: _Batches
    ) -> "_Comparison":
        """Enumerates the batches.

        Raises:
            InputError: a loss that draws random numbers, or only one needs the whole support.
        """
        for one in (loss, other):
            if draws_random_numbers(one):
                raise InputError(
                    f"{name_of(one)} draws random numbers, so a batch has no one gradient; compare"
                    " with in_expectation=True."
                )
        functions = _on_batches(loss, batches.adapt), _on_batches(other, None)
        asked = [needs_of(function) for function in functions]
        if ("support" in asked[0]) != ("support" in asked[1]):
            raise InputError(
                f"one of {name_of(loss)} and {name_of(other)} runs on the whole support and the"
                " other on samples, so no batch is given to both; compare with"
                " in_expectation=True."
            )
        plan = planned(
            case.problems,
            batches.size,
            case.behaviour,
            asked[0] | asked[1],
            batches.micro_batches,
            ordered=batches.ordered,
        )
        scene, _ = plan.scene(case.policy, MAX_EXECUTIONS)
        if plan.complete:
            rows = torch.arange(len(scene.whole.tokens))[None]
        else:
            check_executions(scene.drawn, plan.block, MAX_EXECUTIONS, plan.micro_batches)
            rows, _ = scene.every_batch(plan.block, plan.micro_batches)
            # of the other orders one: a loss that reads places differs there
            reversed_rows = rows.unflatten(1, (-1, plan.block)).flip(-1).flatten(1)
            rows = torch.unique(torch.cat([rows, reversed_rows]), dim=0)
        whole = _with_graph(scene.whole, case.policy, distributions=plan.distributions)
        return cls(functions, case, whole, rows, plan.complete)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """∇ of both on every batch, [X,P] each."""
        mine, theirs = (self._gradients(function, self.whole) for function in self.functions)
        return mine, theirs

    def rounding(self, theirs: Tensor) -> float:
        """How far rounding of what it reads may move a gradient of the other loss, [X,P]."""
        exact = dataclasses.replace(self.whole, log_probs=self.whole.log_probs.detach())
        moved = []
        for nudged in nudged_batches(exact, torch.float64):
            # the numbers are moved, the graph behind them stays
            shift = nudged.log_probs - exact.log_probs
            batch = dataclasses.replace(nudged, log_probs=self.whole.log_probs + shift)
            again = self._gradients(self.functions[1], batch)
            moved.append(float((again - theirs).norm(dim=-1).max()))
        return SAFETY * max(moved)

    def texts(self, k: int) -> str:
        """The sequences of a batch."""
        return str(self.case.problem.space.decode(self.whole.tokens[self.rows[k]]))

    def _gradients(self, function: Estimator, whole: Batch) -> Tensor:
        parameters = [p for p in self.case.policy.parameters() if p.requires_grad]
        found = []
        # plain backward passes: what the audit does by vmap and in closed form is not relied on
        for rows in self.rows:
            value = function(dataclasses.replace(whole.pick(rows), complete=self.complete))
            check_loss(value)
            gradients = torch.autograd.grad(
                value, parameters, retain_graph=True, materialize_grads=True
            )
            found.append(torch.cat([gradient.reshape(-1).double() for gradient in gradients]))
        return torch.stack(found)


def _on_batches(loss: Estimator, adapt: Adapter | None) -> Estimator:
    """The loss as a function of a Batch."""
    return loss if adapt is None and takes_a_batch(loss) else adapted(loss, adapt)


def _with_graph(whole: Batch, policy: LanguageModel, *, distributions: bool) -> Batch:
    """The batch with log-probabilities that carry the policy's gradient."""
    if not distributions:
        log_probs = token_log_probs(policy, whole.tokens, whole.prompt)
        return dataclasses.replace(whole, log_probs=log_probs)
    log_dists = conditional_log_probs(policy, whole.tokens, whole.prompt)
    log_probs = log_dists.gather(-1, whole.tokens[..., None]).squeeze(-1)
    return dataclasses.replace(whole, log_probs=log_probs, log_dists=log_dists)


def _remedy(report: AuditReport, expected: Tensor, problems: int) -> str:
    """What usually makes this bias."""
    size, batch_size = float(expected.norm()), report.batch_size
    # not the user's tolerance: whether a factor is exactly ½ is a matter of rounding
    rounding = max(TOLERANCE * max(size, math.sqrt(report.variance)), report.rounding)
    # the multiple of the target that comes closest to the mean
    scale = float(report.mean @ expected) / size**2 if size else math.nan
    if float(report.mean.norm()) <= rounding:
        return (
            "its mean is 0, as that of ∇log π is on-policy: put the term into the reward, detached,"
            " times log π."
        )
    if len(expected) == 1 or not float((report.mean - scale * expected).norm()) <= rounding:
        more = "; a baseline or a λ may be another problem's" if problems > 1 else ""
        return f"the table has bias, angle and best scale for every target{more}."
    usual = {
        -1.0: "the sign is wrong, or the ratio is upside down (π_old/π for π/π_old).",
        (batch_size - 1) / batch_size: (
            "the baseline includes the sequence itself, or a sum of squares is divided by B: leave"
            " it out, or use B − 1."
        ),
        float(batch_size * problems): "the batch is summed; take the mean.",
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
