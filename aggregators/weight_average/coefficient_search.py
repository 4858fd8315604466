"""Search for the clients' coefficients on held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from math import isnan
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import Field, field_validator

from ..core.base import Aggregator
from ..core.exchange import Round, collect
from ..core.registry import AnyAggregator
from ..core.seed import derive_seed
from ..core.update import ClientUpdate, GlobalModel, Merged, Probe

Point: TypeAlias = tuple[float, ...]  # K λ_k of each client: uniform is all ones


class Trial(NamedTuple):
    """A point, the merge under it, and that model's loss on the probe."""

    loss: float
    point: Point
    merged: Merged


class CoefficientSearch(Aggregator):
    """The inner method's merge under those coefficients, among the ones tried, that do best on held-out data.

    λ* = argmin_λ loss(θ*(λ)), where λ_k ≥ 0 and Σ λ_k = 1. Uniform λ, the inner's own merge, come first; then, for two
    clients, an even grid with both endpoints; for more, points from Dirichlet(1), drawn by round. Of equal losses the
    first wins, so that no merge is worse on the probe than the uniform one.
    Source: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", the searches for λ of its
    experiments and code.
    Memory K updates; time `candidates` merges and evaluations. Metrics: `probe_loss` and `uniform_loss`, of the two
    merges, and `coefficient_<client>`, the chosen λ_k.
    """

    kind: Literal["coefficient_search"] = "coefficient_search"
    inner: AnyAggregator = Field(description="a method that has coefficients, and asks its clients once")
    candidates: int = Field(default=51, ge=2, description="points of a pair's grid, or in all where there are more")

    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    examples = ({"candidates": 4},)
    inners = ("fisher",)

    @field_validator("inner")
    @classmethod
    def _searchable(cls, inner: Aggregator) -> Aggregator:
        if (coefficients := getattr(inner, "coefficients", None)) is None:
            raise ValueError(f"{inner.kind} has no coefficients to search: wrap the method that has, such as fisher")
        if coefficients:
            raise ValueError(f"the coefficients of {inner.kind} are what is searched: leave them out")
        if len([*inner.questions()]) != 1:
            raise ValueError(f"{inner.kind} asks its clients more than once: it cannot be merged anew from one answer")
        return inner

    def round(self, model: GlobalModel) -> Round:
        """The inner's one exchange, held; then a merge for each point."""
        if model.probe is None:
            raise ValueError("coefficient_search needs held-out data on the server: give the model a probe")
        asked = next(self.inner.round(model))
        updates: list[ClientUpdate] = yield from replace(asked, fold=collect)
        points = self._points(len(updates), model.round)
        trials = (self._trial(model, model.probe, updates, point) for point in points)
        uniform = next(trials)
        best = min(chain([uniform], trials), key=lambda trial: (isnan(trial.loss), trial.loss))
        shares = {f"coefficient_{u.client_id}": c / len(updates) for u, c in zip(updates, best.point, strict=True)}
        metrics = {"probe_loss": best.loss, "uniform_loss": uniform.loss, **shares}
        return best.merged._replace(metrics={**best.merged.metrics, **metrics})

    def _points(self, num: int, round: int) -> Iterable[Point]:
        """Each point once, uniform first."""
        last = self.candidates - 1
        grid = [(2 * (last - i) / last, 2 * i / last) for i in range(self.candidates)] if num == 2 else []
        generator = np.random.default_rng(derive_seed("coefficient_search", round))
        drawn = num * generator.dirichlet(np.ones(num), last if num > 2 else 0)
        return dict.fromkeys([(1.0,) * num, *grid, *map(tuple, drawn.tolist())])

    def _trial(self, model: GlobalModel, probe: Probe, updates: Sequence[ClientUpdate], point: Point) -> Trial:
        coefficients = {str(update.client_id): weight for update, weight in zip(updates, point, strict=True)}
        merged = self.inner.model_copy(update={"coefficients": coefficients}).aggregate(model, updates)
        return Trial(probe.loss(merged.params), point, merged)
