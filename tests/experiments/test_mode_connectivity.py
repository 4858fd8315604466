"""Ways between networks: what lies on them, what their barriers are, and that the gates see what they are there for."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from aggregators.core.diagnosis import between
from client.task import tensors
from client.tasks.idx import data_folder
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled
from client.training import Training, evaluate, seeded
from experiments import cache, mode_connectivity
from experiments.cifar10 import Cifar10
from experiments.finetuning import Cohort, Finetuned, initial
from experiments.mode_connectivity import METHODS, Outcome, Perceptron, Setting, Way

ROOT = Path(__file__).resolve().parents[2]
TASK = Perceptron(width=32, partition="shared", validation=0.0)
SETTING = Setting(TASK, Training(epochs=1), steps=4)
NETWORKS = [f"perceptron 3 × {width}" for width in (64, 128, 512)]


@pytest.fixture(autouse=True)
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in place of MNIST, and a cache of this test's own."""
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    for split in ("train_set", "test_set"):
        monkeypatch.setattr(Mnist, split, lambda self: Labelled(images, np.arange(40) % 10))
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")


def client(seed: int) -> Finetuned:
    examples: Any = TASK.data({"partition-id": 0, "num-partitions": 2})[0]
    return Finetuned(TASK, initial(TASK, seed), examples)


def twin(client: Finetuned) -> Finetuned:
    """The same function, the units of every hidden layer reversed."""
    turned = {name: value.flip(0) if "hidden" in name else value for name, value in client.params.items()}
    for name in ("hidden2.weight", "hidden3.weight", "output.weight"):
        turned[name] = turned[name].flip(1)
    return client.at(turned)


def test_a_barrier_is_the_most_that_the_loss_rises_above_the_line_between_its_ends() -> None:
    assert Way([0.1, 2.0, 0.5], [0, 0, 0]).barrier == pytest.approx(2.0 - 0.3)
    assert Way([0.0, 1.0, 1.0, 1.2], [0] * 4).barrier == pytest.approx(1.0 - 0.4)
    assert Way([1.0, 0.2, 0.4], [0] * 3).barrier == 0


def test_a_way_begins_and_ends_at_the_networks_and_passes_their_mean() -> None:
    start, end = client(0), client(1)
    found = mode_connectivity.way(SETTING, Cohort([start, end]), start.params, end.params)
    mean = {name: (value + end.params[name]) / 2 for name, value in start.params.items()}
    for step, params in ((0, start.params), (2, mean), (4, end.params)):
        model = TASK.model()
        model.load_state_dict({**params})
        there = evaluate(TASK, model, TASK.test_data())
        assert (found.loss[step], found.accuracy[step]) == pytest.approx((there["loss"], there["accuracy"]), rel=1e-5)
    assert (len(found.loss), found.middle) == (5, found.accuracy[2])


def test_between_two_networks_counters_are_the_first_ones() -> None:
    start = {"weight": torch.tensor([0.0, 4.0]), "num_batches_tracked": torch.tensor(7)}
    end = {"weight": torch.tensor([4.0, 0.0]), "num_batches_tracked": torch.tensor(9)}
    found = between(start, end, 0.25)
    assert found["weight"].tolist() == [1.0, 3.0]
    assert found["num_batches_tracked"] == 7


@pytest.mark.parametrize("method", [*METHODS][1:])
def test_between_a_network_and_its_permuted_twin_matching_leaves_no_way_to_go(method: str) -> None:
    cohort = Cohort([client(0), twin(client(0))])
    first, second = mode_connectivity.ends(cohort.round(METHODS[method]))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_matched_network_computes_what_it_did(method: str) -> None:
    cohort, inputs = Cohort([client(0), client(1)]), torch.rand(5, 1, 28, 28)
    for own, end in zip(cohort.clients, mode_connectivity.ends(cohort.round(METHODS[method])), strict=True):
        was, is_ = (functional_call(TASK.model(), {**params}, (inputs,)) for params in (own.params, end))
        torch.testing.assert_close(is_, was)


def test_a_pair_shares_its_examples_and_neither_start_nor_order() -> None:
    first, second = mode_connectivity.pair(SETTING, seed=0).clients
    assert all(torch.equal(a, b) for a, b in zip(first.examples.tensors, second.examples.tensors, strict=True))
    assert first.seed != second.seed
    assert not torch.equal(first.params["hidden1.weight"], second.params["hidden1.weight"])


def test_every_network_is_scored_by_every_method_on_paired_networks() -> None:
    found = mode_connectivity.outcome(0, {"perceptron 3 × 32": SETTING})
    assert [*found.scores] == [f"perceptron 3 × 32, {method}" for method in METHODS] == [*found.nbytes]
    ends = {(way.loss[0], way.accuracy[0]) for way in found.ways.values()}
    assert len(ends) == 1
    assert {scores["prediction ensemble"] for scores in found.scores.values()} == {
        scores["prediction ensemble"] for scores in [*found.scores.values()][:1]
    }


def images(num: int) -> TensorDataset:
    with seeded(0):
        return TensorDataset(torch.rand(num, 3, 32, 32), torch.arange(num) % 10)


def test_running_statistics_are_those_of_the_first_examples() -> None:
    task = Cifar10(width=2)
    params = tensors(task.model())
    client = Finetuned(task, params, images(12))
    found = mode_connectivity.reset(params, Cohort([client]), num=8)
    stem = nn.functional.conv2d(client.examples.tensors[0][:8], params["0.0.weight"], padding=1)
    torch.testing.assert_close(found["0.1.running_mean"], stem.mean((0, 2, 3)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["0.1.running_var"], stem.var((0, 2, 3), correction=0), atol=1e-6, rtol=1e-4)
    assert torch.equal(found["13.weight"], params["13.weight"])


def outcome(*, before: float = 1.0, after: float = 0.005, wide: float = 0.1) -> Outcome:
    """What a seed might come to: every gate holds, but for what the arguments move."""
    barriers = {
        (network, method): before if method == "not matched" else barrier
        for network, barrier in zip(NETWORKS, (0.3, wide, after), strict=True)
        for method in METHODS
    }
    scores = {f"{network}, {method}": {"barrier": barrier} for (network, method), barrier in barriers.items()}
    ways = {pair: Way([0.1, 0.1 + barrier, 0.1], [0.9] * 3) for pair, barrier in barriers.items()}
    return Outcome(scores, ways, dict.fromkeys(scores, 1e6))


@pytest.mark.parametrize(
    ("changes", "number"),
    [({}, []), ({"before": 0.7}, [0]), ({"after": 0.02}, [1]), ({"wide": 0.4}, [2]), ({"wide": 0.004}, [2])],
)
def test_each_gate_fails_on_what_it_forbids(changes: dict[str, float], number: list[int]) -> None:
    holds = [gate.holds for gate in mode_connectivity.gates([outcome(**changes)])]
    assert [place for place, held in enumerate(holds) if not held] == number


def test_tables_and_plot_show_every_network_and_method() -> None:
    figure, outcomes = Figure(), [outcome(), outcome(after=0.006)]
    ((_, rows),) = mode_connectivity.tables(outcomes).items()
    mode_connectivity.plot(outcomes, figure)
    assert (len(rows), rows[0]["MB per client"]) == (9, 1.0)
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 3]


@pytest.mark.paper
@pytest.mark.skipif(not (data_folder() / "mnist").is_dir(), reason="MNIST is absent: run `make data`")
def test_the_quick_run_passes_its_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    command = [sys.executable, "-m", "experiments.mode_connectivity", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
