"""The most probable sequences of a lattice's posterior against the sorted enumeration."""

import pytest

from tests.exact.lattices import INF, both, close, random_problem


@pytest.mark.parametrize("kind", ["unigram", "bigram", "trigram"])
def test_the_best_sequences_are_the_best_of_all(kind):
    for seed in range(16):
        pair = both(random_problem(kind, 0.5, seed, hard=seed % 3 == 0), "logs")
        if pair is None:
            continue
        model, oracle = pair
        top = model.top_sequences(5)
        expected = oracle.log_probs.sort(descending=True).values[:5]
        close(top.log_weights, expected[expected > -INF])
        close(model.log_prob(top.tokens), top.log_weights)
