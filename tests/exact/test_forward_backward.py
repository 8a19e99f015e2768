"""Forward–backward against enumeration: the same posterior, moments, lengths and best sequences,
for every kind of prior and any λ.
"""

import math

import pytest
import torch
from torch import Tensor

from klrl_edu import testing
from klrl_edu.core import logspace
from klrl_edu.core.draws import enumerate_executions, seeded_draw
from klrl_edu.core.errors import InfeasibleError, InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.evaluation.compare import compare
from klrl_edu.exact import forward_backward
from klrl_edu.exact.forward_backward import backward
from klrl_edu.exact.lattice import Lattice, build_lattice
from klrl_edu.exact.posterior import Posterior, feasible_prior, posterior
from klrl_edu.exact.structured import StructuredPosterior
from klrl_edu.learning import losses
from klrl_edu.learning.training import train
from klrl_edu.models.finite_state import FiniteStateModel
from klrl_edu.models.hmm import HiddenMarkovModel
from klrl_edu.models.ngram import NGramModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.problems.automata import (
    AutomatonReward,
    accept_reward,
    at_least,
    constraint,
    exactly,
    length_between,
)
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import count_reward, text_reward

INF = math.inf
LAMBDAS = [1.0, 0.1, 5.0, 0.0, INF, 1e-3, 5e-324]
PRIORS = ["unigram", "bigram", "trigram", "hmm-1", "hmm-3"]
WAYS = {
    "numbers": forward_backward._backward_in_numbers,
    "logs": forward_backward._backward_in_logs,
}


def random_problem(
    kind: str, kl_coef: float, seed: int, *, scale: float = 1.0, hard: bool = False
) -> Problem:
    """A random prior with zeros over 1 to 3 words and 1 to 4 positions, and a random reward on up
    to 4 states.
    """
    generator = torch.Generator().manual_seed(seed)
    space = SequenceSpace(("a", "b", "c")[: 1 + seed % 3], 1 + seed // 3 % 4, eos=seed % 2 == 0)
    words, states = len(space.vocabulary), 1 + seed % 4
    if kind.startswith("hmm"):
        prior: FiniteStateModel = HiddenMarkovModel.random(space, int(kind[-1]), seed=seed)
    else:
        shape = NGramModel(space, 1 + ["unigram", "bigram", "trigram"].index(kind)).logits.shape
        logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        zero = torch.rand(shape, generator=generator) < 0.25
        zero[:, 0] = False
        prior = NGramModel(
            space, 1 + ["unigram", "bigram", "trigram"].index(kind), logits.masked_fill(zero, -INF)
        )
    per_word, final = (
        scale * torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((states, words), (states,))
    )
    if hard:
        per_word = per_word.masked_fill(torch.rand(per_word.shape, generator=generator) < 0.2, -INF)
        final = final.masked_fill(torch.rand(final.shape, generator=generator) < 0.3, -INF)
    transitions = torch.randint(states, (states, words), generator=generator)
    return Problem(
        prior,
        AutomatonReward(space, transitions, seed % states, per_word, final, "a random automaton"),
        kl_coef,
    )


def both(problem: Problem, way: str) -> tuple[StructuredPosterior, Posterior] | None:
    """Forward–backward one way, and enumeration; None where that way or the problem does
    not apply.
    """
    lattice = build_lattice(problem)
    messages = WAYS[way](lattice)
    if messages is None:
        return None
    try:
        oracle = posterior(problem, "enumeration")
    except InfeasibleError:
        with pytest.raises(InfeasibleError, match="a random automaton"):
            StructuredPosterior(lattice, messages)
        return None
    return StructuredPosterior(lattice, messages), oracle


def close(seen: Tensor | float, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        *(torch.as_tensor(side, dtype=torch.float64).detach() for side in (seen, expected)),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kl_coef", LAMBDAS)
@pytest.mark.parametrize("kind", PRIORS)
def test_it_agrees_with_enumeration(kind, kl_coef, way, hard):
    for seed in range(12):
        pair = both(random_problem(kind, kl_coef, seed, hard=hard), way)
        if pair is None:
            continue
        model, oracle = pair
        support = oracle.enumerated()
        # log π* of size r/λ rounds by that size: at λ = 1e-3 the fourth digit of 1e-12 is lost
        size = max(1.0, float(oracle.log_probs[oracle.log_probs > -INF].abs().max()))
        close(model.log_prob(support.tokens), oracle.log_probs, 1e-12 * size)
        close(model.kl_to_prior(), logspace.kl_divergence(oracle.log_probs, support.log_prior))
        mean = logspace.expectation(oracle.log_probs, support.rewards)
        seen_mean, seen_variance = model.reward_moments()
        close(seen_mean, mean)
        close(seen_variance, logspace.expectation(oracle.log_probs, (support.rewards - mean) ** 2))
        lengths = (
            oracle.problem.space.live(support.tokens).sum(-1) - int(oracle.problem.space.eos)
        ).clamp(max=model.lattice.words)
        law = torch.zeros(model.lattice.words + 1, dtype=torch.float64).index_add(
            0, lengths, oracle.log_probs.exp()
        )
        close(model.length_law(), law)
        if not model.hidden:
            close(model.entropy(), logspace.entropy(oracle.log_probs))


@pytest.mark.parametrize("kl_coef", LAMBDAS)
@pytest.mark.parametrize("kind", ["bigram", "hmm-3"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_value_and_evidence_agree_with_enumeration(kind, kl_coef, hard):
    for seed in range(12):
        problem = random_problem(kind, kl_coef, seed, hard=hard)
        try:
            oracle = posterior(problem, "enumeration")
        except InfeasibleError:
            continue
        target = posterior(problem, "forward_backward")
        assert target.method == "forward_backward"
        close(target.value, oracle.value)
        close(target.log_evidence, oracle.log_evidence)


@pytest.mark.parametrize("kind", ["bigram", "hmm-3"])
@pytest.mark.parametrize("kl_coef", [0.1, 5e-324])
def test_huge_rewards_stay_finite(kind, kl_coef):
    for seed in range(12):
        pair = both(random_problem(kind, kl_coef, seed, scale=5e306), "logs")
        if pair is not None:
            close(pair[0].log_prob(pair[1].enumerated().tokens).exp(), pair[1].log_probs.exp())
            assert bool(torch.isfinite(pair[0].best_return))


@pytest.mark.parametrize("kind", PRIORS)
def test_it_keeps_the_laws_of_a_language_model(kind):
    for seed in (4, 7, 11):
        model = posterior(random_problem(kind, 0.5, seed), "forward_backward").model
        testing.check_language_model(model)


@pytest.mark.parametrize("kind", PRIORS)
def test_every_execution_of_its_sampler_gives_the_posterior(kind):
    for seed in (3, 4, 7, 8):
        problem = random_problem(kind, 0.5, seed, hard=seed % 2 == 0)
        try:
            oracle = posterior(problem, "enumeration")
        except InfeasibleError:
            continue
        model = posterior(problem, "forward_backward").model
        seen: dict[tuple[int, ...], float] = {}
        for run in enumerate_executions(
            lambda draw, model=model: tuple(model.sample(1, draw=draw)[0].tolist())
        ):
            seen[run.result] = seen.get(run.result, 0.0) + math.exp(run.log_prob)
        expected = dict(
            zip(
                map(tuple, oracle.enumerated().tokens.tolist()),
                oracle.log_probs.exp().tolist(),
                strict=True,
            )
        )
        assert seen == pytest.approx(
            {row: mass for row, mass in expected.items() if mass > 0}, rel=1e-11
        )


@pytest.mark.parametrize("seed", [8, 11], ids=["11 texts with EOS", "22 texts without"])
def test_many_samples_use_the_table_of_all_pairs_and_few_only_their_own(seed):
    problem = random_problem("bigram", 0.5, seed)
    testing.assert_samples_from(
        posterior(problem, "forward_backward").model.sample, posterior(problem, "enumeration").model
    )


@pytest.mark.parametrize("kind", ["unigram", "bigram", "trigram"])
def test_the_best_sequences_are_the_best_of_all(kind):
    for seed in range(16):
        pair = both(random_problem(kind, 0.5, seed, hard=seed % 3 == 0), "logs")
        if pair is None:
            continue
        model, oracle = pair
        top = model.top_sequences(5)
        expected = oracle.log_probs.sort(descending=True).values[:5]
        close(top.log_weights, expected[expected > -INF])
        close(model.log_prob(top.tokens), top.log_weights)


def test_counts_and_their_covariance_are_derivatives_of_the_evidence():
    problem = random_problem("bigram", 1.0, 11)
    words = list(problem.space.vocabulary)
    model = posterior(problem, "forward_backward").model
    oracle = posterior(problem, "enumeration")
    bonus = torch.zeros(len(words), dtype=torch.float64, requires_grad=True)
    counts = torch.stack(
        [(oracle.enumerated().tokens == k).sum(-1) for k in range(len(words))], 1
    ).double()
    log_evidence = torch.logsumexp(
        oracle.enumerated().log_prior + oracle.enumerated().rewards + counts @ bonus, 0
    )
    (gradient,) = torch.autograd.grad(log_evidence, bonus, create_graph=True)
    hessian = torch.stack(
        [torch.autograd.grad(part, bonus, retain_graph=True)[0] for part in gradient]
    )
    moments = model.count_moments(words)
    close(moments.mean, gradient)
    close(moments.covariance, hessian)


def test_a_space_of_ten_to_the_hundred_is_taken_by_auto_and_agrees_with_a_count():
    # exactly 7 of one word among 50 independent draws from 100 words: a binomial
    space = SequenceSpace(tuple(f"w{k}" for k in range(100)), 50, eos=False)
    problem = Problem(NGramModel(space, 2), constraint(exactly("w3", 7, space)), 1.0)
    target = posterior(problem)
    assert target.method == "forward_backward"
    assert space.size == 10**100
    log_binomial = (
        math.lgamma(51)
        - math.lgamma(8)
        - math.lgamma(44)
        + 7 * math.log(0.01)
        + 43 * math.log(0.99)
    )
    close(target.log_evidence, log_binomial)
    tokens = target.model.sample(50, draw=seeded_draw(0))
    assert bool(((tokens == 3).sum(-1) == 7).all())
    close(target.model.kl_to_prior(), -log_binomial)
    close(
        target.model.count_moments(["w3", "w4"]).mean,
        torch.tensor([7, 43 / 99], dtype=torch.float64),
    )


def test_a_policy_is_compared_by_samples_where_nothing_can_be_enumerated():
    space = SequenceSpace(tuple("abcdefgh"), 30, eos=False)
    problem = Problem(NGramModel(space, 2), count_reward("a", space), 2.0)
    target = posterior(problem)
    # the posterior itself: every log-ratio is 0, so the mean is exact
    same = compare(target.model, target, n=20, draw=seeded_draw(0))
    assert abs(same.reverse_kl) < 1e-12
    assert abs(same.forward_kl) < 1e-12
    # the prior: independent positions, where each step's KL is the same along every sequence, and
    # the mean over any sample is exact
    prior = compare(problem.prior, target, n=20, draw=seeded_draw(1))
    exact = 30 * (math.log((7 + math.exp(0.5)) / 8) - 0.5 / 8)
    assert prior.reverse_kl == pytest.approx(exact, rel=1e-12)
    assert prior.standard_error["reverse_kl"] < 1e-12
    # a policy whose steps differ: within 6 standard errors of the exact sum (false alarm below
    # 1e-8)
    generator = torch.Generator().manual_seed(3)
    policy = NGramModel(space, 2, torch.randn(9, 8, generator=generator, dtype=torch.float64))
    sampled, whole = compare(policy, target, n=400, draw=seeded_draw(2)), compare(policy, target)
    for name in ("reverse_kl", "forward_kl", "kl_to_prior", "expected_reward"):
        assert (
            0
            < abs(getattr(sampled, name) - getattr(whole, name))
            <= 6 * sampled.standard_error[name]
        )


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_an_ngram_policy_is_compared_exactly_context_by_context(order, hard, kl_coef):
    for seed in range(12):
        problem = random_problem("bigram", kl_coef, seed, hard=hard)
        try:
            oracle = posterior(problem, "enumeration")
        except InfeasibleError:
            continue
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(
            NGramModel(problem.space, order).logits.shape, generator=generator, dtype=torch.float64
        )
        policy = NGramModel(problem.space, order, logits)
        for approximation in (
            policy,
            problem.prior,
        ):  # with mass everywhere, and with the prior's zeros
            seen = compare(approximation, posterior(problem, "forward_backward")).metrics()
            expected = compare(approximation, oracle).metrics()
            for name in (
                "reverse_kl",
                "forward_kl",
                "kl_to_prior",
                "effective_sample_size",
                "uncovered_mass",
                "violating_mass",
            ):
                close(seen[name], expected[name], 1e-11)
            if math.isfinite(expected["reverse_kl"]):
                for name in ("expected_reward", "objective", "objective_gap"):
                    close(seen[name], expected[name], 1e-11)
            assert seen["total_variation"] is None


def test_an_ngram_is_trained_and_compared_exactly_where_nothing_can_be_enumerated():
    space = SequenceSpace(tuple("abcdefgh"), 30, eos=False)
    problem = Problem(NGramModel(space, 2).requires_grad_(False), count_reward("a", space), 1.0)
    target = posterior(problem)
    history = train(
        None,
        problem,
        losses.rloo,
        steps=60,
        batch_size=64,
        lr=0.05,
        draw=seeded_draw(0),
        target=target,
    )
    # independent positions: KL(q‖π*) = 30 (log((7 + e)/8) − 1/8), in closed form
    assert history["reverse_kl"][0] == pytest.approx(
        30 * (math.log((7 + math.e) / 8) - 1 / 8), rel=1e-12
    )
    assert history["reverse_kl"][-1] < history["reverse_kl"][0] / 10
    assert history["objective_gap"][-1] == pytest.approx(history["reverse_kl"][-1])


def test_auto_says_the_prefix_trie_for_a_network_with_an_automatons_reward():
    space = SequenceSpace(("a", "b"), 3)
    network = RecurrentModel(space, hidden_size=4)
    assert posterior(Problem(network, count_reward("a", space), 1.0)).method == "soft_bellman"
    assert (
        posterior(Problem(network, constraint(at_least("a", 1, space)), 1.0)).method
        == "soft_bellman"
    )
    assert posterior(Problem(network, text_reward(len, space), 1.0)).method == "enumeration"
    assert (
        posterior(Problem(NGramModel(space, 2), count_reward("a", space), 1.0)).method
        == "enumeration"
    )
    assert (
        posterior(
            Problem(NGramModel(space, 2), count_reward("a", space), 1.0), max_sequences=3
        ).method
        == "forward_backward"
    )


def test_messages_of_numbers_give_way_where_they_might_underflow():
    space = SequenceSpace(("a", "b"), 2000, eos=False)
    logits = torch.tensor([0.0, -800.0], dtype=torch.float64).expand(3, 2)
    lattice = build_lattice(
        Problem(NGramModel(space, 2, logits), constraint(exactly("b", 2, space)), 1.0)
    )
    assert forward_backward._backward_in_numbers(lattice) is None
    expected = math.lgamma(2001) - math.lgamma(3) - math.lgamma(1999) - 1600
    close(StructuredPosterior(lattice, backward(lattice)).log_mass, expected)


class Unnormalised(FiniteStateModel):
    """Emits with total mass 1.1."""

    def __init__(self, space):
        super().__init__()
        self.space = space

    def initial_log_probs(self):
        return torch.zeros(1, dtype=torch.float64)

    def emission_log_probs(self):
        return torch.full((1, 2), math.log(0.55), dtype=torch.float64)

    def successors(self):
        return torch.zeros(1, 1, dtype=torch.long)


def test_bad_problems_are_named():
    space, other = SequenceSpace(("a",), 3), SequenceSpace(("b",), 3)
    with pytest.raises(InfeasibleError, match="exactly 5 × 'a'"):
        posterior(
            Problem(NGramModel(space, 2), constraint(exactly("a", 5, space)), 1.0),
            "forward_backward",
        )
    both_lengths = length_between(0, 1, space) & length_between(2, 2, space)
    with pytest.raises(InfeasibleError, match=r"\(0 to 1 words\) and \(2 to 2 words\)"):
        posterior(Problem(NGramModel(space, 1), constraint(both_lengths), 1.0), "forward_backward")
    with pytest.raises(InputError, match=r"only here: \['a'\]; only there: \['b'\]"):
        build_lattice(Problem(NGramModel(space, 2), accept_reward(exactly("b", 1, other)), 1.0))
    with pytest.raises(InputError, match="RecurrentModel; forward-backward needs an n-gram"):
        build_lattice(Problem(RecurrentModel(space, hidden_size=2), count_reward("a", space), 1.0))
    with pytest.raises(InputError, match="no automaton is known for the reward 'len'"):
        build_lattice(Problem(NGramModel(space, 2), text_reward(len, space), 1.0))
    with pytest.raises(InputError, match=r"emission_log_probs sum to 1.1 in row 0"):
        build_lattice(Problem(Unnormalised(space), count_reward("a", space), 1.0))
    hidden = posterior(
        Problem(HiddenMarkovModel.random(space, 2), count_reward("a", space), 1.0),
        "forward_backward",
    ).model
    for question in (hidden.entropy, lambda: hidden.top_sequences(2)):
        with pytest.raises(InputError, match="samples"):
            question()
    with pytest.raises(InputError, match=r"\['z'\] are not in the vocabulary"):
        hidden.count_moments(["z"])


def test_too_many_numbers_are_refused_with_their_count():
    space = SequenceSpace(tuple(f"w{k}" for k in range(1000)), 10, eos=False)
    with pytest.raises(
        TooLargeError,
        match=r"1,001 contexts × 302 automaton states × 1,000 make 302,302,000 numbers",
    ):
        build_lattice(Problem(NGramModel(space, 2), constraint(exactly("w0", 300, space)), 1.0))


def test_the_feasible_prior_of_a_large_space_is_a_posterior_without_reward():
    space = SequenceSpace(tuple("abcdefgh"), 30, eos=False)
    prior = feasible_prior(Problem(NGramModel(space, 2), constraint(exactly("a", 1, space)), 0.5))
    assert isinstance(prior, StructuredPosterior)
    tokens = prior.sample(8, draw=seeded_draw(0))
    close(
        prior.log_prob(tokens),
        torch.full((8,), -math.log(30) - 29 * math.log(7), dtype=torch.float64),
    )


def test_a_lattice_moves_with_its_model():
    model = posterior(random_problem("hmm-3", 0.5, 4), "forward_backward").model
    assert isinstance(model.float().double().lattice, Lattice)
