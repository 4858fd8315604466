"""What surviving costs: the ledger and the records beside a live round and what it brings; memory with many clients."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any, NamedTuple
from unittest import mock

import psutil
from flwr.app import Context, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.start_client_internal import _init_connection

import server.ledger
from client.app import respond
from deploy.local import LocalFederation
from server import loopback

from .rounds import APPS, ours
from .row import Row

CLIENTS, ROUNDS = 4, 8
FEW, MANY = 20, 200  # clients
THREADS = 8  # that play the clients
POLL = 3.0  # seconds between a SuperNode's questions for work
LONGEST = 240.0  # seconds that a round of many may take
TASK = {"kind": "tiny:Tiny", "tensors": 1}  # 4 MB


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
    few, many = crowded(FEW), crowded(MANY)
    detail = f"{many}; {FEW} clients: {few}"
    yield Row(
        f"peak memory of the ServerApp, {MANY} clients over gRPC", f"{FEW}", many.app / few.app, "<= 1.05", detail
    )


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


class Crowd(NamedTuple):
    """What a round took: its seconds, of which those spent waiting for replies, and peaks of resident bytes."""

    seconds: float
    waiting: float
    app: int
    link: int

    def __str__(self) -> str:
        took = f"{self.seconds:.0f} s, of which waiting {self.waiting:.0f}"
        return f"{self.app / 1e6:.0f} MB (SuperLink {self.link / 1e6:.0f}), {took}"


def crowded(clients: int) -> Crowd:
    """The first round of a real SuperLink and ServerApp with so many clients, which this process plays.

    In Flower's simulation the ServerApp is a thread beside Ray's driver and the store of replies; here it is alone.
    """
    large = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # else what malloc keeps is by chance
    with (
        TemporaryDirectory(prefix="fedbasin-bench-", ignore_cleanup_errors=True) as folder,
        LocalFederation(Path(folder), [], environment=large) as federation,
    ):
        runs = federation.folder / "runs"
        config = {"task": json.dumps(TASK), "rounds": 1, "min-clients": clients, "runs-dir": str(runs)}
        run = runs / federation.submit(APPS / "ours", config)
        with _fleet(federation.fleet, clients):
            _wait_for(run / "round-0001.json")
            record = json.loads((run / "round-0001.json").read_text())
            link = psutil.Process(federation.processes["superlink"].pid)
            (app,) = (child for child in link.children(recursive=True) if child.name() == "flwr-serverapp")
            return Crowd(record["seconds"], record["exchanges"][0]["seconds"]["waiting"], _peak(app), _peak(link))


def _wait_for(path: Path) -> None:
    end = time.monotonic() + LONGEST
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"no {path.name} within {LONGEST:g} s")
        time.sleep(0.1)


def _peak(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


@contextmanager
def _fleet(port: int, clients: int) -> Iterator[None]:
    """So many clients of the SuperLink, each of which polls as often as a SuperNode, and answers at once."""
    gone = Event()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(TaskIdentity, _task_id=1, _run_id=1, _node_id=1))
        connection = (_init_connection("grpc-rere", f"127.0.0.1:{port}", insecure=True) for _ in range(clients))
        nodes = [*enumerate(map(stack.enter_context, connection))]
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        turns = [pool.submit(_play, nodes[first::THREADS], gone) for first in range(THREADS)]
        try:
            yield
        finally:
            gone.set()
            for turn in turns:
                turn.result()


def _play(nodes: Sequence[tuple[int, Any]], gone: Event) -> None:
    """Lets these nodes answer, one after the other, until they are to be gone."""
    while not gone.is_set():
        next_poll = time.monotonic() + POLL
        for number, node in nodes:
            if not gone.is_set():
                _answer(number, *node)
        gone.wait(max(0.0, next_poll - time.monotonic()))


def _answer(number: int, node_id: int, receive: Any, send: Any, *calls: Any) -> None:
    """One question for work, and the reply to what comes: what a SuperNode and its ClientApp do."""
    if (work := receive()) is None:
        return
    (head, tree), (_, _, pull, push, confirm) = work, calls
    run = head.metadata.run_id
    asked = pull_and_inflate_object_from_tree(
        tree, lambda id: pull(run, id), lambda id: confirm(run, id), return_type=Message
    )
    asked.metadata.__dict__["_message_id"] = tree.object_id
    context = Context(run, node_id, {"partition-id": number}, RecordDict(), {})
    reply = Message(respond(asked.content, context), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    missing, session = send(reply, get_object_tree(reply), 0.0)
    for id, part in get_all_nested_objects(reply).items():
        if id in missing:
            push(run, session, id, part.deflate())
