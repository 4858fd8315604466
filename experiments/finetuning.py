"""Models fine-tuned from a common start: trained and measured once, then kept on disk; merged; and what they score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from aggregators.core.exchange import Exchange, run
from aggregators.core.registry import parse
from aggregators.core.seed import derive_seed
from aggregators.core.update import ClientUpdate, Estimator, GlobalModel, Gradients, Merged, Probe, Tensors
from client.statistics.gradients import gradients
from client.task import Task, is_private, load, tensors
from client.training import Training, evaluating, seeded, train

from .cache import cached
from .sources import sources

BATCH = 500
Config: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A model, the examples it was trained on, and the seed of its training and statistics."""

    task: Task
    params: Tensors
    examples: TensorDataset
    seed: int = 0
    private: tuple[str, ...] = ()

    def tuned(self, examples: TensorDataset, training: Training, seed: int) -> Finetuned:
        """The model after training on these examples."""
        settings = {
            "task": repr(self.task),
            "start": digest(self.params.values()),
            "examples": digest(examples.tensors),
            "training": training.model_dump(),
            "seed": seed,
            "code": sources("client/training.py", "client/tasks"),
        }
        params = cached("finetuned", settings, lambda: self._trained(examples, training, seed))
        return replace(self, params={name: params[name] for name in self.params}, examples=examples, seed=seed)

    def with_new(self, private: tuple[str, ...], seed: int) -> Finetuned:
        """The same model but for the parameters that match `private`, which start anew and never leave it."""
        fresh = {name: value for name, value in initial(self.task, seed).items() if is_private(name, private)}
        return replace(self, params={**self.params, **fresh}, private=private)

    def at(self, params: Tensors) -> Finetuned:
        """The same client with other public parameters."""
        return replace(self, params={**self.params, **params})

    def update(self, client: int, estimator: Estimator = "exact", limit: int | None = None) -> ClientUpdate:
        """What the client returns to a method that asks for Σ g² over `limit` of its examples."""
        num = min(limit or len(self.examples), len(self.examples))
        return ClientUpdate(
            client_id=client,
            num_examples=len(self.examples),
            params=self._public(self.params),
            sq_grad_sum=self._public(self._squares(estimator, num)),
            num_grads=num,
            estimator=estimator,
        )

    def _public(self, values: Tensors) -> dict[str, Tensor]:
        return {name: value for name, value in values.items() if not is_private(name, self.private)}

    def _squares(self, estimator: Estimator, num: int) -> Tensors:
        asked = Gradients(squares=True, estimator=estimator, limit=num)
        settings = {
            "task": repr(self.task),
            "params": digest(self.params.values()),
            "examples": digest(self.examples.tensors),
            "asked": asked.model_dump(),
            "seed": self.seed,
            "code": sources("client/statistics"),
        }
        return cached("squares", settings, lambda: self._measured(asked))

    def _trained(self, examples: TensorDataset, training: Training, seed: int) -> Tensors:
        model = self.task.model()
        load(model, self.params)
        train(self.task, model, examples, training, seed=seed, round=1)
        return tensors(model)

    def _measured(self, asked: Gradients) -> Tensors:
        model = self.task.model()
        load(model, self.params)
        seed = derive_seed(self.seed, "statistics")
        return gradients(self.task, model, self.examples, asked, seed=seed).sq_grad_sum


def initial(task: Task, seed: int) -> Tensors:
    """The parameters of a new model, the same for the same seed."""
    with seeded(derive_seed(seed, "initial")):
        return tensors(task.model())


def merged(config: Config, updates: Sequence[ClientUpdate], probe: Probe | None = None) -> Merged:
    """What a method that asks its clients once makes of these updates."""
    start = updates[0].params
    return parse(config).aggregate(GlobalModel(params=start, trainable=frozenset(start), probe=probe), updates)


def merged_from(config: Config, start: Tensors, clients: Sequence[Finetuned], limit: int | None) -> Merged:
    """A round of the method that began at `start`: the clients answer its exchanges, also at models it sends them."""

    def ask(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        for number, client in enumerate(clients):
            sent = exchange.sent(number) or {}
            yield (client if exchange.task == "train" else client.at(sent)).update(number, limit=limit)

    return run(parse(config).round(GlobalModel(params=start, trainable=frozenset(start))), ask)


@torch.no_grad()
def probabilities(task: Task, params: Tensors, inputs: Tensor) -> Tensor:
    """Each input's probabilities of the labels, (n, num_classes)."""
    model = task.model()
    load(model, params)
    with evaluating(model):
        return torch.cat([model(batch).softmax(1) for batch in torch.split(inputs, BATCH)])


def correct(task: Task, models: Sequence[Tensors], examples: TensorDataset) -> Tensor:
    """Whether the mean of the models' predictions labels each example rightly, (n,): of one model, or an ensemble."""
    inputs, targets = examples.tensors
    predicted = torch.stack([probabilities(task, params, inputs) for params in models]).mean(0).argmax(1)
    return predicted == targets


def accuracy(task: Task, models: Sequence[Tensors], examples: TensorDataset) -> float:
    """The share of examples that the mean of the models' predictions labels rightly."""
    return correct(task, models, examples).double().mean().item()


def digest(tensors: Iterable[Tensor]) -> str:
    """What tells these tensors from others."""
    state = blake2b(digest_size=16)
    for tensor in tensors:
        state.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().contiguous().numpy().data)
    return state.hexdigest()
