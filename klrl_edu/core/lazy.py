"""Packages whose public names are listed once, in their stub, and imported on first use.

A stub's `from klrl_edu.a.b import name as name` makes `name` an attribute of the package; nothing
is imported before somebody asks. Standard library only: what imports this must not import torch.
"""

import ast
import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def lazy_names(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from the stub beside its __init__.py.

    Args:
        package: `__name__` of the package.
        file: `__file__` of its __init__.py.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes = {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no public name {name!r}")
        value = _imported(homes[name], name)
        # from now on Python finds it without asking __getattr__
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, listed, sorted(homes)


def _imported(home: str, name: str) -> Any:
    """The name in its module; or, where a folder holds a file of that name, that module."""
    module = importlib.import_module(home)
    is_file = hasattr(module, "__path__") and find_spec(f"{home}.{name}") is not None
    return importlib.import_module(f"{home}.{name}") if is_file else getattr(module, name)
