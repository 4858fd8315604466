"""Server momentum against an explicit loop over rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import PRECISIONS, Precision, ask, clients, following, global_model

from aggregators.core.base import Aggregator
from aggregators.core.exchange import run
from aggregators.core.registry import parse
from aggregators.core.update import GlobalModel, Merged
from aggregators.server_step.fedavgm import FedAvgM
from aggregators.weight_average.fedavg import FedAvg


def round_of(method: Aggregator, model: GlobalModel) -> Merged:
    """A round with other clients every time."""
    return run(method.round(model), ask(clients(model, seed=10 + model.round)))


def mean_step(model: GlobalModel) -> dict[str, np.ndarray]:
    """Where federated averaging would go from here."""
    mean = round_of(FedAvg(), model).params
    return {name: (mean[name].double() - model.params[name].double()).numpy() for name in model.names}


@pytest.mark.parametrize(("momentum", "learning_rate"), [(0.9, 1.0), (0.5, 0.3), (0.0, 2.0), (0.99, 0.01)])
def test_momentum_adds_up_over_rounds(momentum: float, learning_rate: float) -> None:
    method = FedAvgM(inner=FedAvg(), momentum=momentum, learning_rate=learning_rate)
    model = global_model()
    velocity = {name: np.zeros(model.params[name].shape) for name in model.names}
    for _ in range(4):
        merged = round_of(method, model)
        for name, step in mean_step(model).items():
            velocity[name] = momentum * velocity[name] + step
            there = model.params[name].double().numpy() + learning_rate * velocity[name]
            np.testing.assert_allclose(merged.params[name], there, rtol=1e-6, atol=1e-6)
        model = following(model, merged)


@pytest.mark.parametrize("inner", ["fedavg", "fisher", "median"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_momentum_and_at_rate_one_it_is_its_inner(inner: str, precision: Precision) -> None:
    model = global_model(precision)
    plain = round_of(parse(inner), model).params
    stepped = round_of(FedAvgM(inner=parse(inner), momentum=0.0), model).params
    for name, value in plain.items():
        tolerance = 1e-15 if value.dtype == torch.float64 else 0  # θ_t + (θ* − θ_t) in float64: exact for shorter types
        torch.testing.assert_close(stepped[name], value, rtol=tolerance, atol=tolerance)


def test_buffers_are_the_inners() -> None:
    model = global_model()
    plain, stepped = round_of(FedAvg(), model), round_of(FedAvgM(inner=FedAvg(), learning_rate=3.0), model)
    buffers = [name for name in model.params if name not in model.trainable]
    assert all(torch.equal(plain.params[name], stepped.params[name]) for name in buffers)


def test_nested_momenta_keep_their_memories_apart() -> None:
    inner = FedAvgM(inner=FedAvg(), momentum=0.5, learning_rate=0.5)
    method = FedAvgM(inner=inner, momentum=0.8, learning_rate=0.7)
    model = global_model()
    inside = {name: np.zeros(model.params[name].shape) for name in model.names}
    outside = {name: np.zeros(model.params[name].shape) for name in model.names}
    for _ in range(4):
        merged = round_of(method, model)
        for name, step in mean_step(model).items():
            inside[name] = 0.5 * inside[name] + step
            outside[name] = 0.8 * outside[name] + 0.5 * inside[name]
            there = model.params[name].double().numpy() + 0.7 * outside[name]
            np.testing.assert_allclose(merged.params[name], there, rtol=1e-6, atol=1e-6)
        model = following(model, merged)
    assert all(np.allclose(model.kept("momentum")[name], outside[name], atol=1e-6) for name in model.names)
    assert all(np.allclose(model.within().kept("momentum")[name], inside[name], atol=1e-6) for name in model.names)


def test_momentum_is_kept_in_float32_or_wider() -> None:
    model = global_model("mixed")
    kept = round_of(FedAvgM(inner=FedAvg()), model).memory["momentum"]
    assert isinstance(kept, dict)
    assert {name: value.dtype for name, value in kept.items()} == {
        name: torch.promote_types(model.params[name].dtype, torch.float32) for name in model.names
    }


def test_the_inners_metrics_are_kept() -> None:
    model = global_model()
    inner = round_of(parse("fisher"), model).metrics
    assert round_of(FedAvgM(inner=parse("fisher")), model).metrics == inner
    assert inner.keys() == {"damped_share"}
