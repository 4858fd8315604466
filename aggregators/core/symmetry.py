"""The permutation symmetries of a network: which axes of which tensors move together."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import NamedTuple, TypeAlias, Union

import torch
from torch import Tensor

from .update import ClientUpdate, Moments, Tensors


class Product(NamedTuple):
    """An axis that is its parts' row-major product: heads × a block of 32, channels × 5 · 5 positions."""

    parts: tuple[Layout, ...]


class Concat(NamedTuple):
    """An axis of its parts one after the other: the four gates of an LSTM, concatenated features."""

    parts: tuple[Layout, ...]


Layout: TypeAlias = Union[
    str, int, Product, Concat
]  # a group; so many entries that stay in place; what is made of them
Axes: TypeAlias = tuple[Layout | None, ...]  # of a tensor; None is an axis that stays as it is
Permutation: TypeAlias = Mapping[str, Tensor]  # group -> index: unit i of the result is unit index[i]
Sizes: TypeAlias = Mapping[str, int]  # group -> units


@dataclass(frozen=True, eq=False)
class Symmetry:
    """The groups of units that can be permuted without changing what a network computes.

    `axes` says of each tensor by name what each axis is made of; a tensor that is not named stays as it is. Groups
    have no size: they take that of the tensors. `scaled` are the groups whose units can be multiplied by any positive
    number too, as ReLUs allow: group -> (tensor, axis) -> 1 where the axis brings the unit forth, -1 where it reads it.
    """

    axes: Mapping[str, Axes]
    scaled: Mapping[str, Mapping[tuple[str, int], int]] = field(default_factory=dict)
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

    def sizes(self, params: Tensors) -> dict[str, int]:
        """How many units each group has in a model of these tensors; ValueError where tensors contradict one another."""
        found: dict[str, int] = {}
        for hint in (None, *self.groups):
            if hint is not None and hint not in found and hint in self.hints:
                found[hint] = self.hints[hint]
            elif hint is not None:
                continue
            known = -1
            while len(found) > known:
                known = len(found)
                for name, axes in self.axes.items():
                    if name in params:
                        _measure(name, axes, params[name], found)
        return found

    def within(self, names: Iterable[str]) -> Symmetry:
        """The groups that move nothing but tensors of these names."""
        known = {*names}
        kept = {group for group, members in self.members.items() if all(name in known for name, _ in members)}
        axes = {
            name: tuple(_kept(layout, kept, self.hints) for layout in layouts) for name, layouts in self.axes.items()
        }
        moving = {name: layouts for name, layouts in axes.items() if any(layout is not None for layout in layouts)}
        return Symmetry(moving, {group: roles for group, roles in self.scaled.items() if group in kept}, self.hints)

    def permute(self, params: Tensors, permutation: Permutation) -> dict[str, Tensor]:
        """The tensors with every group's units reordered; groups without an index stay."""
        sizes = self.sizes(params)
        return {name: self._moved(value, self.axes.get(name, ()), permutation, sizes) for name, value in params.items()}

    def scale(self, params: Tensors, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with each unit of these groups multiplied where it is brought forth, divided where it is read."""
        sizes, scaled = self.sizes(params), dict(params)
        for group, factor in factors.items():
            for (name, axis), sign in self.scaled[group].items():
                spread = entries(self.axes[name][axis], {group: factor}, sizes).to(scaled[name])
                shape = [-1 if other == axis else 1 for other in range(scaled[name].ndim)]
                scaled[name] = scaled[name] * spread.pow(sign).reshape(shape)
        return scaled

    def permute_update(self, update: ClientUpdate, permutation: Permutation) -> ClientUpdate:
        """The update of the permuted network: parameters and every statistic alike."""
        sizes = self.sizes(update.params)

        def moved(values: Tensors, axes: Callable[[str], Axes]) -> dict[str, Tensor]:
            return {name: self._moved(value, axes(name), permutation, sizes) for name, value in values.items()}

        def own(name: str) -> Axes:
            return self.axes.get(name, ())

        moments = {
            layer: Moments(num, *moved({"mean": mean, "m2": m2}, lambda _, layer=layer: self._outputs(layer)).values())
            for layer, (num, mean, m2) in update.moments.items()
        }
        return replace(
            update,
            params=moved(update.params, own),
            grad_sum=moved(update.grad_sum, own),
            sq_grad_sum=moved(update.sq_grad_sum, own),
            grad_sketch=moved(update.grad_sketch, lambda name: (None, *own(name))),
            gram=moved(update.gram, lambda layer: 2 * self._inputs(layer, update.params)),
            grad_gram=moved(update.grad_gram, lambda layer: 2 * self._outputs(layer)),
            moments=moments,
            cross_moments=moved(update.cross_moments, self._outputs),
        )

    def _moved(self, value: Tensor, axes: Axes, permutation: Permutation, sizes: Sizes) -> Tensor:
        for axis, layout in enumerate(axes):
            if layout is not None and any(group in permutation for group in groups(layout)):
                value = value.index_select(axis, index(layout, permutation, sizes).to(value.device))
        return value

    def _outputs(self, layer: str) -> Axes:
        """The axis of what the layer puts out."""
        return self.axes.get(f"{layer}.weight".removeprefix("."), ())[:1]

    def _inputs(self, layer: str, params: Tensors) -> Axes:
        """The axis of [x, 1] that enters the layer: channels × kernel, then the constant."""
        name = f"{layer}.weight".removeprefix(".")
        axes = self.axes.get(name, ())
        if len(axes) < 2 or axes[1] is None:
            return ()
        kernel = prod(params[name].shape[2:])
        return (Concat((axes[1] if kernel == 1 else Product((axes[1], kernel)), 1)),)


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
    """How many entries an axis of this layout has; KeyError for a group without a size."""
    if isinstance(layout, int):
        return layout
    if isinstance(layout, str):
        return sizes[layout]
    parts = [size(part, sizes) for part in layout.parts]
    return prod(parts) if isinstance(layout, Product) else sum(parts)


def index(layout: Layout, permutation: Permutation, sizes: Sizes) -> Tensor:
    """Which entry of an axis comes to each place when its groups are permuted."""
    if isinstance(layout, int) or (isinstance(layout, str) and layout not in permutation):
        return torch.arange(size(layout, sizes))
    if isinstance(layout, str):
        return permutation[layout].cpu()
    parts = [index(part, permutation, sizes) for part in layout.parts]
    whole = parts[0]
    for part, inner in zip(layout.parts[1:], parts[1:], strict=True):
        if isinstance(layout, Product):
            whole = (whole[:, None] * size(part, sizes) + inner).flatten()
        else:
            whole = torch.cat([whole, inner + len(whole)])
    return whole


def entries(layout: Layout | None, values: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
    """A number for each entry of an axis from one per unit of its groups; 1 where it has none of these."""
    if isinstance(layout, str) and layout in values:
        return values[layout].double()
    if layout is None or isinstance(layout, str | int):
        return torch.ones(size(layout, sizes) if layout is not None else 1, dtype=torch.float64)
    parts = [entries(part, values, sizes) for part in layout.parts]
    if isinstance(layout, Concat):
        return torch.cat(parts)
    whole = parts[0]
    for part in parts[1:]:
        whole = (whole[:, None] * part).flatten()
    return whole


def rows(value: Tensor, layout: Layout, group: str, sizes: Sizes) -> Iterator[Tensor]:
    """`value`, whose first axis has this layout, as matrices of a row per unit of `group`, one per occurrence."""
    if layout == group:
        yield value.reshape(len(value), -1)
    elif isinstance(layout, Concat):
        lengths = [size(part, sizes) for part in layout.parts]
        for part, piece in zip(layout.parts, value.split(lengths), strict=True):
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
    if (length - base) % slope or length < base:
        raise ValueError(f"symmetry: {name} has an axis of {length}, which its blocks do not divide")
    return (length - base) // slope


def inverse(permutation: Permutation) -> dict[str, Tensor]:
    """What undoes it."""
    return {group: torch.argsort(index) for group, index in permutation.items()}


def compose(first: Permutation, second: Permutation) -> dict[str, Tensor]:
    """`first`, and `second` after it."""
    both = {group: first[group][second[group]] for group in first.keys() & second.keys()}
    return {**first, **second, **both}
