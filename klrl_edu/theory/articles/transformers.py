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
    plain_kl,
    sentences,
)
from klrl_edu.theory.articles.tabular import chain_rule_kl
from klrl_edu.theory.cases import Case
from klrl_edu.theory.gradients import kl
from klrl_edu.theory.verdicts import ClaimsOf, Formulas

article = ClaimsOf("B", sentences)


@article.at("2.4, 4.1", "nats", "t01").corrected(
    r"$L_{KL} = \sum_i D_{KL}(P(y_i \mid X, \theta) \Vert Q(y_i \mid X, \theta))$",
    r"$L_{KL} = \sum_i E_{y_{<i} \sim P}\, D_{KL}(P(y_i \mid y_{<i}, X, \theta) \Vert Q(y_i"
    r" \mid y_{<i}, X))$",
)
def b_positions(case: Case) -> Formulas:
    """The KL of sentences from the KL of each position: its marginals without their prefix, or, by
    (1), given it.
    """
    own, prior = (
        marginal_log_probs(case, log_probs) for log_probs in (case.log_policy, case.log_prior)
    )
    return Formulas(
        truth=plain_kl(case.log_policy, case.log_prior),
        printed=(case.log_policy.exp()[:, None] * (own - prior)).sum(),
        corrected=chain_rule_kl(case, case.log_policy),
        broken={
            "prefixes averaged under q": chain_rule_kl(case, case.log_prior),
            "in bits": chain_rule_kl(case, case.log_policy) / math.log(2),
        },
        says=lambda found: (
            "π and q have the same first words and the same second words, so the sum is"
            f" {abs(found.printed):.4f}; KL(π‖q) = {found.truth:.6f} nats"
        ),
    )


@article.at("2.4, 4.1", "nats", "t01").corrected(
    r"$D_{KL}(P \Vert Q)$ with $Q$ the true target, a text",
    r"$D_{KL}(Q \Vert P) = -\log P(y \mid X, \theta)$",
)
def b_one_hot(case: Case) -> Formulas:
    """The loss [K] for the target Q that is one-hot at each sentence in turn: (2)."""
    one_hot = torch.eye(len(case.tokens), dtype=torch.float64).log()
    return Formulas(
        truth=-case.log_policy,
        printed=kl(case.log_policy, one_hot),
        corrected=kl(one_hot, case.log_policy),
        broken={"log P without its sign": case.log_policy},
        says=lambda found: (
            f"with the true text 'the cat' as Q, KL(π‖Q) = {found.printed[0]:g}; the cross-entropy"
            f" is the other direction, KL(Q‖π) = {found.right[0]:.6f} = −log ½ nats"
        ),
    )


@article.at("4.2", "nats", "t10").corrected(
    r"$L_{BERT} = -\sum_{t=1}^{T} \log P(y_t \mid X, \theta)$",
    r"$L_{BERT} = -\sum_{t \in M} \log P(y_t \mid y_{\setminus M}, \theta)$, $M$ the masked"
    r" positions",
)
def b_masked(case: Case) -> Formulas:
    """The loss of a masked model with true conditionals, the mean over masks: summed over all
    positions or over the masked ones. What no masked model can go below is the truth: Σ_{t masked}
    H(Y_t | visible words), by entropies of tables of words.
    """
    everything = tuple(range(case.space.max_length))
    masks = [  # each as likely: all but none and everything
        mask for size in everything[1:] for mask in itertools.combinations(everything, size)
    ]
    least = [_masked_uncertainty(case, mask) for mask in masks]
    printed, corrected = (
        torch.stack([_cloze_loss(case, mask, predicted or mask) for mask in masks]).mean()
        for predicted in (everything, None)
    )
    return Formulas(
        truth=torch.tensor(least, dtype=torch.float64).mean(),
        printed=printed,
        corrected=corrected,
        broken={"half of the sum over all": printed / 2},
        says=lambda found: (
            "with one of the two words masked the loss of the true conditionals is"
            f" {found.truth:.6f} nats (each word masked in turn: {2 * found.truth:.12f} ="
            f" H(q) − I); summed over both positions, the seen one too, it is {printed:.6f}"
        ),
    )


def _cloze_loss(case: Case, mask: tuple[int, ...], predicted: tuple[int, ...]) -> Tensor:
    """What a masked model with true conditionals loses, E_q[−Σ_{t predicted} log q(y_t | the
    visible words, without y_t itself)]: a scalar.
    """
    total = torch.zeros((), dtype=torch.float64)
    for t in predicted:
        # a word that is seen must not be its own context: it would be certain, at no loss
        context = [i for i in range(case.space.max_length) if i not in mask and i != t]
        with_word, without = (
            log_mass(case, case.log_prior, words) for words in ([*context, t], context)
        )
        total = total - case.log_prior.exp() @ (with_word - without)
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


@article.at("4.3", "nats", "t10").holds(r"$L_{GPT} = -\sum_t \log P(y_t \mid y_{<t}, X, \theta)$")
def b_autoregressive(case: Case) -> Formulas:
    """The loss of each sentence [K] is the sum of its tokens' losses: (1)."""
    losses = -token_log_probs(case.table(case.log_policy), case.tokens)  # [K,T]
    return Formulas(
        truth=-case.log_policy,
        printed=losses.sum(-1),
        broken={"each word without its prefix": -marginal_log_probs(case, case.log_policy).sum(-1)},
        says=lambda found: (
            f"'the cat': {losses[0, 0]:.6f} + {losses[0, 1]:.6f} = {losses[0].sum():.6f} = −log ½"
            " nats"
        ),
    )


_TWO_MODES = torch.tensor(
    [0.5, 0.02, 0.02, 0.46], dtype=torch.float64
).log()  # 'the cat' and 'a dog', hardly anything else


def _from_two_modes() -> tuple[Case, ...]:
    """A target with two modes, then the others."""
    return (replace(course_case(), log_policy=_TWO_MODES), *sentences())


@article.at("2.4", "nats", "t01", on=_from_two_modes).false(
    r"a KL penalty makes distributions more compact: $H(P) \le H(Q)$",
    r"by $D_{KL}(\cdot \Vert Q)$ narrower where $Q$ has modes apart, wider where it has none;"
    r" by $D_{KL}(Q \Vert \cdot)$ wider: $H(P) = H(Q) + I(Q)$ for independent words",
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
    tempered = [abs(logspace.entropy(course_case().at(c).log_star)) for c in (0.0, 1.0, math.inf)]
    policy = course_case().log_policy
    return Formulas(
        truth=fitted,
        printed=torch.minimum(fitted, target),
        corrected=target + information,
        broken={
            "the information taken away": target - information,
            "the information counted twice": target + 2 * information,
        },
        says=lambda found: (
            f"a target with two modes has H = {target:.4f}: independent words fitted by"
            f" KL(·‖target) keep one mode, H = {mode_seeking_entropy(_TWO_MODES):.4f}, fitted by"
            f" KL(target‖·) they cover both, H = {fitted:.4f}; to π, which has H ="
            f" {logspace.entropy(policy):.4f}, KL(·‖π) too fits wider words, H ="
            f" {mode_seeking_entropy(policy):.4f}; and a penalty λ KL(π‖q) widens: H(π*) ="
            f" {tempered[0]:.4f}, {tempered[1]:.4f}, {tempered[2]:.4f} nats at λ = 0, 1, inf"
        ),
    )


def _product_of_marginals(case: Case) -> Tensor:
    """Log-probabilities [V^T] of words drawn independently with π's marginals, over every
    combination of words.
    """
    total = torch.zeros((), dtype=torch.float64)
    for words in case.tokens.T:
        marginal = torch.zeros(case.space.vocab_size, dtype=torch.float64)
        marginal.index_add_(0, words, case.log_policy.exp())
        total = total[..., None] + marginal.log()  # one axis a word
    return total.reshape(-1)


def mode_seeking_entropy(log_target: Tensor, rounds: int = 200) -> float:
    """The entropy of two independent binary words that minimise KL(·‖target) by coordinate descent:
    log-probabilities [4], the pair (i, j) at 2i + j.
    """
    table = log_target.reshape(2, 2)
    first = second = torch.full((2,), 0.5, dtype=torch.float64)
    # given the other word, the best law of one is ∝ exp of the mean log target; from uniform words
    # the larger mode wins
    for _ in range(rounds):
        first = torch.softmax(table @ second, 0)
        second = torch.softmax(first @ table, 0)
    return float(logspace.entropy(first.log()) + logspace.entropy(second.log()))


@article.at("5.2", "probability", "t09").false(
    "a forward pass with generation arguments returns text",
    r"it returns logits; a sampler draws $y_t \sim \mathrm{softmax}(\text{logits}_t)$, one"
    r" word after another",
)
def b_generation(case: Case) -> Formulas:
    """The law [K] of a text: that forward passes alone give, and that a sampler draws."""
    logits = case.table(case.log_policy)(case.tokens[:1])
    return Formulas(
        truth=case.log_policy.exp(),
        printed=_law_of_forward_pass(case),
        corrected=_law_of_sampler(case),
        broken={"at temperature ½": torch.softmax(2 * case.log_policy, 0)},
        says=lambda found: (
            f"a forward pass on one sentence returns numbers of shape {list(logits.shape)}; reading"
            " off the likeliest words always gives one sentence, at total variation"
            f" {1 - found.printed @ found.truth:.4f} from π; a sampler's outcomes have exactly π's"
            " probabilities"
        ),
    )


def _law_of_forward_pass(case: Case) -> Tensor:
    """All mass [K] on one sentence, the likeliest word at each position."""
    model = case.table(case.log_policy)
    text = case.tokens[:1].clone()
    for t in range(case.space.max_length):
        text[:, t] = model(text)[:, t].argmax(-1)
    return (case.tokens == text).all(-1).double()


def _law_of_sampler(case: Case) -> Tensor:
    """The law [K] of the text that a sampler draws from the logits, by running it through every
    outcome.
    """
    model = case.table(case.log_policy)
    law = torch.zeros(len(case.tokens), dtype=torch.float64)
    for execution in enumerate_executions(lambda draw: model.sample(1, draw=draw)):
        law += (case.tokens == execution.result).all(-1).double() * math.exp(execution.log_prob)
    return law
