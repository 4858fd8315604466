"""Running statistics against the statistics of the clients' inputs put together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from toys import fingerprint

from aggregators.core.exchange import Exchange, run
from aggregators.core.registry import parse
from aggregators.core.symmetry import Symmetry
from aggregators.core.update import ClientUpdate, GlobalModel, Moments, Request, Tensors
from aggregators.restore.batch_norm import BatchNorm
from aggregators.weight_average.fedavg import FedAvg
from server import loopback

SIZES = (40, 7, 90)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


SYMMETRY = Symmetry(
    {
        "0.weight": ("0", None),
        "0.bias": ("0",),
        **{f"1.{name}": ("0",) for name in ("weight", "bias", "running_mean", "running_var")},
        "3.weight": (None, "0"),
    }
)


def model(net: nn.Module) -> GlobalModel:
    params = {name: value.clone() for name, value in net.state_dict().items()}
    return GlobalModel(params=params, trainable=frozenset(dict(net.named_parameters())), symmetry=SYMMETRY)


@dataclass(frozen=True, eq=False)
class Site:
    """A client with a network of its own and inputs x, (n, 4), which measures by hand what enters its batch norm."""

    client_id: int
    x: Tensor
    params: Tensors

    def reply(self, exchange: Exchange[Any]) -> ClientUpdate:
        """Its model; or the moments of what enters the batch norm of the model it was sent."""
        found = ClientUpdate(client_id=self.client_id, num_examples=len(self.x), params=self.params)
        if exchange.task == "train":
            return found
        assert exchange.request == Request(moments=True, batch_stats=True)
        sent = exchange.sent(self.client_id)
        assert sent is not None
        z = self.x @ sent["0.weight"].T + sent["0.bias"]
        return replace(found, params={}, moments={"1": Moments(len(z), z.mean(0), (z - z.mean(0)).square().sum(0))})


def site(client_id: int, num: int) -> Site:
    """A client whose network normalises by the exact statistics of its own inputs, far from the others'."""
    with torch.random.fork_rng():
        torch.manual_seed(client_id)
        net = network()
        x = 3 * client_id + (1 + client_id) * torch.randn(num, 4).double()
    z = net[0](x).detach()
    own = {"1.running_mean": z.mean(0), "1.running_var": z.var(0, correction=0)}
    counted = {"1.num_batches_tracked": torch.tensor(10 * client_id)}
    return Site(client_id, x, {**{n: v.detach() for n, v in net.state_dict().items()}, **own, **counted})


SITES = [site(i, num) for i, num in enumerate(SIZES)]
START = model(network())


def answers(sites: Sequence[Site]) -> Any:
    return lambda exchange: (one.reply(exchange) for one in sites)


def restored(source: Any, sites: Sequence[Site] = SITES) -> Tensors:
    return run(BatchNorm(inner=FedAvg(), source=source).round(START), answers(sites)).params


def averaged(sites: Sequence[Site] = SITES) -> Tensors:
    return run(FedAvg().round(START), answers(sites)).params


# --- the statistics ---------------------------------------------------------------------------------------------


def test_moments_are_those_of_all_the_clients_inputs_together() -> None:
    z = torch.cat([one.x @ one.params["0.weight"].T + one.params["0.bias"] for one in SITES])
    found = restored("moments")
    torch.testing.assert_close(found["1.running_mean"], z.mean(0))
    torch.testing.assert_close(found["1.running_var"], z.var(0, correction=0))


def test_averaged_variances_leave_out_how_far_the_means_lie_apart() -> None:
    mean = sum(n * one.params["1.running_mean"] for n, one in zip(SIZES, SITES, strict=True)) / sum(SIZES)
    apart = sum(n * (one.params["1.running_mean"] - mean).square() for n, one in zip(SIZES, SITES, strict=True)) / sum(
        SIZES
    )
    torch.testing.assert_close(restored("moments")["1.running_var"], averaged()["1.running_var"] + apart)
    assert (apart > averaged()["1.running_var"]).any()


def test_measured_statistics_are_those_of_all_examples_through_the_merged_layer() -> None:
    merged = averaged()
    z = torch.cat([one.x for one in SITES]) @ merged["0.weight"].T + merged["0.bias"]
    found = restored("measure")
    torch.testing.assert_close(found["1.running_mean"], z.mean(0))
    torch.testing.assert_close(found["1.running_var"], z.var(0, correction=0))


def test_with_measured_statistics_the_merge_normalises_all_examples_together() -> None:
    net = network().eval()
    entered: list[Tensor] = []
    net[2].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    functional_call(net, dict(restored("measure")), (torch.cat([one.x for one in SITES]),))
    torch.testing.assert_close(entered[0].std(0, correction=0), torch.ones(6).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entered[0].mean(0), torch.zeros(6).double(), rtol=1e-8, atol=1e-8)


def six(value: float) -> Tensor:
    return torch.full((6,), value, dtype=torch.float64)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(1e-3, 1e3))
def test_variances_are_precise_however_far_the_means_lie(centre: float, apart: float, var: float) -> None:
    start = replace(START, params={**START.params, "1.running_mean": six(centre)})
    sites = [
        Site(i, SITES[0].x, {**SITES[0].params, "1.running_mean": six(mean), "1.running_var": six(var)})
        for i, mean in enumerate((centre + apart, centre - apart))
    ]
    apart = float(sites[0].params["1.running_mean"][0] - centre)  # as far as it can be written
    found = run(BatchNorm(inner=FedAvg()).round(start), answers(sites)).params["1.running_var"]
    torch.testing.assert_close(found, six(var + apart**2), rtol=1e-8, atol=1e-8 * var)


@given(st.floats(1, 1e6))
def test_channels_that_are_constant_everywhere_have_no_negative_variance(mean: float) -> None:
    start = replace(START, params={**START.params, "1.running_mean": six(0)})
    constant = {"1.running_mean": six(mean), "1.running_var": six(0)}
    sites = [Site(one.client_id, one.x, {**one.params, **constant}) for one in SITES]
    found = run(BatchNorm(inner=FedAvg()).round(start), answers(sites)).params["1.running_var"]
    assert ((found >= 0) & (found < 1e-12 * mean**2)).all()


# --- the rest of the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["moments", "measure"])
@pytest.mark.parametrize("inner", ["fedavg", "median"])
def test_all_else_is_the_inners(source: Any, inner: str) -> None:
    plain = run(parse(inner).round(START), answers(SITES)).params
    found = run(BatchNorm(inner=parse(inner), source=source).round(START), answers(SITES)).params
    changed = {name for name in plain if not torch.equal(found[name], plain[name])}
    assert "1.running_var" in changed <= {"1.running_mean", "1.running_var"}
    assert [*found] == [*START.params]


def test_moments_cost_no_exchange_and_nothing_besides_the_models() -> None:
    assert [*BatchNorm(inner=FedAvg()).questions()] == [*FedAvg().questions()]


def test_what_the_inner_merged_is_what_is_measured() -> None:
    sent: list[Tensors] = []

    def noting(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        sent.append(exchange.sent(0) or {})
        return answers(SITES)(exchange)

    run(BatchNorm(inner=FedAvg(), source="measure").round(START), noting)
    assert fingerprint(sent[1]) == fingerprint(averaged())


def test_a_client_that_did_not_measure_a_norm_has_no_share_in_it() -> None:
    silent = without_moments(SITES[0])
    few = run(BatchNorm(inner=FedAvg(), source="measure").round(START), answers([silent, *SITES[1:]])).params
    z = torch.cat([one.x for one in SITES[1:]]) @ averaged()["0.weight"].T + averaged()["0.bias"]
    torch.testing.assert_close(few["1.running_var"], z.var(0, correction=0))


def test_a_client_has_no_more_weight_than_its_examples_however_many_rows_it_claims() -> None:
    measure = {"inner": FedAvg(), "source": "measure"}
    fair = run(BatchNorm(**measure).round(START), answers(SITES)).params

    def boasting(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        for update in answers(SITES)(exchange):
            claimed = {name: Moments(10**6 * one.num, one.mean, 10**6 * one.m2) for name, one in update.moments.items()}
            yield replace(update, moments=claimed) if update.client_id == SITES[0].client_id else update

    found = run(BatchNorm(**measure).round(START), boasting).params
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(found[name], fair[name])


def test_a_norm_that_nobody_measured_keeps_the_inners_statistics() -> None:
    silent = [without_moments(one) for one in SITES]
    found = run(BatchNorm(inner=FedAvg(), source="measure").round(START), answers(silent)).params
    assert fingerprint(found) == fingerprint(averaged())


def without_moments(site: Site) -> Any:
    """The client, without moments in its replies."""

    class Silent(Site):
        def reply(self, exchange: Exchange[Any]) -> ClientUpdate:
            return replace(super().reply(exchange), moments={})

    return Silent(site.client_id, site.x, site.params)


# --- beside others ----------------------------------------------------------------------------------------------


def test_a_permuted_twin_has_the_same_statistics_once_it_is_aligned_outside() -> None:
    order = {"0": torch.randperm(6, generator=torch.Generator().manual_seed(0))}
    twin = Site(9, SITES[1].x, SYMMETRY.permute(SITES[1].params, order))
    method = parse({"kind": "git_rebasin", "inner": {"kind": "batch_norm", "inner": "fedavg"}})
    found = run(method.round(START), answers([SITES[1], twin])).params
    for name, value in SITES[1].params.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_alignment_within_is_refused_with_the_right_order() -> None:
    config = {"kind": "batch_norm", "inner": {"kind": "norm_clip", "inner": {"kind": "git_rebasin", "inner": "fedavg"}}}
    with pytest.raises(
        ValueError, match=re.escape('outside: {"kind": "git_rebasin", "inner": {"kind": "batch_norm", "in')
    ):
        parse(config)


@pytest.mark.parametrize("source", ["moments", "measure"])
def test_a_model_without_running_statistics_is_refused_before_anything_is_asked(source: Any) -> None:
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="this model has no running statistics: leave batch_norm out"):
        next(BatchNorm(inner=FedAvg(), source=source).round(model(plain)))


def test_statistics_measured_on_the_merge_of_unrelated_clients_bring_it_back_in_a_federation() -> None:
    def accuracy(aggregator: Any) -> float:
        settings: dict[str, Any] = {"clients": 2, "start": "own", "rounds": 1, "training": {"epochs": 10}}
        task = {"kind": "digits", "architecture": "convnet_bn", "partition": "iid"}
        return loopback.run(task, aggregator, **settings).evaluation["accuracy"] or 0

    measured = accuracy({"kind": "batch_norm", "inner": "fedavg", "source": "measure"})
    assert measured > accuracy("fedavg") + 0.25
