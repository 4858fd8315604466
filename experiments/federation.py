"""Federations in this process, whose last round's clients stay to be looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from statistics import fmean
from typing import Any, Literal, NamedTuple, cast, final

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import TensorDataset

from aggregators.core.base import Aggregator
from aggregators.core.exchange import Round, collect, tee
from aggregators.core.registry import AnyAggregator
from aggregators.core.update import GlobalModel, Memory, Request, Tensors
from client.task import Task, parse
from server import loopback

from .cache import cached
from .finetuning import correct
from .sources import sources


@final
class Observed(Aggregator):
    """The inner method; its memory also holds the models and label counts that the round's clients returned."""

    kind: Literal["experiments.federation:Observed"] = "experiments.federation:Observed"
    inner: AnyAggregator = Field(description="the method that merges")

    def round(self, model: GlobalModel) -> Round:
        """The inner's."""
        merged, updates = yield from tee(self.inner.round(model.within()), collect, Request(class_counts=True))
        clients: Memory = {
            str(update.client_id): {"params": update.params, "labels": cast(Tensor, update.class_counts)}
            for update in updates
        }
        return merged._replace(memory={"inner": merged.memory, "clients": clients})


class Federation(NamedTuple):
    """What is run: a task by its configuration, a method, clients, rounds, local training."""

    task: Mapping[str, Any]
    method: Mapping[str, Any]
    clients: int
    rounds: int
    training: Mapping[str, Any]
    seed: int


class Course(NamedTuple):
    """What a federation came to. `accuracy` on the server's test data and `nbytes`, all clients', by round.

    The others are of the last round: the merge's accuracy on the worst client's mix of labels, the best and the mean
    single client's, and that of the prediction ensemble.
    """

    accuracy: list[float]
    nbytes: list[float]
    worst: float
    best_single: float
    mean_single: float
    ensemble: float


def course(federation: Federation) -> Course:
    """The federation's course, run unless it was run before by the same code."""
    code = sources("aggregators", "client", "server", "experiments/federation.py")
    kept = cached("federation", {**federation._asdict(), "code": code}, lambda: _run(federation))
    accuracy, nbytes, last = (kept[name].tolist() for name in ("accuracy", "nbytes", "last"))
    return Course(accuracy, nbytes, *last)


def _run(federation: Federation) -> dict[str, Tensor]:
    run = completed(
        task=federation.task,
        aggregator={"kind": "experiments.federation:Observed", "inner": federation.method},
        clients=federation.clients,
        rounds=federation.rounds,
        seed=federation.seed,
        training=federation.training,
    )
    task, exchanges = parse(json.dumps(federation.task)), [record["exchanges"] for record in run.records]
    return {
        "accuracy": torch.tensor([record["test"]["accuracy"] for record in run.records], dtype=torch.float64),
        "nbytes": torch.tensor([sum(e["bytes_in"] + e["bytes_out"] for e in asked) for asked in exchanges]).double(),
        "last": torch.tensor(last_round(task, run.model.params, run.model.memory["clients"]), dtype=torch.float64),
    }


def completed(**settings: Any) -> loopback.Run:
    """The run in process, in which nobody was left out and no round lost; RuntimeError, with the reasons, else."""
    with redirect_stdout(StringIO()):  # a line for every round is too much here
        run = loopback.run(**settings, evaluate=False, keep_replies=False)
    exchanges = [exchange for record in run.records for exchange in record["exchanges"]]
    left_out = [one["reason"] for exchange in exchanges for one in exchange["left_out"]]
    lost = [record["reason"] for record in run.records if record["status"] != "merged"]
    if left_out or lost:
        raise RuntimeError(f"{settings['aggregator']}: {'; '.join([*left_out, *lost])}")
    return run


def last_round(task: Task, merged: Tensors, clients: Any) -> tuple[float, float, float, float]:
    """Worst client's, best and mean single client's, and the ensemble's accuracy, on the task's test data."""
    test = cast(TensorDataset, task.test_data())
    models = [client["params"] for client in clients.values()]
    alone = [_share(correct(task, [params], test)) for params in models]
    worst = worst_mix(correct(task, [merged], test), test.tensors[1], [client["labels"] for client in clients.values()])
    return worst, max(alone), fmean(alone), _share(correct(task, models, test))


def worst_mix(hits: Tensor, labels: Tensor, mixes: list[Tensor]) -> float:
    """The least accuracy on any mix of labels, given by their counts; `hits` and `labels` are of test data, (n,)."""
    rates = torch.stack([hits[labels == label].double().mean() for label in range(len(mixes[0]))])
    return min(((counts * rates).sum() / counts.sum()).item() for counts in mixes)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
