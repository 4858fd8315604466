"""Bayesian nonparametric matching: the units of many networks matched to global ones, of which there may be more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lgamma, log, sqrt
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

PRICES = 1e-9  # of new atoms: those that are closer are one
RISE = 1e-7  # of the gains: a smaller one is rounding


class Prior(NamedTuple):
    """A beta–Bernoulli process of atoms, each with weights from N(0, σ0²), of which every client has some."""

    gamma: float  # of J clients each brings γ / J new atoms, in the mean
    sigma0: float
    popularity: int = 10  # clients beyond which an atom is no more popular
    max_units: int | None = None  # atoms, or as many as the widest client has units if that is more


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


class Matched(NamedTuple):
    """The atom of each client's every unit, the atoms, and the objective when all had a turn and later."""

    units: list[Tensor]
    atoms: Atoms
    objectives: list[float]

    @property
    def size(self) -> int:
        """The number of atoms."""
        return len(self.atoms.counts)


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
    return torch.cat([known, new], 1).nan_to_num_(0, 0, 0)  # what overflowed says nothing


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

    Several numbers of new atoms may be best at one price, as among copies of a unit: then each new atom has its own.
    """
    low, high, price = 0.0, 2 * log(1 + room) + 2 * float(known.abs().amax() if known.numel() else 0), log(1 + room)
    while high - low > PRICES:
        units = _priced(known, price)
        new = int((units >= known.shape[1]).count_nonzero())
        if new > room or (new and price < 2 * log(new)):
            low = price
        elif new < room and price > 2 * log(1 + new):
            high = price
        else:
            return units
        price = (low + high) / 2 if new or low else 0.0
    numbers = torch.arange(1, room + 1, dtype=known.dtype)
    return _hungarian(torch.cat([known, -2 * numbers.log().expand(len(known), room)], 1))


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
    return Matched(matcher.units, matcher.atoms, objectives)


def joined(found: Matched, weights: Tensor, precision: float, prior: Prior) -> Matched:
    """The same with a client more, whose units go to their best atoms, the others held."""
    atoms, clients = found.atoms, len(found.units) + 1
    units = assigned(gains(atoms, weights, precision, clients, prior), len(atoms.counts))
    return found._replace(units=[*found.units, units], atoms=atoms.add(weights, units, precision))


def scaled(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights of all units over the root of their mean squared length, so that their scale does not matter."""
    squares = sum(float(own.double().square().sum()) for own in weights)
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
