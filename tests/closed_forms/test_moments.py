"""The least divergence under moment constraints, against its definition and a general optimiser."""

import math

import pytest
import torch
from scipy.optimize import minimize

from klrl_edu.closed_forms.moments import match_moments
from klrl_edu.core.errors import InfeasibleError, InputError
from tests.closed_forms.vectors import Q, random_problem

DOG = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)


def test_the_courses_half_of_dogs():
    found = match_moments(Q, DOG, torch.tensor([0.5]))
    assert float(found.coefficients) == pytest.approx(math.log(1.5), abs=1e-12)
    assert found.log_probs.exp().tolist() == pytest.approx([1 / 3, 3 / 8, 1 / 6, 1 / 8], abs=1e-13)
    assert found.kl == pytest.approx(
        math.log(1.5) / 2 - math.log(1.2), abs=1e-15
    )  # 0.020410997260128


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_it_attains_the_means_in_the_family_and_no_other_is_nearer(seed, dimensions):
    generator = torch.Generator().manual_seed(seed)
    log_q, _ = random_problem(seed, outcomes=7)
    features = torch.randn(7, dimensions, generator=generator, dtype=torch.float64)
    targets = torch.softmax(torch.randn(7, generator=generator, dtype=torch.float64), 0) @ features
    found = match_moments(log_q, features, targets)
    p = found.log_probs.exp()
    torch.testing.assert_close(p @ features, targets, rtol=0, atol=1e-12)
    lifted = found.log_probs - log_q - features @ found.coefficients  # constant: p ∝ q e^{β·φ}
    assert float(lifted.max() - lifted.min()) < 1e-12
    constraints = {
        "type": "eq",
        "fun": lambda x: [x.sum() - 1, *(x @ features.numpy() - targets.numpy())],
    }
    other = minimize(
        lambda x: float((x * (torch.from_numpy(x).log().numpy() - log_q.numpy())).sum()),
        p.numpy() * 0.9 + 0.1 / 7,
        bounds=[(1e-12, 1)] * 7,
        constraints=constraints,
    )
    assert found.kl <= other.fun + 1e-7
    torch.testing.assert_close(
        found.covariance,
        (features * p[:, None]).T @ features - torch.outer(targets, targets),
        rtol=0,
        atol=1e-12,
    )


def test_a_target_that_an_outcome_has_exactly_is_inside():
    features = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
    log_q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    found = match_moments(log_q, features, torch.tensor([0.5], dtype=torch.float64))
    assert float(found.log_probs.exp() @ features[:, 0]) == pytest.approx(0.5, abs=1e-12)


def test_dependent_features_get_the_coefficients_of_least_norm():
    found = match_moments(Q, torch.cat([DOG, DOG], 1), torch.tensor([0.5, 0.5]))
    assert found.coefficients.tolist() == pytest.approx([math.log(1.5) / 2] * 2, abs=1e-9)
    assert found.kl == pytest.approx(math.log(1.5) / 2 - math.log(1.2), abs=1e-12)


def test_a_far_target_is_reached():
    found = match_moments(Q, DOG, torch.tensor([1 - 1e-6], dtype=torch.float64))
    assert float(found.log_probs.exp() @ DOG[:, 0]) == pytest.approx(1 - 1e-6, abs=1e-12)


def test_what_cannot_be_attained_says_by_how_much():
    with pytest.raises(InfeasibleError, match=r"0.2 away.*range over \[0, 1\]"):
        match_moments(Q, DOG, torch.tensor([1.2], dtype=torch.float64))
    with pytest.raises(InfeasibleError, match="on the edge"):
        match_moments(Q, DOG, torch.tensor([1.0]))
    both = torch.cat([DOG, 1 - DOG], 1)  # each alone is attainable, together their means sum to one
    with pytest.raises(InfeasibleError, match=r"0\.1 away"):
        match_moments(Q, both, torch.tensor([0.6, 0.6], dtype=torch.float64))
    empty = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    with pytest.raises(InfeasibleError, match=r"range over \[0, 0\]"):
        match_moments(empty.log(), DOG, torch.tensor([0.5]))


def test_bad_shapes_and_values_are_named():
    with pytest.raises(InputError, match=r"\[K, D\] and \[D\] with K = 4"):
        match_moments(Q, DOG[:3], torch.tensor([0.5]))
    with pytest.raises(InputError, match="finite"):
        match_moments(Q, DOG * math.nan, torch.tensor([0.5]))
