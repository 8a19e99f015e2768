"""What models that change another one's logits have in common.

    logits′(prefix) = f(logits(prefix))                                                          (1)

N sequences, T tokens, V columns, k children, S prompt tokens.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

from torch import Tensor

from klrl_edu.models.contract import LanguageModel


class WrappedModel(LanguageModel):
    """Reads by another model and changes its logits by `change`.

    It shares that model's parameters, its state and its way with prompts.
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.space, self.model = model.space, model
        self.reads_prompt = model.reads_prompt

    def change(self, logits: Tensor) -> Tensor:
        """f of (1) on logits [..., V], row by row."""
        raise NotImplementedError

    def reading(self) -> AbstractContextManager[Any]:
        """What the other model is run in."""
        return nullcontext()

    @property
    def own_prompt(self) -> tuple[int, ...]:  # type: ignore[override]
        """The prompt that the other model is bound to."""
        return self.model.own_prompt

    @property
    def knows_prompts(self) -> bool:
        return self.model.knows_prompts

    def check_prompt(self, prompt: Tensor | None) -> None:
        self.model.check_prompt(prompt)

    def for_prompt(self, prompt: Tensor | str | None) -> Self:
        self.model.for_prompt(prompt)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.facts())})"  # the other one names the space

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        with self.reading():
            return self.change(self.model(tokens, prompt))

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, Any]:
        with self.reading():
            logits, state = self.model.start(n, prompt)
        return self.change(logits), state

    def step(self, state: Any, token: Tensor) -> tuple[Tensor, Any]:
        with self.reading():
            logits, state = self.model.step(state, token)
        return self.change(logits), state

    def branch(self, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        with self.reading():
            logits, state = self.model.branch(state, tokens)
        return self.change(logits), state

    def select(self, state: Any, index: Tensor) -> Any:
        return self.model.select(state, index)
