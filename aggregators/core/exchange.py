"""Rounds as generators of exchanges, and what transforms a round."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import JsonValue

from .update import ClientUpdate, Merged, Request, Tensors

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
Q = TypeVar("Q")
Work: TypeAlias = Literal["train", "measure", "evaluate"]


class LostRound(Exception):
    """The round cannot be finished with these answers: θ_t stands."""


@dataclass(frozen=True, eq=False)
class Fold(Generic[S, R]):
    """How answers become one: a state, what each update adds to it, and what it ends as.

    Bound to its model when made; may consume its states, never touches an update.
    """

    init: Callable[[], S]
    accumulate: Callable[[S, ClientUpdate], S]
    combine: Callable[[S, S], S]
    finalize: Callable[[S], R]


collect: Fold[list[ClientUpdate], list[ClientUpdate]] = Fold(
    init=list,
    accumulate=lambda updates, update: [*updates, update],
    combine=lambda a, b: a + b,
    finalize=lambda updates: sorted(updates, key=lambda update: (update.name, update.client_id)),
)


def both(a: Fold[S, R], b: Fold[T, Q]) -> Fold[tuple[S, T], tuple[R, Q]]:
    """The fold that runs `a` and `b` side by side over the same updates."""
    return Fold(
        init=lambda: (a.init(), b.init()),
        accumulate=lambda s, update: (a.accumulate(s[0], update), b.accumulate(s[1], update)),
        combine=lambda s, t: (a.combine(s[0], t[0]), b.combine(s[1], t[1])),
        finalize=lambda s: (a.finalize(s[0]), b.finalize(s[1])),
    )


class Question(NamedTuple):
    """What an exchange asks of each client: the task, and what to compute besides params."""

    task: Work
    request: Request = Request()


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange(Generic[R]):
    """One question to the cohort, and the fold of its answers.

    `params` is what clients receive: one model for all, one per client, or None when each starts from its own; for a
    client that the method does not know it may say None too, which the run's start replaces: θ_t, or its own. `anchor`
    is the model that their cross-moments compare with, None for the one received. `min_updates` is what the method
    needs, beside the run's quorum. `training` overrides local training.
    """

    task: Work
    params: Tensors | Callable[[int], Tensors | None] | None
    anchor: Tensors | None = None
    fold: Fold[Any, R]
    request: Request = field(default_factory=Request)
    min_updates: int = 1
    frozen: frozenset[str] = frozenset()
    training: Mapping[str, JsonValue] = field(default_factory=dict)

    def __iter__(self) -> Generator[Exchange[R], Any, R]:
        """What makes `answer = yield from exchange` know the answer's type, as `yield exchange` does not."""
        answer: R = yield self
        return answer

    def answer(self, updates: Iterable[ClientUpdate]) -> R:
        """The fold of `updates`, each dropped before the next is asked for; LostRound when there are too few."""
        state, number = self.fold.init(), 0
        for update in updates:
            state = self.fold.accumulate(state, update)
            number += 1
            del update
        if number < self.min_updates:
            raise LostRound(f"{number} good replies, the method needs at least {self.min_updates}")
        return self.fold.finalize(state)

    def sent(self, client_id: int) -> Tensors | None:
        """What that client started from; None when it was its own."""
        return self.params(client_id) if callable(self.params) else self.params


Round: TypeAlias = Generator[Exchange[Any], Any, Merged]
Back: TypeAlias = Callable[[Any], Any]
Change: TypeAlias = Callable[[Exchange[Any]], tuple[Exchange[Any], Back]]


def run(round: Round, ask: Callable[[Exchange[Any]], Iterable[ClientUpdate]]) -> Merged:
    """What `round` ends with when `ask` yields the cohort's answers; nothing is ever thrown into a round."""
    answer: Any = None
    while True:
        try:
            exchange = round.send(answer)
        except StopIteration as stop:
            merged: Merged = stop.value
            return merged
        answer = exchange.answer(ask(exchange))


def rewrap(round: Round, change: Change) -> Round:
    """The round with every exchange, and its answer, passed through `change`."""
    answer: Any = None
    while True:
        try:
            exchange = round.send(answer)
        except StopIteration as stop:
            merged: Merged = stop.value
            return merged
        changed, back = change(exchange)
        answer = back((yield changed))


def _on_train(change: Change) -> Change:
    return lambda exchange: change(exchange) if exchange.task == "train" else (exchange, lambda answer: answer)


def premap(
    round: Round, f: Callable[[Exchange[Any], ClientUpdate], ClientUpdate], request: Request = Request()
) -> Round:
    """The round with f(exchange, update) in place of each update of a train exchange, before the fold sees it."""

    def change(exchange: Exchange[Any]) -> tuple[Exchange[Any], Back]:
        def accumulate(state: Any, update: ClientUpdate) -> Any:
            return exchange.fold.accumulate(state, f(exchange, update))

        fold = replace(exchange.fold, accumulate=accumulate)
        return replace(exchange, fold=fold, request=exchange.request | request), lambda answer: answer

    return rewrap(round, _on_train(change))


def premap_cohort(
    round: Round, f: Callable[[Sequence[ClientUpdate]], Sequence[ClientUpdate]], request: Request = Request()
) -> Round:
    """The round with f(updates, sorted by name and id) in place of a train exchange's updates; holds them all."""

    def change(exchange: Exchange[Any]) -> tuple[Exchange[Any], Back]:
        asked = replace(exchange, fold=collect, request=exchange.request | request)
        return asked, lambda updates: exchange.answer(f(updates))

    return rewrap(round, _on_train(change))


def tee(
    round: Round, fold: Fold[Any, R], request: Request = Request()
) -> Generator[Exchange[Any], Any, tuple[Merged, R]]:
    """The round's end, and `fold` over the answers of its last train exchange."""
    seconds: list[R] = []

    def change(exchange: Exchange[Any]) -> tuple[Exchange[Any], Back]:
        def back(answers: tuple[Any, R]) -> Any:
            seconds[:] = [answers[1]]
            return answers[0]

        return replace(exchange, fold=both(exchange.fold, fold), request=exchange.request | request), back

    merged = yield from rewrap(round, _on_train(change))
    if not seconds:
        raise ValueError("tee needs a round that trains: this one made no train exchange")
    return merged, seconds[0]
