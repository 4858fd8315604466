"""What a user brings to a federation: a model, data and a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import ClassVar, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.data import Dataset

Node: TypeAlias = Mapping[str, "str | int | float | bool"]  # a client's --node-config
Examples: TypeAlias = "Dataset[tuple[Tensor, Tensor]]"  # (input, target) pairs


class Task(BaseModel, ABC):
    """The model, data and loss of a federation; subclass it and name it in the configuration as `module:Class`.

    Fields of a subclass are its options, settable in the configuration. `num_classes` is the number of labels of a
    classification task, whose outputs are (batch, num_classes) scores; None for any other task, which then can
    estimate gradient statistics from its own targets only (`empirical`). Parameters whose name matches a pattern in
    `private` (shell wildcards) never leave the client.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_classes: ClassVar[int | None] = None
    private: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def model(self) -> nn.Module:
        """A newly initialised model; the caller seeds torch's generator."""

    @abstractmethod
    def data(self, node: Node) -> tuple[Examples, Examples]:
        """The training and validation examples of the client whose node configuration is `node`."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each example, shape (batch,); cross-entropy unless overridden."""
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Score of each example in [0, 1], shape (batch,): whether the likeliest label is right."""
        return (outputs.argmax(dim=-1) == targets).to(torch.float32)

    def test_data(self) -> Examples | None:
        """Held-out examples on the server, or None when it has none."""
        return None
