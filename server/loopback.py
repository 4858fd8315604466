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
from .grid import Content, Reply
from .ledger import Ledger
from .settings import from_run_config
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

    def ask(
        self, kind: str, content: Content, cohort: Sequence[int], deadline: float, newcomers: bool = True
    ) -> Iterator[Reply]:
        """The clients' replies, one client after the other; an exception of a client is its error reply."""
        end = time.monotonic() + deadline
        for client in cohort:
            if time.monotonic() > end:
                yield Reply(client, None, f"late: no reply within {deadline:g} s")
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
    **settings: Any,
) -> Run:
    """A federation of `clients` simulated clients, or of one per node configuration in `nodes`.

    `settings` are those of a run (`rounds=5`, `seed=1`, `training={"epochs": 2}`). Checkpoints and records stay in
    `folder` when it is given. Raises ValueError, in one line, for a configuration that cannot run.
    """
    logging.getLogger("flwr.fedbasin").setLevel(logging.WARNING)  # the clients' own progress
    nodes = nodes or [{"partition-id": part, "num-partitions": clients} for part in range(clients)]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary).resolve()
        config = {"min-clients": len(nodes), **{key.replace("_", "-"): value for key, value in settings.items()}}
        chosen = from_run_config({**config, "task": _described(task), "aggregator": parse(aggregator)})
        model, evaluation = federate(chosen, Loopback(nodes), place, Telemetry())
        return Run(model, Ledger(place).records(), evaluation)


def _described(task: str | Mapping[str, Any] | Task) -> str:
    if isinstance(task, str):
        return task
    if isinstance(task, Mapping):
        return json.dumps(task)
    kind = f"{type(task).__module__}:{type(task).__qualname__}"
    return json.dumps({"kind": kind, **task.model_dump(mode="json")})
