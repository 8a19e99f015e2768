"""Laws that every model and reward must keep.

    Σ_v π(v|y_<t) = 1,     logits_t = f(y_<t),     step ≡ branch ≡ forward,
    π(EOS|EOS …) = 1                                                                             (1)

A law is a plain function that raises AssertionError with what it saw; `assert_is_language_model`
runs them all on one's own model. Each is shown failing on a broken model in
tests/testing/test_laws.py. N sequences, T tokens, V columns of logits, S prompt tokens.
"""

import copy
import io
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.arguments import describe
from klrl_edu.core.draws import Draw, seeded_draw
from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.validation import check_count, check_number
from klrl_edu.models.contract import (
    LanguageModel,
    batch_prompt,
    conditional_log_probs,
    ended_and_last,
    force_eos,
    sample_scored,
    token_log_probs,
)
from klrl_edu.problems.rewards import Reward

__tracebackhide__ = True  # pytest shows the line that asserts, and no frame of this module

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}  # nats, by the dtype of a model's logits
_ALL_TOKENS = 64  # spaces up to this size are checked on every sequence


def example_tokens(space: SequenceSpace, n: int = 24, seed: int = 0) -> Tensor:
    """Sequences [N,T] that exercise a space: all of it where it has at most 64, otherwise n random
    ones of every length.
    """
    check_count(n, "n")
    check_count(seed, "seed", minimum=0)
    if space.size <= _ALL_TOKENS:
        return space.all_tokens()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(space.vocabulary), (n, space.max_length), generator=generator)
    if not space.eos:
        return tokens
    length = torch.randint(space.max_length, (n, 1), generator=generator)
    # the longest and the empty one always: most mistakes are at an end
    length[:2] = torch.tensor([[space.max_length - 1], [0]])[:n]
    return torch.where(torch.arange(space.max_length) < length, tokens, len(space.vocabulary))


def _to_read(space: SequenceSpace, tokens: Tensor | None) -> Tensor:
    """Sequences [N,T] for a law: the examples, or those given, at least one."""
    if tokens is None:
        return example_tokens(space)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not tokens.numel():
        got = f"shape {list(tokens.shape)}" if isinstance(tokens, Tensor) else describe(tokens)
        raise InputError(
            f"tokens is {got}; expected [N, T] with N at least 1, as without sequences every law"
            " holds."
        )
    return tokens


# --- laws of a language model ---------------------------------------------------------------------


def check_language_model(
    model: LanguageModel,
    prompt: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    draw: Draw | None = None,
    fresh: Callable[[], LanguageModel] | None = None,
    tolerance: float | None = None,
) -> None:
    """Runs every law below on a model.

    Args:
        model: any LanguageModel.
        prompt: [S], one prompt for all sequences, or [N,S] with −1 as left padding and `tokens`
            [N,T]; None for none.
        tokens: [N,T] to read; by default `example_tokens(model.space)`.
        draw: the randomness of the sampling law; `seeded_draw(0)` by default.
        fresh: builds the same model with other weights, for the state_dict law.
        tolerance: in nats; by default 1e-12 where logits are float64, 1e-5 where they are float32.

    Raises:
        AssertionError: a law is broken; the message names it and where.
    """
    tokens = _to_read(model.space, tokens)
    check_normalised(model, prompt, tokens=tokens, tolerance=tolerance)
    check_causal(model, prompt, tokens=tokens, tolerance=tolerance)
    check_decoding(model, prompt, tokens=tokens, tolerance=tolerance)
    check_rows_independent(model, prompt, tokens=tokens, tolerance=tolerance)
    check_eos_absorbs(model, prompt, tokens=tokens, tolerance=tolerance)
    prompts = batch_prompt(prompt, len(tokens))
    first = None if prompts is None else prompts[0]
    check_samples_belong(model, first, draw=draw)
    check_decoding_gradient(model, first, tolerance=tolerance)
    check_state_dict(model, prompt, tokens=tokens, fresh=fresh, tolerance=tolerance)
    check_refuses_past_end(model, prompt, tokens=tokens)
    check_prompts(model, tokens=tokens)


# under the name that stands beside the other assertions
assert_is_language_model = check_language_model


def check_normalised(
    model: LanguageModel,
    prompt: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Law: next-token probabilities sum to one after every prefix, and none is NaN. Arguments as in
    `check_language_model`.
    """
    tokens = _to_read(model.space, tokens)
    # a NaN anywhere in a row makes its sum NaN, which equals nothing
    log_total = logspace.logsumexp(conditional_log_probs(model, tokens, prompt))
    zero = torch.zeros(tokens.shape, dtype=torch.float64)
    _agree(log_total, zero, "normalised: log Σ_v π(v|prefix)", model, tolerance)


def check_causal(
    model: LanguageModel,
    prompt: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Law: row t of `forward` depends on tokens[:, :t] only; the tokens from t on are replaced and
    the row must not move.
    """
    tokens = _to_read(model.space, tokens)
    log_probs, columns = _read(model, tokens, prompt), model.space.vocab_size
    for t in range(model.space.max_length):
        law = f"causal: row t = {t} of forward, with other tokens from {t} on"
        # three other continuations, each with every later token changed
        for shift in range(1, min(columns, 4)):
            changed = torch.cat([tokens[:, :t], (tokens[:, t:] + shift) % columns], 1)
            # past T − 1 or after EOS such ids are no sequence; a network reads them all the same
            seen = _read(model, changed, prompt)[:, t]
            _agree(seen, log_probs[:, t], law, model, tolerance)


def check_decoding(
    model: LanguageModel,
    prompt: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Law: step ≡ branch ≡ forward. Decodes along tokens by `step`, and beside it by `branch` into
    the true and another token.
    """
    tokens = _to_read(model.space, tokens)
    space, n = model.space, len(tokens)
    expected = _read(model, tokens, prompt)
    logits, state = model.start(n, batch_prompt(prompt, n))
    branched = state
    seen = _finish(model, logits, tokens, 0)
    _agree(seen, expected[:, 0], "step ≡ forward: start", model, tolerance)
    # `branch` gives the two children of a row side by side; the first is the true one
    true_children = torch.arange(0, 2 * n, 2, device=tokens.device)
    for t in range(1, space.max_length):
        logits, after = model.step(state, tokens[:, t - 1])
        seen = _finish(model, logits, tokens, t)
        _agree(seen, expected[:, t], f"step ≡ forward: position {t}", model, tolerance)
        other = (tokens[:, t - 1] + 1) % space.vocab_size
        model.step(state, other)  # a state may be stepped twice: the first child must not notice
        state = after
        pair, both = model.branch(branched, torch.stack([tokens[:, t - 1], other], 1))
        assert pair.shape == (n, 2, space.vocab_size), (
            f"branch of {n} rows by 2 tokens gave logits {list(pair.shape)}, expected [n, k, V]"
        )
        seen, law = _finish(model, pair[:, 0], tokens, t), f"branch ≡ forward: position {t}"
        _agree(seen, expected[:, t], f"{law}, the true token", model, tolerance)
        turned = torch.cat([tokens[:, : t - 1], other[:, None], tokens[:, t:]], 1)
        seen, beside = _finish(model, pair[:, 1], turned, t), _read(model, turned, prompt)[:, t]
        _agree(seen, beside, f"{law}, another token", model, tolerance)
        branched = model.select(both, true_children)


def check_rows_independent(
    model: LanguageModel,
    prompt: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Law: a row reads the same alone, in a batch, and after `select` has reordered and repeated
    the batch.
    """
    tokens = _to_read(model.space, tokens)
    rows, n = batch_prompt(prompt, len(tokens)), len(tokens)
    expected = _read(model, tokens, prompt)
    law = "rows independent of the batch"
    for i in range(min(n, 6)):  # what mixes rows, mixes them all
        alone = _read(model, tokens[i : i + 1], None if rows is None else rows[i : i + 1])
        _agree(alone[0], expected[i], f"{law}: row {i} alone", model, tolerance)
    # all rows backwards, and every second one again
    index = torch.cat([torch.arange(n).flip(0), torch.arange(0, n, 2)]).to(tokens.device)
    _, state = model.start(n, rows)
    for t in range(1, model.space.max_length):
        logits, _ = model.step(model.select(state, index), tokens[index, t - 1])
        _, state = model.step(state, tokens[:, t - 1])
        seen, what = _finish(model, logits, tokens[index], t), "rows reordered by select"
        _agree(seen, expected[index, t], f"{law}: {what}, position {t}", model, tolerance)


def check_eos_absorbs(
    model: LanguageModel,
    prompt: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Law: EOS has probability 1 after EOS and at T, and `token_log_prob` says the same as the
    conditionals.
    """
    tokens = _to_read(model.space, tokens)
    log_probs = conditional_log_probs(model, tokens, prompt)
    ended, last = ended_and_last(model.space, tokens)
    if model.space.eos:
        # exactly: 0 and −inf are written there, not computed
        forced = log_probs[ended | last]
        assert bool((forced[:, -1] == 0).all()), (
            "EOS forced and absorbing: π(EOS) is not 1 after EOS or at T"
        )
        assert bool((forced[:, :-1] == -math.inf).all()), (
            "EOS forced and absorbing: a word has mass after EOS or at T"
        )
    taken = log_probs.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
    what = "EOS forced and absorbing: token_log_prob against conditional_log_probs"
    _agree(token_log_probs(model, tokens, prompt), taken, what, model, tolerance)


def check_samples_belong(
    model: LanguageModel, prompt: Tensor | None = None, *, draw: Draw | None = None, n: int = 32
) -> None:
    """Law: samples are sequences of the space (EOS absorbs, and stands at T) with positive mass.
    prompt [S] or None.
    """
    check_count(n, "n")
    tokens = model.sample(n, draw=seeded_draw(0) if draw is None else draw, prompt=prompt)
    expected = [n, model.space.max_length]
    assert list(tokens.shape) == expected, (
        f"sample gave shape {list(tokens.shape)}, expected [n, T] = {expected}"
    )
    try:
        model.space.check_tokens(tokens, "sample")
    except InputError as error:
        raise AssertionError(f"EOS forced and absorbing: {error}") from None
    log_probs = model.log_prob(tokens, prompt)
    assert bool((log_probs > -math.inf).all()), (
        f"a sample has zero mass: {model.space.decode(tokens[log_probs == -math.inf])[:1]}"
    )


def check_decoding_gradient(
    model: LanguageModel,
    prompt: Tensor | None = None,
    *,
    tolerance: float | None = None,
    n: int = 16,
) -> None:
    """Law: log-probabilities and gradient are the same along `step`, where training takes them, and
    by `forward`. prompt [S] or None.
    """
    check_count(n, "n")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    prompts = None if prompt is None else prompt[None]
    tokens, decoded = sample_scored(model, n, draw=seeded_draw(0), prompts=prompts)
    read = token_log_probs(model, tokens, prompt)
    law = "gradient of step ≡ forward"
    themselves = f"{law}: the log-probabilities themselves"
    _agree(decoded.detach(), read.detach(), themselves, model, tolerance)
    # what has nothing to train has no gradient to compare
    if not parameters or not read.requires_grad:
        return
    assert decoded.requires_grad, (
        "gradient of step ≡ forward: start and step carry no gradient, so training on samples would"
        " not move the model"
    )
    # an advantage for each token, all different, so that no two errors cancel
    advantages = torch.linspace(-1, 1, read.numel(), dtype=read.dtype, device=read.device)
    weight = advantages.view_as(read)
    sides = (
        torch.autograd.grad((weight * side).sum(), parameters, allow_unused=True)
        for side in (decoded, read)
    )
    for parameter, *gradients in zip(parameters, *sides, strict=True):
        mine, theirs = (
            torch.zeros_like(parameter) if gradient is None else gradient for gradient in gradients
        )
        _agree(mine, theirs, law, model, tolerance)


def check_state_dict(
    model: LanguageModel,
    prompt: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    fresh: Callable[[], LanguageModel] | None = None,
    tolerance: float | None = None,
) -> None:
    """Law: a state_dict that is saved, loaded (weights only) and put into a model with other
    weights gives the same distribution.

    Args:
        fresh: builds the same model with other weights; by default a deep copy whose parameters are
            drawn anew, which cannot notice weights that are kept outside the parameters.
    """
    tokens = _to_read(model.space, tokens)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = _scrambled(model) if fresh is None else fresh()
    # weights only: what needs pickled code to come back is not in the state
    other.load_state_dict(torch.load(file, weights_only=True))
    seen, expected = _read(other, tokens, prompt), _read(model, tokens, prompt)
    _agree(seen, expected, "state_dict round trip", model, tolerance)


def check_refuses_past_end(
    model: LanguageModel, prompt: Tensor | None = None, *, tokens: Tensor | None = None
) -> None:
    """Law: logits exist for positions 0 … T−1; one `step` more raises InputError."""
    tokens = _to_read(model.space, tokens)
    _, state = model.start(len(tokens), batch_prompt(prompt, len(tokens)))
    for t in range(model.space.max_length - 1):
        _, state = model.step(state, tokens[:, t])
    # the last token has been given its logits; to step into it would ask for those of T
    try:
        model.step(state, tokens[:, -1])
    except InputError:
        return
    raise AssertionError(
        f"stepping past T = {model.space.max_length} must raise InputError (call check_room in"
        " step)"
    )


def check_prompts(model: LanguageModel, *, tokens: Tensor | None = None) -> None:
    """Law: a prompt is read or refused, never passed over: a model that reads none refuses all but
    the one it is bound to, and `start` and all that score and sample refuse what `check_prompt`
    does.
    """
    tokens = _to_read(model.space, tokens)[:1]
    # of two lengths, as a model may be bound to one prompt
    some = [torch.zeros(1, length, dtype=torch.long, device=tokens.device) for length in (1, 2)]
    refused = [prompt for prompt in some if _refuses(model.check_prompt, prompt)]
    assert refused or model.reads_prompt, (
        f"prompts are read or refused: {type(model).__name__} reads none, and check_prompt takes"
        f" {[prompt[0].tolist() for prompt in some]}"
    )
    for prompt in refused:
        asked: dict[str, Callable[[Tensor], object]] = {
            "start": partial(model.start, 1),
            "token_log_probs": partial(token_log_probs, model, tokens),
            "conditional_log_probs": partial(conditional_log_probs, model, tokens),
            "sample": lambda prompt: model.sample(1, draw=seeded_draw(0), prompt=prompt[0]),
        }
        for name, ask in asked.items():
            assert _refuses(ask, prompt), (
                f"prompts are read or refused: {name} of {type(model).__name__} takes the prompt"
                f" {prompt[0].tolist()}, which check_prompt refuses (call it there)"
            )


def _refuses(ask: Callable[[Tensor], object], prompt: Tensor) -> bool:
    try:
        ask(prompt)
    except InputError:
        return True
    return False


def check_causal_reward(
    reward: Reward,
    space: SequenceSpace,
    prompt: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
) -> None:
    """Law of a reward [N,T]: column t depends on tokens[:, :t+1] only, and is 0 after the first
    EOS.

    Args:
        reward: reward(tokens [N,T], prompt) -> [N,T] in reward units.
        space: whose sequences it reads.
        prompt: [S] or None.
        tokens: [N,T]; by default `example_tokens(space)`.
    """
    tokens = _to_read(space, tokens)
    rows = batch_prompt(prompt, len(tokens))
    values = reward(tokens, rows)
    assert values.shape == tokens.shape, (
        f"causal reward: shape {list(values.shape)}, expected [N, T] = {list(tokens.shape)}"
    )
    assert bool((values[~space.live(tokens)] == 0).all()), (
        "causal reward: a value after the first EOS is not 0"
    )
    for t in range(space.max_length):
        # each sequence goes on as another of them does, and is then closed by EOS
        for shift in range(1, min(len(tokens), 5)):
            mixed = torch.cat([tokens[:, : t + 1], tokens.roll(shift, 0)[:, t + 1 :]], 1)
            changed = _close(mixed, space)
            seen = reward(changed, rows)[:, t]
            # NaN may stand where the prior has no mass, and must not move either
            same = torch.isclose(seen, values[:, t], rtol=0, atol=1e-12, equal_nan=True)
            assert bool(same.all()), (
                f"causal reward: column {t} moved with later tokens,"
                f" {_first(same, seen, values[:, t])}"
            )


@torch.no_grad()
def _read(model: LanguageModel, tokens: Tensor, prompt: Tensor | None) -> Tensor:
    """Log-probabilities [N,T,V] along any ids, whether or not they are a sequence of the space (EOS
    at T).
    """
    logits = model(tokens, batch_prompt(prompt, len(tokens)))
    return force_eos(logits, *ended_and_last(model.space, tokens), model.space)


def _finish(model: LanguageModel, logits: Tensor, tokens: Tensor, t: int) -> Tensor:
    """Log-probabilities [N,V] at position t of decoding along tokens."""
    ended, last = ended_and_last(model.space, tokens)
    return force_eos(logits.detach(), ended[:, t], last[t], model.space)


def _agree(
    seen: Tensor, expected: Tensor, law: str, model: LanguageModel, tolerance: float | None
) -> None:
    """Equal within the tolerance of the model's dtype, −inf only to −inf, NaN to nothing."""
    if tolerance is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
        tolerance = TOLERANCES.get(dtype, 1e-5)
    # a nat is a factor of e: nothing that allows it holds anybody to a law
    rule = "in nats, at least 0 and below 1, such as 1e-12 (1e-5 in float32)"
    tolerance = check_number(tolerance, "tolerance", rule, lambda nats: 0 <= nats < 1)
    # −inf is close to −inf alone, so a mass that is 0 must be 0
    same = torch.isclose(seen.cpu(), expected.detach().cpu(), rtol=tolerance, atol=tolerance)
    assert bool(same.all()), (
        f"{type(model).__name__} breaks the law '{law}': {_first(same, seen, expected)}; tolerance"
        f" {tolerance:g}"
    )


def _first(same: Tensor, seen: Tensor, expected: Tensor) -> str:
    """The first entry that differs, in words."""
    place = (~same).nonzero()[0].tolist()
    found, wanted = seen[tuple(place)].item(), expected[tuple(place)].item()
    return f"entry {place} is {found:.17g}, expected {wanted:.17g}"


@torch.no_grad()
def _scrambled(model: LanguageModel) -> LanguageModel:
    """A copy with other parameters, drawn from a generator of its own."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        # by a generator of its own: the global one belongs to the user's test
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return other


def _close(tokens: Tensor, space: SequenceSpace) -> Tensor:
    """Any ids [N,T] made a sequence: EOS after the first EOS and at T."""
    if not space.eos:
        return tokens
    closed = torch.where(space.live(tokens), tokens, len(space.vocabulary))
    return torch.cat([closed[:, :-1], torch.full_like(closed[:, -1:], len(space.vocabulary))], 1)
