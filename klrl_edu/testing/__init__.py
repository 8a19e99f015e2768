"""What a test of one's own model, reward, estimator or sampler needs: laws, Hypothesis strategies,
exact and statistical assertions.

The public names are listed once, in `__init__.pyi`, and imported on first use: the pytest plugin
reads the ledger without torch, and only the strategies need hypothesis.
"""

from klrl_edu.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
