"""A decoder-only Transformer, with pre-norm and GELU as in GPT-2.

    x ← x + attend(norm(x)),   x ← x + mlp(norm(x)),   logits = W norm(x)                        (1)

The sequence read is [prompt, BOS, y_0 … y_{T−2}]. Positions count from BOS, so a prompt's left
padding never shifts them, and padding is masked out. Keys and values are cached in decoding,
[N,heads,t,D] a layer with the sequences first; the children of a branch attend to their parent's
cache where it lies, and copy it only when one of them is selected. Vaswani et al. (2017); Radford
et al. (2019).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention

from klrl_edu.core.draws import as_generator
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import brief, check_count, check_entries
from klrl_edu.models.contract import (
    LanguageModel,
    check_prompt_words,
    check_room,
    device_of,
    select_rows,
)

Cache = tuple[Tensor, ...]  # one tensor [N,heads,t,D] a layer


class TransformerState(NamedTuple):
    """What was read, cached.

    Attributes:
        keys, values: of the t tokens so far.
        readable: which of the t may be read [N,t]; None for all.
        position: of the last logits.
    """

    keys: Cache
    values: Cache
    readable: Tensor | None
    position: int


class BranchState(NamedTuple):
    """k children each of n parents.

    The caches are the parents' [n,heads,t + k,D]; their last k entries are the children's own.
    """

    keys: Cache
    values: Cache
    readable: Tensor | None
    position: int
    children: int


class _Block(nn.Module):
    """One layer of (1): causal self-attention and a perceptron on the stream x [N,t,width]."""

    def __init__(self, width: int, heads: int, dtype: torch.dtype):
        super().__init__()
        self.heads = heads
        # skip_init: no weight is drawn from the global generator, the model draws them all
        self.attention_norm = nn.LayerNorm(width, dtype=dtype)
        self.mlp_norm = nn.LayerNorm(width, dtype=dtype)
        self.qkv = nn.utils.skip_init(nn.Linear, width, 3 * width, dtype=dtype)
        self.project = nn.utils.skip_init(nn.Linear, width, width, dtype=dtype)
        self.expand = nn.utils.skip_init(nn.Linear, width, 4 * width, dtype=dtype)
        self.contract = nn.utils.skip_init(nn.Linear, 4 * width, width, dtype=dtype)

    def forward(
        self, x: Tensor, mask: Tensor | None, causal: bool, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next x [N,t,width], and all keys and values [N,heads,t_past + t,D].

        Args:
            x: [N,t,width].
            mask: additive, [N,1,t,t_past + t] or None.
            past: keys and values of what was read before.
        """
        n, t, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(n, t, 3, self.heads, width // self.heads)
        query, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [N,heads,t,D]
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        attended = scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal
        )
        x = x + self.project(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.contract(gelu(self.expand(self.mlp_norm(x)))), keys, values


class TransformerModel(LanguageModel):
    """A small GPT.

    Args:
        space: where it lives; a prompt uses the same token ids.
        width: of the residual stream (d_model), a multiple of `heads`.
        heads, layers: their numbers.
        max_prompt: the longest prompt S it can read, without padding.
        seed: of the initial weights, an int or a CPU generator.
        dtype: of the weights; float64 by default, float32 for speed.
    """

    reads_prompt = True

    def __init__(
        self,
        space: SequenceSpace,
        *,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        max_prompt: int = 0,
        seed: int | torch.Generator = 0,
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__()
        for name, value in (("width", width), ("heads", heads), ("layers", layers)):
            check_count(value, name)
        check_count(max_prompt, "max_prompt", 0)
        if width % heads:
            raise InputError(
                f"width = {width} is not a multiple of heads = {heads}; choose one that is."
            )
        ids, positions = space.vocab_size + 1, space.max_length + max_prompt
        weights = width * (12 * layers * width + 2 * ids + positions)
        what = f"width = {brief(width)}, layers = {brief(layers)}, max_prompt = {brief(max_prompt)}"
        check_entries(weights, what, "choose smaller ones")
        self.space, self.max_prompt = space, max_prompt
        # the last id is BOS
        self.token_embedding = nn.utils.skip_init(nn.Embedding, ids, width, dtype=dtype)
        # rows 0 … T−1: BOS and the tokens after it; then the prompt, counted backwards from BOS
        self.position_embedding = nn.utils.skip_init(nn.Embedding, positions, width, dtype=dtype)
        self.blocks = nn.ModuleList(_Block(width, heads, dtype) for _ in range(layers))
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.head = nn.utils.skip_init(nn.Linear, width, space.vocab_size, bias=False, dtype=dtype)
        self._initialise(as_generator(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Xavier-uniform matrices, zero biases, N(0, 0.02²) embeddings."""
        # projections into the stream shrink with depth (GPT-2): 2 of them a layer are added up
        depth = 1 / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if "norm" in name:  # LayerNorm starts as the identity by itself
                continue
            if "embedding" in name:
                parameter.normal_(0, 0.02, generator=generator)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                gain = depth if "project" in name or "contract" in name else 1
                nn.init.xavier_uniform_(parameter, gain=gain, generator=generator)

    def facts(self) -> list[str]:
        width = self.token_embedding.embedding_dim
        prompt = f"prompts of at most {self.max_prompt}"
        return [f"{len(self.blocks)} layers of width {width}", prompt, *super().facts()]

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        n, length = len(tokens), self.space.max_length
        ids, positions, readable = self._prompt_and_bos(n, prompt)
        ids = torch.cat([ids, tokens[:, :-1].long()], 1)
        positions = torch.cat([positions, torch.arange(1, length, device=ids.device)])
        if readable is None:
            return self._logits(ids, positions, None, causal=True)[0]
        mask = self._causal_mask(pad(readable, (0, length - 1), value=True), ids.shape[1])
        logits = self._logits(ids, positions, mask)[0]
        return logits[:, -length:]  # from BOS on

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, TransformerState]:
        ids, positions, readable = self._prompt_and_bos(n, prompt)
        mask = None if readable is None else self._causal_mask(readable, ids.shape[1])
        logits, keys, values = self._logits(ids, positions, mask)
        return logits[:, -1], TransformerState(keys, values, readable, 0)

    def step(
        self, state: TransformerState | BranchState, token: Tensor
    ) -> tuple[Tensor, TransformerState]:
        position = state.position + 1
        check_room(self.space, position)
        state = self._settled(state)
        readable = None if state.readable is None else pad(state.readable, (0, 1), value=True)
        mask = None if readable is None else self._causal_mask(readable, 1)
        positions = torch.full((1,), position, device=token.device)
        logits, keys, values = self._logits(token[:, None], positions, mask, past=state)
        return logits[:, -1], TransformerState(keys, values, readable, position)

    def branch(
        self, state: TransformerState | BranchState, tokens: Tensor
    ) -> tuple[Tensor, BranchState]:
        position = state.position + 1
        check_room(self.space, position)
        state = self._settled(state)
        k, cached = tokens.shape[1], state.keys[0].shape[2]
        dtype, device = self.head.weight.dtype, tokens.device
        # a child sees what its parent read, and itself; siblings do not see each other
        parents = torch.zeros(k, cached, dtype=dtype, device=device)
        itself = torch.full((k, k), -math.inf, dtype=dtype, device=device).fill_diagonal_(0)
        mask = torch.cat([parents, itself], 1)
        if state.readable is not None:
            mask = mask + pad(_additive(state.readable, dtype), (0, k))[:, None, None, :]
        positions = torch.full((1,), position, device=tokens.device)
        logits, keys, values = self._logits(tokens, positions, mask, past=state)
        return logits, BranchState(keys, values, state.readable, position, k)

    def select(self, state: TransformerState | BranchState, index: Tensor) -> TransformerState:
        if isinstance(state, TransformerState):
            selected: TransformerState = select_rows(state, index)
            return selected
        parent, child = index // state.children, index % state.children
        cached = state.keys[0].shape[2] - state.children
        keys = tuple(_one_child(layer, parent, child, cached) for layer in state.keys)
        values = tuple(_one_child(layer, parent, child, cached) for layer in state.values)
        readable = state.readable
        if readable is not None:  # the child's own token can be read
            readable = pad(readable[parent], (0, 1), value=True)
        return TransformerState(keys, values, readable, state.position)

    def _settled(self, state: TransformerState | BranchState) -> TransformerState:
        """A state with a cache for every row."""
        if isinstance(state, TransformerState):
            return state
        rows, device = len(state.keys[0]) * state.children, state.keys[0].device
        return self.select(state, torch.arange(rows, device=device))

    def _prompt_and_bos(
        self, n: int, prompt: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is read before the first logits, [prompt, BOS].

        Returns:
            ids [n,S+1], rows of the position table [S+1], and which may be read [n,S+1] (None:
            all).
        """
        bos = torch.full((n, 1), self.space.vocab_size, dtype=torch.long, device=device_of(self))
        zero = torch.zeros(1, dtype=torch.long, device=bos.device)
        if prompt is None:
            return bos, zero, None
        check_prompt_words(self.space, prompt)
        padding = int((prompt < 0).all(0).sum())  # columns that pad every row carry nothing
        prompt = prompt[:, padding:]
        size = prompt.shape[1]
        if size > self.max_prompt:
            raise InputError(
                f"prompt has {size} tokens, more than max_prompt = {self.max_prompt}; build it with"
                f" max_prompt={size}."
            )
        backwards = self.space.max_length + torch.arange(size - 1, -1, -1, device=bos.device)
        readable = pad(prompt >= 0, (0, 1), value=True)
        return torch.cat([prompt.clamp(min=0), bos], 1), torch.cat([backwards, zero]), readable

    def _causal_mask(self, readable: Tensor, t: int) -> Tensor:
        """Additive mask [N,1,t,total] for the last t of readable [N,total]."""
        # what lies before, and is no padding
        total = readable.shape[1]
        causal = torch.ones(t, total, dtype=torch.bool, device=readable.device).tril(total - t)
        # a padded row of the prompt reads itself, or its softmax would be empty (NaN)
        itself = torch.eye(total, dtype=torch.bool, device=readable.device)[total - t :]
        allowed = causal & (readable[:, None, None, :] | itself)
        return _additive(allowed, self.head.weight.dtype)

    def _logits(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        *,
        causal: bool = False,
        past: TransformerState | None = None,
    ) -> tuple[Tensor, Cache, Cache]:
        """Logits [N,t,V] for ids [N,t] at positions [t] after the past.

        Returns:
            the logits, and all keys and values, [N,heads,t_past + t,D] a layer.
        """
        x = self.token_embedding(ids) + self.position_embedding(positions)
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            before = None if past is None else (past.keys[layer], past.values[layer])
            x, key, value = block(x, mask, causal, before)
            keys.append(key)
            values.append(value)
        return self.head(self.norm(x)), tuple(keys), tuple(values)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, −inf elsewhere: attention kernels take this form faster than booleans."""
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, -math.inf)


def _one_child(layer: Tensor, parent: Tensor, child: Tensor, cached: int) -> Tensor:
    """The cache [m,heads,t + 1,D] of m chosen children, out of their parents' [n,heads,t + k,D]."""
    shared = layer[:, :, :cached].index_select(0, parent)  # [m,heads,t,D]
    own = layer[parent, :, cached + child]  # [m,heads,D]
    return torch.cat([shared, own.unsqueeze(2)], 2)
