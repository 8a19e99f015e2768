"""Code by its name: a loss, an estimator or a model of the package's or of one's own.

    rloo, grpo(clip=0.1)                    a loss of klrl_edu/learning/losses.py, with arguments
    kl_values.k3, losses.rloo               a function of estimators/ or learning/
    file.py:function, module:function       one's own, from here or installed

Arguments are plain Python values (numbers, texts, lists), read by `ast.literal_eval`, never run.
"""

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tqdm

from klrl_edu.core.errors import InputError, KlrlError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.learning import losses
from klrl_edu.learning.batches import Loss
from klrl_edu.models.contract import LanguageModel

_ROOMS = ("estimators", "learning")  # where functions of this package are looked for
_NO_LOSSES = ("penalised_reward",)  # what the losses are made of
# what `klrl audit --list` names: files of losses and of estimators of divergences
_AUDITED = {
    "losses": "learning",
    "kl_gradients": "estimators",
    "kl_values": "estimators",
    "divergences": "estimators",
    "top_k": "estimators",
}
# a ratio of two sums, two coefficients, and a loss made of a function that no command line gives
_NOT_AUDITED = (*_NO_LOSSES, "kl_per_token", "best_coefficient", "fitted_coefficient", "f_dpg")
_CALL = re.compile(r"(?P<name>[^(]+)(?:\((?P<arguments>.*)\))?", re.DOTALL)


def package_losses() -> dict[str, Loss]:
    """Every loss of klrl_edu/learning/losses.py by its name."""
    return {
        name: function
        for name, function in vars(losses).items()
        if inspect.isfunction(function)
        and function.__module__ == losses.__name__
        and name[0] != "_"
        and name not in _NO_LOSSES
    }


def find_loss(text: str) -> Loss:
    """The loss that `text` names, with the arguments that it gives, e.g. "grpo(clip=0.1)".

    Raises:
        InputError: no such loss, an argument that it does not take, or one that it lacks.
    """
    match = _CALL.fullmatch(text.strip())
    if match is None:
        raise InputError(f"--loss {text!r} cannot be read; write it as rloo or grpo(clip=0.1).")
    name, arguments = match["name"].strip(), _arguments(text, match["arguments"])
    found = find_object(name) if ":" in name else _package_loss(name.removeprefix("losses."))
    if inspect.isclass(found):
        return _made(found, name, arguments)
    if not callable(found):
        raise InputError(
            f"{name} is a {type(found).__name__}, no loss; name a function of a Batch."
        )
    _check_arguments(found, name, arguments)
    return partial(found, **arguments) if arguments else found


def find_function(target: str) -> Callable[..., Any]:
    """The function that a name stands for: one's own, or `file.function` of estimators/ and
    learning/.

    Raises:
        InputError: no such module, file or function, or its file does not import; says which.
    """
    if ":" not in target:
        return _own_function(target)
    found = find_object(target)
    return _made(found, target, {}) if inspect.isclass(found) else found


def audited_functions() -> dict[str, Callable[..., Any]]:
    """The package's own losses and estimators, by the names that `klrl audit` takes."""
    found: dict[str, Callable[..., Any]] = {}
    for file, room in _AUDITED.items():
        module = importlib.import_module(f"klrl_edu.{room}.{file}")
        for name, function in vars(module).items():
            own = getattr(function, "__module__", None) == module.__name__
            if own and inspect.isfunction(function) and name[0] != "_" and name not in _NOT_AUDITED:
                found[f"{file}.{name}"] = function
    return found


def build_model(target: str, space: SequenceSpace, seed: int) -> LanguageModel:
    """A model of one's own: Class(space, seed=seed) where it takes a seed, else Class(space); a
    function that returns a model does as well.

    Raises:
        InputError: no such class, it fails, or what it makes is no LanguageModel on the space.
    """
    maker = find_object(target)
    call = f"{target.rpartition(':')[2]}(space)"
    with _in_one_line(
        lambda error: (
            f"--model {target}: {call} failed{line_of(error)}: {said(error)}; it is called with"
            " the problem's SequenceSpace, and with seed= if it takes one."
        )
    ):
        takes_seed = "seed" in inspect.signature(maker).parameters
        made = maker(space, seed=seed) if takes_seed else maker(space)
    if not isinstance(made, LanguageModel):
        raise InputError(
            f"--model {target} made a {type(made).__name__}, which is no LanguageModel; derive it"
            " from klrl_edu.LanguageModel and give it forward, start, step and select."
        )
    if getattr(made, "space", None) != space:
        raise InputError(
            f"--model {target} made a model on {getattr(made, 'space', None)!r}; keep the space"
            f" that it is given, {space!r}: self.space = space."
        )
    return made


def find_object(target: str) -> Callable[..., Any]:
    """What `module:name` or `file.py:name` stands for.

    Raises:
        InputError: no such module, file or name, or its file does not import; says which.
    """
    place, _, name = target.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_of_name(place)
    # a module may look names up by code of its own
    with _in_one_line(
        lambda error: f"{place}: its {name!r} failed{line_of(error)}: {said(error)}; fix it."
    ):
        found = getattr(module, name, None)
    if not callable(found) or name.startswith("__"):
        listed = [
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and (inspect.isfunction(value) or _class_of(value, module))
        ]
        raise InputError(
            f"{place} has no function {name!r}; it has {', '.join(listed) or 'none'}"
            f"{_nearest(name, listed)}."
        )
    return found


@contextlib.contextmanager
def blaming(own: str) -> Iterator[None]:
    """Turns whatever a user's code raises, sys.exit included, into one line with its place.

    Args:
        own: what is the user's own, in words; "" where all code is the package's, whose failures
            are not for the reader to mend and stay as they are.
    """
    if not own:
        yield
        return
    with _in_one_line(lambda error: f"{own} failed{line_of(error)}: {said(error)}."):
        yield


@contextlib.contextmanager
def _in_one_line(
    words: Callable[[BaseException], str],
    let_through: tuple[type[BaseException], ...] = (KlrlError, KeyboardInterrupt),
) -> Iterator[None]:
    """Whatever a user's code raises becomes an InputError of these words. Ctrl-C is not its doing,
    and what this package refuses is in one line already.
    """
    try:
        yield
    except let_through:
        raise
    except BaseException as error:
        raise InputError(words(error)) from None


def said(error: BaseException) -> str:
    """An exception in one line."""
    try:
        words = str(error).strip().splitlines()
    except Exception:  # even its words are the user's code
        words = []
    return f"{type(error).__name__}: {words[0].rstrip('.') if words else 'no message'}"


def line_of(error: BaseException) -> str:
    """Where in a user's file an exception comes from: the last line of the first file that is
    neither ours nor of the packages that call it for us.
    """
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})"
    others = (
        str(Path(__file__).parents[1]),
        str(Path(torch.__file__).parent),
        str(Path(tqdm.__file__).parent),
        str(Path(importlib.__file__).parent),
        "<frozen",
    )
    trace = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in trace if not frame.filename.startswith(others)]
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    return f" (line {lines[-1]})" if lines else ""


def _package_loss(name: str) -> Loss:
    known = package_losses()
    if name in known:
        return known[name]
    raise InputError(
        f"loss {name!r} is not known{_nearest(name, list(known))}; choose from {', '.join(known)},"
        " or give file.py:function or module:function."
    )


def _own_function(target: str) -> Callable[..., Any]:
    """`file.function` of estimators/ or learning/."""
    file, _, name = target.partition(".")
    names = file.isidentifier() and name.isidentifier() and name[0] != "_"
    for room in _ROOMS if names else ():
        if importlib.util.find_spec(f"klrl_edu.{room}.{file}") is not None:
            function = getattr(importlib.import_module(f"klrl_edu.{room}.{file}"), name, None)
            if callable(function):
                return function
    known = audited_functions()
    # by its whole name, or without its file's
    spelt = {**{one: one for one in known}, **{one.partition(".")[2]: one for one in known}}
    near = difflib.get_close_matches(target, spelt, n=1)
    meant = f"; did you mean {spelt[near[0]]}?" if near else ";"
    raise InputError(
        f"{target!r} is no function of this package{meant} klrl audit --list names them; or give"
        " module:function, file.py:function."
    )


def _arguments(text: str, written: str | None) -> dict[str, Any]:
    """The keyword arguments of a call, as plain values."""
    if written is None:
        return {}
    try:
        call = ast.parse(f"f({written})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise InputError(
                f"--loss {text!r}: the batch is the loss's only argument without a name; write the"
                " others by name, such as clip=0.1."
            )
        named = [str(keyword.arg) for keyword in call.keywords]
        twice = next((name for name in named if named.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"--loss {text!r} gives {twice} twice; remove one.")
        return {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    except InputError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError, AssertionError):
        raise InputError(
            f"--loss {text!r} cannot be read; write arguments as plain values, such as"
            " grpo(clip=0.1)."
        ) from None


def _check_arguments(function: Callable[..., Any], name: str, given: dict[str, Any]) -> None:
    """Refuses arguments that a loss does not take, and a loss that lacks one."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]  # after the batch
    except (TypeError, ValueError):  # built-in functions keep no signature
        return
    fixed = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    known = [one.name for one in fixed]
    unknown = next((key for key in given if key not in known), None)
    if unknown is not None and len(fixed) == len(parameters):
        listed = f"it takes {', '.join(known)}" if known else "it takes none"
        raise InputError(
            f"loss {name} has no argument {unknown!r}{_nearest(unknown, known)}; {listed}."
        )
    missing = [one.name for one in fixed if one.default is one.empty and one.name not in given]
    if missing:
        filled = ", ".join(f"{one}=…" for one in missing)
        raise InputError(
            f"loss {name} needs {' and '.join(missing)} besides the batch; give plain values as"
            f" {name}({filled}), or write a function of the batch that calls it, in a file of your"
            " own: --loss file.py:function."
        )


def _made(cls: Callable[..., Any], target: str, arguments: dict[str, Any]) -> Callable[..., Any]:
    """A loss that is a module, with what it is given."""
    with_them = "with the arguments given" if arguments else "without arguments"
    with _in_one_line(
        lambda error: (
            f"{target} is a class and cannot be made {with_them}: {said(error)}; name a function."
        )
    ):
        made: Callable[..., Any] = cls(**arguments)
    if not callable(made):
        raise InputError(f"{target} is a class whose objects cannot be called; name a function.")
    return made


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give file.py:function with a path from here.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # its neighbours can be imported, as when Python runs the file
    with (
        _first_on_the_path(path.parent.resolve()),
        _in_one_line(
            lambda error: f"{path}{line_of(error)} does not import: {said(error)}; fix the file.",
            # a KlrlError too: its own words would not say which file raised it
            let_through=(KeyboardInterrupt,),
        ),
    ):
        spec.loader.exec_module(module)
    return module


def _module_of_name(name: str) -> ModuleType:
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise InputError(
            f"{name!r} is no name of a module; give module:function, or file.py:function with a"
            " path."
        )
    if parts[0] in sys.stdlib_module_names:
        raise InputError(
            f"{name} is of Python's own library, which holds no loss, estimator or model; give"
            " module:function, or file.py:function with a path."
        )
    with (
        _first_on_the_path(Path.cwd()),
        _in_one_line(lambda error: _why_no_module(name, error), let_through=(KeyboardInterrupt,)),
    ):
        return importlib.import_module(name)


def _why_no_module(name: str, error: BaseException) -> str:
    """There is none of this name, it lacks another, or its own code fails."""
    lacks = error.name if isinstance(error, ModuleNotFoundError) else None
    if lacks is not None and (name == lacks or name.startswith(f"{lacks}.")):
        return (
            f"there is no module {name!r} here or installed; give module:function, or"
            " file.py:function with a path."
        )
    remedy = "fix it" if lacks is None else "install what is missing"
    return f"module {name!r}{line_of(error)} does not import: {said(error)}; {remedy}."


@contextlib.contextmanager
def _first_on_the_path(folder: Path) -> Iterator[None]:
    """Imports look into a folder first, and are put back as they were."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it off
            sys.path.remove(str(folder))


def _class_of(value: object, module: ModuleType) -> bool:
    return inspect.isclass(value) and value.__module__ == module.__name__


def _nearest(typed: str, known: list[str]) -> str:
    near = difflib.get_close_matches(typed, known, n=1)
    return f" (nearest: {near[0]})" if near else ""
