"""Local training and evaluation, plain torch.

Optimisers are torch.optim's functional forms: the classes import torch._dynamo, which takes as long as torch itself
and would be paid for with every message, since each is handled in a fresh process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import cos, pi
from typing import Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd
from torch.utils.data import DataLoader

from aggregators.core.functional import evaluating
from client.task import Examples, Task

Batch: TypeAlias = tuple[Tensor, ...]  # inputs and targets
Step: TypeAlias = Callable[[list[Tensor]], None]


class Training(BaseModel):
    """How a client trains: minibatches, optimiser, and the learning rate's course over rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(default=1, ge=0, description="passes over the client's examples; 0 leaves the model as it is")
    batch_size: int = Field(default=32, ge=1, description="examples a step averages over")
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="starts afresh every round")
    learning_rate: float = Field(default=0.05, gt=0, description="rate of round 1")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd; adamw's betas are 0.9 and 0.999")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 penalty in sgd, decoupled in adamw")
    schedule: Literal["constant", "cosine", "exponential"] = Field(default="constant", description="by round")
    decay: float = Field(default=0.99, gt=0, le=1, description="an exponential schedule's factor per round")
    rounds: int | None = Field(default=None, ge=1, description="after which a cosine schedule has come to 0")
    proximal: float = Field(default=0.0, ge=0, description="FedProx's mu: pull towards where training started")

    @model_validator(mode="after")
    def _cosine_has_an_end(self) -> Training:
        if self.schedule == "cosine" and self.rounds is None:
            raise ValueError("schedule='cosine' needs to know when it ends: set `rounds`")
        return self


def rate(training: Training, round: int) -> float:
    """The learning rate of a round; rounds count from 1."""
    passed = round - 1
    if training.schedule == "exponential":
        return training.learning_rate * training.decay**passed
    if training.schedule == "cosine" and training.rounds is not None:
        return training.learning_rate * (1 + cos(pi * min(passed / training.rounds, 1.0))) / 2
    return training.learning_rate


def train(
    task: Task,
    model: nn.Module,
    examples: Examples,
    training: Training,
    *,
    seed: int,
    round: int,
    frozen: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """`train_loss`, the mean loss per example over the last epoch, after training `model` in place.

    What is minimised is the batch mean of the task's loss plus proximal/2 · ‖θ − θ_start‖² (FedProx, Li et al. 2020,
    eq. 2); the loss is reported without that term, and not at all when there was nothing to train on. Order and
    dropout follow from `seed` alone. Parameters named in `frozen` stay; buffers follow the data all the same.
    ValueError where `frozen` names none of the model's parameters, or all.
    """
    params = _moving(model, frozen)
    step = _step(training, params, rate(training, round))
    metrics: dict[str, float] = {}
    model.train()
    with seeded(seed), torch.enable_grad():
        for _ in range(training.epochs):
            metrics = _epoch(task, model, _shuffled(examples, training.batch_size), params, step)
    return metrics


def evaluate(task: Task, model: nn.Module, examples: Examples, batch_size: int = 256) -> dict[str, float]:
    """Mean `loss` and `accuracy` per example in eval mode, and `num`, how many there were; three zeros for none."""
    loss = score = 0.0
    num = 0
    loader: DataLoader[Batch] = DataLoader(examples, batch_size, generator=torch.Generator())
    with evaluating(model), torch.no_grad():
        for inputs, targets in loader:
            outputs = model(inputs)
            loss += task.loss(outputs, targets).double().sum().item()
            score += task.correct(outputs, targets).double().sum().item()
            num += len(targets)
    return {"loss": loss / max(num, 1), "accuracy": score / max(num, 1), "num": num}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it, torch draws from `seed`; after it, the caller's generators are as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _moving(model: nn.Module, frozen: frozenset[str]) -> list[Tensor]:
    params = dict(model.named_parameters())
    if unknown := sorted(frozen - params.keys()):
        raise ValueError(f"cannot freeze {', '.join(unknown)}: the model's parameters are {', '.join(params)}")
    moving: list[Tensor] = [param for name, param in params.items() if param.requires_grad and name not in frozen]
    if not moving:
        raise ValueError("every parameter is frozen: leave at least one to train")
    return moving


def _shuffled(examples: Examples, size: int) -> DataLoader[Batch]:
    """Batches in random order; a single example left over joins the batch before it, since BatchNorm refuses one."""
    order: list[int] = torch.randperm(len(examples)).tolist()  # type: ignore[arg-type]
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if len(batches) > 1 and size > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return DataLoader(examples, batch_sampler=batches)


def _epoch(
    task: Task, model: nn.Module, batches: DataLoader[Batch], params: list[Tensor], step: Step
) -> dict[str, float]:
    total = 0.0
    num = 0
    for inputs, targets in batches:
        losses = task.loss(model(inputs), targets)
        step(list(torch.autograd.grad(losses.mean(), params, materialize_grads=True)))
        total += losses.detach().double().sum().item()
        num += len(targets)
    return {"train_loss": total / num} if num else {}


def _step(training: Training, params: list[Tensor], lr: float) -> Step:
    """What moves `params` by their gradients: FedProx's pull, then the optimiser."""
    optimise = (_sgd if training.optimizer == "sgd" else _adamw)(training, params, lr)
    start = [param.detach().clone() for param in params] if training.proximal else []

    @torch.no_grad()
    def step(grads: list[Tensor]) -> None:
        if training.proximal:
            pulls = [training.proximal * (param - origin) for param, origin in zip(params, start, strict=True)]
            grads = [grad + pull for grad, pull in zip(grads, pulls, strict=True)]
        optimise(grads)

    return step


def _sgd(training: Training, params: list[Tensor], lr: float) -> Step:
    velocities: list[Tensor | None] = [None for _ in params]
    return lambda grads: sgd(
        params,
        grads,
        velocities,
        foreach=False,
        lr=lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def _adamw(training: Training, params: list[Tensor], lr: float) -> Step:
    means, squares = ([torch.zeros_like(param) for param in params] for _ in range(2))
    steps = [torch.zeros(()) for _ in params]
    return lambda grads: adamw(
        params,
        grads,
        means,
        squares,
        [],
        steps,
        foreach=False,
        lr=lr,
        beta1=0.9,
        beta2=0.999,
        weight_decay=training.weight_decay,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
