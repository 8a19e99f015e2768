"""Exercises that check themselves.

    check("t01.mutual", answer)

says whether an answer is right, and if it is not, what is wrong with it. References are recomputed at every call from
`reference.py`; an answer counts when it agrees with them to 1e-9. What was checked is recorded in `.klrl/answers.json`, or in the
file that KLRL_ANSWERS names.
"""

import copy
import difflib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from klrl_edu import reference
from klrl_edu.core.errors import InputError
from klrl_edu.evaluation.records import json_line, write_atomically
from klrl_edu.problems.examples import FOUR_POLICY, FOUR_REWARDS, FOUR_SENTENCES

TOLERANCE = 1e-9
_TRIALS = 20  # random inputs on which an answer that is a function is tried
_ROUNDED = 1e-2  # this near, a number was probably rounded

# t01: 'the' goes with 'cat' and 'a' with 'dog'
CORRELATED = {"the cat": 0.50, "the dog": 0.02, "a cat": 0.03, "a dog": 0.45}
# t02: two sentences share the best reward
TIED_REWARDS = {"the cat": 2.0, "the dog": 0.0, "a cat": 0.0, "a dog": 2.0}

Table = dict[Any, float]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that is recognised.

    Attributes:
        says: what the reader did, and what to do instead.
        value: computes what that gives; of the same arguments as the exercise's reference.
    """

    says: str
    value: Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One question.

    Attributes:
        name: "tNN.word".
        reference: computes the right answer; a number, a text, a dict, a sequence. For an exercise that asks for a function: that function.
        unit: of the numbers, "nats" or "reward units" or empty.
        mistakes: the wrong answers to recognise.
        hint: said where the mistake is not recognised.
        inputs: for a function: arguments from a random generator; None where the answer is a value.
    """

    name: str
    reference: Callable[..., Any]
    unit: str = ""
    mistakes: tuple[Mistake, ...] = ()
    hint: str = ""
    inputs: Callable[[random.Random], tuple[Any, ...]] | None = None


def check(name: str, answer: object) -> None:
    """Prints whether an answer is right or what is wrong with it, and records the result.

    Args:
        name: of the exercise, "t01.mutual".
        answer: a number, a dict sentence -> number, a sequence, an array or tensor of these, or a function where the exercise asks for one;
            `...` is not answered yet.

    Raises:
        InputError: no such exercise; the message lists those of the tutorial.
    """
    exercise = find(name)
    if answer is ...:
        print(f"{name}: not answered yet. Put your answer in place of the dots.")
        return
    wrong = judge(exercise, answer)
    print(f"{name}: {'right.' if wrong is None else f'not yet. {wrong}'}")
    _record(name, wrong is None)


def find(name: str) -> Exercise:
    """An exercise by its name.

    Raises:
        InputError: no such name; the message lists the known ones.
    """
    if name not in EXERCISES:
        near = difflib.get_close_matches(str(name), EXERCISES, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"exercise {name!r} is not known.{meant} The exercises are {', '.join(EXERCISES)}.")
    return EXERCISES[name]


def judge(exercise: Exercise, answer: object) -> str | None:
    """What is wrong with an answer; None if it is right."""
    if exercise.inputs is None:
        if callable(answer) and not hasattr(answer, "tolist"):
            return "Your answer is a function; call it, and answer with what it returns."
        trials: list[tuple[Any, ...]] = [()]
        given = [answer]
    else:
        if not callable(answer):
            return f"This exercise asks for a function; your answer is {_describe(answer)}."
        trials = list(_inputs(exercise))
        given = []
        for arguments in trials:
            try:
                given.append(answer(*copy.deepcopy(arguments)))
            except Exception as error:  # whatever the reader's function raises is for the reader
                said = f"{type(error).__name__}: {error}".rstrip(": ")
                return _with_hint(exercise, f"Your function raised {said}, called with {_arguments(arguments)}.")
            if given[-1] is None:
                return "Your function returned None; does it end with a return?"
    expected = [exercise.reference(*copy.deepcopy(arguments)) for arguments in trials]
    faults = [_fault(one, right) for one, right in zip(given, expected, strict=True)]
    if not any(faults):
        return None
    for mistake in exercise.mistakes:
        wrong = [mistake.value(*copy.deepcopy(arguments)) for arguments in trials]
        if all(_fault(one, other, 1e-6) is None for one, other in zip(given, wrong, strict=True)):
            return mistake.says
    for says, recognised in _COMMON:
        if all(recognised(_plain(one), right, exercise.unit) for one, right in zip(given, expected, strict=True)):
            return says
    first = next(index for index, fault in enumerate(faults) if fault)
    called = f" (called with {_arguments(trials[first])})" if exercise.inputs else ""
    return _with_hint(exercise, f"{faults[first]}{called}.")


def answers_path() -> Path:
    """Where results are recorded: KLRL_ANSWERS, or .klrl/answers.json in the working directory."""
    return Path(os.environ.get("KLRL_ANSWERS") or Path(".klrl") / "answers.json")


def read_answers(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """What was recorded: name -> {"correct": bool, "time": when, in UTC}; empty where nothing was.

    Raises:
        InputError: the file is not such a record.
    """
    path = answers_path() if path is None else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(one, dict) and isinstance(one.get("correct"), bool) for one in found.values()):
        raise InputError(f"{path} is not a record of answers; move it away, or name another file in KLRL_ANSWERS.")
    return found


def _record(name: str, correct: bool) -> None:
    """The latest result of each exercise; a folder that cannot be written to costs the record, not the tutorial."""
    path = answers_path()
    try:
        results = {**read_answers(path), name: {"correct": correct, "time": datetime.now(UTC).isoformat(timespec="seconds")}}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json_line(results) + "\n").encode())
    except (OSError, InputError) as error:
        reason = error if isinstance(error, InputError) else f"{path}: {error.strerror or error}"
        print(f"(not recorded: {reason})")


def _inputs(exercise: Exercise) -> Iterator[tuple[Any, ...]]:
    """The same random inputs at every call."""
    assert exercise.inputs is not None
    generator = random.Random(20)
    for _ in range(_TRIALS):
        yield exercise.inputs(generator)


# What is wrong with one value ---------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Tensors, arrays and numpy numbers as Python's own; word tuples as texts."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_key(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _key(key: Any) -> Any:
    return " ".join(map(str, key)) if isinstance(key, tuple) else key


def _fault(given: Any, expected: Any, tolerance: float = TOLERANCE) -> str | None:
    """What is wrong with a value, without telling the right one; None if it agrees."""
    given, expected = _plain(given), _plain(expected)
    if isinstance(given, list) and len(given) == 1 and not isinstance(expected, list | dict):
        given = given[0]
    if isinstance(expected, dict):
        return _dict_fault(given, expected, tolerance)
    if isinstance(expected, list):
        return _list_fault(given, expected, tolerance)
    if isinstance(expected, str):
        return None if isinstance(given, str) and given.split() == expected.split() else f"Your answer is {_describe(given)}, which is not it"
    return _number_fault(given, expected, tolerance)


def _dict_fault(given: Any, expected: Table, tolerance: float) -> str | None:
    if isinstance(given, list) and len(given) == len(expected):  # values in the order of the sentences
        given = dict(zip(expected, given, strict=True))
    if not isinstance(given, dict):
        return f"A dict with the keys {_names(expected)} is expected; your answer is {_describe(given)}"
    if missing := [key for key in expected if key not in given]:
        return f"There is no entry for {_names(missing)}"
    if extra := [key for key in given if key not in expected]:
        return f"There is an entry too many: {_names(extra)}"
    return _first_fault((repr(key), given[key], expected[key]) for key in expected if _fault(given[key], expected[key], tolerance))


def _list_fault(given: Any, expected: list[Any], tolerance: float) -> str | None:
    given = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(given, list):
        return f"A sequence of {len(expected)} is expected; your answer is {_describe(given)}"
    if len(given) != len(expected):
        return f"A sequence of {len(expected)} is expected; your answer has {len(given)}"
    pairs = enumerate(zip(given, expected, strict=True))
    return _first_fault((f"[{index}]", one, right) for index, (one, right) in pairs if _fault(one, right, tolerance))


def _first_fault(faults: Iterator[tuple[str, Any, Any]]) -> str | None:
    found = list(faults)
    if not found:
        return None
    where, given, right = found[0]
    more = f" ({len(found)} entries are off)" if len(found) > 1 else ""
    return f"At {where}: {_fault(given, right)}{more}"


def _number_fault(given: Any, expected: float, tolerance: float) -> str | None:
    if isinstance(given, bool) or not isinstance(given, int | float):
        return f"A number is expected; your answer is {_describe(given)}"
    if math.isnan(given):
        return "Your answer is nan: somewhere 0 · log 0 or inf − inf was computed"
    if given == expected:
        return None
    if math.isinf(expected):
        return f"{given:.12g} is not it: the answer is infinite"
    if abs(given - expected) <= tolerance * max(1.0, abs(expected)):
        return None
    size = "too large" if given > expected else "too small"
    if abs(given - expected) <= _ROUNDED * abs(expected):
        return f"{given:.12g} is close but {size}: agreement to 1e-9 is asked, so let Python compute the number instead of typing it rounded"
    return f"{given:.12g} is {size}"


def _is_negative(given: Any, expected: Any, unit: str) -> bool:
    return _is_number(given) and _is_number(expected) and expected != 0 and _number_fault(-given, expected, 1e-6) is None


def _is_in_bits(given: Any, expected: Any, unit: str) -> bool:
    if not (unit == "nats" and _is_number(given) and _is_number(expected)):
        return False
    return expected != 0 and _number_fault(given * math.log(2), expected, 1e-6) is None


def _is_unnormalised(given: Any, expected: Any, unit: str) -> bool:
    """The right proportions of a distribution, and another sum."""
    if not (isinstance(given, dict) and isinstance(expected, dict) and set(given) == set(expected) and all(map(_is_number, given.values()))):
        return False
    total = math.fsum(given.values())
    if abs(math.fsum(expected.values()) - 1) > TOLERANCE or not 0 < total < math.inf:
        return False
    return _fault({key: value / total for key, value in given.items()}, expected, 1e-6) is None


_COMMON: tuple[tuple[str, Callable[[Any, Any, str], bool]], ...] = (
    ("The size is right and the sign is wrong.", _is_negative),
    ("That is in bits; nats are asked: use the natural logarithm.", _is_in_bits),
    ("The proportions are right, but the probabilities do not sum to 1: divide by their sum.", _is_unnormalised),
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _describe(value: Any) -> str:
    if callable(value) and not hasattr(value, "tolist"):
        return "a function"
    value = _plain(value)
    return f"{value:.12g}" if isinstance(value, float) else f"{value!r:.60}" if isinstance(value, str | int) else f"a {type(value).__name__}"


def _names(keys: Any) -> str:
    return ", ".join(repr(key) for key in keys)


def _arguments(arguments: tuple[Any, ...]) -> str:
    def short(value: Any) -> str:
        return "{" + ", ".join(f"{key!r}: {short(item)}" for key, item in value.items()) + "}" if isinstance(value, dict) else f"{value:.3g}"

    return ", ".join(map(short, arguments))


def _with_hint(exercise: Exercise, fault: str) -> str:
    return f"{fault} Hint: {exercise.hint}" if exercise.hint else fault


# Pieces that references and mistakes share --------------------------------------------------------------------------


def _words(p: Table) -> Table:
    """'the cat' -> ('the', 'cat')."""
    return {tuple(text.split()): value for text, value in p.items()}


def _marginals(p: Table) -> list[Table]:
    """The distributions of the first and of the second word."""
    found: list[Table] = [{}, {}]
    for words, probability in _words(p).items():
        for position, word in enumerate(words):
            found[position][word] = found[position].get(word, 0.0) + probability
    return found


def _product(first: Table, second: Table) -> Table:
    return {f"{a} {b}": x * y for a, x in first.items() for b, y in second.items()}


def _independent(p: Table) -> Table:
    """The words of p, drawn independently."""
    return _product(*_marginals(p))


def _mean_field(p: Table, rounds: int = 2000) -> Table:
    """argmin KL(π‖p) over independent words, by coordinate descent: log π₁(a) = Σ_b π₂(b) log p(a b) + const, and so on."""
    first, second = ({word: 1 / len(side) for word in side} for side in _marginals(p))
    for _ in range(rounds):
        first = reference.softmax({a: math.fsum(second[b] * math.log(p[f"{a} {b}"]) for b in second) for a in first})
        second = reference.softmax({b: math.fsum(first[a] * math.log(p[f"{a} {b}"]) for a in first) for b in second})
    return _product(first, second)


def _tilted(q: Table, exponent: Table) -> Table:
    """q e^exponent, not normalised."""
    return {y: q[y] * math.exp(exponent[y]) for y in q}


def _normalised(weight: Table) -> Table:
    total = math.fsum(weight.values())
    return {y: w / total for y, w in weight.items()}


def _times(factor: float, r: Table) -> Table:
    return {y: factor * value for y, value in r.items()}


def _posterior(lam: float) -> Table:
    return reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, lam)[0]


def _random_table(generator: random.Random, outcomes: str = "abcd") -> Table:
    return reference.softmax({y: generator.gauss(0, 1) for y in outcomes})


def _without(p: Table, outcome: str) -> Table:
    return _normalised({y: 0.0 if y == outcome else probability for y, probability in p.items()})


# t01: what does KL measure? -----------------------------------------------------------------------------------------


def _kl_inputs(generator: random.Random) -> tuple[Any, ...]:
    """Two tables: full; p without mass somewhere; neither with mass there; q without mass where p has some."""
    p, q = _random_table(generator), _random_table(generator)
    kind = generator.randrange(4)
    return _without(p, "a") if kind in (1, 2) else p, _without(q, "a") if kind in (2, 3) else q


def _kl_skipping(p: Table, q: Table) -> float:
    return math.fsum(p[y] * math.log(p[y] / q[y]) for y in p if p[y] > 0 and q[y] > 0)


def _second_word_kl(weights: Table, p: Table, q: Table) -> float:
    """Σ_a weight(a) KL(p(·|a)‖q(·|a))."""
    return math.fsum(w * reference.kl(reference.next_token(p, (a,)), reference.next_token(q, (a,))) for a, w in weights.items())


def _chain(second_weights: Table | None = None) -> list[float]:
    """The two terms of KL(CORRELATED‖q), the second with other weights on the first word."""
    p, q = _words(CORRELATED), _words(FOUR_SENTENCES)
    first, second = reference.chain_rule(p, q, 2)
    return [first, second if second_weights is None else _second_word_kl(second_weights, p, q)]


def _chain_of_marginals() -> list[float]:
    return [reference.kl(p, q) for p, q in zip(_marginals(CORRELATED), _marginals(FOUR_SENTENCES), strict=True)]


_OTHER_WAY = "That is the KL the other way round: the first argument is the one that the mean is taken under."

_T01 = (
    Exercise(
        "t01.kl",
        reference.kl,
        "nats",
        (
            Mistake(_OTHER_WAY, lambda p, q: reference.kl(q, p)),
            Mistake(
                "That is the cross-entropy −Σ p log q; subtract the entropy of p.",
                lambda p, q: reference.expectation(p, lambda y: -math.log(q[y]) if q[y] > 0 else math.inf),
            ),
            Mistake("Where p has mass and q has none, KL is inf; your function leaves that outcome out.", _kl_skipping),
        ),
        "an outcome with p = 0 counts 0, whatever q is there; one with p > 0 and q = 0 makes the sum math.inf",
        _kl_inputs,
    ),
    Exercise(
        "t01.chain",
        _chain,
        "nats",
        (
            Mistake(
                "The second term compares the marginals of the second word. It must compare the conditionals, given the first word.",
                _chain_of_marginals,
            ),
            Mistake("The second term averages over first words from q; they come from p.", lambda: _chain(_marginals(FOUR_SENTENCES)[0])),
            Mistake("The second term sums over first words without weighting them; weight by p(first word).", lambda: _chain({"the": 1, "a": 1})),
            Mistake(_OTHER_WAY, lambda: reference.chain_rule(_words(FOUR_SENTENCES), _words(CORRELATED), 2)),
        ),
        "KL of the first words, then the mean over first words from p of KL between the next-word distributions",
    ),
    Exercise(
        "t01.mutual",
        lambda: reference.kl(FOUR_SENTENCES, _independent(FOUR_SENTENCES)),
        "nats",
        (
            Mistake(_OTHER_WAY, lambda: reference.kl(_independent(FOUR_SENTENCES), FOUR_SENTENCES)),
            Mistake("That is H(Y₁) + H(Y₂); subtract H(Y₁, Y₂).", lambda: reference.entropy(_independent(FOUR_SENTENCES))),
        ),
        "build the four products q₁(first word)·q₂(second word); then one call of kl",
    ),
    Exercise(
        "t01.product",
        lambda: _independent(CORRELATED),
        "",
        (
            Mistake("That is p itself, and no model with independent words can be that.", lambda: CORRELATED),
            Mistake("That is the reverse fit, which minimises KL(π‖p). Which π minimises KL(p‖π)?", lambda: _mean_field(CORRELATED)),
            Mistake("That is uniform. The forward fit keeps the marginals of p.", lambda: dict.fromkeys(CORRELATED, 1 / len(CORRELATED))),
        ),
        "minimising −E_p[log π₁(Y₁)] − E_p[log π₂(Y₂)] are two separate maximum-likelihood fits",
    ),
)


# t02: why does reward alone collapse? -------------------------------------------------------------------------------

STEP_SIZE = 0.1


def _step(pi: Table, r: Table, eta: float) -> Table:
    """One multiplicative step: π e^{ηr}, normalised."""
    return _normalised(_tilted(pi, _times(eta, r)))


def _step_inputs(generator: random.Random) -> tuple[Any, ...]:
    return _random_table(generator), {y: generator.gauss(0, 1) for y in "abcd"}, generator.uniform(0.05, 0.5)


def _steps_until(probability: float) -> int:
    """The first k with P('a dog') > probability after k steps from q."""
    pi, k = dict(FOUR_SENTENCES), 0
    while pi["a dog"] <= probability:
        pi, k = _step(pi, FOUR_REWARDS, STEP_SIZE), k + 1
    return k


def _best(r: Table) -> list[Any]:
    return [y for y in r if r[y] == max(r.values())]


def _point_mass(y: Any, p: Table) -> Table:
    return {x: float(x == y) for x in p}


_T02 = (
    Exercise(
        "t02.step",
        _step,
        "",
        (
            Mistake("That is π + ηr: probabilities are multiplied by e^(ηr), not added to.", lambda pi, r, eta: {y: pi[y] + eta * r[y] for y in pi}),
            Mistake(
                "That multiplies by 1 + ηr, the first two terms of e^(ηr); use math.exp.",
                lambda pi, r, eta: _normalised({y: pi[y] * (1 + eta * r[y]) for y in pi}),
            ),
            Mistake("That multiplies by e^(r/η); a small η must be a small step, e^(ηr).", lambda pi, r, eta: _step(pi, r, 1 / eta)),
            Mistake(
                "That is a softmax of ηr; it forgets the probabilities that the step starts from.",
                lambda pi, r, eta: reference.softmax(_times(eta, r)),
            ),
        ),
        "weight[y] = pi[y] * math.exp(eta * r[y]), then divide by the sum",
        _step_inputs,
    ),
    Exercise(
        "t02.steps",
        lambda: _steps_until(0.99),
        "",
        (
            Mistake("That is the last step with P('a dog') ≤ 0.99; the first one above it is asked.", lambda: _steps_until(0.99) - 1),
            Mistake("One too many: start to count at k = 0, where π is q.", lambda: _steps_until(0.99) + 1),
        ),
        "a loop from q, counting steps until pi['a dog'] > 0.99",
    ),
    Exercise(
        "t02.limit",
        lambda: reference.kl(_point_mass("a dog", FOUR_SENTENCES), FOUR_SENTENCES),
        "nats",
        (
            Mistake("That is log 4, which is right only where q is uniform.", lambda: math.log(len(FOUR_SENTENCES))),
            Mistake("That is the entropy of q. What remains is one sentence, of probability 1.", lambda: reference.entropy(FOUR_SENTENCES)),
            Mistake(_OTHER_WAY, lambda: math.inf),
        ),
        "all mass on 'a dog': one term is left in the sum",
    ),
    Exercise(
        "t02.tie",
        lambda: _normalised({y: FOUR_SENTENCES[y] if y in _best(TIED_REWARDS) else 0.0 for y in FOUR_SENTENCES}),
        "",
        (
            Mistake(
                "That shares equally between the two best; every step multiplies both by the same factor, so they keep the ratio that q gives them.",
                lambda: {y: float(y in _best(TIED_REWARDS)) / len(_best(TIED_REWARDS)) for y in FOUR_SENTENCES},
            ),
            Mistake("That is the limit for the old rewards, where 'a dog' alone is best.", lambda: _point_mass("a dog", FOUR_SENTENCES)),
            Mistake(
                "All mass on one of the two best; but every step multiplies both by the same factor.",
                lambda: _point_mass(_best(TIED_REWARDS)[0], FOUR_SENTENCES),
            ),
        ),
        "which sentences lose their mass? What happens to the ratio of the others?",
    ),
)


# t03: what does the KL term compute? --------------------------------------------------------------------------------

NEW_KL_COEF = 0.5


def _gap(lam: float) -> float:
    """λ KL(π‖π*_λ) of the course's policy."""
    return lam * reference.kl(FOUR_POLICY, _posterior(lam))


def _variance(p: Table) -> float:
    return reference.mean_and_variance(p, lambda y: FOUR_REWARDS[y])[1]


def _implied_reward(pi: Table, q: Table, lam: float) -> Table:
    """λ log π/q: the reward for which π is the posterior, with Z = 1."""
    return {y: lam * math.log(pi[y] / q[y]) for y in pi}


_T03 = (
    Exercise(
        "t03.posterior",
        lambda: _posterior(NEW_KL_COEF),
        "",
        (
            Mistake("That is the posterior at λ = 1; here λ = ½.", lambda: _posterior(1.0)),
            Mistake("The exponent is r/λ; yours is r·λ.", lambda: _posterior(1 / NEW_KL_COEF)),
            Mistake("That is a softmax of r/λ; it forgets the prior q.", lambda: reference.softmax(_times(1 / NEW_KL_COEF, FOUR_REWARDS))),
            Mistake(
                "That is π·exp(r/λ), normalised; the posterior starts from the prior q.",
                lambda: reference.posterior(FOUR_POLICY, FOUR_REWARDS, NEW_KL_COEF)[0],
            ),
        ),
        "q(y)·exp(r(y)/λ), divided by its sum",
    ),
    Exercise(
        "t03.gap",
        lambda: _gap(NEW_KL_COEF),
        "reward units",
        (
            Mistake("That is KL(π‖π*) in nats; the gap is λ times that, in reward units.", lambda: _gap(NEW_KL_COEF) / NEW_KL_COEF),
            Mistake("That is the gap at λ = 1; here λ = ½.", lambda: _gap(1.0)),
            Mistake(_OTHER_WAY, lambda: NEW_KL_COEF * reference.kl(_posterior(NEW_KL_COEF), FOUR_POLICY)),
            Mistake(
                "That is KL(π*‖π), without λ and the other way round: λ KL(π‖π*) is asked.",
                lambda: reference.kl(_posterior(NEW_KL_COEF), FOUR_POLICY),
            ),
            Mistake(
                "That is λ KL(π‖q): the distance from the prior, not from the posterior.",
                lambda: NEW_KL_COEF * reference.kl(FOUR_POLICY, FOUR_SENTENCES),
            ),
            Mistake(
                "That is log Z − J(π): λ is missing before log Z.",
                lambda: (
                    reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, NEW_KL_COEF)[1]
                    - reference.objective(FOUR_POLICY, FOUR_SENTENCES, FOUR_REWARDS, NEW_KL_COEF)
                ),
            ),
        ),
        "λ log Z − J(π), or λ KL(π‖π*): compute both, they must agree",
    ),
    Exercise(
        "t03.variance",
        lambda: _variance(_posterior(1.0)),
        "",
        (
            Mistake("That is the standard deviation; its square is asked.", lambda: math.sqrt(_variance(_posterior(1.0)))),
            Mistake(
                "That is the variance under the prior q; the derivative is taken at λ = 1, so it is under π*.", lambda: _variance(FOUR_SENTENCES)
            ),
            Mistake("That is E[r²]; subtract (E[r])².", lambda: reference.expectation(_posterior(1.0), lambda y: FOUR_REWARDS[y] ** 2)),
            Mistake("That is E[r], the first derivative of log Z.", lambda: reference.expectation(_posterior(1.0), lambda y: FOUR_REWARDS[y])),
        ),
        "E[r²] − (E[r])², both under π* at λ = 1",
    ),
    Exercise(
        "t03.reward",
        _implied_reward,
        "",
        (
            Mistake("That is log π/q, in nats; times λ it is in reward units.", lambda pi, q, lam: _implied_reward(pi, q, 1.0)),
            Mistake("The ratio is upside down: π/q is asked, not q/π.", lambda pi, q, lam: _implied_reward(q, pi, lam)),
            Mistake("That is λ·π/q; take the logarithm of the ratio.", lambda pi, q, lam: {y: lam * pi[y] / q[y] for y in pi}),
            Mistake("That divides by λ; solve π = q·exp(r/λ) for r.", lambda pi, q, lam: _implied_reward(pi, q, 1 / lam)),
        ),
        "solve π = q·exp(r/λ)/Z for r with Z = 1",
        lambda generator: (_random_table(generator), _random_table(generator), generator.uniform(0.1, 3.0)),
    ),
)

EXERCISES: dict[str, Exercise] = {exercise.name: exercise for exercise in (*_T01, *_T02, *_T03)}
