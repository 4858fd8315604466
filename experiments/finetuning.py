"""Models fine-tuned from a start: trained and measured once, then kept on disk; merged; and what they score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from aggregators.core.exchange import Exchange, run
from aggregators.core.fitting import fit
from aggregators.core.functional import evaluating
from aggregators.core.registry import parse
from aggregators.core.seed import derive_seed
from aggregators.core.update import ClientUpdate, Estimator, GlobalModel, Gradients, Merged, Probe, Request, Tensors
from client import wire
from client.statistics import measure
from client.statistics.gradients import gradients
from client.task import Task, is_private, load, tensors
from client.training import Training, seeded, train
from server.app import symmetry
from server.wire import encode, nbytes

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

    def measured(self, request: Request, anchor: Tensors | None = None) -> dict[str, Any]:
        """The fields of an update that any method may ask for, at the client's parameters on its examples."""
        model = self.task.model()
        load(model, self.params)
        seed = derive_seed(self.seed, "statistics")
        return measure(self.task, model, self.examples, request, seed=seed, anchor=anchor)

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


class Round(NamedTuple):
    """What a round ended with, and the bytes that each client received and sent in it, as the wire carries them."""

    merged: Merged
    nbytes: float


@dataclass(frozen=True, eq=False)
class Cohort:
    """Clients that have trained, each from its own start, and answer whatever a method asks of them.

    What one was asked before it does not measure again; cohorts of the same first clients may share what is `known`.
    """

    clients: Sequence[Finetuned]
    known: dict[object, dict[str, Any]] = field(default_factory=dict)

    def round(self, config: Config) -> Round:
        """The round of the method whose training ended with these models."""
        traffic: list[int] = []

        def ask(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
            messages = encode(replace(exchange, params=None) if exchange.task == "train" else exchange, {})
            for number in range(len(self.clients)):
                update = self._answer(number, exchange)
                traffic.append(nbytes(messages(number)) + nbytes(wire.encode(update)))
                yield update

        method = parse(config)
        aligns = any("symmetry" in part.needs for part in method.parts())
        merged = run(method.round(self._traced if aligns else self._model), ask)
        return Round(merged, sum(traffic) / len(self.clients))

    @cached_property
    def _model(self) -> GlobalModel:
        """The server's, from which no client began."""
        task = self.clients[0].task
        trainable = frozenset(name for name, _ in task.model().named_parameters())
        return GlobalModel(params=initial(task, 0), trainable=trainable, round=1)

    @cached_property
    def _traced(self) -> GlobalModel:
        """The same with the symmetry of its network."""
        return replace(self._model, symmetry=symmetry(self.clients[0].task, self._model))

    def _answer(self, number: int, exchange: Exchange[Any]) -> ClientUpdate:
        client, sent, trained = self.clients[number], exchange.sent(number), exchange.task == "train"
        at = client if trained else client.at(sent or {})
        anchor = sent if exchange.anchor is None else exchange.anchor
        models = [digest(params.values()) for params in (at.params, anchor or {})]
        fields = self._once((number, exchange.request.model_dump_json(), *models), at, exchange.request, anchor)
        params = client.params if trained else {}
        return ClientUpdate(client_id=number, num_examples=len(client.examples), params=params, **fields)

    def _once(self, asked: object, at: Finetuned, request: Request, anchor: Tensors | None) -> dict[str, Any]:
        if asked not in self.known:
            self.known[asked] = at.measured(request, anchor)
        return self.known[asked]


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
def outputs(task: Task, params: Tensors, inputs: Tensor) -> Tensor:
    """What the task's network, as wide as `params` are, makes of each input, (n, num_classes)."""
    model = fit(task.model(), params)
    load(model, params)
    with evaluating(model):
        return torch.cat([model(batch) for batch in torch.split(inputs, BATCH)])


def probabilities(task: Task, params: Tensors, inputs: Tensor) -> Tensor:
    """Each input's probabilities of the labels, (n, num_classes)."""
    return outputs(task, params, inputs).softmax(1)


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
