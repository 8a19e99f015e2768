"""Article D, policy gradients, value functions and model-based methods: five claims.

    descent on a loss:  Δθ = −α ∇L;    ascent on a return:  Δθ = α ∇J                            (1)
    Q(s,a) = r(s,a) + γ Σ_s' p(s'|s,a) max_a' Q(s',a')                                           (2)
    ∇V = Σ_s d(s) Σ_a ∇π(a|s) Q(s,a),    d the discounted visits of s under π                    (3)
    soft tree backup:  V(s) = λ log Σ_a q(a|s) e^{V(sa)/λ},
    π*(a|s) = q(a|s) e^{(V(sa) − V(s))/λ}                                                        (4)

K sentences; two decisions with A actions and S states; logs in nats, values in reward units.
"""

import heapq

import torch
from torch import Tensor

from klrl_edu.exact.posterior import posterior
from klrl_edu.models.contract import sequence_log_probs
from klrl_edu.theory.articles.examples import (
    TwoSteps,
    climb,
    log_mass,
    mean_score,
    processes,
    sentences,
    uniform,
)
from klrl_edu.theory.cases import Case
from klrl_edu.theory.gradients import logit_gradient
from klrl_edu.theory.verdicts import Formulas, corrected, false, holds, shown

_STEP_SIZE = 0.1


@corrected(
    "D",
    "4.1",
    r"$\Delta\theta = \alpha \nabla J(\theta)$ with $J$ called a loss",
    r"$\Delta\theta = -\alpha \nabla L(\theta)$ for a loss $L = -J$",
    "reward units",
    "t05",
    sentences,
)
def d_step(case: Case) -> Formulas:
    """The direction of ascent of J [K], ∇J = E_π[s (r − λ log π/q)]: the printed step is that of
    the loss L = −J, by autograd.
    """
    of_loss = logit_gradient(case, lambda log_policy: -case.objective(log_policy))
    return Formulas(
        truth=mean_score(case, case.rewards - case.kl_coef * case.log_ratio),
        printed=of_loss,
        corrected=-of_loss,
    )


@d_step.says
def _(case: Case, found: Formulas) -> str:
    here, up, down = (
        float(
            case.objective(
                torch.log_softmax(case.log_policy + sign * _STEP_SIZE * found.printed, 0)
            )
        )
        for sign in (0, -1, 1)
    )
    return (
        f"with L = −J, from J = {here:.6f} the step +0.1 ∇L leads to {down:.6f} and −0.1 ∇L to"
        f" {up:.6f}"
    )


d_step.broken(
    "divided by λ", lambda case: mean_score(case, case.rewards - case.log_ratio / case.kl_coef)
)


@corrected(
    "D",
    "4.2",
    r"$\hat Q(s,a) = \sum_{s'} p(s' \mid s,a) \max_{a'} Q(s',a')$",
    r"$Q(s,a) = r(s,a) + \gamma \sum_{s'} p(s' \mid s,a) \max_{a'} Q(s',a')$",
    "reward units",
    "t05",
    processes,
)
def d_backup(process: TwoSteps) -> Formulas:
    """The values Q(a) then Q(s,b) [A + S·A]: by the printed backup from terminal values of 0, and
    by (2).
    """
    nothing = torch.zeros_like(process.then_reward)
    return Formulas(
        truth=process.best_action_values(),
        printed=torch.cat([process.transition @ nothing.amax(-1), nothing.reshape(-1)]),
        corrected=_backed_up(process, process.then_reward.amax(-1)),
    )


def _backed_up(process: TwoSteps, state_values: Tensor) -> Tensor:
    """The values Q(a) then Q(s,b) [A + S·A] from those of the states [S]."""
    first = process.first_reward + process.discount * process.transition @ state_values
    return torch.cat([first, process.then_reward.reshape(-1)])


d_backup.says(
    lambda process, found: (
        "no reward enters: terminal values of 0 make every value 0, and of c, c; the best returns"
        f" of the two first actions are {found.truth[0]:.4f}, {found.truth[1]:.4f}"
    )
)
d_backup.broken(
    "the mean for the maximum", lambda process: _backed_up(process, process.then_reward.mean(-1))
)


@corrected(
    "D",
    "4.2",
    r"$\Delta\theta = \alpha \nabla \sum_s \pi(a \mid s)\, \hat Q(s,a)$",
    r"$\Delta\theta = \alpha \sum_s d(s) \sum_a \nabla \pi(a \mid s)\, Q(s,a)$",
    "reward units",
    "t05",
    processes,
)
def d_actor(process: TwoSteps) -> Formulas:
    """The gradient of the expected return [A + S·A] in the policy's logits; the truth by autograd
    through all trajectories. Printed, the free a is action 0; corrected, it is (3). Q and d are
    held fixed.
    """
    process, logits = _with_gradient(process)
    (first, then), values = process.policy(), _own_values(process)
    each_state = (then * process.then_reward).sum(-1)
    visits = process.discount * process.state_law().detach()
    first_action = first[0] * values[0] + (then[:, 0] * process.then_reward[:, 0]).sum()
    return Formulas(
        truth=_flat(process.expected_return(), logits),
        printed=_flat(first_action, logits),
        corrected=_flat(first @ values + visits @ each_state, logits),
    )


def _own_values(process: TwoSteps) -> Tensor:
    """The policy's own values of the first actions, Q^π(a) [A], without gradient."""
    later = (process.policy()[1] * process.then_reward).sum(-1)
    return (process.first_reward + process.discount * process.transition @ later).detach()


def _with_gradient(process: TwoSteps) -> tuple[TwoSteps, tuple[Tensor, Tensor]]:
    logits = (
        process.first_logits.clone().requires_grad_(),
        process.then_logits.clone().requires_grad_(),
    )
    return process._replace(first_logits=logits[0], then_logits=logits[1]), logits


def _flat(value: Tensor, logits: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of a scalar in the logits of both decisions [A + S·A]."""
    parts = torch.autograd.grad(value, logits, retain_graph=True)
    return torch.cat([part.reshape(-1) for part in parts])


@d_actor.says
def _(process: TwoSteps, found: Formulas) -> str:
    cosine = float(torch.nn.functional.cosine_similarity(found.printed, found.truth, 0))
    return (
        f"with the free a set to the first action, the cosine with ∇E[return] is {cosine:.4f} and"
        f" the lengths are {found.printed.norm():.4f} and {found.truth.norm():.4f}"
    )


def _states_alike(process: TwoSteps) -> Tensor:
    alike = torch.full_like(process.transition, 1 / process.transition.shape[1])
    actions = len(process.first_reward)
    flat = d_actor(process._replace(transition=alike)).right
    return torch.cat([d_actor(process).right[:actions], flat[actions:]])


d_actor.broken("every state visited as often", _states_alike)


@holds(
    "D",
    "3.2",
    "policy gradients, value functions and a model each solve the problem",
    "probability",
    "t05",
    sentences,
)
def d_families(case: Case) -> Formulas:
    """The policies [3,K] that the three end at, and the posterior."""
    ends = [_by_values(case), climb(case, uniform(case)).exp(), _by_model(case)]
    return Formulas(truth=case.log_star.exp().expand(3, -1), printed=torch.stack(ends))


def _by_values(case: Case) -> Tensor:
    """The posterior [K] by the soft values of every prefix, from the last word back: (4)."""
    model = posterior(case.problem, method="soft_bellman").model
    return sequence_log_probs(model, case.tokens).detach().exp()


def _by_model(case: Case) -> Tensor:
    """The posterior [K] by planning forward: each word in proportion to the q e^{r/λ} of all that
    the model can still write after it.
    """
    weights = case.log_prior + case.rewards / case.kl_coef
    prefixes = [range(t) for t in range(case.space.max_length + 1)]
    reach = torch.stack([log_mass(case, weights, prefix) for prefix in prefixes])
    return reach.diff(dim=0).sum(0).exp()


@d_families.says
def _(case: Case, found: Formulas) -> str:
    spread = float((found.printed.amax(0) - found.printed.amin(0)).max())
    return (
        f"all three give P(the cat) = {found.printed[0, 0]:.9f} and P(a dog) ="
        f" {found.printed[0, 3]:.9f}, and differ by {shown(spread)}"
    )


def _stopped_early(case: Case) -> Tensor:
    found = d_families(case).printed.clone()
    found[1] = climb(case, case.log_policy, steps=20).exp()
    return found


d_families.broken("the gradient stopped after 20 steps", _stopped_early)


@false(
    "D",
    "9.2",
    "A* search and priority queues find the policy faster",
    r"they find its mode; $V(s) = \lambda \log \sum_a q(a \mid s)\, e^{V(sa)/\lambda}$ on"
    r" the same tree finds $\pi^*$",
    "probability",
    "t05",
    sentences,
)
def d_search(case: Case) -> Formulas:
    """The posterior [K]; what A* returns has all its mass on one sentence."""
    found = torch.zeros(len(case.tokens), dtype=torch.float64)
    found[best_first(case)[0]] = 1.0
    return Formulas(truth=case.log_star.exp(), printed=found, corrected=_by_values(case))


def best_first(case: Case) -> tuple[int, int]:
    """Searches by A* for the sentence with the largest log q + r/λ: (its row, prefixes opened). A
    prefix is worth at most its log-mass + max r/λ.
    """
    rows = [tuple(row) for row in case.tokens.tolist()]
    scaled, top = case.rewards / case.kl_coef, float(case.rewards.max()) / case.kl_coef
    queue: list[tuple[float, tuple[int, ...]]] = [(-top, ())]
    for opened in range(len(rows) * case.space.max_length + 1):
        prefix = heapq.heappop(queue)[1]
        if prefix in rows:
            return rows.index(prefix), opened
        for longer in sorted(
            {row[: len(prefix) + 1] for row in rows if row[: len(prefix)] == prefix}
        ):
            row = next(k for k, sentence in enumerate(rows) if sentence[: len(longer)] == longer)
            bound = float(scaled[row]) if longer in rows else top
            mass = float(log_mass(case, case.log_prior, range(len(longer)))[row])
            heapq.heappush(queue, (-mass - bound, longer))
    raise AssertionError("unreachable: every prefix leads to a sentence")


@d_search.says
def _(case: Case, found: Formulas) -> str:
    row, opened = best_first(case)
    text, share = case.space.decode(case.tokens)[row], float(found.truth[row])
    return (
        f"A* opens {opened} prefixes and returns {text!r}, the posterior's mode, which has"
        f" probability {share:.6f}: as a policy it is at total variation {1 - share:.6f} from π*;"
        " one backward sweep over the same tree gives π* itself"
    )


d_search.broken("the prior left out", lambda case: torch.softmax(case.rewards / case.kl_coef, 0))
