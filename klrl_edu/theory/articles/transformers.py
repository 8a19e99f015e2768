"""Article B, Transformers, BERT and GPT, and KL as a regulariser: five rows, six claims.

    KL(P‖Q) = Σ_t E_{y_<t ~ P} KL(P(·|y_<t)‖Q(·|y_<t)),    −log P(y) = −Σ_t log P(y_t|y_<t)      (1)
    one-hot Q at y:  KL(P‖Q) = inf,    KL(Q‖P) = −log P(y), the cross-entropy                    (2)
    independent words nearest to P by KL(P‖·): the product of P's marginals; its entropy is H(P) +
    I(P)           (3)

I(P) = KL(P‖product of marginals). K sentences, T words, V vocabulary; logs in nats.
"""

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.draws import enumerate_executions
from klrl_edu.models.contract import token_log_probs
from klrl_edu.theory.articles.examples import (
    course_case,
    log_mass,
    marginal_log_probs,
    sentences,
)
from klrl_edu.theory.articles.tabular import chain_rule_kl
from klrl_edu.theory.cases import Case
from klrl_edu.theory.gradients import kl
from klrl_edu.theory.verdicts import Formulas, corrected, false, holds


@corrected(
    "B",
    "2.4, 4.1",
    r"$L_{KL} = \sum_i D_{KL}(P(y_i \mid X, \theta) \Vert Q(y_i \mid X, \theta))$",
    r"$L_{KL} = \sum_i E_{y_{<i} \sim P}\, D_{KL}(P(y_i \mid y_{<i}, X, \theta) \Vert Q(y_i"
    r" \mid y_{<i}, X))$",
    "nats",
    "t01",
    sentences,
)
def b_positions(case: Case) -> Formulas:
    """The KL of sentences from the KL of each position: its marginals without their prefix, or, by
    (1), given it.
    """
    own, prior = (
        marginal_log_probs(case, log_probs) for log_probs in (case.log_policy, case.log_prior)
    )
    return Formulas(
        truth=kl(case.log_policy, case.log_prior),
        printed=(case.log_policy.exp()[:, None] * (own - prior)).sum(),
        corrected=chain_rule_kl(case, case.log_policy),
    )


b_positions.says(
    lambda case, found: (
        "π and q have the same first words and the same second words, so the sum is"
        f" {abs(found.printed):.4f}; KL(π‖q) = {found.truth:.6f} nats"
    )
)
b_positions.broken("prefixes averaged under q", lambda case: chain_rule_kl(case, case.log_prior))


@corrected(
    "B",
    "2.4, 4.1",
    r"$D_{KL}(P \Vert Q)$ with $Q$ the true target, a text",
    r"$D_{KL}(Q \Vert P) = -\log P(y \mid X, \theta)$",
    "nats",
    "t01",
    sentences,
)
def b_one_hot(case: Case) -> Formulas:
    """The loss [K] for the target Q that is one-hot at each sentence in turn: (2)."""
    one_hot = torch.eye(len(case.tokens), dtype=torch.float64).log()
    return Formulas(
        truth=-case.log_policy,
        printed=kl(case.log_policy, one_hot),
        corrected=kl(one_hot, case.log_policy),
    )


b_one_hot.says(
    lambda case, found: (
        f"with the true text 'the cat' as Q, KL(π‖Q) = {found.printed[0]:g}; the cross-entropy is"
        f" the other direction, KL(Q‖π) = {found.right[0]:.6f} = −log ½ nats"
    )
)
b_one_hot.broken("log P without its sign", lambda case: case.log_policy)


@corrected(
    "B",
    "4.2",
    r"$L_{BERT} = -\sum_{t=1}^{T} \log P(y_t \mid X, \theta)$",
    r"$L_{BERT} = -\sum_{t \in M} \log P(y_t \mid y_{\setminus M}, \theta)$, $M$ the masked"
    r" positions",
    "nats",
    "t10",
    sentences,
)
def b_masked(case: Case) -> Formulas:
    """The loss of a masked model with true conditionals, the mean over masks: summed over all
    positions or over the masked ones. What no masked model can go below is the truth: Σ_{t masked}
    H(Y_t | visible words), by entropies of tables of words.
    """
    everything, masks = tuple(range(case.space.max_length)), _masks(case.space.max_length)
    return Formulas(
        truth=torch.tensor(
            [_masked_uncertainty(case, mask) for mask in masks], dtype=torch.float64
        ).mean(),
        printed=torch.stack([_cloze_loss(case, mask, everything) for mask in masks]).mean(),
        corrected=torch.stack([_cloze_loss(case, mask, mask) for mask in masks]).mean(),
    )


def _masks(length: int) -> list[tuple[int, ...]]:
    """The sets of masked positions, each as likely: all but none and everything."""
    return [
        mask for size in range(1, length) for mask in itertools.combinations(range(length), size)
    ]


def _cloze_loss(case: Case, mask: tuple[int, ...], predicted: tuple[int, ...]) -> Tensor:
    """What a masked model with true conditionals loses, E_q[−Σ_{t predicted} log q(y_t | the
    visible words, without y_t itself)]: a scalar.
    """
    total = torch.zeros((), dtype=torch.float64)
    for t in predicted:
        context = [i for i in range(case.space.max_length) if i not in mask and i != t]
        log_conditional = log_mass(case, case.log_prior, [*context, t]) - log_mass(
            case, case.log_prior, context
        )
        total = total - case.log_prior.exp() @ log_conditional
    return total


def _masked_uncertainty(case: Case, mask: tuple[int, ...]) -> float:
    """The entropy of the masked words given the visible ones, Σ_{t masked} H(Y_t | visible words),
    in nats.
    """
    context = [i for i in range(case.space.max_length) if i not in mask]
    return sum(_words_entropy(case, [*context, t]) - _words_entropy(case, context) for t in mask)


def _words_entropy(case: Case, positions: list[int]) -> float:
    """The entropy of the words at some positions under q, from a table with one entry a distinct
    tuple.
    """
    table: dict[tuple[int, ...], float] = {}
    for words, probability in zip(
        case.tokens[:, positions].tolist(), case.log_prior.exp().tolist(), strict=True
    ):
        table[tuple(words)] = table.get(tuple(words), 0.0) + probability
    return -math.fsum(p * math.log(p) for p in table.values())


b_masked.says(
    lambda case, found: (
        f"with one of the two words masked the loss of the true conditionals is {found.truth:.6f}"
        f" nats (each word masked in turn: {2 * found.truth:.12f} = H(q) − I); summed over both"
        f" positions, the seen one too, it is {found.printed:.6f}"
    )
)
b_masked.broken("half of the sum over all", lambda case: b_masked(case).printed / 2)


@holds(
    "B",
    "4.3",
    r"$L_{GPT} = -\sum_t \log P(y_t \mid y_{<t}, X, \theta)$",
    "nats",
    "t10",
    sentences,
)
def b_autoregressive(case: Case) -> Formulas:
    """The loss of each sentence [K] is the sum of its tokens' losses: (1)."""
    return Formulas(truth=-case.log_policy, printed=_token_losses(case).sum(-1))


def _token_losses(case: Case) -> Tensor:
    """The loss of each token, −log P(y_t|y_<t) [K,T]."""
    return -token_log_probs(case.table(case.log_policy), case.tokens)


@b_autoregressive.says
def _(case: Case, found: Formulas) -> str:
    first, second = _token_losses(case)[0].tolist()
    return f"'the cat': {first:.6f} + {second:.6f} = {first + second:.6f} = −log ½ nats"


b_autoregressive.broken(
    "each word without its prefix",
    lambda case: -marginal_log_probs(case, case.log_policy).sum(-1),
)


_TWO_MODES = torch.tensor(
    [0.5, 0.02, 0.02, 0.46], dtype=torch.float64
).log()  # 'the cat' and 'a dog', hardly anything else


def _from_two_modes() -> tuple[Case, ...]:
    """A target with two modes, then the others."""
    return (replace(course_case(), log_policy=_TWO_MODES), *sentences())


@false(
    "B",
    "2.4",
    r"a KL penalty makes distributions more compact: $H(P) \le H(Q)$",
    r"by $D_{KL}(\cdot \Vert Q)$ narrower as a rule; by $D_{KL}(Q \Vert \cdot)$ wider:"
    r" $H(P) = H(Q) + I(Q)$ for independent words",
    "nats",
    "t01",
    _from_two_modes,
)
def b_compact(case: Case) -> Formulas:
    """The entropy of the independent words that minimise KL(π‖·): more compact would mean at most
    that of its target π; it is (3).
    """
    fitted, target = (
        logspace.entropy(_product_of_marginals(case)),
        logspace.entropy(case.log_policy),
    )
    information = kl(case.log_policy, marginal_log_probs(case, case.log_policy).sum(-1))
    return Formulas(
        truth=fitted, printed=torch.minimum(fitted, target), corrected=target + information
    )


def _product_of_marginals(case: Case) -> Tensor:
    """Log-probabilities [V^T] of words drawn independently with π's marginals, over every
    combination of words.
    """
    length, vocab_size = case.space.max_length, case.space.vocab_size
    total = torch.zeros((), dtype=torch.float64)
    for t in range(length):
        marginal = (
            torch.zeros(vocab_size, dtype=torch.float64)
            .index_add(0, case.tokens[:, t], case.log_policy.exp())
            .log()
        )
        total = total[..., None] + marginal
    return total.reshape(-1)


def mode_seeking_entropy(log_target: Tensor, rounds: int = 200) -> float:
    """The entropy of two independent binary words that minimise KL(·‖target) by coordinate descent:
    log-probabilities [4], the pair (i, j) at 2i + j.
    """
    table = log_target.reshape(2, 2)
    first = second = torch.full((2,), 0.5, dtype=torch.float64)
    for _ in range(rounds):
        first = torch.softmax(table @ second, 0)
        second = torch.softmax(first @ table, 0)
    return float(logspace.entropy(first.log()) + logspace.entropy(second.log()))


@b_compact.says
def _(case: Case, found: Formulas) -> str:
    tempered = [
        abs(logspace.entropy(course_case().at(kl_coef).log_star))
        for kl_coef in (0.0, 1.0, math.inf)
    ]
    return (
        f"a target with two modes has H = {logspace.entropy(case.log_policy):.4f}: independent"
        f" words fitted by KL(·‖target) keep one mode, H = {mode_seeking_entropy(_TWO_MODES):.4f},"
        f" fitted by KL(target‖·) they cover both, H = {found.truth:.4f}; and"
        f" a penalty λ KL(π‖q) widens: H(π*) = {tempered[0]:.4f}, {tempered[1]:.4f},"
        f" {tempered[2]:.4f} nats at λ = 0, 1, inf"
    )


b_compact.broken(
    "the information taken away",
    lambda case: 2 * logspace.entropy(case.log_policy) - b_compact(case).right,
)


@false(
    "B",
    "5.2",
    "a forward pass with generation arguments returns text",
    r"it returns logits; a sampler draws $y_t \sim \mathrm{softmax}(\text{logits}_t)$, one"
    r" word after another",
    "probability",
    "t09",
    sentences,
)
def b_generation(case: Case) -> Formulas:
    """The law [K] of a text: that forward passes alone give, and that a sampler draws."""
    return Formulas(
        truth=case.log_policy.exp(),
        printed=_law_of_forward_pass(case),
        corrected=_law_of_sampler(case, case.log_policy),
    )


def _law_of_forward_pass(case: Case) -> Tensor:
    """All mass [K] on one sentence, the likeliest word at each position."""
    model = case.table(case.log_policy)
    text = case.tokens[:1].clone()
    for t in range(case.space.max_length):
        text[:, t] = model(text)[:, t].argmax(-1)
    return (case.tokens == text).all(-1).double()


def _law_of_sampler(case: Case, log_policy: Tensor) -> Tensor:
    """The law [K] of the text that a sampler draws from the logits, by running it through every
    outcome.
    """
    model = case.table(log_policy)
    law = torch.zeros(len(case.tokens), dtype=torch.float64)
    for execution in enumerate_executions(lambda draw: model.sample(1, draw=draw)):
        law += (case.tokens == execution.result).all(-1).double() * math.exp(execution.log_prob)
    return law


@b_generation.says
def _(case: Case, found: Formulas) -> str:
    logits = case.table(case.log_policy)(case.tokens[:1])
    missed = 1 - float(found.printed @ found.truth)
    return (
        f"a forward pass on one sentence returns numbers of shape {list(logits.shape)}; reading off"
        f" the likeliest words always gives one sentence, at total variation {missed:.4f} from π; a"
        " sampler's outcomes have exactly π's probabilities"
    )


b_generation.broken(
    "at temperature ½",
    lambda case: _law_of_sampler(case, torch.log_softmax(2 * case.log_policy, 0)),
)
