"""Which updates may enter the fold, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import inf
from typing import Any, TypeAlias

import torch
from torch import Tensor

from aggregators.core.exchange import Exchange
from aggregators.core.flat import tensor_fields
from aggregators.core.layers import channels, find
from aggregators.core.symmetry import Symmetry
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Request, Tensors

from .telemetry import one_line

ROUNDING = 1e-3  # relative slack of Cauchy–Schwarz: sums of many examples, rounded to float32; half precision has more
POSITIONS = 2**24  # the most at which a layer may look at one example
Widths: TypeAlias = Mapping[str, int]  # group -> the most units that it may have
LAYERWISE = ("gram", "grad_gram", "moments", "cross_moments")


class Rejected(ValueError):
    """An update that may not enter the fold, and why."""


def admit(update: ClientUpdate, exchange: Exchange[Any], model: GlobalModel, max_examples: int) -> None:
    """Raises Rejected, in one line, unless `update` answers `exchange` with sound values."""
    for reason in _faults(update, exchange, model, max_examples):
        raise Rejected(one_line(reason))


def resized(model: GlobalModel, params: Tensors, most: Widths) -> Tensors:
    """θ_t's tensors at the widths of `params`; Rejected, in one line, where these are of no such network.

    A group of which `most` says nothing may have any number of units.
    """
    assert model.symmetry is not None
    for reason in _misfits(model.symmetry, params, model.params, most):
        raise Rejected(one_line(reason))
    return model.symmetry.resized(model.params, params)


def _misfits(symmetry: Symmetry, got: Tensors, model: Tensors, most: Widths) -> Iterator[str]:
    yield from _misnamed("params", got, model)
    try:
        sizes = symmetry.sizes(got)
    except ValueError as error:
        yield f"{error}: let all that a layer's units are in have one width"
        return
    for group, units in sizes.items():
        bound = most.get(group, inf)
        if not 1 <= units <= bound:
            yield f"{group} has {units} units: allowed is 1 to {bound}, by the run's max-width"


def _faults(update: ClientUpdate, exchange: Exchange[Any], model: GlobalModel, max_examples: int) -> Iterator[str]:
    """Every reason to leave the update out, the structural ones first: later checks rely on earlier ones."""
    if not 1 <= update.num_examples <= max_examples:
        yield f"num_examples is {update.num_examples}: allowed is 1 to {max_examples}"
    if not 0 <= update.metrics.get("num", 0) <= max_examples:
        yield f"the metric num is {update.metrics['num']:g}: allowed is 0 to {max_examples}"
    asked = Request() if exchange.task == "evaluate" else exchange.request
    yield from mismatches("params", update.params, model.params if exchange.task == "train" else {})
    yield from _gradients(update, asked.gradients or Gradients(), model)
    yield from _counts(update, asked)
    yield from _layerwise(update, asked)
    yield from _moments(update, model)
    yield from _correlations(update, exchange, model)
    yield from _layers(update, asked, model)
    yield from _labels(update, asked)
    yield from _not_finite(tensor_fields(update))
    yield from _impossible_squares(update)
    yield from _impossible_grams(update)
    yield from _impossible_correlations(update)


def _misnamed(field: str, got: Tensors, expected: Mapping[str, Tensor]) -> Iterator[str]:
    if missing := expected.keys() - got.keys():
        yield f"{field} lacks {_some(missing)}"
    if extra := got.keys() - expected.keys():
        yield f"{field} has {_some(extra)}, which was not asked for"


def mismatches(field: str, got: Tensors, expected: Mapping[str, Tensor], rows: int | None = None) -> Iterator[str]:
    """Why `got` has not the names, shapes and dtypes of `expected`, with so many rows of each where it is sketched."""
    yield from _misnamed(field, got, expected)
    for name, tensor in expected.items():
        shape = tensor.shape if rows is None else (rows, *tensor.shape)
        if got[name].shape != shape:
            yield f"{field} {name} has shape {tuple(got[name].shape)}, asked for {tuple(shape)}"
        if got[name].dtype not in ({tensor.dtype} if field == "params" else {tensor.dtype, torch.float32}):
            yield f"{field} {name} has dtype {got[name].dtype}, asked for {tensor.dtype}"


def _gradients(update: ClientUpdate, asked: Gradients, model: GlobalModel) -> Iterator[str]:
    trainable = {name: model.params[name] for name in model.names}
    yield from mismatches("grad_sum", update.grad_sum, trainable if asked.sums else {})
    yield from mismatches("sq_grad_sum", update.sq_grad_sum, trainable if asked.squares else {})
    sketched = trainable if asked.sketches else {}
    yield from mismatches("grad_sketch", update.grad_sketch, sketched, rows=asked.sketches)


def _counts(update: ClientUpdate, asked: Request) -> Iterator[str]:
    gradients = asked.gradients or Gradients()
    labelled = gradients.sums or gradients.squares or gradients.sketches or asked.grad_gram
    if labelled and update.estimator != gradients.estimator:
        yield f"estimator is {update.estimator}, asked for {gradients.estimator}"
    most = min(update.num_examples, gradients.limit or update.num_examples)
    if (labelled or asked.gram) and not 1 <= update.num_grads <= most:
        yield f"num_grads is {update.num_grads}: allowed is 1 to {most}"


def _layerwise(update: ClientUpdate, asked: Request) -> Iterator[str]:
    for field in LAYERWISE:
        if bool(getattr(update, field)) != getattr(asked, field):
            yield f"{field} is missing" if getattr(asked, field) else f"{field} was not asked for"


def _moments(update: ClientUpdate, model: GlobalModel) -> Iterator[str]:
    most = update.num_examples * POSITIONS
    for layer, moments in update.moments.items():
        if not 1 <= moments.num <= most:
            yield f"moments {layer} counts {moments.num}: allowed is 1 to {most}"
        if (size := channels(model, layer)) is None:
            yield f"moments has {layer}, which is no layer of the model"
        for part, value in (("mean", moments.mean), ("m2", moments.m2)):
            yield from _misshapen(f"moments {layer}|{part}", value, (size,))


def _correlations(update: ClientUpdate, exchange: Exchange[Any], model: GlobalModel) -> Iterator[str]:
    anchor = model if exchange.anchor is None else replace(model, params=exchange.anchor)
    for layer, matrix in update.cross_moments.items():
        if (size := channels(model, layer)) is None:
            yield f"cross_moments has {layer}, which is no layer of the model"
        yield from _misshapen(f"cross_moments {layer}", matrix, (size, channels(anchor, layer)))


def _misshapen(what: str, value: Tensor, shape: tuple[int | None, ...]) -> Iterator[str]:
    if value.shape != shape:
        yield f"{what} has shape {tuple(value.shape)}, asked for {shape}"
    if value.dtype != torch.float32:
        yield f"{what} has dtype {value.dtype}, asked for torch.float32"


def _layers(update: ClientUpdate, asked: Request, model: GlobalModel) -> Iterator[str]:
    """Whose Gram matrices are not of the model's layers, in their sizes.

    Which of the parameters belong to such layers a state dict does not tell: a client may leave any layer out, and
    then has no information on it.
    """
    for field, layer, gram in _grams(update):
        if (found := find(model, layer)) is None:
            yield f"{field} has {layer}, which is no layer of the model that trains"
        else:
            yield from _misshapen(f"{field} {layer}", gram, (found.sizes()[field],) * 2)
    if asked.gram and asked.grad_gram and (odd := update.gram.keys() ^ update.grad_gram.keys()):
        yield f"only one of gram and grad_gram has {_some(odd)}: asked for both of every layer"


def _grams(update: ClientUpdate) -> Iterator[tuple[str, str, Tensor]]:
    for field, grams in (("gram", update.gram), ("grad_gram", update.grad_gram)):
        for layer, gram in grams.items():
            yield field, layer, gram


def _labels(update: ClientUpdate, asked: Request) -> Iterator[str]:
    counts = update.class_counts
    if (counts is not None) != asked.class_counts:
        yield "class_counts is missing" if asked.class_counts else "class_counts was not asked for"
    if counts is not None and not _is_census(counts, update.num_examples):
        yield f"class_counts is no vector of whole numbers from 0 that sum to num_examples, {update.num_examples}"


def _is_census(counts: Tensor, num: int) -> bool:
    whole = counts.ndim == 1 and not counts.is_floating_point() and bool((counts >= 0).all())
    return whole and float(counts.double().sum()) == num  # an int64 sum could wrap around


def _impossible_squares(update: ClientUpdate) -> Iterator[str]:
    """Sums of squares that are negative, or smaller than Cauchy–Schwarz allows; all values are finite by now."""
    for name, squares in _squares(update):
        if squares.numel() and squares.min() < 0:
            yield f"{name} is negative: a sum of squares cannot be"
    for name in update.sq_grad_sum.keys() & update.grad_sum.keys():
        if _too_small(update.sq_grad_sum[name], update.grad_sum[name], update.num_grads):
            yield f"sq_grad_sum {name} is smaller than grad_sum² / num_grads: Cauchy–Schwarz forbids it"


def _squares(update: ClientUpdate) -> Iterator[tuple[str, Tensor]]:
    for name, sums in update.sq_grad_sum.items():
        yield f"sq_grad_sum {name}", sums
    for layer, moments in update.moments.items():
        yield f"moments {layer}", moments.m2
    for field, layer, gram in _grams(update):
        yield f"the diagonal of {field} {layer}", gram.diagonal()


def _impossible_grams(update: ClientUpdate) -> Iterator[str]:
    """Sums of outer products that cannot be: their diagonals are sound by now."""
    for layer, gram in update.gram.items():
        if gram[-1, -1] < 1:
            yield f"gram {layer} counts {float(gram[-1, -1]):g} inputs: allowed is 1 or more"
    for field, layer, gram in _grams(update):
        if fault := _fault(gram.double()):
            yield f"{field} {layer} {fault}"


def _impossible_correlations(update: ClientUpdate) -> Iterator[str]:
    for layer, matrix in update.cross_moments.items():
        if (matrix.abs() > 1 + ROUNDING).any():
            yield f"cross_moments {layer} has a correlation beyond 1: Cauchy–Schwarz forbids it"


def _fault(gram: Tensor) -> str:
    """Why a matrix is no sum of outer products, by more than rounding and underflow of float32 explain; or nothing."""
    scale = (gram.diagonal() + torch.finfo(torch.float32).tiny).rsqrt()
    correlation = scale[:, None] * gram * scale
    if ((correlation - correlation.T).abs() > ROUNDING).any():
        return "is not symmetric: a sum of outer products is"
    if (correlation.abs() > 1 + ROUNDING).any():
        return "has an entry beyond those of its diagonal: Cauchy–Schwarz forbids it"
    correlation.diagonal().fill_(1 + ROUNDING + len(gram) * torch.finfo(torch.float32).eps)
    indefinite = torch.linalg.cholesky_ex(correlation).info > 0
    return "has a negative eigenvalue: a sum of outer products has none" if indefinite else ""


def _too_small(squares: Tensor, sums: Tensor, num: int) -> bool:
    """Whether (Σ g)² ≤ num · Σ g² fails anywhere by more than rounding and underflow of either dtype explain."""
    kinds = torch.finfo(squares.dtype), torch.finfo(sums.dtype)
    slack = 1 + max(ROUNDING, *(4 * kind.eps for kind in kinds))
    return bool((sums.double().square() > num * (slack * squares.double() + kinds[0].tiny)).any())


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
