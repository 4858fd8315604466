"""The order in which a network's groups of units can be matched, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .symmetry import Layout, Symmetry, groups


class Level(NamedTuple):
    """Groups of units that are as deep as one another, and the tensors that are settled when these are matched."""

    groups: list[str]
    tensors: list[str]


class Depth:
    """The order in which a network's groups can be matched: each when all that its units read has been."""

    def __init__(self, symmetry: Symmetry) -> None:
        self.symmetry = symmetry
        self.outputs = {name: self._output(name) for name in symmetry.axes}
        self.reads = {group: self._read(group) for group in symmetry.groups}

    def _output(self, name: str) -> int:
        """The axis of the units that the tensor brings forth or belongs to; the first if there is none."""
        axes = enumerate(self.symmetry.axes[name])
        return next((axis for axis, layout in axes if layout is not None and self.symmetry.role(name, axis) > 0), 0)

    def layout(self, name: str) -> Layout | None:
        """What the axis that the tensor brings forth is made of."""
        return self.symmetry.axes[name][self.outputs[name]]

    def weights(self, group: str) -> list[str]:
        """The tensors whose rows a unit of the group is matched by: those that bring it forth, and their biases."""
        own = [name for name in self.symmetry.axes if group in groups(self.layout(name))]
        matrices = {name for name in own if len(self.symmetry.axes[name]) > 1}
        return [name for name in own if name in matrices or name.removesuffix("bias") + "weight" in matrices]

    def _read(self, group: str) -> set[str]:
        """The groups that the units of this one are computed from."""
        found = set[str]()
        for name in self.weights(group):
            others = [axis for axis in range(len(self.symmetry.axes[name])) if axis != self.outputs[name]]
            found.update(*(groups(self.symmetry.axes[name][axis]) for axis in others))
        return found

    def levels(self) -> list[Level]:
        """All groups, from the first to the last; ValueError, in one line, where they have no such order."""
        depth: dict[str, int] = {}
        while rest := [group for group in self.symmetry.groups if group not in depth]:
            ready = [group for group in rest if self.reads[group] <= depth.keys()]
            self._refuse_unless(ready, rest)
            depth |= dict.fromkeys(ready, 1 + max(depth.values(), default=-1))
        last = {name: max([-1, *(depth[group] for group in groups(self.layout(name)))]) for name in self.outputs}
        numbers = sorted({*depth.values()})
        return [Level([g for g in depth if depth[g] == n], [name for name in last if last[name] == n]) for n in numbers]

    def _refuse_unless(self, ready: Sequence[str], rest: Sequence[str]) -> None:
        for group in (group for group in ready if not self.weights(group)):
            raise ValueError(f"no weight brings forth the units of {group!r}: they cannot be matched layer by layer")
        if not ready:
            path = [rest[0]]
            while path[-1] not in path[:-1]:
                path.append(min(self.reads[path[-1]].intersection(rest)))
            circle = " from ".join(map(repr, path[path.index(path[-1]) :]))
            raise ValueError(
                f"units follow from themselves, {circle}, and cannot be matched layer by layer, as those of residual"
                " streams and recurrent layers: use ot_fusion, git_rebasin or activation_matching"
            )
