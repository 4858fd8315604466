"""The permutation symmetries of a network: which axes of which tensors move together."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .tensors import along
from .update import ClientUpdate, Moments, Tensors


class Product(NamedTuple):
    """An axis that is its parts' row-major product: heads × a block of 32, channels × 5 · 5 positions."""

    parts: tuple[Layout, ...]


class Concat(NamedTuple):
    """An axis of its parts one after the other: the four gates of an LSTM, concatenated features."""

    parts: tuple[Layout, ...]


Layout: TypeAlias = str | int | Product | Concat  # a group; so many entries that stay; what is made of them
Axes: TypeAlias = tuple[Layout | None, ...]  # of a tensor; None is an axis that stays as it is
Permutation: TypeAlias = Mapping[str, Tensor]  # group -> index: unit i of the result is unit index[i]
Sizes: TypeAlias = Mapping[str, int]  # group -> units
Powers: TypeAlias = list[tuple[Layout | None, int]]  # of each axis the layout, and the power of its units' scale


@dataclass(frozen=True, eq=False)
class Symmetry:
    """The groups of units that can be permuted without changing what a network computes.

    `axes` says of each tensor by name what each axis is made of; a tensor that is not named stays as it is. Groups
    have no size: they take that of the tensors. `roles` is 1 of each (tensor, axis) that brings units forth, -1 where
    it reads them; where it does not say, second axes read. `scaled` are the groups whose units can be multiplied by any
    positive number too, as ReLUs allow.
    """

    axes: Mapping[str, Axes]
    roles: Mapping[tuple[str, int], int] = field(default_factory=dict)
    scaled: Sequence[str] = ()
    hints: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def groups(self) -> list[str]:
        """The names of the groups, in the order of the tensors."""
        return list(dict.fromkeys(group for axes in self.axes.values() for axis in axes for group in groups(axis)))

    @cached_property
    def members(self) -> dict[str, list[tuple[str, int]]]:
        """Of each group, every (tensor, axis) that it moves."""
        found: dict[str, list[tuple[str, int]]] = {group: [] for group in self.groups}
        for name, axes in self.axes.items():
            for axis, layout in enumerate(axes):
                for group in dict.fromkeys(groups(layout)):
                    found[group].append((name, axis))
        return found

    def role(self, name: str, axis: int) -> int:
        """1 of an axis that brings forth its units, or belongs to them, -1 of one that reads them."""
        return self.roles.get((name, axis)) or (-1 if axis == 1 else 1)

    def sizes(self, params: Tensors) -> dict[str, int]:
        """How many units each group has in a model of these tensors; ValueError where they contradict one another."""
        found: dict[str, int] = {}
        self._measure(params, found)
        for group in self.groups:
            if group not in found and group in self.hints:
                found[group] = self.hints[group]
                self._measure(params, found)
        return found

    def _measure(self, params: Tensors, found: dict[str, int]) -> None:
        """Adds the sizes that follow from those found so far."""
        known = -1
        while len(found) > known:
            known = len(found)
            for name in (name for name in self.axes if name in params):
                _measure(name, self.axes[name], params[name], found)

    def within(self, params: Tensors) -> Symmetry:
        """The groups that move none but these tensors."""
        sizes = {**self.hints, **self.sizes(params)}
        kept = {group for group, members in self.members.items() if all(name in params for name, _ in members)}
        axes = {name: tuple(_kept(layout, kept, sizes) for layout in layouts) for name, layouts in self.axes.items()}
        moving = {name: layouts for name, layouts in axes.items() if any(layout is not None for layout in layouts)}
        return Symmetry(moving, self.roles, [group for group in self.scaled if group in kept], self.hints)

    def permute(self, params: Tensors, permutation: Permutation) -> dict[str, Tensor]:
        """The tensors with every group's units reordered; groups without an index stay."""
        sizes = self.sizes(params)
        return {name: _permuted(value, self._powers(name), permutation, sizes) for name, value in params.items()}

    def take(self, params: Tensors, units: Permutation) -> dict[str, Tensor]:
        """The tensors of these units of each group, in this order; groups without an index stay."""
        sizes = self.sizes(params)
        return {name: _taken(value, self.axes.get(name, ()), units, sizes) for name, value in params.items()}

    def put(self, params: Tensors, units: Permutation, sizes: Sizes, own: Sizes | None = None) -> dict[str, Tensor]:
        """The tensors of a network of `sizes` whose units at these places are those given, 0 elsewhere.

        `take` undoes it. Groups without places stay, those with some are as large as `sizes` says. `own` are the sizes
        that `params` have, if known.
        """
        own = own or self.sizes(params)
        return {name: _put(value, self.axes.get(name, ()), units, own, sizes) for name, value in params.items()}

    def resized(self, model: Tensors, params: Tensors) -> dict[str, Tensor]:
        """The model's tensors as `params` size its groups, without values; ValueError where these contradict."""
        own, sizes = self.sizes(model), self.sizes({name: params[name] for name in model if name in params})
        return {name: _resized(value, self.axes.get(name, ()), {**own, **sizes}) for name, value in model.items()}

    def scale(self, params: Tensors, factors: Mapping[str, Tensor], power: int = 1) -> dict[str, Tensor]:
        """The tensors with each unit of these groups multiplied where it is brought forth, divided where it is read.

        Gradients by these tensors scale with `power` -1, their squares with -2.
        """
        self._refuse_unscalable(factors)
        sizes = self.sizes(params)
        return {name: _scaled(value, self._powers(name, power), factors, sizes) for name, value in params.items()}

    def permute_update(self, update: ClientUpdate, permutation: Permutation) -> ClientUpdate:
        """The update of the permuted network: parameters and every statistic alike."""
        sizes = {group: len(index) for group, index in permutation.items()} | self._sizes(update)
        return self._changed(update, sizes, lambda value, axes: _permuted(value, axes, permutation, sizes))

    def scale_update(self, update: ClientUpdate, factors: Mapping[str, Tensor]) -> ClientUpdate:
        """The update of the network whose units are scaled: parameters and every statistic alike."""
        self._refuse_unscalable(factors)
        sizes = {group: len(factor) for group, factor in factors.items()} | self._sizes(update)
        return self._changed(update, sizes, lambda value, axes: _scaled(value, axes, factors, sizes))

    def _refuse_unscalable(self, factors: Mapping[str, Tensor]) -> None:
        for group in factors.keys() - {*self.scaled}:
            raise ValueError(f"symmetry: the units of {group!r} cannot be scaled")

    def _sizes(self, update: ClientUpdate) -> dict[str, int]:
        return self.sizes({**update.sq_grad_sum, **update.grad_sum, **update.params})

    def _changed(self, update: ClientUpdate, sizes: Sizes, change: Callable[[Tensor, Powers], Tensor]) -> ClientUpdate:
        """The update with each tensor changed, which goes by what its axes are made of."""

        def each(values: Tensors, axes: Callable[[str], Powers]) -> dict[str, Tensor]:
            return {name: change(value, axes(name)) for name, value in values.items()}

        means = each({layer: one.mean for layer, one in update.moments.items()}, self._outputs)
        squares = each({layer: one.m2 for layer, one in update.moments.items()}, partial(self._outputs, power=2))
        lengths = {layer: len(matrix) - 1 for layer, matrix in update.gram.items()}
        return replace(
            update,
            params=each(update.params, self._powers),
            grad_sum=each(update.grad_sum, partial(self._powers, power=-1)),
            sq_grad_sum=each(update.sq_grad_sum, partial(self._powers, power=-2)),
            grad_sketch=each(update.grad_sketch, lambda name: [(None, 0), *self._powers(name, -1)]),
            gram=each(update.gram, lambda layer: 2 * self._inputs(layer, lengths[layer], sizes)),
            grad_gram=each(update.grad_gram, lambda layer: 2 * self._outputs(layer, -1)),
            moments={layer: Moments(one.num, means[layer], squares[layer]) for layer, one in update.moments.items()},
            cross_moments=each(update.cross_moments, partial(self._outputs, power=0)),  # correlations
        )

    def _powers(self, name: str, power: int = 1) -> Powers:
        """The axes of a tensor that scales like a parameter to this power."""
        return [(layout, power * self.role(name, axis)) for axis, layout in enumerate(self.axes.get(name, ()))]

    def _outputs(self, layer: str, power: int = 1) -> Powers:
        """The axis of what the layer puts out, or of what a batch norm takes in."""
        named = (f"{layer}.{part}".removeprefix(".") for part in ("weight", "running_mean"))
        return [(self.axes[name][0], power) for name in named if name in self.axes][:1]

    def _inputs(self, layer: str, length: int, sizes: Sizes) -> Powers:
        """The axis of [x, 1] that enters the layer: channels × kernel, of this length, then the constant."""
        channels = dict(enumerate(self.axes.get(f"{layer}.weight".removeprefix("."), ()))).get(1)
        if channels is None:
            return [(None, 0)]
        kernel = length // size(channels, sizes)
        return [(Concat((channels if kernel == 1 else Product((channels, kernel)), 1)), 1)]


def _permuted(value: Tensor, axes: Powers, permutation: Permutation, sizes: Sizes) -> Tensor:
    for axis, (layout, _) in enumerate(axes):
        if layout is not None and any(group in permutation for group in groups(layout)):
            value = value.index_select(axis, index(layout, permutation, sizes).to(value.device))
    return value


def _resized(value: Tensor, axes: Axes, sizes: Sizes) -> Tensor:
    layouts = [*axes, *[None] * (value.ndim - len(axes))]
    shape = [
        length if layout is None else size(layout, sizes) for layout, length in zip(layouts, value.shape, strict=True)
    ]
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _taken(value: Tensor, axes: Axes, units: Permutation, sizes: Sizes) -> Tensor:
    for axis, layout in enumerate(axes):
        if layout is not None and any(group in units for group in groups(layout)):
            value = value.index_select(axis, places(layout, units, sizes).to(value.device))
    return value


def _put(value: Tensor, axes: Axes, units: Permutation, own: Sizes, sizes: Sizes) -> Tensor:
    grown = {**own, **{group: sizes[group] for group in units}}
    for axis, layout in enumerate(axes):
        if layout is not None and any(group in units for group in groups(layout)):
            shape = [*value.shape[:axis], size(layout, grown), *value.shape[axis + 1 :]]
            where = places(layout, units, grown).to(value.device)
            value = value.new_zeros(shape).index_copy(axis, where, value)
    return value


def _scaled(value: Tensor, axes: Powers, factors: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
    for axis, (layout, power) in enumerate(axes):
        if power and any(group in factors for group in groups(layout)):
            factor = entries(layout, factors, sizes).pow(power).to(value.device)
            value = (value * along(factor, axis, value.ndim)).to(value.dtype)
    return value


def _kept(layout: Layout | None, kept: Container[str], sizes: Sizes) -> Layout | None:
    """The layout with the other groups in place."""
    if layout is None or not any(group in kept for group in groups(layout)):
        return None
    if isinstance(layout, Product | Concat):
        return type(layout)(tuple(_kept(part, kept, sizes) or size(part, sizes) for part in layout.parts))
    return layout


def groups(layout: Layout | None) -> Iterator[str]:
    """The groups in a layout, each as often as it occurs."""
    if isinstance(layout, str):
        yield layout
    elif isinstance(layout, Product | Concat):
        for part in layout.parts:
            yield from groups(part)


def size(layout: Layout, sizes: Sizes) -> int:
    """How many entries an axis of this layout has; ValueError for a group of which no tensor tells the size."""
    if isinstance(layout, int):
        return layout
    if isinstance(layout, str):
        if layout not in sizes:
            raise ValueError(f"symmetry: no tensor tells how many units {layout!r} has: name them in `hints`")
        return sizes[layout]
    parts = [size(part, sizes) for part in layout.parts]
    return prod(parts) if isinstance(layout, Product) else sum(parts)


def index(layout: Layout, permutation: Permutation, sizes: Sizes) -> Tensor:
    """Which entry of an axis comes to each place when its groups are permuted."""
    for group in groups(layout):
        if group in permutation and len(permutation[group]) != size(group, sizes):
            raise ValueError(f"symmetry: {len(permutation[group])} places for the {sizes[group]} units of {group!r}")
    return places(layout, permutation, sizes)


def places(layout: Layout, units: Permutation, sizes: Sizes) -> Tensor:
    """Where the entries of these units are on an axis of a network of `sizes`."""
    if isinstance(layout, str) and layout in units:
        return units[layout].cpu()
    if isinstance(layout, int | str):
        return torch.arange(size(layout, sizes))
    whole, start = torch.zeros(1 if isinstance(layout, Product) else 0, dtype=torch.int64), 0
    for part in layout.parts:
        entries = places(part, units, sizes)
        if isinstance(layout, Product):
            whole = (whole[:, None] * size(part, sizes) + entries).flatten()
        else:
            whole, start = torch.cat([whole, start + entries]), start + size(part, sizes)
    return whole


def entries(layout: Layout | None, values: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
    """A number for each entry of an axis from one per unit of its groups, float64; 1 where it has none of these."""
    if isinstance(layout, str) and layout in values:
        return values[layout].double()
    if layout is None or isinstance(layout, str | int):
        return torch.ones(1 if layout is None else size(layout, sizes), dtype=torch.float64)
    whole, *parts = (entries(part, values, sizes) for part in layout.parts)
    for part in parts:
        whole = torch.cat([whole, part]) if isinstance(layout, Concat) else torch.outer(whole, part).flatten()
    return whole


def rows(value: Tensor, layout: Layout, group: str, sizes: Sizes) -> Iterator[Tensor]:
    """`value`, whose first axis has this layout, as matrices of a row per unit of `group`, one per occurrence."""
    if layout == group:
        yield value.reshape(len(value), -1)
    elif isinstance(layout, Concat):
        lengths = [size(part, sizes) for part in layout.parts]
        for part, piece in zip(layout.parts, torch.split(value, lengths), strict=True):
            yield from rows(piece, part, group, sizes)
    elif isinstance(layout, Product):
        blocks = value.reshape(*(size(part, sizes) for part in layout.parts), -1)
        for axis, part in enumerate(layout.parts):
            yield from rows(blocks.movedim(axis, 0), part, group, sizes)


def _measure(name: str, axes: Sequence[Layout | None], value: Tensor, found: dict[str, int]) -> None:
    """Adds to `found` the size of each group that this tensor determines."""
    if len(axes) > value.ndim:
        raise ValueError(f"symmetry: {name} has {value.ndim} axes, {len(axes)} are described")
    for layout, length in zip(axes, value.shape, strict=False):
        if layout is None:
            continue
        unknown = {group for group in groups(layout) if group not in found}
        if not unknown and size(layout, found) != length:
            raise ValueError(f"symmetry: {name} has an axis of {length}, its groups make {size(layout, found)}")
        if len(unknown) == 1:
            found[unknown.pop()] = _solve(name, layout, length, found)


def _solve(name: str, layout: Layout, length: int, found: Sizes) -> int:
    """The size of the one unknown group with which the layout has this length: an affine function of it."""
    (unknown,) = {group for group in groups(layout) if group not in found}
    base = size(layout, {**found, unknown: 0})
    slope = size(layout, {**found, unknown: 1}) - base
    units = (length - base) // max(1, slope)
    if units < 0 or not slope or size(layout, {**found, unknown: units}) != length:
        raise ValueError(f"symmetry: {name} has an axis of {length}, which its blocks do not divide")
    return units


def inverse(permutation: Permutation) -> dict[str, Tensor]:
    """What undoes it."""
    return {group: torch.argsort(index) for group, index in permutation.items()}


def compose(first: Permutation, second: Permutation) -> dict[str, Tensor]:
    """`first`, and `second` after it."""
    both = {group: first[group][second[group]] for group in first.keys() & second.keys()}
    return {**first, **second, **both}
