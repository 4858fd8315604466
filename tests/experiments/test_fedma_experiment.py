"""The experiment on FedMA: its networks, clients as a federation has them, and that its gates see their cause."""

import json
import subprocess
import sys
from dataclasses import replace
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
from aggregators.core.symmetry import Symmetry
from client import task as tasks
from client.tasks.idx import data_folder
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled
from client.training import Training, seeded
from experiments import cache, fedma, finetuning
from experiments.fedma import FULL, GATED, QUICK, SKEWS, Case, Course, Courses, LeNet, Setting, Vgg
from server import loopback

ROOT = Path(__file__).resolve().parents[2]
SMALL = Setting(
    {"kind": "experiments.mode_connectivity:Perceptron", "width": 8, "validation": 0.0},
    levels=3,
    clients=2,
    examples=30,
    passes=2,
    training=Training(epochs=1),
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
    assert len(_symmetry(task).groups) == FULL[network].levels


def _symmetry(task: tasks.Task) -> Symmetry:
    with seeded(0):
        return task.symmetry(task.model())


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
    found = fedma.methods(SMALL.training)
    kinds = [parse(method.config).kind for method in found.values()]
    assert kinds == ["fedma", "fedma", "fedavg", "fedavg"]
    assert [name for name, method in found.items() if method.proximal] == ["FedProx"]


@pytest.mark.parametrize("skew", SKEWS)
def test_a_seed_deals_its_own_data_and_every_client_its_share(skew: str) -> None:
    found = FULL[GATED].dealt(skew, seed=7)
    assert (found["partition_seed"], found["limit"]) == (7, 24_000)
    assert found["partition"] == SKEWS[skew]["partition"]


@pytest.mark.parametrize("kind", ["pfnm", "fedavg"])
def test_clients_alone_merge_as_a_federation_of_one_exchange_that_trains_as_long(kind: str) -> None:
    cohort, task = fedma.alone(SMALL, "IID", 3), SMALL.dealt("IID", 3)
    found = cohort.round({"kind": kind})
    options: dict[str, Any] = {"rounds": 1, "start": "own", "evaluate": False, "training": {"epochs": 4}}
    run = loopback.run(task, kind, clients=2, seed=3, **options)
    for name, value in run.model.params.items():
        torch.testing.assert_close(found.merged.params[name], value, rtol=1e-5, atol=1e-6)
    assert fedma.score(cohort.clients[0].task, found.merged.params) == run.records[0]["test"]["accuracy"]


def test_one_shot_methods_stand_beside_the_clients_and_their_ensemble() -> None:
    cohort = fedma.alone(SMALL, "IID", 0)
    found, task, models = fedma.one_shot(cohort), cohort.clients[0].task, [c.params for c in cohort.clients]
    test: Any = task.test_data()
    assert found["mean single client"].accuracy == [fmean(fedma.score(task, params) for params in models)]
    assert found["prediction ensemble"].accuracy == [finetuning.accuracy(task, models, test)]
    assert found["prediction ensemble"].growth == [2.0]
    assert found["PFNM"].growth[0] >= 1.0


def test_a_course_has_a_round_for_every_pass_and_as_many_exchanges_of_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: fedma.course(SMALL, "IID", m, 0) for name, m in fedma.methods(SMALL.training).items()}
    assert [(len(c.accuracy), c.exchanges) for c in found.values()] == [(2, 4), (2, 4), (8, 1), (8, 1)]
    assert min(min(course.nbytes) for course in found.values()) > 0
    assert found["FedMA"].nbytes[0] < found["FedMA"].nbytes[1]  # nothing is sent before clients begin
    monkeypatch.setattr(loopback, "run", None)
    again = fedma.course(SMALL, "IID", fedma.methods(SMALL.training)["FedMA"], 0)
    assert again == found["FedMA"]


def test_a_client_that_is_left_out_ends_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = loopback.run({**SMALL.dealt("IID", 0)}, "fedavg", clients=2, rounds=1, evaluate=False)
    ran.records[0]["exchanges"][0]["left_out"].append({"client": "1", "reason": "it is late"})
    monkeypatch.setattr(loopback, "run", lambda **settings: replace(ran))
    with pytest.raises(RuntimeError, match="it is late"):
        fedma.course(SMALL, "IID", fedma.methods(SMALL.training)["FedAvg"], 0)


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
    }
    found: dict[Case, list[Course]] = {}
    for skew, name in product(SKEWS, ends):
        end = ends[name] + changes.get(f"{skew[:3]} {name}", 0.0)
        rounds, exchanges = (4, 1) if name in ("FedAvg", "FedProx") else (1, 4) if name[:5] == "FedMA" else (1, 1)
        growth = 1.1 + changes.get("growth", 0.0) if name == "FedMA" else 1.0
        nbytes = [1.9e6 * exchanges] * rounds if exchanges == 4 else [2e6] * rounds
        accuracy = [end - 0.1 * (rounds - 1 - number) for number in range(rounds)]
        found[Case(GATED, skew, name)] = [Course(accuracy, nbytes, [growth] * rounds, exchanges)] * 2
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


def test_tables_compare_what_has_cost_as_many_exchanges_or_bytes() -> None:
    pass_, by_exchange, by_byte = (
        {(row["labels"], row["method"]): row for row in rows} for rows in fedma.tables(courses(), QUICK).values()
    )
    assert (len(pass_), len(by_exchange), len(by_byte)) == (18, 8, 8)
    assert (pass_["IID", "FedAvg"]["exchanges"], pass_["IID", "FedAvg"]["MB per client"]) == (4, 8.0)
    assert str(by_exchange["IID", "FedAvg"]["1 passes"]).startswith("0.9100")
    assert str(by_byte["IID", "FedAvg"]["1 passes"]).startswith("0.8100")  # 7.6 MB pay for three rounds of 2


def test_what_costs_more_than_fedma_in_one_round_ends_in_none() -> None:
    found = dict(courses())
    dear = Case(GATED, "IID", "FedAvg")
    found[dear] = [course._replace(nbytes=[9e6] * 4) for course in found[dear]]
    (row,) = (row for row in fedma.tables(found, QUICK)["Accuracy within as many bytes as passes of FedMA"][2:3])
    assert (row["method"], row["1 passes"]) == ("FedAvg", "none ends")


def test_the_plot_has_two_panels_for_each_network_and_skew() -> None:
    figure = Figure()
    fedma.plot(courses(), figure)
    assert [len(axes.lines) for axes in figure.axes] == [10] * 4
    assert [axes.get_xlabel() for axes in figure.axes] == ["exchange", "MB per client"] * 2


@pytest.mark.paper
@pytest.mark.skipif(not (data_folder() / "mnist").is_dir(), reason="MNIST is absent: run `make data`")
def test_the_quick_run_passes_its_gates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.fedma", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
