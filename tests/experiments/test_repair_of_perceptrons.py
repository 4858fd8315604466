"""The experiment on REPAIR: clients answer as a federation's do, its figures, and that its gates see their cause."""

import subprocess
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.data import TensorDataset

from aggregators.core.seed import derive_seed
from client.task import tensors
from client.tasks.idx import data_folder
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled
from client.training import Training, seeded
from experiments import cache, finetuning, repair
from experiments.finetuning import Cohort, Finetuned
from experiments.mode_connectivity import KEPT, Perceptron
from experiments.repair import CLIENTS, LAYERS, MATCHED, RESTORED, Outcome, row
from server import loopback

ROOT = Path(__file__).resolve().parents[2]
TASK = Perceptron(width=24, partition="shared", validation=0.0)
TRAINING = Training(epochs=1)


@pytest.fixture(autouse=True)
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in place of MNIST, and a cache of this test's own."""
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    for split in ("train_set", "test_set"):
        monkeypatch.setattr(Mnist, split, lambda self: Labelled(images, np.arange(60) % 10))
    monkeypatch.setattr(cache, "FOLDER", tmp_path)


def clients(num: int) -> list[Finetuned]:
    """As a federation of this seed has them after its first round."""
    found = []
    for part in range(num):
        with seeded(derive_seed(0, "initial", part)):
            start = {name: value.clone() for name, value in tensors(TASK.model()).items()}
        examples: Any = TASK.data({"partition-id": part, "num-partitions": num})[0]
        found.append(Finetuned(TASK, start, examples).tuned(examples, TRAINING, derive_seed(0, 1, part)))
    return found


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "git_rebasin", "inner": {"kind": "repair", "inner": "fisher"}},
        {"kind": "activation_matching", "inner": {"kind": "repair", "inner": "fedavg", "mode": "exact"}},
    ],
    ids=str,
)
def test_a_cohorts_round_and_its_bytes_are_those_of_a_federation_from_own_starts(config: Mapping[str, Any]) -> None:
    options = {"rounds": 1, "start": "own", "evaluate": False, "training": TRAINING.model_dump()}
    run = loopback.run(TASK, config, clients=2, seed=0, **options)
    found = Cohort(clients(2)).round(config)
    for name, value in run.model.params.items():
        torch.testing.assert_close(found.merged.params[name], value, rtol=1e-5, atol=1e-6)
    exchanges = run.records[0]["exchanges"]
    assert found.nbytes == sum(exchange["bytes_in"] + exchange["bytes_out"] for exchange in exchanges) / 2


def test_nothing_is_measured_twice_also_by_a_larger_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[object, dict[str, Any]] = {}
    both, method = clients(2), repair.config("matched", "gram")
    first = Cohort(both[:1], known).round(method)
    Cohort(both, known).round(method)
    monkeypatch.setattr(finetuning, "measure", None)
    again = Cohort(both[:1], known).round(method)
    assert all(torch.equal(again.merged.params[name], value) for name, value in first.merged.params.items())


def test_a_layers_variance_is_the_mean_over_units_before_the_relu() -> None:
    (client,) = clients(1)
    inputs = client.examples.tensors[0].flatten(1)
    first = inputs @ client.params["hidden1.weight"].T + client.params["hidden1.bias"]
    second = first.relu() @ client.params["hidden2.weight"].T + client.params["hidden2.bias"]
    found = repair.variances(client)
    assert found["hidden1"] == pytest.approx(float(first.var(0, correction=0).mean()), rel=1e-4)
    assert found["hidden2"] == pytest.approx(float(second.var(0, correction=0).mean()), rel=1e-4)
    assert found.keys() == set(LAYERS)


def test_of_one_network_held_by_two_the_variance_is_kept() -> None:
    (client,) = clients(1)
    twins = Cohort([client, client])
    assert repair.kept(twins, twins.round(KEPT)) == pytest.approx(dict.fromkeys(_columns(), 1.0))


def test_averaging_loses_variance_and_exact_repair_gives_it_back() -> None:
    cohort = Cohort(clients(3))
    lost, back = (repair.kept(cohort, cohort.round(RESTORED[name])) for name in ("average", "exact"))
    assert all(0 < share < 0.9 for share in lost.values())
    assert back == pytest.approx(dict.fromkeys(_columns(), 1.0), rel=1e-3)


def test_clients_have_disjoint_parts_and_starts_of_their_own() -> None:
    task = Perceptron(width=24, partition="iid", limit=60, validation=0.0)
    found = repair.trained(task, 3, seed=0)
    parts = torch.cat([client.examples.tensors[0] for client in found])
    assert len(parts.unique(dim=0)) == 60
    assert len({client.seed for client in found}) == 3
    assert len({finetuning.digest(client.params.values()) for client in found}) == 3


def test_a_larger_cohort_begins_with_the_clients_of_the_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(repair, "CLIENTS", range(2, 4))
    monkeypatch.setattr(repair, "endpoints", lambda cohort, test: seen.append([c.seed for c in cohort.clients]) or {})
    found = repair.outcome(0, 5)
    two, three = seen
    assert (two, len(set(three))) == (three[:2], 3)
    assert [*found.scores] == [row(k, *names) for k, *names in product((2, 3), MATCHED, RESTORED)]
    assert found.nbytes[row(2, "matched", "gram")] > found.nbytes[row(2, "matched", "average")] > 0


def test_endpoints_are_single_clients_and_the_ensemble_all_of_them() -> None:
    (client,) = clients(1)
    test = TensorDataset(*client.examples.tensors)
    found = repair.endpoints(Cohort([client, client]), test)
    assert found["mean endpoint"] == found["prediction ensemble"] == finetuning.accuracy(TASK, [client.params], test)


def _columns() -> list[str]:
    return [f"variance kept, {layer}" for layer in LAYERS]


def outcome(**changes: float) -> Outcome:
    """What a seed might come to: every gate holds, but for what `changes` moves."""
    accuracies = {"average": 0.5, "gram": 0.7, "exact": 0.7}
    scores = {
        row(k, matched, restored): {
            "accuracy": accuracies[restored] + changes.get(f"{matched.partition(' ')[0]}_{restored}", 0),
            **dict.fromkeys(("mean endpoint", "prediction ensemble", *_columns()), 0.9),
        }
        for k, matched, restored in product(CLIENTS, MATCHED, RESTORED)
    }
    return Outcome(scores, dict.fromkeys(scores, 2e6))


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, []),
        ({"not_gram": -0.06}, [0]),
        ({"not_exact": -0.06}, [0]),
        ({"matched_gram": -0.006}, [1]),
        ({"matched_exact": -0.006}, [1]),
    ],
)
def test_each_gate_fails_on_what_it_forbids(changes: dict[str, float], number: list[int]) -> None:
    holds = [gate.holds for gate in repair.gates([outcome(**changes)])]
    assert [place for place, held in enumerate(holds) if not held] == number


def test_tables_and_plot_show_every_merge() -> None:
    figure, outcomes = Figure(), [outcome(), outcome(matched_gram=0.01)]
    ((_, rows),) = repair.tables(outcomes).items()
    repair.plot(outcomes, figure)
    assert (len(rows), rows[0]["MB per client"]) == (5 * 2 * 3, 2.0)
    assert [len(axes.containers) for axes in figure.axes] == [3, 3, 0]
    assert len(figure.axes[2].lines) == 6


@pytest.mark.paper
@pytest.mark.skipif(not (data_folder() / "mnist").is_dir(), reason="MNIST is absent: run `make data`")
def test_the_quick_run_passes_its_gates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.repair", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
