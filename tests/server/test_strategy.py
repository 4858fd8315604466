"""The strategy: bad replies are left out and named, rounds below quorum are lost, and neither ends the run."""

from __future__ import annotations

import errno
import gc
import json
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import pytest
import torch
import toys
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from pydantic import PrivateAttr
from server_toys import (
    Change,
    Crash,
    Hall,
    Silence,
    answering,
    hall,
    left_out,
    population,
    records,
    said,
    strategy,
)
from torch import Tensor
from toys import fingerprint

import server.strategy
from aggregators.core.base import Aggregator
from aggregators.core.exchange import Exchange, Fold, Round, collect
from aggregators.core.update import ClientUpdate, GlobalModel, Merged, Moments, Request
from client import wire
from server.grid import Content, Reply, Terms
from server.ledger import Ledger, Unwritable
from server.strategy import MergeStrategy, round_half_up
from server.wire import decode

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


def raising(error: Exception) -> Change:
    def change(update: ClientUpdate) -> ClientUpdate:
        raise error

    return change


def claiming(**changes: Any) -> Change:
    return lambda update: replace(update, **changes)


def measuring(**metrics: float) -> Change:
    return lambda update: replace(update, metrics=metrics)


def rounds(folder: Path, transport: Any, aggregator: Any = "fedavg", **settings: Any) -> GlobalModel:
    """The model after a run from θ_0."""
    return strategy(aggregator, transport, folder, **settings).run(MODEL)[0]


def merged(aggregator: str, cohort: Sequence[toys.Client], folder: Path) -> GlobalModel:
    """What a run with those clients alone ends with."""
    return rounds(folder, hall(cohort), aggregator, rounds=1)


# --- bad replies ----------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Change, str]] = {
    "NaN": (spoilt("params", NAN), "params first.weight holds NaN or infinity"),
    "infinity": (spoilt("params", float("inf")), "params first.weight holds NaN or infinity"),
    "a missing tensor": (lambda u: replace(u, params={"mask": u.params["mask"]}), "params lacks "),
    "an extra tensor": (lambda u: replace(u, params={**u.params, "x": torch.ones(1)}), "params has x"),
    "a misshapen tensor": (claiming(params={**MODEL.params, "first.bias": torch.ones(1)}), "first.bias has shape (1,)"),
    "negative squares": (spoilt("sq_grad_sum", -1.0), "sq_grad_sum first.weight is negative"),
    "no statistics": (claiming(sq_grad_sum={}), "sq_grad_sum lacks"),
    "a count of 0": (claiming(num_examples=0), "num_examples is 0"),
    "a count beyond the limit": (claiming(num_examples=10**12), "num_examples is 1000000000000"),
    "no gradients counted": (claiming(num_grads=0), "num_grads is 0"),
    "the wrong estimator": (claiming(estimator="logit"), "estimator is logit, asked for exact"),
    "what nobody asked for": (
        claiming(moments={"a": Moments(1, torch.ones(1), torch.ones(1))}),
        "moments was not asked",
    ),
    "an error": (raising(ValueError("no data\nat all")), "error 2: no data at all"),
    "silence": (raising(Silence()), "late: no reply within 1 s"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_left_out_and_named_and_the_round_goes_on(tmp_path: Path, case: str) -> None:
    change, reason = BAD[case]
    run = strategy(FISHER, hall(COHORT, {3: change}), tmp_path / "run", rounds=2)
    model = run.run(MODEL)[0]
    assert model.round == 2
    for number, record in enumerate(records(tmp_path / "run"), 1):
        assert record["status"] == "merged"
        assert list(left_out(record)) == ["3"]
        assert reason in left_out(record)["3"]
        assert f"round {number}: client 3 left out: {left_out(record)['3']}" in said(run).splitlines()


@pytest.mark.parametrize("case", BAD)
def test_the_others_merge_as_if_the_bad_client_were_not_there(tmp_path: Path, case: str) -> None:
    with_bad = rounds(tmp_path / "a", hall(COHORT, {3: BAD[case][0]}), FISHER, rounds=1)
    without = merged(FISHER, [client for client in COHORT if client.client_id != 3], tmp_path / "b")
    assert fingerprint(with_bad.params) == fingerprint(without.params)


def garbled(change: Callable[[Any], Any]) -> Callable[[RecordDict], RecordDict]:
    """Client 3, whose encoded reply is changed on the wire."""

    def answer(content: RecordDict) -> RecordDict:
        reply = answering(COHORT[2])(content)
        change(reply)
        return reply

    return answer


GARBLED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another version": (lambda content: content["manifest"].update(version=2), "wire version 2, this server speaks 1"),
    "no manifest": (lambda content: content.pop("manifest"), "not a reply: KeyError: 'manifest'"),
    "half the bytes": (
        lambda content: content.update(params=wire.flat_record(content["params"]["flat"].data[:100])),
        "100 bytes where the layout describes",
    ),
    "no array": (lambda content: content["params"].clear(), "not a reply: KeyError: 'flat'"),
    "nothing": (lambda content: content.clear(), "not a reply: KeyError"),
    "Flower's own format": (
        lambda content: (
            content.clear(),
            content.update(arrays=ArrayRecord(), metrics=MetricRecord({"num-examples": 3})),
        ),
        "not a reply: KeyError",
    ),
}


@pytest.mark.parametrize("case", GARBLED)
def test_a_malformed_reply_is_left_out_and_named_and_the_round_goes_on(tmp_path: Path, case: str) -> None:
    change, reason = GARBLED[case]
    transport = hall(COHORT)
    transport.clients = {**transport.clients, 3: garbled(change)}
    rounds(tmp_path, transport, rounds=1)
    (record,) = records(tmp_path)
    assert record["status"] == "merged"
    assert reason in left_out(record)["3"]
    assert record["exchanges"][0]["admitted"] == ["1", "2", "4"]


def test_a_reply_in_a_name_that_has_answered_is_left_out(tmp_path: Path) -> None:
    """A node that restarted under a new id has the name that it had."""
    rounds(tmp_path, hall(COHORT, {4: claiming(name="site-2")}), rounds=1)
    (record,) = records(tmp_path)
    assert left_out(record) == {"4": "answered twice: site-2 is in the fold already"}


def test_nameless_clients_are_not_one_another(tmp_path: Path) -> None:
    rounds(tmp_path, hall(COHORT, {number: claiming(name="") for number in (1, 2, 3, 4)}), rounds=1)
    assert records(tmp_path)[0]["exchanges"][0]["admitted"] == ["1", "2", "3", "4"]


class Twice(Hall):
    """A hall that delivers every reply twice."""

    def ask(self, kind: str, content: Content, cohort: Sequence[int], terms: Terms) -> Iterator[Reply]:
        for client_id in cohort:
            for _ in range(2):
                yield self._reply(client_id, content(client_id))


def test_a_reply_that_comes_twice_counts_once(tmp_path: Path) -> None:
    transport = Twice({client.client_id: answering(replace(client, name="")) for client in COHORT})
    model = rounds(tmp_path / "a", transport, rounds=1)
    (record,) = records(tmp_path / "a")
    assert left_out(record) == {str(n): f"answered twice: {n} is in the fold already" for n in (1, 2, 3, 4)}
    assert fingerprint(model.params) == fingerprint(merged("fedavg", COHORT, tmp_path / "b").params)


def test_a_metric_that_passes_for_a_name_does_not_hide_the_clients_own(tmp_path: Path) -> None:
    rounds(tmp_path, hall(COHORT, {1: measuring(name=3.0, num_examples=7.0)}), rounds=1)
    told = records(tmp_path)[0]["exchanges"][0]["clients"]["1"]
    assert (told["name"], told["num_examples"]) == ("site-1", COHORT[0].num_examples)


# --- quorum ---------------------------------------------------------------------------------------------------------


class Once:
    """What goes wrong the n-th time only."""

    def __init__(self, change: Change, nth: int) -> None:
        self.change, self.left = change, nth

    def __call__(self, update: ClientUpdate) -> ClientUpdate:
        self.left -= 1
        return self.change(update) if self.left == 0 else update


def test_below_quorum_the_model_stands_the_record_says_so_and_later_rounds_go_on(tmp_path: Path) -> None:
    changes = {number: Once(spoilt("params", NAN), 1) for number in (1, 2)}
    run = strategy("fedavg", hall(COHORT, changes), tmp_path, rounds=2, min_clients=3, quorum=3, checkpoints=9)
    run.run(MODEL)
    lost, merged = records(tmp_path)
    assert (lost["status"], lost["reason"]) == ("lost", "2 good replies, the quorum is 3")
    assert sorted(left_out(lost)) == ["1", "2"]
    assert merged["status"] == "merged"
    assert "round 1 lost: 2 good replies, the quorum is 3" in said(run)
    (tmp_path / "round-0002.json").unlink()
    assert fingerprint(run.ledger.restore(MODEL).params) == fingerprint(MODEL.params)


def test_exactly_the_quorum_is_enough(tmp_path: Path) -> None:
    changes = {1: spoilt("params", NAN)}
    rounds(tmp_path, hall(COHORT, changes), rounds=1, min_clients=3, quorum=3)
    assert records(tmp_path)[0]["status"] == "merged"


def test_a_run_in_which_every_reply_is_bad_still_ends_with_the_model_it_began_with(tmp_path: Path) -> None:
    model = rounds(tmp_path, hall(COHORT, dict.fromkeys((1, 2, 3, 4), spoilt("params", NAN))), rounds=3)
    assert [record["status"] for record in records(tmp_path)] == ["lost"] * 3
    assert fingerprint(model.params) == fingerprint(MODEL.params)


def test_a_method_that_needs_more_replies_than_the_quorum_loses_the_round_by_name(tmp_path: Path) -> None:
    rounds(tmp_path, hall(COHORT[:2]), Demanding(), rounds=1)
    (record,) = records(tmp_path)
    assert (record["status"], record["reason"]) == ("lost", "2 good replies, the method needs at least 3")


def test_a_merged_model_that_is_not_finite_loses_the_round(tmp_path: Path) -> None:
    model = rounds(tmp_path, hall(COHORT), Diverging(), rounds=2)
    assert [record["status"] for record in records(tmp_path)] == ["lost", "merged"]
    assert records(tmp_path)[0]["reason"] == "the merged model's first.weight is not finite"
    assert all(tensor.isfinite().all() for tensor in model.params.values())


def test_a_lost_round_keeps_the_methods_memory(tmp_path: Path) -> None:
    momentum = '{"kind": "fedavgm", "inner": "fedavg"}'
    clients = hall(COHORT)
    after_two = rounds(tmp_path / "a", clients, momentum, rounds=2)
    changes = {number: Once(spoilt("params", NAN), 2) for number in (1, 2, 3, 4)}
    with_a_lost_one = rounds(tmp_path / "b", hall(COHORT, changes), momentum, rounds=3)
    assert [record["status"] for record in records(tmp_path / "b")] == ["merged", "lost", "merged"]
    assert fingerprint(with_a_lost_one.params) == fingerprint(after_two.params)
    assert fingerprint(with_a_lost_one.memory) == fingerprint(after_two.memory)


class Demanding(Aggregator):
    """Needs three replies."""

    kind: Literal["demanding"] = "demanding"

    def round(self, model: GlobalModel) -> Round:
        yield from Exchange(task="train", params=model.params, fold=collect, min_updates=3)
        return Merged(model.params)


class Diverging(Aggregator):
    """Merges to NaN in the first round."""

    kind: Literal["diverging"] = "diverging"

    def round(self, model: GlobalModel) -> Round:
        yield from Exchange(task="train", params=model.params, fold=collect)
        bad = {"first.weight": torch.full_like(model.params["first.weight"], NAN)} if model.round == 1 else {}
        return Merged({**model.params, **bad}, metrics={"loss": NAN, "norm": torch.tensor(2.0)})


# --- who is asked, and what -----------------------------------------------------------------------------------------


def test_the_cohort_is_sampled_once_a_round_by_the_seed(tmp_path: Path) -> None:
    asked = {}
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        transport = hall(population(MODEL, 10))
        rounds(tmp_path / name, transport, TWO, rounds=3, fraction=0.4, seed=seed)
        asked[name] = [cohort for _, cohort in transport.asked]
    assert asked["first"] == asked["again"] != asked["other"]
    assert [len(cohort) for cohort in asked["first"]] == [4] * 6
    assert asked["first"][::2] == asked["first"][1::2]  # both exchanges of a round
    assert len({tuple(cohort) for cohort in asked["first"]}) == 3  # every round anew


def test_at_least_a_quorum_is_sampled_and_no_more_than_are_there(tmp_path: Path) -> None:
    transport = hall(COHORT)
    rounds(tmp_path, transport, rounds=1, fraction=0.01, min_clients=3, quorum=3)
    assert len(transport.asked[0][1]) == 3


@pytest.mark.parametrize(("value", "nearest"), [(0.49, 0), (0.5, 1), (1.5, 2), (2.5, 3), (2.4, 2)])
def test_halves_of_a_client_are_rounded_up(value: float, nearest: int) -> None:
    assert round_half_up(value) == nearest


def test_a_second_exchange_asks_those_who_answered_the_first(tmp_path: Path) -> None:
    transport = hall(COHORT, {2: Once(spoilt("params", NAN), 1)})
    rounds(tmp_path, transport, TWO, rounds=2)
    assert transport.asked == [
        ("train", [1, 2, 3, 4]),
        ("measure", [1, 3, 4]),
        ("train", [1, 2, 3, 4]),
        ("measure", [1, 2, 3, 4]),
    ]


class Newcomer(Hall):
    """A hall in which a client that nobody asked answers every exchange too."""

    def ask(self, kind: str, content: Content, cohort: Sequence[int], terms: Terms) -> Iterator[Reply]:
        yield from super().ask(kind, content, [client for client in cohort if client != 4], terms)
        yield self._reply(4, content(4))


def test_a_newcomer_may_join_a_rounds_first_exchange_but_no_later_one(tmp_path: Path) -> None:
    transport = Newcomer({client.client_id: answering(client) for client in COHORT})
    transport.nodes = lambda: [1, 2, 3]  # type: ignore[method-assign]
    rounds(tmp_path / "a", transport, rounds=1)
    assert records(tmp_path / "a")[0]["exchanges"][0]["admitted"] == ["1", "2", "3", "4"]
    bad_at_first = Newcomer({**transport.clients, 4: answering(COHORT[3], Once(spoilt("params", NAN), 1))})
    bad_at_first.nodes = lambda: [1, 2, 3]  # type: ignore[method-assign]
    rounds(tmp_path / "b", bad_at_first, TWO, rounds=1)
    first, second = records(tmp_path / "b")[0]["exchanges"]
    assert first["admitted"] == second["admitted"] == ["1", "2", "3"]
    assert second["left_out"] == [
        {"client": "4", "reason": "it has no part in this exchange: no reply of its own to the one before was admitted"}
    ]


class Own(Aggregator):
    """Trains, and then measures each client's own model."""

    kind: Literal["own"] = "own"

    def round(self, model: GlobalModel) -> Round:
        updates = yield from Exchange(task="train", params=model.params, fold=collect)
        trained = {update.client_id: update.params for update in updates}
        yield from Exchange(task="measure", params=trained.__getitem__, fold=collect)
        return Merged(model.params)


class Replacing(Hall):
    """A hall that client 3 leaves after the first exchange: 4 is asked in its place, where a newcomer may be."""

    def ask(self, kind: str, content: Content, cohort: Sequence[int], terms: Terms) -> Iterator[Reply]:
        gone = bool(self.asked)
        yield from super().ask(kind, content, [client for client in cohort if not gone or client != 3], terms)
        if gone and terms.newcomers:
            yield self._reply(4, content(4))


def test_after_a_rounds_first_exchange_no_newcomer_is_asked_in_place_of_a_client_that_is_gone(tmp_path: Path) -> None:
    transport = Replacing({client.client_id: answering(client) for client in COHORT})
    transport.nodes = lambda: [1, 2, 3]  # type: ignore[method-assign]
    rounds(tmp_path, transport, Own(), rounds=1)
    (record,) = records(tmp_path)
    assert record["status"] == "merged"
    assert [exchange["admitted"] for exchange in record["exchanges"]] == [["1", "2", "3"], ["1", "2"]]


class Known(Aggregator):
    """Knows client 1, and counts what it computes for clients."""

    kind: Literal["known"] = "known"
    _computed: list[int] = PrivateAttr(default_factory=list)

    def round(self, model: GlobalModel) -> Round:
        def sent(client_id: int) -> Any:
            self._computed.append(client_id)
            return model.params if client_id == 1 else None

        yield from Exchange(task="train", params=sent, fold=collect)
        return Merged(model.params)


@pytest.mark.parametrize("start", ["own", "shared"])
def test_a_client_that_the_method_does_not_know_begins_as_the_runs_clients_do(tmp_path: Path, start: str) -> None:
    transport = hall(COHORT[:2])
    rounds(tmp_path, transport, Known(), rounds=2, start=start)
    assert received(transport) == ([False, False, True, False] if start == "own" else [True] * 4)


def test_what_each_client_is_sent_is_computed_once(tmp_path: Path) -> None:
    known = Known()
    rounds(tmp_path, hall(COHORT[:1]), known, rounds=1)
    assert known._computed == [1]


def received(transport: Hall) -> list[bool]:
    """Of each message that was sent, whether it held params."""
    return [wire.decode(content)[1] is not None for content in transport.sent]


def test_an_own_start_sends_no_params_in_the_first_exchange_of_the_first_round_only(tmp_path: Path) -> None:
    transport = hall(COHORT[:1])
    rounds(tmp_path, transport, TWO, rounds=2, start="own")
    assert received(transport) == [False, True, True, True]


class Smaller(Aggregator):
    """Measures a part of the model, and then trains it."""

    kind: Literal["smaller"] = "smaller"

    def round(self, model: GlobalModel) -> Round:
        part = {"first.bias": model.params["first.bias"]}
        yield from Exchange(task="measure", params=lambda client_id: part, fold=collect)
        yield from Exchange(task="train", params=model.params, fold=collect)
        return Merged(model.params)


def test_a_reply_is_expected_in_the_shapes_that_its_own_exchange_sent(tmp_path: Path) -> None:
    rounds(tmp_path, hall(COHORT), Smaller(), rounds=2)
    assert [left_out(record) for record in records(tmp_path)] == [{}, {}]


@pytest.mark.parametrize("stops", [[4], [1, 2, 4]])
def test_an_own_start_holds_until_a_round_has_merged_resumed_or_not(tmp_path: Path, stops: list[int]) -> None:
    transport, model = hall(COHORT[:1], {1: Once(spoilt("params", NAN), 1)}), MODEL
    for stop in stops:
        model, _ = strategy("fedavg", transport, tmp_path, rounds=stop, start="own").run(model)
    assert [record["status"] for record in records(tmp_path)] == ["lost", "merged", "merged", "merged"]
    assert received(transport) == [False, False, True, True]


@pytest.mark.parametrize("compared", [False, True])
def test_an_own_start_sends_the_model_only_to_compare_with(tmp_path: Path, compared: bool) -> None:
    transport = hall(COHORT[:1])
    rounds(tmp_path, transport, Comparing(compared=compared), rounds=2, start="own")
    assert received(transport) == [False, True]
    first, second = (wire.anchor(content) for content in transport.sent)
    assert (first is not None) == compared
    assert first is None or all(torch.equal(value, MODEL.params[name]) for name, value in first.items())
    assert second is not None
    assert "anchor" not in transport.sent[1].array_records


class Comparing(Aggregator):
    """Trains, and asks for correlations."""

    kind: Literal["comparing"] = "comparing"
    compared: bool

    def round(self, model: GlobalModel) -> Round:
        request = Request(cross_moments=self.compared)
        yield from Exchange(task="train", params=model.params, request=request, fold=collect)
        return Merged(model.params)


class TwoTrains(Aggregator):
    """Trains twice a round."""

    kind: Literal["two_trains"] = "two_trains"

    def round(self, model: GlobalModel) -> Round:
        for _ in range(2):
            yield from Exchange(task="train", params=model.params, fold=collect)
        return Merged(model.params)


def test_an_own_start_sends_params_when_the_first_round_trains_again(tmp_path: Path) -> None:
    transport = hall(COHORT[:1])
    rounds(tmp_path, transport, TwoTrains(), rounds=2, start="own")
    assert received(transport) == [False, True, True, True]


def test_a_shared_start_sends_params_from_the_first_round_on(tmp_path: Path) -> None:
    transport = hall(COHORT[:1])
    rounds(tmp_path, transport, rounds=2)
    assert received(transport) == [True, True]


def test_clients_are_told_all_they_need(tmp_path: Path) -> None:
    transport = hall(COHORT[:1])
    settings = {"task": "mnist", "seed": 9, "training": {"epochs": 3}, "evaluate": True}
    rounds(tmp_path, transport, TWO, rounds=1, **settings)
    train, measure, evaluate = (wire.decode(content)[0] for content in transport.sent)
    assert [asked.exchange for asked in (train, measure, evaluate)] == ["train", "measure", "evaluate"]
    assert [asked.evaluate for asked in (train, measure, evaluate)] == [True, False, True]
    assert (train.task, train.seed, train.round, train.training) == ("mnist", 9, 1, {"rounds": 1, "epochs": 3})


def test_a_round_begins_when_enough_clients_are_connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.strategy, "WAIT", 0.001)
    transport = hall(COHORT)
    looks = iter([[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]])
    transport.nodes = lambda: next(looks)  # type: ignore[method-assign]
    rounds(tmp_path, transport, rounds=1, min_clients=3)
    assert transport.asked == [("train", [1, 2, 3])]


def test_a_round_for_which_too_few_connect_in_time_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.strategy, "WAIT", 0.001)
    transport = hall(COHORT[:2])
    model = rounds(tmp_path, transport, rounds=2, min_clients=3, deadline=0.01)
    assert {record["reason"] for record in records(tmp_path)} == {"2 clients connected within 0.01 s, min-clients is 3"}
    assert (transport.asked, model.round) == ([], 2)


# --- records --------------------------------------------------------------------------------------------------------


def test_a_rounds_record_tells_who_was_asked_and_what_it_took(tmp_path: Path) -> None:
    rounds(tmp_path, hall(COHORT, {3: spoilt("params", NAN)}), FISHER, rounds=1)
    (record,) = records(tmp_path)
    (exchange,) = record["exchanges"]
    assert (record["round"], exchange["task"], exchange["asked"]) == (1, "train", 4)
    assert exchange["admitted"] == ["1", "2", "4"]
    assert exchange["clients"]["4"]["num_examples"] == COHORT[3].num_examples
    assert set(exchange["seconds"]) >= {"encoding", "waiting", "decoding", "admission", "keeping", "folding"}
    assert 0 < record["metrics"]["damped_share"] < 1


def test_bytes_are_counted_both_ways(tmp_path: Path) -> None:
    transport = hall(COHORT)
    rounds(tmp_path, transport, rounds=1)
    exchange = records(tmp_path)[0]["exchanges"][0]
    model = sum(-(-tensor.nbytes // 16) * 16 for tensor in MODEL.params.values())
    assert exchange["bytes_out"] == exchange["bytes_in"] == 4 * model


def test_records_are_json_whatever_clients_and_methods_measure(tmp_path: Path) -> None:
    odd = {1: measuring(num=3.0, accuracy=NAN, loss=float("inf")), 2: measuring(num=2.0, loss=-1e308, x=NAN)}
    rounds(tmp_path, hall(COHORT, odd), Diverging(), rounds=2, evaluate=True)
    told = records(tmp_path)[1]  # strict JSON
    assert told["metrics"] == {"loss": None, "norm": 2.0}
    assert told["exchanges"][0]["clients"]["1"]["accuracy"] is None
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()


def test_a_client_id_of_64_bits_is_text_in_the_record(tmp_path: Path) -> None:
    large = replace(COHORT[0], client_id=2**64 - 1)
    rounds(tmp_path, hall([large]), rounds=1)
    assert records(tmp_path)[0]["exchanges"][0]["admitted"] == [str(2**64 - 1)]


# --- evaluation -----------------------------------------------------------------------------------------------------

MEASURED = {
    1: measuring(num=10.0, accuracy=0.9, loss=1.0),
    2: measuring(num=30.0, accuracy=0.5, loss=2.0),
    3: measuring(num=0.0, accuracy=0.0, loss=0.0),
    4: measuring(),
}


def test_the_evaluation_of_the_received_model_is_weighted_by_validation_examples(tmp_path: Path) -> None:
    _, final = strategy("fedavg", hall(COHORT, MEASURED), tmp_path, rounds=1, evaluate=True).run(MODEL)
    told = records(tmp_path)[0]["received"]
    assert told == pytest.approx({"accuracy": 0.6, "worst": 0.5, "spread": 0.2, "loss": 1.75, "clients": 2})
    assert final == told
    assert json.loads((tmp_path / "evaluation.json").read_text())["clients"] == told


@pytest.mark.parametrize(
    "metrics",
    [
        {"num": 5.0},
        {"num": 5.0, "accuracy": 0.5},
        {"num": 5.0, "loss": 0.5},
        {"num": NAN, "accuracy": 0.5, "loss": 1.0},
        {"num": 5.0, "accuracy": NAN, "loss": 1.0},
        {"num": 5.0, "accuracy": 0.5, "loss": NAN},
        {"num": 1e308, "accuracy": 1e308, "loss": 1e308},
        {"num": -5.0, "accuracy": 0.5, "loss": 1.0},
    ],
)
def test_no_metric_that_a_client_reports_ends_the_run(tmp_path: Path, metrics: dict[str, float]) -> None:
    changes = {**MEASURED, 3: measuring(**metrics), 4: measuring(**metrics)}
    _, final = strategy("fedavg", hall(COHORT, changes), tmp_path, rounds=2, evaluate=True).run(MODEL)
    assert final["loss"] == pytest.approx(1.75)
    assert [record["status"] for record in records(tmp_path)] == ["merged", "merged"]


def test_a_last_evaluation_that_fails_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    run = strategy("fedavg", OnlyTrains(hall(COHORT).clients), tmp_path, rounds=1, evaluate=True)
    model, final = run.run(MODEL)
    assert (model.round, final) == (1, {})
    assert "the last model was not evaluated: 0 good replies, the quorum is 1" in said(run)


class OnlyTrains(Hall):
    """A hall whose clients die when they are to evaluate."""

    def _reply(self, client_id: int, content: RecordDict) -> Reply:
        asked, _ = wire.decode(content)
        return super()._reply(client_id, content) if asked.exchange == "train" else Reply(client_id, None, "error 8")


def test_the_servers_own_test_data_is_scored_after_every_round(tmp_path: Path) -> None:
    model = rounds(tmp_path, hall(COHORT), rounds=1)
    assert MODEL.probe is not None
    assert records(tmp_path)[0]["test"]["loss"] == pytest.approx(MODEL.probe.loss(model.params))


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


def test_a_named_client_that_is_back_under_another_id_is_not_counted_twice_among_those_whom_a_round_needs(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"rounds": 1, "min_clients": 4, "quorum": 4, "deadline": 20}
    with pytest.raises(Crash):
        rounds(tmp_path, hall(COHORT, crash_after=3), **settings)
    after, looks = returned(COHORT, 2, 9), iter([[1, 3, 9]])
    after.nodes = lambda: next(looks, [1, 3, 4, 9])  # type: ignore[method-assign]
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


# --- memory and order -----------------------------------------------------------------------------------------------


class Weighing(Aggregator):
    """Counts, at each update that is folded, the replies whose tensors are alive: they hold the received bytes."""

    kind: Literal["weighing"] = "weighing"
    _decoded: list[weakref.ref[Tensor]] = PrivateAttr(default_factory=list)
    _alive: list[int] = PrivateAttr(default_factory=list)

    def round(self, model: GlobalModel) -> Round:
        def accumulate(state: None, update: ClientUpdate) -> None:
            self._alive.append(self.alive())

        fold = Fold(init=lambda: None, accumulate=accumulate, combine=lambda a, b: None, finalize=lambda state: None)
        yield from Exchange(task="train", params=model.params, fold=fold)
        return Merged(model.params)

    def alive(self) -> int:
        return sum(ref() is not None for ref in self._decoded)

    def decode(self, content: RecordDict, client_id: int) -> ClientUpdate:
        update = decode(content, client_id)
        self._decoded.append(weakref.ref(update.params["first.weight"]))
        return update


def test_at_most_two_updates_are_alive_in_a_streamed_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighing = Weighing()
    monkeypatch.setattr(server.strategy, "decode", weighing.decode)
    rounds(tmp_path, hall(population(MODEL, 10)), weighing, rounds=1)
    assert len(weighing._alive) == 10
    assert max(weighing._alive) <= 2
    assert weighing.alive() == 0


class Watching(Hall):
    """A hall that knows which replies' bytes are alive."""

    def __init__(self, clients: dict[int, Callable[[RecordDict], RecordDict]]) -> None:
        super().__init__(clients)
        self.replies: list[weakref.ref[Array]] = []

    def _reply(self, client_id: int, content: RecordDict) -> Reply:
        reply = super()._reply(client_id, content)
        assert reply.content is not None
        self.replies += [weakref.ref(record["flat"]) for record in reply.content.array_records.values()]
        return reply


def test_a_replys_bytes_are_freed_at_once_whether_it_is_good_or_malformed(tmp_path: Path) -> None:
    """Flower's records sit in reference cycles, and would wait for the garbage collector, gigabytes of them."""
    broken = garbled(lambda content: content["counts"].clear())
    transport = Watching({**hall(COHORT).clients, 3: broken, 4: answering(COHORT[3], spoilt("params", NAN))})
    gc.disable()
    try:
        rounds(tmp_path, transport, rounds=1)
        alive = [ref() is not None for ref in transport.replies]
    finally:
        gc.enable()
    assert sorted(left_out(records(tmp_path)[0])) == ["3", "4"]
    assert alive == [False] * 4


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """The largest distance between float32 tensors, in units of the last place."""
    ranks = [bits.where(bits >= 0, -(2**31) - bits) for bits in (t.view(torch.int32).long() for t in (a, b))]
    return int((ranks[0] - ranks[1]).abs().max()) if a.numel() else 0


@pytest.mark.parametrize("aggregator", ["fedavg", FISHER])
def test_the_fold_does_not_depend_on_the_order_of_arrival_beyond_one_ulp(tmp_path: Path, aggregator: str) -> None:
    cohort = population(MODEL, 10)
    orders = [cohort, cohort[::-1], cohort[5:] + cohort[:5], cohort[1::2] + cohort[::2]]
    models = [merged(aggregator, order, tmp_path / str(number)) for number, order in enumerate(orders)]
    for model in models[1:]:
        for name, tensor in model.params.items():
            if tensor.is_floating_point():
                assert ulps_apart(tensor, models[0].params[name]) <= 1
            else:
                assert tensor.equal(models[0].params[name])
