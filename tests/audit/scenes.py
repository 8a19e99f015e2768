"""Small problems and losses that several audit tests share."""

import torch

from klrl_edu.audit.coordinates import coordinates_of
from klrl_edu.audit.tree import SupportTree
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.estimators import kl_values
from klrl_edu.models.contract import enumerate_support, token_log_probs
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import table_reward

ANSWERS = ["", "a", "b", "a a", "a b", "b a"]
Q, PI, MU = (
    [0.1, 0.3, 0.2, 0.15, 0.15, 0.1],
    [0.2, 0.1, 0.25, 0.25, 0.1, 0.1],
    [0.15, 0.2, 0.2, 0.1, 0.2, 0.15],
)
REWARDS = [0.0, 1.0, 0.0, 2.0, 0.5, 1.0]


def answers(kl_coef=0.7):
    """Texts of none to two words that end in EOS: lengths differ and no two targets agree."""
    prior = SequenceTable.from_texts(dict(zip(ANSWERS, Q, strict=True)))
    return Problem(
        prior, table_reward(dict(zip(ANSWERS, REWARDS, strict=True)), prior.space), kl_coef
    )


def answers_policy(probs=PI):
    return SequenceTable.from_texts(dict(zip(ANSWERS, probs, strict=True)), space=answers().space)


def random_prefix_table(space, seed, tokens=None):
    table = PrefixTable(space, tokens)
    with torch.no_grad():
        table.logits.copy_(
            torch.randn(
                table.logits.shape,
                generator=torch.Generator().manual_seed(seed),
                dtype=torch.float64,
            )
        )
    return table


def binary(length, seed=0):
    """All 2^T sequences under a random prior and a random policy, both PrefixTables, with the count
    of b as reward.
    """
    space = SequenceSpace(("a", "b"), length, eos=False)
    return random_prefix_table(space, seed), Problem(
        random_prefix_table(space, seed + 1), lambda tokens, prompt: tokens.double().sum(-1), 0.5
    )


def tree_and_coordinates(policy):
    tokens = enumerate_support(policy).tokens
    tree = SupportTree.build(
        PrefixTrie(policy.space, tokens), tokens, token_log_probs(policy, tokens).detach()
    )
    return tree, coordinates_of(policy, tree)


def log_ratio(batch):
    return (batch.log_probs - batch.prior_log_probs).sum(-1)


def k2_loss(batch):
    return kl_values.k2(log_ratio(batch)).mean()


def batch_mean_baseline(batch):
    """Includes the sequence itself, and so shrinks the gradient by 1/B."""
    reward = batch.rewards.sum(-1) - batch.kl_coef * log_ratio(batch).detach()
    return -((reward - reward.mean()) * batch.log_probs.sum(-1)).mean()
