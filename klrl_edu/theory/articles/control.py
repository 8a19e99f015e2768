"""Article D, policy gradients, value functions and model-based methods: five claims.

    descent on a loss:  Δθ = −α ∇L;    ascent on a return:  Δθ = α ∇J                            (1)
    Q(s,a) = r(s,a) + γ Σ_s' p(s'|s,a) max_a' Q(s',a')                                           (2)
    ∇V = Σ_s d(s) Σ_a ∇π(a|s) Q(s,a),    d the discounted visits of s under π                    (3)
    soft tree backup:  V(s) = λ log Σ_a q(a|s) e^{V(sa)/λ},
    π*(a|s) = q(a|s) e^{(V(sa) − V(s))/λ}                                                        (4)

K sentences; two decisions with A actions and S states; logs in nats, values in reward units.
"""

import heapq
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core import logspace
from klrl_edu.decisions.soft_control import policy_evaluation, policy_gradient, value_iteration
from klrl_edu.exact.soft_bellman import soft_bellman
from klrl_edu.learning import losses
from klrl_edu.theory.articles.examples import (
    TwoSteps,
    by_states,
    climb,
    log_mass,
    mean_score,
    processes,
    random_sentences,
    sentences,
    uniform,
)
from klrl_edu.theory.cases import Case
from klrl_edu.theory.verdicts import ClaimsOf, Formulas, shown

article = ClaimsOf("D", sentences)
_STEP_SIZE = 0.1


@article.at("4.1", "reward units", "t05").corrected(
    r"$\Delta\theta = \alpha \nabla J(\theta)$ with $J$ called a loss",
    r"$\Delta\theta = -\alpha \nabla L(\theta)$ for a loss $L = -J$",
)
def d_step(case: Case) -> Formulas:
    """The direction of ascent of J [K], ∇J = E_π[s (r − λ log π/q)]: the printed step is that of
    the package's loss L = −J.
    """
    # one batch, the whole support: the mean is the gradient itself
    of_loss = audit_gradient(losses.exact, case.policy, case.problem).mean
    undivided = mean_score(case, case.rewards - case.log_ratio / case.kl_coef)
    here, up, down = (
        case.objective(torch.log_softmax(case.log_policy + sign * _STEP_SIZE * of_loss, 0))
        for sign in (0, -1, 1)
    )
    return Formulas(
        truth=mean_score(case, case.rewards - case.kl_coef * case.log_ratio),
        printed=of_loss,
        corrected=-of_loss,
        broken={"divided by λ": undivided},
        says=lambda found: (
            f"with L = −J, from J = {here:.6f} the step +0.1 ∇L leads to {down:.6f} and −0.1 ∇L to"
            f" {up:.6f}"
        ),
    )


@article.at("4.2", "reward units", "t05", on=processes).corrected(
    r"$\hat Q(s,a) = \sum_{s'} p(s' \mid s,a) \max_{a'} Q(s',a')$",
    r"$Q(s,a) = r(s,a) + \gamma \sum_{s'} p(s' \mid s,a) \max_{a'} Q(s',a')$",
)
def d_backup(process: TwoSteps) -> Formulas:
    """The values Q(a) then Q(s,b) [A + S·A]: by the printed backup from terminal values of 0, and
    by (2), which is the package's value iteration at λ = 0.
    """
    nothing, mean = torch.zeros_like(process.then_reward), process.then_reward.mean(-1)
    averaged = process.first_reward + process.discount * process.transition @ mean
    return Formulas(
        truth=process.best_action_values(),
        printed=torch.cat([process.transition @ nothing.amax(-1), nothing.reshape(-1)]),
        corrected=_best_values(process),
        broken={
            "the mean for the maximum": torch.cat([averaged, process.then_reward.reshape(-1)]),
            "γ left out": _best_values(process._replace(discount=1.0)),
        },
        says=lambda found: (
            "no reward enters: terminal values of 0 make every value 0, and of c, c; the best"
            f" returns of the two first actions are {found.truth[0]:.4f}, {found.truth[1]:.4f}"
        ),
    )


def _best_values(process: TwoSteps) -> Tensor:
    """The values of both decisions [A + S·A] by the package's sweeps of (2)."""
    return process.decisions(value_iteration(process.as_decision_process(), 0.0).action_values)


@article.at("4.2", "reward units", "t05", on=processes).corrected(
    r"$\Delta\theta = \alpha \nabla \sum_s \pi(a \mid s)\, \hat Q(s,a)$",
    r"$\Delta\theta = \alpha \sum_s d(s) \sum_a \nabla \pi(a \mid s)\, Q(s,a)$",
)
def d_actor(process: TwoSteps) -> Formulas:
    """The gradient of the expected return [A + S·A] in the policy's logits; the truth by autograd
    through all trajectories. Printed, the free a is action 0, and Q is held fixed; corrected, it is
    the package's (3).
    """
    at = process.as_decision_process(), process.log_policy(), 0.0  # λ = 0: no KL is charged here
    policy, values = process.log_policy().exp(), policy_evaluation(*at).action_values
    first = torch.zeros_like(policy)
    first[:, 0] = 1.0
    # ∇π(0|s) Q(s,0) in the logits of s; no state is weighed by how often π comes there
    printed = process.decisions(policy[:, :1] * (first - policy) * values[:, :1])
    gradient, visited = policy_gradient(*at), process.state_law()
    return Formulas(
        truth=process.gradient(),
        printed=printed,
        corrected=process.decisions(gradient),
        broken={
            "every state visited as often": _later(process, gradient, 1 / len(visited) / visited),
            "later visits undiscounted": _later(process, gradient, 1 / process.discount),
        },
        says=lambda found: (
            "with the free a set to the first action, the cosine with ∇E[return] is"
            f" {torch.nn.functional.cosine_similarity(printed, found.truth, 0):.4f} and the lengths"
            f" are {printed.norm():.4f} and {found.truth.norm():.4f}"
        ),
    )


def _later(process: TwoSteps, gradient: Tensor, factor: Tensor | float) -> Tensor:
    """A gradient [S + 2, A] with the part of each state of the second decision times a factor, one
    or [S]: [A + S·A].
    """
    factors = torch.ones(len(gradient), 1, dtype=torch.float64)
    factors[1:-1, 0] = factor
    return process.decisions(gradient * factors)


@article.at("3.2", "probability", "t05").holds(
    "policy gradients, value functions and a model each solve the problem"
)
def d_families(case: Case) -> Formulas:
    """The policies [3,K] that the three end at, and the posterior."""
    by_gradient = climb(case, uniform(case)).exp()
    by_values, by_model = by_states(case).exp(), _by_model(case)
    stopped = climb(case, case.log_policy, steps=20).exp()
    printed = torch.stack([by_values, by_gradient, by_model])
    return Formulas(
        truth=case.log_star.exp().expand(3, -1),
        printed=printed,
        broken={"the gradient stopped after 20 steps": torch.stack([by_values, stopped, by_model])},
        says=lambda found: (
            f"all three give P(the cat) = {printed[0, 0]:.9f} and P(a dog) ="
            f" {printed[0, 3]:.9f}, and differ by"
            f" {shown(float((printed.amax(0) - printed.amin(0)).max()))}"
        ),
    )


def _by_model(case: Case) -> Tensor:
    """The posterior [K] by planning forward: each word in proportion to the q e^{r/λ} of all that
    the model can still write after it.
    """
    # log π*(a|s) = log reach(sa) − log reach(s): reach need not be normalised
    weights = case.log_prior + case.rewards / case.kl_coef
    prefixes = [range(t) for t in range(case.space.max_length + 1)]
    reach = torch.stack([log_mass(case, weights, prefix) for prefix in prefixes])
    return reach.diff(dim=0).sum(0).exp()


@cache
def _with_a_tree() -> tuple[Case, ...]:
    """The others, then 81 sentences of four words: in small trees A* opens everything at once."""
    return (*sentences(), random_sentences(11, 3, 4, 0.5).case)


@article.at("9.2", "prefixes opened", "t05", on=_with_a_tree).false(
    "A* search and priority queues find the policy faster",
    r"they find its mode; $\pi^*$ takes every prefix, in whatever order: as many as the sweep"
    r" $V(s) = \lambda \log \sum_a q(a \mid s)\, e^{V(sa)/\lambda}$ opens",
)
def d_search(case: Case) -> Formulas:
    """How many prefixes are opened before the policy is known, a scalar: as printed, when A*
    returns; in truth, when what A* has found is π*; by (4), what the package's sweep goes through.
    """
    rows, opened = zip(*best_first(case), strict=True)
    texts, tree = case.space.decode(case.tokens), _with_a_tree()[-1]
    # what is found, normalised, is at total variation 1 − its mass from π*
    mass = case.log_star.exp()[list(rows)].cumsum(0)
    known = int((mass < 1 - 1e-12).sum())
    swept = len(soft_bellman(case.support, case.kl_coef).state_values)
    return Formulas(
        truth=torch.tensor(opened[known]),
        printed=torch.tensor(opened[0]),
        corrected=torch.tensor(swept),
        broken={
            "the empty prefix left out": torch.tensor(swept - 1),
            "no prefix shared": torch.tensor(case.tokens.numel()),
        },
        says=lambda found: (
            f"A* opens {opened[0]} prefixes and returns {texts[rows[0]]!r}, the posterior's mode,"
            f" as a policy at total variation {1 - mass[0]:.6f} from π*; one backward sweep opens"
            f" {swept} and gives π* itself; on {len(tree.tokens)} sentences A* opens"
            f" {next(best_first(tree))[1]} for the mode and {tree.support.trie.nodes} for π*"
        ),
    )


def best_first(case: Case) -> Iterator[tuple[int, int]]:
    """Searches by A* for the sentences, from the largest log q + r/λ on: of each its row and how
    many prefixes were opened before it. A prefix is worth at most its log-mass + max r/λ.
    """
    rows = [tuple(row) for row in case.tokens.tolist()]
    scaled, top = case.rewards / case.kl_coef, float(case.rewards.max()) / case.kl_coef
    # the smallest comes first, so what a prefix is worth stands there with its sign turned
    queue: list[tuple[float, tuple[int, ...]]] = [(-top, ())]
    opened = 0
    while queue:
        prefix = heapq.heappop(queue)[1]
        if prefix in rows:  # worth what it is, and no other prefix can be worth more
            yield rows.index(prefix), opened
            continue
        opened += 1
        for longer in sorted(
            {row[: len(prefix) + 1] for row in rows if row[: len(prefix)] == prefix}
        ):
            alike = [k for k, row in enumerate(rows) if row[: len(longer)] == longer]
            bound = float(scaled[alike[0]]) if longer in rows else top
            mass = float(logspace.logsumexp(case.log_prior[alike]))
            heapq.heappush(queue, (-mass - bound, longer))
