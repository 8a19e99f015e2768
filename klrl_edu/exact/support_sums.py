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
    """Sums over all sequences, scalars: KLs in nats, E_π[r] in reward units (over the prior's
    support, and over what is not forbidden where it was summed by contexts), log Σ π*²/π where π
    covers π*, the masses of π* where π has none and of π where π* has none, ½ Σ |π − π*|, and
    ½ KL(π‖m) + ½ KL(π*‖m) with m = ½(π + π*); None for what was not summed.
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
    on_support, elsewhere = support_log_mass(approximation, support.tokens, support.trie, prompt)
    nothing = elsewhere.new_full((1,), -math.inf)
    log_pi = torch.cat([on_support, elsewhere.reshape(1)])
    log_star = torch.cat([log_posterior, nothing])
    log_q = torch.cat([support.log_prior, nothing])
    rewards = torch.cat([support.rewards, torch.zeros_like(nothing)])
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
        total_variation=(log_pi.exp() - log_star.exp()).abs().sum() / 2,
        jensen_shannon=(to_middle + star_to_middle) / 2,
    )


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
