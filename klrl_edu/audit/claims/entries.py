"""An estimator or loss with what it claims, as data.

    E[g] = Σ_k c_k target_k    or    E[g] = a closed form of `predictions`;
    unbiased: one target, c = 1, or the closed form of what is meant                             (1)

Targets are those of `audit.targets`; gradients are to be minimised.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from klrl_edu.audit.claims.predictions import Prediction
from klrl_edu.models.contract import LanguageModel
from klrl_edu.problems.problem import Problem

ClaimedMean = Mapping[str, float] | Prediction
"""Target name -> coefficient (none: 0), or a closed form."""

REVERSE, FORWARD = {"reverse_kl": 1.0}, {"forward_kl": 1.0}
REVERSE_PER_TOKEN, FORWARD_PER_TOKEN = {"reverse_kl_per_token": 1.0}, {"forward_kl_per_token": 1.0}
OBJECTIVE, NOTHING = {"objective": 1.0}, dict[str, float]()


@dataclass(frozen=True)
class Entry:
    """One estimator or loss and its claim.

    Attributes:
        name: module.function, and what distinguishes several entries of one function.
        function: what the claim is about; its docstring says "unbiased" exactly where an entry of
            it does.
        kind: "value" or "gradient".
        formula: of one estimate, in the symbols of its module.
        claim: its expectation.
        words: that expectation in words: what it is unbiased for, or what it follows instead.
        unbiased: whether it is what the estimator is for.
        batch_size: sequences an estimate.
        drawn_by: the policy π itself, another policy μ ("behaviour"), or the exact π*
            ("posterior").
        audited: the function as the audit takes it, where it is not `function` itself.
        constants: keyword arguments that depend on the policy and the problem.
    """

    name: str
    function: Callable[..., Any]
    kind: Literal["value", "gradient"]
    formula: str
    claim: ClaimedMean
    words: str
    unbiased: bool
    batch_size: int = 1
    drawn_by: Literal["policy", "behaviour", "posterior"] = "policy"
    audited: Callable[..., Any] | None = None
    constants: Callable[[LanguageModel, Problem], dict[str, Any]] | None = None


def value_entry(
    function: Callable[..., Any],
    formula: str,
    claim: ClaimedMean,
    words: str,
    *,
    unbiased: bool = False,
    label: str = "",
    **more: Any,
) -> Entry:
    """An entry of a value; `label` tells it from others of the same function."""
    return Entry(_name(function, label), function, "value", formula, claim, words, unbiased, **more)


def gradient_entry(
    function: Callable[..., Any],
    formula: str,
    claim: ClaimedMean,
    words: str,
    *,
    unbiased: bool = False,
    label: str = "",
    **more: Any,
) -> Entry:
    """An entry of a surrogate or loss; `label` tells it from others of the same function."""
    return Entry(
        _name(function, label), function, "gradient", formula, claim, words, unbiased, **more
    )


def _name(function: Callable[..., Any], label: str) -> str:
    home = function.__module__.rsplit(".", 1)[-1]
    return f"{home}.{function.__name__}" + (f" ({label})" if label else "")
