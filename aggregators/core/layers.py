"""Linear and convolutional layers as matrices: what Gram matrices of inputs and of gradients speak of."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .update import GlobalModel, Tensors


class Layer(NamedTuple):
    """A layer as one matrix W̃ = [W, b], (out, in + 1), a convolution's W as (out, channels · kernel).

    `bias` is None, and W̃ = W, where the layer has none or it does not train.
    """

    weight: str
    bias: str | None
    shape: torch.Size

    def sizes(self) -> dict[str, int]:
        """How many rows and columns each kind of Gram matrix has; x̃ = [x, 1] whether or not there is a bias."""
        return {"gram": prod(self.shape[1:]) + 1, "grad_gram": self.shape[0]}

    def matrix(self, params: Tensors) -> Tensor:
        """W̃ in float64."""
        weight = params[self.weight].double().flatten(1)
        return weight if self.bias is None else torch.cat([weight, params[self.bias].double()[:, None]], 1)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parameters in W̃, by name."""
        weight = {self.weight: matrix[:, : prod(self.shape[1:])].reshape(self.shape)}
        return weight if self.bias is None else {**weight, self.bias: matrix[:, -1]}

    def gram(self, gram: Tensor, off_diagonal: float) -> Tensor:
        """The Gram matrix of what W̃ multiplies, float64, the entries off its diagonal times `off_diagonal`."""
        size = prod(self.shape[1:]) + (self.bias is not None)
        scaled = gram[:size, :size].double() * off_diagonal
        scaled.diagonal().copy_(gram.diagonal()[:size])
        return scaled


def find(model: GlobalModel, name: str) -> Layer | None:
    """The layer whose weight is the parameter `name`.weight, if that one trains and is a matrix or a kernel."""
    weight, bias = (f"{name}.{part}".removeprefix(".") for part in ("weight", "bias"))
    if weight not in model.trainable or weight not in model.params:
        return None
    shape = model.params[weight].shape
    if len(shape) < 2 or not shape.numel():
        return None
    biased = bias in model.trainable and bias in model.params and model.params[bias].shape == shape[:1]
    return Layer(weight, bias if biased else None, shape)


def layer(model: GlobalModel, name: str) -> Layer:
    """The layer of that name; ValueError where the model has none."""
    found = find(model, name)
    if found is None:
        raise ValueError(f"Gram matrices of {name!r}, which is no layer of this model that trains")
    return found


def channels(model: GlobalModel, name: str) -> int | None:
    """How many channels the layer of that name puts out, or the batch norm takes; None where the model has neither."""
    own = (f"{name}.{part}".removeprefix(".") for part in ("weight", "running_mean"))
    shapes = [model.params[tensor].shape for tensor in own if tensor in model.params]
    return next((shape[0] for shape in shapes if shape), None)
