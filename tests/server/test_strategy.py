"""The strategy: bad replies are left out and named, rounds below quorum are lost, and neither ends the run."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import toys
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from pydantic import PrivateAttr
from server_toys import (
    COHORT,
    FISHER,
    MODEL,
    NAN,
    TWO,
    Change,
    Hall,
    Own,
    Silence,
    answering,
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
from torch import Tensor
from toys import fingerprint

import server.strategy
from aggregators.core.base import Aggregator
from aggregators.core.exchange import Exchange, Fold, Round, collect
from aggregators.core.update import ClientUpdate, GlobalModel, Merged, Moments, Request
from client import wire
from server.grid import Content, Reply, Terms
from server.strategy import round_half_up
from server.wire import decode


def raising(error: Exception) -> Change:
    def change(update: ClientUpdate) -> ClientUpdate:
        raise error

    return change


def claiming(**changes: Any) -> Change:
    return lambda update: replace(update, **changes)


def measuring(**metrics: float) -> Change:
    return lambda update: replace(update, metrics=metrics)


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
