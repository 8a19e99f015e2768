"""The messages of forward–backward: what may follow each pair of a lattice, in time linear in T.

    β_L(c,s) = e^{f(s)/λ},
    β_t(c,s) = q(EOS|c) e^{f(s)/λ} + Σ_k q(k|c) e^{w(s,k)/λ} E_{c'|c,k} β_{t+1}(c', δ(s,k))      (1)
    Z = Σ_c q(c) β_0(c, s₀),
    π*(k|c,s) = q(k|c) e^{w(s,k)/λ} E_{c'|c,k} β_{t+1}(c', δ(s,k)) / β_t(c,s)                    (2)

Rabiner (1989). The lattice and its letters are those of `lattice.py`. All logs in nats.

Two ways to compute the messages, with the same answer: as numbers, one matrix product a step, where
a bound shows that nothing can underflow; otherwise as logarithms beside a return still in reach (as
in `soft_bellman`), for any reward and any λ ≥ 0. Near the prior β is near 1, and the numbers are
those of β − 1, which obey the same recursion:

    β_L − 1 = expm1(f/λ),
    β_t − 1 = q(EOS|c) expm1(f/λ) + Σ_k q(k|c) [expm1(w/λ) + e^{w/λ} E(β_{t+1} − 1)]             (3)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from klrl_edu.closed_forms.soft_maximum import SoftMaximum, soft_maximum
from klrl_edu.core import logspace, ties
from klrl_edu.core.groups import Rows
from klrl_edu.exact.lattice import Lattice

_MODERATE = 1e3  # T·max|r|/λ up to here rounds to 1e-13 nats when written into the messages
_SAFE = 1e-290  # the smallest product that a message made of numbers may contain
_RESCALE_EVERY = 16
_FEW = 64.0  # T·max|r|/λ up to here leaves β − 1 far from overflow
_WELL_ABOVE_ZERO = 0.5  # |log β| from here on keeps its digits in β
_TINY = 1e-290


class Messages(NamedTuple):
    """log β_t(c,s) [L+1,C,S], and what lies ahead of a word: log E_{c'} β_t(c',s) [L+1,C,S].

    Where `anchor` and `anchor_ahead` are given, every β is e^{anchor/λ} times these: a return in
    reach, in reward units, and at λ = 0 the best, which rounding may have moved by `slack`.
    """

    log_mass: Tensor
    log_ahead: Tensor
    anchor: Tensor | None = None
    anchor_ahead: Tensor | None = None
    slack: Tensor | None = None
    slack_ahead: Tensor | None = None


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
    beta = stacked.mT.contiguous()
    mixed = beta if lattice.log_transition is None else lattice.log_transition.exp() @ beta
    # in place where β is not needed again: the largest tensor of all
    log_mass = (beta.log_() if mixed is beta else beta.log()).add_(log_shift)
    excess = _excess_in_numbers(lattice, emission) if _is_near_prior(lattice, log_mass) else None
    log_mass = _refined(log_mass, excess)
    if lattice.log_transition is None:
        return Messages(log_mass, log_mass)
    if excess is not None:  # the mean of β − 1 is that of β, less 1
        excess = lattice.log_transition.exp() @ excess
    return Messages(log_mass, _refined(mixed.log() + log_shift, excess))


def _is_near_prior(lattice: Lattice, log_mass: Tensor) -> bool:
    """Whether log Z is so near 0 that β itself has lost digits, and β − 1 is in range."""
    log_evidence = logspace.logsumexp(lattice.log_initial + log_mass[0, :, lattice.start])
    in_range = (lattice.words + 1) * _largest(lattice) <= _FEW * lattice.kl_coef
    return in_range and abs(float(log_evidence)) < _WELL_ABOVE_ZERO


def _excess_in_numbers(lattice: Lattice, emission: Tensor) -> Tensor:
    """β − 1 by (3): [L+1,C,S]."""
    word, final = lattice.word_rewards / lattice.kl_coef, lattice.final_rewards / lattice.kl_coef
    by_word, by_eos = emission[:, : word.shape[1]], emission[:, word.shape[1] :]
    pull = _pull_in_numbers(lattice, by_word, word.exp())
    # [S,C]: what a step adds by itself, whatever lies ahead
    earned = torch.expm1(word) @ by_word.T + torch.expm1(final)[:, None] * by_eos.sum(-1)
    excess = torch.expm1(final)[:, None].expand(-1, lattice.contexts).contiguous()
    listed = [excess]
    for _ in range(lattice.words):
        excess = earned + pull(excess)
        listed.append(excess)
    return torch.stack(listed[::-1]).mT


def _refined(log_mass: Tensor, excess: Tensor | None) -> Tensor:
    """log β, from β − 1 where that is near 0."""
    if excess is None:
        return log_mass
    return torch.where(log_mass.abs() < _WELL_ABOVE_ZERO, torch.log1p(excess), log_mass)


def _plain_weights(lattice: Lattice) -> tuple[Tensor, Tensor, float, float] | None:
    """e^{w/λ} and e^{f/λ} with their largest exponents taken out, and those two exponents.

    None where λ is a limit, or an exponent is large.
    """
    largest = _largest(lattice)
    if not 0 < lattice.kl_coef < math.inf:
        return None
    if not (lattice.words + 1) * largest <= _MODERATE * lattice.kl_coef:
        return None
    if largest > 0 and largest / lattice.kl_coef < _TINY:
        return None  # r/λ itself has lost its digits, where r has not
    word, final = lattice.word_rewards / lattice.kl_coef, lattice.final_rewards / lattice.kl_coef
    word_top, final_top = float(word.amax()), float(final.amax())
    if word_top == -math.inf or final_top == -math.inf:
        return None
    return (word - word_top).exp(), (final - final_top).exp(), word_top, final_top


def _largest(lattice: Lattice) -> float:
    """The largest |reward| of an edge that is allowed, in reward units; 0 if there is none."""
    rewards = torch.cat([lattice.word_rewards.reshape(-1), lattice.final_rewards])
    finite = rewards[rewards > -math.inf]
    return float(finite.abs().amax()) if len(finite) else 0.0


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
    """(1) with each β as e^{m/λ}·e^ℓ: finite for any reward, at any λ and in its limits."""
    anchor = lattice.final_rewards.expand(lattice.contexts, -1)
    mass = torch.where(anchor > -math.inf, torch.zeros_like(anchor), -math.inf)
    here = _Node(anchor, mass, torch.zeros_like(anchor))
    nodes, nodes_ahead = [here], []
    for step in range(lattice.words + 1):
        ahead = _mix_in_logs(lattice, here)
        nodes_ahead.append(ahead)
        if step == lattice.words:
            break
        here = _Node(*_step_in_logs(lattice, ahead)[:3])
        nodes.append(here)
    at, ahead = (
        _Node(*(torch.stack(part[::-1]) for part in zip(*listed, strict=True)))
        for listed in (nodes, nodes_ahead)
    )
    anchors, slacks = (at.anchor, ahead.anchor), (at.slack, ahead.slack)
    return Messages(at.log_mass, ahead.log_mass, *anchors, *slacks)


class _Node(NamedTuple):
    """β [C,S] as m and ℓ, and how far rounding may have moved m."""

    anchor: Tensor
    log_mass: Tensor
    slack: Tensor


def _mix_in_logs(lattice: Lattice, here: _Node) -> _Node:
    """The mean of β(c',s) over the next context c' given c."""
    if lattice.log_transition is None:
        return here
    log_q = lattice.log_transition[:, :, None]  # [c, c', s]
    mixed = soft_maximum(Rows(1), log_q, here.anchor, here.log_mass, lattice.kl_coef, here.slack)
    return _Node(*mixed[:3])


def _step_in_logs(lattice: Lattice, ahead: _Node) -> SoftMaximum:
    """The step of (1): the soft maximum over the columns v of each (c,s)."""
    context, state = lattice.successor[:, None, :], lattice.next_state
    anchor, log_mass, slack = (part[context, state] for part in ahead)
    reward = lattice.word_rewards + anchor  # [C,S,V]
    if lattice.kl_coef == 0:
        slack = slack + ties.addition_slack(lattice.word_rewards, anchor)
    log_q = lattice.log_emission[:, None].expand(-1, lattice.states, -1)
    if lattice.space.eos:  # nothing follows EOS: the final reward, log 1
        final = lattice.final_rewards[None, :, None].expand(lattice.contexts, -1, 1)
        reward = torch.cat([reward, final], -1)
        log_mass, slack = (torch.nn.functional.pad(part, (0, 1)) for part in (log_mass, slack))
    return soft_maximum(Rows(-1), log_q, reward, log_mass, lattice.kl_coef, slack)
