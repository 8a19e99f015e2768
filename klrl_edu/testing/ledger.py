"""The ledger of a test run: what each statistical assertion may get wrong, and the union bound over
all of them.

    P(a correct library fails the run) ≤ Σ_k δ_k                                                 (1)

(1) needs no independence, so assertions may share a seed. Standard library only: the pytest plugin
reads it without torch. Boucheron, Lugosi and Massart (2013), section 1.2, for the union bound.
"""

import math
import os
import sys
from dataclasses import dataclass, field

from klrl_edu.core.errors import InputError


@dataclass(frozen=True)
class LedgerEntry:
    """One statistical assertion, written down before it looks at its data.

    Attributes:
        assertion: its name.
        false_alarm: δ, a bound on the probability that it fails although everything is right.
        detectable: the smallest bias that it finds with probability 1 − 1e-6, in `unit`.
        unit: of the bias, in words.
        test: the test that made it; "" outside pytest.
    """

    assertion: str
    false_alarm: float
    detectable: float
    unit: str
    test: str = ""


@dataclass
class Ledger:
    """All statistical assertions of one run, and the seed that they draw from."""

    seed: int = 0
    entries: list[LedgerEntry] = field(default_factory=list)

    @property
    def false_alarm(self) -> float:
        """Σ δ (1), an upper bound on the probability that a correct library fails the run; at most
        1.
        """
        # the union bound may exceed 1, and then says nothing
        return min(1.0, math.fsum(entry.false_alarm for entry in self.entries))

    def record(self, assertion: str, *, false_alarm: float, detectable: float, unit: str) -> None:
        """Writes an assertion down, with the test that runs (pytest keeps its name in
        PYTEST_CURRENT_TEST).

        Raises:
            InputError: `false_alarm` is no probability, or `detectable` no finite bias.
        """
        # one NaN would make the sum of the whole run NaN, and no bar would ever be above it
        _check_number(false_alarm, "false_alarm", most=1.0)
        _check_number(detectable, "detectable", most=sys.float_info.max)
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        self.entries.append(LedgerEntry(assertion, false_alarm, detectable, unit, test))

    def summary(self, most: int = 10) -> list[str]:
        """Lines of text: the count and (1), then the `most` assertions of the largest false-alarm
        probability.
        """
        ranked = sorted(self.entries, key=lambda entry: -entry.false_alarm)
        lines = [
            f"{len(ranked)} in all; a correct library fails one of them with probability at most"
            f" {self.false_alarm:.3g} (union bound)"
        ]
        lines += [
            f"{entry.false_alarm:9.2e}  finds {entry.detectable:8.2e} {entry.unit} "
            f" {entry.assertion}  {entry.test}"
            for entry in ranked[:most]
        ]
        if ranked[most:]:
            lines.append(
                f"{math.fsum(entry.false_alarm for entry in ranked[most:]):9.2e}  in"
                f" {len(ranked) - most} more"
            )
        return lines


def _check_number(value: float, name: str, most: float) -> None:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_real or not 0 <= value <= most:
        raise InputError(f"{name} = {value!r} must be a number from 0 to {most:g}.")


run = Ledger()
"""The ledger of this process. The pytest plugin puts a new one here, with the run's seed."""
