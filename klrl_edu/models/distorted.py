"""Distortions of a model, as samplers apply them, each an explicit distribution of its own.

    tempered:  μ(v|prefix) ∝ π(v|prefix)^{1/τ}                                                   (1)
    top-k:     μ(v|prefix) ∝ π(v|prefix) · 1[v among the k most probable]                        (2)
    nucleus:   μ(v|prefix) ∝ π(v|prefix) · 1[mass before v < p], most probable first             (3)
    mixture:   μ(y) = Σ_m w_m π_m(y),  μ(v|prefix) = Σ_m P(m|prefix) π_m(v|prefix)               (4)

What an inference engine samples from at temperature 0.6 or with top-p 0.9 is not π: it is a
behaviour policy μ with log-probabilities of its own, and ratios against π correct for nothing else.
Temperature: Ackley, Hinton & Sejnowski (1985); top-k: Fan, Lewis & Dauphin (2018); nucleus:
Holtzman et al. (2020), eq. 2. N sequences, T tokens, V columns, M models.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from klrl_edu.core import logspace
from klrl_edu.core.arguments import check_arguments
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import (
    check_count,
    check_number,
    check_probabilities,
    check_same_space,
)
from klrl_edu.models.contract import LanguageModel, ended_and_last, force_eos
from klrl_edu.models.wrapped import WrappedModel

# of the mass that is cut off: a nucleus whose mass is p up to rounding is whole (.4 + .3 at .7)
_ROUNDING = 1e-12


class TemperedModel(WrappedModel):
    """A model at another temperature (1); see `tempered`."""

    def __init__(self, model: LanguageModel, temperature: float):
        super().__init__(model)
        self.temperature = temperature

    def facts(self) -> list[str]:
        return [repr(self.model), f"temperature {self.temperature:g}"]

    def change(self, logits: Tensor) -> Tensor:
        logits = logits.double()
        # first by the largest: at a small τ the others go to −inf, and none to +inf
        top = logits.detach().amax(-1, keepdim=True)
        return (logits - top) / self.temperature


class TopKModel(WrappedModel):
    """A model cut to its k most probable next tokens (2); see `top_k`."""

    def __init__(self, model: LanguageModel, k: int):
        super().__init__(model)
        self.k = k

    def facts(self) -> list[str]:
        return [repr(self.model), f"top {self.k}"]

    def change(self, logits: Tensor) -> Tensor:
        logits = logits.double()
        dropped = torch.ones_like(logits, dtype=torch.bool)
        dropped = dropped.scatter(-1, _most_probable_first(logits)[..., : self.k], False)
        return logits.masked_fill(dropped, -math.inf)


class NucleusModel(WrappedModel):
    """A model cut to the smallest set of next tokens with mass p (3); see `nucleus`."""

    def __init__(self, model: LanguageModel, p: float):
        super().__init__(model)
        self.p = p

    def facts(self) -> list[str]:
        return [repr(self.model), f"nucleus {self.p:g}"]

    def change(self, logits: Tensor) -> Tensor:
        logits = logits.double()
        if self.p == 1:  # also what has a mass too small for a float
            return logits
        order = _most_probable_first(logits)
        probs = torch.softmax(logits.detach(), -1).gather(-1, order)
        # mass from a token on; "mass before it < p", summed from the small end, where digits count
        onwards = probs.flip(-1).cumsum(-1).flip(-1)
        dropped = ~(onwards > (1 - self.p) * (1 + _ROUNDING))
        dropped[..., 0] = False  # the most probable token stays, however small p is
        return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def _most_probable_first(logits: Tensor) -> Tensor:
    """The ids [..., V] by falling probability, equal ones by rising id; NaN comes first."""
    return torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices


class MixtureState(NamedTuple):
    """Where a mixture stands.

    Attributes:
        states: of the M models.
        laws: their next-token log-probabilities [N,M,V] at the last logits.
        log_mass: log w_m π_m(prefix) [N,M].
        position: of the last logits.
    """

    states: tuple[Any, ...]
    laws: Tensor
    log_mass: Tensor
    position: int


class MixtureModel(LanguageModel):
    """A mixture of models over whole sequences (4); see `mixture`."""

    def __init__(self, models: Sequence[LanguageModel], weights: Sequence[float]):
        super().__init__()
        self.space, self.models = models[0].space, nn.ModuleList(models)
        self.weights = tuple(weights)
        self.reads_prompt = any(model.reads_prompt for model in models)

    @property
    def knows_prompts(self) -> bool:
        return any(model.knows_prompts for model in self._each())

    def check_prompt(self, prompt: Tensor | None) -> None:
        for model in self._each():
            model.check_prompt(prompt)

    def for_prompt(self, prompt: Tensor | str | None) -> Self:
        for model in self._each():
            model.for_prompt(prompt)
        return self

    def facts(self) -> list[str]:
        weighted = zip(self.weights, self._each(), strict=True)
        return [f"{weight:g} of {model!r}" for weight, model in weighted]

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        ended, last = ended_and_last(self.space, tokens)
        logits = [model(tokens, prompt) for model in self._each()]
        laws = torch.stack([force_eos(rows, ended, last, self.space) for rows in logits], 2)
        log_probs = _taken(laws, tokens)  # [N,T,M]
        # row t knows the tokens before it: the sums, one place later
        before = pad(log_probs.cumsum(1), (0, 0, 1, -1))
        return _mixed(self._log_weights(laws) + before, laws)

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, MixtureState]:
        return self._at([model.start(n, prompt) for model in self._each()], None, 0)

    def step(self, state: MixtureState, token: Tensor) -> tuple[Tensor, MixtureState]:
        read = zip(self._each(), state.states, strict=True)
        log_mass = state.log_mass + _taken(state.laws, token)
        return self._at([m.step(s, token) for m, s in read], log_mass, state.position + 1)

    def select(self, state: MixtureState, index: Tensor) -> MixtureState:
        read = zip(self._each(), state.states, strict=True)
        return state._replace(
            states=tuple(model.select(inner, index) for model, inner in read),
            laws=state.laws[index],
            log_mass=state.log_mass[index],
        )

    def _at(
        self, read: list[tuple[Tensor, Any]], log_mass: Tensor | None, position: int
    ) -> tuple[Tensor, MixtureState]:
        """The logits [N,V] of the mixture, and the state that gives them."""
        last = position == self.space.max_length - 1
        # rows that ended are the contract's to force
        ended = torch.zeros(len(read[0][0]), dtype=torch.bool, device=read[0][0].device)
        laws = torch.stack([force_eos(logits, ended, last, self.space) for logits, _ in read], 1)
        if log_mass is None:  # of the empty prefix
            log_mass = self._log_weights(laws).expand(len(laws), -1)
        states = tuple(state for _, state in read)
        return _mixed(log_mass, laws), MixtureState(states, laws, log_mass, position)

    def _each(self) -> list[LanguageModel]:
        return list(self.models)  # type: ignore[arg-type]

    def _log_weights(self, like: Tensor) -> Tensor:
        """log w [M]; made where they are used, so that no `.float()` rounds them."""
        return torch.tensor(self.weights, dtype=torch.float64, device=like.device).log()


def _taken(laws: Tensor, tokens: Tensor) -> Tensor:
    """log π_m of each token [...], by laws [..., M, V]: [..., M]."""
    index = tokens.long()[..., None, None].expand(*laws.shape[:-1], 1)
    return laws.gather(-1, index).squeeze(-1)


def _mixed(log_mass: Tensor, laws: Tensor) -> Tensor:
    """Logits [..., V] of (4): log Σ_m w_m π_m(prefix) π_m(v|prefix); uniform where no model goes.

    Args:
        log_mass: log w_m π_m(prefix) [..., M] in nats.
        laws: log π_m(v|prefix) [..., M, V].
    """
    return logspace.uniform_where_dead(logspace.logsumexp(log_mass[..., None] + laws, dim=-2))


def tempered(model: LanguageModel, temperature: float) -> TemperedModel:
    """The model with its next-token logits divided by a temperature (1).

    Below 1 it is sharper than the model, above 1 flatter; its support is the model's. Tempering
    token by token is not π(y)^{1/τ} normalised over whole sequences, which is a posterior.

    Args:
        model: logits [N,T,V]; its parameters are shared, and gradients pass.
        temperature: τ > 0, of no unit. Greedy decoding, the limit τ → 0, is `top_k(model, 1)`.

    Raises:
        InputError: another kind of model, or a τ that is not a positive number.

    Exact KL to the model: `compare(tempered(q, τ), posterior(Problem(q, reward, math.inf)))`, as
    at λ = inf the posterior is q.
    """
    check_arguments("tempered(model, temperature)", model=(model, LanguageModel))
    rule = "above 0 and finite; greedy decoding is top_k(model, 1)"
    value = check_number(temperature, "temperature", rule, lambda tau: 0 < tau < math.inf)
    return TemperedModel(model, value)


def top_k(model: LanguageModel, k: int) -> TopKModel:
    """The model cut, token by token, to its k most probable next tokens (2).

    Exactly k are kept (fewer only where fewer have mass): by probability, and among equals by lower
    id. Libraries that compare with the k-th largest logit keep all that tie with it. EOS counts as
    a token, and where it is forced it stays.

    Args:
        model: logits [N,T,V]; its parameters are shared. Gradients pass to what is kept; the choice
            itself has none.
        k: tokens to keep, at least 1; V and more keep all.

    Raises:
        InputError: another kind of model, or a k that is no whole number of at least 1.

    Exact KL to the model as for `tempered`: KL(μ‖π) is finite, and KL(π‖μ) is inf where a token
    with mass was cut; `uncovered_mass` says how much is never drawn.
    """
    check_arguments("top_k(model, k)", model=(model, LanguageModel))
    return TopKModel(model, check_count(k, "k"))


def nucleus(model: LanguageModel, p: float) -> NucleusModel:
    """The model cut, token by token, to the fewest next tokens whose mass is at least p (3).

    Also called top-p.

    Tokens join by probability, among equals by lower id, and the one that crosses p is included. A
    set whose mass is p up to rounding (1e-12 of the rest) is whole. EOS counts as a token, and
    where it is forced it stays.

    Args:
        model: logits [N,T,V]; its parameters are shared. Gradients pass to what is kept; the choice
            itself has none.
        p: in (0, 1]; 1 keeps all.

    Raises:
        InputError: another kind of model, or p outside (0, 1].

    Exact KL to the model as for `top_k`.
    """
    check_arguments("nucleus(model, p)", model=(model, LanguageModel))
    rule = "above 0 and at most 1; greedy decoding is top_k(model, 1)"
    return NucleusModel(model, check_number(p, "p", rule, lambda mass: 0 < mass <= 1))


def mixture(
    models: Sequence[LanguageModel],
    weights: Sequence[float] | Tensor,
    *,
    normalize: bool = False,
) -> MixtureModel:
    """One of M models, drawn by its weight for the whole sequence (4).

    So a batch is distributed whose sequences come from several checkpoints, or from the policy and
    the prior. The next-token law is the models' own, weighted by how probable each is given the
    prefix; a weight of 0 takes a model out.

    Args:
        models: M on one space, logits [N,T,V], each of which takes the same prompts; their
            parameters are shared, and gradients pass.
        weights: M probabilities that sum to one within 1e-9.
        normalize: accept other weights, and divide by their sum.

    Raises:
        InputError: no model, other spaces, or weights that are no probabilities of the models.

    Exact KL to any model on the space: `compare(mixture(...), posterior(Problem(q, reward,
    math.inf)))`.
    """
    if not isinstance(models, Sequence) or not models:
        raise InputError("mixture(models, weights): models must be a list of at least one model.")
    for model in models:
        check_arguments("mixture(models, weights)", model=(model, LanguageModel))
        check_same_space(model.space, models[0].space, "models")
    probs = check_probabilities(weights, "weights", normalize=normalize).tolist()
    if len(probs) != len(models):
        raise InputError(
            f"weights has {len(probs)} entries for {len(models)} models; give one a model."
        )
    return MixtureModel(models, probs)
