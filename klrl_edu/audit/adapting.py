"""A function of named tensors as a `Loss` or a value estimator: the names of its parameters say
what it takes.

A parameter with a default keeps it, unless `adapt` names it; a mask whose default is None gets the
live tokens. Names of a Batch, of verl, of TRL and of OpenRLHF are understood (`FIELDS`). What the
libraries call `advantages` is the sequence's reward r(y), without KL penalty and without baseline;
`adapt={"advantages": "leave_one_out"}` gives another (`ADVANTAGES`), and the report says which it
was. N sequences, T tokens, V columns.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError
from klrl_edu.estimators.advantages import centred, leave_one_out_advantage, sample_z_score
from klrl_edu.learning.batches import Batch, needs, needs_of

_NOTES = "_klrl_notes"
Reader = Callable[[Batch], Any]
Adapter = Mapping[str, Any] | Callable[[Batch], Mapping[str, Any]]
Kind = Literal["gradient", "value"]


def _mask(batch: Batch) -> Tensor:
    return batch.live.long()  # 0 and 1 as integers, as the libraries keep it


def _sequence_reward(batch: Batch) -> Tensor:
    return batch.rewards.sum(-1)


def _at_each_token(of_sequence: Reader) -> Reader:
    """A number a sequence [N] on each of its live tokens [N,T]."""
    return lambda batch: of_sequence(batch)[:, None] * batch.live


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
    # `complete` is a flag of the batch; the others have the sequences as an axis
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
_OPENRLHF: dict[str, Reader] = {
    **_fields(_attribute("log_probs"), "action_log_probs"),
    **_fields(_attribute("prior_log_probs"), "base_action_log_probs", "log_probs_base"),
    # rollout_log_probs and old_log_probs are verl's names too
    **_fields(_attribute("behaviour_log_probs"), "old_action_log_probs"),
    **_fields(_mask, "action_mask", "loss_mask"),
}
_TRL: dict[str, Reader] = {
    **_fields(_attribute("log_probs"), "per_token_logps"),
    **_fields(_attribute("prior_log_probs"), "ref_per_token_logps"),
    **_fields(_attribute("behaviour_log_probs"), "old_per_token_logps"),
    **_fields(_mask, "completion_mask"),
    "beta": _one_kl_coef,  # a number there
}
FIELDS: dict[str, Reader] = {
    **_OWN,
    **_VERL,
    **_TRL,
    **_OPENRLHF,
    # the libraries mean different things by it, so a note says what was given
    "advantages": _sequence_reward,
}
"""Parameter name -> what a function gets for it: [N,T] per token, with 0 after EOS; `rewards` has a
whole-sequence reward on the last live token; `advantages` is r(y), [N] as in TRL, or [N,T] on every
live token where another parameter has a name of verl's or of OpenRLHF's.
"""
_MASKS = tuple(name for name, reader in FIELDS.items() if reader is _mask)


class _Advantage(NamedTuple):
    """What stands for `advantages`: of a sequence [N], and the same in words."""

    of_sequence: Reader
    words: str


ADVANTAGES: dict[str, _Advantage] = {
    "reward": _Advantage(
        _sequence_reward, "the sequence's reward r(y), without baseline and KL penalty"
    ),
    "group_mean": _Advantage(
        lambda batch: centred(_sequence_reward(batch), batch.group),
        "r(y) less the mean of its group, itself included, without KL penalty",
    ),
    "leave_one_out": _Advantage(
        lambda batch: leave_one_out_advantage(_sequence_reward(batch), batch.group),
        "r(y) less the mean of the others in its group, without KL penalty",
    ),
    "z_score": _Advantage(
        lambda batch: sample_z_score(_sequence_reward(batch), batch.group),
        "the z-score of r(y) in its group, (r − mean)/(std + 1e-4) with n − 1 in the std, without"
        " KL penalty",
    ),
}
"""The ready-made advantages that `adapt` takes by name, of the sequences of one group (prompt)."""

# an estimator of KL reads none of these
_OF_LOSSES = {
    "advantages",
    "rewards",
    "token_level_rewards",
    "token_level_scores",
    "kl_coef",
    "beta",
}
_LOG_RATIOS = ("u", "log_ratio", "log_ratios", "logratio", "logr", "token_log_ratio")
_LOSS_WORDS = ("loss", "gradient")
_VALUE_WORDS = (
    "kl",
    "k1",
    "k2",
    "k3",
    "divergence",
    "divergences",
    "penalty",
    "estimator",
    "estimators",
)


def kind_of(function: Callable[..., Any]) -> Kind | None:
    """Whether a function is a loss ("gradient") or an estimator of a divergence ("value"), where
    its names decide; None where they do not.
    """
    return kind_and_reason(function)[0]


def kind_and_reason(function: Callable[..., Any]) -> tuple[Kind | None, str]:
    """`kind_of`, and what decided it, in words."""
    named = list(parameters_of(function).values())
    if named and _is_batch(named[0]):
        return "gradient", "it takes a Batch"
    # what it takes says more than what it is called
    for parameter in named:
        if parameter.name in _OF_LOSSES:
            return "gradient", f"its parameter {parameter.name}"
    own = name_of(function).lower()
    whole = f"{getattr(function, '__module__', '')}.{own}".lower()
    # before the words of values, as a kl_loss is a loss
    for word in _LOSS_WORDS:
        # within a longer word, too: losses, kl_gradients
        if word in whole:
            return "gradient", f"{word!r} in its {'name' if word in own else 'module'}"
    if named and named[0].name in _LOG_RATIOS:
        return "value", f"its parameter {named[0].name}"
    for word in _VALUE_WORDS:
        # as a word of its own: "kl" is in "klrl", too
        if word in re.split(r"[\W_]+", whole):
            return "value", f"{word!r} in its {'name' if word in own else 'module'}"
    return None, ""


def takes_a_batch(function: Callable[..., Any]) -> bool:
    """Whether a Batch is all that a function wants: its only required parameter is called or
    annotated one, or has no name of a field.
    """
    required = _required(function)
    if len(required) != 1:
        # none required (defaults, *args, no known signature): the Batch goes in as it stands
        return not required
    return _is_batch(required[0]) or required[0].name not in FIELDS


def takes_a_log_ratio(function: Callable[..., Any]) -> bool:
    """Whether the only required parameter stands for u [N]: it has no name of a field, and is not
    called or annotated a batch.
    """
    required = _required(function)
    only = required[0] if len(required) == 1 else None
    return only is not None and only.name not in FIELDS and not _is_batch(only)


def is_of_log_ratio(function: Callable[..., Any]) -> bool:
    """Whether it takes log-ratios alone, by name or for want of another, and so those of tokens as
    well as those of sequences.
    """
    named = [parameter.name for parameter in _required(function)]
    return named == ["log_ratio"] or takes_a_log_ratio(function)


def needed_of(function: Callable[..., Any]) -> list[str]:
    """The parameters that nothing is known of, for `adapt` to say what they are."""
    if takes_a_batch(function) or takes_a_log_ratio(function):
        return []
    known = [p for p in _required(function) if p.name in FIELDS or _is_batch(p)]
    return [p.name for p in _required(function) if p not in known]


def draws_random_numbers(function: Callable[..., Any]) -> bool:
    """Whether a parameter is called `draw`."""
    return "draw" in parameters_of(function)


def adapted(function: Callable[..., Any], adapt: Adapter | None) -> Callable[..., Any]:
    """The function with a Batch as its first parameter; `draw` is handed on.

    Args:
        function: of named tensors; of a tuple that it returns the first counts (verl: loss, then
            statistics).
        adapt: a mapping parameter -> name of a field or of ready-made advantages, function of the
            Batch, or value; or Batch -> keyword arguments. None goes by the names alone.

    Raises:
        InputError: a parameter without default whose name is unknown; lists the names that are
            known.
    """
    readers, notes = ({}, ()) if callable(adapt) else _readers(function, adapt or {})

    def on_batch(batch: Batch, **draw: Draw) -> Any:
        if callable(adapt):
            given = adapt(batch)
        else:
            given = {name: reader(batch) for name, reader in readers.items()}
        result = function(**given, **draw)
        return result[0] if isinstance(result, tuple) else result

    # the wrapper needs what the function is marked with, and what its names read
    asked = set(needs_of(function))
    if {"log_dists", "prior_log_dists"} & set(readers):
        asked.add("distributions")
    setattr(on_batch, _NOTES, notes)
    return needs(*asked)(on_batch)


def notes_of(function: Any) -> tuple[str, ...]:
    """What was given for names that mean different things to different people."""
    found: tuple[str, ...] = getattr(function, _NOTES, ())
    return found


def name_of(function: Any) -> str:
    """What to call a function, a partial or a module."""
    while hasattr(function, "func"):  # a partial of a partial
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _readers(
    function: Callable[..., Any], adapt: Mapping[str, Any]
) -> tuple[dict[str, Reader], tuple[str, ...]]:
    """What each parameter gets, and what must be said of it."""
    parameters = parameters_of(function)
    unknown = [name for name in adapt if name not in parameters]
    if unknown:
        raise InputError(
            f"adapt names {unknown[0]!r}, which is no parameter of {name_of(function)}; it has"
            f" {', '.join(parameters) or 'none'}."
        )
    # those two keep an advantage a token, TRL one a sequence
    per_token = any(name in _VERL or name in _OPENRLHF for name in parameters)
    readers: dict[str, Reader] = {}
    notes: list[str] = []
    for name, parameter in parameters.items():
        chosen = adapt.get(name, "reward" if name == "advantages" else None)
        missing = parameter.default is parameter.empty
        if isinstance(chosen, str) and chosen in ADVANTAGES and (missing or name in adapt):
            readers[name], note = _advantages(name, chosen, per_token)
            another = (
                "" if name in adapt else f"; adapt={{{name!r}: 'leave_one_out'}} gives another"
            )
            notes.append(f"{note}{another}.")
        elif name in adapt:
            readers[name] = _reader_of(chosen)
        elif parameter.default is None and name in _MASKS:
            readers[name] = _mask
            notes.append(
                f"{name}: the live tokens, and not its default None, with which padding counts."
            )
        elif not missing or name == "draw":  # a default, or handed on at the call
            continue
        elif _is_batch(parameter):
            readers[name] = lambda batch: batch
        elif name in FIELDS:
            readers[name] = FIELDS[name]
        else:
            raise InputError(
                f"{name_of(function)} takes {name!r}, which is not understood; rename it, give it a"
                f" default, or say what it is: adapt={{{name!r}: a value or a name}}. Known names:"
                f" {', '.join(FIELDS)}."
            )
    return readers, tuple(notes)


def _advantages(name: str, chosen: str, per_token: bool) -> tuple[Reader, str]:
    """Ready-made advantages in the shape that is wanted, and what they are."""
    of_sequence, words = ADVANTAGES[chosen]
    if per_token:
        return _at_each_token(of_sequence), f"{name}: {words}, on every live token"
    return of_sequence, f"{name}: {words}"


def _reader_of(given: Any) -> Reader:
    if isinstance(given, str) and given in FIELDS:
        return FIELDS[given]
    if callable(given):
        read: Reader = given
        return read
    return lambda batch: given


def _is_batch(parameter: inspect.Parameter) -> bool:
    # a module that postpones its annotations holds them as text
    return parameter.name == "batch" or parameter.annotation in (Batch, "Batch", "klrl_edu.Batch")


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Named parameters; those of `forward` for a module, none where Python knows no signature."""
    # the __call__ of a module is (*args, **kwargs), which names nothing
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
