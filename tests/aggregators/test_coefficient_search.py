"""The search for coefficients, against every point of the grid by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import inf, nan
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import TwoExchanges, ask, clients, fingerprint, global_model

from aggregators.core.base import Aggregator
from aggregators.core.exchange import Exchange, Round, run
from aggregators.core.registry import AnyAggregator, parse
from aggregators.core.update import ClientUpdate, GlobalModel, Merged, Probe, Tensors
from aggregators.weight_average.coefficient_search import CoefficientSearch
from aggregators.weight_average.fisher import Fisher

THETAS, SQUARES = (0.0, 1.0, 5.0), (1.0, 2.0, 4.0)


def probing(loss: Callable[[float], float], round: int = 1) -> GlobalModel:
    """A model of one parameter whose held-out loss is a function of it."""
    probe = Probe(loss=lambda params: loss(float(params["a"])), score=lambda params: 0.0)
    params = {"a": torch.tensor([9.0], dtype=torch.float64)}
    return GlobalModel(params=params, trainable=frozenset("a"), probe=probe, round=round)


def cohort(num: int) -> list[ClientUpdate]:
    """Clients of one parameter, with one example each."""
    return [
        ClientUpdate(
            client_id=2**63 + number,
            num_examples=1,
            num_grads=1,
            params={"a": torch.tensor([THETAS[number]], dtype=torch.float64)},
            sq_grad_sum={"a": torch.tensor([SQUARES[number]], dtype=torch.float64)},
        )
        for number in range(num)
    ]


def searched(loss: Callable[[float], float], num: int = 2, round: int = 1, candidates: int = 51) -> Merged:
    method = CoefficientSearch(inner=Fisher(damping=0), candidates=candidates)
    return method.aggregate(probing(loss, round), cohort(num))


def coefficients(merged: Merged) -> list[float]:
    """The λ_k chosen, in the order of the clients."""
    return [float(value) for name, value in merged.metrics.items() if name.startswith("coefficient_")]


def between(share: float) -> float:
    """Fisher merging of the first two clients under λ = (1 − share, share)."""
    weights = (1 - share) * SQUARES[0], share * SQUARES[1]
    return (weights[0] * THETAS[0] + weights[1] * THETAS[1]) / sum(weights)


# --- two clients: a grid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [-1.0, 0.2, 0.37, 0.5, 0.93, 4.0])
@pytest.mark.parametrize("candidates", [2, 10, 51])
def test_the_best_of_an_even_grid_is_found(goal: float, candidates: int) -> None:
    shares = [0.5, *(i / (candidates - 1) for i in range(candidates))]
    best = min(shares, key=lambda share: abs(between(share) - goal))
    merged = searched(lambda theta: abs(theta - goal), candidates=candidates)
    assert coefficients(merged) == pytest.approx([1 - best, best])
    assert float(merged.params["a"]) == pytest.approx(between(best))
    assert merged.metrics["probe_loss"] == pytest.approx(abs(between(best) - goal))
    assert merged.metrics["uniform_loss"] == pytest.approx(abs(between(0.5) - goal))


@pytest.mark.parametrize(("goal", "share"), [(-1.0, 0.0), (4.0, 1.0)])
def test_both_endpoints_are_tried_and_are_one_clients_model(goal: float, share: float) -> None:
    merged = searched(lambda theta: abs(theta - goal))
    assert coefficients(merged) == [1 - share, share]
    assert float(merged.params["a"]) == THETAS[int(share)]


def test_every_point_is_tried_once_and_uniform_first() -> None:
    tried: list[float] = []
    searched(lambda theta: tried.append(theta) or 0.0, candidates=11)
    assert tried[0] == between(0.5)
    assert sorted(tried) == pytest.approx([between(i / 10) for i in range(11)])


# --- more clients: draws ----------------------------------------------------------------------------------------


@given(st.floats(-1, 6), st.integers(1, 3), st.integers(1, 9))
def test_it_is_never_worse_on_the_probe_than_uniform_coefficients(goal: float, num: int, round: int) -> None:
    losses: list[float] = []
    merged = searched(lambda theta: losses.append(abs(theta - goal)) or losses[-1], num, round, candidates=6)
    assert merged.metrics["uniform_loss"] == losses[0]
    assert merged.metrics["probe_loss"] == min(losses) == abs(float(merged.params["a"]) - goal)


def test_coefficients_lie_on_the_simplex_and_reproduce_the_merge() -> None:
    merged = searched(lambda theta: abs(theta - 4.5), num=3)
    found = coefficients(merged)
    assert sum(found) == pytest.approx(1)
    assert min(found) >= 0
    weights = [share * square for share, square in zip(found, SQUARES, strict=True)]
    theta = sum(weight * theta for weight, theta in zip(weights, THETAS, strict=True)) / sum(weights)
    assert float(merged.params["a"]) == pytest.approx(theta)
    assert abs(theta - 4.5) < 0.2 < 1 < merged.metrics["uniform_loss"]  # of 51 draws the best comes close


def test_draws_are_uniform_on_the_simplex() -> None:
    points = [*CoefficientSearch(inner=Fisher(), candidates=4001)._points(3, 1)]
    drawn = torch.tensor(points[1:], dtype=torch.float64) / 3
    assert points[0] == (1, 1, 1)
    assert torch.allclose(drawn.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.02)
    assert torch.allclose(drawn.var(0), torch.full((3,), 1 / 18, dtype=torch.float64), atol=0.005)  # Dirichlet(1, 1, 1)


def test_draws_are_those_of_the_round() -> None:
    first, again, later = (coefficients(searched(lambda theta: abs(theta - 3), 3, round)) for round in (1, 1, 2))
    assert first == again != later


def test_a_single_client_is_tried_once() -> None:
    tried: list[float] = []
    merged = searched(lambda theta: tried.append(theta) or 0.0, num=1)
    assert tried == [THETAS[0]]
    assert coefficients(merged) == [1.0]


# --- equal and broken losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [0.0, inf, nan])
@pytest.mark.parametrize("num", [2, 4])
def test_of_equal_losses_the_uniform_one_wins_and_is_the_inners_own_to_the_bit(loss: float, num: int) -> None:
    model = replace(global_model("mixed"), probe=Probe(loss=lambda params: loss, score=lambda params: 0.0))
    answers = ask(sorted(clients(model, num), key=lambda client: client.client_id))
    plain = run(Fisher().round(model), answers)
    merged = run(CoefficientSearch(inner=Fisher(), candidates=5).round(model), answers)
    assert fingerprint(merged.params) == fingerprint(plain.params)
    assert merged.metrics["damped_share"] == plain.metrics["damped_share"]


def test_of_equal_losses_the_earliest_wins() -> None:
    merged = searched(lambda theta: float(theta == between(0.5)), candidates=5)
    assert coefficients(merged) == [1.0, 0.0]


def test_a_loss_that_is_no_number_never_wins() -> None:
    merged = searched(lambda theta: nan if theta < between(0.6) else theta)
    assert coefficients(merged) == pytest.approx([0.4, 0.6])


# --- what it asks, and of whom ----------------------------------------------------------------------------------


def test_the_cohort_is_asked_once() -> None:
    asked: list[Exchange[Any]] = []
    model, answers = global_model(), ask(clients(global_model()))

    def noting(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        asked.append(exchange)
        return answers(exchange)

    run(CoefficientSearch(inner=Fisher(estimator="sampled", max_grads=3)).round(model), noting)
    (exchange,) = asked
    assert exchange.request == Fisher(estimator="sampled", max_grads=3).request


def test_what_stands_around_it_changes_the_updates_that_it_merges() -> None:
    model = global_model()
    clipped = parse({"kind": "norm_clip", "max_norm": 1e-6, "inner": CoefficientSearch(inner=Fisher(), candidates=3)})
    merged = run(clipped.round(model), ask(clients(model)))
    assert all(torch.allclose(merged.params[name], model.params[name], atol=1e-5) for name in model.names)


class Searchable(Aggregator):
    """Has coefficients, an inner method, and a memory."""

    kind: Literal["test_coefficient_search:Searchable"] = "test_coefficient_search:Searchable"
    inner: AnyAggregator
    coefficients: Mapping[str, float] = {}

    def round(self, model: GlobalModel) -> Round:
        """The inner's merge, its parameters multiplied by the first client's coefficient."""
        merged = yield from self.inner.round(model.within())
        factor = self.coefficients[str(2**63)]
        params: Tensors = {name: factor * value for name, value in merged.params.items()}
        return merged._replace(params=params, memory={"factor": factor, "rounds": len(model.memory)})


def test_an_inner_method_that_wraps_another_is_merged_anew_with_its_own_memory() -> None:
    method = CoefficientSearch(inner=Searchable(inner="fedavg"), candidates=3)
    model = replace(probing(lambda theta: -theta), memory={"a": 1, "b": 2})
    merged = method.aggregate(model, cohort(2))
    assert float(merged.params["a"]) == 2 * 0.5  # λ = (1, 0), twice the mean
    assert merged.memory == {"factor": 2.0, "rounds": 2}


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("fedavg", "fedavg has no coefficients to search: wrap the method that has, such as fisher"),
        ({"kind": "norm_clip", "inner": "fisher"}, "norm_clip has no coefficients to search"),
        ({"kind": "fisher", "coefficients": {"1": 2.0}}, "the coefficients of fisher are what is searched: leave them"),
        (Searchable(inner=TwoExchanges(inner="fedavg")), "Searchable asks its clients more than once"),
    ],
    ids=str,
)
def test_an_inner_method_that_cannot_be_searched_is_refused_by_name_in_one_line(inner: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        parse({"kind": "coefficient_search", "inner": inner})
    assert said in str(refused.value)


def test_without_held_out_data_it_says_so() -> None:
    model = replace(probing(abs), probe=None)
    with pytest.raises(ValueError, match="coefficient_search needs held-out data on the server"):
        CoefficientSearch(inner=Fisher()).aggregate(model, cohort(2))
    assert CoefficientSearch(inner=Fisher()).needs == {"probe"}
