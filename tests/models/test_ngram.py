"""n-grams: counts against a dictionary, smoothing by hand, and the contexts of any order."""

import itertools
import math
from collections import Counter

import pytest
import torch

from klrl_edu import testing
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.contract import conditional_log_probs, enumerate_support
from klrl_edu.models.ngram import NGramModel
from klrl_edu.problems.corpora import surname_frequencies

SPACE, FIXED = SequenceSpace(("a", "b", "c"), 4), SequenceSpace(("a", "b"), 3, eos=False)
TEXTS = ["a b a", "b", "", "a a", "c b", "a b"]


def random_ngram(space: SequenceSpace, order: int, seed: int = 0) -> NGramModel:
    generator = torch.Generator().manual_seed(seed)
    shape = NGramModel(space, order).logits.shape
    return NGramModel(space, order, torch.randn(shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("space", [SPACE, FIXED], ids=["eos", "fixed"])
def test_dense_and_fitted_models_keep_every_law(space, order):
    testing.check_language_model(
        random_ngram(space, order), fresh=lambda: random_ngram(space, order, 1)
    )
    fitted = NGramModel.fit(space, TEXTS if space.eos else ["a b a", "b b a", "a a a"], order)
    testing.check_language_model(fitted)
    assert float(enumerate_support(fitted).log_weights.logsumexp(0)) == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_row_depends_on_the_last_words_and_on_nothing_before(order):
    space = SequenceSpace(("a", "b"), 5)
    rows = conditional_log_probs(random_ngram(space, order), space.all_tokens())
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    for tokens, row in zip(space.all_tokens().tolist(), rows, strict=True):
        for t in range(space.max_length - 1):
            if space.vocab_size - 1 in tokens[:t]:
                break
            context = tuple([-1] * order + tokens[:t])[-(order - 1) :] if order > 1 else ()
            torch.testing.assert_close(row[t], seen.setdefault(context, row[t]), rtol=0, atol=0)
    assert len(seen) == sum(2**k for k in range(order))
    assert len({tuple(row.tolist()) for row in seen.values()}) == len(seen)


def test_the_courses_dirichlet_predictive():
    space = SequenceSpace(("the cat", "the dog", "a cat", "a dog"), 1, eos=False, separator="|")
    model = NGramModel.fit(
        space, list(space.vocabulary), 1, weights=[4, 3, 2, 1], smoothing="dirichlet"
    )
    assert model.emission_log_probs().exp()[0].tolist() == pytest.approx(
        [5 / 14, 4 / 14, 3 / 14, 2 / 14], abs=1e-15
    )


def slow_witten_bell(
    history: tuple[str, ...],
    token: str,
    texts: list[str],
    weights: list[float],
    space: SequenceSpace,
) -> float:
    """(1) straight from the texts, for the longest history of which any ending is looked up by
    scanning.
    """
    longest, columns = space.max_length - 1, space.vocab_size
    follow: Counter[str] = Counter()
    for text, weight in zip(texts, weights, strict=True):
        words = text.split()
        chain = ["<"] * 5 + words + ["$"] * (len(words) < longest)
        for i in range(5, len(chain)):
            if not history or tuple(chain[i - len(history) : i]) == history:
                follow[chain[i]] += weight
    lower = slow_witten_bell(history[1:], token, texts, weights, space) if history else 1 / columns
    total = sum(follow.values())
    return (follow[token] + len(follow) * lower) / (total + len(follow)) if total else lower


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_witten_bell_is_its_formula(order):
    weights = [1.0, 2.0, 0.5, 1.0, 3.0, 1.5]
    model = NGramModel.fit(SPACE, TEXTS, order, weights=weights)
    names = [*SPACE.vocabulary, "$"]
    for words in itertools.product(SPACE.vocabulary, repeat=2):
        tokens = SPACE.encode([" ".join(words)])
        rows = conditional_log_probs(model, tokens)[0].exp()
        for t in range(3):
            history = (
                tuple(["<"] * 5 + list(words[:t]))[len(words[:t]) + 5 - (order - 1) :]
                if order > 1
                else ()
            )
            expected = [slow_witten_bell(history, name, TEXTS, weights, SPACE) for name in names]
            assert rows[t].tolist() == pytest.approx(expected, rel=1e-12)


def test_a_forced_eos_is_no_evidence():
    short = SequenceSpace(("a",), 3)
    model = NGramModel.fit(
        short, ["a a"], 1
    )  # both words were chosen, the EOS after them was not: n(a) = 2, t = 1
    assert model.emission_log_probs().exp()[0].tolist() == pytest.approx([(2 + 0.5) / 3, 0.5 / 3])


def test_after_an_unknown_context_dirichlet_is_uniform_and_recovers():
    model = NGramModel.fit(SPACE, ["a a", "b"], 3, smoothing="dirichlet", concentration=0.5)
    rows = conditional_log_probs(model, SPACE.encode(["c a a"]))[0].exp()
    assert rows[1].tolist() == pytest.approx([0.25] * 4)  # after "c"
    assert rows[2].tolist() == pytest.approx([0.25] * 4)  # after "c a", never seen, though "a" was


def test_surnames_fit_at_order_six_and_higher_orders_fit_them_better():
    table = surname_frequencies(300)
    space = SequenceSpace.from_texts(list(table), separator="")
    fits = [
        NGramModel.fit(space, list(table), order, weights=list(table.values()))
        for order in (1, 2, 4, 6)
    ]
    weights = torch.tensor(list(table.values()), dtype=torch.float64)
    likelihoods = [
        float(weights @ model.log_prob(space.encode(list(table))).detach()) for model in fits
    ]
    assert likelihoods == sorted(likelihoods)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, "order = 0"),
        ({"texts": []}, "texts is empty"),
        ({"texts": "a b"}, "a single text"),
        ({"texts": ["a z"]}, "z"),
        ({"weights": [1.0]}, "weights has 1 entries for 6 texts"),
        ({"weights": [1, 1, 1, -1, 1, 1]}, r"weights\[3\] = -1 "),
        ({"weights": [math.nan] * 6}, r"weights\[0\] = nan"),
        ({"weights": [0] * 6}, "all zero"),
        (
            {"smoothing": "kneser-ney"},
            "'kneser-ney' is not known; choose 'witten-bell' or 'dirichlet'",
        ),
        ({"smoothing": "dirichlet", "concentration": 0.0}, "concentration = 0.0"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        NGramModel.fit(SPACE, **{"texts": TEXTS, "order": 2, **options})


def test_bad_logits_are_named():
    with pytest.raises(InputError, match=r"expected \[C, V\] = \[4, 4\]"):
        NGramModel(SPACE, 2, torch.zeros(3, 4))
    with pytest.raises(
        InputError, match=r"logits\[1, 0\] = -inf: NaN, \+inf, or a row without mass"
    ):
        NGramModel(SPACE, 2, torch.zeros(4, 4).index_fill(0, torch.tensor([1]), -math.inf))
    with pytest.raises(TooLargeError, match=r"order 6 over 27 words has 14,900,788 contexts"):
        NGramModel(SequenceSpace(tuple("abcdefghijklmnopqrstuvwxyz-"), 8), 6)
