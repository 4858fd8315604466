"""Fusion by optimal transport."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import Field, ValidationInfo, field_validator

from ..core.base import Aggregator
from ..core.diagnosis import Diagnosis
from ..core.exchange import Exchange, Question, Round, collect
from ..core.registry import OfOneWidth
from ..core.tensors import norm, steps
from ..core.transport import Outgoing, Planned, Planner, Plans, permutation, reverse, transport, transport_update
from ..core.update import ClientUpdate, GlobalModel, Memory, Merged, Request, Tensors

ASKED = Request(cross_moments=True)
RIGID = {"gram": "Gram matrices", "grad_gram": "Gram matrices of gradients", "moments": "moments"}


class OtFusion(Aggregator):
    """The inner method's round on clients whose units are carried into those of a reference, whatever their widths.

    T = arg min ⟨T, C⟩ of each client and each group of units, between marginals that are equal or go by the lengths of
    units' weights; C the distance of their weights, or of their activations, which clients measure in a
    second exchange, on their own examples, beside the reference. Units become convex combinations of those carried to
    them; `outgoing` is whether what reads them is summed, or averaged as in the reference implementation.

    In the first round the reference is the `widest` client, of the most parameters, or the `first` by name; from then
    on θ_t, of its widths and units, so that the model never shrinks where a wide client is away. The inner method sees
    θ_t in these widths. `iterations` beyond the first take the clients' mean for the reference. A client of other
    widths keeps them: its plans are remembered, and it is sent θ_t carried back, outgoing weights summed.

    A plan between equal widths and marginals is a permutation, and every statistic follows it. Elsewhere the squares of
    gradients follow approximately (`approximate_statistics` is the share of clients), and what else an inner method may
    ask for not at all: with Sinkhorn's plans, or marginals by importance, such a method is refused; with others a
    client of another width is left out of its merge (`left_out`), and still gets the next model.

    Source: Singh & Jaggi 2020, "Model Fusion via Optimal Transport", algorithm 1, with biases, sums of outgoing weights
    and one plan for all layers of a residual stream. O(n³) a plan, and products of all weights.
    """

    kind: Literal["ot_fusion"] = "ot_fusion"
    inner: OfOneWidth = Field(description="the method that merges the carried clients")
    cost: Literal["weights", "activations"] = Field(default="weights", description="what units are compared by")
    solver: Literal["exact", "sinkhorn"] = Field(default="exact", description="of the plans")
    regularisation: float = Field(default=0.05, ge=0.001, description="of Sinkhorn's plans, in mean costs")
    marginals: Literal["uniform", "importance"] = Field(default="uniform", description="the units' masses")
    outgoing: Outgoing = Field(default="sum", description="whether outgoing weights are summed or averaged")
    reference: Literal["widest", "first"] = Field(default="widest", description="the client that gives the widths")
    passes: int = Field(default=1, ge=1, description="over the groups, in finding a client's plans")
    iterations: int = Field(default=1, ge=1, description="of the barycentre")

    needs: ClassVar[frozenset[str]] = frozenset({"symmetry", "widths"})
    examples = (
        {"cost": "activations", "reference": "first"},
        {"marginals": "importance", "outgoing": "mean"},
        {"iterations": 2, "passes": 2},
    )

    @field_validator("inner")
    @classmethod
    def _trains_once(cls, inner: Aggregator) -> Aggregator:
        """Refuses what could not begin anew, in the reference's widths, when it is given the carried clients."""
        tasks = [question.task for question in inner.questions()]
        if any(question.task == "train" and question.request.cross_moments for question in inner.questions()):
            raise ValueError(
                f"{inner.kind} compares clients with what they were sent, which is not what they merge into"
            )
        if tasks.count("train") != 1 or tasks[0] != "train":
            raise ValueError(f"{inner.kind} asks to {', '.join(tasks)}: what trains clients once, first, can follow")
        return inner

    @field_validator("solver", "marginals")
    @classmethod
    def _carries_what_is_asked(cls, value: str, info: ValidationInfo) -> str:
        """Refuses plans that are no permutations where an inner method asks for what only these carry."""
        for part in reversed([*info.data["inner"].parts()] if "inner" in info.data else []):
            for task, request in part.questions():
                if value in ("sinkhorn", "importance") and task == "train" and (asked := rigid(request)):
                    raise ValueError(
                        f"{part.kind} asks for {asked}, which follow exact, uniform plans only: take these"
                    )
        return value

    def questions(self) -> Iterator[Question]:
        """The inner's; where units are compared by activations, these after each training."""
        for question in self.inner.questions():
            yield question
            if question.task == "train" and self.cost == "activations":
                yield from [Question("measure", ASKED)] * self.iterations

    def round(self, model: GlobalModel) -> Round:
        """The inner's round, its updates carried first."""
        return _Fusion(self, model).round()


def rigid(request: Request) -> str:
    """What is asked for that follows permutations only, in words."""
    named = [words for field, words in RIGID.items() if getattr(request, field)]
    return " and ".join(["sketches"] * bool(request.gradients and request.gradients.sketches) + named)


class _Carried(NamedTuple):
    """A client's update, the same in the reference's units, and its plans, which the reference itself has not."""

    update: ClientUpdate
    moved: ClientUpdate
    planned: Planned

    @property
    def exact(self) -> bool:
        """Whether it is permuted, and so every statistic too."""
        return permutation(self.planned.plans) is not None


class _Fusion:
    """One round: the plans of clients of other widths than θ_t's, by id, and what the record tells."""

    def __init__(self, method: OtFusion, model: GlobalModel) -> None:
        if model.symmetry is None:
            raise ValueError("ot_fusion needs the symmetry of the task's network")
        self.method, self.model, self.symmetry = method, model, model.symmetry
        self.rounds = cast(int, model.memory.get("rounds", 0))
        self.known = {*cast("Mapping[str, int]", model.memory.get("known", {}))}
        self.plans = {**cast("Mapping[str, Plans]", model.memory.get("plans", {}))}
        self.record: dict[str, float] = {}
        self.diagnosis = Diagnosis(model)
        self.planner = Planner(
            self.symmetry,
            model.names,
            regularisation=method.regularisation if method.solver == "sinkhorn" else None,
            important=method.marginals == "importance",
            outgoing=method.outgoing,
            passes=method.passes,
        )

    def round(self) -> Round:
        """The inner's round on what is carried, its memory and metrics within this method's."""
        inner, answer = self.method.inner.round(self.model.within()), None
        while True:
            try:
                exchange = inner.send(answer)
            except StopIteration as stop:
                return self._merged(stop.value)
            if exchange.task == "train":
                inner, answer = yield from self._trained(inner, exchange)
            else:
                answer = yield exchange

    def _merged(self, merged: Merged) -> Merged:
        known = dict.fromkeys(sorted(self.known), 1)
        memory: Memory = {"rounds": self.rounds + 1, "known": known, "plans": self.plans, "inner": merged.memory}
        metrics = {**merged.metrics, **self.record, **self.diagnosis.metrics(merged.params)}
        return Merged(merged.params, memory, metrics)

    def _trained(self, inner: Round, exchange: Exchange[Any]) -> Generator[Exchange[Any], Any, tuple[Round, Any]]:
        """The inner's round, begun anew where θ_t takes the reference's widths, and the answer to its exchange."""
        updates = yield from replace(exchange, params=self._sent(exchange), fold=collect)
        reference, carried = yield from self._carried(updates)
        followed = [one for one in carried if one.exact or not rigid(exchange.request)]
        self._note(carried, followed, reference)
        start = self._start(reference)
        if start is not self.model.params:
            inner = self.method.inner.round(replace(self.model.within(), params=start))
            exchange = next(inner)
        return inner, exchange.answer(one.moved for one in followed)

    def _sent(self, exchange: Exchange[Any]) -> Tensors | Callable[[int], Tensors | None] | None:
        """What the exchange sends, carried back to clients' own widths; beside these, nothing to those that are new."""
        params = exchange.params
        if not self.plans or params is None:
            return params

        def sent(client_id: int) -> Tensors | None:
            model, plans = exchange.sent(client_id), self.plans.get(str(client_id))
            if model is None or str(client_id) not in self.known:
                return None
            return model if plans is None else transport(self.symmetry, model, reverse(plans))

        return sent

    def _carried(
        self, updates: Sequence[ClientUpdate]
    ) -> Generator[Exchange[Any], Any, tuple[Tensors, list[_Carried]]]:
        """The last reference, and the clients in its units; who falls silent is left out."""
        reference, carried = self.model.params if self.rounds else self._chosen(updates), list[_Carried]()
        for _ in range(self.method.iterations):
            reference = mean([one.moved.params for one in carried]) if carried else reference
            correlations = yield from self._correlations(updates, reference)
            updates = [update for update in updates if update.client_id in correlations]
            carried = [self._one(update, reference, correlations[update.client_id]) for update in updates]
        return reference, carried

    def _chosen(self, updates: Sequence[ClientUpdate]) -> Tensors:
        """The client's model whose widths and units the merged one takes."""
        parameters = [sum(value.numel() for value in update.params.values()) for update in updates]
        return updates[0 if self.method.reference == "first" else parameters.index(max(parameters))].params

    def _correlations(
        self, updates: Sequence[ClientUpdate], reference: Tensors
    ) -> Generator[Exchange[Any], Any, Mapping[int, Tensors]]:
        """Of each client's units with the reference's, by client, if they are compared by activations."""
        if self.method.cost == "weights":
            return {update.client_id: {} for update in updates}
        trained = {update.client_id: update.params for update in updates}
        measured = yield from Exchange(
            task="measure", params=trained.__getitem__, anchor=reference, request=ASKED, fold=collect
        )
        return {update.client_id: update.cross_moments for update in measured}

    def _one(self, update: ClientUpdate, reference: Tensors, correlations: Tensors) -> _Carried:
        if update.params is reference:
            return _Carried(update, update, Planned({}))
        planned = self.planner.plans(update.params, reference, correlations)
        return _Carried(update, transport_update(self.symmetry, update, planned.plans, self.method.outgoing), planned)

    def _start(self, reference: Tensors) -> Tensors:
        """θ_t in the reference's widths."""
        if self.symmetry.sizes(self.model.params) == self.symmetry.sizes(reference):
            return self.model.params
        plans = self.planner.plans(self.model.params, reference).plans
        return transport(self.symmetry, self.model.params, plans)

    def _note(self, carried: Sequence[_Carried], followed: Sequence[_Carried], reference: Tensors) -> None:
        """Remembers the plans of clients of other widths, and what the record tells."""
        sizes = self.symmetry.sizes(reference)
        self.known |= {str(one.update.client_id) for one in carried}
        for update, _, planned in carried:
            if self.symmetry.sizes(update.params) != sizes:
                self.plans[str(update.client_id)] = {group: plan.float() for group, plan in planned.plans.items()}
        if followed and self.model.probe is not None:
            self.diagnosis.start = followed[0].moved.params
        approximate = sum(not one.exact and bool(one.moved.grad_sum or one.moved.sq_grad_sum) for one in followed)
        self.record = {
            **means([self._measured(one, reference) for one in carried if one.planned.plans]),
            "approximate_statistics": approximate / max(1, len(followed)),
            "left_out": len(carried) - len(followed),
        }

    def _measured(self, one: _Carried, reference: Tensors) -> dict[str, float]:
        """As of other alignments; −Σ ⟨T, C⟩ is the objective, and there is no distance between widths."""

        def distance(params: Tensors) -> float:
            return float(norm(steps(self.model.names, params, reference).values()))

        alike = all(one.update.params[name].shape == reference[name].shape for name in self.model.names)
        return {
            "matching_objective_before": -one.planned.before,
            "matching_objective": -one.planned.after,
            "units_moved": one.planned.moved_share,
            "distance": distance(one.moved.params),
            **({"distance_before": distance(one.update.params)} if alike else {}),
        }


def mean(cohort: Sequence[Tensors]) -> Tensors:
    """The mean of models of equal widths; integers are the first one's."""
    return {
        name: torch.stack([one[name].double() for one in cohort]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in cohort[0].items()
    }


def means(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each number over those that have it."""
    names = dict.fromkeys(name for one in measured for name in one)
    return {name: fmean(one[name] for one in measured if name in one) for name in names}
