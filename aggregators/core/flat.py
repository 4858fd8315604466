"""Tensors as one run of bytes, and an update as named fields of tensors: what the wire and the ledger carry."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .update import TENSOR_FIELDS, ClientUpdate, Moments, Tensors

WIRE_VERSION = 1
ALIGNMENT = 16  # bytes; every tensor starts at a multiple, so that it can be viewed in place
MOST_AXES, LARGEST_SIZE = 64, 2**63 - 1  # of a shape, as torch has them; beyond, arithmetic alone would take long

Layout: TypeAlias = Sequence[tuple[str, str, Sequence[int]]]  # (name, dtype, shape) of each tensor, in order

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def pack(tensors: Tensors) -> tuple[bytes, Layout]:
    """The bytes of all tensors in one run, each aligned, with the layout that `unpack` needs; one copy."""
    layout = [(name, _dtype_name(name, tensor), tuple(tensor.shape)) for name, tensor in tensors.items()]
    return b"".join(_padded(tensors)), layout


def _dtype_name(name: str, tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype}, which the wire does not carry: use one of {', '.join(DTYPES)}")
    return dtype


def _padded(tensors: Tensors) -> Iterator[memoryview | bytes]:
    for tensor in tensors.values():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        yield data
        yield bytes(-data.nbytes % ALIGNMENT)


def unpack(data: bytes, layout: Layout) -> dict[str, Tensor]:
    """The tensors in `data`, as read-only views of its bytes; ValueError where bytes and layout disagree."""
    spans = list(_spans(layout))
    expected = spans[-1][1] if spans else 0
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes where the layout describes {expected}")
    if len({name for name, _, _ in layout}) != len(spans):
        raise ValueError("a tensor's name stands twice in the layout")
    flat = as_tensor(data)
    return {
        name: flat[start : start + _nbytes(dtype, shape)].view(DTYPES[dtype]).view(tuple(shape))
        for (name, dtype, shape), (start, _) in zip(layout, spans, strict=True)
    }


def _spans(layout: Layout) -> Iterator[tuple[int, int]]:
    end = 0
    for name, dtype, shape in layout:
        if not (isinstance(name, str) and isinstance(dtype, str) and dtype in DTYPES and _is_shape(shape)):
            raise ValueError(f"{name!r:.80} is described as {dtype!r:.80} of shape {shape!r:.80}")
        start, end = end, end + -(-_nbytes(dtype, shape) // ALIGNMENT) * ALIGNMENT
        yield start, end


def _is_shape(shape: object) -> bool:
    sizes = shape if isinstance(shape, list | tuple) and len(shape) <= MOST_AXES else [None]
    return all(type(size) is int and 0 <= size <= LARGEST_SIZE for size in sizes)  # a bool is no size


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return prod(shape) * DTYPES[dtype].itemsize


def as_tensor(data: bytes) -> Tensor:
    """A read-only view of `data`, shape (len(data),), uint8."""
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():  # torch warns that bytes are read-only: so are updates
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8)


def tensor_fields(update: ClientUpdate) -> dict[str, Tensors]:
    """Every non-empty field of tensors of the update, moments and class counts included, by field name."""
    fields: dict[str, Tensors] = {name: getattr(update, name) for name in TENSOR_FIELDS}
    fields["moments"] = {
        f"{layer}|{part}": torch.as_tensor(value)
        for layer, moments in update.moments.items()
        for part, value in zip(Moments._fields, moments, strict=True)
    }
    fields["class_counts"] = {} if update.class_counts is None else {"": update.class_counts}
    return {name: tensors for name, tensors in fields.items() if tensors}


def from_tensor_fields(fields: Mapping[str, Tensors]) -> dict[str, Any]:
    """The inverse of `tensor_fields`: keyword arguments of ClientUpdate; ValueError for a field it does not know."""
    known: dict[str, Any] = {name: fields[name] for name in TENSOR_FIELDS if name in fields}
    if "moments" in fields:
        known["moments"] = _moments(fields["moments"])
    if "class_counts" in fields:
        (known["class_counts"],) = fields["class_counts"].values()
    if extra := fields.keys() - known.keys():
        raise ValueError(f"unknown fields {sorted(extra)}")
    return known


def _moments(tensors: Tensors) -> dict[str, Moments]:
    layers = dict.fromkeys(key.rpartition("|")[0] for key in tensors)
    missing = [f"{layer}|{part}" for layer in layers for part in Moments._fields if f"{layer}|{part}" not in tensors]
    if missing or len(tensors) != len(layers) * len(Moments._fields):
        raise ValueError(f"moments are incomplete or malformed: {missing or sorted(tensors)}")
    return {
        layer: Moments(_count(layer, tensors[f"{layer}|num"]), tensors[f"{layer}|mean"], tensors[f"{layer}|m2"])
        for layer in layers
    }


def _count(layer: str, num: Tensor) -> int:
    if num.shape or num.is_floating_point():
        raise ValueError(f"moments of {layer!r} count {num.dtype} of shape {tuple(num.shape)}, not one whole number")
    return int(num)
