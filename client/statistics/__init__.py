"""What methods ask of clients besides their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aggregators.core.update import Gradients, Request, Tensors

from ..task import Examples, Task
from ..training import Batch, seeded
from .activations import grams
from .estimators import refusal
from .gradients import gradients
from .moments import correlations, moments


def measure(
    task: Task, model: nn.Module, examples: Examples, request: Request, *, seed: int, anchor: Tensors | None = None
) -> dict[str, Any]:
    """The fields of a ClientUpdate that `request` names, at the model's parameters; ValueError where unsupported.

    `anchor` is the model that cross-moments compare it with.
    """
    if reason := unsupported(request, task):
        raise ValueError(reason)
    fields: dict[str, Any] = {}
    if request.gram or request.grad_gram:
        fields |= grams(task, model, examples, request, seed=seed)._asdict()
    if request.moments:
        fields["moments"] = moments(task, model, examples, request, seed=seed)
    if request.cross_moments:
        if anchor is None:
            raise ValueError("cross_moments compare with a model, and none was sent: let the exchange name an `anchor`")
        fields["cross_moments"] = correlations(task, model, anchor, examples, request, seed=seed)
    asked = request.gradients
    if asked is not None and (asked.sums or asked.squares or asked.sketches):
        fields |= gradients(task, model, examples, asked, seed=seed)._asdict()
    if request.class_counts:
        with seeded(seed):
            fields["class_counts"] = _class_counts(task, examples)
    return fields


def unsupported(request: Request, task: Task) -> str | None:
    """Why clients of this task cannot answer `request`, in one line with the remedy; None where they can."""
    name = type(task).__name__
    if request.class_counts and task.num_classes is None:
        return f"class_counts needs labels and {name}.num_classes is None: set it, or choose another method"
    asked = request.gradients or (Gradients() if request.grad_gram else None)
    return refusal(task, asked.estimator) if asked else None


def _class_counts(task: Task, examples: Examples) -> Tensor:
    counts = torch.zeros(task.num_classes or 0, dtype=torch.int64)
    for _, targets in DataLoader[Batch](examples, batch_size=256):
        counts += targets.flatten().bincount(minlength=len(counts))
    return counts
