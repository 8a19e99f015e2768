"""The audit against the course's numbers, brute force over batches, and losses whose expected
gradient is known.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from klrl_edu.audit.audit import audit_gradient, audit_value
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError, TooLargeError, UnsupportedPolicyError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.estimators import kl_values
from klrl_edu.learning import losses
from klrl_edu.learning.batches import needs
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.examples import four_sentences, four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.testing import policies, problems
from tests.exact.dictionaries import INF

GRADIENT = [
    -0.011675039611,
    -0.078948283960,
    -0.010705934735,
    0.101329258306,
]  # ∇J of t05, in sequence logits
FORWARD = [0.1, -0.1, -0.1, 0.1]  # ∇KL(q‖π) of t06
PI, Q, R = [0.5, 0.2, 0.1, 0.2], [0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 0.0, 2.0]
U = [math.log(p / q) for p, q in zip(PI, Q, strict=True)]


def log_ratio(batch):
    return (batch.log_probs - batch.prior_log_probs).sum(-1)


def batch_mean_baseline(batch):
    """The broken twin of RLOO: the mean includes the sequence itself."""
    reward = losses.penalised_reward(batch)
    return -((reward - reward.mean()) * batch.log_probs.sum(-1)).mean()


def k1_loss(batch):
    return log_ratio(batch).mean()


def k2_loss(batch):
    return kl_values.k2(log_ratio(batch)).mean()


def k3_loss(batch):
    return kl_values.k3(log_ratio(batch)).mean()


def audit(loss, **options):
    return audit_gradient(loss, four_sentences_policy(), four_sentences(), **options)


def close(expected):
    return pytest.approx(list(expected), rel=0, abs=5.1e-13)


def relative(report, name):
    """Bias over the size of what was averaged, so that a target of 0 is no trouble."""
    return report.bias[name] / max(
        float(report.targets[name].norm()), math.sqrt(report.variance), 1e-3
    )


# --- what each loss follows -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "batch_size", "executions"),
    [(losses.exact, 1, 1), (losses.reinforce, 1, 4), (losses.rloo, 2, 10), (losses.rloo, 3, 20)],
)
def test_unbiased_losses_have_the_gradient_of_t05(loss, batch_size, executions):
    report = audit(loss, batch_size=batch_size)
    assert report.mean.tolist() == close(-x for x in GRADIENT)  # the loss descends, J ascends
    assert report.targets["objective"].tolist() == close(-x for x in GRADIENT)
    assert report.relative_bias["objective"] < 1e-12
    assert "objective" in report.verdict
    assert "unbiased" in report.verdict
    assert (report.executions, report.coordinates, report.batch_size) == (
        executions,
        "sequence logits",
        batch_size,
    )


@settings(max_examples=20)
@given(data=st.data())
def test_rloo_and_reinforce_are_unbiased_for_any_problem_and_policy(data):
    problem = data.draw(problems(max_words=2, forbid=False))
    policy = data.draw(policies(problem))
    for loss, batch_size in ((losses.reinforce, 1), (losses.rloo, 2)):
        report = audit_gradient(loss, policy, problem, batch_size=batch_size)
        assert relative(report, "objective") < 1e-12


def test_any_constant_baseline_leaves_reinforce_unbiased():
    report = audit(lambda batch: losses.reinforce(batch, baseline=17.5), batch_size=2)
    assert report.bias["objective"] < 1e-13


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_batch_mean_baseline_shrinks_the_gradient_by_exactly_one_over_n(n):
    report = audit(batch_mean_baseline, batch_size=n)
    assert report.mean.tolist() == pytest.approx([-(n - 1) / n * x for x in GRADIENT], abs=1e-12)
    assert report.scale["objective"] == pytest.approx((n - 1) / n, rel=1e-12)
    assert report.relative_bias["objective"] == pytest.approx(1 / n, rel=1e-11)
    assert f"follows objective, scaled by {(n - 1) / n:.6g}" in report.verdict


def test_k1_as_a_loss_has_expectation_zero():
    report = audit(k1_loss)
    assert float(report.mean.norm()) < 1e-15
    assert report.verdict == "k1_loss has expectation 0."
    assert report.variance > 0.1


def test_k2_as_a_loss_follows_the_reverse_divergence():
    report = audit(k2_loss, batch_size=2)
    divergence = sum(p * u for p, u in zip(PI, U, strict=True))
    assert report.mean.tolist() == close(p * (u - divergence) for p, u in zip(PI, U, strict=True))
    assert report.relative_bias["reverse_kl"] < 1e-12
    assert report.verdict == "k2_loss is unbiased for reverse_kl."


def test_k3_as_a_loss_follows_the_forward_divergence():
    report = audit(k3_loss)
    assert report.mean.tolist() == close(FORWARD)
    assert report.targets["forward_kl"].tolist() == close(FORWARD)
    # the first words of π and q are alike here, so that freezing prefixes changes nothing
    assert report.verdict == "k3_loss is unbiased for forward_kl and forward_kl_per_token."


def test_k3_in_the_reward_follows_the_difference_of_both_divergences():
    def k3_in_reward(batch):
        return (kl_values.k3(log_ratio(batch)).detach() * batch.log_probs.sum(-1)).mean()

    report = audit(k3_in_reward)
    assert report.mean.tolist() == close(
        (report.targets["reverse_kl"] - report.targets["forward_kl"]).tolist()
    )
    assert report.verdict == "k3_in_reward descends KL(π‖q) − KL(q‖π)."


def test_the_kl_penalty_left_out_is_noticed():
    """The custom loss of a user who forgot λ: it follows ∇E[r] (t11) and not ∇J."""

    def reward_only(batch):
        return -(batch.rewards.sum(-1) * batch.log_probs.sum(-1)).mean()

    report = audit(reward_only)
    assert report.mean.tolist() == close([-0.05, 0.18, 0.09, -0.22])
    assert report.relative_bias["objective"] > 0.5
    assert report.verdict == "reward_only is unbiased for expected_reward."


def test_at_the_posterior_rloo_has_mean_and_variance_zero():
    """Where r − λu = λ log Z for every sequence, there is nothing left to learn and no noise."""
    problem = four_sentences(0.7)
    logits = [math.log(q) + r / 0.7 for q, r in zip(Q, R, strict=True)]
    star = SequenceTable(
        problem.space, problem.prior.tokens, torch.tensor(logits, dtype=torch.float64)
    )
    report = audit_gradient(losses.rloo, star, problem, batch_size=2)
    assert report.variance < 1e-28
    assert float(report.mean.norm()) < 1e-14
    assert report.verdict == "rloo has expectation 0, as has objective here."


# --- moments by hand ------------------------------------------------------------------------------


def test_mean_and_variance_are_those_of_a_loop_over_batches():
    """RLOO at n = 2 in plain Python: the score of sequence logits is e_y − π."""
    expected, second = [0.0] * 4, 0.0
    reward = [r - u for r, u in zip(R, U, strict=True)]
    for a, b in itertools.product(range(4), repeat=2):
        probability = PI[a] * PI[b]
        gradient = [
            -(
                (reward[a] - reward[b]) * ((k == a) - PI[k])
                + (reward[b] - reward[a]) * ((k == b) - PI[k])
            )
            / 2
            for k in range(4)
        ]
        expected = [m + probability * g for m, g in zip(expected, gradient, strict=True)]
        second += probability * sum(g * g for g in gradient)
    report = audit(losses.rloo, batch_size=2)
    assert report.mean.tolist() == pytest.approx(expected, abs=1e-14)
    assert report.variance == pytest.approx(second - sum(m * m for m in expected), abs=1e-14)


def test_independent_averages_divide_the_variance():
    one, three = audit(losses.reinforce).variance, audit(losses.reinforce, batch_size=3).variance
    assert three == pytest.approx(one / 3, rel=1e-12)


def test_full_distributions_count_in_the_gradient():
    """A per-token KL over the vocabulary: its gradient runs through [N,T,V], and the sampled
    log-probabilities are not used at all.

    In sequence logits, with frozen prefixes; the oracle differentiates Σ_y π(y) Σ_t KL_t(y) with
    π(y) held fixed.
    """

    @needs("distributions")
    def rao_blackwell(batch):
        return kl_values.per_token_kl(batch.log_dists, batch.prior_log_dists).sum(-1).mean()

    first = {"the": (0.7, 0.7), "a": (0.3, 0.3)}  # π and q of the first word: here equal
    assert first["the"][0] == pytest.approx(PI[0] + PI[1])
    # ∂KL(the)/∂θ: within 'the', p = (5/7, 2/7) against (4/7, 3/7), and weight 0.7; within 'a', p =
    # (1/3, 2/3) against (2/3, 1/3), weight 0.3
    expected = []
    for p, q, weight in (
        ((5 / 7, 2 / 7), (4 / 7, 3 / 7), 0.7),
        ((1 / 3, 2 / 3), (2 / 3, 1 / 3), 0.3),
    ):
        u = [math.log(a / b) for a, b in zip(p, q, strict=True)]
        mean = sum(a * b for a, b in zip(p, u, strict=True))
        expected += [weight * a * (b - mean) for a, b in zip(p, u, strict=True)]
    report = audit(rao_blackwell)
    assert report.mean.tolist() == pytest.approx(expected, abs=1e-14)

    @needs("distributions")
    def both(batch):
        return rao_blackwell(batch) + losses.reinforce(batch)

    assert audit(both).mean.tolist() == pytest.approx(
        [a - b for a, b in zip(expected, GRADIENT, strict=True)], abs=1e-12
    )


def test_a_networks_parameters_are_coordinates_too():
    """Three-parameter check against central differences of J, whose error is about 1e-9 at h =
    1e-5.
    """
    problem = four_sentences(0.5)
    policy = restrict_to_support(
        RecurrentModel(problem.space, hidden_size=2, seed=3), problem.prior
    )
    report = audit_gradient(losses.rloo, policy, problem, batch_size=2)
    parameters = list(policy.parameters())
    assert (
        report.coordinates == f"{sum(p.numel() for p in parameters)} parameters of RestrictedModel"
    )
    assert relative(report, "objective") < 1e-12
    tokens = problem.prior.tokens

    def objective():
        log_pi = policy.log_prob(tokens).detach()
        return float(
            log_pi.exp()
            @ (problem.rewards(tokens) - 0.5 * (log_pi - problem.prior.log_prob(tokens).detach()))
        )

    slopes, h = [], 1e-5
    with torch.no_grad():
        for parameter in parameters:
            for entry in parameter.view(-1):
                old = float(entry)
                entry.fill_(old + h)
                up = objective()
                entry.fill_(old - h)
                slopes.append((up - objective()) / (2 * h))
                entry.fill_(old)
    assert (-report.mean).tolist() == pytest.approx(slopes, abs=1e-9)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "bias", "variance"),
    [
        (kl_values.k1, 0.0, 0.191954080129),
        (kl_values.k2, 0.001162936509, None),
        (kl_values.k3, 0.0, 0.008973476020),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_values_have_the_moments_of_t06(estimator, bias, variance, batch_size):
    report = audit_value(
        estimator, four_sentences_policy(), four_sentences(), batch_size=batch_size
    )
    assert float(report.mean) - 0.099793472091 == pytest.approx(bias, abs=1.1e-12)
    assert report.targets["reverse_kl"].tolist() == close([0.099793472091])
    assert report.targets["forward_kl"].tolist() == close([0.101696829963])
    if variance is not None:
        assert report.variance == pytest.approx(variance / batch_size, abs=1e-12)
    assert ("unbiased" in report.verdict) == (bias == 0)


def test_a_user_estimator_can_be_audited_and_must_keep_its_shape():
    report = audit_value(lambda u: torch.exp(-u) - 1, four_sentences_policy(), four_sentences())
    assert report.verdict == "<lambda> has expectation 0."
    with pytest.raises(InputError, match=r"shape \[\]; expected \[4\]"):
        audit_value(lambda u: u.mean(), four_sentences_policy(), four_sentences())


@pytest.mark.parametrize("log_mass", [-1.0, -36.0, -800.0])
def test_the_forward_divergence_is_infinite_however_little_mass_is_missed(log_mass):
    space = SequenceSpace(("a", "b", "c"), 1, eos=False)
    tokens = space.all_tokens()
    problem = Problem(
        SequenceTable(space, tokens, torch.tensor([0.0, 0.0, log_mass]).double()),
        lambda t, p: torch.zeros(len(t)),
        1.0,
    )
    policy = SequenceTable(space, tokens[:2], torch.tensor([0.0, 1.0]).double())
    assert audit_value(kl_values.k1, policy, problem).targets["forward_kl"].tolist() == [INF]
    assert "forward_kl" not in audit_gradient(losses.reinforce, policy, problem).targets


# --- refusals -------------------------------------------------------------------------------------


def test_too_many_batches_are_refused_with_their_count():
    with pytest.raises(
        TooLargeError,
        match=(
            r"batches of 200 out of 4 sequences are 1,373,701 multisets.*max_executions ="
            r" 1,000,000.*monte_carlo=n"
        ),
    ):
        audit(losses.grpo, batch_size=200)
    with pytest.raises(TooLargeError, match=r"about 10\^17"):
        audit(losses.grpo, batch_size=1_000_000)
    assert audit(losses.rloo, batch_size=2, max_executions=10).executions == 10
    with pytest.raises(TooLargeError, match="are 10 multisets"):
        audit(losses.rloo, batch_size=2, max_executions=9)


def test_an_unrestricted_policy_is_refused():
    problem = four_sentences()
    with pytest.raises(UnsupportedPolicyError, match="restrict_to_support"):
        audit_gradient(losses.reinforce, PrefixTable(problem.space), problem)


def test_what_is_no_loss_is_refused():
    with pytest.raises(InputError, match=r"shape \[1\].*scalar"):
        audit(lambda batch: batch.log_probs.sum(-1))
    with pytest.raises(InputError, match="no gradient"):
        audit(lambda batch: batch.log_probs.detach().sum())
    with pytest.raises(InputError, match="float"):
        audit(lambda batch: 1.0)
    with pytest.raises(InputError, match="at least 2 a prompt"):
        audit(losses.rloo, batch_size=1)
    with pytest.raises(InputError, match="batch_size = 0"):
        audit(losses.rloo, batch_size=0)


def test_a_frozen_policy_and_another_space_are_refused():
    with pytest.raises(InputError, match="no trainable parameters"):
        audit_gradient(
            losses.reinforce, four_sentences_policy().requires_grad_(False), four_sentences()
        )
    with pytest.raises(InputError, match="different spaces"):
        audit_gradient(
            losses.reinforce, SequenceTable.from_texts({"the cat": 1.0}), four_sentences()
        )


def test_a_module_loss_is_audited_with_its_parameters_held_fixed():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

        def forward(self, batch):
            return losses.reinforce(batch, baseline=self.shift)

    report = audit(Shifted())
    assert report.name == "Shifted"
    assert report.bias["objective"] < 1e-14


def test_targets_are_the_autograd_gradients_of_the_enumerated_divergences():
    policy, problem = four_sentences_policy(), four_sentences()
    log_pi, log_q = policy.log_probs, problem.prior.log_probs.detach()
    (reverse,) = torch.autograd.grad(logspace.kl_divergence(log_pi, log_q), policy.logits)
    assert torch.allclose(audit(losses.exact).targets["reverse_kl"], reverse, rtol=0, atol=1e-15)
