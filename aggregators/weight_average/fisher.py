"""Fisher merging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from ..core.base import Sum, SumAggregator, Sums, Term
from ..core.exchange import LostRound
from ..core.tensors import norm, widened
from ..core.update import ClientUpdate, Estimator, GlobalModel, Gradients, Merged, Request

Weight: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Fisher(SumAggregator):
    """The mean of the clients' models, each parameter weighted by its client's Fisher information.

    P_k = λ_k n_k F_k^γ with F_k = sq_grad_sum / num_grads; θ* = (Σ P_k θ_k + λ c) / (Σ P_k + λ), where
    λ = damping · mean over all parameters of Σ P_k and c is the prior's centre: the weighted mean (`mean`), θ_t
    (`bayes`) or one client's model (`target`). A coordinate without information takes c. `temper` γ = 0 weighs by
    λ_k n_k, ½ is tempered Fisher, 1 the paper's; `coefficients` are its λ_k, by node id or name, 1 where absent.
    `normalize` divides F_k by its norm over all parameters, as the paper's code does, so that a client far from
    convergence, whose gradients are long, does not outweigh the others.
    Source: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", eqs. 2 and 4.
    Time O(D) a client, memory two float64 sums, three with prior `mean` or `target`. Metric `damped_share`: the
    share of coordinates whose summed precision is below λ.
    """

    kind: Literal["fisher"] = "fisher"
    temper: float = Field(default=1.0, ge=0, le=1, description="power γ of the Fisher information")
    damping: float = Field(default=0.1, ge=0, allow_inf_nan=False, description="λ over the mean summed precision")
    prior: Literal["mean", "bayes", "target"] = Field(default="mean", description="what damping pulls towards")
    target: int | str | None = Field(default=None, description="prior `target`: that client's node id or name")
    coefficients: Mapping[str, Weight] = Field(default_factory=dict, description="λ_k by client's node id or name")
    normalize: bool = Field(default=False, description="whether each client's Fisher information has norm 1")
    estimator: Estimator = Field(default="exact", description="which labels the gradients are of")
    max_grads: int | None = Field(default=None, ge=1, description="examples behind the Fisher; none: all")

    examples = (
        {"temper": 0.5},
        {"temper": 0.0, "damping": 0.0},
        {"damping": 0.0},
        {"prior": "bayes"},
        {"prior": "target", "target": 1},
        {"estimator": "empirical", "max_grads": 8, "coefficients": {"1": 2.0}},
        {"normalize": True},
        {"normalize": True, "temper": 0.5, "estimator": "logit"},
    )

    def model_post_init(self, context: object) -> None:
        """Refuses a prior `target` without a target."""
        if (self.prior == "target") != (self.target is not None):
            raise ValueError("prior 'target' needs a target, a client's node id or name, and only that prior takes one")

    @property
    def request(self) -> Request:
        """Σ g² over single examples."""
        return Request(gradients=Gradients(squares=True, estimator=self.estimator, limit=self.max_grads))

    def terms(self, model: GlobalModel, update: ClientUpdate) -> Iterator[Term]:
        """P_k, P_k θ_k, and n_k θ_k or the target's θ_k."""
        weight = update.num_examples * self._coefficient(update)
        squares = update.sq_grad_sum
        length = norm(squares[name] for name in model.names) if self.normalize else None
        scale = weight / (1 if self.normalize else max(1, update.num_grads)) ** self.temper
        for name in model.names:
            theta, powers = update.params[name], self._powers(squares[name], length)
            yield Term("precision", name, scale, powers)
            yield Term("weighted", name, scale, theta, powers)
            if self.prior == "mean":
                yield Term("centre", name, weight, theta)
            elif self.target is not None and update.answers_to(self.target):
                yield Term("centre", name, 1, theta)

    def finish(self, model: GlobalModel, sums: Sums) -> Merged:
        """(Σ P_k θ_k + λ c) / (Σ P_k + λ), in place of the sums."""
        precision = sums["precision"]
        size = max(1, sum(model.params[name].numel() for name in model.names))
        damping = self.damping / size * _stacked_sum([precision[name].total.sum() for name in model.names])
        damped_share = _stacked_sum([(precision[name].total < damping).sum() for name in model.names]) / size
        merged = {
            name: _ratio(sums["weighted"][name], precision[name], self._centre(model, sums, name), damping)
            for name in model.names
        }
        return Merged(merged, metrics={"damped_share": damped_share})

    def _powers(self, squares: Tensor, length: Tensor | None) -> Tensor:
        units = squares if length is None else squares.double() / (length + (length == 0))
        return units if self.temper == 1 else widened(units).pow(self.temper)

    def _coefficient(self, update: ClientUpdate) -> float:
        named = (weight for client, weight in self.coefficients.items() if update.answers_to(client))
        return next(named, 1.0)

    def _centre(self, model: GlobalModel, sums: Sums, name: str) -> Tensor:
        if self.prior == "bayes":
            return model.params[name].double()
        if "centre" not in sums:
            raise LostRound(f"client {self.target!r}, the prior's target, did not answer")
        return sums["centre"][name].mean()


def _ratio(weighted: Sum, precision: Sum, centre: Tensor, damping: Tensor) -> Tensor:
    numerator = weighted.total.addcmul_(centre, damping)
    total = precision.total.add_(damping)
    return torch.where(total > 0, numerator.div_(total), centre)


def _stacked_sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum()
