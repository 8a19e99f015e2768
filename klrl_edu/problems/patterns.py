r"""Regular expressions as automata over a vocabulary, with the meaning of Python's `re.search`.

Python's own parser reads the pattern; its tree becomes a nondeterministic automaton over characters
(Thompson 1968), that one a deterministic one over the characters of the vocabulary, and each word
is then pushed through by its spelling (a separator before every word but the first). The anchor ^
holds at the beginning of the text, $ at its end and before a newline that ends it. Lookaround,
back-references, \b and flags describe no automaton of this kind, or none that is small, and are
refused with their place.
"""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import brief
from klrl_edu.problems.automata import MAX_STATES, Automaton
from klrl_edu.problems.rewards import compiled_pattern

# the standard library's, where sre_parse moved in Python 3.11
_parser: Any = re._parser  # type: ignore[attr-defined]
_constants: Any = re._constants  # type: ignore[attr-defined]
_UNSUPPORTED = {
    "ASSERT": r"\(\?<?=",
    "ASSERT_NOT": r"\(\?<?!",
    "GROUPREF": r"\\[1-9]|\(\?P=",
    "GROUPREF_EXISTS": r"\(\?\(",
    "AT": r"\\[bB]",
    "ATOMIC_GROUP": r"\(\?>",
    "POSSESSIVE_REPEAT": r"[*+?}]\+",
    "flags": r"\(\?[a-zA-Z-]+[:)]",
}
_REPEAT_LIMIT = 1000
_MOST_WORK = 1_000_000  # steps of the subset construction: a few seconds
_BEGIN, _END, _DOLLAR = "begin", "end", "$"
_ANCHORS = {
    "AT_BEGINNING": _BEGIN,
    "AT_BEGINNING_STRING": _BEGIN,
    "AT_END": _DOLLAR,
    "AT_END_STRING": _END,
}
# what may still be read
_ANYTHING, _NEWLINE, _NOTHING = 0, 1, 2


def regular_expression(pattern: str, space: SequenceSpace) -> Automaton:
    """Accepts the texts in which Python's `re.search(pattern, text)` finds a match.

    ^…$ asks for the whole text.

    Raises:
        InputError: a pattern that does not compile, or syntax that is not supported, with its
            position.
        TooLargeError: more than MAX_STATES states.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FutureWarnings about sets
        compiled_pattern(pattern)
        tree = _parser.parse(pattern)
    if tree.state.flags & ~re.UNICODE:
        raise _refusal(pattern, "flags")
    graph = _Graph(pattern, any("\n" in part for part in (*space.vocabulary, space.separator)))
    graph.final = graph.sequence(tree, graph.node())
    return _over_words(graph, space, f"/{pattern}/").minimal()


def _refusal(pattern: str, what: str) -> InputError:
    found = re.search(_UNSUPPORTED.get(what, "(?!)"), pattern)
    where = "" if found is None else f" at position {found.start()} ({found.group()!r})"
    return InputError(
        f"pattern {brief(pattern)} uses {what.lower()}{where}, which is not supported; use"
        " literals, classes, groups, |, *, +, ?, {m,n}, ^, $."
    )


@dataclass
class _Graph:
    """A nondeterministic automaton over characters; node 0 is its start.

    A place is a node and what may still be read: anything; or, once a $ was taken for the one
    before the text's last newline, that newline; or nothing. Places are numbered 3 · node + that.
    """

    pattern: str
    has_newline: bool  # whether a text may hold one
    # edges that read nothing: target and the anchor they ask for
    empty: list[list[tuple[int, str]]] = field(default_factory=list)
    # edges that read a character: target and the parser's node
    reading: list[list[tuple[int, Any]]] = field(default_factory=list)
    final: int = 0

    def node(self) -> int:
        """A new node."""
        if len(self.empty) >= MAX_STATES:
            raise TooLargeError(
                f"pattern {brief(self.pattern)} unrolls to more than {MAX_STATES:,} nodes; repeat"
                " less."
            )
        self.empty.append([])
        self.reading.append([])
        return len(self.empty) - 1

    def sequence(self, items: Iterable[tuple[Any, Any]], at: int) -> int:
        """Appends items after a node; the node where they end."""
        for op, argument in items:
            at = self._item(str(op), argument, at)
        return at

    def _item(self, op: str, argument: Any, at: int) -> int:
        """Appends one of the parser's items after a node; the node where it ends."""
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            end = self.node()
            self.reading[at].append((end, (op, argument)))
        elif op == "SUBPATTERN":
            _, added, removed, inner = argument
            if added or removed:
                raise _refusal(self.pattern, "flags")
            end = self.sequence(inner, at)
        elif op == "BRANCH":
            end = self.node()
            for branch in argument[1]:
                start = self.node()
                self.empty[at].append((start, ""))
                self.empty[self.sequence(branch, start)].append((end, ""))
        elif op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = argument
            end = self._repeat(least, most, inner, at)
        elif op == "AT" and str(argument) in _ANCHORS:
            end = self.node()
            self.empty[at].append((end, _ANCHORS[str(argument)]))
        else:
            raise _refusal(self.pattern, op)
        return end

    def _repeat(self, least: int, most: Any, inner: Any, at: int) -> int:
        """`least` copies, and then a loop, or further copies that may each be left out."""
        for _ in range(least):
            at = self.sequence(inner, at)
        if most is _constants.MAXREPEAT:
            loop = self.node()
            self.empty[at].append((loop, ""))
            self.empty[self.sequence(inner, loop)].append((loop, ""))
            at = loop
        elif most > _REPEAT_LIMIT:
            raise TooLargeError(
                f"pattern {brief(self.pattern)} repeats up to {most} times; at most"
                f" {_REPEAT_LIMIT} are unrolled."
            )
        else:
            end = self.node()
            for _ in range(most - least):
                self.empty[at].append((end, ""))
                at = self.sequence(inner, at)
            self.empty[at].append((end, ""))
            at = end
        last = self.node()
        self.empty[at].append((last, ""))
        return last

    @property
    def found(self) -> int:
        """The place of a match, whatever follows."""
        return 3 * self.final + _ANYTHING

    def closure(self, places: Iterable[int], *anchors: str) -> frozenset[int]:
        """The places reached without reading, through the anchors that hold here."""
        seen, waiting = set(places), list(places)
        while waiting:
            node, left = divmod(waiting.pop(), 3)
            for target, anchor in self.empty[node]:
                left_after = self._through(anchor, left, anchors)
                if left_after is not None and (place := 3 * target + left_after) not in seen:
                    seen.add(place)
                    waiting.append(place)
        return frozenset(seen)

    def _through(self, anchor: str, left: int, anchors: tuple[str, ...]) -> int | None:
        """What may still be read behind an anchor; None where it does not hold."""
        if not anchor or anchor in anchors:
            return left
        if anchor == _BEGIN:
            return None
        if left == _NOTHING:
            return left
        # $ is taken on trust: the next character must turn out to be the last, a newline
        return _NEWLINE if anchor == _DOLLAR and self.has_newline else None

    def after(self, places: frozenset[int], character: str) -> frozenset[int]:
        """The places one character later."""
        # what `re.search` asks: a match that was found stays found, and one may begin anywhere
        if self.found in places:
            return frozenset([self.found])
        moved = [0]
        for place in places:
            node, left = divmod(place, 3)
            if left == _NOTHING or (left == _NEWLINE and character != "\n"):
                continue
            left_after = _ANYTHING if left == _ANYTHING else _NOTHING
            moved += [
                3 * target + left_after
                for target, item in self.reading[node]
                if _matches(item[0], item[1], character)
            ]
            if node == self.final:  # matched before the last newline, which is now read
                moved.append(3 * node + _NOTHING)
        ahead = self.closure(moved)
        return frozenset([self.found]) if self.found in ahead else ahead

    def accepts(self, places: frozenset[int], *anchors: str) -> bool:
        """Whether a text that ends here matches."""
        ended = self.closure(places, _END, _DOLLAR, *anchors)
        return self.found in ended or 3 * self.final + _NOTHING in ended


def _matches(op: str, argument: Any, character: str) -> bool:
    code = ord(character)
    if op == "ANY":
        return character != "\n"
    if op == "IN":
        items = [(str(item), value) for item, value in argument]
        negated = bool(items) and items[0][0] == "NEGATE"
        found = any(_matches(item, value, character) for item, value in items[negated:])
        return found is not negated
    if op == "RANGE":
        return bool(argument[0] <= code <= argument[1])
    if op == "CATEGORY":
        # CATEGORY_NOT_DIGIT and so on: by Python's own \d, \s, \w and their complements
        letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[str(argument).rsplit("_", 1)[1]]
        letter = letter.upper() if "NOT_" in str(argument) else letter
        return re.match("\\" + letter, character) is not None
    return bool(code == argument) is (op == "LITERAL")


def _over_words(graph: _Graph, space: SequenceSpace, text: str) -> Automaton:
    """The deterministic automaton over words, whose states are sets of the graph's places."""
    # the first state is the start of the text, where ^ holds and no separator is due; it is not in
    # `place`, so that no word leads back to it
    start = graph.closure([0], _BEGIN)
    start = frozenset([graph.found]) if graph.found in start else start
    sets, place = [start], {}
    accepting = [graph.accepts(start, _BEGIN)]
    memory: dict[tuple[frozenset[int], str], frozenset[int]] = {}
    work = 0

    def through(places: frozenset[int], spelling: str) -> frozenset[int]:
        nonlocal work
        for character in spelling:
            if (places, character) not in memory:
                work += len(places)
                memory[places, character] = graph.after(places, character)
            places = memory[places, character]
        return places

    rows: list[list[int]] = []
    while len(rows) < len(sets):
        due = space.separator if rows else ""
        row = []
        for word in space.vocabulary:
            ahead = through(sets[len(rows)], due + word)
            if ahead not in place:
                place[ahead] = len(sets)
                sets.append(ahead)
                accepting.append(graph.accepts(ahead))
            row.append(place[ahead])
        rows.append(row)
        if len(sets) > MAX_STATES or work > _MOST_WORK:
            limit = f"{MAX_STATES:,} states" if len(sets) > MAX_STATES else f"{_MOST_WORK:,} steps"
            raise TooLargeError(
                f"{brief(text)} needs more than {limit} over {space!r}; simplify it."
            )
    return Automaton(space, torch.tensor(rows), torch.tensor(accepting), 0, text)
