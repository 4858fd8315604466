"""Interpolation between an anchor and what the cohort has learnt from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.base import Aggregator, SumState, Term
from ..core.exchange import Exchange, Fold, Question, Round, tee
from ..core.registry import OfOneWidth
from ..core.tensors import like, widened
from ..core.update import ClientUpdate, Estimator, GlobalModel, Gradients, Request, Tensors


class WiseFT(Aggregator):
    """The way from an anchor θ_0 to the inner method's merge θ*, gone as far as α: robust fine-tuning.

    θ = (1 − w) θ_0 + w θ*, where w = α if `isotropic`; if `fisher`, coordinate by coordinate,
    w = α (P + λ) / ((1 − α)(P_0 + λ) + α (P + λ)) with P and P_0 the cohort's Fisher information, Σ n_k F_k / Σ n_k,
    at the clients' models and at the anchor, and λ = damping · mean over all parameters of (1 − α) P_0 + α P, so that a
    coordinate without information takes w = α. The anchor is θ_t (`round`), or the model of the first round, kept in
    memory (`initial`). α = 0 and α = 1 give the anchor and θ* to the bit. Float buffers take w = α, integer buffers
    are θ*'s.
    Source: Wortsman et al. 2022, "Robust Fine-Tuning of Zero-Shot Models", eq. 1; Matena and Raffel 2022, "Merging
    Models with Fisher-Weighted Averaging", eq. 4 and the experiments on robust fine-tuning. Time O(D) a client, memory
    the anchor and, if `fisher`, two float64 sums, beside the inner's.
    """

    kind: Literal["wise_ft"] = "wise_ft"
    inner: OfOneWidth = Field(description="the method that makes θ*")
    alpha: float = Field(default=0.5, ge=0, le=1, description="how far from the anchor, 0, towards θ*, 1")
    anchor: Literal["initial", "round"] = Field(default="initial", description="the first round's model, or each's own")
    weighting: Literal["isotropic", "fisher"] = Field(default="isotropic", description="whether α is one for all")
    damping: float = Field(default=0.1, ge=0, allow_inf_nan=False, description="λ over the mean Fisher information")
    estimator: Estimator = Field(default="exact", description="which labels the gradients are of")
    max_grads: int | None = Field(default=None, ge=1, description="examples behind the Fisher; none: all")

    examples = (
        {"alpha": 0.0},
        {"alpha": 1.0, "weighting": "fisher"},
        {"alpha": 0.3, "anchor": "round"},
        {"alpha": 0.3, "weighting": "fisher"},
        {"alpha": 0.7, "weighting": "fisher", "damping": 0.0, "anchor": "round", "max_grads": 8},
    )

    def model_post_init(self, context: object) -> None:
        """Refuses an inner method whose replies would need another estimator."""
        list(self.questions())

    def questions(self) -> Iterator[Question]:
        """The inner's, with squares where it trains; then squares at the anchor."""
        for question in self.inner.questions():
            yield question._replace(request=question.request | self._asked) if question.task == "train" else question
        if self._weighs:
            yield Question("measure", self._asked)

    def round(self, model: GlobalModel) -> Round:
        """The inner's round, then the Fisher information at the anchor."""
        start = self._start(model)
        inner = self.inner.round(model.within())
        shares: Tensors = {}
        if self._weighs:
            merged, there = yield from tee(inner, _pooled(model), self._asked)
            here = yield from Exchange(task="measure", params=start, request=self._asked, fold=_pooled(model))
            shares = self._shares(here, there)
        else:
            merged = yield from inner
        kept = {"anchor": start} if self.anchor == "initial" else {}
        params = like(model.params, self._between(start, merged.params, shares))
        return merged._replace(params=params, memory={**kept, "inner": merged.memory})

    def _start(self, model: GlobalModel) -> dict[str, Tensor]:
        """θ_0, buffers too."""
        return {**model.params, **(model.kept("anchor") if self.anchor == "initial" else {})}

    @property
    def _weighs(self) -> bool:
        return self.weighting == "fisher" and 0 < self.alpha < 1

    @property
    def _asked(self) -> Request:
        squares = Gradients(squares=True, estimator=self.estimator, limit=self.max_grads)
        return Request(gradients=squares if self._weighs else None)

    def _shares(self, here: Tensors, there: Tensors) -> dict[str, Tensor]:
        """w by coordinate."""
        size = max(1, sum(fisher.numel() for fisher in here.values()))
        past, learnt = (torch.stack([f.sum() for f in fisher.values()]).sum() / size for fisher in (here, there))
        damping = self.damping * ((1 - self.alpha) * past + self.alpha * learnt)
        return {name: self._share(here[name] + damping, there[name] + damping) for name in here}

    def _share(self, past: Tensor, learnt: Tensor) -> Tensor:
        """α learnt / ((1 − α) past + α learnt)."""
        total = (1 - self.alpha) * past + self.alpha * learnt
        return torch.where(total > 0, self.alpha * learnt / total, self.alpha)

    def _between(self, start: Tensors, end: Tensors, shares: Tensors) -> Tensors:
        """(1 − w) θ_0 + w θ*, the endpoints as they are."""
        if self.alpha in (0, 1):
            return end if self.alpha else start
        share = {name: shares.get(name, self.alpha) for name, value in end.items() if value.is_floating_point()}
        return {**end, **{name: (1 - w) * start[name].double() + w * end[name].double() for name, w in share.items()}}


def _pooled(model: GlobalModel) -> Fold[SumState, dict[str, Tensor]]:
    """Σ n_k F_k / Σ n_k of every trainable parameter."""

    def accumulate(state: SumState, update: ClientUpdate) -> SumState:
        for name in model.names:
            fisher = widened(update.sq_grad_sum[name]) / max(1, update.num_grads)
            state.add(Term("fisher", name, update.num_examples, fisher))
        return state

    def finalize(state: SumState) -> dict[str, Tensor]:
        return {name: sum.mean() for name, sum in state.sums["fisher"].items()}

    return Fold(init=SumState, accumulate=accumulate, combine=SumState.combine, finalize=finalize)
