"""The audit's two standing sizes, with ten times the room of the bench, so that a busy machine does
not matter.
"""

import time

import pytest

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.learning import losses
from tests.audit.scenes import binary, k2_loss
from tests.benchmarks.audits import fifteen_sequences


@pytest.mark.parametrize("loss", [losses.reinforce, k2_loss])
def test_4096_sequences_take_seconds(loss):
    policy, problem = binary(12)
    started = time.process_time()
    report = audit_gradient(loss, policy, problem)
    assert report.executions == 4096
    assert "unbiased" in report.verdict
    assert time.process_time() - started < 10


def test_3060_multisets_take_seconds():
    policy, problem = fifteen_sequences()
    started = time.process_time()
    report = audit_gradient(losses.rloo, policy, problem, batch_size=4)
    assert report.executions == 3060
    assert report.differentiation == "vmap"
    assert time.process_time() - started < 10
