"""Partial vocabularies: the tail added back by samples, by a bucket, or left out."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from klrl_edu.audit.claims.catalogue import answers_case
from klrl_edu.core import logspace
from klrl_edu.core.errors import InputError
from klrl_edu.estimators.kl_values import per_token_kl
from klrl_edu.estimators.top_k import top_k_tail_bucket, top_k_tail_sampled, top_k_truncated
from klrl_edu.testing import log_probs
from tests.estimators.cases import vector, whole_batch
from tests.exact.dictionaries import INF, assert_close

P, Q = vector(0.5, 0.3, 0.15, 0.05), vector(0.25, 0.25, 0.25, 0.25)


def rows(p, q):
    """One position, as [N,T,V]."""
    return p.log()[None, None], q.log()[None, None]


def test_by_hand_with_two_of_four_words():
    full, kept = (
        sum(float(p * (p / q).log()) for p, q in zip(P, Q, strict=True)),
        0.5 * math.log(2) + 0.3 * math.log(1.2),
    )
    assert float(top_k_truncated(*rows(P, Q), 2)) == pytest.approx(kept, rel=1e-14)
    assert float(top_k_tail_bucket(*rows(P, Q), 2)) == pytest.approx(
        kept + 0.2 * math.log(0.2 / 0.5), rel=1e-14
    )
    taken = [float(top_k_tail_sampled(*rows(P, Q), torch.tensor([[v]]), 2)) for v in range(4)]
    assert taken == pytest.approx(
        [kept, kept, kept + math.log(0.6), kept + math.log(0.2)], rel=1e-14
    )
    assert float(P @ vector(*taken)) == pytest.approx(full, rel=1e-14)


@given(data=st.data(), size=st.integers(1, 6))
def test_the_sampled_tail_keeps_the_mean_for_every_k_and_the_bucket_lies_below(data, size):
    p, q = data.draw(log_probs(size)), data.draw(log_probs(size))
    full = per_token_kl(p[None, None], q[None, None])[0, 0]
    assume(math.isfinite(full))  # an infinite term of a mass that underflows has no mean
    wide = p.expand(size, 1, -1), q.expand(size, 1, -1)
    for k in range(size + 1):
        values = top_k_tail_sampled(*wide, torch.arange(size)[:, None], k).squeeze(-1)
        assert_close(
            logspace.expectation(p, values),
            full,
            float(q[q > -INF].abs().max()) + float(p[p > -INF].abs().max()),
        )
        bucket = float(top_k_tail_bucket(p[None, None], q[None, None], k))
        assert -1e-15 <= bucket <= float(full) * (1 + 1e-12) + 1e-12


@given(data=st.data(), size=st.integers(1, 5))
def test_all_of_the_vocabulary_is_the_full_divergence(data, size):
    p, q = data.draw(log_probs(size))[None, None], data.draw(log_probs(size))[None, None]
    for value in (top_k_truncated(p, q, size), top_k_tail_bucket(p, q, size)):
        assert_close(value, per_token_kl(p, q), float(q[q > -INF].abs().max()))


def test_nothing_of_the_vocabulary_is_nothing_a_bucket_of_one_or_k1():
    assert float(top_k_truncated(*rows(P, Q), 0)) == 0
    assert float(top_k_tail_bucket(*rows(P, Q), 0)) == pytest.approx(0, abs=1e-15)
    assert float(top_k_tail_sampled(*rows(P, Q), torch.tensor([[3]]), 0)) == pytest.approx(
        math.log(0.2), rel=1e-14
    )


def test_a_bucket_loses_nothing_where_the_tail_has_one_ratio():
    q = vector(0.3, 0.3, 0.3, 0.1)
    assert float(top_k_tail_bucket(*rows(P, q), 2)) == pytest.approx(
        float(per_token_kl(*rows(P, q))), rel=1e-14
    )


def test_along_sequences_that_end_the_mean_is_the_divergence():
    whole = whole_batch(answers_case())
    pi = whole.log_probs.detach().sum(-1).exp()
    truth = float(pi @ (whole.log_probs - whole.prior_log_probs).detach().sum(-1))
    for k in range(4):
        values = (
            top_k_tail_sampled(whole.log_dists, whole.prior_log_dists, whole.tokens, k)
            .sum(-1)
            .detach()
        )
        assert float(pi @ values) == pytest.approx(truth, rel=1e-13)


def test_gradients_are_finite_where_mass_is_zero_and_vmap_gives_the_same():
    whole = whole_batch(answers_case())
    assert bool((whole.log_dists == -INF).any())

    def total(log_dists, prior, tokens):
        parts = (
            top_k_truncated(log_dists, prior, 2),
            top_k_tail_bucket(log_dists, prior, 2),
            top_k_tail_sampled(log_dists, prior, tokens, 2),
        )
        return torch.stack(parts).sum()

    fields = [
        value.detach().unflatten(0, (3, 2))
        for value in (whole.log_dists, whole.prior_log_dists, whole.tokens)
    ]
    together = torch.func.vmap(torch.func.grad(total))(*fields)
    apart = torch.stack([torch.func.grad(total)(*(field[i] for field in fields)) for i in range(3)])
    assert bool(torch.isfinite(together).all())
    assert torch.allclose(together, apart, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [-1, 5])
def test_a_k_outside_the_vocabulary_is_refused(k):
    with pytest.raises(InputError, match=f"k = {k} must lie between 0 and the vocabulary's size 4"):
        top_k_truncated(*rows(P, Q), k)
