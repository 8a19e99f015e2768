r"""Regular expressions as automata over a vocabulary, with the meaning of Python's `re.search`.

Python's own parser reads the pattern; its tree becomes a nondeterministic automaton over characters
(Thompson 1968), that one a deterministic one over the characters of the vocabulary, and each word
is then pushed through by its spelling (a separator before every word but the first). Anchors ^ and
$ hold at the ends of the text. Lookaround, back-references, \b and flags describe no automaton of
this kind, or none that is small, and are refused with their place.
"""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.problems.automata import MAX_STATES, Automaton

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
_ANCHORS = {
    "AT_BEGINNING": "begin",
    "AT_BEGINNING_STRING": "begin",
    "AT_END": "end",
    "AT_END_STRING": "end",
}


def regular_expression(pattern: str, space: SequenceSpace) -> Automaton:
    """Accepts the texts in which Python's `re.search(pattern, text)` finds a match.

    ^…$ asks for the whole text.

    Raises:
        InputError: a pattern that does not compile, or syntax that is not supported, with its
            position.
        TooLargeError: more than MAX_STATES states.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FutureWarnings about sets
            tree = _parser.parse(pattern)
    except re.error as error:
        raise InputError(
            f"pattern {pattern!r} is not a regular expression: {error.msg} at position {error.pos}."
        ) from None
    if tree.state.flags & ~re.UNICODE:
        raise _refusal(pattern, "flags")
    graph = _Graph(pattern)
    graph.final = graph.sequence(tree, graph.node())
    return _over_words(graph, space, f"/{pattern}/").minimal()


def _refusal(pattern: str, what: str) -> InputError:
    found = re.search(_UNSUPPORTED.get(what, "(?!)"), pattern)
    where = "" if found is None else f" at position {found.start()} ({found.group()!r})"
    return InputError(
        f"pattern {pattern!r} uses {what.lower()}{where}, which is not supported; use literals,"
        " classes, groups, |, *, +, ?, {m,n}, ^, $."
    )


@dataclass
class _Graph:
    """A nondeterministic automaton over characters; node 0 is its start."""

    pattern: str
    # edges that read nothing: target and the anchor they ask for
    empty: list[list[tuple[int, str]]] = field(default_factory=list)
    # edges that read a character: target and the parser's node
    reading: list[list[tuple[int, Any]]] = field(default_factory=list)
    final: int = 0

    def node(self) -> int:
        """A new node."""
        if len(self.empty) >= MAX_STATES:
            raise TooLargeError(
                f"pattern {self.pattern!r} unrolls to more than {MAX_STATES:,} nodes; repeat less."
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
                f"pattern {self.pattern!r} repeats up to {most} times; at most {_REPEAT_LIMIT} are"
                " unrolled."
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

    def closure(self, nodes: Iterable[int], *anchors: str) -> frozenset[int]:
        """The nodes reached without reading, through the anchors that hold here."""
        seen, waiting = set(nodes), list(nodes)
        while waiting:
            for target, anchor in self.empty[waiting.pop()]:
                if target not in seen and (not anchor or anchor in anchors):
                    seen.add(target)
                    waiting.append(target)
        return frozenset(seen)

    def after(self, nodes: frozenset[int], character: str) -> frozenset[int]:
        """The nodes one character later."""
        # what `re.search` asks: a match that was found stays found, and one may begin anywhere
        if self.final in nodes:
            return frozenset([self.final])
        moved = {
            target
            for node in nodes
            for target, item in self.reading[node]
            if _matches(item[0], item[1], character)
        }
        ahead = self.closure([*moved, 0])
        return frozenset([self.final]) if self.final in ahead else ahead

    def accepts(self, nodes: frozenset[int], *anchors: str) -> bool:
        """Whether a text that ends here matches."""
        return self.final in self.closure(nodes, "end", *anchors)


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
    """The deterministic automaton over words, whose states are sets of the graph's nodes."""
    # the first state is the start of the text, where ^ holds and no separator is due; it is not in
    # `place`, so that no word leads back to it
    start = graph.closure([0], "begin")
    start = frozenset([graph.final]) if graph.final in start else start
    sets, place = [start], {}
    accepting = [graph.accepts(start, "begin")]
    memory: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def through(nodes: frozenset[int], spelling: str) -> frozenset[int]:
        for character in spelling:
            if (nodes, character) not in memory:
                memory[nodes, character] = graph.after(nodes, character)
            nodes = memory[nodes, character]
        return nodes

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
        if len(sets) > MAX_STATES:
            raise TooLargeError(
                f"{text} needs more than {MAX_STATES:,} states over {space!r}; simplify it."
            )
    return Automaton(space, torch.tensor(rows), torch.tensor(accepting), 0, text)
