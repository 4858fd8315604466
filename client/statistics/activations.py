"""Gram matrices of what enters layers and of the gradients by what leaves them: what RegMean and K-FAC ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.data import Subset

from aggregators.core.functional import computed, evaluating
from aggregators.core.update import Estimator, Gradients, Request, Tensors

from ..task import Examples, Task, is_private
from ..training import Batch, seeded
from .estimators import chosen, chunks, refusal, scored
from .per_example import changed, plain_attention, widened

BLOCK = 2**20  # entries of rows in float64 at once

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer: TypeAlias = nn.Linear | Convolution
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Grams(NamedTuple):
    """Σ x̃ x̃ᵀ and Σ δ δᵀ by layer, float32, empty where not asked for, of `num_grads` examples."""

    gram: Tensors
    grad_gram: Tensors
    num_grads: int
    estimator: Estimator | None


class Unmeasurable(ValueError):
    """A model that calls no layer of which such statistics can be taken."""

    def __init__(self, task: Task, statistics: str) -> None:
        super().__init__(
            f"{type(task).__name__}'s model calls no linear or convolutional layer that could be measured:"
            f" choose a method that does not ask for {statistics}"
        )


def grams(task: Task, model: nn.Module, examples: Examples, request: Request, *, seed: int) -> Grams:
    """Sums over examples of outer products, by name of each linear or convolutional layer whose weight trains.

    `gram`, (in + 1, in + 1): Σ x̃ x̃ᵀ with x̃ = [x, 1] whether or not the layer has a bias, so that the last entry
    counts rows; of a convolution x is a patch in the order of weight.reshape(out, in), one at every position.
    `grad_gram`, (out, out): Σ δ δᵀ with δ the gradient of log p(y|x), or of y's raw score, by what the layer puts out,
    at every position; the estimator says for which y, as for `gradients`, whose examples and labels these are.
    A layer called several times, and layers that share weight and bias, sum over their calls, under the name of the
    parameter. Left out are grouped convolutions, subclasses of layers, layers that were never called, private ones,
    and weights shared with anything else or by layers of different biases.

    In eval mode; an example's outputs must not depend on its batch. Half precision goes in float32, sums are in
    float64. Time: a forward pass, with `grad_gram` a backward one for every label (without gradients of weights), and
    O(rows · (in² + out²)); memory a chunk's activations and the float64 sums. Source: Jin et al. 2023 (RegMean);
    Martens and Grosse 2015, section 3; for convolutions Grosse and Martens 2016, section 3 (K-FAC).

    ValueError where the model has no such layer, or the estimator needs labels that the task does not have.
    """
    asked = request.gradients or Gradients()
    if request.grad_gram and (reason := refusal(task, asked.estimator)):
        raise ValueError(reason)
    layers = plain_layers(model, task.private, _has_gram)
    with evaluating(model), seeded(seed), plain_attention(), torch.set_grad_enabled(request.grad_gram):
        sample = chosen(examples, asked.limit)
        sums = _sums(task, model, layers, sample, request)
    if len(sample) and not (sums.gram or sums.grad_gram):
        raise Unmeasurable(task, "Gram matrices")
    return Grams(
        gram={name: total.float() for name, total in sums.gram.items()},
        grad_gram={name: total.float() for name, total in sums.grad_gram.items()},
        num_grads=len(sample),
        estimator=asked.estimator if request.grad_gram else None,
    )


def plain_layers(
    model: nn.Module, private: tuple[str, ...], suits: Callable[[Layer], bool] = lambda layer: True
) -> list[tuple[str, Layer]]:
    """Layers by name; those that share weight and bias stand under one name, that of the parameter.

    Left out are subclasses of layers, private ones, and weights shared with anything else, by layers of different
    biases, or by one that does not suit.
    """
    holders: dict[Tensor, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            holders[param].append(module)
    found = []
    for name, param in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and not is_private(name, private):
            found += [(layer, module) for module in _alike(holders[param], suits)]
    return found


def _alike(holders: Sequence[nn.Module], suits: Callable[[Layer], bool]) -> list[Layer]:
    """The modules that hold one parameter, if all are plain layers of one bias that suit; else none."""
    plain = [module for module in holders if isinstance(module, KINDS) and type(module) in KINDS]
    whole = len(plain) == len(holders) and all(map(suits, plain))
    return plain if whole and len({id(layer.bias) for layer in plain}) == 1 else []


def _has_gram(layer: Layer) -> bool:
    return layer.weight.requires_grad and not isinstance(layer, nn.Conv3d) and getattr(layer, "groups", 1) == 1


@dataclass(eq=False)
class _Sums:
    """Float64 sums by layer, and of the chunk under way what was added to the outputs of each call, in order."""

    request: Request
    gram: dict[str, Tensor] = field(default_factory=dict)
    grad_gram: dict[str, Tensor] = field(default_factory=dict)
    shifts: list[tuple[str, Layer, Tensor]] = field(default_factory=list)

    def called(self, name: str, layer: Layer, x: Tensor, output: Tensor) -> Tensor:
        """Adds what entered the layer; the output, shifted by zeros that it can be differentiated by."""
        if self.request.gram:
            _add(self.gram, name, _inputs(layer, x.detach()))
        if not self.request.grad_gram:
            return output
        self.shifts.append((name, layer, torch.zeros_like(output).requires_grad_()))
        return output + self.shifts[-1][2]

    def differentiate(self, scores: Tensor) -> None:
        """Adds δ δᵀ of the scores, (B,), each a function of one example."""
        nothing = torch.zeros((), requires_grad=True)  # a model may detach its layers
        leaves = [shift for _, _, shift in self.shifts]
        deltas = torch.autograd.grad(
            scores.sum() + nothing, [*leaves, nothing], retain_graph=True, materialize_grads=True
        )
        for (name, layer, _), delta in zip(self.shifts, deltas, strict=False):
            _add(self.grad_gram, name, channel_rows(layer, delta))


def _sums(
    task: Task, model: nn.Module, layers: list[tuple[str, Layer]], examples: Subset[Batch], request: Request
) -> _Sums:
    sums, estimator = _Sums(request), (request.gradients or Gradients()).estimator
    run = partial(computed, model, detached(model))

    def add(inputs: Tensor, targets: Tensor, uniform: Tensor) -> None:
        with changed(layers, sums.called):
            outputs = run(widened(inputs))
        if request.grad_gram:
            scores, weights = scored(task, outputs, targets, estimator, uniform)
            for weighted in (scores * weights.sqrt()).unbind(1):
                sums.differentiate(weighted)
            sums.shifts.clear()

    for (inputs, targets), uniform, _ in chunks(examples):
        add(inputs, targets, uniform)  # whose graph is gone before the next
    return sums


def detached(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers by name, in float32 where they are in half precision."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: widened(tensor.detach()) for name, tensor in tensors}


def _add(sums: dict[str, Tensor], name: str, rows: Iterable[Tensor]) -> None:
    """Adds Σ r rᵀ over all rows r, which come in blocks."""
    for block in rows:
        wide = block.double()
        sums.setdefault(name, wide.new_zeros(block.shape[1], block.shape[1])).addmm_(wide.T, wide)


def _inputs(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    """[x, 1] of every row or patch that the layer sees, (n, in + 1), in blocks."""
    blocks = _split(x.reshape(-1, x.shape[-1])) if isinstance(layer, nn.Linear) else _patches(layer, x)
    return (pad(block, (0, 1), value=1.0) for block in blocks)


def channel_rows(layer: Layer | BatchNorm, x: Tensor) -> Iterator[Tensor]:
    """What leaves a layer, or enters a batch norm, at every row or position, (n, channels), in blocks."""
    axis = -1 - len(layer.kernel_size) if isinstance(layer, Convolution) else 1 if isinstance(layer, BatchNorm) else -1
    return _split(x.movedim(axis, -1).reshape(-1, x.shape[axis]))


def _patches(layer: Convolution, x: Tensor) -> Iterator[Tensor]:
    """What the kernel sees at each position of each image, (n, in), channels first; a 1-d image is one row high."""
    images = x.reshape(-1, *x.shape[-1 - len(layer.kernel_size) :])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    padded = padded if padded.ndim == 4 else padded.unsqueeze(2)
    kernel, dilation, stride = ((1, *size)[-2:] for size in (layer.kernel_size, layer.dilation, layer.stride))
    for part in torch.split(padded, max(1, BLOCK // (prod(kernel) * padded.shape[1:].numel()))):
        yield unfold(part, kernel, dilation=dilation, stride=stride).transpose(1, 2).flatten(0, 1)


def _split(rows: Tensor) -> Iterator[Tensor]:
    yield from torch.split(rows, max(1, BLOCK // max(1, rows.shape[1])))
