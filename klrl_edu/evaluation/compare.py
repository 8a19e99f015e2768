"""Any approximation held against an exact posterior.

    J(π) = E_π[r] − λ KL(π‖q),    gap = λ log Z − J(π) = λ KL(π‖π*)                              (1)

Exact: both distributions on the prior's support, and one outcome more for whatever mass the
approximation has elsewhere. The mass elsewhere is summed edge by edge along the trie, so it is
exactly 0 for a restricted policy and exact for a tiny one. By samples: unbiased means over n
sequences of the approximation and n of the posterior, the KLs taken exactly at each step along
them. K supported sequences, nats, reward units.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, overload

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.arguments import check_arguments, check_draw
from klrl_edu.core.display import Cell, html_table, text_table
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.core.validation import check_count, check_same_space
from klrl_edu.core.weighted import WeightedSequences
from klrl_edu.exact.posterior import Posterior
from klrl_edu.exact.structured import StructuredPosterior
from klrl_edu.models.contract import (
    LanguageModel,
    advance,
    batch_prompt,
    block_size,
    conditional_log_probs,
    force_eos,
    sequence_log_probs,
)
from klrl_edu.models.ngram import NGramModel
from klrl_edu.models.table import SequenceTable


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
        log_evidence_error: log Ẑ − log Z in nats for weighted particles; None for models.
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
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[list[str], list[list[Cell]]]:
        if self.exact:
            return ["metric", "exact value"], [
                [name, value] for name, value in self.metrics().items()
            ]
        header = ["metric", f"mean of {self.sequences}", "standard error"]
        return header, [
            [name, value, self.standard_error.get(name)] for name, value in self.metrics().items()
        ]


@dataclass(frozen=True)
class Comparisons:
    """One comparison a problem, and their mean."""

    rows: tuple[Comparison, ...]

    @property
    def mean(self) -> dict[str, float]:
        """Metric -> mean over the problems (metrics that every row has)."""
        columns = {
            name: [row.metrics()[name] for row in self.rows] for name in self.rows[0].metrics()
        }
        return {
            name: math.fsum(v for v in values if v is not None) / len(values)
            for name, values in columns.items()
            if None not in values
        }

    def to_dict(self) -> dict[str, Any]:
        """Rows and mean as plain numbers."""
        return {"rows": [row.to_dict() for row in self.rows], "mean": self.mean}

    def __str__(self) -> str:
        header = ["metric", *(f"problem {i}" for i in range(len(self.rows))), "mean"]
        return text_table(
            header,
            [
                [name, *(row.metrics()[name] for row in self.rows), mean]
                for name, mean in self.mean.items()
            ],
        )


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
            read; an exact comparison with a posterior that was not enumerated; `n` without `draw`.
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
        if (
            target.support is None
            and isinstance(approximation, NGramModel)
            and isinstance(target.model, StructuredPosterior)
        ):
            return _by_context(approximation, target, target.model)
        return _exact(approximation, target)
    if draw is None or isinstance(approximation, WeightedSequences):
        raise InputError(
            "compare by samples takes a model, n= and draw=, e.g. draw=seeded_draw(0); weighted"
            " sequences are compared exactly."
        )
    check_draw(draw)
    return _sampled(approximation, target, check_count(n, "n", 2), draw)


def _exact(approximation: LanguageModel | WeightedSequences, target: Posterior) -> Comparison:
    support, kl_coef = target.enumerated(), target.problem.kl_coef
    on_support, elsewhere = support_log_mass(
        approximation, support.tokens, support.trie, target.problem.prompt
    )
    none = elsewhere.new_full((1,), -math.inf)
    log_pi = torch.cat([on_support, elsewhere.reshape(1)])
    log_star, log_q = torch.cat([target.log_probs, none]), torch.cat([support.log_prior, none])
    rewards = torch.cat([support.rewards, torch.zeros_like(none)])
    middle = torch.logaddexp(log_pi, log_star) - math.log(2)
    reverse_kl, kl_to_prior = (
        logspace.kl_divergence(log_pi, log_star),
        logspace.kl_divergence(log_pi, log_q),
    )
    expected_reward = logspace.expectation(log_pi, rewards)
    objective = float(expected_reward) - _product(kl_coef, float(kl_to_prior))
    violating, uncovered = log_star == -math.inf, log_pi == -math.inf
    particles = isinstance(approximation, WeightedSequences) and not approximation.exact
    return Comparison(
        reverse_kl=float(reverse_kl),
        forward_kl=float(logspace.kl_divergence(log_star, log_pi)),
        total_variation=float((log_pi.exp() - log_star.exp()).abs().sum()) / 2,
        jensen_shannon=float(
            logspace.kl_divergence(log_pi, middle) + logspace.kl_divergence(log_star, middle)
        )
        / 2,
        expected_reward=float(expected_reward),
        kl_to_prior=float(kl_to_prior),
        objective=objective,
        objective_gap=_gap(float(reverse_kl), kl_coef, float(target.value), objective),
        log_evidence_error=_evidence_error(approximation, target),
        effective_sample_size=(
            _particle_ess(approximation) if particles else _proposal_ess(log_pi, log_star)
        ),
        uncovered_mass=float(log_star[uncovered].exp().sum()),
        violating_mass=float(log_pi[violating].exp().sum()),
    )


def _by_context(policy: NGramModel, target: Posterior, star: StructuredPosterior) -> Comparison:
    """Every sum over sequences as a sweep over the triples (policy's context, prior's context,
    automaton's state) that are reached.
    """
    kl_coef, sums = target.problem.kl_coef, star.against(policy)
    objective = float(sums.expected_reward) - _product(kl_coef, float(sums.kl_to_prior))
    return Comparison(
        reverse_kl=float(sums.reverse_kl),
        forward_kl=float(sums.forward_kl),
        total_variation=None,
        jensen_shannon=None,
        expected_reward=float(sums.expected_reward),
        kl_to_prior=float(sums.kl_to_prior),
        objective=objective,
        objective_gap=_gap(float(sums.reverse_kl), kl_coef, float(target.value), objective),
        log_evidence_error=None,
        effective_sample_size=math.exp(-float(sums.log_second_moment)),
        uncovered_mass=float(sums.uncovered_mass),
        violating_mass=float(sums.violating_mass),
    )


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


def _evidence_error(
    approximation: LanguageModel | WeightedSequences, target: Posterior
) -> float | None:
    if not isinstance(approximation, WeightedSequences):
        return None
    return float(approximation.log_evidence - target.log_evidence)


def _particle_ess(approximation: LanguageModel | WeightedSequences) -> float:
    assert isinstance(approximation, WeightedSequences)
    return float(approximation.effective_sample_size) / len(approximation)


def _proposal_ess(log_pi: Tensor, log_star: Tensor) -> float:
    """1/Σ π*²/π; 0 where π misses mass of π*."""
    covered = log_star > -math.inf
    return math.exp(-float(logspace.logsumexp(2 * log_star[covered] - log_pi[covered])))


def support_log_mass(
    approximation: LanguageModel | WeightedSequences,
    tokens: Tensor,
    trie: PrefixTrie,
    prompt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log-mass of an approximation on each of the sequences [K,T] of a trie, and (a scalar)
    everywhere else.
    """
    if isinstance(approximation, SequenceTable):
        approximation = WeightedSequences(
            approximation.space, approximation.tokens, approximation.log_probs.detach(), exact=True
        )
    if isinstance(approximation, WeightedSequences):
        return _table_log_mass(approximation, len(tokens), trie)
    return _walk(approximation, trie, len(tokens), prompt)


def _walk(
    model: LanguageModel, trie: PrefixTrie, rows: int, prompt: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log-mass [K] of a trie's sequences and of all else, reading each node once, depth-first in
    blocks.
    """
    space = model.space
    on_support = torch.full((rows,), -math.inf, dtype=torch.float64, device=trie.key.device)
    elsewhere = []
    root = torch.zeros(1, dtype=torch.long, device=trie.key.device)
    stack = [
        (0, root, root, root.double(), None, root)
    ]  # depth, nodes, rows of the parents' state, log-masses, that state, tokens
    while stack:
        depth, node, row, before, state, token = stack.pop()
        logits, state = (
            model.start(1, batch_prompt(prompt, 1))
            if depth == 0
            else advance(model, state, row, token)
        )
        last = depth == space.max_length - 1
        log_probs = before[:, None] + force_eos(
            logits, torch.zeros_like(node, dtype=torch.bool), last, space
        )
        on_edge = trie.scatter_edges(torch.ones_like(trie.key, dtype=torch.bool), node, False)
        elsewhere.append(logspace.logsumexp(log_probs.masked_fill(on_edge, -math.inf).reshape(-1)))
        row, token = on_edge.nonzero(as_tuple=True)
        edge, child = trie.follow(node[row], token)
        mass = log_probs[row, token]
        ends, goes_on = child < 0, child >= 0
        on_support[trie.leaf[edge[ends]]] = mass[ends]
        pieces = (
            part[goes_on].split(block_size(space.vocab_size)) for part in (child, row, mass, token)
        )
        stack.extend(
            (depth + 1, *piece[:3], state, piece[3])
            for piece in zip(*pieces, strict=True)
            if len(piece[0])
        )
    return on_support, logspace.logsumexp(torch.stack(elsewhere))


def _table_log_mass(
    weighted: WeightedSequences, rows: int, trie: PrefixTrie
) -> tuple[Tensor, Tensor]:
    _, edges = trie.find(weighted.tokens)
    last = edges.gather(1, weighted.space.live(weighted.tokens).sum(-1, keepdim=True) - 1).squeeze(
        -1
    )
    row = torch.where(
        last >= 0, trie.leaf[last.clamp(min=0)], rows
    )  # the row after the last one gathers what lies elsewhere
    masses = logspace.segment_logsumexp(weighted.log_probs, row, rows + 1)
    return masses[:-1], masses[-1]


def _sampled(approximation: LanguageModel, target: Posterior, n: int, draw: Draw) -> Comparison:
    """Unbiased means: under π for what π averages, under π* for what π* averages."""
    problem = target.problem
    mine = approximation.sample(n, draw=draw, prompt=problem.prompt)
    theirs = target.model.sample(n, draw=draw, prompt=problem.prompt)
    pi, star = _both_log_probs(approximation, target, mine)
    log_ratio = pi - sequence_log_probs(problem.prior, mine, problem.prompt)  # u [n]
    inside = log_ratio < math.inf
    rewards = torch.zeros_like(pi)
    rewards[inside] = problem.rewards(mine[inside])
    pi_there, star_there = _both_log_probs(approximation, target, theirs)
    js_mine, mine_error = _mean(pi - _middle(pi, star))
    js_theirs, theirs_error = _mean(star_there - _middle(pi_there, star_there))
    weight, weight_error = _mean(torch.exp(star_there - pi_there))  # E_π*[π*/π]
    values = {
        "reverse_kl": _mean(_stepwise_kl(approximation, target.model, mine, problem.prompt)),
        "forward_kl": _mean(_stepwise_kl(target.model, approximation, theirs, problem.prompt)),
        "total_variation": _mean((1 - torch.exp(star - pi)).clamp(min=0)),
        "jensen_shannon": ((js_mine + js_theirs) / 2, math.hypot(mine_error, theirs_error) / 2),
        "expected_reward": _mean(rewards),
        "kl_to_prior": _mean(log_ratio),
        "objective": _mean(rewards - _penalty(problem.kl_coef, log_ratio)),
        "effective_sample_size": (1 / weight, weight_error / weight**2),
        "uncovered_mass": _mean((pi_there == -math.inf).double()),
        "violating_mass": _mean((star == -math.inf).double()),
    }
    gap = _gap(
        values["reverse_kl"][0], problem.kl_coef, float(target.value), values["objective"][0]
    )
    gap_error = (
        problem.kl_coef * values["reverse_kl"][1] if problem.kl_coef > 0 else values["objective"][1]
    )
    values["objective_gap"] = (gap, gap_error)
    means = {name: value for name, (value, _) in values.items()}
    errors = {name: error for name, (_, error) in values.items()}
    return Comparison(log_evidence_error=None, sequences=n, standard_error=errors, **means)


def _both_log_probs(
    approximation: LanguageModel, target: Posterior, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    prompt = target.problem.prompt
    return sequence_log_probs(approximation, tokens, prompt), sequence_log_probs(
        target.model, tokens, prompt
    )


def _stepwise_kl(
    drawn_from: LanguageModel, other: LanguageModel, tokens: Tensor, prompt: Tensor | None
) -> Tensor:
    """Σ_t KL(drawn_from(·|y_<t)‖other(·|y_<t)) [n] along its own samples [n,T]: unbiased for the KL
    by the chain rule, and 0 where they agree.
    """
    mine, theirs = (conditional_log_probs(model, tokens, prompt) for model in (drawn_from, other))
    return torch.where(
        drawn_from.space.live(tokens), logspace.kl_divergence(mine, theirs), 0.0
    ).sum(-1)


def _middle(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _penalty(kl_coef: float, log_ratio: Tensor) -> Tensor:
    """λu [n], whose mean is λ·KL; at λ = inf any divergence costs inf, whatever the sign of one
    sample's u.
    """
    if kl_coef == math.inf:
        return torch.where(log_ratio == 0, 0.0, math.inf)
    return torch.where(torch.isinf(log_ratio), math.inf, kl_coef * log_ratio)


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and standard error; infinite values make both inf."""
    if not bool(torch.isfinite(values).all()):
        return float(values.mean()), math.inf
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
