"""Hidden Markov models: a hidden context that moves by itself and emits a token a step.

    q(y) = Σ_{c_0 … } q(c_0) Π_t q(y_t|c_t) q(c_{t+1}|c_t)                                       (1)
    EM:  q(v|c) ∝ E[number of times c emits v | data],
    and likewise for the first and the next context                                              (2)

Rabiner (1989), eqs. 18–40; Baum et al. (1970). The expected counts of (2) are the gradient of the
log-likelihood by the logs of the laws. C contexts, V columns, N sequences, T tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from klrl_edu.core import logspace
from klrl_edu.core.draws import as_generator
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import brief, check_count, check_entries
from klrl_edu.models.contract import check_room
from klrl_edu.models.finite_state import FiniteStateModel
from klrl_edu.models.ngram import check_weights, chosen_tokens


class FilterState(NamedTuple):
    """log q(c|what was read) [N,C] in nats; the position of the last logits."""

    filtered: Tensor
    position: int


MAX_STEPS = 1_000_000


class Fit(NamedTuple):
    """A fitted model, and the data's log-likelihood (nats) before each EM step and at the end."""

    model: "HiddenMarkovModel"
    log_likelihoods: list[float]


class HiddenMarkovModel(FiniteStateModel):
    """A hidden Markov model; it reads no prompts.

    Args:
        space: where it lives; where it has EOS, that is one of the tokens emitted.
        initial: logits [C]; transition: logits [C,C], a row a context; emission: logits [C,V]. −inf
            is zero mass. They become float64 parameters.

    Raises:
        InputError: shapes that do not fit, NaN or +inf, a row without mass.
    """

    def __init__(self, space: SequenceSpace, initial: Tensor, transition: Tensor, emission: Tensor):
        super().__init__()
        self.space = space
        states = initial.numel()
        laws = (
            ("initial", initial, (states,)),
            ("transition", transition, (states, states)),
            ("emission", emission, (states, space.vocab_size)),
        )
        for name, logits, shape in laws:
            if logits.shape != shape or not states:
                raise InputError(
                    f"{name} has shape {list(logits.shape)}; expected {list(shape)} for {states}"
                    " contexts."
                )
            no_number = torch.isnan(logits) | (logits == math.inf)
            no_mass = logits.amax(-1) == -math.inf
            if bool(no_number.any()) or bool(no_mass.any()):
                raise InputError(
                    f"{name} holds NaN, +inf, or a row without mass; give logits, -inf for zero"
                    " mass."
                )
            self.register_parameter(name, nn.Parameter(logits.detach().double().clone()))

    initial: Tensor
    transition: Tensor
    emission: Tensor

    @classmethod
    def random(
        cls, space: SequenceSpace, states: int, *, seed: int | torch.Generator = 0
    ) -> "HiddenMarkovModel":
        """Standard normal logits: C = `states` contexts."""
        check_count(states, "states")
        what = f"states = {brief(states)} contexts"
        check_entries(states * (states + space.vocab_size), what, "choose fewer")
        generator = as_generator(seed)
        shapes = ((states,), (states, states), (states, space.vocab_size))
        laws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return cls(space, *laws)

    @classmethod
    def fit(
        cls,
        space: SequenceSpace,
        texts: Sequence[str],
        states: int,
        *,
        weights: Sequence[float] | None = None,
        steps: int = 50,
        seed: int = 0,
    ) -> Fit:
        """`steps` of EM (2) from random laws; the log-likelihood never falls.

        An EOS that the space forces at T is no evidence.

        Args:
            weights: how often each text counts; 1 by default.

        Raises:
            InputError: texts outside the space, none at all, negative weights, states < 1, steps <
                0.
        """
        check_count(steps, "steps", 0, maximum=MAX_STEPS)
        model = cls.random(space, states, seed=seed)
        weight = torch.tensor(check_weights(texts, weights), dtype=torch.float64)
        tokens, chosen = chosen_tokens(space, texts)
        parameters = (model.initial, model.transition, model.emission)
        history = []
        for _ in range(steps):
            laws = [law.detach().requires_grad_(True) for law in model._laws()]
            total = weight @ _log_likelihood((laws[0], laws[1], laws[2]), tokens, chosen)
            history.append(float(total.detach()))
            # (2): the gradient by the log of a law is the expected number of times it was used
            counts = torch.autograd.grad(total, laws)
            for parameter, law, count in zip(parameters, laws, counts, strict=True):
                row = count.sum(-1, keepdim=True)
                # a context that is never left, or never used, keeps its law
                fitted = torch.where(row == 0, law.detach(), count.log() - row.log())
                parameter.data.copy_(fitted)
        with torch.no_grad():
            history.append(float(weight @ _log_likelihood(model._laws(), tokens, chosen)))
        return Fit(model, history)

    def facts(self) -> list[str]:
        return [f"{len(self.initial):,} hidden contexts"]

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        logits, state = self.start(len(tokens))
        columns = [logits]
        for column in tokens[:, :-1].long().T:
            logits, state = self.step(state, column)
            columns.append(logits)
        return torch.stack(columns, 1)

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, FilterState]:
        self.check_prompt(prompt)
        filtered = self.initial_log_probs().expand(n, -1)
        return self._emit(filtered), FilterState(filtered, 0)

    def step(self, state: FilterState, token: Tensor) -> tuple[Tensor, FilterState]:
        check_room(self.space, state.position + 1)
        joint = state.filtered + self.emission_log_probs().T[token]
        # where a token of zero mass was read any law will do
        dead = (joint.detach() == -math.inf).all(-1, keepdim=True)
        joint = torch.where(dead, state.filtered, joint)
        moved = logspace.log_normalize(joint)[:, :, None] + self.transition_log_probs()
        filtered = logspace.logsumexp(moved, 1)
        return self._emit(filtered), FilterState(filtered, state.position + 1)

    def _emit(self, filtered: Tensor) -> Tensor:
        """log q(v|what was read) [N,V]."""
        return logspace.logsumexp(filtered[:, :, None] + self.emission_log_probs(), 1)

    def _laws(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.initial_log_probs(), self.transition_log_probs(), self.emission_log_probs()

    def initial_log_probs(self) -> Tensor:
        return logspace.log_normalize(self.initial)

    def emission_log_probs(self) -> Tensor:
        return logspace.log_normalize(self.emission)

    def transition_log_probs(self) -> Tensor:
        return logspace.log_normalize(self.transition)


def _log_likelihood(laws: tuple[Tensor, Tensor, Tensor], tokens: Tensor, chosen: Tensor) -> Tensor:
    """log q [N] of the chosen tokens [N,T] by the forward recursion on (1)."""
    initial, transition, emission = laws
    joint = initial.expand(len(tokens), -1)  # log q(c_t, y_{<t})
    for t in range(tokens.shape[1]):
        ahead = joint + emission.T[tokens[:, t]]
        if t + 1 < tokens.shape[1]:
            # the context moves where a further token was chosen: nothing moves after the last
            moved = logspace.logsumexp(ahead[:, :, None] + transition, 1)
            ahead = torch.where(chosen[:, t + 1, None], moved, ahead)
        joint = torch.where(chosen[:, t, None], ahead, joint)
    return logspace.logsumexp(joint)
