"""n-gram language models: the next token depends on the last n − 1.

    Witten–Bell:  p(v|c) = (n(c,v) + t(c) p(v|c⁻)) / (n(c) + t(c)),    p(v|∅⁻) = 1/V             (1)
    Dirichlet:    p(v|c) = (n(c,v) + α) / (n(c) + αV)                                            (2)

n counts in the data, t(c) the number of different tokens after context c, c⁻ the context without
its oldest word (Witten & Bell 1991; Chen & Goodman 1999, §2.6). Before a text stand n − 1 marks of
its beginning. C contexts, K words, V columns, N sequences, T tokens.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from klrl_edu.core import logspace
from klrl_edu.core.display import readable_count
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import check_count, check_number
from klrl_edu.models.contract import check_room
from klrl_edu.models.finite_state import FiniteStateModel

MAX_ENTRIES = 10_000_000  # of the table C·V
MAX_ORDER = 1_000
_BEGIN = -1  # stands before the text in a context
Context = tuple[int, ...]
Counts = dict[Context, dict[int, float]]


class NGramState(NamedTuple):
    """The context of each row [N]; the position of the last logits."""

    context: Tensor
    position: int


class NGramModel(FiniteStateModel):
    """A table with a row of logits for each context; it reads no prompts.

    Args:
        space: where it lives.
        order: n ≥ 1; n − 1 words of context.
        logits: [C,V] in nats, zeros (uniform) by default; −inf is zero mass. They become the
            parameter `logits`. Rows run over the contexts of 0, 1, … n − 1 words, each length in
            the order of the words' ids.

    Raises:
        TooLargeError: more than MAX_ENTRIES logits; `fit` keeps only contexts that occur.
    """

    successor: Tensor

    def __init__(self, space: SequenceSpace, order: int, logits: Tensor | None = None):
        super().__init__()
        check_count(order, "order", maximum=MAX_ORDER)
        words = len(space.vocabulary)
        contexts = sum(words**k for k in range(order))
        if contexts * space.vocab_size > MAX_ENTRIES:
            raise TooLargeError(
                f"order {order} over {words} words has {readable_count(contexts)} contexts,"
                f" {readable_count(contexts * space.vocab_size)} logits, more than"
                f" {MAX_ENTRIES:,}; lower the order, or use NGramModel.fit, which keeps the"
                " contexts that occur."
            )
        self._set(space, order, _dense_successor(words, order), logits)

    # `fit` comes here too, past __init__, with contexts of its own
    def _set(
        self, space: SequenceSpace, order: int, successor: Tensor, logits: Tensor | None
    ) -> None:
        shape = (len(successor), space.vocab_size)
        logits = torch.zeros(shape, dtype=torch.float64) if logits is None else logits
        if logits.shape != shape:
            raise InputError(
                f"logits has shape {list(logits.shape)}; expected [C, V] = {list(shape)}, a row a"
                " context."
            )
        no_mass = (logits == -math.inf).all(-1, keepdim=True)
        bad = torch.isnan(logits) | (logits == math.inf) | no_mass
        if bool(bad.any()):
            context, token = bad.nonzero()[0].tolist()
            raise InputError(
                f"logits[{context}, {token}] = {float(logits[context, token])}: NaN, +inf, or a row"
                " without mass; give finite logits."
            )
        self.space, self.order = space, order
        self.register_buffer("successor", successor)
        self.logits = nn.Parameter(logits.detach().clone())

    @classmethod
    def fit(
        cls,
        space: SequenceSpace,
        texts: Sequence[str],
        order: int,
        *,
        weights: Sequence[float] | None = None,
        smoothing: Literal["witten-bell", "dirichlet"] = "witten-bell",
        concentration: float = 1.0,
    ) -> "NGramModel":
        """Counts texts and smooths; holds only the contexts that occur, and their endings.

        A context that never occurred is read as its longest ending that did. An EOS that the space
        forces at T is no evidence, and is not counted.

        Args:
            weights: how often each text counts; 1 by default.
            smoothing: "witten-bell" (1), where t(c) counts kinds and n(c) weights; or "dirichlet"
                (2), uniform after contexts that never occurred.
            concentration: α of "dirichlet".

        Raises:
            InputError: texts outside the space, none at all, negative weights, an unknown
                smoothing, α ≤ 0.
        """
        check_count(order, "order", maximum=MAX_ORDER)
        if smoothing not in ("witten-bell", "dirichlet"):
            raise InputError(
                f"smoothing = {smoothing!r} is not known; choose 'witten-bell' or 'dirichlet'."
            )
        rule = "above 0 and finite"
        concentration = check_number(
            concentration, "concentration", rule, lambda alpha: 0 < alpha < math.inf
        )
        counts = _count(space, texts, order, check_weights(texts, weights))
        contexts = sorted(counts, key=lambda context: (len(context), context))
        if smoothing == "witten-bell":
            rows = _witten_bell(counts, contexts, space.vocab_size)
        else:
            rows = _dirichlet(counts, contexts, order, space, concentration)
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        start = (_BEGIN,) * (order - 1)
        contexts.sort(key=lambda context: context != start)  # the start first, as in a dense table
        logits = torch.tensor([rows[context] for context in contexts], dtype=torch.float64).log()
        model._set(space, order, _sparse_successor(contexts, order, len(space.vocabulary)), logits)
        return model

    def facts(self) -> list[str]:
        return [f"order {self.order}", f"{len(self.logits):,} contexts"]

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        context = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        contexts = [context]
        for column in tokens[:, :-1].long().T:
            context = self._after(context, column)
            contexts.append(context)
        return self.logits[torch.stack(contexts, 1)]

    def start(self, n: int, prompt: Tensor | None = None) -> tuple[Tensor, NGramState]:
        self.check_prompt(prompt)
        context = torch.zeros(n, dtype=torch.long, device=self.logits.device)
        return self.logits[context], NGramState(context, 0)

    def step(self, state: NGramState, token: Tensor) -> tuple[Tensor, NGramState]:
        check_room(self.space, state.position + 1)
        context = self._after(state.context, token)
        return self.logits[context], NGramState(context, state.position + 1)

    def _after(self, context: Tensor, token: Tensor) -> Tensor:
        """The contexts [N] after contexts and tokens [N]; after EOS any will do."""
        word = token.clamp(max=self.successor.shape[1] - 1)
        return self.successor[context, word]

    def initial_log_probs(self) -> Tensor:
        contexts, device = len(self.logits), self.logits.device
        never = torch.full((contexts,), -math.inf, dtype=torch.float64, device=device)
        return never.index_fill(0, self.successor.new_zeros(1), 0.0)  # context 0 is the start

    def emission_log_probs(self) -> Tensor:
        return logspace.log_normalize(self.logits.double())

    def successors(self) -> Tensor:
        return self.successor


def check_weights(texts: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """One finite weight ≥ 0 a text, 1 by default, not all zero.

    Raises:
        InputError: anything else, or no text.
    """
    if isinstance(texts, str) or not len(texts):
        raise InputError("texts is empty or a single text; give a list of texts.")
    given = [1.0] * len(texts) if weights is None else list(weights)
    if len(given) != len(texts):
        raise InputError(
            f"weights has {len(given)} entries for {len(texts)} texts; give one a text."
        )
    listed = [
        check_number(weight, f"weights[{i}]", "a number ≥ 0", lambda number: 0 <= number < math.inf)
        for i, weight in enumerate(given)
    ]
    if not any(listed):
        raise InputError("weights are all zero; give at least one text a positive weight.")
    return listed


def chosen_tokens(space: SequenceSpace, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens [N,T] of texts, and which of them the text chose [N,T]: all up to an EOS before T."""
    tokens = space.encode(texts)
    chosen = space.live(tokens)
    if space.eos:
        chosen[:, -1] = False
    return tokens, chosen


def _count(space: SequenceSpace, texts: Sequence[str], order: int, weights: list[float]) -> Counts:
    """n(c,v) for every context of 0 … n − 1 words that occurs."""
    beginning = (_BEGIN,) * (order - 1)
    counts: Counts = defaultdict(lambda: defaultdict(float))
    # a look-up makes an entry: the start and the empty context are there without any text
    counts[beginning]
    counts[()]
    tokens, chosen = chosen_tokens(space, texts)
    for row, length, weight in zip(tokens.tolist(), chosen.sum(-1).tolist(), weights, strict=True):
        if not weight:
            continue
        padded = beginning + tuple(row[:length])
        for at in range(order - 1, len(padded)):
            for k in range(order):
                counts[padded[at - k : at]][padded[at]] += weight
    return counts


def _witten_bell(
    counts: Counts, contexts: list[Context], columns: int
) -> dict[Context, list[float]]:
    """(1) for contexts sorted by length."""
    rows: dict[Context, list[float]] = {}
    for context in contexts:
        # below the empty context stands the uniform law, so that every token keeps mass
        lower = rows[context[1:]] if context else [1 / columns] * columns
        seen = counts[context]
        kinds, total = len(seen), sum(seen.values())
        if seen:
            weights = [seen.get(v, 0.0) + kinds * lower[v] for v in range(columns)]
            rows[context] = [weight / (total + kinds) for weight in weights]
        else:
            rows[context] = lower
    return rows


def _dirichlet(
    counts: Counts, contexts: list[Context], order: int, space: SequenceSpace, alpha: float
) -> dict[Context, list[float]]:
    """(2) for whole contexts; the shorter ones stand for what never occurred."""
    columns, rows = space.vocab_size, {}
    for context in contexts:
        seen = counts[context] if len(context) == order - 1 else {}
        total = sum(seen.values()) + alpha * columns
        rows[context] = [(seen.get(v, 0.0) + alpha) / total for v in range(columns)]
    return rows


def _dense_successor(words: int, order: int) -> Tensor:
    """The context after each word [C,K], for all contexts of 0 … n − 1 words.

    A word is appended, and the oldest dropped once there are n − 1.
    """
    # contexts of k words are numbered from offset[k] on, as numbers of k digits to the base K
    offset = [0]
    for k in range(order):
        offset.append(offset[-1] + words**k)
    word, parts = torch.arange(words), []
    for k in range(order):
        longer = min(k + 1, order - 1)
        appended = torch.arange(words**k)[:, None] * words + word
        parts.append(offset[longer] + appended % words**longer)
    return torch.cat(parts)


def _sparse_successor(contexts: list[Context], order: int, words: int) -> Tensor:
    """The context after each word [C,K]: the longest ending of both that is a context."""
    place = {context: i for i, context in enumerate(contexts)}

    def after(context: Context, word: int) -> int:
        ending = (*context, word)[-(order - 1) :] if order > 1 else ()
        while ending not in place:
            ending = ending[1:]
        return place[ending]

    return torch.tensor([[after(context, word) for word in range(words)] for context in contexts])
