"""Half precision is asked for by name, shares the weights, and changes the distribution by no more
than its rounding.
"""

import pytest
import torch

from klrl_edu.core import logspace
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.contract import conditional_log_probs, enumerate_support, sample
from klrl_edu.models.precision import autocast
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.testing import check_eos_absorbs, check_samples_belong

SPACE = SequenceSpace(("a", "b", "c"), 4)
BITS = {torch.bfloat16: 8, torch.float16: 11}


def network() -> TransformerModel:
    return TransformerModel(SPACE, width=16, heads=2, layers=2, seed=0, dtype=torch.float32)


@pytest.mark.parametrize("dtype", BITS)
def test_the_divergence_is_of_the_order_of_the_rounding_squared(dtype):
    model = network()
    exact, rounded = (enumerate_support(m).log_weights for m in (model, autocast(model, dtype)))
    error = (exact - rounded).abs().max()
    # KL ≈ ½ E[change of log q]², and each logit of order one rounds by 2^-bits in a few products
    assert 0 < float(error) < 100 * 2.0 ** -BITS[dtype]
    assert float(logspace.kl_divergence(exact, rounded)) <= float(error) ** 2


def lstm():
    return RecurrentModel(SPACE, hidden_size=8, seed=0, dtype=torch.float32)


def bfloat16_lstms_run_here():
    """torch has no kernel of its own for them, and oneDNN has one for some processors only."""
    try:
        autocast(lstm(), torch.bfloat16)(SPACE.all_tokens())
    except RuntimeError as error:
        if "primitive" in str(error):
            return False
        raise
    return True


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (network, torch.bfloat16),
        (network, torch.float16),
        pytest.param(
            lstm,
            torch.bfloat16,
            marks=pytest.mark.skipif(
                not bfloat16_lstms_run_here(), reason="this processor has no bfloat16 LSTM kernel"
            ),
        ),
    ],
)
def test_the_laws_that_do_not_compare_two_routes_hold(make, dtype):
    model = autocast(make(), dtype)
    log_probs = conditional_log_probs(model, SPACE.all_tokens())
    torch.testing.assert_close(
        log_probs.exp().sum(-1), torch.ones_like(log_probs[..., 0]), rtol=0, atol=1e-12
    )
    check_eos_absorbs(model)
    check_samples_belong(model)
    assert torch.equal(sample(model, 5, draw=seeded_draw(0)), sample(model, 5, draw=seeded_draw(0)))


def test_the_weights_are_shared_and_get_float32_gradients():
    model = network()
    autocast(model, torch.bfloat16).log_prob(SPACE.all_tokens()).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32
        for parameter in model.parameters()
    )


def test_a_dtype_that_is_no_half_precision_is_refused():
    with pytest.raises(InputError, match=r"torch.float64.*bfloat16"):
        autocast(network(), torch.float64)


def test_weights_that_autocast_would_leave_alone_are_refused():
    with pytest.raises(InputError, match=r"torch.float64.*float32"):
        autocast(TransformerModel(SPACE, width=8, heads=2, layers=1), torch.bfloat16)
