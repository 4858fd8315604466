"""Federated averaging against numpy.average; the buffers of every sum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import PRECISIONS, Precision, global_model, updates

from aggregators.core.exchange import LostRound
from aggregators.weight_average.fedavg import FedAvg


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weights", ["num_examples", "uniform"])
def test_parameters_are_their_average_over_clients(precision: Precision, weights: str) -> None:
    model = global_model(precision)
    replies = updates(model)
    shares = [update.num_examples if weights == "num_examples" else 1 for update in replies]
    merged = FedAvg.model_validate({"weights": weights}).aggregate(model, replies).params
    for name in model.names:
        mean = np.average([update.params[name].double().numpy() for update in replies], axis=0, weights=shares)
        torch.testing.assert_close(merged[name], torch.as_tensor(mean).to(merged[name].dtype))


@pytest.mark.parametrize("weights", ["num_examples", "uniform"])
def test_running_statistics_are_averaged_over_examples(weights: str) -> None:
    model = global_model()
    replies = updates(model)
    merged = FedAvg.model_validate({"weights": weights}).aggregate(model, replies).params
    shares = [update.num_examples for update in replies]
    for name in ("norm.running_mean", "norm.running_var"):
        mean = np.average([update.params[name].double().numpy() for update in replies], axis=0, weights=shares)
        torch.testing.assert_close(merged[name], torch.as_tensor(mean).float())


def test_integer_and_boolean_buffers_take_the_maximum() -> None:
    model = global_model()
    replies = [
        replace(update, params={**update.params, "mask": torch.tensor([i == 2, False])})
        for i, update in enumerate(updates(model))
    ]
    merged = FedAvg().aggregate(model, replies).params
    for name in ("seen", "norm.num_batches_tracked"):
        assert torch.equal(merged[name], torch.stack([update.params[name] for update in replies]).amax(0))
    assert merged["mask"].tolist() == [True, False]


def test_a_client_without_examples_weighs_nothing() -> None:
    model = global_model()
    one, other, *_ = updates(model)
    merged = FedAvg().aggregate(model, [one, replace(other, num_examples=0)]).params
    assert all(torch.equal(merged[name], one.params[name]) for name in model.names)


def test_a_cohort_without_examples_is_a_lost_round() -> None:
    model = global_model()
    with pytest.raises(LostRound, match="weights sum to 0"):
        FedAvg().aggregate(model, [replace(update, num_examples=0) for update in updates(model)])
