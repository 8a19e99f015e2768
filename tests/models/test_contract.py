"""The contract's functions: sampling, enumeration, restriction, prompts; and every model held to
the laws.
"""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu.core.draws import enumerate_executions, seeded_draw
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.contract import (
    LanguageModel,
    conditional_log_probs,
    enumerate_support,
    force_eos,
    readable_count,
    sample,
    sequence_log_probs,
    token_log_probs,
)
from klrl_edu.models.hmm import HiddenMarkovModel
from klrl_edu.models.ngram import NGramModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.testing import (
    assert_samples_from,
    check_language_model,
    example_tokens,
    policies,
    problems,
    sequence_tables,
    spaces,
)
from tests.models.toys import BigramToy, PromptedToy, UniformToy, words

INF = math.inf
SPACES = {
    "eos": words(2, 3),
    "no-eos": words(3, 3, eos=False),
    "one-word": words(1, 2),
    "one-token": words(3, 1, eos=False),
}


def some_table(space: SequenceSpace, zeros: bool = True) -> SequenceTable:
    """A table on every fifth sequence of a space, so that prefixes are out of reach; with `zeros`,
    its first row (of several) has mass 0.
    """
    tokens = space.all_tokens()[::5]
    logits = torch.linspace(-1, 2, len(tokens), dtype=torch.float64)
    if zeros and len(tokens) > 1:
        logits[0] = -INF
    return SequenceTable(space, tokens, logits)


def random_prefix_table(space: SequenceSpace) -> PrefixTable:
    table = PrefixTable(space)
    logits = torch.randn(
        table.logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return PrefixTable(space, None, logits)


def small_rnn(
    space: SequenceSpace,
    cell: str = "lstm",
    layers: int = 1,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> RecurrentModel:
    return RecurrentModel(space, cell=cell, hidden_size=6, layers=layers, seed=seed, dtype=dtype)


def small_transformer(
    space: SequenceSpace, dtype: torch.dtype = torch.float64, seed: int = 0, max_prompt: int = 0
) -> TransformerModel:
    model = TransformerModel(
        space, width=8, heads=2, layers=2, max_prompt=max_prompt, seed=seed, dtype=dtype
    )
    with torch.no_grad():  # embeddings of 0.02 make logits too alike for a law to notice much
        for embedding in (model.token_embedding, model.position_embedding):
            embedding.weight.mul_(50)
    return model


MODELS = {
    "sequence-table": lambda space: some_table(space, zeros=False),
    "sequence-table-with-zeros": some_table,
    "prefix-table": random_prefix_table,
    "prefix-table-of-few": lambda space: PrefixTable(space, space.all_tokens()[:2]),
    "bigram": BigramToy,
    "uniform": UniformToy,
    "lstm": small_rnn,
    "lstm-2-layers": lambda space: small_rnn(space, layers=2),
    "lstm-float32": lambda space: small_rnn(space, dtype=torch.float32),
    "gru": lambda space: small_rnn(space, "gru"),
    "gru-2-layers": lambda space: small_rnn(space, "gru", 2),
    "gru-float32": lambda space: small_rnn(space, "gru", dtype=torch.float32),
    "transformer": small_transformer,
    "transformer-float32": lambda space: small_transformer(space, torch.float32),
    "restricted-bigram": lambda space: restrict_to_support(BigramToy(space), some_table(space)),
    "restricted-lstm": lambda space: restrict_to_support(small_rnn(space), some_table(space)),
    "restricted-transformer-float32": lambda space: restrict_to_support(
        small_transformer(space, torch.float32), some_table(space)
    ),
    "restricted-twice": lambda space: restrict_to_support(
        restrict_to_support(BigramToy(space), some_table(space, False)), some_table(space)
    ),
}
EXACT = [name for name in MODELS if "float32" not in name]


def distribution_by_forward(
    model: LanguageModel, prompt: torch.Tensor | None = None
) -> dict[tuple[int, ...], float]:
    """Every sequence's log-probability by chaining plain softmaxes of `forward` in Python; zero
    mass left out.
    """
    space, out = model.space, {}
    rows = space.all_tokens()
    logits = model(rows, None if prompt is None else prompt.expand(len(rows), -1)).detach().double()
    for row, table in zip(rows.tolist(), logits, strict=True):
        total = 0.0
        for t, token in enumerate(row):
            if space.eos and (t == space.max_length - 1 or space.eos_id in row[:t]):
                continue  # forced
            total += float(table[t, token]) - float(torch.log(torch.exp(table[t]).sum()))
        if total > -INF:
            out[tuple(row)] = total
    return out


def as_dict(tokens: torch.Tensor, log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    return dict(zip(map(tuple, tokens.tolist()), log_probs.tolist(), strict=True))


# laws


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_model_keeps_every_law(build, space):
    check_language_model(build(space))


@given(problem=problems(max_length=4), data=st.data())
def test_random_tables_and_policies_keep_every_law(problem, data):
    check_language_model(problem.prior)
    check_language_model(data.draw(policies(problem)))


PROMPTED = {
    "toy": PromptedToy,
    "lstm": lambda space: small_rnn(space, layers=2),
    "gru": lambda space: small_rnn(space, "gru"),
    "transformer": lambda space: small_transformer(space, max_prompt=3),
    "lstm-float32": lambda space: small_rnn(space, dtype=torch.float32),
    "restricted-transformer": lambda space: restrict_to_support(
        small_transformer(space, max_prompt=3), some_table(space, False)
    ),
}


@pytest.mark.parametrize("space", [SPACES["eos"], SPACES["no-eos"]], ids=["eos", "no-eos"])
@pytest.mark.parametrize("build", PROMPTED.values(), ids=PROMPTED)
def test_prompted_models_keep_every_law_with_and_without_left_padding(build, space):
    model = build(space)
    tokens = example_tokens(space)
    rows = torch.tensor([[-1, -1, 1], [0, 1, 1], [-1, 1, 0], [-1, -1, -1]]).repeat(len(tokens), 1)[
        : len(tokens)
    ]
    check_language_model(model, torch.tensor([1, 0]))
    check_language_model(model, torch.tensor([-1, 1, 0]))
    check_language_model(model, rows, tokens=tokens)


@pytest.mark.parametrize("build", PROMPTED.values(), ids=PROMPTED)
def test_left_padding_changes_nothing_and_the_prompt_does(build):
    model = build(SPACES["eos"])
    tokens = SPACES["eos"].all_tokens()
    logits = model(tokens, torch.tensor([[1, 0]]).expand(len(tokens), -1))
    padded = model(tokens, torch.tensor([[-1, 1, 0]]).expand(len(tokens), -1))
    tolerance = 1e-12 if logits.dtype == torch.float64 else 1e-5
    assert torch.allclose(padded, logits, rtol=tolerance, atol=tolerance)
    mixed = model(
        tokens[:2], torch.tensor([[-1, 1, 0], [1, 1, 0]])
    )  # padding beside a row that has none
    assert torch.allclose(mixed[0], logits[0], rtol=tolerance, atol=tolerance)
    for other in (model(tokens, torch.tensor([[1, 1]]).expand(len(tokens), -1)), model(tokens)):
        assert (
            other.softmax(-1) - logits.softmax(-1)
        ).abs().max() > 10 * tolerance + 1e-4  # far beyond what padding may change


@pytest.mark.parametrize("build", PROMPTED.values(), ids=PROMPTED)
def test_a_prompt_of_padding_only_is_no_prompt(build):
    model = build(SPACES["eos"])
    tokens = SPACES["eos"].all_tokens()
    assert torch.allclose(
        model(tokens, torch.full((len(tokens), 2), -1)), model(tokens), rtol=1e-6, atol=1e-6
    )


# log-probabilities


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("name", EXACT)
def test_sequence_log_probs_chain_the_softmaxes_and_sum_to_one(name, space):
    model = MODELS[name](space)
    tokens = space.all_tokens()
    seen = as_dict(tokens, sequence_log_probs(model, tokens))
    assert {row: value for row, value in seen.items() if value > -INF} == pytest.approx(
        distribution_by_forward(model), rel=1e-12, abs=1e-12
    )
    assert math.fsum(map(math.exp, seen.values())) == pytest.approx(1, abs=1e-12)


def test_token_log_probs_are_zero_after_the_first_eos():
    tokens = torch.tensor([[0, 2, 2], [2, 2, 2]])
    log_probs = token_log_probs(BigramToy(SPACES["eos"]), tokens)
    assert (log_probs != 0).tolist() == [[True, True, False], [True, False, False]]


def test_float32_logits_are_upcast_before_the_softmax():
    assert (
        conditional_log_probs(
            MODELS["gru-float32"](SPACES["eos"]), SPACES["eos"].all_tokens()
        ).dtype
        == torch.float64
    )


def test_tokens_and_prompts_of_a_wrong_shape_are_refused():
    model = PromptedToy(SPACES["eos"])
    with pytest.raises(InputError, match=r"tokens\[0, 2\] = 0 does not belong"):
        sequence_log_probs(model, torch.tensor([[0, 0, 0]]))
    with pytest.raises(InputError, match=r"prompt has shape \[3, 1\]; expected \[S\] or \[2, S\]"):
        sequence_log_probs(
            model, SPACES["eos"].all_tokens()[:2], torch.zeros(3, 1, dtype=torch.long)
        )
    with pytest.raises(InputError, match=r"prompts has shape \[1\]"):
        sample(model, 2, draw=seeded_draw(0), prompts=torch.zeros(1, dtype=torch.long))


def test_a_forward_of_the_wrong_shape_is_named():
    class Short(UniformToy):
        def forward(self, tokens, prompt=None):
            return super().forward(tokens)[:, :-1]

    with pytest.raises(
        InputError, match=r"Short.forward gave shape .* expected \[N, T, V\] = \[7, 3, 3\]"
    ):
        sequence_log_probs(Short(SPACES["eos"]), SPACES["eos"].all_tokens())


# sampling


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("space", [SPACES["eos"], SPACES["no-eos"]], ids=["eos", "no-eos"])
def test_every_execution_of_sample_gives_the_distribution(name, space):
    model = MODELS[name](space)
    outcomes = enumerate_executions(lambda draw: tuple(sample(model, 1, draw=draw)[0].tolist()))
    assert len(outcomes) == len({outcome.result for outcome in outcomes})
    assert dict(outcomes) == pytest.approx(distribution_by_forward(model), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("space", [SPACES["eos"], SPACES["no-eos"]], ids=["eos", "no-eos"])
def test_many_samples_that_share_their_prefixes_have_the_distribution(space):
    model = BigramToy(space)
    assert_samples_from(model.sample, model)


def test_every_execution_of_two_samples_gives_the_product():
    model = BigramToy(words(1, 3))
    one = distribution_by_forward(model)
    outcomes = enumerate_executions(
        lambda draw: tuple(map(tuple, sample(model, 2, draw=draw).tolist()))
    )
    expected = {(a, b): one[a] + one[b] for a, b in itertools.product(one, one)}
    assert dict(outcomes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("build", [PROMPTED["toy"], PROMPTED["gru"], PROMPTED["transformer"]])
def test_every_execution_with_prompts_gives_each_prompts_distribution_grouped_by_prompt(build):
    model = build(words(1, 2))
    prompts = torch.tensor([[-1, 0], [0, 1]])
    per_prompt = [distribution_by_forward(model, prompt) for prompt in prompts]
    outcomes = enumerate_executions(
        lambda draw: tuple(map(tuple, sample(model, 2, draw=draw, prompts=prompts).tolist()))
    )
    expected = {
        (a, b, c, d): per_prompt[0][a] + per_prompt[0][b] + per_prompt[1][c] + per_prompt[1][d]
        for a, b, c, d in itertools.product(*per_prompt[:1] * 2, *per_prompt[1:] * 2)
    }
    assert dict(outcomes) == pytest.approx(expected, rel=1e-12)


def test_sample_stops_once_all_have_ended_and_fills_up_with_eos():
    steps = []

    class Counting(UniformToy):
        def step(self, state, token):
            steps.append(1)
            return super().step(state, token)

    tokens = sample(
        Counting(words(2, 50)), 3, draw=lambda log_probs, rows: torch.full((len(rows),), 2)
    )
    assert torch.equal(tokens, torch.full((3, 50), 2))
    assert not steps


def test_the_method_sample_takes_one_prompt():
    model = PromptedToy(SPACES["eos"])
    prompt = torch.tensor([1, 0])
    expected = sample(model, 4, draw=seeded_draw(0), prompts=prompt[None])
    assert torch.equal(model.sample(4, draw=seeded_draw(0), prompt=prompt), expected)
    assert torch.equal(
        model.log_prob(expected, prompt), sequence_log_probs(model, expected, prompt)
    )


# enumeration


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("name", EXACT)
def test_enumerate_support_lists_what_has_mass_in_lexicographic_order(name, space):
    model = MODELS[name](space)
    support = enumerate_support(model)
    assert support.exact
    assert support.tokens.tolist() == sorted(support.tokens.tolist())
    assert as_dict(support.tokens, support.log_weights) == pytest.approx(
        distribution_by_forward(model), rel=1e-12, abs=1e-12
    )
    assert torch.allclose(
        support.log_weights, sequence_log_probs(model, support.tokens), rtol=1e-12, atol=1e-12
    )


@given(space=spaces(max_length=4), data=st.data())
def test_the_support_of_a_table_is_its_rows_with_mass(space, data):
    table = data.draw(sequence_tables(space, extremes=True))
    rows = table.tokens[table.log_probs > -INF].tolist()
    assert enumerate_support(table, max_sequences=len(rows)).tokens.tolist() == sorted(rows)


def test_enumerate_support_reads_the_prompt():
    model = PromptedToy(SPACES["eos"])
    prompt = torch.tensor([1, 1])
    support = enumerate_support(model, prompt=prompt)
    assert as_dict(support.tokens, support.log_weights) == pytest.approx(
        distribution_by_forward(model, prompt), rel=1e-12
    )


def test_blocks_of_one_prefix_give_the_same_support(monkeypatch):
    model = small_transformer(SPACES["no-eos"])
    whole = enumerate_support(model)
    monkeypatch.setattr("klrl_edu.models.contract._BLOCK_ENTRIES", 1)
    assert torch.equal(enumerate_support(model).tokens, whole.tokens)
    assert torch.allclose(
        enumerate_support(model).log_weights, whole.log_weights, rtol=1e-12, atol=1e-12
    )


def test_twenty_sentences_over_thirty_words_cost_twenty_sequences(monkeypatch):
    space = SequenceSpace(tuple(f"w{i}" for i in range(30)), 9, eos=False)
    tokens = torch.randint(30, (20, 9), generator=torch.Generator().manual_seed(0))
    table, rows = SequenceTable(space, tokens, torch.zeros(20)), []
    inner = SequenceTable.step
    monkeypatch.setattr(
        SequenceTable,
        "step",
        lambda self, state, token: rows.append(len(token)) or inner(self, state, token),
    )
    support = enumerate_support(table, max_sequences=20)
    assert support.tokens.tolist() == sorted(tokens.tolist())
    assert support.log_weights.tolist() == pytest.approx([-math.log(20)] * 20, rel=1e-14)
    assert sum(rows) <= 20 * 8


@pytest.mark.parametrize("eos", [True, False])
def test_a_support_one_larger_than_allowed_is_refused_and_its_size_is_not(eos):
    model = UniformToy(words(3, 3, eos))
    assert len(enumerate_support(model, max_sequences=model.space.size)) == model.space.size
    with pytest.raises(
        TooLargeError,
        match=f"max_sequences = {model.space.size - 1} .*the whole space: {model.space.size}",
    ):
        enumerate_support(model, max_sequences=model.space.size - 1)


def test_a_vocabulary_of_50257_is_refused_with_its_count_before_many_logits_are_made():
    read = []

    class Watched(UniformToy):
        def step(self, state, token):
            read.append(len(token))
            return super().step(state, token)

    space = SequenceSpace(tuple(map(str, range(50257))), 20)
    with pytest.raises(
        TooLargeError, match=r"more than max_sequences = 1,000,000 .*the whole space: about 10\^89"
    ):
        enumerate_support(Watched(space))
    assert (
        sum(read) * space.vocab_size < 3_000_000
    )  # logits, where reading all first words at once would make 2.5 billion


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (7, "7"),
        (10**15 - 1, "999,999,999,999,999"),
        (10**15, "about 10^15"),
        (50257**20, "about 10^94"),
    ],
)
def test_counts_are_exact_up_to_fifteen_digits(count, text):
    assert readable_count(count) == text


def test_a_model_of_nan_has_no_support():
    model = BigramToy(SPACES["eos"])
    with torch.no_grad():
        model.weight[1] = math.nan
    with pytest.raises(InputError, match="BigramToy gives NaN logits after 1 tokens"):
        enumerate_support(model)


# restriction


def test_a_restricted_policy_is_its_token_wise_renormalisation_with_mass_exactly_zero_elsewhere():
    space = SPACES["no-eos"]
    policy, reference = BigramToy(space), some_table(space)
    restricted = distribution_by_forward(restrict_to_support(policy, reference))
    allowed = {tuple(row) for row in enumerate_support(reference).tokens.tolist()}
    expected = {}
    for row in allowed:
        total = 0.0
        for t in range(space.max_length):
            logits = policy.weight[row[t - 1] if t else space.vocab_size].detach()
            options = {other[t] for other in allowed if other[:t] == row[:t]}
            total += float(logits[row[t]]) - math.log(
                sum(math.exp(float(logits[v])) for v in options)
            )
        expected[row] = total
    assert restricted == pytest.approx(expected, rel=1e-12)
    log_probs = sequence_log_probs(restrict_to_support(policy, reference), space.all_tokens())
    assert (log_probs.exp() == 0).sum() == space.size - len(allowed)


def test_prefixes_out_of_reach_are_uniform_and_gradients_stay_finite():
    space = words(2, 2, eos=False)
    reference = SequenceTable.from_texts({"a a": 1.0}, space=space)
    policy = random_prefix_table(space)
    restricted = restrict_to_support(policy, reference)
    tokens = space.all_tokens()
    log_probs = conditional_log_probs(restricted, tokens)
    assert log_probs[2:, 1].exp().flatten().tolist() == pytest.approx(
        [0.5] * 4, rel=1e-14
    )  # after "b"
    assert sequence_log_probs(restricted, tokens).tolist() == [0.0, -INF, -INF, -INF]
    sequence_log_probs(restricted, tokens[:1]).sum().backward()
    assert policy.logits.grad is not None
    assert torch.isfinite(policy.logits.grad).all()


def test_a_restricted_policy_shares_its_policys_parameters_and_not_its_references():
    space = SPACES["no-eos"]
    policy, reference = BigramToy(space), some_table(space)
    restricted = restrict_to_support(policy, reference)
    assert [id(p) for p in restricted.parameters()] == [id(policy.weight)]
    assert restricted.reference is reference


def test_a_policy_and_a_reference_of_different_spaces_are_refused():
    with pytest.raises(InputError, match="different spaces"):
        restrict_to_support(BigramToy(words(2, 2)), some_table(words(2, 3)))


@pytest.mark.parametrize("n", [2, 3, 7, 300])
@pytest.mark.parametrize("name", ["lstm", "transformer"])
@pytest.mark.parametrize(
    "space", [words(3, 5), SequenceSpace(("a", "b", "c"), 5, eos=False)], ids=["eos", "no eos"]
)
def test_sharing_prefixes_changes_no_token(space, name, n):
    build = {"lstm": RecurrentModel, "transformer": TransformerModel}[name]
    model = build(space, seed=1)
    for seed in range(20):
        draw = seeded_draw(seed)
        logits, state = model.start(n)
        ended, columns = torch.zeros(n, dtype=torch.bool), []
        for t in range(space.max_length):
            token = draw(force_eos(logits, ended, t == space.max_length - 1, space), None)
            columns.append(token)
            ended = ended | (token == space.eos_id) if space.eos else ended
            if t < space.max_length - 1:
                logits, state = model.step(state, token)
        assert torch.equal(sample(model, n, draw=seeded_draw(seed)), torch.stack(columns, 1))


SHOWN = SequenceSpace(("a", "b"), 3)
TABLE = SequenceTable.from_texts({"a": 0.5, "a b": 0.5}, space=SHOWN)
PRINTED = {
    "SequenceTable(2 sequences, H = 0.6931 nats, 2 words, T = 3, EOS)": TABLE,
    "PrefixTable(2 sequences, 3 prefixes, 2 words, T = 3, EOS)": PrefixTable(SHOWN, TABLE.tokens),
    "NGramModel(order 2, 3 contexts, 2 words, T = 3, EOS)": NGramModel(SHOWN, 2),
    "HiddenMarkovModel(4 hidden contexts, 2 words, T = 3, EOS)": HiddenMarkovModel.random(SHOWN, 4),
    "RecurrentModel(gru, 1 × 4 units, 151 parameters, 2 words, T = 3, EOS)": RecurrentModel(
        SHOWN, cell="gru", hidden_size=4
    ),
    "BigramToy(12 parameters, 2 words, T = 3, EOS)": BigramToy(SHOWN),
    "SequenceTable(1 sequence, H = 0 nats, 2 words, T = 3, EOS, prompt 'b a')": (
        SequenceTable.from_texts({"a": 1.0}, space=SHOWN).for_prompt(torch.tensor([-1, 1, 0]))
    ),
}


@pytest.mark.parametrize(("text", "model"), PRINTED.items(), ids=[*map(repr, PRINTED.values())])
def test_a_printed_model_says_what_it_is(text, model):
    assert repr(model) == str(model) == text


def test_wrapped_models_name_what_they_wrap_and_a_model_without_space_prints_too():
    policy = restrict_to_support(BigramToy(SHOWN), TABLE)
    assert repr(policy) == (
        f"RestrictedModel({BigramToy(SHOWN)!r}, on the support of {TABLE!r}, 2 words, T = 3, EOS)"
    )
    assert repr(LanguageModel()) == "LanguageModel(0 parameters)"
    broken = SequenceTable(SHOWN, TABLE.tokens, torch.zeros(2, dtype=torch.float64))
    broken.logits.data.fill_(math.nan)
    assert "H = nan nats" in repr(broken)


class NanAfter(BigramToy):
    """Gives NaN, or +inf, after word 1."""

    def __init__(self, space, bad):
        super().__init__(space)
        self.bad = bad

    def forward(self, tokens, prompt=None):
        return torch.where(self.previous(tokens)[..., None] == 1, self.bad, super().forward(tokens))


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_log_probabilities_of_nan_are_refused_and_those_without_are_not(bad):
    model, space = NanAfter(SPACES["no-eos"], bad), SPACES["no-eos"]
    with pytest.raises(InputError, match="NanAfter gives NaN log-probabilities"):
        sequence_log_probs(model, space.encode(["a a a", "b a a"]))
    with pytest.raises(InputError, match="NanAfter gives NaN log-probabilities"):
        model.log_prob(space.encode(["c b c"]))
    assert torch.isfinite(token_log_probs(model, space.encode(["a a a", "c a b"]))).all()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.tensor([-5]), "is none: ids run from 0, and -1 is padding on the left"),
        (torch.tensor([[0, -1]]), "is none"),
        (torch.tensor([0.5]), "prompt is a tensor .*; expected token ids"),
        ([0], "prompt is a list of int; expected token ids"),
    ],
)
@pytest.mark.parametrize("ask", [token_log_probs, conditional_log_probs])
def test_a_prompt_that_is_none_is_refused(ask, prompt, message):
    model = small_rnn(SPACES["eos"])
    with pytest.raises(InputError, match=message):
        ask(model, SPACES["eos"].all_tokens()[:1], prompt)


@pytest.mark.parametrize("build", [small_rnn, partial(small_transformer, max_prompt=2)])
def test_a_prompt_with_an_id_beyond_the_space_is_refused(build):
    model = build(SPACES["eos"])
    with pytest.raises(InputError, match="holds the id 3, which is no token"):
        model.sample(1, draw=seeded_draw(0), prompt=torch.tensor([0, 3]))
    model.sample(1, draw=seeded_draw(0), prompt=torch.tensor([0, 2]))


@pytest.mark.parametrize(
    "build",
    [
        lambda logits: SequenceTable(SPACES["one-token"], SPACES["one-token"].all_tokens(), logits),
        lambda logits: PrefixTable(SPACES["one-token"], None, logits[None]),
        lambda logits: NGramModel(SPACES["one-token"], 1, logits[None]),
        lambda logits: HiddenMarkovModel(
            SPACES["one-token"], logits[:1], logits[None, :1], logits[None]
        ),
    ],
    ids=["sequence-table", "prefix-table", "n-gram", "hmm"],
)
def test_training_a_model_leaves_the_logits_that_it_was_made_of(build):
    logits = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in build(logits).parameters():
            parameter.add_(1)
    assert logits.tolist() == [0, 0, 0]


@pytest.mark.parametrize("build", PROMPTED.values(), ids=PROMPTED)
def test_the_first_word_is_a_prompt_and_no_padding(build):
    model, tokens = build(SPACES["eos"]), SPACES["eos"].all_tokens()
    read, without = (sequence_log_probs(model, tokens, p) for p in (torch.tensor([0]), None))
    assert not torch.allclose(read, without, atol=1e-4)
