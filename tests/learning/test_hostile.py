"""Numbers that nobody means, in losses, sources and training: a right value, or one line that names
the argument; and rewards and probabilities at the ends of the floats.
"""

import dataclasses
import math

import pytest
import torch

from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import DivergedError, InputError, UnsupportedPolicyError
from klrl_edu.estimators import advantages
from klrl_edu.learning import losses, sources
from klrl_edu.learning.optimizers import MuonWithAdam
from klrl_edu.learning.training import train
from klrl_edu.models.table import SequenceTable
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward

NAN, INF = math.nan, math.inf
HOSTILE = (NAN, INF, -INF, -1, -1.5, 0, True, 1.5, 1e30, 1j, "1", None)


def refuses(call, name, but=()):
    """Each of HOSTILE is refused in one line that names the argument, except what has a meaning."""
    for value in HOSTILE:
        if any(value is meant for meant in but):
            call(value)
            continue
        with pytest.raises(InputError, match=name) as error:
            call(value)
        assert "\n" not in str(error.value)


def batch_of(texts, *, kl_coef=1.0):
    """Sequences of the four-sentence policy, scored."""
    problem = dataclasses.replace(four_sentences(), kl_coef=kl_coef)
    whole = sources.support(problem)(four_sentences_policy())
    order = problem.space.decode(whole.tokens)
    return whole.pick(torch.tensor([order.index(text) for text in texts]))


PAIR = ["the cat", "a dog"]
ANY_CLIP = (0, 1.5, 1e30, INF)
# loss -> its numbers, each with what has a meaning
NUMBERS = {
    "reinforce": {"baseline": (-1, -1.5, 0, 1.5, 1e30)},
    "ppo_clip": {"values": (-1, -1.5, 0, 1.5, 1e30), "clip": ANY_CLIP, "decay": (0,)},
    "grpo": {"clip": ANY_CLIP, "epsilon": (0, 1.5, 1e30)},
    "grpo_without_kl": {"clip": ANY_CLIP, "epsilon": (0, 1.5, 1e30)},
    "dr_grpo": {"clip": ANY_CLIP},
    "dapo": {"clip_low": ANY_CLIP, "clip_high": ANY_CLIP, "epsilon": (0, 1.5, 1e30)},
    "gspo": {"clip_low": ANY_CLIP, "clip_high": ANY_CLIP, "epsilon": (0, 1.5, 1e30)},
    "cispo": {"clip_high": ANY_CLIP, "epsilon": (0, 1.5, 1e30)},
    "f_dpg": {"log_evidence": (-1, -1.5, 0, 1.5, 1e30)},
}
SWEEP = [(name, number) for name, numbers in NUMBERS.items() for number in numbers]


@pytest.mark.parametrize(("name", "number"), SWEEP)
def test_each_number_of_a_loss_gives_a_value_or_one_line_that_names_it(name, number):
    batch = batch_of(PAIR)
    fixed = {"pseudo_reward": advantages.fdpg_reverse_kl} if name == "f_dpg" else {}

    def call(value):
        seen = getattr(losses, name)(batch, **fixed, **{number: value})
        assert bool(torch.isfinite(seen))

    refuses(call, f"{number} = ", NUMBERS[name][number])


@pytest.mark.parametrize("name", ["grpo_without_kl", "dapo", "gspo", "dr_grpo", "ppo_clip"])
def test_an_infinite_clip_clips_nothing(name):
    batch = batch_of(PAIR)
    drawn = batch.log_probs.detach().clone()
    drawn[1] -= 3  # the ratio of the answer that won is e³
    far = dataclasses.replace(batch, behaviour_log_probs=drawn)
    clips = ("clip_low", "clip_high") if name in ("dapo", "gspo") else ("clip",)
    free, bounded, usual = (
        float(getattr(losses, name)(far, **options).detach())
        for options in (dict.fromkeys(clips, INF), dict.fromkeys(clips, 1e9), {})
    )
    assert free == pytest.approx(bounded, rel=1e-12)
    assert free != pytest.approx(usual, rel=1e-3)


def with_field(batch, name, row, value):
    field = getattr(batch, name).clone()
    field[row, -1] = value
    return dataclasses.replace(batch, **{name: field})


PENALISED = ("reinforce", "rloo", "group_mean", "ppo_clip", "exact")
CENTRED = ("z_score", "grpo", "grpo_without_kl", "dr_grpo", "dapo", "gspo", "cispo")


@pytest.mark.parametrize("name", PENALISED + CENTRED)
@pytest.mark.parametrize("kl_coef", [0.0, 1.0])
def test_a_reward_of_minus_infinity_is_refused_by_every_loss(name, kl_coef):
    batch = dataclasses.replace(batch_of(PAIR, kl_coef=kl_coef), complete=True)
    hard = with_field(batch, "rewards", 1, -INF)
    if name in CENTRED:
        with pytest.raises(InputError, match=r"values\[1\] = -inf is not finite, so its group"):
            getattr(losses, name)(hard)
        return
    said = r"sequence 1 of the batch has reward -inf, .* so r − λu is not finite .*feasible_prior"
    with pytest.raises(UnsupportedPolicyError, match=said):
        getattr(losses, name)(hard)


@pytest.mark.parametrize("name", [*PENALISED, "grpo"])
@pytest.mark.parametrize("kl_coef", [0.0, 1.0])
def test_a_sequence_without_prior_mass_is_refused_at_every_kl_coef(name, kl_coef):
    batch = dataclasses.replace(batch_of(PAIR, kl_coef=kl_coef), complete=True)
    outside = with_field(batch, "prior_log_probs", 0, -INF)
    with pytest.raises(UnsupportedPolicyError, match=r"sequence 0 of the batch has .* log q -inf"):
        getattr(losses, name)(outside)


@pytest.mark.parametrize("name", ["z_score", "grpo_without_kl", "dr_grpo", "dapo", "gspo", "cispo"])
def test_losses_that_do_not_read_the_prior_do_not_ask_for_its_mass(name):
    batch = batch_of(PAIR)
    outside = with_field(batch, "prior_log_probs", 0, -INF)
    assert torch.equal(getattr(losses, name)(outside), getattr(losses, name)(batch))


def test_the_exact_loss_does_not_mind_what_the_policy_never_gives():
    whole = sources.support(four_sentences())(four_sentences_policy())
    logs = torch.tensor([[0.0, math.log(0.5)], [0, math.log(0.5)], [0, -INF], [0, -INF]])
    half = dataclasses.replace(whole, log_probs=logs.double().requires_grad_())
    hard = with_field(with_field(half, "rewards", 3, -INF), "prior_log_probs", 2, -INF)
    value = losses.exact(hard)
    assert torch.equal(value, losses.exact(half))
    (gradient,) = torch.autograd.grad(value, half.log_probs)
    assert bool(torch.isfinite(gradient).all())


def test_f_dpg_needs_a_kl_coef_and_knows_a_target_without_mass():
    batch = batch_of(PAIR, kl_coef=0.0)
    with pytest.raises(InputError, match="kl_coef = 0: f_dpg needs log π"):
        losses.f_dpg(batch, advantages.fdpg_reverse_kl, 0.0)
    # π* gives the second nothing: total variation pays −½ there, and f-divergences with f'(∞) = ∞
    # are infinite
    hard = with_field(batch_of(PAIR), "rewards", 1, -INF)
    value = losses.f_dpg(hard, advantages.fdpg_total_variation, 0.0)
    (gradient,) = torch.autograd.grad(value, hard.log_probs)
    assert gradient[1].tolist() == [0.25, 0.25]


# --- training and its sources ---------------------------------------------------------------------


def trained(**options):
    problem, policy = four_sentences(), four_sentences_policy()
    given = {"steps": 1, "draw": seeded_draw(0), "batch_size": 4, **options}
    return train(policy, problem, losses.rloo, **given)


@pytest.mark.parametrize(
    ("number", "meant"),
    [
        ("steps", (0,)),
        ("batch_size", (None,)),
        ("evaluate_every", (0,)),
        ("lr", (1.5,)),
        ("max_grad_norm", (1.5, 1e30, INF, None)),
    ],
)
def test_each_number_of_training_is_refused_or_meant(number, meant):
    # 1e30 is a rate, and what comes of it has a test of its own
    refuses(
        lambda value: trained(**{number: 1.5 if (number, value) == ("lr", 1e30) else value}),
        f"{number} = ",
        (*meant, 1e30) if number == "lr" else meant,
    )


def test_a_schedule_gives_factors():
    refuses(
        lambda value: trained(schedule=lambda done: 1.5 if value == 1e30 else value),
        r"schedule\(0\) = ",
        (0, 1.5, 1e30),
    )


def test_counts_of_a_source_are_whole_numbers():
    problem = four_sentences()
    inner, draw = sources.support(problem), seeded_draw(0)
    refuses(lambda value: sources.replay(inner, value), "epochs = ")
    refuses(lambda value: sources.on_policy(problem, value, draw=draw), "size = ")
    refuses(
        lambda value: sources.texts(["a dog"], problem.space, value, draw=draw), "size = ", (None,)
    )


@pytest.mark.parametrize("weights", [[NAN, 1], [INF, 1], [-1, 1], [0, 0], [1], [1j, 1], "ab"])
def test_weights_of_a_table_are_finite_numbers(weights):
    space = four_sentences().space
    large = sources.texts(["a dog", "the cat"], space, 2, draw=seeded_draw(0), weights=[1e308] * 2)
    assert large.log_weights.tolist() == pytest.approx([-math.log(2)] * 2, rel=1e-15)
    with pytest.raises(InputError, match="weights"):
        sources.texts(["a dog", "the cat"], space, 2, draw=seeded_draw(0), weights=weights)


@pytest.mark.parametrize("number", ["lr", "adam_lr"])
def test_rates_of_muon_with_adam_are_numbers(number):
    model = TransformerModel(four_sentences().space, width=8, heads=2, layers=1)
    refuses(lambda value: MuonWithAdam(model, **{number: value}), f"{number} = ", (0, 1.5, 1e30))


@pytest.mark.parametrize("lr", [1e300, 1e30, 1e3])
@pytest.mark.parametrize("optimizer", ["adam", "descent"])
def test_an_update_that_loses_the_policy_is_taken_back(lr, optimizer):
    problem, policy = four_sentences(), four_sentences_policy()
    before = policy.logits.detach().clone()
    given = {"lr": lr}
    if optimizer == "descent":  # by rate · gradient, which is about a tenth here
        given = {"optimizer": torch.optim.SGD(policy.parameters(), lr=100 * lr)}
    with pytest.raises(DivergedError, match=r"step 1: its update moved a weight by .* Lower lr"):
        train(policy, problem, losses.rloo, steps=3, draw=seeded_draw(0), **given)
    assert torch.equal(policy.logits.detach(), before)


def test_a_large_rate_on_small_gradients_trains():
    problem, policy = four_sentences(), four_sentences_policy()
    descent = torch.optim.SGD(policy.parameters(), lr=1e3)

    def tiny(batch):
        return losses.exact(batch) / 1e3

    source = sources.support(problem)
    history = train(policy, source, tiny, steps=2, optimizer=descent)
    assert history["loss"][1] < history["loss"][0]


@pytest.mark.parametrize("name", ["rloo", "reinforce", "group_mean", "dr_grpo", "exact"])
def test_rewards_too_large_for_floats_are_named_and_not_called_a_divergence(name):
    base = four_sentences()
    rewards = {"the cat": 1e308, "the dog": 0, "a cat": -1e308, "a dog": 0}
    huge = Problem(base.prior, table_reward(rewards, base.space), 1.0)
    policy = four_sentences_policy()
    before = policy.logits.detach().clone()
    with pytest.raises(InputError, match=r"step 1: .* rewards reach 1e\+308 .* divide reward and"):
        train(policy, huge, getattr(losses, name), steps=1, draw=seeded_draw(0))
    assert torch.equal(policy.logits.detach(), before)
    # z-scores have no unit, so nothing overflows there
    assert len(train(policy, huge, losses.z_score, steps=1, draw=seeded_draw(0))) == 1


def test_a_policy_of_one_sequence_still_has_a_mean():
    prior = SequenceTable.from_texts({"a": 1.0})
    problem = Problem(prior, table_reward({"a": 1.0}, prior.space), 1.0)
    history = train(None, problem, losses.rloo, steps=1, draw=seeded_draw(0))
    assert history["reward"] == [1.0]
