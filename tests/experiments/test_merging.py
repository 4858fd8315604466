"""Merging without a network takes the path of a federation, and measures what it says."""

from math import log

import pytest
import torch

from aggregators.core.update import Request
from client.task import tensors
from client.training import evaluate, seeded
from experiments.merging import Cohort, Outcome, costs, ensemble_loss, losses, one_exchange, traffic
from experiments.pinwheel import Pinwheel

TASK = Pinwheel()
MODELS = [{name: value.clone() for name, value in tensors(TASK.model()).items()} for _ in range(2)]
HELD_OUT = TASK.data({})[1]
COHORT = Cohort(TASK, MODELS[0], MODELS, [TASK.data({})[1]] * 2, HELD_OUT)


def test_the_loss_is_that_of_a_clients_evaluation() -> None:
    model = TASK.model()
    with seeded(0):
        assert losses(TASK, tensors(model), HELD_OUT).mean() == pytest.approx(
            evaluate(TASK, model, HELD_OUT)["loss"], rel=1e-6
        )


def test_an_ensemble_of_equal_models_is_the_model() -> None:
    alone = ensemble_loss(TASK, MODELS[:1], HELD_OUT)
    assert ensemble_loss(TASK, [MODELS[0]] * 3, HELD_OUT) == pytest.approx(alone, rel=1e-12)


def test_an_ensemble_averages_probabilities() -> None:
    first, second = (losses(TASK, params, HELD_OUT) for params in MODELS)
    mean = -((-first).exp() / 2 + (-second).exp() / 2).log().mean()
    assert ensemble_loss(TASK, MODELS, HELD_OUT) == pytest.approx(float(mean), rel=1e-9)
    assert ensemble_loss(TASK, MODELS, HELD_OUT) <= float((first.mean() + second.mean()) / 2)
    assert ensemble_loss(TASK, MODELS, HELD_OUT) < 2 * log(5)


def test_isotropic_merging_is_the_mean_of_the_models() -> None:
    mean = {name: (MODELS[0][name] + MODELS[1][name]) / 2 for name in MODELS[0]}
    found = dict(COHORT.contest({"isotropic": one_exchange({"kind": "fedavg", "weights": "uniform"})}, seed=0))
    expected = COHORT.outcome([mean])
    assert found["isotropic"][:2] == pytest.approx(expected[:2], rel=1e-6)
    assert found["best client alone"][:2] == min(COHORT.outcome([params])[:2] for params in MODELS)
    assert found["prediction ensemble"].held_out == ensemble_loss(TASK, MODELS, HELD_OUT)


def test_the_traffic_is_two_models_and_what_the_method_asks_for() -> None:
    params = tensors(TASK.model())
    methods = {
        "fedavg": one_exchange({"kind": "fedavg"}),
        "fisher": one_exchange({"kind": "fisher"}),
        "ssf": one_exchange({"kind": "ssf"}),
        "sketch": one_exchange({"kind": "ssf", "precision": "sketch", "sketches": 3}),
    }
    assert methods["fedavg"].request == Request()
    assert [traffic(method, params) // 1600 for method in methods.values()] == [2, 3, 4, 6]
    found = {name: [Outcome(0.5, 0.75, 2.0)] for name in methods}
    assert [row["bytes per client and round"] for row in costs(found, methods, params)] == [3200, 4800, 6400, 9600]


def test_a_method_of_several_exchanges_is_refused() -> None:
    with pytest.raises(TypeError, match="more than once"):
        one_exchange({"kind": "toys:TwoExchanges", "inner": "fedavg"})


def test_the_worst_client_is_the_one_with_the_largest_loss() -> None:
    easy, hard = torch.utils.data.Subset(HELD_OUT, range(10)), torch.utils.data.Subset(HELD_OUT, range(10, 20))
    cohort = Cohort(TASK, MODELS[0], MODELS, [easy, hard], HELD_OUT)
    each = [ensemble_loss(TASK, MODELS[:1], examples) for examples in (easy, hard)]
    assert cohort.outcome(MODELS[:1]).worst_client == max(each)
