"""What functions of numbers take: arrays, lists and integers give what tensors give."""

import inspect

import numpy as np
import pytest
import torch

import klrl_edu as klrl
from klrl_edu.core.errors import InputError
from klrl_edu.core.numbers import as_numbers, takes_numbers

LOG_Q = np.log([0.5, 0.25, 0.25])
REWARDS, PREFERENCES = [1, 0, 2], [[0.5, 0.75, 1], [0.25, 0.5, 0], [0, 1, 0.5]]
MODULES = (
    klrl.acceptance,
    klrl.budget,
    klrl.preferences,
    klrl.regularizers,
    klrl.advantages,
    klrl.aggregation,
    klrl.divergences,
    klrl.evidence,
    klrl.kl_gradients,
    klrl.kl_values,
    klrl.top_k,
)
FUNCTIONS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": function
    for module in MODULES
    for name, function in vars(module).items()
    if inspect.isfunction(function)
    and function.__module__ == module.__name__
    and not name.startswith("_")
    and "Tensor" in str(inspect.signature(function)).partition("->")[0]
} | {
    "best_of_n": klrl.best_of_n,
    "match_moments": klrl.match_moments,
    "gaussian_kl.k3": klrl.gaussian_kl.k3,
    "gaussian_kl.control_variate": klrl.gaussian_kl.control_variate,
}
_LOGS = [[-1.0, -2.0], [-3.0, 0]]  # [N,T], as numbers of both kinds
_DISTS = np.log([[[0.5, 0.5], [0.25, 0.75]], [[0.1, 0.9], [0.5, 0.5]]]).tolist()  # [N,T,V]
# one value a name, which all functions share
VALUES = {
    "log_prior": LOG_Q.tolist(),
    "log_policy": np.log([0.25, 0.25, 0.5]).tolist(),
    "log_behaviour": LOG_Q.tolist(),
    "preferences": PREFERENCES,
    "kl_coef": 0.5,
    "tau": 0.5,
    "n": 2,
    "log_beta": 0.3,
    "kl_coefs": [0.5, 1],
    "budget": 0.1,
    "target": 1.25,
    "divergence": "chi_squared",
    "x": [0, -1, 0.25],
    "features": [[1, 0], [0, 1], [0, 0]],
    "targets": [0.3, 0.3],
    "log_ratio": [[1, 0], [-0.5, 2]],
    "coefficient": [0.5, 1],
    "bound": 1.5,
    "weight": 0.25,
    "alpha": 0.5,
    "kl": [1, 2],
    "log_weights": [0, -1.5],
    "posterior_log_weights": [0, -1.5],
    "posterior_log_weight": 1,
    "squared_norms": [1, 2],
    "values": [1, 3],
    "group": [0, 0],
    "live": [[True, True], [True, False]],
    "tokens": [[0, 1], [1, 1]],
    "k": 1,
    "log_probs": _LOGS,
    "prior_log_probs": [[-1.5, -1], [-2, -0.5]],
    "behaviour_log_probs": [[-1, -1], [-2, -1]],
    "log_dists": _DISTS,
    "prior_log_dists": _DISTS[::-1],
}
TWO_AXES = {
    "aggregation": {"values": [[1, 2], [3, 4]]},
    "advantages.gae": {"values": [[1, 2], [3, 4]], "rewards": [[1, 0], [0, 2]]},
    "advantages.to_go": {"rewards": [[1, 0], [0, 2]]},
    "kl_values.fitted_coefficient": {"log_ratio": [1, 0, -2]},
    "kl_values.best_coefficient": {
        "log_probs": LOG_Q.tolist(),
        "prior_log_probs": np.log([0.2, 0.3, 0.5]).tolist(),
    },
    "acceptance.importance_sampling_mean": {"values": [1, 2, 3]},
}
_DTYPES = {"group": torch.long, "tokens": torch.long, "live": torch.bool}


def arguments(name, function):
    """The arguments without a default, and those that are tensors."""
    own = {"rewards": REWARDS} | VALUES
    for start, others in TWO_AXES.items():
        own = own | others if name.startswith(start) else own
    parameters = inspect.signature(function).parameters.values()
    asked = [one for one in parameters if one.default is one.empty]
    numbers = {one.name for one in asked if "Tensor" in str(one.annotation)}
    return {one.name: own[one.name] for one in asked}, numbers


def tensor(name, value):
    return torch.tensor(value, dtype=_DTYPES.get(name, torch.float64))


def flat(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [torch.as_tensor(part, dtype=torch.float64) for part in parts]


@pytest.mark.parametrize(("name", "function"), FUNCTIONS.items(), ids=FUNCTIONS)
def test_lists_and_arrays_give_what_tensors_give(name, function):
    given, numbers = arguments(name, function)
    assert numbers, "nothing to convert"

    def with_(convert):
        return {
            one: convert(one, value) if one in numbers and value is not None else value
            for one, value in given.items()
        }

    expected = flat(function(**with_(tensor)))
    for convert in (lambda _, value: value, lambda _, value: np.array(value)):
        seen = flat(function(**with_(convert)))
        for one, other in zip(seen, expected, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_result_is_in_float64_and_integers_are_no_whole_number_arithmetic():
    assert klrl.kl_values.k2([1, 3]).tolist() == [0.5, 4.5]
    assert klrl.kl_values.k2(np.array([1, 3])).dtype == torch.float64
    assert klrl.kl_values.k2(torch.tensor([1, 3])).tolist() == [0.5, 4.5]
    assert klrl.aggregation.token_mean([[1, 5]], [[1, 0]]).item() == 1  # live is a mask by its name


def test_tensors_pass_as_they_are_with_their_gradient_and_dtype():
    u = torch.tensor([0.5, -0.25], requires_grad=True)
    assert klrl.kl_values.k1(u) is u
    assert klrl.kl_values.k3(u).dtype == torch.float32
    (gradient,) = torch.autograd.grad(klrl.kl_values.k2(u).sum(), u)
    assert gradient.tolist() == u.tolist()
    rewards = torch.tensor([1.0, 0, 2], dtype=torch.float64, requires_grad=True)
    log_policy = torch.tensor(LOG_Q, requires_grad=True)
    loss = klrl.preferences.dpo_loss(log_policy, LOG_Q, klrl.preferences.bradley_terry(rewards), 1)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (log_policy, rewards)))


def test_a_list_of_tensors_keeps_their_gradients():
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.0, 2.0))
    gradients = torch.autograd.grad(klrl.kl_values.k2([[a, b], [3, a]]).sum(), (a, b))
    assert [float(g) for g in gradients] == [2, 2]


def test_numbers_go_where_the_first_tensor_is():
    meta = torch.zeros(2, dtype=torch.float64, device="meta")
    assert klrl.kl_values.k2(meta).device.type == "meta"

    @takes_numbers
    def devices(a: torch.Tensor, b: torch.Tensor | None = None, *, c: torch.Tensor):
        return [None if one is None else one.device.type for one in (a, b, c)]

    assert devices([1], None, c=meta) == ["meta", None, "meta"]
    assert devices([1], c=[2]) == ["cpu", None, "cpu"]


def test_what_is_no_number_is_refused_by_its_name():
    for value, said in (
        ("a", "rewards is the text 'a'"),
        ([[1], [1, 2]], "rewards is a list of list"),
        ({"a": 1}, "rewards is a dict"),
        (np.array(["a"]), "rewards is a ndarray"),
    ):
        with pytest.raises(InputError, match=f"{said}; expected numbers"):
            klrl.best_of_n(LOG_Q, value, 2)
    assert as_numbers(None, "x") is None
    with pytest.raises(TypeError, match="best_of_n"):
        klrl.best_of_n(LOG_Q)
    with pytest.raises(TypeError, match="k1"):
        klrl.kl_values.k1(1, 2)


def test_functions_among_the_arguments_are_left_alone():
    given = ([[-1.0]], [[-2.0]], [[-1.0]])
    value = klrl.kl_values.off_policy_token(*given, klrl.kl_values.k2)
    assert value.tolist() == [0.5]


def test_the_k3_warning_points_at_whoever_called():
    with pytest.warns(RuntimeWarning, match="overflows") as seen:
        klrl.kl_values.k3([-1e4])
    assert seen[0].filename == __file__


def test_complex_numbers_are_refused_and_lose_no_part():
    with pytest.raises(InputError, match="log_ratio is complex"):
        klrl.kl_values.k1(torch.tensor([[1j]]))
    with pytest.raises(InputError, match="log_ratio is a list of complex"):
        klrl.kl_values.k1([1j])


def test_float_tensors_pass_as_they_are_and_all_else_is_made_ready():
    @takes_numbers
    def same(x: torch.Tensor, y: torch.Tensor | None = None) -> tuple:
        return x, y

    half, whole = torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.long)
    assert same(half, half) == (half, half)
    assert same(half)[1] is None
    for x, y in (same(half, whole), same(half, y=whole), same(half, [1, 1])):
        assert x is half
        assert y.dtype == torch.float64
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments but 3 were given"):
        same(half, half, half)
