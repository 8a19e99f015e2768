"""Statements about gradients, in sequence logits: π(y) = e^{θ_y}/Σe^θ, s(y) = ∇_θ log π(y) = e_y −
π.

    ∇J = E_π[(r − λu) s] = −λ ∇KL(π‖π*),    ∇E_π[k] = E_π[k s] + E_π[∇k]                         (1)

Losses are run on every batch of a few outcomes, each weighed by its probability; K outcomes, G a
group.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.multisets import every_order
from klrl_edu.estimators import kl_gradients, kl_values
from klrl_edu.estimators.advantages import best_scalar_baseline, fdpg_forward_kl
from klrl_edu.exact.soft_bellman import soft_bellman
from klrl_edu.learning import losses
from klrl_edu.learning.batches import Batch
from klrl_edu.models.contract import token_log_probs
from klrl_edu.theory.cases import Case
from klrl_edu.theory.statements import Sides, bound, identity

kl, mean = logspace.kl_divergence, logspace.expectation


def scores(log_policy: Tensor) -> Tensor:
    """The score of each outcome, s(y) = e_y − π, a row an outcome [K,K]."""
    return torch.eye(len(log_policy), dtype=torch.float64) - log_policy.exp()


def logit_gradient(case: Case, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient [K] in sequence logits of a scalar function of log π, by autograd."""
    # log π is normalised, and so its own logits
    logits = case.log_policy.clone().requires_grad_()
    return torch.autograd.grad(function(torch.log_softmax(logits, 0)), logits)[0]


def average_score(case: Case, weight: Tensor) -> Tensor:
    """The mean score under π, each outcome with a weight [K]: E_π[weight · s] [K]."""
    return (case.log_policy.exp() * weight) @ scores(case.log_policy)


def objective_gradient(case: Case) -> Tensor:
    """The gradient of the objective, ∇J [K], by autograd of its definition."""
    return logit_gradient(case, case.objective)


def reverse_kl_gradient(case: Case) -> Tensor:
    """The gradient of the reverse divergence, ∇KL(π‖q) [K], by autograd."""
    return logit_gradient(case, lambda log_pi: (log_pi.exp() * (log_pi - case.log_prior)).sum())


def forward_kl_gradient(case: Case) -> Tensor:
    """The gradient of the forward divergence, ∇KL(q‖π) [K], by autograd."""
    return logit_gradient(
        case, lambda log_pi: (case.log_prior.exp() * (case.log_prior - log_pi)).sum()
    )


@identity(r"E_\pi[c\,\nabla\log\pi] = 0", "Williams (1992)", "t06")
def score_has_mean_zero(case: Case) -> Sides:
    """A constant weight on the score changes no expected gradient, which is why baselines
    are free.
    """
    constant = float(case.normal(1))
    return _moved_by_baseline(case, lambda batch: constant), torch.zeros_like(case.rewards)


def _moved_by_baseline(case: Case, baseline: Callable[[Batch], Tensor | float]) -> Tensor:
    """What a baseline changes of REINFORCE's mean gradient, E[b s] [K]."""
    with_it = expected_gradient(case, lambda batch: losses.reinforce(batch, baseline(batch)), 1)
    return with_it - expected_gradient(case, losses.reinforce, 1)


score_has_mean_zero.broken(
    "a baseline that depends on the sample",
    lambda case: (
        _moved_by_baseline(case, lambda batch: (batch.log_probs - batch.prior_log_probs).sum(-1)),
        torch.zeros_like(case.rewards),
    ),
)


@identity(r"\nabla J = E_\pi[(r-\lambda u)\nabla\log\pi]", "Williams (1992)", "t05")
def policy_gradient(case: Case) -> Sides:
    """The gradient of the objective is the mean score weighed by the penalised reward; the +1 of
    ∇(π log π) has mean zero.
    """
    return -expected_gradient(case, losses.reinforce, 1), objective_gradient(case)


policy_gradient.broken(
    "λ dropped",
    lambda case: (-expected_gradient(case.at(1.0), losses.reinforce, 1), objective_gradient(case)),
)


@identity(r"\nabla J = -\lambda\nabla\mathrm{KL}(\pi\|\pi^*)", "Korbak et al. (2022)", "t05")
def gradient_of_the_gap(case: Case) -> Sides:
    """Ascending J is descending the divergence from the posterior."""
    return objective_gradient(case), -case.kl_coef * logit_gradient(
        case, lambda log_pi: (log_pi.exp() * (log_pi - case.log_star)).sum()
    )


gradient_of_the_gap.broken(
    "KL(π*‖π), what maximum likelihood descends",
    lambda case: (
        objective_gradient(case),
        -case.kl_coef * logit_gradient(case, lambda log_pi: -(case.log_star.exp() * log_pi).sum()),
    ),
)


@identity(
    r"E_{\pi^*}[\nabla\log\pi] = -\nabla\mathrm{KL}(\pi^*\|\pi)",
    "Khalifa et al. (2021), DPG",
    "t14",
)
def distributional_gradient(case: Case) -> Sides:
    """The mean score under the posterior descends the forward divergence, and so does f-DPG, whose
    samples are the policy's own.
    """
    descent = -logit_gradient(case, lambda log_pi: kl(case.log_star, log_pi))
    return _towards_the_posterior(case, case.tilted.log_evidence), torch.stack([descent, descent])


def _towards_the_posterior(case: Case, log_evidence: Tensor) -> Tensor:
    """E_π*[s], π* = q e^{r/λ}/Z of a given log Z, and what f-DPG's mean gradient climbs [2,K]."""
    # for the true log Z normalised, for any other not
    star = (case.log_prior + case.rewards / case.kl_coef - log_evidence).exp()

    def forward(batch: Batch) -> Tensor:
        return losses.f_dpg(batch, fdpg_forward_kl, log_evidence)

    return torch.stack([star @ scores(case.log_policy), -expected_gradient(case, forward, 1)])


distributional_gradient.broken(
    "weights left unnormalised",
    lambda case: (
        _towards_the_posterior(case, torch.zeros_like(case.tilted.log_evidence)),
        distributional_gradient.sides(case)[1],
    ),
)


@identity(r"F(\pi)\,(r-\lambda u) = \nabla J,\quad F = E_\pi[s s^\top]", "Kakade (2001)", "t05")
def natural_gradient(case: Case) -> Sides:
    """The natural gradient in sequence logits is the penalised reward itself: a mirror-descent
    step.
    """
    score = scores(case.log_policy)
    fisher = (score * case.log_policy.exp()[:, None]).T @ score
    return fisher @ (case.rewards - case.kl_coef * case.log_ratio), objective_gradient(case)


natural_gradient.broken(
    "the gradient of the reward alone",
    lambda case: (natural_gradient.sides(case)[0], average_score(case, case.rewards)),
)


@bound(
    r"E\|s\|^2(R-b^*)^2 \le E\|s\|^2(R-b)^2,\quad b^* = \frac{E\|s\|^2R}{E\|s\|^2}",
    "Greensmith et al. (2004)",
    "t06",
)
def best_baseline(case: Case) -> Sides:
    """Among constant baselines the variance is least at the mean reward weighed by the squared
    score.
    """
    small = case.small(4)
    return _least_and_others(small, _best_baseline(small))


def _best_baseline(case: Case) -> Tensor:
    squares = scores(case.log_policy).square().sum(-1)
    reward = case.rewards - case.kl_coef * case.log_ratio
    return best_scalar_baseline(reward, squares, case.log_policy)


def _least_and_others(case: Case, baseline: Tensor) -> Sides:
    """REINFORCE's second moment at a baseline, and at others to both sides of the best."""
    best, away = _best_baseline(case), case.normal(3).abs()
    # to both sides: a baseline that is off by a part has a better one on one of them
    others = torch.stack([best + away[0], best - away[1], best + 10 * away[2]])
    least = _second_moment(case, baseline)
    return least.expand(3), torch.stack([_second_moment(case, other) for other in others])


def _second_moment(case: Case, baseline: Tensor) -> Tensor:
    """E‖∇‖² of REINFORCE on one sequence."""

    def gradient_at(row: Tensor) -> Tensor:
        return logit_gradient(
            case, lambda log_pi: losses.reinforce(bandit_batch(case, log_pi, row), baseline)
        )

    rows = torch.arange(len(case.rewards))[:, None]
    squares = torch.stack([gradient_at(row) for row in rows]).square().sum(-1)
    return case.log_policy.exp() @ squares


def _plain_mean(case: Case) -> Sides:
    small = case.small(4)
    reward = small.rewards - small.kl_coef * small.log_ratio
    least, plain = _best_baseline(small), mean(small.log_policy, reward)
    return _second_moment(small, plain), _second_moment(small, least)


best_baseline.broken("the plain mean reward is best", _plain_mean)

# Where the KL goes, on-policy: k_i of the log-ratio as a loss, and as a part of the reward


def _mean_gradient(case: Case, surrogate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean gradient [K] of a surrogate for a KL, over every sequence of the policy."""
    return expected_gradient(
        case, lambda batch: surrogate(batch.log_probs, batch.prior_log_probs), 1
    )


@identity(r"E_\pi[\nabla k_1] = 0", "Tang & Munos (2025)", "t06")
def k1_as_loss(case: Case) -> Sides:
    """k1 as a loss has no gradient on average."""
    return _mean_gradient(case, kl_gradients.loss_k1), torch.zeros_like(case.rewards)


k1_as_loss.broken(
    "∇KL(π‖q), what it is taken for",
    lambda case: (_mean_gradient(case, kl_gradients.loss_k1), reverse_kl_gradient(case)),
)


@identity(r"E_\pi[\nabla k_2] = \nabla\mathrm{KL}(\pi\|q)", "Tang & Munos (2025)", "t06")
def k2_as_loss(case: Case) -> Sides:
    """k2, whose value is biased, has the right gradient as a loss."""
    return _mean_gradient(case, kl_gradients.loss_k2), reverse_kl_gradient(case)


k2_as_loss.broken(
    "u² without the half",
    lambda case: (2 * _mean_gradient(case, kl_gradients.loss_k2), reverse_kl_gradient(case)),
)


@identity(r"E_\pi[\nabla k_3] = \nabla\mathrm{KL}(q\|\pi)", "Tang & Munos (2025)", "t06")
def k3_as_loss(case: Case) -> Sides:
    """k3 as a loss, as GRPO uses it, descends the forward divergence."""
    return _mean_gradient(case, kl_gradients.loss_k3), forward_kl_gradient(case)


k3_as_loss.broken(
    "∇KL(π‖q), what it is taken for",
    lambda case: (_mean_gradient(case, kl_gradients.loss_k3), reverse_kl_gradient(case)),
)


@identity(r"E_\pi[k_1\nabla\log\pi] = \nabla\mathrm{KL}(\pi\|q)", "Tang & Munos (2025)", "t06")
def k1_in_reward(case: Case) -> Sides:
    """k1 in the reward has the gradient of the divergence."""
    return _mean_gradient(case, kl_gradients.reward_k1), reverse_kl_gradient(case)


k1_in_reward.broken(
    "k2 in its place",
    lambda case: (average_score(case, kl_values.k2(case.log_ratio)), reverse_kl_gradient(case)),
)


@identity(
    r"E_\pi[k_3\nabla\log\pi] = \nabla\mathrm{KL}(\pi\|q) - \nabla\mathrm{KL}(q\|\pi)",
    "Tang & Munos (2025)",
    "t06",
)
def k3_in_reward(case: Case) -> Sides:
    """k3 in the reward descends one divergence and ascends the other."""
    return _mean_gradient(case, kl_gradients.reward_k3), reverse_kl_gradient(
        case
    ) - forward_kl_gradient(case)


k3_in_reward.broken(
    "∇KL(π‖q) alone",
    lambda case: (_mean_gradient(case, kl_gradients.reward_k3), reverse_kl_gradient(case)),
)


@identity(
    r"\nabla E_\pi[k] = E_\pi[k\,\nabla\log\pi] + E_\pi[\nabla k]",
    "product rule; Schulman et al. (2015)",
    "t06",
)
def placements_add_up(case: Case) -> Sides:
    """The gradient of a mean is its place in the reward plus its place in the loss."""
    places = (
        kl_gradients.reward_and_loss_k1,
        kl_gradients.reward_and_loss_k2,
        kl_gradients.reward_and_loss_k3,
    )
    return torch.stack([_mean_gradient(case, both) for both in places]), _mean_gradients(case)


def _mean_gradients(case: Case) -> Tensor:
    """∇E_π[k] [3,K] of k1, k2 and k3, by autograd of Σ π k."""

    def gradient(k: Callable[[Tensor], Tensor]) -> Tensor:
        return logit_gradient(case, lambda log_pi: log_pi.exp() @ k(log_pi - case.log_prior))

    return torch.stack(
        [
            # written out, as the estimators of the package are what is tried
            gradient(lambda u: u),
            gradient(lambda u: u**2 / 2),
            gradient(lambda u: torch.exp(-u) - 1 + u),
        ]
    )


placements_add_up.broken(
    "the loss alone",
    lambda case: (
        torch.stack(
            [
                _mean_gradient(case, loss)
                for loss in (kl_gradients.loss_k1, kl_gradients.loss_k2, kl_gradients.loss_k3)
            ]
        ),
        _mean_gradients(case),
    ),
)

# Groups: every batch of a few outcomes


def batches(case: Case, size: int) -> tuple[Tensor, Tensor]:
    """Every batch [M,size] of outcomes, and its probability [M] under π."""
    rows, log_p = every_order(case.log_policy, size)
    return rows, log_p.exp()


def bandit_batch(case: Case, log_policy: Tensor, rows: Tensor) -> Batch:
    """A Batch of one-token sequences, all of one group; `log_policy` [K] carries the gradient."""
    column = log_policy[rows][:, None]
    n = len(rows)
    return Batch(
        tokens=rows[:, None],
        live=torch.ones(n, 1, dtype=torch.bool),
        log_probs=column,
        prior_log_probs=case.log_prior[rows][:, None],
        # drawn by the policy as it is: every ratio is 1, and no clip acts
        behaviour_log_probs=column.detach(),
        rewards=case.rewards[rows][:, None],
        group=torch.zeros(n, dtype=torch.long),
        kl_coef=torch.full((n,), case.kl_coef, dtype=torch.float64),
    )


def expected_gradient(case: Case, loss: Callable[[Batch], Tensor], size: int) -> Tensor:
    """The mean gradient of a loss over every batch, E[∇loss] [K]: one loss, the mean of the
    batches' losses weighed by their fixed probabilities.
    """
    # fixed numbers: batches are drawn first, and then the loss is differentiated
    rows, probabilities = batches(case, size)
    return logit_gradient(
        case,
        lambda log_pi: (
            torch.stack([loss(bandit_batch(case, log_pi, batch)) for batch in rows]) @ probabilities
        ),
    )


@identity(
    r"E[\nabla L_{\mathrm{RLOO}}] = -\nabla J",
    "Kool et al. (2019); Ahmadian et al. (2024), eq. 8",
    "t11",
)
def rloo_is_unbiased(case: Case) -> Sides:
    """The leave-one-out baseline costs no bias: over every batch of two, the mean gradient is that
    of J.
    """
    small = case.small(3)
    return expected_gradient(small, losses.rloo, 2), -objective_gradient(small)


def _shrunk(case: Case) -> Sides:
    small = case.small(3)
    return expected_gradient(small, losses.group_mean, 2), -objective_gradient(small)


rloo_is_unbiased.broken("the mean includes the sequence itself", _shrunk)


@identity(r"E[\nabla L_{\mathrm{mean}}] = -\tfrac{G-1}{G}\nabla J", "Kool et al. (2019)", "t11")
def group_mean_shrinks(case: Case) -> Sides:
    """Centring by the group's own mean scales the gradient by (G − 1)/G; here G is 2 and 3."""
    return _group_means(case), _share_of_the_gradient(case, lambda size: (size - 1) / size)


def _group_means(case: Case) -> Tensor:
    small = case.small(3)
    return torch.stack([expected_gradient(small, losses.group_mean, size) for size in (2, 3)])


def _share_of_the_gradient(case: Case, share: Callable[[int], float]) -> Tensor:
    gradient = objective_gradient(case.small(3))
    return torch.stack([-share(size) * gradient for size in (2, 3)])


group_mean_shrinks.broken(
    "by ½, whatever the size",
    lambda case: (_group_means(case), _share_of_the_gradient(case, lambda size: 0.5)),
)


@identity(
    r"\nabla L_{\mathrm{RLOO}} = \lambda\,\nabla\tfrac12\widehat{\mathrm{Var}}\big(\log\pi-\log"
    r" q-\tfrac r\lambda\big)",
    "Richter et al. (2020), VarGrad",
    "t11",
)
def rloo_is_vargrad(case: Case) -> Sides:
    """Sample by sample, RLOO with the KL in the reward is λ times the gradient of half the sample
    variance of log π − log π*.
    """
    # one batch at random: the statement is about every single one
    small, rows = case.small(3), case.draws(3, 4)
    rloo = logit_gradient(small, lambda log_pi: losses.rloo(bandit_batch(small, log_pi, rows)))
    return rloo, small.kl_coef * _vargrad(small, rows, 1)


def _vargrad(case: Case, rows: Tensor, correction: int) -> Tensor:
    return logit_gradient(
        case,
        lambda log_pi: (
            (log_pi - case.log_prior - case.rewards / case.kl_coef)[rows].var(correction=correction)
            / 2
        ),
    )


def _population_variance(case: Case) -> Sides:
    small, rows = case.small(3), case.draws(3, 4)
    return rloo_is_vargrad.sides(case)[0], small.kl_coef * _vargrad(small, rows, 0)


rloo_is_vargrad.broken("n in place of n − 1", _population_variance)


@identity(
    r"E[g_{\mathrm{GRPO}}] = E_{k\sim\mathrm{Bin}(G,p)}\Big[\sqrt{\tfrac kG(1-\tfrac"
    r" kG)}\Big]\frac{\nabla p}{p(1-p)}",
    "binomial enumeration of GRPO, Shao et al. (2024)",
    "t11",
)
def grpo_on_binary_rewards(case: Case) -> Sides:
    """With rewards of 0 and 1 and the population std, GRPO's mean gradient is that of the success
    rate, rescaled; here G = 3.
    """
    small, size = _binary(case), 3
    p, slope = _success(small)
    # k successes among G decide all z-scores of a group
    scale = sum(
        math.comb(size, k) * p**k * (1 - p) ** (size - k) * math.sqrt(k / size * (1 - k / size))
        for k in range(size + 1)
    )
    return -expected_gradient(small, losses.z_score, size), scale * slope / (p * (1 - p))


def _binary(case: Case) -> Case:
    """Three outcomes, of which the first succeeds."""
    return case.small(3).rewarded(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


def _success(case: Case) -> tuple[float, Tensor]:
    """The success rate p = P(r = 1), and its gradient ∇p [K]."""
    return float(mean(case.log_policy, case.rewards)), logit_gradient(
        case, lambda log_pi: log_pi.exp() @ case.rewards
    )


grpo_on_binary_rewards.broken(
    "taken for ∇p itself",
    lambda case: (grpo_on_binary_rewards.sides(case)[0], _success(_binary(case))[1]),
)

# Balance


def _balance_gradient(case: Case, log_evidence: Tensor) -> Tensor:
    """The mean gradient of the balance, E_π ∇(log Z_θ + log π − log q − r/λ)² [K], samples and log
    Z_θ held fixed.
    """
    target = case.log_prior + case.rewards / case.kl_coef
    return logit_gradient(
        case, lambda log_pi: (case.log_policy.exp() * (log_evidence + log_pi - target) ** 2).sum()
    )


@identity(
    r"E_\pi\nabla\big(\log Z_\theta+\log\pi-\log q-\tfrac r\lambda\big)^2 ="
    r" 2\nabla\mathrm{KL}(\pi\|\pi^*)",
    "Malkin et al. (2023), prop. 1",
    "t11",
)
def trajectory_balance(case: Case) -> Sides:
    """On-policy, trajectory balance descends twice the divergence from the posterior, whatever log
    Z it assumes.
    """
    divergence = logit_gradient(
        case, lambda log_pi: (log_pi.exp() * (log_pi - case.log_star)).sum()
    )
    return _balance_gradient(case, case.tilted.log_evidence + float(case.normal(1))), 2 * divergence


def _forward_of_balance(case: Case) -> Sides:
    return trajectory_balance.sides(case)[0], 2 * logit_gradient(
        case, lambda log_pi: -(case.log_star.exp() * log_pi).sum()
    )


trajectory_balance.broken("twice the forward divergence", _forward_of_balance)


@identity(
    r"\big(-V(\varnothing)+r-\lambda u\big)^2 = \lambda^2\big(\log Z_\theta+u-\tfrac"
    r" r\lambda\big)^2,\ V(\varnothing)=\lambda\log Z_\theta",
    "Nachum et al. (2018) and Malkin et al. (2022)",
    "t11",
)
def trust_pcl_is_balance(case: Case) -> Sides:
    """Trust-PCL's loss, token by token from the soft value of the empty prefix, is λ² times that of
    trajectory balance, sample by sample.
    """
    return _squared_residuals(case, case.kl_coef**2)


def _squared_residuals(case: Case, factor: float) -> Sides:
    off = float(case.normal(1))  # by which both take log Z for another, in nats
    # by tokens, as the other side sums over sequences
    root = soft_bellman(case.support, case.kl_coef).state_values[0]
    tokens = case.support.tokens
    log_ratio = (
        token_log_probs(case.policy, tokens) - token_log_probs(case.problem.prior, tokens)
    ).detach()
    paid = case.problem.token_rewards(tokens) - case.kl_coef * log_ratio
    balance = case.tilted.log_evidence + off + case.log_ratio - case.rewards / case.kl_coef
    return (-root - case.kl_coef * off + paid.sum(-1)) ** 2, factor * balance**2


trust_pcl_is_balance.broken("λ in place of λ²", lambda case: _squared_residuals(case, case.kl_coef))
