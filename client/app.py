"""The Flower ClientApp: train, measure, evaluate."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from aggregators.core.fitting import fit
from aggregators.core.flat import pack, unpack
from aggregators.core.functional import evaluating
from aggregators.core.registry import validated
from aggregators.core.seed import derive_seed
from aggregators.core.update import ClientUpdate, Request, Tensors

from .statistics import measure
from .task import Examples, Node, Task, is_private, load, parse, tensors
from .training import Training, evaluate, train
from .wire import Instructions, anchor, decode, encode, flat_record

app = ClientApp()
log = logging.getLogger("flwr.fedbasin")  # a child of Flower's: its format, its handlers


@app.train()
@app.query()
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """The reply to any exchange's message: Flower's entry."""
    return Message(respond(message.content, context), reply_to=message)


def respond(content: RecordDict, context: Context) -> RecordDict:
    """The encoded update that answers `content`; private parameters stay behind in `context.state`."""
    asked, received = decode(content)
    task, who = parse(asked.task).at(context.node_config), identity(context.node_config, context.node_id)
    model = _model(task, asked, received, who)
    _restore_private(task, model, context.state, asked.round)
    training, validation = task.data(context.node_config)
    _refuse_unfit_private(task, model, training)
    _refuse_few(asked.request, training, context.node_config)
    metrics = evaluate(task, model, validation) if asked.evaluate and received is not None else {}
    log.info("round %d, %s: received model %s", asked.round, asked.exchange, _shown(metrics))
    if asked.exchange == "train":
        metrics |= _train(task, model, training, asked, who)
        _keep_private(task, model, context.state)
    update = ClientUpdate(
        client_id=context.node_id,
        name=str(context.node_config.get("name", "")),
        num_examples=len(training),  # type: ignore[arg-type]
        params=tensors(model, task.private) if asked.exchange == "train" else {},
        metrics=metrics,
        **_measured(task, model, training, asked, who, compared=anchor(content)),
    )
    return encode(update)


def identity(node: Node, node_id: int) -> str:
    """What seeds a client's randomness: its name, else its partition, else its node id, which changes at a restart."""
    return str(node.get("name", node.get("partition-id", node_id)))


def _model(task: Task, asked: Instructions, received: Tensors | None, who: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(asked.seed, "initial", who if received is None else ""))
        model = task.model()
    _note_other_sizes(tensors(model), asked, received or {})
    load(fit(model, received or {}), received or {})
    return model


def _note_other_sizes(own: Tensors, asked: Instructions, received: Tensors) -> None:
    """One log line where this client trains in other widths than it is configured to have."""
    for name, value in received.items():
        if asked.exchange == "train" and name in own and value.shape != own[name].shape:
            mine = f"by this client's own configuration it is {tuple(own[name].shape)}"
            log.info("round %d, train: received %s of shape %s; %s", asked.round, name, tuple(value.shape), mine)
            return


def _train(task: Task, model: nn.Module, examples: Examples, asked: Instructions, who: str) -> dict[str, float]:
    training = validated(Training, asked.training)
    seed = derive_seed(asked.seed, asked.round, who)
    return train(task, model, examples, training, seed=seed, round=asked.round, frozen=asked.frozen)


def _measured(
    task: Task, model: nn.Module, examples: Examples, asked: Instructions, who: str, *, compared: Tensors | None
) -> dict[str, Any]:
    if asked.exchange == "evaluate":
        return {}
    seed = derive_seed(asked.seed, asked.round, who, "statistics")
    fields = measure(task, model, examples, asked.request, seed=seed, anchor=compared)
    return {name: _public(task, value) if isinstance(value, dict) else value for name, value in fields.items()}


def _public(task: Task, values: Tensors) -> Tensors:
    return {name: value for name, value in values.items() if not is_private(name, task.private)}


def _keep_private(task: Task, model: nn.Module, state: RecordDict) -> None:
    kept = {name: tensor for name, tensor in tensors(model).items() if is_private(name, task.private)}
    if kept:
        data, layout = pack(kept)
        state["private"] = flat_record(data)
        state["private_layout"] = ConfigRecord({"layout": json.dumps(layout)})


def _restore_private(task: Task, model: nn.Module, state: RecordDict, round: int) -> None:
    if "private" in state.array_records:
        layout = json.loads(str(state.config_records["private_layout"]["layout"]))
        load(model, unpack(state.array_records["private"]["flat"].data, layout))
    elif task.private and round > 1:
        log.warning("private parameters start from their initial values: this client kept none from an earlier round")


def _refuse_unfit_private(task: Task, model: nn.Module, examples: Examples) -> None:
    """ValueError that names them where the model does not work with this client's private parameters."""
    private = [name for name in tensors(model) if is_private(name, task.private)]
    if not private or not len(examples):  # type: ignore[arg-type]
        return
    try:
        with evaluating(model), torch.no_grad():
            model(examples[0][0][None])
    except RuntimeError as error:
        raise ValueError(
            f"the model that was sent does not work with this client's private {', '.join(private)} ({error}): where"
            " widths differ, give what private parameters read the same width at every client"
        ) from error


def _refuse_few(request: Request, examples: Examples, node: Node) -> None:
    """ValueError where fewer examples would stand behind a statistic than this site's `min-examples`."""
    limit = request.gradients.limit if request.gradients else None
    behind, least = min(len(examples), limit or len(examples)), int(node.get("min-examples", 0))  # type: ignore[arg-type]
    if request != Request() and behind < least:
        raise ValueError(
            f"this site gives statistics of {least} examples or more (min-examples), these would be of {behind}: ask"
            " for more (max_grads), or for weights alone, as fedavg does"
        )


def _shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "not evaluated"
