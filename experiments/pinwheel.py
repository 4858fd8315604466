"""PINWHEEL, its network of 400 parameters, and clients that train it side by side."""

from __future__ import annotations

from collections.abc import Sequence
from math import tau
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from aggregators.core.seed import derive_seed
from aggregators.core.update import Tensors
from client.task import Examples, Node, Task

CLASSES, POINTS = 5, 5000
TRAIN, VALIDATION = 350, 50  # of them; the rest is held out
RADIAL_SD, TANGENTIAL_SD, RATE = 0.3, 0.05, 0.25
BATCH, WEIGHT_DECAY = 100, 0.01


class Pinwheel(Task):
    """Five arms of a spiral in the plane (Johnson et al. 2016, section 4), told apart by 400 parameters."""

    num_classes: ClassVar[int] = CLASSES

    seed: int = 0

    def model(self) -> nn.Module:
        """A perceptron 2-16-16-5 with ReLU, its last layer without bias."""
        hidden = (nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        return nn.Sequential(*hidden, nn.Linear(16, CLASSES, bias=False))

    def data(self, node: Node) -> tuple[Examples, Examples]:
        """350 points to train on and 50 to validate with, the same for every client."""
        return self._points(0, TRAIN), self._points(TRAIN, TRAIN + VALIDATION)

    def test_data(self) -> Examples:
        """The other 4,600 points."""
        return self._points(TRAIN + VALIDATION, POINTS)

    def _points(self, start: int, stop: int) -> Examples:
        return TensorDataset(*(part[start:stop] for part in points(POINTS, self.seed)))


def points(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points in random order, (num, 2) float32, and their classes, equally many of each, (num,) int64.

    A point lies around (1, 0), spread along its arm, and is turned by the angle of its class, the further the farther
    out it is.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "pinwheel"))
    labels = torch.arange(CLASSES).repeat(num // CLASSES)[torch.randperm(num, generator=generator)]
    x, y = (torch.randn(num, 2, generator=generator) * torch.tensor([RADIAL_SD, TANGENTIAL_SD])).unbind(1)
    x = x + 1
    angle = labels * tau / CLASSES + RATE * x.exp()
    return torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], 1), labels


class Schedule(NamedTuple):
    """How one client trains: plain SGD on batch means, in an order of its own."""

    learning_rate: float
    epochs: int
    seed: int


def train(start: Tensors, inputs: Tensor, labels: Tensor, schedules: Sequence[Schedule]) -> list[Tensors]:
    """Each client's parameters, all from `start` on the same points; trained in one stack, each as if alone."""
    stack = [value.repeat(len(schedules), *[1] * value.ndim).requires_grad_() for value in start.values()]
    generators = [torch.Generator().manual_seed(schedule.seed) for schedule in schedules]
    for epoch in range(max(schedule.epochs for schedule in schedules)):
        rates = torch.tensor([s.learning_rate if epoch < s.epochs else 0.0 for s in schedules])
        order = torch.stack([torch.randperm(len(labels), generator=generator) for generator in generators])
        for batch in torch.split(order, BATCH, dim=1):
            _step(stack, inputs[batch], labels[batch], rates)
    return [dict(zip(start, (values[k].detach() for values in stack), strict=True)) for k in range(len(schedules))]


def _step(stack: Sequence[Tensor], inputs: Tensor, labels: Tensor, rates: Tensor) -> None:
    scores = _scores(stack, inputs)
    total = cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]
    grads = torch.autograd.grad(total, stack)
    with torch.no_grad():
        for param, grad in zip(stack, grads, strict=True):
            param.sub_(rates.view(-1, *[1] * (param.ndim - 1)) * (grad + WEIGHT_DECAY * param))


def _scores(stack: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """What N networks make of N batches, (N, B, 2): weights and biases in turn, ReLU between, no bias at the end."""
    *hidden, last = stack
    for weight, bias in zip(hidden[::2], hidden[1::2], strict=True):
        inputs = torch.baddbmm(bias[:, None], inputs, weight.mT).relu()
    return torch.bmm(inputs, last.mT)
