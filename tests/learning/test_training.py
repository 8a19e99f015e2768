"""The training loop: it reaches the posterior, and stops where it must. Every run is a fixed seed,
so nothing here is left to chance.
"""

import copy
import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from klrl_edu.core import logspace
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import DivergedError, InputError, UnsupportedPolicyError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.evaluation.compare import compare
from klrl_edu.evaluation.records import json_line
from klrl_edu.exact.posterior import feasible_prior, posterior
from klrl_edu.learning import losses
from klrl_edu.learning.training import SCHEDULES, cosine, linear, train, train_steps
from klrl_edu.models.contract import LanguageModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward

INF = math.inf
MODELS = {
    "lstm": lambda space: RecurrentModel(space, hidden_size=16),
    "gru": lambda space: RecurrentModel(space, cell="gru", hidden_size=16),
    "transformer": lambda space: TransformerModel(space, width=16, heads=2, layers=1),
    "table": PrefixTable,
}


def restricted(problem, kind="table"):
    return restrict_to_support(MODELS[kind](problem.space), problem.prior)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


# --- it reaches the posterior ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_rloo_drives_each_model_to_the_posterior(kind):
    problem = four_sentences()
    history = train(
        restricted(problem, kind),
        problem,
        losses.rloo,
        steps=300,
        draw=seeded_draw(0),
        target=posterior(problem),
    )
    before, after = history["reverse_kl"]
    assert before > 1e-3
    assert 0 <= after <= 1e-10
    assert compare(history.policy, posterior(problem)).objective_gap == pytest.approx(
        after, rel=1e-9
    )


def test_the_exact_loss_needs_no_samples_to_get_there():
    problem = four_sentences(0.5)
    policy = restricted(problem)
    descent = torch.optim.SGD(policy.parameters(), lr=3.0)
    history = train(
        policy,
        problem,
        losses.exact,
        steps=150,
        optimizer=descent,
        draw=seeded_draw(0),
        target=posterior(problem),
    )
    assert history["reverse_kl"][-1] < 1e-10
    assert history["objective"][-1] == pytest.approx(float(posterior(problem).value), abs=1e-9)
    assert history["objective"][-1] == pytest.approx(-history["loss"][-1], abs=1e-14)
    assert history.records[-1]["exact_objective"] == pytest.approx(
        history["objective"][-1], abs=1e-6
    )  # the record was taken a step earlier


def test_without_a_penalty_the_policy_collapses_onto_the_best_sequence():
    problem = four_sentences(0.0)
    policy = restricted(problem)
    train(policy, problem, losses.rloo, steps=250, lr=0.2, batch_size=16, draw=seeded_draw(0))
    log_pi = policy.log_prob(problem.prior.tokens).detach()
    assert float(logspace.entropy(log_pi)) < 0.01
    assert problem.space.decode(problem.prior.tokens[log_pi.argmax()][None]) == ["a dog"]


def test_a_hard_reward_is_learnt_on_the_posteriors_support():
    base = four_sentences()
    problem = Problem(
        base.prior,
        table_reward({"the cat": 1, "the dog": 0, "a cat": 0, "a dog": -INF}, base.space),
        1.0,
    )
    target = posterior(problem)
    for loss in (losses.exact, losses.rloo):
        policy = restrict_to_support(PrefixTable(base.space), feasible_prior(problem))
        history = train(
            policy,
            problem,
            loss,
            steps=200,
            lr=5e-2,
            batch_size=16,
            draw=seeded_draw(0),
            target=target,
        )
        assert history["reverse_kl"][-1] < 1e-5 < history["reverse_kl"][0]
        assert history["violating_mass"] == [0, 0]


class Prompted(LanguageModel):
    """A bigram whose rows of logits belong to the prompt's last word."""

    reads_prompt = True

    def __init__(self, space, seed=0):
        super().__init__()
        self.space = space
        shape = (space.vocab_size, space.vocab_size + 1, space.vocab_size)
        self.weight = nn.Parameter(
            torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        )

    def forward(self, tokens, prompt=None):
        before = torch.cat(
            [torch.full_like(tokens[:, :1], self.space.vocab_size), tokens[:, :-1]], 1
        )
        return self.weight[prompt[:, -1]][torch.arange(len(tokens))[:, None], before]


def test_two_prompts_are_learnt_at_once():
    """One prior, two prompts, each with its own reward and λ: the rows of `compare` both
    fall to 0.
    """
    space = SequenceSpace(("a", "b"), 2)
    prior = Prompted(space)
    rewards = [table_reward({"": 0.0, "a": 1.0, "b": value}, space) for value in (0.0, 0.5)]
    both = [
        Problem(prior, reward, lam, torch.tensor([word]))
        for word, (reward, lam) in enumerate(zip(rewards, (1.0, 2.0), strict=True))
    ]
    targets = [posterior(problem) for problem in both]
    assert float(targets[0].value) != float(targets[1].value)
    history = train(
        None,
        both,
        losses.rloo,
        steps=250,
        lr=3e-2,
        batch_size=32,
        draw=seeded_draw(0),
        target=targets,
    )
    rows = compare(history.policy, targets).rows
    assert max(row.reverse_kl for row in rows) < 1e-8
    assert min(row.reverse_kl for row in compare(prior, targets).rows) > 1e-3
    assert history["reverse_kl"][-1] == pytest.approx(
        sum(row.reverse_kl for row in rows) / 2, rel=1e-9
    )


class TrajectoryBalance(nn.Module):
    """(log Z + log π − log q − r/λ)², whose log Z is a parameter of the loss. Malkin et
    al. (2022).
    """

    def __init__(self):
        super().__init__()
        self.log_evidence = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, batch):
        log_ratio = (batch.log_probs - batch.prior_log_probs).sum(-1)
        return (
            (self.log_evidence + log_ratio - batch.rewards.sum(-1) / batch.kl_coef).square().mean()
        )


def test_a_loss_may_own_parameters():
    problem, loss = four_sentences(), TrajectoryBalance()
    policy = restricted(problem)
    history = train(
        policy, problem, loss, steps=300, lr=5e-2, draw=seeded_draw(0), target=posterior(problem)
    )
    assert history["reverse_kl"][-1] < 1e-10
    assert float(loss.log_evidence.detach()) == pytest.approx(math.log(2.326218341277), abs=1e-5)


def test_several_optimisers_may_share_the_parameters():
    problem, loss = four_sentences(), TrajectoryBalance()
    policy = restricted(problem)
    optimizers = [
        torch.optim.Adam(policy.parameters(), lr=5e-2),
        torch.optim.SGD(loss.parameters(), lr=0.2),
    ]
    history = train(policy, problem, loss, steps=300, optimizer=optimizers, draw=seeded_draw(0))
    assert history["lr"][0] == 5e-2
    assert float(loss.log_evidence.detach()) == pytest.approx(math.log(2.326218341277), abs=1e-3)


def test_a_parameter_of_the_loss_in_no_optimiser_is_refused_by_name():
    problem, loss, policy = four_sentences(), TrajectoryBalance(), restricted(four_sentences())
    for optimizer in (
        torch.optim.Adam(policy.parameters()),
        [torch.optim.Adam(policy.parameters())],
    ):
        with pytest.raises(InputError, match=r"the loss's log_evidence is trainable and in no opt"):
            train(policy, problem, loss, steps=1, optimizer=optimizer, draw=seeded_draw(0))
    with pytest.raises(InputError, match=r"the policy's policy\.logits is trainable and in no opt"):
        train(
            policy,
            problem,
            losses.rloo,
            steps=1,
            optimizer=torch.optim.Adam(loss.parameters()),
            draw=seeded_draw(0),
        )
    loss.log_evidence.requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters())
    assert len(train(policy, problem, loss, steps=1, optimizer=optimizer, draw=seeded_draw(0))) == 1


@pytest.mark.parametrize("optimizer", ["adam", [], [1.0]])
def test_what_is_no_optimiser_is_refused(optimizer):
    problem = four_sentences()
    with pytest.raises(InputError, match=r"optimizer = .*; expected a torch\.optim\.Optimizer"):
        train(None, problem, losses.rloo, steps=1, optimizer=optimizer, draw=seeded_draw(0))


def test_parameters_that_a_wrapper_hides_are_found_in_the_graph():
    problem, loss = four_sentences(), TrajectoryBalance()
    with pytest.raises(
        InputError, match=r"step 1: the loss reaches a trainable tensor of shape \[\] that no opt"
    ):
        train(None, problem, lambda batch: loss(batch), steps=1, draw=seeded_draw(0))
    assert float(loss.log_evidence.detach()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm = -1.0 must be a positive number, or None"),
        ({"max_grad_norm": 0}, "max_grad_norm = 0 must be a positive number, or None"),
        ({"max_grad_norm": math.nan}, "max_grad_norm = nan must be a positive number, or None"),
        ({"max_grad_norm": True}, "max_grad_norm = True must be a positive number, or None"),
        ({"schedule": lambda done: -1.0}, r"schedule\(0\) = -1.0; expected a factor"),
        ({"schedule": lambda done: math.nan}, r"schedule\(0\) = nan; expected a factor"),
        ({"lr": True}, "lr = True must be a positive number"),
        ({"lr": INF}, "lr = inf must be a positive number"),
        ({"evaluate_every": -1}, "evaluate_every = -1 must be a whole number of at least 0"),
        ({"evaluate_every": 1.5}, "evaluate_every = 1.5 must be a whole number"),
        ({"draw": None}, r"training on samples needs its randomness: draw=seeded_draw\(0\)"),
    ],
)
def test_a_number_that_would_train_uphill_or_not_at_all_is_refused(options, message):
    problem, policy = four_sentences(), restricted(four_sentences())
    before = weights(policy)
    with pytest.raises(InputError, match=message):
        train(policy, problem, losses.rloo, **{"steps": 1, "draw": seeded_draw(0), **options})
    assert same(weights(policy), before)


def test_a_rate_beyond_all_floats_is_taken_back():
    problem, policy = four_sentences(), restricted(four_sentences(), "lstm")
    before = weights(policy)
    with pytest.raises(DivergedError, match="made the policy NaN or infinite"):
        train(policy, problem, losses.rloo, steps=1, lr=1e308, draw=seeded_draw(0))
    assert same(weights(policy), before)


# --- the loop itself ------------------------------------------------------------------------------


def test_without_a_policy_a_copy_of_the_prior_is_trained_and_the_prior_stays():
    problem = four_sentences()
    problem.prior.requires_grad_(False)
    before = weights(problem.prior)
    history = train(None, problem, losses.rloo, steps=5, draw=seeded_draw(0))
    assert isinstance(history.policy, SequenceTable)
    assert history.policy is not problem.prior
    assert same(weights(problem.prior), before)
    assert not same(weights(history.policy), before)
    assert not problem.prior.logits.requires_grad


def test_one_seed_gives_the_same_history_twice_and_another_seed_another():
    problem = four_sentences()
    first, second, other = (
        train(
            restricted(problem, "lstm"), problem, losses.rloo, steps=5, draw=seeded_draw(seed)
        ).records
        for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_train_steps_is_lazy_and_train_is_the_same_loop():
    problem, policy = four_sentences(), restricted(four_sentences())
    before = weights(policy)
    stream = train_steps(policy, problem, losses.rloo, steps=3, draw=seeded_draw(0))
    assert isinstance(stream, Iterator)
    assert same(weights(policy), before)
    first = next(stream)
    assert first["step"] == 1
    after = weights(policy)
    assert not same(after, before)
    records = [first, *stream]
    assert (
        records
        == train(restricted(problem), problem, losses.rloo, steps=3, draw=seeded_draw(0)).records
    )


def test_no_steps_change_nothing():
    problem, policy = four_sentences(), restricted(four_sentences())
    before = weights(policy)
    history = train(
        policy, problem, losses.rloo, steps=0, draw=seeded_draw(0), target=posterior(problem)
    )
    assert history.steps("reverse_kl") == [0]
    assert same(weights(policy), before)


def test_comparisons_come_before_every_so_often_and_after():
    problem = four_sentences()
    history = train(
        restricted(problem),
        problem,
        losses.rloo,
        steps=7,
        draw=seeded_draw(0),
        target=posterior(problem),
        evaluate_every=3,
    )
    assert history.steps("reverse_kl") == [0, 3, 6, 7]
    assert history.steps("loss") == [1, 2, 3, 4, 5, 6, 7]
    assert "exact_objective" in history.names
    json.loads(json_line(history.to_dict()))


def test_batch_means_of_an_enumerated_batch_are_exact():
    problem, policy = four_sentences(), four_sentences_policy()
    record = next(
        train_steps(policy, problem, losses.exact, steps=1, lr=1e-300, draw=seeded_draw(0))
    )
    assert record["reward"] == pytest.approx(0.9, abs=1e-14)
    assert record["kl"] == pytest.approx(0.099793472091, abs=5.1e-13)
    assert record["objective"] == pytest.approx(-record["loss"], abs=1e-14)
    assert record["kl_per_token"] == pytest.approx(0.099793472091 / 2, abs=5.1e-13)


def test_batch_means_count_no_sequence_that_the_policy_never_gives():
    problem = four_sentences()
    policy = SequenceTable(
        problem.space,
        problem.prior.tokens,
        torch.tensor([0.0, 0.0, -INF, -INF], dtype=torch.float64),
    )
    history = train(
        policy,
        problem,
        losses.exact,
        steps=100,
        optimizer=torch.optim.SGD(policy.parameters(), lr=2.0),
        draw=seeded_draw(0),
    )
    assert history["kl"][0] == pytest.approx(
        0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.3), abs=1e-14
    )
    star = 0.4 * math.e / (0.4 * math.e + 0.3)  # the posterior within the two sentences
    assert policy.log_probs.exp().tolist() == pytest.approx([star, 1 - star, 0, 0], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
        ("warmup_cosine", [0.01, (1 + math.cos(math.pi / 6)) / 2, 0.586824, 0.178606]),
    ],
)
def test_schedules_scale_the_learning_rate(name, expected):
    problem, policy = four_sentences(), restricted(four_sentences())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.2)
    stream = train_steps(
        policy,
        problem,
        losses.rloo,
        steps=4,
        optimizer=optimizer,
        schedule=SCHEDULES[name],
        draw=seeded_draw(0),
    )
    seen = [(record["lr"], optimizer.param_groups[0]["lr"]) for record in stream]
    assert seen == [(pytest.approx(0.2 * factor, abs=1e-6),) * 2 for factor in expected]
    assert (linear(1.0), cosine(1.0)) == (0.0, pytest.approx(0.0, abs=1e-16))


def test_ones_own_optimizer_is_used_with_its_rate():
    problem, policy = four_sentences(), four_sentences_policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    record = next(
        train_steps(
            policy,
            problem,
            losses.exact,
            steps=1,
            draw=seeded_draw(0),
            optimizer=optimizer,
            lr=123.0,
            schedule=lambda done: 0.5,
        )
    )
    assert record["lr"] == 0.5
    gradient = torch.tensor(
        [-0.011675039611, -0.078948283960, -0.010705934735, 0.101329258306], dtype=torch.float64
    )
    expected = torch.log(torch.tensor([0.5, 0.2, 0.1, 0.2], dtype=torch.float64)) + 0.5 * gradient
    assert policy.logits.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_the_gradient_is_clipped_and_its_norm_before_that_is_recorded():
    problem, policy = four_sentences(), four_sentences_policy()
    before, norm = (
        policy.logits.detach().clone(),
        math.hypot(-0.011675039611, -0.078948283960, -0.010705934735, 0.101329258306),
    )
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    record = next(
        train_steps(
            policy,
            problem,
            losses.exact,
            steps=1,
            draw=seeded_draw(0),
            optimizer=optimizer,
            max_grad_norm=1e-3,
        )
    )
    assert record["grad_norm"] == pytest.approx(norm, abs=1e-11)
    assert float((policy.logits.detach() - before).norm()) == pytest.approx(1e-3, rel=1e-4)


def test_frozen_parameters_stay():
    problem = four_sentences()
    policy = restricted(problem, "lstm")
    policy.policy.embedding.requires_grad_(False)
    before = policy.policy.embedding.weight.clone()
    train(policy, problem, losses.rloo, steps=3, draw=seeded_draw(0))
    assert torch.equal(policy.policy.embedding.weight, before)


# --- where it must stop ---------------------------------------------------------------------------


def good_until(step, value):
    """RLOO that turns into `value` at a step."""
    calls = [0]

    def loss(batch):
        calls[0] += 1
        return losses.rloo(batch) * (value if calls[0] == step else 1.0)

    return loss


@pytest.mark.parametrize("value", [math.nan, INF])
def test_a_bad_loss_stops_with_its_step_and_the_last_good_weights(value):
    problem = four_sentences()
    policy, twin = restricted(problem, "lstm"), restricted(problem, "lstm")
    with pytest.raises(
        DivergedError, match=r"step 4: the loss is (nan|-?inf); the last good weights are kept"
    ) as caught:
        train(policy, problem, good_until(4, value), steps=9, draw=seeded_draw(0))
    assert caught.value.step == 4
    train(twin, problem, losses.rloo, steps=3, draw=seeded_draw(0))
    assert same(weights(policy), weights(twin))


def test_a_bad_gradient_under_a_finite_loss_stops_too():
    """√0 has slope inf, and inf·0 is NaN."""

    def loss(batch):
        return losses.rloo(batch) + torch.sqrt(
            (batch.log_probs - batch.log_probs.detach()).square().sum()
        )

    problem, policy = four_sentences(), restricted(four_sentences())
    before = weights(policy)
    with pytest.raises(DivergedError, match=r"step 1: the gradient's norm is nan") as caught:
        train(policy, problem, loss, steps=2, draw=seeded_draw(0))
    assert caught.value.step == 1
    assert same(weights(policy), before)


def test_an_update_to_infinity_is_taken_back():
    problem, policy = four_sentences(), restricted(four_sentences())
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e308)
    before = weights(policy)
    with pytest.raises(
        DivergedError,
        match=r"step 1: its update made the policy NaN or infinite; the last good weights are"
        r" back in place",
    ) as caught:
        train(
            policy,
            problem,
            lambda batch: 1e3 * losses.rloo(batch),
            steps=3,
            draw=seeded_draw(0),
            optimizer=optimizer,
        )
    assert caught.value.step == 1
    assert same(weights(policy), before)


def test_a_nan_reward_in_the_middle_keeps_the_last_good_weights_and_names_the_text():
    base = four_sentences()
    calls = [0]

    def reward(tokens, prompt):
        calls[0] += 1
        values = base.reward(tokens, prompt)
        return torch.full_like(values, math.nan) if calls[0] == 3 else values

    policy, twin = restricted(base), restricted(base)
    with pytest.raises(InputError, match=r"reward 'reward' of sequence 0, '.*', is nan"):
        train(policy, Problem(base.prior, reward, 1.0), losses.rloo, steps=9, draw=seeded_draw(0))
    train(twin, base, losses.rloo, steps=2, draw=seeded_draw(0))
    assert same(weights(policy), weights(twin))


@pytest.mark.parametrize("loss", [losses.rloo, losses.reinforce, losses.exact])
def test_an_unrestricted_policy_is_refused_before_any_update(loss):
    problem = four_sentences()
    policy = RecurrentModel(problem.space, hidden_size=4)
    before = weights(policy)
    with pytest.raises(
        UnsupportedPolicyError, match=r"restrict_to_support\(policy, problem\.prior\)"
    ):
        train(policy, problem, loss, steps=3, draw=seeded_draw(0))
    assert same(weights(policy), before)


@pytest.mark.parametrize("loss", [losses.rloo, losses.exact])
def test_stray_mass_too_small_to_be_drawn_is_refused_before_any_update(loss):
    """π('cat' first) is about e^{−30}/2: no batch of two shows it (seed fixed), only a look at the
    distribution does.
    """
    problem = four_sentences()
    policy = PrefixTable(problem.space)
    with torch.no_grad():
        policy.logits[:, :] = -INF
        policy.logits[0, :2] = 0.0  # the, a
        policy.logits[1:, 2:] = 0.0  # cat, dog
        policy.logits[0, 2] = -30.0
    before = weights(policy)
    with pytest.raises(UnsupportedPolicyError, match=r"mass 4\.7e-14 .*restrict_to_support"):
        train(policy, problem, loss, steps=1, batch_size=2, draw=seeded_draw(0))
    assert same(weights(policy), before)


def test_a_policy_on_the_prior_only_is_refused_under_a_hard_reward():
    base = four_sentences()
    problem = Problem(
        base.prior,
        table_reward({"the cat": 1, "the dog": 0, "a cat": 0, "a dog": -INF}, base.space),
        1.0,
    )
    for loss in (losses.exact, losses.rloo):
        with pytest.raises(
            UnsupportedPolicyError, match=r"reward is -inf.*feasible_prior\(problem\)"
        ):
            train(restricted(base), problem, loss, steps=50, draw=seeded_draw(0))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda batch: batch.log_probs.sum(-1), r"the loss returned shape \[64\].*scalar"),
        (lambda batch: 0.5, "the loss returned float"),
        (lambda batch: batch.log_probs.detach().sum(), r"carries no gradient.*detach"),
        (lambda batch: batch.rewards.mean(), "carries no gradient"),
    ],
)
def test_what_is_no_loss_is_refused(loss, message):
    problem = four_sentences()
    with pytest.raises(InputError, match=message):
        train(restricted(problem), problem, loss, steps=1, draw=seeded_draw(0))


def test_arguments_are_checked():
    problem = four_sentences()

    def run(policy=None, given=problem, loss=losses.rloo, **options):
        return train(
            restricted(problem) if policy is None else policy,
            given,
            loss,
            **{"steps": 1, "draw": seeded_draw(0)} | options,
        )

    for options, message in (
        ({"batch_size": 1}, "group 0 holds one sequence"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"steps": -1}, "steps = -1"),
        ({"steps": 1.5}, "steps = 1.5"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"lr": math.nan}, "lr = nan"),
        ({"lr": INF}, "lr = inf"),
        ({"given": four_sentences(INF)}, "kl_coef = inf.*nothing to train"),
        ({"given": []}, "at least one Problem"),
        ({"given": [problem, four_sentences()]}, "share one prior"),
        ({"policy": restricted(problem).requires_grad_(False)}, "no trainable parameters"),
        ({"policy": SequenceTable.from_texts({"the cat": 1.0})}, "different spaces"),
    ):
        with pytest.raises(InputError, match=message):
            run(**options)


def test_a_refused_update_leaves_a_policy_that_can_go_on():
    problem, policy = four_sentences(), restricted(four_sentences(), "gru")
    with pytest.raises(DivergedError):
        train(policy, problem, good_until(2, math.nan), steps=5, draw=seeded_draw(0))
    kept = copy.deepcopy(policy.state_dict())
    train(policy, problem, losses.rloo, steps=2, draw=seeded_draw(0))
    assert not same(list(kept.values()), list(policy.state_dict().values()))
