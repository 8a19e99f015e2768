"""An n-gram policy π against the posterior π* of a lattice, by exact sums over all sequences.

No sequence is listed: both are chains, so every sum runs over the triples (π's context, the
prior's context, the automaton's state) that are reached. With p_t and π(·) the conditionals there,

    KL(π‖π*) = E_π Σ_t KL(π(·)‖p_t),    E_π[r] = E_π Σ_t w,    and so on                        (1)
    Σ_y π*²/π: F_L = 1,    F_t = Σ_v p_t(v)²/π(v) F_{t+1}                                        (2)

P triples, V columns, L words at most; letters as in `lattice.py`. Logs in nats.
"""

import math

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.exact.chain import PosteriorChain
from klrl_edu.exact.chain_moments import mean_where_reached
from klrl_edu.exact.support_sums import ExactSums
from klrl_edu.models.ngram import NGramModel
from klrl_edu.problems.automata import reachable_pairs


def sums_by_context(chain: PosteriorChain, policy: NGramModel) -> ExactSums:
    """Every sum of (1) and (2), by sweeps over the triples.

    Total variation and Jensen–Shannon are left out: their terms are no products along a sequence.

    Raises:
        InputError: hidden contexts, which no finite set of triples sums out.
    """
    lattice = chain.lattice
    if lattice.hidden:
        raise InputError(
            "a posterior over a hidden Markov prior is compared by samples: compare(policy,"
            " target, n=, draw=)."
        )
    after, mine, pair = reachable_pairs(policy.successor, 0, lattice.next_pair, chain.start_pair())
    log_pi, log_q = policy.emission_log_probs()[mine], lattice.pair_emission()[pair]
    tables = (chain.word_log_weights(t)[pair] for t in range(lattice.words))
    star = [logspace.log_normalize_alive(table) for table in tables]  # log p_t
    pi = [log_pi] * lattice.words

    final = lattice.final_rewards[pair % lattice.states]
    rewards = lattice.word_rewards[pair % lattice.states]
    if lattice.space.eos:
        rewards = torch.cat([rewards, final[:, None]], -1)
    reward = [logspace.expectation(log_pi, rewards)] * lattice.words

    # what has no mass on the other side leaves by a column on the way, or at a forced end: the
    # chain goes on along the columns that both take
    forbidden = final == -math.inf
    covered = [torch.where(log_p > -math.inf, log_pi, -math.inf) for log_p in star]
    leaving = [torch.where(log_p > -math.inf, 0.0, log_pi.exp()).sum(-1) for log_p in star]
    shared = [torch.where(log_pi > -math.inf, log_p, -math.inf) for log_p in star]
    missing = [torch.where(log_pi > -math.inf, 0.0, log_p.exp()).sum(-1) for log_p in star]
    # π*²/π, factor by factor
    squares = [torch.where(log_p > -math.inf, 2 * log_p - log_pi, -math.inf) for log_p in star]

    return ExactSums(
        reverse_kl=_along(pi, after, [logspace.kl_divergence(log_pi, log_p) for log_p in star]),
        forward_kl=_along(star, after, [logspace.kl_divergence(log_p, log_pi) for log_p in star]),
        kl_to_prior=_along(pi, after, [logspace.kl_divergence(log_pi, log_q)] * lattice.words),
        expected_reward=_along(pi, after, reward, final),
        log_second_moment=_log_total(squares, after, torch.where(forbidden, -math.inf, 0.0)),
        uncovered_mass=_along(shared, after, missing),
        violating_mass=_along(covered, after, leaving, forbidden.double()),
    )


def _along(
    log_steps: list[Tensor], after: Tensor, gains: list[Tensor], ends: Tensor | None = None
) -> Tensor:
    """E Σ_t gain_t [P] along the chain of conditionals [P,V] that starts at triple 0, a scalar.

    `ends` [P] is gained where the last token is forced.
    """
    prob = torch.zeros(len(after), dtype=torch.float64, device=after.device)
    prob[0] = 1
    total = prob.new_zeros(())
    for log_p, gain in zip(log_steps, gains, strict=True):
        total = total + mean_where_reached(prob, gain)
        moved = prob[:, None] * log_p[:, : after.shape[1]].exp()
        prob = torch.zeros_like(prob).index_add(0, after.reshape(-1), moved.reshape(-1))
    return total if ends is None else total + mean_where_reached(prob, ends)


def _log_total(log_steps: list[Tensor], after: Tensor, ends: Tensor) -> Tensor:
    """(2) backwards: the log of a sum over sequences of the product of their weights.

    A sequence ends by EOS, or by `ends` [P] once L words are read.
    """
    ahead, words = ends, after.shape[1]
    for log_w in reversed(log_steps):
        by_word, by_eos = log_w[:, :words], log_w[:, words:]
        # where π misses π* the sum beyond may be inf, and 0·inf is 0
        going = torch.where(by_word > -math.inf, by_word + ahead[after], -math.inf)
        ahead = logspace.logsumexp(torch.cat([going, by_eos], -1))
    return ahead[0]
