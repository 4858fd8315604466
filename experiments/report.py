"""What every experiment ends with: tables, a plot and gates, printed and written to a folder."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, NamedTuple, TypeAlias

import matplotlib as mpl
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from server.telemetry import console_for_output

RESULTS = Path(__file__).resolve().parent / "results"


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; `16 ± 2` in a table, two columns in CSV."""

    mean: float
    sd: float

    def __str__(self) -> str:
        return f"{_number(self.mean)} ± {_number(self.sd)}"


Cell: TypeAlias = "str | int | float | Spread"
Row: TypeAlias = Mapping[str, Cell]


class Gate(NamedTuple):
    """What must hold for the experiment to pass, whether it does, and the figures that say so."""

    name: str
    holds: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """An experiment's outcome: tables of rows by caption, what the plot shows, gates, and remarks for the reader."""

    title: str
    tables: Mapping[str, Sequence[Row]]
    plot: Callable[[Figure], None]
    gates: Sequence[Gate]
    notes: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.holds for gate in self.gates)


Experiment: TypeAlias = Callable[[bool, int], Report]  # quick, number of seeds


def spread(values: Iterable[float]) -> Spread:
    """Mean and sample standard deviation of one value per seed; sd 0 for a single seed."""
    values = [float(value) for value in values]
    return Spread(fmean(values), stdev(values) if len(values) > 1 else 0.0)


def command_line(name: str, experiment: Experiment, *, seeds: int, quick_seeds: int | None = None) -> typer.Typer:
    """The command `python -m experiments.NAME`, which exits with 1 when a gate fails; `seeds` are its defaults."""
    app = typer.Typer(add_completion=False)

    @app.command(help=(sys.modules[experiment.__module__].__doc__ or "").partition("\n")[0])
    def main(
        quick: Annotated[
            bool, typer.Option("--quick", help="the same gates on a smaller run, within 3 minutes")
        ] = False,
        num: Annotated[int | None, typer.Option("--seeds", min=1, help="how many seeds")] = None,
        folder: Annotated[Path, typer.Option(help="where results go; a quick run's to its subfolder quick")] = RESULTS,
    ) -> None:
        num = num or (quick and quick_seeds) or seeds
        path = (folder / "quick" if quick else folder) / name
        try:
            report = experiment(quick, num)
        except FileNotFoundError as missing:  # data, whose absence says what to do
            raise SystemExit(str(missing)) from None
        write(report, path, f"python -m experiments.{name}{' --quick' * quick} --seeds {num}")
        show(report, console_for_output())
        print(f"wrote {path}.md, .csv, .png")
        raise typer.Exit(0 if report.passed else 1)

    return app


def write(report: Report, path: Path, command: str) -> None:
    """Writes the report beside `path` as .md, .csv and .png; each names the command that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(markdown(report, f"{path.name}.png", command))
    _write_csv(report, path.with_suffix(".csv"), command)
    _write_png(report, path.with_suffix(".png"), command)


def markdown(report: Report, picture: str, command: str) -> str:
    """The report as Markdown: title, command, gates, tables, plot, notes."""
    parts = [f"# {report.title}", f"Made by `{command}`."]
    parts += _markdown_table("Gates", [_gate_row(gate) for gate in report.gates])
    for caption, rows in report.tables.items():
        parts += _markdown_table(caption, rows)
    parts.append(f"![{report.title}]({picture})")
    parts += [f"- {note}" for note in report.notes]
    return "\n\n".join(parts) + "\n"


def show(report: Report, console: Console) -> None:
    """Prints the tables, the notes and the gates."""
    for caption, rows in {**report.tables, "Gates": [_gate_row(gate) for gate in report.gates]}.items():
        table = Table(*_columns(rows), title=caption, title_justify="left")
        for row in rows:
            table.add_row(*_texts(row, _columns(rows)))
        console.print(table)
    for note in report.notes:
        console.print(f"- {note}", highlight=False)


def _gate_row(gate: Gate) -> Row:
    return {"gate": gate.name, "holds": "yes" if gate.holds else "NO", "figures": gate.detail}


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _texts(row: Row, columns: Sequence[str]) -> list[str]:
    return [_text(row.get(column, "")) for column in columns]


def _text(cell: Cell) -> str:
    return _number(cell) if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)


def _number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2g}"


def _markdown_table(caption: str, rows: Sequence[Row]) -> list[str]:
    columns = _columns(rows)
    lines = [columns, ["---"] * len(columns), *(_texts(row, columns) for row in rows)]
    return [f"## {caption}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]


def _write_csv(report: Report, path: Path, command: str) -> None:
    """All tables in one file: a first column names the row's table; a spread takes two columns."""
    rows = [{"table": caption, **_flat(row)} for caption, rows in report.tables.items() for row in rows]
    with path.open("w", newline="") as file:
        file.write(f"# {command}\n")
        writer = csv.DictWriter(file, _columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _flat(row: Row) -> dict[str, str | int | float]:
    flat: dict[str, str | int | float] = {}
    for column, cell in row.items():
        if isinstance(cell, Spread):
            flat |= {column: cell.mean, f"{column} sd": cell.sd}
        else:
            flat[column] = cell
    return flat


def _write_png(report: Report, path: Path, command: str) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9, 5), layout="constrained")
    report.plot(figure)
    figure.supxlabel(command, fontsize="x-small", color="grey")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
