"""Transports, grids and clients in memory: what the server's tests put in place of a network."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias
from unittest import mock

import torch
import toys
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console
from torch import Tensor, nn

from aggregators.core.base import Aggregator
from aggregators.core.exchange import Exchange, Round, collect
from aggregators.core.update import ClientUpdate, GlobalModel, Merged
from client import wire
from client.task import Examples, Node, Task
from server.grid import Content, Reply, Terms
from server.ledger import Ledger
from server.settings import Settings
from server.strategy import MergeStrategy
from server.telemetry import Telemetry

Client: TypeAlias = Callable[[RecordDict], RecordDict]  # a message's content -> the reply's
Change: TypeAlias = Callable[[ClientUpdate], ClientUpdate]


class Crash(Exception):
    """The server's process dies."""


class Silence(Exception):
    """The client does not answer before the deadline."""


def answering(client: toys.Client, change: Change = lambda update: update) -> Client:
    """The toy client behind the wire; `change` is what goes wrong with its updates."""

    def answer(content: RecordDict) -> RecordDict:
        asked, received = wire.decode(content)
        anchor = wire.anchor(content)
        exchange = Exchange(task=asked.exchange, params=received, anchor=anchor, request=asked.request, fold=collect)
        return wire.encode(change(client.reply(exchange)))

    return answer


def population(model: GlobalModel, num: int, seed: int = 3) -> list[toys.Client]:
    """Clients 1 to `num` around θ_t."""
    generator = torch.Generator().manual_seed(seed)
    return [
        toys.Client(
            client_id=number,
            name=f"site-{number}",
            num_examples=3 + 2 * number,
            params=toys.away(model.params, generator, 0.1),
            trainable=model.trainable,
        )
        for number in range(1, num + 1)
    ]


MODEL = toys.global_model()
COHORT = population(MODEL, 4)
FISHER = '{"kind": "fisher"}'
TWO = '{"kind": "toys:TwoExchanges", "inner": {"kind": "fedavgm", "inner": "fedavg"}}'
NAN = float("nan")


def spoilt(field: str, value: float) -> Change:
    """What puts `value` into one tensor of an update."""

    def change(update: ClientUpdate) -> ClientUpdate:
        tensors = dict(getattr(update, field))
        tensors["first.weight"] = torch.full_like(tensors["first.weight"], value)
        changes: dict[str, Any] = {field: tensors}
        return replace(update, **changes)

    return change


@dataclass(eq=False)
class Hall:
    """Clients as plain functions, asked one after the other in the order in which they stand, as a Transport.

    It crashes when it is asked for one reply more than `crash_after`. `asked` tells what was asked of whom.
    """

    clients: Mapping[int, Client]
    crash_after: int | None = None
    asked: list[tuple[str, list[int]]] = field(default_factory=list)
    sent: list[RecordDict] = field(default_factory=list)
    given: int = 0

    def nodes(self) -> list[int]:
        return sorted(self.clients)

    def ask(self, kind: str, content: Content, cohort: Sequence[int], terms: Terms) -> Iterator[Reply]:
        self.asked.append((kind, list(cohort)))
        for client_id in (client_id for client_id in self.clients if client_id in cohort):
            if self.given == self.crash_after:
                raise Crash
            self.given += 1
            yield self._reply(client_id, content(client_id))

    def _reply(self, client_id: int, content: RecordDict) -> Reply:
        self.sent.append(content)
        try:
            return Reply(client_id, self.clients[client_id](content))
        except Silence:
            return Reply(client_id, None, "late: no reply within 1 s")
        except ValueError as error:
            return Reply(client_id, None, f"error 2: {error}")


def hall(clients: Iterable[toys.Client], changes: Mapping[int, Change] | None = None, **kwargs: Any) -> Hall:
    """A Hall of toy clients, in their order; `changes` says what goes wrong at whom."""
    changes = changes or {}
    return Hall({c.client_id: answering(c, changes.get(c.client_id, lambda update: update)) for c in clients}, **kwargs)


def strategy(aggregator: Any, transport: Any, folder: Path, **settings: Any) -> MergeStrategy:
    """A MergeStrategy that writes its lines into a string: see `said`."""
    chosen = Settings(aggregator=aggregator, **{"min_clients": 1, "evaluate": False, **settings})
    ledger = Ledger(folder, chosen.checkpoints, chosen.keep_replies)
    return MergeStrategy(chosen.aggregator, transport, chosen, ledger, Telemetry(Console(file=StringIO(), width=120)))


def rounds(folder: Path, transport: Any, aggregator: Any = "fedavg", **settings: Any) -> GlobalModel:
    """The model after a run from θ_0."""
    return strategy(aggregator, transport, folder, **settings).run(MODEL)[0]


def said(of: MergeStrategy | Telemetry) -> str:
    """What was printed."""
    file = (of if isinstance(of, Telemetry) else of.telemetry).console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def records(folder: Path) -> list[dict[str, Any]]:
    """The rounds' records, as strict JSON: NaN and infinity are none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(path.read_text(), parse_constant=refuse) for path in sorted(folder.glob("round-*.json"))]


def left_out(record: Mapping[str, Any]) -> dict[str, str]:
    """Who was left out of a round, and why."""
    return {out["client"]: out["reason"] for exchange in record["exchanges"] for out in exchange["left_out"]}


@contextmanager
def flower_process() -> Iterator[None]:
    """Within it, Flower's messages can be built, as in a ServerApp's process."""
    with (
        mock.patch.object(TaskIdentity, "_task_id", 1),
        mock.patch.object(TaskIdentity, "_run_id", 1),
        mock.patch.object(TaskIdentity, "_node_id", 1),
    ):
        yield


Outcome: TypeAlias = "tuple[float, RecordDict | Error] | None"  # seconds after the push, and what; None: nothing ever


@dataclass(eq=False)
class FakeGrid(Grid):
    """Flower's grid in memory, on a clock that moves only when someone sleeps.

    `plans` holds each node's outcomes, one per push; `presence` the spans in which a node is connected: it was
    activated at the start of each. `refused` says how the grid tells of a message that it could not store: by leaving
    its id out (InMemoryGrid), by an empty id (HttpGrid), or by returning nothing (HttpGrid: payload too large).
    """

    plans: dict[int, list[Outcome]]
    presence: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    unsendable: dict[int, int] = field(default_factory=dict)  # how many messages to a node are refused
    refused: str = "omitted"
    now: float = 0.0
    sleeps: list[float] = field(default_factory=list)
    pushed: list[tuple[float, int]] = field(default_factory=list)
    messages: dict[str, tuple[float, Message, Outcome]] = field(default_factory=dict)
    pulls: int = 0
    most_alive: int = 0
    alive: list[weakref.ref[Message]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    def get_node_ids(self) -> list[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(node_id=node, last_activated_at=str(start))
            for node in self.plans
            for start, end in self.presence.get(node, [(0.0, float("inf"))])
            if start <= self.now < end
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = [self._push(message) for message in messages]
        if self.refused == "nothing" and "" in ids:
            return []
        if self.refused == "raised" and "" in ids:
            raise ConnectionError("the push session\nhas expired")
        return [id for id in ids if id or self.refused == "blank"]

    def _push(self, message: Message) -> str:
        id, node = f"message-{len(self.pushed)}", message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = id
        self.pushed.append((self.now, node))
        if self.unsendable.get(node):
            self.unsendable[node] -= 1
            return ""
        plan = self.plans[node]
        self.messages[id] = (self.now, message, plan.pop(0) if plan else None)
        return id

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.alive))
        return [reply for id in message_ids for reply in self._pull(id)]

    def _pull(self, id: str) -> list[Message]:
        pushed, message, outcome = self.messages[id]
        if outcome is None or self.now < pushed + outcome[0]:
            return []
        del self.messages[id]
        reply = Message(outcome[1], reply_to=message)
        self.alive.append(weakref.ref(reply))
        return [reply]

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


class Regression(Task):
    """A task without labels, and without data on the server."""

    def model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def data(self, node: Node) -> tuple[Examples, Examples]:
        raise AssertionError("a client was woken")


class Probing(Aggregator):
    """A method that scores models on the server's own data."""

    kind: Literal["server_toys:Probing"] = "server_toys:Probing"
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def round(self, model: GlobalModel) -> Round:
        raise AssertionError("a round was begun")
        yield


def received(transport: Hall) -> list[bool]:
    """Of each message that was sent, whether it held params."""
    return [wire.decode(content)[1] is not None for content in transport.sent]


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """The largest distance between float32 tensors, in units of the last place."""
    ranks = [bits.where(bits >= 0, -(2**31) - bits) for bits in (t.view(torch.int32).long() for t in (a, b))]
    return int((ranks[0] - ranks[1]).abs().max()) if a.numel() else 0


class Own(Aggregator):
    """Trains, and then measures each client's own model."""

    kind: Literal["own"] = "own"

    def round(self, model: GlobalModel) -> Round:
        updates = yield from Exchange(task="train", params=model.params, fold=collect)
        trained = {update.client_id: update.params for update in updates}
        yield from Exchange(task="measure", params=trained.__getitem__, fold=collect)
        return Merged(model.params)
