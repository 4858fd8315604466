"""Classifying small grey images: what the tasks on digits, MNIST and Fashion-MNIST have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import TensorDataset

from aggregators.core.seed import derive_seed
from client.task import Examples, Node, Task
from client.tasks.own_data import Labelled, Labels, Pixels, own_data
from client.tasks.partition import Scheme, Split, parts, place


class Images(Task, ABC):
    """Images of one channel with labels 0 … 9, split among the clients or brought by each.

    A client's `partition-id` and `num-partitions` choose its part of the training set; one with data of its own
    names their folder as `data` instead (see `own_data`). Examples are (image, label): float32 of shape
    (1, height, width) in [0, 1], and int64. Options: `partition` is explained at `partition.parts`; `limit` is how
    many examples of the training set are split at all, None for all; `validation` is the share of its examples that
    a client holds out.
    """

    num_classes: ClassVar[int] = 10
    shape: ClassVar[tuple[int, int]]
    white: ClassVar[int]  # the brightest integer pixel

    partition: Scheme = "dirichlet"
    alpha: float = Field(0.5, gt=0, le=1e6)
    labels_per_client: int = Field(2, ge=1)
    partition_seed: int = Field(0, ge=0)
    limit: int | None = Field(None, ge=1)
    validation: float = Field(0.2, ge=0, lt=1)

    @abstractmethod
    def train_set(self) -> Labelled:
        """The examples that are split among the clients."""

    @abstractmethod
    def test_set(self) -> Labelled:
        """The examples that no client holds."""

    @final
    def data(self, node: Node) -> tuple[Examples, Examples]:
        """The training and validation examples of the client whose node configuration is `node`.

        ValueError or FileNotFoundError in one line, where the node configuration or its folder is wrong.
        """
        images, labels = self._own(node) if "data" in node else self._part(node)
        seed = derive_seed(self.partition_seed, "validation", node.get("partition-id"))
        order = np.random.default_rng(seed).permutation(len(labels))
        held, kept = np.split(order, [int(self.validation * len(order))])
        return self._examples(images[kept], labels[kept]), self._examples(images[held], labels[held])

    @final
    def test_data(self) -> Examples:
        """The test set."""
        return self._examples(*self.test_set())

    def _own(self, node: Node) -> Labelled:
        return own_data(Path(str(node["data"])).expanduser(), self.shape, self.white, self.num_classes)

    def _part(self, node: Node) -> Labelled:
        part, num = place(node)
        images, labels = self.train_set()
        used = np.random.default_rng(self.partition_seed).permutation(len(labels))[: self.limit]
        split = Split(self.partition, self.alpha, self.labels_per_client, self.partition_seed)
        held = used[parts(labels[used], num, split)[part]]
        return Labelled(images[held], labels[held])

    def _examples(self, images: Pixels, labels: Labels) -> Examples:
        scale = 1 if images.dtype.kind == "f" else self.white
        pixels = np.asarray(images, dtype=np.float32)[:, None] / scale
        return TensorDataset(torch.from_numpy(pixels), torch.from_numpy(labels))
