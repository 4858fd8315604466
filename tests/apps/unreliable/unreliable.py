"""A small task whose model can be made large, and a client that does what a file bids it, once."""

import json
import os
import time
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import TensorDataset

from client.app import respond
from client.task import Examples, Node, Task

LONGEST = 300.0  # seconds

app = ClientApp()


class Clouds(Task):
    """Two classes in the plane, another draw for each partition, told apart by a network of `hidden` units."""

    num_classes = 2
    hidden: int = 16

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 2))

    def data(self, node: Node) -> tuple[Examples, Examples]:
        generator = torch.Generator().manual_seed(int(node["partition-id"]))
        labels = torch.arange(64) % 2
        inputs = torch.randn(64, 2, generator=generator) + 2 * labels[:, None]
        return TensorDataset(inputs[:48], labels[:48]), TensorDataset(inputs[48:], labels[48:])


@app.train()
@app.evaluate()
@app.query()
def answer(message: Message, context: Context) -> Message:
    """An honest reply, after what the client was bidden: `sleep SECONDS`, `stay` until it is let go, or `die`.

    The file `NAME.answers` has a line, the round, for each.
    """
    instructions = json.loads(str(message.content.config_records["manifest"]["instructions"]))
    reply = respond(message.content, context)
    order = Path(str(context.node_config["orders"])) / str(context.node_config["name"])
    if instructions["exchange"] == "train":
        obey(order)
    with order.with_suffix(".answers").open("a") as answers:
        print(instructions["round"], file=answers)
    return Message(reply, reply_to=message)


def obey(order: Path) -> None:
    """Does what the file says, if there is one, and renames it first; stays as long as it is there, or too long."""
    if not order.exists():
        return
    verb, *seconds = order.read_text().split()
    order = order.replace(order.with_suffix(".obeyed"))
    if verb == "die":
        os._exit(1)
    end = time.monotonic() + float(*seconds or (LONGEST,))
    while order.exists() and time.monotonic() < end:
        time.sleep(0.1)
