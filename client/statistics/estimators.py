"""Over which examples, and which of their labels, gradient statistics are taken."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from aggregators.core.update import Estimator

from ..task import Examples, Task
from ..training import Batch

CHUNK = 128  # examples at once, at most: more is no faster


def refusal(task: Task, estimator: Estimator) -> str | None:
    """Why the estimator cannot be had on this task, with the remedy, in one line; None where it can."""
    if estimator == "empirical" or task.num_classes is not None:
        return None
    name = type(task).__name__
    return f"estimator {estimator!r} needs labels and {name}.num_classes is None: set it, or choose 'empirical'"


def chosen(examples: Examples, limit: int | None) -> Subset[Batch]:
    """`limit` of the examples at random, or all in their order."""
    num = len(examples)  # type: ignore[arg-type]
    return Subset(examples, range(num) if limit is None else torch.randperm(num)[:limit].tolist())


def chunks(
    examples: Subset[Batch], size: int = CHUNK, labels: int = 1, sketches: int = 0
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Examples with their draws, made at once so that they do not depend on `size`: uniform (B,), signs (B, y, r)."""
    if not len(examples):
        return
    uniform = torch.rand(len(examples), dtype=torch.float64)
    signs = 2 * torch.randint(2, (len(examples), labels, sketches), dtype=torch.int8) - 1
    yield from zip(DataLoader(examples, size), torch.split(uniform, size), torch.split(signs, size), strict=True)


def scored(
    task: Task, outputs: Tensor, targets: Tensor, estimator: Estimator, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """What is differentiated and how it counts, both (B, labels); one y ~ p is where `uniform`, (B,), meets its CDF."""
    if estimator == "empirical":
        return -task.loss(outputs, targets)[:, None], torch.ones(len(outputs), 1, dtype=torch.float64)
    labels = torch.arange(task.num_classes or 0).expand(len(outputs), -1)
    log_p = -torch.stack([task.loss(outputs, y) for y in labels.unbind(1)], dim=1)
    p = log_p.detach().double().softmax(1)
    if estimator == "exact":
        return log_p, p
    y = torch.searchsorted(p.cumsum(1), uniform[:, None]).clamp(max=p.shape[1] - 1)
    return (log_p if estimator == "sampled" else outputs).gather(1, y), torch.ones_like(p[:, :1])
