"""What happened, as records and as progress for people."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from statistics import pstdev
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH = 120  # columns of a table where the output is no terminal
LONGEST = 300  # characters of a line about a reply


@dataclass(eq=False)
class ExchangeRecord:
    """One exchange: who was asked, who was admitted, who was left out and why, bytes, and seconds per stage.

    `kept` are the clients whose replies were kept from before the run stopped: each is still `connected`, or `gone`.
    """

    task: str
    asked: int = 0
    admitted: list[str] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds spent within to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(eq=False)
class RoundRecord:
    """One round: what became of it, its exchanges, the method's metrics, and evaluations.

    `received` is the clients' evaluation of the model that the round started from, as each received it; `test` the
    server's, on its held-out data, of the model that it ended with. `history` tells, in a line each, what disturbed it.
    """

    round: int
    status: str = "merged"
    reason: str = ""
    exchanges: list[ExchangeRecord] = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=dict)
    received: dict[str, float | None] = field(default_factory=dict)
    test: dict[str, float | None] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return asdict(self)

    def total(self, what: str) -> int:
        """`bytes_in` or `bytes_out`, or the number of `admitted` or `left_out`, over all exchanges."""
        values = (getattr(exchange, what) for exchange in self.exchanges)
        return sum(value if isinstance(value, int) else len(value) for value in values)


def evaluation(clients: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Loss and accuracy over the clients, weighted by examples; the worst client's accuracy, and their spread (sd).

    Clients that report no examples or no accuracy do not count; a loss that is not finite is left out of the mean.
    """
    measured = [metrics for metrics in clients.values() if _counts(metrics)]
    if not measured:
        return {}
    accuracies = [metrics["accuracy"] for metrics in measured]
    return {
        "accuracy": _mean("accuracy", measured),
        "worst": finite(min(accuracies)),
        "spread": finite(pstdev(accuracies)),
        "loss": _mean("loss", measured),
        "clients": len(measured),
    }


def _counts(metrics: Mapping[str, Any]) -> bool:
    return (metrics.get("num") or 0) > 0 and metrics.get("accuracy") is not None


def _mean(key: str, measured: Sequence[Mapping[str, Any]]) -> float | None:
    """Σ num · value / Σ num over the clients that have the value; plain sums, since fsum raises where it overflows."""
    told = [metrics for metrics in measured if metrics.get(key) is not None]
    total = sum(metrics["num"] for metrics in told)
    return finite(sum(metrics["num"] * metrics[key] for metrics in told) / total) if told else None


def finite(value: float) -> float | None:
    """The value, or None (null in JSON) where it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None


def one_line(text: str) -> str:
    """The text as one line of printable characters, cut where it is longer than anyone reads."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:LONGEST]


def resuming(folder: str) -> str:
    """The command that goes on with a run."""
    return f"fedbasin resume {shlex.quote(folder)}"


UNPRINTABLE = (OSError, ValueError)  # the latter for what cannot be encoded, and for a file that is closed


class Unfailing:
    """Output whose failure ends no run: that of a full disk, a closed pipe or a terminal that is gone."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, text: str) -> None:
        """Writes the text, if that can be done."""
        with suppress(*UNPRINTABLE):
            self.file.write(text)

    def flush(self) -> None:
        """Flushes, if that can be done."""
        with suppress(*UNPRINTABLE):
            self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def console_for_output(file: IO[str] | None = None) -> Console:
    """A console as wide as the terminal, or 120 columns where there is none."""
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=WIDTH)


def _lasting() -> Console:
    return console_for_output(cast("IO[str]", Unfailing(sys.stdout)))


@dataclass(eq=False)
class Telemetry:
    """Progress on a console: a bar on a terminal, a line per event elsewhere, and a table at the end."""

    console: Console = field(default_factory=_lasting)
    _progress: Progress | None = None
    _bar: TaskID | None = None

    def started(self, method: str, task: str, parameters: int, rounds: Sequence[int], folder: str) -> None:
        """Says what runs, and where its records go."""
        span = f"rounds {rounds[0]} to {rounds[-1]}" if rounds else "no rounds left"
        self._say(f"{method} on {task}: {parameters:,} parameters, {span}; records in {folder}")

    def one_width(self, reason: str) -> None:
        """Says that no client may have other widths than the task's, and why."""
        self._say(one_line(f"all clients must have the task's widths: {reason}"))

    def asking(self, round: int, task: str, clients: int) -> None:
        """A new exchange has begun."""
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._bar = self._progress.add_task(f"round {round} {task}", total=clients)
            self._progress.start()
        else:
            self._say(f"round {round}: {task}, asking {clients} clients")

    def replied(self, client: str) -> None:
        """One more client has answered, or been given up."""
        if self._progress is not None and self._bar is not None:
            self._progress.advance(self._bar)

    def asked(self) -> None:
        """The exchange is over."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def left_out(self, round: int, client: str, reason: str) -> None:
        """A reply may not enter the fold."""
        self._say(f"round {round}: client {client} left out: {reason}", style="yellow")

    def unkept(self, round: int, reason: str) -> None:
        """A reply could not be kept: the round goes on without keeping any."""
        self._say(f"round {round}: goes on, but would be asked anew after a crash: {reason}", style="yellow")

    def parked(self, folder: str) -> None:
        """The run stops before its end, because it was told to."""
        self._say(f"parked, nothing is lost; to go on: {resuming(folder)}")

    def finished(self, record: RoundRecord) -> None:
        """A round is over."""
        stages: dict[str, float] = {}
        for exchange in record.exchanges:
            for stage, seconds in exchange.seconds.items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        times = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items())
        outcome = record.status if not record.reason else f"{record.status}: {record.reason}"
        self._say(f"round {record.round} {outcome}; {_volume(record)}; {record.seconds:.2f} s ({times})")
        for line in record.history:
            self._say(f"  {line}")
        if kept := [state for exchange in record.exchanges for state in exchange.kept.values()]:
            self._say(f"  {len(kept)} replies were kept from before, {kept.count('gone')} of them of clients now gone")
        if record.received:
            model = f"the model of round {record.round - 1}, as each received it"
            self._say(f"  clients on {model}: {_shown(record.received)}")
        if record.test:
            self._say(f"  server on the model of round {record.round}: {_shown(record.test)}")

    def summary(self, records: Sequence[Mapping[str, Any]], final: Mapping[str, float | None]) -> None:
        """The table of the run."""
        self.console.print(table(records, final))

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _volume(record: RoundRecord) -> str:
    replies = f"{record.total('admitted')} replies, {record.total('left_out')} left out"
    return f"{replies}; {record.total('bytes_in') / 1e6:.2f} MB in, {record.total('bytes_out') / 1e6:.2f} MB out"


def _shown(metrics: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in metrics.items())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def table(records: Sequence[Mapping[str, Any]], final: Mapping[str, float | None]) -> Table:
    """A row per round: replies, bytes, seconds, and accuracies of its model, on clients as each received it."""
    rows = Table("round", "outcome", "replies", "left out", "MB in", "MB out", "seconds", "accuracy", "worst", "spread")
    rows.add_column("server")
    after = [record["received"] for record in records[1:]] + [final]
    for record, measured in zip(records, after, strict=True):
        exchanges = record["exchanges"]
        rows.add_row(
            str(record["round"]),
            record["status"],
            str(sum(len(exchange["admitted"]) for exchange in exchanges)),
            str(sum(len(exchange["left_out"]) for exchange in exchanges)),
            *(f"{sum(exchange[key] for exchange in exchanges) / 1e6:.2f}" for key in ("bytes_in", "bytes_out")),
            f"{record['seconds']:.1f}",
            *(_number(measured.get(key)) for key in ("accuracy", "worst", "spread")),
            _number(record["test"].get("accuracy")),
        )
    return rows
