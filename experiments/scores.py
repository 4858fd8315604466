"""Scores of paired seeds, as tables, gaps and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypeAlias

from matplotlib.axes import Axes

from .report import Row, Spread, spread

Scores: TypeAlias = Mapping[str, Mapping[str, float]]  # of one seed: by row and column of a table

LINES = {"prediction ensemble": "-", "best single client": "--", "mean single client": ":"}


def table(label: str, seeds: Sequence[Scores], extra: Mapping[str, Row] | None = None) -> list[Row]:
    """A row for each of the seeds' rows, called by `label`: mean and sd over seeds, and what `extra` adds to it."""
    return [
        {label: row, **{column: over(seeds, row, column) for column in columns}, **(extra or {}).get(row, {})}
        for row, columns in seeds[0].items()
    ]


def over(seeds: Sequence[Scores], row: str, column: str) -> Spread:
    """Mean and sd over seeds of one cell."""
    return spread(seed[row][column] for seed in seeds)


def gap(seeds: Sequence[Scores], row: str, other: str, column: str = "accuracy") -> float:
    """How far `row` is above `other`, mean over the paired seeds."""
    return fmean(seed[row][column] - seed[other][column] for seed in seeds)


def bars(axes: Axes, seeds: Sequence[Scores], title: str) -> None:
    """Accuracy by row, whiskers of one standard deviation; lines for what is not merged, where it is known."""
    names = list(seeds[0])
    found = [over(seeds, name, "accuracy") for name in names]
    axes.barh(names, [score.mean for score in found], xerr=[score.sd for score in found], color="tab:blue")
    beside = {column: over(seeds, names[0], column).mean for column in LINES if column in seeds[0][names[0]]}
    for column, mean in beside.items():
        axes.axvline(mean, linestyle=LINES[column], color="black", label=column)
    low = min(*(score.mean - score.sd for score in found), *beside.values())
    axes.set(xlim=(low - 0.02, None), title=title, xlabel="accuracy")
    axes.invert_yaxis()
    if beside:
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
