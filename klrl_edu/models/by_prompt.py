"""One model a prompt: tables and posteriors read no prompt, so several prompts take several.

    q(y|x) = q_x(y)                                                                              (1)

N sequences, T tokens, V columns of logits, S prompt tokens, M models.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from klrl_edu.core.arguments import check_arguments
from klrl_edu.core.errors import InputError
from klrl_edu.core.validation import check_same_space
from klrl_edu.models.contract import LanguageModel, prompt_ids


class PromptedModels(LanguageModel):
    """Reads each sequence by the model that is bound to its prompt, and refuses other prompts.

    Args:
        models: M models on one space, each bound to a prompt of its own (`for_prompt`; none is a
            prompt too).

    Raises:
        InputError: no model, other spaces, or two models of one prompt.
    """

    reads_prompt = True

    def __init__(self, models: Sequence[LanguageModel]):
        super().__init__()
        if not models:
            raise InputError("models is empty; give at least one.")
        for model in models:
            check_arguments("PromptedModels(models)", model=(model, LanguageModel))
            check_same_space(model.space, models[0].space, "models")
        self.space, self.models = models[0].space, nn.ModuleList(models)
        self.places = {model.own_prompt: place for place, model in enumerate(models)}
        if len(self.places) < len(models):
            raise InputError("two of the models belong to one prompt; give each prompt one model.")

    def check_prompt(self, prompt: Tensor | None) -> None:
        for ids in prompt_ids(prompt):
            if ids not in self.places:
                known = [self.space.decode_prompt(own) for own in self.places]
                raise InputError(
                    f"no model belongs to the prompt {self.space.decode_prompt(ids)!r}; there are"
                    f" those of {', '.join(map(repr, known))}."
                )

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        self.check_prompt(prompt)
        place = [self.places[ids] for ids in prompt_ids(prompt)]
        if prompt is None:  # one answer, for every row
            place = place * len(tokens)
        which = torch.tensor(place).to(tokens.device)
        rows = [(which == i).nonzero().squeeze(-1) for i in range(len(self.models))]
        read = zip(self.models, rows, strict=True)
        logits = [model(tokens[index]) for model, index in read if len(index)]
        # read model by model: back in the order of the rows
        return torch.cat(logits)[torch.cat(rows).argsort()]

    def facts(self) -> list[str]:
        known = ", ".join(repr(self.space.decode_prompt(own)) for own in self.places)
        return [f"{len(self.models)} models, of the prompts {known}"]
