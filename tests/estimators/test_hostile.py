"""Numbers that nobody means: each gives a right value, or one line that names the argument."""

import inspect
import math

import mpmath
import pytest
import torch

from klrl_edu.core.errors import InputError
from klrl_edu.estimators import (
    advantages,
    aggregation,
    divergences,
    evidence,
    kl_gradients,
    kl_values,
    top_k,
)
from tests.core.test_numbers import FUNCTIONS, arguments
from tests.estimators.cases import vector

NAN, INF = math.nan, math.inf
MODULES = (advantages, aggregation, divergences, evidence, kl_gradients, kl_values, top_k)
OWN = {
    name: function
    for name, function in FUNCTIONS.items()
    if function.__module__ in {module.__name__ for module in MODULES}
}
HOSTILE = (NAN, INF, -INF, -1, 0, True, 1.5, 1e30, 1j, "1", vector(1.0, 2.0))
# what has a meaning, and so a value; everything else of HOSTILE is refused
MEANT = {
    "bound": (INF, 0, 1.5, 1e30),
    "epsilon": (0, 1.5, 1e30),
    "coefficient": (-1, 0, True, 1.5, 1e30),  # or a coefficient a log-ratio
    "weight": (),
    "alpha": (-1, 1.5, 1e30),
    "discount": (0,),
    "decay": (0,),
    "length": (),
    "k": (0,),
}


def numbers_of(function):
    """The arguments that are one number."""
    parameters = inspect.signature(function).parameters.values()
    return [
        one.name
        for one in parameters
        if str(one.annotation).split(" ")[0] in {"int", "float"} or one.annotation in (int, float)
    ]


SWEEP = [(name, number) for name, function in OWN.items() for number in numbers_of(function)]


def test_the_sweep_knows_every_number():
    assert {number for _, number in SWEEP} == MEANT.keys()
    assert len(SWEEP) >= 14


@pytest.mark.parametrize(("name", "number"), SWEEP)
def test_each_number_gives_a_value_or_one_line_that_names_it(name, number):
    given, _ = arguments(name, OWN[name])
    for value in HOSTILE:
        if number == "coefficient" and isinstance(value, torch.Tensor):
            continue
        call = {**given, number: value}
        if any(value is meant for meant in MEANT[number]):
            assert not bool(torch.isnan(torch.as_tensor(OWN[name](**call))).any()), value
            continue
        with pytest.raises(InputError, match=f"{number} (=|is) ") as refused:
            OWN[name](**call)
        assert "\n" not in str(refused.value)


def test_what_clamps_nothing_or_everything():
    u = vector(-3.0, 0.5, 40.0)
    assert torch.equal(kl_values.clamped_k1(u, INF), u)
    assert torch.equal(kl_values.clamped_k1(u, 0), 0 * u)
    assert torch.equal(kl_values.clamped_k3(u, INF), kl_values.k3(u))
    assert torch.equal(kl_values.input_clamped_k3(u, 0), 0 * u)


@pytest.mark.parametrize(("name", "function"), OWN.items(), ids=OWN)
def test_complex_numbers_are_refused_by_their_name(name, function):
    given, tensors = arguments(name, function)
    for one in tensors - {"group", "tokens", "live"}:
        value = torch.tensor(given[one], dtype=torch.complex128)
        with pytest.raises(InputError, match=f"{one} is .*complex"):
            function(**{**given, one: value})
        with pytest.raises(InputError, match=f"{one} is .*complex"):
            function(**{**given, one: value.numpy()})


def test_groups_tokens_and_masks_are_what_their_names_say():
    means = advantages.leave_one_out_mean([1, 3], [0, 0])
    for group in ([5, 5], [-1, -1], [10**9, 10**9], torch.tensor([2.0, 2.0])):
        assert torch.equal(advantages.leave_one_out_mean([1, 3], group), means)
    with pytest.raises(InputError, match=r"group\[1\] = 0\.5 is not a whole number"):
        advantages.leave_one_out_mean([1, 3], [0, 0.5])
    with pytest.raises(InputError, match=r"group\[0\] = nan is not a whole number"):
        advantages.centred([1, 3], torch.tensor([NAN, 0]))
    with pytest.raises(InputError, match=r"values have shape \[2\] and group \[3\]"):
        advantages.centred([1, 3], [0, 0, 0])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert float(aggregation.token_mean([[1, 2], [3, 4]], mask)) == 2
    with pytest.raises(InputError, match=r"live\[0, 1\] = 2 is not 0 or 1"):
        aggregation.token_mean([[1, 2]], [[1, 2]])


# --- infinities -----------------------------------------------------------------------------------


def f_of_t(f):
    """f(t)/t at t = e^u, in mpmath."""
    return lambda u: f(mpmath.exp(u)) / mpmath.exp(u)


def alpha_generator(alpha):
    return lambda t: (t**alpha - alpha * t - (1 - alpha)) / (alpha * (alpha - 1))


LOG_2 = math.log(2)
# (estimator, its value at u = −inf, at u = +inf)
LIMITS = {
    "k1": (kl_values.k1, -INF, INF),
    "k2": (kl_values.k2, INF, INF),
    "k3": (kl_values.k3, INF, INF),
    "control variate 0": (lambda u: kl_values.control_variate(u, 0), -INF, INF),
    "control variate ½": (lambda u: kl_values.control_variate(u, 0.5), INF, INF),
    "control variate −1": (lambda u: kl_values.control_variate(u, -1), -INF, INF),
    "absolute": (kl_values.absolute_k1, INF, INF),
    "opposite k3": (kl_values.opposite_k3, INF, INF),
    "clamped k1": (lambda u: kl_values.clamped_k1(u, 2), -2, 2),
    "clamped k3": (lambda u: kl_values.clamped_k3(u, 2), 2, 2),
    "forward KL": (divergences.forward_kl, INF, 0),
    "forward KL, f": (divergences.forward_kl_nonnegative, INF, 1),
    "χ²": (divergences.chi_squared, INF, INF),
    "reverse χ²": (divergences.reverse_chi_squared, INF, 0.5),
    "total variation": (divergences.total_variation, INF, 0.5),
    "squared Hellinger": (divergences.squared_hellinger, INF, 0.5),
    "Jensen–Shannon": (divergences.jensen_shannon, INF, LOG_2 / 2),
    "Jensen–Shannon ¼": (
        lambda u: divergences.generalised_jensen_shannon(u, 0.25),
        INF,
        0.25 * math.log(4),
    ),
    "α = ½": (divergences.alpha_divergence, INF, 2),
    "α = −1": (lambda u: divergences.alpha_divergence(u, -1), INF, 0.5),
    "α = 3": (lambda u: divergences.alpha_divergence(u, 3), INF, INF),
    "f-DPG JS": (advantages.fdpg_jensen_shannon, INF, -LOG_2 / 2),
    "f-DPG χ²": (advantages.fdpg_chi_squared, 1, -INF),
    "f-DPG TV": (advantages.fdpg_total_variation, 0.5, -0.5),
    "f-DPG Hellinger": (advantages.fdpg_squared_hellinger, INF, -0.5),
}


@pytest.mark.parametrize(("estimator", "low", "high"), LIMITS.values(), ids=LIMITS)
def test_infinite_log_ratios_give_the_limit(estimator, low, high):
    seen = estimator(vector(-INF, INF))
    assert seen.tolist() == pytest.approx([low, high], rel=1e-15)
    # from there on floats know no better: e^{−1e17} and e^{1e17} are 0 and inf
    assert math.isnan(float(estimator(vector(NAN))[0]))


@pytest.mark.filterwarnings("ignore:k3 overflows")
@pytest.mark.parametrize("alpha", [0.5, -0.5, 2, 3.7, 30, -30, 1e30, -1e30])
def test_alpha_divergences_keep_their_digits_from_one_end_to_the_other(alpha):
    for u in (1e-9, 0.5, 0.9999, 1, 1.5, 30, 700, 1e4, 1e17):
        for sign in (1, -1):
            with mpmath.workdps(60):
                exact = f_of_t(alpha_generator(mpmath.mpf(alpha)))(mpmath.mpf(sign * u))
            seen = float(divergences.alpha_divergence(vector(sign * u), alpha)[0])
            if exact < 1e300:
                assert seen == pytest.approx(float(exact), rel=1e-13, abs=0)
            else:
                assert seen > 1e299


def test_a_fitted_coefficient_far_from_the_prior_does_not_overflow():
    for shift in (0.0, -800.0, 300.0):
        u = [shift + x for x in (0.0, 1.0, 2.5)]
        with mpmath.workdps(60):
            w = [mpmath.exp(-x) for x in u]
            mean, mean_u = sum(w) / 3, mpmath.fsum(u) / 3
            top = sum((a - mean_u) * (b - mean) for a, b in zip(u, w, strict=True))
            exact = float(-top / sum((b - mean) ** 2 for b in w))
        assert float(kl_values.fitted_coefficient(u)) == pytest.approx(exact, rel=1e-12)
    for bad in ([], [INF, 0], [NAN]):
        with pytest.raises(
            InputError, match="log_ratio holds no number, or one that is not finite"
        ):
            kl_values.fitted_coefficient(bad)


# --- rewards at the ends of the floats ------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "others"),
    [
        ([-INF, 1, 2], [1.5, -INF, -INF]),
        ([-INF, -INF, 2], [-INF, -INF, -INF]),
        ([INF, 1, 2], [1.5, INF, INF]),
        ([INF, -INF, 2], [-INF, INF, NAN]),
        ([NAN, 1, 2], [NAN, NAN, NAN]),
        ([1e308, 1e308, 0], [5e307, 5e307, 1e308]),
        ([5e-324, 0, 0], [0, 0, 0]),
        ([3e-320, 0, 3e-320], [1.5e-320, 3e-320, 1.5e-320]),
    ],
)
def test_the_mean_of_the_others_is_right_at_every_value(values, others):
    group = [0, 0, 0]
    assert advantages.leave_one_out_mean(values, group).tolist() == pytest.approx(
        others, rel=1e-15, nan_ok=True
    )
    # a second group knows nothing of it
    both = advantages.leave_one_out_mean([*values, 1, 3], [*group, 1, 1])
    assert both[3:].tolist() == [3, 1]


@pytest.mark.parametrize("size", [1e308, 1e-200, 5e-324, 1.0])
def test_z_scores_know_no_unit(size):
    values = [size, -size, 0]
    root = math.sqrt(2 / 3)
    assert advantages.population_z_score(values, [0, 0, 0]).tolist() == pytest.approx(
        [1 / root, -1 / root, 0], rel=1e-14
    )
    assert advantages.sample_z_score(values, [0, 0, 0], 0).tolist() == pytest.approx(
        [1, -1, 0], rel=1e-14
    )
    assert advantages.centred(values, [0, 0, 0]).tolist() == values


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_group_with_an_infinite_value_has_no_mean_to_be_measured_from(value):
    with pytest.raises(
        InputError, match=r"values\[1\] = .* is not finite, so its group has no mean"
    ):
        advantages.centred([0, value], [0, 0])


def test_a_baseline_without_any_score_is_refused():
    with pytest.raises(InputError, match=r"squared_norms are 0 .* with every baseline"):
        advantages.best_scalar_baseline([1, 2], [0, 0], [0, 0])
    # nor does the norm of what is never drawn count
    with pytest.raises(InputError, match="squared_norms are 0"):
        advantages.best_scalar_baseline([1, 2], [0, 1], [0, -INF])


# --- nothing --------------------------------------------------------------------------------------


def test_what_a_mask_leaves_nothing_of_counts_0():
    values = torch.tensor([[3.0, 5.0], [7.0, NAN]], requires_grad=True)
    one, none = torch.tensor([[True, True], [False, False]]), torch.zeros(2, 2, dtype=torch.bool)
    assert float(aggregation.seq_mean_token_mean(values, one).detach()) == 2
    assert float(aggregation.token_mean(values, one).detach()) == 4
    for name in ("seq_mean_token_sum", "seq_mean_token_mean", "token_mean", "fixed_length"):
        seen = getattr(aggregation, name)(values, none)
        (gradient,) = torch.autograd.grad(seen, values)
        assert float(seen.detach()) == 0
        assert not bool(gradient.any())


@pytest.mark.parametrize("name", [name for name in OWN if name.startswith("kl_gradients.")])
def test_a_surrogate_of_no_sequence_is_refused(name):
    given, tensors = arguments(name, OWN[name])
    empty = {
        one: torch.zeros(0, *torch.as_tensor(value).shape[1:], dtype=torch.float64)
        for one, value in given.items()
        if one in tensors
    }
    with pytest.raises(InputError, match="the batch holds no sequence"):
        OWN[name](**{**given, **empty})


def test_means_and_evidence_of_nothing_are_refused():
    for name in ("seq_mean_token_sum", "seq_mean_token_mean", "token_mean", "fixed_length"):
        with pytest.raises(InputError, match="the batch holds no sequence"):
            getattr(aggregation, name)(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool))
    for name in ("importance_sampling", "lower_bound", "upper_bound", "harmonic_mean"):
        for nothing in ([], 1.0):
            with pytest.raises(InputError, match="at least one sample"):
                getattr(evidence, name)(nothing)
    with pytest.raises(InputError, match="at least one sample"):
        evidence.self_normalised([], [])
    assert float(evidence.reverse_importance_sampling(1.0, [])) == 1  # the exact sample alone
