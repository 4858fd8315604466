"""Regression mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.base import SumAggregator, Sums, Term
from ..core.layers import layer
from ..core.update import ClientUpdate, GlobalModel, Merged, Request

ROUNDING = 2**-24  # relative, of each entry of a Gram matrix in float32


class RegMean(SumAggregator):
    """The layers whose outputs come closest, in least squares, to each client's own on its own inputs.

    W̃ᵀ = [Σ G_k + λI]^{-1} [Σ G_k W̃_kᵀ + λ W̄ᵀ], W̃ = [W, b], for each layer with a Gram matrix G_k = Σ x̃ x̃ᵀ of its
    inputs x̃ = [x, 1], a convolution's as patches; entries off the diagonal of G_k are multiplied by `off_diagonal`.
    W̄ is the mean weighted by num_examples, and what every other parameter takes; λ = damping · mean diagonal of Σ G_k.
    A client without a layer's Gram matrix has no information on it. Without damping (below in · 6e-8, the rounding of
    Gram matrices), directions that no input has stay at W̄, by an eigendecomposition in place of Cholesky's.
    Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models"; the damping is ours.
    Statistics uploaded: `gram`, (in + 1)² numbers a layer. Time O(in² (in + out)) a layer and client, memory a float64
    G and model. Metric `unsolved_layers`: layers that stay at W̄, since Σ G_k is 0 or, after rounding, not positive.
    """

    kind: Literal["regmean"] = "regmean"
    off_diagonal: float = Field(default=0.9, ge=0, le=1)
    damping: float = Field(default=0.1, ge=0, allow_inf_nan=False)

    examples = (
        {"damping": 0.0},
        {"off_diagonal": 1.0, "damping": 0.0},
        {"off_diagonal": 0.0, "damping": 1.0},
    )

    @property
    def request(self) -> Request:
        """Gram matrices of layers' inputs."""
        return Request(gram=True)

    def terms(self, model: GlobalModel, update: ClientUpdate) -> Iterator[Term]:
        """n_k θ_k; of each layer G_k and G_k (W̃_k − W̃_t)ᵀ, from the examples behind G_k scaled to n_k."""
        for name in model.names:
            yield Term("mean", name, update.num_examples, update.params[name])
        scale = update.num_examples / max(1, update.num_grads)
        for name, sums in update.gram.items():
            found = layer(model, name)
            gram = found.gram(sums, self.off_diagonal)
            yield Term("gram", name, scale, gram)
            yield Term("pull", name, scale, gram @ (found.matrix(update.params) - found.matrix(model.params)).T)

    def finish(self, model: GlobalModel, sums: Sums) -> Merged:
        """W̄ᵀ + [Σ G_k + λI]^{-1} Σ G_k (W̃_k − W̄)ᵀ, which is W̄ exactly where clients agree."""
        merged = {name: sum.mean() for name, sum in sums.get("mean", {}).items()}
        solved = [torch.ones((), dtype=torch.bool, device=model.device)]
        for name, gram in sums.get("gram", {}).items():
            found = layer(model, name)
            mean = found.matrix(merged)
            pull = sums["pull"][name].total - gram.total @ (mean - found.matrix(model.params)).T
            step, sound = _solve(gram.total, pull, self.damping)
            merged |= found.tensors(mean + step.T)
            solved.append(sound)
        return Merged(merged, metrics={"unsolved_layers": torch.stack(solved).logical_not().sum()})


def _solve(gram: Tensor, pull: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """[G + λI]^{-1} pull, 0 where there is no such thing; and whether there is."""
    size = len(gram)
    strength = damping * gram.diagonal().mean()
    if damping <= size * ROUNDING:
        values, vectors = torch.linalg.eigh(gram)
        reached = values > size * ROUNDING * values[-1]
        shares = torch.where(reached, 1 / (values + strength), 0)
        return vectors @ (shares[:, None] * (vectors.T @ pull)), reached.any()
    damped = gram.clone()
    damped.diagonal().add_(strength)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return torch.where(failed == 0, torch.cholesky_solve(pull, factor), 0), failed == 0
