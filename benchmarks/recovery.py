"""What surviving costs: the ledger and the records beside a live round and what it brings; memory with many clients."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import server.ledger
from deploy.local import LocalFederation
from server import loopback

from .memory import resident
from .rounds import APPS, ours
from .row import Row

CLIENTS, ROUNDS = 4, 8
FEW, MANY = 20, 200  # clients
TASK = {"kind": "tiny:Tiny", "tensors": 1}  # 4 MB
MODEL_BYTES = 4 * 1_000_650


def rows() -> Iterator[Row]:
    """Seconds and bytes of the ledger in a round, and whether memory is flat in the number of clients."""
    spent, live = kept(), _live()
    work = f"ledger and record, a round of {CLIENTS} clients, 4 MB"
    detail = f"{spent.seconds / ROUNDS:.2f} s of {live:.1f} s"
    yield Row(work, "the same round over gRPC", spent.seconds / ROUNDS / live, "<= 0.05", detail)
    detail = (
        f"{spent.bytes / ROUNDS / 1e6:.1f} MB of {spent.admitted / ROUNDS / 1e6:.1f} MB, the new checkpoint included"
    )
    yield Row(f"{work}, written", "bytes admitted", spent.bytes / spent.admitted, "<= 1.5", detail)
    few, many = _measured(FEW), _measured(MANY)
    detail = f"{many:.1f} and {few:.1f} models of 4 MB above baseline"
    yield Row(f"peak memory, {MANY} clients in one process", f"{FEW} clients", many / few, "<= 1.05", detail)


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
    return loopback.run(TASK, clients=clients, rounds=rounds, evaluate=False)


def _live() -> float:
    """Seconds of a round of as many SuperNodes over gRPC."""
    nodes = [{"partition-id": number} for number in range(CLIENTS)]
    with (
        TemporaryDirectory(prefix="fedbasin-bench-", ignore_cleanup_errors=True) as folder,
        LocalFederation(Path(folder), nodes) as federation,
    ):
        return ours(federation, CLIENTS, tensors=1)


def _measured(clients: int) -> float:
    command = [sys.executable, "-m", "benchmarks.recovery", str(clients)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # else what malloc keeps is by chance
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def peak(clients: int) -> float:
    """Peak resident memory above baseline, in models, of a round of so many clients in this process."""
    federation(2, 1)  # loads what code a round needs
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    federation(clients, 1)
    return (resident("VmHWM") - before) / MODEL_BYTES


if __name__ == "__main__":
    print(peak(int(sys.argv[1])))
