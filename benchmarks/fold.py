"""Decoding and folding 32 real Flower messages, beside Flower's own mean and a plain copy of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from flwr.app import RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from aggregators.core.flat import tensor_fields
from aggregators.core.registry import parse
from aggregators.core.update import ClientUpdate, GlobalModel
from server.wire import decode, nbytes

from .messages import MANY, ONE, Shapes, model, ours, stock
from .row import Row, interleaved

REPLIES = 32


def rows() -> Iterator[Row]:
    """FedAvg beside Flower and a copy, in one tensor and in 37; Fisher beside a copy."""
    yield from _fedavg(ONE, "one tensor")
    yield from _fedavg(MANY, f"{len(MANY)} tensors")
    yield _fisher()


def _fedavg(shapes: Shapes, described: str) -> Iterator[Row]:
    mine = [ours(shapes, client, squares=False) for client in range(REPLIES)]
    theirs = [stock(shapes, client) for client in range(REPLIES)]
    theta = start(shapes)
    fold, flower, copy = interleaved(
        lambda: merge("fedavg", theta, mine),
        lambda: aggregate_arrayrecords(theirs, "num-examples"),
        lambda: read_all(mine),
    )
    size = sum(map(nbytes, mine)) / 1e9
    work = f"decode + fold of {REPLIES} messages of 10 M float32 in {described}, FedAvg"
    took = f"{fold:.2f} s, Flower {flower:.2f} s"
    yield Row(work, "Flower's aggregate_arrayrecords", flower / fold, ">= 3", took)
    yield Row(work, "a plain copy, bytes/s", copy / fold, ">= 0.4", _speeds(size, fold, copy))


def _fisher() -> Row:
    mine = [ours(ONE, client, squares=True) for client in range(REPLIES)]
    theta = start(ONE)
    fold, copy = interleaved(lambda: merge("fisher", theta, mine), lambda: read_all(mine))
    size = sum(map(nbytes, mine)) / 1e9
    work = f"decode + fold of {REPLIES} messages of 10 M float32 in one tensor, Fisher"
    return Row(work, "a plain copy, bytes/s", copy / fold, ">= 0.15", _speeds(size, fold, copy))


def _speeds(size: float, fold: float, copy: float) -> str:
    return f"{size / fold:.1f} GB/s, copy {size / copy:.1f} GB/s"


def start(shapes: Shapes) -> GlobalModel:
    """A θ_t of these shapes."""
    params = model(shapes, 0)
    return GlobalModel(params=params, trainable=frozenset(params))


def decoded(messages: Sequence[RecordDict]) -> Iterator[ClientUpdate]:
    """The updates in the messages, one at a time."""
    for client, message in enumerate(messages):
        yield decode(message, client)


def merge(method: str, theta: GlobalModel, messages: Sequence[RecordDict]) -> object:
    """The whole fold: decode, accumulate, finalize."""
    return parse(method).aggregate(theta, decoded(messages))


def read_all(messages: Sequence[RecordDict]) -> None:
    """Copies every byte of the messages, message by message, into one buffer that is reused."""
    buffers: dict[int, Tensor] = {}
    for update in decoded(messages):
        for tensors in tensor_fields(update).values():
            for tensor in tensors.values():
                buffers.setdefault(tensor.numel(), torch.empty_like(tensor).view(-1)).copy_(tensor.view(-1))
