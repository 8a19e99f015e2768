"""klrl_edu: an exact laboratory for KL-regularised reinforcement learning of language models, seen as Bayesian inference.

    π*(y) = q(y) · exp(r(y)/λ) / Z        J(π) = E_π[r] − λ KL(π‖q) = λ log Z − λ KL(π‖π*)

The public names are listed once, in `__init__.pyi`, and imported on first use: `import klrl_edu` alone does not import torch.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) and node.module for alias in node.names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'klrl_edu' has no public name {name!r}")
    home = _HOMES[name]
    value = importlib.import_module(f"{home}.{name}") if _is_module(home, name) else getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_module(home: str, name: str) -> bool:
    """Whether klrl_edu.a.name is a file of its own rather than a name in klrl_edu/a.py."""
    return Path(__file__).parent.joinpath(*home.split(".")[1:], f"{name}.py").is_file()
