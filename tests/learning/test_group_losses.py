"""What the named losses follow on-policy, over every ordered batch: RLOO, GRPO and its kin, PPO,
f-DPG; and what clipping does.
"""

import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klrl_edu.audit.cases import AuditCase
from klrl_edu.audit.claims.catalogue import answers_case, four_sentences_case
from klrl_edu.core.errors import InputError
from klrl_edu.estimators import advantages
from klrl_edu.exact.posterior import posterior
from klrl_edu.learning import losses
from klrl_edu.models.contract import conditional_log_probs
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.problem import Problem
from klrl_edu.testing import policies, problems
from tests.estimators.cases import expectations, flat_gradient, truths, vector, whole_batch
from tests.exact.dictionaries import INF, assert_close

CASES = {"four sentences": four_sentences_case, "answers of several lengths": answers_case}
case_of = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SIX = {"abs": 5.1e-7}


def close(seen, expected):
    assert float((seen - expected).norm()) < 1e-13, (seen, expected)


def on_policy(case):
    whole = whole_batch(case)
    return dataclasses.replace(whole, behaviour_log_probs=whole.log_probs.detach())


def pairs(case, advantage, share):
    """−E over two samples of A(r, r') · share(L, L') · s(y), by a double loop: what a group of two
    follows, if A is odd.
    """
    whole = whole_batch(case)
    log_pi, r, length = (
        whole.log_probs.sum(-1),
        whole.rewards.sum(-1).tolist(),
        whole.live.sum(-1).tolist(),
    )
    pi, total = log_pi.detach().exp().tolist(), 0.0
    for i, j in itertools.product(range(len(pi)), repeat=2):
        total = (
            total - pi[i] * pi[j] * advantage(r[i], r[j]) * share(length[i], length[j]) * log_pi[i]
        )
    return flat_gradient(total, case.policy)


def sign(a, b):
    return float(a > b) - float(a < b)


def sample_score(a, b, epsilon=1e-4):
    """(r − mean)/(sample std + ε) of the first of two."""
    return (a - b) / 2 / (abs(a - b) / math.sqrt(2) + epsilon) if a != b else 0.0


# --- the course's numbers, in sequence logits -----------------------------------------------------


def test_rloo_without_kl_follows_the_expected_reward_of_t11():
    case = four_sentences_case()
    reward_only = case._replace(problem=dataclasses.replace(case.problem, kl_coef=0.0))
    assert expectations(losses.rloo, reward_only, 2)[0].tolist() == pytest.approx(
        [-0.05, 0.18, 0.09, -0.22], abs=1e-15
    )


def test_grpo_of_two_follows_another_direction_by_the_numbers_of_t11():
    case = four_sentences_case()
    seen = -expectations(losses.z_score, case, 2)[0]
    assert seen.tolist() == pytest.approx([0.05, -0.14, -0.07, 0.16], abs=1e-15)
    ascent = -truths(case)["expected_reward"]
    assert float(seen @ ascent / (seen.norm() * ascent.norm())) == pytest.approx(0.998022, **SIX)


def test_the_sample_std_scales_it_by_a_root_of_half_and_epsilon_shrinks_it_further():
    case = four_sentences_case()
    population = expectations(losses.z_score, case, 2)[0]
    without, with_it = (
        2 * expectations(partial(losses.grpo_without_kl, epsilon=e), case, 2)[0]
        for e in (0.0, 1e-4)
    )  # T = 2
    close(without, math.sqrt(0.5) * population)
    assert bool((with_it.abs() < without.abs()).all())
    assert float((with_it - without).norm()) < 2e-4 * float(without.norm())


# --- baselines and placements ---------------------------------------------------------------------


@case_of
@pytest.mark.parametrize("size", [2, 3])
def test_the_batch_mean_shrinks_the_gradient_to_g_minus_one_over_g(case, size):
    case = case() if size == 2 else four_sentences_case()
    known = truths(case)
    close(expectations(losses.group_mean, case, size)[0], (size - 1) / size * known["objective"])
    close(
        expectations(losses.dr_grpo, case, size)[0],
        (size - 1) / size / whole_batch(case).tokens.shape[1] * known["expected_reward"],
    )
    close(expectations(losses.rloo, case, size)[0], known["objective"])


@case_of
def test_z_scores_of_two_follow_who_wins(case):
    case = case()
    close(expectations(losses.z_score, case, 2)[0], pairs(case, sign, lambda a, b: 1))


@case_of
def test_grpo_weighs_by_length_and_adds_the_forward_divergence_where_that_is_one(case):
    """With lengths that vary it is not even E[(1/L) Σ_t ∇KL(q_t‖π_t)], as 1/L depends on the token
    whose score it weighs.
    """
    case = case()
    followed = pairs(case, sample_score, lambda a, b: 1 / a)
    close(expectations(losses.grpo_without_kl, case, 2)[0], followed)
    whole = whole_batch(case)
    slope = (1 - torch.exp(whole.prior_log_probs - whole.log_probs)).detach()  # of k3 by log π_t
    weight = whole.log_probs.detach().sum(-1).exp() / whole.live.sum(-1)
    penalty = flat_gradient((weight * (slope * whole.log_probs).sum(-1)).sum(), case.policy)
    close(expectations(losses.grpo, case, 2)[0], followed + case.problem.kl_coef * penalty)
    known = truths(case)["forward_kl_per_token"]
    assert (float((2 * penalty - known).norm()) < 1e-13) == bool(whole.live.all())


@case_of
def test_dapo_divides_by_the_length_of_the_whole_batch(case):
    case = case()
    # a batch of two sums to A s + A' s' over L + L': twice the mean over who is first
    close(
        expectations(losses.dapo, case, 2)[0], pairs(case, sample_score, lambda a, b: 2 / (a + b))
    )


@case_of
@pytest.mark.parametrize(
    ("one", "other"), [(losses.gspo, losses.grpo_without_kl), (losses.cispo, losses.dapo)]
)
def test_on_policy_two_methods_are_one_sample_by_sample(case, one, other):
    case = case()
    whole = on_policy(case)
    for rows in itertools.combinations_with_replacement(range(len(whole.tokens)), 3):
        batch = whole.pick(torch.tensor(rows))
        close(flat_gradient(one(batch), case.policy), flat_gradient(other(batch), case.policy))


def test_grpo_does_not_rest_at_the_posterior():
    """There r − λu is constant and RLOO has nothing left to learn; GRPO's z-score and forward KL
    pull on.
    """
    case = answers_case()
    target = posterior(case.problem)
    tokens = case.problem.prior.tokens
    at_star = SequenceTable(case.problem.space, tokens, target.model.log_prob(tokens).detach())
    star = case._replace(policy=at_star)
    assert float(expectations(losses.rloo, star, 2)[0].norm()) < 1e-14
    assert float(expectations(losses.grpo, star, 2)[0].norm()) > 1e-2


def test_grpo_on_wins_and_losses_follows_its_closed_form():
    """r in {0, 1}: E_{k~Bin(G,p)}[√(k/G (1 − k/G))] ∇p/(p(1 − p))."""
    case = four_sentences_case()
    won = Problem(
        case.problem.prior, lambda tokens, prompt: (tokens[:, 1] == 2).double(), 1.0
    )  # a cat
    case = case._replace(problem=won)
    p, slope = 0.6, -truths(case)["expected_reward"]
    for size in (2, 3):
        spread = sum(
            math.comb(size, k) * p**k * (1 - p) ** (size - k) * math.sqrt(k / size * (1 - k / size))
            for k in range(size + 1)
        )
        close(expectations(losses.z_score, case, size)[0], -spread / (p * (1 - p)) * slope)


@settings(max_examples=10)
@given(data=st.data())
def test_the_unbiased_losses_are_so_for_any_problem_and_policy(data):
    problem = data.draw(problems(max_words=2, max_length=2, forbid=False))
    policy = data.draw(policies(problem))
    case = AuditCase("drawn", policy, problem, policy)
    truth = truths(case)["objective"]
    largest = 10 * (
        1
        + float(whole_batch(case).rewards.abs().max())
        + problem.kl_coef * float(whole_batch(case).prior_log_probs.abs().max())
    )
    assert_close(expectations(losses.reinforce, case)[0], truth, largest)
    assert_close(expectations(losses.rloo, case, 2)[0], truth, largest)
    assert_close(expectations(partial(losses.ppo_clip, values=0.7), case)[0], truth, largest)


# --- PPO ------------------------------------------------------------------------------------------


@case_of
def test_ppo_on_policy_is_exact_for_any_values_without_decay_and_not_with_it(case):
    case = case()
    values = (
        conditional_log_probs(case.problem.prior, whole_batch(case).tokens)[..., 0].exp().detach()
    )  # any function of the prefix
    whole, pi, bias = on_policy(case), whole_batch(case).log_probs.detach().sum(-1).exp(), {}
    for decay in (1.0, 0.5):
        total = sum(
            pi[i] * losses.ppo_clip(whole.pick(torch.tensor([i])), values[i : i + 1], decay=decay)
            for i in range(len(pi))
        )
        bias[decay] = float((flat_gradient(total, case.policy) - truths(case)["objective"]).norm())
    assert bias[1.0] < 1e-13
    assert bias[0.5] > 1e-2


def one_step(ratio, reward, **changes):
    """A batch of one token that was drawn with probability ½, whose policy now has `ratio` times
    that.
    """
    log_prob = vector(math.log(0.5 * ratio))[None].requires_grad_()
    batch = whole_batch(four_sentences_case()).pick(torch.tensor([0]))
    half = vector(math.log(0.5))[None]
    fields = {
        "log_probs": log_prob,
        "behaviour_log_probs": half,
        "prior_log_probs": half,
        "rewards": vector(reward)[None],
        "live": torch.ones(1, 1) > 0,
    }
    return dataclasses.replace(batch, **{**fields, **changes})


@pytest.mark.parametrize(
    ("ratio", "reward", "moves"),
    [(1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (1.1, 1.0, True)],
)
def test_the_clip_stops_what_already_went_far_enough_and_nothing_else(ratio, reward, moves):
    batch = one_step(ratio, reward)
    loss = losses.ppo_clip(batch)
    (slope,) = torch.autograd.grad(loss, batch.log_probs)
    assert float(slope) == pytest.approx(-ratio * reward if moves else 0.0, rel=1e-14)
    assert float(loss.detach()) == pytest.approx(
        -reward * (ratio if moves else (1.2 if reward > 0 else 0.8)), rel=1e-14
    )


def test_cispo_keeps_the_gradient_of_a_clipped_token():
    def two(ratio):
        other = one_step(1.0, 0.0)
        batch = one_step(ratio, 1.0)
        names = (
            "log_probs",
            "behaviour_log_probs",
            "prior_log_probs",
            "rewards",
            "live",
            "group",
            "kl_coef",
            "tokens",
        )
        joined = {
            name: torch.cat([getattr(part, name).detach() for part in (batch, other)])
            for name in names
        }
        return dataclasses.replace(
            batch,
            **{
                **joined,
                "log_probs": joined["log_probs"].requires_grad_(),
                "log_dists": None,
                "prior_log_dists": None,
            },
        )

    score = sample_score(1.0, 0.0)
    for ratio, weight in ((1.5, 1.5), (1.9, 1.6)):
        batch = two(ratio)
        (slope,) = torch.autograd.grad(losses.cispo(batch, clip_high=0.6), batch.log_probs)
        assert slope[:, 0].tolist() == pytest.approx([-weight * score / 2, score / 2], rel=1e-12)
    batch = two(1.9)
    (slope,) = torch.autograd.grad(losses.dapo(batch), batch.log_probs)
    assert float(slope[0, 0]) == 0  # dropped there


def two_answers(ratio):
    """Two one-word answers of rewards 1 and 0, each `ratio` times as probable as when drawn."""
    case = four_sentences_case()
    batch = whole_batch(case).pick(torch.tensor([0, 3]))
    first = torch.zeros_like(batch.rewards)
    first[0, 0] = 1
    behaviour = (batch.log_probs - math.log(ratio)).detach()
    return dataclasses.replace(batch, behaviour_log_probs=behaviour, rewards=first)


@pytest.mark.parametrize(
    ("name", "lowest", "highest", "won", "lost"),
    [
        ("grpo", 0.8, 1.2, sample_score(1, 0), sample_score(0, 1)),
        ("grpo_without_kl", 0.8, 1.2, sample_score(1, 0), sample_score(0, 1)),
        ("dapo", 0.8, 1.28, sample_score(1, 0), sample_score(0, 1)),
        ("gspo", 1 - 3e-4, 1 + 4e-4, sample_score(1, 0), sample_score(0, 1)),
        ("dr_grpo", 0.8, 1.2, 0.5, -0.5),
        ("ppo_clip", 0.8, 1.2, 1, 0),  # no baseline, and the reward is that of one token
    ],
)
def test_each_loss_clips_where_it_was_published_to(name, lowest, highest, won, lost):
    for ratio in (0.5, 0.9999, 1.0001, 1.15, 1.25, 2.0):
        batch = dataclasses.replace(two_answers(ratio), kl_coef=torch.zeros(2).double())
        # the answer that won stops at the upper bound, the one that lost at the lower one
        expected = -(min(ratio, highest) * won + max(ratio, lowest) * lost) / 2
        value = float(getattr(losses, name)(batch).detach())
        assert value == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_cispos_weight_ends_at_five_and_has_no_gradient():
    advantage = torch.tensor([[sample_score(1, 0)], [sample_score(0, 1)]], dtype=torch.float64)
    for ratio, weight in ((0.1, 0.1), (4.9, 4.9), (5.1, 5.0), (8.0, 5.0)):
        batch = two_answers(ratio)
        value = losses.cispo(batch)
        expected = -weight * (advantage * batch.log_probs.detach()).sum() / 4
        assert float(value.detach()) == pytest.approx(float(expected), rel=1e-12)
        (gradient,) = torch.autograd.grad(value, batch.log_probs)
        assert torch.allclose(gradient, -weight * advantage / 4, rtol=1e-12, atol=0)


def test_gspo_takes_the_geometric_mean_of_the_ratios():
    whole = whole_batch(four_sentences_case())
    batch = whole.pick(torch.tensor([0, 3]))  # rewards 1 and 2
    ratio = torch.exp((batch.log_probs - batch.behaviour_log_probs).detach().sum(-1) / 2)
    score = sample_score(2.0, 1.0)
    expected = -(float(ratio[1]) * score - float(ratio[0]) * score) / 2
    assert float(losses.gspo(batch, clip_low=0.9, clip_high=9.0).detach()) == pytest.approx(
        expected, rel=1e-13
    )


# --- f-DPG ----------------------------------------------------------------------------------------


@case_of
@pytest.mark.parametrize(
    "name",
    [
        "reverse_kl",
        "forward_kl",
        "total_variation",
        "jensen_shannon",
        "chi_squared",
        "squared_hellinger",
    ],
)
def test_f_dpg_descends_its_divergence_to_the_posterior(case, name):
    case = case()
    target = posterior(case.problem)
    whole = whole_batch(case)
    log_pi, p = (
        whole.log_probs.sum(-1),
        whole_batch(case).prior_log_probs.sum(-1)
        + whole.rewards.sum(-1) / case.problem.kl_coef
        - target.log_evidence,
    )
    pi, p = log_pi.exp(), p.exp()
    divergence = {
        "reverse_kl": lambda: (pi * (pi / p).log()).sum(),
        "forward_kl": lambda: -(p * log_pi).sum(),
        "total_variation": lambda: (pi - p).abs().sum() / 2,
        "jensen_shannon": (
            lambda: (
                ((pi * (2 * pi / (pi + p)).log()).sum() + (p * (2 * p / (pi + p)).log()).sum()) / 2
            )
        ),
        "chi_squared": lambda: (p * (pi / p - 1).square()).sum() / 2,
        "squared_hellinger": lambda: (pi.sqrt() - p.sqrt()).square().sum() / 2,
    }[name]()
    loss = partial(
        losses.f_dpg,
        pseudo_reward=getattr(advantages, f"fdpg_{name}"),
        log_evidence=target.log_evidence,
    )
    close(expectations(lambda batch: loss(batch), case)[0], flat_gradient(divergence, case.policy))


def test_f_dpg_of_the_reverse_divergence_is_the_objective_and_needs_no_evidence():
    case = answers_case()
    for guess in (0.0, 3.0):
        loss = partial(losses.f_dpg, pseudo_reward=advantages.fdpg_reverse_kl, log_evidence=guess)
        close(
            expectations(lambda batch, loss=loss: loss(batch), case)[0],
            truths(case)["objective"] / case.problem.kl_coef,
        )


# --- refusals and edges ---------------------------------------------------------------------------

GROUPED = (
    losses.z_score,
    losses.grpo,
    losses.grpo_without_kl,
    losses.dapo,
    losses.gspo,
    losses.cispo,
)


@pytest.mark.parametrize("loss", GROUPED)
def test_equal_rewards_teach_nothing_one_alone_is_an_error_and_so_is_a_forbidden_one(loss):
    case = four_sentences_case()
    batch = on_policy(case).pick(torch.tensor([1, 2, 1]))  # rewards 0, 0, 0
    gradient = flat_gradient(
        loss(dataclasses.replace(batch, kl_coef=torch.zeros(3, dtype=torch.float64))), case.policy
    )
    assert float(gradient.norm()) == 0
    with pytest.raises(InputError, match="group 0 holds one sequence"):
        loss(on_policy(case).pick(torch.tensor([1])))
    forbidden = batch.rewards.clone()
    forbidden[0, 1] = -INF
    with pytest.raises(InputError, match=r"values\[0\] = -inf is not finite"):
        loss(dataclasses.replace(batch, rewards=forbidden))


@pytest.mark.parametrize(
    "loss",
    [*GROUPED, losses.reinforce, losses.rloo, losses.group_mean, losses.dr_grpo, losses.ppo_clip],
)
def test_losses_run_under_vmap(loss):
    whole = whole_batch(answers_case())
    fields = {
        name: value.detach().unflatten(0, (3, 2))
        for name, value in whole.tensors().items()
        if name not in ("group", "kl_coef")
    }
    shared = {"group": whole.group[:2], "kl_coef": whole.kl_coef[:2]}

    def value(log_probs, rest):
        return loss(dataclasses.replace(whole, **{**rest, **shared, "log_probs": log_probs}))

    leaf = fields.pop("log_probs")
    together = torch.func.vmap(torch.func.grad(value))(leaf, fields)
    apart = torch.stack(
        [
            torch.func.grad(value)(leaf[i], {name: field[i] for name, field in fields.items()})
            for i in range(3)
        ]
    )
    assert torch.allclose(together, apart, rtol=1e-12, atol=1e-14)


def test_groups_do_not_mix():
    """Two prompts of two in one batch: RLOO and the z-score see each alone."""
    whole = on_policy(four_sentences_case())
    batch = dataclasses.replace(
        whole.pick(torch.tensor([0, 1, 2, 3])), group=torch.tensor([0, 0, 1, 1])
    )
    apart = [
        dataclasses.replace(whole.pick(torch.tensor(rows)), group=torch.zeros(2, dtype=torch.long))
        for rows in ([0, 1], [2, 3])
    ]
    for loss in (losses.rloo, losses.z_score, losses.grpo):
        assert float(loss(batch).detach()) == pytest.approx(
            sum(float(loss(part).detach()) for part in apart) / 2, abs=1e-14
        )
