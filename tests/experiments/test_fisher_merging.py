"""The experiments of Fisher merging: their data, their ends, and that their gates see what they are there for."""

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.data import TensorDataset

from experiments import cache, fisher_merging
from experiments.finetuning import Finetuned, accuracy, initial
from experiments.fisher_merging import ALPHAS, METHODS, QUICK, SEARCH, TASK, WEIGHTINGS, Images, Outcome, Sizes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FOLDER", tmp_path)


def pictures(num: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(num, 1, 28, 28, generator=generator), torch.arange(num) % 10)


def client(seed: int) -> Finetuned:
    return Finetuned(TASK, initial(TASK, seed), pictures(4, seed))


def test_a_quarter_turn_moves_every_pixel_and_no_turn_none() -> None:
    images, labels = pictures(3).tensors
    aside, same = fisher_merging.turned(pictures(3), torch.tensor([90.0, 0.0, -90.0])).tensors
    torch.testing.assert_close(aside[0, 0], images[0, 0].rot90(), atol=1e-5, rtol=0)
    torch.testing.assert_close(aside[1], images[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(aside[2, 0], images[2, 0].rot90(-1), atol=1e-5, rtol=0)
    assert torch.equal(same, labels)


@pytest.mark.parametrize("sizes", [Sizes(), QUICK])
def test_no_two_parts_of_the_clothes_or_of_the_digits_overlap(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[set[int]]] = {"clothes": [], "digits": []}

    def recorded(name: str) -> Callable[[Images, int, int], TensorDataset]:
        def take(images: Images, begin: int, num: int) -> TensorDataset:
            drawn[name].append(set(images.order[begin : begin + num].tolist()))
            return TensorDataset(torch.zeros(num, 1, 1, 1), torch.zeros(num))

        return take

    for name in drawn:
        monkeypatch.setattr(Images, name, recorded(name))
    monkeypatch.setattr(Finetuned, "tuned", lambda self, *_: self)
    monkeypatch.setattr(Images, "new", lambda self: client(0))
    images = Images(0, sizes)
    fisher_merging.cohort(images), fisher_merging.held_out(images), fisher_merging.way(images)
    images.few(), images.validation(), images.parity()
    for parts in drawn.values():
        assert all(parts)
        assert not any(a & b for a, b in combinations(parts, 2))


def test_the_ends_of_the_way_are_its_endpoints_to_the_bit() -> None:
    assert fisher_merging.ends_exactly(client(0), client(1), grads=2)


def test_ends_that_are_off_by_one_bit_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true = fisher_merging.merged_from

    def nudged(*args: Any) -> Any:
        found = true(*args)
        return found._replace(params={name: value.nextafter(value + 1) for name, value in found.params.items()})

    monkeypatch.setattr(fisher_merging, "merged_from", nudged)
    assert not fisher_merging.ends_exactly(client(0), client(1), grads=2)


def test_a_searched_merge_is_no_worse_on_the_validation_data_than_the_target_alone() -> None:
    target, donor = (client(seed).with_new(fisher_merging.HEAD, seed) for seed in (0, 1))
    validation = pictures(20, seed=3)
    for config in SEARCH.values():
        chosen = fisher_merging.borrowed(config, target, donor, validation, grads=2)
        errors = 1 - accuracy(TASK, [target.at(chosen.params).params], validation)
        assert float(chosen.metrics["probe_loss"]) == errors <= 1 - accuracy(TASK, [target.params], validation)
        assert 0 <= float(chosen.metrics["coefficient_1"]) <= 1


def outcome(**changes: float) -> Outcome:
    """What a seed might come to: every gate holds, but for what `changes` moves."""
    beside = {"best single client": 0.8, "mean single client": 0.7, "prediction ensemble": 0.82}
    fused = {name: {"accuracy": 0.78, "worst client": 0.7, **beside} for name in METHODS}
    fused["Fisher"] = {**fused["Fisher"], "accuracy": 0.79 + changes.get("fisher", 0)}
    few = {name: {"isotropic": 0.78, "Fisher": 0.79, "tempered Fisher": 0.79} for name in ("16", "256", "1,024")}
    few["256"] = {**few["256"], "Fisher": 0.79 + changes.get("few", 0)}
    way = {
        f"{weighting} {alpha:g}": {"upright": alpha, "turned": 1 - alpha + changes.get("turned", 0) * (alpha == 1)}
        for weighting, alpha in product(WEIGHTINGS, ALPHAS)
    }
    names = ["target alone", *(f"{method}, with {donor}" for donor in ("parity", "clothes") for method in SEARCH)]
    donors = {name: {"accuracy": 0.6, "donor's share": 0.3} for name in names}
    donors["target alone"] = {"accuracy": 0.6 + changes.get("alone", 0), "donor's share": 0.0}
    return Outcome(fused, few, way, donors, exact=changes.get("exact", 1) == 1)


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"fisher": -0.013}, [0]),
        ({"fisher": -0.1}, [0, 1]),
        ({"few": -0.006}, [2]),
        ({"exact": 0}, [3]),
        ({"turned": 0.6}, [4]),
        ({"alone": 0.01}, [5]),
        ({}, []),
    ],
)
def test_each_gate_fails_on_what_it_forbids(changes: dict[str, float], number: list[int]) -> None:
    holds = [gate.holds for gate in fisher_merging.gates([outcome(**changes)])]
    assert [place for place, held in enumerate(holds) if not held] == number


def test_tables_and_plot_show_every_row() -> None:
    figure = Figure()
    tables = fisher_merging.tables([outcome(), outcome(fisher=0.01)], QUICK)
    fisher_merging.plot([outcome(), outcome(fisher=0.01)], figure)
    assert [len(rows) for rows in tables.values()] == [len(METHODS), 3, 2 * len(ALPHAS), 5]
    assert len(figure.axes) == 4
    assert all(row["bytes per client and round"] for row in next(iter(tables.values())))


@pytest.mark.paper
def test_the_quick_run_passes_its_gates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.fisher_merging", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
