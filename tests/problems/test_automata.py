"""Automata accept what plain Python accepts, combine as sets do, and pay what the rewards they
stand for pay.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klrl_edu import testing
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.posterior import posterior
from klrl_edu.models.ngram import NGramModel
from klrl_edu.problems.automata import (
    Automaton,
    AutomatonReward,
    accept_reward,
    as_automaton_reward,
    at_least,
    at_most,
    constraint,
    contains,
    exactly,
    length_between,
    never,
    parity,
    word_list,
)
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import (
    add,
    count_reward,
    length_reward,
    repeat_reward,
    scale,
    text_reward,
    token_reward,
)

INF = math.inf
FREE, FIXED = SequenceSpace(("a", "b", "c"), 5), SequenceSpace(("a", "b", "c"), 4, eos=False)
SPACES = pytest.mark.parametrize("space", [FREE, FIXED], ids=["eos", "fixed"])


def words_of(space: SequenceSpace) -> list[list[str]]:
    return [text.split() for text in space.decode(space.all_tokens())]


def has_run(words: list[str], run: list[str]) -> bool:
    return any(words[i : i + len(run)] == run for i in range(len(words) - len(run) + 1))


PLAIN = {
    "contains a b": (lambda s: contains(["a", "b"], s), lambda w: has_run(w, ["a", "b"])),
    "contains a a b": (
        lambda s: contains(["a", "a", "b"], s),
        lambda w: has_run(w, ["a", "a", "b"]),
    ),
    "contains a b a": (
        lambda s: contains(["a", "b", "a"], s),
        lambda w: has_run(w, ["a", "b", "a"]),
    ),
    "never b b": (lambda s: never(["b", "b"], s), lambda w: not has_run(w, ["b", "b"])),
    "exactly 2 a": (lambda s: exactly("a", 2, s), lambda w: w.count("a") == 2),
    "exactly 0 a": (lambda s: exactly("a", 0, s), lambda w: w.count("a") == 0),
    "at least 2 b": (lambda s: at_least("b", 2, s), lambda w: w.count("b") >= 2),
    "at most 1 c": (lambda s: at_most("c", 1, s), lambda w: w.count("c") <= 1),
    "2 to 3 words": (lambda s: length_between(2, 3, s), lambda w: 2 <= len(w) <= 3),
    "odd a": (lambda s: parity("a", "odd", s), lambda w: w.count("a") % 2 == 1),
    "even a": (lambda s: parity("a", "even", s), lambda w: w.count("a") % 2 == 0),
}


@SPACES
@pytest.mark.parametrize("name", PLAIN)
def test_an_automaton_accepts_what_plain_python_accepts(name, space):
    build, plain = PLAIN[name]
    assert build(space).accepts(space.all_tokens()).tolist() == [
        plain(words) for words in words_of(space)
    ]


@SPACES
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(PLAIN, 2))[::4])
def test_products_and_complements_are_those_of_sets(one, other, space):
    a, b = PLAIN[one][0](space), PLAIN[other][0](space)
    tokens = space.all_tokens()
    in_a, in_b = a.accepts(tokens), b.accepts(tokens)
    assert torch.equal((a & b).accepts(tokens), in_a & in_b)
    assert torch.equal((a | b).accepts(tokens), in_a | in_b)
    assert torch.equal((~a).accepts(tokens), ~in_a)
    assert len(~(~a & ~b)) == len(
        a | b
    )  # de Morgan, and the smallest automaton of a language is one


def test_a_word_list_accepts_exactly_its_texts():
    texts = ["a b", "a", "c b a", ""]
    assert word_list(texts, FREE).accepts(FREE.all_tokens()).tolist() == [
        " ".join(words) in texts for words in words_of(FREE)
    ]


@given(st.integers(1, 6), st.integers(0, 10_000))
def test_the_smallest_automaton_accepts_the_same_and_tells_its_states_apart(states, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(states, (states, 2), generator=generator)
    machine = Automaton(
        SequenceSpace(("a", "b"), 7),
        table,
        torch.rand(states, generator=generator) < 0.5,
        states - 1,
        "random",
    )
    small, tokens = machine.minimal(), machine.space.all_tokens()
    assert torch.equal(small.accepts(tokens), machine.accepts(tokens))
    assert len(small) <= len(machine)
    # from every two states some text of at most S words is accepted from one alone (Moore's bound),
    # and every state is reached
    endings = [
        Automaton(machine.space, small.transitions, small.accepting, start, "").accepts(tokens)
        for start in range(len(small))
    ]
    assert len({tuple(ending.tolist()) for ending in endings}) == len(small)
    assert set(small.read(tokens).unique().tolist()) == set(range(len(small)))


@SPACES
def test_emptiness_looks_at_the_texts_that_fit(space):
    longest = space.max_length - space.eos
    assert not exactly("a", longest, space).is_empty()
    assert exactly("a", longest + 1, space).is_empty()
    assert (exactly("a", 1, space) & exactly("a", 2, space)).is_empty()
    assert length_between(0, 0, space).is_empty() is not space.eos


REWARDS = {
    "tokens": lambda s: token_reward([1.0, -0.5, 0.25] + [0.75] * s.eos, s),
    "count": lambda s: count_reward("b", s),
    "length": lambda s: length_reward(s, -0.5),
    "repeats": lambda s: repeat_reward(s, -0.5),
    "forbidding": lambda s: token_reward({"a": -INF}, s),
    "sum": lambda s: add(
        count_reward("a", s), repeat_reward(s, -0.5), accept_reward(exactly("b", 1, s), 2.0)
    ),
    "scaled": lambda s: scale(add(count_reward("a", s, 3.0), repeat_reward(s)), -2.0),
    "scaled by nothing": lambda s: scale(token_reward({"a": -INF}, s), 0.0),
    "constraint": lambda s: constraint(parity("a", "odd", s)),
}


@SPACES
@pytest.mark.parametrize("name", REWARDS)
def test_the_automaton_of_a_reward_pays_the_same(name, space):
    reward, tokens = REWARDS[name](space), space.all_tokens()
    machine = as_automaton_reward(reward, space)
    seen, expected = machine(tokens), reward(tokens, None)
    assert torch.equal(seen.sum(-1), expected.sum(-1) if expected.ndim == 2 else expected)
    if name != "forbidding":
        testing.check_causal_reward(machine, space)


@SPACES
def test_a_sum_of_automaton_rewards_pays_both(space):
    one, other = (
        accept_reward(exactly("a", 1, space), 2.0, -1.0),
        as_automaton_reward(repeat_reward(space), space),
    )
    tokens = space.all_tokens()
    assert torch.equal((one + other)(tokens), one(tokens) + other(tokens))


def test_a_reward_without_an_automaton_has_none():
    assert as_automaton_reward(text_reward(len, FREE), FREE) is None
    assert as_automaton_reward(add(count_reward("a", FREE), text_reward(len, FREE)), FREE) is None


def test_other_words_are_named():
    other = SequenceSpace(("a", "b", "d"), 5)
    for combine in (
        lambda: exactly("a", 1, FREE) & exactly("a", 1, other),
        lambda: constraint(exactly("a", 1, FREE)) + constraint(exactly("a", 1, other)),
    ):
        with pytest.raises(InputError, match=r"only here: \['c'\]; only there: \['d'\]"):
            combine()
    with pytest.raises(InputError, match="another order"):
        _ = exactly("a", 1, FREE) | exactly("a", 1, SequenceSpace(("c", "b", "a"), 5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: contains(["d"], FREE), r"not in its vocabulary: \['d'\]"),
        (lambda: contains("ab", FREE), "is a text; give a list"),
        (lambda: contains([], FREE), "must name words"),
        (lambda: exactly("a", -2, FREE), "count = -2"),
        (lambda: length_between(3, 2, FREE), "high = 2 is below low = 3"),
        (lambda: length_between(-1, 2, FREE), "low = -1"),
        (lambda: parity("a", "prime", FREE), "'even' or 'odd'"),
        (lambda: word_list([], FREE), "texts is empty"),
        (lambda: word_list(["a z"], FREE), "z"),
        (
            lambda: Automaton(
                FREE, torch.zeros(2, 2, dtype=torch.long), torch.ones(2).bool(), 0, ""
            ),
            r"expected \[S, K\] = \[2, 3\]",
        ),
        (
            lambda: Automaton(FREE, torch.full((2, 3), 2), torch.ones(2).bool(), 0, ""),
            "is no state; there are 2",
        ),
        (
            lambda: Automaton(
                FREE, torch.zeros(2, 3, dtype=torch.long), torch.ones(2).bool(), 2, ""
            ),
            "start = 2",
        ),
        (
            lambda: accept_reward(exactly("a", 1, FREE), INF),
            "value = inf must be a number, or -inf",
        ),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_too_many_states_are_refused_with_their_number():
    with pytest.raises(TooLargeError, match="1,000,002 states"):
        exactly("a", 1_000_000, FREE)


def test_eos_ends_the_text_and_nothing_is_paid_after_it():
    reward = AutomatonReward(
        FREE,
        torch.zeros(1, 3, dtype=torch.long),
        0,
        torch.ones(1, 3, dtype=torch.float64),
        torch.tensor([5.0]).double(),
        "",
    )
    assert reward(FREE.encode(["a b", ""])).tolist() == [[1, 1, 5, 0, 0], [5, 0, 0, 0, 0]]


def test_a_reward_of_a_tenth_is_a_tenth():
    """Not the nearest float32."""
    reward = accept_reward(at_least("a", 0, FREE), 0.1, 0.3)
    assert reward.final_rewards.tolist() == [0.1]
    assert accept_reward(~at_least("a", 0, FREE), 0.1, 0.3).final_rewards.tolist() == [0.3]
    assert float(posterior(Problem(NGramModel(FREE, 1), reward, 1.0)).value) == pytest.approx(
        0.1, rel=1e-15
    )


def test_a_repeat_may_be_forbidden():
    """−inf on a repeat, and nothing on the rest, where a product would be NaN."""
    problem = Problem(NGramModel(FREE, 1), repeat_reward(FREE, -INF), 1.0)
    tokens = FREE.all_tokens()
    words = [text.split() for text in FREE.decode(tokens)]
    expected = [-INF if any(map(str.__eq__, w, w[1:])) else 0.0 for w in words]
    assert problem.rewards(tokens).tolist() == expected
    assert as_automaton_reward(problem.reward, FREE)(tokens).sum(-1).tolist() == expected


def test_counting_takes_one_state_a_count_and_one_for_more():
    assert len(length_between(1, 2, FREE)) == len(at_most("a", 2, FREE)) == 4
    assert len(exactly("a", 2, FREE)) == 4
    assert len(at_least("a", 2, FREE)) == 3
