"""Surrogates against the gradients of enumerated divergences, the course's numbers, and random
problems.
"""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klrl_edu.audit.cases import AuditCase
from klrl_edu.audit.claims.catalogue import answers_case, four_sentences_case
from klrl_edu.core import logspace
from klrl_edu.estimators import kl_gradients
from klrl_edu.models.contract import sequence_log_probs
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.problem import Problem
from klrl_edu.testing import policies, problems
from tests.estimators.cases import called, expectations, flat_gradient, truths, vector, whole_batch
from tests.exact.dictionaries import assert_close

ON_POLICY = {
    "reward_k1": "reverse_kl",
    "reward_k1_to_go": "reverse_kl",
    "reward_rao_blackwell_to_go": "reverse_kl",
    "loss_k2": "reverse_kl",
    "loss_k3": "forward_kl",
    "loss_k2_token": "reverse_kl_per_token",
    "loss_k3_token": "forward_kl_per_token",
    "loss_clamped_k3_token": "forward_kl_per_token",  # no k3 is above 10 here
    "loss_full_kl": "reverse_kl_per_token",
    "loss_full_forward_kl": "forward_kl_per_token",
    "reward_and_loss_k1": "reverse_kl",
    "reward_and_loss_k2": "half_square",
    "reward_and_loss_k3": "reverse_kl",
    "reward_and_loss_k3_token": "reverse_kl",
    "rao_blackwell_to_go": "reverse_kl",
    "straight_through_k2": "reverse_kl_per_token",
    "live_ratio_k3_token": "reverse_kl_per_token",
    "live_ratio_k3_prefix": "reverse_kl",
    "live_ratio_k3": "reverse_kl",
    "detached_ratio_k3_token": "forward_kl_per_token",
    "detached_ratio_k3": "forward_kl",
    "off_policy_unweighted": "reverse_kl",
    "off_policy_token": "reverse_kl_per_token",
    "off_policy_prefix": "reverse_kl",
    "off_policy_sequence": "reverse_kl",
}
OFF_POLICY = {
    "live_ratio_k3_token": "reverse_kl_per_token on μ's prefixes",
    "live_ratio_k3_prefix": "reverse_kl",
    "live_ratio_k3": "reverse_kl",
    "detached_ratio_k3_token": "forward_kl_per_token on μ's prefixes",
    "detached_ratio_k3": "forward_kl",
    "off_policy_unweighted": "half_square of μ",
    "off_policy_token": "reverse_kl_per_token on μ's prefixes",
    "off_policy_prefix": "reverse_kl",
    "off_policy_sequence": "reverse_kl",
}
DIFFERENCES = {  # placements that follow a difference of two gradients
    "reward_k3": ("reverse_kl", "forward_kl"),
    "reward_k3_token": ("reverse_kl", "forward_kl_per_token"),
    "reward_full_kl": ("reverse_kl", "reverse_kl_per_token"),
}
CASES = {"four sentences": four_sentences_case, "answers of several lengths": answers_case}
case_of = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def close(seen, expected):
    assert float((seen - expected).norm()) < 1e-13, (seen, expected)


@case_of
@pytest.mark.parametrize(("name", "target"), ON_POLICY.items())
def test_on_policy_each_surrogate_follows_what_it_says(case, name, target):
    close(expectations(getattr(kl_gradients, name), case())[0], truths(case())[target])


@case_of
@pytest.mark.parametrize(("name", "target"), OFF_POLICY.items())
def test_off_policy_each_surrogate_follows_what_it_says(case, name, target):
    close(
        expectations(getattr(kl_gradients, name), case(), off_policy=True)[0],
        truths(case())[target],
    )


@case_of
@pytest.mark.parametrize(("name", "pair"), DIFFERENCES.items())
def test_what_is_put_into_the_reward_lacks_its_own_derivative(case, name, pair):
    known = truths(case())
    close(expectations(getattr(kl_gradients, name), case())[0], known[pair[0]] - known[pair[1]])


@case_of
def test_k1_as_a_loss_is_noise_around_zero(case):
    mean, variance = expectations(kl_gradients.loss_k1, case())
    assert float(mean.norm()) < 1e-15
    assert variance > 0.1


@case_of
def test_the_absolute_value_follows_twice_the_total_variation(case):
    close(
        expectations(kl_gradients.loss_absolute_k1, case())[0],
        2 * truths(case())["total_variation"],
    )


@case_of
def test_the_absolute_value_of_a_token_follows_twice_the_total_variation_of_its_conditional(case):
    case = case()
    whole = whole_batch(case)
    variation = (whole.log_dists.exp() - whole.prior_log_dists.exp()).abs().sum((-1, -2))
    expected = flat_gradient(
        (whole.log_probs.detach().sum(-1).exp() * variation).sum(), case.policy
    )
    close(expectations(kl_gradients.loss_absolute_k1_token, case)[0], expected)


def test_the_claims_tell_the_targets_apart():
    """A broken twin would pass only where two targets are equal; on the answers no two are."""
    known = list(truths(answers_case()).items())
    for index, (name, one) in enumerate(known):
        for other, two in known[index + 1 :]:
            assert float((one - two).norm()) > 1e-3, (name, other)


@settings(max_examples=15)
@given(data=st.data())
def test_the_unbiased_ones_are_so_for_any_problem_and_policies(data):
    problem = data.draw(problems(max_words=2, max_length=2, forbid=False))
    policy, behaviour = data.draw(policies(problem)), data.draw(policies(problem))
    case = AuditCase("drawn", policy, problem, behaviour)
    known = truths(case)
    largest = max(float(value.norm()) for value in known.values())
    for name, target in ON_POLICY.items():
        if name != "loss_clamped_k3_token":
            assert_close(
                expectations(getattr(kl_gradients, name), case)[0], known[target], 10 * largest
            )
    for name, target in OFF_POLICY.items():
        assert_close(
            expectations(getattr(kl_gradients, name), case, off_policy=True)[0],
            known[target],
            10 * largest,
        )


def test_a_batch_averages():
    case = answers_case()
    one, two = (expectations(kl_gradients.reward_and_loss_k3_token, case, size) for size in (1, 2))
    close(one[0], two[0])
    assert two[1] == pytest.approx(one[1] / 2, rel=1e-12)


# --- the course's numbers -------------------------------------------------------------------------


def one_token(probs, prior):
    """A distribution over single words, in its logits."""
    words = "abcd"[: len(probs)]
    q = SequenceTable.from_texts(dict(zip(words, prior, strict=True)))
    return AuditCase(
        "one token",
        SequenceTable.from_texts(dict(zip(words, probs, strict=True))),
        Problem(q, lambda tokens, prompt: torch.zeros(len(tokens)), 1.0),
        q,
    )


def test_the_four_sentences_of_t06():
    case = four_sentences_case()
    assert expectations(kl_gradients.loss_k2, case)[0].tolist() == pytest.approx(
        [0.061675, -0.101052, -0.079294, 0.118671], abs=5.1e-7
    )
    assert expectations(kl_gradients.loss_k3, case)[0].tolist() == pytest.approx(
        [0.1, -0.1, -0.1, 0.1], abs=1e-15
    )


def test_a_reversed_reference():
    case = one_token((0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4))
    assert expectations(kl_gradients.reward_k1, case)[0].tolist() == pytest.approx(
        [0.3719, -0.0153, -0.1724, -0.1843], abs=5.1e-5
    )
    assert expectations(kl_gradients.loss_k3, case)[0].tolist() == pytest.approx(
        [0.3, 0.1, -0.1, -0.3], abs=1e-15
    )


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("loss_k1", 0.0),
        ("loss_k2", 1.386294361120),
        ("loss_k3", 1.875),
        ("reward_k1", 1.386294361120),
    ],
)
def test_a_coin_by_the_probability_itself(name, slope):
    """P = 0.8 against Q = 0.5, d/dp: KL' = log 4, and k3 as a loss follows 1 − (½/p) … = 1.875
    instead.
    """
    total = 0.0
    for heads in (True, False):
        p = vector(0.8).requires_grad_()
        log_prob = torch.log(p if heads else 1 - p)
        (gradient,) = torch.autograd.grad(
            getattr(kl_gradients, name)(log_prob[None], vector(math.log(0.5))[None]), p
        )
        total += (0.8 if heads else 0.2) * float(gradient)
    assert total == pytest.approx(slope, abs=5.1e-13)


# --- sample by sample -----------------------------------------------------------------------------


@given(data=st.data())
def test_k2_in_the_loss_and_k3_in_both_are_k1_in_the_reward_sample_by_sample(data):
    values = st.lists(st.floats(-3, 0), min_size=4, max_size=4)
    log_probs, prior = (vector(*data.draw(values)).reshape(2, 2) for _ in "pq")
    gradients = []
    for surrogate in (
        kl_gradients.reward_k1,
        kl_gradients.loss_k2,
        kl_gradients.reward_and_loss_k3,
    ):
        leaf = log_probs.clone().requires_grad_()
        gradients.append(torch.autograd.grad(surrogate(leaf, prior), leaf)[0])
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
    assert torch.allclose(gradients[0], gradients[2], rtol=1e-12, atol=1e-12)


def test_the_straight_through_surrogate_shows_k3_and_pulls_as_k2():
    log_probs, prior = (
        vector(-1.0, -2.0).reshape(1, 2).requires_grad_(),
        vector(-3.0, -0.5).reshape(1, 2),
    )
    value = kl_gradients.straight_through_k2(log_probs, prior)
    assert float(value.detach()) == pytest.approx(
        math.exp(-2) - 1 + 2 + math.exp(1.5) - 1 - 1.5, rel=1e-14
    )
    assert torch.autograd.grad(value, log_probs)[0].tolist() == [[2.0, -1.5]]


def test_a_clamped_k3_lets_go_of_what_is_furthest_away():
    """q/π = 13.6 is just below k3 = 10: beyond it the pull back is gone."""
    for log_ratio, pulls in ((-math.log(13.5), True), (-math.log(13.7), False)):
        log_probs = vector(log_ratio)[None].requires_grad_()
        (gradient,) = torch.autograd.grad(
            kl_gradients.loss_clamped_k3_token(log_probs, torch.zeros(1, 1, dtype=torch.float64)),
            log_probs,
        )
        assert (float(gradient) != 0) == pulls


def test_later_divergence_is_what_the_per_token_loss_misses():
    """The two-step example: after 0 policy and prior agree, after 1 they are opposed, so the first
    token decides the KL to come.
    """
    case = two_steps()
    known = truths(case)
    assert float(known["reverse_kl"].norm()) > 2 * float(known["reverse_kl_per_token"].norm())
    for name in ("reward_k1_to_go", "rao_blackwell_to_go", "live_ratio_k3_prefix"):
        close(expectations(getattr(kl_gradients, name), case)[0], known["reverse_kl"])


def two_steps():
    policy = SequenceTable.from_texts({"0 0": 0.25, "0 1": 0.25, "1 0": 0.005, "1 1": 0.495})
    prior = SequenceTable.from_texts(
        {"0 0": 0.125, "0 1": 0.125, "1 0": 0.7425, "1 1": 0.0075}, space=policy.space
    )
    problem = Problem(prior, lambda tokens, prompt: torch.zeros(len(tokens)), 1.0)
    return AuditCase("two steps", policy, problem, prior)


@settings(max_examples=10)
@given(data=st.data())
def test_the_gradient_is_that_of_finite_differences(data):
    """Rao–Blackwell with return to go, by next-token logits; central differences of KL at h = 1e-5
    are good to about 1e-9.
    """
    problem = data.draw(problems(max_words=2, max_length=2, forbid=False))
    tokens = problem.prior.tokens[problem.prior.log_probs.detach() > -math.inf]
    policy = data.draw(policies(problem))
    seen = expectations(
        kl_gradients.rao_blackwell_to_go, AuditCase("drawn", policy, problem, policy)
    )[0]
    log_q, slopes, h = sequence_log_probs(problem.prior, tokens).detach(), [], 1e-5
    with torch.no_grad():
        for parameter in policy.parameters():
            for index in range(parameter.numel()):
                old, values = float(parameter.view(-1)[index]), []
                for shift in (h, -h):
                    parameter.view(-1)[index] = old + shift
                    values.append(
                        float(logspace.kl_divergence(sequence_log_probs(policy, tokens), log_q))
                    )
                parameter.view(-1)[index] = old
                slopes.append((values[0] - values[1]) / (2 * h))
    assert seen.tolist() == pytest.approx(slopes, abs=1e-8 * max(1.0, float(log_q.abs().max())))


# --- where mass is zero, and in vmap --------------------------------------------------------------


def test_full_distributions_with_zeros_have_finite_gradients():
    problem = four_sentences_case().problem
    policy = PrefixTable.from_model(problem.prior, problem.prior.tokens)
    case = AuditCase("drawn", policy, problem, policy)
    whole = whole_batch(case)
    assert bool((whole.log_dists == -math.inf).any())
    for surrogate in (kl_gradients.loss_full_kl, kl_gradients.loss_full_forward_kl):
        gradient = flat_gradient(surrogate(whole.log_dists, whole.prior_log_dists), policy)
        assert bool(torch.isfinite(gradient).all())
    value = kl_gradients.rao_blackwell_to_go(
        whole.log_probs, whole.log_dists, whole.prior_log_dists
    )
    assert bool(torch.isfinite(flat_gradient(value, policy)).all())


@pytest.mark.parametrize("name", ON_POLICY)
def test_surrogates_run_under_vmap(name):
    whole, surrogate = whole_batch(answers_case()), getattr(kl_gradients, name)
    wanted = [
        parameter
        for parameter in inspect.signature(surrogate).parameters
        if hasattr(whole, parameter)
    ]
    fields = [getattr(whole, field).detach().unflatten(0, (3, 2)) for field in wanted]

    def value(*parts):
        return surrogate(**dict(zip(wanted, parts, strict=True)))

    together = torch.func.vmap(torch.func.grad(value))(*fields)
    apart = torch.stack([torch.func.grad(value)(*(field[i] for field in fields)) for i in range(3)])
    assert torch.allclose(together, apart, rtol=1e-12, atol=1e-14)


# --- over a batch ---------------------------------------------------------------------------------


SURROGATES = [
    name
    for name, one in vars(kl_gradients).items()
    if getattr(one, "__module__", "") == kl_gradients.__name__
]


@pytest.mark.parametrize("name", SURROGATES)
def test_the_surrogate_of_a_batch_is_the_mean_of_its_sequences(name):
    whole = whole_batch(answers_case())
    function = getattr(kl_gradients, name)
    alone = [float(called(function, whole.pick(torch.tensor([i]))).detach()) for i in range(5)]
    together = called(function, whole.pick(torch.arange(5)))
    assert float(together.detach()) == pytest.approx(math.fsum(alone) / 5, rel=1e-12, abs=1e-15)
