"""A small task, a method that asks for Σg and Σg², and a client that answers with rubbish."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aggregators.core.base import SumAggregator, Sums, Term
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Merged, Request
from client.app import respond
from client.task import Examples, Node, Task
from client.wire import encode
from server.wire import decode

app = ClientApp()
Change = Callable[[ClientUpdate], dict[str, Any]]


class Blobs(Task):
    """Two well-separated classes in the plane, another draw for each partition."""

    num_classes = 2

    def model(self) -> nn.Module:
        return nn.Linear(2, 2)

    def data(self, node: Node) -> tuple[Examples, Examples]:
        generator = torch.Generator().manual_seed(int(node["partition-id"]))
        labels = torch.arange(64) % 2
        inputs = torch.randn(64, 2, generator=generator) + 4 * labels[:, None]
        return TensorDataset(inputs[:48], labels[:48]), TensorDataset(inputs[48:], labels[48:])


class Both(SumAggregator):
    """The mean, by a method that asks for both sums, so that Cauchy–Schwarz can be checked."""

    kind: Literal["rogue:Both"] = "rogue:Both"

    @property
    def request(self) -> Request:
        return Request(gradients=Gradients(sums=True, squares=True))

    def terms(self, model: GlobalModel, update: ClientUpdate) -> Iterator[Term]:
        for name in model.names:
            yield Term("weighted", name, update.num_examples, update.params[name])

    def finish(self, model: GlobalModel, sums: Sums) -> Merged:
        return Merged({name: sum.mean() for name, sum in sums["weighted"].items()})


def _filled(value: float) -> Change:
    return lambda update: {"params": {**update.params, "bias": torch.full_like(update.params["bias"], value)}}


def _times(tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: tensor * factor for name, tensor in tensors.items()}


CHANGES: dict[str, Change] = {
    "missing tensor": lambda update: {"params": {"weight": update.params["weight"]}},
    "extra tensor": lambda update: {"params": {**update.params, "more": torch.zeros(3)}},
    "misshapen tensor": lambda update: {"params": {**update.params, "bias": torch.zeros(1)}},
    "NaN": _filled(float("nan")),
    "infinity": _filled(float("inf")),
    "negative squares": lambda update: {"sq_grad_sum": _times(update.sq_grad_sum, -1)},
    "impossible squares": lambda update: {"grad_sum": {n: s + 1e3 for n, s in update.grad_sum.items()}},
    "no examples": lambda _: {"num_examples": 0},
    "too many examples": lambda _: {"num_examples": 10**6},
    "wrong estimator": lambda _: {"estimator": "empirical"},
    "no statistics": lambda _: {"grad_sum": {}, "sq_grad_sum": {}, "num_grads": 0, "estimator": None},
}
KINDS = [*CHANGES, "wrong version", "an error", "not ours", "twice", "late"]
LATE = 120.0  # seconds: longer than the deadline


@app.train()
@app.evaluate()
@app.query()
def answer(message: Message, context: Context) -> Message:
    """An honest reply, or rubbish where the node is the rogue one: of another kind every round."""
    instructions = json.loads(str(message.content.config_records["manifest"]["instructions"]))
    reply = respond(message.content, context)
    if context.node_config.get("rogue") and instructions["exchange"] == "train":
        reply = _rubbish(KINDS[(instructions["round"] - 1) % len(KINDS)], reply)
    return Message(reply, reply_to=message)


def _rubbish(kind: str, reply: RecordDict) -> RecordDict:
    if kind in CHANGES:
        update = decode(reply, 0)
        return encode(dataclasses.replace(update, **CHANGES[kind](update)))
    if kind == "wrong version":
        reply.config_records["manifest"]["version"] = 99
    if kind == "an error":
        raise RuntimeError("this client has a bad day")
    if kind == "not ours":
        return RecordDict()
    if kind == "late":
        time.sleep(LATE)
    return reply
