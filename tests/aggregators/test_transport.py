"""Optimal transport: plans between units, and what they carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, images, lenet
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from aggregators.core.fitting import fit
from aggregators.core.matching import assign, correlation
from aggregators.core.symmetry import Concat, Product, Symmetry, inverse
from aggregators.core.tracing import trace
from aggregators.core.transport import (
    FLOOR,
    Planner,
    importance,
    permutation,
    plan,
    reverse,
    staying,
    transport,
    transport_update,
    uniform,
)
from aggregators.core.update import ClientUpdate, Moments, Tensors
from client.task import tensors

seeds = st.integers(0, 2**31)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- plans ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=seeds, units=st.integers(1, 5))
def test_between_equal_widths_the_exact_plan_is_the_best_assignment(seed: int, units: int) -> None:
    cost = drawn(units, units, seed=seed).exp()
    found = plan(cost, *uniform(units, units))
    best = min(sum(float(cost[i, one[i]]) for i in range(units)) for one in permutations(range(units)))
    assert units * float((found * cost).sum()) == pytest.approx(best)
    assert permutation({"g": found}) is not None
    assert torch.equal(found.argmax(1), assign(-cost))


@settings(max_examples=30)
@given(seed=seeds, units=st.integers(1, 6), others=st.integers(1, 6), even=st.booleans())
def test_between_any_widths_and_masses_the_exact_plan_is_the_linear_programs(
    seed: int, units: int, others: int, even: bool
) -> None:
    cost = drawn(units, others, seed=seed).exp()
    masses = uniform(units, others) if even else (drawn(units, seed=seed + 1).exp(), drawn(others, seed=seed + 2).exp())
    mu, nu = (mass / mass.sum() for mass in masses)
    found = plan(cost, *masses)
    sums = np.concatenate([np.kron(np.eye(units), np.ones(others)), np.kron(np.ones(units), np.eye(others))])
    best = linprog(cost.flatten().numpy(), A_eq=sums, b_eq=torch.cat([mu, nu]).numpy())
    assert float((found * cost).sum()) == pytest.approx(best.fun, rel=1e-6)
    torch.testing.assert_close(found.sum(1), mu)
    torch.testing.assert_close(found.sum(0), nu)


@pytest.mark.parametrize(("units", "others"), [(6, 6), (6, 9), (7, 4)])
def test_sinkhorns_plan_meets_its_marginals_and_tends_to_the_exact_one(units: int, others: int) -> None:
    cost, (mu, nu) = drawn(units, others).sigmoid(), uniform(units, others)
    exact = plan(cost, mu, nu)
    gaps = []
    for regularisation in (1.0, 0.3, 0.1, 0.03, 0.01):
        found = plan(cost, mu, nu, regularisation)
        torch.testing.assert_close(found.sum(1), mu / mu.sum())
        torch.testing.assert_close(found.sum(0), nu / nu.sum())
        assert permutation({"g": found}) is None
        gaps.append(float(((found - exact) * cost).sum()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 50 * abs(gaps[-1])


@pytest.mark.parametrize("scale", [1e-20, 1e8, 1e30])
def test_an_exact_plan_meets_its_marginals_whatever_the_scale_of_masses_and_costs(scale: float) -> None:
    cost, mu, nu = scale * drawn(60, 80).exp(), scale * drawn(60, seed=1).exp(), drawn(80, seed=2).exp()
    found = plan(cost, mu, nu)
    torch.testing.assert_close(found.sum(1), mu / mu.sum())
    torch.testing.assert_close(found.sum(0), nu / nu.sum())
    torch.testing.assert_close((found * cost).sum(), (plan(cost / scale, mu / scale, nu) * cost).sum())


def test_sinkhorns_plan_is_the_same_by_logarithms_which_steep_costs_need(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, masses = drawn(4, 6).exp(), uniform(4, 6)
    plain = plan(cost, *masses, 0.1)
    monkeypatch.setattr("aggregators.core.transport.RANGE", 0)
    torch.testing.assert_close(plan(cost, *masses, 0.1), plain, rtol=1e-6, atol=1e-9)
    monkeypatch.undo()
    steep = plan(cost, *masses, 0.005)
    gaps = [float(((found - plan(cost, *masses)) * cost).sum()) for found in (plain, steep)]
    assert abs(gaps[1]) < gaps[0] / 2


def test_sinkhorns_plan_does_not_depend_on_the_unit_of_costs() -> None:
    cost, masses = drawn(4, 6).exp(), uniform(4, 6)
    torch.testing.assert_close(plan(cost, *masses, 0.1), plan(1000 * cost, *masses, 0.1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(plan(0 * cost, *masses, 0.1), torch.full((4, 6), 1 / 24, dtype=torch.float64))


@given(units=st.integers(1, 60), others=st.integers(1, 60))
def test_equal_masses_are_whole_and_of_one_sum(units: int, others: int) -> None:
    mu, nu = uniform(units, others)
    assert (len(mu), len(nu)) == (units, others)
    assert mu.sum() == nu.sum()
    assert all(torch.equal(mass, mass[0].round().expand(len(mass))) for mass in (mu, nu))


def test_importance_goes_by_the_lengths_of_rows() -> None:
    weights = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    expected = torch.tensor([5.0, 0, 1], dtype=torch.float64) + FLOOR * 2
    torch.testing.assert_close(importance(weights), expected)
    assert (importance(torch.zeros(3, 2)) > 0).all()


@given(units=st.integers(1, 12), others=st.integers(1, 12))
def test_the_plan_that_stays_meets_the_marginals_and_never_crosses(units: int, others: int) -> None:
    mu, nu = uniform(units, others)
    found = staying(mu, nu)
    torch.testing.assert_close(found.sum(1), mu / mu.sum())
    torch.testing.assert_close(found.sum(0), nu / nu.sum())
    places = (found > 1e-12).nonzero()
    assert (places.diff(dim=0) >= 0).all()
    if units == others:
        torch.testing.assert_close(found, torch.eye(units, dtype=torch.float64) / units)


def test_a_plan_that_splits_or_joins_units_is_no_permutation() -> None:
    eye = torch.eye(3, dtype=torch.float64) / 3
    for other in (eye.repeat_interleave(2, 0), eye.repeat_interleave(2, 1), eye + 0.01):
        assert permutation({"g": eye, "h": other}) is None
    found = permutation({"g": eye, "h": eye[[2, 0, 1]]})
    assert found is not None
    assert {group: index.tolist() for group, index in found.items()} == {"g": [0, 1, 2], "h": [1, 2, 0]}


# --- networks -------------------------------------------------------------------------------------------------------


def perceptron(*widths: int) -> nn.Module:
    a, b = widths or (6, 5)
    layers = (nn.Linear(12, a), nn.ReLU(), nn.Linear(a, b), nn.Tanh(), nn.Linear(b, 4))
    return nn.Sequential(nn.Flatten(), *layers)


def convolutional() -> nn.Module:
    """With batch norms, and channels that a linear layer reads as blocks of positions."""
    first = (nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, nn.Linear(24, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


class Stream(nn.Module):
    """Two blocks write to a stream that convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.up, self.norm, self.down = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, padding=1)
        self.out = nn.Linear(4 * 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.down(torch.relu(self.norm(self.up(x))))
        y: Tensor = self.out(x.flatten(1))
        return y


class Backward(nn.Module):
    """Units that tanh keeps from being scaled, of words and transposed convolutions: second axes bring them forth."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.up, self.back, self.out = nn.ConvTranspose1d(4, 5, 2), nn.ConvTranspose1d(5, 3, 1), nn.Linear(39, 2)

    def forward(self, x: Tensor) -> Tensor:
        words = torch.tanh(self.words(x.flatten(1).long().abs() % 6).mT)
        y: Tensor = self.out(torch.tanh(self.back(torch.tanh(self.up(words)))).flatten(1))
        return y


SMALL = images(1, 3, 4)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "perceptron": (perceptron, SMALL),
    "convolutional": (convolutional, SMALL),
    "stream": (Stream, SMALL),
    "backward": (Backward, 3 * SMALL),
    "LeNet": (lenet, NETWORKS["LeNet"].example),
}
every_net = pytest.mark.parametrize("name", NETS)


@cache
def net(name: str) -> tuple[nn.Module, Symmetry]:
    make, example = NETS[name]
    module = make().eval()
    return module, trace(module, example)


def params_of(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Every parameter and running statistic at random, float64."""
    generator = torch.Generator().manual_seed(seed)

    def one(name: str, value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return noise.abs() + 0.5 if "var" in name else noise / max(1, value[:1].numel()) ** 0.5

    return {n: one(n, value) if value.is_floating_point() else value for n, value in tensors(module).items()}


def computed(name: str, params: Tensors) -> Tensor:
    """What the network puts out with tensors of whatever widths."""
    module = NETS[name][0]().double().eval()
    fit(module, params)
    module.load_state_dict(dict(params))
    y: Tensor = module(NETS[name][1].double())
    return y.detach()


def shuffled(symmetry: Symmetry, params: Tensors, seed: int = 3) -> dict[str, Tensor]:
    """A permutation at random."""
    generator = torch.Generator().manual_seed(seed)
    return {group: torch.randperm(units, generator=generator) for group, units in symmetry.sizes(params).items()}


READERS = {  # tensors that read units
    "perceptron": ("3.weight", "5.weight"),
    "convolutional": ("4.weight", "7.weight"),
    "stream": ("up.weight", "down.weight", "out.weight"),
    "backward": ("up.weight", "back.weight", "out.weight"),
    "LeNet": ("3.weight", "7.weight", "9.weight", "11.weight"),
}


def duplicated(name: str, params: Tensors, times: int) -> dict[str, Tensor]:
    """The same function with every unit so many times, each read by an equal part, in an order at random."""
    _, symmetry = net(name)
    units = {group: torch.arange(n).repeat(times) for group, n in symmetry.sizes(params).items()}
    wide = symmetry.take(params, units)
    wide = {key: value / times if key in READERS[name] else value for key, value in wide.items()}
    return symmetry.permute(wide, shuffled(symmetry, wide))


def planner(symmetry: Symmetry, params: Tensors, **options: Any) -> Planner:
    names = [name for name in params if "running" not in name and "num_batches" not in name]
    return Planner(symmetry, names, **options)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], value) for name, value in b.items())


@every_net
@pytest.mark.parametrize("passes", [1, 3])
def test_a_permuted_twin_comes_back_exactly(name: str, passes: int) -> None:
    module, symmetry = net(name)
    params = params_of(module)
    places = shuffled(symmetry, params)
    twin = symmetry.permute(params, places)
    found = planner(symmetry, params, passes=passes).plans(twin, params)
    assert same(permutation(found.plans) or {}, inverse(places))
    assert same(transport(symmetry, twin, found.plans), params)
    assert found.after == pytest.approx(0, abs=1e-6)
    assert found.before > 1
    moved = sum(int((index != torch.arange(len(index))).sum()) for index in places.values())
    assert found.moved_share == pytest.approx(moved / sum(map(len, places.values())))


@every_net
@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_duplicated_units_are_carried_without_loss_by_sums(name: str, one: int, other: int) -> None:
    module, symmetry = net(name)
    params = params_of(module)
    given, reference = (duplicated(name, params, times) for times in (one, other))
    torch.testing.assert_close(computed(name, given), computed(name, params))
    plans = planner(symmetry, params).plans(given, reference).plans
    moved = transport(symmetry, given, plans)
    assert symmetry.sizes(moved) == symmetry.sizes(reference)
    torch.testing.assert_close(computed(name, moved), computed(name, params))
    torch.testing.assert_close(transport(symmetry, moved, reverse(plans)), given)


@every_net
def test_duplicated_units_are_not_carried_without_loss_by_means(name: str) -> None:
    module, symmetry = net(name)
    params = params_of(module)
    given = duplicated(name, params, 2)
    plans = planner(symmetry, params, outgoing="mean").plans(given, params).plans
    gap = (computed(name, transport(symmetry, given, plans, "mean")) - computed(name, params)).abs().max()
    assert gap > 0.05


def test_an_lstms_gates_and_its_own_past_are_carried_alike() -> None:
    """Its units doubled, each of the four gates, and what reads them halved."""
    narrow, wide = (nn.LSTM(5, units, batch_first=True).double() for units in (3, 6))
    gates, inputs = Concat(("h",) * 4), (None,)
    symmetry = Symmetry(
        {"weight_ih_l0": (gates, *inputs), "weight_hh_l0": (gates, "h"), "bias_ih_l0": (gates,), "bias_hh_l0": (gates,)}
    )
    params = params_of(narrow)
    double = symmetry.take(params, {"h": torch.tensor([2, 0, 1, 1, 2, 0])})
    double["weight_hh_l0"] = double["weight_hh_l0"] / 2
    words = drawn(2, 4, 5)
    expected = functional_call(narrow, params, words)[0]
    doubled = functional_call(wide, double, words)[0]
    torch.testing.assert_close(doubled, expected[..., [2, 0, 1, 1, 2, 0]])
    moved = transport(symmetry, double, Planner(symmetry, [*params]).plans(double, params).plans)
    torch.testing.assert_close(functional_call(narrow, moved, words)[0], expected)


def test_running_statistics_follow_as_convex_combinations() -> None:
    module, symmetry = net("convolutional")
    params = params_of(module)
    masses = {group: drawn(n, n + 2, seed=n).exp() for group, n in symmetry.sizes(params).items()}
    moved = transport(symmetry, params, masses)
    for part, group in (("1", "0"), ("5", "4")):
        for key in ("weight", "bias", "running_mean", "running_var"):
            expected = (masses[group].T @ params[f"{part}.{key}"]) / masses[group].sum(0)
            torch.testing.assert_close(moved[f"{part}.{key}"], expected)
    assert torch.equal(moved["1.num_batches_tracked"], params["1.num_batches_tracked"])


@every_net
def test_inputs_and_the_last_layers_outputs_are_never_carried(name: str) -> None:
    module, symmetry = net(name)
    params = params_of(module)
    first, *_, last = (key for key in params if key.endswith("weight"))
    masses = {group: drawn(n, n, seed=n).exp() for group, n in symmetry.sizes(params).items()}
    moved = transport(symmetry, params, masses)
    assert torch.equal(moved[last.replace("weight", "bias")], params[last.replace("weight", "bias")])
    assert moved[last].shape == params[last].shape
    scaled = {**params, last: params[last] * drawn(len(params[last]), 1)}
    torch.testing.assert_close(transport(symmetry, scaled, masses)[last], moved[last] * drawn(len(params[last]), 1))
    pixel = {**params, first: params[first].clone()}
    inputs = 0 if name == "backward" else -1  # words are the rows of a table
    pixel[first].select(inputs, 0).zero_()
    assert (transport(symmetry, pixel, masses)[first].select(inputs, 0) == 0).all()


# --- loops ----------------------------------------------------------------------------------------------------------

BLOCKS = Symmetry({"a.weight": ("g", None), "a.bias": ("g",), "b.weight": ("h", Product(("g", 2))), "c": (None, "h")})
SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (3, 8), "c": (2, 3), "scale": ()}
WIDE = {"a.weight": (6, 3), "a.bias": (6,), "b.weight": (2, 12), "c": (2, 2), "scale": ()}


def blocks(shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> dict[str, Tensor]:
    return {name: drawn(*shape, seed=seed + place) for place, (name, shape) in enumerate(shapes.items())}


def masses() -> dict[str, Tensor]:
    return {"g": drawn(4, 6, seed=8).exp(), "h": drawn(3, 2, seed=9).exp()}


def looped(params: Tensors, share: Callable[[str, bool, int, int], float]) -> dict[str, Tensor]:
    """Σ over units of what `share` says of (group, whether it is read, unit, unit after), entry by entry."""
    out = {name: torch.zeros(WIDE[name], dtype=torch.float64) for name in params}
    for i, j in product(range(4), range(6)):
        for name in params.keys() & {"a.weight", "a.bias"}:
            out[name][j] += share("g", False, i, j) * params[name][i]
        for p, q, at in product(range(3), range(2), range(2)):
            weight = share("h", False, p, q) * share("g", True, i, j)
            out["b.weight"][q, 2 * j + at] += weight * params["b.weight"][p, 2 * i + at]
    for p, q in product(range(3), range(2)):
        out["c"][:, q] += share("h", True, p, q) * params["c"][:, p]
    return {**out, "scale": params["scale"]}


@pytest.mark.parametrize("outgoing", ["sum", "mean"])
def test_parameters_are_carried_as_a_loop_over_units_carries_them(outgoing: Any) -> None:
    T = masses()

    def share(group: str, read: bool, i: int, j: int) -> float:
        whole = T[group][i].sum() if read and outgoing == "sum" else T[group][:, j].sum()
        return float(T[group][i, j] / whole)

    torch.testing.assert_close(transport(BLOCKS, blocks(), T, outgoing), looped(blocks(), share))


def test_gradients_and_their_squares_are_convex_combinations_as_a_loop_finds_them() -> None:
    T = masses()
    sums, squares = blocks(seed=20), {name: value.exp() for name, value in blocks(seed=40).items()}
    update = ClientUpdate(
        client_id=1, num_examples=5, num_grads=4, params=blocks(), grad_sum=sums, sq_grad_sum=squares,
        gram={"a": torch.eye(4)}, moments={"a": Moments(1, torch.ones(4), torch.ones(4))},
    )  # fmt: skip
    moved = transport_update(BLOCKS, update, T)

    def share(group: str, read: bool, i: int, j: int) -> float:
        return float(T[group][i, j] / T[group][:, j].sum())

    torch.testing.assert_close(moved.grad_sum, looped(sums, share))
    torch.testing.assert_close(moved.sq_grad_sum, looped(squares, share))
    assert (moved.num_examples, moved.num_grads) == (5, 4)
    rest = (moved.gram, moved.grad_gram, moved.moments, moved.cross_moments, moved.grad_sketch)
    assert not any(rest)


def test_an_update_is_permuted_with_every_statistic_where_plans_permute() -> None:
    places = {"g": torch.tensor([2, 0, 3, 1]), "h": torch.tensor([1, 2, 0])}
    plans = {
        group: torch.eye(len(index), dtype=torch.float64)[:, index] / len(index) for group, index in places.items()
    }
    update = ClientUpdate(
        client_id=1, num_examples=5, params=blocks(), sq_grad_sum=blocks(seed=2), num_grads=1,
        gram={"b": drawn(9, 9)}, moments={"a": Moments(1, drawn(4), drawn(4))}, cross_moments={"a": drawn(4, 4)},
    )  # fmt: skip
    moved, expected = transport_update(BLOCKS, update, plans), BLOCKS.permute_update(update, places)
    for field in ("params", "sq_grad_sum", "gram", "cross_moments"):
        assert same(getattr(moved, field), getattr(expected, field))
    assert torch.equal(moved.moments["a"].mean, update.moments["a"].mean[places["g"]])


def far(a: Tensor, b: Tensor) -> Tensor:
    """The distance of each pair of rows, by a loop."""
    return torch.tensor([[float((x - y).square().sum().sqrt()) for y in b] for x in a], dtype=torch.float64)


@pytest.mark.parametrize("passes", [1, 2])
def test_costs_are_distances_of_all_that_is_carried_already(passes: int) -> None:
    a, b = blocks(), blocks(WIDE, seed=10)
    own = {"g": torch.cat([a["a.weight"], a["a.bias"][:, None]], 1)}
    others = {"g": torch.cat([b["a.weight"], b["a.bias"][:, None]], 1)}
    g = plan(far(own["g"], others["g"]), *uniform(4, 6))
    read = torch.einsum("ij,pik->pjk", g / g.sum(1, keepdim=True), a["b.weight"].view(3, 4, 2)).flatten(1)
    own["h"] = torch.cat([read, a["c"].T * (3 / 2)], 1)
    others["h"] = torch.cat([b["b.weight"], b["c"].T], 1)
    h = plan(far(own["h"], others["h"]), *uniform(3, 2))
    if passes == 2:
        forth = ((h / h.sum(0)).T @ a["b.weight"]).view(2, 4, 2).movedim(1, 0).flatten(1) * (4 / 6)
        own["g"] = torch.cat([own["g"], forth], 1)
        others["g"] = torch.cat([others["g"], b["b.weight"].view(2, 6, 2).movedim(1, 0).flatten(1)], 1)
        g = plan(far(own["g"], others["g"]), *uniform(4, 6))
        read = torch.einsum("ij,pik->pjk", g / g.sum(1, keepdim=True), a["b.weight"].view(3, 4, 2)).flatten(1)
        own["h"] = torch.cat([read, own["h"][:, 12:]], 1)
        h = plan(far(own["h"], others["h"]), *uniform(3, 2))
    found = Planner(BLOCKS, [*SHAPES], passes=passes).plans(a, b)
    for group, expected in (("g", g), ("h", h)):
        torch.testing.assert_close(found.plans[group], expected)
    costs = {group: far(own[group], others[group]) for group in own}
    assert found.after == pytest.approx(sum(float((costs[k] * found.plans[k]).sum()) for k in costs))
    stays = {"g": staying(*uniform(4, 6)), "h": staying(*uniform(3, 2))}
    assert found.before == pytest.approx(sum(float((costs[k] * stays[k]).sum()) for k in costs))


def test_important_units_carry_more() -> None:
    a, b = blocks(), blocks(WIDE, seed=10)
    plans = Planner(BLOCKS, [*SHAPES], important=True).plans(a, b).plans
    lengths = torch.cat([a["a.weight"], a["a.bias"][:, None]], 1).norm(dim=1)
    masses = lengths + FLOOR * lengths.mean()
    torch.testing.assert_close(plans["g"].sum(1), masses / masses.sum())


def test_a_group_waits_until_something_of_it_can_be_compared() -> None:
    """The head is the first tensor, and of the last group nothing trains."""
    symmetry = Symmetry({"head": ("h", "g"), "first": ("g", None), "out": (None, "h"), "norm": ("n",)})
    assert Planner(symmetry, ["head", "first"]).order == ["g", "h", "n"]
    params = {"head": drawn(3, 4), "first": drawn(4, 2), "out": drawn(2, 3), "norm": drawn(5)}
    found = Planner(symmetry, ["head", "first"]).plans(params, {**params, "norm": drawn(5, seed=1)})
    torch.testing.assert_close(found.plans["n"], torch.eye(5, dtype=torch.float64) / 5)


# --- activations ----------------------------------------------------------------------------------------------------


def test_correlations_are_means_over_layers_and_the_channels_of_a_block() -> None:
    symmetry = Symmetry({"a.weight": (Product(("g", 2)), None), "b.weight": ("g", None), "c.weight": (None, "g")})
    found = {"a": drawn(4, 6), "b": drawn(2, 3, seed=1), "c": drawn(5, 5, seed=2)}
    means = correlation(symmetry, "g", found, ({"g": 2}, {"g": 3}))
    assert means is not None
    for i, j in product(range(2), range(3)):
        blockwise = (found["a"][2 * i, 2 * j] + found["a"][2 * i + 1, 2 * j + 1]) / 2
        assert float(means[i, j]) == pytest.approx(float((blockwise + found["b"][i, j]) / 2))
    assert correlation(symmetry, "g", {"c": found["c"]}, ({"g": 2}, {"g": 3})) is None


def test_units_are_planned_by_their_correlations_and_ties_by_their_weights() -> None:
    a, b = blocks(), blocks(WIDE, seed=10)
    rho = 2 * torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    found = Planner(BLOCKS, [*SHAPES]).plans(a, b, {"a": rho}).plans
    exact = plan((2 - 2 * rho).sqrt(), *uniform(4, 6))
    torch.testing.assert_close(found["g"], exact)
    tied, weights = (Planner(BLOCKS, [*SHAPES]).plans(a, b, given).plans for given in ({"a": 0 * rho + 1}, {}))
    torch.testing.assert_close(tied, weights)


# --- speed ----------------------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_there_is_no_loop_over_units() -> None:
    numbers = []
    for width in (8, 80):
        module = perceptron(width, width)
        symmetry = net("perceptron")[1]
        a, b = (params_of(module, seed) for seed in (1, 2))
        with Counting() as counting:  # type: ignore[no-untyped-call]
            found = Planner(symmetry, [*a]).plans(a, b)
            transport(symmetry, a, found.plans)
        numbers.append(counting.number)
    assert numbers[0] == numbers[1]
