"""Matching by weights beside what the machine multiplies, its parts, its memory as clients grow in number; tracing."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from aggregators.core import matching
from aggregators.core.registry import parse
from aggregators.core.symmetry import Symmetry
from aggregators.core.tracing import trace, verify
from aggregators.core.update import ClientUpdate, GlobalModel, Probe, Tensors
from client.tasks.architectures import mlp

from .memory import GROWTH, resident
from .row import Row, interleaved

networks: Any = import_module("tests.networks")  # the eight; mypy does not read tests
PERCEPTRON, RESNET = "3 × 512 perceptron", "ResNet-50's shape"
SQUARE = 2048  # of the product that shows what the machine can do
RESTARTS = 5
CLIENTS = (8, 32)
INPUTS, UNITS = 160_000, 64  # of a network that takes memory and no time; larger tensors than malloc keeps


def rows() -> Iterator[Row]:
    """Cost matrices; matchings of independent initialisations, which take the most visits; memory; tracing."""
    pairs = {name: initialised(*network) for name, network in NETWORKS.items()}
    for name in (PERCEPTRON, RESNET):
        yield _products(name, pairs[name])
    for name, pair in pairs.items():
        restarts, asked = (RESTARTS, "<= 2") if name == PERCEPTRON else (1, "")
        yield _matched(name, pair, restarts, asked)
    yield _flat()
    yield from map(_traced, networks.EIGHT)


def minilm() -> nn.Module:
    """Six layers of twelve heads, and 30,522 words."""
    model: nn.Module = networks.Bert(384)
    model.words, model.positions = nn.Embedding(30_522, 384), nn.Embedding(512, 384)
    return model


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], Tensor]] = {
    PERCEPTRON: (partial(mlp, 784, 512, 512, 512, 10), torch.rand(2, 784)),
    "ResNet-20": (partial(networks.resnet20, 16), torch.rand(2, 3, 16, 16)),
    RESNET: (partial(networks.resnet50, 64), torch.rand(2, 3, 16, 16)),
    "MiniLM": (minilm, networks.EIGHT["BERT"].example),
}


class Pair(NamedTuple):
    """Two initialisations of a network."""

    symmetry: Symmetry
    a: Tensors
    b: Tensors


def initialised(make: Callable[[], nn.Module], example: Tensor) -> Pair:
    """The network initialised twice, and its symmetry."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, other = make(), make()
    symmetry = trace(one, example)
    a, b = ({n: v.detach() for n, v in m.named_parameters() if n in symmetry.axes} for m in (one, other))
    return Pair(symmetry, a, b)


def _products(name: str, pair: Pair) -> Row:
    """The gains of every group, 2 n² d operations for n units of d weights each."""
    symmetry, a, b = pair
    sizes, square = symmetry.sizes(b), torch.randn(SQUARE, SQUARE)
    weights = {
        group: sum(a[name].numel() for name, _ in places if name in a) for group, places in symmetry.members.items()
    }
    operations = sum(2 * sizes[group] * number for group, number in weights.items())

    def gains() -> None:
        for group in symmetry.groups:
            matching.gains(symmetry, group, a, b, sizes)

    ours, machine = interleaved(gains, lambda: square @ square)
    rate, best = operations / ours / 1e9, 2 * SQUARE**3 / machine / 1e9
    detail = f"{rate:.0f} Gflop/s, the machine {best:.0f}"
    return Row(f"cost matrices of a {name}, flop/s", f"a product of {SQUARE} × {SQUARE}", rate / best, ">= 0.3", detail)


def _matched(name: str, pair: Pair, restarts: int, asked: str) -> Row:
    """Seconds of a matching of units at equal scale, and of the parts of one run."""
    every, one = Clock(), Clock()
    every.timed("all", _match)(pair, restarts)
    with (
        patch.object(matching, "gains", one.timed("products", matching.gains)),
        patch.object(matching, "assign", one.timed("assignment", matching.assign)),
    ):
        one.timed("all", _match)(pair, 1)
    rest = one.seconds["all"] - one.seconds["products"] - one.seconds["assignment"]
    parts = {**one.seconds, "permuting and the rest": rest}
    detail = "one run: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items() if part != "all")
    runs = f"{restarts} runs" if restarts > 1 else "one run"
    return Row(f"matching a {name}, {runs}, seconds", "1 s", every.seconds["all"], asked, detail)


def _match(pair: Pair, restarts: int) -> None:
    symmetry, *models = pair
    a, b = (symmetry.scale(one, matching.balance(symmetry, one)) for one in models)
    matching.match(symmetry, a, b, restarts=restarts)


class Clock:
    """Seconds that functions take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, whose seconds are added to those of `part`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = work(*args, **kwargs)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            return found

        return timed


def _flat() -> Row:
    """Each number of clients in a process of its own."""
    few, many = (_peak(number) for number in CLIENTS)
    detail = f"peaks {few:.1f}x and {many:.1f}x the model"
    return Row(
        f"alignment to the global model, memory of {CLIENTS[1]} clients",
        f"of {CLIENTS[0]}",
        many / few,
        f"<= {GROWTH}",
        detail,
    )


def _peak(clients: int) -> float:
    command = [sys.executable, "-m", "benchmarks.alignment", str(clients)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(clients: int) -> float:
    """Peak resident memory above baseline of a round aligned to the global model, in float32 models."""
    model, method = hidden(INPUTS), parse({"kind": "git_rebasin", "inner": "fedavg", "reference": "global"})
    method.aggregate(hidden(10), shuffled(hidden(10), 2))  # loads what code it needs
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    method.aggregate(model, shuffled(model, clients))
    return (resident("VmHWM") - before) / sum(value.nbytes for value in model.params.values())


def hidden(inputs: int) -> GlobalModel:
    """A perceptron of one hidden layer."""
    shapes = {"in.weight": (UNITS, inputs), "in.bias": (UNITS,), "out.weight": (10, UNITS)}
    params = {name: torch.randn(shape) for name, shape in shapes.items()}
    symmetry = Symmetry(
        {"in.weight": ("in", None), "in.bias": ("in",), "out.weight": (None, "in")},
        scaled=["in"],
    )
    probe = Probe(loss=lambda params: 0.0, score=lambda params: 0.0)
    return GlobalModel(params=params, trainable=frozenset(params), symmetry=symmetry, probe=probe)


def shuffled(model: GlobalModel, clients: int) -> Iterator[ClientUpdate]:
    """Clients near the model, each in an order of units of its own."""
    for number in range(clients):
        params = {name: value + 0.1 * torch.randn_like(value) for name, value in model.params.items()}
        moved = model.symmetry.permute(params, {"in": torch.randperm(UNITS)}) if model.symmetry else params
        yield ClientUpdate(client_id=number, num_examples=10, params=moved)


def _traced(name: str) -> Row:
    """Seconds until the symmetry of one of the small networks is known to hold."""
    case, clock = networks.EIGHT[name], Clock()
    network = case.network
    symmetry = clock.timed("tracing", trace)(network, case.example)
    clock.timed("verification", verify)(symmetry, network, case.example)
    detail = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in clock.seconds.items())
    work = f"tracing and verifying {name}, {len(symmetry.groups)} groups, seconds"
    return Row(work, "1 s", sum(clock.seconds.values()), "", detail)


if __name__ == "__main__":
    print(peak(int(sys.argv[1])))
