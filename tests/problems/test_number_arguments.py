"""Every number that a public function of core, models and problems takes, at the edges of numbers:
it is used as it is, or refused by its name in one line.
"""

import math

import pytest
import torch

import klrl_edu as klrl
from klrl_edu.core.errors import InputError
from klrl_edu.models.distorted import mixture, nucleus, tempered, top_k
from klrl_edu.problems import automata
from klrl_edu.problems.corpora import surname_prior
from tests.models.toys import UniformToy, words

EDGES = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "0": 0,
    "true": True,
    "1e30": 1e30,
    "10^30": 10**30,
    "complex": 1j,
    "text": "1",
}
COUNT, COUNT_OR_NONE, LIMIT = set(), {"0"}, {"10^30"}
KL_COEF = {"inf", "0", "1e30", "10^30"}
FACTOR = {"-1", "0", "1e30", "10^30"}
VALUE = FACTOR | {"-inf", "true"}
SPACE = words(2, 3)
TOKENS = SPACE.all_tokens()
MODEL = UniformToy(SPACE)
SOME = automata.at_least("a", 1, SPACE)


def zero(tokens, prompt=None):
    return torch.zeros(len(tokens))


def automaton(start):
    moves = torch.zeros(2, 2, dtype=torch.long)
    return automata.Automaton(SPACE, moves, torch.tensor([True, False]), start, "")


# argument -> the call, and which edges it takes
CALLS = {
    "SequenceSpace.max_length": (lambda x: klrl.SequenceSpace(("a", "b"), x), COUNT),
    "SequenceSpace.eos": (lambda x: klrl.SequenceSpace(("a", "b"), 3, x), {"true"}),
    "all_tokens.max_sequences": (SPACE.all_tokens, LIMIT),
    "seeded_draw.seed": (klrl.seeded_draw, COUNT_OR_NONE),
    "enumerate_executions.max_executions": (
        lambda x: klrl.enumerate_executions(lambda draw: 1, x),
        LIMIT,
    ),
    "enumerate_support.max_sequences": (lambda x: klrl.enumerate_support(MODEL, x), LIMIT),
    "sample.n": (lambda x: MODEL.sample(x, draw=klrl.seeded_draw(0)), COUNT),
    "RecurrentModel.hidden_size": (lambda x: klrl.RecurrentModel(SPACE, hidden_size=x), COUNT),
    "RecurrentModel.layers": (lambda x: klrl.RecurrentModel(SPACE, layers=x), COUNT),
    "RecurrentModel.seed": (
        lambda x: klrl.RecurrentModel(SPACE, hidden_size=2, seed=x),
        COUNT_OR_NONE,
    ),
    "TransformerModel.width": (lambda x: klrl.TransformerModel(SPACE, width=x), COUNT),
    "TransformerModel.heads": (lambda x: klrl.TransformerModel(SPACE, heads=x), COUNT),
    "TransformerModel.layers": (lambda x: klrl.TransformerModel(SPACE, layers=x), COUNT),
    "TransformerModel.max_prompt": (
        lambda x: klrl.TransformerModel(SPACE, max_prompt=x),
        COUNT_OR_NONE,
    ),
    "NGramModel.order": (lambda x: klrl.NGramModel(SPACE, x), COUNT),
    "NGramModel.fit.order": (lambda x: klrl.NGramModel.fit(SPACE, ["a"], x), COUNT),
    "NGramModel.fit.concentration": (
        lambda x: klrl.NGramModel.fit(SPACE, ["a"], 1, smoothing="dirichlet", concentration=x),
        {"1e30", "10^30"},
    ),
    "NGramModel.fit.weights": (
        lambda x: klrl.NGramModel.fit(SPACE, ["a", "b"], 1, weights=[x, 1]),
        {"0", "1e30", "10^30"},
    ),
    "HiddenMarkovModel.random.states": (
        lambda x: klrl.HiddenMarkovModel.random(SPACE, x),
        COUNT,
    ),
    "HiddenMarkovModel.fit.steps": (
        lambda x: klrl.HiddenMarkovModel.fit(SPACE, ["a"], 1, steps=x).model,
        COUNT_OR_NONE,
    ),
    "SequenceTable.logits": (
        lambda x: klrl.SequenceTable(SPACE, TOKENS[:2], [x, 0]),
        VALUE,
    ),
    "SequenceTable.from_texts.probs": (
        lambda x: klrl.SequenceTable.from_texts(["a", "b"], [x, 1]),
        {"0"},
    ),
    "tempered.temperature": (lambda x: tempered(MODEL, x), {"1e30", "10^30"}),
    "top_k.k": (lambda x: top_k(MODEL, x), LIMIT),
    "nucleus.p": (lambda x: nucleus(MODEL, x), set()),
    "mixture.weights": (lambda x: mixture([MODEL, MODEL], [x, 1]), {"0"}),
    "Problem.kl_coef": (lambda x: klrl.Problem(MODEL, zero, x), KL_COEF),
    "four_sentences.kl_coef": (klrl.four_sentences, KL_COEF),
    "example.kl_coef": (lambda x: klrl.example("four-sentences", x), KL_COEF),
    "surname_prior.count": (surname_prior, COUNT),
    "table_reward.values": (
        lambda x: klrl.table_reward({"a": x}, SPACE),
        VALUE | {"nan", "inf"},
    ),
    "table_reward.default": (
        lambda x: klrl.table_reward({"a": 1}, SPACE, x),
        VALUE | {"nan", "inf"},
    ),
    "regex_reward.value": (lambda x: klrl.regex_reward("a", SPACE, x), VALUE),
    "regex_reward.otherwise": (lambda x: klrl.regex_reward("a", SPACE, 1, x), VALUE),
    "token_reward.values": (lambda x: klrl.token_reward([x, 0, 0], SPACE), VALUE),
    "count_reward.value": (lambda x: klrl.count_reward("a", SPACE, x), VALUE),
    "length_reward.value": (lambda x: klrl.length_reward(SPACE, x), VALUE),
    "repeat_reward.value": (lambda x: klrl.repeat_reward(SPACE, x), VALUE),
    "scale.factor": (lambda x: klrl.scale(klrl.count_reward("a", SPACE), x), FACTOR),
    "accept_reward.value": (lambda x: automata.accept_reward(SOME, x), VALUE),
    "accept_reward.otherwise": (lambda x: automata.accept_reward(SOME, 1, x), VALUE),
    "scaled.factor": (lambda x: automata.accept_reward(SOME).scaled(x), FACTOR),
    "Automaton.start": (automaton, COUNT_OR_NONE),
    "exactly.count": (lambda x: automata.exactly("a", x, SPACE), COUNT_OR_NONE),
    "at_least.count": (lambda x: automata.at_least("a", x, SPACE), COUNT_OR_NONE),
    "at_most.count": (lambda x: automata.at_most("a", x, SPACE), COUNT_OR_NONE),
    "length_between.low": (lambda x: automata.length_between(x, 2, SPACE), COUNT_OR_NONE),
    "length_between.high": (lambda x: automata.length_between(0, x, SPACE), COUNT_OR_NONE),
}


@pytest.mark.parametrize("argument", CALLS)
def test_a_number_is_used_as_it_is_or_refused_by_its_name_in_one_line(argument):
    call, taken = CALLS[argument]
    name = argument.rpartition(".")[2]
    for edge, value in EDGES.items():
        if edge in taken:
            assert_sound(call(value))
            continue
        with pytest.raises(InputError) as refusal:
            call(value)
        message = str(refusal.value)
        assert "\n" not in message
        assert name in message or "sum to" in message, (edge, message)
        assert len(message) < 300


def assert_sound(result):
    """A model is normalised, a reward gives numbers, and whatever else was made is there."""
    if isinstance(result, klrl.LanguageModel):
        log_probs = klrl.sequence_log_probs(result, result.space.all_tokens())
        assert float(log_probs.detach().exp().sum()) == pytest.approx(1, abs=1e-9)
    elif isinstance(result, klrl.Problem):
        assert math.isfinite(klrl.posterior(result).value)
    elif callable(result) and not isinstance(result, type(klrl.seeded_draw(0))):
        assert result(TOKENS).shape[0] == len(TOKENS)
    else:
        assert result is not None
