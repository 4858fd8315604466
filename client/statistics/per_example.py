"""Gradients of single examples, a chunk of examples at a time.

The examples of a chunk go through the model together, yet each alone and with its own copy of the parameters (vmap),
so autograd returns one gradient per example and nothing leaks between them. The weight of a linear layer that every
example uses once, on one row, needs no copies: its gradients δ xᵀ are summed without being formed, since
(δ xᵀ)² = δ² (x²)ᵀ. Examples of a model that vmap cannot take go one by one. torch.func.grad would import torch._dynamo.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from aggregators.core.functional import computed
from aggregators.core.update import Tensors

BLOCK = 2**16  # entries converted to float64 at once: they stay in the cache

L = TypeVar("L", bound=nn.Module)
Change: TypeAlias = Callable[[str, L, Tensor, Tensor], Tensor]  # name, layer, input, output -> output


class Rows(NamedTuple):
    """The gradients g of B examples, (B, P)."""

    g: Tensor

    def add_to(self, total: Tensor, weights: Tensor, power: int) -> None:
        """Adds Σ_b weights[:, b] · g_b^power to `total`; float64, (k, B) and (k, P)."""
        width = max(1, BLOCK // len(self.g))
        for part, g in zip(torch.split(total, width, 1), torch.split(self.g, width, 1), strict=True):
            part.addmm_(weights, g.double().pow(power))


class Outer(NamedTuple):
    """The gradients δ xᵀ of B examples, from (B, out) and (B, in)."""

    delta: Tensor
    x: Tensor

    def add_to(self, total: Tensor, weights: Tensor, power: int) -> None:
        """Adds what the rows of δ xᵀ would."""
        delta, x = self.delta.double().pow(power), self.x.double().pow(power)
        for row, weight in zip(total, weights, strict=True):
            row.view(delta.shape[1], x.shape[1]).addmm_((weight[:, None] * delta).T, x)


class Pass(NamedTuple):
    """The outputs of B examples, (B, ...), and what they can be differentiated by."""

    outputs: Tensor
    copies: Tensors  # (B, *parameter)
    shifts: Tensors  # added to the outputs of single layers: the gradient by them is δ
    inputs: Tensors  # x of single layers

    def gradients(self, scores: Tensor) -> Iterator[tuple[str, Rows | Outer]]:
        """Every parameter's gradients of `scores`, (B,), each a function of one example's outputs."""
        leaves = {**self.copies, **self.shifts}
        grads = torch.autograd.grad(scores.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True)
        for name, grad in zip(leaves, grads, strict=True):
            x = self.inputs.get(name)
            yield name, Rows(_rows(grad)) if x is None else Outer(_rows(grad), _rows(x.detach()))


@dataclass(frozen=True)
class PerExample:
    """A model as a function of examples and of parameters that differ between them."""

    model: nn.Module
    params: Tensors
    buffers: Tensors
    single: Mapping[str, tuple[nn.Linear, Tensor]]  # layers whose weights stay shared, with zeros like their output
    batched: bool = True

    @property
    def width(self) -> int:
        """How many numbers of each example's gradient are formed."""
        return sum(param.numel() for name, param in self.params.items() if name not in self.single)

    def __call__(self, inputs: Tensor) -> Pass:
        """The outputs of inputs (B, ...); they see each example as a batch of its own."""
        copies = {name: _copies(param, len(inputs)) for name, param in self.params.items() if name not in self.single}
        shifts = {name: _copies(zeros, len(inputs)) for name, (_, zeros) in self.single.items()}
        outputs, entered = (vmap(self._one) if self.batched else self._loop)(copies, shifts, widened(inputs))
        return Pass(outputs, copies, shifts, entered)

    def _one(self, params: Tensors, shifts: Tensors, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        entered = {}

        def shift(name: str, layer: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
            entered[name] = x
            return output + shifts[name]

        with changed([(name, layer) for name, (layer, _) in self.single.items()], shift):
            outputs = computed(self.model, {**self.params, **self.buffers, **params}, x[None])
        return outputs[0], entered

    def _loop(self, params: Tensors, shifts: Tensors, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        copies = {name: copy.unbind() for name, copy in params.items()}
        outputs = [self._one({name: c[i] for name, c in copies.items()}, {}, x)[0] for i, x in enumerate(inputs)]
        return torch.stack(outputs), {}


def per_example(model: nn.Module, example: Tensor) -> PerExample:
    """The model, in float32 where it is in half precision, ready for inputs like `example`."""
    params = {name: widened(param.detach()) for name, param in model.named_parameters()}
    buffers = {name: widened(buffer) for name, buffer in model.named_buffers()}
    single = _single(model, {**params, **buffers}, widened(example))
    batched = PerExample(model, params, buffers, single)
    return batched if _runs(batched, example) else replace(batched, single={}, batched=False)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within it, attention is computed step by step: its fused kernels are closed to vmap and to autograd."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _single(model: nn.Module, tensors: Tensors, example: Tensor) -> dict[str, tuple[nn.Linear, Tensor]]:
    """Linear layers called once, on one row, whose weight has no other use: cut there, no gradient reaches it."""
    named = {f"{name}.weight".lstrip("."): layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    layers = {name: layer for name, layer in named.items() if name in tensors}
    weights = {name: tensors[name].detach().requires_grad_() for name in layers}
    calls: dict[str, list[Tensor]] = defaultdict(list)

    def cut(name: str, layer: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        calls[name].append(torch.zeros_like(output))
        return linear(x, layer.weight.detach(), layer.bias)

    with changed(layers.items(), cut):
        outputs = computed(model, {**tensors, **weights}, example[None])
    nothing = torch.zeros((), requires_grad=True)
    elsewhere = torch.autograd.grad(outputs.sum() + nothing, [*weights.values(), nothing], allow_unused=True)
    once = [name for name, grad in zip(weights, elsewhere, strict=False) if grad is None and len(calls[name]) == 1]
    found = {name: (layers[name], calls[name][0]) for name in once}
    return {name: (layer, zeros) for name, (layer, zeros) in found.items() if zeros.numel() == layer.out_features}


def _runs(network: PerExample, example: Tensor) -> bool:
    """Whether vmap has a rule for all that the model does; an error of the model's own will come back in the loop."""
    try:
        twice = network(torch.stack([example, example]))
        list(twice.gradients(twice.outputs.reshape(2, -1).sum(1)))
    except Exception:
        return False
    return True


@contextmanager
def changed(layers: Iterable[tuple[str, L]], change: Change[L]) -> Iterator[None]:
    """Within it, what comes out of these layers is what `change` makes of it."""

    def hook(name: str, layer: L, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        return change(name, layer, x, output)

    with ExitStack() as stack:
        for name, layer in layers:
            stack.enter_context(layer.register_forward_hook(partial(hook, name), prepend=True, with_kwargs=True))
        yield


def _rows(batch: Tensor) -> Tensor:
    return batch.reshape(len(batch), prod(batch.shape[1:]))


def _copies(tensor: Tensor, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape).requires_grad_()


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it is in half precision, itself otherwise."""
    floating = tensor.is_floating_point()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if floating else tensor
