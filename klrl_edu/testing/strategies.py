"""Hypothesis strategies for the laboratory's nouns; zeros, ties, huge and equal values come often,
by construction.

K outcomes, N sequences, T tokens. Needs hypothesis (the `test` extra).
"""

import math
from functools import partial
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import check_count
from klrl_edu.models.contract import LanguageModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import Reward, table_reward, token_reward

# zeros, ties, underflow in a probability
EXTREME_LOG_WEIGHTS = (-math.inf, 0.0, -0.0, 1e-300, -1e-16, -36.0, -745.2, -1e5, 700.0)
_WORDS = "abcdefghijkl"
KL_COEFS = (0.05, 0.25, 0.5, 1.0, 2.0, 10.0)


@st.composite
def spaces(
    draw: st.DrawFn, max_words: int = 3, max_length: int = 3, eos: bool | None = None
) -> SequenceSpace:
    """Small spaces with and without EOS: at most `max_words` words (of 12) and T ≤ `max_length`."""
    if check_count(max_words, "max_words") > len(_WORDS):
        raise InputError(f"max_words = {max_words} must be at most {len(_WORDS)}.")
    check_count(max_length, "max_length")
    words = draw(st.integers(1, max_words))
    length = draw(st.integers(1, max_length))
    eos = draw(st.booleans()) if eos is None else eos
    return SequenceSpace(tuple(_WORDS[:words]), length, eos)


@st.composite
def log_weights(draw: st.DrawFn, size: int, extremes: bool = True) -> Tensor:
    """Unnormalised log-weights [K] in nats with at least one finite entry; ties often, −inf and
    underflow where `extremes`.
    """
    check_count(size, "size")
    value = st.floats(-5, 5) | st.sampled_from((-math.inf, 0.0, 1.0))
    if extremes:
        value = value | st.sampled_from(EXTREME_LOG_WEIGHTS)
    values = torch.tensor(draw(st.lists(value, min_size=size, max_size=size)), dtype=torch.float64)
    # one entry at least has mass
    values[draw(st.integers(0, size - 1))] = draw(st.sampled_from((0.0, 1.0)))
    return values


def log_probs(size: int, extremes: bool = True) -> st.SearchStrategy[Tensor]:
    """Normalised log-probabilities [K] in nats, with zeros (−inf), ties and, where `extremes`,
    probabilities that underflow.
    """
    return log_weights(size, extremes).map(logspace.log_normalize)


def distributions(max_size: int = 6) -> st.SearchStrategy[Tensor]:
    """Probabilities [K] as a user would write them, K ≤ `max_size`: zeros and ties, summing to one
    within 1e-9.
    """
    check_count(max_size, "max_size")
    counts = st.lists(st.integers(0, 9), min_size=1, max_size=max_size).filter(any)
    return counts.map(lambda weights: torch.tensor(weights, dtype=torch.float64) / sum(weights))


@st.composite
def sequence_tables(
    draw: st.DrawFn, space: SequenceSpace, max_sequences: int = 8, extremes: bool = False
) -> SequenceTable:
    """Priors: a SequenceTable on a few sequences of a space, the rest of which has mass 0; so have
    some of its rows.
    """
    check_count(max_sequences, "max_sequences")
    everything = space.all_tokens()
    count = draw(st.integers(1, min(len(everything), max_sequences)))
    row = st.integers(0, len(everything) - 1)
    index = draw(st.lists(row, min_size=count, max_size=count, unique=True))
    return SequenceTable(space, everything[index], draw(log_weights(count, extremes)))


@st.composite
def rewards(
    draw: st.DrawFn, prior: SequenceTable, forbid: bool = True, extremes: bool = False
) -> Reward:
    """Rewards for a prior: a table by text (ties, equal values, −inf where `forbid`, ±1e300 where
    `extremes`) or one value a token.

    At least one supported sequence has a finite reward. Texts without mass get NaN, which must be
    ignored.
    """
    space, supported = prior.space, prior.log_probs.detach() > -math.inf
    if draw(st.integers(0, 3)) == 0:  # one in four has a value a token
        size = space.vocab_size
        return token_reward(draw(st.lists(st.floats(-2, 2), min_size=size, max_size=size)), space)
    value = st.sampled_from((0.0, 1.0, 2.0, -1.0)) | st.floats(-3, 3)
    if forbid:
        value = value | st.just(-math.inf)
    if extremes:
        value = value | st.sampled_from((1e300, -1e300, 1e308, 5e-324))
    texts = space.decode(prior.tokens[supported])
    # equal rewards, where the posterior is the prior, would hardly come by chance
    equal = draw(st.sampled_from((True, False, False)))
    if equal:
        values = [draw(value)] * len(texts)
    else:
        values = draw(st.lists(value, min_size=len(texts), max_size=len(texts)))
    assume(any(one > -math.inf for one in values))
    return table_reward(dict(zip(texts, values, strict=True)), space)


@st.composite
def problems(
    draw: st.DrawFn,
    max_words: int = 3,
    max_length: int = 3,
    kl_coefs: st.SearchStrategy[float] | None = None,
    forbid: bool = True,
    extremes: bool = False,
) -> Problem:
    """Problems that enumeration solves: SequenceTable priors with zeros and ties, and rewards as in
    `rewards`.

    Args:
        kl_coefs: λ; by default positive and moderate, with 0, inf and 5e-324 too where `extremes`.
        forbid: allow rewards of −inf (never on the whole support); then only a policy on the
            posterior's support has a finite KL to it.
        extremes: rewards up to 1e308 and priors down to e^{−1e5} as well.
    """
    prior = draw(sequence_tables(draw(spaces(max_words, max_length)), extremes=extremes))
    if kl_coefs is None:
        kl_coefs = st.sampled_from(KL_COEFS) | st.floats(0.1, 5)
        if extremes:
            # a branch of their own, beside the two above: a third of all
            kl_coefs = st.sampled_from((0.0, math.inf, 5e-324)) | kl_coefs
    return Problem(prior, draw(rewards(prior, forbid, extremes)), draw(kl_coefs))


def policies(problem: Problem) -> st.SearchStrategy[LanguageModel]:
    """Policies on the support of a problem's prior: a SequenceTable there, or a PrefixTable
    restricted to it. Finite logits, so they cover it.
    """
    prior = problem.prior
    assert isinstance(prior, SequenceTable), (
        "policies() takes a problem whose prior is a SequenceTable"
    )
    tokens = prior.tokens[prior.log_probs.detach() > -math.inf]
    logit = st.floats(-2, 2)
    sequence_table: st.SearchStrategy[LanguageModel] = _vectors(logit, len(tokens)).map(
        partial(SequenceTable, problem.space, tokens)
    )
    shape = PrefixTable(problem.space, tokens).logits.shape

    def restricted(values: Tensor) -> LanguageModel:
        return restrict_to_support(PrefixTable(problem.space, tokens, values.reshape(shape)), prior)

    return sequence_table | _vectors(logit, shape.numel()).map(restricted)


def _vectors(value: st.SearchStrategy[float], size: int) -> st.SearchStrategy[Tensor]:
    return st.lists(value, min_size=size, max_size=size).map(_as_vector)


def _as_vector(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
