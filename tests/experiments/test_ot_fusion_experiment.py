"""The experiment on optimal transport: its clients, what it measures of them, and that its gates see their cause."""

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.data import TensorDataset

from aggregators.core.registry import parse
from client.task import load
from client.tasks.idx import data_folder
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled
from experiments import cache, ot_fusion
from experiments.finetuning import accuracy, outputs
from experiments.mode_connectivity import Perceptron
from experiments.ot_fusion import ACTIVATIONS, ALIKE, APART, DIGIT, INNER, MATCHING, ONCE, PLAIN, WEIGHTS, Outcome, row
from experiments.scores import LINES

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Any] = {"partition_seed": 0, "limit": 60, "validation": 0.0}
EVERY = [row(widths, *names) for widths in ALIKE + APART for names in product(ot_fusion.methods(widths), INNER)]


@pytest.fixture(autouse=True)
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in place of MNIST, and a cache of this test's own."""
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    for split in ("train_set", "test_set"):
        monkeypatch.setattr(Mnist, split, lambda self: Labelled(images, np.arange(60) % 10))
    monkeypatch.setattr(cache, "FOLDER", tmp_path)


def images() -> TensorDataset:
    test: Any = Perceptron().test_data()
    return TensorDataset(*test.tensors)


def test_clients_have_their_widths_disjoint_parts_and_starts_of_their_own() -> None:
    found = [ot_fusion.client(0, number, width, OPTIONS) for number, width in enumerate((8, 12, 8))]
    assert [len(one.params["hidden3.bias"]) for one in found] == [8, 12, 8]
    assert len(torch.cat([one.examples.tensors[0] for one in found]).unique(dim=0)) == 3 * 10
    assert not torch.equal(found[0].params["hidden1.weight"], found[2].params["hidden1.weight"])


def test_an_ensemble_is_of_any_widths_and_of_one_network_that_network() -> None:
    narrow, wide = (ot_fusion.client(0, 0, width, OPTIONS).params for width in (8, 12))
    assert set(ot_fusion.alone([wide, wide], images()).values()) == {accuracy(ot_fusion.TASK, [wide], images())}
    found = ot_fusion.alone([narrow, wide], images())
    assert [*found] == [*LINES]
    assert found["best single client"] >= found["mean single client"]


def test_clients_of_several_widths_are_only_transported() -> None:
    assert {*ot_fusion.methods((64, 64))} >= {PLAIN, MATCHING}
    for widths, inner in product(APART, INNER.values()):
        found = [parse(ot_fusion.around(how, inner)) for how in ot_fusion.methods(widths).values()]
        assert {method.kind for method in found} == {"ot_fusion"}
        assert len({method.model_dump_json() for method in found}) == len(found) == 4


def test_every_cohort_is_merged_in_every_way_and_activations_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ot_fusion, "ALIKE", ALIKE[:1])
    monkeypatch.setattr(ot_fusion, "APART", ((64, 96),))
    scores, nbytes = ot_fusion.fusions(0, OPTIONS, images())
    assert [*scores] == [*nbytes] == [name for name in EVERY if name.startswith(("2 × 64", "64 + 96,"))]
    assert all(0 <= one["accuracy"] <= 1 for one in scores.values())
    for inner in INNER:
        plain, weights, activations = (
            nbytes[row((64, 64), matched, inner)] for matched in (PLAIN, WEIGHTS, ACTIVATIONS)
        )
        network = nbytes[row((64, 64), PLAIN, "FedAvg")]
        correlations = 4 * (3 * 64**2 + 10**2)
        assert weights == plain
        assert activations - weights == pytest.approx(2 * network + correlations, rel=0.01)


def test_the_specialist_holds_all_of_the_digit_and_few_others_the_generalist_the_rest() -> None:
    special, general = (one.examples.tensors for one in ot_fusion.specialists(0, OPTIONS))
    assert (special[1] == DIGIT).sum() == 6
    assert not (general[1] == DIGIT).any()
    assert 0 < (special[1] != DIGIT).sum() < 54 / 4
    assert len(torch.cat([special[0], general[0]]).unique(dim=0)) == 60


def test_however_they_are_matched_the_ways_ends_are_the_generalist_and_the_specialist() -> None:
    scores, ways = ot_fusion.lone_digit(0, OPTIONS, images())
    assert tuple(ways) == ONCE
    for matched, way in ways.items():
        assert (way[0], way[-1]) == (scores["generalist"]["accuracy"], scores["specialist"]["accuracy"])
        assert way[ot_fusion.STEPS // 2] == scores[f"{matched}, half and half"]["accuracy"]
        assert max(way) == scores[f"{matched}, best proportion"]["accuracy"]


def test_a_digit_is_known_by_the_share_of_its_images() -> None:
    client = ot_fusion.client(0, 0, 8, OPTIONS)
    only = {**client.params, "output.weight": torch.zeros(10, 8), "output.bias": torch.eye(10)[DIGIT]}
    assert ot_fusion.known_digit([only], images()) == {"accuracy": pytest.approx(0.1), f"on {DIGIT}": 1.0}


def test_a_doubled_network_computes_the_same_by_units_that_are_there_twice() -> None:
    client = ot_fusion.client(0, 0, 8, OPTIONS)
    wide, inputs = ot_fusion.doubled(client, 0), images().tensors[0]
    before, after = (one.params["hidden1.weight"] for one in (client, wide))
    twice = torch.cat([before, before])
    assert torch.equal(after.sort(0).values, twice.sort(0).values)
    assert not torch.equal(after, twice)
    torch.testing.assert_close(*(outputs(one.task, one.params, inputs) for one in (wide, client)))
    load(wide.task.model(), wide.params)  # which refuses other shapes


def test_doubled_units_are_summed_without_loss_and_averaged_with() -> None:
    found = ot_fusion.doublings(0, OPTIONS, images())
    assert len(found) == 2 * 2 * 2
    for name, one in found.items():
        assert (one["outputs' change"] < 1e-5) is (", sum, " in name)
        assert one["accuracy lost"] == 0 or ", mean, " in name


def outcome(**changes: float) -> Outcome:
    """What a seed might come to: every gate holds, but for what `changes` moves."""
    accuracies = {PLAIN: 0.5, WEIGHTS: 0.7 + changes.get("weights", 0), ACTIVATIONS: 0.7 + changes.get("units", 0)}
    beside = dict.fromkeys(LINES, 0.9)
    fused = {name: {"accuracy": accuracies.get(name.split(", ")[1], 0.6), **beside} for name in EVERY}
    names = product((WEIGHTS, ACTIVATIONS), ("sum", "mean"), ("into 64", "into 128"))
    doubled = {", ".join(name): {"accuracy lost": 0.2, "outputs' change": 0.5} for name in names}
    for name in (name for name in doubled if ", sum, " in name):
        doubled[name] = {"accuracy lost": changes.get("lost", 0.0), "outputs' change": changes.get("away", 1e-6)}
    digit = {"specialist": {"accuracy": 0.5, f"on {DIGIT}": 1.0}}
    return Outcome(fused, dict.fromkeys(fused, 2e6), digit, dict.fromkeys(ONCE, [0.5] * 11), doubled)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({"weights": -0.06}, [0]),
        ({"units": -0.06}, [0]),
        ({"lost": 1e-4}, []),
        ({"lost": 2e-4}, [1]),
        ({"lost": -2e-4}, [1]),
        ({"away": 2e-5}, [1]),
    ],
)
def test_each_gate_fails_on_what_it_forbids(changes: dict[str, float], failing: list[int]) -> None:
    holds = [gate.holds for gate in ot_fusion.gates([outcome(**changes), outcome(**changes)])]
    assert [place for place, held in enumerate(holds) if not held] == failing


def test_tables_and_plot_show_every_study() -> None:
    figure, outcomes = Figure(), [outcome(), outcome(weights=0.01)]
    found = [*ot_fusion.tables(outcomes).values()]
    ot_fusion.plot(outcomes, figure)
    assert [len(rows) for rows in found] == [3 * 5 * 2, 3 * 4 * 2, 1, 8]
    assert found[0][0]["MB per client"] == 2.0
    numbers, widths, proportions = figure.axes
    assert (len(numbers.containers), len(widths.patches), len(proportions.lines)) == (5, 3 * 5, 4)


@pytest.mark.paper
@pytest.mark.skipif(not (data_folder() / "mnist").is_dir(), reason="MNIST is absent: run `make data`")
def test_the_quick_run_passes_its_gates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.ot_fusion", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
