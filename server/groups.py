"""A network's groups of units as a table: how many, what they move, and what stays in place."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from aggregators.core.symmetry import Concat, Layout, Product, Symmetry
from aggregators.core.update import Tensors


def page(symmetry: Symmetry, params: Tensors, traced: float, verified: float) -> Group:
    """A row for every group, then what stays, and the seconds that tracing and verifying took."""
    sizes = symmetry.sizes(params)
    rows = Table("group", "units", "scalable", r"moves, as tensor\[axis]", show_lines=True)
    for group, members in symmetry.members.items():
        moves = ", ".join(place(symmetry, name, axis) for name, axis in members)
        rows.add_row(Text(group), str(sizes[group]), "yes" if group in symmetry.scaled else "no", Text(moves))
    units = sum(sizes[group] for group in symmetry.groups)
    found = f"{len(symmetry.groups)} groups of {units} units, traced in {traced:.2f} s, verified in {verified:.2f} s."
    stays = f"Inputs, outputs and what goes by position stay in place: {', '.join(still(symmetry, params))}."
    return Group(*([rows] if symmetry.groups else []), found, Text(stays))


def place(symmetry: Symmetry, name: str, axis: int) -> str:
    """An axis as `head.weight[1]`, with what it is made of if that is more than one group."""
    layout = symmetry.axes[name][axis]
    return f"{name}[{axis}]" if layout is None or isinstance(layout, str) else f"{name}[{axis}: {written(layout)}]"


def written(layout: Layout) -> str:
    """What an axis is made of, such as `3 × heads × 8` or `forward + backward`."""
    if isinstance(layout, Concat):
        return " + ".join(map(written, layout.parts))
    if isinstance(layout, Product):
        return " × ".join(f"({written(part)})" if isinstance(part, Concat) else written(part) for part in layout.parts)
    return str(layout)


def still(symmetry: Symmetry, params: Tensors) -> Iterator[str]:
    """Tensors of which an axis of several entries stays, with these axes; those within a kernel go without saying."""
    for name, value in params.items():
        layouts = dict(enumerate(symmetry.axes.get(name, ())))
        axes = [axis for axis, length in enumerate(value.shape[:2]) if length > 1 and layouts.get(axis) is None]
        if axes:
            yield f"{name}{axes}"
