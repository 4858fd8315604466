"""Clients of different widths in one federation, in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from toys import fingerprint

import client.app
from aggregators.core.exchange import Exchange
from aggregators.core.update import ClientUpdate
from client.task import Examples, Node, Task
from client.wire import encode
from server import loopback, strategy
from server.admission import admit

WIDTHS = (6, 8, 10)
METHODS: list[Any] = [
    {"kind": "fedma"},
    {"kind": "pfnm"},
    {"kind": "ot_fusion", "inner": "fedavg"},
    {"kind": "ot_fusion", "inner": "fisher", "cost": "activations"},
]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
DIGITS = {"kind": "digits", "partition": "iid", "limit": 120}


Trained = dict[tuple[int, str], list[int]]  # by round and client, the units of each model it trained
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Clouds(Task):
    """Two clouds of points in the plane."""

    num_classes: ClassVar[int] = 2
    local: ClassVar[tuple[str, ...]] = ("hidden",)
    hidden: int = 8

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 2))

    def data(self, node: Node) -> tuple[Examples, Examples]:
        generator = torch.Generator().manual_seed(int(node["partition-id"]))
        labels = torch.arange(16) % 2
        examples = TensorDataset(torch.randn(16, 2, generator=generator) + labels[:, None], labels)
        return examples, examples

    def example(self) -> Tensor:
        return torch.zeros(2, 2)


class Numbered(nn.Module):
    """A view whose size is a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), 8)


class Viewed(Clouds):
    """The same, of a network that works at one width."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, self.hidden), nn.ReLU(), Numbered(), nn.Linear(self.hidden, 2))


def nodes(*widths: int) -> list[dict[str, Any]]:
    return [
        {"partition-id": k, "num-partitions": len(widths), "name": f"site-{k}", "task.hidden": width}
        for k, width in enumerate(widths)
    ]


def run(method: Any, task: Any = None, widths: tuple[int, ...] = WIDTHS, **settings: Any) -> loopback.Run:
    chosen = {"start": "own", "rounds": 2, "training": {"epochs": 1}, **settings}
    return loopback.run(task or Clouds(), method, nodes=nodes(*widths), **chosen)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """What is admitted, exchange by exchange."""
    found: Trained = {}

    def noting(update: ClientUpdate, exchange: Exchange[Any], model: Any, most: int) -> None:
        admit(update, exchange, model, most)
        if exchange.task == "train":
            found.setdefault((model.round, update.name), []).append(len(next(iter(update.params.values()))))

    monkeypatch.setattr(strategy, "admit", noting)
    return found


@methods
def test_each_client_keeps_its_own_width_from_round_to_round(method: Any, trained: Trained) -> None:
    found = run(method, DIGITS)
    assert [record["status"] for record in found.records] == ["merged", "merged"]
    first = {who: widths[0] for who, widths in trained.items()}
    assert first == {(round, f"site-{k}"): width for round in (1, 2) for k, width in enumerate(WIDTHS)}
    units = len(found.model.params["hidden1.bias"])
    assert max(WIDTHS) <= units <= sum(WIDTHS)
    assert found.evaluation["clients"] == 3


@methods
def test_a_client_that_joins_later_keeps_its_own_width_too(method: Any, trained: Trained, tmp_path: Path) -> None:
    run(method, rounds=1, folder=tmp_path)
    run(method, widths=(*WIDTHS, 5), rounds=3, folder=tmp_path, resume=str(tmp_path))
    assert [trained[round, "site-3"][0] for round in (2, 3)] == [5, 5]


def test_a_client_that_joins_a_shared_start_later_begins_from_the_servers_model(
    trained: Trained, tmp_path: Path
) -> None:
    grown = run("pfnm", rounds=1, folder=tmp_path).model
    run("pfnm", widths=(*WIDTHS, 5), folder=tmp_path, resume=str(tmp_path), start="shared")
    assert trained[2, "site-3"] == [len(grown.params["0.bias"])]


@pytest.mark.parametrize("method", ["fedavg", {"kind": "git_rebasin", "inner": "fedavg"}], ids=str)
def test_under_other_methods_clients_of_other_widths_are_left_out_and_named(method: Any) -> None:
    (record,) = run(method, DIGITS, rounds=1).records
    reasons = [one["reason"] for one in record["exchanges"][0]["left_out"]]
    assert len(reasons) == 3
    assert all("hidden1.weight has shape" in reason for reason in reasons)


# --- widths that may not be -----------------------------------------------------------------------------------------


def test_a_layer_is_at_most_so_many_times_as_wide_as_the_tasks_own(tmp_path: Path) -> None:
    """Not as the grown model's, whatever that has become."""
    said = "0 has 21 units: allowed is 1 to 20, by the run's max-width"
    settings = {"max_width": 2.5, "folder": tmp_path}
    (record,) = run("pfnm", widths=(16, 20, 21), rounds=1, **settings).records
    assert record["exchanges"][0]["left_out"] == [{"client": "3", "reason": said}]
    *_, record = run("pfnm", widths=(16, 20, 21), resume=str(tmp_path), **settings).records
    assert record["exchanges"][0]["left_out"] == [{"client": "3", "reason": said}]


def answering(monkeypatch: pytest.MonkeyPatch, change: Change, exchange: int) -> None:
    """Client site-2 sends other params in that exchange of the run."""
    asked = 0

    def changed(update: ClientUpdate) -> Any:
        nonlocal asked
        asked += update.name == "site-2"
        here = update.name == "site-2" and asked == exchange + 1
        return encode(ClientUpdate(**{**vars(update), "params": change({**update.params})}) if here else update)

    monkeypatch.setattr(client.app, "encode", changed)


def test_widths_that_contradict_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda params: {**params, "0.bias": torch.zeros(3)}, exchange=0)
    (record,) = run("fedma", rounds=1).records
    assert record["status"] == "merged"
    (left_out,) = record["exchanges"][0]["left_out"]
    assert "0.bias has an axis of 3, its groups make 10" in left_out["reason"]


def test_a_client_that_answers_in_other_widths_than_it_was_sent_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = dict(Clouds(hidden=5).model().state_dict())
    answering(monkeypatch, lambda params: other, exchange=1)
    (record,) = run("fedma", rounds=1).records
    assert record["status"] == "merged"
    (left_out,) = record["exchanges"][1]["left_out"]
    units = int(record["metrics"]["units.0"])
    assert left_out["reason"] == f"params 0.weight has shape (5, 2), asked for ({units}, 2)"


def test_a_task_of_one_width_is_refused_before_any_client_is_woken_where_the_model_may_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def woken(*args: Any) -> Any:
        raise AssertionError("woke a client")

    monkeypatch.setattr(loopback, "respond", woken)
    with pytest.raises(ValueError, match="does not work with other widths"):
        run("fedma", Viewed(), widths=(8, 8))


def test_where_the_model_cannot_grow_clients_of_one_width_may_have_any_network(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (record,) = run({"kind": "ot_fusion", "inner": "fedavg"}, Viewed(), widths=(8, 8), rounds=1).records
    assert record["status"] == "merged"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all clients must have")]
    assert "does not work with other widths" in line


def test_an_option_that_clients_may_not_set_for_themselves_is_refused() -> None:
    own = [{"partition-id": 0, "num-partitions": 1, "task.limit": 5}]
    (record,) = loopback.run(DIGITS, "fedavg", nodes=own, rounds=1).records
    (left_out,) = record["exchanges"][0]["left_out"]
    assert "task.limit: a client may set for itself hidden of Digits" in left_out["reason"]


# --- crashes --------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The server's process dies."""


TRAINED, EVALUATED = 2 * 2 * 3, 3  # replies: two rounds of two exchanges with three clients, and their evaluation


@pytest.fixture(scope="module")
def whole() -> loopback.Run:
    return run("fedma")


@pytest.mark.parametrize("after", range(TRAINED + EVALUATED))
def test_a_pass_of_fedma_that_crashed_at_any_reply_ends_in_the_same_bits_and_trains_nobody_again(
    after: int, whole: loopback.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    respond, given = loopback.respond, 0

    def dying(*args: Any) -> Any:
        nonlocal given
        given += 1
        if given == after + 1:
            raise Crash
        return respond(*args)

    monkeypatch.setattr(loopback, "respond", dying)
    with pytest.raises(Crash):
        run("fedma", folder=tmp_path)
    again = run("fedma", folder=tmp_path, resume=str(tmp_path))
    assert given == TRAINED + EVALUATED + 1 + max(0, after - TRAINED)  # what was evaluated is evaluated again
    assert fingerprint(again.model.params) == fingerprint(whole.model.params)
    assert fingerprint(again.model.memory) == fingerprint(whole.model.memory)
