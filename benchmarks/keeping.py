"""What keeping costs: the ledger and the records, beside a live round and the bytes that it brings."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import server.ledger
from deploy.local import LocalFederation
from server import loopback

from .rounds import APPS, TASK, ours
from .row import Row

CLIENTS, ROUNDS = 4, 8


def rows() -> Iterator[Row]:
    """Seconds and bytes of the ledger in a round."""
    spent, live = kept(), _live()
    work = f"ledger and record, a round of {CLIENTS} clients, 4 MB"
    detail = f"{spent.seconds / ROUNDS:.2f} s of {live:.1f} s"
    yield Row(work, "the same round over gRPC", spent.seconds / ROUNDS / live, "<= 0.05", detail)
    detail = (
        f"{spent.bytes / ROUNDS / 1e6:.1f} MB of {spent.admitted / ROUNDS / 1e6:.1f} MB, the new checkpoint included"
    )
    yield Row(f"{work}, written", "bytes admitted", spent.bytes / spent.admitted, "<= 1.5", detail)


@dataclass
class Spent:
    """What the ledger took in all rounds, and the bytes of the replies that were admitted."""

    seconds: float = 0.0
    bytes: int = 0
    admitted: int = 0

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, whose seconds are added."""

        def watched(*args: Any) -> None:
            start = time.perf_counter()
            work(*args)
            self.seconds += time.perf_counter() - start

        return watched

    def counted(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """`write`, whose bytes are added."""

        def watched(path: Path, data: bytes) -> None:
            self.bytes += len(data)
            write(path, data)

        return watched


def kept() -> Spent:
    """What the ledger takes in a federation in this process: to begin a round, keep its replies, and save it."""
    spent, ledger = Spent(), server.ledger.Ledger
    with ExitStack() as watched:
        watched.enter_context(mock.patch.object(server.ledger, "_write", spent.counted(server.ledger._write)))
        for name in ("begin", "keep", "save"):
            watched.enter_context(mock.patch.object(ledger, name, spent.timed(getattr(ledger, name))))
        run = federation(CLIENTS, ROUNDS)
    spent.admitted = sum(exchange["bytes_in"] for record in run.records for exchange in record["exchanges"])
    return spent


def federation(clients: int, rounds: int) -> loopback.Run:
    """A run of so many clients in this process."""
    if (app := str(APPS / "ours")) not in sys.path:
        sys.path.append(app)
    with redirect_stdout(io.StringIO()):
        return loopback.run(TASK, clients=clients, rounds=rounds, evaluate=False)


def _live() -> float:
    """Seconds of a round of as many SuperNodes over gRPC."""
    nodes = [{"partition-id": number} for number in range(CLIENTS)]
    with (
        TemporaryDirectory(prefix="fedbasin-bench-", ignore_cleanup_errors=True) as folder,
        LocalFederation(Path(folder), nodes) as federation,
    ):
        return ours(federation, CLIENTS, tensors=1)
