"""Trained models are kept, so that an experiment continues where it stopped."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import cache

SETTINGS = {"seed": 1, "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    return tmp_path / "cache"


class Training:
    """Counts how often it runs; transposed, since what is kept need not be contiguous."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> dict[str, Tensor]:
        self.runs += 1
        return {"weight": torch.arange(6.0).view(2, 3).T.requires_grad_()}


def test_a_model_is_trained_once_and_read_from_then_on() -> None:
    training = Training()
    first, second = (cache.cached("toy", SETTINGS, training)["weight"] for _ in range(2))
    assert training.runs == 1
    assert torch.equal(first, second)
    assert torch.equal(first, torch.arange(6.0).view(2, 3).T)


def test_other_settings_are_another_model() -> None:
    training = Training()
    cache.cached("toy", SETTINGS, training)
    cache.cached("toy", {**SETTINGS, "seed": 2}, training)
    assert training.runs == 2


def test_the_order_of_settings_is_irrelevant() -> None:
    training = Training()
    cache.cached("toy", SETTINGS, training)
    cache.cached("toy", dict(reversed(SETTINGS.items())), training)
    assert training.runs == 1


def test_an_interrupted_training_leaves_nothing_and_starts_again(folder: Path) -> None:
    def interrupted() -> dict[str, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.cached("toy", SETTINGS, interrupted)
    assert not list(folder.glob("*"))
    assert cache.cached("toy", SETTINGS, Training()).keys() == {"weight"}


def test_a_file_cut_short_is_made_again(folder: Path) -> None:
    training = Training()
    cache.cached("toy", SETTINGS, training)
    (path,) = folder.glob("toy-*.safetensors")
    path.write_bytes(path.read_bytes()[:20])
    assert cache.cached("toy", SETTINGS, training)["weight"].shape == (3, 2)
    assert training.runs == 2
