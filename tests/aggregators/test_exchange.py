"""Rounds, and what transforms them. A toy algebra stands in for models: an update is its client's id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import TwoExchanges, ask, clients, fingerprint, global_model, updates

from aggregators.core.exchange import (
    Back,
    Exchange,
    Fold,
    LostRound,
    Round,
    both,
    collect,
    premap,
    premap_cohort,
    rewrap,
    run,
    tee,
)
from aggregators.core.registry import parse
from aggregators.core.update import ClientUpdate, Gradients, Merged, Request

total: Fold[int, int] = Fold(
    init=lambda: 0,
    accumulate=lambda state, update: state + update.num_examples,
    combine=lambda a, b: a + b,
    finalize=lambda state: state,
)
ids: Fold[list[int], list[int]] = Fold(
    init=list,
    accumulate=lambda state, update: [*state, update.client_id],
    combine=lambda a, b: a + b,
    finalize=lambda state: state,
)


def update(client_id: int, num_examples: int = 1) -> ClientUpdate:
    return ClientUpdate(client_id=client_id, num_examples=num_examples)


def answers(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
    """Clients 3, 1 and 2, with 30, 10 and 20 examples."""
    return (update(i, 10 * i) for i in (3, 1, 2))


def asking(
    task: Literal["train", "measure", "evaluate"] = "train", fold: Fold[Any, Any] = total, **settings: Any
) -> Exchange[Any]:
    return Exchange(task=task, params={}, fold=fold, **settings)


def two_questions() -> Round:
    """Trains, then measures; its metrics are both answers."""
    first = yield from asking("train")
    second = yield from asking("measure")
    return Merged({}, metrics={"first": first, "second": second})


def asked(round: Round) -> list[Exchange[Any]]:
    """The exchanges that a round asks."""
    seen: list[Exchange[Any]] = []

    def noting(exchange: Exchange[Any]) -> Iterable[ClientUpdate]:
        seen.append(exchange)
        return answers(exchange)

    run(round, noting)
    return seen


def test_a_round_ends_with_the_answers_to_all_its_exchanges() -> None:
    assert run(two_questions(), answers).metrics == {"first": 60, "second": 60}
    assert [exchange.task for exchange in asked(two_questions())] == ["train", "measure"]


def test_the_second_question_may_depend_on_the_first_answer() -> None:
    model = global_model()
    method = TwoExchanges(inner=parse("fedavg"), learning_rate=1.0)
    mean = parse("fedavg").aggregate(model, updates(model)).params
    merged = run(method.round(model), ask(clients(model)))
    slopes = merged.memory["slope"]
    assert isinstance(slopes, dict)
    for name in model.names:  # measured at the mean of the clients, not where they ended
        torch.testing.assert_close(merged.params[name], (mean[name] - slopes[name]).to(mean[name].dtype))


def test_an_exchange_asks_for_the_next_update_only_when_the_last_is_folded() -> None:
    order: list[str] = []

    def coming() -> Iterator[ClientUpdate]:
        for i in range(3):
            order.append(f"asked {i}")
            yield update(i)

    def noting(state: list[int], update: ClientUpdate) -> list[int]:
        order.append(f"folded {update.client_id}")
        return state

    asking(fold=replace(ids, accumulate=noting)).answer(coming())
    assert order == [f"{what} {i}" for i in range(3) for what in ("asked", "folded")]


@given(st.integers(0, 5), st.integers(0, 5))
def test_too_few_updates_lose_the_round(number: int, needed: int) -> None:
    exchange = asking(fold=ids, min_updates=needed)
    if number >= needed:
        assert exchange.answer(map(update, range(number))) == list(range(number))
    else:
        with pytest.raises(LostRound, match=f"{number} good replies, the method needs at least {needed}"):
            exchange.answer(map(update, range(number)))


def test_too_few_updates_are_not_finalized() -> None:
    never = replace(ids, finalize=lambda state: pytest.fail("finalized"))
    with pytest.raises(LostRound):
        asking(fold=never).answer([])


@pytest.mark.parametrize("failure", [LostRound, OSError])
def test_nothing_is_thrown_into_a_round(failure: type[Exception]) -> None:
    caught: list[Exception] = []

    def wary() -> Round:
        try:
            yield from asking()
        except Exception as error:
            caught.append(error)
        return Merged({})

    def failing(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        yield update(1)
        raise failure

    for round in (wary(), rewrap(wary(), lambda exchange: (exchange, lambda answer: answer)), premap(wary(), second)):
        with pytest.raises(failure):
            run(round, failing)
    assert caught == []


def second(exchange: Exchange[Any], update: ClientUpdate) -> ClientUpdate:
    return update


def test_what_a_client_was_sent_is_known() -> None:
    one, two = {"a": torch.ones(1)}, {"a": torch.zeros(1)}
    assert asking().sent(3) == {}
    assert replace(asking(), params=lambda client_id: one if client_id == 1 else two).sent(1) is one
    assert replace(asking(), params=lambda client_id: one if client_id == 1 else two).sent(2) is two
    assert replace(asking(), params=None).sent(1) is None


@given(st.lists(st.integers(0, 99), unique=True, max_size=6), st.integers(0, 6))
def test_collected_updates_come_sorted_by_client_however_split(arrived: list[int], cut: int) -> None:
    def folded(part: Iterable[int]) -> list[ClientUpdate]:
        state = collect.init()
        for client_id in part:
            state = collect.accumulate(state, update(client_id))
        return state

    found = collect.finalize(collect.combine(folded(arrived[:cut]), folded(arrived[cut:])))
    assert [u.client_id for u in found] == sorted(arrived)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.integers(0, 6))
def test_both_folds_give_what_each_gives(arrived: list[int], cut: int) -> None:
    pair = both(ids, total)
    state, other = pair.init(), pair.init()
    for number in arrived[:cut]:
        state = pair.accumulate(state, update(number, number))
    for number in arrived[cut:]:
        other = pair.accumulate(other, update(number, number))
    assert pair.finalize(pair.combine(state, other)) == (arrived, sum(arrived))


# --- rewrap -----------------------------------------------------------------------------------------------------


def test_rewrap_changes_every_question_and_every_answer() -> None:
    def change(exchange: Exchange[Any]) -> tuple[Exchange[Any], Back]:
        return replace(exchange, min_updates=2), lambda answer: -answer

    assert [exchange.min_updates for exchange in asked(rewrap(two_questions(), change))] == [2, 2]
    assert run(rewrap(two_questions(), change), answers).metrics == {"first": -60, "second": -60}


def test_rewrapping_with_nothing_changes_nothing() -> None:
    model = global_model()
    method = TwoExchanges(inner=parse("fisher"))
    plain = run(method.round(model), ask(clients(model)))
    same = run(rewrap(method.round(model), lambda exchange: (exchange, lambda answer: answer)), ask(clients(model)))
    assert fingerprint(same) == fingerprint(plain)


# --- premap -----------------------------------------------------------------------------------------------------


def doubled(exchange: Exchange[Any], update: ClientUpdate) -> ClientUpdate:
    return replace(update, num_examples=2 * update.num_examples)


def one_more(exchange: Exchange[Any], update: ClientUpdate) -> ClientUpdate:
    return replace(update, num_examples=update.num_examples + 1)


def test_premap_maps_the_updates_of_train_exchanges_only() -> None:
    assert run(premap(two_questions(), doubled), answers).metrics == {"first": 120, "second": 60}


def test_an_outer_premap_sees_updates_before_an_inner_one() -> None:
    assert run(premap(premap(two_questions(), one_more), doubled), answers).metrics["first"] == 2 * 60 + 3
    assert run(premap(premap(two_questions(), doubled), one_more), answers).metrics["first"] == 2 * (60 + 3)


def test_premap_hands_over_the_exchange_that_was_asked() -> None:
    starts: list[Any] = []

    def noting(exchange: Exchange[Any], update: ClientUpdate) -> ClientUpdate:
        starts.append((update.client_id, exchange.sent(update.client_id)))
        return update

    def personal() -> Round:
        yield from replace(asking(), params=lambda client_id: {"a": torch.tensor(client_id)})
        return Merged({})

    run(premap(personal(), noting), answers)
    assert starts == [(i, {"a": torch.tensor(i)}) for i in (3, 1, 2)]


def test_premap_counts_updates_as_they_came() -> None:
    def needs_four() -> Round:
        yield from asking(min_updates=4)
        return Merged({})

    with pytest.raises(LostRound, match="3 good replies"):
        run(premap(needs_four(), doubled), answers)


MORE = Request(gram=True)
SQUARES = Request(gradients=Gradients(squares=True))


@pytest.mark.parametrize("wrapped", ["premap", "premap_cohort", "tee"])
def test_a_wrappers_request_is_added_to_train_exchanges_only(wrapped: str) -> None:
    def squares_asked() -> Round:
        yield from asking("train", request=SQUARES)
        yield from asking("measure", request=SQUARES)
        return Merged({})

    def wrapper() -> Round:
        if wrapped == "tee":
            merged, _ = yield from tee(squares_asked(), ids, MORE)
            return merged
        if wrapped == "premap":
            return (yield from premap(squares_asked(), doubled, MORE))
        return (yield from premap_cohort(squares_asked(), list, MORE))

    assert [exchange.request for exchange in asked(wrapper())] == [SQUARES | MORE, SQUARES]


# --- premap_cohort ----------------------------------------------------------------------------------------------


def test_collected_updates_come_in_the_order_of_names_whatever_ids_a_server_gives() -> None:
    arrived = [replace(update(number), name=name) for number, name in ((7, "b"), (9, "a"), (3, "b"), (5, ""))]
    assert [one.client_id for one in collect.finalize(arrived)] == [5, 9, 3, 7]


def test_premap_cohort_maps_the_sorted_cohort_of_train_exchanges_only() -> None:
    seen: list[list[int]] = []

    def but_first(updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        seen.append([update.client_id for update in updates])
        return updates[1:]

    assert run(premap_cohort(two_questions(), but_first), answers).metrics == {"first": 50, "second": 60}
    assert seen == [[1, 2, 3]]


def test_a_filter_that_leaves_too_few_loses_the_round() -> None:
    with pytest.raises(LostRound, match="0 good replies"):
        run(premap_cohort(two_questions(), lambda updates: []), answers)


def test_premap_and_premap_cohort_nest_either_way() -> None:
    def but_first(updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        return updates[1:]

    assert run(premap(premap_cohort(two_questions(), but_first), doubled), answers).metrics["first"] == 100
    assert run(premap_cohort(premap(two_questions(), doubled), but_first), answers).metrics["first"] == 100


# --- tee --------------------------------------------------------------------------------------------------------


def test_tee_folds_the_answers_of_the_last_train_exchange_a_second_time() -> None:
    def three_questions() -> Round:
        first = yield from asking("train")
        second = yield from asking("train", fold=ids)
        third = yield from asking("evaluate")
        return Merged({}, metrics={"first": first, "second": len(second), "third": third})

    batches = iter([[1, 2], [5, 4, 3], [6]])
    merged, again = finished(tee(three_questions(), ids), lambda exchange: map(update, next(batches)))
    assert merged.metrics == {"first": 2, "second": 3, "third": 1}
    assert again == [5, 4, 3]


def test_tee_sees_updates_before_the_inners_own_map() -> None:
    merged, again = finished(tee(premap(two_questions(), doubled), total), answers)
    assert merged.metrics["first"] == 120
    assert again == 60


def test_tee_of_a_round_that_does_not_train_is_refused() -> None:
    def only_measures() -> Round:
        yield from asking("measure")
        return Merged({})

    with pytest.raises(ValueError, match="tee needs a round that trains"):
        finished(tee(only_measures(), ids), answers)


def finished(round: Any, ask: Any) -> Any:
    """What any generator of exchanges returns."""
    return run(round, ask)


# --- aggregate --------------------------------------------------------------------------------------------------


def test_a_round_of_one_exchange_is_run_in_one_call() -> None:
    model = global_model()
    called = parse("fisher").aggregate(model, updates(model, SQUARES))
    assert fingerprint(called) == fingerprint(run(parse("fisher").round(model), ask(clients(model))))


def test_a_round_of_two_exchanges_is_refused_in_one_call() -> None:
    model = global_model()
    with pytest.raises(ValueError, match="toys:TwoExchanges asks its clients more than once"):
        TwoExchanges(inner=parse("fedavg")).aggregate(model, updates(model))


def test_parts_are_a_method_and_all_within_it() -> None:
    method = parse({"kind": "norm_clip", "inner": {"kind": "fedavgm", "inner": "fisher"}})
    assert [part.kind for part in method.parts()] == ["norm_clip", "fedavgm", "fisher"]
