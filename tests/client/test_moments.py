"""Moments and correlations of activations, against numpy on all activations at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aggregators.core.update import Gradients, Moments, Request, Tensors
from client.statistics import measure, unsupported
from client.statistics.activations import BLOCK, channel_rows, plain_layers
from client.statistics.moments import Pair, Running, correlations, moments
from client.task import Examples, Node, Task

Activations = dict[str, NDArray[np.float64]]  # (rows, channels)
MANY = 300  # examples: three batches


class Labels(Task):
    num_classes: ClassVar[int | None] = 3

    def model(self) -> nn.Module:
        return nn.Linear(4, 3)

    def data(self, node: Node) -> tuple[Examples, Examples]:
        raise NotImplementedError


class PrivateHead(Labels):
    private: ClassVar[tuple[str, ...]] = ("2.*",)


def inputs(num: int, *shape: int, seed: int = 0) -> Examples:
    x = torch.randn(num, *(shape or (4,)), generator=torch.Generator().manual_seed(seed))
    return cast(Examples, TensorDataset(x, torch.arange(num) % 3))


def net(*layers: nn.Module, seed: int = 0) -> nn.Module:
    """The layers in a row, every parameter and running statistic at random."""
    model = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data = noise.abs() + 0.5 if "var" in name else noise * 0.5
    return model


def mlp(seed: int = 0) -> nn.Module:
    return net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), seed=seed)


def normed(seed: int = 0) -> nn.Module:
    """Two batch norms, the second of which takes what no layer puts out."""
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.BatchNorm2d(3)
    return net(*layers, nn.Flatten(), nn.Linear(48, 2), seed=seed)


def activations(model: nn.Module, examples: Examples, axes: dict[str, int]) -> Activations:
    """All that leaves the named modules, or enters batch norms, channels last."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            value = args[0] if "BatchNorm" in type(module).__name__ else output
            found[name].append(value.detach().double().movedim(axes[name], -1).flatten(0, -2).clone())

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in axes]
    model.eval()(torch.stack([x for x, _ in examples]))  # type: ignore[attr-defined]
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def expect(found: dict[str, Moments], rows: Activations) -> None:
    assert list(found) == list(rows)
    for name, value in rows.items():
        assert found[name].num == len(value)
        assert found[name].mean.dtype == found[name].m2.dtype == torch.float32
        np.testing.assert_allclose(found[name].mean, value.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name].m2, value.var(0) * len(value), rtol=1e-5, atol=1e-6)


def measured(model: nn.Module, examples: Examples, **asked: Any) -> dict[str, Moments]:
    return moments(Labels(), model, examples, Request(moments=True, **asked), seed=0)


def compared(model: nn.Module, anchor: Tensors, examples: Examples, **asked: Any) -> dict[str, Tensor]:
    return correlations(Labels(), model, anchor, examples, Request(cross_moments=True, **asked), seed=0)


# --- moments --------------------------------------------------------------------------------------------------------


def in_place(seed: int = 0) -> nn.Module:
    return net(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2), seed=seed)


NETS: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, int]]] = {
    "perceptron": (mlp(), (4,), {"0": -1, "2": -1}),
    "overwritten": (in_place(), (4,), {"0": -1, "2": -1}),
    "rows of tokens": (mlp(), (5, 4), {"0": -1, "2": -1}),
    "convolution, batch norms": (normed(), (1, 6, 6), {"0": 1, "1": 1, "3": 1, "5": -1}),
    "grouped convolution": (
        net(nn.Conv2d(4, 6, 2, groups=2), nn.Conv2d(6, 6, 1, groups=6)),
        (4, 3, 3),
        {"0": 1, "1": 1},
    ),
    "1-d": (net(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)), (2, 7), {"0": 1, "1": 1}),
    "3-d": (net(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2)), (1, 3, 3, 3), {"0": 1, "1": 1}),
    "batch norm of features": (net(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False)), (4,), {"0": -1, "1": 1}),
}


@pytest.mark.parametrize("name", NETS)
def test_moments_are_those_of_all_activations_at_once(name: str) -> None:
    model, shape, axes = NETS[name]
    examples = inputs(MANY, *shape)
    found = measured(model, examples)
    expect({name: found[name] for name in axes}, activations(model, examples, axes))
    assert found.keys() == axes.keys()


@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    centre=st.sampled_from([0.0, 1.0, -1e4, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_any_blocks_of_rows_combine_into_the_moments_of_all(rows: list[int], centre: float, seed: int) -> None:
    """Deviations of 1 around a million leave a sum of squares without a centre few right digits."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (centre + torch.randn(sum(rows), 3, generator=generator, dtype=torch.float64) for _ in range(2))
    pair = Pair()
    for parts in zip(a.split(rows), b.split(rows), strict=True):
        pair.add(*parts)
    for running, value in ((pair.a, a), (pair.b, b)):
        assert running.num == sum(rows)
        np.testing.assert_allclose(running.mean, value.mean(0), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(running.m2, np.var(value.numpy(), axis=0) * len(value), rtol=1e-8, atol=1e-12)
    centred = [value.numpy() - value.numpy().mean(0) for value in (a, b)]
    np.testing.assert_allclose(pair.products, centred[0].T @ centred[1], rtol=1e-8, atol=1e-8)


def test_moments_are_taken_in_eval_mode_and_leave_the_model_as_it_was() -> None:
    model, examples = net(*normed(), nn.Dropout(0.5), nn.Linear(2, 2)), inputs(20, 1, 6, 6)
    expected = activations(deepcopy(model), examples, {"0": 1, "1": 1, "3": 1, "5": -1, "7": -1})
    model.train()
    before = deepcopy(model.state_dict())
    expect(measured(model, examples), expected)
    measured(model, examples, batch_stats=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_with_batch_stats_one_pass_re_estimates_every_batch_norm() -> None:
    """The reference is torch's: a pass in training mode over all examples as one batch."""
    model, examples = normed(), inputs(100, 1, 6, 6)
    found = measured(model, examples, batch_stats=True)
    reference = deepcopy(model).train()
    norms = {name: norm for name, norm in reference.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
    reference(torch.stack([x for x, _ in examples]))  # type: ignore[attr-defined]
    for name, norm in norms.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        torch.testing.assert_close(found[name].mean, norm.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].m2 / (found[name].num - 1), norm.running_var, rtol=1e-4, atol=1e-5)
    plain = measured(model, examples)
    assert torch.allclose(plain["1"].mean, found["1"].mean, atol=1e-5)
    assert not torch.allclose(plain["3"].mean, found["3"].mean, atol=1e-2)


def test_batch_stats_are_of_batches_of_nearly_equal_size_at_random() -> None:
    """Sorted examples of two kinds, one more than a batch takes: either kind alone has no spread."""
    x = torch.cat([torch.zeros(65, 1), torch.ones(64, 1)])
    examples = cast(Examples, TensorDataset(x, torch.zeros(129, dtype=torch.int64)))
    sizes: list[int] = []

    class Watched(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            assert 0.1 < x.mean() < 0.9
            return super().forward(x)

    measured(nn.Sequential(Watched(1), nn.Linear(1, 1)), examples, batch_stats=True)
    assert sizes == [65, 64]


@pytest.mark.parametrize("batch_stats", [False, True])
def test_the_limit_of_the_request_is_how_many_examples_are_measured(batch_stats: bool) -> None:
    asked: dict[str, Any] = {"gradients": Gradients(limit=7), "batch_stats": batch_stats}
    found = measured(normed(), inputs(50, 1, 6, 6), **asked)
    assert {name: value.num for name, value in found.items()} == {"0": 112, "1": 112, "3": 112, "5": 7}


def test_a_client_without_examples_has_no_moments() -> None:
    assert measured(mlp(), inputs(0)) == {}
    assert compared(mlp(), {}, inputs(0)) == {}


def test_a_model_without_layers_is_refused_with_the_remedy() -> None:
    for call in (measured, lambda model, examples: compared(model, {}, examples)):
        with pytest.raises(ValueError, match="calls no linear or convolutional layer"):
            call(nn.Flatten(), inputs(3))


def test_half_precision_is_measured_in_float32() -> None:
    model, examples = mlp().bfloat16(), inputs(40)
    wide = deepcopy(model).float()
    expect(measured(model, examples), activations(wide, examples, {"0": -1, "2": -1}))
    found = compared(model, model.state_dict(), examples)
    torch.testing.assert_close(found, compared(wide, wide.state_dict(), examples))


class Shared(nn.Module):
    """One layer called twice, two that share weight and bias, two that share a weight alone, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.first, self.alike, self.apart = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alike.weight, self.alike.bias = self.first.weight, self.first.bias
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.alike(self.first(self.norm(self.twice(self.norm(self.twice(x))))))
        z: Tensor = self.other(self.one(x))
        return y + z


def test_calls_of_one_layer_are_pooled_and_what_is_ambiguous_is_left_out() -> None:
    model, examples = net(Shared()), inputs(30)
    rows = activations(model, examples, {"twice": -1, "norm": -1, "first": -1, "alike": -1})
    rows["first"] = np.concatenate([rows["first"], rows.pop("alike")])
    expect(measured(model, examples), rows)


def test_private_layers_are_left_out() -> None:
    model = net(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3))
    found = moments(PrivateHead(), model, inputs(9), Request(moments=True), seed=0)
    assert found.keys() == {"0", "3"}


def test_layers_of_a_transformer_are_seen_although_it_has_a_faster_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    found = measured(net(layer), inputs(5, 3, 8))
    assert {name: value.num for name, value in found.items()} == {"linear1": 15, "linear2": 15}


# --- correlations ---------------------------------------------------------------------------------------------------


def corrcoef(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.corrcoef(a.T, b.T)[: a.shape[1], a.shape[1] :]


@pytest.mark.parametrize(
    ("make", "shape", "axes"),
    [
        (mlp, (4,), {"0": -1, "2": -1}),
        (in_place, (4,), {"0": -1, "2": -1}),
        (normed, (1, 6, 6), {"0": 1, "5": -1}),
    ],
)
def test_correlations_are_pearsons_of_all_activations_at_once(
    make: Callable[[int], nn.Module], shape: tuple[int, ...], axes: dict[str, int]
) -> None:
    model, anchor, examples = make(1), make(2), inputs(MANY, *shape)
    a, b = (activations(one, examples, axes) for one in (model, anchor))
    found = compared(model, anchor.state_dict(), examples)
    assert found.keys() == axes.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value, corrcoef(a[name], b[name]), atol=2e-6)


class Gated(nn.Module):
    """An LSTM, and a layer that reads it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(4, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.lstm(x)[0])
        return y


WIDTHS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "layer norm": (lambda h: net(nn.Linear(4, h), nn.LayerNorm(h), nn.Linear(h, 3), seed=h), (4,), {"0": -1, "2": -1}),
    "depthwise": (
        lambda h: net(nn.Conv2d(1, h, 3), nn.Conv2d(h, h, 3, groups=h), nn.Conv2d(h, 2, 1), seed=h),
        (1, 6, 6),
        {"0": 1, "1": 1, "2": 1},
    ),
    "LSTM": (lambda h: net(Gated(h), seed=h), (5, 4), {"last": -1}),
    "old weight norm": (
        lambda h: net(nn.Linear(4, h), nn.utils.weight_norm(nn.Linear(h, 3)), seed=h),
        (4,),
        {"0": -1},
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", WIDTHS)
def test_a_model_of_other_widths_is_run_in_its_own_sizes(name: str) -> None:
    make, shape, axes = WIDTHS[name]
    model, anchor, examples = make(4), make(7), inputs(MANY, *shape)
    model(examples[0][0][None])  # as in training: weight norms keep what they computed
    found = compared(model, anchor.state_dict(), examples)
    a, b = (activations(one, examples, axes) for one in (model, anchor))
    assert found.keys() == axes.keys()
    for layer, value in found.items():
        np.testing.assert_allclose(value, corrcoef(a[layer], b[layer]), atol=2e-6)


def test_comparing_other_widths_leaves_the_model_as_it_was() -> None:
    model, anchor = (net(nn.Linear(4, h), nn.LayerNorm(h), nn.Linear(h, 3), seed=h).train() for h in (4, 7))
    before = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    compared(model, anchor.state_dict(), inputs(5))
    assert all(id(value) == before[name][0] for name, value in model.state_dict(keep_vars=True).items())
    assert all(torch.equal(value, before[name][1]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_more_rows_than_one_block_takes_are_compared_row_by_row_whatever_the_widths() -> None:
    model, anchor, examples = net(nn.Conv1d(2, 3, 1)), net(nn.Conv1d(2, 7, 1), seed=1), inputs(128, 2, 1500)
    a, b = (activations(one, examples, {"": 1})[""] for one in (model, anchor))
    assert len(a) > BLOCK / 7
    (found,) = compared(model, anchor.state_dict(), examples).values()
    np.testing.assert_allclose(found, corrcoef(a, b), atol=2e-6)


def test_correlations_are_free_of_scale_and_centre() -> None:
    model, examples = mlp(), inputs(50)
    moved = {name: value.clone() for name, value in model.state_dict().items()}
    moved["0.weight"] *= torch.tensor([1e-3, 0.1, 1, 5, 30, 1e3])[:, None]
    moved["0.bias"] += 2
    found = compared(model, moved, examples)["0"]
    np.testing.assert_allclose(found, compared(model, model.state_dict(), examples)["0"], atol=1e-4)
    np.testing.assert_allclose(found.diagonal(), np.ones(6), atol=1e-4)


def test_a_constant_unit_correlates_with_nothing() -> None:
    model, examples = mlp(), inputs(MANY)
    with torch.no_grad():
        model[0].weight[2] = 0  # type: ignore[index]
        model[0].bias[2] = 0.1  # type: ignore[index]
    found = compared(model, mlp(1).state_dict(), examples)["0"]
    assert (found[2] == 0).all()
    assert (found[[0, 1, 3, 4, 5]] != 0).all()
    single = compared(model, mlp(1).state_dict(), inputs(1))
    assert all((value == 0).all() for value in single.values())


def test_a_unit_that_varies_by_rounding_alone_correlates_with_nothing() -> None:
    model, examples = mlp(), inputs(MANY)
    with torch.no_grad():
        model[0].weight[2] *= 3e-5  # type: ignore[index]
        model[0].bias[2] = 1000  # type: ignore[index]
    assert len(np.unique(activations(model, examples, {"0": -1})["0"][:, 2])) > 1
    assert (compared(model, mlp(1).state_dict(), examples)["0"][2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correlations_go_by_the_models_own_private_parameters(dtype: torch.dtype) -> None:
    model, anchor, examples = mlp(1).to(dtype), mlp(2).to(dtype).state_dict(), inputs(20)
    known = {name: value for name, value in anchor.items() if name.startswith("0.")}
    whole = {**model.state_dict(), **known}
    found = correlations(PrivateHead(), model, known, examples, Request(cross_moments=True), seed=0)
    assert found.keys() == {"0"}
    torch.testing.assert_close(found["0"], compared(model, whole, examples)["0"])


def test_a_model_whose_outputs_overflow_correlates_with_nothing() -> None:
    pair = Pair()
    pair.add(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double(), torch.tensor([[1e300, 1.0], [-1e300, 2.0]]).double())
    found = pair.correlation()
    assert found[:, 0].tolist() == [0, 0]
    assert found[:, 1].tolist() == pytest.approx([1, -1])


def test_correlations_are_over_the_limited_examples() -> None:
    model, anchor, examples = mlp(1), mlp(2), inputs(50)
    found = compared(model, anchor.state_dict(), examples, gradients=Gradients(limit=2))["0"]
    assert torch.allclose(found.abs(), torch.ones(6, 6), atol=1e-4)  # two points lie on a line


def test_comparing_leaves_both_models_as_they_were() -> None:
    model, anchor, examples = normed(1).train(), normed(2).state_dict(), inputs(5, 1, 6, 6)
    before = deepcopy((model.state_dict(), anchor))
    compared(model, anchor, examples)
    for state, kept in zip((model.state_dict(), anchor), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in state.items())
    assert all(module.training for module in model.modules())


# --- what a client answers ------------------------------------------------------------------------------------------


def test_measure_returns_moments_and_correlations_where_asked() -> None:
    model, anchor, examples = mlp(1), mlp(2).state_dict(), inputs(20)
    request = Request(moments=True, cross_moments=True)
    assert unsupported(request, Labels()) is None
    fields = measure(Labels(), model, examples, request, seed=0, anchor=anchor)
    assert fields.keys() == {"moments", "cross_moments"}
    torch.testing.assert_close(fields["cross_moments"], compared(model, anchor, examples))
    assert fields["moments"].keys() == {"0", "2"}


def test_correlations_without_a_model_to_compare_with_are_refused() -> None:
    with pytest.raises(ValueError, match="name an `anchor`"):
        measure(Labels(), mlp(), inputs(3), Request(cross_moments=True), seed=0)


def test_every_layer_has_its_channels_last() -> None:
    layers = dict(plain_layers(net(nn.Conv1d(2, 3, 1), nn.Conv3d(2, 3, 1)), ()))
    for name, shape in {"0": (2, 3, 5), "1": (2, 3, 4, 5, 6)}.items():
        x = torch.randn(shape)
        assert torch.equal(torch.cat([*channel_rows(layers[name], x)]), x.movedim(1, -1).flatten(0, -2))


def test_what_is_sent_is_float32_of_sums_in_float64() -> None:
    running = Running()
    running.add(torch.full((3, 2), 1 / 3, dtype=torch.float64))
    assert running.mean.dtype == torch.float64
    assert running.moments().mean.dtype == torch.float32
