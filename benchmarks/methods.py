"""Seconds and peak memory of every method of posterior merging as models grow, beside one pass over the same bytes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aggregators.core.exchange import Exchange, run
from aggregators.core.layers import find
from aggregators.core.registry import parse
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Probe, Request, Tensors

from .memory import resident
from .row import Row

CLIENTS = 10
LAYERS = 12
EXAMPLES = 100
SIZES = (10**5, 10**6, 10**7)
LARGEST = 10**8  # of methods that hold two updates at most: ten of SSF's would take 12 GB
WARMING = 4 * 10**5  # parameters, the fewest whose layers are large enough for every kernel
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"kind": "fedavg"},
    "fisher": {"kind": "fisher"},
    "ssf rank_one": {"kind": "ssf"},
    "ssf sketch, r = 8": {"kind": "ssf", "precision": "sketch"},
    "regmean": {"kind": "regmean"},
    "kfac": {"kind": "kfac"},
    "wise_ft, fisher": {"kind": "wise_ft", "inner": "fedavg", "weighting": "fisher"},
}


def rows() -> Iterator[Row]:
    """A row per method and size, each measured in a process of its own."""
    for name, config in METHODS.items():
        before = None
        for size in sizes(config["kind"]):
            found = _measured(config, size)
            grown = "" if before is None else f", {found.seconds / before.seconds:.1f}x the time of D / 10"
            detail = f"{found.seconds:.3f} s, peak {found.peak:.1f}x the model{grown}"
            work = f"{name}, D = {size:.0e}, K = {CLIENTS}"
            yield Row(work, "one pass over the clients' bytes", found.seconds / found.reading, "", detail)
            before = found


def sizes(kind: str) -> tuple[int, ...]:
    """How large the models are; the matrix algebra of RegMean and K-FAC, O(D^1.5), takes minutes for the next."""
    if kind == "kfac":
        return SIZES[:2]
    return SIZES if kind in ("ssf", "regmean") else (*SIZES, LARGEST)


class Measured(NamedTuple):
    """Seconds of the merge, seconds of reading the updates once, and peak memory in float32 models."""

    seconds: float
    reading: float
    peak: float


def _measured(config: dict[str, Any], size: int) -> Measured:
    command = [sys.executable, "-m", "benchmarks.methods", json.dumps(config), str(size)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return Measured(*map(float, out))


def measure(config: dict[str, Any], size: int) -> Measured:
    """One merge of ten clients that arrive one by one; making them counts for no time, holding them for memory."""
    method, model = parse(config), perceptron(size)
    merge(method.round, perceptron(WARMING), Clock())  # loads what code it needs
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, clock, start = resident("VmRSS"), Clock(), time.perf_counter()
    merge(method.round, model, clock)
    seconds = time.perf_counter() - start - clock.making - clock.reading
    bytes_of_model = sum(tensor.nbytes for tensor in model.params.values())
    return Measured(seconds, clock.reading, (resident("VmHWM") - before) / bytes_of_model)


class Clock:
    """Seconds that clients take to be made, and to be read once."""

    making = 0.0
    reading = 0.0

    def time(self, kind: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; its seconds are added."""
        start = time.perf_counter()
        result = work()
        setattr(self, kind, getattr(self, kind) + time.perf_counter() - start)
        return result


def merge(round: Callable[[GlobalModel], Any], model: GlobalModel, clock: Clock) -> None:
    """The whole round; clients are made when they are asked for."""

    def ask(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        for number in range(CLIENTS):
            update = clock.time("making", partial(client, model, exchange, number))
            clock.time("reading", partial(read, update))
            yield update
            del update

    run(round(model), ask)


def perceptron(size: int) -> GlobalModel:
    """A perceptron of twelve square layers with about `size` parameters."""
    width = int((size / LAYERS) ** 0.5)
    shapes = {
        f"layer{k}.{part}": s for k in range(LAYERS) for part, s in (("weight", (width, width)), ("bias", (width,)))
    }
    params = {name: 0.01 * torch.randn(shape) for name, shape in shapes.items()}
    probe = Probe(loss=lambda params: 0.0, score=lambda params: 0.0)
    return GlobalModel(params=params, trainable=frozenset(params), probe=probe)


def client(model: GlobalModel, exchange: Exchange[Any], number: int) -> ClientUpdate:
    """A client near θ_t with the statistics that the exchange requests, random but possible."""
    request, trained = exchange.request, exchange.task == "train"
    asked = request.gradients or Gradients()
    return ClientUpdate(
        client_id=number,
        num_examples=EXAMPLES,
        num_grads=EXAMPLES,
        estimator=asked.estimator,
        params={name: value + 0.01 * torch.randn_like(value) for name, value in model.params.items()}
        if trained
        else {},
        grad_sum=_like(model, 1.0, ()) if asked.sums else {},
        sq_grad_sum={k: v.square_() for k, v in _like(model, 3.0, ()).items()} if asked.squares else {},
        grad_sketch=_like(model, 1.0, (asked.sketches,)) if asked.sketches else {},
        **_grams(model, request),
    )


def _like(model: GlobalModel, scale: float, rows: tuple[int, ...]) -> Tensors:
    return {name: scale * torch.randn(*rows, *value.shape) for name, value in model.params.items()}


def _grams(model: GlobalModel, request: Request) -> dict[str, Any]:
    layers = {name: find(model, name) for name in (f"layer{k}" for k in range(LAYERS))}
    return {
        field: {name: _gram(layer.sizes()[field]) for name, layer in layers.items() if layer}
        for field in ("gram", "grad_gram")
        if getattr(request, field)
    }


def _gram(size: int) -> Tensor:
    x = torch.cat([torch.randn(EXAMPLES, size - 1), torch.ones(EXAMPLES, 1)], 1)
    return x.T @ x


def read(update: ClientUpdate) -> float:
    """The sum of every number in the update: one pass over its bytes."""
    fields = (update.params, update.grad_sum, update.sq_grad_sum, update.grad_sketch, update.gram, update.grad_gram)
    return float(sum(tensor.sum() for tensors in fields for tensor in tensors.values()))


if __name__ == "__main__":
    print(*measure(json.loads(sys.argv[1]), int(sys.argv[2])))
