"""The other side of three ratios: TRL's RLOOTrainer on count-threes, from the same prior, with the
same Adam.

The GPT-2 carries the weights of our own prior (same architecture), so that both sides start from
one distribution and the exact KL(π‖π*) of TRL's policy can be had by copying its weights back. Most
of TRL's time is overhead a step, not arithmetic: generation, bookkeeping and three passes, so the
ratio falls with the batch.
"""

import contextlib
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from klrl_edu.core.draws import seeded_draw
from klrl_edu.evaluation.compare import compare
from klrl_edu.exact.posterior import looked_up, posterior
from klrl_edu.learning import losses
from klrl_edu.learning.training import copy_of_prior, train_steps
from klrl_edu.models.contract import LanguageModel
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.examples import count_threes, count_threes_prior
from tests.benchmarks.measure import Ratio

BOS, EOS, WORDS, LENGTH, LR = 8, 9, 8, 6, 1e-3
WARM_UP, STEPS = 3, 20
KL_BAR, MOST_STEPS, LOOK_EVERY = 0.05, 400, 10


def gpt2_of(model: TransformerModel) -> GPT2LMHeadModel:
    """The same distribution as a Hugging Face model: ten embeddings (words, BOS, EOS), a head of
    eight columns.
    """
    sizes = {
        "vocab_size": WORDS + 2,
        "n_positions": LENGTH + 1,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
    }
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    other = GPT2LMHeadModel(
        GPT2Config(
            **sizes,
            **dropout,
            activation_function="gelu",
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    other.lm_head = nn.Linear(64, WORDS, bias=False)
    with torch.no_grad():
        for mine, theirs in _pairs(model, other):
            theirs.zero_()
            theirs[: len(mine)].copy_(mine)
    return other.eval()


def copied_back(other: GPT2LMHeadModel) -> TransformerModel:
    """Our model with TRL's weights."""
    model = count_threes_prior()
    with torch.no_grad():
        for mine, theirs in _pairs(model, other):
            mine.copy_(theirs[: len(mine)])
    return model


def _pairs(
    model: TransformerModel, other: GPT2LMHeadModel
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every weight of ours beside the same one of GPT-2, whose matrices are stored transposed."""
    body = other.transformer
    pairs = [
        (model.token_embedding.weight, body.wte.weight),
        (model.position_embedding.weight, body.wpe.weight),
        (model.head.weight, other.lm_head.weight),
    ]
    layers = [(model.norm, body.ln_f)]
    for mine, theirs in zip(model.blocks, body.h, strict=True):
        layers += [(mine.attention_norm, theirs.ln_1), (mine.mlp_norm, theirs.ln_2)]
        for a, b in (
            (mine.qkv, theirs.attn.c_attn),
            (mine.project, theirs.attn.c_proj),
            (mine.expand, theirs.mlp.c_fc),
            (mine.contract, theirs.mlp.c_proj),
        ):
            pairs += [(a.weight, b.weight.T), (a.bias, b.bias)]
    return pairs + [pair for a, b in layers for pair in ((a.weight, b.weight), (a.bias, b.bias))]


class _AfterEachStep(TrainerCallback):
    """Calls back with the CPU seconds of the step; what the callee does is outside the clock."""

    def __init__(self, then: Callable[[float], bool]):
        self.then, self.last = then, time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.then(time.process_time() - self.last):
            control.should_training_stop = True
        self.last = time.process_time()


def run_trl(
    policy: GPT2LMHeadModel, batch_size: int, steps: int, then: Callable[[float], bool]
) -> None:
    """RLOOTrainer on count-threes, from the prior; `then(seconds)` after each step says whether to
    stop.
    """
    problem = count_threes()
    words = {**{str(k): k for k in range(WORDS)}, "<bos>": BOS, "<eos>": EOS}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words)),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
    )

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return problem.rewards(torch.tensor(completion_ids)).tolist()

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "max_steps": steps,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "use_cpu": True,
        }
        quiet = {
            "report_to": "none",
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "bf16": False,
            "seed": 0,
        }
        batches = {
            "per_device_train_batch_size": batch_size,
            "num_generations": batch_size,
            "steps_per_generation": 1,
            "gradient_checkpointing": False,
        }
        arguments = RLOOConfig(
            **options,
            **quiet,
            **batches,
            max_completion_length=LENGTH,
            beta=problem.kl_coef,
            max_grad_norm=1.0,
        )
        prompts = Dataset.from_dict({"prompt": ["<bos>"] * 8})
        reference = copy.deepcopy(policy)
        with mock.patch(
            "trl.trainer.rloo_trainer.create_model_from_path", return_value=reference
        ):  # it would load the prior from a hub
            trainer = RLOOTrainer(
                policy,
                reward,
                args=arguments,
                train_dataset=prompts,
                processing_class=tokenizer,
                callbacks=[_AfterEachStep(then)],
            )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()


def step_ratio(batch_size: int, bar: str) -> Ratio:
    """One RLOO step: TRL's and ours in turn, in one process."""
    problem = count_threes()
    options = {
        "steps": WARM_UP + STEPS,
        "draw": seeded_draw(0),
        "batch_size": batch_size,
        "lr": LR,
        "max_grad_norm": 1.0,
    }
    own = train_steps(copy_of_prior(problem), looked_up(posterior(problem)), losses.rloo, **options)
    pairs = []

    def after(theirs: float) -> bool:
        started = time.process_time()
        next(own)
        pairs.append((theirs, time.process_time() - started))
        return False

    run_trl(gpt2_of(problem.prior), batch_size, WARM_UP + STEPS, after)
    kept = pairs[WARM_UP:]
    medians = [1e3 * statistics.median(side) for side in zip(*kept, strict=True)]
    names = (
        f"one RLOO step, batch {batch_size}",
        "TRL 1.16 RLOOTrainer ÷ own, which looks log q up",
    )
    return Ratio(
        *names,
        bar,
        statistics.median(a / b for a, b in kept),
        f"{medians[0]:.4g} ms ÷ {medians[1]:.4g} ms, {STEPS} rounds",
    )


def seconds_to_a_kl() -> Ratio:
    """CPU seconds until KL(π‖π*) ≤ 0.05 at batch 256, both from the prior with Adam at 1e-3;
    looking at the KL is outside the clock.
    """
    problem = count_threes()
    target = posterior(problem)
    theirs, own = gpt2_of(problem.prior), copy_of_prior(problem)
    spent: dict[str, list[float]] = {"TRL": [], "own": []}

    def after(side: str, seconds: float, model: Callable[[], LanguageModel]) -> bool:
        spent[side].append(seconds)
        return len(spent[side]) % LOOK_EVERY == 0 and compare(model(), target).reverse_kl <= KL_BAR

    run_trl(
        theirs, 256, MOST_STEPS, lambda seconds: after("TRL", seconds, lambda: copied_back(theirs))
    )
    started = time.process_time()
    for _ in train_steps(
        own,
        looked_up(target),
        losses.rloo,
        steps=MOST_STEPS,
        draw=seeded_draw(0),
        batch_size=256,
        lr=LR,
        max_grad_norm=1.0,
    ):
        if after("own", time.process_time() - started, lambda: own):
            break
        started = time.process_time()
    totals = {side: sum(seconds) for side, seconds in spent.items()}
    note = " ÷ ".join(f"{totals[side]:.3g} s in {len(spent[side])} steps" for side in spent)
    return Ratio(
        "CPU seconds to KL(π‖π*) ≤ 0.05, batch 256",
        "TRL 1.16 RLOOTrainer ÷ own",
        "≥ 3",
        totals["TRL"] / totals["own"],
        note,
    )
