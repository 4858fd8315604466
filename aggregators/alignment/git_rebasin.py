"""Weight matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..core.base import Aggregator
from ..core.diagnosis import Diagnosis
from ..core.exchange import Exchange, Round, premap, premap_cohort
from ..core.matching import Matching, balance, inner, match, match_many
from ..core.registry import OfOneWidth
from ..core.seed import derive_seed
from ..core.tensors import widened
from ..core.update import ClientUpdate, GlobalModel, Tensors

DAMPING = 0.01  # of the mean F^¼


class GitReBasin(Aggregator):
    """The inner method's round on clients whose units are permuted to match one another by their weights.

    P_k = arg max Σ over tensors ⟨θ_ref, P θ_k⟩, by coordinate descent over the network's groups of units, each step a
    linear assignment. `reference`: `cohort` matches each client in turn to the mean of the others until none moves
    (MergeMany), in the order of units of the first client; `first` matches all to the first client; `global` to the
    model each was sent, one client at a time in the memory of one, which needs a θ_t that has been trained. Statistics
    are permuted with their parameters. `fisher`: clients that send squares are matched to one another by F^¼ θ, F^¼
    having a mean of 1 and a hundredth added, by which weights without information are told apart; a client that this
    would take further from the first than it is stays. `rescale`: units between ReLUs are compared, and merged, at
    equal scale, the reference's.
    Source: Ainsworth et al. 2023, "Git Re-Basin: Merging Models modulo Permutation Symmetries", section 3.2 and
    appendix A.10; F^¼ is this project's. O(n³) an assignment, and products of all weights, a sweep over groups.
    """

    kind: Literal["git_rebasin"] = "git_rebasin"
    inner: OfOneWidth = Field(description="the method that merges the matched clients")
    reference: Literal["cohort", "first", "global"] = Field(default="cohort", description="what clients are matched to")
    restarts: int = Field(default=5, ge=1, description="random orders of groups tried in each matching")
    fisher: bool = Field(default=True, description="whether Fisher information weights the matching of clients")
    rescale: bool = Field(default=True, description="whether units between ReLUs take the reference's scale")
    seed: int = Field(default=0, description="of the orders")

    needs: ClassVar[frozenset[str]] = frozenset({"symmetry"})
    examples = ({"reference": "first"}, {"reference": "global", "restarts": 1}, {"fisher": False, "rescale": False})

    def round(self, model: GlobalModel) -> Round:
        """The inner's round, its updates aligned first."""
        matcher = _Matcher(self, model)
        if self.reference == "global":
            merged = yield from premap(self.inner.round(model), matcher.to_sent)
        else:
            merged = yield from premap_cohort(self.inner.round(model), matcher.together)
        return merged._replace(metrics={**merged.metrics, **matcher.diagnosis.metrics(merged.params)})


class _Features(NamedTuple):
    """A model, θ of its trainable tensors that the groups move, at equal scale, and F^¼ θ or θ, which is matched."""

    params: Tensors
    theta: Tensors
    weighted: Tensors
    scales: Mapping[str, Tensor]  # taken out of θ


class _Matcher:
    """One round's matching."""

    def __init__(self, method: GitReBasin, model: GlobalModel) -> None:
        if model.symmetry is None:
            raise ValueError("git_rebasin needs the symmetry of the task's network")
        self.method, self.model, self.symmetry = method, model, model.symmetry
        self.diagnosis = Diagnosis(model)

    def to_sent(self, exchange: Exchange[Any], update: ClientUpdate) -> ClientUpdate:
        """The update matched to the model that its client started from, or to θ_t if it started from its own."""
        sent = exchange.sent(update.client_id) or self.model.params
        reference, own = map(self._features, (sent, update.params))
        return self._aligned(update, own, self._match(reference, own, update), reference)

    def together(self, updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """The updates matched to one another, in the first one's order and scale of units."""
        features = [*map(self._of, updates)]
        self.diagnosis.start = updates[0].params
        matched = zip(updates[1:], features[1:], self._matchings(updates, features), strict=True)
        return [updates[0], *(self._aligned(*one, features[0]) for one in matched)]

    def _matchings(self, updates: Sequence[ClientUpdate], features: Sequence[_Features]) -> list[Matching]:
        if self.method.reference == "first":
            others = zip(features[1:], updates[1:], strict=True)
            return [self._match(features[0], own, update) for own, update in others]
        return match_many(self.symmetry, [own.weighted for own in features], **self._options())[1:]

    def _match(self, reference: _Features, own: _Features, update: ClientUpdate) -> Matching:
        return match(self.symmetry, reference.weighted, own.weighted, **self._options(update.client_id))

    def _options(self, *purpose: int) -> dict[str, Any]:
        seed = derive_seed(self.method.seed, self.model.round, *purpose, "matching")
        return {"restarts": self.method.restarts, "generator": np.random.default_rng(seed)}

    def _of(self, update: ClientUpdate) -> _Features:
        """What a client is matched by; weighted by F^¼ where it sends squares."""
        found = self._features(update.params)
        if not (self.method.fisher and update.sq_grad_sum):
            return found
        squares = {name: widened(update.sq_grad_sum[name]) for name in found.theta}
        roots = {name: value.pow(0.25) for name, value in self.symmetry.scale(squares, found.scales, -2).items()}
        mean = _mean(roots) or 1.0
        return found._replace(weighted={n: theta * (roots[n] / mean + DAMPING) for n, theta in found.theta.items()})

    def _features(self, params: Tensors) -> _Features:
        theta = {name: widened(params[name]) for name in self.model.names if name in self.symmetry.axes}
        scales = balance(self.symmetry, theta) if self.method.rescale else {}
        theta = self.symmetry.scale(theta, scales)
        return _Features(params, theta, theta, scales)

    def _aligned(self, update: ClientUpdate, own: _Features, found: Matching, reference: _Features) -> ClientUpdate:
        """The update in the reference's order and scale of units."""
        found = self._nearer(found, own, reference)
        places = found.permutation
        factors = {group: scale[places[group]] / reference.scales[group] for group, scale in own.scales.items()}
        aligned = self.symmetry.scale_update(self.symmetry.permute_update(update, places), factors)
        self.diagnosis.add(found, reference.params, (update.params, aligned.params))
        return aligned

    def _nearer(self, found: Matching, own: _Features, reference: _Features) -> Matching:
        """The matching; the identity where it takes θ further from the reference's than it is."""
        moved = self.symmetry.permute(own.theta, found.permutation)
        if inner(moved, reference.theta) >= inner(own.theta, reference.theta):
            return found
        return Matching(
            {group: places.sort().values for group, places in found.permutation.items()}, *[found.before] * 2
        )


def _mean(tensors: Tensors) -> float:
    """Over all entries of all tensors."""
    total = sum(float(value.sum(dtype=torch.float64)) for value in tensors.values())
    return total / max(1, sum(value.numel() for value in tensors.values()))
