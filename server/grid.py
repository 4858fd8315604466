"""Replies one at a time, as they come, over Flower's grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from .telemetry import one_line

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 0.3  # seconds between sweeps over the pending replies
ROLL_CALL = 3.0  # seconds between looks at who is connected
ATTEMPTS = 3  # times one client's task is sent, at most
AWAY = 120.0  # seconds that a lost client is waited for where enough have answered: a SuperNode with a key needs 67
PATIENCE = 10.0  # seconds that a reply may take to be pulled before the others no longer wait for it
PULLS = 16  # replies that are pulled at once, at most
LOST = {3: "its message was lost", 4: "its reply was lost", 5: "it is gone", 8: "its process died"}  # Flower's codes
MESSAGE_TYPES = {"train": "train", "measure": "query", "evaluate": "evaluate"}

Content = Callable[[int], RecordDict]


class Reply(NamedTuple):
    """What came back from one client: content, or the reason why there is none."""

    client_id: int
    content: RecordDict | None
    error: str = ""


class Terms(NamedTuple):
    """What an exchange keeps to: its seconds, whether the replies so far are enough, and who may be asked.

    A newcomer is asked in place of a client that is gone.
    """

    deadline: float
    enough: Callable[[], bool] = lambda: False
    newcomers: bool = True


class Transport(Protocol):
    """What carries exchanges to clients: Flower's grid, or a loopback in this process."""

    def nodes(self) -> list[int]:
        """The ids of the clients that are connected, sorted."""

    def ask(self, kind: str, content: Content, cohort: Sequence[int], terms: Terms) -> Iterator[Reply]:
        """One reply per client of the cohort, in order of arrival, until the deadline of the terms has passed."""


@dataclass(eq=False)
class _Asked:
    """One exchange under way: which message waits for which client, and whose task was lost."""

    terms: Terms
    end: float  # when the deadline passes
    activated: Mapping[int, str]
    pending: dict[str, int] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)  # when each of the lost was
    attempts: dict[int, int] = field(default_factory=dict)

    def waits(self, now: float) -> bool:
        """Whether a reply may still come: before the deadline, from who has not answered, or will be asked again."""
        return now < self.end and (bool(self.pending) or any(self._hopes(client, now) for client in self.lost))

    def _hopes(self, client: int, now: float) -> bool:
        """Whether a lost client may still be asked: not too often, nor for long where enough have answered."""
        given_up = now > self.since[client] + AWAY and self.terms.enough()
        return self.attempts[client] < ATTEMPTS and not given_up

    def lose(self, client_id: int, reason: str, now: float) -> None:
        """The client's task is lost, unless it has been sent again already."""
        if client_id not in self.pending.values():
            self.lost[client_id], self.since[client_id] = reason, now

    def drop(self, client_id: int) -> None:
        """Nothing more is expected of this client."""
        self.lost.pop(client_id, None)
        self.pending = {id: client for id, client in self.pending.items() if client != client_id}


@dataclass(eq=False)
class _Pulls:
    """Pulls, of which one that takes long goes on beside the next: Flower waits for a reply that is still uploaded.

    Where its SuperNode has died meanwhile, that is for 180 s.
    """

    grid: Grid
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(PULLS, "pull"))
    running: dict[str, Future[list[Message]]] = field(default_factory=dict)

    def pull(self, message_id: str) -> list[Message]:
        """The reply to the message; none where it is not there yet."""
        if message_id not in self.running:
            if len(self.running) == PULLS:
                return []
            self.running[message_id] = self.threads.submit(lambda: list(self.grid.pull_messages([message_id])))
            wait([self.running[message_id]], PATIENCE)
        return self.running.pop(message_id).result() if self.running[message_id].done() else []

    def keep(self, pending: Collection[str]) -> None:
        """Forgets what was pulled of messages that are no longer pending."""
        self.running = {id: future for id, future in self.running.items() if id in pending or not future.done()}

    def close(self) -> None:
        """What is not there yet is not waited for."""
        self.threads.shutdown(wait=False, cancel_futures=True)


@dataclass(eq=False)
class StreamingGrid:
    """Flower's grid as a Transport: pushes once, then pulls each reply when it is there, and forgets it.

    Flower delivers at most once. A task whose node died, or restarted between two polls, is sent again, to the same
    node if it is back, else to one that has newly connected (without authentication a restarted node is a new one),
    where newcomers may be asked.
    """

    grid: Grid
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def nodes(self) -> list[int]:
        """The ids of the nodes that are connected, sorted."""
        return sorted(self.grid.get_node_ids())

    def ask(self, kind: str, content: Content, cohort: Sequence[int], terms: Terms) -> Iterator[Reply]:
        """One reply per client of the cohort, in order of arrival; after the deadline the rest are late."""
        asked, pulls = _Asked(terms, self.clock() + terms.deadline, self._online()), _Pulls(self.grid)
        try:
            self._push(asked, kind, content, cohort)
            yield from self._answers(asked, pulls, kind, content)
        finally:
            pulls.close()
        yield from _late(asked)

    def _answers(self, asked: _Asked, pulls: _Pulls, kind: str, content: Content) -> Iterator[Reply]:
        pause, roll_call = FIRST_PAUSE, self.clock() + ROLL_CALL
        while asked.waits(self.clock()):
            before = len(asked.pending)
            yield from self._sweep(asked, pulls)
            pause = FIRST_PAUSE if len(asked.pending) < before else min(1.5 * pause, LONGEST_PAUSE)
            if self.clock() >= roll_call:
                again, replaced = self._returned(asked)
                self._push(asked, kind, content, again)
                yield from replaced
                roll_call = self.clock() + ROLL_CALL
            if asked.waits(self.clock()):
                self.sleep(max(0.0, min(pause, asked.end - self.clock())))

    def _push(self, asked: _Asked, kind: str, content: Content, cohort: Iterable[int]) -> None:
        """Sends each client its task; what the grid does not name afterwards, it could not send."""
        clients = [client for client in cohort if asked.attempts.get(client, 0) < ATTEMPTS]
        if not clients or (ttl := asked.end - self.clock()) <= 0:
            return
        messages = [Message(content(client), client, MESSAGE_TYPES[kind], ttl=ttl, group_id=kind) for client in clients]
        sent, reason = self._pushed(messages)
        for client, message in zip(clients, messages, strict=True):
            asked.attempts[client] = asked.attempts.get(client, 0) + 1
            if message.metadata.message_id in sent:
                asked.pending[message.metadata.message_id] = client
            else:
                asked.lose(client, reason, self.clock())

    def _pushed(self, messages: Sequence[Message]) -> tuple[set[str], str]:
        """The ids of the messages that were sent, and why others were not."""
        try:
            return set(self.grid.push_messages(messages)), "its message could not be sent"
        except Exception as error:  # whatever Flower raises where a SuperLink dies meanwhile
            return set(), one_line(f"its message could not be sent: {type(error).__name__}: {error}")

    def _sweep(self, asked: _Asked, pulls: _Pulls) -> Iterator[Reply]:
        """Pulls the pending messages one by one, so that few replies are held; none that has expired."""
        pulls.keep(asked.pending)
        for message_id in list(asked.pending):
            if message_id not in asked.pending or self.clock() >= asked.end:
                continue
            for message in pulls.pull(message_id):
                client = asked.pending.pop(message_id)
                if message.has_error() and message.error.code in LOST:
                    asked.lose(client, LOST[message.error.code], self.clock())
                    continue
                asked.drop(client)
                reply = _reply(client, message)
                del message
                yield reply
                del reply

    def _online(self) -> dict[int, str]:
        return {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}

    def _returned(self, asked: _Asked) -> tuple[list[int], list[Reply]]:
        """Who is to be asked again: lost clients that are back, clients that restarted, newcomers for the rest."""
        online, known = self._online(), asked.attempts
        restarted = [
            client
            for client in set(asked.pending.values())
            if client in online and online[client] != asked.activated.get(client)
        ]
        back = [client for client in asked.lost if client in online and known[client] < ATTEMPTS]
        gone = [client for client in asked.lost if client not in online]
        newcomers = [client for client in sorted(online) if client not in asked.activated and client not in known]
        replaced = dict(zip(gone, newcomers, strict=False)) if asked.terms.newcomers else {}
        again = [*restarted, *back, *replaced.values()]
        asked.activated = {**asked.activated, **{client: online[client] for client in again}}
        replies = [Reply(old, None, f"{asked.lost[old]}: {new} is asked in its place") for old, new in replaced.items()]
        for client in [*back, *replaced]:
            del asked.lost[client]
        return again, replies


def _reply(client: int, message: Message) -> Reply:
    if message.has_error():
        reason = one_line(message.error.reason or "") or "no reason given"
        return Reply(client, None, f"error {message.error.code}: {reason}")
    return Reply(client, message.content)


def _late(asked: _Asked) -> Iterator[Reply]:
    deadline = f"{asked.terms.deadline:g} s"
    for client in dict.fromkeys(asked.pending.values()):
        yield Reply(client, None, f"late: no reply within {deadline}")
    for client, reason in asked.lost.items():
        attempt = f"attempt {asked.attempts[client]} of {ATTEMPTS}"
        yield Reply(client, None, f"lost: {reason} ({attempt}, deadline {deadline})")
