"""Sources: who drew the sequences, what stands beside them, and that one loop trains on each. Every
run is a fixed seed, so nothing here is left to chance.
"""

import itertools
import math

import pytest
import torch
from torch import nn

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core import logspace
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import InputError, UnsupportedPolicyError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.evaluation.compare import compare
from klrl_edu.exact.posterior import posterior
from klrl_edu.learning import losses, sources
from klrl_edu.learning.training import train, train_steps
from klrl_edu.models.contract import LanguageModel, enumerate_support
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import count_reward, table_reward

TEXTS = ["the cat", "the dog", "a cat", "a dog"]
WORDS = SequenceSpace(("a", "b"), 3)
WON, LOST = 1.0, 0.0


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def network(seed=0, prompt=2, width=16):
    return TransformerModel(WORDS, width=width, heads=2, layers=1, max_prompt=prompt, seed=seed)


def prompted(prior, *prompts):
    """A problem a prompt, each with a reward and a λ of its own."""
    return [
        Problem(prior, count_reward("a", WORDS, 1.0 + k), 0.5 + k, prompt=torch.tensor(prompt))
        for k, prompt in enumerate(prompts)
    ]


# --- samples of the policy ------------------------------------------------------------------------


def test_prompts_are_drawn_and_scored_in_one_pass_with_shorter_ones_padded():
    prior = network()
    policy = network(seed=1)
    both = prompted(prior, [0], [1, 0])
    batch = sources.on_policy(both, 5, draw=seeded_draw(0))(policy)
    assert batch.prompt.tolist() == [[-1, 0]] * 5 + [[1, 0]] * 5
    assert batch.group.tolist() == [0] * 5 + [1] * 5
    assert batch.kl_coef.tolist() == [0.5] * 5 + [1.5] * 5
    for row in range(10):
        one = batch.tokens[row : row + 1]
        prompt = both[row // 5].prompt
        for model, seen in ((policy, batch.log_probs), (prior, batch.prior_log_probs)):
            alone = float(model.log_prob(one, prompt).detach())
            assert float(seen[row].sum().detach()) == pytest.approx(alone, abs=1e-12)
        reward = float(both[row // 5].rewards(one))
        assert float(batch.rewards[row].sum()) == pytest.approx(reward, abs=1e-15)


class Counting(nn.Module):
    """Counts the passes through a network."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


@pytest.mark.parametrize("prompts", [1, 8])
def test_a_step_costs_as_many_passes_for_eight_prompts_as_for_one(prompts):
    prior, policy = network(prompt=3), network(seed=1, prompt=3)
    counters = [Counting(), Counting()]
    for model, counter in zip((prior, policy), counters, strict=True):
        model.norm.register_forward_pre_hook(lambda _, x, c=counter: c(x[0]))
    given = list(itertools.product([0, 1], repeat=3))[:prompts]
    problems = prompted(prior, *map(list, given))
    sources.on_policy(problems, 4, draw=seeded_draw(0))(policy)
    assert [counter.calls for counter in counters] == [1, WORDS.max_length]


def test_some_prompts_and_some_none_are_refused():
    prior = network()
    mixed = [
        Problem(prior, count_reward("a", WORDS), 1.0, prompt=torch.tensor([0])),
        Problem(prior, count_reward("a", WORDS), 1.0),
    ]
    with pytest.raises(InputError, match=r"problems\[1\] has no prompt and others have one"):
        train(None, mixed, losses.rloo, steps=1, draw=seeded_draw(0))


def test_a_problem_is_short_for_its_own_samples():
    problem = four_sentences()
    given = {"steps": 4, "lr": 0.05}
    short = train(
        four_sentences_policy(), problem, losses.rloo, draw=seeded_draw(3), batch_size=8, **given
    )
    source = sources.on_policy(problem, 8, draw=seeded_draw(3))
    long = train(four_sentences_policy(), source, losses.rloo, **given)
    assert short.records == long.records


@pytest.mark.parametrize(("name", "value"), [("batch_size", 8), ("draw", seeded_draw(0))])
def test_what_belongs_to_the_source_is_not_given_twice(name, value):
    source = sources.on_policy(four_sentences(), 8, draw=seeded_draw(3))
    with pytest.raises(InputError, match=f"{name} belongs to the source"):
        train(None, source, losses.rloo, steps=1, **{name: value})


# --- samples of somebody else ---------------------------------------------------------------------


def dpg(problem):
    """Distributional policy gradient: −(P/Z μ) log π by samples of μ. Khalifa et al. (2021)."""
    log_evidence = float(posterior(problem).log_evidence)

    def loss(batch):
        log_target = (batch.prior_log_probs + batch.rewards / batch.kl_coef[:, None]).sum(-1)
        weight = torch.exp(log_target - log_evidence - batch.behaviour_log_probs.sum(-1))
        return -(weight * batch.log_probs.sum(-1)).mean()

    return loss


def test_dpg_from_the_prior_reaches_the_posterior():
    problem = four_sentences()
    source = sources.behaviour(problem.prior, problem, 256, draw=seeded_draw(0))
    policy = restrict_to_support(RecurrentModel(problem.space, hidden_size=16), problem.prior)
    history = train(
        policy, source, dpg(problem), steps=200, lr=1e-2, schedule=lambda done: 1 - done,
        target=posterior(problem),
    )  # fmt: skip
    assert history["reverse_kl"][0] > 0.1
    assert history["reverse_kl"][-1] < 1e-3
    assert history["log_behaviour_ratio"][0] != 0
    assert "kl" not in history.names  # the batch is no sample of π, and its mean of u no KL


def test_the_audit_of_dpg_from_the_prior_is_the_forward_kl_to_the_posterior():
    problem, policy = four_sentences(), four_sentences_policy()
    source = sources.behaviour(problem.prior, problem, 2, draw=seeded_draw(0))
    report = audit_gradient(dpg(problem), policy, source)
    star = posterior(problem).log_probs.exp()
    pi = policy.log_probs.detach().exp()
    assert report.batch_size == 2
    assert report.executions == 10
    assert torch.allclose(report.mean, pi - star, rtol=0, atol=1e-14)  # ∇KL(π*‖π) in θ


def test_a_behaviour_that_the_policy_cannot_follow_is_refused():
    problem = four_sentences()
    half = SequenceTable(problem.space, problem.prior.tokens, vector(0, 0, -math.inf, -math.inf))
    source = sources.behaviour(problem.prior, problem, 64, draw=seeded_draw(0))
    with pytest.raises(UnsupportedPolicyError, match=r"step 1: .*policy gives no mass"):
        train(half, source, dpg(problem), steps=1)


def test_the_audit_enumerates_what_the_behaviour_draws():
    """By REINFORCE, whose mean under μ is not that under π."""
    problem, policy = four_sentences(), four_sentences_policy()
    source = sources.behaviour(problem.prior, problem, 2, draw=seeded_draw(0))
    report = audit_gradient(losses.reinforce, policy, source)
    named = audit_gradient(losses.reinforce, policy, problem, batch_size=2, behaviour=problem.prior)
    assert torch.equal(report.mean, named.mean)
    assert report.variance == named.variance
    own = audit_gradient(losses.reinforce, policy, problem, batch_size=2)
    assert not torch.allclose(report.mean, own.mean, atol=1e-3)


# --- several epochs, a value head -----------------------------------------------------------------


class ValueHead(nn.Module):
    """V(y_<t) in reward units, a number a prefix of the trie."""

    def __init__(self, space):
        super().__init__()
        self.table = PrefixTable(space)
        self.values = nn.Parameter(torch.zeros(len(self.table.logits), dtype=torch.float64))

    def forward(self, batch):
        node = self.table.trie.find(batch.tokens)[0]
        return torch.where(batch.live, self.values[node.clamp(min=0)], 0.0)


class PPOWithCritic(nn.Module):
    """PPO's clipped surrogate and the critic's squared error, summed. Schulman et al. (2017)."""

    def __init__(self, space, clip=0.2):
        super().__init__()
        self.critic, self.clip = ValueHead(space), clip
        self.ratios = []

    def forward(self, batch):
        values = self.critic(batch)
        ratio = torch.exp(batch.log_probs - batch.behaviour_log_probs).detach()
        self.ratios.append(ratio[batch.live])
        penalty = batch.kl_coef[:, None] * (batch.behaviour_log_probs - batch.prior_log_probs)
        to_go = (batch.rewards - penalty).flip(-1).cumsum(-1).flip(-1)
        error = torch.where(batch.live, (values - to_go).square(), 0.0).sum(-1).mean()
        return losses.ppo_clip(batch, values.detach(), clip=self.clip) + 0.5 * error


def test_ppo_with_four_epochs_and_a_value_head_reaches_the_posterior_and_clips():
    problem = four_sentences()
    policy = restrict_to_support(RecurrentModel(problem.space, hidden_size=16), problem.prior)
    loss = PPOWithCritic(problem.space)
    source = sources.replay(sources.on_policy(problem, 64, draw=seeded_draw(0)), 4)
    optimizers = [
        torch.optim.Adam(policy.parameters(), lr=1e-2),
        torch.optim.Adam(loss.parameters(), lr=5e-2),
    ]
    history = train(
        policy, source, loss, steps=240, optimizer=optimizers, schedule=lambda done: 1 - done,
        target=posterior(problem),
    )  # fmt: skip
    assert history["reverse_kl"][-1] < 2e-3 < history["reverse_kl"][0]
    first, *later = loss.ratios[:4]
    assert torch.equal(first, torch.ones_like(first))
    assert all(bool((ratio != 1).any()) for ratio in later)
    assert any(bool(((ratio - 1).abs() > 0.2).any()) for ratio in loss.ratios)  # it clips
    # the critic's value at the root is the soft value, λ log Z, up to its noise
    assert float(loss.critic.values[0].detach()) == pytest.approx(
        float(posterior(problem).value), abs=0.05
    )


def test_each_epoch_is_scored_by_the_policy_as_it_is_then():
    problem, policy = four_sentences(), four_sentences_policy()
    seen = []

    def loss(batch):
        seen.append((batch.tokens, batch.log_probs.detach(), batch.behaviour_log_probs))
        assert torch.equal(batch.log_probs.detach().sum(-1), policy.log_prob(batch.tokens).detach())
        return losses.ppo_clip(batch)

    source = sources.replay(sources.on_policy(problem, 8, draw=seeded_draw(0)), 3)
    records = list(train_steps(policy, source, loss, steps=6, lr=0.05))
    assert all(torch.equal(seen[0][0], tokens) for tokens, *_ in seen[:3])
    assert not torch.equal(seen[0][0], seen[3][0])
    assert all(torch.equal(seen[0][2], behaviour) for *_, behaviour in seen[:3])
    assert not torch.equal(seen[0][1], seen[1][1])
    assert ["kl" in record for record in records] == [True, False, False] * 2


def test_replay_cannot_be_audited_and_says_so():
    source = sources.replay(sources.on_policy(four_sentences(), 2, draw=seeded_draw(0)), 2)
    with pytest.raises(InputError, match=r"law of this source \(Replay\) is not known"):
        audit_gradient(losses.rloo, four_sentences_policy(), source)


# --- preference pairs -----------------------------------------------------------------------------


def dpo(batch):
    """−log σ(λΔu), the preferred sequence of each pair first. Rafailov et al. (2023), eq. 7."""
    log_ratio = (batch.log_probs - batch.prior_log_probs).sum(-1)
    chosen, rejected = (batch.kl_coef * log_ratio).unflatten(0, (-1, 2)).unbind(1)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def all_pairs(problem):
    """Every ordered pair of sentences, and how often a Bradley–Terry judge of the reward prefers
    the first where both are drawn from the prior.
    """
    support = enumerate_support(problem.prior)
    q, r = support.log_weights.exp(), problem.rewards(support.tokens)
    index = [(i, j) for i in range(len(q)) for j in range(len(q)) if i != j]
    chosen, rejected = torch.tensor(index).unbind(1)
    weights = q[chosen] * q[rejected] * torch.sigmoid(r[chosen] - r[rejected])
    return support.tokens[chosen], support.tokens[rejected], weights


def test_a_pair_is_a_group_of_two_whose_rewards_say_who_won():
    problem = four_sentences(0.5)
    source = sources.pairs(TEXTS[:2], TEXTS[2:], problem.prior, 0.5)
    batch = source(four_sentences_policy())
    assert problem.space.decode(batch.tokens) == ["the cat", "a cat", "the dog", "a dog"]
    assert batch.group.tolist() == [0, 0, 1, 1]
    assert batch.rewards.tolist() == [[0, WON], [0, LOST], [0, WON], [0, LOST]]
    assert batch.kl_coef.tolist() == [0.5] * 4
    prior = problem.prior.log_prob(batch.tokens)
    assert torch.equal(batch.prior_log_probs.sum(-1), prior)


def test_dpo_on_pairs_of_a_bradley_terry_judge_reaches_the_posterior():
    problem = four_sentences()
    chosen, rejected, weights = all_pairs(problem)
    source = sources.pairs(
        chosen, rejected, problem.prior, problem.kl_coef, 256, draw=seeded_draw(0), weights=weights
    )
    policy = restrict_to_support(PrefixTable(problem.space), problem.prior)
    history = train(
        policy, source, dpo, steps=200, lr=5e-2, schedule=lambda done: 1 - done,
        target=posterior(problem),
    )  # fmt: skip
    assert history["reverse_kl"][-1] < 2e-3 < history["reverse_kl"][0]
    assert "reward" not in history.names  # 1 and 0 of a pair are no rewards


def test_the_audit_of_dpo_is_its_expected_gradient_over_pairs_and_labels():
    problem, policy = four_sentences(), four_sentences_policy()
    chosen, rejected, weights = all_pairs(problem)
    weights = weights / weights.sum()
    table = sources.pairs(
        chosen, rejected, problem.prior, 1.0, 2, draw=seeded_draw(0), weights=weights
    )
    report = audit_gradient(dpo, policy, table)
    # by hand, from −E[σ(−λΔu) λ(s_chosen − s_rejected)], with s_y = e_y − π in sequence logits
    rows = {text: k for k, text in enumerate(problem.space.decode(policy.tokens))}
    one, other = (
        torch.tensor([rows[text] for text in problem.space.decode(side)])
        for side in (chosen, rejected)
    )
    u = (policy.log_probs - problem.prior.log_prob(policy.tokens)).detach()
    pull = weights * torch.sigmoid(u[other] - u[one])
    expected = torch.zeros(4, dtype=torch.float64)
    expected.index_add_(0, one, -pull).index_add_(0, other, pull)
    assert torch.allclose(report.mean, expected, rtol=0, atol=1e-15)
    assert report.executions == math.comb(12 + 1, 2)
    single = sources.pairs(
        chosen, rejected, problem.prior, 1.0, 1, draw=seeded_draw(0), weights=weights
    )
    assert audit_gradient(dpo, policy, single).variance == pytest.approx(2 * report.variance)
    assert set(report.targets) == {
        "reverse_kl", "forward_kl", "reverse_kl_per_token", "forward_kl_per_token"
    }  # fmt: skip


def test_in_an_audit_each_pair_is_a_group_of_its_own():
    problem, policy = four_sentences(), four_sentences_policy()
    seen = set()

    def looking(batch):
        seen.add((tuple(batch.group.tolist()), tuple(batch.rewards.sum(-1).tolist())))
        return dpo(batch)

    table = sources.pairs(TEXTS[:2], TEXTS[2:], problem.prior, 1.0, 2, draw=seeded_draw(0))
    audit_gradient(looking, policy, table)
    assert seen == {((0, 0, 1, 1), (WON, LOST, WON, LOST))}


def test_at_the_posterior_the_expected_gradient_of_dpo_vanishes():
    problem = four_sentences(0.7)
    chosen, rejected, weights = all_pairs(problem)
    star = posterior(problem).model.requires_grad_(True)
    table = sources.pairs(
        chosen, rejected, problem.prior, 0.7, 1, draw=seeded_draw(0), weights=weights
    )
    report = audit_gradient(dpo, star, table)
    assert float(report.mean.norm()) < 1e-15


# --- texts ----------------------------------------------------------------------------------------


def maximum_likelihood(batch):
    """−mean log π of the texts, nats a sequence."""
    return -batch.log_probs.sum(-1).mean()


def test_maximum_likelihood_on_all_texts_reaches_their_frequencies():
    space = four_sentences().space
    source = sources.texts(["the cat"] * 3 + ["a dog"], space)
    policy = PrefixTable(space)
    history = train(policy, source, maximum_likelihood, steps=200, lr=0.3)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert history["loss"][-1] == pytest.approx(entropy, abs=1e-3)
    assert history.names == ["step", "loss", "grad_norm", "lr"]


def test_maximum_likelihood_on_drawn_texts_descends_the_forward_kl_to_their_weights():
    space = four_sentences().space
    policy = four_sentences_policy()
    weights = [4.0, 3.0, 2.0, 1.0]
    source = sources.texts(TEXTS, space, 3, draw=seeded_draw(0), weights=weights)
    report = audit_gradient(maximum_likelihood, policy, source)
    share = vector(*weights) / 10
    rows = [space.decode(policy.tokens).index(text) for text in TEXTS]
    expected = policy.log_probs.detach().exp()
    expected[rows] -= share
    assert torch.allclose(report.mean, expected, rtol=0, atol=1e-15)
    assert report.relative_bias["negative_log_likelihood"] < 1e-14
    assert "unbiased for negative_log_likelihood" in report.verdict
    many = sources.texts(TEXTS, space, 256, draw=seeded_draw(0), weights=weights)
    train(policy, many, maximum_likelihood, steps=300, lr=5e-2, schedule=lambda done: 1 - done)
    learnt = policy.log_probs.detach()[rows]
    assert float(logspace.kl_divergence(share.log(), learnt)) < 1e-3


def test_texts_with_prompts_are_conditional():
    prompts = torch.tensor([[0], [1]])
    source = sources.texts(["a a", "b"], WORDS, prompt=prompts)
    policy = network()
    batch = source(policy)
    for row in range(2):
        alone = float(policy.log_prob(batch.tokens[row : row + 1], prompts[row]).detach())
        assert float(batch.log_probs[row].sum().detach()) == pytest.approx(alone, abs=1e-12)
    train(policy, source, maximum_likelihood, steps=60, lr=1e-2)
    assert float(policy.log_prob(batch.tokens[:1], prompts[0]).detach()) > math.log(0.9)
    assert float(policy.log_prob(batch.tokens[:1], prompts[1]).detach()) < math.log(0.1)
    with pytest.raises(InputError, match="the source has 2 prompts, and an audit is of one"):
        audit_gradient(maximum_likelihood, policy, source)


def test_a_loss_that_reads_what_texts_do_not_have_is_told_so():
    source = sources.texts(TEXTS, four_sentences().space)
    missing = r"step 1: the loss reads batch\.prior_log_probs, which a batch of texts does not have"
    with pytest.raises(InputError, match=missing):
        train(four_sentences_policy(), source, losses.rloo, steps=1)


# --- tables that cannot be drawn from -------------------------------------------------------------


def test_a_table_says_what_is_wrong_with_it():
    space, prior = four_sentences().space, four_sentences().prior
    with pytest.raises(InputError, match=r"size = 2 rows are drawn .* needs draw="):
        sources.texts(TEXTS, space, 2)
    with pytest.raises(InputError, match=r"weights say how often a row is drawn; give size="):
        sources.texts(TEXTS, space, weights=[1, 2, 3, 4])
    with pytest.raises(InputError, match=r"weights has shape \[2\]; expected 4 numbers"):
        sources.texts(TEXTS, space, 2, draw=seeded_draw(0), weights=[1, 2])
    with pytest.raises(InputError, match="the table is empty"):
        sources.texts([], space)
    with pytest.raises(InputError, match="2 texts were chosen and 1 rejected"):
        sources.pairs(TEXTS[:2], TEXTS[2:3], prior, 1.0)
    with pytest.raises(InputError, match="word 'bird' is not in the vocabulary"):
        sources.texts(["a bird"], space)
    with pytest.raises(UnsupportedPolicyError, match="the prior gives no mass to 'dog dog'"):
        train(None, sources.pairs(["dog dog"], ["a dog"], prior, 1.0), dpo, steps=1)


def test_a_text_that_the_policy_never_gives_is_refused_in_training_and_audit():
    space, policy = four_sentences().space, four_sentences_policy()
    source = sources.texts(["dog dog"], space)
    with pytest.raises(UnsupportedPolicyError, match="gives no mass"):
        train(policy, source, maximum_likelihood, steps=1)
    with pytest.raises(UnsupportedPolicyError, match="gives no mass to 'dog dog'"):
        audit_gradient(maximum_likelihood, policy, source)


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (lambda p: sources.on_policy(p, 4, draw=0), r"draw is the number 0; .*seeded_draw\(0\)"),
        (lambda p: sources.on_policy(p, 0, draw=seeded_draw(0)), "size = 0 must be a whole number"),
        (lambda p: sources.on_policy(p.prior, 4, draw=seeded_draw(0)), "expected a Problem"),
        (
            lambda p: sources.behaviour(p, p.prior, 4, draw=seeded_draw(0)),
            r"sources\.behaviour\(model, problem\): model is a Problem",
        ),
        (lambda p: sources.replay(p, 4), r"source is a Problem; expected what gives batches"),
        (
            lambda p: sources.replay(sources.support(p), 0),
            "epochs = 0 must be a whole number of at least 1",
        ),
        (lambda p: sources.pairs(TEXTS[:1], TEXTS[1:2], p, 1.0), "prior is a Problem"),
        (lambda p: sources.pairs(TEXTS[:1], TEXTS[1:2], p.prior, -1.0), "must be at least 0"),
        (lambda p: sources.texts(TEXTS, p.prior), "space is a SequenceTable"),
        (lambda p: sources.texts("the cat", p.space), "'the cat' is one text"),
        (lambda p: sources.texts(TEXTS, p.space, 2, draw=1), r"draw=seeded_draw\(1\)"),
    ],
)
def test_slips_in_sources_are_named(slip, message):
    with pytest.raises(InputError, match=message):
        slip(four_sentences())


# --- one's own ------------------------------------------------------------------------------------


def test_ones_own_function_is_a_source():
    problem, policy = four_sentences(), four_sentences_policy()
    draw = seeded_draw(0)

    def best_of_many(policy):
        """The better half of a batch."""
        batch = sources.on_policy(problem, 16, draw=draw)(policy)
        return batch.pick(batch.rewards.sum(-1).argsort(descending=True)[:8])

    before = float(policy.log_prob(problem.space.encode(["a dog"])).detach())
    train(policy, best_of_many, maximum_likelihood, steps=50, lr=0.05)
    assert float(policy.log_prob(problem.space.encode(["a dog"])).detach()) > before + 0.5
    with pytest.raises(InputError, match=r"law of this source \(function\) is not known"):
        audit_gradient(maximum_likelihood, policy, best_of_many)


def weights_of(policy):
    return [parameter.detach().clone() for parameter in policy.parameters()]


def ends_early(good):
    batches = iter([good, good])
    return lambda policy: sources.rescored(next(batches), policy)


def of_another_space(good):
    other = Problem(PrefixTable(WORDS), count_reward("a", WORDS), 1.0)
    source = sources.on_policy(other, 4, draw=seeded_draw(0))
    return after_two(good, lambda policy: source(other.prior))


def after_two(good, then):
    count = itertools.count()
    return lambda policy: sources.rescored(good, policy) if next(count) < 2 else then(policy)


BAD_SOURCES = {
    "ends early": (ends_early, "step 3: the source ended after 2 batches"),
    "another type": (
        lambda good: after_two(good, lambda policy: good.tokens),
        "step 3: the source gave Tensor; a source maps the policy to a Batch",
    ),
    "another space": (of_another_space, r"step 3: the source's batch\.tokens .* expected \[N, 2\]"),
}


@pytest.mark.parametrize(("make", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_a_bad_source_is_one_line_with_its_step_and_the_weights_stay(make, message):
    problem, policy = four_sentences(), four_sentences_policy()
    good = sources.on_policy(problem, 8, draw=seeded_draw(0))(policy)
    steps = train_steps(policy, make(good), losses.rloo, steps=9)
    next(steps)
    next(steps)
    kept = weights_of(policy)
    with pytest.raises(InputError, match=message) as caught:
        next(steps)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(kept, weights_of(policy), strict=True))


def test_a_source_without_a_prior_needs_a_policy():
    source = sources.texts(TEXTS, four_sentences().space)
    with pytest.raises(InputError, match="this source has none; give a policy"):
        train(None, source, maximum_likelihood, steps=1)
    problem = four_sentences()
    pairs = sources.pairs(TEXTS[:2], TEXTS[2:], problem.prior, 1.0)
    assert isinstance(train(None, pairs, dpo, steps=1).policy, SequenceTable)


class Never(LanguageModel):
    """A model of another space."""

    space = WORDS


def test_policy_and_source_live_on_one_space():
    with pytest.raises(InputError, match="policy and source"):
        train(Never(), sources.texts(TEXTS, four_sentences().space), maximum_likelihood, steps=1)


def test_a_reward_may_read_the_prompt_of_each_sequence():
    """Two prompts, one reward function that reads them: each group gets its own."""
    prior = network()
    wanted = table_reward({"": 0.0, "a": 1.0, "b": 2.0, "a a": 3.0, "a b": 4.0, "b a": 5.0,
                           "b b": 6.0}, WORDS)  # fmt: skip

    def reward(tokens, prompt):
        return wanted(tokens) * (1 + prompt[:, -1])

    both = [Problem(prior, reward, 1.0, prompt=torch.tensor([k])) for k in (0, 1)]
    batch = sources.on_policy(both, 6, draw=seeded_draw(0))(network(seed=2))
    expected = wanted(batch.tokens) * (1 + batch.group)
    assert torch.equal(batch.rewards.sum(-1), expected)
    values = compare(prior, [posterior(problem) for problem in both])
    assert len(values.rows) == 2


def test_all_pairs_of_a_table_are_not_the_support_for_the_audit_either():
    problem, policy = four_sentences(), four_sentences_policy()
    table = sources.pairs(TEXTS[:2], TEXTS[2:], problem.prior, 1.0)
    for run in (
        lambda: audit_gradient(losses.exact, policy, table),
        lambda: train(policy, table, losses.exact, steps=1),
    ):
        with pytest.raises(InputError, match="sums over every supported sequence"):
            run()
