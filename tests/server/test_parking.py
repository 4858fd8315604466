"""Parking: a signal stops a run where it waits, with every reply in hand kept; a second one stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toys
from flwr.app import Context, RecordDict
from server_toys import Client, FakeGrid, Hall, answering, population, records, strategy
from toys import fingerprint

import server.app
import server.ledger
from aggregators.core.update import GlobalModel
from server.parking import SIGNALS, Parked, Parking
from server.strategy import MergeStrategy

MODEL = toys.global_model()
COHORT = population(MODEL, 4)
TWO = '{"kind": "toys:TwoExchanges", "inner": {"kind": "fedavgm", "inner": "fedavg"}}'


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGINT is, also where a shell has put the tests into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(client: Client, nth: int, number: int) -> Client:
    """The client, while whose n-th reply is made a signal comes."""
    left = iter(range(nth, -99, -1))

    def answer(content: RecordDict) -> RecordDict:
        if next(left) == 1:
            signal.raise_signal(number)
        return client(content)

    return answer


def hall(nth: int = 99, number: int = signal.SIGTERM) -> Hall:
    """Four clients; the signal comes in the third one's n-th reply."""
    clients = {client.client_id: answering(client) for client in COHORT}
    return Hall({**clients, 3: interrupted(clients[3], nth, number)})


def parked(run: MergeStrategy, model: GlobalModel = MODEL) -> int:
    """The signal by which the run was parked."""
    with pytest.raises(Parked) as stopped, run.parking.signals():
        run.run(model)
    return stopped.value.signal


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_run_that_was_parked_goes_on_with_the_same_bits_and_asks_nobody_again(
    tmp_path: Path, nth: int, number: int
) -> None:
    straight, _ = strategy(TWO, hall(), tmp_path / "a", rounds=2).run(MODEL)
    before, after = hall(nth, number), hall()
    assert parked(strategy(TWO, before, tmp_path / "b", rounds=2)) == number
    again = strategy(TWO, after, tmp_path / "b", rounds=2)
    model, _ = again.run(again.ledger.restore(MODEL))
    assert before.given + after.given == 16 + 1  # the reply that was being made is made again
    assert fingerprint(model.params) == fingerprint(straight.params)
    history = [record["history"] for record in records(tmp_path / "b")]
    assert history[(nth - 1) // 2] == ["begun again: the run had stopped in it"]
    assert sum(map(len, history)) == 1


def during(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A signal comes while the ledger does this."""
    does: Callable[..., None] = getattr(server.ledger.Ledger, method)

    def told(*args: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        does(*args)

    monkeypatch.setattr(server.ledger.Ledger, method, told)


def test_a_reply_that_is_in_hand_is_kept_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during(monkeypatch, "keep")
    run = strategy("fedavg", hall(), tmp_path, rounds=1)
    assert parked(run) == signal.SIGTERM
    assert [update.client_id for update in run.ledger.kept(1, 0)] == [1]


def test_a_round_that_is_being_saved_is_finished_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during(monkeypatch, "save")
    run = strategy("fedavg", hall(), tmp_path, rounds=3)
    parked(run)
    assert run.ledger.latest() == 1


def test_a_run_parks_while_it_waits_for_clients_to_connect(tmp_path: Path) -> None:
    transport = hall()
    transport.nodes = lambda: signal.raise_signal(signal.SIGTERM) or []  # type: ignore[method-assign]
    parked(strategy("fedavg", transport, tmp_path, rounds=1))
    assert transport.asked == []


def test_a_run_under_flower_is_parked_and_the_signal_left_to_flower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's handler tells the SuperLink, and ends the process with 0."""
    heard: list[int] = []
    grid, config = FakeGrid({}), {"runs-dir": str(tmp_path), "rounds": 1, "deadline": 1.0}
    monkeypatch.setattr(grid, "get_node_ids", lambda: signal.raise_signal(signal.SIGTERM) or [])
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        server.app.main(grid, Context(7, 0, {}, RecordDict(), config))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert (tmp_path / "7" / "settings.json").exists()


# --- signals --------------------------------------------------------------------------------------------------------


def test_a_second_signal_does_at_once_what_it_did_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are told while a reply is kept: the first waits, the second does not."""
    keep = server.ledger.Ledger.keep

    def told(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)
        keep(*args)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(server.ledger.Ledger, "keep", told)
    run = strategy("fedavg", hall(), tmp_path, rounds=1)
    with pytest.raises(KeyboardInterrupt), run.parking.signals():
        run.run(MODEL)
    assert [update.client_id for update in run.ledger.kept(1, 0)] == [1]


def test_signals_are_as_they_were_when_the_run_has_ended() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Parking().signals():
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_was_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Parking().signals():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_outside_the_main_thread_signals_are_left_as_they_are() -> None:
    """Where Flower simulates, the ServerApp is a thread."""
    found: list[object] = []

    def run() -> None:
        with Parking().signals():
            found.extend(signal.getsignal(number) for number in SIGNALS)

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == before
