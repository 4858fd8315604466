"""Scores of paired seeds: tables, gaps and bars."""

import pytest
from matplotlib.figure import Figure

from experiments.report import Spread
from experiments.scores import bars, gap, table

SEEDS = [
    {"a": {"accuracy": 0.5, "best single client": 0.6}, "b": {"accuracy": 0.7, "best single client": 0.6}},
    {"a": {"accuracy": 0.7, "best single client": 0.8}, "b": {"accuracy": 0.8, "best single client": 0.8}},
]


def test_a_table_has_mean_and_deviation_of_every_cell_and_what_else_is_known_of_a_row() -> None:
    first, second = table("method", SEEDS, {"b": {"bytes": 12}})
    assert first["method"] == "a"
    assert isinstance(first["accuracy"], Spread)
    assert first["accuracy"] == pytest.approx((0.6, 0.02**0.5))
    assert "bytes" not in first
    assert second["bytes"] == 12


def test_a_gap_is_the_mean_of_paired_differences() -> None:
    assert gap(SEEDS, "b", "a") == pytest.approx(0.15)


def test_bars_show_every_row_and_a_line_for_what_is_not_merged() -> None:
    axes = Figure().subplots()
    bars(axes, SEEDS, "toy")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["best single client"]
