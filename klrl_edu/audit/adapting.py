"""A function of named tensors as a `Loss` or a value estimator: the names of its parameters say
what it takes.

A parameter with a default keeps it, unless `adapt` names it. Names of a Batch, of verl and of TRL
are understood (`FIELDS`). What the libraries call `advantages` is the sequence's reward r(y),
without KL penalty and without baseline: nothing is guessed; give `adapt={"advantages": …}` for
another. N sequences, T tokens, V columns.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError
from klrl_edu.learning.batches import Batch, needs, needs_of

_NOTES = "_klrl_notes"
Reader = Callable[[Batch], Any]
Adapter = Mapping[str, Any] | Callable[[Batch], Mapping[str, Any]]


def _mask(batch: Batch) -> Tensor:
    return batch.live.long()  # 0 and 1 as integers, as the libraries keep it


def _sequence_reward(batch: Batch) -> Tensor:
    return batch.rewards.sum(-1)


def _reward_at_each_token(batch: Batch) -> Tensor:
    return batch.rewards.sum(-1, keepdim=True).expand_as(batch.rewards) * batch.live


def _log_ratio(batch: Batch) -> Tensor:
    return (batch.log_probs - batch.prior_log_probs).sum(-1)


def _one_kl_coef(batch: Batch) -> Tensor:
    """λ, where the whole batch has one."""
    if bool((batch.kl_coef != batch.kl_coef[0]).any()):
        raise InputError(
            f"beta is one number, and the batch has several, {batch.kl_coef.unique().tolist()};"
            " take kl_coef [N] in its place."
        )
    return batch.kl_coef[0]


def _fields(reader: Reader, *names: str) -> dict[str, Reader]:
    return dict.fromkeys(names, reader)


def _attribute(name: str) -> Reader:
    return lambda batch: getattr(batch, name)


_OWN: dict[str, Reader] = {
    **{name: _attribute(name) for name in Batch.__dataclass_fields__ if name != "complete"},
    "log_ratio": _log_ratio,  # u [N]
    "token_log_ratio": lambda batch: batch.log_probs - batch.prior_log_probs,
}
_VERL: dict[str, Reader] = {
    **_fields(_attribute("log_probs"), "log_prob", "logprob"),
    **_fields(_attribute("prior_log_probs"), "ref_log_prob", "ref_logprob"),
    **_fields(
        _attribute("behaviour_log_probs"), "old_log_prob", "old_log_probs", "rollout_log_probs"
    ),
    **_fields(_attribute("rewards"), "token_level_rewards", "token_level_scores"),
    **_fields(_mask, "response_mask", "eos_mask"),
}
_TRL: dict[str, Reader] = {
    **_fields(_attribute("log_probs"), "per_token_logps"),
    **_fields(_attribute("prior_log_probs"), "ref_per_token_logps"),
    **_fields(_attribute("behaviour_log_probs"), "old_per_token_logps"),
    **_fields(_mask, "completion_mask"),
    "beta": _one_kl_coef,  # a number there
}
FIELDS: dict[str, Reader] = {**_OWN, **_VERL, **_TRL, "advantages": _sequence_reward}
"""Parameter name -> what a function gets for it: [N,T] per token, with 0 after EOS; `rewards` has a
whole-sequence reward on the last live token; `advantages` is r(y), [N] as in TRL, or [N,T] on every
live token where another parameter has a name of verl's.
"""


def takes_a_batch(function: Callable[..., Any]) -> bool:
    """Whether the first required parameter is a Batch: by annotation, or the only one and not the
    name of a field.
    """
    required = _required(function)
    if not required:
        return True
    first = required[0]
    if first.annotation is Batch or first.annotation in ("Batch", "klrl_edu.Batch"):
        return True
    return len(required) == 1 and first.name not in FIELDS


def takes_a_log_ratio(function: Callable[..., Any]) -> bool:
    """Whether the only required parameter stands for u [N]: it has no name of a field, and is not
    called or annotated a batch.
    """
    required = _required(function)
    only = required[0] if len(required) == 1 else None
    return (
        only is not None
        and only.name not in {*FIELDS, "batch"}
        and only.annotation not in (Batch, "Batch", "klrl_edu.Batch")
    )


def draws_random_numbers(function: Callable[..., Any]) -> bool:
    """Whether a parameter is called `draw`."""
    return "draw" in parameters_of(function)


def adapted(function: Callable[..., Any], adapt: Adapter | None) -> Callable[..., Any]:
    """The function with a Batch as its first parameter; `draw` is handed on.

    Args:
        function: of named tensors; of a tuple that it returns the first counts (verl: loss, then
            statistics).
        adapt: a mapping parameter -> name of a field or a value, or Batch -> keyword arguments;
            None goes by the names alone.

    Raises:
        InputError: a parameter without default whose name is unknown; lists the names that are
            known.
    """
    readers = {} if callable(adapt) else _readers(function, adapt or {})

    def on_batch(batch: Batch, **draw: Draw) -> Any:
        if callable(adapt):
            given = adapt(batch)
        else:
            given = {name: reader(batch) for name, reader in readers.items()}
        result = function(**given, **draw)
        return result[0] if isinstance(result, tuple) else result

    asked = set(needs_of(function))
    if {"log_dists", "prior_log_dists"} & set(readers):
        asked.add("distributions")
    return needs(*asked)(on_batch)


def notes_of(function: Any) -> tuple[str, ...]:
    """What was given for names that mean different things to different people."""
    found: tuple[str, ...] = getattr(function, _NOTES, ())
    return found


def name_of(function: Any) -> str:
    """What to call a function, a partial or a module."""
    while hasattr(function, "func"):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _readers(function: Callable[..., Any], adapt: Mapping[str, Any]) -> dict[str, Reader]:
    parameters = parameters_of(function)
    unknown = [name for name in adapt if name not in parameters]
    if unknown:
        raise InputError(
            f"adapt names {unknown[0]!r}, which is no parameter of {name_of(function)}; it has"
            f" {', '.join(parameters) or 'none'}."
        )
    verl = any(name in _VERL for name in parameters)
    readers: dict[str, Reader] = {}
    for name, parameter in parameters.items():
        if name in adapt:
            readers[name] = _reader_of(adapt[name])
        elif parameter.default is not parameter.empty or name == "draw":
            continue
        elif name in FIELDS:
            readers[name] = _reward_at_each_token if name == "advantages" and verl else FIELDS[name]
        else:
            raise InputError(
                f"{name_of(function)} takes {name!r}, which is not understood; rename it, give it a"
                f" default, or say what it is: adapt={{{name!r}: a value or a name}}. Known names:"
                f" {', '.join(FIELDS)}."
            )
    return readers


def _reader_of(given: Any) -> Reader:
    return FIELDS[given] if isinstance(given, str) and given in FIELDS else lambda batch: given


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Named parameters; those of `forward` for a module, none where Python knows no signature."""
    target = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        found = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _required(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [
        p for name, p in parameters_of(function).items() if p.default is p.empty and name != "draw"
    ]
