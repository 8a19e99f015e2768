"""pytest's side of the laboratory: the run's seed, and the ledger of false alarms printed at the
end.

    pytest --klrl-false-alarm 1e-6      the run fails if its statistical assertions could be wrong
    more often, together
    pytest --klrl-seed=random           another seed, printed so that it can be given again

Standard library and pytest only: torch is imported by the tests that need it. The entry point has
this module's own name, so that `-p klrl_edu.pytest_plugin` and `pytest_plugins` mean the same
plugin, whether the package is installed or not.
"""

import argparse
import dataclasses
import secrets
from typing import Any

import pytest

from klrl_edu.testing import ledger

_SEED = "klrl_edu_seed"  # what xdist's controller hands to a worker
_LEDGER = "klrl_edu_ledger"  # what it gets back


def pytest_addoption(parser: pytest.Parser) -> None:
    """--klrl-false-alarm and --klrl-seed."""
    group = parser.getgroup("klrl_edu", "statistical assertions")
    group.addoption(
        "--klrl-false-alarm",
        type=_probability,
        metavar="P",
        help="fail the run if the false-alarm probabilities of its assertions sum above P",
    )
    group.addoption(
        "--klrl-seed",
        type=_seed,
        default=0,
        metavar="SEED",
        help="what statistical assertions draw from: a whole number, or random",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Opens the ledger of this process; an xdist worker has its controller's seed."""
    of_controller = getattr(config, "workerinput", {})
    ledger.run = ledger.Ledger(of_controller.get(_SEED, config.getoption("klrl_seed")))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In xdist's controller: a worker reads the command line anew and would choose another random
    seed.
    """
    node.workerinput[_SEED] = ledger.run.seed


def pytest_report_header() -> str:
    """The seed, and how to have it again."""
    return f"klrl_edu: statistical assertions draw from --klrl-seed={ledger.run.seed}"


@pytest.fixture(scope="session")
def klrl_seed() -> int:
    """The seed of the run."""
    return ledger.run.seed


@pytest.fixture
def klrl_draw(klrl_seed: int) -> Any:
    """A `Draw` from the seed of the run, new in every test."""
    from klrl_edu.core.draws import seeded_draw

    return seeded_draw(klrl_seed)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """In xdist's controller: adds what a worker wrote down."""
    rows = getattr(node, "workeroutput", {}).get(_LEDGER, [])  # none where it crashed
    ledger.run.entries.extend(ledger.LedgerEntry(*row) for row in rows)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its ledger over; the controller, or a run without workers, fails above the
    bar.
    """
    if hasattr(session.config, "workeroutput"):
        # xdist carries plain tuples between processes, and no classes of ours
        rows = [dataclasses.astuple(entry) for entry in ledger.run.entries]
        session.config.workeroutput[_LEDGER] = rows
    elif _excess(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the ledger, if anything was written."""
    if not ledger.run.entries:
        return
    terminalreporter.section("klrl_edu: statistical assertions")
    for line in ledger.run.summary():
        terminalreporter.line(line)
    terminalreporter.line(f"they draw from --klrl-seed={ledger.run.seed}")
    if excess := _excess(config):
        terminalreporter.line(excess, red=True)


def _excess(config: pytest.Config) -> str:
    """By how much the run is above its bar, in words; "" where it is not."""
    bar, total = config.getoption("klrl_false_alarm"), ledger.run.false_alarm
    if bar is None or total <= bar:
        return ""
    return (
        f"FAILED: the run may raise a false alarm with probability {total:.3g}, which is"
        f" {total - bar:.3g} above --klrl-false-alarm {bar:g}; give the assertions at the top of"
        " the list a smaller false_alarm=, or raise the bar."
    )


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text} is not a probability; give a number from 0 to 1, such as 1e-6"
        )
    return value


def _seed(text: str) -> int:
    """A whole number from 0 to 2^63 − 1; "random" chooses one that is short enough to type
    again.
    """
    if text == "random":
        return secrets.randbelow(10**9)
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(
            f"{text} is not a seed; give a whole number from 0 to 2^63 - 1, or random"
        )
    return int(text)
