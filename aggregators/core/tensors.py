"""Algebra on state dicts; sums in float64."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .update import Tensors

BLOCK = 1 << 18  # elements; smaller blocks lose to their overhead, larger ones fall out of the cache
SMALLEST = 1 << 15  # elements; below, starting the kernel's threads costs more than they save


def zeros(shape: torch.Size, device: torch.device) -> Tensor:
    """A float64 sum to begin with; on the CPU in memory of numpy's, whose huge pages are touched in half the time."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape))
    return torch.zeros(shape, dtype=torch.float64, device=device)


def add_scaled_(total: Tensor, scale: float, value: Tensor, factor: Tensor | None = None) -> None:
    """Adds scale · factor · value to the float64 tensor `total`, without a float64 copy of a whole tensor.

    All tensors have one shape and one device: nothing is broadcast or moved silently. One pass over memory on the CPU,
    two in blocks that fit its cache elsewhere and for short dtypes.
    """
    others = [value] if factor is None else [value, factor]
    for other in others:
        if other.shape != total.shape or other.device != total.device:
            raise ValueError(f"cannot add {_described(other)} to a sum of {_described(total)}")
    flat = [other.detach().reshape(-1) for other in others]
    (_add_fused if all(map(_fusable, flat)) else _add_in_blocks)(total.view(-1), scale, *flat)


def _fusable(tensor: Tensor) -> bool:
    wide = tensor.dtype in (torch.float32, torch.float64)
    return wide and tensor.device.type == "cpu" and tensor.numel() >= SMALLEST


def _add_fused(total: Tensor, scale: float, value: Tensor, factor: Tensor | None = None) -> None:
    from . import kernels  # numba, which a client does not need

    if factor is None:
        kernels.add_scaled(total.numpy(), scale, value.numpy())
    else:
        kernels.add_scaled_product(total.numpy(), scale, value.numpy(), factor.numpy())


def _add_in_blocks(total: Tensor, scale: float, *values: Tensor) -> None:
    if total.numel() <= BLOCK:
        _add(total, scale, *values)
    else:
        for sums, *others in zip(*(torch.split(tensor, BLOCK) for tensor in (total, *values)), strict=True):
            _add(sums, scale, *others)


def _add(total: Tensor, scale: float, value: Tensor, factor: Tensor | None = None) -> None:
    total.add_(value if factor is None else value.double() * factor, alpha=scale)


def _described(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} on {tensor.device}"


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 where its dtype is shorter, itself otherwise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """A number for each entry of an axis, in the shape that broadcasts to a tensor of so many."""
    return values.reshape([-1 if other == axis else 1 for other in range(ndim)])


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all entries of `tensors` together, a 0-d float64 tensor."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()


def steps(names: Iterable[str], params: Tensors, start: Tensors) -> dict[str, Tensor]:
    """The steps θ_k − θ_t of `names`, in float64."""
    return {name: params[name].double() - start[name].double() for name in names}


def like(model: Tensors, tensors: Tensors) -> dict[str, Tensor]:
    """`tensors` in the names, order and dtypes of `model`; ValueError where a name is missing or extra."""
    if tensors.keys() != model.keys():
        raise ValueError(f"the merged model's names differ: {sorted(tensors.keys() ^ model.keys())}")
    return {name: tensors[name].to(value.dtype) for name, value in model.items()}
