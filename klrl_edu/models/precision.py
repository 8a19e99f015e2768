"""A model run in half precision, asked for by name: torch's autocast around its matrix products.

The weights stay float32, and so do norms, softmax and the log-probabilities taken from the logits;
only products round, to 8 significant bits (bfloat16) or 11 (float16). What that does to a
distribution is measured, not guessed: `python3 dev.py bench` prints KL(float32‖autocast) of
count-threes' prior, exact over its 262,144 sequences. On a CPU it is 8.9e-5 nats a sequence in
bfloat16 and 1.7e-6 in float16: a policy trained to less than that is judged in float32.
"""

import torch
from torch import Tensor

from klrl_edu.core.errors import InputError
from klrl_edu.models.contract import LanguageModel, device_of
from klrl_edu.models.wrapped import WrappedModel

DTYPES = (torch.bfloat16, torch.float16)


class AutocastModel(WrappedModel):
    """A float32 model whose matrix products run in half precision; see `autocast`."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype):
        super().__init__(model)
        self.dtype = dtype

    def facts(self) -> list[str]:
        return [repr(self.model), str(self.dtype).removeprefix("torch.")]

    def reading(self) -> torch.autocast:
        return torch.autocast(device_of(self).type, dtype=self.dtype)

    def change(self, logits: Tensor) -> Tensor:
        return logits.float()  # out of half precision before any softmax


def autocast(model: LanguageModel, dtype: torch.dtype) -> AutocastModel:
    """The model with its matrix products in half precision, sharing its weights.

    It trains like the model itself.

    Args:
        model: logits [N,T,V], float32 weights.
        dtype: torch.bfloat16 or torch.float16.

    The laws of a language model hold; `step` and `forward` agree only to the precision of `dtype`.
    Recurrent models run in bfloat16 on a CPU, which has no float16 kernel for them.

    Raises:
        InputError: another dtype, or weights that autocast would leave as they are.
    """
    if dtype not in DTYPES:
        raise InputError(
            f"dtype = {dtype} is no half precision; choose torch.bfloat16 or torch.float16, or"
            " leave the model as it is."
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    others = sorted(str(other) for other in dtypes - {torch.float32})
    if others:
        raise InputError(
            f"the model has weights of {', '.join(others)}; autocast works on float32: build it"
            " with dtype=torch.float32."
        )
    return AutocastModel(model, dtype)
