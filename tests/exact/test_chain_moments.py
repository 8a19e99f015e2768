"""Moments of a lattice's posterior as derivatives of its evidence."""

import math

import pytest
import torch

from klrl_edu.core.errors import InputError
from klrl_edu.exact.posterior import posterior
from tests.exact.lattices import close, random_problem


def test_counts_and_their_covariance_are_derivatives_of_the_evidence():
    problem = random_problem("bigram", 1.0, 11)
    words = list(problem.space.vocabulary)
    model = posterior(problem, "forward_backward").model
    oracle = posterior(problem, "enumeration")
    bonus = torch.zeros(len(words), dtype=torch.float64, requires_grad=True)
    counts = torch.stack(
        [(oracle.enumerated().tokens == k).sum(-1) for k in range(len(words))], 1
    ).double()
    log_evidence = torch.logsumexp(
        oracle.enumerated().log_prior + oracle.enumerated().rewards + counts @ bonus, 0
    )
    (gradient,) = torch.autograd.grad(log_evidence, bonus, create_graph=True)
    hessian = torch.stack(
        [torch.autograd.grad(part, bonus, retain_graph=True)[0] for part in gradient]
    )
    moments = model.count_moments(words)
    close(moments.mean, gradient)
    close(moments.covariance, hessian)


def test_features_that_are_none_are_named():
    model = posterior(random_problem("bigram", 0.5, 7), "forward_backward").model
    states, words = model.lattice.next_state.shape
    word, final = torch.zeros(states, words, 1).double(), torch.zeros(states, 1).double()
    for bad_word, bad_final, message in (
        (word[..., 0], final, "word_features has shape"),
        (word, final[:, 0], r"(final|word)_features has shape"),
        (word + math.nan, final, "word_features hold NaN"),
        (word, final + math.inf, "final_features hold NaN"),
    ):
        with pytest.raises(InputError, match=message):
            model.moments(bad_word, bad_final)
