"""The algebra of axes, against tensors of numbers that are reshaped, cut and joined in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aggregators.core.parts import Part, concat, cut, fix, fixed, product, regroup, unify, unscale

Step: TypeAlias = Callable[[Tensor, Sequence[Tensor]], Tensor]


def places(part: Part, permutation: Mapping[Part, Tensor]) -> Tensor:
    """Which entry comes to each place of an axis, entry by entry."""
    root = part.root()
    if root.kind in ("free", "fixed"):
        return permutation.get(root, torch.arange(root.size))
    inner = [places(one, permutation).tolist() for one in root.parts]
    if root.kind == "product":
        whole = [0]
        for indices in inner:
            whole = [before * len(indices) + index for before in whole for index in indices]
        return torch.tensor(whole)
    starts = [sum(map(len, inner[:number])) for number in range(len(inner))]
    return torch.tensor([start + index for start, indices in zip(starts, inner, strict=True) for index in indices])


def moved(value: Tensor, axes: Sequence[Part], permutation: Mapping[Part, Tensor]) -> Tensor:
    for axis, part in enumerate(axes):
        value = value.index_select(axis, places(part, permutation))
    return value


def free(*parts: Part) -> list[int]:
    """The sizes of what can be permuted, each once."""
    leaves = dict.fromkeys(leaf for part in parts for leaf in part.leaves())
    return [leaf.size for leaf in leaves if leaf.kind == "free"]


@dataclass
class Chain:
    """Operations on a first tensor, to which others are added, on axes at once and on numbers later."""

    draw: Callable[..., object]
    axes: list[Part]
    inputs: list[list[Part]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def shape(self) -> list[int]:
        return [axis.size for axis in self.axes]

    def some_axis(self) -> int:
        return self.draw(st.integers(0, len(self.axes) - 1))  # type: ignore[return-value]

    def reshape(self) -> None:
        rest, sizes = prod(self.shape), []
        while rest > 1 and len(sizes) < 4:
            sizes.append(self.draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0])))
            rest //= sizes[-1]  # type: ignore[operator]
        sizes.append(rest)
        self.axes = regroup(self.axes, sizes)  # type: ignore[arg-type]
        self.steps.append(lambda value, _: value.reshape(sizes))

    def permute(self) -> None:
        order = self.draw(st.permutations(range(len(self.axes))))
        self.axes = [self.axes[axis] for axis in order]  # type: ignore[attr-defined]
        self.steps.append(lambda value, _: value.permute(order))

    def exchange(self) -> None:
        """Two pieces of an axis change places."""
        axis = self.some_axis()
        size = self.shape[axis]
        border = self.draw(st.integers(0, size))
        sizes = [border, size - border]  # type: ignore[operator]
        self.axes[axis] = concat(reversed(cut(self.axes[axis], sizes)))
        self.steps.append(lambda value, _: torch.cat(value.split(sizes, axis)[::-1], axis))

    def double(self) -> None:
        axis = self.some_axis()
        self.axes[axis] = concat([self.axes[axis]] * 2)
        self.steps.append(lambda value, _: torch.cat([value, value], axis))

    def add(self) -> None:
        """A new tensor of the same shape is added."""
        other = [Part(size) for size in self.shape]
        number = len(self.inputs)
        self.inputs.append([*other])
        for one, part in zip(self.axes, other, strict=True):
            unify(one, part)
        self.steps.append(lambda value, inputs: value + inputs[number])

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        value = inputs[0]
        for step in self.steps:
            value = step(value, inputs)
        return value


SHAPES = st.sampled_from([(12,), (2, 6), (4, 3), (2, 2, 3), (8,), (6, 6), (5, 2)])
STEPS = st.lists(st.sampled_from(["reshape", "permute", "exchange", "double", "add"]), max_size=9)


@settings(max_examples=400)
@given(st.data(), SHAPES, STEPS, st.integers(0, 2**31))
def test_permuting_before_and_after_any_operations_is_the_same(
    data: st.DataObject, shape: tuple[int, ...], steps: list[str], seed: int
) -> None:
    axes = [Part(size) for size in shape]
    chain = Chain(data.draw, axes, [[*axes]])
    for step in steps:
        if prod(chain.shape) <= 200:
            getattr(chain, step)()
    generator = torch.Generator().manual_seed(seed)
    leaves = {leaf for axes in chain.inputs for axis in axes for leaf in axis.leaves() if leaf.kind == "free"}
    order = sorted(leaves, key=id)
    permutation = {leaf: torch.randperm(leaf.size, generator=generator) for leaf in order}
    numbers = [torch.randint(1000, [axis.size for axis in axes], generator=generator) for axes in chain.inputs]
    there = chain([moved(value, axes, permutation) for value, axes in zip(numbers, chain.inputs, strict=True)])
    assert chain(numbers).shape == torch.Size(chain.shape)
    assert torch.equal(there, moved(chain(numbers), chain.axes, permutation))


def test_a_reshape_splits_an_axis_into_factors_that_are_permuted() -> None:
    whole = Part(12)
    assert free(*regroup([whole], [3, 4])) == [3, 4]
    assert free(whole) == [3, 4]


def test_a_part_that_occurs_twice_is_split_in_both_places() -> None:
    part = Part(6)
    axes = regroup([part, part], [2, 3, 2, 3])
    assert axes[0].root() is axes[2].root()
    assert free(*axes) == [2, 3]


def test_axes_that_a_reshape_tears_apart_stay() -> None:
    axes = [Part(4), Part(6)]
    assert free(*regroup(axes, [3, 8])) == free(*axes) == []


def test_axes_without_entries_keep_their_lengths() -> None:
    assert [axis.size for axis in regroup([Part(0), Part(6)], [2, 0, 3])] == [2, 0, 3]
    assert [axis.size for axis in cut(Part(3), [0, 3, 0])] == [0, 3, 0]


def test_pieces_of_gates_are_the_units_of_each() -> None:
    hidden = Part(5)
    assert [piece.root() for piece in cut(concat([hidden] * 4), [5] * 4)] == [hidden] * 4


def test_pieces_are_cut_where_either_of_two_concatenations_is() -> None:
    one, other = concat([Part(2), Part(3)]), concat([Part(3), Part(2)])
    unify(one, other)
    assert free(one) == free(other) == [2, 1, 2]


def test_products_are_split_into_common_factors() -> None:
    one, other = product([Part(4), Part(6)]), product([Part(2), Part(12)])
    unify(one, other)
    assert free(one) == free(other) == [2, 2, 6]


def test_products_without_common_factors_stay() -> None:
    one, other = product([Part(4), Part(6)]), product([Part(6), Part(4)])
    unify(one, other)
    assert free(one, other) == []


def test_a_product_is_cut_through_its_first_factor() -> None:
    channels, positions = Part(6), fixed(4)
    pieces = cut(product([channels, positions]), [8, 16])
    assert free(*pieces) == free(channels) == [2, 4]


def test_a_product_that_is_cut_within_its_blocks_stays() -> None:
    channels = Part(6)
    cut(product([channels, fixed(4)]), [10, 14])
    assert free(channels) == []


def test_what_moves_with_what_stays_stays() -> None:
    one, other = Part(3), Part(3)
    unify(one, other)
    unify(other, fixed(3))
    assert free(one, other) == []


def test_what_moves_with_the_unscalable_is_unscalable() -> None:
    one, other, third = Part(3), Part(6), Part(3)
    unscale(one)
    unify(concat([one, third]), other)
    assert [leaf.scalable for leaf in other.leaves()] == [False, True]


def test_what_is_fixed_is_fixed_in_all_its_parts() -> None:
    whole = concat([Part(2), product([Part(3), Part(2)])])
    fix(whole)
    assert not whole.free()


def test_axes_of_different_lengths_cannot_move_together() -> None:
    with pytest.raises(ValueError, match="axes of 3 and 4 cannot move together"):
        unify(Part(3), Part(4))
