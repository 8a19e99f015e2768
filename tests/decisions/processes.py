"""Decision processes for the tests: random small ones, and oracles in plain dictionaries
and loops.
"""

import math

import torch
from hypothesis import strategies as st

from klrl_edu.decisions.decision_process import DecisionProcess

REWARDS = st.sampled_from((0.0, 1.0, -1.0)) | st.floats(-2, 2)


def loop(
    reward: float = -0.5, discount: float = 1.0, leaving: float = 0.3, **settings
) -> DecisionProcess:
    """One state that stays with reward `reward` or leaves with reward `leaving`, evenly under the
    prior.
    """
    stays, leaves, nothing = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]
    return DecisionProcess.from_probabilities(
        [[0.5, 0.5], nothing],
        [[stays, leaves], [nothing, nothing]],
        [[reward, leaving], nothing],
        initial=[1.0, 0.0],
        terminal=[False, True],
        discount=discount,
        **settings,
    )


@st.composite
def processes(
    draw: st.DrawFn,
    returns: bool | None = None,
    forbid: bool = False,
    discounts: tuple[float, ...] = (0.0, 0.5, 0.9),
) -> DecisionProcess:
    """Up to four states and an end, up to three actions, some not available.

    Args:
        returns: states may be entered again, with γ from `discounts`; otherwise paths move on, and
            γ = 1 is allowed too.
        forbid: rewards of −inf as well, never on the last action of a state, which moves on.
    """
    returns = draw(st.booleans()) if returns is None else returns
    live, A = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    S = live + 1
    weights = st.integers(0, 4)
    prior, rewards = torch.zeros(S, A, dtype=torch.float64), torch.zeros(S, A, dtype=torch.float64)
    transitions = torch.zeros(S, A, S, dtype=torch.float64)
    for s in range(live):
        prior[s] = torch.tensor([draw(weights) for _ in range(A - 1)] + [draw(st.integers(1, 4))])
        for a in range(A):
            first = 0 if returns and a < A - 1 else s + 1
            transitions[s, a, first:] = torch.tensor([draw(weights) for _ in range(S - first)])
            transitions[s, a, s + 1] += 1  # every state leads on, so all are reached and all end
            rewards[s, a] = draw(REWARDS | st.just(-math.inf) if forbid and a < A - 1 else REWARDS)
    discount = draw(st.sampled_from(discounts if returns else (*discounts, 1.0)))
    return DecisionProcess.from_probabilities(
        normalised(prior),
        normalised(transitions),
        rewards,
        initial=normalised(torch.tensor([float(s < live) for s in range(S)], dtype=torch.float64)),
        terminal=[s == live for s in range(S)],
        discount=discount,
    )


@st.composite
def policies(draw: st.DrawFn, process: DecisionProcess) -> torch.Tensor:
    """log π [S,A] on the prior's actions, logits within ±2."""
    logits = draw(
        st.lists(
            st.floats(-2, 2), min_size=process.log_prior.numel(), max_size=process.log_prior.numel()
        )
    )
    return softmax_policy(
        process, torch.tensor(logits, dtype=torch.float64).reshape(process.log_prior.shape)
    )


def softmax_policy(process: DecisionProcess, logits: torch.Tensor) -> torch.Tensor:
    """log softmax over the available actions, −inf elsewhere."""
    masked = torch.where(process.available, logits, -math.inf)
    return torch.where(
        process.available,
        masked - torch.where(process.terminal, 0, torch.logsumexp(masked, -1))[:, None],
        -math.inf,
    )


def normalised(weights: torch.Tensor) -> torch.Tensor:
    """Rows that sum to one; rows of zeros stay."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def paths(process: DecisionProcess, log_policy: torch.Tensor):
    """Every path of a process that does not return: (probability, discounted Σ r, discounted Σ log
    π/q, list of (state, action, next)).
    """
    policy, prior = log_policy.exp().tolist(), process.log_prior.exp().tolist()
    moves, rewards, terminal = (
        process.transitions.tolist(),
        process.rewards.tolist(),
        process.terminal.tolist(),
    )

    def follow(state, weight, factor, reward, ratio, steps):
        if terminal[state]:
            yield weight, reward, ratio, steps
            return
        for action, p in enumerate(policy[state]):
            for after, chance in enumerate(moves[state][action]):
                if p * chance > 0:
                    further = (
                        reward + factor * rewards[state][action],
                        ratio + factor * math.log(p / prior[state][action]),
                    )
                    yield from follow(
                        after,
                        weight * p * chance,
                        factor * process.discount,
                        *further,
                        [*steps, (state, action, after)],
                    )

    for state, start in enumerate(process.initial.tolist()):
        if start > 0:
            yield from follow(state, start, 1.0, 0.0, 0.0, [])


def soft_values_by_recursion(process: DecisionProcess, kl_coef: float, depth: int) -> list[float]:
    """V of every state with `depth` steps to go, by plain sums."""
    prior, moves, rewards = (
        process.log_prior.exp().tolist(),
        process.transitions.tolist(),
        process.rewards.tolist(),
    )
    values = [0.0] * len(process.states)
    for _ in range(depth):
        after = list(values)
        for s in (~process.terminal).nonzero().squeeze(-1).tolist():
            q_values = [
                r + process.discount * math.fsum(p * v for p, v in zip(row, values, strict=True))
                for r, row in zip(rewards[s], moves[s], strict=True)
            ]
            after[s] = kl_coef * math.log(
                math.fsum(
                    p * math.exp(q / kl_coef) for p, q in zip(prior[s], q_values, strict=True)
                )
            )
        values = after
    return values
