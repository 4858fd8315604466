from __future__ import annotations

from collections.abc import Callable
from math import isclose
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from client.task import Examples, Node, Task
from client.training import Training, evaluate, rate, train


class Labels(Task):
    """Three labels, four inputs, dropout."""

    num_classes = 3

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))

    def data(self, node: Node) -> tuple[Examples, Examples]:
        return labelled(40), labelled(10)


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.theta


class Quadratic(Labels):
    """Each example's loss is ½‖x − θ‖²."""

    def model(self) -> nn.Module:
        return Point()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().sum(1) / 2


def pairs(inputs: Tensor, targets: Tensor) -> Examples:
    return cast(Examples, TensorDataset(inputs, targets))


def labelled(num: int) -> Examples:
    generator = torch.Generator().manual_seed(num)
    return pairs(torch.randn(num, 4, generator=generator), torch.arange(num) % 3)


def made(task: Task) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return task.model()


def trained(training: Training, seed: int = 1, frozen: frozenset[str] = frozenset(), num: int = 40) -> nn.Module:
    model = made(Labels())
    train(Labels(), model, labelled(num), training, seed=seed, round=1, frozen=frozen)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


EACH_OPTIMIZER = pytest.mark.parametrize("optimizer", ["sgd", "adamw"])


@EACH_OPTIMIZER
def test_training_is_the_same_bit_for_bit_under_the_same_seed(optimizer: str) -> None:
    training = Training(optimizer=optimizer, epochs=2)
    torch.manual_seed(5)
    first = trained(training)
    torch.manual_seed(6)
    assert same(first, trained(training))


def test_training_differs_under_another_seed() -> None:
    assert not same(trained(Training()), trained(Training(), seed=2))


def test_training_and_evaluation_leave_the_callers_random_generator_as_it_was() -> None:
    before = torch.random.get_rng_state()
    evaluate(Labels(), trained(Training()), labelled(10))
    assert torch.equal(torch.random.get_rng_state(), before)


def class_based(training: Training, model: nn.Module) -> torch.optim.Optimizer:
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, foreach=False
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        foreach=False,
    )


@EACH_OPTIMIZER
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_full_batch_training_takes_the_steps_of_torch_optimizers(
    optimizer: str, momentum: float, weight_decay: float
) -> None:
    training = Training(
        optimizer=optimizer, momentum=momentum, weight_decay=weight_decay, learning_rate=0.01, epochs=5, batch_size=2
    )
    x = torch.tensor([[3.0, 0.5], [1.0, -1.0]])
    ours, theirs = Point(), Point()
    train(Quadratic(), ours, pairs(x, x), training, seed=0, round=1)
    steps = class_based(training, theirs)
    for _ in range(5):
        steps.zero_grad()
        Quadratic().loss(theirs(x), x).mean().backward()  # type: ignore[no-untyped-call]
        steps.step()
    torch.testing.assert_close(ours.theta, theirs.theta)


@given(proximal=st.floats(0, 10), learning_rate=st.floats(0.001, 0.15), epochs=st.integers(0, 6))
def test_fedprox_follows_its_closed_form_on_a_quadratic(proximal: float, learning_rate: float, epochs: int) -> None:
    training = Training(proximal=proximal, learning_rate=learning_rate, epochs=epochs, momentum=0.0, batch_size=3)
    x = torch.tensor([[3.0, 0.5], [1.0, -1.0], [0.0, 4.0]], dtype=torch.float64)
    model = Point().double()
    start = model.theta.detach().clone()
    train(Quadratic(), model, pairs(x, x), training, seed=0, round=1)
    centre = (x.mean(0) + proximal * start) / (1 + proximal)
    expected = centre + (1 - learning_rate * (1 + proximal)) ** epochs * (start - centre)
    torch.testing.assert_close(model.theta.detach(), expected)


def test_each_of_two_parameters_with_one_gradient_tensor_gets_its_own_pull() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(2))
            self.b = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return x - (self.a + self.b)

    model = Sum()
    training = Training(proximal=1.0, learning_rate=0.1, momentum=0.0, epochs=2, batch_size=1)
    train(Quadratic(), model, pairs(torch.ones(1, 2), torch.ones(1)), training, seed=0, round=1)
    torch.testing.assert_close(model.a.detach(), torch.full((2,), 0.1 + 0.1 * (0.8 - 0.1)))
    assert torch.equal(model.a, model.b)


def test_a_parameter_that_the_loss_does_not_depend_on_stays() -> None:
    model = Point()
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    x = torch.ones(4, 2)
    train(Quadratic(), model, pairs(x, x), Training(), seed=0, round=1)
    assert torch.equal(model.get_parameter("unused"), torch.ones(2))
    assert not torch.equal(model.theta, Point().theta)


def test_frozen_parameters_stay_and_the_others_move() -> None:
    start, model = made(Labels()), trained(Training(weight_decay=0.1), frozen=frozenset({"0.weight", "3.bias"}))
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, start.get_parameter(name))}
    assert moved == {"0.bias", "3.weight"}


def test_a_parameter_that_the_user_froze_stays() -> None:
    model = made(Labels())
    start = model.get_parameter("0.weight").requires_grad_(False).clone()
    train(Labels(), model, labelled(8), Training(), seed=1, round=1)
    assert torch.equal(model.get_parameter("0.weight"), start)


def test_freezing_an_unknown_parameter_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"cannot freeze head\.weight: .* 0\.weight"):
        trained(Training(), frozen=frozenset({"head.weight"}))


def test_freezing_everything_is_refused() -> None:
    every = frozenset(name for name, _ in made(Labels()).named_parameters())
    with pytest.raises(ValueError, match="every parameter is frozen"):
        trained(Training(), frozen=every)


@pytest.mark.parametrize(("epochs", "num"), [(0, 40), (3, 0)])
def test_nothing_to_train_on_leaves_the_model_and_reports_no_loss(epochs: int, num: int) -> None:
    model = made(Labels())
    examples = pairs(torch.zeros(num, 4), torch.zeros(num, dtype=torch.int64))
    assert train(Labels(), model, examples, Training(epochs=epochs), seed=1, round=1) == {}
    assert same(model, made(Labels()))


def test_the_training_loss_is_the_mean_per_example_over_the_last_epoch() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 2.0], [4.0, 1.0]])
    training = Training(learning_rate=1e-12, proximal=1.0, epochs=2, batch_size=2)
    metrics = train(Quadratic(), Point(), pairs(x, x), training, seed=0, round=1)
    expected = (x - torch.tensor([1.0, -2.0])).square().sum(1).mean().item() / 2
    assert metrics == {"train_loss": pytest.approx(expected)}


def batch_sizes(num: int, batch_size: int) -> list[int]:
    sizes: list[int] = []

    class Spy(Labels):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            sizes.append(len(targets))
            return super().loss(outputs, targets)

    train(Spy(), made(Labels()), labelled(num), Training(batch_size=batch_size), seed=0, round=1)
    return sizes


@pytest.mark.parametrize(
    ("num", "batch_size", "sizes"),
    [(9, 4, [4, 5]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (1, 4, [1]), (5, 4, [5]), (3, 1, [1, 1, 1])],
)
def test_a_single_example_left_over_joins_the_batch_before_it(num: int, batch_size: int, sizes: list[int]) -> None:
    assert batch_sizes(num, batch_size) == sizes


def test_a_network_with_batch_norm_trains_where_one_example_is_left_over() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    train(Labels(), model, labelled(9), Training(batch_size=4), seed=0, round=1)
    assert model[1].num_batches_tracked == 2


def test_every_example_is_seen_once_an_epoch() -> None:
    seen: list[float] = []

    class Spy(Quadratic):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            seen.extend(targets.tolist())
            return super().loss(outputs, targets)

    examples = pairs(torch.zeros(10, 2), torch.arange(10))
    train(Spy(), Point(), examples, Training(batch_size=3, epochs=2), seed=0, round=1)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_training_runs_in_train_mode_whatever_mode_the_model_was_in() -> None:
    model = made(Labels()).eval()
    train(Labels(), model, labelled(40), Training(), seed=1, round=1)
    assert same(model, trained(Training()))
    assert model.training


@given(st.integers(1, 500))
def test_a_constant_schedule_keeps_its_rate(round: int) -> None:
    assert rate(Training(learning_rate=0.3), round) == 0.3


@given(round=st.integers(1, 200), decay=st.floats(0.5, 1.0))
def test_an_exponential_schedule_falls_by_its_factor_each_round(round: int, decay: float) -> None:
    training = Training(schedule="exponential", decay=decay)
    assert rate(training, 1) == training.learning_rate
    assert isclose(rate(training, round + 1), decay * rate(training, round))


def test_a_cosine_schedule_falls_from_the_full_rate_over_half_of_it_to_zero() -> None:
    training = Training(schedule="cosine", learning_rate=0.4, rounds=10)
    assert [rate(training, round) for round in (1, 6, 11, 12)] == pytest.approx([0.4, 0.2, 0.0, 0.0])


@given(round=st.integers(1, 50), rounds=st.integers(1, 50))
def test_a_cosine_schedule_never_rises_and_is_never_negative(round: int, rounds: int) -> None:
    training = Training(schedule="cosine", rounds=rounds)
    assert rate(training, round) >= rate(training, round + 1) >= 0


def test_training_uses_the_rate_of_its_round() -> None:
    training = Training(schedule="exponential", decay=0.5, learning_rate=0.2, momentum=0.0, batch_size=1)
    model = Point()
    start = model.theta.detach().clone()
    x = torch.tensor([[2.0, 2.0]])
    train(Quadratic(), model, pairs(x, x), training, seed=0, round=3)
    torch.testing.assert_close(model.theta.detach(), start + 0.05 * (x[0] - start))


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": -1},
        {"batch_size": 0},
        {"optimizer": "lbfgs"},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"momentum": 1},
        {"weight_decay": -0.1},
        {"schedule": "cosine"},
        {"decay": 0},
        {"decay": 1.5},
        {"rounds": 0},
        {"proximal": float("inf")},
        {"learning_rates": 0.1},
    ],
)
def test_a_bad_value_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad)) if bad != {"schedule": "cosine"} else "set `rounds`"):
        Training.model_validate(bad)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_is_the_mean_over_examples_in_eval_mode(batch_size: int) -> None:
    model, examples = made(Labels()), labelled(10)
    inputs, targets = default_collate([examples[i] for i in range(10)])
    scores = model.eval()(inputs)
    model.train()
    assert evaluate(Labels(), model, examples, batch_size) == {
        "loss": pytest.approx(nn.functional.cross_entropy(scores, targets).item()),
        "accuracy": pytest.approx((scores.argmax(1) == targets).float().mean().item()),
        "num": 10,
    }


def test_evaluation_of_no_examples_counts_none() -> None:
    examples = pairs(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert evaluate(Labels(), made(Labels()), examples) == {"loss": 0, "accuracy": 0, "num": 0}


def failing(model: nn.Module) -> None:
    with pytest.raises(RuntimeError):
        evaluate(Labels(), model, pairs(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64)))


def passing(model: nn.Module) -> None:
    evaluate(Labels(), model, labelled(4))


@pytest.mark.parametrize("use", [passing, failing])
def test_evaluation_puts_every_module_back_into_its_mode(use: Callable[[nn.Module], None]) -> None:
    model = made(Labels()).train()
    model.get_submodule("2").eval()
    use(model)
    assert [module.training for module in model.modules()] == [True, True, True, False, True]


def test_half_precision_models_train_and_evaluate() -> None:
    model = nn.Linear(4, 3).bfloat16()
    inputs, targets = default_collate([labelled(12)[i] for i in range(12)])
    examples = pairs(inputs.bfloat16(), targets)
    before = evaluate(Labels(), model, examples)["loss"]
    train(Labels(), model, examples, Training(epochs=5), seed=0, round=1)
    assert evaluate(Labels(), model, examples)["loss"] < before
    assert model.weight.dtype == torch.bfloat16
