"""Distorted models against the distributions that plain Python makes of their definitions, and
their exact KL against sums over all sequences.
"""

import math

import pytest
import torch

import klrl_edu as klrl
from klrl_edu.core.errors import InputError
from klrl_edu.models.by_prompt import PromptedModels
from klrl_edu.models.contract import (
    LanguageModel,
    conditional_log_probs,
    enumerate_support,
    sequence_log_probs,
)
from klrl_edu.models.distorted import mixture, nucleus, tempered, top_k
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import SequenceTable
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.testing import check_language_model
from tests.models.test_restricted import DeadLastRow
from tests.models.toys import BigramToy, UniformToy, words

INF = math.inf
EOS, FIXED = words(2, 3), words(3, 3, eos=False)
SPACES = {"eos": EOS, "no-eos": FIXED, "one-word": words(1, 2), "one-token": words(3, 1, eos=False)}


def next_token_model(*probs: float) -> SequenceTable:
    """A model of single tokens with these probabilities."""
    space = words(len(probs), 1, eos=False)
    return SequenceTable.from_texts(dict(zip(space.vocabulary, probs, strict=True)), space=space)


def next_token_probs(model: LanguageModel) -> list[float]:
    rows = model.space.all_tokens()
    return sequence_log_probs(model, rows).exp().tolist()


# the definitions, in plain Python, on one next-token distribution


def by_probability(probs):
    return sorted(range(len(probs)), key=lambda v: (-probs[v], v))


def renormalised(probs, kept):
    total = math.fsum(probs[v] for v in kept)
    return [probs[v] / total if v in kept else 0.0 for v in range(len(probs))]


def tempered_by_hand(probs, temperature):
    powers = [p ** (1 / temperature) for p in probs]
    return [power / math.fsum(powers) for power in powers]


def top_k_by_hand(probs, k):
    return renormalised(probs, set(by_probability(probs)[:k]))


def nucleus_by_hand(probs, p):
    kept: list[int] = []
    for v in by_probability(probs):
        if math.fsum(probs[u] for u in kept) < p:
            kept.append(v)
    return renormalised(probs, set(kept))


def sequences_by_hand(model, distort):
    """Sequence -> probability, token by token with the contract's EOS."""
    space, found = model.space, {}
    length, end = space.max_length, space.eos_id
    every = space.all_tokens()
    rows = conditional_log_probs(model, every).exp().tolist()
    law_after = {
        tuple(tokens[:t]): rows[i][t]
        for i, tokens in enumerate(every.tolist())
        for t in range(length)
    }

    def walk(prefix, mass):
        if len(prefix) == length or end in prefix:
            found[prefix + (end,) * (length - len(prefix))] = mass
        elif end is not None and len(prefix) == length - 1:
            walk((*prefix, end), mass)
        else:
            for v, p in enumerate(distort(law_after[prefix])):
                if p > 0:
                    walk((*prefix, v), mass * p)

    walk((), 1.0)
    return found


KINDS = {
    "tempered": (
        lambda model: tempered(model, 0.6),
        lambda law: tempered_by_hand(law, 0.6),
    ),
    "flattened": (
        lambda model: tempered(model, 2),
        lambda law: tempered_by_hand(law, 2),
    ),
    "top-k": (lambda model: top_k(model, 2), lambda law: top_k_by_hand(law, 2)),
    "nucleus": (lambda model: nucleus(model, 0.7), lambda law: nucleus_by_hand(law, 0.7)),
}


def half_table(space):
    """A model of every second sequence of a space, so that some prefixes are out of reach."""
    tokens = space.all_tokens()[::2]
    return SequenceTable(space, tokens, torch.linspace(-1, 1, len(tokens), dtype=torch.float64))


def mixture_of_three(model):
    """With a model that has zeros, and one of weight 0."""
    parts = [model, half_table(model.space), UniformToy(model.space)]
    return mixture(parts, [0.75, 0.25, 0.0])


def nested(model):
    return mixture([top_k(tempered(model, 0.5), 1), nucleus(model, 0.9)], [0.5, 0.5])


OF_ANY_MODEL = {name: distort for name, (distort, _) in KINDS.items()} | {"nested": nested}
DISTORTED = OF_ANY_MODEL | {
    "mixture": mixture_of_three,
    "restricted": lambda model: restrict_to_support(tempered(model, 2), half_table(model.space)),
    "of-a-restricted": lambda model: top_k(restrict_to_support(model, half_table(model.space)), 2),
}


def network(space, dtype=torch.float64):
    model = TransformerModel(space, width=8, heads=2, layers=1, max_prompt=2, seed=0, dtype=dtype)
    # embeddings of 0.02 make laws too alike
    model.token_embedding.weight.data.mul_(50)
    return model


# laws


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("distort", DISTORTED.values(), ids=DISTORTED)
def test_every_distorted_model_keeps_every_law(distort, space):
    check_language_model(distort(BigramToy(space)))


@pytest.mark.parametrize("distort", OF_ANY_MODEL.values(), ids=OF_ANY_MODEL)
def test_prompts_pass_through_to_a_model_that_reads_them(distort):
    model = distort(network(EOS))  # its `branch` shares the parents' cache
    assert model.reads_prompt
    assert model.knows_prompts
    check_language_model(model, torch.tensor([-1, 1, 0]))
    one, other = (
        sequence_log_probs(model, EOS.all_tokens(), torch.tensor(ids)) for ids in ([0], [1])
    )
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("distort", DISTORTED.values(), ids=DISTORTED)
def test_prompts_that_the_model_does_not_read_are_refused_and_one_can_be_bound(distort):
    model = distort(BigramToy(EOS))
    with pytest.raises(InputError, match="reads no prompt"):
        sequence_log_probs(model, EOS.all_tokens(), torch.tensor([1]))
    free = sequence_log_probs(model, EOS.all_tokens())
    bound = model.for_prompt("b")
    assert torch.equal(sequence_log_probs(bound, EOS.all_tokens(), torch.tensor([1])), free)
    with pytest.raises(InputError, match="belongs to the prompt 'b'"):
        sequence_log_probs(bound, EOS.all_tokens(), torch.tensor([0]))


def test_a_model_bound_to_a_prompt_stands_under_it_also_when_distorted():
    parts = [
        tempered(BigramToy(EOS, seed).for_prompt(word), 0.5) for seed, word in ((0, "a"), (1, "b"))
    ]
    several = PromptedModels(parts)
    for word, part in zip("ab", parts, strict=True):
        prompt = EOS.encode_prompt(word)
        seen = sequence_log_probs(several, EOS.all_tokens(), prompt)
        assert torch.equal(seen, sequence_log_probs(part, EOS.all_tokens()))


def test_a_mixture_with_a_model_bound_to_a_prompt_takes_that_prompt_alone():
    bound = half_table(EOS).for_prompt("b")
    model = mixture([network(EOS), bound], [0.5, 0.5])
    check_language_model(model, torch.tensor([1]))
    assert model.reads_prompt
    assert model.knows_prompts
    with pytest.raises(InputError, match="belongs to the prompt 'b'"):
        model.sample(1, draw=klrl.seeded_draw(0), prompt=torch.tensor([0]))
    # one part alone that knows prompts keeps the mixture from being read without them
    assert mixture([bound, BigramToy(EOS)], [0.5, 0.5]).knows_prompts


@pytest.mark.parametrize("distort", OF_ANY_MODEL.values(), ids=OF_ANY_MODEL)
def test_a_distorted_model_moves_whole_and_shares_the_parameters(distort):
    model = network(EOS, torch.float32)
    distorted = distort(model)
    assert {id(p) for p in distorted.parameters()} == {id(p) for p in model.parameters()}
    assert distorted(EOS.all_tokens()).dtype == torch.float64
    rows = EOS.all_tokens().to("meta")
    assert distorted.to("meta")(rows).device.type == "meta"


def test_a_mixture_keeps_the_digits_of_its_weights_in_half_precision():
    model = mixture([UniformToy(EOS), half_table(EOS)], [0.1, 0.9]).half()
    never_in_the_table = float(sequence_log_probs(model, EOS.all_tokens()[1:2]).detach().exp())
    assert never_in_the_table == pytest.approx(0.1 / 9, rel=1e-12)


# distributions


@pytest.mark.parametrize("space", [EOS, FIXED], ids=["eos", "no-eos"])
@pytest.mark.parametrize(("distort", "by_hand"), KINDS.values(), ids=KINDS)
def test_sequences_have_the_probabilities_of_the_definition(distort, by_hand, space):
    model = BigramToy(space)
    distorted = distort(model)
    support = enumerate_support(distorted)
    seen = dict(
        zip(map(tuple, support.tokens.tolist()), support.log_weights.exp().tolist(), strict=True)
    )
    assert seen == pytest.approx(sequences_by_hand(model, by_hand), rel=1e-12)


def test_a_mixture_is_the_weighted_sum_over_whole_sequences():
    """Not of next-token laws: after a prefix that only one model gives, that model speaks alone."""
    for space in SPACES.values():
        parts = BigramToy(space), half_table(space)
        rows = space.all_tokens()
        first, second = (sequence_log_probs(part, rows).exp() for part in parts)
        seen = sequence_log_probs(mixture(parts, [0.3, 0.7]), rows).exp()
        assert torch.allclose(seen, 0.3 * first + 0.7 * second, rtol=1e-12, atol=0)


TIED = (0.1, 0.3, 0.3, 0.2, 0.1)


@pytest.mark.parametrize(
    ("distort", "kept"),
    [
        (lambda m: top_k(m, 1), {1}),
        (lambda m: top_k(m, 2), {1, 2}),
        (lambda m: top_k(m, 4), {0, 1, 2, 3}),
        (lambda m: top_k(m, 10**30), {0, 1, 2, 3, 4}),
        (lambda m: nucleus(m, 1e-20), {1}),
        (lambda m: nucleus(m, 0.3), {1}),
        (lambda m: nucleus(m, 0.3000001), {1, 2}),
        (lambda m: nucleus(m, 0.8), {1, 2, 3}),  # .3 + .3 + .2 up to rounding
        (lambda m: nucleus(m, 0.9), {0, 1, 2, 3}),
        (lambda m: nucleus(m, 1), {0, 1, 2, 3, 4}),
    ],
)
def test_ties_go_to_the_lower_id_and_exactly_as_many_are_kept_as_asked_for(distort, kept):
    seen = next_token_probs(distort(next_token_model(*TIED)))
    assert seen == pytest.approx(renormalised(TIED, kept), rel=1e-12)


def test_a_nucleus_that_rounding_would_widen_is_whole():
    for p, probs in [(0.7, (0.4, 0.3, 0.2, 0.1)), (0.9, (0.1,) * 10), (2 / 3, (1 / 3,) * 3)]:
        count = round(p * len(probs)) if len(set(probs)) == 1 else 2
        assert sum(q > 0 for q in next_token_probs(nucleus(next_token_model(*probs), p))) == count


def test_all_of_a_model_is_kept_also_where_its_mass_is_below_a_float():
    space = words(3, 1, eos=False)
    faint = SequenceTable(space, space.all_tokens(), torch.tensor([0.0, -800, -INF]).double())
    for whole in (nucleus(faint, 1), top_k(faint, 3), tempered(faint, 1)):
        assert sequence_log_probs(whole, space.all_tokens()).tolist() == [0, -800, -INF]


def test_extreme_temperatures_have_their_limits_and_no_nan():
    model = next_token_model(0.4, 0.4, 0.2, 0.0)
    assert next_token_probs(tempered(model, 5e-324)) == [0.5, 0.5, 0, 0]
    assert next_token_probs(tempered(model, 1e300)) == pytest.approx([1 / 3] * 3 + [0])
    model.logits.data = torch.tensor([1e308, 1e308, 0.0, -1e308], dtype=torch.float64)
    assert next_token_probs(tempered(model, 0.01)) == [0.5, 0.5, 0, 0]


# exact KL to the model, by the package's own comparison


def reward(tokens, prompt):
    return torch.zeros(len(tokens))


def exact_kl(distorted, model):
    """KL(μ‖π), KL(π‖μ) and the mass of π that μ never gives, from `compare`: at λ = inf the
    posterior is the prior.
    """
    target = klrl.posterior(klrl.Problem(model, reward, INF))
    seen = klrl.compare(distorted, target)
    assert seen.kl_to_prior == pytest.approx(seen.reverse_kl, rel=1e-12)
    return seen.reverse_kl, seen.forward_kl, seen.uncovered_mass


def kl_by_hand(p, q):
    return math.fsum((math.log(p[y] / q[y]) if q.get(y) else INF) * p[y] for y in p if p[y] > 0)


@pytest.mark.parametrize("space", [EOS, FIXED], ids=["eos", "no-eos"])
@pytest.mark.parametrize("name", [*KINDS, "mixture"])
def test_compare_gives_the_exact_kl_to_the_model(name, space):
    model = BigramToy(space)
    mine = sequences_by_hand(model, lambda law: law)
    if name == "mixture":
        half = sequences_by_hand(half_table(space), lambda law: law)
        theirs = {y: 0.75 * p + 0.25 * half.get(y, 0.0) for y, p in mine.items()}
    else:
        theirs = sequences_by_hand(model, KINDS[name][1])
    never = math.fsum(p for y, p in mine.items() if y not in theirs)
    expected = kl_by_hand(theirs, mine), kl_by_hand(mine, theirs), never
    assert exact_kl(DISTORTED[name](model), model) == pytest.approx(expected, rel=1e-11)
    assert (expected[1] == INF) == (never > 0) == (name in ("top-k", "nucleus"))


def test_the_kl_of_a_truncation_is_the_log_of_the_mass_it_keeps():
    """KL(μ‖π) = −log π(kept), of single tokens."""
    model = next_token_model(0.4, 0.3, 0.2, 0.1)
    assert exact_kl(top_k(model, 3), model) == pytest.approx((-math.log(0.9), INF, 0.1))
    assert exact_kl(nucleus(model, 0.5), model) == pytest.approx((-math.log(0.7), INF, 0.3))


# gradients, text, refusals


@pytest.mark.parametrize("distort", OF_ANY_MODEL.values(), ids=OF_ANY_MODEL)
def test_a_row_without_mass_where_eos_is_forced_sends_no_nan(distort):
    model = DeadLastRow()
    distorted = distort(model)
    tokens = model.space.all_tokens()
    assert enumerate_support(distorted).log_evidence.item() == pytest.approx(0, abs=1e-12)
    log_probs = sequence_log_probs(distorted, tokens)
    log_probs[log_probs > -INF].sum().backward()
    check_language_model(distorted)
    assert torch.isfinite(model.logits.grad).all()


@pytest.mark.parametrize("distort", DISTORTED.values(), ids=DISTORTED)
def test_gradients_pass_to_the_model_and_agree_with_differences(distort):
    model = BigramToy(words(2, 2))
    distorted = distort(model)
    tokens = enumerate_support(distorted).tokens
    weight = torch.linspace(-1, 2, len(tokens), dtype=torch.float64)

    def score(value):
        with torch.no_grad():
            model.weight.copy_(value)
        return sequence_log_probs(distorted, tokens) @ weight

    at, step = model.weight.detach().clone(), 1e-6
    (gradient,) = torch.autograd.grad(score(at), model.weight)
    for place in ((3, 0), (0, 1)):
        moved = torch.zeros_like(at)
        moved[place] = step
        difference = (score(at + moved) - score(at - moved)) / (2 * step)
        assert float(gradient[place]) == pytest.approx(difference.item(), abs=1e-8)


def test_print_says_what_a_distorted_model_is():
    model = next_token_model(0.4, 0.6)
    inner = "SequenceTable(2 sequences, H = 0.673 nats, 2 words, T = 1, no EOS)"
    texts = {
        tempered(model, 0.6): f"TemperedModel({inner}, temperature 0.6)",
        top_k(model, 1): f"TopKModel({inner}, top 1)",
        nucleus(model, 0.9): f"NucleusModel({inner}, nucleus 0.9)",
        mixture([model, model], [0.25, 0.75]): f"MixtureModel(0.25 of {inner}, 0.75 of {inner},"
        " 2 words, T = 1, no EOS)",
    }
    for distorted, text in texts.items():
        assert str(distorted) == repr(distorted) == text


@pytest.mark.parametrize("bad", [math.nan, INF, -INF, -1, 0, 0.0, True, 1j, "1", None, 10**400])
def test_temperatures_and_masses_that_are_none_are_refused(bad):
    model = next_token_model(0.4, 0.6)
    with pytest.raises(InputError, match=r"^temperature = .* must be above 0 and finite"):
        tempered(model, bad)
    with pytest.raises(InputError, match=r"^p = .* must be above 0 and at most 1"):
        nucleus(model, bad)
    with pytest.raises(InputError, match=r"^k = .* must be a whole number of at least 1"):
        top_k(model, -1 if bad == 10**400 else bad)


def test_mixtures_of_what_does_not_belong_together_are_refused():
    model = next_token_model(0.4, 0.6)
    with pytest.raises(InputError, match="at least one model"):
        mixture([], [])
    with pytest.raises(InputError, match="models live on different spaces"):
        mixture([model, next_token_model(0.2, 0.3, 0.5)], [0.5, 0.5])
    with pytest.raises(InputError, match="weights has 1 entries for 2 models"):
        mixture([model, model], [1.0])
    with pytest.raises(InputError, match="weights sum to 2, not 1"):
        mixture([model, model], [1, 1])
    assert mixture([model, model], [1, 3], normalize=True).weights == (0.25, 0.75)
    with pytest.raises(InputError, match="expected a model"):
        mixture([model, 3], [0.5, 0.5])
    for distort in (lambda m: tempered(m, 1), lambda m: top_k(m, 1), lambda m: nucleus(m, 1)):
        with pytest.raises(InputError, match="model is the text 'model'; expected a model"):
            distort("model")
