"""One torch thread, and Hypothesis profiles chosen by HYPOTHESIS_PROFILE: ci (the default, no
randomness), dev, nightly.
"""

import os

import torch
from hypothesis import HealthCheck, settings

pytest_plugins = [
    "klrl_edu.pytest_plugin"
]  # here as well as by its entry point: the package need not be installed again

torch.set_num_threads(1)

_SLOW_MACHINE = [HealthCheck.too_slow]
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=_SLOW_MACHINE
)
settings.register_profile(
    "dev", deadline=None, max_examples=100, suppress_health_check=_SLOW_MACHINE
)
settings.register_profile(
    "nightly", deadline=None, max_examples=2000, suppress_health_check=_SLOW_MACHINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
