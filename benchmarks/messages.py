"""Real Flower messages: a reply as it leaves a client and arrives at the server, through Flower's own objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from torch import Tensor

from aggregators.core.update import ClientUpdate
from client.wire import encode

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

ONE: Shapes = {"weight": (3200, 3200)}  # 10 M parameters in one tensor

MANY: Shapes = {  # 10 M parameters in the proportions of a small transformer: 6 blocks, an embedding, norms and biases
    "embedding": (8192, 384),
    **{f"block{k}.{name}": shape for k in range(4) for name, shape in {
        "attention": (1152, 384), "attention_bias": (1152,), "out": (384, 384), "out_bias": (384,),
        "up": (1536, 384), "up_bias": (1536,), "down": (384, 1536), "down_bias": (384,), "norm": (384,),
    }.items()},
}  # fmt: skip


def model(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Standard normal float32 tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def received(content: RecordDict) -> RecordDict:
    """`content` after Flower's own way over the wire: into objects of bytes, and out of them."""
    objects = {key: value.deflate() for key, value in get_all_nested_objects(content).items()}
    return inflate_object_from_contents(content.object_id, objects)  # type: ignore[return-value]


def ours(shapes: Shapes, client: int, squares: bool) -> RecordDict:
    """A reply in our wire format, with Σ g² where asked."""
    params = model(shapes, client)
    squared = {name: value.square() for name, value in model(shapes, 1000 + client).items()} if squares else {}
    update = ClientUpdate(
        client_id=client,
        num_examples=10 + client,
        params=params,
        sq_grad_sum=squared,
        num_grads=10 if squares else 0,
        estimator="exact" if squares else None,
    )
    return received(encode(update))


def stock(shapes: Shapes, client: int) -> RecordDict:
    """The same model as a stock Flower client sends it: an array per tensor."""
    arrays = ArrayRecord(model(shapes, client), keep_input=False)
    return received(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10 + client})}))
