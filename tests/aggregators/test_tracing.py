"""Symmetries read off networks: found by hand, and held against what the networks compute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import EIGHT, NETWORKS, WORDS, Bert, lenet, mlp, resnet20
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import (
    channel_shuffle,
    dropout,
    glu,
    linear,
    pad,
    pixel_shuffle,
    relu,
    scaled_dot_product_attention,
)

from aggregators.core.symmetry import Product, Symmetry, groups
from aggregators.core.tracing import Untraceable, trace, verify
from client.task import tensors

every_network = pytest.mark.parametrize("name", NETWORKS)


@cache
def traced(name: str) -> tuple[nn.Module, Symmetry]:
    network = NETWORKS[name].network
    return network, trace(network, NETWORKS[name].example)


def away(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Its tensors in float64, each once, with every entry at random; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(value.shape, generator=generator).double() for name, value in tensors(network).items()}
    floating = {name: value for name, value in tensors(network).items() if value.is_floating_point()}
    return {
        name: (0.3 * drawn[name]).abs() + 0.5 if "var" in name else value.double() + 0.3 * drawn[name]
        for name, value in floating.items()
    } | {name: value for name, value in tensors(network).items() if name not in floating}


def computed(network: nn.Module, params: Mapping[str, Tensor], example: Tensor) -> Tensor:
    given = example.double() if example.is_floating_point() else example
    with torch.no_grad():
        found: Tensor = functional_call(network.eval(), dict(params), (given,))
    return found


def drawn(sizes: Mapping[str, int], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A permutation of every group, and a factor for each of its units."""
    generator = torch.Generator().manual_seed(seed)
    permutation = {group: torch.randperm(size, generator=generator) for group, size in sizes.items()}
    return permutation, {group: 0.5 + torch.rand(size, generator=generator) for group, size in sizes.items()}


# --- networks ---------------------------------------------------------------------------------------------------


@every_network
@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_a_permuted_and_scaled_network_computes_the_same(name: str, seed: int) -> None:
    network, symmetry = traced(name)
    params, example = away(network, seed), NETWORKS[name].example
    permutation, factors = drawn(symmetry.sizes(params), seed)
    changed = symmetry.permute(params, permutation)
    changed = symmetry.scale(changed, {group: factors[group] for group in symmetry.scaled})
    torch.testing.assert_close(
        computed(network, changed, example), computed(network, params, example), rtol=1e-8, atol=1e-8
    )


@every_network
def test_the_groups_are_those_found_by_hand(name: str) -> None:
    network, symmetry = traced(name)
    assert symmetry.sizes(network.state_dict()) == NETWORKS[name].groups


@every_network
def test_the_symmetry_is_verified(name: str) -> None:
    network, symmetry = traced(name)
    verify(symmetry, network, NETWORKS[name].example)


@pytest.mark.parametrize("name", ["MLP", "LeNet", "VGG-9", "U-Net", "1-d", "3-d"])
def test_units_between_relus_can_be_scaled(name: str) -> None:
    _, symmetry = traced(name)
    assert [*symmetry.scaled] == symmetry.groups


@pytest.mark.parametrize(
    ("network", "example", "roles"),
    [
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), torch.tensor([[1], [2]]), [("0.weight", 1, 1)]),
        (
            nn.Sequential(nn.Conv1d(1, 4, 1), nn.ConvTranspose1d(4, 3, 1), nn.Conv1d(3, 1, 1)),
            torch.zeros(2, 1, 5),
            [("1.weight", 0, -1), ("1.weight", 1, 1), ("2.weight", 1, -1)],
        ),
        (lambda: between(lambda self, x: x @ self.w, w=table(8, 8)), None, [("w", 0, -1), ("w", 1, 1)]),
        (lambda: between(lambda self, x: (self.w @ x.mT).mT, w=table(8, 8)), None, [("w", 0, 1), ("w", 1, -1)]),
        (
            lambda: between(lambda self, x: torch.einsum("bi,io->bo", x, self.w), w=table(8, 8)),
            None,
            [("w", 0, -1), ("w", 1, 1)],
        ),
        (lambda: between(lambda self, x: x * self.w, w=table(1, 8)), None, [("w", 1, 1)]),
        (
            lambda: between(lambda self, x: self.cell(x)[0], cell=nn.LSTM(8, 8)),
            None,
            [("cell.weight_ih_l0", 0, 1), ("cell.weight_ih_l0", 1, -1), ("cell.weight_hh_l0", 1, -1)],
        ),
    ],
)
def test_axes_bring_units_forth_or_read_them_whatever_follows(
    network: Any, example: Tensor | None, roles: list[tuple[str, int, int]]
) -> None:
    module = network if isinstance(network, nn.Module) else network()
    symmetry = trace(module, torch.zeros(2, 4) if example is None else example)
    for name, axis, role in roles:
        assert symmetry.axes[name][axis] is not None
        assert symmetry.role(name, axis) == role


@pytest.mark.parametrize("name", ["ViT", "BERT", "LSTM", "DenseNet", "grouped"])
def test_units_that_are_normalised_or_gated_cannot_be_scaled(name: str) -> None:
    assert traced(name)[1].scaled == []


@every_network
def test_outputs_stay(name: str) -> None:
    _, symmetry = traced(name)
    for tensor in NETWORKS[name].outputs:
        assert symmetry.axes.get(tensor, (None,))[0] is None


@pytest.mark.parametrize(
    ("name", "tensor", "axis"),
    [
        *(
            ("MLP", "1.weight", 1),
            ("LeNet", "0.weight", 1),
            ("VGG-9", "0.weight", 1),
            ("ResNet-20", "stem.0.weight", 1),
        ),
        *(("ResNet-50", "stem.0.0.weight", 1), ("ViT", "patches.weight", 1), ("ViT", "positions", 1)),
        *(("BERT", "words.weight", 0), ("BERT", "positions.weight", 0), ("LSTM", "words.weight", 0)),
        *(("grouped", "first.weight", 1), ("U-Net", "down.weight", 1), ("tied BERT", "words.weight", 0)),
    ],
)
def test_inputs_words_and_positions_stay(name: str, tensor: str, axis: int) -> None:
    layouts = traced(name)[1].axes[tensor]
    assert layouts[axis] is None
    assert any(layout is not None for layout in layouts)


def test_maps_are_flattened_into_blocks() -> None:
    assert traced("LeNet")[1].axes["7.weight"] == ("7", Product(("3", 16)))


def test_heads_are_blocks_of_their_queries_keys_values_and_outputs() -> None:
    block = Product(("layers.0.attention.query", 2))
    axes = traced("BERT")[1].axes
    assert axes["layers.0.attention.query.bias"] == axes["layers.0.attention.value.bias"] == (block,)
    assert axes["layers.0.attention.out.weight"] == ("words", block)


@pytest.mark.parametrize("name", EIGHT)
def test_every_tensor_but_the_outputs_moves_and_no_counter(name: str) -> None:
    network, symmetry = traced(name)
    still = {
        tensor for tensor in tensors(network) if not any(axis is not None for axis in symmetry.axes.get(tensor, ()))
    }
    assert {tensor for tensor in still if "num_batches" not in tensor} == {NETWORKS[name].outputs[1]}


@pytest.mark.parametrize(("make", "name"), [(mlp, "MLP"), (lenet, "LeNet"), (resnet20, "ResNet-20"), (Bert, "BERT")])
def test_sizes_follow_the_tensors_of_a_wider_network(make: Callable[..., nn.Module], name: str) -> None:
    _, symmetry = traced(name)
    wider, example = make(width=24 if name == "BERT" else 5), NETWORKS[name].example
    params = away(wider, seed=1)
    permutation, _ = drawn(symmetry.sizes(params), seed=2)
    permuted = symmetry.permute(params, permutation)
    torch.testing.assert_close(computed(wider, permuted, example), computed(wider, params, example))
    assert symmetry.sizes(params) == trace(wider, example).sizes(params)


# --- what verification sees -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["MLP", "LeNet", "LSTM", "gates", "grouped", "DenseNet", "U-Net", "ViT", "weight norm"]
)
def test_a_symmetry_that_forgets_any_axis_is_refused(name: str) -> None:
    network, symmetry = traced(name)
    for tensor, layouts in symmetry.axes.items():
        for axis in (axis for axis, layout in enumerate(layouts) if layout is not None):
            less = (*layouts[:axis], None, *layouts[axis + 1 :])
            forgetful = Symmetry({**symmetry.axes, tensor: less}, hints=symmetry.hints)
            with pytest.raises(ValueError, match=r"permuting the group .* changes the outputs: give the task a `symm"):
                verify(forgetful, network, NETWORKS[name].example)


class Adapted(nn.Module):
    """A layer beside which a small one has been put, as adapters begin."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.down, self.up = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
        nn.init.normal_(self.up.weight, std=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x).relu()
        return self.out(h + self.up(self.down(h).relu()))


def test_a_symmetry_that_forgets_what_does_little_yet_is_refused() -> None:
    network = Adapted()
    symmetry = trace(network, X[:, :1].expand(-1, 6))
    forgetful = {name: axes for name, axes in symmetry.axes.items() if name.partition(".")[0] not in ("down", "up")}
    with pytest.raises(ValueError, match="permuting the group 'into' changes the outputs"):
        verify(Symmetry(forgetful), network, torch.rand(2, 6))


class Numbered(nn.Sequential):
    """A module with numbered children and several groups of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU())
        self.first, self.second = (nn.Parameter(torch.randn(a, b)) for a, b in ((5, 7), (7, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) @ self.first).relu() @ self.second


def test_a_group_is_named_as_no_other_is() -> None:
    network = nn.Sequential(OrderedDict(inner=Numbered(), head=nn.Linear(4, 2)))
    symmetry = trace(network, torch.rand(2, 6))
    assert symmetry.sizes(network.state_dict()) == {"inner": 5, "inner#2": 7, "inner#3": 4, "inner.0": 6}
    verify(symmetry, network, torch.rand(2, 6))


def test_tensors_are_in_the_order_in_which_the_network_reads_them() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.second, self.first = nn.Linear(5, 2), nn.Linear(4, 5), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x).relu()).relu())

    axes = trace(Backwards(), torch.rand(2, 3)).axes
    assert [name for name in axes if name.endswith("weight")] == ["first.weight", "second.weight", "last.weight"]


@pytest.mark.parametrize("seed", range(3))
def test_two_units_that_change_places_are_seen(seed: int) -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    with pytest.raises(ValueError, match="permuting the group 'h' changes the outputs"):
        verify(Symmetry({"0.weight": ("h", None)}), network, torch.zeros(2, 3), seed=seed)


def test_scaling_what_is_not_proportional_is_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    symmetry = trace(network, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="scaling the group '0' changes the outputs"):
        verify(replace(symmetry, scaled=["0"]), network, torch.zeros(2, 3))


BY_HAND = {"1.weight": ("h", None), "1.bias": ("h",), "3.weight": (None, "h")}


def test_a_symmetry_given_by_hand_is_verified() -> None:
    verify(Symmetry(BY_HAND), NETWORKS["MLP"].network, NETWORKS["MLP"].example)


def test_a_symmetry_of_tensors_that_are_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model has no tensor '4.weight', or has it under an earlier name"):
        verify(Symmetry({**BY_HAND, "4.weight": ("h",)}), NETWORKS["MLP"].network, NETWORKS["MLP"].example)


def test_a_symmetry_of_the_alias_of_a_tied_weight_is_refused() -> None:
    network, _ = traced("tied BERT")
    with pytest.raises(ValueError, match=r"the model has no tensor 'head.weight', or has it under an earlier name"):
        verify(Symmetry({"head.weight": (None, "h")}), network, NETWORKS["tied BERT"].example)


def test_a_small_network_is_verified_though_its_rectifiers_may_all_be_shut_at_first() -> None:
    for seed in range(60):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        verify(trace(network, torch.zeros(2, 2)), network, torch.zeros(2, 2))


def test_outputs_that_show_nothing_are_refused() -> None:
    network = Does(lambda self, x: 0 * self.second(relu(self.first(x))), **layers())
    symmetry = trace(network, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="the outputs do not depend on the group 'first', so that nothing verifies it"):
        verify(symmetry, network, torch.zeros(2, 4))


def test_outputs_that_are_not_finite_are_refused() -> None:
    network = Does(lambda self, x: (self.second(relu(self.first(x))) - 1e9).log(), **layers())
    with pytest.raises(ValueError, match="not finite"):
        verify(trace(network, X), network, X)


def test_a_network_that_insists_on_its_precision_is_verified_in_it() -> None:
    network = Does(lambda self, x: self.second(relu(self.first(x.float()))), **layers())
    symmetry = trace(network, X)
    verify(symmetry, network, X)
    with pytest.raises(ValueError, match="permuting the group 'first' changes the outputs"):
        verify(Symmetry({**symmetry.axes, "first.bias": (None,)}), network, X)


def test_tracing_and_verifying_leave_the_network_as_it_is() -> None:
    network = NETWORKS["ResNet-20"].network.train()
    network.get_submodule("stem").eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    verify(trace(network, NETWORKS["ResNet-20"].example), network, NETWORKS["ResNet-20"].example)
    assert network.training
    assert not network.get_submodule("stem").training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_layer_with_two_names_moves_by_its_first_and_is_left_as_it_is() -> None:
    again = nn.Linear(8, 8)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), again, nn.Tanh(), again, nn.Tanh(), nn.Linear(8, 2))
    before = again.weight.clone()
    symmetry = trace(network, X)
    verify(symmetry, network, X)
    assert symmetry.axes["2.weight"] == ("0", "0")
    assert "4.weight" not in symmetry.axes
    assert torch.equal(again.weight, before)


# --- operations -------------------------------------------------------------------------------------------------


class Does(nn.Module):
    """A network of these modules, parameters and buffers that does what it is told."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.told = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(part))

    def forward(self, x: Tensor) -> Any:
        return self.told(self, x)


X = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))
IMAGE = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def layers(width: int = 8, read: int | None = None) -> dict[str, nn.Module]:
    return {"first": nn.Linear(4, width), "second": nn.Linear(read or width, 2)}


def convolutions(width: int = 8, read: int | None = None) -> dict[str, nn.Module]:
    return {"first": nn.Conv2d(4, width, 3), "second": nn.Conv2d(read or width, 2, 1)}


def table(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def between(change: Callable[[Any, Tensor], Tensor], **parts: Any) -> Does:
    """What happens between two layers of 8 units."""
    return Does(lambda self, x: self.second(change(self, self.first(x))), **(layers() | parts))


def filled(self: Any, x: Tensor) -> Tensor:
    hidden = self.first(x)
    whole = torch.zeros(len(x), 12, dtype=x.dtype)
    whole[:, :8] = hidden
    whole[:, 8:] = hidden[:, :4]
    return self.second(whole)


def struck(self: Any, x: Tensor) -> Tensor:
    """Ones, of which one is struck out by an operation without a rule, under another name."""
    ones = torch.ones(8, dtype=x.dtype)
    row = ones[None]
    ones.index_fill_(0, torch.tensor([1]), 0.0)
    return self.second(self.first(x) * row)


def begun(self: Any, x: Tensor) -> Tensor:
    """Two recurrent layers, the first of which does not begin at 0."""
    states = torch.zeros(2, len(x), 6, dtype=x.dtype)
    states[0].add_(self.state)
    return self.second(self.cell(x, states)[0][:, -1])


def heads(x: Tensor, num: int) -> Tensor:
    return x.unflatten(-1, (num, -1)).transpose(1, 2)


def shared_attention(self: Any, x: Tensor) -> Tensor:
    q, k, v = heads(self.q(x), 4), heads(self.k(x), 2), heads(self.v(x), 2)
    return self.second(scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)).mean(1)


def scored(self: Any, x: Tensor) -> Tensor:
    """Attention with a mask made on the way."""
    hidden = self.first(x)
    mask = torch.triu(torch.full((5, 5), float("-inf")), 1)
    return self.second((hidden @ hidden.mT + mask).softmax(-1) @ hidden).mean(1)


def experts(self: Any, x: Tensor) -> Tensor:
    hidden = torch.einsum("bi,eih->beh", x, self.into).relu()
    return torch.einsum("be,beh,eho->bo", self.gate(x).softmax(-1), hidden, self.out)


with torch.random.fork_rng():
    torch.manual_seed(0)
    SOUND: dict[str, tuple[nn.Module, Tensor, dict[str, int], list[str]]] = {
        # how units are cut, joined and moved about
        "positions beyond the example's": (
            Does(
                lambda self, x: self.second(relu(self.first(x) + self.at[: x.shape[1]])).mean(1),
                **layers(),
                at=table(9, 8),
            ),
            *(SEQUENCE, {"at": 8}, []),
        ),
        "positions changed before they are cut": (
            between(lambda self, h: relu(h + self.at.mul(2).tanh()[None, : h.shape[1]]), at=table(9, 8)),
            *(SEQUENCE, {"at": 8}, []),
        ),
        "units that nothing reads": (
            between(lambda self, h: relu(h)[:, :6], second=nn.Linear(6, 2)),
            X,
            {"first": 6},
            ["first"],
        ),
        "units that only a forgotten result reads": (
            Does(
                lambda self, x: (self.aside(relu(self.first(x))), self.second(x))[1],
                **layers(8, 4),
                aside=nn.Linear(8, 3),
            ),
            *(X, {}, []),
        ),
        "unequal pieces": (
            between(lambda self, h: torch.cat([h.chunk(3, -1)[1], h.chunk(3, -1)[0], h.chunk(3, -1)[2]], -1).relu()),
            *(X, {"first": 3, "first#2": 3, "first#3": 2}, ["first", "first#2", "first#3"]),
        ),
        "half gates half": (between(lambda self, h: glu(h), second=nn.Linear(4, 2)), X, {"first": 4}, []),
        "repeated whole": (
            between(lambda self, h: relu(h).repeat(1, 2), second=nn.Linear(16, 2)),
            X,
            {"first": 8},
            ["first"],
        ),
        "maps flattened beside one another": (
            Does(
                lambda self, x: self.second(torch.cat([self.first(x).flatten(1), self.third(x).relu().flatten(1)], 1)),
                **convolutions() | {"second": nn.Linear(16 * 12, 2), "third": nn.Conv2d(4, 4, 3)},
            ),
            *(IMAGE, {"first": 8, "second": 4}, ["first", "second"]),
        ),
        "maps flattened channels last": (
            between(lambda self, h: h.movedim(1, -1).flatten(1), **convolutions() | {"second": nn.Linear(128, 2)}),
            *(IMAGE, {"first": 8}, ["first"]),
        ),
        "pixels shuffled": (
            between(lambda self, h: pixel_shuffle(h, 2).relu(), **convolutions(8, 2)),
            *(IMAGE, {"first": 2}, ["first"]),
        ),
        "channels shuffled": (
            between(
                lambda self, h: self.groups(channel_shuffle(h, 2)),
                **convolutions(),
                groups=nn.Conv2d(8, 8, 1, groups=2),
            ),
            *(IMAGE, {"first": 2, "second": 4}, []),
        ),
        "written in place": (Does(filled, **layers(8, 12)), X, {"first": 4, "first#2": 4}, []),
        "struck out in place": (Does(struck, **layers()), X, {}, []),
        "units that are outputs too": (
            Does(lambda self, x: (self.first(x), self.second(self.first(x))), **layers()),
            X,
            {},
            [],
        ),
        "words read by their own table": (
            Does(lambda self, x: linear(self.words(x).mean(1), self.words.weight), words=nn.Embedding(20, 6)),
            *(WORDS, {"words": 6}, []),
        ),
        "changed in place": (
            Does(
                lambda self, x: (hidden := self.first(x), hidden[:, :3].sigmoid_(), self.second(hidden))[2], **layers()
            ),
            *(X, {"first": 3, "first#2": 5}, ["first#2"]),
        ),
        "taken by position": (between(lambda self, h: h.cumsum(1)), X, {}, []),
        "taken in order": (between(lambda self, h: h.topk(4, 1)[0], second=nn.Linear(4, 2)), X, {}, []),
        "the largest over positions": (between(lambda self, h: h.max(1)[0]), SEQUENCE, {"first": 8}, []),
        "where the largest is": (between(lambda self, h: h * h.argmax(-1, keepdim=True)), X, {}, []),
        "the last of each": (
            between(lambda self, h: h[torch.arange(2), torch.tensor([3, 1])]),
            SEQUENCE,
            {"first": 8},
            ["first"],
        ),
        "padded with copies": (
            between(lambda self, h: pad(h[:, None], (1, 1), mode="reflect")[:, 0], second=nn.Linear(10, 2)),
            *(X, {}, []),
        ),
        "summed units": (
            Does(lambda self, x: self.first(x).relu().sum(-1), first=nn.Linear(4, 8)),
            X,
            {"first": 8},
            [],
        ),
        # weights that are no parameters themselves
        "a weight and its transposed": (
            Does(lambda self, x: linear(linear(x, self.w).relu(), self.w.t()), w=table(8, 4)),
            *(X, {"w": 8}, []),
        ),
        "a part of a weight": (
            Does(lambda self, x: linear(linear(x, self.w[:6]).relu(), self.v[:, 2:8]), w=table(8, 4), v=table(3, 8)),
            *(X, {"w": 6}, []),
        ),
        "a spectral norm": (
            between(
                lambda self, h: h.relu().mean((2, 3)),
                first=nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 3)),
            ),
            *(IMAGE, {"first": 8}, []),
        ),
        "a layer twice": (
            between(lambda self, h: self.again(self.again(h.relu()).relu()).relu(), again=nn.Linear(8, 8)),
            *(X, {"first": 8}, ["first"]),
        ),
        "einsum": (
            Does(experts, into=table(5, 4, 6), out=table(5, 6, 2), gate=nn.Linear(4, 5)),
            *(X, {"into": 5, "into#2": 6}, []),
        ),
        "addmm": (
            Does(
                lambda self, x: self.second(torch.addmm(self.b, x, self.w).relu()),
                w=table(4, 8),
                b=table(8),
                second=nn.Linear(8, 2),
            ),
            *(X, {"w": 8}, []),
        ),
        "bilinear": (
            between(lambda self, h: self.pairs(h, h), pairs=nn.Bilinear(8, 8, 8)),
            X,
            {"first": 8, "second": 8},
            [],
        ),
        "a transposed convolution in groups": (
            between(lambda self, h: self.up(h).relu(), **convolutions(), up=nn.ConvTranspose2d(8, 8, 2, 2, groups=2)),
            *(IMAGE, {}, []),
        ),
        # attention
        "heads that share keys": (
            Does(
                shared_attention,
                **{name: nn.Linear(4, width) for name, width in (("q", 8), ("k", 4), ("v", 4))},
                second=nn.Linear(8, 2),
            ),
            *(SEQUENCE, {"q": 2}, []),
        ),
        "a mask made on the way": (Does(scored, **layers()), SEQUENCE, {"first": 8}, []),
        "learnt queries": (
            between(
                lambda self, h: scaled_dot_product_attention(self.q.expand(2, -1, -1), h, h).mean(1), q=table(1, 6, 8)
            ),
            *(SEQUENCE, {"q": 6, "q#2": 8}, []),
        ),
        "learnt queries in order": (
            between(
                lambda self, h: scaled_dot_product_attention(self.q.expand(2, -1, -1), h, h, is_causal=True).mean(1),
                q=table(1, 5, 8),
            ),
            *(SEQUENCE, {"q": 8}, []),
        ),
        "a frozen encoder": (
            between(
                lambda self, h: h.mean(1),
                first=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).requires_grad_(False),
                second=nn.Linear(4, 2),
            ),
            *(SEQUENCE, {"first.self_attn": 2, "first.linear1": 8}, ["first.linear1"]),
        ),
        # recurrence
        "learnt states": (
            Does(
                lambda self, x: self.second(
                    self.cell(x, (self.h.expand(2, 2, 6).clone(), self.h.expand(2, 2, 6).clone()))[0][:, -1]
                ),
                cell=nn.LSTM(4, 6, 2, batch_first=True),
                h=table(2, 1, 6),
                second=nn.Linear(6, 2),
            ),
            *(SEQUENCE, {"h": 6}, []),
        ),
        "states written in place": (
            Does(begun, cell=nn.GRU(4, 6, 2, batch_first=True), state=table(6), second=nn.Linear(6, 2)),
            *(SEQUENCE, {"state": 6}, []),
        ),
        "the last states of two layers": (
            Does(
                lambda self, x: self.second(self.cell(x)[1].transpose(0, 1).flatten(1)),
                cell=nn.GRU(4, 6, 2, batch_first=True),
                second=nn.Linear(12, 2),
            ),
            *(SEQUENCE, {"cell": 6}, []),
        ),
        "a projected state": (
            Does(
                lambda self, x: self.second(self.cell(x)[0][:, -1]),
                cell=nn.LSTM(4, 6, proj_size=3),
                second=nn.Linear(3, 2),
            ),
            *(SEQUENCE, {}, []),
        ),
        "a cell step by step": (
            Does(
                lambda self, x: self.second(self.cell(x[:, 1], self.cell(x[:, 0]))[0]),
                cell=nn.LSTMCell(4, 6),
                second=nn.Linear(6, 2),
            ),
            *(SEQUENCE, {"cell": 6}, []),
        ),
        # what allows no scaling
        "a number added to all units": (between(lambda self, h: h.relu() + self.t, t=table()), X, {"first": 8}, []),
        "a number for each example": (
            Does(lambda self, x: self.second(relu(self.first(x)) + x[:, :1]), **layers()),
            *(X, {"first": 8}, []),
        ),
        "logarithms of sums": (between(lambda self, h: h.relu().logsumexp(1)), SEQUENCE, {"first": 8}, []),
        "whether units are positive": (between(lambda self, h: h.relu().bool().to(h.dtype)), X, {"first": 8}, []),
        "padded with ones": (
            between(lambda self, h: pad(h.relu(), (0, 2), value=1.0), second=nn.Linear(10, 2)),
            *(X, {"first": 8, "second": 2}, ["first"]),
        ),
        "a slope for each channel": (
            between(lambda self, h: self.slope(h), **convolutions(6), slope=nn.PReLU(6)),
            *(IMAGE, {"first": 6}, []),
        ),
        "a convolution of each channel": (
            between(
                lambda self, h: self.each(h.relu()).relu(), **convolutions(8, 16), each=nn.Conv2d(8, 16, 1, groups=8)
            ),
            *(IMAGE, {"first": 8}, []),
        ),
        "attention without softmax": (
            between(lambda self, h: (heads(h, 4) @ (heads(h, 4).mT @ heads(h, 4))).transpose(1, 2).flatten(2)),
            *(SEQUENCE, {"first": 4}, []),
        ),
        "bounds for each unit": (between(lambda self, h: h.clamp(max=self.t), t=table(8)), X, {"t": 8}, []),
        "powers for each unit": (between(lambda self, h: h.abs() ** self.t.abs(), t=table(8)), X, {"t": 8}, []),
        # chance
        "as many units as examples": (
            between(lambda self, h: h.relu() + self.t, **layers(2), t=table(2, 1)),
            X,
            {"first": 2},
            [],
        ),
        "one unit": (between(lambda self, h: h.relu(), **layers(1)), X, {}, []),
        "inputs of another precision": (
            between(lambda self, h: h.to(torch.float64).float().relu()),
            X,
            {"first": 8},
            ["first"],
        ),
    }


@pytest.mark.parametrize("name", SOUND)
def test_an_operation_leaves_what_is_sound(name: str) -> None:
    network, example, sizes, scaled = SOUND[name]
    symmetry = trace(network, example)
    assert symmetry.sizes(network.state_dict()) == sizes
    assert [*symmetry.scaled] == scaled
    verify(symmetry, network, example)


def test_a_network_without_symmetry_has_no_groups() -> None:
    symmetry = trace(nn.Linear(4, 3), X)
    assert symmetry.groups == []
    verify(symmetry, nn.Linear(4, 3), X)


def test_buffers_move_and_those_that_are_not_kept_stay() -> None:
    class Shifted(nn.Module):
        def __init__(self, kept: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("shift", table(8), persistent=kept)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(relu(self.first(x) + self.shift))

    assert trace(Shifted(kept=True), X).axes["shift"] == ("shift",)
    assert trace(Shifted(kept=False), X).groups == []


# --- refusals ---------------------------------------------------------------------------------------------------


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(table(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.centres)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("network", "example", "said"),
    [
        (nn.Sequential(nn.Linear(4, 8), Distances()), X, r"1 \(Distances\): no rule for the operation cdist.default"),
        (nn.Sequential(nn.Linear(4, 8), Branches()), X, r"1 \(Branches\): torch.export: Could not guard on data-dep"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 8)), X, r"1 \(Linear\): torch.export: "),
        (
            between(lambda self, h: dropout(h)),
            X,
            r"the model \(Does\): the operation dropout.default: it draws at random in eval mode too",
        ),
        (
            between(lambda self, h: torch.no_grad()(torch.relu)(h)),
            X,
            r"the model \(Does\): no rule for the operation wrap_with_set_grad_enabled",
        ),
        (
            Does(lambda self, x: torch.einsum("...i,oi->...o", x, self.w).sum(-1), w=table(8, 4)),
            X,
            r"the model \(Does\): the operation einsum.default: write its equation with a letter for each axis",
        ),
    ],
)
def test_what_cannot_be_traced_is_refused_by_module_operation_and_remedy(
    network: nn.Module, example: Tensor, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        Untraceable, match=f"^{said}.*; give the task a `symmetry` of its own, or choose a me"
    ) as refusal:
        trace(network, example)
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_every_group_of_a_layout_is_a_group() -> None:
    for _, symmetry in map(traced, NETWORKS):
        found = {group for layouts in symmetry.axes.values() for layout in layouts for group in groups(layout)}
        assert found == {*symmetry.groups} == symmetry.hints.keys()
