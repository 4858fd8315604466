"""A client's own images: a folder with `images.npy` and `labels.npy`, as `numpy.save` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[Any]
Labels: TypeAlias = NDArray[np.int64]


class Labelled(NamedTuple):
    """Images of shape (n, height, width), integers up to the task's white or floats in [0, 1]; labels (n,)."""

    images: Pixels
    labels: Labels


def own_data(folder: Path, shape: tuple[int, int], white: int, num_classes: int) -> Labelled:
    """The examples in `folder`; one-line FileNotFoundError or ValueError that names what is wrong with which file.

    `images.npy`: (n, *shape), integers in 0 … `white` or floats in [0, 1]. `labels.npy`: (n,), integers in
    0 … num_classes − 1. Pickled objects are refused.
    """
    images, labels = _load(folder / "images.npy"), _load(folder / "labels.npy")
    if images.shape[1:] != shape or not len(images):
        raise ValueError(f"{folder}/images.npy has shape {images.shape}: this task takes (n, {shape[0]}, {shape[1]})")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{folder}/labels.npy has shape {labels.shape}: {len(images)} images take ({len(images)},)")
    _check_range(folder / "images.npy", images, 1 if images.dtype.kind == "f" else white, "iuf")
    _check_range(folder / "labels.npy", labels, num_classes - 1, "iu")
    return Labelled(images, labels.astype(np.int64))


def _load(path: Path) -> NDArray[Any]:
    """The array in `path`, mapped and not yet read."""
    try:
        return open_memmap(path, mode="r")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: write it with numpy.save, or correct data=FOLDER") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no array of numbers ({error}): write it with numpy.save") from error


def _check_range(path: Path, values: NDArray[Any], top: int, kinds: str) -> None:
    if values.dtype.kind not in kinds:
        raise ValueError(f"{path} holds {values.dtype}: convert it to integers{' or floats' * ('f' in kinds)}")
    if not ((values >= 0) & (values <= top)).all():
        raise ValueError(f"{path} holds {values.dtype} outside 0 … {top}: rescale or remove them")
