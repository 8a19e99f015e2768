"""A problem: prior q, reward r and KL coefficient λ, which together define a posterior.

π*(y) = q(y) e^{r(y)/λ} / Z,    J(π) = E_π[r] − λ KL(π‖q) = λ log Z − λ KL(π‖π*)                 (1)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from klrl_edu.core.arguments import check_arguments, describe
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import check_kl_coef
from klrl_edu.models.contract import LanguageModel, batch_prompt, check_reads, device_of
from klrl_edu.problems.rewards import Reward, check_reward, reward_name


@dataclass(frozen=True)
class Problem:
    """Prior, reward and λ.

    Args:
        prior: q, a LanguageModel; it stays fixed.
        reward: r(tokens [N,T], prompt) -> [N] or [N,T], in reward units; see `rewards`.
        kl_coef: λ ≥ 0 in reward units per nat (TRL's β). 0 and inf are limits: q restricted to
            argmax r, and q.
        prompt: [S] token ids, or a text, which the space's words encode, or None. Several prompts
            are a sequence of problems that share a prior.

    Raises:
        InputError: an argument of another kind, or a prompt that the prior does not read.
    """

    in_words: ClassVar[str] = "a Problem(prior, reward, kl_coef)"

    prior: LanguageModel
    reward: Reward
    kl_coef: float
    prompt: Tensor | None = None

    def __post_init__(self) -> None:
        # frozen: what is normalised here goes in by object's own door
        object.__setattr__(self, "kl_coef", check_kl_coef(self.kl_coef))
        check_arguments("Problem(prior, reward, kl_coef)", prior=(self.prior, LanguageModel))
        check_reward(self.reward)
        prompt: object = self.prompt
        if isinstance(prompt, str):
            ids = self.space.encode_prompt(prompt).to(device_of(self.prior))
            object.__setattr__(self, "prompt", ids)
        if self.prompt is not None:
            self._check_prompt(self.prompt)

    def _check_prompt(self, prompt: Tensor) -> None:
        if not isinstance(prompt, Tensor) or prompt.is_floating_point() or prompt.is_complex():
            raise InputError(
                f"prompt is {describe(prompt)}; expected token ids [S], whole numbers, or a text."
            )
        if prompt.ndim != 1:
            raise InputError(
                f"prompt has shape {list(prompt.shape)}; a problem has one prompt [S]; use a"
                " sequence of problems for several."
            )
        check_reads(self.prior, prompt)

    def __repr__(self) -> str:
        parts = [f"prior={self.prior!r}", f"reward={reward_name(self.reward)!r}"]
        parts.append(f"kl_coef={self.kl_coef:g}")
        if self.prompt is not None:
            parts.append(f"prompt={self.space.decode_prompt(self.prompt)!r}")
        return f"Problem({', '.join(parts)})"

    @property
    def space(self) -> SequenceSpace:
        """Where prior, policies and posterior live."""
        return self.prior.space

    def token_rewards(self, tokens: Tensor) -> Tensor:
        """Rewards [N,T] of tokens [N,T] that the prior supports.

        A whole-sequence reward stands on the last live token.

        Raises:
            InputError: tokens that are not of the space, a NaN or +inf, a complex number, a wrong
            shape, or a value after the first EOS.
        """
        # tokens first: a reward may index its tables by them
        live = self.space.live(self.space.check_tokens(tokens))
        values = self.reward(tokens, batch_prompt(self.prompt, len(tokens)))
        if not isinstance(values, Tensor) or values.shape not in (tokens.shape, tokens.shape[:1]):
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"reward {reward_name(self.reward)!r} returned {shape}; expected a tensor [N] or"
                f" [N, T], [N, T] = {list(tokens.shape)}."
            )
        if values.is_complex():
            raise InputError(
                f"reward {reward_name(self.reward)!r} returned complex numbers; expected real ones."
            )
        # no gradient: a learned reward is fixed here, and only the policy moves
        values = values.detach().double()
        if values.ndim == 1:
            # on the last live token: the sum over T is the reward, and each column stays causal
            last = self.space.last(tokens)
            values = torch.where(last, values[:, None], torch.zeros_like(values[:, None]))
        self._check(values, tokens, live)
        return values

    def rewards(self, tokens: Tensor) -> Tensor:
        """r(y) [N] of tokens [N,T] that the prior supports, checked as `token_rewards` are."""
        return self.token_rewards(tokens).sum(-1)

    def _check(self, values: Tensor, tokens: Tensor, live: Tensor) -> None:
        # −inf passes: it forbids. +inf would leave no posterior to normalise
        bad = torch.isnan(values) | (values == torch.inf)
        if bool(bad.any()):
            n, t = bad.nonzero()[0].tolist()
            text = self.space.decode(tokens[n : n + 1])[0]
            value = float(values[n, t])
            raise InputError(
                f"reward {reward_name(self.reward)!r} of sequence {n}, {text!r}, is {value}; give a"
                " number, or -inf to forbid it."
            )
        # a sum over T would count it
        stray = ~live & (values != 0)
        if bool(stray.any()):
            n, t = stray.nonzero()[0].tolist()
            raise InputError(
                f"reward {reward_name(self.reward)!r} gives {float(values[n, t])} at [{n}, {t}],"
                " after the first EOS; multiply by space.live(tokens)."
            )


def check_problems(problems: Problem | Sequence[Problem]) -> list[Problem]:
    """One problem or several as a list; several must share one prior."""
    listed: object = [problems] if isinstance(problems, Problem) else problems
    if not isinstance(listed, Sequence) or not listed:
        meant = " Did you mean its .problem?" if hasattr(problems, "problem") else ""
        raise InputError(
            f"problem is {describe(problems)}; expected {Problem.in_words}, or a list"
            f" of at least one Problem.{meant}"
        )
    for problem in listed:
        check_arguments("problem, or a list of problems", problem=(problem, Problem))
    # the same object, not an equal one: its log-probabilities are read once for all
    if any(problem.prior is not listed[0].prior for problem in listed):
        raise InputError(
            "problems must share one prior object (they differ in prompt, reward and kl_coef)."
        )
    return list(listed)
