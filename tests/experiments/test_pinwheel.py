"""PINWHEEL, its network, and clients that train side by side."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aggregators.core.seed import derive_seed
from client.task import load, tensors
from client.training import seeded
from experiments.pinwheel import BATCH, WEIGHT_DECAY, Pinwheel, Schedule, points, train

SCHEDULES = [Schedule(0.01, 1, seed=1), Schedule(0.05, 2, seed=2)]


def start(task: Pinwheel) -> dict[str, Tensor]:
    with seeded(derive_seed("test")):
        return tensors(task.model())


def trained_alone(task: Pinwheel, inputs: Tensor, labels: Tensor, schedule: Schedule) -> dict[str, Tensor]:
    model = task.model()
    load(model, start(task))
    optimizer = torch.optim.SGD(model.parameters(), schedule.learning_rate, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(schedule.seed)
    for _ in range(schedule.epochs):
        for batch in torch.split(torch.randperm(len(labels), generator=generator), BATCH):
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return tensors(model)


def test_there_are_400_parameters_and_350_points_to_train_on() -> None:
    task = Pinwheel()
    train_set, validation = task.data({})
    assert sum(param.numel() for param in task.model().parameters()) == 400
    assert [len(part) for part in (train_set, validation, task.test_data())] == [350, 50, 4600]  # type: ignore[arg-type]
    assert train_set[0][0].shape == (2,)
    assert task.model()(torch.zeros(3, 2)).shape == (3, 5)


def test_the_classes_are_equally_many_and_turned_against_one_another() -> None:
    inputs, labels = points(5000, seed=3)
    assert labels.bincount().tolist() == [1000] * 5
    means = torch.stack([inputs[labels == label].mean(0) for label in range(5)])
    turn = torch.tensor(2 * torch.pi / 5)
    rotation = torch.tensor([[turn.cos(), turn.sin()], [-turn.sin(), turn.cos()]])
    torch.testing.assert_close(means[:-1] @ rotation, means[1:], atol=0.05, rtol=0)


def test_another_seed_draws_other_points() -> None:
    assert torch.equal(points(50, seed=0)[0], points(50, seed=0)[0])
    assert not torch.equal(points(50, seed=0)[0], points(50, seed=1)[0])


@pytest.mark.parametrize("client", [0, 1])
def test_clients_in_one_stack_train_as_if_alone(client: int) -> None:
    task = Pinwheel()
    inputs, labels = points(150, seed=0)
    stacked = train(start(task), inputs, labels, SCHEDULES)[client]
    alone = trained_alone(task, inputs, labels, SCHEDULES[client])
    assert stacked.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(stacked[name], value)
        assert not torch.equal(stacked[name], start(task)[name])
