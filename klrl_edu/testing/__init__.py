"""What a test of one's own model, reward, estimator or sampler needs: laws, Hypothesis strategies, exact and statistical assertions.

The public names are listed once, in `__init__.pyi`, and imported on first use: the pytest plugin reads the ledger without torch,
and only the strategies need hypothesis.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) and node.module for alias in node.names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'klrl_edu.testing' has no public name {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
