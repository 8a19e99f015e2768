"""Any approximation held against an exact posterior.

    J(π) = E_π[r] − λ KL(π‖q),    gap = λ log Z − J(π) = λ KL(π‖π*)                              (1)

Exact: the sums over all sequences that the posterior gives (`Posterior.against`). By samples:
unbiased means over n sequences of the approximation and n of the posterior, the KLs taken exactly
at each step along them. Nats, reward units.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, overload

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.arguments import check_arguments, check_draw, describe
from klrl_edu.core.display import Cell, html_table, text_table
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import SUM_TOLERANCE, check_count, check_same_space
from klrl_edu.core.weighted import WeightedSequences
from klrl_edu.exact.posterior import Posterior
from klrl_edu.models.contract import (
    LanguageModel,
    conditional_log_probs,
    sequence_log_probs,
)


@dataclass(frozen=True)
class Comparison:
    """How far an approximation π is from π*; every KL in nats a sequence.

    Attributes:
        reverse_kl: KL(π‖π*), inf where π has mass and π* none (see `violating_mass`).
        forward_kl: KL(π*‖π), inf where π* has mass and π none (see `uncovered_mass`).
        total_variation: ½ Σ |π − π*|; None where the space was summed by contexts (see `compare`),
            which gives no sum of |·|.
        jensen_shannon: ½ KL(π‖m) + ½ KL(π*‖m), m = ½(π + π*); None likewise.
        expected_reward: E_π[r] over the prior's support, in reward units; rewards elsewhere do not
            exist and count 0.
        kl_to_prior: KL(π‖q).
        objective: J(π) = expected_reward − λ·kl_to_prior; −inf off the prior's support, at λ = 0
            too.
        objective_gap: λ log Z − J(π), computed as λ·reverse_kl (max r − J at λ = 0), which has no
            cancellation.
        log_evidence_error: log Ẑ − log Z in nats for weights; None for models, and for an exact
            table that sums to one, which say nothing of Z.
        effective_sample_size: per sample, in (0, 1]: 1/Σ π*²/π for a model used as a proposal,
            (Σw)²/(n Σw²) for particles. Sampled, it is the reciprocal of an unbiased mean, and so
            biased itself.
        uncovered_mass: π* mass where π has none.
        violating_mass: π mass where π* has none.
        sequences: None when exact, else how many were drawn from each side.
        standard_error: of each sampled metric; empty (all zero) when exact.
    """

    reverse_kl: float
    forward_kl: float
    total_variation: float | None
    jensen_shannon: float | None
    expected_reward: float
    kl_to_prior: float
    objective: float
    objective_gap: float
    log_evidence_error: float | None
    effective_sample_size: float
    uncovered_mass: float
    violating_mass: float
    sequences: int | None = None
    standard_error: dict[str, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether every number was enumerated."""
        return self.sequences is None

    @property
    def summary(self) -> str:
        """How far π is from π*, and why, in a sentence or two."""
        about = "" if self.exact else "about "
        what = "policy" if self.log_evidence_error is None else "approximation"
        if math.isfinite(self.reverse_kl):
            far = (
                f"The {what} is {about}{self.reverse_kl:.4g} nats from the posterior (KL(π‖π*)) and"
                f" earns {self.objective_gap:.4g} less than the best objective"
            )
            if self.uncovered_mass > 0:
                return (
                    f"{far}; it never gives sequences that hold {self.uncovered_mass:.3g} of the"
                    " posterior (uncovered_mass), so KL(π*‖π) is infinite."
                )
            return f"{far}; it covers the posterior (uncovered_mass 0) and stays on it."
        mass = f"{self.violating_mass:.3g} of the {what}'s mass (violating_mass)"
        if self.violating_mass == 0:  # it is there, or the divergence would be finite
            mass = f"some of the {what}'s mass, too little for a float,"
        if math.isinf(self.kl_to_prior):
            why = "lies where the prior has none: restrict_to_support keeps it off there"
        elif math.isinf(self.expected_reward):
            why = "lies on sequences that the reward forbids (-inf): restrict_to_support(policy,"
            why += " feasible_prior(problem)) keeps it off there"
        else:
            why = (
                "lies where the posterior has none, as at λ = 0, where the posterior is on the best"
                f" sequences alone; read objective_gap = {self.objective_gap:.4g} instead"
            )
        return f"KL(π‖π*) is infinite because {mass} {why}."

    def metrics(self) -> dict[str, float | None]:
        """Metric -> value."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("sequences", "standard_error")
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return {
            **self.metrics(),
            "sequences": self.sequences,
            "standard_error": dict(self.standard_error),
        }

    def __str__(self) -> str:
        return f"{text_table(*self._table())}\n\n{self.summary}"

    def _repr_html_(self) -> str:
        return f"{html_table(*self._table())}<p>{html.escape(self.summary)}</p>"

    def _table(self) -> tuple[list[str], list[list[Cell]]]:
        metrics = self.metrics()
        if self.exact:
            return ["metric", "exact value"], [[name, value] for name, value in metrics.items()]
        header = ["metric", f"mean of {self.sequences}", "standard error"]
        errors = self.standard_error
        return header, [[name, value, errors.get(name)] for name, value in metrics.items()]


@dataclass(frozen=True)
class Comparisons:
    """One comparison a problem, and their mean."""

    rows: tuple[Comparison, ...]

    @property
    def mean(self) -> dict[str, float]:
        """Metric -> mean over the problems (metrics that every row has)."""
        means = {}
        for name in self.rows[0].metrics():
            values = [row.metrics()[name] for row in self.rows]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                means[name] = math.fsum(known) / len(known)
        return means

    def to_dict(self) -> dict[str, Any]:
        """Rows and mean as plain numbers."""
        return {"rows": [row.to_dict() for row in self.rows], "mean": self.mean}

    def __str__(self) -> str:
        header = ["metric", *(f"problem {i}" for i in range(len(self.rows))), "mean"]
        lines: list[list[Cell]] = []
        for name, mean in self.mean.items():
            lines.append([name, *(row.metrics()[name] for row in self.rows), mean])
        return text_table(header, lines)


@overload
def compare(
    approximation: LanguageModel | WeightedSequences,
    target: Posterior,
    *,
    n: int | None = None,
    draw: Draw | None = None,
) -> Comparison: ...
@overload
def compare(
    approximation: LanguageModel | WeightedSequences,
    target: Sequence[Posterior],
    *,
    n: int | None = None,
    draw: Draw | None = None,
) -> Comparisons: ...
@torch.no_grad()
def compare(
    approximation: LanguageModel | WeightedSequences,
    target: Posterior | Sequence[Posterior],
    *,
    n: int | None = None,
    draw: Draw | None = None,
) -> Comparison | Comparisons:
    """Holds an approximation against one exact posterior, or a row each against several.

    Args:
        approximation: a policy, or weighted sequences such as a sampler's particles.
        target: the posterior(s), on the same space.
        n: None for exact numbers: on the enumerated support, or, where the posterior is one by
            forward–backward of an n-gram prior and the policy is an n-gram, context by context;
            otherwise sequences to draw from each side (models only), at least 2.
        draw: the randomness for `n`.

    Raises:
        InputError: an argument of another kind; another space; a prompt that the model does not
            read; a policy whose log-probabilities are NaN; an exact comparison with a posterior
            that was not enumerated; `n` without `draw`.
    """
    if isinstance(target, Iterable):
        rows = tuple(compare(approximation, one, n=n, draw=draw) for one in target)
        if not rows:
            raise InputError("compare(policy, target): target is empty; give at least one.")
        return Comparisons(rows)
    check_arguments(
        "compare(policy, target)",
        policy=(approximation, (LanguageModel, WeightedSequences)),
        target=(target, Posterior),
    )
    if isinstance(approximation, LanguageModel):
        approximation.check_prompt(target.problem.prompt)
    check_same_space(approximation.space, target.problem.space, "approximation and target")
    if n is None:
        return _exact(approximation, target)
    if draw is None or isinstance(approximation, WeightedSequences):
        raise InputError(
            "compare by samples takes a model, n= and draw=, e.g. draw=seeded_draw(0); weighted"
            " sequences are compared exactly."
        )
    check_draw(draw)
    return _sampled(approximation, target, check_count(n, "n", 2), draw)


def _exact(approximation: LanguageModel | WeightedSequences, target: Posterior) -> Comparison:
    """Every number from the posterior's exact sums; weighted particles know log Z and their own
    effective sample size.
    """
    sums, kl_coef = target.against(approximation), target.problem.kl_coef
    reverse_kl, kl_to_prior = float(sums.reverse_kl), float(sums.kl_to_prior)
    _refuse_nan(sums.reverse_kl, approximation)
    # J as defined; its gap to the best is taken from the divergence, which cancels nothing
    objective = float(sums.expected_reward) - _product(kl_coef, kl_to_prior)
    # the second moment of π*/π under π is Σ π*²/π
    log_evidence_error, sample_size = None, math.exp(-float(sums.log_second_moment))
    if isinstance(approximation, WeightedSequences):
        log_evidence = float(approximation.log_evidence)
        # an exact table that sums to one is a distribution, as a model is, and says nothing of Z
        if not approximation.exact or abs(log_evidence) > SUM_TOLERANCE:
            log_evidence_error = log_evidence - float(target.log_evidence)
        if not approximation.exact:
            # drawn particles: of their own weights, not as a proposal
            sample_size = float(approximation.effective_sample_size) / len(approximation)
    return Comparison(
        reverse_kl=reverse_kl,
        forward_kl=float(sums.forward_kl),
        total_variation=_or_none(sums.total_variation),
        jensen_shannon=_or_none(sums.jensen_shannon),
        expected_reward=float(sums.expected_reward),
        kl_to_prior=kl_to_prior,
        objective=objective,
        objective_gap=_gap(reverse_kl, kl_coef, float(target.value), objective),
        log_evidence_error=log_evidence_error,
        effective_sample_size=sample_size,
        uncovered_mass=float(sums.uncovered_mass),
        violating_mass=float(sums.violating_mass),
    )


def _refuse_nan(values: Tensor, approximation: LanguageModel | WeightedSequences) -> None:
    """A table of NaN would say nothing, and look like a result."""
    if bool(torch.isnan(values).any()):
        raise InputError(
            f"compare(policy, target): the policy, {describe(approximation)}, gives NaN for"
            " log-probabilities: weights that are NaN, or a forward() that divides 0 by 0. Take the"
            " weights of an earlier step, or train again with a lower lr."
        )


def _or_none(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


def _product(kl_coef: float, kl: float) -> float:
    """λ·KL by its limits: at λ = 0 a finite divergence costs nothing, at λ = inf only none is free,
    and off q's support no λ helps.
    """
    if math.isinf(kl):
        return math.inf
    return 0.0 if kl_coef == 0 or kl == 0 else kl_coef * kl


def _gap(reverse_kl: float, kl_coef: float, value: float, objective: float) -> float:
    """(1), and where λ = 0, or π* underflowed to zero under a finite reward, the plain
    difference.
    """
    if kl_coef > 0 and math.isfinite(reverse_kl):
        return _product(kl_coef, reverse_kl)
    return value - objective


def _sampled(approximation: LanguageModel, target: Posterior, n: int, draw: Draw) -> Comparison:
    """Unbiased means: under π for what π averages, under π* for what π* averages."""
    problem = target.problem
    mine = approximation.sample(n, draw=draw, prompt=problem.prompt)
    theirs = target.model.sample(n, draw=draw, prompt=problem.prompt)
    pi, star = _both_log_probs(approximation, target, mine)
    _refuse_nan(pi, approximation)
    log_ratio = pi - sequence_log_probs(problem.prior, mine, problem.prompt)  # u [n]
    inside = log_ratio < math.inf
    rewards = torch.zeros_like(pi)
    rewards[inside] = problem.rewards(mine[inside])  # elsewhere a reward need not exist
    # under π* too: where π is thin its own samples hardly come
    pi_there, star_there = _both_log_probs(approximation, target, theirs)
    # the Jensen–Shannon divergence has a half under each; the two samples are independent
    js_mine, mine_error = _mean(pi - _middle(pi, star))
    js_theirs, theirs_error = _mean(star_there - _middle(pi_there, star_there))
    weight, weight_error = _mean(torch.exp(star_there - pi_there))  # E_π*[π*/π]
    values = {
        # whole next-token laws at each step: log-ratios would add the noise of what was drawn
        "reverse_kl": _mean(_stepwise_kl(approximation, target.model, mine, problem.prompt)),
        "forward_kl": _mean(_stepwise_kl(target.model, approximation, theirs, problem.prompt)),
        # Σ (π − π*)₊ = E_π[(1 − π*/π)₊]; expm1 keeps the digits where both nearly agree
        "total_variation": _mean((-torch.expm1(star - pi)).clamp(min=0)),
        "jensen_shannon": ((js_mine + js_theirs) / 2, math.hypot(mine_error, theirs_error) / 2),
        "expected_reward": _mean(rewards),
        "kl_to_prior": _mean(log_ratio),
        # by sample, so that the error knows how r and u move together
        "objective": _mean(rewards - _penalty(problem.kl_coef, log_ratio)),
        # of a reciprocal, by the delta method
        "effective_sample_size": (1 / weight, weight_error / weight**2),
        "uncovered_mass": _mean((pi_there == -math.inf).double()),
        "violating_mass": _mean((star == -math.inf).double()),
    }
    (reverse_kl, reverse_kl_error), (objective, objective_error) = (
        values["reverse_kl"],
        values["objective"],
    )
    gap = _gap(reverse_kl, problem.kl_coef, float(target.value), objective)
    # the error of whichever of the two the gap was taken from
    gap_error = problem.kl_coef * reverse_kl_error if problem.kl_coef > 0 else objective_error
    values["objective_gap"] = (gap, gap_error)
    means = {name: value for name, (value, _) in values.items()}
    errors = {name: error for name, (_, error) in values.items()}
    return Comparison(log_evidence_error=None, sequences=n, standard_error=errors, **means)


def _both_log_probs(
    approximation: LanguageModel, target: Posterior, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """log π and log π* of sequences [n,T]: [n] each, in nats."""
    prompt = target.problem.prompt
    mine = sequence_log_probs(approximation, tokens, prompt)
    return mine, sequence_log_probs(target.model, tokens, prompt)


def _stepwise_kl(
    drawn_from: LanguageModel, other: LanguageModel, tokens: Tensor, prompt: Tensor | None
) -> Tensor:
    """Σ_t KL(drawn_from(·|y_<t)‖other(·|y_<t)) [n] along its own samples [n,T]: unbiased for the KL
    by the chain rule, and 0 where they agree.
    """
    mine, theirs = (conditional_log_probs(model, tokens, prompt) for model in (drawn_from, other))
    divergence = logspace.kl_divergence(mine, theirs)
    return torch.where(drawn_from.space.live(tokens), divergence, 0.0).sum(-1)


def _middle(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log ½(p + q), in nats."""
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _penalty(kl_coef: float, log_ratio: Tensor) -> Tensor:
    """λu [n], whose mean is λ·KL; at λ = inf any divergence costs inf, whatever the sign of one
    sample's u.
    """
    if kl_coef == math.inf:
        return torch.where(log_ratio == 0, 0.0, math.inf)
    # at λ = 0 as well, where the product would be NaN
    return torch.where(torch.isinf(log_ratio), math.inf, kl_coef * log_ratio)


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and standard error; infinite values make both inf."""
    if not bool(torch.isfinite(values).all()):
        return float(values.mean()), math.inf
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
