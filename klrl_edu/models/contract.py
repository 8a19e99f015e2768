"""The contract of every prior q and policy π: a language model on a SequenceSpace.

    log π(y|x) = Σ_t log π(y_t | y_<t, x)                                                        (1)

A model gives logits; the functions here make probabilities of them, force EOS at T and keep it
absorbing, always in float64. N sequences, T tokens, V columns of logits, S prompt tokens, M
prompts; log-probabilities in nats.
"""

import math
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from klrl_edu.core.arguments import check_arguments, check_draw, describe
from klrl_edu.core.display import readable_count as readable_count
from klrl_edu.core.draws import Draw
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import any_known, brief, check_count, check_entries
from klrl_edu.core.weighted import WeightedSequences

MAX_SEQUENCES = 1_000_000
# what a walk reads at once: at most so many logits (8 MiB in float64), and so many prefixes
_BLOCK_ENTRIES, _BLOCK_ROWS = 1 << 20, 1 << 11


class PrefixState(NamedTuple):
    """The default state: the tokens so far, read again at each step."""

    tokens: Tensor
    prompt: Tensor | None


class LanguageModel(nn.Module):
    """A distribution over the sequences of `space`, given token by token.

    Write `forward`, and the rest works; override `start`, `step` and `select` together for speed.

    Attributes:
        space: where it lives.
        reads_prompt: whether `forward` and `start` read prompts. A model that does not refuses
            them, but for the one it is bound to (`for_prompt`).
    """

    in_words: ClassVar[str] = (
        "a model (a LanguageModel such as SequenceTable.from_texts(texts, probs) or"
        " RecurrentModel(space))"
    )
    space: SequenceSpace
    reads_prompt: bool = False
    own_prompt: tuple[int, ...] = ()

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Logits [N,T,V] for tokens [N,T]; row t may read tokens[:, :t] only.

        Prompts are [N,S], where −1 is left padding, or None.

        Ids beyond the rows in use can be anything from 0 to V − 1 (a prefix is read filled up with
        zeros, EOS or not).
        """
        raise NotImplementedError

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, Any]:
        """The first logits [n,V] of n sequences, and a state.

        Tensors in a state have the sequences as their first axis.
        """
        self.check_prompt(prompt)
        tokens = torch.empty(n, 0, dtype=torch.long, device=device_of(self))
        return self._read(tokens, prompt), PrefixState(tokens, prompt)

    def step(self, state: Any, token: Tensor) -> tuple[Tensor, Any]:
        """After token [n]: the next logits [n,V] and a new state; `state` stays as it was.

        Raises:
            InputError: past T.
        """
        check_room(self.space, state.tokens.shape[1] + 1)
        tokens = torch.cat([state.tokens, token[:, None]], 1)
        return self._read(tokens, state.prompt), PrefixState(tokens, state.prompt)

    def select(self, state: Any, index: Tensor) -> Any:
        """The rows `index` of a state, repeated or dropped."""
        return select_rows(state, index)

    def branch(self, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        """Each of n rows continued by its own k tokens [n,k].

        Returns:
            logits [n,k,V], and the state of n·k rows, grouped by parent.
        """
        n, k = tokens.shape
        parents = torch.arange(n, device=tokens.device).repeat_interleave(k)
        logits, state = self.step(self.select(state, parents), tokens.reshape(-1))
        return logits.reshape(n, k, -1), state

    def for_prompt(self, prompt: Tensor | str | None) -> Self:
        """Binds a model that reads no prompts to the one it belongs to, and returns the model.

        A posterior's table is bound so. The prompt is [S], its text, or None for none.
        """
        ids = self.space.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        self.own_prompt = prompt_ids(ids)[0]
        return self

    def check_prompt(self, prompt: Tensor | None) -> None:
        """Refuses prompts [N,S] or [S] that the model would pass over.

        No prompt, or one of padding only, is always taken.

        Raises:
            InputError: the model reads no prompts, and is bound to none or to another one.
        """
        if self.reads_prompt:
            return
        for ids in prompt_ids(prompt):
            if ids not in ((), self.own_prompt):
                raise InputError(_unread(self, ids))

    @property
    def knows_prompts(self) -> bool:
        """Whether a prompt says anything to it: it reads them, or is bound to one."""
        return self.reads_prompt or bool(self.own_prompt)

    def __repr__(self) -> str:
        parts = self.facts()
        if isinstance(getattr(self, "space", None), SequenceSpace):
            parts = [*parts, self.space.in_short()]
            if self.own_prompt:
                parts = [*parts, f"prompt {self.space.decode_prompt(self.own_prompt)!r}"]
        return f"{type(self).__name__}({', '.join(parts)})"

    def facts(self) -> list[str]:
        """What `print(model)` says of it besides its space and the prompt it is bound to."""
        return [f"{sum(parameter.numel() for parameter in self.parameters()):,} parameters"]

    def token_log_prob(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        """log π(y_t|y_<t) [N,T]; see `token_log_probs`. Tables skip the V columns."""
        log_probs = conditional_log_probs(self, tokens, prompt)
        return log_probs.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)

    def log_prob(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        """log π(y|x) [N] in nats; see `sequence_log_probs`."""
        return sequence_log_probs(self, tokens, prompt)

    def sample(self, n: int, *, draw: Draw, prompt: Tensor | None = None) -> Tensor:
        """n sequences [n,T] for one prompt [S] or none; see `sample`."""
        return sample(self, n, draw=draw, prompts=None if prompt is None else prompt.reshape(1, -1))

    def _read(self, prefix: Tensor, prompt: Tensor | None) -> Tensor:
        """The logits [n,V] after a prefix [n,t], by a full forward."""
        t = prefix.shape[1]
        # filled up with zeros, which a causal model cannot see
        filled = torch.nn.functional.pad(prefix, (0, self.space.max_length - t))
        return self(filled, prompt)[:, t]


def check_reads(model: LanguageModel, prompt: Tensor | None) -> None:
    """A prompt [N,S] or [S] is one, and the model reads it.

    Raises:
        InputError: ids that are no whole numbers, or below −1; padding (−1) after a token; or what
            `check_prompt` refuses.
    """
    if prompt is not None:
        is_tensor = isinstance(prompt, Tensor)
        # an empty one may have any dtype
        if not is_tensor or (
            prompt.numel() and (prompt.is_floating_point() or prompt.is_complex())
        ):
            raise InputError(
                f"prompt is {describe(prompt)}; expected token ids, whole numbers (see"
                " space.encode_prompt)."
            )
        rows = torch.atleast_2d(prompt)
        misplaced = (rows[:, 1:] < 0) & (rows[:, :-1] >= 0)
        if bool((rows < -1).any()) or bool(misplaced.any()):
            raise InputError(
                f"prompt = {prompt.tolist()} is none: ids run from 0, and -1 is padding on the left"
                " of a row."
            )
    model.check_prompt(prompt)


def check_prompt_words(space: SequenceSpace, prompt: Tensor | None) -> None:
    """Refuses a prompt [N,S] with ids outside the space, for models that embed them."""
    if prompt is not None and bool((prompt >= space.vocab_size).any()):
        raise InputError(
            f"prompt holds the id {int(prompt.max())}, which is no token of {space!r}: ids run from"
            f" 0 to {space.vocab_size - 1}."
        )


def prompt_ids(prompt: Tensor | None) -> list[tuple[int, ...]]:
    """The prompts of [N,S] or [S], each without its left padding; () for None."""
    if prompt is None:
        return [()]
    rows = torch.atleast_2d(prompt).flatten(0, -2)
    return [tuple(token for token in row if token >= 0) for row in rows.tolist()]


def _unread(model: LanguageModel, ids: tuple[int, ...]) -> str:
    """Why a model refuses a prompt, and what to do."""
    name, asked = type(model).__name__, model.space.decode_prompt(ids)
    if model.own_prompt:
        return (
            f"this {name} belongs to the prompt {model.space.decode_prompt(model.own_prompt)!r},"
            f" and was given {asked!r}; take the one that belongs to that prompt."
        )
    return (
        f"{name} reads no prompt, and was given {asked!r}; take a model that does (RecurrentModel,"
        " TransformerModel, or one's own with reads_prompt = True), or bind this one to the prompt"
        " it belongs to: model.for_prompt(prompt)."
    )


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters live (CPU for one without any)."""
    tensor: Tensor | None = next(iter(model.parameters()), None)
    tensor = next(iter(model.buffers()), None) if tensor is None else tensor
    return torch.device("cpu") if tensor is None else tensor.device


def select_rows(state: Any, index: Tensor) -> Any:
    """Rows `index` [m] of every tensor [n, …] in a nested tuple; numbers and None pass."""
    if isinstance(state, Tensor):
        return state.index_select(0, index)  # three times as fast as state[index]
    if isinstance(state, tuple):
        parts = [select_rows(part, index) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def check_room(space: SequenceSpace, position: int) -> None:
    """Refuses to decode past T: logits exist for positions 0 … T−1."""
    if position >= space.max_length:
        raise InputError(
            f"step: position {position} is past the last token of {space!r}; stop after max_length"
            " tokens."
        )


def force_eos(logits: Tensor, ended: Tensor, last: Tensor | bool, space: SequenceSpace) -> Tensor:
    """Logits [..., V] -> float64 log-probabilities, with EOS certain where it must be.

    That is where the sequence has `ended` [...], or the position is the `last` one. This keeps q
    normalised and sampleable; conditioning q on |y| ≤ T would be another distribution.
    """
    if not space.eos:
        return torch.log_softmax(logits.double(), -1)
    forced = (ended | last).unsqueeze(-1)
    certain = torch.full((space.vocab_size,), -math.inf, dtype=torch.float64, device=logits.device)
    certain[-1] = 0
    # masked before the softmax too: a row of −inf there would send NaN into the gradient from
    # behind the last `where`
    log_probs = torch.log_softmax(torch.where(forced, 0.0, logits.double()), -1)
    return torch.where(forced, certain, log_probs)


def conditional_log_probs(
    model: LanguageModel, tokens: Tensor, prompt: Tensor | None = None
) -> Tensor:
    """Next-token log-probabilities along sequences.

    Args:
        tokens: [N,T] of the model's space.
        prompt: [N,S] with −1 as left padding, [S] shared by all, or None.

    Returns:
        [N,T,V] float64 in nats, normalised over V; rows after the first EOS give EOS probability 1.
    """
    check_arguments("conditional_log_probs(model, tokens)", model=(model, LanguageModel))
    space = model.space
    space.check_tokens(tokens)
    check_reads(model, prompt)
    logits = model(tokens, batch_prompt(prompt, len(tokens)))
    if logits.shape != (*tokens.shape, space.vocab_size):
        raise InputError(
            f"{type(model).__name__}.forward gave shape {list(logits.shape)}; expected [N, T, V] ="
            f" {[*tokens.shape, space.vocab_size]}."
        )
    return force_eos(logits, *ended_and_last(space, tokens), space)


def ended_and_last(space: SequenceSpace, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Where a sequence has ended before position t [N,T], and where t is the last position [T]."""
    position = torch.arange(space.max_length, device=tokens.device)
    return ~space.live(tokens), position == space.max_length - 1


def token_log_probs(model: LanguageModel, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
    """log π(y_t|y_<t, x) for tokens [N,T] -> [N,T] float64 in nats, 0 after the first EOS.

    The prompt is as in `conditional_log_probs`.
    """
    check_arguments("token_log_probs(model, tokens)", model=(model, LanguageModel))
    model.space.check_tokens(tokens)
    check_reads(model, prompt)
    log_probs = model.token_log_prob(tokens, batch_prompt(prompt, len(tokens)))
    _refuse_nan(log_probs, model)
    return log_probs


def sequence_log_probs(
    model: LanguageModel, tokens: Tensor, prompt: Tensor | None = None
) -> Tensor:
    """log π(y|x) by (1) for tokens [N,T] -> [N] float64 in nats; −inf at a token of no mass."""
    return token_log_probs(model, tokens, prompt).sum(-1)


def _refuse_nan(log_probs: Tensor, model: LanguageModel) -> None:
    """Numbers of a model with NaN would go on as if they were some."""
    # log-probabilities are at most 0, so their sum is NaN only where one of them is
    if any_known(torch.isnan(log_probs.detach().sum())):
        raise InputError(
            f"{type(model).__name__} gives NaN log-probabilities; look for NaN or inf in its"
            " weights or its logits."
        )


def batch_prompt(prompt: Tensor | None, n: int) -> Tensor | None:
    """A prompt [S] shared by n sequences -> [n,S]; [n,S] and None pass."""
    if prompt is None:
        return None
    if prompt.ndim == 1:
        return prompt.expand(n, -1)
    if prompt.ndim != 2 or len(prompt) != n:
        raise InputError(f"prompt has shape {list(prompt.shape)}; expected [S] or [{n}, S].")
    return prompt


@torch.no_grad()
def sample(model: LanguageModel, n: int, *, draw: Draw, prompts: Tensor | None = None) -> Tensor:
    """Ancestral samples; sequences that still share a prefix are read once.

    Args:
        n: sequences a prompt.
        draw: the source of randomness, e.g. `seeded_draw(0)`.
        prompts: [M,S], or None.

    Returns:
        tokens [n,T], or [M·n,T] grouped by prompt.
    """
    return sample_scored(model, n, draw=draw, prompts=prompts)[0]


def sample_scored(
    model: LanguageModel, n: int, *, draw: Draw, prompts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `sample`, with log π(y_t|y_<t) [n,T] float64 in nats, without a second pass.

    They are what `token_log_probs` gives, gradient included. A prefix that several samples share is
    read, and differentiated, once.
    """
    check_arguments("sample(model, n)", model=(model, LanguageModel))
    check_count(n, "n")
    check_draw(draw)
    space = model.space
    if prompts is not None and prompts.ndim != 2:
        raise InputError(f"prompts has shape {list(prompts.shape)}; expected [M, S].")
    check_reads(model, prompts)
    distinct = 1 if prompts is None else len(prompts)
    total = n * distinct
    what = f"n = {brief(n)} samples for {distinct:,} prompts, of {space.max_length:,} tokens each,"
    check_entries(total * space.max_length, what, "draw fewer at a time")
    logits, state = model.start(distinct, prompts)
    # which of the distinct prefixes each sequence has; the model reads those alone
    row = torch.arange(distinct, device=logits.device).repeat_interleave(n)
    ended = torch.zeros(distinct, dtype=torch.bool, device=logits.device)
    columns: list[Tensor] = []
    scores: list[Tensor] = []
    for t in range(space.max_length):
        last = t == space.max_length - 1
        log_probs = force_eos(logits, ended, last, space)
        token = draw(log_probs.detach(), row)
        columns.append(token)
        scores.append(log_probs.view(-1).index_select(0, row * space.vocab_size + token))
        if last or (space.eos and bool(token.eq(space.vocab_size - 1).all())):
            break
        parent, token, row = _distinct_children(row, token, len(logits), space.vocab_size)
        if space.eos:
            ended = token.eq(space.vocab_size - 1)
        if parent is not None:
            state = model.select(state, parent)
        logits, state = model.step(state, token)
    # where all had ended before T: EOS, and log-probability 0
    missing = (0, space.max_length - len(columns))
    end = space.vocab_size - 1
    tokens = torch.nn.functional.pad(torch.stack(columns, 1), missing, value=end)
    return tokens, torch.nn.functional.pad(torch.stack(scores, 1), missing)


def _distinct_children(
    row: Tensor, token: Tensor, parents: int, vocab_size: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The M distinct (prefix, token) pairs among N sequences.

    Returns:
        their parents [M] (None: all, in order), their tokens [M], and each sequence's row [N].
    """
    if parents == len(row):  # every sequence already has a prefix of its own
        return None, torch.empty_like(token).index_copy(0, row, token), row
    pairs, row = torch.unique(row * vocab_size + token, return_inverse=True)
    return pairs // vocab_size, pairs % vocab_size, row


class _Block(NamedTuple):
    """Prefixes of one length that wait on a walk.

    They are read when their turn comes, so the logits of one block are alive at a time.

    Attributes:
        prefix: tokens [n,t].
        log_prob: [n] in nats.
        row: [n], of the parents' state.
        state: of the parents.
    """

    prefix: Tensor
    log_prob: Tensor
    row: Tensor
    state: Any


@torch.no_grad()
def enumerate_support(
    model: LanguageModel, max_sequences: int = MAX_SEQUENCES, prompt: Tensor | None = None
) -> WeightedSequences:
    """Every sequence of positive mass with its log-probability, in lexicographic order of tokens.

    Walks the prefix trie depth-first in blocks and prunes prefixes of zero mass, so a table of 20
    sentences over 30 words costs 20 sequences, not 30^T. Each prefix on the stack leads to at least
    one sequence, so the count is known to pass `max_sequences` as soon as it does.

    Args:
        max_sequences: the most to hold.
        prompt: [S] or None.

    Raises:
        TooLargeError: the support is larger, with the count of the whole space and what to do.
        InputError: the model gives NaN.
    """
    check_arguments("enumerate_support(model)", model=(model, LanguageModel))
    check_count(max_sequences, "max_sequences")
    check_reads(model, prompt)
    space = model.space
    device = device_of(model)
    end = space.vocab_size - 1
    nothing = torch.empty(1, 0, dtype=torch.long, device=device)
    certain = torch.zeros(1, dtype=torch.float64, device=device)
    stack = [_Block(nothing, certain, torch.zeros_like(certain, dtype=torch.long), None)]
    waiting, found = 1, 0  # prefixes on the stack, and sequences that are whole
    all_tokens: list[Tensor] = []
    all_log_probs: list[Tensor] = []
    while stack:
        block = stack.pop()
        t = block.prefix.shape[1]
        last = t == space.max_length - 1
        logits, state = _open(model, block, prompt)
        ended = torch.zeros_like(block.log_prob, dtype=torch.bool)
        log_probs = block.log_prob[:, None] + force_eos(logits, ended, last, space)
        if bool(torch.isnan(log_probs).any()):
            raise InputError(
                f"{type(model).__name__} gives NaN logits after {t} tokens, so its support is not"
                " known; look for NaN in its weights."
            )
        row, token = (log_probs > -math.inf).nonzero(as_tuple=True)
        prefix = torch.cat([block.prefix.index_select(0, row), token[:, None]], 1)
        log_prob = log_probs.view(-1).index_select(0, row * space.vocab_size + token)
        done = token.eq(end) if space.eos else torch.full_like(token, last, dtype=torch.bool)
        waiting += int((~done).sum()) - len(block.prefix)
        found += int(done.sum())
        if found + waiting > max_sequences:
            raise TooLargeError(
                f"the model's support holds more than max_sequences = {max_sequences:,} sequences"
                f" (the whole space: {readable_count(space.size)}); raise max_sequences, shorten"
                " the space, or compare by samples (compare(..., n=, draw=))."
            )
        missing = (0, space.max_length - t - 1)
        all_tokens.append(torch.nn.functional.pad(prefix[done], missing, value=end))
        all_log_probs.append(log_prob[done])
        blocks = _split(prefix[~done], log_prob[~done], row[~done], state, space.vocab_size)
        stack.extend(reversed(blocks))  # the first of them is popped next
    tokens, log_probs = torch.cat(all_tokens), torch.cat(all_log_probs)
    if space.eos:  # leaves of other depths came first; without EOS the walk is in order already
        order = _lexicographic(tokens)
        tokens, log_probs = tokens[order], log_probs[order]
    return WeightedSequences(space, tokens, log_probs, exact=True)


def _open(model: LanguageModel, block: _Block, prompt: Tensor | None) -> tuple[Tensor, Any]:
    """The logits [n,V] after a block's prefixes, and the state that reads them."""
    if block.prefix.shape[1] == 0:
        return model.start(1, batch_prompt(prompt, 1))
    return advance(model, block.state, block.row, block.prefix[:, -1])


def advance(model: LanguageModel, state: Any, row: Tensor, token: Tensor) -> tuple[Tensor, Any]:
    """One step of a walk on a trie: rows of a state, in order, continued by a token each.

    Args:
        row: [m], ascending.
        token: [m].

    Returns:
        logits [m,V] and the new state.
    """
    # where every row in use has the same number of children, they share its state (`branch`);
    # otherwise it is copied for each
    parents, children = torch.unique_consecutive(row, return_counts=True)
    if len(parents) < len(token) and bool((children == children[0]).all()):
        logits, state = model.branch(model.select(state, parents), token.reshape(len(parents), -1))
        return logits.flatten(0, 1), state
    return model.step(model.select(state, row), token)


def block_size(vocab_size: int) -> int:
    """How many prefixes a walk reads at once: few enough for its memory."""
    size = max(1, min(_BLOCK_ROWS, _BLOCK_ENTRIES // vocab_size))
    # a multiple of V: where every token has mass, whole families of children, as `branch` wants
    return size - (size % vocab_size if size > vocab_size else 0)


def _split(
    prefix: Tensor, log_prob: Tensor, row: Tensor, state: Any, vocab_size: int
) -> list[_Block]:
    """The surviving prefixes in blocks, each small enough that its logits fit the budget."""
    if not len(prefix):
        return []
    size = block_size(vocab_size)
    pieces = zip(prefix.split(size), log_prob.split(size), row.split(size), strict=True)
    return [_Block(prefixes, log_probs, rows, state) for prefixes, log_probs, rows in pieces]


def _lexicographic(tokens: Tensor) -> Tensor:
    """The order [N] that sorts tokens [N,T], by stable sorts from the last column to the first."""
    order = torch.arange(len(tokens), device=tokens.device)
    for t in reversed(range(tokens.shape[1])):
        order = order[torch.sort(tokens[order, t], stable=True).indices]
    return order
