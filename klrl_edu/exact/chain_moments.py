"""Means under a lattice's posterior, by sums along its chain: no sequence is listed or drawn.

    E[φ], Cov[φ] of φ(y) = Σ_t φ(s_t, y_t) + φ_end(s_end), by the laws of total expectation and
    total covariance over the chain's steps                                                      (1)
    KL(π*‖q) = E Σ_t KL(p_t(·|c,s)‖q(·|c)),    H(π*) = E Σ_t H(p_t(·|c,s))                       (2)

The law of hidden contexts given y is the prior's, so (2) for KL holds with their steps summed too.
Letters as in `lattice.py`; M rows, D features.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.exact.chain import PosteriorChain
from klrl_edu.exact.lattice import MAX_MESSAGES


class FeatureMoments(NamedTuple):
    """Mean [D] and covariance [D,D] of features under π*."""

    mean: Tensor
    covariance: Tensor


def feature_moments(
    chain: PosteriorChain, word_features: Tensor, final_features: Tensor
) -> FeatureMoments:
    """(1), backwards: the moments of what is still to come from each pair (c,s).

    Args:
        word_features: φ(s,k) [S,K,D], finite; final_features: φ_end(s) [S,D].

    Raises:
        InputError: other shapes, or features that are not finite.
        TooLargeError: the C·S·max(K·D, D²) numbers that this needs are too many.
    """
    lattice, size = chain.lattice, final_features.shape[-1]
    _check_features(chain, word_features, final_features)
    pairs, words = lattice.next_pair.shape
    needed = pairs * max(pairs, words * size, size * size)
    if needed > MAX_MESSAGES:
        raise TooLargeError(
            f"the covariance of {size} features over {pairs:,} pairs needs {needed:,} numbers;"
            " ask for fewer features at a time."
        )
    every = torch.arange(pairs, device=chain.log_start.device)
    after, state = lattice.next_pair, every % lattice.states
    mean = final_features[state]  # E[φ to come | c,s], and its covariance
    covariance = mean.new_zeros(pairs, size, size)
    for t in reversed(range(lattice.words)):
        if lattice.hidden and t + 1 < lattice.words:
            mean, covariance = _over_hidden_contexts(chain, t + 1, mean, covariance)
        # a pair that nothing feasible follows has p = 0 throughout, and so moments 0
        p = logspace.log_normalize_alive(chain.word_log_weights(t)).exp()
        values = mean[after] + word_features[state]
        if lattice.space.eos:
            values = torch.cat([values, final_features[state][:, None]], 1)
        mean = torch.einsum("mv,mvd->md", p, values)
        # total covariance: of the conditional means, and the mean of the conditional covariances
        away = (values - mean[:, None]) * p.sqrt()[..., None]
        # the law of the next pair [C·S,C·S]: words that lead to one pair are added up
        edges = (every[:, None].expand_as(after), after)
        moves = p.new_zeros(pairs, pairs).index_put(edges, p[:, :words], accumulate=True)
        within = (moves @ covariance.view(pairs, -1)).view_as(covariance)
        covariance = within + away.mT @ away
    start = every.view(lattice.contexts, -1)[:, lattice.start]
    law = logspace.log_normalize_alive(chain.log_start[None]).exp()
    whole = _mixture(law, mean[start][None], covariance[start][None])
    return FeatureMoments(whole.mean[0], whole.covariance[0])


def _check_features(chain: PosteriorChain, word: Tensor, final: Tensor) -> None:
    states, words = chain.lattice.next_state.shape
    expected = {
        "word_features": (word, 3, (states, words)),
        "final_features": (final, 2, (states,)),
    }
    for name, (given, ndim, shape) in expected.items():
        if given.ndim != ndim or given.shape[:-1] != shape or given.shape[-1] != final.shape[-1]:
            raise InputError(f"{name} has shape {list(given.shape)}; expected {[*shape, 'D']}.")
        if not bool(torch.isfinite(given).all()):
            raise InputError(f"{name} hold NaN or an infinity; give finite numbers.")


def _over_hidden_contexts(
    chain: PosteriorChain, t: int, mean: Tensor, covariance: Tensor
) -> FeatureMoments:
    """Moments of what follows a hidden context, from those of what follows the next one."""
    lattice = chain.lattice
    law = logspace.log_normalize_alive(chain.hidden_log_weights(t)).exp()  # [C·S,C]
    state = torch.arange(len(law), device=law.device) % lattice.states
    next_context = torch.arange(lattice.contexts, device=law.device)
    after = next_context * lattice.states + state[:, None]
    return _mixture(law, mean[after], covariance[after])


def _mixture(weights: Tensor, mean: Tensor, covariance: Tensor) -> FeatureMoments:
    """Mean [M,D] and covariance [M,D,D] of M mixtures of J parts each.

    Args:
        weights: [M,J].
        mean: [M,J,D], of the parts; covariance: [M,J,D,D].
    """
    together = torch.einsum("mj,mjd->md", weights, mean)
    away = (mean - together[:, None]) * weights.sqrt()[..., None]
    within = torch.einsum("mj,mjde->mde", weights, covariance)
    return FeatureMoments(together, within + away.mT @ away)


def reward_moments(chain: PosteriorChain) -> tuple[Tensor, Tensor]:
    """E[r] and Var[r] under π*, scalars in reward units and their square."""
    # what is forbidden has probability 0 under π*, and so any finite feature there
    word, final = (
        rewards.masked_fill(rewards == -math.inf, 0.0)[..., None]
        for rewards in (chain.lattice.word_rewards, chain.lattice.final_rewards)
    )
    mean, covariance = feature_moments(chain, word, final)
    return mean[0], covariance[0, 0]


def count_moments(chain: PosteriorChain, words: list[str]) -> FeatureMoments:
    """Mean [D] and covariance [D,D] of how often each of D words occurs under π*.

    Raises:
        InputError: a word is not in the vocabulary.
    """
    space, device = chain.lattice.space, chain.log_start.device
    unknown = [word for word in words if word not in space.word_ids]
    if unknown:
        raise InputError(f"words = {unknown} are not in the vocabulary of {space!r}.")
    ids = torch.tensor([space.word_ids[word] for word in words], device=device)
    shape = chain.lattice.next_state.shape
    features = chain.log_start.new_zeros(*shape, len(words))
    features[:, ids, torch.arange(len(words), device=device)] = 1
    return feature_moments(chain, features, features[:, 0] * 0)


def kl_to_prior(chain: PosteriorChain) -> Tensor:
    """KL(π*‖q) in nats, a scalar, by (2)."""
    lattice = chain.lattice
    log_q = lattice.pair_emission()
    steps = _along(chain, lambda t, _: logspace.kl_of_tilt(log_q, chain.word_log_ratio(t)))
    if not lattice.hidden:
        return steps
    return logspace.kl_of_tilt(lattice.log_initial, chain.start_log_ratio) + steps


def entropy(chain: PosteriorChain) -> Tensor:
    """H(π*) in nats, a scalar, by (2).

    Raises:
        InputError: the prior has hidden contexts, whose entropy given the words is no sum over
            steps.
    """
    if chain.lattice.hidden:
        raise InputError(
            "the entropy of a posterior over a hidden Markov prior has no exact sum; estimate"
            " −E log π* from its exact samples."
        )
    return _along(chain, lambda t, log_table: logspace.entropy(log_table))


def _along(chain: PosteriorChain, gain: Callable[[int, Tensor], Tensor]) -> Tensor:
    """E Σ_t gain_t of where π* stands, a scalar, gain: t, log p_t [C·S,V] -> [C·S].

    The divergences of hidden steps from the prior are added where there are any.
    """
    lattice = chain.lattice
    total = chain.log_mass.new_zeros(())
    for t, prob, log_table in chain.occupancy():
        total = total + mean_where_reached(prob, gain(t, log_table))
        if lattice.hidden and t + 1 < lattice.words:
            moved = chain.after_word(prob, log_table)
            total = total + mean_where_reached(moved, _hidden_divergence(chain, t + 1))
    return total


def _hidden_divergence(chain: PosteriorChain, t: int) -> Tensor:
    """KL of the step of a hidden context before position t from the prior's: [C·S]."""
    lattice = chain.lattice
    assert lattice.log_transition is not None
    prior = lattice.log_transition.repeat_interleave(lattice.states, 0)
    return logspace.kl_of_tilt(prior, chain.hidden_log_ratio(t))


def mean_where_reached(prob: Tensor, values: Tensor) -> Tensor:
    """Σ prob·values [M] -> scalar, where what has no probability does not count."""
    return (prob * torch.where(prob > 0, values, 0.0)).sum()


def length_law(chain: PosteriorChain) -> Tensor:
    """P(the text has ℓ words) under π* [L+1], ℓ = 0 … L; all at L where the length is fixed."""
    law = chain.log_start.new_zeros(chain.lattice.words + 1)
    left = torch.ones_like(law[0])
    if chain.lattice.space.eos:
        for t, prob, log_table in chain.occupancy():
            law[t] = prob @ log_table[:, -1].exp()
            left = chain.after_word(prob, log_table).sum()
    law[-1] = left
    return law
