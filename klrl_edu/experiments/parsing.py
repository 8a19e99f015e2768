"""The words of a command line: a command's signature -> its options, their help, and one line for
what is misspelt.

tyro reads the signature and the docstring, writes the help and splits the words. Its messages are
boxes made for people, and what it offers programs for errors (`tyro._errors`) it calls private; so
nothing of what it prints is read here. The contract is its public one: words that it does not know
come back by `return_unknown_args`, a value is read by a constructor of ours
(`PrimitiveConstructorSpec`), and what is left to fail, an option or a command without its value, is
its exit code.
"""

import contextlib
import difflib
import inspect
import io
import itertools
import re
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

Command = Callable[..., None]
_HELP = ("-h", "--help")
_COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")  # for a shell, by tyro
_SHELLS = ("bash", "zsh", "tcsh")
_METAVARS: dict[Any, str] = {float: "NUMBER", int: "N", Path: "DIR", str: "TEXT"}
# what people type who know another tool -> what it is called here, where a command has it
_SYNONYMS = {
    "kl-coef": "lambda beta kl kl-beta kl-weight kl-penalty temperature tau lam coef",
    "lr": "learning-rate step-size alpha rate eta",
    "steps": "epochs iterations iters num-steps n-steps max-steps updates",
    "batch-size": "batch bs n samples num-samples minibatch-size",
    "loss": "algorithm algo method objective estimator",
    "model": "policy network arch architecture",
    "out": "output output-dir outdir dir directory path save folder o",
    "seed": "random-seed random-state rng",
    "device": "gpu cuda cpu",
    "schedule": "scheduler lr-schedule warmup",
    "separator": "sep delimiter",
    "normalize": "normalise weights unnormalized",
    "count": "top number show limit n k",
    "quiet": "silent q",
    "examples": "n trials repetitions count",
    "name": "only statement claim",
    "kind": "type",
    "problem": "table task",
    "max-executions": "limit max",
    "behaviour": "behavior sampler rollout",
    "stale": "staleness lag",
    "against": "versus vs other",
    "micro-batches": "micro-batch accumulation gradient-accumulation-steps",
}


class MisspeltError(Exception):
    """A command line that cannot be read: the message says what is wrong and where help is.

    No ValueError: tyro would turn that into a box.
    """


@dataclass(frozen=True)
class Word:
    """What a value is called in the help, e.g. TABLE; a mark in an argument's annotation."""

    metavar: str


@dataclass(frozen=True)
class Parsed:
    """A command and the arguments that it was asked for with."""

    command: Command
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Does what was asked."""
        self.command(*self.args, **self.options)


def parse(words: Sequence[str], commands: dict[str, Command], about: str) -> Parsed | None:
    """The command that the words ask for; None where they ask for help, which is then printed.

    Args:
        words: as typed, without the program's name.
        commands: name -> function; its positional-only parameters are the command's own words.
        about: one line on the program, above its help.

    Raises:
        MisspeltError: an unknown command or option, or a value that cannot be read.
    """
    if not words or words[0] in _HELP or words[0] in _COMPLETION:
        _check_completion(words)
        _print_help(list(words) or ["--help"], commands, about)
        return None
    name, rest = words[0], list(words[1:])
    if name not in commands:
        raise MisspeltError(_unknown_command(name, commands))
    return _parse_command(name, commands[name], _options_first(rest))


def _check_completion(words: Sequence[str]) -> None:
    """Refuses a shell that tyro completes nothing for."""
    if words and words[0] in _COMPLETION and (len(words) < 2 or words[1] not in _SHELLS):
        raise MisspeltError(f"{words[0]} needs a shell: {', '.join(_SHELLS)}")


def _options_first(words: list[str]) -> list[str]:
    """The words with what follows a "--", which holds no options, in front."""
    if "--" not in words:
        return words
    place = words.index("--")
    options, own = words[:place], words[place + 1 :]
    dashed = next((word for word in own if word.startswith("-")), None)
    if dashed is not None:
        raise MisspeltError(
            f"{dashed!r} comes after --, where nothing is an option; put options before it, and"
            f" write a name that starts with a hyphen as ./{dashed}"
        )
    return own + options


def _print_help(words: list[str], commands: dict[str, Command], about: str) -> None:
    listed = {name: _readable(command, name, print)[0] for name, command in commands.items()}
    for shown in listed.values():
        # in the list a command has its first paragraph alone
        shown.__doc__ = (shown.__doc__ or "").partition("\n\n")[0]
    with contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(listed, prog="klrl", description=about, args=words)


def _parse_command(name: str, command: Command, words: list[str]) -> Parsed | None:
    found: list[Parsed] = []
    readable, options = _readable(
        command, name, lambda *args, **given: found.append(Parsed(command, args, given))
    )
    asks_for_help = any(word in _HELP for word in words)
    # tyro's own complaints are boxes; ours, below, say the same in a line
    silence = contextlib.redirect_stderr(io.StringIO())
    try:
        with contextlib.nullcontext() if asks_for_help else silence:
            _, unknown = tyro.cli(
                readable,
                prog=f"klrl {name}",
                args=words,
                return_unknown_args=True,
                console_outputs=asks_for_help,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise MisspeltError(_incomplete(name, command, options, words)) from None
    if unknown:
        raise MisspeltError(_unknown_words(name, command, options, unknown, words))
    return found[0]


def _readable(
    command: Command, name: str, call: Callable[..., Any]
) -> tuple[Callable[..., Any], list[str]]:
    """A function that tyro reads like `command`, with our names for its values and our reading of
    them; and its options' names.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    read = {key: _argument(hints[key], parameter, name) for key, parameter in parameters.items()}

    def readable(*args: Any, **kwargs: Any) -> None:
        call(*args, **kwargs)

    readable.__doc__, readable.__name__ = _unwrapped(command), command.__name__
    readable.__annotations__ = {**read, "return": None}
    renamed = [parameter.replace(annotation=read[key]) for key, parameter in parameters.items()]
    # on a function of its own: the command keeps its signature
    readable.__signature__ = inspect.Signature(renamed)  # type: ignore[attr-defined]
    options = [
        _spelled(key)
        for key, parameter in parameters.items()
        if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
    ]
    return readable, options


def _unwrapped(command: Command) -> str:
    """The docstring with each argument's help on one line, for tyro to wrap anew."""
    return re.sub(r"\n {8,}(?=\S)", " ", inspect.getdoc(command) or "")


def _argument(hint: Any, parameter: inspect.Parameter, command: str) -> Any:
    """An argument's annotation as tyro takes it."""
    marks: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        marks = tuple(rest)
    positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    kept = [mark for mark in marks if not isinstance(mark, Word)]
    if positional:
        kept.append(tyro.conf.Positional)
    # a flag has no value for our constructor to read
    if hint is bool:
        return Annotated[(hint, *kept)] if kept else hint
    if parameter.default is None:  # the docstring says what happens by default
        kept.append(tyro.conf.arg(help_behavior_hint=""))
    repeatable = get_origin(hint) is tuple
    plain = get_args(hint)[0] if repeatable else _without_none(hint)
    word = next((mark.metavar for mark in marks if isinstance(mark, Word)), None)
    place = word or parameter.name if positional else f"--{_spelled(parameter.name)}"
    spec = PrimitiveConstructorSpec[Any](
        nargs=1,
        metavar=word or _metavar(plain),
        instance_from_str=lambda words: _read(words[0], plain, place, command),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )
    if repeatable:
        each: Any = Annotated[(plain, spec)]
        return Annotated[(tuple[each, ...], tyro.conf.UseAppendAction, *kept)]
    return Annotated[(hint, spec, *kept)]


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(one for one in get_args(hint) if one is not type(None))
    return hint


def _metavar(plain: Any) -> str:
    if get_origin(plain) is Literal:
        return "{" + ",".join(get_args(plain)) + "}"
    return _METAVARS[plain]


def _read(word: str, plain: Any, place: str, command: str) -> Any:
    """A typed word as the value it stands for."""
    if get_origin(plain) is Literal:
        choices = get_args(plain)
        if word in choices:
            return word
        raise MisspeltError(
            f"invalid choice {word!r} for {place}; choose from {', '.join(choices)}"
            f"{_perhaps(word, choices)} {_see(command)}"
        )
    try:
        return plain(word)
    except ValueError:
        wanted = "a whole number, such as 100" if plain is int else "a number, such as 0.5"
        raise MisspeltError(f"{place} {word!r} is not {wanted} {_see(command)}") from None


def _unknown_command(name: str, commands: Iterable[str]) -> str:
    known = list(commands)
    return (
        f"unknown command {name!r}{_perhaps(name, known)}; the commands are {', '.join(known)}"
        " (klrl --help)"
    )


def _unknown_words(
    name: str, command: Command, options: list[str], unknown: Sequence[str], words: Sequence[str]
) -> str:
    wrong = next((word for word in unknown if _like_an_option(word)), None)
    if wrong is None:
        flag = _flag_before(unknown[0], command, words)
        if flag is not None:
            return f"{flag} takes no value: leave {unknown[0]!r} out {_see(name)}"
        return (
            f"{unknown[0]!r} is one word too many for klrl {name}; put a name with blanks in quotes"
            f" {_see(name)}"
        )
    typed = wrong.partition("=")[0]
    stem = typed.strip("-").replace("_", "-").lower()
    # what other tools call it goes before what is spelt alike
    near = [option for option in options if stem in _SYNONYMS.get(option, "").split()][:1]
    near = near or difflib.get_close_matches(stem, options, n=1)
    meant = f". Perhaps you meant: --{near[0]}" if near else ""
    listed = ", ".join(f"--{option}" for option in options)
    # one hyphen and a point or a slash: a file, more likely
    file = f", and a file is written ./{typed}" if re.match(r"-[^-].*[./]", typed) else ""
    return f"{name} has no option {typed}{meant}; it takes {listed}{file} {_see(name)}"


def _flag_before(value: str, command: Command, words: Sequence[str]) -> str | None:
    """The option without a value that a word was given to as its value, if any."""
    hints = get_type_hints(command, include_extras=True)
    flags = {f"--{_spelled(key)}" for key, hint in hints.items() if _is_flag(hint)}
    for word, following in itertools.pairwise([*words, ""]):
        option, equals, given = word.replace("_", "-").partition("=")
        if option in flags and (given == value if equals else following == value):
            return option
    return None


def _incomplete(name: str, command: Command, options: list[str], words: Sequence[str]) -> str:
    """What is missing: the value of an option, or else a word of the command's own."""
    hints = get_type_hints(command, include_extras=True)
    valued = {f"--{option}" for option in options if not _is_flag(hints[option.replace("-", "_")])}
    for word, following in itertools.pairwise([*words, None]):
        assert word is not None
        bare = word.replace("_", "-") in valued
        if bare and (following is None or _like_an_option(following)):
            return f"{word} lacks its value {_see(name)}"
    # after an option that it does not know tyro takes no word for the command's own
    unknown = [word for word in words if _like_an_option(word) and not _known(word, options)]
    if unknown:
        return _unknown_words(name, command, options, unknown, words)
    own = []
    for key, parameter in inspect.signature(command).parameters.items():
        positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        if positional and parameter.default is inspect.Parameter.empty:
            marks = get_args(hints[key])[1:]
            words_for_it = [mark.metavar for mark in marks if isinstance(mark, Word)]
            own.append(words_for_it[0] if words_for_it else key.upper())
    if own:
        return f"Missing: klrl {name} {' '.join(own)} {_see(name)}"
    return f"the arguments of klrl {name} cannot be read {_see(name)}"


def _is_flag(hint: Any) -> bool:
    return hint is bool or (get_origin(hint) is Annotated and get_args(hint)[0] is bool)


def _like_an_option(word: str) -> bool:
    # -0.5 is a value, and a lone hyphen no option
    return len(word) > 1 and word.startswith("-") and not _is_number(word)


def _known(word: str, options: list[str]) -> bool:
    stem = word.partition("=")[0].removeprefix("--").replace("_", "-")
    return not stem or stem in options or stem.removeprefix("no-") in options


def _perhaps(typed: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(typed, known, n=1)
    return f". Perhaps you meant: {near[0]}" if near else ""


def _see(name: str) -> str:
    return f"(klrl {name} --help)"


def _spelled(parameter: str) -> str:
    return parameter.replace("_", "-")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
