"""What a user brings to a federation: a model, data and a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import ClassVar, Self, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.data import Dataset

from aggregators.core.registry import as_mapping, external, unknown, validated
from aggregators.core.symmetry import Symmetry

from .tasks import SHIPPED

Node: TypeAlias = Mapping[str, "str | int | float | bool"]  # a client's --node-config
Examples: TypeAlias = "Dataset[tuple[Tensor, ...]]"  # (input, target) pairs


class Task(BaseModel, ABC):
    """The model, data and loss of a federation; subclass it and name it in the configuration as `module:Class`.

    Fields of a subclass are its options, settable in the configuration. `num_classes` is the number of labels of a
    classification task, whose outputs are (batch, num_classes) scores; None for any other task, which then can
    estimate gradient statistics from its own targets only (`empirical`). Parameters whose name matches a pattern in
    `private` (shell wildcards) never leave the client. Options in `local`, such as a width, each client may set for
    itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_classes: ClassVar[int | None] = None
    private: ClassVar[tuple[str, ...]] = ()
    local: ClassVar[tuple[str, ...]] = ()

    def at(self, node: Node) -> Self:
        """The task with the options that this client sets for itself: `task.OPTION` in its node configuration."""
        own = {key.removeprefix("task."): value for key, value in node.items() if key.startswith("task.")}
        if refused := own.keys() - {*self.local}:
            allowed = ", ".join(self.local) or "none"
            raise ValueError(
                f"task.{min(refused)}: a client may set for itself {allowed} of {type(self).__name__}:"
                " remove it from the node configuration"
            )
        return validated(type(self), {**self.model_dump(), **own}) if own else self

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

    def example(self) -> Tensor:
        """A batch of two inputs, whose values do not matter: methods that align networks trace the model with it."""
        if (examples := self.test_data()) is None:
            raise ValueError(f"{type(self).__name__} has no test_data: let its `example` return a batch of two inputs")
        return torch.stack([examples[index][0] for index in range(2)])

    def symmetry(self, model: nn.Module) -> Symmetry:
        """Which units of the model can be permuted: traced, unless overridden, and verified by the server."""
        from aggregators.core.tracing import trace  # torch.export, which clients do not need

        return trace(model, self.example())


def parse(config: str) -> Task:
    """The task that `config` describes: the name of one that ships, `module:Class`, or a JSON object with `kind`.

    Raises ValueError in one line that names the key, the value and what is allowed.
    """
    mapping = dict(as_mapping(config))
    kind = mapping.pop("kind")
    if ":" not in kind and kind not in SHIPPED:
        raise ValueError(unknown("task", kind, [*SHIPPED, "module:Class"]))
    task: Task = validated(external(SHIPPED.get(kind, kind), Task), mapping)
    return task


def tensors(model: nn.Module, private: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each tensor once, in the order of the state dict; views, no copies.

    Names that match a pattern in `private` are left out.
    """
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and not is_private(name, private):
            found[name] = tensor.detach()
        seen.add(id(tensor))
    return found


def is_private(name: str, private: tuple[str, ...]) -> bool:
    """Whether `name` matches a pattern in `private`."""
    return any(fnmatchcase(name, pattern) for pattern in private)


@torch.no_grad()
def load(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies `values` into the model's tensors; ValueError where a name is unknown or a shape differs."""
    own = tensors(model)
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            mine = f"of shape {tuple(own[name].shape)}" if name in own else "absent"
            raise ValueError(f"received {name} of shape {tuple(value.shape)}; in this client's model it is {mine}")
        own[name].copy_(value)
