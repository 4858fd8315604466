"""How a run stops when it is told to: its round is parked, the replies to it kept, and nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Parked(BaseException):
    """The run stops here, told so by a signal; all that was finished or admitted is in its ledger."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@dataclass(eq=False)
class Parking:
    """Whether a run was told to stop; it does so where it waits, so that a reply in hand is kept, a merge finished."""

    told: int = 0  # the signal that came last
    _waiting: bool = False
    _before: dict[int, Any] = field(default_factory=dict)  # what each signal did

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within it SIGTERM and SIGINT park the run, and a second one does at once what it did before.

        Signals reach the main thread alone: in another they are left as they are, and so is one that is ignored, as
        SIGINT is in what a shell has put into the background.
        """
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._tell) or signal.SIG_DFL for number in heard}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it Parked is raised as soon as a signal comes, or at once where one has come before."""
        self._waiting = True
        try:
            if self.told:
                raise Parked(self.told)
            yield
        finally:
            self._waiting = False

    def _tell(self, number: int, frame: FrameType | None) -> None:
        if self.told:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self.told = number
        if self._waiting:
            raise Parked(number)
