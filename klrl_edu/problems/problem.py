"""A problem: prior q, reward r and KL coefficient λ, which together define a posterior.

π*(y) = q(y) e^{r(y)/λ} / Z,    J(π) = E_π[r] − λ KL(π‖q) = λ log Z − λ KL(π‖π*)                 (1)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import check_kl_coef
from klrl_edu.models.contract import LanguageModel, batch_prompt
from klrl_edu.problems.rewards import Reward, describe


@dataclass(frozen=True)
class Problem:
    """Prior, reward and λ.

    Args:
        prior: q, a LanguageModel; it stays fixed.
        reward: r(tokens [N,T], prompt) -> [N] or [N,T], in reward units; see `rewards`.
        kl_coef: λ ≥ 0 in reward units per nat (TRL's β). 0 and inf are limits: q restricted to
            argmax r, and q.
        prompt: [S] token ids, or None. Several prompts are a sequence of problems that share a
            prior.
    """

    prior: LanguageModel
    reward: Reward
    kl_coef: float
    prompt: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kl_coef", check_kl_coef(self.kl_coef))
        if not isinstance(self.prior, LanguageModel):
            raise InputError(
                f"prior is a {type(self.prior).__name__}; expected a LanguageModel such as"
                " SequenceTable.from_texts(texts, probs)."
            )
        if not callable(self.reward):
            raise InputError(
                f"reward is a {type(self.reward).__name__}; expected a function of (tokens,"
                " prompt), or text_reward(fn, space)."
            )
        if self.prompt is not None and self.prompt.ndim != 1:
            raise InputError(
                f"prompt has shape {list(self.prompt.shape)}; a problem has one prompt [S]; use a"
                " sequence of problems for several."
            )

    @property
    def space(self) -> SequenceSpace:
        """Where prior, policies and posterior live."""
        return self.prior.space

    def token_rewards(self, tokens: Tensor) -> Tensor:
        """Rewards [N,T] of tokens [N,T] that the prior supports; a whole-sequence reward stands on
        the last live token.

        Raises:
            InputError: a NaN or +inf, a wrong shape, or a value after the first EOS.
        """
        live = self.space.live(tokens)
        values = self.reward(tokens, batch_prompt(self.prompt, len(tokens)))
        if not isinstance(values, Tensor) or values.shape not in (tokens.shape, tokens.shape[:1]):
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"reward {describe(self.reward)!r} returned {shape}; expected a tensor [N] or [N,"
                f" T], [N, T] = {list(tokens.shape)}."
            )
        values = values.detach().double()
        if values.ndim == 1:
            last = self.space.last(tokens)
            values = torch.where(last, values[:, None], torch.zeros_like(values[:, None]))
        self._check(values, tokens, live)
        return values

    def rewards(self, tokens: Tensor) -> Tensor:
        """r(y) [N] of tokens [N,T] that the prior supports, in reward units; checked as
        `token_rewards` are.
        """
        return self.token_rewards(tokens).sum(-1)

    def _check(self, values: Tensor, tokens: Tensor, live: Tensor) -> None:
        bad = torch.isnan(values) | (values == torch.inf)
        if bool(bad.any()):
            n, t = bad.nonzero()[0].tolist()
            text = self.space.decode(tokens[n : n + 1])[0]
            value = float(values[n, t])
            raise InputError(
                f"reward {describe(self.reward)!r} of sequence {n}, {text!r}, is {value}; give a"
                " number, or -inf to forbid it."
            )
        stray = ~live & (values != 0)
        if bool(stray.any()):
            n, t = stray.nonzero()[0].tolist()
            raise InputError(
                f"reward {describe(self.reward)!r} gives {float(values[n, t])} at [{n}, {t}], after"
                " the first EOS; multiply by space.live(tokens)."
            )


def check_problems(problems: Problem | Sequence[Problem]) -> list[Problem]:
    """One problem or several as a list; several must share one prior."""
    listed = [problems] if isinstance(problems, Problem) else list(problems)
    if not listed or not all(isinstance(problem, Problem) for problem in listed):
        raise InputError("problem must be a Problem, or a sequence of at least one Problem.")
    if any(problem.prior is not listed[0].prior for problem in listed):
        raise InputError(
            "problems must share one prior object (they differ in prompt, reward and kl_coef)."
        )
    return listed
