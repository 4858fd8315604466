"""Handwritten digits of 8 × 8 pixels, bundled with scikit-learn: the task that needs no download."""

from __future__ import annotations

from importlib.metadata import version
from typing import ClassVar, Literal, final

import numpy as np
from pydantic import Field
from torch import nn

from client.tasks.architectures import convnet_bn, mlp
from client.tasks.cache import Arrays, cached
from client.tasks.images import Images
from client.tasks.own_data import Labelled

HELD_OUT = 360  # of 1797, a fifth


@final
class Digits(Images):
    """Digits from scikit-learn; 1437 examples for the clients and 360, always the same, for the test."""

    shape: ClassVar[tuple[int, int]] = (8, 8)
    white: ClassVar[int] = 16

    local: ClassVar[tuple[str, ...]] = ("hidden",)

    architecture: Literal["mlp", "convnet_bn"] = "mlp"
    hidden: int = Field(default=64, ge=1)

    def model(self) -> nn.Module:
        """A perceptron with two hidden layers of `hidden` units (64: 8,970 parameters), or `convnet_bn` (6,186)."""
        return mlp(64, self.hidden, self.hidden, 10) if self.architecture == "mlp" else convnet_bn(side=8)

    def train_set(self) -> Labelled:
        """All but the test set."""
        return _select(slice(HELD_OUT, None))

    def test_set(self) -> Labelled:
        """A fixed fifth of the examples."""
        return _select(slice(HELD_OUT))


def _select(which: slice) -> Labelled:
    """Some of the examples, in a fixed random order; from disk, as scikit-learn takes seconds to import."""
    examples = cached(_load, "digits", version("scikit-learn"))
    chosen = np.random.default_rng(0).permutation(len(examples["labels"]))[which]
    return Labelled(examples["images"][chosen], examples["labels"][chosen])


def _load() -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {"images": digits.images.astype(np.uint8), "labels": digits.target.astype(np.int64)}
