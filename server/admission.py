"""Which updates may enter the fold, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from aggregators.core.exchange import Exchange
from aggregators.core.flat import tensor_fields
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Tensors

ROUNDING = 1e-4  # relative slack of Cauchy–Schwarz: both sides were rounded to float32, or to half precision, alike


class Rejected(ValueError):
    """An update that may not enter the fold, and why."""


def admit(update: ClientUpdate, exchange: Exchange[Any], model: GlobalModel, max_examples: int) -> None:
    """Raises Rejected, in one line, unless `update` answers `exchange` with sound values."""
    for reason in _faults(update, exchange, model, max_examples):
        raise Rejected(reason)


def _faults(update: ClientUpdate, exchange: Exchange[Any], model: GlobalModel, max_examples: int) -> Iterator[str]:
    """Every reason to leave the update out, the structural ones first: later checks rely on earlier ones."""
    if not 1 <= update.num_examples <= max_examples:
        yield f"num_examples is {update.num_examples}: allowed is 1 to {max_examples}"
    yield from _mismatches("params", update.params, model.params if exchange.task == "train" else {})
    if exchange.task != "evaluate":
        yield from _statistics(update, exchange.request.gradients, model)
    yield from _not_finite(tensor_fields(update))


def _mismatches(field: str, got: Tensors, expected: Mapping[str, Tensor], rows: int | None = None) -> Iterator[str]:
    if missing := expected.keys() - got.keys():
        yield f"{field} lacks {_some(missing)}"
    if extra := got.keys() - expected.keys():
        yield f"{field} has {_some(extra)}, which was not asked for"
    for name, tensor in expected.items():
        shape = tensor.shape if rows is None else (rows, *tensor.shape)
        if got[name].shape != shape:
            yield f"{field} {name} has shape {tuple(got[name].shape)}, asked for {tuple(shape)}"
        if got[name].is_floating_point() != tensor.is_floating_point():
            yield f"{field} {name} has dtype {got[name].dtype}, asked for {tensor.dtype}"


def _statistics(update: ClientUpdate, asked: Gradients | None, model: GlobalModel) -> Iterator[str]:
    trainable = {name: model.params[name] for name in model.names}
    asked = asked or Gradients()
    yield from _mismatches("grad_sum", update.grad_sum, trainable if asked.sums else {})
    yield from _mismatches("sq_grad_sum", update.sq_grad_sum, trainable if asked.squares else {})
    sketched = trainable if asked.sketches else {}
    yield from _mismatches("grad_sketch", update.grad_sketch, sketched, rows=asked.sketches)
    if asked.sums or asked.squares or asked.sketches:
        yield from _counts(update, asked)
    yield from _impossible_squares(update)


def _counts(update: ClientUpdate, asked: Gradients) -> Iterator[str]:
    if update.estimator != asked.estimator:
        yield f"estimator is {update.estimator}, asked for {asked.estimator}"
    most = min(update.num_examples, asked.limit or update.num_examples)
    if not 1 <= update.num_grads <= most:
        yield f"num_grads is {update.num_grads}: allowed is 1 to {most}"


def _impossible_squares(update: ClientUpdate) -> Iterator[str]:
    for name, squares in update.sq_grad_sum.items():
        if squares.numel() and squares.min() < 0:
            yield f"sq_grad_sum {name} is negative: a sum of squares cannot be"
        if name in update.grad_sum:
            bound = squares.double() * update.num_grads
            if not (update.grad_sum[name].double().square() <= bound * (1 + ROUNDING) + 1e-30).all():
                yield f"sq_grad_sum {name} is smaller than grad_sum² / num_grads: Cauchy–Schwarz forbids it"


def _not_finite(fields: Mapping[str, Tensors]) -> Iterator[str]:
    for field, tensors in fields.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.numel() and not all_finite(tensor):
                yield f"{field} {name} holds NaN or infinity"


def all_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite; both extremes are, and NaN is an extreme: one pass, no temporary."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
