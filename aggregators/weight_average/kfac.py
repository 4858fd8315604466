"""The product of Kronecker-factored posteriors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.base import CohortAggregator, Sum, mean_buffers
from ..core.kronecker import Pair, solve
from ..core.layers import Layer, layer
from ..core.solve import Solution
from ..core.tensors import add_scaled_
from ..core.update import ClientUpdate, Estimator, GlobalModel, Gradients, Merged, Request

FLOOR = 1e-8  # of the mean eigenvalue of G_k; powers of rounding errors are none


class KFAC(CohortAggregator):
    """The mode of the product of the clients' posteriors, each Kronecker-factored layer by layer.

    min_W̃ Σ n_k tr(G_k^γ (W̃ − W̃_k) A_k (W̃ − W̃_k)ᵀ) + λ ‖W̃ − W̄‖², W̃ = [W, b], for each layer with A_k = E[x̃ x̃ᵀ] of its
    inputs x̃ = [x, 1] and G_k = E[δ δᵀ] of the gradients δ by its outputs. For a convolution A_k is the mean, and δ δᵀ
    the sum, over positions. γ is the `exponent`: 1 is K-FAC; 0 has the solution of RegMean, damping included, where all
    clients' examples pass the layer equally often. Entries off the diagonal of A_k are multiplied by `off_diagonal`;
    λ = damping · Σ n_k tr(A_k) tr(G_k^γ) / (in · out). W̄ is the mean weighted by num_examples, and what every other
    parameter takes. Solved for W̃ − W̄ by preconditioned conjugate gradients to a relative residual of `tolerance`, or
    for `iterations`. Directions that no input has stay at W̄. A client without a layer's matrices has no information.
    Source: Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
    section 3; Tam et al. 2024, "Merging by Matching Models in Task Parameter Subspaces" (MaTS: the merge and its
    conjugate gradients); Jin et al. 2023 (RegMean, the off-diagonal factor); exponents between are ours.
    Statistics uploaded: `gram` and `grad_gram`, (in + 1)² + out² numbers a layer. Time O(in³ + out³) a layer and
    client, and O(in · out · (in + out)) an iteration and client; memory K updates, and all clients' matrices of one
    layer in float64. Metrics: the largest `cg_residual` and `cg_iterations` of any layer.
    """

    kind: Literal["kfac"] = "kfac"
    exponent: float = Field(default=0.5, ge=0, le=1)
    off_diagonal: float = Field(default=0.9, ge=0, le=1)
    damping: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    tolerance: float = Field(default=1e-5, gt=0, lt=1)
    iterations: int = Field(default=150, ge=1)
    estimator: Estimator = "exact"
    max_grads: int | None = Field(default=None, ge=1)

    examples = (
        {"exponent": 0.0, "off_diagonal": 1.0},
        {"exponent": 1.0, "damping": 0.0},
        {"estimator": "empirical", "max_grads": 8, "iterations": 3},
    )

    @property
    def request(self) -> Request:
        """Gram matrices of layers' inputs, and of the gradients by their outputs."""
        gradients = Gradients(estimator=self.estimator, limit=self.max_grads)
        return Request(gram=True, grad_gram=True, gradients=gradients)

    @property
    def min_updates(self) -> int:
        """One: its own mode."""
        return 1

    def merge(self, model: GlobalModel, updates: Sequence[ClientUpdate]) -> Merged:
        """Each layer's mode; the mean of everything else."""
        merged = {name: _mean(updates, name) for name in model.names}
        residual, iterations = 0.0, 0
        for name in sorted({name for update in updates for name in update.gram.keys() & update.grad_gram.keys()}):
            found = layer(model, name)
            mean = found.matrix(merged)
            solution = self._step(found, name, mean, updates)
            merged |= found.tensors(mean + solution.x)
            residual, iterations = max(residual, solution.residual), max(iterations, solution.iterations)
        metrics = {"cg_residual": residual, "cg_iterations": iterations}
        return Merged({**merged, **mean_buffers(model, updates)}, metrics=metrics)

    def _step(self, found: Layer, name: str, mean: Tensor, updates: Sequence[ClientUpdate]) -> Solution:
        """The V = W̃ − W̄ of Σ Ĝ_k V A_k + λV = Σ Ĝ_k (W̃_k − W̄) A_k with Ĝ_k = n_k G_k^γ."""
        pairs, pull = [], torch.zeros_like(mean)
        for update in updates:
            if name in update.gram and name in update.grad_gram:
                pairs.append(self._pair(found, update, update.gram[name], update.grad_gram[name]))
                pull += pairs[-1](found.matrix(update.params) - mean)
        return solve(pairs, pull, self.damping, self.tolerance, self.iterations)

    def _pair(self, found: Layer, update: ClientUpdate, gram: Tensor, grad_gram: Tensor) -> Pair:
        """Ĝ_k and A_k."""
        outputs = update.num_examples * _power(grad_gram.double() / max(1, update.num_grads), self.exponent)
        return Pair(outputs, found.gram(gram, self.off_diagonal) / gram[-1, -1].double().clamp(min=1))


def _power(gram: Tensor, exponent: float) -> Tensor:
    """G^γ of a symmetric G, its eigenvalues floored."""
    values, vectors = torch.linalg.eigh(gram)
    powers = values.clamp(min=FLOOR * values.mean()).pow(exponent)
    power: Tensor = (vectors * powers) @ vectors.T
    return power


def _mean(updates: Sequence[ClientUpdate], name: str) -> Tensor:
    state = Sum(torch.zeros_like(updates[0].params[name], dtype=torch.float64))
    for update in updates:
        add_scaled_(state.total, update.num_examples, update.params[name])
        state.scale += update.num_examples
    return state.mean()
