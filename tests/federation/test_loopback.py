"""Whole federations in this process: tasks, clients, wire, admission, merge core and ledger together."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import RecordDict
from processes import until
from torch import nn
from torch.utils.data import TensorDataset

from aggregators.core.update import ClientUpdate
from client.task import Examples, Node, Task
from server import loopback
from server.app import federate
from server.grid import Content, Reply, Terms
from server.ledger import Ledger
from server.settings import from_run_config
from server.telemetry import Telemetry
from server.wire import decode

QUICK = {"rounds": 2, "training": {"epochs": 1}}


class Line(Task):
    """Points on a noisy line: a task without labels, whose slope is private where asked."""

    private: ClassVar[tuple[str, ...]] = ()

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def data(self, node: Node) -> tuple[Examples, Examples]:
        if node.get("broken"):
            raise OSError("the disk is full")
        generator = torch.Generator().manual_seed(int(node["partition-id"]))
        inputs = torch.randn(40, 1, generator=generator)
        examples = TensorDataset(inputs, 2 * inputs + 0.1 * torch.randn(40, 1, generator=generator))
        return examples, examples

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).square().sum(1)

    def correct(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((outputs - targets).abs() < 0.5).float().squeeze(1)


class PrivateHead(Line):
    private: ClassVar[tuple[str, ...]] = ("2.*",)


def same(a: loopback.Run, b: loopback.Run) -> bool:
    return all(torch.equal(a.model.params[name], b.model.params[name]) for name in b.model.params)


@pytest.mark.parametrize(
    "method",
    [
        "fedavg",
        "fisher",
        {"kind": "fisher", "estimator": "logit", "normalize": True},
        "median",
        {"kind": "fedavgm", "inner": "fisher"},
        {"kind": "norm_clip", "inner": "fedavg"},
        {"kind": "coefficient_search", "inner": "fisher", "candidates": 9},
        {"kind": "wise_ft", "inner": "fedavg", "weighting": "fisher", "max_grads": 64, "anchor": "round", "alpha": 0.9},
    ],
    ids=str,
)
def test_every_kind_of_method_learns_the_digits(method: Any) -> None:
    run = loopback.run({"kind": "digits", "partition": "iid"}, method, rounds=4, training={"epochs": 5})
    accuracies = [record["test"]["accuracy"] for record in run.records]
    assert accuracies[-1] > max(0.6, accuracies[0])
    assert run.evaluation["accuracy"] > 0.6


def test_two_federations_of_one_seed_give_the_same_bits_and_another_seed_others() -> None:
    runs = [loopback.run(Line(), seed=seed, **QUICK) for seed in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_private_parameters_stay_at_their_clients_from_round_to_round(said: pytest.LogCaptureFixture) -> None:
    run = loopback.run(PrivateHead(), rounds=3, training={"epochs": 20})
    assert list(run.model.params) == ["0.weight", "0.bias"]
    assert "private parameters start from their initial values" not in said.text
    assert run.evaluation["loss"] < run.records[0]["received"]["loss"] / 2


class Overheard(loopback.Loopback):
    """Keeps what every client sent, and can tell its private parameters."""

    def ask(self, kind: str, content: Content, cohort: Sequence[int], terms: Terms) -> Iterator[Reply]:
        self.updates: list[ClientUpdate] = []
        for reply in super().ask(kind, content, cohort, terms):
            self.updates.append(decode(reply.content, reply.client_id))
            yield reply

    def heads(self) -> list[bytes]:
        return [bytes(context.state.array_records["private"]["flat"].data) for context in self.contexts.values()]


def test_fisher_merges_the_shared_body_and_every_client_keeps_its_own_head(tmp_path: Path) -> None:
    transport = Overheard([{"partition-id": part} for part in range(3)])
    config = {
        "task": json.dumps({"kind": f"{__name__}:PrivateHead"}),
        "aggregator": json.dumps({"kind": "fisher", "estimator": "empirical"}),
        "evaluate": False,
    }
    settings = from_run_config({**config, "rounds": 1, "training.epochs": 5})
    merged, _ = federate(settings, transport, tmp_path, Telemetry())
    assert [[*update.sq_grad_sum] for update in transport.updates] == [["0.weight", "0.bias"]] * 3
    expected = settings.aggregator.aggregate(merged, transport.updates).params
    assert all(torch.equal(merged.params[name], expected[name]) for name in ("0.weight", "0.bias"))
    heads = transport.heads()
    assert len(set(heads)) == 3
    still = from_run_config({**config, "rounds": 2, "training.epochs": 0, "resume": str(tmp_path)})
    federate(still, transport, tmp_path, Telemetry())
    assert transport.heads() == heads


def test_clients_that_start_from_their_own_models_receive_none_in_the_first_round() -> None:
    run = loopback.run(Line(), start="own", **QUICK)
    first, second = (record["exchanges"][0] for record in run.records)
    assert first["bytes_out"] == 0 < second["bytes_out"]
    assert run.records[0]["received"] == {}
    assert len({client["train_loss"] for client in first["clients"].values()}) == len(first["clients"])


def test_a_client_that_fails_is_named_and_the_others_go_on() -> None:
    nodes = [{"partition-id": 0}, {"partition-id": 1, "broken": True}, {"partition-id": 2}]
    run = loopback.run(Line(), nodes=nodes, **QUICK)
    for record in run.records:
        (exchange,) = record["exchanges"]
        assert exchange["admitted"] == ["1", "3"]
        assert exchange["left_out"] == [{"client": "2", "reason": "error 2: OSError: the disk is full"}]


def test_below_quorum_the_model_stands_and_the_record_says_so() -> None:
    nodes = [{"partition-id": 0}, {"partition-id": 1, "broken": True}]
    run = loopback.run(Line(), nodes=nodes, quorum=2, **QUICK)
    assert [record["status"] for record in run.records] == ["lost", "lost"]
    assert run.records[0]["reason"] == "1 good replies, the quorum is 2"
    untouched = loopback.run(Line(), nodes=nodes, quorum=2, rounds=1, training={"epochs": 1})
    assert same(run, untouched)


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "fedavgm", "inner": "fedavg"},
        {"kind": "wise_ft", "inner": "fedavg", "weighting": "fisher", "estimator": "empirical"},
    ],
    ids=str,
)
def test_a_run_resumed_after_two_rounds_gives_the_bits_of_one_that_went_through(method: Any, tmp_path: Path) -> None:
    whole = loopback.run(Line(), method, rounds=4)
    loopback.run(Line(), method, rounds=2, folder=tmp_path)
    rest = loopback.run(Line(), method, rounds=4, folder=tmp_path, resume=str(tmp_path))
    assert same(rest, whole)
    assert [record["round"] for record in rest.records] == [1, 2, 3, 4]
    left = {path.name for path in tmp_path.iterdir()} - {"evaluation.json", "settings.json", "nodes.json", "lock"}
    assert left == {f"round-{n:04d}.json" for n in (1, 2, 3, 4)} | {f"round-{n:04d}.safetensors" for n in (3, 4)}


class Crash(BaseException):
    """The process dies."""


@pytest.fixture
def crashes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replies more each process makes before it dies, the last one first; none: it lives."""
    planned: list[int] = []
    respond = loopback.respond

    def dying(*args: Any) -> Any:
        if planned:
            planned[-1] -= 1
            if planned[-1] < 0:
                planned.pop()
                raise Crash
        return respond(*args)

    monkeypatch.setattr(loopback, "respond", dying)
    return planned


MOMENTUM = {"kind": "fedavgm", "inner": "fedavg"}
NAMED = [{"partition-id": part, "name": f"site-{part}"} for part in (2, 0, 1)]


@pytest.mark.parametrize("reply", range(7))
def test_a_run_that_crashed_at_any_reply_is_resumed_from_its_folder_alone_with_the_same_bits(
    reply: int, tmp_path: Path, crashes: list[int]
) -> None:
    settings: dict[str, Any] = {"nodes": NAMED, "seed": 3, "quorum": 3, "evaluate": False, **QUICK}
    whole = loopback.run(Line(), MOMENTUM, **settings)
    crashes.append(reply)
    if reply < 6:
        with pytest.raises(Crash):
            loopback.run(Line(), MOMENTUM, folder=tmp_path, **settings)
    else:
        loopback.run(Line(), MOMENTUM, folder=tmp_path, **settings)
    again = loopback.resume(tmp_path)
    assert same(again, whole)
    assert [record["status"] for record in again.records] == ["merged", "merged"]


def test_a_hundred_rounds_with_crashes_at_random_replies_give_the_same_bits(tmp_path: Path, crashes: list[int]) -> None:
    settings: dict[str, Any] = {"nodes": NAMED, "rounds": 100, "evaluate": False, "training": {"batch_size": 40}}
    whole = loopback.run(Line(), MOMENTUM, **settings)
    draw = random.Random(6)
    crashes += [draw.randrange(25) for _ in range(20)]
    planned = len(crashes)
    with pytest.raises(Crash):
        loopback.run(Line(), MOMENTUM, folder=tmp_path, **settings)
    while crashes:
        with pytest.raises(Crash):
            loopback.resume(tmp_path)
    again = loopback.resume(tmp_path)
    assert same(again, whole)
    assert [record["round"] for record in again.records] == list(range(1, 101))
    assert sum(len(record["history"]) for record in again.records) == planned


def test_a_folder_that_holds_a_run_is_refused_to_another_and_stays_as_it_was(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"nodes": NAMED, "seed": 3, **QUICK}
    loopback.run(Line(), "fedavg", folder=tmp_path, **settings)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}
    for again, said in (
        ({}, r"holds a run: fedbasin resume .*, or take another folder$"),
        ({"resume": str(tmp_path), "aggregator": "median"}, r'its aggregator is \{"kind": "fedavg".*: give the same'),
        ({"resume": str(tmp_path), "task": "digits"}, r"its task is .*: give the same, or start a new run$"),
    ):
        with pytest.raises(ValueError, match=said):
            loopback.run(**{"task": Line(), "aggregator": "fedavg", "folder": tmp_path, **settings, **again})
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"} == before


def test_a_task_and_a_method_that_are_written_otherwise_are_the_same(tmp_path: Path) -> None:
    """So are those that were noted before an option was there."""
    settings: dict[str, Any] = {"nodes": NAMED, "evaluate": False, **QUICK}
    loopback.run("test_loopback:Line", "fedavg", folder=tmp_path, **{**settings, "rounds": 1})
    noted = Ledger(tmp_path).noted("settings")
    Ledger(tmp_path).note("settings", {**noted, "aggregator": {"kind": "fedavg"}})
    task = json.dumps({"kind": f"{Line.__module__}:Line"})
    rest = loopback.run(task, "fedavg", folder=tmp_path, resume=str(tmp_path), **{**settings, "rounds": 2})
    assert len(rest.records) == 2


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"seed": 4}, {"seed": 3}, "seed"),
        ({"start": "own"}, {"start": "shared"}, "start"),
        ({"rounds": 5}, {"rounds": 2}, "rounds"),
    ],
)
def test_what_a_round_was_begun_with_is_told_where_it_changed(
    before: dict[str, Any], after: dict[str, Any], said: str, tmp_path: Path, crashes: list[int]
) -> None:
    training = {"epochs": 1, "schedule": "cosine"}
    settings: dict[str, Any] = {"nodes": NAMED, "evaluate": False, "rounds": 2, "seed": 3, "training": training}
    crashes.append(2)
    with pytest.raises(Crash):
        loopback.run(Line(), "fedavg", folder=tmp_path, **{**settings, **before})
    again = loopback.run(Line(), "fedavg", folder=tmp_path, resume=str(tmp_path), **{**settings, **after})
    assert again.records[0]["history"][0].endswith(f"were dropped: {said} changed when it was resumed")


def test_replies_that_were_trained_otherwise_are_dropped_when_a_round_is_resumed_and_its_record_says_so(
    tmp_path: Path, crashes: list[int]
) -> None:
    settings: dict[str, Any] = {"nodes": NAMED, "quorum": 3, "evaluate": False, **QUICK}
    anew = loopback.run(Line(), MOMENTUM, seed=3, **settings)
    crashes.append(2)
    with pytest.raises(Crash):
        loopback.run(Line(), MOMENTUM, folder=tmp_path, seed=3, **{**settings, "training": {"epochs": 9}})
    again = loopback.run(Line(), MOMENTUM, folder=tmp_path, resume=str(tmp_path), seed=3, **settings)
    dropped = "the replies kept were dropped: training changed when it was resumed"
    assert again.records[0]["history"] == [dropped, "begun again: the run had stopped in it"]
    assert same(again, anew)


def test_a_folder_of_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*no run there, or its settings"):
        loopback.resume(tmp_path)


HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background job ignores it
FEDBASIN = [sys.executable, "-c", f"{HEARD}; from server.cli import app; app()"]
LONG = ["--rounds", "12", "--clients", "2", "--task", '{"kind": "digits", "partition": "iid"}']


def simulated(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [*FEDBASIN, *(arguments or ("simulate", *LONG, "--folder", str(folder)))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The last model of a process that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with simulated(folder) as process:
        assert process.communicate(timeout=60)[1] == ""
    return (folder / "round-0012.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_was_stopped_is_resumed_by_another_with_the_same_bits(
    number: int, undisturbed: bytes, tmp_path: Path
) -> None:
    with simulated(tmp_path) as stopped:
        until((tmp_path / "round-0002.json").exists, timeout=60)
        stopped.send_signal(number)
        said, _ = stopped.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert stopped.returncode == -signal.SIGKILL
    else:
        assert stopped.returncode == 0
        assert said.splitlines()[-1] == f"parked, nothing is lost; to go on: fedbasin resume {tmp_path}"
    assert not (tmp_path / "evaluation.json").exists()
    with simulated(tmp_path, "resume", str(tmp_path)) as again:
        assert again.communicate(timeout=60)[1] == ""
    assert (tmp_path / "round-0012.safetensors").read_bytes() == undisturbed


class Asleep:
    """A transport whose clients must not be woken."""

    def nodes(self) -> list[int]:
        raise AssertionError("looked for clients")

    def ask(self, kind: str, content: Content, cohort: Sequence[int], terms: Terms) -> Iterator[Reply]:
        raise AssertionError(f"woke {cohort} with {RecordDict()}")


LINE = f"{__name__}:Line"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"aggregator": "fishr"}, "aggregator = 'fishr': unknown aggregation method 'fishr' (did you mean 'fisher'?)"),
        ({"aggregator": '{"kind": "fisher", "dampng": 1}'}, "unknown key 'dampng' (did you mean 'damping'?); allowed:"),
        ({"aggregator": '{"kind": "fisher", "damping": -1}'}, "damping = -1: input should be greater than or equal"),
        ({"aggregator": '{"kind": "fedavgm", "inner": {"kind": "fisher", "temper": 2}}'}, "temper = 2: input should"),
        ({"aggregator": "{"}, "is not valid JSON"),
        ({"task": "digit"}, "unknown task 'digit' (did you mean 'digits'?); allowed: digits, fashion-mnist, mnist"),
        ({"task": '{"kind": "digits", "alpha": 0}'}, "alpha = 0: input should be greater than 0"),
        ({"task": "nowhere:Task"}, "cannot import 'nowhere'"),
        ({"rounds": 0}, "rounds = 0: input should be greater than or equal to 1"),
        ({"minclients": 3}, "unknown key 'minclients' (did you mean 'min-clients'?)"),
        ({"training.epoch": 3}, "training: unknown key 'epoch' (did you mean 'epochs'?)"),
        ({"training.learning_rate": -1.0}, "training: learning_rate = -1.0: input should be greater than 0"),
        ({"task": LINE, "aggregator": "fisher"}, "Line.num_classes is None"),
        ({"aggregator": '{"kind": "norm_clip", "inner": "fedavg"}', "start": "own"}, "start = 'own' must be 'shared'"),
        ({"resume": "nowhere"}, "resume = 'nowhere': no run there"),
        ({"device": "warp"}, "device = 'warp': not a device of this machine"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_in_one_line_before_any_client_is_woken(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        federate(from_run_config(config), Asleep(), tmp_path / "run", Telemetry())
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()
