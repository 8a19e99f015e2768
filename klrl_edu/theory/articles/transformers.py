"""Article B, Transformers, BERT and GPT, and KL as a regulariser: five rows, six claims.

    KL(P‖Q) = Σ_t E_{y_<t ~ P} KL(P(·|y_<t)‖Q(·|y_<t)),    −log P(y) = −Σ_t log P(y_t|y_<t)      (1)
    one-hot Q at y:  KL(P‖Q) = inf,    KL(Q‖P) = −log P(y), the cross-entropy                    (2)
    independent words nearest to P by KL(P‖·): the product of P's marginals; its entropy is H(P) +
    I(P)           (3)

I(P) = KL(P‖product of marginals). K sentences, T words, V vocabulary; logs in nats.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.draws import enumerate_executions
from klrl_edu.exact.enumeration import tilt
from klrl_edu.models.contract import token_log_probs
from klrl_edu.theory.articles.claim import Claim
from klrl_edu.theory.articles.examples import (
    Sentences,
    four_sentences,
    kl,
    log_mass,
    marginal_log_probs,
    sentences,
)
from klrl_edu.theory.articles.tabular import chain_rule_kl, sentence_kl

_TWO_MODES = torch.tensor(
    [0.5, 0.02, 0.02, 0.46], dtype=torch.float64
).log()  # 'the cat' and 'a dog', hardly anything else


def positionwise_kl(example: Sentences) -> Tensor:
    """Σ_i KL(P(y_i)‖Q(y_i)) over the positions, each word's marginals without its prefix:
    a scalar.
    """
    own, other = (
        marginal_log_probs(example, log_probs)
        for log_probs in (example.log_policy, example.log_prior)
    )
    return (example.log_policy.exp()[:, None] * (own - other)).sum()


def _says_positions() -> str:
    example = four_sentences()
    seen, true = abs(float(positionwise_kl(example))), float(sentence_kl(example))
    return (
        f"π and q have the same first words and the same second words, so the sum is {seen:.4f};"
        f" KL(π‖q) = {true:.6f} nats"
    )


def divergence_from_one_hot(example: Sentences) -> Tensor:
    """KL(P‖Q) [K] for the Q that is one-hot at each sentence in turn: inf wherever P has other
    mass.
    """
    return kl(example.log_policy, torch.eye(len(example.tokens), dtype=torch.float64).log())


def divergence_to_one_hot(example: Sentences) -> Tensor:
    """KL(Q‖P) [K] for the Q that is one-hot at each sentence in turn."""
    return kl(torch.eye(len(example.tokens), dtype=torch.float64).log(), example.log_policy)


def _says_one_hot() -> str:
    example = four_sentences()
    printed, true = (
        float(divergence_from_one_hot(example)[0]),
        float(divergence_to_one_hot(example)[0]),
    )
    return (
        f"with the true text 'the cat' as Q, KL(π‖Q) = {printed:g}; the cross-entropy is the other"
        f" direction, KL(Q‖π) = {true:.6f} = −log ½ nats"
    )


def _masks(length: int) -> list[tuple[int, ...]]:
    """The sets of masked positions, each as likely: all but none and everything."""
    return [
        mask for size in range(1, length) for mask in itertools.combinations(range(length), size)
    ]


def _cloze_loss(example: Sentences, mask: tuple[int, ...], predicted: tuple[int, ...]) -> Tensor:
    """E_q[−Σ_{t predicted} log q(y_t | the visible words, without y_t itself)], a scalar: what a
    masked model with true conditionals loses.
    """
    total = torch.zeros((), dtype=torch.float64)
    for t in predicted:
        context = [i for i in range(example.space.max_length) if i not in mask and i != t]
        log_conditional = log_mass(example, example.log_prior, [*context, t]) - log_mass(
            example, example.log_prior, context
        )
        total = total - example.log_prior.exp() @ log_conditional
    return total


def loss_everywhere(example: Sentences) -> Tensor:
    """The mean over masks of the loss summed over t = 1 … T, a scalar in nats."""
    length = example.space.max_length
    return torch.stack(
        [_cloze_loss(example, mask, tuple(range(length))) for mask in _masks(length)]
    ).mean()


def loss_where_masked(example: Sentences) -> Tensor:
    """The mean over masks of the loss summed over the masked positions, a scalar in nats."""
    return torch.stack(
        [_cloze_loss(example, mask, mask) for mask in _masks(example.space.max_length)]
    ).mean()


def masked_uncertainty(example: Sentences) -> Tensor:
    """The mean over masks of Σ_{t masked} H(Y_t | visible words), by entropies of tables of words:
    what no masked model can go below.
    """
    totals = []
    for mask in _masks(example.space.max_length):
        context = [i for i in range(example.space.max_length) if i not in mask]
        totals.append(
            sum(
                _words_entropy(example, [*context, t]) - _words_entropy(example, context)
                for t in mask
            )
        )
    return torch.tensor(totals, dtype=torch.float64).mean()


def _words_entropy(example: Sentences, positions: list[int]) -> float:
    """H of the words at some positions under q, from a table with one entry a distinct tuple."""
    table: dict[tuple[int, ...], float] = {}
    for words, probability in zip(
        example.tokens[:, positions].tolist(), example.log_prior.exp().tolist(), strict=True
    ):
        table[tuple(words)] = table.get(tuple(words), 0.0) + probability
    return -math.fsum(p * math.log(p) for p in table.values())


def _says_masked() -> str:
    example = four_sentences()
    masked = float(masked_uncertainty(example))
    return (
        f"with one of the two words masked the loss of the true conditionals is {masked:.6f} nats"
        f" (each word masked in turn: {2 * masked:.12f} = H(q) − I); summed over both positions,"
        f" the seen one too, it is {float(loss_everywhere(example)):.6f}"
    )


def summed_token_losses(example: Sentences) -> Tensor:
    """−Σ_t log P(y_t|y_<t) [K]."""
    return -token_log_probs(example.table(example.log_policy), example.tokens).sum(-1)


def _says_autoregressive() -> str:
    first, second = (
        -token_log_probs(
            four_sentences().table(four_sentences().log_policy), four_sentences().tokens
        )[0]
    ).tolist()
    return f"'the cat': {first:.6f} + {second:.6f} = {first + second:.6f} = −log ½ nats"


def _product_of_marginals(example: Sentences) -> Tensor:
    """Log-probabilities [V^T] of words drawn independently with π's marginals, over every
    combination of words.
    """
    length, vocab_size = example.space.max_length, example.space.vocab_size
    total = torch.zeros((), dtype=torch.float64)
    for t in range(length):
        marginal = (
            torch.zeros(vocab_size, dtype=torch.float64)
            .index_add(0, example.tokens[:, t], example.log_policy.exp())
            .log()
        )
        total = total[..., None] + marginal
    return total.reshape(-1)


def fit_entropy(example: Sentences) -> Tensor:
    """H of the independent words that minimise KL(π‖·), a scalar in nats."""
    return logspace.entropy(_product_of_marginals(example))


def no_wider_than_target(example: Sentences) -> Tensor:
    """What more compact means: the fit's entropy, at most that of its target π."""
    return torch.minimum(fit_entropy(example), logspace.entropy(example.log_policy))


def target_entropy_and_information(example: Sentences) -> Tensor:
    """H(π) + I(π), a scalar in nats, by (3)."""
    return logspace.entropy(example.log_policy) + kl(
        example.log_policy, marginal_log_probs(example, example.log_policy).sum(-1)
    )


def mode_seeking_entropy(log_target: Tensor, rounds: int = 200) -> float:
    """H of two independent binary words that minimise KL(·‖target) by coordinate descent:
    log-probabilities [4], the pair (i, j) at 2i + j.
    """
    table = log_target.reshape(2, 2)
    first = second = torch.full((2,), 0.5, dtype=torch.float64)
    for _ in range(rounds):
        first = torch.softmax(table @ second, 0)
        second = torch.softmax(first @ table, 0)
    return float(logspace.entropy(first.log()) + logspace.entropy(second.log()))


def _two_modes() -> Sentences:
    return four_sentences()._replace(log_policy=_TWO_MODES)


def _says_compact() -> str:
    example = four_sentences()
    tempered = [
        abs(
            float(logspace.entropy(tilt(example.log_prior, example.rewards, kl_coef).log_posterior))
        )
        for kl_coef in (0.0, 1.0, math.inf)
    ]
    return (
        f"a target with two modes has H = {float(logspace.entropy(_TWO_MODES)):.4f}: independent"
        f" words fitted by KL(·‖target) keep one mode, H = {mode_seeking_entropy(_TWO_MODES):.4f},"
        f" fitted by KL(target‖·) they cover both, H = {float(fit_entropy(_two_modes())):.4f}; and"
        f" a penalty λ KL(π‖q) widens: H(π*) = {tempered[0]:.4f}, {tempered[1]:.4f},"
        f" {tempered[2]:.4f} nats at λ = 0, 1, inf"
    )


def law_of_forward_pass(example: Sentences) -> Tensor:
    """The law [K] of the text that forward passes alone give, the likeliest word at each position:
    all its mass on one sentence.
    """
    model = example.table(example.log_policy)
    text = example.tokens[:1].clone()
    for t in range(example.space.max_length):
        text[:, t] = model(text)[:, t].argmax(-1)
    return (example.tokens == text).all(-1).double()


def law_of_sampler(example: Sentences) -> Tensor:
    """The law [K] of the text that a sampler draws from the logits, by running it through every
    outcome.
    """
    model = example.table(example.log_policy)
    law = torch.zeros(len(example.tokens), dtype=torch.float64)
    for execution in enumerate_executions(lambda draw: model.sample(1, draw=draw)):
        law += (example.tokens == execution.result).all(-1).double() * math.exp(execution.log_prob)
    return law


def _says_generation() -> str:
    example = four_sentences()
    logits = example.table(example.log_policy)(example.tokens[:1])
    missed = 1 - float(law_of_forward_pass(example) @ example.log_policy.exp())
    return (
        f"a forward pass on one sentence returns numbers of shape {list(logits.shape)}; reading off"
        f" the likeliest words always gives one sentence, at total variation {missed:.4f} from π; a"
        " sampler's outcomes have exactly π's probabilities"
    )


TRANSFORMERS: tuple[Claim[Any], ...] = (
    Claim(
        name="b-positions",
        article="B",
        section="2.4, 4.1",
        printed=r"$L_{KL} = \sum_i D_{KL}(P(y_i \mid X, \theta) \Vert Q(y_i \mid X, \theta))$",
        corrected=(
            r"$L_{KL} = \sum_i E_{y_{<i} \sim P}\, D_{KL}(P(y_i \mid y_{<i}, X, \theta) \Vert Q(y_i"
            r" \mid y_{<i}, X))$"
        ),
        verdict="holds with a correction",
        tutorial="t01",
        unit="nats",
        examples=sentences,
        truth=sentence_kl,
        asserted=positionwise_kl,
        repaired=chain_rule_kl,
        says=_says_positions,
    ),
    Claim(
        name="b-one-hot",
        article="B",
        section="2.4, 4.1",
        printed=r"$D_{KL}(P \Vert Q)$ with $Q$ the true target, a text",
        corrected=r"$D_{KL}(Q \Vert P) = -\log P(y \mid X, \theta)$",
        verdict="holds with a correction",
        tutorial="t01",
        unit="nats",
        examples=sentences,
        truth=lambda example: -example.log_policy,
        asserted=divergence_from_one_hot,
        repaired=divergence_to_one_hot,
        says=_says_one_hot,
    ),
    Claim(
        name="b-masked",
        article="B",
        section="4.2",
        printed=r"$L_{BERT} = -\sum_{t=1}^{T} \log P(y_t \mid X, \theta)$",
        corrected=(
            r"$L_{BERT} = -\sum_{t \in M} \log P(y_t \mid y_{\setminus M}, \theta)$, $M$ the masked"
            r" positions"
        ),
        verdict="holds with a correction",
        tutorial="t10",
        unit="nats",
        examples=sentences,
        truth=masked_uncertainty,
        asserted=loss_everywhere,
        repaired=loss_where_masked,
        says=_says_masked,
    ),
    Claim(
        name="b-autoregressive",
        article="B",
        section="4.3",
        printed=r"$L_{GPT} = -\sum_t \log P(y_t \mid y_{<t}, X, \theta)$",
        corrected="",
        verdict="holds",
        tutorial="t10",
        unit="nats",
        examples=sentences,
        truth=lambda example: -example.log_policy,
        asserted=summed_token_losses,
        repaired=None,
        says=_says_autoregressive,
    ),
    Claim(
        name="b-compact",
        article="B",
        section="2.4",
        printed=r"a KL penalty makes distributions more compact: $H(P) \le H(Q)$",
        corrected=(
            r"by $D_{KL}(\cdot \Vert Q)$ narrower as a rule; by $D_{KL}(Q \Vert \cdot)$ wider:"
            r" $H(P) = H(Q) + I(Q)$ for independent words"
        ),
        verdict="false",
        tutorial="t01",
        unit="nats",
        examples=lambda: (_two_modes(), *sentences()),
        truth=fit_entropy,
        asserted=no_wider_than_target,
        repaired=target_entropy_and_information,
        says=_says_compact,
    ),
    Claim(
        name="b-generation",
        article="B",
        section="5.2",
        printed="a forward pass with generation arguments returns text",
        corrected=(
            r"it returns logits; a sampler draws $y_t \sim \mathrm{softmax}(\text{logits}_t)$, one"
            r" word after another"
        ),
        verdict="false",
        tutorial="t09",
        unit="probability",
        examples=sentences,
        truth=lambda example: example.log_policy.exp(),
        asserted=law_of_forward_pass,
        repaired=law_of_sampler,
        says=_says_generation,
    ),
)
