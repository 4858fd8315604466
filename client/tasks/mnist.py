"""MNIST: handwritten digits of 28 × 28 pixels."""

from __future__ import annotations

from typing import ClassVar, final

from client.tasks.idx import IdxImages


@final
class Mnist(IdxImages):
    """MNIST (LeCun et al. 1998), fetched by `make data`."""

    folder: ClassVar[str] = "mnist"
