"""Small models written as a user would: only `forward`, everything else by default."""

import torch
from torch import Tensor, nn

from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.contract import LanguageModel


def words(count: int, length: int, eos: bool = True) -> SequenceSpace:
    """A space over the first letters of the alphabet."""
    return SequenceSpace(tuple("abcdefghijklmnop"[:count]), length, eos)


class BigramToy(LanguageModel):
    """logits_t = W[y_{t−1}], with a row of W for the start."""

    def __init__(self, space: SequenceSpace, seed: int = 0):
        super().__init__()
        self.space = space
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(
            torch.randn(
                space.vocab_size + 1, space.vocab_size, generator=generator, dtype=torch.float64
            )
        )

    def previous(self, tokens: Tensor) -> Tensor:
        """y_{t−1} [N,T], the start's id V at t = 0."""
        return torch.cat([torch.full_like(tokens[:, :1], self.space.vocab_size), tokens[:, :-1]], 1)

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        return self.weight[self.previous(tokens)]


class PromptedToy(BigramToy):
    """A bigram whose logits move with the words of its prompt (padding −1 left out), by how often
    each occurs.
    """

    reads_prompt = True

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        logits = super().forward(tokens)
        if prompt is None:
            return logits
        counts = torch.stack([(prompt == v).sum(1) for v in range(self.space.vocab_size)], 1)
        return logits + counts.double().unsqueeze(1) * self.weight[-1]


class UniformToy(LanguageModel):
    """Equal logits without any memory: a view of one number."""

    def __init__(self, space: SequenceSpace):
        super().__init__()
        self.space = space

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        return torch.zeros((), dtype=torch.float64).expand(*tokens.shape, self.space.vocab_size)
