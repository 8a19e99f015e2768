"""The exact mean, bias and variance of any estimator, by enumerating everything that can be drawn.

    E[g] = Σ_batches Π_i π(y_i) · ∇loss(y_1 … y_B),    Var g = E‖g − E g‖²                                         (1)

The loss is differentiated by its token log-probabilities [B,T] (and its full distributions [B,T,V], if it asks for them), and that
is contracted with their Jacobian ∂ log π(y_t|y_<t)/∂θ, computed once. S supported sequences, B batch size, T tokens, P parameters.
"""

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from klrl_edu.audit.report import AuditReport, total_variance
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.core.validation import check_count, check_same_space
from klrl_edu.evaluation.compare import support_log_mass
from klrl_edu.learning import losses
from klrl_edu.learning.batches import Batch, Loss, check_loss, needs_of, score_batch
from klrl_edu.models.contract import LanguageModel, enumerate_support, readable_count, sequence_log_probs
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.problem import Problem

MAX_EXECUTIONS = 100_000


def audit_gradient(loss: Loss, policy: LanguageModel, problem: Problem, *, batch_size: int = 1, max_executions: int = MAX_EXECUTIONS) -> AuditReport:
    """What a loss descends on average, exactly, on-policy.

    Args:
        loss: Batch -> scalar, as `train` takes it; deterministic.
        policy: π, on the prior's support; its trainable parameters are the coordinates.
        problem: prior, reward and λ.
        batch_size: B; a loss that needs the support is run once on it.
        max_executions: the most batches S^B to enumerate.

    Returns:
        Mean and variance of ∇loss beside the targets "objective" (∇(−J)), "reverse_kl" (∇KL(π‖q)) and "forward_kl" (∇KL(q‖π), where finite).

    Raises:
        TooLargeError: more batches than `max_executions`; the message has the count.
        UnsupportedPolicyError: the policy leaves the prior's support.
    """
    started = time.perf_counter()
    check_same_space(policy.space, problem.space, "policy and problem")
    check_count(batch_size, "batch_size")
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("the policy has no trainable parameters, so there is no gradient; call policy.requires_grad_(True).")
    support = enumerate_support(policy, max_executions, problem.prompt)
    wants_support = "support" in needs_of(loss)
    executions = 1 if wants_support else len(support) ** batch_size
    if executions > max_executions:
        raise TooLargeError(
            f"{len(support)} sequences in batches of {batch_size} are {readable_count(executions)} outcomes, more than max_executions = "
            f"{max_executions:,}; take a smaller batch_size or space, or raise max_executions."
        )
    whole = score_batch(policy, [problem], [support.tokens], distributions="distributions" in needs_of(loss))
    sampled = {"log_probs": whole.log_probs} if whole.log_dists is None else {"log_probs": whole.log_probs, "log_dists": whole.log_dists}
    jacobians = {name: _jacobian(log_probs, parameters) for name, log_probs in sampled.items()}
    if wants_support:
        values, log_weight = _batch_gradient(loss, whole, torch.arange(len(support)), jacobians)[None], torch.zeros(1, dtype=torch.float64)
    else:
        batches = torch.tensor(list(itertools.product(range(len(support)), repeat=batch_size)))
        values = torch.stack([_batch_gradient(loss, whole, batch, jacobians) for batch in batches])
        log_weight = support.log_weights[batches].sum(-1)
    mean = torch.exp(log_weight) @ values
    return AuditReport(
        name=_name(loss),
        mean=mean,
        variance=total_variance(log_weight, values, mean),
        targets=_targets(policy, problem, whole, parameters),
        coordinates="sequence logits" if isinstance(policy, SequenceTable) else f"{mean.numel()} parameters of {type(policy).__name__}",
        batch_size=batch_size,
        executions=executions,
        seconds=time.perf_counter() - started,
    )


def audit_value(estimator: Callable[[Tensor], Tensor], policy: LanguageModel, problem: Problem, *, batch_size: int = 1) -> AuditReport:
    """The exact mean and variance of an estimator of KL(π‖q) from samples of π.

    Args:
        estimator: sequence log-ratios u = log π/q [N] in nats -> estimates [N], e.g. `kl_values.k3`.
        batch_size: estimates are averaged over this many independent samples.

    Returns:
        Targets "reverse_kl" = KL(π‖q) and "forward_kl" = KL(q‖π), in nats.
    """
    started = time.perf_counter()
    check_same_space(policy.space, problem.space, "policy and problem")
    check_count(batch_size, "batch_size")
    support = enumerate_support(policy, prompt=problem.prompt)
    with torch.no_grad():
        log_pi = support.log_weights
        log_q = sequence_log_probs(problem.prior, support.tokens, problem.prompt)
        values = estimator(log_pi - log_q)
        if values.shape != log_pi.shape:
            raise InputError(f"the estimator returned shape {list(values.shape)}; expected {list(log_pi.shape)}, one estimate a log-ratio.")
        mean = logspace.expectation(log_pi, values).reshape(1)
        variance = total_variance(log_pi, values[:, None], mean) / batch_size
    targets = {
        "reverse_kl": logspace.kl_divergence(log_pi, log_q).reshape(1),
        "forward_kl": _forward_kl(log_pi, log_q, support.tokens, problem).reshape(1),
    }
    return AuditReport(_name(estimator), mean, variance, targets, "nats", batch_size, len(support), time.perf_counter() - started)


def _forward_kl(log_pi: Tensor, log_q: Tensor, tokens: Tensor, problem: Problem) -> Tensor:
    """KL(q‖π) on π's support, `tokens` [S,T]; mass of q elsewhere, however little, has π = 0 and makes it infinite."""
    with torch.no_grad():
        missed = support_log_mass(problem.prior, tokens, PrefixTrie(problem.space, tokens), problem.prompt)[1]
    if missed > -torch.inf:
        return torch.full_like(missed, torch.inf)
    return logspace.kl_divergence(log_q, log_pi)


def _jacobian(log_probs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """∂ log_probs[s,t]/∂θ -> [S,T,P], or of full distributions [S,T,V] -> [S,T,V,P], where −inf stays −inf and has derivative 0."""
    flat = log_probs.reshape(-1)
    rows = [_flat_gradient(entry if alive else entry.detach(), parameters) for entry, alive in zip(flat, flat.detach() > -torch.inf, strict=True)]
    return torch.stack(rows).reshape(*log_probs.shape, -1)


def _flat_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    if not value.requires_grad:
        return torch.cat([torch.zeros(p.numel(), dtype=torch.float64) for p in parameters])
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.reshape(-1).double() for gradient in gradients])


def _batch_gradient(loss: Loss, whole: Batch, rows: Tensor, jacobians: dict[str, Tensor]) -> Tensor:
    """∇_θ of the loss on the batch of sequences `rows` [B] -> [P], by the chain rule through each field that has a Jacobian."""
    picked = {name: None if (value := getattr(whole, name)) is None else value.detach()[rows] for name in Batch.__dataclass_fields__}
    leaves = [picked[name].requires_grad_() for name in jacobians]  # type: ignore[union-attr]
    value = loss(Batch(**picked))  # type: ignore[arg-type]
    check_loss(value)
    gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    parts = [gradient.reshape(-1) @ jacobian[rows].flatten(0, -2) for gradient, jacobian in zip(gradients, jacobians.values(), strict=True)]
    return torch.stack(parts).sum(0)


def _targets(policy: LanguageModel, problem: Problem, whole: Batch, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The gradients a loss may be meant to have, by autograd through the enumerated distributions."""
    log_pi = whole.log_probs.sum(-1)
    log_q = whole.prior_log_probs.sum(-1)
    values = {
        "objective": losses.exact(whole),
        "reverse_kl": logspace.kl_divergence(log_pi, log_q),
        "forward_kl": _forward_kl(log_pi, log_q, whole.tokens, problem),
    }
    return {name: _flat_gradient(value, parameters) for name, value in values.items() if bool(torch.isfinite(value))}


def _name(function: object) -> str:
    while hasattr(function, "func"):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
