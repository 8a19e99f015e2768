"""What must run wherever a model lives: sampling, enumerating, comparing, training, auditing,
checkpoints.

Each program takes a device and returns numbers, the same on every device.
`python -m tests.devices.programs` runs them on the simulated one and prints, as JSON, the numbers
of both sides and what each planted mismatch raised.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from klrl_edu.audit.audit import audit_gradient
from klrl_edu.core.draws import seeded_draw
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.core.tries import PrefixTrie
from klrl_edu.evaluation.compare import compare
from klrl_edu.evaluation.records import load_checkpoint, save_checkpoint
from klrl_edu.exact.posterior import looked_up, posterior
from klrl_edu.learning import losses
from klrl_edu.learning.training import copy_of_prior, train
from klrl_edu.models import contract, transformer
from klrl_edu.models.contract import LanguageModel, enumerate_support, sample, sequence_log_probs
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.restricted import restrict_to_support
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.models.transformer import TransformerModel
from klrl_edu.problems.examples import four_sentences
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import add, count_reward, repeat_reward

SPACE = SequenceSpace(("a", "b", "c"), 3)
Numbers = list[float]


def problem_on(device: torch.device, prompt: Tensor | None = None) -> Problem:
    """A Transformer prior over 3 words, T = 3, with a reward in two parts."""
    prior = TransformerModel(SPACE, width=8, heads=2, layers=1, max_prompt=2, seed=3).to(device)
    return Problem(
        prior,
        add(count_reward("a", SPACE), repeat_reward(SPACE)),
        0.5,
        None if prompt is None else prompt.to(device),
    )


def models_on(device: torch.device) -> list[LanguageModel]:
    """One of each kind."""
    base = four_sentences().prior
    assert isinstance(base, SequenceTable)
    lstm = RecurrentModel(base.space, hidden_size=4, seed=1)
    tables = [
        SequenceTable(base.space, base.tokens, base.logits.detach()),
        PrefixTable.from_model(base, base.tokens),
    ]
    models = [*tables, lstm, TransformerModel(SPACE, width=8, heads=2, layers=2, seed=2)]
    return [*(model.to(device) for model in models), restrict_to_support(lstm, tables[0])]


def sampling(device: torch.device) -> Numbers:
    tokens = [sample(model, 20, draw=seeded_draw(4)) for model in models_on(device)]
    assert all(drawn.device == device for drawn in tokens)
    return [float(value) for drawn in tokens for value in drawn.cpu().flatten()]


def prompted_sampling(device: torch.device) -> Numbers:
    prompts = torch.tensor([[-1, 0], [1, 2]]).to(device)
    return (
        sample(problem_on(device).prior, 8, draw=seeded_draw(5), prompts=prompts)
        .cpu()
        .double()
        .flatten()
        .tolist()
    )


def enumerating(device: torch.device) -> Numbers:
    return [
        float(value)
        for model in models_on(device)
        for value in enumerate_support(model).log_weights.cpu()
    ]


def comparing(device: torch.device) -> Numbers:
    target = posterior(problem_on(device))
    other = TransformerModel(SPACE, width=8, heads=2, layers=1, seed=9).to(device)
    exact, sampled = compare(other, target), compare(other, target, n=16, draw=seeded_draw(2))
    by_prefixes = posterior(problem_on(device), "soft_bellman")
    return [
        value
        for side in (exact, sampled, compare(by_prefixes.model, target))
        for value in side.metrics().values()
        if value is not None
    ]


def training(device: torch.device) -> Numbers:
    numbers = []
    for prompt in (None, torch.tensor([1, 2])):
        problem = problem_on(device, prompt)
        for loss in (losses.rloo, losses.reinforce, losses.exact):
            policy = copy_of_prior(problem)
            sgd = torch.optim.SGD(
                policy.parameters(), lr=0.1
            )  # Adam would divide gradients of rounding size by their own size
            history = train(
                policy,
                problem,
                loss,
                steps=3,
                batch_size=8,
                optimizer=sgd,
                draw=seeded_draw(0),
                target=posterior(problem),
            )
            numbers += [*history["loss"], history["reverse_kl"][-1]]
    return numbers


def training_from_a_table(device: torch.device) -> Numbers:
    problem = four_sentences()
    problem.prior.to(device)
    target = posterior(problem)
    policy = restrict_to_support(
        RecurrentModel(problem.space, hidden_size=4, seed=1).to(device), problem.prior
    )
    sgd = torch.optim.SGD(policy.parameters(), lr=0.1)
    return train(
        policy,
        looked_up(target),
        losses.rloo,
        steps=3,
        batch_size=8,
        optimizer=sgd,
        draw=seeded_draw(0),
        target=target,
    )["loss"]


def auditing(device: torch.device) -> Numbers:
    problem = four_sentences()
    problem.prior.to(device)
    policy = SequenceTable(
        problem.space,
        posterior(problem).enumerated().tokens,
        torch.zeros(4, dtype=torch.float64).to(device),
    )
    report = audit_gradient(losses.rloo, policy, problem, batch_size=2)
    return [float(value) for value in report.mean.cpu()]


def checkpoints(device: torch.device) -> Numbers:
    with tempfile.TemporaryDirectory() as folder:
        saved = models_on(device)[3]
        save_checkpoint(
            Path(folder) / "x.pt",
            {"weights": {name: value.cpu() for name, value in saved.state_dict().items()}},
        )
        loaded = TransformerModel(SPACE, width=8, heads=2, layers=2, seed=77).to(device)
        loaded.load_state_dict(load_checkpoint(Path(folder) / "x.pt")["weights"])
    tokens = SPACE.all_tokens().to(device)
    assert torch.equal(
        sequence_log_probs(loaded, tokens).cpu(), sequence_log_probs(saved, tokens).cpu()
    )
    return sequence_log_probs(loaded, tokens).detach().cpu().tolist()


PROGRAMS: dict[str, Callable[[torch.device], Numbers]] = {
    program.__name__: program
    for program in (
        sampling,
        prompted_sampling,
        enumerating,
        comparing,
        training,
        training_from_a_table,
        auditing,
        checkpoints,
    )
}


def planted() -> dict[str, tuple[Callable[[], object], Callable[[torch.device], Numbers]]]:
    """Mistake -> what patches it in, and the program that must notice."""
    live, uniform = SequenceSpace.live, torch.rand
    additive, ended = transformer._additive, contract.ended_and_last
    find = PrefixTrie.find

    def reward_on_cpu(self: object, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        return torch.zeros(tokens.shape, dtype=torch.float64)

    return {
        "BOS made on the CPU": (
            lambda: mock.patch.object(transformer, "device_of", return_value=torch.device("cpu")),
            sampling,
        ),
        "a walk that starts on the CPU": (
            lambda: mock.patch.object(contract, "device_of", return_value=torch.device("cpu")),
            enumerating,
        ),
        "live tokens on the CPU": (
            lambda: mock.patch.object(
                SequenceSpace, "live", lambda self, tokens: live(self, tokens).cpu()
            ),
            training,
        ),
        "a reward on the CPU": (
            lambda: mock.patch("klrl_edu.problems.rewards.SumReward.__call__", reward_on_cpu),
            training,
        ),
        "an attention mask on the CPU": (
            lambda: mock.patch.object(
                transformer, "_additive", lambda allowed, dtype: additive(allowed.cpu(), dtype)
            ),
            prompted_sampling,
        ),
        "uniforms left on the CPU": (
            lambda: mock.patch(
                "torch.rand",
                lambda *size, generator, dtype: _immovable(
                    uniform(*size, generator=generator, dtype=dtype)
                ),
            ),
            sampling,
        ),
        "a trie that answers on the CPU": (
            lambda: mock.patch.object(
                PrefixTrie,
                "find",
                lambda self, tokens: tuple(part.cpu() for part in find(self, tokens)),
            ),
            training_from_a_table,
        ),
        "ended rows on the CPU": (
            lambda: mock.patch.object(
                contract,
                "ended_and_last",
                lambda space, tokens: tuple(part.cpu() for part in ended(space, tokens)),
            ),
            comparing,
        ),
        "a prior left on the CPU": (
            lambda: mock.patch.object(TransformerModel, "to", lambda self, device: self),
            lambda device: (
                sequence_log_probs(problem_on(device).prior, SPACE.all_tokens().to(device))
                .cpu()
                .tolist()
            ),
        ),
    }


def _immovable(tensor: Tensor) -> Tensor:
    """The same tensor, whose `to` forgets to move it."""
    tensor.to = lambda *args, **kwargs: tensor  # type: ignore[method-assign]
    return tensor


def main() -> None:
    """Both sides of each program, and the planted mistakes, as JSON."""
    from tests.devices.simulated_device import DEVICE, SimulatedDevice

    torch.set_num_threads(1)
    report: dict[str, dict[str, object]] = {"cpu": {}, "simulated": {}, "caught": {}}
    for name, program in PROGRAMS.items():
        report["cpu"][name] = program(torch.device("cpu"))
        with SimulatedDevice():
            try:
                report["simulated"][name] = program(DEVICE)
            except Exception:
                report["simulated"][name] = traceback.format_exc(limit=-8)
    for name, (patch, program) in planted().items():
        with SimulatedDevice(), patch():  # type: ignore[attr-defined]
            try:
                program(DEVICE)
                report["caught"][name] = "nothing was noticed"
            except RuntimeError as error:
                report["caught"][name] = str(error)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
