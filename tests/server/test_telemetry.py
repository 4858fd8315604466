"""Telemetry: numbers as they are, in records and in lines that people can read."""

from __future__ import annotations

import json
import sys
from io import BytesIO, StringIO, TextIOWrapper
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from server_toys import said

from server.telemetry import (
    LONGEST,
    ExchangeRecord,
    RoundRecord,
    Telemetry,
    Unfailing,
    evaluation,
    finite,
    one_line,
    table,
)

NAN, INF = float("nan"), float("inf")


def telemetry(width: int = 120, terminal: bool = False) -> Telemetry:
    return Telemetry(Console(file=StringIO(), width=width, force_terminal=terminal))


TOLD: dict[str, tuple[Any, ...]] = {
    "started": ("fedavg", "digits", 10, range(1, 4), "/runs/7"),
    "one_width": ("why",),
    "asking": (1, "train", 2),
    "replied": ("1",),
    "left_out": (1, "2", "late"),
    "unkept": (1, "why"),
    "asked": (),
    "finished": (RoundRecord(1),),
    "parked": ("/runs/7",),
    "summary": ([RoundRecord(1).as_dict()], {}),
}


class Full(StringIO):
    """Output on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("terminal", [False, True])
def test_output_that_cannot_be_written_ends_no_run(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it pile up."""
    assert TOLD.keys() == {name for name in vars(Telemetry) if not name.startswith("_")}
    monkeypatch.setattr(Full, "isatty", lambda file: terminal)
    monkeypatch.setattr(sys, "stdout", Full())
    log = Telemetry()
    for method, arguments in TOLD.items():
        getattr(log, method)(*arguments)
    assert log.console.is_terminal or not terminal
    assert log.console._buffer == []


def closed() -> StringIO:
    (file := StringIO()).close()
    return file


@pytest.mark.parametrize("file", [closed(), TextIOWrapper(BytesIO(), "ascii")], ids=["closed", "no such character"])
def test_output_that_takes_no_text_ends_no_run(file: IO[str]) -> None:
    with pytest.raises(ValueError, match=r"closed|encode"):
        print("é", file=file, flush=True)
    print("é", file=Unfailing(file), flush=True)


# --- evaluation -----------------------------------------------------------------------------------------------------

reports = st.fixed_dictionaries(
    {"num": st.integers(1, 10**6), "accuracy": st.floats(0, 1), "loss": st.floats(0, 1e6)},
)


@given(clients=st.lists(reports, min_size=1, max_size=6))
def test_the_evaluation_is_the_mean_weighted_by_examples_the_worst_and_the_standard_deviation(
    clients: list[dict[str, float]],
) -> None:
    found = evaluation({str(number): client for number, client in enumerate(clients)})
    num, accuracy, loss = (np.array([client[key] for client in clients]) for key in ("num", "accuracy", "loss"))
    expected = {
        "accuracy": np.average(accuracy, weights=num),
        "worst": accuracy.min(),
        "spread": accuracy.std(),
        "loss": np.average(loss, weights=num),
        "clients": len(clients),
    }
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_clients_without_validation_examples_do_not_count() -> None:
    clients = {
        "a": {"num": 0.0, "accuracy": 0.0, "loss": 0.0},
        "b": {"num": 4.0, "accuracy": 0.75, "loss": 1.0},
        "c": {},
    }
    assert evaluation(clients) == {"accuracy": 0.75, "worst": 0.75, "spread": 0.0, "loss": 1.0, "clients": 1}


def test_nobody_who_measured_is_no_evaluation() -> None:
    assert evaluation({}) == evaluation({"a": {}, "b": {"num": 0.0}}) == {}


def test_a_loss_that_is_not_finite_is_left_out_of_the_mean_but_the_accuracy_counts() -> None:
    a, b = {"num": 1.0, "accuracy": 0.2, "loss": None}, {"num": 1.0, "accuracy": 0.4, "loss": 3.0}
    assert evaluation({"a": a, "b": b}) == pytest.approx(
        {"accuracy": 0.3, "worst": 0.2, "spread": 0.1, "loss": 3.0, "clients": 2}
    )


def test_losses_none_of_which_is_finite_are_no_loss() -> None:
    assert evaluation({"a": {"num": 1.0, "accuracy": 0.2, "loss": None}})["loss"] is None


numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@given(clients=st.lists(st.dictionaries(st.sampled_from(["num", "accuracy", "loss", "x"]), numbers), max_size=4))
def test_whatever_clients_report_the_evaluation_is_json(clients: list[dict[str, Any]]) -> None:
    found = evaluation({str(number): client for number, client in enumerate(clients)})
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(("value", "kept"), [(0.5, 0.5), (3, 3.0), (NAN, None), (INF, None), (-INF, None)])
def test_a_number_that_json_cannot_hold_is_none(value: float, kept: float | None) -> None:
    assert finite(value) == kept


# --- records --------------------------------------------------------------------------------------------------------


def exchange(task: str = "train", **changes: Any) -> ExchangeRecord:
    note = ExchangeRecord(
        task, asked=3, admitted=["1", "18446744073709551615"], bytes_in=2_000_000, bytes_out=3_000_000
    )
    note.left_out.append({"client": "2", "reason": "late"})
    for name, value in changes.items():
        setattr(note, name, value)
    return note


def test_totals_are_over_all_exchanges() -> None:
    record = RoundRecord(1, exchanges=[exchange(), exchange("measure", admitted=["1"], bytes_in=500_000)])
    totals = {what: record.total(what) for what in ("admitted", "left_out", "bytes_in", "bytes_out")}
    assert totals == {"admitted": 3, "left_out": 2, "bytes_in": 2_500_000, "bytes_out": 6_000_000}


def test_a_record_is_json_with_ids_as_text() -> None:
    record = RoundRecord(4, "lost", "too few", [exchange()], {"damped_share": None}).as_dict()
    told = json.loads(json.dumps(record, allow_nan=False))
    assert told["exchanges"][0]["admitted"][1] == "18446744073709551615"
    assert (told["round"], told["status"], told["reason"], told["metrics"]) == (
        4,
        "lost",
        "too few",
        {"damped_share": None},
    )


def test_seconds_of_a_stage_add_up_and_survive_an_error() -> None:
    note = ExchangeRecord("train")
    with note.timed("folding"):
        pass
    first = note.seconds["folding"]
    with pytest.raises(ValueError, match="within"), note.timed("folding"):
        raise ValueError("within")
    assert note.seconds["folding"] > first > 0


# --- lines ----------------------------------------------------------------------------------------------------------


@given(text=st.text())
def test_one_line_is_printable_and_short(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert len(line) <= LONGEST
    assert line == one_line(line)


def test_one_line_keeps_the_words() -> None:
    assert one_line("  ValueError:\n\tno data\r\n\x1b[31mat all\x00 ") == "ValueError: no data [31mat all"


def test_events_are_lines_where_the_output_is_no_terminal() -> None:
    log = telemetry()
    log.started("fisher", "digits", 1_234_567, range(2, 6), "/runs/7")
    log.asking(2, "train", 4)
    log.replied("1")
    log.asked()
    log.left_out(2, "3", "params lacks a")
    assert said(log).splitlines() == [
        "fisher on digits: 1,234,567 parameters, rounds 2 to 5; records in /runs/7",
        "round 2: train, asking 4 clients",
        "round 2: client 3 left out: params lacks a",
    ]


def test_why_all_clients_must_have_one_width_is_one_line() -> None:
    log = telemetry(width=40)
    log.one_width("the model does not work\nwith other widths")
    assert said(log) == "all clients must have the task's widths: the model does not work with other widths\n"


def test_a_run_that_is_finished_already_says_so() -> None:
    log = telemetry()
    log.started("fedavg", "digits", 10, range(4, 4), "/runs/7")
    assert "no rounds left" in said(log)


def test_a_finished_round_is_told_with_its_times_volume_and_evaluations() -> None:
    log = telemetry()
    notes = [exchange(seconds={"waiting": 1.0}), exchange("measure", seconds={"waiting": 0.5, "folding": 0.25})]
    record = RoundRecord(3, exchanges=notes, seconds=2.0)
    record.received, record.test = {"accuracy": 0.91234, "loss": None}, {"accuracy": 0.5}
    log.finished(record)
    assert said(log).splitlines() == [
        "round 3 merged; 4 replies, 2 left out; 4.00 MB in, 6.00 MB out; 2.00 s (waiting 1.50, folding 0.25)",
        "  clients on the model of round 2, as each received it: accuracy 0.9123, loss –",
        "  server on the model of round 3: accuracy 0.5",
    ]


def test_a_lost_round_is_told_with_its_reason() -> None:
    log = telemetry()
    log.finished(RoundRecord(3, "lost", "1 good replies, the quorum is 2"))
    assert said(log).startswith("round 3 lost: 1 good replies, the quorum is 2; 0 replies, 0 left out;")


@pytest.mark.parametrize("reason", ["x" * 500, "[red]marked[/red] up", "a :bomb: in text", "[/] [bold"])
def test_a_line_stays_one_line_and_as_it_was_written(reason: str) -> None:
    """A log that wraps cannot be searched; a client's text is no markup."""
    log = telemetry(width=40)
    log.left_out(1, "7", reason)
    assert said(log) == f"round 1: client 7 left out: {reason}\n"


def test_a_terminal_shows_a_bar_while_an_exchange_runs_and_takes_it_away() -> None:
    log = telemetry(terminal=True)
    log.asking(2, "train", 3)
    assert log._progress is not None
    for client in ("1", "2"):
        log.replied(client)
    (task,) = log._progress.tasks
    assert (task.description, task.completed, task.total) == ("round 2 train", 2, 3)
    log.asked()
    assert log._progress is None
    log.asked()


# --- the table ------------------------------------------------------------------------------------------------------


def rendered(records: list[dict[str, Any]], final: dict[str, float | None]) -> list[list[str]]:
    """The table's cells, row by row, as they are printed."""
    console = Console(file=StringIO(), width=160)
    console.print(table(records, final))
    file = console.file
    assert isinstance(file, StringIO)
    lines = [line for line in file.getvalue().splitlines() if "│" in line or "┃" in line]
    return [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in lines]


def test_the_table_shows_each_rounds_numbers_and_its_models_evaluation() -> None:
    """What clients measured in round 2 is the model of round 1; the last model is measured after the last round."""
    first = RoundRecord(1, exchanges=[exchange(), exchange()], seconds=1.26, test={"accuracy": 0.4})
    second = RoundRecord(2, "lost", "why", [exchange(admitted=[])], seconds=2.0)
    second.received = {"accuracy": 0.71239, "worst": 0.5, "spread": 0.1, "loss": 1.0}
    rows = rendered([first.as_dict(), second.as_dict()], {"accuracy": 0.8, "worst": None})
    assert rows == [
        [
            "round",
            "outcome",
            "replies",
            "left out",
            "MB in",
            "MB out",
            "seconds",
            "accuracy",
            "worst",
            "spread",
            "server",
        ],
        ["1", "merged", "4", "2", "4.00", "6.00", "1.3", "0.7124", "0.5", "0.1", "0.4"],
        ["2", "lost", "0", "1", "2.00", "3.00", "2.0", "0.8", "–", "–", "–"],
    ]


def test_the_summary_prints_the_table() -> None:
    log = telemetry()
    log.summary([RoundRecord(1, exchanges=[exchange()]).as_dict()], {"accuracy": 0.25})
    assert "accuracy" in said(log)
    assert "0.25" in said(log)
