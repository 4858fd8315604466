"""Symmetries as such: what their axes are made of, and every field of an update through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import ClassVar, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from aggregators.core.symmetry import (
    Concat,
    Layout,
    Product,
    Symmetry,
    compose,
    entries,
    index,
    inverse,
    rows,
    size,
)
from aggregators.core.tracing import trace, verify
from aggregators.core.update import TENSOR_FIELDS, ClientUpdate, Gradients, Request, Tensors
from client.statistics import measure
from client.task import Examples, Node, Task, load, tensors

SIZES = {"a": 3, "b": 2}
LAYOUTS: dict[str, Layout] = {
    "a group": "a",
    "a number": 4,
    "blocks": Product(("a", 2)),
    "blocks of groups": Product(("a", "b")),
    "gates": Concat(("a", "a")),
    "parts": Concat(("b", 2, "a")),
    "parts of blocks": Concat((Product((2, "a")), "b", Product(("b", 3)))),
    "blocks of parts": Product((Concat(("a", 1)), 2, "b")),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def permutations(sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group: torch.randperm(length, generator=generator) for group, length in sizes.items()}


def factors(sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group: 0.5 + torch.rand(length, generator=generator) for group, length in sizes.items()}


def labels(layout: Layout) -> list[tuple[tuple[str, int], ...]]:
    """Of each entry of an axis where it stands in each part that it lies in."""
    if isinstance(layout, Product):
        found: list[tuple[tuple[str, int], ...]] = [()]
        for part in layout.parts:
            found = [(*before, *label) for before in found for label in labels(part)]
        return found
    if isinstance(layout, Concat):
        return [((f"part {k}", 0), *label) for k, part in enumerate(layout.parts) for label in labels(part)]
    name, length = (layout, SIZES[layout]) if isinstance(layout, str) else ("fixed", layout)
    return [((name, unit),) for unit in range(length)]


# --- axes -------------------------------------------------------------------------------------------------------


@every_layout
def test_the_size_of_an_axis_is_the_number_of_its_entries(layout: Layout) -> None:
    assert size(layout, SIZES) == len(labels(layout))


@every_layout
@given(seed=st.integers(0, 2**31))
def test_each_entry_of_a_permuted_axis_is_that_of_the_unit_that_takes_its_place(layout: Layout, seed: int) -> None:
    permutation = permutations(SIZES, seed)

    def taken(name: str, unit: int) -> tuple[str, int]:
        return name, int(permutation[name][unit]) if name in SIZES else unit

    found = [labels(layout)[place] for place in index(layout, permutation, SIZES)]
    assert found == [tuple(taken(*one) for one in label) for label in labels(layout)]


@every_layout
def test_each_entry_of_an_axis_has_the_factors_of_its_units(layout: Layout) -> None:
    values = {"a": torch.tensor([2.0, 3.0, 5.0])}
    expected = [prod(float(values[name][unit]) for name, unit in label if name == "a") for label in labels(layout)]
    assert entries(layout, values, SIZES).tolist() == expected


@every_layout
@pytest.mark.parametrize("group", SIZES)
def test_rows_gather_all_that_each_unit_has(layout: Layout, group: str) -> None:
    value = torch.arange(2 * size(layout, SIZES)).view(-1, 2)
    matrices = [*rows(value, layout, group, SIZES)]
    for unit in range(SIZES[group]):
        mine = [place for place, label in enumerate(labels(layout)) if (group, unit) in label]
        assert (
            sorted(number for matrix in matrices for number in matrix[unit].tolist()) == value[mine].flatten().tolist()
        )


def test_a_permutation_of_other_units_than_the_model_has_is_refused() -> None:
    with pytest.raises(ValueError, match="2 places for the 3 units of 'a'"):
        index(Product(("a", 2)), {"a": torch.tensor([1, 0])}, SIZES)


# --- permutations -----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_two_permutations_one_after_the_other_are_their_composition(first: int, second: int) -> None:
    symmetry, params = traced("DenseNet")
    sizes = symmetry.sizes(params)
    one = permutations(sizes, first)
    other = {group: order for group, order in permutations(sizes, second).items() if group != "layers.0"}
    there = symmetry.permute(symmetry.permute(params, one), other)
    assert_same(there, symmetry.permute(params, compose(one, other)))
    assert_same(symmetry.permute(there, inverse(compose(one, other))), params)


def test_groups_without_an_index_stay() -> None:
    symmetry, params = traced("MLP")
    moved = symmetry.permute(params, {"3": torch.arange(9).flip(0)})
    assert torch.equal(moved["1.weight"], params["1.weight"])
    assert torch.equal(moved["3.weight"], params["3.weight"].flip(0))
    assert torch.equal(moved["5.weight"], params["5.weight"].flip(1))


def test_members_are_all_axes_that_a_group_moves() -> None:
    symmetry = Symmetry({"w": ("a", Concat(("a", "b"))), "b": (None, "b"), "c": (Product(("a", 3)),)})
    assert symmetry.groups == ["a", "b"]
    assert symmetry.members == {"a": [("w", 0), ("w", 1), ("c", 0)], "b": [("w", 1), ("b", 1)]}


def test_units_that_cannot_be_scaled_are_not() -> None:
    symmetry, params = traced("LSTM")
    with pytest.raises(ValueError, match="the units of 'cell' cannot be scaled"):
        symmetry.scale(params, {"cell": torch.ones(6)})


def test_scaling_by_a_power_is_scaling_by_the_factors_power() -> None:
    symmetry, params = traced("LeNet")
    by = factors(symmetry.sizes(params), seed=0)
    there = symmetry.scale(params, by, power=-2)
    here = symmetry.scale(params, {group: factor**-2 for group, factor in by.items()})
    torch.testing.assert_close(there, here)


# --- sizes ------------------------------------------------------------------------------------------------------


def test_sizes_follow_from_tensors_that_name_groups_together() -> None:
    symmetry = Symmetry({"w": (Concat(("a", "b", "a")),), "v": (Product(("a", 4)), "c")})
    assert symmetry.sizes({"w": torch.zeros(8), "v": torch.zeros(12, 5)}) == {"a": 3, "b": 2, "c": 5}


def test_sizes_that_no_tensor_tells_are_those_given() -> None:
    symmetry = Symmetry({"w": (Concat(("a", "b")),)}, hints={"a": 3})
    assert symmetry.sizes({"w": torch.zeros(8)}) == {"a": 3, "b": 5}


def test_sizes_that_nothing_tells_are_asked_for() -> None:
    symmetry = Symmetry({"w": (Concat(("a", "b")),)})
    with pytest.raises(ValueError, match="no tensor tells how many units 'a' has: name them in `hints`"):
        symmetry.permute({"w": torch.zeros(8)}, {"a": torch.arange(3)})


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"v": ("a",), "w": ("a", None)}, "w has an axis of 4, its groups make 6"),
        ({"w": (Product(("a", 3)),)}, "w has an axis of 4, which its blocks do not divide"),
        ({"w": (Concat(("a", 5)),)}, "w has an axis of 4, which its blocks do not divide"),
        ({"w": (Product(("a", "a")), Product(("b", "b")))}, "w has an axis of 4, which its blocks do not divide"),
        ({"v": ("a", None)}, "v has 1 axes, 2 are described"),
    ],
)
def test_tensors_that_contradict_the_symmetry_are_named(axes: dict[str, tuple[Layout | None, ...]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Symmetry(axes).sizes({"v": torch.zeros(6), "w": torch.zeros(4, 5)})


# --- private tensors --------------------------------------------------------------------------------------------


def test_groups_that_move_a_private_tensor_stay() -> None:
    symmetry, params = traced("DenseNet")
    shared = symmetry.within({name: value for name, value in params.items() if not name.startswith("layers.0")})
    assert shared.groups == ["layers.1", "layers.2"]
    assert shared.axes["norm.bias"] == (Concat((3, 4, "layers.1", "layers.2")),)
    verify(shared, NETWORKS["DenseNet"].network, NETWORKS["DenseNet"].example)


def test_groups_given_by_hand_stay_with_a_private_tensor_too() -> None:
    symmetry = Symmetry({"first": ("a",), "second": ("b",), "both": (Concat(("a", "b")),)}, scaled=["a", "b"])
    shared = symmetry.within({"second": torch.zeros(2), "both": torch.zeros(5)})
    assert shared.axes == {"second": ("b",), "both": (Concat((3, "b")),)}
    assert [*shared.scaled] == ["b"]


# --- updates ----------------------------------------------------------------------------------------------------


class Labels(Task):
    """Classification into three labels."""

    num_classes: ClassVar[int | None] = 3

    def model(self) -> nn.Module:
        raise NotImplementedError

    def data(self, node: Node) -> tuple[Examples, Examples]:
        raise NotImplementedError


def normed() -> nn.Module:
    """Convolutions, batch norms with and without weights, blocks of positions, and tied layers."""
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.weight, other.bias = one.weight, one.bias
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5, affine=False)),
        *(nn.Tanh(), nn.Flatten(), nn.Linear(5 * 9, 6), nn.Tanh(), one, nn.Tanh(), other, nn.Tanh(), nn.Linear(6, 3)),
    )


def rectified() -> nn.Module:
    """Units that can be scaled."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))
    )


EXAMPLES = cast(
    Examples,
    TensorDataset(torch.randn(7, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3),
)
EVERYTHING = Request(
    gradients=Gradients(sums=True, squares=True, sketches=2, estimator="empirical"),
    gram=True,
    grad_gram=True,
    moments=True,
    cross_moments=True,
    class_counts=True,
)


def away(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Its tensors with every entry at random; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: value.clone() for name, value in tensors(network).items()}
    noise = {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in params.items()}
    return {
        name: value if not value.is_floating_point() else value + (noise[name].abs() if "var" in name else noise[name])
        for name, value in params.items()
    }


def traced(name: str) -> tuple[Symmetry, dict[str, Tensor]]:
    if name not in TRACED:
        network = NETWORKS[name].network
        TRACED[name] = trace(network, NETWORKS[name].example), away(network)
    return TRACED[name]


TRACED: dict[str, tuple[Symmetry, dict[str, Tensor]]] = {}


def assert_same(there: Tensors, here: Tensors) -> None:
    assert there.keys() == here.keys()
    assert all(torch.equal(value, here[name]) for name, value in there.items())


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def update(make: Callable[[], nn.Module], params: Tensors) -> ClientUpdate:
    """All that a client can measure of the network at these parameters, beside itself at others."""
    network = seeded(make)
    anchor = away(network, seed=1)
    load(network, params)
    fields = measure(Labels(), network, EXAMPLES, EVERYTHING, seed=0, anchor=anchor)
    return ClientUpdate(client_id=1, num_examples=7, params=params, **fields)


def close(there: ClientUpdate, here: ClientUpdate) -> None:
    """Every field of both is the same, but for rounding."""
    for field in TENSOR_FIELDS:
        assert getattr(there, field), field
        torch.testing.assert_close(getattr(there, field), getattr(here, field), rtol=1e-3, atol=1e-4)
    assert there.moments.keys() == here.moments.keys()
    for layer, moments in there.moments.items():
        torch.testing.assert_close(tuple(moments), tuple(here.moments[layer]), rtol=1e-3, atol=1e-4)
    assert there.class_counts is not None
    assert torch.equal(there.class_counts, here.class_counts)
    assert (there.num_examples, there.num_grads, there.estimator) == (here.num_examples, here.num_grads, here.estimator)


def found(make: Callable[[], nn.Module]) -> tuple[Symmetry, dict[str, Tensor]]:
    network = seeded(make)
    return trace(network, torch.stack([EXAMPLES[0][0], EXAMPLES[1][0]])), away(network)


@pytest.mark.parametrize("seed", range(3))
def test_every_field_of_an_update_is_that_of_the_permuted_network(seed: int) -> None:
    symmetry, params = found(normed)
    permutation = permutations(symmetry.sizes(params), seed)
    there = update(normed, symmetry.permute(params, permutation))
    close(symmetry.permute_update(update(normed, params), permutation), there)


@pytest.mark.parametrize("seed", range(3))
def test_every_field_of_an_update_is_that_of_the_scaled_network(seed: int) -> None:
    symmetry, params = found(rectified)
    by = factors(symmetry.sizes(params), seed)
    there = update(rectified, symmetry.scale(params, by))
    close(symmetry.scale_update(update(rectified, params), by), there)


def test_an_update_without_parameters_is_permuted_alike() -> None:
    symmetry, params = found(normed)
    permutation = permutations(symmetry.sizes(params), 0)
    whole = symmetry.permute_update(update(normed, params), permutation)
    measured = update(normed, params)
    for field in TENSOR_FIELDS:
        alone = ClientUpdate(client_id=1, num_examples=7, **{field: getattr(measured, field)})
        assert_same(getattr(symmetry.permute_update(alone, permutation), field), getattr(whole, field))


def test_a_permuted_twin_comes_back_with_its_statistics() -> None:
    symmetry, params = found(normed)
    permutation = permutations(symmetry.sizes(params), 0)
    mine = update(normed, params)
    back = symmetry.permute_update(symmetry.permute_update(mine, permutation), inverse(permutation))
    for field in TENSOR_FIELDS:
        assert_same(getattr(back, field), getattr(mine, field))
    for layer, moments in mine.moments.items():
        assert torch.equal(back.moments[layer].mean, moments.mean)
        assert torch.equal(back.moments[layer].m2, moments.m2)


def test_scaling_keeps_precision_and_what_the_network_computes() -> None:
    symmetry, params = found(rectified)
    scaled = symmetry.scale(params, factors(symmetry.sizes(params), 0))
    assert all(value.dtype == torch.float32 for value in scaled.values())
    example = torch.stack([EXAMPLES[0][0], EXAMPLES[1][0]])
    there, here = (functional_call(seeded(rectified), one, (example,)) for one in (scaled, params))
    torch.testing.assert_close(there, here)
