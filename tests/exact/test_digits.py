"""Digits at every λ, from 1e-8 to 1e100 and at infinity, by every method, against mpmath.

λ log Z ≈ E_q[r] + Var_q(r)/2λ and KL(π*‖q) ≈ Var_q(r)/2λ² near the prior: neither may drown in the
rounding of numbers near 1.
"""

import math
from collections.abc import Iterator

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mpf

from klrl_edu.closed_forms.budget import frontier
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.posterior import Posterior, posterior
from klrl_edu.models.hmm import HiddenMarkovModel
from klrl_edu.models.ngram import NGramModel
from klrl_edu.problems.automata import AutomatonReward
from klrl_edu.problems.examples import four_sentences
from klrl_edu.problems.problem import Problem
from tests.exact.dictionaries import INF

METHODS = ("enumeration", "soft_bellman", "forward_backward")
DIGITS = 250  # KL at λ = 1e100 is 1e-200, a difference of numbers near 1e-100
_SPACES = [SequenceSpace(("a", "b"), 3, eos=eos) for eos in (False, True)]


def exact(problem: Problem) -> tuple[list[mpf], list[mpf]]:
    """q and r of every sequence, from the n-gram's logits and the automaton's rewards."""
    prior, reward, space = problem.prior, problem.reward, problem.space
    laws = [normalised([mpf(x) for x in row]) for row in prior.logits.tolist()]
    q, r = [], []

    def walk(t: int, context: int, state: int, mass: mpf, earned: mpf) -> Iterator[None]:
        if t == space.max_length - space.eos:
            q.append(mass)
            r.append(earned + reward.final_rewards[state].item())
            return
        for word in range(len(space.vocabulary)):
            walk(
                t + 1,
                int(prior.successor[context, word]),
                int(reward.transitions[state, word]),
                mass * laws[context][word],
                earned + reward.word_rewards[state, word].item(),
            )
        if space.eos:
            q.append(mass * laws[context][-1])
            r.append(earned + reward.final_rewards[state].item())

    walk(0, 0, reward.start, mpf(1), mpf(0))
    return q, r


def normalised(logits: list[mpf]) -> list[mpf]:
    weights = [mpmath.exp(x) for x in logits]
    return [weight / mpmath.fsum(weights) for weight in weights]


def value_and_kl(q: list[mpf], r: list[mpf], lam: mpf) -> tuple[mpf, mpf]:
    """λ log Z in reward units and KL(π*‖q) in nats, as they are written."""
    if lam == INF:
        allowed = [(a, b) for a, b in zip(q, r, strict=True) if b > -INF]
        mass = mpmath.fsum(a for a, _ in allowed)
        if len(allowed) < len(q):
            return -mpmath.inf, -mpmath.log(mass)
        return mpmath.fsum(a * b for a, b in allowed), mpf(0)
    log_z = mpmath.log(mpmath.fsum(a * mpmath.exp(b / lam) for a, b in zip(q, r, strict=True)))
    tilted = [
        (a * mpmath.exp(b / lam - log_z), b / lam - log_z)
        for a, b in zip(q, r, strict=True)
        if b > -INF
    ]
    return lam * log_z, mpmath.fsum(p * u for p, u in tilted)


def close(seen: float, expected: mpf, scale: float = 0.0) -> None:
    """Within 1e-12 of the expected number itself."""
    if mpmath.isinf(expected) or expected == 0:
        assert seen == expected
    else:
        assert abs(mpf(seen) - expected) <= mpf(1e-12) * max(abs(expected), mpf(scale))


@st.composite
def problems(draw) -> Problem:
    """Bigrams and automata whose rewards, eighths, sum without rounding; some words are rare."""
    space = draw(st.sampled_from(_SPACES))
    columns = space.vocab_size
    logit = st.sampled_from([0.0, -1.0, 0.5, -0.125, 2.0, -25.0])
    logits = [[draw(logit) for _ in range(columns)] for _ in range(len(space.vocabulary) + 1)]
    reward = st.sampled_from([0.0, 0.125, 1.0, 2.5, 0.75] + [-INF] * draw(st.booleans()))
    words = [[draw(reward) for _ in space.vocabulary] for _ in range(2)]
    finals = [draw(st.sampled_from([0.0, 1.0])), 0.0]
    moves = torch.tensor([[draw(st.integers(0, 1)) for _ in space.vocabulary] for _ in range(2)])
    words[0][0] = 0.125  # something is allowed
    moves[0, 0] = 0
    kl_coef = draw(st.floats(-8, 100).map(lambda x: 10.0**x) | st.just(INF))
    return Problem(
        NGramModel(space, 2, torch.tensor(logits, dtype=torch.float64)),
        AutomatonReward(
            space,
            moves,
            0,
            torch.tensor(words, dtype=torch.float64),
            torch.tensor(finals, dtype=torch.float64),
            "eighths",
        ),
        kl_coef,
    )


def check(target: Posterior, value: mpf, kl: mpf) -> None:
    lam = target.problem.kl_coef
    # where forbidden mass cancels rewards, the digits are those of the rewards
    close(float(target.value), value, scale=float(1e-3 * (lam < INF)))
    if lam < INF:
        close(float(target.log_evidence), value / mpf(lam), scale=float(1e-3 / lam))
    else:
        close(float(target.log_evidence), -kl)
    if target.support is not None:
        support = target.support
        (found,) = frontier(support.log_prior, support.rewards, [lam]).kl.tolist()
    else:
        found = float(target.model.kl_to_prior())
    # equal rewards have KL 0, and ours the square of a rounding
    close(found, kl, scale=1e-17 * min(1.0, lam**-2))
    close(float(target.kl_to_prior()), kl, scale=1e-17 * min(1.0, lam**-2))


@given(problem=problems())
def test_every_method_keeps_its_digits_at_every_kl_coef(problem):
    with mpmath.workdps(DIGITS):
        q, r = exact(problem)
        value, kl = value_and_kl(q, r, mpf(problem.kl_coef))
        for method in METHODS:
            check(posterior(problem, method), value, kl)


@pytest.mark.parametrize("kl_coef", [1.0, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12, 1e16, 1e100])
@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
def test_the_four_sentences_keep_their_digits(kl_coef, method):
    with mpmath.workdps(DIGITS):
        q, r = [mpf(4) / 10, mpf(3) / 10, mpf(2) / 10, mpf(1) / 10], [1, 0, 0, 2]
        value, kl = value_and_kl(q, [mpf(x) for x in r], mpf(kl_coef))
        target = posterior(four_sentences(kl_coef), method)
        close(float(target.value), value)
        close(float(target.kl_to_prior()), kl)


@pytest.mark.parametrize("method", METHODS)
def test_at_infinity_the_evidence_is_one_to_the_last_digit(method):
    space = SequenceSpace(("a", "b", "c"), 3)
    prior = NGramModel(space, 2, torch.linspace(-1, 2, 16, dtype=torch.float64).view(4, 4))
    reward = AutomatonReward(
        space,
        torch.zeros(1, 3, dtype=torch.long),
        0,
        torch.tensor([[0.1, 0.5, 0.0]], dtype=torch.float64),
        torch.tensor([0.2], dtype=torch.float64),
        "letters",
    )
    target = posterior(Problem(prior, reward, INF), method)
    assert str(float(target.log_evidence)) == "0.0"
    for kl_coef in (1e100, 1e308):  # r/λ = 1e-308 has lost its digits; r has not
        near = posterior(Problem(prior, reward, kl_coef), method)
        assert float(near.value) == pytest.approx(float(target.value), rel=1e-15)


@pytest.mark.parametrize("kl_coef", [1e-8, 1e-3, 1.0, 1e5, 1e12, 1e100])
def test_hidden_contexts_keep_their_digits_too(kl_coef):
    # value, log Z and KL against the sequences, whose digits are held above
    space = SequenceSpace(("a", "b"), 3)
    reward = AutomatonReward(
        space,
        torch.tensor([[0, 1], [1, 0]]),
        0,
        torch.tensor([[0.25, 1.0], [0.0, 2.5]], dtype=torch.float64),
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        "eighths",
    )
    problem = Problem(HiddenMarkovModel.random(space, 3, seed=1), reward, kl_coef)
    hidden, listed = (posterior(problem, method) for method in ("forward_backward", "enumeration"))
    for name in ("value", "log_evidence"):
        assert float(getattr(hidden, name)) == pytest.approx(
            float(getattr(listed, name)), rel=1e-12
        )
    support = listed.enumerated()
    kl = float(frontier(support.log_prior, support.rewards, [kl_coef]).kl[0])
    assert float(hidden.model.kl_to_prior()) == pytest.approx(kl, rel=1e-12, abs=0)
    assert math.isfinite(kl)
