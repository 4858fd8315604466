"""Units of one network carried into those of another, of its width or of another, by plans of optimal transport."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from math import lcm
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .matching import assign, correlation
from .symmetry import Concat, Layout, Sizes, Symmetry, groups, rows, size
from .update import ClientUpdate, Tensors

Plans: TypeAlias = Mapping[str, Tensor]  # group -> T, (units, units of the reference): how much of i becomes j; sum 1
Maps: TypeAlias = Mapping[str, Tensor]  # group -> what a vector of its units is multiplied by
Outgoing: TypeAlias = Literal["sum", "mean"]

ROUNDING = 1e-12  # of all mass: less is none
STEPS = 10**7  # of the simplex, which takes few more than there are units
ITERATIONS = 2_000  # of Sinkhorn's
RANGE = 300  # of costs, in regularisations: exp(-RANGE) and its inverse are numbers by far
FLOOR = 0.01  # of the mean importance, which every unit has beside its own
ALIKE = 1e-6  # of 2 − 2ρ: less is rounding, of float32
TIE = 1e-5  # of the largest distance of weights: what they add to distances of activations


# --- plans ----------------------------------------------------------------------------------------------------------


def plan(cost: Tensor, mu: Tensor, nu: Tensor, regularisation: float | None = None) -> Tensor:
    """T = arg min ⟨T, C⟩ with T 1 ∝ μ and Tᵀ 1 ∝ ν, of sum 1, shape (units, units of the reference), float64, CPU.

    With a regularisation ε it is Sinkhorn's, arg min ⟨T, C⟩ − ε C̄ H(T), C̄ the mean cost. Source: Kantorovich 1942,
    "On the translocation of masses"; Cuturi 2013, "Sinkhorn Distances". About n³ operations; n² an iteration.
    """
    cost = cost.double().cpu()
    if regularisation is not None:
        return _sinkhorn(cost, mu / mu.sum(), nu / nu.sum(), regularisation * float(cost.mean().clamp(min=1e-30)))
    if len(mu) == len(nu) and bool((mu == mu[0]).all() and (nu == nu[0]).all()):
        return torch.eye(len(mu), dtype=torch.float64)[assign(-cost)] / len(mu)  # a permutation is best (Birkhoff)
    return _exact(cost, mu, nu)


def _exact(cost: Tensor, mu: Tensor, nu: Tensor) -> Tensor:
    """Masses that are whole numbers of one sum, as those of `uniform`, stay: they move without rounding."""
    whole = bool((mu.sum() == nu.sum()) & (mu == mu.round()).all() & (nu == nu.round()).all())
    mu, nu = (mu, nu) if whole else (mu / mu.sum(), nu / nu.sum())
    found = _solved("emd", cost, mu, nu, numItermax=STEPS) / mu.sum()
    found = found if whole else _met(found, mu, nu)
    return torch.where(found > ROUNDING, found, 0.0)


def _sinkhorn(cost: Tensor, mu: Tensor, nu: Tensor, regularisation: float) -> Tensor:
    steep = float(cost.max() - cost.min()) > RANGE * regularisation
    method = "sinkhorn_log" if steep else "sinkhorn"  # the same, and slower by far
    limits = {"numItermax": ITERATIONS, "warn": False}
    return _met(_solved("sinkhorn", cost - cost.min(), mu, nu, regularisation, method, **limits), mu, nu)


def _met(found: Tensor, mu: Tensor, nu: Tensor) -> Tensor:
    """A plan nearby whose marginals are these (Altschuler et al. 2017, algorithm 2): iterations only come near them."""
    found = found * (mu / found.sum(1)).clamp(max=1)[:, None]
    found = found * (nu / found.sum(0)).clamp(max=1)
    rest = [(mass - found.sum(axis)).clamp(min=0) for mass, axis in ((mu, 1), (nu, 0))]
    return found + torch.outer(*rest) / rest[0].sum().clamp(min=1e-30)


def _solved(solver: str, cost: Tensor, mu: Tensor, nu: Tensor, *options: float | str, **limits: int) -> Tensor:
    """What a solver of Python Optimal Transport finds, without the libraries whose arrays it would take."""
    for library in ("JAX", "TENSORFLOW", "CUPY"):
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{library}", "1")
    found = getattr(import_module("ot"), solver)(mu.numpy(), nu.numpy(), cost.numpy(), *options, **limits)
    plan: Tensor = torch.from_numpy(np.asarray(found))
    return plan


def uniform(units: int, others: int) -> tuple[Tensor, Tensor]:
    """Equal masses of so many units on either side, whole numbers of one sum, by which they move without rounding."""
    total = lcm(units, others)
    mu, nu = (torch.full((number,), total / number, dtype=torch.float64) for number in (units, others))
    return mu, nu


def importance(weights: Tensor) -> Tensor:
    """Masses in proportion to the lengths of units' weights, the rows, a hundredth of their mean added."""
    lengths: Tensor = weights.double().norm(dim=1).cpu()
    return (lengths + FLOOR * lengths.mean()).clamp(min=1e-30)


def staying(mu: Tensor, nu: Tensor) -> Tensor:
    """The plan that keeps the order of units: between equal masses each stays in its place."""
    ends = [mass.cumsum(0) / mass.sum() for mass in (mu, nu)]
    starts = [torch.cat([end.new_zeros(1), end[:-1]]) for end in ends]
    return (torch.minimum(ends[0][:, None], ends[1]) - torch.maximum(starts[0][:, None], starts[1])).clamp(min=0)


def permutation(plans: Plans) -> dict[str, Tensor] | None:
    """The permutation that these plans are; None where one of them splits a unit or joins two."""
    for one in plans.values():
        if one.shape[0] != one.shape[1] or any(bool(((one > 0).sum(axis) != 1).any()) for axis in (0, 1)):
            return None
    return {group: one.argmax(0).cpu() for group, one in plans.items()}


def reverse(plans: Plans) -> dict[str, Tensor]:
    """The plans from the reference's units into one's own."""
    return {group: one.mT for group, one in plans.items()}


# --- what is carried ------------------------------------------------------------------------------------------------


def transport(symmetry: Symmetry, params: Tensors, plans: Plans, outgoing: Outgoing = "sum") -> dict[str, Tensor]:
    """The tensors in the reference's units; groups without a plan stay.

    What brings units forth, and running statistics, are convex combinations, diag(1/β) Tᵀ W, β = Tᵀ 1. What reads them
    is summed, W diag(1/μ) T, μ = T 1, by which a network whose units were all split, or all doubled, computes the same;
    with `mean` it is averaged, W T diag(1/β), by which it does not. A tensor that does both along one axis, as a tied
    embedding, counts as reading, which is the same function at equal widths only. Source: Singh & Jaggi 2020, "Model
    Fusion via Optimal Transport", algorithm 1, which averages.
    """
    way = _Way(symmetry, symmetry.sizes(params), convex(plans), spread(plans) if outgoing == "sum" else convex(plans))
    return way.carried(params)


def transport_update(
    symmetry: Symmetry, update: ClientUpdate, plans: Plans, outgoing: Outgoing = "sum"
) -> ClientUpdate:
    """The update in the reference's units: permuted with every statistic where the plans are a permutation.

    Elsewhere gradients and their squares are convex combinations along every axis, F̃ = diag(1/β) Tᵀ F, which is an
    approximation, and there is no other statistic of examples.
    """
    if (places := permutation(plans)) is not None:
        return symmetry.permute_update(update, places)
    way = _Way(symmetry, symmetry.sizes(update.params), convex(plans), convex(plans))
    params = transport(symmetry, update.params, plans, outgoing)
    sums, squares = map(way.carried, (update.grad_sum, update.sq_grad_sum))
    moved = replace(update, params=params, grad_sum=sums, sq_grad_sum=squares)
    return replace(moved, grad_sketch={}, gram={}, grad_gram={}, moments={}, cross_moments={})


def convex(plans: Plans) -> dict[str, Tensor]:
    """diag(1/β) Tᵀ: each unit of the reference is made of those that become it."""
    return {group: (one / one.sum(0)).mT for group, one in plans.items()}


def spread(plans: Plans) -> dict[str, Tensor]:
    """(diag(1/μ) T)ᵀ: what reads a unit goes, in parts, to all that it becomes."""
    return {group: (one / one.sum(1, keepdim=True)).mT for group, one in plans.items()}


@dataclass(frozen=True, eq=False)
class _Way:
    """What the units of a network of these sizes are multiplied by, where they are brought forth and where read."""

    symmetry: Symmetry
    sizes: Sizes
    forth: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)

    def carried(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors, in their dtypes."""
        return {name: self.one(name, value) for name, value in tensors.items()}

    def one(self, name: str, value: Tensor, but: int | None = None) -> Tensor:
        """A tensor carried along all its axes, perhaps but one."""
        moved = value
        for axis, layout in enumerate(self.symmetry.axes.get(name, ())):
            maps = self.forth if self.symmetry.role(name, axis) > 0 else self.read
            if layout is not None and axis != but and any(group in maps for group in groups(layout)):
                moved = _along(moved.double().movedim(axis, 0), layout, maps, self.sizes).movedim(0, axis)
        return moved.to(value.dtype)


def _along(value: Tensor, layout: Layout, maps: Maps, sizes: Sizes) -> Tensor:
    """`value`, whose first axis has this layout, multiplied by the maps of the groups in it."""
    if isinstance(layout, str) and layout in maps:
        moved: Tensor = torch.tensordot(maps[layout].to(value), value, 1)
        return moved
    if isinstance(layout, int | str):
        return value
    lengths = [size(part, sizes) for part in layout.parts]
    if isinstance(layout, Concat):
        pieces = zip(torch.split(value, lengths), layout.parts, strict=True)
        return torch.cat([_along(piece, part, maps, sizes) for piece, part in pieces])
    blocks = value.reshape(*lengths, *value.shape[1:])
    for axis, part in enumerate(layout.parts):
        blocks = _along(blocks.movedim(axis, 0), part, maps, sizes).movedim(0, axis)
    return blocks.flatten(0, len(lengths) - 1)


# --- two networks ---------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """Plans; Σ over groups of ⟨T, C⟩, in the order of units and as planned; and the share of units that move."""

    plans: dict[str, Tensor]
    before: float = 0.0
    after: float = 0.0
    moved_share: float = 0.0


@dataclass(frozen=True, eq=False)
class Planner:
    """How networks are brought into the units of a reference: by one plan for each group, in the order of the tensors.

    Units are as far apart as all that brings them forth or reads them, biases too, as one vector, of the tensors called
    `names`. Other groups are carried before; a tensor that a group without a plan moves waits for the next of `passes`.
    What reads units is compared at the length that it has once it is carried.
    """

    symmetry: Symmetry
    names: Container[str]
    regularisation: float | None = None
    important: bool = False
    outgoing: Outgoing = "sum"
    passes: int = 1

    def plans(self, params: Tensors, reference: Tensors, correlations: Tensors | None = None) -> Planned:
        """The plans from one network to the reference, whatever the width of either.

        With correlations by layer, (units, units of the reference), the distance is that of standardised activations,
        √(2 − 2ρ), and weights settle ties; a group that none of these layers brings forth is compared by weights.
        """
        pair = _Pair(self, (params, reference), correlations or {})
        for _ in range(self.passes):
            for group in self.order:
                pair.visit(group)
        return pair.planned()

    @cached_property
    def order(self) -> list[str]:
        """The groups, next always one of which something can be compared, if there is any."""
        left, order = [*self.symmetry.groups], list[str]()
        while left:
            order.append(next((group for group in left if self.places(group, order)), left[0]))
            left.remove(order[-1])
        return order

    def places(self, group: str, carried: Container[str]) -> list[tuple[str, int]]:
        """Every (tensor, axis) of the group of which no other axis waits to be carried."""
        return [
            (name, axis)
            for name, axis in self.symmetry.members[group]
            if name in self.names and all(other in carried for other in self._beside(name, axis))
        ]

    def _beside(self, name: str, axis: int) -> Iterator[str]:
        """The groups of the other axes."""
        for other, layout in enumerate(self.symmetry.axes[name]):
            if other != axis:
                yield from groups(layout)


class _Pair:
    """A network and the reference, and what is found so far: the plans, their costs, and the plans that stay."""

    def __init__(self, planner: Planner, params: tuple[Tensors, Tensors], correlations: Tensors) -> None:
        self.planner, self.params, self.correlations = planner, params, correlations
        self.sizes = planner.symmetry.sizes(params[0]), planner.symmetry.sizes(params[1])
        self.way = _Way(planner.symmetry, self.sizes[0])
        self.found, self.costs, self.stays = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()

    def visit(self, group: str) -> None:
        """Finds the group's plan, with the others as they are."""
        features = self._features(group)
        mu, nu = map(importance, features) if self.planner.important else uniform(*map(len, features))
        self.costs[group], self.stays[group] = self._cost(group, *features), staying(mu, nu)
        new = {group: plan(self.costs[group], mu, nu, self.planner.regularisation)}
        self.found.update(new)
        self.way.forth.update(convex(new))
        self.way.read.update(spread(new) if self.planner.outgoing == "sum" else convex(new))

    def planned(self) -> Planned:
        """What was found."""
        before, after = (
            sum(float((plans[group] * cost).sum()) for group, cost in self.costs.items())
            for plans in (self.stays, self.found)
        )
        stay = sum(one.shape[1] * float(torch.minimum(one, self.stays[g]).sum()) for g, one in self.found.items())
        units = sum(one.shape[1] for one in self.found.values())
        return Planned(self.found, before, after, 1 - stay / max(1, units))

    def _cost(self, group: str, a: Tensor, b: Tensor) -> Tensor:
        """The distance of each unit from each of the reference."""
        weights = torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").cpu()
        similar = correlation(self.planner.symmetry, group, self.correlations, self.sizes)
        if similar is None:
            return weights
        return (2 - 2 * similar).clamp(min=ALIKE).sqrt() + TIE * weights / weights.max().clamp(min=1e-30)

    def _features(self, group: str) -> tuple[Tensor, Tensor]:
        """What units are compared by, a row each, float64; a column of 0 where there is nothing."""
        there = next(iter(self.params[0].values())).new_zeros(1).double()
        found = [[there.expand(sizes[group], 1)] for sizes in self.sizes]
        for name, axis in self.planner.places(group, self.found):
            layout = self.planner.symmetry.axes[name][axis] or 1
            for values, tensor, sizes in zip(found, self._tensors(group, name, axis), self.sizes, strict=True):
                values.extend(rows(tensor.movedim(axis, 0), layout, group, sizes))
        a, b = (torch.cat(values, 1) for values in found)
        return a, b

    def _tensors(self, group: str, name: str, axis: int) -> tuple[Tensor, Tensor]:
        """A tensor of both, the first carried along its other axes, and as long along this one as it will be."""
        a, b = (params[name].double() for params in self.params)
        summed = self.planner.outgoing == "sum" and self.planner.symmetry.role(name, axis) < 0
        return self.way.one(name, a, but=axis) * (self.sizes[0][group] / self.sizes[1][group] if summed else 1.0), b
