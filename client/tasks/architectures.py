"""The networks of the tasks that ship, as plain sequences of named layers; all return scores of shape (n, 10)."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn


def mlp(*widths: int) -> nn.Module:
    """A multi-layer perceptron with ReLU between its linear layers: inputs, hidden layers and outputs by width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for depth, (fan_in, fan_out) in enumerate(pairwise(widths[:-1]), start=1):
        layers[f"hidden{depth}"] = nn.Linear(fan_in, fan_out)
        layers[f"relu{depth}"] = nn.ReLU()
    layers["output"] = nn.Linear(widths[-2], widths[-1])
    return nn.Sequential(layers)


def convnet() -> nn.Module:
    """The ConvNet of 21,840 parameters for 28 × 28 images, with dropout, of the paper on SSF (its MNIST runs)."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 10, kernel_size=5),  # 28 -> 24
            pool1=nn.MaxPool2d(2),  # -> 12
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(10, 20, kernel_size=5),  # -> 8
            dropout2=nn.Dropout2d(),
            pool2=nn.MaxPool2d(2),  # -> 4
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),  # 20 · 4 · 4 = 320
            hidden=nn.Linear(320, 50),
            relu3=nn.ReLU(),
            dropout3=nn.Dropout(),
            output=nn.Linear(50, 10),
        )
    )


def convnet_bn(side: int) -> nn.Module:
    """A convolutional network with batch normalisation, so with buffers, for images of `side` × `side` pixels."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, kernel_size=3, padding=1),
            norm1=nn.BatchNorm2d(16),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, kernel_size=3, padding=1),
            norm2=nn.BatchNorm2d(32),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            output=nn.Linear(32 * (side // 4) ** 2, 10),
        )
    )
