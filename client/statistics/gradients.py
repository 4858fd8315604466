"""Sums over single examples' gradients: what precision methods (Fisher, SSF) ask of clients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from aggregators.core.functional import evaluating
from aggregators.core.update import Estimator, Gradients, Tensors

from ..task import Examples, Task
from ..training import Batch, seeded
from .estimators import CHUNK, chosen, chunks, refusal, scored
from .per_example import Outer, Rows, per_example, plain_attention


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
    with evaluating(model), seeded(seed), torch.enable_grad(), plain_attention():
        sample = chosen(examples, request.limit)
        totals = _totals(task, model, sample, request, budget)
    linear = {name: _shaped(total.linear, total.shape) for name, total in totals.items()}
    squares = {name: _shaped(total.squares, total.shape) for name, total in totals.items()}
    return GradientSums(
        grad_sum={name: rows[0] for name, rows in linear.items() if request.sums},
        sq_grad_sum={name: rows[0] for name, rows in squares.items() if request.squares},
        grad_sketch={name: rows[int(request.sums) :] for name, rows in linear.items() if request.sketches},
        num_grads=len(sample),
        estimator=request.estimator,
    )


class _Total(NamedTuple):
    """Float64 sums over a parameter's gradients, (k, P), and over their squares, (1, P); no row where not asked for."""

    shape: torch.Size
    linear: Tensor
    squares: Tensor

    @staticmethod
    def zeros(param: Tensor, request: Gradients) -> _Total:
        rows = request.sums + request.sketches, int(request.squares)
        return _Total(param.shape, *(torch.zeros(num, param.numel(), dtype=torch.float64) for num in rows))

    def add(self, g: Rows | Outer, mixture: Tensor, weights: Tensor) -> None:
        """Adds Σ_b mixture[:, b] · g_b and Σ_b weights[b] · g_b²."""
        if len(self.linear):
            g.add_to(self.linear, mixture, power=1)
        if len(self.squares):
            g.add_to(self.squares, weights[None], power=2)


def _totals(
    task: Task, model: nn.Module, examples: Subset[Batch], request: Gradients, budget: int
) -> dict[str, _Total]:
    totals = {name: _Total.zeros(param, request) for name, param in model.named_parameters()}
    if not len(examples):
        return totals
    network = per_example(model, examples[0][0])
    size = max(1, min(CHUNK, budget // (4 * max(1, network.width))))
    labels = task.num_classes if request.estimator == "exact" and task.num_classes else 1
    for (inputs, targets), uniform, signs in chunks(examples, size, labels, request.sketches):
        chunk = network(inputs)
        scores, weights = scored(task, chunk.outputs, targets, request.estimator, uniform)
        signed = signs * weights.sqrt()[..., None]
        mixture = torch.cat([weights[..., None], signed], dim=-1) if request.sums else signed
        for y in range(labels):
            for name, g in chunk.gradients(scores[:, y]):
                totals[name].add(g, mixture[:, y].T, weights[:, y])
    return totals


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows.float().view(len(rows), *shape)
