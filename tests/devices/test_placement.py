"""Every program gives the CPU's numbers on another device, and a tensor left behind is noticed: on
a simulated device, in a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices.programs import PROGRAMS, planted

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report():
    run = subprocess.run(
        [sys.executable, "-m", "tests.devices.programs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_the_same_numbers_on_another_device(name, report):
    simulated = report["simulated"][name]
    assert not isinstance(simulated, str), simulated
    assert simulated == pytest.approx(report["cpu"][name], rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("name", planted())
def test_a_tensor_left_behind_is_noticed(name, report):
    assert "Expected all tensors to be on the same device" in report["caught"][name]
