"""Fisher merging against a loop over clients and coordinates, and against the product of two Gaussians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import global_model, updates

from aggregators.core.exchange import LostRound
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Request
from aggregators.weight_average.fisher import Fisher

SQUARES = Request(gradients=Gradients(squares=True))


def flat(model: GlobalModel, tensors: Mapping[str, Tensor]) -> list[float]:
    """Every trainable coordinate as a Python number."""
    return [value for name in model.names for value in tensors[name].double().reshape(-1).tolist()]


def by_hand(method: Fisher, model: GlobalModel, cohort: Sequence[ClientUpdate]) -> list[float]:
    """(Σ P_k θ_k + λ c) / (Σ P_k + λ), one client and one coordinate after the other."""
    weights = []
    for update in cohort:
        named = {**{str(update.client_id): 1.0, update.name: 1.0}, **method.coefficients}
        weights.append(update.num_examples * named[str(update.client_id)] * named[update.name])
    thetas = [flat(model, update.params) for update in cohort]
    precisions = [
        [weight * (square / update.num_grads) ** method.temper for square in flat(model, update.sq_grad_sum)]
        for weight, update in zip(weights, cohort, strict=True)
    ]
    start = flat(model, model.params)
    total = sum(sum(precision) for precision in precisions)
    damping = method.damping * total / len(start)
    merged = []
    for i in range(len(start)):
        centres = {
            "mean": sum(w * theta[i] for w, theta in zip(weights, thetas, strict=True)) / sum(weights),
            "bayes": start[i],
            "target": next(iter(t[i] for t, u in zip(thetas, cohort, strict=True) if method.target == u.client_id), 0),
        }
        up, down = damping * centres[method.prior], damping
        for precision, theta in zip(precisions, thetas, strict=True):
            up += precision[i] * theta[i]
            down += precision[i]
        merged.append(up / down if down > 0 else centres[method.prior])
    return merged


@pytest.mark.parametrize("prior", [{}, {"prior": "bayes"}, {"prior": "target", "target": 7}])
@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("temper", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("coefficients", [{}, {"7": 3.0, "site-1": 0.5}, {"site-2": 0.0}])
def test_it_is_the_formula(prior: Any, damping: float, temper: float, coefficients: dict[str, float]) -> None:
    method = Fisher(**prior, damping=damping, temper=temper, coefficients=coefficients)
    model = global_model()
    cohort = updates(model, method.request)
    merged = method.aggregate(model, cohort).params
    assert flat(model, merged) == pytest.approx(by_hand(method, model, cohort), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("max_grads", [1, 4])
def test_precision_grows_with_the_examples_not_with_the_gradients(max_grads: int) -> None:
    method = Fisher(max_grads=max_grads)
    model = global_model()
    cohort = updates(model, method.request)
    assert {update.num_grads for update in cohort} == {min(max_grads, update.num_examples) for update in cohort}
    merged = method.aggregate(model, cohort).params
    assert flat(model, merged) == pytest.approx(by_hand(method, model, cohort), rel=1e-6, abs=1e-7)


def test_few_gradients_weigh_by_all_examples() -> None:
    many = replace(scalar(1, 1.0, 2.0, num=1), num_examples=1000)  # F = 2 from one gradient of 1000 examples
    few = scalar(2, 0.0, 20.0, num=10)  # F = 2 from all 10
    assert merged_scalar(Fisher(damping=0), many, few) == pytest.approx(1000 / 1010)


# --- normalised -------------------------------------------------------------------------------------------------


def normalized(update: ClientUpdate, names: Sequence[str]) -> ClientUpdate:
    """The update with its Fisher information, Σ g² / N, of norm 1."""
    whole = np.concatenate([update.sq_grad_sum[name].double().numpy().ravel() for name in names])
    factor = update.num_grads / float(np.linalg.norm(whole))
    return replace(update, sq_grad_sum={name: factor * update.sq_grad_sum[name].double() for name in names})


@pytest.mark.parametrize("temper", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("settings", [{}, {"damping": 0.0}, {"prior": "bayes"}, {"coefficients": {"7": 3.0}}])
def test_normalised_it_merges_fisher_information_of_norm_one(temper: float, settings: Any) -> None:
    model = global_model()
    cohort = updates(model, SQUARES)
    merged = Fisher(normalize=True, temper=temper, **settings).aggregate(model, cohort).params
    expected = by_hand(Fisher(temper=temper, **settings), model, [normalized(update, model.names) for update in cohort])
    assert flat(model, merged) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("factor", [1e-40, 1e-3, 1e30])
def test_normalised_the_length_of_gradients_is_irrelevant(factor: float) -> None:
    model = global_model()
    first, *others = updates(model, SQUARES)
    longer = replace(first, sq_grad_sum={name: factor * v.double() for name, v in first.sq_grad_sum.items()})
    merged, again = (
        flat(model, Fisher(normalize=True).aggregate(model, [one, *others]).params) for one in (first, longer)
    )
    assert again == pytest.approx(merged, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("temper", [0.5, 1.0])
def test_normalised_no_information_stays_none(temper: float) -> None:
    method = Fisher(normalize=True, damping=0, temper=temper)
    assert merged_scalar(method, scalar(1, 2.0, 0.0), scalar(2, 4.0, 3.0)) == 4.0
    assert merged_scalar(method, scalar(1, 2.0, 0.0, num=1), scalar(2, 4.0, 0.0, num=3)) == 3.5


@pytest.mark.parametrize("square", [1e-45, 3e38])
def test_normalised_the_smallest_and_largest_squares_are_no_trouble(square: float) -> None:
    model = GlobalModel(params={"a": torch.zeros(4)}, trainable=frozenset("a"))
    cohort = [
        ClientUpdate(
            client_id=i,
            num_examples=1,
            num_grads=1,
            params={"a": torch.full((4,), float(i))},
            sq_grad_sum={"a": torch.full((4,), square if i == 1 else 1.0)},
        )
        for i in (1, 3)
    ]
    assert Fisher(normalize=True).aggregate(model, cohort).params["a"].tolist() == [2.0] * 4


# --- one coordinate ---------------------------------------------------------------------------------------------


def scalar_model(value: float = 0.0) -> GlobalModel:
    return GlobalModel(params={"a": torch.tensor([value], dtype=torch.float64)}, trainable=frozenset("a"))


def scalar(client_id: int, theta: float, square: float, num: int = 1, **settings: Any) -> ClientUpdate:
    """A client of one parameter, with the summed square of num gradients."""
    return ClientUpdate(
        client_id=client_id,
        num_examples=num,
        num_grads=num,
        params={"a": torch.tensor([theta], dtype=torch.float64)},
        sq_grad_sum={"a": torch.tensor([square], dtype=torch.float64)},
        **settings,
    )


def merged_scalar(method: Fisher, *cohort: ClientUpdate, start: float = 0.0) -> float:
    return float(method.aggregate(scalar_model(start), cohort).params["a"])


thetas = st.floats(-1e3, 1e3)
squares = st.floats(1e-6, 1e6)


@given(thetas, squares, st.integers(1, 99), thetas, squares, st.integers(1, 99))
def test_it_is_the_mode_of_the_product_of_two_gaussians(
    theta_1: float, square_1: float, num_1: int, theta_2: float, square_2: float, num_2: int
) -> None:
    found = merged_scalar(Fisher(damping=0), scalar(1, theta_1, square_1, num_1), scalar(2, theta_2, square_2, num_2))
    mode = theta_1 + square_2 / (square_1 + square_2) * (theta_2 - theta_1)  # P_k = n_k · (Σg² / n_k) = Σg²
    assert found == pytest.approx(mode, rel=1e-9, abs=1e-9)


@given(thetas, thetas, st.integers(1, 99), st.integers(1, 99))
def test_without_temper_it_is_the_weighted_mean(theta_1: float, theta_2: float, num_1: int, num_2: int) -> None:
    found = merged_scalar(Fisher(temper=0), scalar(1, theta_1, 1e-9, num_1), scalar(2, theta_2, 1e9, num_2))
    assert found == pytest.approx((num_1 * theta_1 + num_2 * theta_2) / (num_1 + num_2), rel=1e-9, abs=1e-9)


@given(st.floats(1e9, 1e12))
def test_heavy_damping_gives_the_centre(damping: float) -> None:
    cohort = scalar(1, 2.0, 1.0, num=1), scalar(2, 4.0, 100.0, num=3)
    assert merged_scalar(Fisher(damping=damping), *cohort) == pytest.approx(3.5)
    assert merged_scalar(Fisher(damping=damping, prior="bayes"), *cohort, start=9.0) == pytest.approx(9)
    assert merged_scalar(Fisher(damping=damping, prior="target", target=1), *cohort) == pytest.approx(2)


# --- without information ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize(
    ("prior", "centre"), [({}, 3.5), ({"prior": "bayes"}, 9.0), ({"prior": "target", "target": 1}, 2.0)]
)
def test_a_coordinate_without_information_takes_the_centre(damping: float, prior: Any, centre: float) -> None:
    model = GlobalModel(params={"a": torch.tensor([9.0, 9.0])}, trainable=frozenset("a"))
    cohort = [
        replace(
            scalar(i, 0, 0, num=num),
            params={"a": torch.tensor([theta, theta])},
            sq_grad_sum={"a": torch.tensor([0.0, 5.0])},
        )
        for i, num, theta in ((1, 1, 2.0), (2, 3, 4.0))
    ]
    merged = Fisher(damping=damping, **prior).aggregate(model, cohort).params["a"]
    assert merged[0] == pytest.approx(centre)
    assert merged[1] == pytest.approx(3.0 if damping == 0 else (3 * 10 + 0.5 * centre) / 10.5)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_cohort_without_any_information_gives_the_weighted_mean(damping: float) -> None:
    cohort = scalar(1, 2.0, 0.0, num=1), scalar(2, 4.0, 0.0, num=3)
    assert merged_scalar(Fisher(damping=damping), *cohort) == 3.5


def test_a_client_without_gradients_adds_no_precision() -> None:
    silent = replace(scalar(2, 100.0, 0.0), num_examples=0, num_grads=0)
    assert merged_scalar(Fisher(damping=0), scalar(1, 2.0, 1.0), silent) == 2.0


def test_weights_that_sum_to_zero_are_a_lost_round() -> None:
    with pytest.raises(LostRound, match="weights sum to 0"):
        merged_scalar(Fisher(coefficients={"1": 0, "2": 0}), scalar(1, 2.0, 1.0), scalar(2, 3.0, 1.0))


# --- clients by name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [2, "2", "hospital"])
def test_the_target_is_named_by_node_id_or_name(target: int | str) -> None:
    method = Fisher(prior="target", target=target, damping=1e12)
    assert merged_scalar(method, scalar(1, 5.0, 1.0), scalar(2, 7.0, 1.0, name="hospital")) == pytest.approx(7)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_without_its_target_the_round_is_lost(damping: float) -> None:
    with pytest.raises(LostRound, match="client 'hospital', the prior's target, did not answer"):
        merged_scalar(Fisher(prior="target", target="hospital", damping=damping), scalar(1, 5.0, 1.0))


@pytest.mark.parametrize("client", ["2", "hospital"])
def test_a_coefficient_is_named_by_node_id_or_name(client: str) -> None:
    method = Fisher(coefficients={client: 3.0}, damping=0)
    assert merged_scalar(method, scalar(1, 4.0, 1.0), scalar(2, 8.0, 1.0, name="hospital")) == pytest.approx(7)


# --- what it reports and takes ----------------------------------------------------------------------------------


def test_the_damped_share_is_that_of_coordinates_below_the_damping() -> None:
    model = GlobalModel(params={"a": torch.zeros(3), "b": torch.zeros(1)}, trainable=frozenset("ab"))
    update = ClientUpdate(
        client_id=1,
        num_examples=2,
        num_grads=2,
        params=model.params,
        sq_grad_sum={"a": torch.tensor([0.0, 0.9, 1.5]), "b": torch.tensor([1.6])},
    )
    metrics = Fisher(damping=1.0).aggregate(model, [update]).metrics  # λ = mean(0, 0.9, 1.5, 1.6) = 1
    assert float(metrics["damped_share"]) == 0.5
    assert float(Fisher(damping=0).aggregate(model, [update]).metrics["damped_share"]) == 0


@pytest.mark.parametrize("temper", [1.0, 0.5])
def test_squares_may_come_in_bfloat16(temper: float) -> None:
    method, model = Fisher(temper=temper), global_model()
    cohort = [
        replace(update, sq_grad_sum={name: value.bfloat16() for name, value in update.sq_grad_sum.items()})
        for update in updates(model, SQUARES)
    ]
    merged = method.aggregate(model, cohort).params
    rounding = 1e-6 if temper == 1 else 2**-8  # a power is taken in the squares' own precision
    assert flat(model, merged) == pytest.approx(by_hand(method, model, cohort), rel=rounding, abs=rounding)


def test_it_asks_for_squares_of_the_estimator_and_number_configured() -> None:
    assert Fisher(estimator="sampled", max_grads=9).request == Request(
        gradients=Gradients(squares=True, estimator="sampled", limit=9)
    )
