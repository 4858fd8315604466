"""Algebra on state dicts; sums in float64, in blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .update import Tensors

BLOCK = 1 << 18  # elements; smaller blocks lose to their overhead, larger ones fall out of the cache


def add_scaled_(total: Tensor, scale: float, value: Tensor, factor: Tensor | None = None) -> None:
    """Adds scale · factor · value to the float64 tensor `total`, without a float64 copy of a whole tensor.

    All tensors have one shape and one device: nothing is broadcast or moved silently.
    """
    for other in (value,) if factor is None else (value, factor):
        if other.shape != total.shape or other.device != total.device:
            raise ValueError(f"cannot add {_described(other)} to a sum of {_described(total)}")
    totals, values = total.view(-1), value.detach().reshape(-1)
    factors = None if factor is None else factor.detach().reshape(-1)
    scratch = torch.empty(min(BLOCK, totals.numel()), dtype=torch.float64, device=total.device)
    for start in range(0, totals.numel(), BLOCK):
        part = slice(start, start + BLOCK)
        block = scratch[: totals[part].numel()].copy_(values[part])
        if factors is not None:
            block.mul_(factors[part])
        totals[part].add_(block, alpha=scale)


def _described(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} on {tensor.device}"


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 where its dtype is shorter, itself otherwise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
