"""Clients of different widths in one federation, in this process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from aggregators.core.exchange import Exchange
from aggregators.core.update import ClientUpdate
from server import loopback, strategy
from server.admission import admit

WIDTHS = (6, 8, 10)
NODES = [
    {"partition-id": k, "num-partitions": 3, "name": f"site-{k}", "task.hidden": width}
    for k, width in enumerate(WIDTHS)
]
METHODS: list[Any] = [
    {"kind": "fedma"},
    {"kind": "pfnm"},
    {"kind": "ot_fusion", "inner": "fedavg"},
    {"kind": "ot_fusion", "inner": "fisher", "cost": "activations"},
]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
TASK = {"kind": "digits", "partition": "iid", "limit": 120}


def run(method: Any, **settings: Any) -> loopback.Run:
    return loopback.run(TASK, method, nodes=NODES, start="own", **{"rounds": 2, "training": {"epochs": 1}, **settings})


@methods
def test_each_client_keeps_its_own_width_from_round_to_round(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first: dict[tuple[int, str], torch.Size] = {}

    def noting(update: ClientUpdate, exchange: Exchange[Any], model: Any, most: int) -> None:
        admit(update, exchange, model, most)
        if exchange.task == "train":
            first.setdefault((model.round, update.name), update.params["hidden1.weight"].shape)

    monkeypatch.setattr(strategy, "admit", noting)
    found = run(method)
    assert [record["status"] for record in found.records] == ["merged", "merged"]
    assert first == {(round, f"site-{k}"): (width, 64) for round in (1, 2) for k, width in enumerate(WIDTHS)}
    units = len(found.model.params["hidden1.bias"])
    assert max(WIDTHS) <= units <= sum(WIDTHS)
    assert found.evaluation["clients"] == 3


@pytest.mark.parametrize("method", ["fedavg", {"kind": "git_rebasin", "inner": "fedavg"}], ids=str)
def test_under_other_methods_clients_of_other_widths_are_left_out_and_named(method: Any) -> None:
    (record,) = run(method, rounds=1).records
    reasons = [one["reason"] for one in record["exchanges"][0]["left_out"]]
    assert len(reasons) == 3
    assert all("hidden1.weight has shape" in reason for reason in reasons)


class Crash(BaseException):
    """The server's process dies."""


@pytest.mark.parametrize("after", range(0, 18, 2))
def test_a_pass_of_fedma_that_crashed_at_any_reply_ends_in_the_same_bits(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run({"kind": "fedma"})
    respond, given = loopback.respond, 0

    def dying(*args: Any) -> Any:
        nonlocal given
        given += 1
        if given == after + 1:
            raise Crash
        return respond(*args)

    with monkeypatch.context() as patched:
        patched.setattr(loopback, "respond", dying)
        with pytest.raises(Crash):
            run({"kind": "fedma"}, folder=tmp_path)
    finished = any(tmp_path.glob("round-*.json"))
    again = run({"kind": "fedma"}, folder=tmp_path, **({"resume": str(tmp_path)} if finished else {}))
    assert all(torch.equal(again.model.params[name], value) for name, value in whole.model.params.items())


def test_an_option_that_clients_may_not_set_for_themselves_is_refused() -> None:
    nodes = [{"partition-id": 0, "num-partitions": 1, "task.limit": 5}]
    (record,) = loopback.run(TASK, "fedavg", nodes=nodes, rounds=1).records
    (left_out,) = record["exchanges"][0]["left_out"]
    assert "task.limit: a client may set for itself hidden of Digits" in left_out["reason"]
