"""Deterministic automata over a vocabulary, and the rewards that they compute.

    s_0 = start,   s_{t+1} = δ(s_t, y_t),   accepted ⇔ s_end ∈ F                                 (1)
    r(y) = Σ_t w(s_t, y_t) + f(s_end)                                                            (2)

An automaton reads words; EOS is no word of it, and ends the text. What (2) describes,
forward–backward sums exactly on any number of sequences. Hopcroft, Motwani & Ullman (2007) for
products and complements; Hopcroft (1971) for the smallest equivalent automaton. S states, K words,
N sequences, T tokens.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from klrl_edu.core.display import readable_count
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import check_count, check_entries, check_number
from klrl_edu.problems.rewards import RepeatReward, Reward, SumReward, TokenReward, reward_value

MAX_STATES = 100_000


@dataclass(frozen=True, eq=False)
class Automaton:
    """A complete deterministic automaton (1).

    Attributes:
        space: its words are `space.vocabulary`.
        transitions: δ [S,K], the state after each word.
        accepting: F as a mask [S].
        start: the state before the first word.
        text: what errors call it.
    """

    space: SequenceSpace
    transitions: Tensor
    accepting: Tensor
    start: int
    text: str

    def __post_init__(self) -> None:
        states, words = len(self.accepting), len(self.space.vocabulary)
        if self.transitions.shape != (states, words):
            raise InputError(
                f"transitions has shape {list(self.transitions.shape)}; expected [S, K] ="
                f" {[states, words]}: a row a state, a column a word."
            )
        bad = (self.transitions < 0) | (self.transitions >= states)
        if bool(bad.any()):
            state, word = bad.nonzero()[0].tolist()
            raise InputError(
                f"transitions[{state}, {word}] = {int(self.transitions[state, word])} is no state;"
                f" there are {states}."
            )
        # True is 1 in Python, and would pass for a state
        if isinstance(self.start, bool) or self.start not in range(states):
            raise InputError(f"start = {self.start} is no state; there are {states}.")

    def __len__(self) -> int:
        return len(self.accepting)

    def read(self, tokens: Tensor) -> Tensor:
        """The state before each token, and after the last: [N,T] -> [N,T+1]; EOS moves nothing."""
        return _read(self.transitions, self.start, tokens)

    def accepts(self, tokens: Tensor) -> Tensor:
        """Whether each text is accepted: [N,T] -> bool [N]."""
        return self.accepting.to(tokens.device)[self.read(tokens)[:, -1]]

    def __invert__(self) -> "Automaton":
        # δ is complete, so every text ends in a state, and F alone turns round
        return replace(self, accepting=~self.accepting, text=f"not {self.text}")

    def __and__(self, other: "Automaton") -> "Automaton":
        return self._product(other, torch.logical_and, f"({self.text}) and ({other.text})")

    def __or__(self, other: "Automaton") -> "Automaton":
        return self._product(other, torch.logical_or, f"({self.text}) or ({other.text})")

    def _product(
        self, other: "Automaton", combine: Callable[[Tensor, Tensor], Tensor], text: str
    ) -> "Automaton":
        check_same_vocabulary(self.space, other.space)
        transitions, mine, theirs = reachable_pairs(
            self.transitions, self.start, other.transitions, other.start
        )
        accepting = combine(self.accepting[mine], other.accepting[theirs])
        # at once, or the states of a chain of products would multiply
        return Automaton(self.space, transitions, accepting, 0, text).minimal()

    def minimal(self) -> "Automaton":
        """The smallest automaton that accepts the same texts (Hopcroft 1971).

        States stand in the order in which reading reaches them.
        """
        # states that no text reaches are dropped, the others renumbered
        reached = _reached(self.transitions, self.start)
        number = torch.full((len(self),), -1).index_put((reached,), torch.arange(len(reached)))
        transitions = number[self.transitions[reached]]
        block = _blocks(transitions, self.accepting[reached])
        # a block becomes a state, for which its first member stands
        count = int(block.max()) + 1
        last = torch.full((count,), len(block))
        first = last.scatter_reduce(0, block, torch.arange(len(block)), "amin")
        order = first.argsort()
        rank = torch.empty_like(order).index_put((order,), torch.arange(count))
        kept = first[order]
        return Automaton(
            space=self.space,
            transitions=rank[block[transitions[kept]]],
            accepting=self.accepting[reached][kept],
            start=int(rank[block[0]]),
            text=self.text,
        )

    def is_empty(self) -> bool:
        """Whether no text that fits the space is accepted."""
        # the last of T tokens is EOS, where there is one
        words = self.space.max_length - self.space.eos
        here = torch.zeros(len(self), dtype=torch.bool)  # the states that texts of t words reach
        here[self.start] = True
        found = bool(self.accepting[here].any()) and self.space.eos
        for _ in range(words):
            after = self.transitions[here].reshape(-1).unique()
            here = torch.zeros_like(here).index_fill(0, after, True)
            # without EOS only texts of all T words fit
            found = (found and self.space.eos) or bool(self.accepting[here].any())
        return not found


def check_same_vocabulary(one: SequenceSpace, other: SequenceSpace) -> None:
    """Refuses automata over different words.

    Raises:
        InputError: with the words that differ.
    """
    if one.vocabulary == other.vocabulary:
        return
    mine, theirs = set(one.vocabulary), set(other.vocabulary)
    if mine == theirs:
        raise InputError(
            "the vocabularies hold the same words in another order; build both automata over one"
            " space."
        )
    sides = {"here": mine - theirs, "there": theirs - mine}
    only = [f"only {side}: {sorted(words)[:5]}" for side, words in sides.items() if words]
    raise InputError(
        f"the automata are over different vocabularies ({'; '.join(only)}); build both over one"
        " space."
    )


def _read(transitions: Tensor, start: int, tokens: Tensor) -> Tensor:
    """The state before each of tokens [N,T], and after the last [N,T+1]."""
    transitions, words = transitions.to(tokens.device), transitions.shape[1]
    state = torch.full((len(tokens),), start, dtype=torch.long, device=tokens.device)
    states = [state]
    for column in tokens.long().T:
        moved = transitions[state, column.clamp(max=words - 1)]
        state = torch.where(column < words, moved, state)  # EOS is no word: it moves nothing
        states.append(state)
    return torch.stack(states, 1)


def _blocks(transitions: Tensor, accepting: Tensor) -> Tensor:
    """The number of each state's block [S]: states that no text tells apart share one.

    From accepting and other states, blocks are split by where a word leads, until none splits.
    """
    # words that move every state alike count once
    columns = torch.unique(transitions, dim=1).T.tolist()
    before = [[list[int]() for _ in accepting] for _ in columns]
    for sources, column in zip(before, columns, strict=True):
        for state, after in enumerate(column):
            sources[after].append(state)
    number = accepting.long().tolist()
    halves = ({i for i, one in enumerate(number) if one == side} for side in (0, 1))
    blocks = [half for half in halves if half]
    if len(blocks) == 1:
        number = [0] * len(number)
    waiting = set(range(len(blocks)))
    while waiting:
        splitter = list(blocks[waiting.pop()])
        for sources in before:
            into = defaultdict[int, set[int]](set)
            for state in (state for after in splitter for state in sources[after]):
                into[number[state]].add(state)
            for old, part in into.items():
                if len(part) == len(blocks[old]):
                    continue
                new = len(blocks)
                blocks[old] -= part
                blocks.append(part)
                for state in part:
                    number[state] = new
                # both halves of a block that waits must wait; else the smaller one is enough
                smaller = new if len(part) <= len(blocks[old]) else old
                waiting.add(new if old in waiting else smaller)
    return torch.tensor(number)


def _reached(transitions: Tensor, start: int) -> Tensor:
    """The states that some text reaches, the start first."""
    seen, frontier = [start], [start]
    known = {start}
    while frontier:
        ahead = torch.unique(transitions[torch.tensor(frontier)]).tolist()
        frontier = [state for state in ahead if state not in known]
        known.update(frontier)
        seen += frontier
    return torch.tensor(seen)


def reachable_pairs(
    one: Tensor, start_one: int, other: Tensor, start_other: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The product of two automata, over the P pairs of states that some text reaches.

    Returns:
        its transitions [P,K], the start first, and the two states of each pair [P].
    """
    # the pair (i, j) has the code i · width + j
    width = len(other)
    known = frontier = torch.tensor([start_one * width + start_other])
    while len(frontier):
        after = one[frontier // width] * width + other[frontier % width]
        ahead = torch.unique(after)
        frontier = ahead[~torch.isin(ahead, known)]
        known = torch.cat([known, frontier])
        if len(known) > MAX_STATES:
            raise TooLargeError(
                f"the product of automata with {len(one):,} and {width:,} states has more than"
                f" {MAX_STATES:,}; simplify one of them."
            )
    # from codes to places among the known pairs
    after = one[known // width] * width + other[known % width]
    by_code, place = known.sort()
    return place[torch.searchsorted(by_code, after)], known // width, known % width


# --- constructors ---------------------------------------------------------------------------------


def word_list(texts: Sequence[str], space: SequenceSpace) -> Automaton:
    """Accepts exactly these texts.

    Raises:
        InputError: a text does not fit the space.
    """
    if not texts:
        raise InputError(
            "texts is empty; list at least one text, or use ~length_between(0, ...) for an"
            " automaton that accepts nothing."
        )
    words = len(space.vocabulary)
    # a trie of the texts: a state a prefix, −1 where a word leads off it
    rows: list[list[int]] = [[-1] * words]
    accepting = [False]
    for row in space.encode(texts).tolist():
        state = 0
        for word in (word for word in row if word < words):
            if rows[state][word] < 0:
                rows[state][word] = len(rows)
                rows.append([-1] * words)
                accepting.append(False)
            state = rows[state][word]
        accepting[state] = True
    dead = len(rows)  # one state more, for all that is off the trie
    table = torch.tensor([*rows, [dead] * words])
    transitions = torch.where(table < 0, dead, table)
    text = f"one of {len(texts)} texts"
    return Automaton(space, transitions, torch.tensor([*accepting, False]), 0, text).minimal()


def contains(words: Sequence[str], space: SequenceSpace) -> Automaton:
    """Accepts texts in which these words stand next to each other, in this order."""
    ids = _ids(words, space)
    rows: list[list[int]] = []
    # state j: the last j words read are the first j of the pattern (Knuth, Morris & Pratt 1977);
    # on any other word it does as the state `longest`, where one would stand that began later
    longest = 0
    for j, word in enumerate(ids):
        row = list(rows[longest]) if j else [0] * len(space.vocabulary)
        before, row[word] = row[word], j + 1
        rows.append(row)
        longest = before if j else 0
    rows.append([len(ids)] * len(space.vocabulary))
    accepting = torch.arange(len(rows)) == len(ids)
    return Automaton(
        space, torch.tensor(rows), accepting, 0, f"contains {space.separator.join(words)!r}"
    )


def never(words: Sequence[str], space: SequenceSpace) -> Automaton:
    """Accepts texts in which these words never stand next to each other in this order."""
    return replace(~contains(words, space), text=f"never {space.separator.join(words)!r}")


def exactly(word: str, count: int, space: SequenceSpace) -> Automaton:
    """Accepts texts with exactly `count` occurrences of a word."""
    check_count(count, "count", 0)
    return _counting(
        [word], count + 1, space, lambda seen: seen == count, f"exactly {count} × {word!r}"
    )


def at_least(word: str, count: int, space: SequenceSpace) -> Automaton:
    """Accepts texts with `count` or more occurrences of a word."""
    return _counting(
        [word], count, space, lambda seen: seen >= count, f"at least {count} × {word!r}"
    )


def at_most(word: str, count: int, space: SequenceSpace) -> Automaton:
    """Accepts texts with `count` or fewer occurrences of a word."""
    check_count(count, "count", 0)
    return _counting(
        [word], count + 1, space, lambda seen: seen <= count, f"at most {count} × {word!r}"
    )


def length_between(low: int, high: int, space: SequenceSpace) -> Automaton:
    """Accepts texts of `low` to `high` words, EOS not counted.

    Raises:
        InputError: low > high, or low < 0.
    """
    check_count(low, "low", 0)
    # −1 passes here, for the clearer words below
    check_count(high, "high", -1, maximum=MAX_STATES - 2)
    if high < low:
        raise InputError(f"high = {high} is below low = {low}; no text has such a length.")
    text = f"{low} to {high} words"

    def fits(seen: Tensor) -> Tensor:
        return (seen >= low) & (seen <= high)

    return _counting(space.vocabulary, high + 1, space, fits, text)


def parity(word: str, which: Literal["even", "odd"], space: SequenceSpace) -> Automaton:
    """Accepts texts in which a word occurs an even or an odd number of times."""
    if which not in ("even", "odd"):
        raise InputError(f"which = {which!r} is not known; choose 'even' or 'odd'.")
    (moved,) = _ids([word], space)
    transitions = torch.arange(2)[:, None].repeat(1, len(space.vocabulary))
    transitions[:, moved] = torch.tensor([1, 0])
    accepting = torch.arange(2) == ("even", "odd").index(which)
    return Automaton(space, transitions, accepting, 0, f"an {which} number of {word!r}")


def _counting(
    words: Sequence[str],
    cap: int,
    space: SequenceSpace,
    accept: Callable[[Tensor], Tensor],
    text: str,
) -> Automaton:
    """State j: j of these words were read, `cap` standing for that many or more."""
    check_count(cap, "count", 0)
    if cap >= MAX_STATES:
        raise TooLargeError(
            f"{text} needs {readable_count(cap + 1)} states, more than {MAX_STATES:,}; count less."
        )
    _check_table(cap + 1, space)
    seen = torch.arange(cap + 1)
    transitions = seen[:, None].repeat(1, len(space.vocabulary))
    transitions[:, _ids(words, space)] = (seen + 1).clamp(max=cap)[:, None]
    return Automaton(space, transitions, accept(seen), 0, text)


def _check_table(states: int, space: SequenceSpace) -> None:
    """Refuses an automaton whose table [S,K] would fill the memory."""
    words = len(space.vocabulary)
    what = f"{states:,} states over {words:,} words"
    check_entries(states * words, what, "count less, or take a smaller vocabulary")


def _ids(words: Sequence[str], space: SequenceSpace) -> list[int]:
    if isinstance(words, str):
        raise InputError(f"words = {words!r} is a text; give a list of words, e.g. {[words]}.")
    unknown = [word for word in words if word not in space.word_ids]
    if unknown or not words:
        raise InputError(
            f"words = {list(words)} must name words of {space!r}; not in its vocabulary: {unknown}."
        )
    return [space.word_ids[word] for word in words]


# --- rewards --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AutomatonReward:
    """A causal reward (2) [N,T] that forward–backward can sum.

    Attributes:
        space, transitions [S,K], start: the automaton.
        word_rewards: w [S,K] in reward units, earned on reading a word in a state; −inf forbids it.
        final_rewards: f [S] in reward units, earned where the text ends (on EOS, or on the last
            token where the length is fixed).
        text: what errors call it.
    """

    space: SequenceSpace
    transitions: Tensor
    start: int
    word_rewards: Tensor
    final_rewards: Tensor
    text: str

    def __post_init__(self) -> None:
        for name in ("word_rewards", "final_rewards"):
            values = getattr(self, name)
            if bool((torch.isnan(values) | (values == math.inf)).any()):
                raise InputError(
                    f"{name} of {self.text!r} hold NaN or +inf; give numbers, or -inf to forbid."
                )

    def __call__(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        states, words = _read(self.transitions, self.start, tokens), self.transitions.shape[1]
        # EOS has no column; what is read in its place is replaced below
        before, word = states[:, :-1], tokens.long().clamp(max=words - 1)
        earned = self.word_rewards.to(tokens.device)[before, word]
        final = self.final_rewards.to(tokens.device)
        if not self.space.eos:  # the last word ends the text
            last = earned[:, -1:] + final[states[:, -1:]]
            return torch.cat([earned[:, :-1], last], 1)
        by_token = torch.where(tokens < words, earned, final[before])
        return torch.where(self.space.live(tokens), by_token, 0.0)

    def __add__(self, other: "AutomatonReward") -> "AutomatonReward":
        check_same_vocabulary(self.space, other.space)
        transitions, mine, theirs = reachable_pairs(
            self.transitions, self.start, other.transitions, other.start
        )
        # not made minimal: rewards, and not F, tell these states apart
        words = self.word_rewards[mine] + other.word_rewards[theirs]
        finals = self.final_rewards[mine] + other.final_rewards[theirs]
        text = f"{self.text} + {other.text}"
        return AutomatonReward(self.space, transitions, 0, words, finals, text)

    def scaled(self, factor: float) -> "AutomatonReward":
        """factor · r, where 0 · (−inf) = 0."""
        factor = check_number(factor, "factor", "finite", math.isfinite)
        words, finals = self.word_rewards, self.final_rewards
        # 0 · (−inf) is NaN in floats
        if factor == 0:
            words, finals = torch.zeros_like(words), torch.zeros_like(finals)
        else:
            words, finals = factor * words, factor * finals
        text = f"{factor:g}·({self.text})"
        return replace(self, word_rewards=words, final_rewards=finals, text=text)

    def __str__(self) -> str:
        return self.text


def accept_reward(
    automaton: Automaton, value: float = 1.0, otherwise: float = 0.0
) -> AutomatonReward:
    """`value` where a text is accepted, `otherwise` where not, in reward units."""
    value, otherwise = reward_value(value, "value"), reward_value(otherwise, "otherwise")
    final = torch.full(automaton.accepting.shape, otherwise, dtype=torch.float64)
    final[automaton.accepting] = value
    words = torch.zeros(automaton.transitions.shape, dtype=torch.float64)
    text = f"{value:g} where {automaton.text}, else {otherwise:g}"
    return AutomatonReward(
        automaton.space, automaton.transitions, automaton.start, words, final, text
    )


def constraint(automaton: Automaton) -> AutomatonReward:
    """0 where a text is accepted, −inf where not: the posterior is the prior given that it is."""
    return replace(accept_reward(automaton, 0.0, -math.inf), text=automaton.text)


def as_automaton_reward(reward: Reward, space: SequenceSpace) -> AutomatonReward | None:
    """The automaton of a per-token, repeat or automaton reward, or of their sum; else None."""
    if isinstance(reward, AutomatonReward):
        return reward
    if isinstance(reward, TokenReward):  # one state; the value of EOS, if any, is the final one
        count = len(space.vocabulary)
        words = torch.tensor([reward.values[:count]], dtype=torch.float64)
        final = torch.tensor(reward.values[count:] or (0.0,), dtype=torch.float64)
        stay = torch.zeros(1, words.shape[1], dtype=torch.long)
        return AutomatonReward(space, stay, 0, words, final, "a reward for each word")
    if isinstance(reward, RepeatReward):
        return _repeats(reward, space)
    if isinstance(reward, SumReward):
        parts = [as_automaton_reward(part, space) for part in reward.parts]
        known = [
            part.scaled(weight)
            for part, weight in zip(parts, reward.weights, strict=True)
            if part is not None
        ]
        return sum(known[1:], known[0]) if len(known) == len(parts) else None
    return None


def _repeats(reward: RepeatReward, space: SequenceSpace) -> AutomatonReward:
    """State k: the last word was k; the last state: none yet."""
    count = len(space.vocabulary)
    _check_table(count + 1, space)
    transitions = torch.arange(count).repeat(count + 1, 1)
    words = torch.zeros(count + 1, count, dtype=torch.float64)
    # reading k pays in the state that k left
    words[:count].fill_diagonal_(reward.value)
    final = torch.zeros(count + 1, dtype=torch.float64)
    return AutomatonReward(space, transitions, count, words, final, "repeats")
