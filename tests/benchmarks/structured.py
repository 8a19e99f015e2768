"""A space of 10¹⁰⁰ sequences: log Z and exact samples against what one would write with torch
alone.
"""

import subprocess
import sys

import torch
from torch import Tensor

from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.forward_backward import backward
from klrl_edu.exact.lattice import Lattice, build_lattice
from klrl_edu.exact.structured import StructuredPosterior
from klrl_edu.models.ngram import NGramModel
from klrl_edu.problems.automata import AutomatonReward
from klrl_edu.problems.problem import Problem
from tests.benchmarks.measure import Ratio, ratio
from tests.exact.test_memory import PROGRAM

V, T, S, SAMPLES, KL_COEF = 100, 50, 10, 10_000, 0.5


def lattice() -> Lattice:
    """A random bigram prior over 100 words, T = 50, and a random automaton of 10 states with a
    reward for each final state.
    """
    generator = torch.Generator().manual_seed(0)
    space = SequenceSpace(tuple(f"w{k}" for k in range(V)), T, eos=False)
    prior = NGramModel(space, 2, torch.randn(V + 1, V, generator=generator, dtype=torch.float64))
    transitions = torch.randint(S, (S, V), generator=generator)
    final = torch.randn(S, generator=generator, dtype=torch.float64)
    reward = AutomatonReward(
        space, transitions, 0, torch.zeros(S, V, dtype=torch.float64), final, "ten states"
    )
    return build_lattice(Problem(prior, reward, KL_COEF))


def evidence_against_products() -> Ratio:
    """log Z against the T − 1 products of matrices that it cannot do without."""
    ours, table = lattice(), torch.rand(V, V, dtype=torch.float64)

    def bare() -> Tensor:
        messages = torch.ones(V, S, dtype=torch.float64)
        for _ in range(T - 1):
            messages = table @ messages
        return messages

    names = ("log Z over 10¹⁰⁰ sequences", "own ÷ T−1 bare products [V×V]·[V×S]")
    return ratio(*names, "≤ 2", lambda: StructuredPosterior(ours, backward(ours)).log_mass, bare)


def evidence_against_dense() -> Ratio:
    """log Z against products with the matrix over all pairs of word and state."""
    ours, dense = lattice(), torch.rand(V * S, V * S, dtype=torch.float64)

    def chain() -> Tensor:
        message = torch.ones(V * S, dtype=torch.float64)
        for _ in range(T - 1):
            message = dense @ message
        return message

    names = ("log Z over 10¹⁰⁰ sequences", "own ÷ T−1 dense products [VS×VS]·[VS]")
    return ratio(
        *names, "≤ 0.25", lambda: StructuredPosterior(ours, backward(ours)).log_mass, chain
    )


def samples_against_multinomial() -> Ratio:
    """10,000 exact samples, messages included, against a loop over time with batched
    torch.multinomial.
    """
    ours, generator, draw = lattice(), torch.Generator().manual_seed(0), seeded_draw(0)

    def loop() -> None:
        messages = backward(ours).log_mass
        context, state = torch.zeros(SAMPLES, dtype=torch.long), torch.full((SAMPLES,), ours.start)
        for t in range(T):
            ahead = messages[t + 1][ours.successor[context], ours.next_state[state]]
            word = torch.multinomial(
                torch.softmax(ours.log_emission[context] + ahead, -1), 1, generator=generator
            ).squeeze(1)
            context, state = ours.successor[context, word], ours.next_state[state, word]

    names = ("10,000 exact samples of 10¹⁰⁰ sequences", "loop with torch.multinomial ÷ own")
    return ratio(
        *names,
        "≥ 15",
        loop,
        lambda: StructuredPosterior(ours, backward(ours)).sample(SAMPLES, draw=draw),
    )


def peak_memory() -> Ratio:
    """Peak memory of enumerating count-threes above the start, in megabytes."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    walk, whole = (int(kilobytes) / 1024 for kilobytes in run.stdout.split())
    return Ratio(
        "peak memory of log q of all 262,144 sequences",
        "megabytes above the start",
        "≤ 250",
        walk,
        f"{whole:.0f} with the posterior",
    )
