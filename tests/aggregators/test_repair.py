"""REPAIR against what networks put out, measured here, against batch norms in train mode, and against loops."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad, unfold
from toys import fingerprint

from aggregators.core.exchange import Exchange, Question, run
from aggregators.core.registry import parse
from aggregators.core.symmetry import Concat, Product, Symmetry
from aggregators.core.tracing import trace
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Merged, Moments, Request, Tensors
from aggregators.restore.repair import Joint, Repair
from aggregators.weight_average.fedavg import FedAvg
from aggregators.weight_average.fisher import Fisher
from server import loopback

# --- networks, and clients that measure them by hooks -----------------------------------------------------------


class Network(NamedTuple):
    """A module, its symmetry, the layers to repair in order, and the shape of an input."""

    module: nn.Module
    symmetry: Symmetry
    layers: tuple[str, ...]
    shape: tuple[int, ...]


MLP = Network(
    nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)),
    Symmetry(
        {
            "0.weight": ("0", None),
            "0.bias": ("0",),
            "2.weight": ("2", "0"),
            "2.bias": ("2",),
            "4.weight": ("4", "2"),
            "4.bias": ("4",),
            "6.weight": (None, "4"),
        }
    ),
    ("0", "2", "4"),
    (5,),
)
CONV = Network(
    nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    ),
    Symmetry(
        {
            "0.weight": ("0", None, None, None),
            "0.bias": ("0",),
            "2.weight": ("2", "0", None, None),
            "5.weight": ("5", Product(("2", 4))),
            "5.bias": ("5",),
            "7.weight": (None, "5"),
        }
    ),
    ("0", "2", "5"),
    (2, 6, 6),
)
NETWORKS = pytest.mark.parametrize("network", [MLP, CONV], ids=["mlp", "conv"])
MODES = pytest.mark.parametrize(
    "settings", [{"mode": "gram"}, {"mode": "exact"}, {"mode": "exact", "goal": "mean_std"}], ids=str
)


@dataclass(frozen=True, eq=False)
class Site:
    """A client with a model of its own and inputs x, whose layers are watched by hooks."""

    client_id: int
    network: Network
    params: Tensors
    x: Tensor

    def reply(self, exchange: Exchange[Any]) -> ClientUpdate:
        """Its own model with statistics at it, or those of the model that it was sent."""
        training = exchange.task == "train"
        params = self.params if training else exchange.sent(self.client_id) or {}
        seen = self.watched(params)
        asked = exchange.request
        return ClientUpdate(
            client_id=self.client_id,
            num_examples=len(self.x),
            num_grads=len(self.x),
            params=params if training else {},
            gram={name: rows.T @ rows for name, (rows, _) in seen.items()} if asked.gram else {},
            moments={name: moments(z) for name, (_, z) in seen.items()} if asked.moments else {},
        )

    def watched(self, params: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
        """Of every layer what enters, [x, 1] row by row, and what it puts out, (n, out)."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(name: str) -> Any:
            return lambda layer, args, z: seen.update(
                {name: (entered(layer, args[0]), z.movedim(1, -1).flatten(0, -2))}
            )

        layers = {n: m for n, m in self.network.module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
        with torch.no_grad():
            functional_call(self.network.module.eval(), dict(params), (self.x,))
        for handle in handles:
            handle.remove()
        return seen

    def outputs(self, params: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of a layer."""
        z = self.watched(params)[layer][1]
        return z.mean(0), z.std(0, correction=0)


def entered(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        x = unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2).flatten(0, 1)
    return pad(x, (0, 1), value=1.0)


def moments(z: Tensor) -> Moments:
    return Moments(len(z), z.mean(0), (z - z.mean(0)).square().sum(0))


def started(network: Network, dtype: torch.dtype = torch.float64) -> GlobalModel:
    own = {name: value.clone().to(dtype) for name, value in network.module.state_dict().items()}
    return GlobalModel(
        params=own, trainable=frozenset(dict(network.module.named_parameters())), symmetry=network.symmetry
    )


def drawn(network: Network, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Parameters of the network at random."""
    generator = torch.Generator().manual_seed(seed)
    own = network.module.state_dict()
    return {n: torch.randn(v.shape, generator=generator, dtype=torch.float64).to(dtype) for n, v in own.items()}


def data(network: Network, seed: int, num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs whose mean and scale differ from client to client."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(num, *network.shape, generator=generator, dtype=torch.float64)
    return ((1 + seed) * x + seed).to(dtype)


def cohort(network: Network, sizes: Sequence[int] = (60, 25, 90)) -> list[Site]:
    """Clients with unrelated models and data."""
    return [Site(i, network, drawn(network, i), data(network, i, num)) for i, num in enumerate(sizes)]


def answers(sites: Sequence[Any]) -> Callable[[Exchange[Any]], Iterator[ClientUpdate]]:
    return lambda exchange: (site.reply(exchange) for site in sites)


def repaired(network: Network, sites: Sequence[Any], **settings: Any) -> Merged:
    return run(Repair(inner=FedAvg(), **settings).round(started(network)), answers(sites))


def averaged(network: Network, sites: Sequence[Any]) -> Tensors:
    return run(FedAvg().round(started(network)), answers(sites)).params


def put_out(sites: Sequence[Site], layer: str, params: Tensors | None, goal: str = "within") -> tuple[Tensor, Tensor]:
    """Mean and spread of a layer averaged over clients, of one model or of each client's own."""
    found = [site.outputs(site.params if params is None else params, layer) for site in sites]
    weights = torch.tensor([len(site.x) for site in sites]).double()
    weights /= weights.sum()
    mean, std = (sum(w * one[i] for w, one in zip(weights, found, strict=True)) for i in (0, 1))
    within = sum(w * one[1].square() for w, one in zip(weights, found, strict=True))
    return torch.as_tensor(mean), torch.as_tensor(within).sqrt() if goal == "within" else torch.as_tensor(std)


# --- the targets ------------------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("goal", ["within", "mean_std"])
def test_exact_repair_meets_its_targets_in_every_layer(network: Network, goal: Any) -> None:
    sites = cohort(network)
    merged = repaired(network, sites, mode="exact", goal=goal, cap=1e6)
    assert float(merged.metrics["capped_share"]) == 0
    for layer in network.layers:
        target, found = put_out(sites, layer, None, goal), put_out(sites, layer, merged.params, goal)
        torch.testing.assert_close(found[1], target[1], rtol=1e-4, atol=0)
        if f"{layer}.bias" in merged.params:
            torch.testing.assert_close(found[0], target[0], rtol=1e-4, atol=1e-4)


@NETWORKS
def test_an_average_of_unrelated_models_has_lost_spread_before(network: Network) -> None:
    sites = cohort(network)
    plain = averaged(network, sites)
    for layer in network.layers:
        assert (put_out(sites, layer, plain)[1] < 0.9 * put_out(sites, layer, None)[1]).double().mean() > 0.8


@NETWORKS
def test_in_the_first_layer_gram_repair_is_exact_repair(network: Network) -> None:
    gram, exact = (repaired(network, cohort(network), mode=mode).params for mode in ("gram", "exact"))
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(gram[name], exact[name], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(gram["2.weight"], exact["2.weight"])


def chained(c: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The inputs' covariance when what they come from covaries as `after`, entry by entry."""
    pairs = [(i, j) for i in range(len(c)) for j in range(len(c)) if i != j]
    scale = {(i, j): np.sqrt(c[i, i] * c[j, j] / (before[i, i] * before[j, j])) for i, j in pairs}
    x, y = np.array([scale[pair] * before[pair] for pair in pairs]), np.array([c[pair] for pair in pairs])
    slope = min(1.0, max(0.0, np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]))
    moved = c.copy()
    for pair in pairs:
        moved[pair] += slope * scale[pair] * (after[pair] - before[pair])
    return moved


@NETWORKS
def test_gram_repair_is_the_formula_in_every_layer(network: Network) -> None:
    sites = cohort(network)
    merged, plain = repaired(network, sites).params, averaged(network, sites)
    weights = np.array([len(site.x) for site in sites]) / sum(len(site.x) for site in sites)
    ends: tuple[np.ndarray, np.ndarray] | None = None
    for layer in network.layers:
        target_mean, target_std = (part.numpy() for part in put_out(sites, layer, None))
        seen = [[part.numpy() for part in site.watched(site.params)[layer]] for site in sites]
        rows, out = [x[:, :-1] for x, _ in seen], [z for _, z in seen]
        mean = sum(w * x.mean(0) for w, x in zip(weights, rows, strict=True))
        spread, own = (
            sum(w * np.cov(x.T, bias=True) for w, x in zip(weights, part, strict=True)) for part in (rows, out)
        )
        covariance = chained(spread, *ends) if ends is not None and len(ends[0]) == len(spread) else spread
        weight = plain[f"{layer}.weight"].numpy()
        flat = weight.reshape(len(weight), -1)
        factors = []
        for unit, row in enumerate(flat):
            var = max(row @ covariance @ row, 0.25 * (row @ spread @ row))
            factors.append(min(target_std[unit] / np.sqrt(var), 10.0))
            np.testing.assert_allclose(merged[f"{layer}.weight"][unit].flatten(), factors[-1] * row, rtol=1e-9)
            if f"{layer}.bias" in plain:
                bias = target_mean[unit] - factors[-1] * (row @ mean)
                np.testing.assert_allclose(merged[f"{layer}.bias"][unit], bias, rtol=1e-9, atol=1e-9)
        ends = own, np.outer(factors, factors) * (flat @ covariance @ flat.T)


def test_where_the_merges_covariance_leaves_a_channel_no_variance_its_factor_is_bounded() -> None:
    inputs = Joint(torch.zeros(2).double(), torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double())
    before, after = inputs, Joint(torch.zeros(2).double(), torch.tensor([[1.0, 1.5], [1.5, 1.0]]).double())
    row = torch.tensor([[1.0, -1.0]]).double()
    plain, moved = inputs.through(row), inputs.following(before, after).through(row)
    assert moved.covariance.item() < 0
    assert moved.at_least(0.25 * plain.covariance.diagonal()).channels.std.item() == pytest.approx(0.5)


def test_inputs_that_do_not_follow_the_units_before_them_keep_their_covariance() -> None:
    inputs = Joint(torch.zeros(3), torch.eye(3).double())
    before, after = (Joint(torch.zeros(3), torch.eye(3).double() + c) for c in (0.2, 0.9))
    assert torch.equal(inputs.following(before, after).covariance, inputs.covariance)


def test_on_shared_data_it_is_the_papers_reset_of_inserted_batch_norms() -> None:
    """Batch norms behind each layer, with the mean of the ends' statistics, see the data in train mode."""
    x = data(MLP, 0, 200)
    sites = [Site(i, MLP, drawn(MLP, i), x) for i in range(2)]
    merged = repaired(MLP, sites, mode="exact", goal="mean_std", cap=1e6).params
    plain, z = averaged(MLP, sites), x
    for layer in MLP.layers:
        z = z @ plain[f"{layer}.weight"].T + plain[f"{layer}.bias"]
        mean, std = put_out(sites, layer, None, "mean_std")
        z = nn.functional.batch_norm(z, None, None, weight=std, bias=mean, training=True, eps=1e-12).relu()
    expected = z @ plain["6.weight"].T + plain["6.bias"]
    torch.testing.assert_close(functional_call(MLP.module, dict(merged), (x,)), expected)


@pytest.mark.parametrize("mode", ["gram", "exact"])
def test_spread_comes_back_to_the_deepest_layer(mode: Any) -> None:
    sites = cohort(MLP)
    target, plain = put_out(sites, "4", None)[1], put_out(sites, "4", averaged(MLP, sites))[1]
    found = put_out(sites, "4", repaired(MLP, sites, mode=mode).params)[1]
    assert (found / target).log().abs().mean() < 0.5 * (plain / target).log().abs().mean()


# --- one model --------------------------------------------------------------------------------------------------


@NETWORKS
@MODES
def test_one_model_held_by_all_is_left_to_the_bit_whatever_their_data(
    network: Network, settings: dict[str, Any]
) -> None:
    params = drawn(network, 5, torch.float32)
    params["0.bias"] = torch.zeros_like(params["0.bias"])  # to which rounding would add
    params["0.weight"][1] = 0  # a dead unit
    sites = [Site(i, network, params, data(network, i, num, torch.float32)) for i, num in enumerate((60, 25, 90))]
    found = run(Repair(inner=FedAvg(), **settings).round(started(network, torch.float32)), answers(sites))
    assert fingerprint(found.params) == fingerprint(params)
    assert float(found.metrics["largest_factor"]) == float(found.metrics["mean_factor"]) == 1
    assert float(found.metrics["dead_share"]) == 0


@MODES
def test_one_client_alone_keeps_its_model(settings: dict[str, Any]) -> None:
    sites = cohort(MLP, (40,))
    torch.testing.assert_close(repaired(MLP, sites, **settings).params, sites[0].params, rtol=1e-12, atol=0)


@MODES
def test_permuted_twins_on_different_data_come_back_as_one_once_aligned_outside(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    order = {group: torch.randperm(size, generator=generator) for group, size in (("0", 8), ("2", 7), ("4", 6))}
    params = drawn(MLP, 1)
    twins = [params, MLP.symmetry.permute(params, order)]
    sites = [Site(i, MLP, twin, data(MLP, i, 50)) for i, twin in enumerate(twins)]
    method = parse({"kind": "git_rebasin", "inner": {"kind": "repair", "inner": "fedavg", **settings}})
    torch.testing.assert_close(run(method.round(started(MLP)), answers(sites)).params, params)


# --- units at the edge ------------------------------------------------------------------------------------------


def two(rows: Sequence[Sequence[float]], inputs: Sequence[Tensor]) -> list[Site]:
    """Two clients whose models differ in the first unit only, which has these weights."""
    params = [drawn(MLP, 1), drawn(MLP, 1)]
    for own, row in zip(params, rows, strict=True):
        own["0.weight"][0] = torch.tensor(row)
    return [Site(i, MLP, own, x) for i, (own, x) in enumerate(zip(params, inputs, strict=True))]


@MODES
def test_a_unit_dead_in_every_client_but_not_in_the_merge_ends_constant(settings: dict[str, Any]) -> None:
    inputs = [data(MLP, 0, 30), data(MLP, 0, 30)]
    inputs[0][:, 0] = inputs[1][:, 1] = 0
    sites = two([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]], inputs)
    merged = repaired(MLP, sites, **settings)
    assert merged.params["0.weight"][0].tolist() == [0] * 5
    torch.testing.assert_close(merged.params["0.bias"][0], put_out(sites, "0", None)[0][0])
    assert float(merged.metrics["dead_share"]) == pytest.approx(1 / 21)


@MODES
@pytest.mark.parametrize("cap", [3.0, 10.0])
def test_a_unit_all_but_dead_in_the_merge_is_scaled_by_the_cap_and_its_mean_restored(
    settings: dict[str, Any], cap: float
) -> None:
    x = data(MLP, 1, 30)
    sites = two([[1, 0, 0, 0, 0], [-0.9999, 0, 0, 0, 0]], [x, x])
    merged = repaired(MLP, sites, cap=cap, **settings)
    torch.testing.assert_close(merged.params["0.weight"][0], cap * averaged(MLP, sites)["0.weight"][0])
    torch.testing.assert_close(put_out(sites, "0", merged.params)[0][0], put_out(sites, "0", None)[0][0])
    assert float(merged.metrics["largest_factor"]) == cap
    assert float(merged.metrics["capped_share"]) >= 1 / 21


@MODES
def test_a_unit_cancelled_by_the_merge_comes_to_its_mean_and_all_stays_finite(settings: dict[str, Any]) -> None:
    x = data(MLP, 1, 30)
    sites = two([[1, 0, 0, 0, 0], [-1, 0, 0, 0, 0]], [x, x])
    merged = repaired(MLP, sites, **settings)
    assert all(value.isfinite().all() for value in merged.params.values())
    torch.testing.assert_close(put_out(sites, "0", merged.params)[0][0], put_out(sites, "0", None)[0][0])


# --- which layers -----------------------------------------------------------------------------------------------


@NETWORKS
@MODES
def test_the_last_layer_is_left_alone_and_the_others_are_not(network: Network, settings: dict[str, Any]) -> None:
    sites = cohort(network)
    merged, plain = repaired(network, sites, **settings), averaged(network, sites)
    changed = {name for name in plain if not torch.equal(merged.params[name], plain[name])}
    assert changed == {f"{layer}.{part}" for layer in network.layers for part in ("weight", "bias")} & plain.keys()
    assert merged.metrics["repaired_layers"] == 3


@MODES
def test_a_bias_that_does_not_train_stays(settings: dict[str, Any]) -> None:
    start = started(MLP)
    start = replace(start, trainable=start.trainable - {"2.bias"})
    sites = [replace(one, params={**one.params, "2.bias": start.params["2.bias"]}) for one in cohort(MLP)]
    merged = run(Repair(inner=FedAvg(), cap=1e6, **settings).round(start), answers(sites)).params
    torch.testing.assert_close(merged["2.bias"], start.params["2.bias"], rtol=1e-12, atol=0)
    if settings["mode"] == "exact":
        goal = settings.get("goal", "within")
        torch.testing.assert_close(put_out(sites, "2", merged, goal)[1], put_out(sites, "2", None, goal)[1])


NORMED = Network(
    nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)),
    Symmetry(
        {
            "0.weight": ("0", None),
            "0.bias": ("0",),
            **{f"1.{name}": ("0",) for name in ("weight", "bias", "running_mean", "running_var")},
            "3.weight": ("3", "0"),
            "3.bias": ("3",),
            "5.weight": (None, "3"),
        }
    ),
    ("3",),
    (5,),
)


@MODES
def test_a_layer_in_front_of_a_batch_norm_is_left_to_it(settings: dict[str, Any]) -> None:
    params = [{**NORMED.module.state_dict(), **drawn_floats(seed)} for seed in range(3)]
    sites = [Site(i, NORMED, own, data(NORMED, i, 50)) for i, own in enumerate(params)]
    merged, plain = repaired(NORMED, sites, **settings), averaged(NORMED, sites)
    changed = {name for name in plain if not torch.equal(merged.params[name], plain[name])}
    assert changed == {"3.weight", "3.bias"}


def drawn_floats(seed: int) -> dict[str, Tensor]:
    return {
        name: value.abs() if name.endswith("running_var") else value
        for name, value in drawn(NORMED, seed).items()
        if not name.endswith("num_batches_tracked")
    }


class Forked(nn.Module):
    """A stem that two layers read, whose outputs go side by side into the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 5)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        found: Tensor = self.last(torch.cat([self.left(h), self.right(h)], 1).relu())
        return found


FORKED = Network(
    Forked(),
    Symmetry(
        {
            "stem.weight": ("stem", None),
            "stem.bias": ("stem",),
            "left.weight": ("left", "stem"),
            "left.bias": ("left",),
            "right.weight": ("right", "stem"),
            "right.bias": ("right",),
            "last.weight": (None, Concat(("left", "right"))),
        }
    ),
    ("stem", "left", "right"),
    (4,),
)


@pytest.mark.parametrize(("network", "levels"), [(MLP, 3), (CONV, 3), (FORKED, 2)], ids=["mlp", "conv", "forked"])
def test_exact_repair_measures_once_for_every_level_of_layers(network: Network, levels: int) -> None:
    asked: list[Question] = []

    def noting(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        asked.append(Question(exchange.task, exchange.request))
        return answers(cohort(network))(exchange)

    method = Repair(inner=FedAvg(), mode="exact", cap=1e6)
    merged = run(method.round(started(network)), noting).params
    moments = Request(moments=True)
    assert asked == [Question("train", moments), *levels * [Question("measure", moments)]]
    assert list(dict.fromkeys(asked)) == [*method.questions()]
    for layer in network.layers:
        spreads = [put_out(cohort(network), layer, params)[1] for params in (merged, None)]
        torch.testing.assert_close(*spreads, rtol=1e-4, atol=0)


class Recurrent(nn.Module):
    """Layers before and after a recurrent one, which is not repaired, defined last to first."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.two = nn.Linear(6, 2), nn.Linear(5, 6)
        self.cell, self.one = nn.LSTM(7, 5, batch_first=True), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).relu()[:, None].expand(-1, 3, -1)
        return self.last(self.two(self.cell(h)[0][:, -1]).relu())


def test_layers_are_repaired_in_the_order_in_which_they_run_whatever_lies_between() -> None:
    module = Recurrent()
    network = Network(module, trace(module, torch.rand(2, 4)), ("one", "two"), (4,))
    merged = repaired(network, cohort(network), mode="exact", cap=1e6).params
    for layer in network.layers:
        spreads = [put_out(cohort(network), layer, params)[1] for params in (merged, None)]
        torch.testing.assert_close(*spreads, rtol=1e-4, atol=0)


# --- clients that know less -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gone(Site):
    """A client that trains, and does not answer after that."""

    def reply(self, exchange: Exchange[Any]) -> Any:
        return super().reply(exchange) if exchange.task == "train" else None


def test_a_client_that_falls_silent_is_missing_on_both_sides() -> None:
    sites = cohort(MLP)
    gone = Gone(7, MLP, drawn(MLP, 7), data(MLP, 9, 80))

    def heard(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        return (reply for reply in answers([*sites, gone])(exchange) if reply is not None)

    method = Repair(inner=FedAvg(), mode="exact", cap=1e6)
    merged = run(method.round(started(MLP)), heard).params
    for layer in MLP.layers:
        for found, target in zip(put_out(sites, layer, merged), put_out(sites, layer, None), strict=True):
            torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-4)


def test_a_client_that_no_longer_measures_a_layer_is_missing_on_both_sides_of_it() -> None:
    sites = cohort(MLP)

    def heard(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        for update in answers(sites)(exchange):
            mute = exchange.task == "measure" and update.client_id == 1
            yield replace(update, moments=_but_second(update.moments)) if mute else update

    merged = run(Repair(inner=FedAvg(), mode="exact", cap=1e6).round(started(MLP)), heard).params
    rest = [sites[0], sites[2]]
    torch.testing.assert_close(put_out(rest, "2", merged), put_out(rest, "2", None), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(put_out(sites, "4", merged), put_out(sites, "4", None), rtol=1e-4, atol=1e-4)


@dataclass(frozen=True, eq=False)
class Deaf(Site):
    """A client without statistics of the second layer."""

    def reply(self, exchange: Exchange[Any]) -> ClientUpdate:
        found = super().reply(exchange)
        kept: Any = {field: _but_second(getattr(found, field)) for field in ("gram", "moments")}
        return replace(found, **kept)


def _but_second(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "2"}


@MODES
def test_a_client_without_a_layers_statistics_has_no_share_in_its_targets(settings: dict[str, Any]) -> None:
    sites = cohort(MLP)
    deaf = Deaf(7, MLP, drawn(MLP, 7), data(MLP, 9, 80))
    mean = repaired(MLP, [*sites, deaf], **settings).params
    every = repaired(MLP, [*sites, Site(7, MLP, deaf.params, deaf.x)], **settings).params
    torch.testing.assert_close(mean["0.weight"], every["0.weight"])
    assert not torch.allclose(mean["2.bias"], every["2.bias"])
    if settings["mode"] == "exact":
        torch.testing.assert_close(put_out(sites, "2", mean)[0], put_out(sites, "2", None)[0])


@MODES
def test_a_layer_of_which_nobody_knows_anything_is_the_inners(settings: dict[str, Any]) -> None:
    deaf = [Deaf(one.client_id, MLP, one.params, one.x) for one in cohort(MLP)]
    merged, plain = repaired(MLP, deaf, **settings), averaged(MLP, deaf)
    assert fingerprint([merged.params["2.weight"]]) == fingerprint([plain["2.weight"]])
    assert merged.metrics["repaired_layers"] == 2


def test_gram_matrices_in_float32_with_inputs_far_from_0_still_meet_the_first_targets() -> None:
    sites = [replace(one, x=one.x + 30) for one in cohort(MLP)]

    def narrow(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        for update in answers(sites)(exchange):
            yield replace(update, gram={name: gram.float() for name, gram in update.gram.items()})

    merged = run(Repair(inner=FedAvg(), cap=1e6).round(started(MLP)), narrow).params
    for found, target in zip(put_out(sites, "0", merged), put_out(sites, "0", None), strict=True):
        torch.testing.assert_close(found, target, rtol=1e-3, atol=1e-3)


@dataclass(frozen=True, eq=False)
class Hurried(Site):
    """A client that measures on no more examples than it is asked to, and knows the same of every parameter."""

    def reply(self, exchange: Exchange[Any]) -> ClientUpdate:
        gradients = exchange.request.gradients or Gradients()
        found = Site(self.client_id, self.network, self.params, self.x[: gradients.limit]).reply(exchange)
        ones = {name: torch.ones_like(value) for name, value in self.params.items()}
        return replace(found, num_examples=len(self.x), sq_grad_sum=ones if gradients.squares else {})


def test_the_merge_is_measured_on_the_examples_that_the_clients_models_were() -> None:
    params = drawn(MLP, 1)
    sites = [Hurried(i, MLP, params, data(MLP, i, 50)) for i in range(3)]
    method = Repair(inner=Fisher(max_grads=8), mode="exact")
    found = run(method.round(started(MLP)), answers(sites))
    torch.testing.assert_close(found.params, params, rtol=1e-12, atol=0)
    assert [*method.questions()][-1].request.gradients == Gradients(limit=8)


# --- what is refused --------------------------------------------------------------------------------------------


def test_alignment_within_is_refused_with_the_right_order() -> None:
    config = {"kind": "repair", "inner": {"kind": "norm_clip", "inner": {"kind": "git_rebasin", "inner": "fisher"}}}
    with pytest.raises(ValueError, match=re.escape('outside: {"kind": "git_rebasin", "inner": {"kind": "repair", "in')):
        parse(config)


def test_the_mean_of_stds_is_refused_in_one_shot() -> None:
    with pytest.raises(ValueError, match="summed Gram matrices hold no mean of the merge's stds: set mode = 'exact'"):
        parse({"kind": "repair", "inner": "fedavg", "goal": "mean_std"})


def test_a_model_whose_symmetry_is_not_known_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(ValueError, match="repair needs the symmetry of the task's network"):
        next(Repair(inner=FedAvg()).round(replace(started(MLP), symmetry=None)))


# --- in a federation --------------------------------------------------------------------------------------------


def test_most_of_what_averaging_unrelated_clients_lost_comes_back_in_a_federation() -> None:
    def accuracy(aggregator: Any) -> float:
        settings: dict[str, Any] = {"start": "own", "rounds": 1, "training": {"epochs": 30}}
        return loopback.run({"kind": "digits", "partition": "iid"}, aggregator, **settings).evaluation["accuracy"] or 0

    gram, exact = (accuracy({"kind": "repair", "inner": "fedavg", "mode": mode}) for mode in ("gram", "exact"))
    assert min(gram, exact) > accuracy("fedavg") + 0.25
