"""Where the next batch comes from: one loop trains on any of these, and the audit enumerates those
whose law it can.

                 who drew the sequences           beside them                     law, for the audit
    on_policy    the policy itself                prior, reward                   π
    behaviour    another policy μ, or the prior   prior, reward, log μ            μ
    support      nobody: each sequence once       prior, reward                   one batch
    replay       a source, some steps ago         as there; log μ stays           none
    pairs        a table of preferences           prior, which of two won         its weights
    texts        a table of texts                 nothing                         its weights

A source is a function policy -> Batch: `log_probs` carry the gradient of the policy as it is now.
Any function of that form trains too. N sequences, T tokens, S prompt tokens, P rows of a table.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.arguments import check_arguments, check_draw, describe
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError, UnsupportedPolicyError
from klrl_edu.core.numbers import as_numbers
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.core.validation import check_count, check_kl_coef, check_same_space
from klrl_edu.exact.enumeration import problem_support
from klrl_edu.exact.support_sums import support_log_mass
from klrl_edu.learning.batches import (
    Batch,
    absent,
    score_batch,
    stacked_prompts,
)
from klrl_edu.models.contract import (
    LanguageModel,
    batch_prompt,
    conditional_log_probs,
    device_of,
    sample_scored,
    token_log_probs,
)
from klrl_edu.problems.problem import Problem, check_problems

Source = Callable[[LanguageModel], Batch]
"""What gives the next batch for the policy as it is now: one's own function, or one of these."""

_LOOKED_AT = 16  # sequences of the prior along which an unrestricted policy is looked for


def on_policy(
    problem: Problem | Sequence[Problem], size: int = 64, *, draw: Draw, distributions: bool = False
) -> "PolicySamples":
    """Fresh samples of the policy itself, `size` a problem; what a Problem is short for.

    Args:
        problem: one, or several that share a prior; their prompts are read in one pass.
        size: sequences a problem.
        draw: the randomness, e.g. `seeded_draw(0)`.
        distributions: score full next-token distributions [N,T,V] too.
    """
    return PolicySamples(tuple(check_problems(problem)), size, draw, None, distributions)


def behaviour(
    model: LanguageModel,
    problem: Problem | Sequence[Problem],
    size: int = 64,
    *,
    draw: Draw,
    distributions: bool = False,
) -> "PolicySamples":
    """Samples of another policy μ, scored by the policy: stale weights, the prior (DPG), any model.

    Args:
        model: μ, on the problem's space and within the policy's support; it stays as it is.
        Others: as in `on_policy`.
    """
    call = "sources.behaviour(model, problem)"
    check_arguments(call, model=(model, LanguageModel), problem=(problem, object))
    problems = tuple(check_problems(problem))
    check_same_space(model.space, problems[0].space, "behaviour and problem")
    return PolicySamples(problems, size, draw, model, distributions)


def support(problem: Problem | Sequence[Problem], *, distributions: bool = False) -> "WholeSupport":
    """Every supported sequence with a finite reward once a problem: no sampling, for losses that
    sum over the space.

    Args:
        problem: one, or several that share a prior.
        distributions: score full next-token distributions [N,T,V] too.

    Raises:
        TooLargeError: the support is too large to list.
    """
    problems = tuple(check_problems(problem))
    groups = tuple(_feasible_sequences(each) for each in problems)
    return WholeSupport(problems, groups, distributions)


def replay(source: Source, epochs: int) -> "Replay":
    """Each batch of a source `epochs` times in a row, scored anew by the policy: PPO's epochs.

    `behaviour_log_probs` stay those of whoever drew the batch, so ratios move away from 1.

    Args:
        source: gives a fresh batch every `epochs` steps.
        epochs: updates on a batch, at least 1.
    """
    if not callable(source):
        raise InputError(
            f"sources.replay(source, epochs): source is {describe(source)}; expected what gives"
            " batches, such as sources.on_policy(problem, size, draw=…)."
        )
    check_count(epochs, "epochs")
    return Replay(source, epochs)


def pairs(
    chosen: Sequence[str] | Tensor,
    rejected: Sequence[str] | Tensor,
    prior: LanguageModel,
    kl_coef: float,
    size: int | None = None,
    *,
    draw: Draw | None = None,
    weights: Sequence[float] | Tensor | None = None,
    prompt: Tensor | None = None,
) -> "Table":
    """Preference pairs: two sequences of one group, of which the one that won has reward 1.

    Args:
        chosen, rejected: P texts, or tokens [P,T]; chosen[i] was preferred to rejected[i].
        prior: the reference model q, whose log-probabilities stand beside the policy's.
        kl_coef: λ (DPO's β).
        size: pairs a step, drawn with replacement; None gives all of them at each step.
        draw: the randomness, where `size` is given.
        weights: P, how often a pair is drawn relative to the others; equally by default.
        prompt: [S], the same for all, or [P,S] with −1 as left padding; or None.
    """
    check_arguments("sources.pairs(chosen, rejected, prior)", prior=(prior, LanguageModel))
    space = prior.space
    if len(chosen) != len(rejected):
        raise InputError(
            f"{len(chosen)} texts were chosen and {len(rejected)} rejected; a pair has one of each."
        )
    sides = torch.stack([_as_tokens(side, space) for side in (chosen, rejected)], 1)  # [P,2,T]
    kl_coef = check_kl_coef(kl_coef)
    log_weights = _log_weights(weights, len(sides), size)
    return Table(sides, space, log_weights, size, draw, prompt, prior, kl_coef)


def texts(
    data: Sequence[str] | Tensor,
    space: SequenceSpace,
    size: int | None = None,
    *,
    draw: Draw | None = None,
    weights: Sequence[float] | Tensor | None = None,
    prompt: Tensor | None = None,
) -> "Table":
    """Plain text without prior and reward: pretraining and demonstrations.

    Args:
        data: P texts, or tokens [P,T] of the space.
        space: where they live, the policy's.
        size: texts a step, drawn with replacement; None gives all of them at each step.
        Others: as in `pairs`.
    """
    check_arguments("sources.texts(data, space)", space=(space, SequenceSpace))
    rows = _as_tokens(data, space)[:, None]
    log_weights = _log_weights(weights, len(rows), size)
    return Table(rows, space, log_weights, size, draw, prompt)


class _AboutProblems:
    """What the sources of one problem or several have in common."""

    problems: tuple[Problem, ...]

    @property
    def prior(self) -> LanguageModel:
        """q, which the problems share."""
        return self.problems[0].prior

    @property
    def space(self) -> SequenceSpace:
        """Where the sequences live."""
        return self.prior.space


@dataclass(frozen=True)
class PolicySamples(_AboutProblems):
    """Samples of the policy or of a behaviour model; see `on_policy` and `behaviour`."""

    problems: tuple[Problem, ...]
    size: int
    draw: Draw
    behaviour: LanguageModel | None
    distributions: bool

    def __post_init__(self) -> None:
        check_count(self.size, "size")
        check_draw(self.draw)

    def __call__(self, policy: LanguageModel) -> Batch:
        drawn_by = policy if self.behaviour is None else self.behaviour
        prompts = stacked_prompts(self.problems)
        if prompts is None:  # one law for all problems, which differ in reward and λ
            count = self.size * len(self.problems)
            tokens, log_probs = sample_scored(drawn_by, count, draw=self.draw)
        else:
            # every prompt in one pass; the rows of a problem stand together
            tokens, log_probs = sample_scored(drawn_by, self.size, draw=self.draw, prompts=prompts)
        own = self.behaviour is None
        batch = score_batch(
            policy,
            self.problems,
            tokens.split(self.size),
            # what drew them has scored them, gradient included
            log_probs=log_probs if own else None,
            distributions=self.distributions,
            drawn_by="the policy" if own else "the behaviour policy",
        )
        if own:
            return batch
        # μ may give what π never does, and −inf has no gradient
        _refuse_impossible(batch.log_probs, batch.tokens, self.space, "the policy")
        return replace(batch, behaviour_log_probs=log_probs.detach())

    def check(self, policy: LanguageModel) -> None:
        """Refuses a policy that samples where the prior has no mass, before the first step."""
        if self.behaviour is None:
            # π draws itself; of another policy each drawn text is looked at as it is scored
            for problem in self.problems:
                _refuse_unrestricted(policy, problem, self.draw)


@dataclass(frozen=True)
class WholeSupport(_AboutProblems):
    """Every sequence once; see `support`."""

    problems: tuple[Problem, ...]
    groups: tuple[Tensor, ...]
    distributions: bool

    def __call__(self, policy: LanguageModel) -> Batch:
        return score_batch(
            policy,
            self.problems,
            self.groups,
            distributions=self.distributions,
            complete=True,
        )

    def check(self, policy: LanguageModel) -> None:
        """Refuses a policy with mass anywhere else."""
        # a sum over the support would miss mass elsewhere without a word
        for problem, tokens in zip(self.problems, self.groups, strict=True):
            _refuse_stray_mass(policy, problem, tokens)


@dataclass
class Replay:
    """A source whose batches come several times; see `replay`."""

    source: Source
    epochs: int
    _left: int = field(default=0, init=False, repr=False)
    _batch: Batch | None = field(default=None, init=False, repr=False)

    def __call__(self, policy: LanguageModel) -> Batch:
        if self._left == 0 or self._batch is None:
            self._batch, self._left = self.source(policy), self.epochs
            batch = self._batch
        else:
            # the last update moved π, and backward freed the graph of its log-probabilities
            batch = rescored(self._batch, policy)
        self._left -= 1
        return batch

    def check(self, policy: LanguageModel) -> None:
        """What the inner source asks of a policy."""
        check_policy(self.source, policy)


@dataclass(frozen=True)
class Table:
    """Rows of a table, of one text or of two that were compared; see `texts` and `pairs`.

    Attributes:
        rows: [P,k,T], k = 1 for texts and 2 for pairs, the preferred one first.
        space: where they live.
        log_weights: log-probability [P] with which a row is drawn.
        size: rows a step; None for all of them.
        draw: the randomness.
        prompt: [S], [P,S] or None.
        prior: q, or None.
        kl_coef: λ, or None.
    """

    rows: Tensor
    space: SequenceSpace
    log_weights: Tensor
    size: int | None
    draw: Draw | None
    prompt: Tensor | None
    prior: LanguageModel | None = None
    kl_coef: float | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            check_count(self.size, "size")
            if self.draw is None:
                raise InputError(
                    f"size = {self.size} rows are drawn at each step, which needs draw=,"
                    " e.g. seeded_draw(0)."
                )
            check_draw(self.draw)
        if not len(self.rows):
            raise InputError("the table is empty; give at least one row.")

    def __call__(self, policy: LanguageModel) -> Batch:
        every = torch.arange(len(self.rows), device=self.rows.device)
        if self.size is None or self.draw is None:
            return self.batch(policy, every)
        # one row of weights that all draws read: with replacement
        return self.batch(policy, self.draw(self.log_weights[None], torch.zeros(self.size).long()))

    def batch(self, policy: LanguageModel, index: Tensor) -> Batch:
        """The batch of the rows `index` [B]: B·k sequences, a group for each pair."""
        kind = "texts" if self.rows.shape[1] == 1 else "pairs"
        width = self.rows.shape[1]
        # the two of a pair become neighbours
        tokens = self.rows[index].flatten(0, 1).to(device_of(policy))
        prompt = self._prompts(index, width)
        paired = torch.arange(len(tokens), device=tokens.device) // width

        def missing(name: str) -> Tensor:
            return absent(name, f"which a batch of {kind} does not have.")

        given: dict[str, Tensor] = {}
        if self.prior is not None and self.kl_coef is not None:
            with torch.no_grad():
                prior_log_probs = token_log_probs(self.prior, tokens, prompt)
            # log π/q, which losses of preferences compare, would be infinite
            _refuse_impossible(prior_log_probs, tokens, self.space, "the prior")
            given["prior_log_probs"] = prior_log_probs
            given["kl_coef"] = torch.full_like(tokens[:, 0], self.kl_coef, dtype=torch.float64)
            # the preferred one stands first
            won = (torch.arange(len(tokens), device=tokens.device) % width == 0).double()
            # on the last live token, where any reward of a whole sequence stands
            given["rewards"] = won[:, None] * self.space.last(tokens)
        batch = Batch(
            tokens=tokens,
            live=self.space.live(tokens),
            log_probs=token_log_probs(policy, tokens, prompt),
            # texts share one group: no problem parts them
            group=paired if width > 1 else torch.zeros_like(paired),
            prompt=prompt,
            truncated=self.space.truncated(tokens),
            prior_log_probs=given.get("prior_log_probs", missing("prior_log_probs")),
            behaviour_log_probs=missing("behaviour_log_probs"),
            rewards=given.get("rewards", missing("rewards")),
            kl_coef=given.get("kl_coef", missing("kl_coef")),
        )
        _refuse_impossible(batch.log_probs, tokens, self.space, "the policy")
        return batch

    def _prompts(self, index: Tensor, width: int) -> Tensor | None:
        if self.prompt is None or self.prompt.ndim == 1:
            return batch_prompt(self.prompt, len(index) * width)
        # both texts of a pair answer one prompt
        return self.prompt[index].repeat_interleave(width, 0)


def _refuse_impossible(log_probs: Tensor, tokens: Tensor, space: SequenceSpace, model: str) -> None:
    """Sequences that a model never gives have no log-probability to compare or to differentiate."""
    never = log_probs.detach().sum(-1) == -math.inf
    if bool(never.any()):
        text = space.decode(tokens[never][:1])[0]
        raise UnsupportedPolicyError(
            f"{model} gives no mass to {text!r}, which the batch holds, so its log-probability is"
            f" -inf; leave the text out, or take another model in the place of {model}."
        )


def rescored(batch: Batch, policy: LanguageModel) -> Batch:
    """The same sequences with the policy's log-probabilities as it is now; everything else, the
    behaviour's log-probabilities among it, stays.
    """
    if "log_dists" not in batch.tensors():
        return replace(batch, log_probs=token_log_probs(policy, batch.tokens, batch.prompt))
    log_dists = conditional_log_probs(policy, batch.tokens, batch.prompt)
    taken = log_dists.gather(-1, batch.tokens[..., None]).squeeze(-1)
    return replace(batch, log_probs=taken, log_dists=log_dists)


def check_policy(source: Source, policy: LanguageModel) -> None:
    """What a source asks of a policy before the first step; one's own functions ask nothing."""
    space = getattr(source, "space", None)
    if space is not None:
        check_same_space(policy.space, space, "policy and source")
    look = getattr(source, "check", None)
    if look is not None:
        look(policy)


def _as_tokens(data: Sequence[str] | Tensor, space: SequenceSpace) -> Tensor:
    # a text is a sequence too, of its letters
    if isinstance(data, str):
        raise InputError(f"expected a list of texts, and {data!r} is one text: give [{data!r}].")
    return space.check_tokens(data if isinstance(data, Tensor) else space.encode(list(data)))


def _log_weights(weights: Sequence[float] | Tensor | None, rows: int, size: int | None) -> Tensor:
    """log of normalised weights [P]."""
    if weights is None:
        # an empty table is refused where it is built, in its own words
        return torch.full((rows,), -math.log(max(rows, 1)), dtype=torch.float64)
    given = as_numbers(weights, "weights")
    sound = torch.isfinite(given) & (given >= 0)
    if given.shape != (rows,) or not bool(sound.all()) or not bool((given > 0).any()):
        raise InputError(
            f"weights has shape {list(given.shape)}; expected {rows} numbers, finite, none negative"
            " and not all 0."
        )
    if size is None:
        raise InputError("weights say how often a row is drawn; give size= and draw= with them.")
    return logspace.log_normalize(given.double().log())  # whose sum may overflow


def _feasible_sequences(problem: Problem) -> Tensor:
    """The sequences [K,T] of the prior's support whose reward is not −inf."""
    found = problem_support(problem)
    return found.tokens[found.rewards > -math.inf]


@torch.no_grad()
def _refuse_stray_mass(policy: LanguageModel, problem: Problem, tokens: Tensor) -> None:
    trie = PrefixTrie(problem.space, tokens)
    # summed where π leaves the trie: exact, without a list of what lies outside
    stray = float(support_log_mass(policy, tokens, trie, problem.prompt)[1].exp())
    if stray > 0:
        raise UnsupportedPolicyError(
            f"the policy gives mass {stray:.2g} to sequences where the prior has none or the reward"
            " is -inf, so KL(policy‖posterior) is infinite. Wrap it: restrict_to_support(policy,"
            " problem.prior), or feasible_prior(problem) in its place where rewards are -inf."
        )


@torch.no_grad()
def _refuse_unrestricted(policy: LanguageModel, problem: Problem, draw: Draw) -> None:
    """Looks at every next token along some sequences of the prior, so that a missing restriction
    shows before the first step.
    """
    tokens = problem.prior.sample(_LOOKED_AT, draw=draw, prompt=problem.prompt)
    prior, mine = (
        conditional_log_probs(model, tokens, problem.prompt) for model in (problem.prior, policy)
    )
    taken = mine.gather(-1, tokens[..., None]).squeeze(-1)
    # a step counts where π reaches its prefix: what was taken before it has mass
    reached = torch.nn.functional.pad(taken.cumsum(-1), (1, -1)) > -math.inf
    looked_at = (reached & problem.space.live(tokens))[..., None]
    stray = torch.where((prior == -math.inf) & looked_at, mine, -math.inf).exp().sum(-1)
    if bool((stray > 0).any()):
        n, t = (stray > 0).nonzero()[0].tolist()
        prefix = problem.space.separator.join(
            problem.space.vocabulary[i] for i in tokens[n, :t].tolist()
        )
        raise UnsupportedPolicyError(
            f"after {prefix!r} the policy gives mass {float(stray[n, t]):.2g} to tokens where the"
            " prior has none, so KL is infinite. Wrap it: restrict_to_support(policy,"
            " problem.prior)."
        )
