"""A run that stopped is taken up again: whose replies are kept, who is asked, and that the bits are the same."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import toys
from server_toys import (
    COHORT,
    FISHER,
    MODEL,
    NAN,
    TWO,
    Crash,
    Hall,
    Own,
    hall,
    left_out,
    population,
    received,
    records,
    rounds,
    said,
    spoilt,
    strategy,
    ulps_apart,
)
from toys import fingerprint

from server.ledger import Ledger, Unwritable
from server.strategy import MergeStrategy

# --- resuming -------------------------------------------------------------------------------------------------------


def resumed(folder: Path, crashing: Hall, after: Hall, aggregator: str, **settings: Any) -> MergeStrategy:
    """A run that crashed and was begun anew."""
    with pytest.raises(Crash):
        strategy(aggregator, crashing, folder, **settings).run(MODEL)
    again = strategy(aggregator, after, folder, **settings)
    again.run(again.ledger.restore(MODEL))
    return again


REPLIES = 2 * 2 * 3  # two rounds of two exchanges with three clients


@pytest.mark.parametrize("crash_after", range(REPLIES))
def test_a_crash_after_any_reply_changes_no_bit(tmp_path: Path, crash_after: int) -> None:
    uninterrupted = hall(COHORT[:3])
    straight = rounds(tmp_path / "a", uninterrupted, TWO, rounds=2)
    assert uninterrupted.given == REPLIES
    crashing, after = hall(COHORT[:3], crash_after=crash_after), hall(COHORT[:3])
    ledger = resumed(tmp_path / "b", crashing, after, TWO, rounds=2).ledger
    assert after.given == REPLIES - crash_after  # nobody is asked again
    restored = ledger.restore(MODEL)
    assert restored.round == 2
    assert fingerprint(restored.params) == fingerprint(straight.params)
    assert fingerprint(restored.memory) == fingerprint(straight.memory)


def test_a_run_that_crashes_again_and_again_loses_nothing(tmp_path: Path) -> None:
    straight = rounds(tmp_path / "a", hall(COHORT), TWO, rounds=1)
    for crash_after in (3, 2, 1):
        with pytest.raises(Crash):
            rounds(tmp_path / "b", hall(COHORT, crash_after=crash_after), TWO, rounds=1)
    last = hall(COHORT)
    model = rounds(tmp_path / "b", last, TWO, rounds=1)
    assert last.given == 2
    assert left_out(records(tmp_path / "b")[0]) == {}
    assert fingerprint(model.params) == fingerprint(straight.params)


def test_without_kept_replies_a_crashed_round_is_asked_anew(tmp_path: Path) -> None:
    straight = rounds(tmp_path / "a", hall(COHORT), TWO, rounds=2)
    after = hall(COHORT)
    run = resumed(tmp_path / "b", hall(COHORT, crash_after=11), after, TWO, rounds=2, keep_replies=False)
    assert after.asked == [("train", [1, 2, 3, 4]), ("measure", [1, 2, 3, 4])]
    assert fingerprint(run.ledger.restore(MODEL).params) == fingerprint(straight.params)


def test_replies_of_an_exchange_are_folded_in_the_order_in_which_they_first_came(tmp_path: Path) -> None:
    order = [COHORT[index] for index in (3, 0, 2, 1)]
    rounds(tmp_path / "a", hall(order), rounds=1)
    resumed(tmp_path / "b", hall(order, crash_after=2), hall(order), "fedavg", rounds=1)
    admitted = [records(tmp_path / name)[0]["exchanges"][0]["admitted"] for name in ("a", "b")]
    assert admitted[0] == admitted[1] == ["4", "1", "3", "2"]


def test_a_client_left_out_before_the_crash_does_not_join_an_exchange_that_later_ones_stand_on(tmp_path: Path) -> None:
    """Kept answers to the second exchange were given to the first one's result: it may not change."""
    bad = {2: spoilt("params", NAN)}
    straight = rounds(tmp_path / "a", hall(COHORT, bad), TWO, rounds=1)
    after = hall(COHORT)  # all are well now
    run = resumed(tmp_path / "b", hall(COHORT, bad, crash_after=5), after, TWO, rounds=1)
    assert after.asked == [("train", []), ("measure", [3, 4])]
    assert fingerprint(run.ledger.restore(MODEL).params) == fingerprint(straight.params)


def test_a_kept_reply_of_a_client_that_is_left_out_of_the_exchange_before_is_left_out_too(tmp_path: Path) -> None:
    """The resumed run allows fewer examples than client 4 has."""
    order = [COHORT[index] for index in (3, 0, 1, 2)]
    with pytest.raises(Crash):
        rounds(tmp_path, hall(order, crash_after=5), Own(), rounds=1)
    rounds(tmp_path, hall(order), Own(), rounds=1, max_examples=COHORT[2].num_examples)
    first, second = records(tmp_path)[0]["exchanges"]
    assert first["admitted"] == second["admitted"] == ["1", "2", "3"]
    assert "num_examples is 11" in first["left_out"][0]["reason"]
    assert "no reply of its own" in second["left_out"][0]["reason"]


def test_a_kept_reply_that_cannot_be_read_is_asked_for_again_with_all_that_stand_on_it(tmp_path: Path) -> None:
    straight = rounds(tmp_path / "a", hall(COHORT), TWO, rounds=1)
    with pytest.raises(Crash):
        rounds(tmp_path / "b", hall(COHORT, crash_after=6), TWO, rounds=1)
    (tmp_path / "b" / "replies" / "0001-00-000001.safetensors").write_bytes(b"torn")
    after = hall(COHORT)
    model = rounds(tmp_path / "b", after, TWO, rounds=1)
    assert after.asked == [("train", [2]), ("measure", [1, 3, 4, 2])]
    assert fingerprint(model.params) == fingerprint(straight.params)


def test_a_client_left_out_before_the_crash_may_join_an_exchange_that_was_still_open(tmp_path: Path) -> None:
    after = hall(COHORT)
    resumed(tmp_path, hall(COHORT, {2: spoilt("params", NAN)}, crash_after=3), after, TWO, rounds=1)
    assert after.asked[0] == ("train", [2, 4])
    assert records(tmp_path)[0]["exchanges"][0]["admitted"] == ["1", "3", "2", "4"]


def test_a_kept_reply_that_does_not_fit_the_resumed_run_is_left_out_and_its_client_asked_again(tmp_path: Path) -> None:
    """The run goes on with another method, which asks for more."""
    with pytest.raises(Crash):
        rounds(tmp_path, hall(COHORT, crash_after=2), "fedavg", rounds=1)
    after = hall(COHORT)
    rounds(tmp_path, after, FISHER, rounds=1)
    (record,) = records(tmp_path)
    assert after.asked == [("train", [1, 2, 3, 4])]
    assert sorted(left_out(record)) == ["1", "2"]
    assert all(reason.startswith("sq_grad_sum lacks") for reason in left_out(record).values())
    assert record["exchanges"][0]["admitted"] == ["1", "2", "3", "4"]


def test_server_momentum_survives_a_restart(tmp_path: Path) -> None:
    momentum = '{"kind": "fedavgm", "inner": "fedavg", "momentum": 0.7}'
    straight = rounds(tmp_path / "a", hall(COHORT), momentum, rounds=3)
    rounds(tmp_path / "b", hall(COHORT), momentum, rounds=2)
    again = strategy(momentum, hall(COHORT), tmp_path / "b", rounds=3)
    model, _ = again.run(again.ledger.restore(MODEL))
    assert model.kept("momentum")["first.weight"].abs().sum() > 0
    assert fingerprint(model.params) == fingerprint(straight.params)
    assert fingerprint(model.memory) == fingerprint(straight.memory)


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    first = rounds(tmp_path, hall(COHORT), rounds=2)
    transport = hall(COHORT)
    again = strategy("fedavg", transport, tmp_path, rounds=2)
    model, _ = again.run(again.ledger.restore(MODEL))
    assert transport.asked == []
    assert fingerprint(model.params) == fingerprint(first.params)


def test_the_record_says_that_a_round_was_begun_again_and_whose_replies_were_kept(tmp_path: Path) -> None:
    for crash_after in (2, 1):
        with pytest.raises(Crash):
            rounds(tmp_path, hall(COHORT, crash_after=crash_after), rounds=2)
    run = strategy("fedavg", hall(COHORT), tmp_path, rounds=2)
    run.run(MODEL)
    first, second = records(tmp_path)
    assert first["history"] == ["begun again: the run had stopped in it"] * 2
    assert first["exchanges"][0]["kept"] == {"1": "connected", "2": "connected", "3": "connected"}
    assert (second["history"], second["exchanges"][0]["kept"]) == ([], {})
    assert "  3 replies were kept from before, 0 of them of clients now gone" in said(run).splitlines()


def test_a_round_whose_checkpoint_was_damaged_is_repeated_and_the_record_says_so(tmp_path: Path) -> None:
    straight = rounds(tmp_path / "a", hall(COHORT), TWO, rounds=3)
    rounds(tmp_path / "b", hall(COHORT), TWO, rounds=2)
    (tmp_path / "b" / "round-0002.safetensors").write_bytes(b"")
    again = strategy(TWO, hall(COHORT), tmp_path / "b", rounds=3)
    model, _ = again.run(again.ledger.restore(MODEL))
    assert [record["history"] for record in records(tmp_path / "b")] == [
        [],
        ["begun again: its checkpoint was damaged"],
        [],
    ]
    assert fingerprint(model.params) == fingerprint(straight.params)
    assert fingerprint(model.memory) == fingerprint(straight.memory)


def test_an_own_start_is_repeated_when_the_only_merged_round_is_damaged(tmp_path: Path) -> None:
    rounds(tmp_path, hall(COHORT[:1]), rounds=1, start="own")
    (tmp_path / "round-0001.safetensors").write_bytes(b"")
    transport = hall(COHORT[:1])
    again = strategy("fedavg", transport, tmp_path, rounds=1, start="own")
    again.run(again.ledger.restore(MODEL))
    assert received(transport) == [False]


# --- clients that do not come back ----------------------------------------------------------------------------------

NAMELESS = [replace(client, name="") for client in COHORT]


def returned(cohort: Sequence[toys.Client], gone: int, back: int) -> Hall:
    """The hall after a restart, in which client `gone` is `back` under another id."""
    return hall([replace(client, client_id=back) if client.client_id == gone else client for client in cohort])


def test_a_kept_reply_of_a_nameless_client_that_is_gone_is_dropped_and_the_record_says_so(tmp_path: Path) -> None:
    """It is back as 9, and would count twice."""
    straight = rounds(tmp_path / "a", hall(NAMELESS), rounds=1)
    after = returned(NAMELESS, 2, 9)
    run = resumed(tmp_path / "b", hall(NAMELESS, crash_after=3), after, "fedavg", rounds=1)
    (record,) = records(tmp_path / "b")
    dropped = "its kept reply is dropped: it is gone, and without a name may be back under another id"
    assert left_out(record) == {"2": dropped}
    assert f"round 1: client 2 left out: {dropped}" in said(run).splitlines()
    assert record["exchanges"][0]["kept"] == {"1": "connected", "3": "connected"}
    assert after.asked == [("train", [4, 9])]
    found = run.ledger.restore(MODEL).params
    assert all(ulps_apart(found[n], straight.params[n]) <= 1 for n in found if found[n].is_floating_point())


def test_a_kept_reply_of_a_named_client_that_is_gone_is_used_once_and_the_record_says_so(tmp_path: Path) -> None:
    straight = rounds(tmp_path / "a", hall(COHORT), rounds=1)
    run = resumed(tmp_path / "b", hall(COHORT, crash_after=3), returned(COHORT, 2, 9), "fedavg", rounds=1)
    (record,) = records(tmp_path / "b")
    assert record["exchanges"][0]["kept"] == {"1": "connected", "2": "gone", "3": "connected"}
    assert left_out(record) == {"9": "answered twice: site-2 is in the fold already"}
    assert "  3 replies were kept from before, 1 of them of clients now gone" in said(run).splitlines()
    assert fingerprint(run.ledger.restore(MODEL).params) == fingerprint(straight.params)


def test_a_kept_reply_that_later_ones_stand_on_is_used_even_of_a_nameless_client_that_is_gone(tmp_path: Path) -> None:
    straight = rounds(tmp_path / "a", hall(NAMELESS), TWO, rounds=1)
    after = returned(NAMELESS, 1, 9)
    run = resumed(tmp_path / "b", hall(NAMELESS, crash_after=6), after, TWO, rounds=1)
    assert after.asked == [("train", []), ("measure", [3, 4])]
    assert fingerprint(run.ledger.restore(MODEL).params) == fingerprint(straight.params)


def test_a_resumed_round_asks_the_cohort_that_it_began_with(tmp_path: Path) -> None:
    """Whoever has joined since, and so would change the draw."""
    ten, more = population(MODEL, 10), population(MODEL, 14)
    straight = hall(ten)
    rounds(tmp_path / "a", straight, rounds=1, fraction=0.5)
    after = hall(more)
    resumed(tmp_path / "b", hall(ten, crash_after=0), after, "fedavg", rounds=1, fraction=0.5)
    assert after.asked == straight.asked


def test_a_resumed_round_asks_others_in_place_of_those_of_its_cohort_who_are_gone(tmp_path: Path) -> None:
    ten = population(MODEL, 10)
    with pytest.raises(Crash):
        rounds(tmp_path, before := hall(ten, crash_after=0), rounds=1, fraction=0.5)
    cohort = before.asked[0][1]
    after = hall([client for client in ten if client.client_id != cohort[0]])
    rounds(tmp_path, after, rounds=1, fraction=0.5)
    ((_, asked),) = after.asked
    assert len(asked) == 5
    assert set(cohort[1:]) < set(asked)


def test_a_kept_reply_of_a_named_client_that_is_away_leaves_its_place_to_nobody(tmp_path: Path) -> None:
    ten = population(MODEL, 10)
    straight = rounds(tmp_path / "a", hall(ten), rounds=1, fraction=0.5)
    with pytest.raises(Crash):
        rounds(tmp_path / "b", before := hall(ten, crash_after=2), rounds=1, fraction=0.5)
    first = before.asked[0][1][0]
    for crash_after in (1, 1, None):
        here = [client for client in ten if client.client_id != first]
        after = hall(here, crash_after=crash_after)
        with suppress(Crash):
            model = rounds(tmp_path / "b", after, rounds=1, fraction=0.5)
    admitted = [records(tmp_path / name)[0]["exchanges"][0]["admitted"] for name in ("a", "b")]
    assert admitted[0] == admitted[1]
    assert fingerprint(model.params) == fingerprint(straight.params)


@pytest.mark.parametrize("seed", range(4))
def test_named_clients_that_are_all_back_under_other_ids_are_asked_who_they_are(tmp_path: Path, seed: int) -> None:
    """As after their host was started again: those who have answered are told by their names."""
    settings: dict[str, Any] = {"rounds": 1, "min_clients": 4, "quorum": 4, "deadline": 0.01, "seed": seed}
    straight = rounds(tmp_path / "a", hall(COHORT), **settings)
    after = hall([replace(client, client_id=client.client_id + 10) for client in COHORT])
    run = resumed(tmp_path / "b", hall(COHORT, crash_after=3), after, "fedavg", **settings)
    assert len(left_out(records(tmp_path / "b")[0])) == 3
    assert fingerprint(run.ledger.restore(MODEL).params) == fingerprint(straight.params)


def test_a_cohort_does_not_grow_when_named_clients_are_back_under_other_ids_again_and_again(tmp_path: Path) -> None:
    ten = population(MODEL, 10)
    for crash_after, shift in ((2, 0), (1, 20), (1, 40)):
        again = hall([replace(client, client_id=client.client_id + shift) for client in ten], crash_after=crash_after)
        with pytest.raises(Crash):
            rounds(tmp_path, again, rounds=1, fraction=0.5)
        assert len(Ledger(tmp_path).cohort(1)) == 5


class Gathering(Hall):
    """A hall into which client 4 comes after the first look."""

    looks: int = 0

    def nodes(self) -> list[int]:
        self.looks += 1
        return [client for client in super().nodes() if client != 4 or self.looks > 1]


def test_a_named_client_that_is_back_under_another_id_is_not_counted_twice_among_those_whom_a_round_needs(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"rounds": 1, "min_clients": 4, "quorum": 4, "deadline": 20}
    with pytest.raises(Crash):
        rounds(tmp_path, hall(COHORT, crash_after=3), **settings)
    after = Gathering(returned(COHORT, 2, 9).clients)
    rounds(tmp_path, after, **settings)
    assert after.asked == [("train", [4, 9])]
    assert records(tmp_path)[0]["status"] == "merged"


def test_nameless_clients_count_among_those_whom_a_round_needs_once_later_replies_stand_on_theirs(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"rounds": 1, "min_clients": 4, "quorum": 4, "deadline": 0.01}
    straight = rounds(tmp_path / "a", hall(NAMELESS), TWO, **settings)
    with pytest.raises(Crash):
        rounds(tmp_path / "b", hall(NAMELESS, crash_after=5), TWO, **settings)
    model = rounds(tmp_path / "b", hall(NAMELESS[1:]), TWO, **settings)
    assert fingerprint(model.params) == fingerprint(straight.params)


def test_the_last_evaluation_keeps_no_replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Ledger, "keep", lambda self, *what: kept.append(what))
    strategy("fedavg", hall(COHORT), tmp_path, rounds=1, evaluate=True).run(MODEL)
    assert len(kept) == 4


def test_clients_who_have_answered_count_among_those_whom_a_round_needs(tmp_path: Path) -> None:
    """Else a round whose replies are all kept would be lost, with them, because a client is away."""
    straight = rounds(tmp_path / "a", hall(COHORT), rounds=1)
    with pytest.raises(Crash):
        rounds(tmp_path / "b", hall(COHORT, crash_after=3), rounds=1, min_clients=4, quorum=4)
    model = rounds(tmp_path / "b", hall(COHORT[1:]), rounds=1, min_clients=4, quorum=4, deadline=0.01)
    assert fingerprint(model.params) == fingerprint(straight.params)


@pytest.mark.parametrize("aggregator", ["fedavg", TWO])
def test_the_last_evaluation_takes_no_reply_for_its_own_that_a_crash_left_of_the_last_round(
    tmp_path: Path, aggregator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as crash:
        crash.setattr(Ledger, "forget_replies", Mock(side_effect=Crash))
        with pytest.raises(Crash):
            rounds(tmp_path, hall(COHORT), aggregator, rounds=1)
    transport = hall(COHORT)
    again = strategy(aggregator, transport, tmp_path, rounds=1, evaluate=True)
    again.run(again.ledger.restore(MODEL))
    assert transport.asked == [("evaluate", [1, 2, 3, 4])]
    assert "left out:" not in said(again)


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What part of a file's name means that no room is left for it; nothing at first."""
    parts: list[str] = []
    put = os.replace

    def replacing(partial: Path, path: Path) -> None:
        if any(part in str(path) for part in parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(partial, path)

    monkeypatch.setattr(os, "replace", replacing)
    return parts


@pytest.mark.parametrize("part", ["0001-00-000002", "0001-01-000005", "replies/begun.json"])
def test_replies_that_cannot_be_kept_are_all_given_up_and_the_round_goes_on(
    tmp_path: Path, full: list[str], part: str
) -> None:
    straight = rounds(tmp_path / "a", hall(COHORT), TWO, rounds=1)
    full.append(part)
    run = strategy(TWO, hall(COHORT, crash_after=7), tmp_path / "b", rounds=1)
    with pytest.raises(Crash):
        run.run(MODEL)
    assert not [*(tmp_path / "b").rglob("replies/*.safetensors")]
    line = "round 1: goes on, but would be asked anew after a crash: cannot write "
    assert sum(line in said for said in said(run).splitlines()) == 1
    full.clear()
    again = rounds(tmp_path / "b", hall(COHORT), TWO, rounds=1)
    (record,) = records(tmp_path / "b")
    told = [line.partition(": cannot write")[0] for line in record["history"]]
    assert told == ([] if "begun" in part else ["its replies were not kept", "begun again: the run had stopped in it"])
    assert fingerprint(again.params) == fingerprint(straight.params)


def test_the_round_after_one_whose_replies_were_not_kept_keeps_them_again(tmp_path: Path, full: list[str]) -> None:
    full.append("replies/0001-")
    with pytest.raises(Crash):
        rounds(tmp_path, hall(COHORT, crash_after=6), rounds=2)
    assert len([*(tmp_path / "replies").glob("0002-00-*")]) == 2
    assert len(records(tmp_path)[0]["history"]) == 1


@pytest.mark.parametrize("part", ["round-0002.safetensors", "round-0002.json"])
def test_a_disk_that_is_full_at_a_checkpoint_ends_the_run_and_loses_nothing(
    tmp_path: Path, full: list[str], part: str
) -> None:
    straight = rounds(tmp_path / "a", hall(COHORT), TWO, rounds=3)
    full.append(part)
    with pytest.raises(Unwritable, match="No space left on device"):
        rounds(tmp_path / "b", hall(COHORT), TWO, rounds=3)
    assert len(records(tmp_path / "b")) == 1
    full.clear()
    after = hall(COHORT)
    again = strategy(TWO, after, tmp_path / "b", rounds=3)
    model, _ = again.run(again.ledger.restore(MODEL))
    assert after.given == 8  # the third round's: the second one's were all kept
    assert fingerprint(model.params) == fingerprint(straight.params)
