"""An n-gram policy against a lattice's posterior: exact where nothing can be enumerated, and the
same as on the enumerated support.
"""

import math

import pytest
import torch

from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import InfeasibleError, InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.evaluation.compare import compare
from klrl_edu.exact.posterior import posterior
from klrl_edu.learning import losses
from klrl_edu.learning.training import train
from klrl_edu.models.ngram import NGramModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import count_reward
from tests.exact.lattices import close, random_problem


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


def test_what_no_finite_set_of_contexts_sums_out_is_told_to_take_samples():
    plain = posterior(random_problem("bigram", 1.0, 8), "forward_backward")
    network = RecurrentModel(plain.problem.space, hidden_size=2)
    with pytest.raises(
        InputError, match=r"by forward_backward, without enumerating its support.*n=, draw="
    ):
        compare(network, plain)
    hidden = posterior(random_problem("hmm-3", 1.0, 8), "forward_backward")
    with pytest.raises(InputError, match=r"hidden Markov prior is compared by samples.*n=, draw="):
        compare(NGramModel(hidden.problem.space, 1), hidden)


def test_both_posteriors_give_the_same_sums():
    problem = random_problem("bigram", 0.5, 8)
    listed, by_context = (
        posterior(problem, method).against(problem.prior)
        for method in ("enumeration", "forward_backward")
    )
    for one, other in zip(by_context, listed, strict=True):
        if one is not None:
            close(one, other)
    assert by_context.total_variation is None
    assert float(listed.total_variation) > 0
