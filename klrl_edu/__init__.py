"""klrl_edu: an exact laboratory for KL-regularised reinforcement learning of language models, seen
as Bayesian inference.

    π*(y) = q(y) · exp(r(y)/λ) / Z        J(π) = E_π[r] − λ KL(π‖q) = λ log Z − λ KL(π‖π*)

The public names are listed once, in `__init__.pyi`, and imported on first use: `import klrl_edu`
alone does not import torch.
"""

from klrl_edu.core.lazy import lazy_names

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
