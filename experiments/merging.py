"""One-shot merging without a network: measured clients, methods by their configuration, and what they come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import log
from operator import or_
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from aggregators.core.base import Aggregator, CohortAggregator, SumAggregator
from aggregators.core.functional import evaluating
from aggregators.core.registry import parse
from aggregators.core.seed import derive_seed
from aggregators.core.update import ClientUpdate, GlobalModel, Request, Tensors
from client.statistics import measure
from client.task import Examples, Task, load
from client.training import Batch

from .report import Row, spread

BATCH = 1000
Method: TypeAlias = SumAggregator | CohortAggregator


class Outcome(NamedTuple):
    """A model's mean negative log-likelihood on held-out examples and on its worst client's, and what it cost."""

    held_out: float
    worst_client: float
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Cohort:
    """Clients that trained from one start: their models, and the examples that their statistics come from."""

    task: Task
    start: Tensors
    models: Sequence[Tensors]
    examples: Sequence[Examples]
    held_out: Examples

    def contest(self, methods: Mapping[str, Method], seed: int) -> Iterator[tuple[str, Outcome]]:
        """Each method's outcome on these clients; then, not merged, of the best client alone and of the ensemble."""
        request = reduce(or_, (method.request for method in methods.values()))
        updates = [self._update(client, request, seed) for client in range(len(self.models))]
        for name, method in methods.items():
            yield name, self._merged(method, updates)
        yield "best client alone", min(self.outcome([model]) for model in self.models)
        yield "prediction ensemble", self.outcome(self.models)

    def _merged(self, method: Method, updates: Sequence[ClientUpdate]) -> Outcome:
        trainable = frozenset(name for name, _ in self.task.model().named_parameters())
        began = perf_counter()
        merged = method.aggregate(GlobalModel(params=self.start, trainable=trainable), updates)
        return self.outcome([merged.params], perf_counter() - began)

    def outcome(self, models: Sequence[Tensors], seconds: float = 0.0) -> Outcome:
        """What the mean of these models' predictions comes to: of one model, or an ensemble."""
        own = {id(examples): examples for examples in self.examples}.values()
        worst = max(ensemble_loss(self.task, models, examples) for examples in own)
        return Outcome(ensemble_loss(self.task, models, self.held_out), worst, seconds)

    def _update(self, client: int, request: Request, seed: int) -> ClientUpdate:
        model, params, examples = self.task.model(), self.models[client], self.examples[client]
        load(model, params)
        fields = measure(self.task, model, examples, request, seed=derive_seed(seed, client, "statistics"))
        num = len(examples)  # type: ignore[arg-type]
        return ClientUpdate(client_id=client, num_examples=num, params=params, **fields)


def one_exchange(config: Mapping[str, Any]) -> Method:
    """The one-exchange method that `config` describes; TypeError for one that asks its clients more than once."""
    parsed = parse(config)
    if not isinstance(parsed, Method):
        raise TypeError(f"{parsed.kind} asks its clients more than once: run it in a federation")
    return parsed


def costs(found: Mapping[str, Sequence[Outcome]], methods: Mapping[str, Method], params: Tensors) -> list[Row]:
    """A row per method: what it sends, how long it takes, and its worst client's loss."""
    return [
        {
            "method": name,
            "bytes per client and round": traffic(method, params),
            "seconds to merge": spread(outcome.seconds for outcome in found[name]),
            "worst client's loss": spread(outcome.worst_client for outcome in found[name]),
        }
        for name, method in methods.items()
    ]


def held_out(outcomes: Sequence[Outcome]) -> list[float]:
    """The losses on held-out examples, seed by seed."""
    return [outcome.held_out for outcome in outcomes]


def traffic(method: Aggregator, params: Tensors) -> int:
    """Bytes that a client receives and sends in one round: models, and statistics of a model's size."""
    copies = 0
    for question in method.questions():
        asked = question.request.gradients
        copies += 1 + (question.task == "train") + (asked.sums + asked.squares + asked.sketches if asked else 0)
    return copies * sum(param.numel() * param.element_size() for param in params.values())


def ensemble_loss(task: Task, models: Sequence[Tensors], examples: Examples) -> float:
    """The mean negative log-likelihood of the examples under the mean of the models' probabilities."""
    log_p = -torch.stack([losses(task, params, examples) for params in models])
    return float(log(len(models)) - log_p.logsumexp(0).mean())


@torch.no_grad()
def losses(task: Task, params: Tensors, examples: Examples) -> Tensor:
    """The negative log-likelihood of each example under the model with these parameters, float64, (n,)."""
    model = task.model()
    load(model, params)
    loader: DataLoader[Batch] = DataLoader(examples, BATCH)
    with evaluating(model):
        return torch.cat([task.loss(model(inputs), targets) for inputs, targets in loader]).double()
