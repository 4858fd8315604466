"""A federation in this process: the same wire, admission and strategy, no network."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from rich.table import Table

from aggregators.core.base import Aggregator
from aggregators.core.registry import parse
from aggregators.core.update import GlobalModel
from client.app import respond
from client.task import Node, Task

from .app import federate
from .grid import Content, Reply, Terms
from .ledger import Ledger
from .parking import Parking
from .settings import Settings, from_run_config
from .telemetry import Telemetry, table


@dataclass(frozen=True, eq=False)
class Run:
    """A finished federation: the model, the record of every round, and the last model's evaluation by the clients."""

    model: GlobalModel
    records: list[dict[str, Any]]
    evaluation: dict[str, float | None]

    def __rich__(self) -> Table:
        return table(self.records, self.evaluation)


@dataclass(eq=False)
class Loopback:
    """Clients in this process as a Transport; node k (from 1) has the k-th node configuration."""

    nodes_config: Sequence[Node]
    contexts: dict[int, Context] = field(init=False)

    def __post_init__(self) -> None:
        self.contexts = {
            number: Context(0, number, dict(node), RecordDict(), {}) for number, node in enumerate(self.nodes_config, 1)
        }

    def nodes(self) -> list[int]:
        """1 to the number of clients."""
        return sorted(self.contexts)

    def ask(self, kind: str, content: Content, cohort: Sequence[int], terms: Terms) -> Iterator[Reply]:
        """The clients' replies, one client after the other; an exception of a client is its error reply."""
        end = time.monotonic() + terms.deadline
        for client in cohort:
            if time.monotonic() > end:
                yield Reply(client, None, f"late: no reply within {terms.deadline:g} s")
                continue
            try:
                answer = respond(content(client), self.contexts[client])
            except Exception as error:
                yield Reply(client, None, f"error 2: {type(error).__name__}: {error}")
            else:
                yield Reply(client, answer)
                del answer


def run(
    task: str | Mapping[str, Any] | Task,
    aggregator: str | Mapping[str, Any] | Aggregator = "fedavg",
    *,
    clients: int = 4,
    nodes: Sequence[Node] | None = None,
    folder: str | Path | None = None,
    parking: Parking | None = None,
    **settings: Any,
) -> Run:
    """A federation of `clients` simulated clients, or of one per node configuration in `nodes`.

    `settings` are those of a run (`rounds=5`, `seed=1`, `training={"epochs": 2}`). Checkpoints and records stay in
    `folder` when it is given: see `resume`. Raises ValueError, in one line, for a configuration that cannot run.
    """
    nodes = nodes or [{"partition-id": part, "num-partitions": clients} for part in range(clients)]
    config = {"min-clients": len(nodes), **{key.replace("_", "-"): value for key, value in settings.items()}}
    chosen = from_run_config({**config, "task": _described(task), "aggregator": parse(aggregator)})
    with tempfile.TemporaryDirectory() as temporary:
        return _federation(chosen, nodes, Path(folder or temporary).resolve(), parking)


def resume(folder: str | Path, parking: Parking | None = None) -> Run:
    """The rest of a run in this process that stopped before its end, however it did: the same bits as without a stop.

    What clients keep to themselves, private parameters, went with the process, and starts anew, which their log says.
    Raises ValueError, in one line, where there is no such run.
    """
    ledger = Ledger(place := Path(folder).resolve())
    settings, noted = ledger.noted("settings"), ledger.noted("nodes")
    if not settings:
        raise ValueError(f"{folder}: no run there, or its settings.json is damaged: give a run's folder")
    if not noted:
        raise ValueError(f"{folder}: its clients are a federation's: fedbasin resume {folder} FEDERATION")
    return _federation(from_run_config({**settings, "resume": str(place)}), noted["nodes"], place, parking)


def _federation(settings: Settings, nodes: Sequence[Node], folder: Path, parking: Parking | None) -> Run:
    logging.getLogger("flwr.fedbasin").setLevel(logging.WARNING)  # the clients' own progress
    model, evaluation = federate(settings, Loopback(nodes), folder, Telemetry(), parking=parking, nodes=nodes)
    return Run(model, Ledger(folder).records(), evaluation)


def _described(task: str | Mapping[str, Any] | Task) -> str:
    if isinstance(task, str):
        return task
    if isinstance(task, Mapping):
        return json.dumps(task)
    kind = f"{type(task).__module__}:{type(task).__qualname__}"
    return json.dumps({"kind": kind, **task.model_dump(mode="json")})
