"""The words of `klrl audit` as what the audit takes: problems of one prior, a policy, behaviour
policies, what parameters are, and what a loss is held against.
"""

import ast
import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from klrl_edu.audit.adapting import ADVANTAGES, FIELDS
from klrl_edu.audit.comparisons import Against
from klrl_edu.core.errors import InputError
from klrl_edu.exact.posterior import posterior
from klrl_edu.experiments.loading import find_function
from klrl_edu.experiments.runner import ProblemSource
from klrl_edu.models.contract import LanguageModel, sequence_log_probs
from klrl_edu.models.distorted import nucleus, tempered, top_k
from klrl_edu.models.table import SequenceTable
from klrl_edu.problems.examples import four_sentences_policy
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward

_AGREE = 1e-9  # probabilities that are equal but for how a table writes them
_MEANT = 0.8  # likeness of a misspelt name
Distortion = Callable[[LanguageModel, float], LanguageModel]
_DISTORTIONS: dict[str, Distortion] = {
    "temperature": tempered,
    "top_k": lambda model, k: top_k(model, int(k) if k.is_integer() else k),  # type: ignore[arg-type]
    "nucleus": nucleus,
}


def problems_of(names: Sequence[str], kl_coefs: Sequence[float]) -> list[Problem]:
    """Problems of one prior: a name and a λ each, where one stands for all.

    Raises:
        InputError: as many λ as problems, and neither is one; tables of other sentences or
            probabilities; what `ProblemSource` refuses.
    """
    count = max(len(names), len(kl_coefs))
    for given in (names, kl_coefs):
        if len(given) not in (1, count):
            raise InputError(
                f"--problem is given {len(names)} times and --kl-coef {len(kl_coefs)} times; give"
                " one --kl-coef for all problems, or one each in their order."
            )
    names = list(names) * (count // len(names))
    kl_coefs = list(kl_coefs) * (count // len(kl_coefs))
    first = ProblemSource(names[0], kl_coefs[0]).load()
    others = [_beside(first, names[0], *pair) for pair in zip(names[1:], kl_coefs[1:], strict=True)]
    return [first, *others]


def _beside(first: Problem, first_name: str, name: str, kl_coef: float) -> Problem:
    """Another problem, on the very prior of the first."""
    if name == first_name:
        return dataclasses.replace(first, kl_coef=kl_coef)
    problem = ProblemSource(name, kl_coef).load()
    law, rewards = _law_and_rewards(problem)
    first_law, _ = _law_and_rewards(first)
    if law.keys() != first_law.keys() or any(abs(law[y] - first_law[y]) > _AGREE for y in law):
        raise InputError(
            f"--problem {name}: its sentences or their probabilities are not those of"
            f" {first_name}; problems in one batch share a prior and differ in rewards and kl_coef."
        )
    # by text, as the tables may list their sentences in different orders
    return Problem(first.prior, table_reward(rewards, first.space), kl_coef)


def _law_and_rewards(problem: Problem) -> tuple[dict[str, float], dict[str, float]]:
    """The probability and the reward of each sentence with prior mass."""
    support = posterior(problem).enumerated()
    texts = problem.space.decode(support.tokens)
    law = dict(zip(texts, support.log_prior.exp().tolist(), strict=True))
    return law, dict(zip(texts, support.rewards.tolist(), strict=True))


def policy_for(problems: Sequence[Problem], name: str) -> SequenceTable:
    """The policy under audit: (.5, .2, .1, .2) for four-sentences, else the tilted prior."""
    return four_sentences_policy() if name == "four-sentences" else tilted_prior(problems)


def tilted_prior(problems: Sequence[Problem]) -> SequenceTable:
    """A policy that is neither prior nor posterior: log π = log q + cos k + constant, k = 1, 2, …
    on the sequences with prior mass that no problem forbids.
    """
    support = posterior(problems[0]).enumerated()
    rewards = [problem.token_rewards(support.tokens).sum(-1) for problem in problems]
    kept = (torch.stack(rewards) > -math.inf).all(0)
    tokens, log_prior = support.tokens[kept], support.log_prior[kept]
    tilt = torch.cos(torch.arange(1, len(tokens) + 1, dtype=torch.float64))
    return SequenceTable(problems[0].space, tokens, log_prior + tilt)


def behaviours_of(
    words: Sequence[str], shares: Sequence[float], policy: SequenceTable, prior: LanguageModel
) -> dict[str, LanguageModel]:
    """label -> the policy that draws, from `--behaviour` and `--stale`.

    Raises:
        InputError: a word that names none, a number that does not fit, or one twice.
    """
    listed = [(word, _behaviour(word, policy, prior)) for word in words]
    for share in shares:
        if not 0 <= share <= 1:
            raise InputError(
                f"--stale {share:g} is no share; give a number from 0 (the policy itself) to 1 (the"
                " prior)."
            )
        listed.append((f"stale {share:g}", _between(policy, prior, share)))
    twice = [label for label, _ in listed if [other for other, _ in listed].count(label) > 1]
    if twice:
        raise InputError(f"the behaviour policy {twice[0]!r} is given twice; remove one.")
    return dict(listed)


def _behaviour(word: str, policy: SequenceTable, prior: LanguageModel) -> LanguageModel:
    if word in ("policy", "prior"):
        return _between(policy, prior, float(word == "prior"))
    name, equals, value = word.partition("=")
    name = name.replace("-", "_")
    if name not in _DISTORTIONS or not equals:
        raise InputError(
            f"--behaviour {word!r} names no policy; give temperature=0.6, top_k=2, nucleus=0.9,"
            " prior or policy."
        )
    try:
        number = float(value)
    except ValueError:
        raise InputError(f"--behaviour {word!r}: {value!r} is no number, such as 0.6.") from None
    return _DISTORTIONS[name](policy, number)


@torch.no_grad()
def _between(policy: SequenceTable, prior: LanguageModel, share: float) -> SequenceTable:
    """log μ = (1 − share) log π + share log q + constant, on π's sequences."""
    log_pi, log_q = (sequence_log_probs(model, policy.tokens) for model in (policy, prior))
    return SequenceTable(policy.space, policy.tokens, (1 - share) * log_pi + share * log_q)


def adapt_of(words: Sequence[str]) -> dict[str, Any] | None:
    """parameter -> name of a field or of advantages, or a plain value; None where nothing is said.

    Raises:
        InputError: a word that is no parameter=name, one parameter twice, a misspelt name.
    """
    adapt: dict[str, Any] = {}
    for word in words:
        parameter, _, value = word.partition("=")
        if not parameter.isidentifier() or not value:
            raise InputError(
                f"--adapt {word!r} cannot be read; write parameter=name, such as lp=log_probs or"
                " advantages=leave_one_out, or parameter=value, such as clip=0.1."
            )
        if parameter in adapt:
            raise InputError(f"--adapt gives {parameter} twice; remove one.")
        adapt[parameter] = _meaning(word, value)
    return adapt or None


def _meaning(word: str, value: str) -> Any:
    """A name as it is, else a Python value, else the text itself."""
    # names first: to literal_eval they are no values
    if value in FIELDS or value in ADVANTAGES:
        return value
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        near = difflib.get_close_matches(value, [*FIELDS, *ADVANTAGES], n=1, cutoff=_MEANT)
    if near:
        raise InputError(
            f"--adapt {word!r}: {value!r} is no name of a field; did you mean {near[0]}? A text of"
            " its own is written in quotes."
        )
    return value


def against_of(words: Sequence[str]) -> dict[str, Against] | None:
    """label -> a loss, or the file of a report; None where nothing is said.

    Raises:
        InputError: no such loss.
    """
    found: dict[str, Against] = {}
    for word in words:
        other: Against = word if word.endswith(".json") else find_function(word)
        found[f"the mean of {word}"] = other
    return found or None
