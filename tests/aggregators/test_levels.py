"""The order of levels."""

from __future__ import annotations

import pytest
from networks import NETWORKS

from aggregators.core.levels import Depth
from aggregators.core.symmetry import Concat, Symmetry
from aggregators.core.tracing import trace


def levels(symmetry: Symmetry) -> list[tuple[list[str], list[str]]]:
    return [(level.groups, level.tensors) for level in Depth(symmetry).levels()]


def named(layer: str) -> list[str]:
    return [f"{layer}.weight", f"{layer}.bias"]


@pytest.mark.parametrize(
    ("network", "layers"), [("LeNet", "0 3 7 9"), ("VGG-9", "0 2 5 7 10 12 16 18"), ("U-Net", "down bottom up")]
)
def test_the_levels_of_a_chain_are_its_layers(network: str, layers: str) -> None:
    case = NETWORKS[network]
    found = levels(trace(case.network, case.example))
    assert found == [([layer], named(layer)) for layer in layers.split()]


def test_branches_that_are_as_deep_make_one_level_and_a_norm_of_both_follows_the_deeper() -> None:
    norm = {f"norm.{name}": (Concat(("a", "b", "c")),) for name in ("weight", "running_var")}
    layers = {"a.weight": ("a", None), "b.weight": ("b", None), "c.weight": ("c", "a"), "c.bias": ("c",)}
    assert levels(Symmetry({**norm, **layers, "last.weight": (None, Concat(("b", "c")))})) == [
        (["a", "b"], ["a.weight", "b.weight"]),
        (["c"], ["norm.weight", "norm.running_var", "c.weight", "c.bias"]),
    ]


def test_a_stream_that_several_layers_write_waits_for_the_last_of_them() -> None:
    layers = {"a.weight": ("s", None), "b.weight": ("b", None), "c.weight": ("s", "b"), "d.weight": (None, "s")}
    depth = Depth(Symmetry(layers))
    assert [level.groups for level in depth.levels()] == [["b"], ["s"]]
    assert depth.weights("s") == ["a.weight", "c.weight"]


def test_units_are_matched_by_weights_and_biases_and_not_by_norms() -> None:
    norm = {f"1.{name}": ("0",) for name in ("weight", "bias", "running_mean", "running_var")}
    depth = Depth(Symmetry({"0.weight": ("0", None, None, None), "0.bias": ("0",), **norm, "4.weight": (None, "0")}))
    assert depth.weights("0") == ["0.weight", "0.bias"]
    assert [level.tensors for level in depth.levels()] == [["0.weight", "0.bias", *norm]]


def test_what_brings_units_forth_may_say_so_in_whatever_order() -> None:
    symmetry = Symmetry(
        {"last.weight": (None, "a"), "first.weight": ("a", None)},
        {("last.weight", 1): -1, ("first.weight", 0): 1},
    )
    assert levels(symmetry) == [(["a"], ["first.weight"])]


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"0.weight": ("stem", None), "1.weight": ("up", "stem"), "2.weight": ("stem", "up")}, "'stem' from 'up'"),
        ({"w": ("words", None), "i": (Concat(("cell",) * 4), "words"), "h": (Concat(("cell",) * 4), "cell")}, "'cell'"),
        ({"0.weight": ("a", None), "norm.scale": ("b",)}, "no weight brings forth the units of 'b'"),
    ],
)
def test_what_has_no_order_is_refused_by_name(layers: dict[str, tuple[str | None, ...]], named: str) -> None:
    with pytest.raises(ValueError, match=named) as refused:
        Depth(Symmetry(layers)).levels()
    assert "\n" not in str(refused.value)
