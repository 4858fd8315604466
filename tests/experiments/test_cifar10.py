"""CIFAR-10 as it is published, and the network for it."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from experiments import cifar10


def test_a_resnet20_has_twenty_layers_in_three_stages() -> None:
    model = cifar10.resnet20(16)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    main = [layer for layer in layers if getattr(layer, "kernel_size", None) != (1, 1)]
    assert (len(main), len(layers)) == (20, 22)
    assert [a.out_channels for a, b in pairwise(main) if a.out_channels != getattr(b, "out_channels", 0)] == [
        16,
        32,
        64,
    ]  # type: ignore[union-attr]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_file_of_cifar10_has_an_image_in_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10"
    folder.mkdir()
    monkeypatch.setenv("FEDBASIN_DATA", str(tmp_path))
    monkeypatch.setattr(cifar10, "intact", lambda source, folder: True)
    rows = np.random.default_rng(1).integers(0, 256, (6, 1024, 3), dtype=np.uint8)
    for name, part in (("data_batch_1", rows[:2]), ("data_batch_2", rows[2:4]), ("test_batch", rows[4:])):
        Image.fromarray(part).save(folder / f"{name}.png")
    for split, labels in (("train", [3, 1, 4, 1]), ("test", [5, 9])):
        (folder / f"{split}_lables.json").write_text(json.dumps(labels))
    examples, none = cifar10.Cifar10(limit=3).data({})
    assert (len(examples), len(none)) == (3, 0)  # type: ignore[arg-type]
    image, label = examples[2]
    assert (label, image.shape) == (4, (3, 32, 32))
    assert image[1, 2, 5] == pytest.approx(rows[2, 2 * 32 + 5, 1] / 255)
    assert [int(label) for _, label in cifar10.Cifar10(tested=2).test_data()] == [5, 9]  # type: ignore[attr-defined]
