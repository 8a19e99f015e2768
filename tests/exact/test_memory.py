"""The walk over 262,144 sequences stays small, measured in a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
torch.set_num_threads(1)
from klrl_edu import count_threes, posterior, seeded_draw
from klrl_edu.models.contract import enumerate_support
def peak():  # of this program alone: ru_maxrss would start from what its parent held
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
problem = count_threes()
problem.prior.sample(64, draw=seeded_draw(0))  # what a first use allocates once
before = peak()
enumerate_support(problem.prior)
walked = peak()
posterior(problem)
print(walked - before, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_enumerating_count_threes_takes_at_most_250_megabytes_above_the_start():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300
    )
    walk, whole = (int(kilobytes) / 1024 for kilobytes in run.stdout.split())
    assert walk <= 250, f"the walk took {walk:.0f} MB"
    assert whole <= 250, f"the posterior took {whole:.0f} MB"
