"""Bayesian nonparametric matching: the units of many networks matched to global ones, of which there may be more."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lgamma, log, sqrt
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .base import Aggregator, mean_buffers
from .exchange import Fold, collect
from .seed import derive_seed
from .symmetry import Layout, Sizes, Symmetry, groups, places, rows
from .tensors import add_scaled_, like, widened, zeros
from .update import ClientUpdate, GlobalModel, Memory, Merged, Tensors

PRICES = 1e-9  # of new atoms: those that are closer are one
RISE = 1e-7  # of the gains: a smaller one is rounding
TINY = 1e-30  # a precision: of what no client has any more
Updates: TypeAlias = Sequence[ClientUpdate]


class Prior(NamedTuple):
    """A beta–Bernoulli process of atoms, each with weights from N(0, σ0²), of which every client has some."""

    gamma: float  # of J clients each brings γ / J new atoms, in the mean
    sigma0: float
    popularity: int = 10  # clients beyond which an atom is no more popular
    max_units: int | None = None  # atoms, or as many as the widest client has units if that is more


class Matched(NamedTuple):
    """The atom of each client's every unit, the number of atoms, and the objective when all had a turn and later."""

    units: list[Tensor]
    size: int
    objectives: list[float]


@dataclass(frozen=True, eq=False)
class Atoms:
    """Of each atom G_i = Σ s w over its units, float64, Σ s, and c_i, their number; the latter two on the CPU."""

    sums: Tensor
    masses: Tensor
    counts: Tensor

    @classmethod
    def none(cls, weights: Tensor) -> Atoms:
        """No atom yet, of as many weights as these units."""
        sums = weights.new_zeros(0, weights.shape[1], dtype=torch.float64)
        return cls(sums, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))

    def add(self, weights: Tensor, units: Tensor, precision: float, sign: int = 1) -> Atoms:
        """The atoms and a client's units, which make new ones beyond the last; without these units where sign is -1."""
        new = int((units + 1 - len(self.counts)).clamp(min=0).max()) if len(units) else 0
        sums, masses, counts = (torch.cat([a, a.new_zeros(new, *a.shape[1:])]) for a in vars(self).values())
        return Atoms(
            sums.index_add_(0, units.to(sums.device), weights.double(), alpha=sign * precision),
            masses.index_add_(0, units, torch.full(units.shape, sign * precision, dtype=torch.float64)),
            counts.index_add_(0, units, torch.full_like(units, sign)),
        )

    def only(self, kept: Tensor) -> Atoms:
        """These atoms."""
        return Atoms(self.sums[kept.to(self.sums.device)], self.masses[kept], self.counts[kept])


def gains(atoms: Atoms, weights: Tensor, precision: float, clients: int, prior: Prior) -> Tensor:
    """Twice what each unit adds to the log posterior in each atom, and in each new one, float64, on the CPU.

    Shape (units, atoms + new ones). With ŵ = s w, S = 1/σ0² + Σ s, c of J clients in an atom, at most the popularity:
    ‖ŵ + G‖² / (s + S) − ‖G‖² / S + 2 log(c / (J − c)); in the q-th new one ‖ŵ‖² / (s + 1/σ0²) + 2 log(γ / J) − 2 log q.
    """
    s, s0 = precision, prior.sigma0**-2
    squares, lengths = (s * weights.double()).square().sum(1).cpu(), atoms.sums.square().sum(1).cpu()
    products = (weights @ atoms.sums.to(weights.dtype).mT).double().cpu()
    popular = atoms.counts.clamp(max=prior.popularity).double()
    total = s + s0 + atoms.masses
    known = products.mul_(2 * s).add_(squares[:, None]).add_(lengths).div_(total)
    known += 2 * torch.log(popular / (clients - popular)) - lengths / (s0 + atoms.masses)
    number = torch.arange(1, _room(len(weights), len(atoms.counts), prior) + 1, dtype=torch.float64)
    new = (squares / (s + s0) + 2 * log(prior.gamma / clients))[:, None] - 2 * number.log()
    return torch.cat([known, new], 1)


def _room(units: int, atoms: int, prior: Prior) -> int:
    """How many atoms a client may add: up to the bound, and as many as its units need."""
    bound = units if prior.max_units is None else prior.max_units - atoms
    return min(units, max(bound, units - atoms, 0))


def assigned(gain: Tensor, atoms: int) -> Tensor:
    """The atom of each unit, no two the same, so that gains sum to the most; new ones in the order of the units.

    That a q-th new atom costs 2 log q comes to one price on each: of the best assignment, with m of them, one between
    2 log m and 2 log (m + 1), at which units choose by themselves whether to be new. That takes far less time.
    """
    room = gain.shape[1] - atoms
    units = _chosen(gain[:, :atoms] - gain[:, atoms : atoms + 1], room) if room else _hungarian(gain)
    new = units >= atoms
    units[new] = atoms + torch.arange(int(new.count_nonzero()))
    return units


def _chosen(known: Tensor, room: int) -> Tensor:
    """The atom of each unit by what it gains over a new one, or one beyond the last: the price is found by bisection.

    Where two numbers of new atoms are best at one price, the better of those beside it that were met.
    """
    low, high, price = 0.0, 2 * log(1 + room) + 2 * float(known.abs().amax() if known.numel() else 0), log(1 + room)
    best, most = torch.zeros(0, dtype=torch.int64), -torch.inf
    while high - low > PRICES:
        units = _priced(known, price)
        new = int((units >= known.shape[1]).count_nonzero())
        kept = (units < known.shape[1]).nonzero().flatten()
        value = float(known[kept, units[kept]].sum()) - 2 * lgamma(1 + new)
        if new <= room and value > most:
            best, most = units, value
        if new > room or (new and price < 2 * log(new)):
            low = price
        elif new < room and price > 2 * log(1 + new):
            high = price
        else:
            break
        price = (low + high) / 2 if new or low else 0.0
    return best


def _priced(known: Tensor, price: float) -> Tensor:
    """The atom of each unit, or one beyond the last for those that do better to pay the price."""
    alone = torch.full((len(known), len(known)), -torch.inf, dtype=known.dtype)
    return _hungarian(torch.cat([known, alone.fill_diagonal_(-price)], 1))


def _hungarian(gain: Tensor) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])


def match_units(
    weights: Sequence[Tensor],
    precisions: Sequence[float],
    prior: Prior,
    *,
    sweeps: int = 5,
    generator: np.random.Generator | None = None,
) -> Matched:
    """Atoms for the units of all clients, by BBP-MAP inference.

    `weights` are of each client (units, weights), in float32 or float64, `precisions` theirs. The widest client's units
    are the first atoms; the others follow, one Hungarian assignment each, and in sweeps, in random orders, each client
    is matched to the others again, if the objective rises. That is twice the log posterior of the assignment, up to a
    constant: Σ_i ‖G_i‖² / S_i + 2 Σ_i [log(γ / J) + Σ_{c < c_i} log(c / (J − c))] − 2 Σ_j log q_j!, q_j being the
    atoms that only client j has. The published algorithm lets it fall, which is all that differs.
    Source: Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks", section 3 and
    algorithm 1. O(n m d + n² m) a visit, of n units with d weights and m atoms.
    """
    generator = generator or np.random.default_rng(0)
    matcher, clients = _Matcher(weights, precisions, prior), range(len(weights))
    for k in sorted(clients, key=lambda k: -len(weights[k])):
        matcher.visit(k)
    objectives = [matcher.objective]
    for _ in range(sweeps):
        moved = [matcher.visit(k) for k in generator.permutation(len(weights)).tolist()]
        objectives.append(matcher.objective)
        if not any(moved):
            break
    return Matched(matcher.units, len(matcher.atoms.counts), objectives)


def scaled(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights of all units over the root of their mean squared length, so that their scale does not matter."""
    squares = sum(float(own.square().sum(dtype=torch.float64)) for own in weights)
    length = sqrt(squares / sum(map(len, weights))) or 1.0
    return [own / length for own in weights]


class _Matcher:
    """An assignment that improves: each client's units, the atoms, and the objective."""

    def __init__(self, weights: Sequence[Tensor], precisions: Sequence[float], prior: Prior) -> None:
        self.weights, self.precisions, self.prior = weights, precisions, prior
        self.units = [torch.zeros(0, dtype=torch.int64) for _ in weights]
        self.atoms, self.objective = Atoms.none(weights[0]), 0.0

    def visit(self, k: int) -> bool:
        """Whether the client's units were moved: to their best atoms, the other clients' held, if that is better."""
        client = self.weights[k], self.precisions[k]
        rest, units = self._without(k)
        gain = gains(rest, *client, len(self.weights), self.prior)
        best = assigned(gain, len(rest.counts))
        before, after = (self._value(k, gain, rest, [*units[:k], own, *units[k + 1 :]]) for own in (units[k], best))
        if len(units[k]) and after - before <= RISE * abs(before):
            return False
        self.units, self.atoms = [*units[:k], best, *units[k + 1 :]], rest.add(client[0], best, client[1])
        self.objective += after - before
        return True

    def _without(self, k: int) -> tuple[Atoms, list[Tensor]]:
        """The other clients' atoms, and all units in their numbering, in which the client's own atoms are new ones."""
        placed = self.weights[k][: len(self.units[k])]  # none before its first turn
        atoms = self.atoms.add(placed, self.units[k], self.precisions[k], -1)
        shared = atoms.counts > 0
        number = torch.where(shared, shared.cumsum(0), int(shared.sum()) + (~shared).cumsum(0)) - 1
        return atoms.only(shared), [number[units] for units in self.units]

    def _value(self, k: int, gain: Tensor, rest: Atoms, units: Sequence[Tensor]) -> float:
        """The objective that depends on the client: its gains, and the other clients' atoms that it leaves to them."""
        counts = torch.cat([rest.counts, torch.zeros(gain.shape[1] - len(rest.counts), dtype=torch.int64)])
        counts = counts.index_add(0, units[k], torch.ones_like(units[k]))
        alone = sum(lgamma(1 + int((counts[own] == 1).sum())) for j, own in enumerate(units) if j != k)
        return float(gain[torch.arange(len(units[k])), units[k]].sum()) - 2 * alone


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
                " streams and recurrent layers: align the clients with git_rebasin or activation_matching"
            )


class Nonparametric(Aggregator, ABC):
    """A method that matches units by BBP-MAP: its hyper-parameters.

    The defaults are this project's. A copy of a unit never becomes a new atom, since γ ≤ 1 makes 2 log(c / (J − c))
    more than 2 log(γ / J); how many others do depends on how different units are, not on the scale that training has
    given them, nor on the number of clients alone, as with the published values (`PAPER`).
    """

    gamma: float = Field(default=1.0, gt=0, description="how readily units stay unmatched; up to 1 no copy does")
    sigma: float = Field(default=0.6, gt=0, description="how far clients' weights are from their atom's")
    sigma0: float = Field(default=100.0, gt=0, description="how far atoms' weights are from 0")
    relative: bool = Field(
        default=True, description="whether σ and σ0 are in units of the mean length of units' weights"
    )
    popularity: int = Field(default=10, ge=1, description="clients beyond which an atom is no more popular")
    max_units: int | None = Field(
        default=None, ge=1, description="bound on a group's units, beside the widest client's"
    )
    sweeps: int = Field(default=5, ge=0, description="times that every client is matched again to the others")
    shrunk: bool = Field(
        default=False, description="whether atoms are posterior means, nearer 0 than their units' mean"
    )
    weighted: bool = Field(default=True, description="whether a client's precision goes by its number of examples")
    seed: int = Field(default=0, description="of the orders of clients")

    needs: ClassVar[frozenset[str]] = frozenset({"symmetry", "widths"})

    @property
    def prior(self) -> Prior:
        """Of the atoms of a group."""
        return Prior(self.gamma, self.sigma0, self.popularity, self.max_units)

    def precisions(self, updates: Updates) -> list[float]:
        """s_k = n_k / mean(n) / σ², or 1 / σ² for all."""
        numbers = [update.num_examples if self.weighted else 1 for update in updates]
        return [number * len(numbers) / sum(numbers) / self.sigma**2 for number in numbers]


PAPER: dict[str, Any] = {
    **{"gamma": 7.0, "sigma": 1.0, "sigma0": 1.0},
    **{"relative": False, "shrunk": True, "weighted": False},
}


class Pass:
    """One pass over a network's levels: the tensors that are settled, and where each client's units are in them."""

    def __init__(self, method: Nonparametric, model: GlobalModel) -> None:
        if model.symmetry is None or not model.symmetry.groups:
            raise ValueError(f"{method.kind} needs the symmetry of the task's network, with units to match")
        self.method, self.model, self.symmetry = method, model, model.symmetry
        self.depth = Depth(model.symmetry)
        self.levels = self._levels()
        self.params: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}
        self.units: dict[int, dict[str, Tensor]] = {}
        self.widths: list[dict[str, int]] = []  # of the clients that began
        self.shared = 0  # atoms that all clients have

    def _levels(self) -> list[Level]:
        try:
            return self.depth.levels()
        except ValueError as error:
            raise ValueError(f"{self.method.kind}: {error}") from None

    @property
    def start(self) -> Tensors | Callable[[int], Tensors]:
        """θ_t, of which a client that is remembered has the units that were its own."""
        known = self.model.memory.get("units")
        if not isinstance(known, Mapping):
            return self.model.params
        remembered = replace(self.model, memory=known)
        return lambda client_id: self.symmetry.take(self.model.params, remembered.kept(str(client_id)))

    @property
    def frozen(self) -> frozenset[str]:
        """The parameters that are settled."""
        return frozenset(name for name in self.model.names if name in self.params)

    def fold(self, *, buffers: bool) -> Fold[list[ClientUpdate], list[ClientUpdate]]:
        """Collects what is not settled, with all buffers if so asked, and lets go of the replies."""
        kept = {*self.model.params} - self.params.keys() | {*(self.model.buffers if buffers else ())}

        def accumulate(updates: list[ClientUpdate], update: ClientUpdate) -> list[ClientUpdate]:
            params = {name: value.clone() for name, value in update.params.items() if name in kept}
            return [*updates, replace(update, params=params)]

        return replace(collect, accumulate=accumulate)

    def match(self, level: Level, updates: Updates) -> list[ClientUpdate]:
        """Settles the level; what is left of the clients, with its units where the settled tensors have them."""
        sizes = [self.symmetry.sizes(update.params) for update in updates]
        self.widths = self.widths or sizes
        self.units = {update.client_id: self.units.get(update.client_id, {}) for update in updates}
        precisions = self.method.precisions(updates)
        for group in level.groups:
            weights = [self._weights(group, update.params, own) for update, own in zip(updates, sizes, strict=True)]
            self._match(group, weights, precisions)
        grown = [self._grown(level, update) for update in updates]
        self.params |= {name: self._mean(name, grown, precisions) for name in level.tensors if name in grown[0].params}
        return [replace(u, params={n: value for n, value in u.params.items() if n not in self.params}) for u in grown]

    def _weights(self, group: str, params: Tensors, sizes: Sizes) -> Tensor:
        """A row of each unit's incoming weights, and biases."""
        found = list[Tensor]()
        for name in self.depth.weights(group):
            value = widened(params[name]).movedim(self.depth.outputs[name], 0)
            found.extend(rows(value, self.depth.layout(name) or 1, group, sizes))
        return torch.cat(found, 1)

    def _match(self, group: str, weights: Sequence[Tensor], precisions: Sequence[float]) -> None:
        generator = np.random.default_rng(derive_seed(self.method.seed, self.model.round, group, "matching"))
        weights = scaled(weights) if self.method.relative else weights
        found = match_units(weights, precisions, self.method.prior, sweeps=self.method.sweeps, generator=generator)
        self.sizes[group] = found.size
        self.shared += int((torch.cat(found.units).bincount() == len(weights)).sum())
        for own, units in zip(self.units.values(), found.units, strict=True):
            own[group] = units

    def _grown(self, level: Level, update: ClientUpdate) -> ClientUpdate:
        """The update with the level's units where the atoms are, and zeros where it has none."""
        units = {group: self.units[update.client_id][group] for group in level.groups}
        return replace(update, params=self.symmetry.put(update.params, units, self.sizes))

    def _mean(self, name: str, grown: Updates, precisions: Sequence[float]) -> Tensor:
        """Σ s_k θ_k / Σ s_k over the clients that have the unit; with 1/σ0² below for weights that are shrunk."""
        axis, layout = self.depth.outputs[name], self.depth.layout(name) or 1
        total = zeros(grown[0].params[name].shape, self.model.device)
        mass = torch.zeros(total.shape[axis], dtype=torch.float64)
        for update, precision in zip(grown, precisions, strict=True):
            add_scaled_(total, precision, update.params[name])
            mass[places(layout, self.units[update.client_id], self.sizes)] += precision
        if self.method.shrunk and any(name in self.depth.weights(group) for group in groups(layout)):
            mass += self.method.sigma0**-2
        shape = [-1 if other == axis else 1 for other in range(total.ndim)]
        mean = total / mass.clamp(min=TINY).to(total.device).reshape(shape)
        return mean.to(self.model.params[name].dtype)

    def sent(self, rest: Updates) -> Callable[[int], Tensors]:
        """Of each client the settled tensors with what is left of its own."""
        names = self.model.params
        models = {u.client_id: {n: self.params[n] if n in self.params else u.params[n] for n in names} for u in rest}
        return models.__getitem__

    def finish(self, rest: Updates, exchanges: int) -> Merged:
        """The settled tensors, the mean of the rest by classes, and of the buffers that are given."""
        left = replace(self.model, params={name: self.model.params[name] for name in rest[0].params})
        params = {
            **self.params,
            **{name: _mean_by_class(name, rest) for name in left.names},
            **mean_buffers(left, rest),
        }
        memory: Memory = {"units": {str(client_id): units for client_id, units in self.units.items()}}
        return Merged(like(self.model.params, params), memory, {**self._metrics(), "exchanges": exchanges})

    def _metrics(self) -> dict[str, float]:
        """Units of each group, the widest client's and in the end; their growth; the share that all clients have."""
        total, widest = sum(self.sizes.values()), max(self.widths, key=lambda own: sum(own.values()))
        return {
            **{f"units_before.{group}": widest[group] for group in self.sizes},
            **{f"units.{group}": units for group, units in self.sizes.items()},
            "growth": total / sum(widest[group] for group in self.sizes),
            "shared_share": self.shared / total,
        }


def _mean_by_class(name: str, updates: Updates) -> Tensor:
    """Σ_k share_k θ_k, the shares being those of each class where the tensor's first axis has one entry for each."""
    value = updates[0].params[name]
    total = zeros(value.shape, value.device)
    for update, share in zip(updates, _shares(updates, len(value) if value.ndim else 0), strict=True):
        total += update.params[name].double() * share.reshape([-1, *[1] * (value.ndim - 1)][: value.ndim]).to(
            value.device
        )
    return total


def _shares(updates: Updates, classes: int) -> Tensor:
    """n_kc / n_c of each client and class; n_k / n for classes without examples, and where others are counted."""
    numbers = torch.tensor([[update.num_examples] for update in updates], dtype=torch.float64)
    counts = [update.class_counts for update in updates if update.class_counts is not None]
    if len(counts) < len(updates) or len(counts[0]) != classes:
        return numbers / numbers.sum()
    held = torch.stack(counts).double().cpu()
    return torch.where(held.sum(0) > 0, held / held.sum(0), numbers / numbers.sum())
