"""The grid of matching, merging and restoring: what a cell is, that all run, and that its gate sees its cause."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from aggregators.core.registry import parse
from client.tasks.idx import data_folder
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled
from experiments import alignment_grid, cache
from experiments.alignment_grid import CELLS, Cell, Outcome, Sizes

ROOT = Path(__file__).resolve().parents[2]
BEST = str(Cell("by weights", "tempered Fisher", "REPAIR"))


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in place of MNIST, and a cache of this test's own."""
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    for split in ("train_set", "test_set"):
        monkeypatch.setattr(Mnist, split, lambda self: Labelled(images, np.arange(40) % 10))
    monkeypatch.setattr(cache, "FOLDER", tmp_path)


def test_a_cell_matches_outside_restores_within_and_merges_innermost() -> None:
    kinds = [part.kind for part in parse(Cell("by activations", "Fisher", "REPAIR").config(8)).parts()]
    assert kinds == ["activation_matching", "repair", "fisher"]
    assert [part.kind for part in parse(Cell("not matched", "FedAvg", "as merged").config(8)).parts()] == ["fedavg"]


def test_every_cell_is_a_method_of_its_own() -> None:
    methods = [parse(cell.config(8)).model_dump_json() for cell in CELLS]
    assert (len(methods), len(set(methods))) == (3 * 3 * 2, 3 * 3 * 2)


def test_every_cell_merges_the_same_two_clients(digits: None) -> None:
    found = alignment_grid.outcome(0, Sizes(client=20, grads=4))
    assert [*found.scores] == [*map(str, CELLS)] == [*found.nbytes]
    beside = {(one["mean endpoint"], one["prediction ensemble"]) for one in found.scores.values()}
    assert len(beside) == 1
    assert all(0 <= one["accuracy"] <= 1 for one in found.scores.values())


def test_squares_gram_matrices_and_a_second_exchange_are_paid_for(digits: None) -> None:
    nbytes = alignment_grid.outcome(0, Sizes(client=20, grads=4)).nbytes
    alone, fisher, repaired, matched, activations = (
        nbytes[str(Cell(*names))]
        for names in (
            ("not matched", "FedAvg", "as merged"),
            ("not matched", "Fisher", "as merged"),
            ("not matched", "FedAvg", "REPAIR"),
            ("by weights", "FedAvg", "as merged"),
            ("by activations", "FedAvg", "as merged"),
        )
    )
    gram, correlations = 4 * (785**2 + 3 * 65**2), 4 * (3 * 64**2 + 10**2)
    assert (fisher, matched) == (2 * alone, alone)
    assert repaired - alone == pytest.approx(gram, abs=64)  # tensors are padded to 16 bytes
    assert activations - 3 * alone == pytest.approx(correlations, abs=64)


def outcome(best: float) -> Outcome:
    """What a seed might come to: one cell better than the others, endpoints at 0.9."""
    scores = {
        str(cell): {"accuracy": best if str(cell) == BEST else 0.5, "mean endpoint": 0.9, "prediction ensemble": 0.92}
        for cell in CELLS
    }
    return Outcome(scores, dict.fromkeys(scores, 3e6))


@pytest.mark.parametrize(("best", "holds"), [(0.881, True), (0.95, True), (0.879, False)])
def test_the_gate_is_two_points_below_the_endpoints_mean(best: float, holds: bool) -> None:
    gate = alignment_grid.gate([outcome(best), outcome(best)])
    assert gate.holds is holds
    assert gate.detail.startswith(f"{BEST}: {best - 0.9:.4f}")


def test_tables_and_plot_show_every_cell() -> None:
    figure, outcomes = Figure(), [outcome(0.89), outcome(0.9)]
    ((_, rows),) = alignment_grid.tables(outcomes, Sizes()).items()
    alignment_grid.plot(outcomes, figure)
    assert (len(rows), rows[0]["MB per client"]) == (18, 3.0)
    assert sum(len(bars) for bars in figure.axes[0].containers if hasattr(bars, "patches")) == 18


@pytest.mark.paper
@pytest.mark.skipif(not (data_folder() / "mnist").is_dir(), reason="MNIST is absent: run `make data`")
def test_the_quick_run_passes_its_gates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.alignment_grid", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
