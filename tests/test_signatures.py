"""The public signatures are frozen: a changed name, parameter, kind or default is meant.

tests/signatures.txt lists, a line each, what `klrl_edu` and `klrl_edu.testing` export: functions,
classes with their constructors and public members, and the functions and classes of public modules.

    python -m tests.test_signatures      writes it anew
"""

import difflib
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import klrl_edu
from klrl_edu import testing

FILE = Path(__file__).with_name("signatures.txt")
RENEW = "python -m tests.test_signatures"


def listing() -> str:
    """Every public signature, a line each, in alphabetical order within its package."""
    lines = []
    for package in (klrl_edu, testing):
        for name in package.__all__:
            lines += signatures(f"{package.__name__}.{name}", getattr(package, name))
    return "\n".join(lines) + "\n"


def signatures(name: str, thing: Any) -> Iterator[str]:
    """The lines of one public name and of what is public inside it."""
    if isinstance(thing, ModuleType):
        for key, member in public(vars(thing)):
            if getattr(member, "__module__", None) == thing.__name__:
                yield from signatures(f"{name}.{key}", member)
    elif inspect.isclass(thing):
        yield f"{name}{constructor(thing)}"
        for key, member in public(members(thing)):
            yield from signatures(f"{name}.{key}", member)
    elif isinstance(thing, property | functools.cached_property):
        yield f"{name}: property"
    elif isinstance(thing, classmethod | staticmethod):
        yield f"{name}{parameters(thing.__func__)}  # {type(thing).__name__}"
    elif inspect.isroutine(thing):
        yield f"{name}{parameters(thing)}"
    else:  # a type's other name, or a constant
        yield name


def public(names: dict[str, Any]) -> list[tuple[str, Any]]:
    """Those that do not begin with an underscore, in alphabetical order."""
    return sorted((key, member) for key, member in names.items() if not key.startswith("_"))


def members(cls: type) -> dict[str, Any]:
    """The methods and properties that a class and its parents in this package define.

    What torch or Python add is theirs; a field stands in the constructor.
    """
    ours = [parent for parent in reversed(cls.__mro__) if parent.__module__.startswith("klrl_edu")]
    found = {key: member for parent in ours for key, member in vars(parent).items()}
    kinds = (property, functools.cached_property, classmethod, staticmethod)
    return {
        key: member
        for key, member in found.items()
        if inspect.isfunction(member) or isinstance(member, kinds)
    }


def constructor(cls: type) -> str:
    """The parameters of a class; none for one whose constructor is Python's or torch's own."""
    initial = cls.__new__ if issubclass(cls, tuple) else cls.__init__
    written = inspect.isfunction(initial) and not initial.__module__.startswith("torch")
    return parameters(initial) if written else ""


def parameters(function: Any) -> str:
    """Names, kinds and defaults, without `self`; annotations are mypy's."""
    empty = inspect.Parameter.empty
    bare = [
        parameter.replace(
            annotation=empty,
            default=empty if parameter.default is empty else Default(parameter.default),
        )
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls", "_cls")
    ]
    return str(inspect.Signature(bare))


class Default:
    """A default value as it is typed: a function by its name, a long one by its type."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        if inspect.isroutine(self.value) or inspect.isclass(self.value):
            return self.value.__qualname__
        text = repr(self.value)
        return text if len(text) <= 60 else f"<{type(self.value).__name__}>"


def difference(frozen: str, now: str) -> list[str]:
    """The lines that left (-) and those that came (+)."""
    compared = difflib.unified_diff(frozen.splitlines(), now.splitlines(), lineterm="", n=0)
    return [line for line in compared if not re.match(r"---|\+\+\+|@@", line)]


def test_the_public_signatures_are_as_frozen():
    changed = difference(FILE.read_text(encoding="utf-8"), listing())
    if changed:
        pytest.fail(
            "public signatures changed; if that is meant, write them anew with"
            f" `{RENEW}` and say so in CHANGELOG.md:\n" + "\n".join(changed),
            pytrace=False,
        )


def test_a_listing_names_no_address_and_is_the_same_twice():
    assert listing() == listing()
    assert " at 0x" not in listing()


def test_a_change_of_name_kind_default_or_member_is_noticed():
    class Before:
        """A class whose members change."""

        def __init__(self, n, *, scale=1.0): ...
        def method(self, x, y=None): ...
        @property
        def size(self): ...

    class After(Before):
        """The same with a change of each kind."""

        def __init__(self, n, scale=2.0): ...
        def method(self, x, z=None): ...

        size = None

    Before.__module__ = After.__module__ = "klrl_edu.example"
    frozen, now = ("\n".join(signatures("it", cls)) for cls in (Before, After))
    assert difference(frozen, now) == [
        "-it(n, *, scale=1.0)",
        "-it.method(x, y=None)",
        "-it.size: property",
        "+it(n, scale=2.0)",
        "+it.method(x, z=None)",
    ]


def test_every_public_name_has_a_line_of_its_own_or_of_its_module():
    text = listing()
    for package in (klrl_edu, testing):
        for name in package.__all__:
            assert re.search(rf"^{re.escape(package.__name__)}\.{name}\b", text, re.M), name


if __name__ == "__main__":
    FILE.write_text(listing(), encoding="utf-8")
    print(f"{FILE}: {len(listing().splitlines())} signatures")
