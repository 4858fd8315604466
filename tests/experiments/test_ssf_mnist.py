"""The experiment on MNIST: clients share a start and their data, train once, and its quick run passes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from client.tasks.idx import data_folder
from experiments import cache, ssf_mnist
from experiments.merging import Outcome
from experiments.report import command_line
from experiments.ssf_mnist import SETS, Size, cohort, gate, methods, run

ROOT = Path(__file__).resolve().parents[2]
TINY = Size(limit=64, statistics=8, masks=2, steps=2)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random images in place of MNIST, and a cache of this test's own."""
    generator = np.random.default_rng(0)
    for split in ("train", "t10k"):
        write(tmp_path / f"mnist/{split}-images-idx3-ubyte", generator.integers(0, 256, (100, 28, 28)))
        write(tmp_path / f"mnist/{split}-labels-idx1-ubyte", generator.integers(0, 10, 100))
    monkeypatch.setenv("FEDBASIN_DATA", str(tmp_path))
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    return tmp_path


def write(path: Path, values: np.ndarray) -> None:  # type: ignore[type-arg]
    path.parent.mkdir(exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def test_three_networks_of_21840_parameters_come_from_one_start(data: Path) -> None:
    found = cohort("mnist", TINY, seed=0)
    assert [sum(value.numel() for value in model.values()) for model in found.models] == [21_840] * 3
    assert all(not torch.equal(model["output.weight"], found.start["output.weight"]) for model in found.models)
    assert {id(examples) for examples in found.examples} == {id(found.examples[0])}
    assert len(found.examples[0]) == TINY.statistics  # type: ignore[arg-type]


def test_what_was_trained_is_read_from_then_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cohort("mnist", TINY, seed=0)
    monkeypatch.setattr(ssf_mnist, "train", None)
    again = cohort("mnist", TINY, seed=0)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first.models, again.models, strict=True) for name in a)
    with pytest.raises(TypeError):
        cohort("mnist", TINY, seed=1)


def test_every_method_merges_them(data: Path) -> None:
    outcomes = dict(cohort("mnist", TINY, seed=0).contest(methods(TINY, seed=0), seed=0))
    assert outcomes.keys() == {*methods(TINY, 0), "best client alone", "prediction ensemble"}
    assert all(np.isfinite(outcome[:2]).all() for outcome in outcomes.values())


def test_the_gate_allows_two_percent_above_fisher() -> None:
    fisher = [Outcome(0.07, 0.0)] * 3
    assert gate("mnist", "SSF", {"Fisher": fisher, "SSF": [Outcome(0.0713, 0.0)] * 3}).holds
    assert not gate("mnist", "SSF", {"Fisher": fisher, "SSF": [Outcome(0.0715, 0.0)] * 3}).holds


def test_without_its_data_it_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBASIN_DATA", str(tmp_path))
    answer = CliRunner().invoke(command_line("ssf_mnist", run, seeds=1), ["--quick", "--folder", str(tmp_path)])
    assert answer.exit_code == 1
    assert "train-images-idx3-ubyte is missing or empty: run `make data`" in answer.output


@pytest.mark.paper
@pytest.mark.skipif(
    not all((data_folder() / name).is_dir() for name in SETS),
    reason="MNIST or Fashion-MNIST is absent: run `make data`",
)
def test_the_quick_run_passes_its_gates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.ssf_mnist", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
