"""What an experiment leaves behind, and how it says that a gate has failed."""

import csv
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from experiments.report import Gate, Report, Spread, command_line, spread, write


def draw(figure: Figure) -> None:
    figure.subplots().plot([0, 1], [2, 3])


def report(holds: bool = True) -> Report:
    return Report(
        title="A toy",
        tables={
            "Losses": [{"K": 2, "Fisher": Spread(0.25, 0.5)}, {"K": 3, "Fisher": Spread(0.125, 0.25)}],
            "Costs": [{"method": "Fisher", "bytes": 12_800}],
        },
        plot=draw,
        gates=[Gate("Fisher is cheap", holds, "12,800 bytes")],
        notes=["Nothing is measured here."],
    )


def run(folder: Path, holds: bool, *arguments: str) -> int:
    app = command_line("toy", lambda quick, seeds: report(holds), seeds=5, quick_seeds=2)
    return CliRunner().invoke(app, [*arguments, "--folder", str(folder)]).exit_code


def test_the_markdown_holds_command_gates_tables_plot_and_notes(tmp_path: Path) -> None:
    write(report(), tmp_path / "toy", "python -m toy")
    text = (tmp_path / "toy.md").read_text()
    assert "Made by `python -m toy`." in text
    assert "| Fisher is cheap | yes | 12,800 bytes |" in text
    assert "| K | Fisher |\n| --- | --- |\n| 2 | 0.2500 ± 0.5000 |" in text
    assert "![A toy](toy.png)" in text
    assert "- Nothing is measured here." in text


def test_the_csv_holds_every_table_with_means_and_deviations_apart(tmp_path: Path) -> None:
    write(report(), tmp_path / "toy", "python -m toy")
    command, *lines = (tmp_path / "toy.csv").read_text().splitlines()
    assert command == "# python -m toy"
    first, _, last = csv.DictReader(lines)
    assert (first["table"], first["K"], first["Fisher"], first["Fisher sd"]) == ("Losses", "2", "0.25", "0.5")
    assert (last["method"], last["bytes"], last["Fisher"]) == ("Fisher", "12800", "")


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    write(report(), tmp_path / "toy", "python -m toy")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_the_exit_code_is_one_when_a_gate_fails_and_zero_otherwise(tmp_path: Path) -> None:
    assert run(tmp_path, holds=True) == 0
    assert run(tmp_path, holds=False) == 1
    assert "| NO |" in (tmp_path / "toy.md").read_text()


def test_a_quick_run_has_its_own_folder_and_number_of_seeds(tmp_path: Path) -> None:
    run(tmp_path, True, "--quick")
    assert "`python -m experiments.toy --quick --seeds 2`" in (tmp_path / "quick/toy.md").read_text()
    run(tmp_path, True)
    assert "`python -m experiments.toy --seeds 5`" in (tmp_path / "toy.md").read_text()


def test_a_spread_is_the_mean_and_the_sample_deviation() -> None:
    assert spread([1, 2, 3]) == Spread(2.0, 1.0)
    assert spread([4]) == Spread(4.0, 0.0)
    assert str(Spread(0.14770001, 0.001)) == "0.1477 ± 0.0010"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0000"), (1e-10, "1e-10"), (0.00012, "0.00012"), (12.5, "12.5000")]
)
def test_small_figures_keep_two_digits(value: float, text: str) -> None:
    assert str(Spread(value, 0.0)).startswith(f"{text} ±")
