"""Fashion-MNIST: clothes of 28 × 28 pixels, in ten kinds."""

from __future__ import annotations

from typing import ClassVar, final

from client.tasks.idx import IdxImages


@final
class FashionMnist(IdxImages):
    """Fashion-MNIST (Xiao et al. 2017), fetched by `make data`."""

    folder: ClassVar[str] = "fashion-mnist"
