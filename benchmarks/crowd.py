"""Memory of a ServerApp with many clients, and what limits their number."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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

from client.app import respond
from deploy.local import LocalFederation

from .rounds import APPS, TASK
from .row import Row

FEW, MANY = 20, 200  # clients
THREADS = 8  # that play the clients
POLL = 3.0  # seconds between a SuperNode's questions for work
LONGEST = 240.0  # seconds that a round may take


def rows() -> Iterator[Row]:
    """Whether the memory of the ServerApp is flat in the number of clients."""
    few, many = crowded(FEW), crowded(MANY)
    work, detail = f"peak memory of the ServerApp, {MANY} clients of 4 MB over gRPC", f"{many}; {FEW} clients: {few}"
    yield Row(work, f"{FEW} clients", many.app / few.app, "<= 1.05", detail)


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
