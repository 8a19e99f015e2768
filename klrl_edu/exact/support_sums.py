"""An approximation π against an enumerated posterior π*: exact sums over all sequences.

Both distributions on the prior's support, and one outcome more for whatever mass the approximation
has elsewhere. The mass elsewhere is summed edge by edge along the trie, so it is exactly 0 for a
restricted policy and exact for a tiny one. K supported sequences, T tokens; logs in nats.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.core.weighted import WeightedSequences
from klrl_edu.exact.enumeration import Support
from klrl_edu.models.contract import LanguageModel, advance, batch_prompt, block_size, force_eos
from klrl_edu.models.table import SequenceTable


class ExactSums(NamedTuple):
    """Sums over all sequences, scalars; None for what was not summed.

    Attributes:
        reverse_kl: KL(π‖π*) in nats; forward_kl: KL(π*‖π); kl_to_prior: KL(π‖q).
        expected_reward: E_π[r] in reward units, over the prior's support, and over what is not
            forbidden where it was summed by contexts.
        log_second_moment: log Σ π*²/π in nats, where π covers π*.
        uncovered_mass: of π* where π has none.
        violating_mass: of π where π* has none.
        total_variation: ½ Σ |π − π*|.
        jensen_shannon: ½ KL(π‖m) + ½ KL(π*‖m) with m = ½(π + π*), in nats.
    """

    reverse_kl: Tensor
    forward_kl: Tensor
    kl_to_prior: Tensor
    expected_reward: Tensor
    log_second_moment: Tensor
    uncovered_mass: Tensor
    violating_mass: Tensor
    total_variation: Tensor | None = None
    jensen_shannon: Tensor | None = None


def sums_on_support(
    approximation: LanguageModel | WeightedSequences,
    support: Support,
    log_posterior: Tensor,
    prompt: Tensor | None = None,
) -> ExactSums:
    """Every sum, from the K sequences of the support and log π* [K] on them."""
    # one outcome more, for all that is not on the support: only π can have mass there
    on_support, elsewhere = support_log_mass(approximation, support.tokens, support.trie, prompt)
    nothing = elsewhere.new_full((1,), -math.inf)
    log_pi = torch.cat([on_support, elsewhere.reshape(1)])
    log_star = torch.cat([log_posterior, nothing])
    log_q = torch.cat([support.log_prior, nothing])
    rewards = torch.cat([support.rewards, torch.zeros_like(nothing)])
    # m = ½(π + π*) has mass wherever either has, so both divergences from it are finite
    log_middle = torch.logaddexp(log_pi, log_star) - math.log(2)
    to_middle = logspace.kl_divergence(log_pi, log_middle)
    star_to_middle = logspace.kl_divergence(log_star, log_middle)
    covered = log_star > -math.inf
    return ExactSums(
        reverse_kl=logspace.kl_divergence(log_pi, log_star),
        forward_kl=logspace.kl_divergence(log_star, log_pi),
        kl_to_prior=logspace.kl_divergence(log_pi, log_q),
        expected_reward=logspace.expectation(log_pi, rewards),
        log_second_moment=logspace.logsumexp(2 * log_star[covered] - log_pi[covered]),
        uncovered_mass=log_star[log_pi == -math.inf].exp().sum(),
        violating_mass=log_pi[~covered].exp().sum(),
        total_variation=_total_variation(log_pi, log_star),
        jensen_shannon=(to_middle + star_to_middle) / 2,
    )


def _total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ |p − q| of normalised log-probabilities [K], by |p − q| = max(p, q)·(1 − e^{−|log p/q|}).

    Where p > q and where q > p the differences have one sum, the total variation; that over the
    side of less mass has the smaller error, as what it loses to rounding is its mass by 1e-16.
    """
    larger = torch.maximum(log_p, log_q)
    gap = torch.where(larger > -math.inf, (log_p - log_q).abs(), 0.0)
    difference = -logspace.mul_exp(torch.expm1(-gap), larger)
    sides = [side for side in (log_p > log_q, log_q > log_p) if bool(side.any())]
    if not sides:
        return torch.zeros_like(larger[0])
    return difference[min(sides, key=lambda side: float(larger[side].exp().sum()))].sum()


def support_log_mass(
    approximation: LanguageModel | WeightedSequences,
    tokens: Tensor,
    trie: PrefixTrie,
    prompt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log-mass of an approximation on each sequence of a trie [K], and everywhere else [].

    Args:
        tokens: the sequences [K,T].
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
    """log-mass [K] of a trie's sequences and of all else, reading each node once."""
    space = model.space
    on_support = torch.full((rows,), -math.inf, dtype=torch.float64, device=trie.key.device)
    elsewhere = []
    root = torch.zeros(1, dtype=torch.long, device=trie.key.device)
    # blocks of one depth: depth, nodes, rows of the parents' state, log-masses, that state, tokens
    stack = [(0, root, root, root.double(), None, root)]
    while stack:
        depth, node, row, before, state, token = stack.pop()
        if depth == 0:
            logits, state = model.start(1, batch_prompt(prompt, 1))
        else:
            logits, state = advance(model, state, row, token)
        last = depth == space.max_length - 1
        going_on = torch.zeros_like(node, dtype=torch.bool)  # a node of the trie has not ended
        log_probs = before[:, None] + force_eos(logits, going_on, last, space)
        on_edge = trie.scatter_edges(torch.ones_like(trie.key, dtype=torch.bool), node, False)
        # a token that is no edge takes all that follows it off the trie
        elsewhere.append(logspace.logsumexp(log_probs.masked_fill(on_edge, -math.inf).reshape(-1)))
        row, token = on_edge.nonzero(as_tuple=True)
        edge, child = trie.follow(node[row], token)
        mass = log_probs[row, token]
        ends, goes_on = child < 0, child >= 0
        on_support[trie.leaf[edge[ends]]] = mass[ends]
        size = block_size(space.vocab_size)
        pieces = (part[goes_on].split(size) for part in (child, row, mass, token))
        for nodes, rows_of, masses, tokens in zip(*pieces, strict=True):
            if len(nodes):  # an empty tensor splits into one empty piece
                stack.append((depth + 1, nodes, rows_of, masses, state, tokens))
    return on_support, logspace.logsumexp(torch.stack(elsewhere))


def _table_log_mass(
    weighted: WeightedSequences, rows: int, trie: PrefixTrie
) -> tuple[Tensor, Tensor]:
    """log-mass [K] of a trie's sequences and of all else, in a list of weighted sequences."""
    _, edges = trie.find(weighted.tokens)
    last = weighted.space.live(weighted.tokens).sum(-1, keepdim=True) - 1
    last_edge = edges.gather(1, last).squeeze(-1)
    # the row after the last one gathers what lies elsewhere
    row = torch.where(last_edge >= 0, trie.leaf[last_edge.clamp(min=0)], rows)
    masses = logspace.segment_logsumexp(weighted.log_probs, row, rows + 1)
    return masses[:-1], masses[-1]
