"""The Flower ServerApp, and the composition root of every federation: settings -> strategy -> run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from pydantic import BaseModel
from torch import nn

from aggregators.core.base import Aggregator
from aggregators.core.exchange import Exchange
from aggregators.core.fitting import fit, refuse_unless_resizable
from aggregators.core.registry import parse as method
from aggregators.core.registry import validated
from aggregators.core.seed import derive_seed
from aggregators.core.symmetry import Symmetry
from aggregators.core.update import GlobalModel, Probe, Tensors
from client.statistics import unsupported
from client.task import Node, Task, load, parse, tensors
from client.training import Training, evaluate

from .admission import Widths
from .grid import StreamingGrid, Transport
from .ledger import Ledger, Unwritable
from .parking import Parked, Parking
from .settings import Settings, from_run_config
from .strategy import MergeStrategy
from .telemetry import Telemetry, resuming

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run under Flower; a bad configuration ends it, in one line, before any client is woken.

    A signal parks it, and is then left to Flower, which tells the SuperLink and ends the process with 0.
    """
    settings, parking = from_run_config(context.run_config), Parking()
    folder = Path(settings.resume or Path(settings.runs_dir) / str(context.run_id)).resolve()
    try:
        with parking.signals():
            federate(settings, StreamingGrid(grid), folder, Telemetry(), parking=parking)
    except Parked as parked:
        signal.raise_signal(parked.signal)


def federate(
    settings: Settings,
    transport: Transport,
    folder: Path,
    telemetry: Telemetry,
    *,
    parking: Parking | None = None,
    nodes: Sequence[Node] | None = None,
) -> tuple[GlobalModel, dict[str, float | None]]:
    """The model after the last round and its evaluation, of a federation over `transport` recorded in `folder`.

    `nodes` are the configurations of clients in this process, which are noted, so that it can be resumed. Raises
    ValueError, in one line, for a configuration that cannot run or a folder in use, Unwritable for one that cannot be
    written, and Parked when `parking` is told to stop.
    """
    task = _checked_task(settings)
    ledger = Ledger(folder, settings.checkpoints, settings.keep_replies)
    if settings.resume and not ledger.noted("settings"):
        raise ValueError(f"resume = {settings.resume!r}: no run there; give a run's folder, or nothing")
    model = global_model(task, settings)
    if "symmetry" in settings.aggregator.needed():
        model = replace(model, symmetry=symmetry(task, model))
    widths = _widths(task, model, settings, telemetry)
    _refuse_unless_able(settings.aggregator, task, settings, model)
    with _ending(telemetry, ledger), ledger.held():
        _refuse_another_run(ledger, settings)
        model = ledger.restore(model, widths is not None)
        _drop_what_others_asked(ledger, settings, model.round + 1)
        _note(ledger, settings, nodes)
        size = sum(tensor.numel() for tensor in model.params.values())
        rounds = range(model.round + 1, settings.rounds + 1)
        telemetry.started(settings.aggregator.kind, settings.task, size, rounds, str(folder))
        parking = parking or Parking()
        return MergeStrategy(settings.aggregator, transport, settings, ledger, telemetry, widths, parking).run(model)


@contextmanager
def _ending(telemetry: Telemetry, ledger: Ledger) -> Iterator[None]:
    """Says how to go on with a run that ends before its last round."""
    try:
        yield
    except Unwritable as error:
        again = resuming(str(ledger.folder)) if ledger.noted("settings") else "start it again"
        raise Unwritable(
            f"{error}: all that was finished is whole: mend that (a full disk: make room), then {again}"
        ) from None
    except Parked:
        telemetry.parked(str(ledger.folder))
        raise


def _refuse_another_run(ledger: Ledger, settings: Settings) -> None:
    """ValueError, in one line, where the folder holds a run that is not to be resumed, or one of something else."""
    if not settings.resume:
        if ledger.begun():
            raise ValueError(f"{ledger.folder} holds a run: {resuming(str(ledger.folder))}, or take another folder")
        return
    before, now = ledger.noted("settings"), _noted(settings)
    for key, read in {"task": parse, "aggregator": method}.items():
        if not _alike(read, before[key], now[key]):
            told = f"its {key} is {json.dumps(before[key])}: give the same, or start a new run"
            raise ValueError(f"resume = {settings.resume!r}: {told}")


def _alike(read: Callable[[Any], BaseModel], before: Any, now: Any) -> bool:
    """Whether both are read as the same, however they are written, and with the defaults of options that are new."""
    try:
        was, is_ = read(before), read(now)
    except ValueError:
        return False
    return type(was) is type(is_) and was.model_dump() == is_.model_dump()


def _drop_what_others_asked(ledger: Ledger, settings: Settings, round: int) -> None:
    """Kept replies to what this run would not have asked are dropped, and the round says so."""
    before, now = ledger.noted("settings"), _noted(settings)
    keys = ["seed", "start", "training", *(["rounds"] if settings.training.get("schedule") == "cosine" else [])]
    if changed := [key for key in keys if before.get(key, now[key]) != now[key]]:
        ledger.drop_replies(round, f"the replies kept were dropped: {', '.join(changed)} changed when it was resumed")


def _noted(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json", by_alias=True)


def _note(ledger: Ledger, settings: Settings, nodes: Sequence[Node] | None) -> None:
    """Notes what it takes to resume the run."""
    if nodes is not None:
        ledger.note("nodes", {"nodes": [dict(node) for node in nodes]})
    ledger.note("settings", _noted(settings))


def _checked_task(settings: Settings) -> Task:
    try:
        task = parse(settings.task)
    except ValueError as error:
        raise ValueError(f"task = {settings.task!r}: {error}") from None
    try:
        validated(Training, settings.local_training)
    except ValueError as error:
        raise ValueError(f"training: {error}") from None
    return task


def global_model(task: Task, settings: Settings) -> GlobalModel:
    """θ_0 of the task, drawn by the run's seed, on the run's device, with a probe where the task has test data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "initial", ""))
        module = task.model()
    params = {name: tensor.to(settings.device) for name, tensor in tensors(module, task.private).items()}
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trainable & params.keys():
        raise ValueError(f"task = {settings.task!r}: its model has no trainable parameter to merge")
    return GlobalModel(params=params, trainable=frozenset(trainable & params.keys()), probe=_probe(task))


def movable(task: Task, module: nn.Module, params: Tensors) -> Symmetry:
    """The groups of the task's model that move nothing private, and nothing frozen, which clients have in common."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return task.symmetry(module).within({name: value for name, value in params.items() if name not in frozen})


def symmetry(task: Task, model: GlobalModel) -> Symmetry:
    """The groups of the task's model that can be moved, verified; ValueError where there are none."""
    from aggregators.core.tracing import verify  # torch.export, which other methods do not need

    module = task.model()
    found = movable(task, module, model.params)
    if not found.groups:
        raise ValueError(f"{type(task).__name__}'s model has no units that could be permuted: use another method")
    verify(found, module, task.example())
    return found


def _widths(task: Task, model: GlobalModel, settings: Settings, telemetry: Telemetry) -> Widths | None:
    """The most units that a client's own model may have of each group; None where all are to have θ_t's widths."""
    needs = settings.aggregator.needed()
    if "widths" not in needs or model.symmetry is None:
        return None
    try:
        refuse_unless_resizable(model.symmetry, task.model(), task.example())
    except ValueError as error:
        if "growth" in needs:
            raise
        telemetry.one_width(str(error))
        return None
    return {group: int(settings.max_width * units) for group, units in model.symmetry.sizes(model.params).items()}


def _probe(task: Task) -> Probe | None:
    if (examples := task.test_data()) is None:
        return None
    module = task.model()

    def measured(params: Tensors) -> Mapping[str, float]:
        load(fit(module, params), params)
        return evaluate(task, module, examples)

    return Probe(loss=lambda params: measured(params)["loss"], score=lambda params: measured(params)["accuracy"])


def _refuse_unless_able(aggregator: Aggregator, task: Task, settings: Settings, model: GlobalModel) -> None:
    """Raises ValueError, in one line, when the method needs what the task or the run does not provide."""
    for reason in _lacks(aggregator, task, settings, model):
        raise ValueError(f"aggregator = {aggregator.kind!r}: {reason}")


def _lacks(aggregator: Aggregator, task: Task, settings: Settings, model: GlobalModel) -> Iterator[str]:
    needs = aggregator.needed()
    if "shared_start" in needs and settings.start != "shared":
        yield f"it measures steps from the server's model: start = {settings.start!r} must be 'shared'"
    if "probe" in needs and model.probe is None:
        yield f"it needs held-out data on the server: task {settings.task!r} defines no test_data"
    first: Exchange[Any] = next(aggregator.round(model))
    for request in (first.request, *(question.request for question in aggregator.questions())):
        if reason := unsupported(request, task):
            yield f"{reason} (task = {settings.task!r})"
