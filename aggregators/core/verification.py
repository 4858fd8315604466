"""A symmetry held against its network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .functional import computed, evaluating, once
from .symmetry import Symmetry

REMEDY = "give the task a `symmetry` of its own, or choose a method that needs none"
SHARE = 1e-8  # of what the group's tensors do to the outputs: a permutation that keeps them does less
ROUNDING = 1e4  # units in the last place
DRAWS = 4  # of parameters and inputs, at most
TINY = 1e-300


@torch.no_grad()
def verify(symmetry: Symmetry, module: nn.Module, *inputs: Tensor, seed: int = 0) -> None:
    """Raises ValueError, naming a group, unless permuting or scaling its units at random keeps the outputs.

    In eval mode and float64, at parameters, buffers and inputs away from the module's own, since zeros and ones hide
    what permutes them. A group is refused too if its tensors do nothing to the outputs, which then show no mistake.
    """
    generator = torch.Generator().manual_seed(seed)
    with evaluating(module):
        network, shown = _telling(module, symmetry, inputs, generator)
        bounds = {group: max(SHARE * change, network.rounding) for group, change in shown.items()}
        if mistake := _mistake(network, symmetry, bounds, generator):
            raise ValueError(f"symmetry: {mistake} changes the outputs: {REMEDY}")


@dataclass(frozen=True, eq=False)
class _Network:
    """A network on the CPU, in `dtype` unless None, and parameters, persistent buffers and inputs away from its own."""

    module: nn.Module
    own: Mapping[str, Tensor]
    params: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]
    dtype: torch.dtype | None

    def back(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Its own tensors of these names."""
        return {name: _wide(self.own[name], self.dtype) for name in names}

    def outputs(self, params: Mapping[str, Tensor]) -> list[Tensor]:
        """All tensors that it returns, in float64, with some of the parameters replaced by these."""
        others = self.back(self.own.keys() - self.params.keys())
        found = computed(self.module, {**others, **self.params, **params}, *self.inputs)
        return [value.double() for value in tree_leaves(found) if isinstance(value, Tensor) and value.numel()]

    def change(self, params: Mapping[str, Tensor]) -> float:
        """How far these parameters take the outputs, as a share of the largest."""
        pairs = zip(self.outputs(params), self.expected, strict=True)
        changes = [(there - here).abs().max() / here.abs().max().clamp(min=TINY) for there, here in pairs]
        return max(map(float, changes), default=0.0)

    @cached_property
    def expected(self) -> list[Tensor]:
        """The outputs as it is."""
        expected = self.outputs({})
        if not all(value.isfinite().all() for value in expected):
            raise ValueError("symmetry: the outputs at random parameters are not finite, so that nothing verifies it")
        return expected

    @cached_property
    def rounding(self) -> float:
        """A share of the outputs that the order of sums may change."""
        floating = [value.dtype for value in self.params.values() if value.is_floating_point()]
        return ROUNDING * max((torch.finfo(dtype).eps for dtype in floating), default=0.0)


def _network(module: nn.Module, inputs: Sequence[Tensor], generator: torch.Generator) -> _Network:
    """The network in float64, or in its own precision where it insists on that."""
    own = dict([*module.named_parameters(), *module.named_buffers()])

    def made(dtype: torch.dtype | None) -> _Network:
        params = {name: _moved(_wide(own[name], dtype), generator) for name in dict.fromkeys(once(module).values())}
        return _Network(module, own, params, tuple(_moved(_wide(value, dtype), generator) for value in inputs), dtype)

    network = made(torch.float64)
    try:
        network.outputs({})
    except RuntimeError:
        return made(None)
    return network


def _wide(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.detach().to("cpu", dtype if value.is_floating_point() else None)


def _moved(value: Tensor, generator: torch.Generator) -> Tensor:
    """Half a standard deviation away, or 0.1 where all entries are one; what is nowhere negative grows."""
    if not value.is_floating_point() or not (known := value[value.isfinite()]).numel():
        return value
    draw = torch.rand if known.min() >= 0 and known.max() > 0 else torch.randn
    spread = 0.5 * float(known.std(correction=0)) or 0.1
    return value + spread * draw(value.shape, generator=generator, dtype=value.dtype)


def _telling(
    module: nn.Module, symmetry: Symmetry, inputs: Sequence[Tensor], generator: torch.Generator
) -> tuple[_Network, dict[str, float]]:
    """A network on whose outputs every group's tensors act, and how much putting them back changes those.

    Drawn anew where they do not, as where a small layer's rectifiers are all shut; ValueError where they never do.
    """
    for _ in range(DRAWS):
        network = _network(module, inputs, generator)
        if unknown := sorted(symmetry.axes.keys() - network.params.keys()):
            raise ValueError(f"symmetry: the model has no tensor {unknown[0]!r}, or has it under an earlier name")
        shown = {g: network.change(network.back(name for name, _ in symmetry.members[g])) for g in symmetry.groups}
        silent = [group for group, change in shown.items() if change <= 10 * network.rounding]
        if not silent:
            return network, shown
    raise ValueError(
        f"symmetry: the outputs do not depend on the group {silent[0]!r}, so that nothing verifies it:"
        " let the task's `example` return inputs on which they do"
    )


def _mistake(
    network: _Network, symmetry: Symmetry, bounds: Mapping[str, float], generator: torch.Generator
) -> str | None:
    """What changes the outputs beyond its bound; all at once first, which seldom does."""
    sizes, params = symmetry.sizes(network.params), network.params
    permutation = {group: _derangement(sizes[group], generator) for group in bounds}
    factors = {group: 0.5 + torch.rand(sizes[group], generator=generator) for group in symmetry.scaled}
    every = symmetry.scale(symmetry.permute(params, permutation), factors)
    if network.change(every) <= min(bounds.values(), default=1.0):
        return None
    for group, bound in bounds.items():
        if not network.change(symmetry.permute(params, {group: permutation[group]})) <= bound:
            return f"permuting the group {group!r}"
        if group in factors and not network.change(symmetry.scale(params, {group: factors[group]})) <= bound:
            return f"scaling the group {group!r}"
    return None


def _derangement(size: int, generator: torch.Generator) -> Tensor:
    """A random cycle through all units, so that none keeps its place."""
    order = torch.randperm(size, generator=generator)
    index = torch.empty_like(order)
    index[order] = order.roll(1)
    return index
