"""Hidden Markov models: likelihood against every hidden path, and EM that climbs to where the
gradient is zero.
"""

import itertools
import math

import pytest
import torch

from klrl_edu import testing
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.contract import enumerate_support
from klrl_edu.models.hmm import HiddenMarkovModel

SPACE, FIXED = SequenceSpace(("a", "b"), 4), SequenceSpace(("a", "b", "c"), 3, eos=False)
TEXTS = ["a b a", "b", "", "a a", "b b", "a b"]


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("space", [SPACE, FIXED], ids=["eos", "fixed"])
def test_it_keeps_every_law(space, states):
    model = HiddenMarkovModel.random(space, states, seed=1)
    testing.check_language_model(
        model, fresh=lambda: HiddenMarkovModel.random(space, states, seed=2)
    )
    assert float(enumerate_support(model).log_weights.logsumexp(0)) == pytest.approx(0, abs=1e-13)


def test_the_likelihood_is_the_sum_over_hidden_paths():
    model = HiddenMarkovModel.random(FIXED, 3, seed=4)
    initial, moves, emits = (
        law.detach().exp()
        for law in (
            model.initial_log_probs(),
            model.transition_log_probs(),
            model.emission_log_probs(),
        )
    )
    for tokens in FIXED.all_tokens()[::5]:
        total = 0.0
        for path in itertools.product(range(3), repeat=3):
            prob = float(initial[path[0]])
            for t, c in enumerate(path):
                prob *= float(emits[c, tokens[t]]) * (float(moves[path[t - 1], c]) if t else 1.0)
            total += prob
        assert float(model.log_prob(tokens[None]).detach()) == pytest.approx(
            math.log(total), abs=1e-12
        )


def test_one_context_is_a_unigram_and_em_counts():
    model, history = HiddenMarkovModel.fit(SPACE, TEXTS, 1, steps=1)
    # chosen tokens: a b a | b EOS | EOS | a a EOS | b b EOS | a b EOS; after "a b a" EOS is forced
    assert model.emission_log_probs().exp()[0].tolist() == pytest.approx([5 / 15, 5 / 15, 5 / 15])
    assert history[1] == pytest.approx(15 * math.log(1 / 3))


@pytest.mark.parametrize("states", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_em_never_lowers_the_likelihood_and_ends_where_its_gradient_is_zero(states, seed):
    model, history = HiddenMarkovModel.fit(
        SPACE, TEXTS, states, weights=[3, 1, 2, 1, 1, 2], steps=400, seed=seed
    )
    assert all(later >= earlier - 1e-10 for earlier, later in itertools.pairwise(history))
    weights = torch.tensor([3.0, 1, 2, 1, 1, 2], dtype=torch.float64)
    # the model's own likelihood: `log_prob` gives a forced EOS probability 1, as the fit does
    log_likelihood = weights @ model.log_prob(SPACE.encode(TEXTS))
    assert float(log_likelihood.detach()) == pytest.approx(history[-1], abs=1e-10)
    log_likelihood.backward()
    assert all(
        float(parameter.grad.nan_to_num().abs().max()) < 0.05 for parameter in model.parameters()
    )


def test_zero_laws_stay_zero_and_carry_finite_gradients():
    emission = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]]).log_softmax(-1)
    model = HiddenMarkovModel(
        SequenceSpace(("a", "b"), 3, eos=False),
        torch.tensor([0.0, -math.inf]),
        torch.eye(2).log(),
        emission,
    )
    log_probs = model.log_prob(model.space.all_tokens())
    assert log_probs.exp().tolist() == [1.0] + [0.0] * 7
    log_probs[0].backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())


def test_hmmlearn_gives_the_same_likelihood():
    hmmlearn = pytest.importorskip("hmmlearn.hmm")
    model = HiddenMarkovModel.random(FIXED, 3, seed=4)
    other = hmmlearn.CategoricalHMM(n_components=3, n_features=3)
    laws = (model.initial_log_probs(), model.transition_log_probs(), model.emission_log_probs())
    other.startprob_, other.transmat_, other.emissionprob_ = (
        law.detach().exp().numpy() for law in laws
    )
    for tokens in FIXED.all_tokens()[::7]:
        assert float(model.log_prob(tokens[None]).detach()) == pytest.approx(
            other.score(tokens[:, None].numpy()), abs=1e-12
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HiddenMarkovModel.random(SPACE, 0), "states = 0"),
        (lambda: HiddenMarkovModel.fit(SPACE, [], 2), "texts is empty"),
        (lambda: HiddenMarkovModel.fit(SPACE, ["a z"], 2), "z"),
        (lambda: HiddenMarkovModel.fit(SPACE, TEXTS, 2, steps=-1), "steps = -1"),
        (
            lambda: HiddenMarkovModel(SPACE, torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 3)),
            r"transition has shape \[2, 3\]; expected \[2, 2\]",
        ),
        (
            lambda: HiddenMarkovModel(
                SPACE, torch.zeros(2), torch.zeros(2, 2), torch.full((2, 3), math.nan)
            ),
            "emission holds NaN",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
