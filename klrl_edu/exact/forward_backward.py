"""The messages of forward–backward: what may follow each pair of a lattice, in time linear in T.

    β_L(c,s) = e^{f(s)/λ},
    β_t(c,s) = q(EOS|c) e^{f(s)/λ} + Σ_k q(k|c) e^{w(s,k)/λ} E_{c'|c,k} β_{t+1}(c', δ(s,k))      (1)
    Z = Σ_c q(c) β_0(c, s₀),
    π*(k|c,s) = q(k|c) e^{w(s,k)/λ} E_{c'|c,k} β_{t+1}(c', δ(s,k)) / β_t(c,s)                    (2)

Rabiner (1989). The lattice and its letters are those of `lattice.py`. All logs in nats.

Two ways to compute the messages, with the same answer: as numbers, one matrix product a step, where
a bound shows that nothing can underflow; otherwise as logarithms beside the best return still in
reach (as in `soft_bellman`), for any reward and any λ ≥ 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.closed_forms.tilt import scaled_advantage
from klrl_edu.core import logspace
from klrl_edu.exact.lattice import Lattice

_MODERATE = 1e3  # T·max|r|/λ up to here rounds to 1e-13 nats when written into the messages
_SAFE = 1e-290  # the smallest product that a message made of numbers may contain
_RESCALE_EVERY = 16


class Messages(NamedTuple):
    """log β_t(c,s) [L+1,C,S], and what lies ahead of a word: log E_{c'} β_t(c',s) [L+1,C,S].

    Where `best` and `best_ahead` are given, every β is e^{best/λ} times these: `best` is the
    highest return in reach, in reward units.
    """

    log_mass: Tensor
    log_ahead: Tensor
    best: Tensor | None = None
    best_ahead: Tensor | None = None


def backward(lattice: Lattice) -> Messages:
    """The messages of (1); all −inf at the start where no sequence with prior mass is allowed."""
    messages = _backward_in_numbers(lattice)
    return _backward_in_logs(lattice) if messages is None else messages


# --- messages as numbers --------------------------------------------------------------------------


def _backward_in_numbers(lattice: Lattice) -> Messages | None:
    """(1) with one product of matrices a step; None where numbers would not do.

    They do where nothing can underflow and λ is no limit. A message is beta · e^shift.
    """
    weights = _plain_weights(lattice)
    if weights is None:
        return None
    word_weight, final_weight, word_shift, final_shift = weights
    emission = lattice.log_emission.exp()
    pull = _pull_in_numbers(lattice, emission[:, : lattice.successor.shape[1]], word_weight)
    # the first term of (1), EOS and then e^{f/λ}
    ends = final_weight[:, None] * emission[:, -1] if lattice.space.eos else None
    # [S,C], not [C,S]: short rows first make the products twice as fast
    beta = final_weight[:, None].expand(-1, lattice.contexts).contiguous()
    shift = final_shift
    betas, shifts = [beta], [shift]
    for step in range(1, lattice.words + 1):
        shift, beta = shift + word_shift, pull(beta)
        if ends is not None:  # two terms of different shifts, on the larger one
            top = max(shift, final_shift)
            beta = math.exp(shift - top) * beta + math.exp(final_shift - top) * ends
            shift = top
        if step % _RESCALE_EVERY == 0:  # long texts stay in the range of floats
            top = float(beta.amax())
            if not top > 0:
                return None
            beta, shift = beta / top, shift + math.log(top)
        betas.append(beta)
        shifts.append(shift)
    betas.reverse()
    shifts.reverse()
    stacked = torch.stack(betas)
    if _may_underflow(lattice, emission, stacked, word_weight, final_weight):
        return None
    log_shift = torch.tensor(shifts, dtype=torch.float64, device=stacked.device)[:, None, None]
    if lattice.log_transition is None:
        log_mass = stacked.mT.contiguous().log_().add_(log_shift)
        return Messages(log_mass, log_mass)
    mixed = torch.matmul(lattice.log_transition.exp(), stacked.mT)
    return Messages(stacked.mT.log() + log_shift, mixed.log() + log_shift)


def _plain_weights(lattice: Lattice) -> tuple[Tensor, Tensor, float, float] | None:
    """e^{w/λ} and e^{f/λ} with their largest exponents taken out, and those two exponents.

    None where λ is a limit, or an exponent is large.
    """
    rewards = torch.cat([lattice.word_rewards.reshape(-1), lattice.final_rewards])
    finite = rewards[rewards > -math.inf]
    largest = float(finite.abs().amax()) if len(finite) else 0.0
    if not 0 < lattice.kl_coef < math.inf:
        return None
    if not (lattice.words + 1) * largest <= _MODERATE * lattice.kl_coef:
        return None
    word, final = lattice.word_rewards / lattice.kl_coef, lattice.final_rewards / lattice.kl_coef
    word_top, final_top = float(word.amax()), float(final.amax())
    if word_top == -math.inf or final_top == -math.inf:
        return None
    return (word - word_top).exp(), (final - final_top).exp(), word_top, final_top


def _pull_in_numbers(
    lattice: Lattice, emission: Tensor, word_weight: Tensor
) -> Callable[[Tensor], Tensor]:
    """The step of (1): β_{t+1} [S,C] -> Σ_k q(k|c) e^{w(s,k)/λ} E β_{t+1}(c', δ(s,k)) [S,C].

    As a function made once for all steps, in the three shapes that a prior can have.
    """
    contexts, states, words = lattice.contexts, lattice.states, emission.shape[1]
    if lattice.log_transition is not None:
        # the context moves by itself: words only move the automaton, from s to s' by kernel[c,s,s']
        transition = lattice.log_transition.exp()
        kernel = emission.new_zeros(contexts, states, states)
        every_state = torch.arange(states, device=emission.device)
        for k in range(words):
            weight = emission[:, k : k + 1] * word_weight[:, k]
            kernel[:, every_state, lattice.next_state[:, k]] += weight

        def pull_hidden(beta: Tensor) -> Tensor:
            return torch.einsum("cst,ct->sc", kernel, transition @ beta.T)

        return pull_hidden

    if bool((lattice.successor == lattice.successor[:1]).all()):
        # the context is the last word: one product [S,K]·[K,C]
        place = (lattice.next_state * contexts + lattice.successor[0]).reshape(-1)
        by_word = emission.T.contiguous()
        all_ones = bool((word_weight == 1).all())

        def pull_bigram(beta: Tensor) -> Tensor:
            ahead = beta.view(-1).index_select(0, place).view(states, words)
            return (ahead if all_ones else ahead * word_weight) @ by_word

        return pull_bigram

    place = (lattice.next_state[:, None] * contexts + lattice.successor).reshape(-1)  # [S,C,K]
    edges = word_weight[:, None] * emission

    def pull(beta: Tensor) -> Tensor:
        ahead = beta.reshape(-1).index_select(0, place).view(states, contexts, words)
        return (ahead * edges).sum(-1)

    return pull


def _may_underflow(
    lattice: Lattice, emission: Tensor, betas: Tensor, word_weight: Tensor, final_weight: Tensor
) -> bool:
    """Whether a factor above zero became zero, or a product of them can have come near it.

    The product of each factor's least entry bounds every product in (1) from below.
    """
    factors = [
        (emission, lattice.log_emission),
        (word_weight, lattice.word_rewards),
        (final_weight, lattice.final_rewards),
    ]
    if lattice.log_transition is not None:
        factors.append((lattice.log_transition.exp(), lattice.log_transition))
    least = _least(betas)
    for numbers, logs in factors:
        smallest = float(numbers.amin())
        if smallest == 0 and bool(((numbers == 0) & (logs > -math.inf)).any()):
            return True
        least *= smallest or _least(numbers)
    return not least > _SAFE


def _least(values: Tensor) -> float:
    """The smallest entry above zero; 0 where there is none."""
    # one pass over the tensor where all entries are above zero, as they mostly are
    least = float(values.amin())
    if least > 0:
        return least
    positive = float(torch.where(values > 0, values, math.inf).amin())
    return positive if positive < math.inf else 0.0


# --- messages as logarithms -----------------------------------------------------------------------


def _backward_in_logs(lattice: Lattice) -> Messages:
    """(1) with each β as e^{m/λ}·e^ℓ, ℓ ≤ 0: finite for any reward, at any λ and in its limits."""
    best = lattice.final_rewards.expand(lattice.contexts, -1)
    mass = torch.where(best > -math.inf, 0.0, -math.inf)
    bests, masses, bests_ahead, masses_ahead = [best], [mass], [], []
    for step in range(lattice.words + 1):
        best_ahead, mass_ahead = _mix_in_logs(lattice, best, mass)
        bests_ahead.append(best_ahead)
        masses_ahead.append(mass_ahead)
        if step == lattice.words:
            break
        reward, log_q = _edges_in_logs(lattice, best_ahead, mass_ahead)
        best = reward.amax(-1)
        advantage = scaled_advantage(reward, best[..., None], lattice.kl_coef)
        mass = logspace.logsumexp(log_q + advantage)
        # −inf, not NaN, where there is no way on
        mass = torch.where(best > -math.inf, mass, -math.inf)
        bests.append(best)
        masses.append(mass)
    stacks = (torch.stack(part[::-1]) for part in (masses, masses_ahead, bests, bests_ahead))
    return Messages(*stacks)


def _mix_in_logs(lattice: Lattice, best: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of β(c',s) over the next context c' given c [C,S], as (m, ℓ)."""
    if lattice.log_transition is None:
        return best, mass
    log_q = lattice.log_transition[:, :, None]  # [c, c', s]
    reward = torch.where(log_q > -math.inf, best, -math.inf)
    top = reward.amax(1)
    advantage = scaled_advantage(reward, top[:, None], lattice.kl_coef)
    return top, logspace.logsumexp(log_q + advantage + mass, 1)


def _edges_in_logs(
    lattice: Lattice, best_ahead: Tensor, mass_ahead: Tensor
) -> tuple[Tensor, Tensor]:
    """What each column v of each (c,s) leads to: the best return, and log q(v|c) + ℓ ahead.

    Both are [C,S,V], and −inf where either is.
    """
    context, state = lattice.successor[:, None, :], lattice.next_state
    reward = lattice.word_rewards + best_ahead[context, state]
    log_q = lattice.log_emission[:, None, : state.shape[1]] + mass_ahead[context, state]
    if lattice.space.eos:
        final = lattice.final_rewards[None, :, None].expand(lattice.contexts, -1, 1)
        log_end = lattice.log_emission[:, None, -1:].expand(-1, lattice.states, 1)
        reward = torch.cat([reward, final], -1)
        log_q = torch.cat([log_q, log_end], -1)
    possible = (reward > -math.inf) & (log_q > -math.inf)
    return torch.where(possible, reward, -math.inf), torch.where(possible, log_q, -math.inf)
