"""The coordinate-wise median against numpy's, and what it is for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import PRECISIONS, Precision, clients, global_model, updates

from aggregators.core.update import ClientUpdate, GlobalModel
from aggregators.robust.median import Median


def cohort(model: GlobalModel, num: int) -> list[ClientUpdate]:
    return updates(model, cohort=clients(model, num))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_floats_take_the_median_of_each_coordinate(precision: Precision, num: int) -> None:
    model = global_model(precision)
    replies = cohort(model, num)
    merged = Median().aggregate(model, replies).params
    for name in (name for name, value in model.params.items() if value.is_floating_point()):
        middle = np.median([update.params[name].double().numpy() for update in replies], axis=0)
        torch.testing.assert_close(merged[name], torch.as_tensor(middle).to(merged[name].dtype), rtol=0, atol=0)


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_integers_take_the_lower_median(num: int) -> None:
    model = global_model()
    replies = cohort(model, num)
    merged = Median().aggregate(model, replies).params
    for name in ("seen", "norm.num_batches_tracked"):
        values = np.stack([update.params[name].numpy() for update in replies])
        assert np.array_equal(merged[name].numpy(), np.quantile(values, 0.5, axis=0, method="lower"))


def test_booleans_take_the_lower_median() -> None:
    model = global_model()
    masks = ([True, True], [True, False], [False, False], [True, True])
    replies = [
        replace(update, params={**update.params, "mask": torch.tensor(mask)})
        for update, mask in zip(cohort(model, 4), masks, strict=True)
    ]
    assert Median().aggregate(model, replies).params["mask"].tolist() == [True, False]


@pytest.mark.parametrize("value", [1e30, -1e30])
def test_one_client_of_four_cannot_leave_the_range_of_the_others(value: float) -> None:
    model = global_model()
    *honest, last = cohort(model, 4)
    wild = replace(last, params={name: torch.full_like(p.float(), value).to(p) for name, p in last.params.items()})
    merged = Median().aggregate(model, [wild, *honest]).params
    for name, median in merged.items():
        theirs = torch.stack([update.params[name] for update in honest])
        assert (median >= theirs.amin(0)).all()
        assert (median <= theirs.amax(0)).all()
