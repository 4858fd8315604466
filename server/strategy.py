"""Performs an aggregation method's rounds over a transport."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from flwr.app import RecordDict

from aggregators.core.base import Aggregator
from aggregators.core.exchange import Exchange, LostRound, collect, run
from aggregators.core.seed import derive_seed
from aggregators.core.tensors import like
from aggregators.core.update import ClientUpdate, GlobalModel, Merged, Tensors

from .admission import Rejected, Widths, admit, all_finite, resized
from .grid import Reply, Terms, Transport
from .ledger import Ledger, Unwritable
from .parking import Parking
from .settings import Settings
from .telemetry import ExchangeRecord, RoundRecord, Telemetry, evaluation, finite, one_line
from .wire import Malformed, decode, encode, forget, nbytes

WAIT = 0.5  # seconds between looks at who is connected, before a round begins


@dataclass(eq=False)
class MergeStrategy:
    """Federated rounds of `aggregator`: asks the cohort, admits replies, merges, checkpoints.

    A bad reply is left out and named; a round below quorum leaves θ_t standing; neither ends the run. `widths` bounds
    those of a client that starts from its own model; None where it is to have θ_t's. Told to stop by `parking`, it does
    so where it waits for clients.
    """

    aggregator: Aggregator
    transport: Transport
    settings: Settings
    ledger: Ledger
    telemetry: Telemetry
    widths: Widths | None = None
    parking: Parking = field(default_factory=Parking)
    _record: RoundRecord = field(init=False)
    _online: list[int] = field(init=False, default_factory=list)  # when the round began
    _cohort: list[int] = field(init=False, default_factory=list)
    _keeping: bool = field(init=False, default=True)  # until a reply of the round could not be kept
    _shapes: dict[int, Tensors] = field(init=False, default_factory=dict)
    _merged: bool = field(init=False, default=False)  # whether any round has

    def run(self, model: GlobalModel) -> tuple[GlobalModel, dict[str, float | None]]:
        """The model after the last round, and its evaluation by the clients (empty when nobody evaluated it)."""
        past = [record for record in self.ledger.records() if record["round"] <= model.round]
        self._merged = any(record["status"] == "merged" for record in past)
        for _ in range(model.round, self.settings.rounds):
            model = self._round(model)
        start = time.perf_counter()
        final = self._evaluated(model) if self.settings.evaluate else {}
        seconds = time.perf_counter() - start
        self.ledger.note("evaluation", {"round": model.round, "clients": final, "seconds": seconds})
        self.telemetry.summary(self.ledger.records(), final)
        return model, final

    def _round(self, before: GlobalModel) -> GlobalModel:
        start = time.perf_counter()
        model = replace(before, round=before.round + 1)
        record = self._record = RoundRecord(model.round, history=self.ledger.history(model.round))
        try:
            self._begin(model.round)
            model = self._applied(model, run(self.aggregator.round(model), lambda asked: self._ask(asked, model)))
        except LostRound as lost:
            record.status, record.reason = "lost", str(lost)
        self._merged |= record.status == "merged"
        if record.exchanges:
            record.received = evaluation(record.exchanges[0].clients)
        if model.probe is not None:
            record.test = {
                "accuracy": finite(model.probe.score(model.params)),
                "loss": finite(model.probe.loss(model.params)),
            }
        record.seconds = time.perf_counter() - start
        self.ledger.save(model, record.as_dict())
        self.telemetry.finished(record)
        return model

    def _applied(self, model: GlobalModel, merged: Merged) -> GlobalModel:
        params = like(model.params, merged.params)
        for name, tensor in params.items():
            if tensor.is_floating_point() and tensor.numel() and not all_finite(tensor):
                raise LostRound(f"the merged model's {name} is not finite")
        self._record.metrics = {name: finite(float(value)) for name, value in merged.metrics.items()}
        return replace(model, params=params, memory=merged.memory)

    def _begin(self, round: int) -> None:
        """Draws the cohort, and notes that the round has begun."""
        answered = self.ledger.answered(round)
        known = {client for client, name in answered.items() if name or self.ledger.closed(round, 0)}
        self._online, self._keeping = self._connected(round, known), True
        away = self._away(round, known, self._online)
        self._cohort = self._sample(round, away)
        cohort = [*self._cohort, *sorted(known.difference(self._online))[:away]]
        self._keep(self.ledger.begin, round, cohort, self._online, self._record.history)

    def _away(self, round: int, known: Collection[int], online: Collection[int]) -> int:
        """How many of those whose replies are kept are away: not who may be back under an id that is new."""
        return max(0, len({*known}.difference(online)) - len({*online} - self.ledger.online(round)))

    def _sample(self, round: int, away: int) -> list[int]:
        """The round's cohort: a fraction of the connected clients, drawn by run seed and round.

        A round that was begun before goes on with those of its cohort who are here, and others for the rest, but for
        those who are away and have answered.
        """
        nodes, before = self._online, self.ledger.cohort(round)
        size = max(1, self.settings.quorum, len(before) or round_half_up(self.settings.fraction * len(nodes)))
        here, others = [node for node in nodes if node in before], [node for node in nodes if node not in before]
        draw = random.Random(derive_seed(self.settings.seed, round, "cohort"))
        return sorted(here + draw.sample(others, min(max(0, size - len(here) - away), len(others))))

    def _keep(self, keep: Callable[..., None], *what: Any) -> None:
        """Keeps it in the ledger; where that cannot be, gives the round's kept replies up, which makes room."""
        try:
            if self._keeping:
                keep(*what)
        except Unwritable as error:
            self._keeping = False
            self.ledger.forget_replies()
            self.telemetry.unkept(self._record.round, str(error))
            self._record.history.append(f"its replies were not kept: {error}")
            with suppress(Unwritable):
                self.ledger.begin(self._record.round, self._cohort, self._online, self._record.history)

    def _connected(self, round: int = 0, known: Collection[int] = ()) -> list[int]:
        """Who is connected, once they, and who is away but has answered, are as many as a round needs."""
        end = time.monotonic() + self.settings.deadline
        while True:
            with self.parking.waiting():
                nodes = self.transport.nodes()
                if len(nodes) + self._away(round, known, nodes) >= self.settings.min_clients:
                    return nodes
                if time.monotonic() > end:
                    raise LostRound(
                        f"{len(nodes)} clients connected within {self.settings.deadline:g} s,"
                        f" min-clients is {self.settings.min_clients}"
                    )
                time.sleep(WAIT)

    def _evaluated(self, model: GlobalModel) -> dict[str, float | None]:
        record = self._record = RoundRecord(model.round)
        self._keeping = False  # a reply here changes no model
        self.ledger.forget_replies()
        try:
            self._online = self._cohort = self._connected()
            asked = Exchange(task="evaluate", params=model.params, fold=collect)
            asked.answer(self._ask(asked, model))
        except LostRound as lost:
            self.telemetry.left_out(model.round, "all", f"the last model was not evaluated: {lost}")
        return evaluation(record.exchanges[0].clients) if record.exchanges else {}

    def _ask(self, exchange: Exchange[Any], model: GlobalModel) -> Iterator[ClientUpdate]:
        """The admitted updates of one exchange as they arrive; those kept from before a crash come first."""
        exchange = self._starting(exchange, model)
        number, note = len(self._record.exchanges), ExchangeRecord(exchange.task)
        self._record.exchanges.append(note)
        replies, kept = self._replies(exchange, model, note), self.ledger.kept(model.round, number)
        answers: Iterator[Reply | ClientUpdate] = chain(kept, replies)
        for answer in answers:
            update, fresh = self._checked(answer, exchange, model, note), isinstance(answer, Reply)
            del answer
            if update is None:
                continue
            if fresh:
                with note.timed("keeping"):
                    self._keep(self.ledger.keep, model.round, number, update)
            with note.timed("folding"):
                yield update.to(model.device)
            del update
        self._cohort = [int(client) for client in note.admitted]
        if len(note.admitted) < self.settings.quorum:
            raise LostRound(f"{len(note.admitted)} good replies, the quorum is {self.settings.quorum}")

    def _starting(self, exchange: Exchange[Any], model: GlobalModel) -> Exchange[Any]:
        """The exchange as the run's start has it: clients' own models until a round has merged, and for newcomers."""
        self._shapes = {}
        own = self.settings.start == "own"
        if own and exchange.task == "train" and not self._merged and not self._record.exchanges:
            anchor = model.params if exchange.request.cross_moments else None
            return replace(exchange, params=None, anchor=exchange.anchor or anchor)
        if callable(exchange.params):
            return replace(exchange, params=self._noting(exchange.params, None if own else model.params))
        return exchange

    def _noting(self, known: Callable[[int], Tensors | None], start: Tensors | None) -> Callable[[int], Tensors | None]:
        """What each client is sent, its shapes noted: a method may have to compute it; `start` if it knows of none."""

        def sent(client_id: int) -> Tensors | None:
            params = known(client_id) or start
            self._shapes[client_id] = {name: value.to("meta") for name, value in (params or {}).items()}
            return params

        return sent

    def _replies(self, exchange: Exchange[Any], model: GlobalModel, note: ExchangeRecord) -> Iterator[Reply]:
        number = len(self._record.exchanges) - 1
        closed = self.ledger.closed(model.round, number)
        cohort = [client for client in self._cohort if str(client) not in note.admitted and not closed]
        with note.timed("encoding"):
            content = encode(exchange, self._instructions(exchange, model))

        def counted(client: int) -> RecordDict:
            message = content(client)
            note.bytes_out += nbytes(message)
            return message

        note.asked = len(cohort) + len(note.admitted)
        self.telemetry.asking(model.round, exchange.task, note.asked)
        terms = Terms(self.settings.deadline, lambda: len(note.admitted) >= self.settings.quorum, number == 0)
        replies = self.transport.ask(exchange.task, counted, cohort, terms)
        try:
            while True:
                with note.timed("waiting"), self.parking.waiting():
                    reply = next(replies, None)
                if reply is None:
                    return
                self.telemetry.replied(str(reply.client_id))
                yield reply
                del reply
        finally:
            self.telemetry.asked()

    def _instructions(self, exchange: Exchange[Any], model: GlobalModel) -> Mapping[str, Any]:
        return {
            "task": self.settings.task,
            "training": {**self.settings.local_training, **exchange.training},
            "seed": self.settings.seed,
            "round": model.round,
            "evaluate": (self.settings.evaluate and not self._record.exchanges[1:]) or exchange.task == "evaluate",
        }

    def _checked(
        self, answer: Reply | ClientUpdate, exchange: Exchange[Any], model: GlobalModel, note: ExchangeRecord
    ) -> ClientUpdate | None:
        """The update in a reply, or kept, that may enter the fold; None for one that may not, whose reason is noted."""
        try:
            fresh = isinstance(answer, Reply)
            update = self._decoded(answer, note) if isinstance(answer, Reply) else self._recovered(answer, model.round)
            with note.timed("admission"):
                admit(update, exchange, self._expected(update, exchange, model), self.settings.max_examples)
            self._admitted(note, update)
            if not fresh:
                note.kept[str(update.client_id)] = "connected" if update.client_id in self._online else "gone"
        except (Rejected, Malformed) as error:
            client, reason = str(answer.client_id), one_line(str(error))
            note.left_out.append({"client": client, "reason": reason})
            self.telemetry.left_out(model.round, client, reason)
            return None
        return update

    def _recovered(self, kept: ClientUpdate, round: int) -> ClientUpdate:
        """The kept update; Rejected where its client may be back as another, and would be in the fold twice.

        A client without keys has a new id after a restart: by its name it is known again. An exchange that later ones
        stand on takes no more replies, and keeps those that it has.
        """
        unknown = kept.client_id not in self._online and not kept.name
        if unknown and not self.ledger.closed(round, 0):
            raise Rejected("its kept reply is dropped: it is gone, and without a name may be back under another id")
        return kept

    def _expected(self, update: ClientUpdate, exchange: Exchange[Any], model: GlobalModel) -> GlobalModel:
        """θ_t in the shapes that this client's reply is to have: of what it was sent, or of its own.

        Rejected where it has no part in the round: methods match the answers of a round's exchanges by id.
        """
        if self._record.exchanges[1:] and update.client_id not in self._cohort:
            raise Rejected("it has no part in this exchange: no reply of its own to the one before was admitted")
        sent = self._shapes.get(update.client_id) or exchange.sent(update.client_id)
        if sent is not None:
            return replace(model, params=sent)
        return model if self.widths is None else replace(model, params=resized(model, update.params, self.widths))

    def _decoded(self, reply: Reply, note: ExchangeRecord) -> ClientUpdate:
        if reply.content is None:
            raise Rejected(reply.error)
        note.bytes_in += nbytes(reply.content)
        try:
            with note.timed("decoding"):
                return decode(reply.content, reply.client_id)
        finally:
            forget(reply.content)

    def _admitted(self, note: ExchangeRecord, update: ClientUpdate) -> None:
        """Notes the client's counts and metrics; Rejected when it has answered already, by its id or by its name."""
        names = {client["name"] for client in note.clients.values()} - {""}
        if str(update.client_id) in note.admitted or update.name in names:
            raise Rejected(f"answered twice: {update.name or update.client_id} is in the fold already")
        note.admitted.append(str(update.client_id))
        note.clients[str(update.client_id)] = {
            **{name: finite(value) for name, value in update.metrics.items()},
            "name": update.name,
            "num_examples": update.num_examples,
        }


def round_half_up(value: float) -> int:
    """The nearest whole number, halves upwards."""
    return int(value + 0.5)
