"""The other side of two ratios: a GPT-2 of the same size from Hugging Face, used as its
documentation shows.
"""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from klrl_edu.problems.problem import Problem

BOS, WORDS, LENGTH = 8, 8, 6


def build_gpt2() -> GPT2LMHeadModel:
    """Two layers, width 64, 4 heads, eight words and BOS."""
    sizes = {
        "vocab_size": WORDS + 1,
        "n_positions": LENGTH + 1,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
    }
    config = GPT2Config(
        **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=BOS, eos_token_id=BOS
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def log_probs(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """log π [N,T] by a full forward."""
    inputs = torch.cat([torch.full((len(tokens), 1), BOS), tokens[:, :-1]], 1)
    logits = model(inputs, use_cache=False).logits[..., :WORDS]
    return torch.log_softmax(logits, -1).gather(-1, tokens[..., None]).squeeze(-1)


@torch.no_grad()
def sample(model: GPT2LMHeadModel, n: int, generator: torch.Generator) -> Tensor:
    """n sequences [n,T] with past_key_values."""
    token, past, columns = torch.full((n, 1), BOS), None, []
    for _ in range(LENGTH):
        out = model(token, past_key_values=past, use_cache=True)
        past = out.past_key_values
        token = torch.multinomial(
            torch.softmax(out.logits[:, -1, :WORDS], -1), 1, generator=generator
        )
        columns.append(token)
    return torch.cat(columns, 1)


class MinimalRloo:
    """RLOO with λ·log π/q in the reward, in as few lines as one would write."""

    def __init__(self, problem: Problem, batch_size: int):
        self.policy, self.prior, self.problem, self.batch_size = (
            build_gpt2(),
            build_gpt2(),
            problem,
            batch_size,
        )
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        """One update."""
        tokens = sample(self.policy, self.batch_size, self.generator)
        mine = log_probs(self.policy, tokens).sum(-1)
        with torch.no_grad():
            log_ratio = mine - log_probs(self.prior, tokens).sum(-1)
            reward = self.problem.rewards(tokens) - self.problem.kl_coef * log_ratio
            advantage = reward - (reward.sum() - reward) / (self.batch_size - 1)
        loss = -(advantage * mine).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
