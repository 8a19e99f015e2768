"""The standing problems; the command line takes their names."""

from collections.abc import Callable

import torch

from klrl_edu.core.errors import InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.table import SequenceTable
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.corpora import surname_prior
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import add, count_reward, regex_reward, repeat_reward, table_reward

FOUR_SENTENCES = {"the cat": 0.4, "the dog": 0.3, "a cat": 0.2, "a dog": 0.1}
FOUR_REWARDS = {"the cat": 1.0, "the dog": 0.0, "a cat": 0.0, "a dog": 2.0}
FOUR_POLICY = {"the cat": 0.5, "the dog": 0.2, "a cat": 0.1, "a dog": 0.2}

SURNAME_PATTERN = r"(son|sen|man)$"

_COUNT_THREES_SEED, _COUNT_THREES_SCALE = 0, 0.8  # pinned, with their H(q), KL and hash, by a test


def four_sentences_space() -> SequenceSpace:
    """Sixteen word pairs over {the, a, cat, dog}, four of which the prior supports; no EOS."""
    return SequenceSpace(("the", "a", "cat", "dog"), max_length=2, eos=False)


def four_sentences(kl_coef: float = 1.0) -> Problem:
    """The course's running example, of four sentences.

    q = (.4, .3, .2, .1) and r = (1, 0, 0, 2) on 'the cat', 'the dog', 'a cat', 'a dog'.
    """
    space = four_sentences_space()
    prior = SequenceTable.from_texts(FOUR_SENTENCES, space=space)
    return Problem(prior, table_reward(FOUR_REWARDS, space), kl_coef)


def four_sentences_policy() -> SequenceTable:
    """The policy π = (.5, .2, .1, .2) that the course holds against q and π*."""
    return SequenceTable.from_texts(FOUR_POLICY, space=four_sentences_space())


def surnames(kl_coef: float = 1.0, count: int = 1000, pattern: str = SURNAME_PATTERN) -> Problem:
    """US census surnames spelled as characters; reward 1 where the spelling matches a pattern.

    Args:
        count: how many of the most frequent names, at most 5,000.
        pattern: a regular expression, searched in the lower-case name.
    """
    prior = surname_prior(count)
    return Problem(prior, regex_reward(pattern, prior.space), kl_coef)


def count_threes_prior(dtype: torch.dtype = torch.float32) -> TransformerModel:
    """A random two-layer Transformer over eight words, its output scaled to H(q) ≈ 9.68 nats.

    Width 64, 4 heads, 101,568 parameters.
    """
    space = SequenceSpace(tuple("01234567"), max_length=6, eos=False)
    prior = TransformerModel(
        space, width=64, heads=4, layers=2, seed=_COUNT_THREES_SEED, dtype=dtype
    )
    with torch.no_grad():
        # smaller logits are flatter: H(q) rises, to at most 6 log 8 ≈ 12.5 nats
        prior.head.weight.mul_(_COUNT_THREES_SCALE)
    return prior.requires_grad_(False)


def count_threes(kl_coef: float = 0.5) -> Problem:
    """262,144 sequences that nobody can eyeball, under a Transformer prior.

    r = number of '3's − ½ · adjacent repeats.
    """
    prior = count_threes_prior()
    # both parts have automata of few states, so forward–backward could sum them as well
    reward = add(count_reward("3", prior.space), repeat_reward(prior.space, -0.5))
    return Problem(prior, reward, kl_coef)


EXAMPLES: dict[str, Callable[..., Problem]] = {
    "four-sentences": four_sentences,
    "surnames": surnames,
    "count-threes": count_threes,
}


def example(name: str, kl_coef: float | None = None) -> Problem:
    """A standing problem by its name.

    Args:
        kl_coef: λ; by default the problem's own, 0.5 for count-threes and 1 for the others.

    Raises:
        InputError: no such name; the message lists them.
    """
    if name not in EXAMPLES:
        raise InputError(
            f"problem {name!r} is not known; choose from {', '.join(EXAMPLES)}, or give a CSV or"
            " JSON table."
        )
    return EXAMPLES[name]() if kl_coef is None else EXAMPLES[name](kl_coef)
