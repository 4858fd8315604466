"""Flower's grid as a transport: replies one at a time, tasks that are lost asked again, nothing ends the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from server_toys import FakeGrid, Outcome, flower_process

from server import grid as module
from server.grid import (
    ATTEMPTS,
    AWAY,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LOST,
    MESSAGE_TYPES,
    PULLS,
    ROLL_CALL,
    Reply,
    StreamingGrid,
    Terms,
)
from server.telemetry import LONGEST

FOREVER = float("inf")
DEADLINE = 60.0


@pytest.fixture(autouse=True)
def _in_a_flower_process() -> Iterator[None]:
    with flower_process():
        yield


def good(after: float) -> Outcome:
    return after, RecordDict({"answer": ConfigRecord({"after": after})})


def bad(after: float, code: int, reason: str | None = "it broke") -> Outcome:
    return after, Error(code, reason)


def replies(grid: FakeGrid, cohort: list[int], deadline: float = DEADLINE, **terms: Any) -> list[Reply]:
    streaming = StreamingGrid(grid, clock=grid.clock, sleep=grid.sleep)
    return list(streaming.ask("train", lambda client_id: RecordDict(), cohort, Terms(deadline, **terms)))


def answered(of: list[Reply]) -> list[int]:
    return [reply.client_id for reply in of if reply.content is not None]


def reasons(of: list[Reply]) -> dict[int, str]:
    return {reply.client_id: reply.error for reply in of if reply.content is None}


def pushes(grid: FakeGrid) -> Counter[int]:
    return Counter(node for _, node in grid.pushed)


# --- as it should be ------------------------------------------------------------------------------------------------


def test_nodes_are_the_connected_ones_sorted() -> None:
    grid = FakeGrid({2**63 + 5: [], 1: [], 7: []}, presence={7: [(5.0, 9.0)]})
    assert StreamingGrid(grid).nodes() == [1, 2**63 + 5]


def test_replies_come_one_by_one_in_order_of_arrival() -> None:
    grid = FakeGrid({1: [good(9)], 2: [good(1)], 3: [good(5)]})
    assert answered(replies(grid, [1, 2, 3])) == [2, 3, 1]


def test_a_reply_is_yielded_when_it_is_there_not_when_the_last_has_come() -> None:
    grid = FakeGrid({1: [good(50)], 2: [good(1)]})
    streaming = StreamingGrid(grid, clock=grid.clock, sleep=grid.sleep)
    first = next(streaming.ask("train", lambda client_id: RecordDict(), [1, 2], Terms(DEADLINE)))
    assert first.client_id == 2
    assert grid.now < 1 + LONGEST_PAUSE


def test_the_content_of_a_reply_is_the_clients() -> None:
    (reply,) = replies(FakeGrid({4: [good(2.5)]}), [4])
    assert reply.content is not None
    assert reply.content["answer"]["after"] == 2.5


def test_each_client_is_sent_its_own_content() -> None:
    grid = FakeGrid({1: [], 2: []})
    streaming = StreamingGrid(grid, clock=grid.clock, sleep=grid.sleep)
    terms = Terms(1.0)
    list(streaming.ask("train", lambda client: RecordDict({"for": ConfigRecord({"client": client})}), [1, 2], terms))
    sent = {message.metadata.dst_node_id: message.content["for"]["client"] for _, message, _ in grid.messages.values()}
    assert sent == {1: 1, 2: 2}


@pytest.mark.parametrize("kind", MESSAGE_TYPES)
def test_an_exchange_is_sent_as_the_message_that_the_client_app_listens_for(kind: str) -> None:
    grid = FakeGrid({1: []})
    streaming = StreamingGrid(grid, clock=grid.clock, sleep=grid.sleep)
    list(streaming.ask(kind, lambda client: RecordDict(), [1], Terms(1.0)))
    ((_, message, _),) = grid.messages.values()
    assert message.metadata.message_type == {"train": "train", "measure": "query", "evaluate": "evaluate"}[kind]


def test_a_message_lives_no_longer_than_the_deadline() -> None:
    grid = FakeGrid({1: []})
    replies(grid, [1], deadline=7.0)
    ((_, message, _),) = grid.messages.values()
    assert message.metadata.ttl == 7.0


def test_at_most_one_message_is_alive_at_a_time() -> None:
    grid = FakeGrid({node: [good(1)] for node in range(1, 9)})
    streaming = StreamingGrid(grid, clock=grid.clock, sleep=grid.sleep)
    for reply in streaming.ask("train", lambda client_id: RecordDict(), list(grid.plans), Terms(DEADLINE)):
        assert sum(ref() is not None for ref in grid.alive) <= 1
        del reply
    assert len(grid.alive) == 8
    assert grid.most_alive == 0  # at a pull, the reply before it is gone


def test_an_empty_cohort_is_answered_at_once() -> None:
    grid = FakeGrid({1: [good(1)]})
    assert replies(grid, []) == []
    assert (grid.pushed, grid.sleeps) == ([], [])


# --- waiting --------------------------------------------------------------------------------------------------------


def test_waiting_is_no_busy_loop() -> None:
    grid = FakeGrid({1: [good(50)]})
    replies(grid, [1])
    assert all(FIRST_PAUSE <= pause <= LONGEST_PAUSE for pause in grid.sleeps)
    assert len(grid.sleeps) < 50 / LONGEST_PAUSE + 20
    assert grid.pulls <= len(grid.sleeps) + 1


def test_pauses_grow_while_nothing_comes_and_start_anew_when_something_does() -> None:
    grid = FakeGrid({1: [good(20)], 2: [good(40)]})
    replies(grid, [1, 2])
    shortest = [index for index, pause in enumerate(grid.sleeps) if pause == FIRST_PAUSE]
    assert len(shortest) == 1  # right after the first of the two came
    assert sorted(grid.sleeps[: shortest[0]]) == grid.sleeps[: shortest[0]]


def test_a_quick_reply_is_not_waited_for_long() -> None:
    grid = FakeGrid({1: [good(0.2)]})
    replies(grid, [1])
    assert grid.now < 0.5


def test_who_has_not_answered_by_the_deadline_is_late() -> None:
    grid = FakeGrid({1: [good(3)], 2: [good(61)], 3: [None]})
    got = replies(grid, [1, 2, 3])
    assert answered(got) == [1]
    assert reasons(got) == {2: "late: no reply within 60 s", 3: "late: no reply within 60 s"}
    assert grid.now == DEADLINE


def test_a_message_that_has_expired_is_not_pulled() -> None:
    """The simulation's grid raises KeyError then, and would end the run; a slow fold can bring it about."""
    grid = FakeGrid({1: [good(1)], 2: [good(1)]})
    streaming = StreamingGrid(grid, clock=grid.clock, sleep=grid.sleep)
    got = []
    for reply in streaming.ask("train", lambda client_id: RecordDict(), [1, 2], Terms(DEADLINE)):
        got.append(reply)
        pulls, grid.now = grid.pulls, DEADLINE + 1
    assert answered(got) == [1]
    assert reasons(got) == {2: "late: no reply within 60 s"}
    assert grid.pulls == pulls


# --- uploads that do not end ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Wedged(FakeGrid):
    """A grid on which pulling the replies of some nodes takes until they are `uploaded`, as real time goes."""

    slow: set[int] = field(default_factory=set)
    uploaded: Event = field(default_factory=Event)
    begun: int = 0
    ended: int = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (id,) = message_ids
        if id in self.messages and self.messages[id][1].metadata.dst_node_id in self.slow:
            self.begun += 1
            try:
                assert self.uploaded.wait(20)
            finally:
                self.ended += 1
        return super().pull_messages([id])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.02)


@pytest.mark.usefixtures("impatient")
def test_an_upload_that_does_not_end_makes_no_other_reply_late() -> None:
    grid = Wedged({1: [good(1)], 2: [good(5)], 3: [good(6)]}, slow={1})
    got = replies(grid, [1, 2, 3])
    grid.uploaded.set()
    assert answered(got) == [2, 3]
    assert reasons(got) == {1: "late: no reply within 60 s"}


@pytest.mark.usefixtures("impatient")
def test_a_slow_upload_is_a_reply_when_it_has_ended() -> None:
    grid = Wedged({1: [good(1)], 2: [good(5)]}, slow={1})
    streaming = StreamingGrid(grid, clock=grid.clock, sleep=grid.sleep)
    got = []
    for reply in streaming.ask("train", lambda client_id: RecordDict(), [1, 2], Terms(FOREVER)):
        got.append(reply)
        grid.uploaded.set()
    assert answered(got) == [2, 1]


@pytest.mark.usefixtures("impatient")
def test_a_node_that_restarts_in_its_upload_is_asked_again_before_that_is_given_up() -> None:
    grid = Wedged({1: [good(1), good(3)], 2: [good(5)]}, presence={1: [(0, 10), (20, FOREVER)]}, slow={1})

    def back(seconds: float) -> None:
        FakeGrid.sleep(grid, seconds)
        if len(grid.pushed) == 3:
            grid.slow.clear()

    streaming = StreamingGrid(grid, clock=grid.clock, sleep=back)
    got = list(streaming.ask("train", lambda client_id: RecordDict(), [1, 2], Terms(DEADLINE)))
    grid.uploaded.set()
    assert answered(got) == [2, 1]
    assert pushes(grid) == {1: 2, 2: 1}


@pytest.mark.usefixtures("impatient")
def test_an_exchange_does_not_wait_for_an_upload_that_does_not_end() -> None:
    grid = Wedged({1: [good(1)]}, slow={1})
    replies(grid, [1])
    assert (grid.begun, grid.ended) == (1, 0)
    grid.uploaded.set()


def test_two_answers_of_a_node_that_are_there_at_once_are_one_reply() -> None:
    grid = FakeGrid({1: [good(21), good(9)], 2: [good(50)]}, presence={1: [(0, 10), (11, FOREVER)]})
    streaming = StreamingGrid(grid, clock=grid.clock, sleep=grid.sleep)

    def asleep(seconds: float) -> None:
        grid.now += 8 if 14 < grid.now < 21 else seconds

    streaming.sleep = asleep
    assert answered([*streaming.ask("train", lambda client_id: RecordDict(), [1, 2], Terms(DEADLINE))]) == [1, 2]


@pytest.mark.usefixtures("impatient")
def test_no_more_replies_are_pulled_at_once_than_may_be_held() -> None:
    many = range(1, PULLS + 4)
    grid = Wedged({node: [good(1)] for node in many}, slow=set(many))
    streaming = StreamingGrid(grid, clock=grid.clock, sleep=grid.sleep)
    assert answered([*streaming.ask("train", lambda client_id: RecordDict(), [*many], Terms(3.0))]) == []
    grid.uploaded.set()
    assert grid.begun == PULLS


# --- errors that are replies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 6, 7])
def test_an_error_is_a_reply_with_its_reason_and_is_not_asked_again(code: int) -> None:
    grid = FakeGrid({1: [bad(1, code, "ValueError: no data"), good(1)]})
    got = replies(grid, [1])
    assert got == [Reply(1, None, f"error {code}: ValueError: no data")]
    assert pushes(grid) == {1: 1}
    assert grid.now < DEADLINE / 2


@pytest.mark.parametrize("reason", [None, "", " \n "])
def test_an_error_without_a_reason_says_so(reason: str | None) -> None:
    assert reasons(replies(FakeGrid({1: [bad(1, 2, reason)]}), [1])) == {1: "error 2: no reason given"}


def test_an_errors_reason_is_one_line_that_no_terminal_obeys() -> None:
    traceback = "Traceback:\n  File 'x'\r\n\x1b[2JKeyError: 3\n" + "y" * 10_000
    reason = reasons(replies(FakeGrid({1: [bad(1, 2, traceback)]}), [1]))[1]
    assert reason.startswith("error 2: Traceback: File 'x' [2JKeyError: 3 yyy")
    assert reason.isprintable()
    assert len(reason) <= LONGEST + len("error 2: ")


# --- tasks that are lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", LOST)
def test_a_lost_task_is_asked_again_of_the_same_node_when_it_is_there(code: int) -> None:
    grid = FakeGrid({1: [bad(1, code), good(1)], 2: [good(2)]})
    assert answered(replies(grid, [1, 2])) == [2, 1]
    assert pushes(grid) == {1: 2, 2: 1}


def test_a_node_that_returns_in_time_is_asked_again_once() -> None:
    grid = FakeGrid({1: [bad(10, 5), good(8)], 2: [good(2)]}, presence={1: [(0, 5), (30, FOREVER)]})
    got = replies(grid, [1, 2])
    assert answered(got) == [2, 1]
    assert reasons(got) == {}
    assert pushes(grid) == {1: 2, 2: 1}
    assert 30 <= grid.pushed[-1][0] <= 30 + ROLL_CALL + LONGEST_PAUSE


def test_a_node_that_does_not_return_is_lost_with_its_reason() -> None:
    grid = FakeGrid({1: [bad(10, 5)], 2: [good(2)]}, presence={1: [(0, 5)]})
    got = replies(grid, [1, 2])
    assert answered(got) == [2]
    assert reasons(got) == {1: "lost: it is gone (attempt 1 of 3, deadline 60 s)"}


def test_a_node_that_does_not_return_is_waited_for_a_while_where_enough_have_answered() -> None:
    """A node without a key, killed and back before the round, is in its cohort twice: nobody is to come any more."""
    grid = FakeGrid({1: [bad(50, 5)], 2: [good(2)], 3: [good(4)]}, presence={1: [(0, 5)]})
    got = replies(grid, [1, 2, 3], deadline=600, enough=lambda: True)
    assert answered(got) == [2, 3]
    assert reasons(got) == {1: "lost: it is gone (attempt 1 of 3, deadline 600 s)"}
    assert 50 + AWAY < grid.now < 51 + AWAY


def test_a_node_that_does_not_return_is_waited_for_to_the_deadline_where_too_few_have_answered() -> None:
    grid = FakeGrid({1: [bad(50, 5)], 2: [bad(2, 2)], 3: [good(4)]}, presence={1: [(0, 5)]})
    replies(grid, [1, 2, 3], deadline=600, enough=lambda: False)
    assert grid.now == 600


def test_a_node_that_returns_after_a_while_is_asked_again_while_others_still_work() -> None:
    grid = FakeGrid({1: [bad(10, 5), good(8)], 2: [good(300)]}, presence={1: [(0, 5), (200, FOREVER)]})
    assert answered(replies(grid, [1, 2], deadline=600, enough=lambda: True)) == [1, 2]


def test_a_node_that_restarted_is_asked_again_though_no_error_came() -> None:
    """Flower delivers at most once: a task dies with its node between two polls, and nobody says so."""
    grid = FakeGrid({1: [None, good(4)]}, presence={1: [(0, 10), (11, FOREVER)]})
    assert answered(replies(grid, [1])) == [1]
    assert pushes(grid) == {1: 2}


def test_a_node_that_restarted_is_asked_once_per_restart() -> None:
    grid = FakeGrid({1: [None, good(30)]}, presence={1: [(0, 10), (11, FOREVER)]})
    assert answered(replies(grid, [1])) == [1]
    assert pushes(grid) == {1: 2}


def test_a_late_error_of_the_first_task_does_not_ask_a_restarted_node_a_third_time() -> None:
    grid = FakeGrid({1: [bad(20, 3), good(30)]}, presence={1: [(0, 10), (11, FOREVER)]})
    assert answered(replies(grid, [1])) == [1]
    assert pushes(grid) == {1: 2}


def test_two_answers_of_a_node_that_was_asked_twice_are_one_reply() -> None:
    grid = FakeGrid({1: [good(25), good(9)], 2: [good(50)]}, presence={1: [(0, 10), (11, FOREVER)]})
    assert answered(replies(grid, [1, 2])) == [1, 2]


def test_a_newcomer_is_asked_in_place_of_a_node_that_is_gone() -> None:
    """Without authentication a restarted node is a new one."""
    grid = FakeGrid({1: [bad(10, 5)], 2: [good(2)], 9: [good(8)]}, presence={1: [(0, 5)], 9: [(6, FOREVER)]})
    got = replies(grid, [1, 2])
    assert answered(got) == [2, 9]
    assert reasons(got) == {1: "it is gone: 9 is asked in its place"}
    assert pushes(grid) == {1: 1, 2: 1, 9: 1}


def test_no_newcomer_is_asked_where_the_answers_of_those_before_are_stood_on() -> None:
    grid = FakeGrid({1: [bad(10, 5)], 2: [good(2)], 9: [good(8)]}, presence={1: [(0, 5)], 9: [(6, FOREVER)]})
    got = replies(grid, [1, 2], newcomers=False)
    assert answered(got) == [2]
    assert reasons(got) == {1: "lost: it is gone (attempt 1 of 3, deadline 60 s)"}
    assert pushes(grid) == {1: 1, 2: 1}


def test_a_newcomer_is_asked_once_however_long_it_takes() -> None:
    grid = FakeGrid({1: [bad(5, 5)], 9: [good(30)]}, presence={1: [(0, 4)], 9: [(6, FOREVER)]})
    assert answered(replies(grid, [1])) == [9]
    assert pushes(grid) == {1: 1, 9: 1}


def test_one_newcomer_stands_in_for_one_node() -> None:
    nodes = {1: [bad(5, 5)], 2: [bad(5, 5)], 9: [good(3)]}
    got = replies(FakeGrid(nodes, presence={1: [(0, 4)], 2: [(0, 4)], 9: [(6, FOREVER)]}), [1, 2])
    assert answered(got) == [9]
    assert sorted(reasons(got)) == [1, 2]


def test_a_node_that_was_there_all_along_stands_in_for_nobody() -> None:
    grid = FakeGrid({1: [bad(5, 5)], 3: [good(1)]}, presence={1: [(0, 4)]})
    assert answered(replies(grid, [1])) == []
    assert pushes(grid) == {1: 1}


def test_newcomers_are_not_asked_while_everyone_is_well() -> None:
    grid = FakeGrid({1: [good(20)], 9: [good(1)]}, presence={9: [(6, FOREVER)]})
    assert answered(replies(grid, [1])) == [1]
    assert pushes(grid) == {1: 1}


def test_attempts_are_bounded_and_a_hopeless_client_is_given_up_before_the_deadline() -> None:
    grid = FakeGrid({1: [bad(2, 8) for _ in range(9)], 2: [good(1)]})
    got = replies(grid, [1, 2], deadline=600)
    assert pushes(grid) == {1: ATTEMPTS, 2: 1}
    assert reasons(got) == {1: "lost: its process died (attempt 3 of 3, deadline 600 s)"}
    assert grid.now < 60


def test_a_restarting_node_is_asked_a_bounded_number_of_times() -> None:
    spans = [(float(start), start + 4.0) for start in range(0, 600, 5)]
    grid = FakeGrid({1: []}, presence={1: spans})
    assert reasons(replies(grid, [1], deadline=600)) == {1: "late: no reply within 600 s"}
    assert pushes(grid) == {1: ATTEMPTS}


def test_every_client_of_the_cohort_gets_exactly_one_reply() -> None:
    plans: dict[int, list[Outcome]]
    plans = {1: [good(1)], 2: [bad(2, 2)], 3: [bad(3, 5), good(3)], 4: [None], 5: [bad(1, 8)] * 5, 6: [bad(4, 3)]}
    plans[9] = [good(5)]
    got = replies(FakeGrid(plans, presence={6: [(0, 3)], 9: [(5, FOREVER)]}), [1, 2, 3, 4, 5, 6])
    assert Counter(reply.client_id for reply in got) == Counter([1, 2, 3, 4, 5, 6, 9])


# --- messages that cannot be sent -----------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", ["omitted", "blank"])
def test_a_message_that_could_not_be_sent_is_sent_again(refused: str) -> None:
    grid = FakeGrid({1: [good(1)], 2: [good(1)], 3: [good(1)]}, unsendable={2: 1}, refused=refused)
    got = replies(grid, [1, 2, 3])
    assert answered(got) == [1, 3, 2]
    assert reasons(got) == {}
    assert pushes(grid) == {1: 1, 2: 2, 3: 1}


def test_messages_that_were_too_large_together_are_sent_again() -> None:
    grid = FakeGrid({1: [None, good(1)], 2: [good(1)]}, unsendable={2: 1}, refused="nothing")
    assert answered(replies(grid, [1, 2])) == [1, 2]


def test_messages_of_which_flower_loses_the_connection_are_sent_again() -> None:
    grid = FakeGrid({1: [None, good(1)], 2: [good(1)]}, unsendable={2: 1}, refused="raised")
    assert answered(replies(grid, [1, 2])) == [1, 2]


def test_a_message_of_which_flower_always_loses_the_connection_is_lost_with_what_it_said() -> None:
    grid = FakeGrid({1: []}, unsendable={1: 99}, refused="raised")
    said = "its message could not be sent: ConnectionError: the push session has expired"
    assert reasons(replies(grid, [1])) == {1: f"lost: {said} (attempt 3 of 3, deadline 60 s)"}


@pytest.mark.parametrize("refused", ["omitted", "blank", "nothing"])
def test_a_message_that_can_never_be_sent_is_lost(refused: str) -> None:
    grid = FakeGrid({1: []}, unsendable={1: 99}, refused=refused)
    assert reasons(replies(grid, [1])) == {1: "lost: its message could not be sent (attempt 3 of 3, deadline 60 s)"}
