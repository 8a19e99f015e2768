"""What people disputed in public about losses, in its smallest form, with the values that are
right.

The texts "", a and b under a prior q and a policy π, both tables of logits; r = .1, .7, −.3 and
λ = ½.
"""

import itertools
import math

import pytest
import torch

import klrl_edu as klrl
from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses, sources
from klrl_edu.learning.batches import needs
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward

SPACE = SequenceSpace(("a", "b"), 2, separator="")
PRIOR, POLICY = (0.0, 0.3, -0.2), (0.9, 0.1, -0.6)  # logits of EOS is the third: a, b, EOS
TILT = (0.9, -0.2, -0.4)


def table(*logits):
    """Logits of the first token; the second is always EOS."""
    full = torch.zeros(3, 3, dtype=torch.float64)
    full[0] = torch.tensor(logits, dtype=torch.float64)
    return PrefixTable(SPACE, logits=full)


def reward(values=(0.1, 0.7, -0.3)):
    return table_reward(dict(zip(("", "a", "b"), values, strict=True)), SPACE)


@pytest.fixture(name="problem")
def _problem():
    return Problem(table(*PRIOR), reward(), 0.5)


@pytest.fixture(name="policy")
def _policy():
    return table(*POLICY)


def near_prior(distance):
    return table(*(q + distance * t for q, t in zip(PRIOR, TILT, strict=True)))


# --- precision ------------------------------------------------------------------------------------


def rloo_in_float32(batch):
    rewards = batch.rewards.sum(-1).float()
    advantage = rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
    return -(advantage * batch.log_probs.sum(-1)).mean()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_loss_that_works_in_float32_is_judged_to_its_own_precision(problem, policy, size):
    report = audit_gradient(rloo_in_float32, policy, problem, batch_size=size)
    assert report.verdict == (
        "rloo_in_float32 is unbiased for expected_reward, to float32 precision."
    )
    assert 1e-10 < report.relative_bias["expected_reward"] < 1e-6


def test_a_bias_beyond_float32_is_seen_in_float32(problem, policy):
    def shrunk(batch):
        return rloo_in_float32(batch) * (1 - 1e-4)

    verdict = audit_gradient(shrunk, policy, problem, batch_size=2).verdict
    assert verdict == "shrunk follows expected_reward, scaled by 0.9999, to float32 precision."


def test_masks_in_float32_lose_nothing_and_change_no_verdict(problem, policy):
    """0 and 1 are the same numbers in any precision."""

    def masked(batch):
        mask = batch.live.float()
        return -(batch.rewards.sum(-1, keepdim=True) * batch.log_probs * mask).sum(-1).mean()

    report = audit_gradient(masked, policy, problem)
    assert report.arithmetic == "float64"
    assert report.verdict == "masked is unbiased for expected_reward."


def test_a_policy_in_float32_rounds_its_gradients_and_not_the_verdict():
    problem = four_sentences(0.5)
    network = klrl.RecurrentModel(problem.space, hidden_size=2, seed=3)
    policy = klrl.restrict_to_support(network, problem.prior)
    report = audit_gradient(losses.rloo, policy, problem, batch_size=2)
    single = audit_gradient(losses.rloo, policy.float(), problem, batch_size=2)
    assert (report.precision, single.precision) == (1e-9, 1e-5)
    assert single.verdict == report.verdict == "rloo is unbiased for objective."


# --- next to the prior ----------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-4, 1e-5, 1e-6])
def test_k1_and_k3_stay_unbiased_however_near_the_prior(problem, distance):
    k1 = audit_value(kl_values.k1, near_prior(distance), problem).verdict
    assert k1.startswith("k1 is unbiased for reverse_kl and")
    k3 = audit_value(kl_values.k3, near_prior(distance), problem).verdict
    assert k3 == "k3 is unbiased for reverse_kl and reverse_kl_per_token."
    k2 = audit_value(kl_values.k2, near_prior(distance), problem).verdict
    assert k2.startswith("k2 is biased for all targets")  # by a part u/3 of it


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_losses_next_to_the_prior_keep_their_verdicts(problem, distance):
    def k1_loss(batch):
        return (batch.log_probs - batch.prior_log_probs).sum(-1).mean()

    def k2_loss(batch):
        return kl_values.k2((batch.log_probs - batch.prior_log_probs).sum(-1)).mean()

    policy = near_prior(distance)
    assert audit_gradient(k1_loss, policy, problem).verdict == "k1_loss has expectation 0."
    said = audit_gradient(k2_loss, policy, problem).verdict
    assert said == "k2_loss is unbiased for reverse_kl and reverse_kl_per_token."


def test_at_the_prior_the_divergences_are_zero_and_nothing_is_divided_by_them(problem):
    report = audit_gradient(losses.rloo, table(*PRIOR), problem, batch_size=2)
    assert set(report.zero_targets) == {
        "reverse_kl",
        "forward_kl",
        "reverse_kl_per_token",
        "forward_kl_per_token",
    }
    assert report.verdict == "rloo is unbiased for objective and expected_reward."
    assert math.isnan(report.relative_bias["reverse_kl"])
    assert str(report).count("the target is 0 here") == 4
    assert "nan" not in str(report)


# --- places in a batch ----------------------------------------------------------------------------


def two_micro_batches(batch):
    """The advantage is centred on the whole batch, and each half has its own mean over tokens."""
    advantage = batch.rewards.sum(-1)
    advantage = advantage - advantage.mean()
    terms = -(advantage[:, None] * batch.log_probs) * batch.live
    half = len(terms) // 2
    halves = (slice(0, half), slice(half, None))
    return sum(0.5 * terms[part].sum() / batch.live[part].sum() for part in halves)


def token_mean(batch):
    advantage = batch.rewards.sum(-1)
    advantage = advantage - advantage.mean()
    return (-(advantage[:, None] * batch.log_probs) * batch.live).sum() / batch.live.sum()


def test_what_splits_its_batch_is_enumerated_as_the_split_that_it_is(problem, policy):
    with pytest.raises(InputError, match=r"depends on the order.*micro_batches=k.*ordered=True"):
        audit_gradient(two_micro_batches, policy, problem, batch_size=4)
    options = {"batch_size": 4, "against": token_mean}
    split = audit_gradient(two_micro_batches, policy, problem, micro_batches=2, **options)
    orders = audit_gradient(two_micro_batches, policy, problem, ordered=True, **options)
    assert (split.executions, orders.executions) == (6**2, 3**4)
    assert torch.allclose(split.mean, orders.mean, rtol=0, atol=1e-15)
    assert split.variance == pytest.approx(orders.variance, rel=1e-12)
    by_hand, whole_by_hand = (
        mean_by_hand(loss, policy, problem) for loss in (two_micro_batches, token_mean)
    )
    assert split.mean.tolist() == pytest.approx(by_hand.tolist(), abs=1e-15)
    off = float((by_hand - whole_by_hand).norm() / whole_by_hand.norm())
    assert split.relative_bias["the mean of token_mean"] == pytest.approx(off, rel=1e-12)
    assert off == pytest.approx(0.02458, abs=5e-6)


def mean_by_hand(loss, policy, problem):
    """Σ over all 81 ordered batches of four of P(batch) ∇loss(batch), a backward pass each."""
    whole = sources.support(problem)(policy)
    total = torch.zeros_like(policy.logits)
    for rows in itertools.product(range(3), repeat=4):
        batch = whole.pick(torch.tensor(rows))
        (gradient,) = torch.autograd.grad(loss(batch), policy.logits, retain_graph=True)
        total += batch.log_probs.sum().exp().detach() * gradient
    return total.flatten()


def test_a_split_that_does_not_fit_is_refused(problem, policy):
    def audit(**options):
        return audit_gradient(two_micro_batches, policy, problem, batch_size=4, **options)

    with pytest.raises(InputError, match="micro_batches = 3 does not divide batch_size = 4"):
        audit(micro_batches=3)
    with pytest.raises(InputError, match="leave micro_batches out"):
        audit(micro_batches=2, ordered=True)
    with pytest.raises(InputError, match="leave micro_batches and ordered out"):
        audit_gradient(losses.exact, policy, problem, ordered=True)


def test_what_breaks_ties_by_their_place_is_seen_on_the_few_batches_with_ties():
    space = SequenceSpace(("a", "b", "c"), 2, eos=False)
    values = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.9, 0.4, 0.9, 0.5, 0.6], dtype=torch.float64)
    everything = space.all_tokens()
    uniform = SequenceTable(space, everything, torch.zeros(9, dtype=torch.float64))
    policy = SequenceTable(space, everything, torch.linspace(-1, 1, 9, dtype=torch.float64))
    tied = Problem(uniform, lambda t, prompt: values[t[:, 0] * 3 + t[:, 1]], 1.0)

    def best_of_batch(batch):
        best = torch.nn.functional.one_hot(batch.rewards.sum(-1).argmax(), 2)
        return -(best * batch.log_probs.sum(-1)).sum()

    with pytest.raises(InputError, match=r"depends on the order of its batch: \['b b', 'c a'\]"):
        audit_gradient(best_of_batch, policy, tied, batch_size=2)
    mean = audit_gradient(best_of_batch, policy, tied, batch_size=2, ordered=True).mean
    assert mean[[4, 6]].tolist() == pytest.approx([-0.069046, -0.113838], abs=5e-7)

    def best_drawn(batch, draw):
        return best_of_batch(batch) + 0 * draw(torch.zeros(1, 2, dtype=torch.float64)).sum()

    with pytest.raises(InputError, match="depends on the order of its batch"):
        audit_gradient(best_drawn, policy, tied, batch_size=2)


# --- several problems -----------------------------------------------------------------------------


def test_problems_that_differ_in_reward_and_kl_coef_share_a_batch(problem, policy):
    """RLOO leaves out within a prompt, so it is unbiased for the mean of their objectives."""
    other = Problem(problem.prior, reward((0.5, -0.2, 1.0)), 0.1)
    report = audit_gradient(losses.rloo, policy, [problem, other], batch_size=2)
    assert report.executions == 6**2
    assert report.verdict == "rloo is unbiased for objective."
    each = [audit_gradient(losses.rloo, policy, one, batch_size=2) for one in (problem, other)]
    mean = torch.stack([single.targets["objective"] for single in each]).mean(0)
    assert torch.allclose(report.targets["objective"], mean, rtol=0, atol=1e-15)
    assert report.variance == pytest.approx(sum(one.variance for one in each) / 4, rel=1e-12)


def prompted_problems():
    """A network that reads its prompt, on two prompts of different length."""
    space = SequenceSpace(("a", "b"), 3)

    def network(seed):
        model = klrl.TransformerModel(space, width=4, heads=1, layers=1, max_prompt=2, seed=seed)
        for parameter in model.parameters():
            parameter.data.mul_(3)
        return model

    prior, policy = network(1), network(2)
    counts = klrl.count_reward("a", space)
    prompts = [torch.tensor([0]), torch.tensor([1, 0])]
    return policy, [Problem(prior, counts, 0.5, prompt=prompt) for prompt in prompts]


def batch_token_mean(batch):
    return -(batch.rewards.sum(-1, keepdim=True) * batch.log_probs).sum() / batch.live.sum()


def prompt_token_mean(batch):
    """Each prompt divides by the length of its own answers."""
    terms = -(batch.rewards.sum(-1, keepdim=True) * batch.log_probs).sum(-1)
    length = batch.live.sum(-1).double()
    means = [terms[batch.group == g].sum() / length[batch.group == g].sum() for g in (0, 1)]
    return sum(means) / 2


def test_a_mean_over_tokens_of_the_batch_is_not_the_mean_over_prompts():
    """By brute force: every pair of one answer a prompt, through the network's own graph."""
    policy, problems = prompted_problems()
    source = sources.support(problems)
    whole = source(policy)
    rows = [(whole.group == g).nonzero().squeeze(-1).tolist() for g in (0, 1)]
    parameters = list(policy.parameters())
    for loss in (batch_token_mean, prompt_token_mean):
        mean, second = 0.0, 0.0
        for pair in itertools.product(*rows):
            batch = whole.pick(torch.tensor(pair))
            weight = batch.log_probs.sum().exp().detach()
            gradients = torch.autograd.grad(loss(batch), parameters, retain_graph=True)
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            mean, second = mean + weight * flat, second + weight * flat.square().sum()
        report = audit_gradient(loss, policy, problems, batch_size=1)
        assert torch.allclose(report.mean, mean, rtol=0, atol=1e-12)
        assert report.variance == pytest.approx(float(second - mean.square().sum()), rel=1e-9)
    single = audit_gradient(
        prompt_token_mean, policy, problems, batch_size=1, against=batch_token_mean
    )
    assert single.relative_bias["the mean of batch_token_mean"] > 0.01


def test_several_prompts_go_through_every_kind_of_loss():
    policy, problems = prompted_problems()
    for loss, size in ((losses.exact, None), (losses.rloo, 2), (losses.reinforce, 1)):
        report = audit_gradient(loss, policy, problems, batch_size=size)
        assert report.verdict == f"{report.name} is unbiased for objective."

    def reads_padding(batch):
        return losses.reinforce(batch) + (7.0 * batch.log_probs * ~batch.live).sum()

    report = audit_gradient(reads_padding, policy, problems)
    assert report.verdict == "reads_padding is unbiased for objective."

    @needs("distributions")
    def exact_kl(batch):
        per_token = kl_values.per_token_kl(batch.log_dists, batch.prior_log_dists)
        return per_token.sum(-1).mean()

    report = audit_gradient(exact_kl, policy, problems)
    assert report.verdict == "exact_kl is unbiased for reverse_kl_per_token."
    value = audit_value(kl_values.k1, policy, problems, batch_size=2)
    singles = [audit_value(kl_values.k1, policy, one) for one in problems]
    assert float(value.mean) == pytest.approx(
        sum(float(one.mean) for one in singles) / 2, rel=1e-12
    )
    assert value.variance == pytest.approx(sum(one.variance for one in singles) / 8, rel=1e-12)
    assert value.verdict == "k1 is unbiased for reverse_kl and reverse_kl_per_token."


def test_values_and_samples_of_several_problems_read_each_its_own_reward(problem, policy):
    other = Problem(problem.prior, reward((0.5, -0.2, 1.0)), 0.1)

    def mean_reward(batch):
        return batch.rewards.sum(-1)

    values = audit_value(mean_reward, policy, [problem, other])
    mass = policy.log_prob(SPACE.encode(["", "a", "b"])).detach().exp()
    each = torch.tensor([[0.1, 0.7, -0.3], [0.5, -0.2, 1.0]], dtype=torch.float64) @ mass
    assert float(values.mean) == pytest.approx(float(each.mean()), rel=1e-14)

    exact = audit_gradient(losses.rloo, policy, [problem, other], batch_size=2)
    drawn = audit_gradient(
        losses.rloo,
        policy,
        [problem, other],
        batch_size=2,
        monte_carlo=5_000,
        draw=klrl.seeded_draw(0),
    )  # seed 0; 9 intervals of 99.9 %
    for name, (low, high) in drawn.distances.items():
        assert low - 1e-12 <= exact.bias[name] <= high
    assert drawn.distances["expected_reward"][0] > 0


# --- what it is held against ----------------------------------------------------------------------


@needs("distributions")
def replay(batch):
    """Samples of a truncated policy, scored by π with the same token cut out."""
    kept = torch.tensor([True, True, False])
    total = batch.log_dists.masked_fill(~kept, -math.inf).logsumexp(-1)
    first = batch.log_probs[:, :1] - total[:, :1]
    return -(batch.rewards.sum(-1, keepdim=True) * first).sum(-1).mean()


@needs("support")
def truncated(batch):
    """−E[r] of π cut to a and b, a function of the policy alone."""
    words = batch.tokens[:, 0] < 2
    log_cut = torch.log_softmax(batch.log_probs.sum(-1)[words], 0)
    return -(log_cut.exp() @ batch.rewards.sum(-1)[words])


def test_replay_of_a_truncated_sampler_follows_the_truncated_policy(problem, policy):
    """π cut to a and b is the sampler, with logits (.9, .1) and rewards (.7, −.3)."""
    sampler = table(0.9, 0.1, -math.inf)
    report = audit_gradient(replay, policy, problem, behaviour=sampler, against=truncated)
    cut = torch.tensor([0.9, 0.1], dtype=torch.float64).softmax(0)
    slope = float(cut[0] * cut[1])  # dE[r]/dlogit_a = p_a p_b (r_a − r_b)
    assert report.mean[:2].tolist() == pytest.approx([-slope, slope], abs=1e-15)
    for name in ("truncated", "truncated_reward"):
        assert report.relative_bias[name] < 1e-14
    assert "unbiased for behaviour_reward and truncated_reward and truncated" in report.verdict
    (note,) = report.notes
    assert "never draws sequences that hold 0.133414 of the policy's mass" in note
    assert "('')" in note


def test_behaviour_targets_are_those_of_autograd(problem, policy):
    sampler = table(-0.5, 0.2, 0.4)
    report = audit_gradient(losses.reinforce, policy, problem, behaviour=sampler)
    logits = policy.logits.detach()[0].clone().requires_grad_()
    log_pi, mu = torch.log_softmax(logits, 0), sampler.logits.detach()[0].softmax(0)
    rewards = torch.tensor([0.7, -0.3, 0.1], dtype=torch.float64)
    expected = {
        "behaviour_reward": -(mu * (rewards - mu @ rewards)) @ log_pi,
        "behaviour_kl": mu @ (mu.log() - log_pi),
    }
    for name, value in expected.items():
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert report.targets[name][:3].tolist() == pytest.approx(gradient.tolist(), abs=1e-15)
    assert "truncated_reward" not in report.targets  # nothing is left out here


def test_reinforce_without_weights_follows_the_behaviours_own_target(problem, policy):
    def unweighted(batch):
        rewards = batch.rewards.sum(-1)
        return -((rewards - rewards.mean()) * batch.log_probs.sum(-1)).mean()

    sampler = table(-0.5, 0.2, 0.4)
    report = audit_gradient(unweighted, policy, problem, behaviour=sampler, batch_size=2)
    assert report.verdict == "unweighted follows behaviour_reward, scaled by 0.5."


def test_a_second_loss_and_a_report_stand_beside_the_targets(problem, policy, tmp_path):
    options = {"batch_size": 4}
    grpo = audit_gradient(losses.grpo, policy, problem, **options)
    grpo.save(tmp_path / "grpo.json")
    against = {"GRPO now": losses.grpo, "GRPO then": tmp_path / "grpo.json", "report": grpo}
    report = audit_gradient(losses.rloo, policy, problem, against=against, **options)
    assert [*report.targets][-3:] == ["GRPO then", "report", "GRPO now"]
    for name in against:
        assert torch.allclose(report.targets[name], grpo.mean, rtol=0, atol=1e-15)
    same = audit_gradient(losses.rloo, policy, problem, against=losses.rloo, **options)
    assert same.verdict == "rloo is unbiased for objective and the mean of rloo."


def test_what_nothing_can_be_held_against_is_refused(problem, policy):
    def audit(against):
        return audit_gradient(losses.rloo, policy, problem, batch_size=2, against=against)

    for wrong, match in ((3, "expected a loss, an AuditReport"), ("nowhere.json", "no report")):
        with pytest.raises(InputError, match=match):
            audit(wrong)
    elsewhere = audit_gradient(losses.reinforce, four_sentences_policy(), four_sentences())
    with pytest.raises(InputError, match=r"a vector of 4 sequence logits.*9 prefix logits"):
        audit(elsewhere)


def test_without_a_match_the_nearest_target_has_its_angle_and_factor(problem, policy):
    report = audit_gradient(token_mean, policy, problem, batch_size=4)
    assert report.verdict == (
        "token_mean is biased for all targets; nearest is expected_reward: 0.99984 along it"
        " (cosine), scaled by 0.4002, relative bias 0.6."
    )
    assert report.cosine["expected_reward"] == pytest.approx(0.9998, abs=5e-5)
    assert report.entries[:3] == (" → a", " → b", " → EOS")
