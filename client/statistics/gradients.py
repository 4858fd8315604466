"""Sums over single examples' gradients: what precision methods (Fisher, SSF) ask of clients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from aggregators.core.update import Estimator, Gradients, Tensors

from ..task import Examples, Task
from ..training import Batch, evaluating, seeded
from .per_example import per_example, plain_attention

CHUNK = 128  # examples at once, at most: more is no faster


class GradientSums(NamedTuple):
    """Σ g, Σ g² and sketches by parameter name, float32, empty where not asked for, of `num_grads` examples."""

    grad_sum: Tensors
    sq_grad_sum: Tensors
    grad_sketch: Tensors
    num_grads: int
    estimator: Estimator


def gradients(
    task: Task, model: nn.Module, examples: Examples, request: Gradients, *, seed: int, budget: int = 2**27
) -> GradientSums:
    """Sums over single examples of g = ∂ log p(y|x) / ∂θ in eval mode, where p(y|x) = exp(-loss(model(x), y)).

    The estimator says for which y: `exact` all labels, weighted by p (Matena & Raffel 2022, eq. 2); `sampled` one
    y ~ p; `empirical` the example's target; `logit` one y ~ p, and g is the gradient of its raw score (the code of
    Recasens et al. 2023). A square is of one example's gradient, never of a batch's mean. Sketches, (r, *parameter),
    are s_j = Σ ε_j √p g with a sign ε_j = ±1 for each example and label, so that E[s_j s_jᵀ] = Σ p g gᵀ (p = 1 where
    there is one label). Every parameter is covered, a tied one once, whether or not it trains. `seed` chooses the
    `request.limit` examples, labels and signs. Models in half precision are differentiated in float32; sums are in
    float64. A chunk's gradients take `budget` bytes at most, unless a single example's take more.

    ValueError where the estimator needs labels that the task does not have.
    """
    if reason := refusal(task, request.estimator):
        raise ValueError(reason)
    totals = {name: _Total.zeros(param, request) for name, param in model.named_parameters()}
    with evaluating(model), seeded(seed), torch.enable_grad(), plain_attention():
        chosen = _chosen(examples, request.limit)
        if len(chosen):
            _accumulate(totals, task, model, chosen, request, budget)
    return GradientSums(
        {name: total.linear[0].float() for name, total in totals.items() if request.sums},
        {name: total.squares[0].float() for name, total in totals.items() if request.squares},
        {name: total.linear[int(request.sums) :].float() for name, total in totals.items() if request.sketches},
        len(chosen),
        request.estimator,
    )


def refusal(task: Task, estimator: Estimator) -> str | None:
    """Why the estimator cannot be had on this task, with the remedy, in one line; None where it can."""
    if estimator == "empirical" or task.num_classes is not None:
        return None
    name = type(task).__name__
    return f"estimator {estimator!r} needs labels and {name}.num_classes is None: set it, or choose 'empirical'"


class _Total(NamedTuple):
    """Float64 sums over one parameter's gradients, (k, *shape), and their squares, (1, *shape); no row if not asked."""

    linear: Tensor
    squares: Tensor

    @staticmethod
    def zeros(param: Tensor, request: Gradients) -> _Total:
        rows = int(request.sums) + request.sketches, int(request.squares)
        linear, squares = (torch.zeros(num, *param.shape, dtype=torch.float64) for num in rows)
        return _Total(linear, squares)


def _chosen(examples: Examples, limit: int | None) -> Subset[Batch]:
    order = range(len(examples)) if limit is None else torch.randperm(len(examples))[:limit].tolist()
    return Subset(examples, order)


def _accumulate(
    totals: dict[str, _Total], task: Task, model: nn.Module, examples: Subset[Batch], request: Gradients, budget: int
) -> None:
    network = per_example(model, examples[0][0])
    size = min(CHUNK, max(1, budget // (4 * max(1, network.width))))
    labels = (task.num_classes or 1) if request.estimator == "exact" else 1
    uniform = torch.rand(len(examples), dtype=torch.float64)
    signs = 2 * torch.randint(2, (len(examples), labels, request.sketches), dtype=torch.int8) - 1
    loader: DataLoader[Batch] = DataLoader(examples, size)
    for (inputs, targets), u, eps in zip(loader, uniform.split(size), signs.split(size), strict=True):
        step = network(inputs)
        scores, weights = _scored(task, step.outputs, targets, request.estimator, u)
        mixture = torch.cat([weights[..., None]][: request.sums] + [eps * weights.sqrt()[..., None]], dim=-1)
        for y in range(labels):
            for name, g in step.gradients(scores[:, y]):
                g.add_to(totals[name].linear.flatten(1), mixture[:, y].T, power=1)
                g.add_to(totals[name].squares.flatten(1), weights[:, y][None][: request.squares], power=2)


def _scored(
    task: Task, outputs: Tensor, targets: Tensor, estimator: Estimator, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """What is differentiated and how it counts, (B, labels) both."""
    if estimator == "empirical":
        return -task.loss(outputs, targets)[:, None], torch.ones(len(outputs), 1, dtype=torch.float64)
    ...
