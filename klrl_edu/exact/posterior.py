"""The posterior of a problem: picks the method, and says which it took.

    π*(y) = q(y) e^{r(y)/λ} / Z,    value = λ log Z = max_π J(π)                                 (1)

Korbak, Perez & Buckley (2022), eq. 3; Levine (2018).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from klrl_edu.closed_forms.soft_maximum import soft_log_evidence, soft_value
from klrl_edu.closed_forms.tilt import tilt_log_ratio
from klrl_edu.core import logspace
from klrl_edu.core.arguments import check_arguments
from klrl_edu.core.display import html_table, text_table
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import check_count
from klrl_edu.core.weighted import WeightedSequences
from klrl_edu.exact.enumeration import Support, not_enumerated, problem_support
from klrl_edu.exact.forward_backward import backward
from klrl_edu.exact.lattice import build_lattice
from klrl_edu.exact.soft_bellman import edge_log_prior, soft_bellman
from klrl_edu.exact.structured import StructuredPosterior
from klrl_edu.exact.support_sums import ExactSums, sums_on_support
from klrl_edu.models.by_prompt import PromptedModels
from klrl_edu.models.contract import MAX_SEQUENCES, LanguageModel
from klrl_edu.models.finite_state import FiniteStateModel
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.automata import as_automaton_reward
from klrl_edu.problems.problem import Problem, check_problems

METHODS = ("auto", "enumeration", "soft_bellman", "forward_backward")
Method = Literal["auto", "enumeration", "soft_bellman", "forward_backward"]
_SHOWN = 10


@dataclass(frozen=True)
class Posterior:
    """An exact posterior.

    Attributes:
        problem: what it is the posterior of.
        model: π* as a LanguageModel.
        value: λ log Z in reward units, the maximum of J; finite also where `log_evidence`
            overflows. max r on the support at λ = 0, E_q[r] at inf.
        log_evidence: log Z in nats; ±inf where it overflows or λ = 0.
        method: how it was computed.
        support: the prior's sequences, where they were enumerated; None where the space is too
            large.
    """

    problem: Problem
    model: LanguageModel
    value: Tensor
    log_evidence: Tensor
    method: str
    support: Support | None = None

    in_words: ClassVar[str] = "a posterior, which posterior(problem) gives"

    @property
    def log_probs(self) -> Tensor:
        """log π*(y) [K] in nats of the enumerated support, in its order.

        Raises:
            InputError: the support was not enumerated.
        """
        return self.enumerated().tilted(self.problem.kl_coef).log_posterior

    @torch.no_grad()
    def kl_to_prior(self) -> Tensor:
        """KL(π*‖q) in nats, with its digits at every λ: about Var_q(r)/2λ² where λ is large, which
        the difference of log π* and log q has lost.
        """
        if self.support is None and isinstance(self.model, StructuredPosterior):
            return self.model.kl_to_prior()
        support = self.enumerated()
        log_ratio = tilt_log_ratio(support.log_prior, support.rewards, self.problem.kl_coef)
        return logspace.kl_of_tilt(support.log_prior, log_ratio)

    def enumerated(self) -> Support:
        """The support, or an error where there is none."""
        if self.support is None:
            raise not_enumerated(self.method)
        return self.support

    @torch.no_grad()
    def against(self, approximation: LanguageModel | WeightedSequences) -> ExactSums:
        """Exact sums over all sequences of an approximation π against π*.

        They run over the support where it was enumerated, and by contexts for an n-gram policy
        where it was not.

        Raises:
            InputError: the support was not enumerated, and the approximation is no n-gram policy or
                the prior's contexts are hidden; compare by samples.
        """
        if self.support is None and isinstance(self.model, StructuredPosterior):
            return self.model.against(approximation)
        return sums_on_support(
            approximation, self.enumerated(), self.log_probs, self.problem.prompt
        )

    def rows(self, count: int | None = None) -> list[tuple[str, float, float, float]]:
        """(text, prior, reward, posterior) of the `count` most probable sequences; None: all."""
        if count is not None:
            check_count(count, "count", 0)
        support, log_probs = self.enumerated(), self.log_probs
        order = torch.argsort(log_probs, descending=True, stable=True)[:count]
        texts = self.problem.space.decode(support.tokens[order])
        columns = (support.log_prior[order].exp(), support.rewards[order], log_probs[order].exp())
        return list(zip(texts, *(column.tolist() for column in columns), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the table."""
        return {
            "kl_coef": self.problem.kl_coef,
            "method": self.method,
            "value": float(self.value),
            "log_evidence": float(self.log_evidence),
            "support_size": None if self.support is None else len(self.support.tokens),
        }

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"Posterior({self.problem!r}, method={self.method!r}, value={float(self.value):.6g})"

    def text(self, count: int = _SHOWN) -> str:
        """The value, log Z and the `count` most probable sequences as plain text."""
        check_count(count, "count", 0)
        head = (
            f"posterior at kl_coef = {self.problem.kl_coef:g} by {self.method}:"
            f" log Z = {float(self.log_evidence):.12g} nats,"
            f" λ log Z = {float(self.value):.12g}"
        )
        if self.support is None:
            return head
        lines = [head, text_table(*self._table(count))]
        more = len(self.support.tokens) - count
        if more > 0:
            lines.append(f"… and {more:,} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(*self._table(_SHOWN)) if self.support is not None else f"<p>{self}</p>"

    def _table(self, count: int) -> tuple[list[str], list[tuple[str, float, float, float]]]:
        return ["sequence", "prior", "reward", "posterior"], self.rows(count)


@torch.no_grad()
def posterior(
    problem: Problem, method: Method = "auto", max_sequences: int = MAX_SEQUENCES
) -> Posterior:
    """The exact posterior.

    Args:
        method: "enumeration" (the support as a SequenceTable), "soft_bellman" (its prefix trie as a
            PrefixTable), "forward_backward" (an n-gram or hidden Markov prior with an automaton's
            reward, any number of sequences, as a StructuredPosterior), or "auto": forward_backward
            where it applies and the space has more than `max_sequences`; else soft_bellman for a
            network prior with a reward that an automaton or a per-token table describes; else
            enumeration.
        max_sequences: the largest support to enumerate.

    Raises:
        TooLargeError: the support is larger; the message has the count and the remedy.
        InfeasibleError: every supported sequence has reward −inf.
        InputError: an unknown method, one that does not apply, a NaN or +inf reward on the support.
    """
    check_arguments("posterior(problem)", problem=(problem, Problem))
    if method not in METHODS:
        raise InputError(f"method = {method!r} is not known; choose from {', '.join(METHODS)}.")
    check_count(max_sequences, "max_sequences")
    if method == "auto":
        method = _choose(problem, max_sequences)
    if method == "forward_backward":
        return _by_forward_backward(problem)
    support = problem_support(problem, max_sequences)
    if method == "soft_bellman":
        return _by_soft_bellman(problem, support)
    tilted = support.tilted(problem.kl_coef)
    model = SequenceTable(problem.space, support.tokens, tilted.log_posterior)
    model.for_prompt(problem.prompt)
    return Posterior(problem, model, tilted.value, tilted.log_evidence, "enumeration", support)


def _choose(problem: Problem, max_sequences: int) -> Method:
    """The method that "auto" takes."""
    if as_automaton_reward(problem.reward, problem.space) is None:
        return "enumeration"  # no causal form of the reward is known
    # few sequences are quicker to list, and then the posterior has its table
    if isinstance(problem.prior, FiniteStateModel):
        return "forward_backward" if problem.space.size > max_sequences else "enumeration"
    # a table is its own list; a network is read node by node of the trie
    is_table = isinstance(problem.prior, SequenceTable | PrefixTable)
    return "enumeration" if is_table else "soft_bellman"


def _by_forward_backward(problem: Problem) -> Posterior:
    lattice = build_lattice(problem)
    model = StructuredPosterior(lattice, backward(lattice)).for_prompt(problem.prompt)
    value = soft_value(model.anchor, model.log_mass, problem.kl_coef)
    log_evidence = soft_log_evidence(model.anchor, model.log_mass, problem.kl_coef)
    return Posterior(problem, model, value, log_evidence, "forward_backward")


def feasible_prior(
    problem: Problem | Sequence[Problem], max_sequences: int = MAX_SEQUENCES
) -> LanguageModel:
    """q restricted to the sequences with r > −inf and renormalised: the limit of π* at λ = inf.

    It has the support of π* at every λ > 0.

    A SequenceTable, or a StructuredPosterior where `posterior` takes forward–backward; it belongs
    to the problem's prompt. Of several problems, of different prompts: PromptedModels, which pick
    the problem's own by the prompt and refuse others.

    Hard rewards leave the policy gradient undefined elsewhere:
    `restrict_to_support(policy, feasible_prior(problem))`.

    Raises:
        As `posterior`.
    """
    if not isinstance(problem, Problem):
        listed = check_problems(problem)
        return PromptedModels([feasible_prior(one, max_sequences) for one in listed])
    if _choose(problem, max_sequences) == "forward_backward":
        return _by_forward_backward(replace(problem, kl_coef=math.inf)).model
    support = problem_support(problem, max_sequences)
    feasible = support.rewards > -math.inf
    model = SequenceTable(problem.space, support.tokens[feasible], support.log_prior[feasible])
    return model.for_prompt(problem.prompt)


@dataclass(frozen=True)
class _EnumeratedReward:
    """Rewards [N,T] read from the row of the support that each sequence is; NaN off the support."""

    support: Support

    def __call__(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        row = self.support.trie.rows_of(tokens)
        return torch.where(row[:, None] >= 0, self.support.token_rewards[row], math.nan)


def looked_up(target: Posterior) -> Problem:
    """The same problem, prompt included, with log q and r read from the enumerated support.

    The numbers are the same, without computing them again at each training step.

    Raises:
        InputError: the support was not enumerated.
    """
    check_arguments("looked_up(target)", target=(target, Posterior))
    support, problem = target.enumerated(), target.problem
    trie = support.trie
    # −inf wherever no edge leads: what was not enumerated has no mass
    logits = support.log_prior.new_full((trie.nodes, problem.space.vocab_size), -math.inf)
    logits[trie.parent, trie.token] = edge_log_prior(support)
    prior = PrefixTable(problem.space, support.tokens, logits).requires_grad_(False)
    prior.for_prompt(problem.prompt)
    return Problem(prior, _EnumeratedReward(support), problem.kl_coef, problem.prompt)


def _by_soft_bellman(problem: Problem, support: Support) -> Posterior:
    values = soft_bellman(support, problem.kl_coef)
    trie = values.trie
    logits = values.log_policy.new_full((trie.nodes, problem.space.vocab_size), -math.inf)
    logits[trie.parent, trie.token] = values.log_policy
    model = PrefixTable(problem.space, support.tokens, logits).for_prompt(problem.prompt)
    value = values.state_values[0]
    log_evidence = soft_log_evidence(values.anchor, values.log_mass, problem.kl_coef)
    return Posterior(problem, model, value, log_evidence, "soft_bellman", support)
