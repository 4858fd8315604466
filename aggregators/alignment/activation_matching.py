"""Activation matching."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.base import Aggregator
from ..core.diagnosis import Diagnosis
from ..core.exchange import Exchange, Question, Round, collect, premap
from ..core.matching import Matching, assign, correlation, gains
from ..core.registry import OfOneWidth
from ..core.symmetry import Permutation, Sizes, Symmetry
from ..core.tensors import widened
from ..core.update import ClientUpdate, GlobalModel, Merged, Request, Tensors

ASKED = Request(cross_moments=True)
TIE = 1e-5  # correlations that differ by less are told apart by weights; float32 rounds them to 1e-7
SWEEPS = 10  # over all groups; the second moves dead units only


class ActivationMatching(Aggregator):
    """The inner method's round on clients whose units are permuted to match one another by their activations.

    P_k = arg max Σ_i corr(a_{P(i)}, b_i) for each group of units, a those of θ_k and b of an anchor, before their
    non-linearity, on that client's own training examples, or those to which the inner method limits its gradients: no
    data on the server. Where a group stands in several layers, or a unit for a block of channels, correlations are
    averaged; ties, dead units and groups that no linear or convolutional layer brings forth are settled by weights.

    All clients are matched to one anchor. `first`: the trained model of the first client, by name. A second exchange
    sends it to the cohort, and to each its own model again, since clients keep nothing; right whatever they start from.
    `global`: θ_t, in the exchange that trains, in the memory of one update. Right once θ_t has been trained; in the
    first round of clients that start from their own it is a network that knows nothing, and matching to it is worse
    than to a trained one, though far better than none.

    Source: Li et al. 2016, "Convergent Learning: Do different neural networks learn the same representations?",
    section 3; Ainsworth et al. 2023, "Git Re-Basin", section 3.1, whose products of activations without centre and
    scale are not scale-free. O(n³) an assignment, n² numbers a layer sent.
    """

    kind: Literal["activation_matching"] = "activation_matching"
    inner: OfOneWidth = Field(description="the method that merges the matched clients")
    reference: Literal["first", "global"] = Field(default="first", description="the anchor: first client or θ_t")

    needs: ClassVar[frozenset[str]] = frozenset({"symmetry"})
    examples = ({"reference": "global"},)

    def questions(self) -> Iterator[Question]:
        """The inner's; correlations with its training, or after it."""
        for task, request in self.inner.questions():
            joint = task == "train" and self.reference == "global"
            yield Question(task, request | ASKED if joint else request)
            if task == "train" and not joint:
                yield Question("measure", ASKED)

    def round(self, model: GlobalModel) -> Round:
        """The inner's round, its updates aligned first."""
        matcher = _Matcher(model)
        inner = self.inner.round(model)
        aligned = premap(inner, matcher.to_sent, ASKED) if self.reference == "global" else matcher.to_first(inner)
        merged = yield from aligned
        return merged._replace(metrics={**merged.metrics, **matcher.diagnosis.metrics(merged.params)})


class _Matcher:
    """One round's matching."""

    def __init__(self, model: GlobalModel) -> None:
        if model.symmetry is None:
            raise ValueError("activation_matching needs the symmetry of the task's network")
        self.model, self.symmetry = model, model.symmetry
        self.diagnosis = Diagnosis(model)

    def to_sent(self, exchange: Exchange[Any], update: ClientUpdate) -> ClientUpdate:
        """The update matched to the model that its client received, or was to compare its own with."""
        anchor = exchange.sent(update.client_id) or self.model.params
        return self._aligned(update, update.cross_moments, anchor)

    def to_first(self, round: Round) -> Round:
        """The round, with a second exchange after each that trains."""
        answer: Any = None
        while True:
            try:
                exchange = round.send(answer)
            except StopIteration as stop:
                merged: Merged = stop.value
                return merged
            answer = yield from (self._compared(exchange) if exchange.task == "train" else exchange)

    def _compared(self, exchange: Exchange[Any]) -> Generator[Exchange[Any], Any, Any]:
        """The exchange's answer from updates matched to the first one; who does not answer twice is left out."""
        first, *others = yield from replace(exchange, fold=collect)
        self.diagnosis.start = first.params
        trained = {update.client_id: update.params for update in (first, *others)}
        measured = yield from Exchange(
            task="measure", params=trained.__getitem__, anchor=first.params, request=ASKED, fold=collect
        )
        found = {update.client_id: update.cross_moments for update in measured}
        aligned = [self._aligned(u, found[u.client_id], first.params) for u in others if u.client_id in found]
        return exchange.answer([first, *aligned])

    def _aligned(self, update: ClientUpdate, correlations: Tensors, anchor: Tensors) -> ClientUpdate:
        names = [name for name in self.model.names if name in self.symmetry.axes]
        theta, other = ({name: widened(params[name]) for name in names} for params in (anchor, update.params))
        found = matched(self.symmetry, correlations, theta, other)
        aligned = self.symmetry.permute_update(update, found.permutation)
        self.diagnosis.add(found, anchor, (update.params, aligned.params))
        return aligned


def matched(symmetry: Symmetry, correlations: Tensors, anchor: Tensors, params: Tensors) -> Matching:
    """The permutation of `params` to the anchor, with the mean correlation of units without it and with it.

    `correlations` are by layer, (units of `params`, units of the anchor). Weights settle what these leave open, group
    by group until none moves. Groups of which `params` have no tensor stay.
    """
    known = [group for group in symmetry.groups if any(name in params for name, _ in symmetry.members[group])]
    sizes = symmetry.sizes(params)
    means = {group: _mean(symmetry, group, correlations, sizes) for group in known}
    permutation = {group: torch.arange(len(mean)) for group, mean in means.items()}
    before = _objective(means, permutation)
    for _ in range(SWEEPS):
        last = dict(permutation)
        for group, mean in means.items():
            weights = gains(symmetry, group, anchor, params).double().cpu()
            step = assign(mean[:, permutation[group]] + TIE * weights / weights.abs().max().clamp(min=1e-30))
            permutation[group] = permutation[group][step]
            params = symmetry.permute(params, {group: step})
        if all(torch.equal(last[group], index) for group, index in permutation.items()):
            break
    return Matching(permutation, before, _objective(means, permutation))


def _objective(means: Mapping[str, Tensor], permutation: Permutation) -> float:
    """The mean over all units of their correlation with their partners."""
    pairs = [mean.gather(1, permutation[group][:, None]) for group, mean in means.items()]
    return float(torch.cat(pairs).mean()) if pairs else 0.0


def _mean(symmetry: Symmetry, group: str, correlations: Tensors, sizes: Sizes) -> Tensor:
    """Of each unit of the anchor with each other, (n, n); 0 where no layer tells."""
    found = correlation(symmetry, group, correlations, (sizes, sizes))
    return torch.zeros(sizes[group], sizes[group], dtype=torch.float64) if found is None else found.mT
