"""Ratios of CPU time: both sides in one process, rounds interleaved, one thread, medians."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

ROUNDS = 9


@dataclass(frozen=True)
class Ratio:
    """One row of the table.

    Attributes:
        measured, against: what is divided, in words.
        bar: what to reach, e.g. "≥ 40".
        value: the median over rounds of (seconds of one side)/(seconds of the other); None where it
            could not be measured.
        note: the seconds of both sides, or why there is no value.
    """

    measured: str
    against: str
    bar: str
    value: float | None
    note: str

    @property
    def reached(self) -> bool | None:
        """Whether the bar is met; None without a value or a bar."""
        if self.value is None or self.bar == "–":
            return None
        sign, number = self.bar.split()
        return self.value >= float(number) if sign == "≥" else self.value <= float(number)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def ratio(
    measured: str,
    against: str,
    bar: str,
    over: Callable[[], object],
    under: Callable[[], object],
    *,
    scale: float = 1.0,
) -> Ratio:
    """scale · time(over) ÷ time(under): the median of ROUNDS interleaved pairs after one warm-up of
    each.
    """
    over(), under()
    pairs = [(scale * cpu_seconds(over), cpu_seconds(under)) for _ in range(ROUNDS)]
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    note = f"{1e3 * medians[0]:.4g} ms ÷ {1e3 * medians[1]:.4g} ms"
    return Ratio(measured, against, bar, statistics.median(a / b for a, b in pairs), note)
