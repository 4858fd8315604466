"""One line of the benchmark table, and how times are taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """What was measured, beside what, their ratio, and the ratio that is asked for (">=" or "<=" and a number)."""

    work: str
    beside: str
    ratio: float
    asked: str
    detail: str = ""

    @property
    def met(self) -> bool:
        """Whether the ratio is what is asked for; a row that asks nothing is met."""
        if not self.asked:
            return True
        sign, _, bound = self.asked.partition(" ")
        return self.ratio >= float(bound) if sign == ">=" else self.ratio <= float(bound)


def interleaved(*works: Callable[[], object], repeats: int = 5) -> list[float]:
    """The least seconds of each work over `repeats` turns; they take turns, so that noise hits all alike."""
    best = [float("inf")] * len(works)
    for _ in range(repeats):
        for number, work in enumerate(works):
            start = time.perf_counter()
            work()
            best[number] = min(best[number], time.perf_counter() - start)
    return best
