"""Every assertion against estimators that are known to be wrong, and against their twins that are
right.

assertion                  refuses                                                       accepts
assert_unbiased            every fault, gradient and value, by its known mean            every twin,
every right estimator of the package
assert_same_gradient       every fault beside its twin, batch by batch and in the mean   a twin
beside itself; equal means where they are equal
assert_variance_at_most    any bound below the variance of a loop over batches           that
variance itself
assert_mean_is             every fault, from samples                                     every twin,
from samples
assert_samples_from        every wrong sampler                                           the model's
own samples
assert_is_language_model   every broken model of test_laws.py                            its sound
twins
"""

import dataclasses
import functools
import itertools

import pytest
import torch

from klrl_edu import testing
from klrl_edu.audit.claims.catalogue import CATALOGUE
from klrl_edu.core.draws import seeded_draw
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from klrl_edu.learning.batches import score_batch
from klrl_edu.models.contract import conditional_log_probs, enumerate_support
from klrl_edu.testing import ledger
from klrl_edu.testing.assertions import standard_cases
from tests.testing import test_laws
from tests.testing.faults import FAULTS, VALUE_FAULTS, kl_to_go_of, known_mean

B = 2
CASES = standard_cases()
TWINS = {fault.twin: fault.target for fault in FAULTS}


@pytest.fixture(autouse=True)
def a_ledger_of_its_own(monkeypatch):
    """What is refused here on purpose is no risk of the suite."""
    monkeypatch.setattr(ledger, "run", ledger.Ledger())


def each_fault(function):
    return pytest.mark.parametrize("fault", FAULTS, ids=[fault.loss.__name__ for fault in FAULTS])(
        function
    )


@functools.cache
def brute_force(loss, case):
    """Probabilities [X] and gradients [X,P] of every batch, each scored from the beginning."""
    support, problems = enumerate_support(case.policy), case.problems
    parameters = [parameter for parameter in case.policy.parameters() if parameter.requires_grad]
    probability, gradients = [], []
    for rows in itertools.product(range(len(support)), repeat=B * len(problems)):
        groups = support.tokens[list(rows)].split(B)
        value = loss(score_batch(case.policy, problems, groups))
        gradients.append(
            torch.cat(
                [
                    g.reshape(-1)
                    for g in torch.autograd.grad(value, parameters, materialize_grads=True)
                ]
            )
        )
        probability.append(support.log_weights[list(rows)].sum().exp())
    return torch.stack(probability), torch.stack(gradients)


def biased_case(fault):
    """The case on which a fault shows most beside the range of its gradients, with these and the
    target.
    """
    found = []
    for case in CASES:
        probability, gradients = brute_force(fault.loss, case)
        sound, twins = brute_force(fault.twin, case)
        bias = float((probability @ gradients - sound @ twins).norm())
        spread = float((gradients - gradients.mean(0)).norm(dim=-1).max())
        found.append((bias / spread, case, probability, gradients, sound @ twins, twins))
    return max(found, key=lambda row: row[0])[1:]


# --- exact assertions -----------------------------------------------------------------------------


@each_fault
def test_a_fault_has_exactly_the_mean_that_its_docstring_gives(fault):
    for case in CASES:
        probability, gradients = brute_force(fault.loss, case)
        assert torch.allclose(
            probability @ gradients, known_mean(fault, case, B), rtol=0, atol=1e-13
        ), case.name


@pytest.mark.parametrize("twin", TWINS, ids=lambda f: f.__name__)
def test_a_twin_is_unbiased_and_has_its_own_gradient(twin):
    testing.assert_unbiased(twin, TWINS[twin], batch_size=B)
    testing.assert_same_gradient(twin, twin, batch_size=B)
    testing.assert_same_gradient(twin, twin, batch_size=B, in_expectation=True)


@each_fault
def test_assert_unbiased_refuses_a_faulty_loss(fault):
    with pytest.raises(
        AssertionError,
        match=(
            f"(?s){fault.loss.__name__} is biased for {fault.target}.*Remedy: .*false-alarm"
            " probability 0"
        ),
    ):
        testing.assert_unbiased(fault.loss, fault.target, batch_size=B)


def right_ones():
    """The package's own that are unbiased for one target on the policy's own samples, by their
    entries in the catalogue.
    """
    for entry in CATALOGUE:
        function = entry.audited or entry.function
        one_target = not callable(entry.claim) and list(entry.claim.values()) == [1.0]
        plain = entry.drawn_by == "policy" and entry.constants is None
        of_log_ratios = function in (kl_values.k1, kl_values.k3)
        if entry.unbiased and one_target and plain and (entry.kind == "gradient" or of_log_ratios):
            (target,) = entry.claim
            yield pytest.param(function, target, entry.batch_size, id=entry.name)


@pytest.mark.parametrize(("estimator", "target", "batch_size"), list(right_ones()))
def test_every_right_estimator_of_the_package_passes(estimator, target, batch_size):
    testing.assert_unbiased(estimator, target, batch_size=batch_size)


def test_a_window_of_three_tokens_is_refused_though_it_hardly_shows():
    with pytest.raises(AssertionError, match=r"kl_to_go_of_3_tokens is biased for reverse_kl"):
        testing.assert_unbiased(kl_to_go_of(3), "reverse_kl")


def test_whoever_forgets_the_groups_has_the_mean_but_neither_gradient_nor_variance():
    """Leave-one-out over all groups is unbiased: the others know nothing of the sequence. But it
    brings one problem's level of reward into the other's variance.
    """

    def without_groups(batch):
        return losses.rloo(dataclasses.replace(batch, group=torch.zeros_like(batch.group)))

    testing.assert_unbiased(without_groups, "objective")
    with pytest.raises(AssertionError, match=r"differ on .* \(two problems in a batch"):
        testing.assert_same_gradient(without_groups, losses.rloo)
    with pytest.raises(AssertionError, match=r"\(two problems in a batch.*, that of rloo"):
        testing.assert_variance_at_most(without_groups, losses.rloo)


@pytest.mark.parametrize("estimator", VALUE_FAULTS, ids=lambda f: f.__name__)
def test_assert_unbiased_refuses_a_faulty_value(estimator):
    with pytest.raises(AssertionError, match=f"{estimator.__name__}|k2 is biased for reverse_kl"):
        testing.assert_unbiased(estimator, "reverse_kl")


@pytest.mark.parametrize("estimator", [kl_values.k1, kl_values.k3], ids=lambda f: f.__name__)
def test_assert_unbiased_accepts_a_sound_value(estimator):
    testing.assert_unbiased(estimator, "reverse_kl")
    case = CASES[0]
    log_pi, log_q = case.policy.log_probs.detach(), case.problem.prior.log_probs.detach()
    exact = float(log_pi.exp() @ (log_pi - log_q))
    testing.assert_unbiased(estimator, exact, case.policy, case.problem)
    with pytest.raises(AssertionError):
        testing.assert_unbiased(
            estimator, exact * (1 + 1e-9), case.policy, case.problem, tolerance=1e-10
        )


@each_fault
def test_assert_same_gradient_tells_a_fault_from_its_twin(fault):
    with pytest.raises(AssertionError, match=f"{fault.loss.__name__}.*{fault.twin.__name__}"):
        testing.assert_same_gradient(fault.loss, fault.twin, batch_size=B)


@pytest.mark.parametrize("fault", FAULTS[::4], ids=lambda fault: fault.loss.__name__)
def test_in_expectation_too(fault):
    with pytest.raises(AssertionError, match=f"{fault.loss.__name__}.*{fault.twin.__name__}"):
        testing.assert_same_gradient(fault.loss, fault.twin, batch_size=B, in_expectation=True)


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.combinations(TWINS, 2)), ids=lambda f: f.__name__
)
def test_equal_means_are_accepted_where_single_batches_differ(one, other):
    if TWINS[one] != TWINS[other]:
        with pytest.raises(AssertionError):
            testing.assert_same_gradient(one, other, in_expectation=True)
        return
    testing.assert_same_gradient(one, other, in_expectation=True)
    batch_by_batch = {one.__name__, other.__name__} == {
        "rloo",
        "log_variance",
    }  # RLOO is VarGrad, batch by batch
    if batch_by_batch:
        testing.assert_same_gradient(one, other)
    else:
        with pytest.raises(AssertionError, match=r"differ on .* batches"):
            testing.assert_same_gradient(one, other)


EVERY_LOSS = [*TWINS, *(fault.loss for fault in FAULTS)]


@pytest.mark.parametrize(
    ("loss", "case"),
    list(zip(EVERY_LOSS, itertools.cycle(CASES), strict=False)),
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_assert_variance_at_most_takes_the_variance_and_nothing_below(loss, case):
    probability, gradients = brute_force(loss, case)
    variance = float(probability @ (gradients - probability @ gradients).square().sum(-1))
    given = (case.policy, case.problems)
    testing.assert_variance_at_most(loss, variance, *given, batch_size=B, tolerance=1e-10)
    with pytest.raises(AssertionError, match=r"has variance .* expected at most"):
        testing.assert_variance_at_most(loss, variance * (1 - 1e-6), *given, batch_size=B)


# --- statistical assertions -----------------------------------------------------------------------


@each_fault
def test_assert_mean_is_finds_a_fault_in_samples_and_passes_its_twin(fault):
    """100,000 batches projected on the bias; σ and range are those of the enumerated batches."""
    case, probability, gradients, expected, twins = biased_case(fault)
    direction = torch.nn.functional.normalize(probability @ gradients - expected, dim=0)
    index = seeded_draw(0)(probability.log()[None], torch.zeros(100_000, dtype=torch.long))
    for values, sound in ((twins @ direction, True), (gradients @ direction, False)):
        mean = float(expected @ direction)
        sigma = float((probability @ (values - probability @ values).square()).sqrt())
        value_range = (min(mean, float(values.min())), max(mean, float(values.max())))
        if sound:
            testing.assert_mean_is(values[index], mean, sigma=sigma, value_range=value_range)
        else:
            with pytest.raises(
                AssertionError,
                match=r"the mean of 100,000 samples .*\n.*False-alarm probability 1e-09",
            ):
                testing.assert_mean_is(values[index], mean, sigma=sigma, value_range=value_range)
    assert {entry.assertion for entry in ledger.run.entries} == {"assert_mean_is"}
    assert case in CASES


MODEL = CASES[2].policy  # x and y, up to two words, EOS; 'y' and 'y x' have no mass
SPACE = MODEL.space


def changed_logits(change):
    """A sampler whose conditionals are changed: change(log_probs [n,V], t) -> logits [n,V]; EOS at
    T as ever.
    """

    def sampler(n, *, draw):
        logits, state = MODEL.start(n)
        columns = []
        for t in range(SPACE.max_length):
            ended = columns[-1] == SPACE.eos_id if columns else torch.zeros(n, dtype=torch.bool)
            token = draw(torch.log_softmax(change(torch.log_softmax(logits.detach(), -1), t), -1))
            forced = ended if t < SPACE.max_length - 1 else torch.ones(n, dtype=torch.bool)
            columns.append(torch.where(forced, SPACE.eos_id, token))
            if t < SPACE.max_length - 1:
                logits, state = MODEL.step(state, columns[-1])
        return torch.stack(columns, 1)

    return sampler


def without(token, position):
    def change(log_probs, t):
        if t != position:
            return log_probs
        kept = log_probs.clone()
        kept[:, token] = -torch.inf
        return torch.where((kept == -torch.inf).all(-1, keepdim=True), log_probs, kept)

    return changed_logits(change)


def repeated(n, *, draw):
    return MODEL.sample(n // 1000, draw=draw).repeat(1000, 1)


def best_of_two(n, *, draw):
    pairs = MODEL.sample(2 * n, draw=draw).reshape(n, 2, -1)
    return torch.where(
        ((pairs[:, 0] < 2).sum(-1) >= (pairs[:, 1] < 2).sum(-1))[:, None], pairs[:, 0], pairs[:, 1]
    )


def conditioned_on_ending(n, *, draw):
    """Rejects where EOS had to be forced at T − 1, instead of forcing it."""
    tokens = MODEL.sample(3 * n, draw=draw)
    return tokens[(tokens < 2).sum(-1) < 2][:n]


WRONG_SAMPLERS = {
    "temperature 0.7": changed_logits(lambda log_probs, t: log_probs / 0.7),
    "temperature 1.4": changed_logits(lambda log_probs, t: log_probs / 1.4),
    "greedy at the second token": changed_logits(
        lambda log_probs, t: log_probs * (1 if t != 1 else 50)
    ),
    "never empty": without(2, 0),
    "never one word": without(2, 1),
    "no second x": without(0, 1),
    "a floor of 0.01 on probabilities": changed_logits(
        lambda log_probs, t: (log_probs.exp() + 0.01).log()
    ),
    "the prior for the policy": CASES[2].problem.prior.sample,
    "uniform over the support": (
        lambda n, *, draw: enumerate_support(MODEL).tokens[
            draw(torch.zeros(1, 4), torch.zeros(n, dtype=torch.long))
        ]
    ),
    "each sample a thousand times": repeated,
    "the longer of two": best_of_two,
    "conditioned on an early end": conditioned_on_ending,
    "one sequence of mass zero": lambda n, *, draw: torch.cat(
        [MODEL.sample(n - 1, draw=draw), SPACE.encode(["y x"])]
    ),
}


def test_the_models_own_samples_are_accepted_by_any_decoder():
    testing.assert_samples_from(MODEL.sample, MODEL)
    testing.assert_samples_from(MODEL.sample(5_000, draw=seeded_draw(1)), MODEL)
    testing.assert_samples_from(changed_logits(lambda log_probs, t: log_probs), MODEL)


@pytest.mark.parametrize("sampler", WRONG_SAMPLERS)
def test_assert_samples_from_refuses(sampler):
    with pytest.raises(
        AssertionError, match=r"False-alarm probability .*e-.*; finds a bin's mass off by more than"
    ):
        testing.assert_samples_from(WRONG_SAMPLERS[sampler], MODEL)


# --- the table is as long as it says --------------------------------------------------------------


def test_every_assertion_meets_ten_faults_or_more():
    assert (
        min(
            len(FAULTS),
            len(VALUE_FAULTS),
            len(WRONG_SAMPLERS),
            len({broken for broken, _, _ in test_laws.BROKEN}),
        )
        >= 10
    )
    assert (
        testing.assert_is_language_model is testing.check_language_model
    )  # which test_laws.py runs on each of them
    assert all(fault.loss.__doc__ for fault in FAULTS)
    assert len([*right_ones()]) >= 20


def test_the_standard_cases_are_what_they_promise():
    log_ratios, rewards, free = [], [], []
    for case in CASES:
        support = enumerate_support(case.policy)
        log_ratio = support.log_weights - case.problem.prior.log_prob(support.tokens)
        log_ratios += log_ratio.tolist()
        rewards += [float(value) for p in case.problems for value in p.rewards(support.tokens)]
        log_dists = conditional_log_probs(case.policy, support.tokens)
        choices = (log_dists > -torch.inf).sum(-1) > 1
        free.append(int(choices.sum(-1).max()))
    assert min(log_ratios) < -10
    assert max(log_ratios) > 20
    assert min(rewards) < -10
    assert max(rewards) > 10
    assert max(free) >= 4
    assert max(len(case.problems) for case in CASES) == 2
    assert all(case.problem.kl_coef not in (0.0, 1.0) for case in CASES)
    assert {case.problem.space.eos for case in CASES} == {True, False}
    assert {type(case.policy).__name__ for case in CASES} == {"SequenceTable", "RestrictedModel"}
    for case in CASES:
        assert (
            len(enumerate_support(case.policy)) < case.problem.space.size
        )  # some sequences have no mass
    assert {problem.prompt for case in CASES for problem in case.problems} == {None}
