"""The experiment on FedMA: its networks, clients as a federation has them, and that its gates see their cause."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.data import TensorDataset

from aggregators.core.registry import parse
from client import task as tasks
from client.tasks.idx import data_folder
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled
from client.training import seeded
from experiments import cache, fedma, finetuning
from experiments.fedma import FULL, GATED, METHODS, SKEWS, Case, Course, Courses, LeNet, Setting, Vgg
from server import loopback

ROOT = Path(__file__).resolve().parents[2]
SMALL = Setting(
    {"kind": "experiments.mode_connectivity:Perceptron", "width": 8, "validation": 0.0},
    levels=3,
    clients=2,
    examples=30,
    passes=2,
)


@pytest.fixture(autouse=True)
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in place of MNIST, and a cache of this test's own."""
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    for split in ("train_set", "test_set"):
        monkeypatch.setattr(Mnist, split, lambda self: Labelled(images, np.arange(60) % 10))
    monkeypatch.setattr(cache, "FOLDER", tmp_path)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in place of CIFAR-10."""
    found = TensorDataset(torch.rand(40, 3, 32, 32), torch.arange(40) % 10)
    monkeypatch.setattr(fedma, "pictures", lambda num: found)
    monkeypatch.setattr(Vgg, "test_data", lambda self: found)


@pytest.mark.parametrize("network", FULL)
@pytest.mark.usefixtures("pictures")
def test_a_network_has_as_many_levels_as_its_setting_says(network: str) -> None:
    task = tasks.parse(json.dumps(FULL[network].dealt("IID", 0)))
    with seeded(0):
        symmetry = task.symmetry(task.model())
    assert len(symmetry.groups) == FULL[network].levels


@pytest.mark.parametrize(("task", "num"), [(LeNet(), 44_426), (Vgg(), 89_834)], ids=["LeNet", "VGG"])
def test_networks_have_the_parameters_that_they_say(task: tasks.Task, num: int) -> None:
    assert sum(param.numel() for param in task.model().parameters()) == num


@pytest.mark.usefixtures("pictures")
def test_clients_of_cifar_10_have_disjoint_parts_of_all_images() -> None:
    task: Any = Vgg(partition="dirichlet", limit=40)
    found = [task.data({"partition-id": part, "num-partitions": 2})[0].tensors[0] for part in range(2)]
    assert len(torch.unique(torch.cat(found), dim=0)) == 40
    assert min(map(len, found)) > 0


def test_every_method_can_be_configured_and_only_fedprox_is_pulled_back() -> None:
    assert [parse(method.config).kind for method in METHODS.values()] == ["fedma", "fedma", "fedavg", "fedavg"]
    assert [name for name, method in METHODS.items() if method.matches] == ["FedMA", "FedMA, paper"]
    assert [name for name, method in METHODS.items() if method.proximal] == ["FedProx"]


def test_the_published_values_train_the_last_layer_for_longer_and_averages_as_long_as_all_passes() -> None:
    found = {name: method.epochs(SMALL) for name, method in METHODS.items()}
    assert found["FedMA"] == [8 + 3 * 2, 4 * 2]
    assert found["FedMA, paper"] == [8 + 2 * 2 + 6, 3 * 2 + 6]
    assert found["FedAvg"] == found["FedProx"] == [2] * 11


@pytest.mark.parametrize("skew", SKEWS)
def test_a_seed_deals_its_own_data_and_every_client_its_share(skew: str) -> None:
    found = FULL[GATED].dealt(skew, seed=7)
    assert (found["partition_seed"], found["limit"]) == (7, 24_000)
    assert found["partition"] == SKEWS[skew]["partition"]


@pytest.mark.parametrize("kind", ["pfnm", "fedavg"])
def test_clients_alone_merge_as_a_federation_of_one_exchange_that_trains_as_long(kind: str) -> None:
    cohort, task = fedma.alone(SMALL, "IID", 3, 4), SMALL.dealt("IID", 3)
    found = cohort.round({"kind": kind})
    options: dict[str, Any] = {"rounds": 1, "start": "own", "evaluate": False, "training": {"epochs": 4}}
    run = loopback.run(task, kind, clients=2, seed=3, **options)
    for name, value in run.model.params.items():
        torch.testing.assert_close(found.merged.params[name], value, rtol=1e-5, atol=1e-6)
    network = cohort.clients[0].task
    test: Any = network.test_data()
    assert run.records[0]["test"]["accuracy"] == finetuning.accuracy(network, [found.merged.params], test)


def test_one_shot_methods_stand_beside_the_clients_and_their_ensemble() -> None:
    cohort = fedma.alone(SMALL, "IID", 0, 1)
    found, task, models = fedma.one_shot(cohort), cohort.clients[0].task, [c.params for c in cohort.clients]
    test: Any = task.test_data()
    assert found["mean single client"].accuracy == [fmean(finetuning.accuracy(task, [m], test) for m in models)]
    assert found["prediction ensemble"].accuracy == [finetuning.accuracy(task, models, test)]
    assert (found["prediction ensemble"].growth, found["prediction ensemble"].epochs) == ([2.0], [8.0])
    assert found["PFNM"].growth[0] >= 1.0


def test_a_course_has_a_round_for_every_pass_and_averages_train_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: fedma.course(SMALL, "IID", METHODS[name], 0) for name in ("FedMA", "FedAvg")}
    assert [sum(course.exchanges) for course in found.values()] == [8, 11]
    assert len({len(values) for values in found["FedMA"]}) == 1
    assert found["FedMA"].nbytes[0] < found["FedMA"].nbytes[1]  # nothing is sent before clients begin
    monkeypatch.setattr(loopback, "run", None)
    assert fedma.course(SMALL, "IID", METHODS["FedMA"], 0) == found["FedMA"]


def test_a_client_that_is_left_out_ends_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = loopback.run(SMALL.dealt("IID", 0), "fedavg", clients=2, rounds=1, evaluate=False)
    ran.records[0]["exchanges"][0]["left_out"].append({"client": "1", "reason": "it is late"})
    monkeypatch.setattr(loopback, "run", lambda **settings: ran)
    with pytest.raises(RuntimeError, match="it is late"):
        fedma.course(SMALL, "IID", METHODS["FedAvg"], 0)


def courses(**changes: float) -> Courses:
    """Two seeds of a quick run in which every gate holds, but for what `changes` moves."""
    ends = {
        "FedMA": 0.9,
        "FedMA, paper": 0.88,
        "FedAvg": 0.91,
        "FedProx": 0.91,
        "one-shot average": 0.2,
        "PFNM": 0.7,
        "PFNM, paper": 0.6,
        "mean single client": 0.85,
        "prediction ensemble": 0.895,
        "prediction ensemble, trained as long": 0.99,
    }
    found: dict[Case, list[Course]] = {}
    for skew, name in product(SKEWS, ends):
        end = ends[name] + changes.get(f"{skew[:3]} {name}", 0.0)
        rounds, exchanges = (7, 1) if name in ("FedAvg", "FedProx") else (1, 4) if name[:5] == "FedMA" else (1, 1)
        growth = 1.1 + changes.get("growth", 0.0) if name == "FedMA" else 1.0
        accuracy = [end - 0.1 * (rounds - 1 - number) for number in range(rounds)]
        nbytes, epochs = (7.6e6, 14.0) if exchanges == 4 else (2e6, 2.0)
        spent = [nbytes] * rounds, [epochs] * rounds, [float(exchanges)] * rounds
        found[Case(GATED, skew, name)] = [Course(accuracy, [growth] * rounds, *spent)] * 2
    return found


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, []),
        ({"IID prediction ensemble": 0.014}, []),
        ({"IID prediction ensemble": 0.016}, [0]),
        ({"Dir prediction ensemble": 0.006}, [1]),
        ({"IID one-shot average": 0.31}, [2]),
        ({"Dir one-shot average": 0.31}, [2]),
        ({"growth": 0.16}, [3]),
        ({"IID PFNM, paper": 0.11}, [4]),
        ({"Dir PFNM, paper": 0.11}, [4]),
    ],
)
def test_each_gate_fails_on_what_it_forbids(changes: dict[str, float], number: list[int]) -> None:
    holds = [gate.holds for gate in fedma.gates(courses(**changes))]
    assert [place for place, held in enumerate(holds) if not held] == number


def test_tables_compare_what_has_cost_as_many_exchanges_epochs_or_bytes() -> None:
    ends, *found = ({(r["labels"], r["method"]): r for r in rows} for rows in fedma.tables(courses()).values())
    assert (len(ends), [len(rows) for rows in found]) == (20, [8] * 3)
    end = ends["IID", "FedAvg"]
    assert [end[column] for column in ("rounds", "exchanges", "epochs", "MB per client")] == [7, 7, 14, 14.0]
    there = [str(rows["IID", "FedAvg"]["pass 1"])[:6] for rows in found]
    assert there == ["0.6100", "0.9100", "0.5100"]  # four rounds, all seven, three: 7.6 MB do not pay for a fourth


def test_what_costs_more_than_fedma_in_one_round_ends_in_none() -> None:
    found, dear = dict(courses()), Case(GATED, "IID", "FedAvg")
    found[dear] = [course._replace(nbytes=[9e6] * 7) for course in found[dear]]
    rows = fedma.tables(found)["Accuracy by the time a pass of FedMA ends, in bytes"]
    assert [row["method"] for row in rows if row["pass 1"] == "none ends"] == ["FedAvg"]


def test_the_plot_has_two_panels_for_each_network_and_skew() -> None:
    figure = Figure()
    fedma.plot(courses(), figure)
    assert [len(axes.lines) for axes in figure.axes] == [8] * 4
    assert [axes.get_xlabel() for axes in figure.axes] == ["epochs of training", "MB per client"] * 2


@pytest.mark.paper
@pytest.mark.skipif(not (data_folder() / "mnist").is_dir(), reason="MNIST is absent: run `make data`")
def test_the_quick_run_passes_its_gates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.fedma", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
