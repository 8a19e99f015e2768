"""Every program on CUDA against the CPU; run on a machine that has it."""

import pytest
import torch

from klrl_edu.core.draws import seeded_draw
from klrl_edu.evaluation.compare import compare
from klrl_edu.exact.posterior import looked_up, posterior
from klrl_edu.learning import losses
from klrl_edu.learning.training import copy_of_prior, train
from klrl_edu.problems.examples import count_threes
from tests.devices.programs import PROGRAMS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_the_same_numbers_on_cuda(name):
    # the same uniforms are drawn on both; tokens could differ only where a uniform falls within
    # rounding of a boundary
    expected, seen = PROGRAMS[name](torch.device("cpu")), PROGRAMS[name](torch.device("cuda", 0))
    assert seen == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_the_large_space_trains_on_cuda():
    problem = count_threes()
    problem.prior.to("cuda")
    target = posterior(problem)
    start = compare(problem.prior, target).reverse_kl
    history = train(
        copy_of_prior(problem),
        looked_up(target),
        losses.rloo,
        steps=100,
        batch_size=256,
        lr=1e-3,
        draw=seeded_draw(0),
        target=target,
    )
    assert history["reverse_kl"][-1] < start / 5
