"""Statements about samplers: best-of-n, rejection, Metropolis–Hastings, importance sampling,
sequential Monte Carlo, speculation.

    Ẑ = 1/n Σ e^{r(y_i)/λ},  y_i ~ q:    E Ẑ = Z,    E log Ẑ ≤ log Z                             (1)

Every random choice is enumerated: each set of draws of a few outcomes, each weighed by its
probability. K outcomes, n draws.
"""

import math

import torch
from torch import Tensor

from klrl_edu.closed_forms import acceptance
from klrl_edu.closed_forms.best_of_n import best_of_n, kl_bound
from klrl_edu.closed_forms.tilt import tilt
from klrl_edu.core import logspace
from klrl_edu.core.draws import Draw, enumerate_executions
from klrl_edu.core.multisets import every_order
from klrl_edu.estimators import evidence
from klrl_edu.exact.soft_bellman import SoftValues, soft_bellman
from klrl_edu.theory.cases import Case
from klrl_edu.theory.statements import Sides, bound, identity

kl, mean = logspace.kl_divergence, logspace.expectation


@identity(
    r"\pi_n(y) = \frac{q(y)}{q(\mathrm{level})}\big[F(r(y))^n - F_-(r(y))^n\big]",
    "Beirami et al. (2024), with ties",
    "t14",
)
def best_of_n_law(case: Case) -> Sides:
    """The law of the best of three draws, ties included, is what enumerating every three draws
    gives.
    """
    small = case.small(4)
    return best_of_n(small.log_prior, small.rewards, 3).log_probs.exp(), _best_by_hand(
        small, 3, shared=True
    )


def _best_by_hand(case: Case, n: int, *, shared: bool) -> Tensor:
    """The mass that each outcome gets [K]: the first best draw, or, not shared, the best outcome of
    lowest index.
    """
    # no sampling: each order of draws with its probability
    rows, log_p = every_order(case.log_prior, n)
    mass = torch.zeros_like(case.rewards)
    order = rows if shared else rows.sort(-1).values
    chosen = order.gather(1, case.rewards[order].argmax(-1, keepdim=True)).squeeze(1)
    return mass.index_add(0, chosen, log_p.exp())


def _sorted_draws(case: Case) -> Sides:
    small = case.small(4)
    # ties alone show how they are broken
    tied = small.rewarded(torch.ones_like(small.rewards))
    return best_of_n(tied.log_prior, tied.rewards, 3).log_probs.exp(), _best_by_hand(
        tied, 3, shared=False
    )


best_of_n_law.broken("ties go to the outcome of lowest index", _sorted_draws)


@bound(r"\mathrm{KL}(\pi_n\|q) \le \log n - \tfrac{n-1}{n}", "Beirami et al. (2024)", "t14")
def best_of_n_divergence(case: Case) -> Sides:
    """The best of n draws is at most log n − (n − 1)/n nats from the prior; equality needs a prior
    without ties and atoms.
    """
    counts = (1, 2, 4, 16)
    found = [best_of_n(case.log_prior, case.rewards, n) for n in counts]
    told = case.log_prior.new_tensor([one.kl for one in found])
    by_law = torch.stack([kl(one.log_probs, case.log_prior) for one in found])
    cap = case.log_prior.new_tensor([math.log(n) - (n - 1) / n for n in counts])
    allowed = case.log_prior.new_tensor([kl_bound(n) for n in counts])
    return torch.cat([told, by_law, allowed]), torch.cat([allowed, told, cap])


def _fine_prior(case: Case) -> Sides:
    """A uniform prior over many outcomes without ties comes near the bound, and above half
    of it.
    """
    log_q = torch.full((400,), -math.log(400), dtype=torch.float64)
    return best_of_n(log_q, case.normal(400), 4).kl, kl_bound(4) / 2


best_of_n_divergence.broken("half of it", _fine_prior)


@identity(
    r"\text{acceptance} = E_q\big[e^{(r-\max r)/\lambda}\big] = Z\,e^{-\max r/\lambda}",
    "von Neumann (1951)",
    "t14",
)
def rejection_acceptance(case: Case) -> Sides:
    """Rejection sampling with the prior as proposal accepts at the rate Z over the largest
    weight.
    """
    accepted = mean(case.log_prior, torch.exp((case.rewards - case.rewards.amax()) / case.kl_coef))
    return acceptance.rejection_acceptance(case.log_prior, case.rewards, case.kl_coef), accepted


rejection_acceptance.broken(
    "1/e^{max r/λ}, without Z",
    lambda case: (
        rejection_acceptance.sides(case)[0],
        torch.exp(-case.rewards.amax() / case.kl_coef),
    ),
)


@identity(r"\pi^*(x)P(x,y) = \pi^*(y)P(y,x)", "Metropolis et al. (1953); Hastings (1970)", "t14")
def detailed_balance(case: Case) -> Sides:
    """Independence Metropolis–Hastings is reversible under the posterior."""
    return _flows(case, acceptance.metropolis_matrix(case.log_prior, case.rewards, case.kl_coef))


def _flows(case: Case, moves: Tensor) -> Sides:
    """The flow π*(x)P(x,y) [K,K] and the sums of P's rows, against its reverse and one."""
    flow, rows = case.log_star.exp()[:, None] * moves, moves.sum(-1, keepdim=True)
    return torch.cat([flow, rows], 1), torch.cat([flow.T, torch.ones_like(rows)], 1)


def _always_accepts(case: Case) -> Sides:
    return _flows(case, case.log_prior.exp().expand(len(case.rewards), -1))


detailed_balance.broken("every proposal is accepted", _always_accepts)


@identity(r"\mu_2 = 1 - 1/\max_y \frac{\pi^*(y)}{q(y)}", "Liu (1996), th. 2.1", "t14")
def second_eigenvalue(case: Case) -> Sides:
    """The chain forgets its start at a rate set by the largest importance weight."""
    kl_coef = _moderate(case)
    matrix = acceptance.metropolis_matrix(case.log_prior, case.rewards, kl_coef)
    log_star = tilt(case.log_prior, case.rewards, kl_coef).log_posterior
    # of a symmetric matrix the eigenvalues are real, and found to the last digit
    root = torch.exp(log_star / 2)
    symmetric = root[:, None] * matrix / root  # π^½ P π^{−½}, symmetric by detailed balance
    rate = acceptance.metropolis_second_eigenvalue(case.log_prior, case.rewards, kl_coef)
    return torch.stack(
        [torch.linalg.eigvalsh((symmetric + symmetric.T) / 2)[-2], root.new_tensor(rate)]
    ), 1 - torch.exp(-(log_star - case.log_prior).amax()).expand(2)


def _moderate(case: Case) -> float:
    """The case's λ, or a tenth of the rewards' range where that is more: π^{−½} of the chain then
    keeps its digits.
    """
    return max(case.kl_coef, float(case.rewards.amax() - case.rewards.amin()) / 10)


def _smallest_weight(case: Case) -> Sides:
    log_star = tilt(case.log_prior, case.rewards, _moderate(case)).log_posterior
    least = torch.exp((log_star - case.log_prior).amin())
    return second_eigenvalue.sides(case)[0], 1 - least.expand(2)


second_eigenvalue.broken("from the smallest weight", _smallest_weight)


@identity(r"E[\hat Z] = Z,\quad \hat Z = \tfrac1n\sum_i e^{r(y_i)/\lambda}", "eq. (1)", "t14")
def importance_sampling(case: Case) -> Sides:
    """Importance sampling from the prior estimates the evidence without bias: over every three
    draws the mean is Z.
    """
    small = case.small(4)
    return _mean_evidence(small), tilt(small.log_prior, _flat(small), 1.0).log_evidence.exp()


def _flat(case: Case) -> Tensor:
    """The rewards in nats, r/λ, less their largest, so that e^{r/λ} is a number."""
    return (case.rewards - case.rewards.amax()) / case.kl_coef


def _mean_evidence(case: Case) -> Tensor:
    rows, log_p = every_order(case.log_prior, 3)
    return log_p.exp() @ evidence.importance_sampling(_flat(case)[rows]).exp()


def _exponential_of_mean(case: Case) -> Sides:
    small = case.small(4)
    rows, log_p = every_order(small.log_prior, 3)
    return log_p.exp() @ evidence.lower_bound(_flat(small)[rows]).exp(), importance_sampling.sides(
        case
    )[1]


importance_sampling.broken("e to the mean of r/λ", _exponential_of_mean)


@bound(
    r"E[\log\hat Z] \le \log Z \le E_{y_1\sim\pi^*}[\log\hat Z]",
    "Jensen; Burda et al. (2016), th. 1; Grosse et al. (2015)",
    "t14",
)
def evidence_sandwich(case: Case) -> Sides:
    """The log of an unbiased estimate is too low on average; with one exact posterior sample among
    the draws it is too high.
    """
    return _sandwich(case, posterior_sample=True)


def _sandwich(case: Case, *, posterior_sample: bool) -> Sides:
    small = case.small(4)
    rows, log_p = every_order(small.log_prior, 3)
    log_weights = _flat(small)[rows]
    target = tilt(small.log_prior, _flat(small), 1.0)
    # y_1 from π* in place of q weighs a batch by π*/q of it
    swap = (target.log_posterior - small.log_prior)[rows[:, 0]] if posterior_sample else 0.0
    with_one = evidence.reverse_importance_sampling(log_weights[:, 0], log_weights[:, 1:])
    lower = log_p.exp() @ evidence.importance_sampling(log_weights)
    upper = (log_p + swap).exp() @ with_one
    return torch.stack([lower, target.log_evidence]), torch.stack([target.log_evidence, upper])


evidence_sandwich.broken(
    "no posterior sample in the upper bound", lambda case: _sandwich(case, posterior_sample=False)
)


@bound(
    r"\log Z - E[\log\hat Z_{n}] \le \log Z - E[\log\hat Z_{n-1}]",
    "Burda et al. (2016), th. 1",
    "t14",
)
def more_samples_are_tighter(case: Case) -> Sides:
    """The lower bound on the log-evidence rises with every sample, from the mean of r/λ at one
    towards log Z.
    """
    small = case.small(4)
    lacks = [torch.zeros((), dtype=torch.float64)]
    for n in (3, 2, 1):
        rows, log_p = every_order(small.log_prior, n)
        estimate = log_p.exp() @ evidence.importance_sampling(_flat(small)[rows])
        lacks.append(tilt(small.log_prior, _flat(small), 1.0).log_evidence - estimate)
    # at one draw log Z − E_q[r/λ] is KL(q‖π*)
    lacks.append(kl(small.log_prior, tilt(small.log_prior, _flat(small), 1.0).log_posterior))
    return torch.stack(lacks[:-1]), torch.stack(lacks[1:])


more_samples_are_tighter.broken(
    "the other way round", lambda case: more_samples_are_tighter.sides(case)[::-1]
)

# Sequential Monte Carlo on two-letter words: propose, weigh, resample, propose, weigh


class _Words:
    """A law of two letters [2,2] and a reward r/λ [2,2], with twists ψ(first letter) [2] for the
    first weights.
    """

    def __init__(self, case: Case):
        joint = case.distribution(4).reshape(2, 2)
        self.first = torch.logsumexp(joint, 1)
        self.second = joint - self.first[:, None]
        self.reward = case.normal(2, 2)
        self.twist = case.normal(2)
        self.log_evidence = torch.logsumexp(joint + self.reward, (0, 1))

    def run(self, draw: Draw, twist: Tensor, *, resampled_weights_kept: bool = False) -> float:
        """The evidence Ẑ by two particles that resample once by the twisted weights."""
        first = draw(self.first.expand(2, 2))
        log_weight = twist[first]
        kept = draw(torch.log_softmax(log_weight, 0).expand(2, 2))
        ancestors = first[kept]
        second = draw(self.second[ancestors])
        # resampling has paid the twist, which is taken out again
        final = self.reward[ancestors, second] - twist[ancestors]
        if resampled_weights_kept:
            final = final + twist[ancestors]
        return math.exp(
            float(torch.logsumexp(log_weight, 0) + torch.logsumexp(final, 0)) - 2 * math.log(2)
        )


@identity(r"E[\hat Z_{\mathrm{SMC}}] = Z", "Del Moral (2004), prop. 7.4.1", "t14")
def sequential_monte_carlo(case: Case) -> Sides:
    """Resampling keeps the estimate of the evidence unbiased, for any intermediate weights: every
    execution of two particles.
    """
    words = _Words(case)
    return _smc_mean(words, kept=False), words.log_evidence.exp()


def _smc_mean(words: _Words, *, kept: bool) -> float:
    runs = enumerate_executions(
        lambda draw: words.run(draw, words.twist, resampled_weights_kept=kept)
    )
    return math.fsum(math.exp(run.log_prob) * run.result for run in runs)


def _weights_kept(case: Case) -> Sides:
    words = _Words(case)
    return _smc_mean(words, kept=True), words.log_evidence.exp()


sequential_monte_carlo.broken("weights kept after resampling", _weights_kept)


@identity(
    r"\psi(s) = e^{V(s)/\lambda},\ a\sim\pi^*(\cdot|s) \;\Rightarrow\; \hat Z = Z \text{ with"
    r" certainty}",
    "Zhao et al. (2024)",
    "t14",
)
def optimal_twist(case: Case) -> Sides:
    """With the soft values for twists and the posterior for proposals every weight is Z, after
    every token: the variance is zero.
    """
    values = soft_bellman(case.support, case.kl_coef)
    return _twisted_weights(case, values, values.state_values), _all_evidence(case)


def _twisted_weights(case: Case, values: SoftValues, twist: Tensor) -> Tensor:
    """The log-weights of every sequence after each token [K,T]: what its edges so far weigh, log
    q − log π* + r/λ, and the twist V/λ [nodes] of the node reached, 0 at the end.
    """
    trie, rewards = case.support.trie, case.support.token_rewards
    edge = trie.edge_of
    ratio = torch.where(edge >= 0, (values.log_prior - values.log_policy)[edge.clamp(min=0)], 0.0)
    child = torch.where(edge >= 0, trie.child[edge.clamp(min=0)], -1)
    ahead = torch.where(child >= 0, twist[child.clamp(min=0)], 0.0) / case.kl_coef
    return (ratio + rewards / case.kl_coef).cumsum(-1) + ahead


def _all_evidence(case: Case) -> Tensor:
    return case.tilted.log_evidence.expand(case.support.token_rewards.shape)


def _twist_by_the_mean(case: Case) -> Sides:
    """The prior's mean return ahead for a twist, stretched so that no two nodes have one value."""
    values = soft_bellman(case.support, case.kl_coef)
    mean_ahead = soft_bellman(case.support, math.inf).state_values
    # the mean alone is the value itself where rewards are all equal
    twist = mean_ahead + torch.arange(len(mean_ahead), dtype=torch.float64)
    return _twisted_weights(case, values, twist), _all_evidence(case)


optimal_twist.broken("a twist that is not the value", _twist_by_the_mean)


@identity(
    r"P(\text{accept}) = \sum_y q\min(1,\tfrac{\pi}{q}) = 1-\mathrm{TV}(\pi,q),\quad \text{output}"
    r" \sim \pi",
    "Leviathan et al. (2023), th. 3.5",
    "t14",
)
def speculative_sampling(case: Case) -> Sides:
    """A draft from q, accepted with min(1, π/q) and else redrawn from the excess, is exactly from
    π; it is kept with 1 − TV.
    """
    return _speculative(case, redraw_from_excess=True)


def _speculative(case: Case, *, redraw_from_excess: bool) -> Sides:
    pi, q = case.log_policy.exp(), case.log_prior.exp()
    # what is drafted and accepted: q·min(1, π/q)
    kept = torch.minimum(pi, q)
    excess = (pi - q).clamp(min=0)
    redraw = excess / excess.sum() if redraw_from_excess else pi
    rate = kept.sum()
    output = kept + (1 - rate) * redraw
    return torch.cat([output, rate[None]]), torch.cat([pi, 1 - (pi - q).abs().sum()[None] / 2])


speculative_sampling.broken(
    "redrawn from π instead of the excess",
    lambda case: _speculative(case, redraw_from_excess=False),
)
