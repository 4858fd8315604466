"""Units of one network matched to those of another, by their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle, islice
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .symmetry import Axes, Permutation, Sizes, Symmetry, compose, groups, index, inverse, rows, size
from .tensors import norm
from .update import Tensors

SWEEPS = 100  # visits of each group or model; there is nothing left to do long before
RISE = 1e-7  # of ‖a‖ ‖b‖ of a tensor: a smaller gain is rounding
BALANCED = 1e-6  # relative: a smaller change of a unit's scale is none


class Matching(NamedTuple):
    """A permutation, and the objective ⟨θ_A, P θ_B⟩ without it and with it."""

    permutation: dict[str, Tensor]
    before: float
    after: float

    @property
    def moved_share(self) -> float:
        """The share of units that change places."""
        moved = sum(int((index != torch.arange(len(index))).sum()) for index in self.permutation.values())
        return moved / max(1, sum(map(len, self.permutation.values())))


def assign(gain: Tensor) -> Tensor:
    """For each row its column, on the CPU, so that the gains of the pairs sum to the most; a square matrix."""
    gain = gain.double().cpu()
    if not gain.sum().isfinite():
        gain = gain.nan_to_num(0, 0, 0)  # what overflowed says nothing
    gain = gain - (gain - gain.amax(1, keepdim=True)).amax(0)  # the same assignment, found in less time
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])


def gains(symmetry: Symmetry, group: str, a: Tensors, b: Tensors, sizes: Sizes | None = None) -> Tensor:
    """What each pair of units has in common, Σ over tensors of A_rows B_rowsᵀ, shape (units, units); 0 without any.

    `sizes` are those of both models, if known.
    """
    sizes = sizes or symmetry.sizes(b)
    units = size(group, sizes)
    found = torch.zeros(units, units, device=next(iter(b.values())).device)
    for name, axis in symmetry.members[group]:
        if name in a:
            layout = symmetry.axes[name][axis] or 1
            pairs = (rows(model[name].movedim(axis, 0), layout, group, sizes) for model in (a, b))
            for left, right in zip(*pairs, strict=True):
                found = found + left @ right.mT
    return found


def correlation(symmetry: Symmetry, group: str, correlations: Tensors, sizes: tuple[Sizes, Sizes]) -> Tensor | None:
    """Of each unit with each of the reference, over layers that bring them forth and their channels; None without."""
    found: list[Tensor] = []
    for name, axis in symmetry.members[group]:
        layer, _, part = name.rpartition(".")
        if axis == 0 and part == "weight" and layer in correlations:
            matrix, layout = correlations[layer].double().cpu(), symmetry.axes[name][0] or 1
            both = zip(matrix.shape, sizes, strict=True)
            channels = (rows(torch.arange(length), layout, group, own) for length, own in both)
            found += [matrix[a[:, None], b[None]].mean(-1) for a, b in zip(*channels, strict=True)]
    return torch.stack(found).mean(0) if found else None


def match(
    symmetry: Symmetry, a: Tensors, b: Tensors, *, restarts: int = 1, generator: np.random.Generator | None = None
) -> Matching:
    """The permutation of `b` that coordinate descent over groups finds to maximise ⟨a, P b⟩ over the tensors given.

    The best of `restarts` runs from the identity, which visit groups in random orders, as many at once as torch has
    threads; groups without a tensor are left out. Source: Ainsworth et al. 2023, "Git Re-Basin", section 3.2, algorithm
    1. O(n² d + n³) a visit, of n units with d weights each.
    """
    first, *others = (generator or np.random.default_rng(0)).spawn(restarts)
    pair = _Pair(symmetry, a, b)
    found = pair.descend(first)
    if found.after == found.before:
        return found  # no group moves before the others, whatever the order
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return max([found, *threads.map(pair.descend, others)], key=lambda matching: matching.after)


class _Move(NamedTuple):
    """Rows along an axis of a tensor that change: which, a's, and b's before and after."""

    axis: int
    rows: Tensor
    a: Tensor
    before: Tensor
    after: Tensor

    @property
    def rise(self) -> float:
        """What the objective gains."""
        return float(torch.sum(self.a * (self.after - self.before), dtype=torch.float64))


class _Pair:
    """Two models to match: of each group its tensors, the groups in these, what is rounding, and the gains at first."""

    def __init__(self, symmetry: Symmetry, a: Tensors, b: Tensors) -> None:
        self.symmetry, self.a, self.b = symmetry, a, b
        self.sizes, self.before = symmetry.sizes(b), inner(a, b)
        members = {group: [name for name, _ in places if name in a] for group, places in symmetry.members.items()}
        self.names = {group: [*dict.fromkeys(names)] for group, names in members.items() if names}
        self.met = {group: self._met(group) for group in self.names}
        self.rounding = {
            group: RISE * max(float(norm([a[name]]) * norm([b[name]])) for name in names)
            for group, names in self.names.items()
        }
        self.gains = {group: gains(symmetry, group, a, b, self.sizes) for group in self.names}

    def _met(self, group: str) -> set[str]:
        """The groups in the same tensors; itself where it is in two places of one."""
        found = [[*chain.from_iterable(map(groups, self.symmetry.axes[name]))] for name in self.names[group]]
        return {other for places in found for other in places if other != group or places.count(group) > 1}

    def descend(self, generator: np.random.Generator) -> Matching:
        """Sweeps over the groups in random orders, but for those whose gains are as they were, until none is left.

        A visit takes the best assignment of a group's units with the others held, if the objective rises, which it need
        not where a group meets itself in a tensor.
        """
        b, after = {name: value.clone() for name, value in self.b.items()}, self.before
        found, unsettled = dict(self.gains), {*self.names}
        permutation = {group: torch.arange(size(group, self.sizes)) for group in self.names}
        for group in self._sweeps(unsettled, generator):
            unsettled.remove(group)
            step = assign(found[group])
            moves = {name: self._move(group, step, name, b[name]) for name in self.names[group]}
            rise = sum(move.rise for move in moves.values())
            if rise > self.rounding[group]:
                after += rise
                permutation[group] = permutation[group][step]
                for name, move in moves.items():
                    b[name].index_copy_(move.axis, move.rows, move.after)
                self._follow(found, group, step, b, moves)
                unsettled |= self.met[group]
        return Matching(permutation, self.before, after)

    def _sweeps(self, unsettled: Set[str], generator: np.random.Generator) -> Iterator[str]:
        """All groups in random order, again and again, without those that are settled when their turn comes."""
        for _ in range(SWEEPS):
            yield from (group for group in generator.permutation([*self.names]).tolist() if group in unsettled)
            if not unsettled:
                break

    def _move(self, group: str, step: Tensor, name: str, b: Tensor) -> _Move:
        """What reordering the group's units does to a tensor: to some rows, or to all where groups share its axes."""
        layouts = [layout or 1 for layout in self.symmetry.axes[name]]
        axis, *more = (axis for axis, layout in enumerate(layouts) if group in groups(layout))
        places = index(layouts[axis], {group: step}, self.sizes).to(b.device)
        rows = torch.arange(len(places), device=b.device)
        if not more and {*groups(layouts[axis])} == {group}:
            rows = (places != rows).nonzero().flatten()
        after = b.index_select(axis, places[rows])
        for other in more:
            after = after.index_select(other, index(layouts[other], {group: step}, self.sizes).to(b.device))
        return _Move(axis, rows, self.a[name].index_select(axis, rows), b.index_select(axis, rows), after)

    def _follow(
        self, found: dict[str, Tensor], group: str, step: Tensor, b: Tensors, moves: Mapping[str, _Move]
    ) -> None:
        """Brings the gains up to date with `b`, in which they are linear, after these moves of the group's units."""
        a = {name: move.a for name, move in moves.items()}
        change = {name: move.after - move.before for name, move in moves.items()}
        for other in self.met[group] - {group}:
            found[other] = found[other] + gains(self.symmetry, other, a, change, self.sizes)
        if group in self.met[group]:
            found[group] = gains(self.symmetry, group, self.a, b, self.sizes)
        else:
            found[group] = found[group].index_select(1, step.to(found[group].device))


def match_many(
    symmetry: Symmetry, cohort: Sequence[Tensors], *, restarts: int = 1, generator: np.random.Generator | None = None
) -> list[Matching]:
    """A permutation of each model into the first one's order of units, with ⟨mean of the others, P_k θ_k⟩.

    In random order each model is matched to the mean of the others, with `restarts` at its first turn, until none
    moves: Σ_{k<l} ⟨P_k θ_k, P_l θ_l⟩ never falls.
    Source: Ainsworth et al. 2023, appendix A.10, algorithm 3 (MergeMany).
    """
    generator = generator or np.random.default_rng(0)
    moved, clients = [*cohort], range(len(cohort))
    total = _total(cohort)
    permutations: list[Permutation] = [{} for _ in cohort]
    still, turns = 0, islice(cycle(generator.permutation(len(cohort)).tolist()), SWEEPS * len(cohort))
    for turn, k in enumerate(turns):
        tried = restarts if turn < len(cohort) else 1
        found = match(symmetry, _others(total, moved, k), moved[k], restarts=tried, generator=generator)
        still = 0 if found.after > found.before else still + 1
        was, moved[k] = moved[k], symmetry.permute(moved[k], found.permutation)
        total = {name: value + moved[k][name] - was[name] for name, value in total.items()}
        permutations[k] = compose(permutations[k], found.permutation)
        if still == len(cohort):
            break
    sides = ((_total(cohort), cohort), (total, moved))
    before, after = ([inner(_others(sum, models, k), models[k]) for k in clients] for sum, models in sides)
    first = inverse(permutations[0])
    return [Matching(compose(permutations[k], first), before[k], after[k]) for k in clients]


def inner(a: Tensors, b: Tensors) -> float:
    """⟨a, b⟩ over the tensors of `a`."""
    return float(sum(torch.sum(value * b[name], dtype=torch.float64) for name, value in a.items()))


def _total(cohort: Sequence[Tensors]) -> dict[str, Tensor]:
    """The sum of all models, float64."""
    return {name: sum((model[name].double() for model in cohort[1:]), cohort[0][name].double()) for name in cohort[0]}


def _others(total: Tensors, cohort: Sequence[Tensors], k: int) -> Tensors:
    """The mean of all models but the k-th; itself where it is alone."""
    if len(cohort) == 1:
        return cohort[k]
    return {name: ((total[name] - own) / (len(cohort) - 1)).to(own.dtype) for name, own in cohort[k].items()}


def balance(symmetry: Symmetry, params: Tensors) -> dict[str, Tensor]:
    """The factors of units that make what brings each forth as long as what reads it, ‖w_in, b‖ = ‖w_out‖.

    Of each scalable group that has both among the tensors, float64, on the CPU. ReLU networks admit them (Dinh et al.
    2017, "Sharp Minima Can Generalize For Deep Nets", section 3). Group after group, until no unit's changes by 1e-6; a
    unit that is dead or unread keeps its scale.
    """
    sizes = symmetry.sizes(params)
    moved = {group: [name for name, _ in symmetry.members[group] if name in params] for group in symmetry.scaled}
    squares = {name: _squares(params[name], symmetry.axes[name]) for names in moved.values() for name in names}
    roles = {g: {symmetry.role(name, axis) for name, axis in symmetry.members[g] if name in params} for g in moved}
    total = {g: torch.ones(sizes[g], dtype=torch.float64) for g, both in roles.items() if len(both) == 2}
    for _ in range(SWEEPS):
        last = dict(total)
        for group, factors in total.items():
            total[group] = factors * _ratio(symmetry, group, squares, total, sizes)
        if all(torch.allclose(total[group], last[group], rtol=BALANCED, atol=0) for group in total):
            break
    return total


def _squares(value: Tensor, axes: Axes) -> Tensor:
    """The squares of all entries, summed over the axes that stay."""
    squares = value.double().square()
    for axis in range(value.ndim):
        if axis >= len(axes) or axes[axis] is None:
            squares = squares.sum(axis, keepdim=True)
    return squares.cpu()


def _ratio(symmetry: Symmetry, group: str, squares: Tensors, factors: Tensors, sizes: Sizes) -> Tensor:
    """√(‖w_out‖ / ‖w_in, b‖) of each unit of the network scaled so far, 1 where either is 0."""
    places = [(name, axis) for name, axis in symmetry.members[group] if name in squares]
    scaled = symmetry.scale({name: squares[name] for name, _ in places}, factors, 2)
    lengths = {role: torch.zeros(sizes[group], dtype=torch.float64) for role in (1, -1)}
    for name, axis in places:
        for matrix in rows(scaled[name].movedim(axis, 0), symmetry.axes[name][axis] or 1, group, sizes):
            lengths[symmetry.role(name, axis)] += matrix.sum(1)
    return torch.where((lengths[1] > 0) & (lengths[-1] > 0), (lengths[-1] / lengths[1]).pow(0.25), 1.0)
