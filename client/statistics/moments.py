"""Means and variances of activations, and how far the units of two models agree: what REPAIR and matching ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.data import DataLoader, Subset

from aggregators.core.fitting import fit
from aggregators.core.functional import computed, evaluating
from aggregators.core.update import Gradients, Moments, Request, Tensors

from ..task import Examples, Task, is_private
from ..training import Batch, seeded
from .activations import BLOCK, Layer, Unmeasurable, channel_rows, detached, plain_layers
from .estimators import CHUNK, chosen
from .per_example import changed, widened

ROUNDING = torch.finfo(torch.float32).eps


def moments(task: Task, model: nn.Module, examples: Examples, request: Request, *, seed: int) -> dict[str, Moments]:
    """Count, mean and summed squared deviations of channels over examples and positions, by name of the module.

    Of what leaves every linear or convolutional layer, its pre-activation, and of what enters every batch norm; a
    module called several times pools its calls. Named and left out are layers as for `grams`, but that grouped,
    3-d and frozen ones are measured too. Examples are the first or, with a limit, those of `grams`.

    In eval mode. With `batch_stats` batch norms go by the statistics of their batch, at most 128 examples at random,
    as in training: one pass then tells what enters each of them when those before it are re-estimated. Half precision
    goes in float32; sums are combined in float64 and sent in float32, shapes (channels,). Source: Chan, Golub and
    LeVeque 1983, "Algorithms for Computing the Sample Variance". ValueError where nothing can be measured.
    """
    sites = [*plain_layers(model, task.private), *_batch_norms(model, task.private)]
    found: dict[str, Running] = defaultdict(Running)

    def add(name: str, site: Layer | BatchNorm, x: Tensor, output: Tensor) -> Tensor:
        for block in channel_rows(site, x if isinstance(site, BatchNorm) else output):
            found[name].add(block.double())
        return _by_batch(site, x) if isinstance(site, BatchNorm) and request.batch_stats else output

    own, limit = detached(model), (request.gradients or Gradients()).limit
    with evaluating(model), seeded(seed), torch.no_grad(), changed(sites, add):
        for inputs, _ in _batches(examples, limit, shuffled=request.batch_stats):
            computed(model, own, widened(inputs))
    if not found and len(examples):  # type: ignore[arg-type]
        raise Unmeasurable(task, "moments")
    return {name: running.moments() for name, running in found.items()}


def correlations(
    task: Task, model: nn.Module, anchor: Tensors, examples: Examples, request: Request, *, seed: int
) -> dict[str, Tensor]:
    """Pearson's correlations of each unit of the model with each of the anchor, (units, units), by name of the layer.

    Σ â b̂ᵀ over the same examples and positions, a what leaves a linear or convolutional layer of the model, b of the
    anchor, which may have other widths, each unit moved and scaled to Σ â = 0, Σ â² = 1; a row or column of 0 for a
    constant unit. Layers and examples are those of `moments`, in eval mode. Parameters that the anchor lacks, private
    ones, are the model's.

    Pre-activations: a layer's channels are units one to one, whereas what enters the next may be flattened maps.
    Correlations: ReLU networks may scale units at will, and nothing else is free of it. Half precision goes in
    float32, sums in float64. Two forward passes, and O(rows · units²) for each layer; memory the outputs of both models
    for 128 examples. Source: Li et al. 2016, "Convergent Learning", section 3. ValueError where nothing can be
    measured.
    """
    own = detached(model)
    found: dict[str, Pair] = defaultdict(Pair)
    with evaluating(model), seeded(seed), torch.no_grad():
        other = own | {name: widened(value) for name, value in anchor.items()}
        sides = [(model, own), (_sized(model, anchor), other)]
        for inputs, _ in _batches(examples, (request.gradients or Gradients()).limit):
            a, b = (_outputs(one, tensors, plain_layers(one, task.private), inputs) for one, tensors in sides)
            for (name, rows), (_, others) in zip(a, b, strict=True):
                found[name].add(rows, others)
    if not found and len(examples):  # type: ignore[arg-type]
        raise Unmeasurable(task, "cross-moments")
    return {name: pair.correlation() for name, pair in found.items()}


@dataclass(eq=False)
class Running:
    """Count, mean and summed squared deviations of the rows so far, float64."""

    num: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    m2: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, rows: Tensor) -> Tensor:
        """Adds rows, (n, channels); the n + 1 deviations that this adds to sums of squares and products."""
        total, mean = self.num + len(rows), rows.mean(0)
        gap = mean - self.mean
        deviations = torch.cat([rows - mean, (self.num * len(rows) / total) ** 0.5 * gap[None]])
        self.m2 = self.m2 + deviations.square().sum(0)
        self.mean = self.mean + len(rows) / total * gap
        self.num = total
        return deviations

    def moments(self) -> Moments:
        """What is sent."""
        return Moments(self.num, self.mean.float(), self.m2.float())

    def scale(self) -> Tensor:
        """1 / √m2, and 0 where what varies is the rounding of float32."""
        varies = self.m2 > self.num * (ROUNDING * self.mean).square()
        return torch.where(varies, self.m2.rsqrt(), 0.0)


@dataclass(eq=False)
class Pair:
    """The rows so far of two models, and the summed products of their deviations, float64."""

    a: Running = field(default_factory=Running)
    b: Running = field(default_factory=Running)
    products: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, a: Tensor, b: Tensor) -> None:
        """Adds rows of the same examples and positions, in blocks."""
        size = max(1, BLOCK // (a.shape[1] + b.shape[1]))
        for x, y in zip(torch.split(a, size), torch.split(b, size), strict=True):
            self.products = self.products + self.a.add(x.double()).T @ self.b.add(y.double())

    def correlation(self) -> Tensor:
        """Of every unit of one with every unit of the other, float32; 0 where a model's outputs overflow."""
        return (self.a.scale()[:, None] * self.products * self.b.scale()).float().nan_to_num(0, 0, 0)


def _sized(model: nn.Module, params: Tensors) -> nn.Module:
    """A module like the model, of the sizes that `params` has; they share the tensors whose shape stays."""
    tensors = (value for one in model.modules() for value in vars(one).values() if isinstance(value, Tensor))
    shared = {id(value): value for value in [*model.parameters(), *model.buffers(), *tensors]}
    return fit(deepcopy(model, shared), params)


def _outputs(
    model: nn.Module, tensors: Tensors, layers: list[tuple[str, Layer]], inputs: Tensor
) -> list[tuple[str, Tensor]]:
    """What leaves each layer, (n, units), in order of the calls; copies, as what follows may be in place."""
    found: list[tuple[str, Tensor]] = []

    def keep(name: str, layer: Layer, x: Tensor, output: Tensor) -> Tensor:
        found.append((name, torch.cat([*channel_rows(layer, output)])))
        return output

    with changed(layers, keep):
        computed(model, tensors, widened(inputs))
    return found


def _batch_norms(model: nn.Module, private: tuple[str, ...]) -> Iterator[tuple[str, BatchNorm]]:
    """By name; those without a tensor that the server knows are left out."""
    for name, module in model.named_modules():
        own = [part for part in ("weight", "running_mean") if getattr(module, part, None) is not None]
        known = [part for part in own if not is_private(f"{name}.{part}".removeprefix("."), private)]
        if isinstance(module, BatchNorm) and known:
            yield name, module


def _by_batch(norm: BatchNorm, x: Tensor) -> Tensor:
    """What the batch norm puts out in training; its running statistics stay."""
    return batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)


def _batches(examples: Examples, limit: int | None, shuffled: bool = False) -> Iterable[Batch]:
    """Batches as equal in size as can be: with batch norms a small one would speak too loud."""
    num: int = len(examples)  # type: ignore[arg-type]
    sample: Subset[Batch] = chosen(examples, num if shuffled and limit is None else limit)
    parts = torch.arange(len(sample)).tensor_split(max(1, -(-len(sample) // CHUNK)))
    return DataLoader(sample, batch_sampler=[part.tolist() for part in parts if len(part)])
