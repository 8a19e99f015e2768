"""Each law fails on a broken model of its own and names itself."""

import math

import pytest
import torch

from klrl_edu import testing
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.contract import LanguageModel, PrefixState, check_room
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import RestrictedModel
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.rewards import count_reward, length_reward, text_reward
from tests.models.toys import BigramToy, PromptedToy, words

INF = math.inf
SPACE = words(3, 4)


class NanAfterWordOne(BigramToy):
    def forward(self, tokens, prompt=None):
        return torch.where(self.previous(tokens)[..., None] == 1, math.nan, super().forward(tokens))


class Peeking(BigramToy):
    """Reads the token that it is to predict."""

    def forward(self, tokens, prompt=None):
        return self.weight[tokens]


class PeekingAtTheLength(BigramToy):
    """Reads how many words the whole sequence has."""

    def forward(self, tokens, prompt=None):
        return super().forward(tokens) + (tokens == 3).sum(1)[:, None, None] * self.weight[0]


class ForgetfulStep(BigramToy):
    """Decodes from the token before last."""

    def step(self, state, token):
        return super().step(state, state.tokens[:, -1] if state.tokens.shape[1] else token)


class ShuffledBranch(BigramToy):
    """Returns the children's logits in the order of the tokens, not of the parents."""

    def branch(self, state, tokens):
        logits, children = super().branch(state, tokens)
        return logits.reshape(tokens.shape[1], tokens.shape[0], -1).transpose(0, 1), children


class Remembering(BigramToy):
    """Sound: its logits add up over the whole prefix, so that a wrong state shows."""

    def forward(self, tokens, prompt=None):
        return super().forward(tokens).cumsum(1)


class ChildlessBranch(Remembering):
    """Right logits, but the children's state is that of the first token only."""

    def branch(self, state, tokens):
        logits, _ = super().branch(state, tokens)
        return logits, super().branch(state, tokens[:, -1:].expand_as(tokens))[1]


class BatchNormalised(BigramToy):
    """Centres its logits over the batch."""

    def forward(self, tokens, prompt=None):
        logits = super().forward(tokens)
        return logits - 0.1 * logits.mean(0)


class FirstRowsOnly(Remembering):
    """`select` keeps as many rows as asked for, but the first ones."""

    def select(self, state, index):
        return super().select(state, torch.arange(len(index)) % len(state.tokens))


class StepsInPlace(Remembering):
    """Writes the next token into the state it was given, so that a state cannot be used twice."""

    def start(self, n, prompt=None):
        tokens = torch.zeros(n, self.space.max_length, dtype=torch.long)
        return self(tokens)[:, 0], (tokens, 0)

    def step(self, state, token):
        tokens, position = state
        check_room(self.space, position + 1)
        tokens[:, position] = token
        return self(tokens)[:, position + 1], (tokens, position + 1)


class PaysAfterEos(BigramToy):
    """Its shortcut for chosen tokens does not know that EOS absorbs."""

    def token_log_prob(self, tokens, prompt=None):
        return self(tokens).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


class SamplesOn(BigramToy):
    """Samples words after EOS."""

    def sample(self, n, *, draw, prompt=None):
        tokens = torch.zeros(n, self.space.max_length, dtype=torch.long)
        for t in range(self.space.max_length):
            tokens[:, t] = draw(self(tokens)[:, t].log_softmax(-1).detach())
        return tokens


class SavesHalf(BigramToy):
    """Saves its weights in half precision."""

    def state_dict(self, *args, **kwargs):
        return {name: value.half() for name, value in super().state_dict(*args, **kwargs).items()}


class HidesAWeight(BigramToy):
    """Keeps its temperature in a plain attribute, where no state_dict sees it."""

    def __init__(self, space, seed=0):
        super().__init__(space, seed)
        self.temperature = 1.0 + seed

    def forward(self, tokens, prompt=None):
        return super().forward(tokens) / self.temperature


class StepsOn(BigramToy):
    """Knows no end."""

    def step(self, state, token):
        tokens = torch.cat([state.tokens, token[:, None]], 1)
        return self.weight[token], PrefixState(tokens, state.prompt)


class DetachedStep(BigramToy):
    """Decodes without a gradient after the first token, as a sampler written for speed would."""

    @torch.no_grad()
    def step(self, state, token):
        return super().step(state, token)


class DetachedDecoding(DetachedStep):
    """Decodes without a gradient."""

    @torch.no_grad()
    def start(self, n, prompt=None):
        return super().start(n, prompt)


class SilentStart(BigramToy):
    """Drops a prompt where decoding starts."""

    def start(self, n, prompt=None):
        return super().start(n)


class SilentSample(BigramToy):
    """Drops a prompt where it samples."""

    def sample(self, n, *, draw, prompt=None):
        return super().sample(n, draw=draw)


class TakesAnyPrompt(BigramToy):
    """Takes any prompt, and reads none."""

    def check_prompt(self, prompt):
        pass


class UnrestrictedStep(RestrictedModel):
    """Restricts in forward and not in decoding, as a training script might."""

    def start(self, n, prompt=None):
        return self.policy.start(n, prompt)

    def step(self, state, token):
        return self.policy.step(state, token)

    def select(self, state, index):
        return self.policy.select(state, index)


class PaddingIsAWord(PromptedToy):
    """Reads the prompt's padding as word 0, and so depends on how a batch was padded."""

    def forward(self, tokens, prompt=None):
        return super().forward(tokens, None if prompt is None else prompt.clamp(min=0))


BROKEN = [
    (NanAfterWordOne, testing.check_normalised, "normalised"),
    (Peeking, testing.check_causal, "causal: row t = 0"),
    (PeekingAtTheLength, testing.check_causal, "causal"),
    (ForgetfulStep, testing.check_decoding, "step ≡ forward: position 2"),
    (ShuffledBranch, testing.check_decoding, "branch ≡ forward"),
    (ChildlessBranch, testing.check_decoding, "branch ≡ forward"),
    (
        BatchNormalised,
        testing.check_rows_independent,
        r"rows independent of the batch: row \d alone",
    ),
    (FirstRowsOnly, testing.check_rows_independent, "rows reordered by select"),
    (StepsInPlace, testing.check_decoding, "step ≡ forward: position 2"),
    (PaysAfterEos, testing.check_eos_absorbs, "EOS forced and absorbing: token_log_prob"),
    (SamplesOn, testing.check_samples_belong, "EOS forced and absorbing: sample"),
    (SavesHalf, testing.check_state_dict, "state_dict round trip"),
    (
        DetachedStep,
        testing.check_decoding_gradient,
        "gradient of step ≡ forward: entry|gradient of step ≡ forward'",
    ),
    (DetachedDecoding, testing.check_decoding_gradient, "carry no gradient"),
    (SilentStart, testing.check_prompts, "start of SilentStart takes the prompt"),
    (SilentSample, testing.check_prompts, "sample of SilentSample takes the prompt"),
    (TakesAnyPrompt, testing.check_prompts, "TakesAnyPrompt reads none"),
    (StepsOn, testing.check_refuses_past_end, "stepping past T = 4 must raise InputError"),
]


@pytest.mark.parametrize(
    ("broken", "law", "message"), BROKEN, ids=[broken.__name__ for broken, _, _ in BROKEN]
)
def test_a_law_fails_on_its_broken_model_and_says_so(broken, law, message):
    law(BigramToy(SPACE))
    law(Remembering(SPACE))
    with pytest.raises(AssertionError, match=message):
        law(broken(SPACE))
    with pytest.raises(AssertionError):
        testing.check_language_model(broken(SPACE))


def test_a_weight_outside_the_state_dict_shows_on_a_fresh_model():
    with pytest.raises(AssertionError, match="state_dict round trip"):
        testing.check_state_dict(HidesAWeight(SPACE), fresh=lambda: HidesAWeight(SPACE, seed=1))
    testing.check_state_dict(BigramToy(SPACE), fresh=lambda: BigramToy(SPACE, seed=1))


def test_a_restriction_that_decoding_forgets_is_found():
    prior = SequenceTable.from_texts({"a": 0.5, "b c": 0.5}, space=SPACE)
    testing.check_language_model(RestrictedModel(BigramToy(SPACE), prior))
    with pytest.raises(AssertionError, match="step ≡ forward: start"):
        testing.check_language_model(UnrestrictedStep(BigramToy(SPACE), prior))


def test_a_model_that_samples_zero_mass_is_found():
    table = SequenceTable.from_texts({"a": 1.0, "b": 0.0}, space=SPACE)
    with pytest.raises(AssertionError, match=r"zero mass: \['b'\]"):
        testing.check_samples_belong(
            table,
            draw=lambda log_probs, rows: torch.full((len(rows),), 1 if log_probs[0, 0] == 0 else 3),
        )


def test_float32_gets_its_own_tolerance_and_a_given_one_counts():
    model = RecurrentModel(SPACE, hidden_size=8, dtype=torch.float32)
    testing.check_language_model(model)
    with pytest.raises(AssertionError, match="tolerance 1e-14"):
        testing.check_language_model(model, tolerance=1e-14)


def test_messages_name_model_law_entry_and_both_values():
    pattern = (
        r"Peeking breaks the law 'causal: row t = 0 .*': entry \[\d+, \d+\] is -?[\d.]+, expected"
        r" -?[\d.]+; tolerance 1e-12"
    )
    with pytest.raises(AssertionError, match=pattern):
        testing.check_causal(Peeking(SPACE))


# the law of rewards


class LooksAhead:
    """Pays a word for what follows it."""

    def __call__(self, tokens, prompt=None):
        return (tokens.roll(-1, 1) == 0).double() * (tokens < 3)


class PaysTheDead:
    def __call__(self, tokens, prompt=None):
        return torch.ones(tokens.shape, dtype=torch.float64)


class KnowsTheLength:
    """Pays one at the first token if the whole text has two words."""

    def __call__(self, tokens, prompt=None):
        out = torch.zeros(tokens.shape, dtype=torch.float64)
        out[:, 0] = ((tokens < 3).sum(1) == 2).double()
        return out


def test_causal_rewards_pass_and_may_forbid():
    testing.check_causal_reward(count_reward("a", SPACE), SPACE)
    testing.check_causal_reward(length_reward(SPACE, -0.5), SPACE)
    testing.check_causal_reward(count_reward("a", SPACE, -INF), SPACE)
    testing.check_causal_reward(count_reward("a", words(3, 3, eos=False)), words(3, 3, eos=False))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (LooksAhead(), "column 0 moved"),
        (KnowsTheLength(), "column 0 moved"),
        (PaysTheDead(), "after the first EOS"),
    ],
)
def test_rewards_that_are_not_causal_are_found(reward, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_causal_reward(reward, SPACE)


def test_a_whole_sequence_reward_is_not_a_causal_one():
    with pytest.raises(AssertionError, match=r"expected \[N, T\]"):
        testing.check_causal_reward(text_reward(len, SPACE), SPACE)


# example tokens


@pytest.mark.parametrize(
    "space",
    [
        words(2, 3),
        words(9, 6),
        words(9, 6, eos=False),
        SequenceSpace(tuple(map(str, range(50257))), 20),
    ],
)
def test_example_tokens_are_sequences_of_the_space_from_empty_to_full(space):
    tokens = space.check_tokens(testing.example_tokens(space))
    assert torch.equal(tokens, testing.example_tokens(space))
    assert len(tokens) == (space.size if space.size <= 64 else 24)
    if space.eos:
        lengths = (tokens != space.eos_id).sum(1)
        assert {0, space.max_length - 1} <= set(lengths.tolist())


def test_laws_take_a_draw_of_ones_own():
    model: LanguageModel = BigramToy(SPACE)
    testing.check_language_model(model, draw=seeded_draw(7))
