"""What every method is: a round; and the two shapes of one-exchange rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeAlias, final

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from .exchange import Exchange, Fold, LostRound, Question, Round, collect, run
from .tensors import add_scaled_, like, zeros
from .update import ClientUpdate, GlobalModel, Merged, Request


class Aggregator(BaseModel, ABC):
    """An aggregation method: a pure description of a round. Its fields are its hyper-parameters.

    `kind`, a Literal in every final class, is its name in configuration. `needs` names what the server must provide:
    "probe" (held-out data), "shared_start" (clients that start from the server's model), "symmetry" (the permutations
    that the task's network admits), "widths" (beside it: clients' networks of other widths than θ_t's, as they begin
    from their own or are sent, and a θ_{t+1} of others), "growth" (beside it: a θ_{t+1} of widths that no client had).
    `examples` are further settings under which the contract suite tries the method, `inners` what it tries a wrapper
    with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    needs: ClassVar[frozenset[str]] = frozenset()
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ()
    inners: ClassVar[Sequence[str]] = ("fedavg", "fisher")

    @abstractmethod
    def round(self, model: GlobalModel) -> Round:
        """The round that starts from `model`: yields exchanges, is sent their folded answers, returns Merged."""

    def questions(self) -> Iterator[Question]:
        """What its round asks, exchange by exchange, once where a network's depth tells how often.

        What the methods within it ask, where a class declares nothing.
        """
        for name in type(self).model_fields:
            if isinstance(part := getattr(self, name), Aggregator):
                yield from part.questions()

    @final
    def parts(self) -> Iterator[Aggregator]:
        """This method, and those within it."""
        yield self
        for name in type(self).model_fields:
            if isinstance(part := getattr(self, name), Aggregator):
                yield from part.parts()

    @final
    def needed(self) -> frozenset[str]:
        """What it and those within it need."""
        return frozenset[str]().union(*(part.needs for part in self.parts()))

    @final
    def aggregate(self, model: GlobalModel, updates: Iterable[ClientUpdate]) -> Merged:
        """A one-exchange round in one call; ValueError for a method that asks its clients more than once."""
        cohorts = iter([updates])

        def ask(exchange: Exchange[Any]) -> Iterable[ClientUpdate]:
            for cohort in cohorts:
                return cohort
            raise ValueError(f"{self.kind} asks its clients more than once: run it in a federation")

        return run(self.round(model), ask)


BUFFERS = "(buffers)"  # the base's own sum


class Term(NamedTuple):
    """scale · factor · value, to be added to the sum called `sum` of the parameter `name`."""

    sum: str
    name: str
    scale: float
    value: Tensor
    factor: Tensor | None = None


@dataclass(eq=False)
class Sum:
    """Σ scale · factor · value in float64, and Σ scale."""

    total: Tensor
    scale: float = 0.0

    def mean(self) -> Tensor:
        """The weighted mean total / scale, in place of the total; LostRound when the weights sum to 0."""
        if self.scale <= 0:
            raise LostRound("the clients' weights sum to 0: give at least one a positive weight")
        return self.total.div_(self.scale)


Sums: TypeAlias = Mapping[str, Mapping[str, Sum]]


@dataclass(eq=False)
class SumState:
    """The sums of a partial cohort by sum and parameter, and its integer buffers' maxima."""

    sums: dict[str, dict[str, Sum]] = field(default_factory=dict)
    counters: dict[str, Tensor] = field(default_factory=dict)

    def add(self, term: Term) -> None:
        """Adds one client's term."""
        sum = self._sum(term.sum, term.name, term.value)
        add_scaled_(sum.total, term.scale, term.value, term.factor)
        sum.scale += term.scale

    def add_buffers(self, model: GlobalModel, update: ClientUpdate) -> None:
        """Adds one client's buffers, weighted by its examples."""
        for name in model.buffers:
            value = update.params[name]
            if value.is_floating_point():
                self.add(Term(BUFFERS, name, update.num_examples, value))
            else:
                self.highest(name, value)

    def buffers(self) -> dict[str, Tensor]:
        """The means of float buffers and the maxima of integer ones; consumes their sums."""
        return {name: sum.mean() for name, sum in self.sums.pop(BUFFERS, {}).items()} | self.counters

    def highest(self, name: str, value: Tensor) -> None:
        """Keeps the larger of two counters, in their dtype."""
        self.counters[name] = torch.maximum(self.counters.get(name, value), value)

    def combine(self, other: SumState) -> SumState:
        """Both partial cohorts as one: the sums add, the counters take their maximum."""
        for key, sums in other.sums.items():
            for name, theirs in sums.items():
                mine = self._sum(key, name, theirs.total)
                mine.total.add_(theirs.total)
                mine.scale += theirs.scale
        for name, value in other.counters.items():
            self.highest(name, value)
        return self

    def _sum(self, key: str, name: str, value: Tensor) -> Sum:
        sums = self.sums.setdefault(key, {})
        if name not in sums:
            sums[name] = Sum(zeros(value.shape, value.device))
        return sums[name]


def mean_buffers(model: GlobalModel, updates: Iterable[ClientUpdate]) -> dict[str, Tensor]:
    """The buffers of a cohort held at once, as a SumAggregator merges them: means, and maxima of integers."""
    state = SumState()
    for update in updates:
        state.add_buffers(model, update)
    return state.buffers()


class SumAggregator(Aggregator, ABC):
    """A method that is a ratio or solve of sums over clients: streams, combines, and can be summed securely."""

    @property
    @abstractmethod
    def request(self) -> Request:
        """What clients compute besides params."""

    @abstractmethod
    def terms(self, model: GlobalModel, update: ClientUpdate) -> Iterator[Term]:
        """What this client adds to each sum of each trainable parameter."""

    @abstractmethod
    def finish(self, model: GlobalModel, sums: Sums) -> Merged:
        """The trainable parameters, of any float dtype; may consume the sums."""

    @final
    def questions(self) -> Iterator[Question]:
        """One: to train."""
        yield Question("train", self.request)

    @final
    def round(self, model: GlobalModel) -> Round:
        """One train exchange, folded into sums."""
        merged = yield from Exchange(task="train", params=model.params, request=self.request, fold=self._fold(model))
        return merged

    @final
    def _fold(self, model: GlobalModel) -> Fold[SumState, Merged]:

        def accumulate(state: SumState, update: ClientUpdate) -> SumState:
            for term in self.terms(model, update):
                state.add(term)
            state.add_buffers(model, update)
            return state

        def finalize(state: SumState) -> Merged:
            buffers = state.buffers()
            merged = self.finish(model, state.sums)
            return merged._replace(params=like(model.params, {**merged.params, **buffers}))

        return Fold(init=SumState, accumulate=accumulate, combine=SumState.combine, finalize=finalize)


class CohortAggregator(Aggregator, ABC):
    """A method that needs the whole cohort at once: holds every update until the last has come."""

    @property
    @abstractmethod
    def request(self) -> Request:
        """What clients compute besides params."""

    @property
    @abstractmethod
    def min_updates(self) -> int:
        """The fewest updates that the method can merge."""

    @abstractmethod
    def merge(self, model: GlobalModel, updates: Sequence[ClientUpdate]) -> Merged:
        """Every name of the model, buffers too, from the updates sorted by client, its name and id."""

    @final
    def questions(self) -> Iterator[Question]:
        """One: to train."""
        yield Question("train", self.request)

    @final
    def round(self, model: GlobalModel) -> Round:
        """One train exchange, collected."""
        updates = yield from Exchange(
            task="train",
            params=model.params,
            request=self.request,
            min_updates=self.min_updates,
            fold=collect,
        )
        merged = self.merge(model, updates)
        return merged._replace(params=like(model.params, merged.params))
