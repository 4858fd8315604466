"""Image tasks whose data lie in IDX files, the format of the MNIST family."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from abc import ABC
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import ClassVar, Literal, final

import numpy as np
from torch import nn

from client.tasks.architectures import convnet, convnet_bn, mlp
from client.tasks.images import Images
from client.tasks.own_data import Labelled, Pixels

UBYTES = b"\x00\x00\x08"  # how an IDX file of unsigned bytes begins


class IdxImages(Images, ABC):
    """Images of 28 × 28 pixels from the folder `folder` of the data folder: 60,000 to train on and 10,000 to test.

    The files are named train-images-idx3-ubyte, train-labels-idx1-ubyte and t10k-… as published, plain or with .gz.
    """

    shape: ClassVar[tuple[int, int]] = (28, 28)
    white: ClassVar[int] = 255
    folder: ClassVar[str]

    architecture: Literal["convnet", "convnet_bn", "mlp"] = "convnet"

    @final
    def model(self) -> nn.Module:
        """`convnet` (21,840 parameters), `convnet_bn`, or `mlp`: a perceptron with three hidden layers of 512."""
        match self.architecture:
            case "convnet":
                return convnet()
            case "convnet_bn":
                return convnet_bn(side=28)
            case "mlp":
                return mlp(28 * 28, 512, 512, 512, 10)

    @final
    def train_set(self) -> Labelled:
        """The official training set."""
        return self._read("train")

    @final
    def test_set(self) -> Labelled:
        """The official test set."""
        return self._read("t10k")

    def _read(self, split: str) -> Labelled:
        folder = data_folder() / self.folder
        images, labels = (read(folder / f"{split}-{name}-ubyte") for name in ("images-idx3", "labels-idx1"))
        if images.shape != (len(labels), *self.shape):
            raise ValueError(
                f"{folder}: {split} images {images.shape} do not fit {len(labels)} labels: run `make data`"
            )
        return Labelled(images, labels.astype(np.int64))


def data_folder() -> Path:
    """Where downloaded data lie on this machine: $FEDBASIN_DATA, else fedbasin in $XDG_DATA_HOME or ~/.local/share."""
    share = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    return Path(os.environ.get("FEDBASIN_DATA") or share / "fedbasin").expanduser()


def read(path: Path) -> Pixels:
    """The array of unsigned bytes in the IDX file `path`, or in `path`.gz; ValueError unless it is one, and whole."""
    content = uncompressed(path)
    ndim = content[3] if len(content) > 3 else 0
    header = 4 + 4 * ndim
    if content[:3] != UBYTES or len(content) < header:
        raise ValueError(f"{path} is no IDX file of unsigned bytes: delete it and run `make data`")
    shape = struct.unpack_from(f">{ndim}I", content, offset=4)
    if len(content) != header + prod(shape):
        raise ValueError(f"{path} does not hold the {shape} bytes it announces: delete it and run `make data`")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def uncompressed(path: Path) -> bytes | mmap:
    """The bytes of `path`, mapped and not yet read, or else those of `path`.gz."""
    packed = path.with_name(f"{path.name}.gz")
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            return mmap(file.fileno(), length=0, access=ACCESS_READ)
    if not packed.exists():
        raise FileNotFoundError(f"{path} is missing or empty: run `make data`, or correct FEDBASIN_DATA")
    try:
        return gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{packed} cannot be read ({error}): delete it and run `make data`") from error
