"""Running statistics of batch norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from pydantic import Field
from torch import Tensor

from ..core.base import Aggregator, SumState, Term
from ..core.exchange import Exchange, Fold, Question, Round, tee
from ..core.tensors import like
from ..core.update import ClientUpdate, GlobalModel, Moments, Request
from . import Unaligned

Source: TypeAlias = Callable[[ClientUpdate, str], Moments | None]  # what a client knows of the norm of that name


class BatchNorm(Aggregator):
    """The inner method's merge with right running statistics in its batch norms.

    mean = Σ w_k m_k, var = Σ w_k (v_k + m_k²) − mean² of each channel. That is the spread of all clients' inputs
    together; the mean of variances, which averaged buffers hold, leaves out how far the clients' means lie apart.
    `moments`: m_k and v_k are the clients' own running statistics, w_k = n_k / Σ n_k. `measure`: in one more exchange
    each client measures what enters the batch norms of the merged model on its own examples, w_k its share of them all,
    while batches are normalised by their own statistics; a norm that nobody measured keeps the inner's. For layers in
    front of batch norms this is REPAIR, and they need no other. Both replace the inner's running statistics even where
    it is robust; integer counters stay the inner's.
    Source: Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", on resetting
    batch norms; Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", section 3.2.
    O(channels) a client and in memory.
    """

    kind: Literal["batch_norm"] = "batch_norm"
    inner: Unaligned = Field(description="the method that merges the parameters")
    source: Literal["moments", "measure"] = Field(default="moments", description="running statistics, or measured anew")

    examples = ({"source": "measure"},)

    def questions(self) -> Iterator[Question]:
        """The inner's; then, if measured, what enters the batch norms."""
        yield from self.inner.questions()
        if self.source == "measure":
            yield Question("measure", self._asked)

    def round(self, model: GlobalModel) -> Round:
        """The inner's round, its running statistics replaced; ValueError for a model without any."""
        norms = [name.removesuffix("running_var") for name in model.buffers if name.endswith("running_var")]
        if not norms:
            raise ValueError("batch_norm: this model has no running statistics: leave batch_norm out")
        inner = self.inner.round(model)
        if self.source == "moments":
            merged, pooled = yield from tee(inner, _pooled(model, norms, _running))
        else:
            merged = yield from inner
            fold = _pooled(model, norms, _measured)
            pooled = yield from Exchange(task="measure", params=merged.params, request=self._asked, fold=fold)
        return merged._replace(params=like(model.params, {**merged.params, **pooled}))

    @property
    def _asked(self) -> Request:
        return Request(moments=True, batch_stats=True)


def _running(update: ClientUpdate, norm: str) -> Moments:
    num, var = update.num_examples, update.params[f"{norm}running_var"].double()
    return Moments(num, update.params[f"{norm}running_mean"], num * var)


def _measured(update: ClientUpdate, norm: str) -> Moments | None:
    """By examples, of which a client cannot claim more than the server allows."""
    if (found := update.moments.get(norm.removesuffix("."))) is None:
        return None
    num = update.num_examples
    return Moments(num, found.mean, found.m2.double() * (num / max(1, found.num)))


def _pooled(model: GlobalModel, norms: list[str], source: Source) -> Fold[SumState, dict[str, Tensor]]:
    """The running statistics of all clients' channels together; means are taken from θ_t's, for precision."""
    centres = {norm: model.params[f"{norm}running_mean"].double() for norm in norms}

    def accumulate(state: SumState, update: ClientUpdate) -> SumState:
        for norm, centre in centres.items():
            if (found := source(update, norm)) is not None:
                num, mean, m2 = found
                state.add(Term("mean", norm, num, mean))
                state.add(Term("square", norm, num, m2.double() / max(1, num) + (mean.double() - centre).square()))
        return state

    def finalize(state: SumState) -> dict[str, Tensor]:
        pooled: dict[str, Tensor] = {}
        for norm, sum in state.sums.get("mean", {}).items():
            mean, square = sum.mean(), state.sums["square"][norm].mean()
            var = square - (mean - centres[norm]).square()
            pooled |= {f"{norm}running_mean": mean, f"{norm}running_var": var.clamp(min=0)}
        return pooled

    return Fold(init=SumState, accumulate=accumulate, combine=SumState.combine, finalize=finalize)
