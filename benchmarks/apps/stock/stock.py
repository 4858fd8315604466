"""A stock Flower app as its documentation writes one: FedAvg, train and evaluate, a tiny model."""

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

client = ClientApp()
server = ServerApp()


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    """256 random examples of ten classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(256, 64, generator=generator), torch.randint(10, (256,), generator=generator)


def received(message: Message) -> nn.Module:
    """The tiny model with the received parameters."""
    model = nn.Linear(64, 10)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return model


@client.train()
def train(message: Message, _: Context) -> Message:
    """One epoch of SGD."""
    model, (inputs, targets) = received(message), examples()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for start in range(0, len(inputs), 32):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[start : start + 32]), targets[start : start + 32])
        loss.backward()
        optimiser.step()
    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(inputs)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, _: Context) -> Message:
    """Loss and accuracy."""
    model, (inputs, targets) = received(message), examples()
    with torch.no_grad():
        outputs = model(inputs)
        loss = nn.functional.cross_entropy(outputs, targets).item()
        accuracy = (outputs.argmax(1) == targets).float().mean().item()
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(inputs)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of FedAvg; writes the seconds they took."""
    config, nodes = context.run_config, int(context.run_config["nodes"])
    strategy = FedAvg(min_train_nodes=nodes, min_evaluate_nodes=nodes, min_available_nodes=nodes)
    start = time.perf_counter()
    strategy.start(grid, ArrayRecord(nn.Linear(64, 10).state_dict()), num_rounds=int(config["rounds"]))
    Path(str(config["out"])).write_text(json.dumps(time.perf_counter() - start))
