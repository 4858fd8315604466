"""Interpolation against a loop over coordinates, its endpoints to the bit, and its anchor over rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import PRECISIONS, Precision, ask, clients, fingerprint, following, global_model

from aggregators.core.base import Aggregator
from aggregators.core.exchange import Exchange, collect, run
from aggregators.core.registry import parse
from aggregators.core.update import ClientUpdate, GlobalModel, Merged, Request, Tensors
from aggregators.weight_average.fedavg import FedAvg
from aggregators.weight_average.fisher import Fisher
from aggregators.weight_average.wise_ft import WiseFT

INNERS = ("fedavg", "fisher", "median")


def round_of(method: Aggregator, model: GlobalModel) -> Merged:
    return run(method.round(model), ask(clients(model, seed=10 + model.round)))


def flat(model: GlobalModel, tensors: Mapping[str, Tensor]) -> list[float]:
    """Every trainable coordinate as a Python number."""
    return [value for name in model.names for value in tensors[name].double().reshape(-1).tolist()]


def mean_fisher(model: GlobalModel, exchange: Exchange[Any]) -> list[float]:
    """Σ n_k F_k / Σ n_k of what the clients answer, one coordinate after the other."""
    replies: Sequence[ClientUpdate] = [client.reply(exchange) for client in clients(model, seed=10 + model.round)]
    squares = [(update, flat(model, update.sq_grad_sum)) for update in replies]
    examples = sum(update.num_examples for update in replies)
    return [
        sum(update.num_examples * values[i] / update.num_grads for update, values in squares) / examples
        for i in range(len(squares[0][1]))
    ]


def by_hand(method: WiseFT, model: GlobalModel, start: Tensors, end: Tensors) -> list[float]:
    """[(1 − α) P_0 θ_0 + α P θ* + λ c] / [(1 − α) P_0 + α P + λ] around c = (1 − α) θ_0 + α θ*."""
    alpha, request = method.alpha, Fisher(max_grads=method.max_grads).request
    there = mean_fisher(model, Exchange(task="train", params=model.params, request=request, fold=collect))
    here = mean_fisher(model, Exchange(task="measure", params=start, request=request, fold=collect))
    damping = method.damping * ((1 - alpha) * sum(here) + alpha * sum(there)) / len(here)
    found = []
    for p_0, p, theta_0, theta in zip(here, there, flat(model, start), flat(model, end), strict=True):
        centre = (1 - alpha) * theta_0 + alpha * theta
        total = (1 - alpha) * p_0 + alpha * p + damping
        weighted = (1 - alpha) * p_0 * theta_0 + alpha * p * theta + damping * centre
        found.append(weighted / total if total else centre)
    return found


# --- the formula ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("damping", "max_grads"), [(0.0, None), (0.1, None), (0.1, 4), (10.0, None)])
def test_by_fisher_information_it_is_the_formula(inner: str, alpha: float, damping: float, max_grads: Any) -> None:
    within = parse({"kind": inner, **({"max_grads": max_grads} if inner == "fisher" else {})})
    method = WiseFT(inner=within, alpha=alpha, weighting="fisher", damping=damping, max_grads=max_grads)
    model = global_model()
    expected = by_hand(method, model, model.params, round_of(within, model).params)
    assert flat(model, round_of(method, model).params) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_isotropic_weighting_is_the_straight_line(inner: str, precision: Precision) -> None:
    model = global_model(precision)
    end = round_of(parse(inner), model).params
    merged = round_of(WiseFT(inner=parse(inner), alpha=0.3), model).params
    for name, start in model.params.items():
        if start.is_floating_point():
            straight = 0.7 * start.double() + 0.3 * end[name].double()
            torch.testing.assert_close(merged[name], straight.to(start.dtype))


@pytest.mark.parametrize("weighting", ["isotropic", "fisher"])
def test_float_buffers_are_interpolated_and_integer_ones_are_the_inners(weighting: Any) -> None:
    model = global_model()
    end = round_of(FedAvg(), model).params
    merged = round_of(WiseFT(inner=FedAvg(), alpha=0.25, weighting=weighting), model).params
    for name in model.params.keys() - model.trainable:
        mixed = 0.75 * model.params[name].double() + 0.25 * end[name].double()
        expected = mixed.float() if end[name].is_floating_point() else end[name]
        torch.testing.assert_close(merged[name], expected)
    assert torch.equal(merged["seen"], end["seen"])
    assert not torch.equal(merged["seen"], model.params["seen"])


def test_heavy_damping_weighs_all_coordinates_alike() -> None:
    model = global_model()
    damped = round_of(WiseFT(inner=FedAvg(), alpha=0.3, weighting="fisher", damping=1e9), model).params
    line = round_of(WiseFT(inner=FedAvg(), alpha=0.3), model).params
    assert all(torch.allclose(damped[name], line[name], rtol=1e-6, atol=1e-7) for name in model.names)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_without_information_all_coordinates_weigh_alike(damping: float) -> None:
    model = global_model()
    method = WiseFT(inner=FedAvg(), alpha=0.3, weighting="fisher", damping=damping)

    def ignorant(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        for update in ask(clients(model, seed=10))(exchange):
            yield replace(update, sq_grad_sum={name: 0 * value for name, value in update.sq_grad_sum.items()})

    merged = run(method.round(model), ignorant).params
    assert fingerprint(merged) == fingerprint(round_of(WiseFT(inner=FedAvg(), alpha=0.3), model).params)


def test_a_coordinate_that_only_the_clients_know_takes_the_merge_and_one_only_the_anchor_knows_stays() -> None:
    params = {"a": torch.tensor([1.0, 1.0])}
    model = GlobalModel(params=params, trainable=frozenset("a"))
    squares = {"train": torch.tensor([4.0, 0.0]), "measure": torch.tensor([0.0, 4.0])}

    def knowing(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        trained = {"a": torch.tensor([2.0, 2.0])} if exchange.task == "train" else {}
        fisher = {"a": squares[exchange.task]}
        yield ClientUpdate(client_id=1, num_examples=3, num_grads=2, params=trained, sq_grad_sum=fisher)

    method = WiseFT(inner=FedAvg(), weighting="fisher", damping=0)
    assert run(method.round(model), knowing).params["a"].tolist() == [2.0, 1.0]


# --- the endpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["isotropic", "fisher"])
@pytest.mark.parametrize("anchor", ["initial", "round"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_endpoints_are_the_anchor_and_the_merge_to_the_bit(
    weighting: Any, anchor: Any, precision: Precision
) -> None:
    model = global_model(precision)
    negative = torch.full_like(model.params["last.bias"], -0.0)  # which a sum with 0 would lose
    model = replace(model, params={**model.params, "last.bias": negative})
    for alpha, end in ((0, model.params), (1, round_of(Fisher(), model).params)):
        method = WiseFT(inner=Fisher(), alpha=alpha, weighting=weighting, anchor=anchor)
        assert fingerprint(round_of(method, model).params) == fingerprint(end)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_at_the_endpoints_no_client_is_asked_for_its_fisher_information(alpha: float) -> None:
    (question,) = WiseFT(inner=FedAvg(), alpha=alpha, weighting="fisher").questions()
    assert question.request == Request()


# --- the anchor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["isotropic", "fisher"])
def test_the_initial_anchor_is_the_first_rounds_model_in_every_round(weighting: Any) -> None:
    method, first = WiseFT(inner=FedAvg(), weighting=weighting), global_model()
    model = first
    for _ in range(3):
        end = round_of(FedAvg(), model).params
        merged = round_of(method, model)
        expected = by_hand(method, model, first.params, end) if weighting == "fisher" else None
        halves = [(a + b) / 2 for a, b in zip(flat(model, first.params), flat(model, end), strict=True)]
        assert flat(model, merged.params) == pytest.approx(expected or halves, rel=1e-5, abs=1e-6)
        model = following(model, merged)
        assert fingerprint(model.kept("anchor")) == fingerprint(first.params)


@pytest.mark.parametrize("weighting", ["isotropic", "fisher"])
def test_the_anchor_of_the_round_is_the_model_it_starts_from(weighting: Any) -> None:
    method, model = WiseFT(inner=FedAvg(), weighting=weighting, anchor="round"), global_model()
    later = following(model, round_of(method, model))
    assert later.kept("anchor") == {}
    assert fingerprint(round_of(method, later).params) == fingerprint(
        round_of(method, replace(later, memory={})).params
    )


def test_the_inners_memory_and_metrics_are_kept_apart() -> None:
    momentum = parse({"kind": "fedavgm", "inner": "fisher"})
    model = global_model()
    plain = following(model, round_of(momentum, model))
    held = following(model, round_of(WiseFT(inner=momentum), model))
    assert fingerprint(held.within().memory) == fingerprint(plain.memory)
    assert round_of(WiseFT(inner=momentum), model).metrics.keys() == {"damped_share"}


# --- what it asks -----------------------------------------------------------------------------------------------


def test_it_measures_at_the_anchor_what_it_measures_at_the_clients_models() -> None:
    asked: list[Exchange[Any]] = []
    model = global_model()
    later = following(model, round_of(WiseFT(inner=FedAvg()), model))

    def noting(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        asked.append(exchange)
        return ask(clients(later))(exchange)

    run(WiseFT(inner=FedAvg(), weighting="fisher", max_grads=5).round(later), noting)
    train, measure = asked
    assert train.request == measure.request == Fisher(max_grads=5).request
    assert fingerprint(train.sent(1)) == fingerprint(later.params)
    assert fingerprint(measure.sent(1)) == fingerprint(model.params)


def test_squares_that_the_inner_method_needs_too_are_sent_once() -> None:
    shared = [*WiseFT(inner=Fisher(), weighting="fisher").questions()]
    assert [(task, request) for task, request in shared] == [("train", Fisher().request), ("measure", Fisher().request)]


def test_an_inner_method_that_needs_another_estimator_is_refused_in_one_line() -> None:
    inner = {"kind": "fisher", "estimator": "logit"}
    with pytest.raises(ValueError, match=r"^[^\n]*two estimators, 'logit' and 'exact': choose one$"):
        parse({"kind": "wise_ft", "weighting": "fisher", "inner": inner})
    assert parse({"kind": "wise_ft", "weighting": "fisher", "estimator": "logit", "inner": inner})
    assert parse({"kind": "wise_ft", "inner": inner})


def test_the_anchor_weighs_no_less_where_fewer_clients_measure_it_than_trained() -> None:
    model, cohort = global_model(), clients(global_model())

    def merged(times: int) -> Tensors:
        few = cohort[:1] * times
        method = WiseFT(inner=FedAvg(), weighting="fisher")
        return run(method.round(model), lambda asked: ask(cohort if asked.task == "train" else few)(asked)).params

    once, thrice = merged(1), merged(3)
    assert all(torch.allclose(once[name], thrice[name], rtol=1e-6) for name in model.names)
