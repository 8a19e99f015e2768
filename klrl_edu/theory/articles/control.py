"""Article D, policy gradients, value functions and model-based methods: five claims.

    descent on a loss:  Δθ = −α ∇L;    ascent on a return:  Δθ = α ∇J                            (1)
    Q(s,a) = r(s,a) + γ Σ_s' p(s'|s,a) max_a' Q(s',a')                                           (2)
    ∇V = Σ_s d(s) Σ_a ∇π(a|s) Q(s,a),    d the discounted visits of s under π                    (3)
    soft tree backup:  V(s) = λ log Σ_a q(a|s) e^{V(sa)/λ},
    π*(a|s) = q(a|s) e^{(V(sa) − V(s))/λ}                                                        (4)

K sentences; two decisions with A actions and S states; logs in nats, values in reward units.
"""

import heapq
import math
from typing import Any

import torch
from torch import Tensor

from klrl_edu.exact.posterior import posterior
from klrl_edu.models.contract import sequence_log_probs
from klrl_edu.theory.articles.claim import Claim, shown
from klrl_edu.theory.articles.examples import (
    Sentences,
    TwoSteps,
    climb,
    four_sentences,
    gradient,
    log_mass,
    mean_score,
    processes,
    sentences,
)
from klrl_edu.theory.articles.tabular import objective

_STEP_SIZE = 0.1


def loss_gradient(example: Sentences) -> Tensor:
    """∇L [K] of the loss L = −J, by autograd: the printed step is α times this."""
    return gradient(lambda log_policy: -objective(example, log_policy), example.log_policy)


def ascent_direction(example: Sentences) -> Tensor:
    """∇J = E_π[s (r − λ log π/q)] [K]."""
    return mean_score(
        example.log_policy,
        example.rewards - example.kl_coef * (example.log_policy - example.log_prior),
    )


def _says_step() -> str:
    example = four_sentences()
    here, up, down = (
        float(
            objective(
                example,
                torch.log_softmax(
                    example.log_policy + sign * _STEP_SIZE * loss_gradient(example), 0
                ),
            )
        )
        for sign in (0, -1, 1)
    )
    return (
        f"with L = −J, from J = {here:.6f} the step +0.1 ∇L leads to {down:.6f} and −0.1 ∇L to"
        f" {up:.6f}"
    )


def values_without_reward(process: TwoSteps) -> Tensor:
    """Q̂(a) then Q̂(s,b) [A + S·A] by Σ p max Q̂ from terminal values of 0."""
    last = torch.zeros_like(process.then_reward)
    return torch.cat([process.transition @ last.amax(-1), last.reshape(-1)])


def backed_up_values(process: TwoSteps) -> Tensor:
    """Q(a) then Q(s,b) [A + S·A] by (2)."""
    last = process.then_reward
    return torch.cat(
        [
            process.first_reward + process.discount * process.transition @ last.amax(-1),
            last.reshape(-1),
        ]
    )


def _says_backup() -> str:
    process = processes()[0]
    true = ", ".join(f"{value:.4f}" for value in process.best_action_values()[:2].tolist())
    return (
        "no reward enters: terminal values of 0 make every value 0, and of c, c; the best returns"
        f" of the two first actions are {true}"
    )


def return_gradient(process: TwoSteps) -> Tensor:
    """∇E[return] [A + S·A] in the policy's logits, by autograd through all trajectories."""
    process, logits = _with_gradient(process)
    return _flat(process.expected_return(), logits)


def gradient_over_states(process: TwoSteps) -> Tensor:
    """∇Σ_s π(a|s) Q(s,a) [A + S·A] with Q held fixed and the free a set to action 0."""
    process, logits = _with_gradient(process)
    (first, then), values = process.policy(), _own_values(process)
    return _flat(first[0] * values[0] + (then[:, 0] * process.then_reward[:, 0]).sum(), logits)


def gradient_over_actions(process: TwoSteps) -> Tensor:
    """(3) [A + S·A], with Q and d held fixed."""
    process, logits = _with_gradient(process)
    (first, then), values = process.policy(), _own_values(process)
    visits = process.discount * process.state_law().detach()
    return _flat(first @ values + visits @ (then * process.then_reward).sum(-1), logits)


def _own_values(process: TwoSteps) -> Tensor:
    """Q^π(a) [A], without gradient."""
    later = (process.policy()[1] * process.then_reward).sum(-1)
    return (process.first_reward + process.discount * process.transition @ later).detach()


def _with_gradient(process: TwoSteps) -> tuple[TwoSteps, tuple[Tensor, Tensor]]:
    logits = (
        process.first_logits.clone().requires_grad_(),
        process.then_logits.clone().requires_grad_(),
    )
    return process._replace(first_logits=logits[0], then_logits=logits[1]), logits


def _flat(value: Tensor, logits: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in torch.autograd.grad(value, logits)])


def _says_actor() -> str:
    seen, true = (compute(processes()[0]) for compute in (gradient_over_states, return_gradient))
    cosine = float(torch.nn.functional.cosine_similarity(seen, true, 0))
    return (
        f"with the free a set to the first action, the cosine with ∇E[return] is {cosine:.4f} and"
        f" the lengths are {_norms(seen, true)}"
    )


def _norms(*vectors: Tensor) -> str:
    return " and ".join(f"{float(vector.norm()):.4f}" for vector in vectors)


def by_values(example: Sentences) -> Tensor:
    """π* [K] by the soft values of every prefix, from the last word back: (4)."""
    model = posterior(example.problem(), method="soft_bellman").model
    return sequence_log_probs(model, example.tokens).detach().exp()


def by_policy_gradient(example: Sentences) -> Tensor:
    """π* [K] by climbing J along its natural gradient, from the uniform policy."""
    uniform = torch.full_like(example.log_prior, -math.log(len(example.tokens)))
    return climb(example.log_prior, example.rewards, example.kl_coef, uniform).exp()


def by_model(example: Sentences) -> Tensor:
    """π* [K] by planning forward: each word in proportion to the q e^{r/λ} of all that the model
    can still write after it.
    """
    weights = example.log_prior + example.rewards / example.kl_coef
    reach = torch.stack(
        [log_mass(example, weights, range(t)) for t in range(example.space.max_length + 1)]
    )
    return reach.diff(dim=0).sum(0).exp()


def three_families(example: Sentences) -> Tensor:
    """The policies [3,K] that the three end at."""
    return torch.stack([by_values(example), by_policy_gradient(example), by_model(example)])


def _says_families() -> str:
    found = three_families(four_sentences())
    spread = float((found.amax(0) - found.amin(0)).max())
    return (
        f"all three give P(the cat) = {float(found[0, 0]):.9f} and P(a dog) ="
        f" {float(found[0, 3]):.9f}, and differ by {shown(spread)}"
    )


def best_first(example: Sentences) -> tuple[int, int]:
    """A* for the sentence with the largest log q + r/λ: (its row, prefixes opened). A prefix is
    worth at most its log-mass + max r/λ.
    """
    rows = [tuple(row) for row in example.tokens.tolist()]
    scaled, top = example.rewards / example.kl_coef, float(example.rewards.max()) / example.kl_coef
    queue: list[tuple[float, tuple[int, ...]]] = [(-top, ())]
    for opened in range(len(rows) * example.space.max_length + 1):
        prefix = heapq.heappop(queue)[1]
        if prefix in rows:
            return rows.index(prefix), opened
        for longer in sorted(
            {row[: len(prefix) + 1] for row in rows if row[: len(prefix)] == prefix}
        ):
            row = next(k for k, sentence in enumerate(rows) if sentence[: len(longer)] == longer)
            bound = float(scaled[row]) if longer in rows else top
            heapq.heappush(
                queue,
                (
                    -float(log_mass(example, example.log_prior, range(len(longer)))[row]) - bound,
                    longer,
                ),
            )
    raise AssertionError("unreachable: every prefix leads to a sentence")


def found_by_search(example: Sentences) -> Tensor:
    """The law [K] of what A* returns: all its mass on one sentence."""
    law = torch.zeros(len(example.tokens), dtype=torch.float64)
    law[best_first(example)[0]] = 1.0
    return law


def _says_search() -> str:
    example = four_sentences()
    row, opened = best_first(example)
    text, share = example.space.decode(example.tokens)[row], float(example.posterior()[row].exp())
    return (
        f"A* opens {opened} prefixes and returns {text!r}, the posterior's mode, which has"
        f" probability {share:.6f}: as a policy it is at total variation {1 - share:.6f} from π*;"
        " one backward sweep over the same tree gives π* itself"
    )


CONTROL: tuple[Claim[Any], ...] = (
    Claim(
        name="d-step",
        article="D",
        section="4.1",
        printed=r"$\Delta\theta = \alpha \nabla J(\theta)$ with $J$ called a loss",
        corrected=r"$\Delta\theta = -\alpha \nabla L(\theta)$ for a loss $L = -J$",
        verdict="holds with a correction",
        tutorial="t05",
        unit="reward units",
        examples=sentences,
        truth=ascent_direction,
        asserted=loss_gradient,
        repaired=lambda example: -loss_gradient(example),
        says=_says_step,
    ),
    Claim(
        name="d-backup",
        article="D",
        section="4.2",
        printed=r"$\hat Q(s,a) = \sum_{s'} p(s' \mid s,a) \max_{a'} Q(s',a')$",
        corrected=r"$Q(s,a) = r(s,a) + \gamma \sum_{s'} p(s' \mid s,a) \max_{a'} Q(s',a')$",
        verdict="holds with a correction",
        tutorial="t05",
        unit="reward units",
        examples=processes,
        truth=TwoSteps.best_action_values,
        asserted=values_without_reward,
        repaired=backed_up_values,
        says=_says_backup,
    ),
    Claim(
        name="d-actor",
        article="D",
        section="4.2",
        printed=r"$\Delta\theta = \alpha \nabla \sum_s \pi(a \mid s)\, \hat Q(s,a)$",
        corrected=r"$\Delta\theta = \alpha \sum_s d(s) \sum_a \nabla \pi(a \mid s)\, Q(s,a)$",
        verdict="holds with a correction",
        tutorial="t05",
        unit="reward units",
        examples=processes,
        truth=return_gradient,
        asserted=gradient_over_states,
        repaired=gradient_over_actions,
        says=_says_actor,
    ),
    Claim(
        name="d-families",
        article="D",
        section="3.2",
        printed="policy gradients, value functions and a model each solve the problem",
        corrected="",
        verdict="holds",
        tutorial="t05",
        unit="probability",
        examples=sentences,
        truth=lambda example: example.posterior().exp().expand(3, -1),
        asserted=three_families,
        repaired=None,
        says=_says_families,
    ),
    Claim(
        name="d-search",
        article="D",
        section="9.2",
        printed="A* search and priority queues find the policy faster",
        corrected=(
            r"they find its mode; $V(s) = \lambda \log \sum_a q(a \mid s)\, e^{V(sa)/\lambda}$ on"
            r" the same tree finds $\pi^*$"
        ),
        verdict="false",
        tutorial="t05",
        unit="probability",
        examples=sentences,
        truth=lambda example: example.posterior().exp(),
        asserted=found_by_search,
        repaired=by_values,
        says=_says_search,
    ),
)
