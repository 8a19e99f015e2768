"""Recurrent policies: LSTM or GRU over token embeddings.

    h_t = cell(h_{t−1}, embed(y_{t−1})),   logits_t = W h_t + b,   y_{−1} = BOS                  (1)

A prompt is read before BOS, skipping its left padding. Hochreiter & Schmidhuber (1997); Cho et al.
(2014). L layers, H hidden units; states are [N,L,H], rows first.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from klrl_edu.core.draws import as_generator
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import brief, check_count, check_entries
from klrl_edu.models.contract import LanguageModel, check_prompt_words, check_room, device_of


class RecurrentState(NamedTuple):
    """Hidden state and, for the LSTM, cell state [N,L,H]; the position of the last logits."""

    hidden: Tensor
    cell: Tensor | None
    position: int


class RecurrentModel(LanguageModel):
    """A recurrent language model.

    Args:
        space: where it lives; a prompt uses the same token ids.
        cell: "lstm" or "gru".
        hidden_size: H, also the width of the embeddings.
        layers: L.
        seed: of the initial weights, an int or a CPU generator.
        dtype: of the weights; float64 by default, float32 for speed.
    """

    reads_prompt = True

    def __init__(
        self,
        space: SequenceSpace,
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        hidden_size: int = 64,
        layers: int = 1,
        seed: int | torch.Generator = 0,
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__()
        if cell not in ("lstm", "gru"):
            raise InputError(f"cell = {cell!r} is not known; choose 'lstm' or 'gru'.")
        check_count(hidden_size, "hidden_size")
        check_count(layers, "layers")
        gates = 4 if cell == "lstm" else 3
        weights = 2 * layers * gates * hidden_size**2 + 2 * (space.vocab_size + 1) * hidden_size
        what = f"hidden_size = {brief(hidden_size)} and layers = {brief(layers)}"
        check_entries(weights, what, "choose smaller ones")
        self.space, self.cell = space, cell
        kind = nn.LSTM if cell == "lstm" else nn.GRU
        # skip_init: no weight is drawn from the global generator, `_initialise` draws them all
        ids = space.vocab_size + 1  # the last row is BOS
        self.embedding = nn.utils.skip_init(nn.Embedding, ids, hidden_size, dtype=dtype)
        # the same by hand, as skip_init refuses these classes
        recurrent = kind(
            hidden_size, hidden_size, layers, batch_first=True, dtype=dtype, device="meta"
        )
        self.recurrent = recurrent.to_empty(device="cpu")
        self.head = nn.utils.skip_init(nn.Linear, hidden_size, space.vocab_size, dtype=dtype)
        self._initialise(as_generator(seed), hidden_size)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator, hidden_size: int) -> None:
        """Torch's own defaults, from a generator: normal embeddings, uniform ±1/√H elsewhere."""
        bound = 1 / math.sqrt(hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("embedding"):
                parameter.normal_(generator=generator)
            else:
                parameter.uniform_(-bound, bound, generator=generator)

    def facts(self) -> list[str]:
        layers, width = self.recurrent.num_layers, self.recurrent.hidden_size
        return [self.cell, f"{layers} × {width} units", *super().facts()]

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        state = self._read_prompt(len(tokens), prompt)
        bos = tokens.new_full((len(tokens), 1), self.space.vocab_size, dtype=torch.long)
        outputs, _ = self._run(torch.cat([bos, tokens[:, :-1].long()], 1), state)
        return self.head(outputs)

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, RecurrentState]:
        state = self._read_prompt(n, prompt)
        bos = torch.full((n, 1), self.space.vocab_size, dtype=torch.long, device=device_of(self))
        outputs, state = self._run(bos, state)
        return self.head(outputs[:, -1]), state._replace(position=0)

    def step(self, state: RecurrentState, token: Tensor) -> tuple[Tensor, RecurrentState]:
        check_room(self.space, state.position + 1)
        outputs, after = self._run(token[:, None], state)
        return self.head(outputs[:, -1]), after._replace(position=state.position + 1)

    def _run(self, ids: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Outputs [N,t,H] and the state after ids [N,t]; torch wants states layer first."""
        hidden = state.hidden.transpose(0, 1).contiguous()
        if state.cell is None:
            outputs, hidden = self.recurrent(self.embedding(ids), hidden)
            return outputs, RecurrentState(hidden.transpose(0, 1), None, state.position)
        cell = state.cell.transpose(0, 1).contiguous()
        outputs, (hidden, cell) = self.recurrent(self.embedding(ids), (hidden, cell))
        return outputs, RecurrentState(hidden.transpose(0, 1), cell.transpose(0, 1), state.position)

    def _read_prompt(self, n: int, prompt: Tensor | None) -> RecurrentState:
        """The state after the prompt [n,S]; padding (−1) leaves a row's state as it was."""
        check_prompt_words(self.space, prompt)
        shape = (n, self.recurrent.num_layers, self.recurrent.hidden_size)
        zeros = torch.zeros(shape, dtype=self.head.weight.dtype, device=self.head.weight.device)
        state = RecurrentState(zeros, zeros if self.cell == "lstm" else None, -1)
        for t in range(0 if prompt is None else prompt.shape[1]):
            assert prompt is not None
            # padding runs through the cell too, as rows of a batch do, and is thrown away
            real = (prompt[:, t] >= 0)[:, None, None]
            _, after = self._run(prompt[:, t : t + 1].clamp(min=0), state)
            hidden, cell = torch.where(real, after.hidden, state.hidden), None
            if state.cell is not None and after.cell is not None:
                cell = torch.where(real, after.cell, state.cell)
            state = RecurrentState(hidden, cell, -1)
        return state
