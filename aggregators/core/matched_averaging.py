"""Matched averaging: units brought together level by level, and averaged; what FedMA and PFNM share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from .base import Aggregator, mean_buffers
from .exchange import Fold, collect
from .levels import Depth, Level
from .nonparametric import Prior, joined, match_units, scaled
from .seed import derive_seed
from .symmetry import Sizes, groups, places, rows
from .tensors import add_scaled_, along, like, widened, zeros
from .update import ClientUpdate, GlobalModel, Memory, Merged, Request, Tensors

TINY = 1e-30  # a precision: of what no client has any more
AWAY = -1  # the client that stands for all that are away
Updates: TypeAlias = Sequence[ClientUpdate]


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
    by_class: bool = Field(default=True, description="whether the last layer goes by classes; else by examples")
    absence: int = Field(default=10, ge=0, description="rounds for which units of clients that are away stay")
    seed: int = Field(default=0, description="of the orders of clients")

    needs: ClassVar[frozenset[str]] = frozenset({"symmetry", "widths", "growth"})

    @property
    def prior(self) -> Prior:
        """Of the atoms of a group."""
        return Prior(self.gamma, self.sigma0, self.popularity, self.max_units)

    @property
    def asked(self) -> Request:
        """What the last layer's mean goes by."""
        return Request(class_counts=self.by_class)

    def precisions(self, updates: Updates) -> list[float]:
        """s_k = n_k / mean(n) / σ², or 1 / σ² for all."""
        numbers = [update.num_examples if self.weighted else 1 for update in updates]
        return [number * len(numbers) / sum(numbers) / self.sigma**2 for number in numbers]


PAPER: dict[str, Any] = {
    **{"gamma": 7.0, "sigma": 1.0, "sigma0": 1.0},
    **{"relative": False, "shrunk": True, "weighted": False, "absence": 0},
}


class Pass:
    """One pass over a network's levels: the tensors that are settled, and where each client's units are in them.

    Clients that have a place in the model but do not answer are matched last and weigh nothing: what they alone have
    stays as it was. One that was lost on the way is as it last answered; those that are away are θ_t's units of theirs.
    """

    def __init__(self, method: Nonparametric, model: GlobalModel) -> None:
        if model.symmetry is None or not model.symmetry.groups:
            raise ValueError(f"{method.kind} needs the symmetry of the task's network, with units to match")
        self.method, self.model, self.symmetry = method, model, model.symmetry
        self.depth = Depth(model.symmetry)
        self.levels = self._levels()
        self.params: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}
        self.units: dict[int, dict[str, Tensor]] = {}
        self.known = self._known()
        self.rest: list[ClientUpdate] = []  # of the clients that answered last
        self.away: list[ClientUpdate] = []
        self.theirs: dict[str, Tensor] = {}  # the units in θ_t of those that are away
        self.widths: list[dict[str, int]] = []  # of the clients that began
        self.shared = 0  # atoms that all clients have

    def _levels(self) -> list[Level]:
        try:
            return self.depth.levels()
        except ValueError as error:
            raise ValueError(f"{self.method.kind}: {error}") from None

    def _known(self) -> dict[str, Mapping[str, Tensor]]:
        """The units in θ_t of each client that is remembered."""
        units: Any = self.model.memory.get("units", {})
        return {**units}

    @property
    def start(self) -> Tensors | Callable[[int], Tensors | None]:
        """θ_t, of which a client has the units that were its own; nothing for one that is not remembered."""
        if not self.known:
            return self.model.params

        def sent(client_id: int) -> Tensors | None:
            units = self.known.get(str(client_id))
            return None if units is None else self.symmetry.take(self.model.params, units)

        return sent

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
        self.away += self._missed({update.client_id for update in updates})
        cohort, precisions = [*updates, *self.away], self.method.precisions(updates)
        sizes = [self.symmetry.sizes({**self.params, **update.params}) for update in cohort]
        self.widths = self.widths or sizes[: len(updates)]
        self.units = {update.client_id: self.units.get(update.client_id, {}) for update in cohort}
        for group in level.groups:
            weights = [self._weights(group, update.params, own) for update, own in zip(cohort, sizes, strict=True)]
            self._match(group, weights, precisions)
        grown = [self._grown(level, update, own) for update, own in zip(cohort, sizes, strict=True)]
        self.params |= {name: self._mean(name, grown, precisions) for name in level.tensors if name in grown[0].params}
        left = [replace(u, params={n: value for n, value in u.params.items() if n not in self.params}) for u in grown]
        self.rest, self.away = left[: len(updates)], left[len(updates) :]
        return self.rest

    def _missed(self, here: Set[int]) -> list[ClientUpdate]:
        """Those who answered last, and do not any more; at first, those remembered of whom there was no answer."""
        if not self.method.absence:
            return []
        return [one for one in self.rest if one.client_id not in here] if self.units else [*self._absent(here)]

    def _absent(self, here: Set[int]) -> Iterator[ClientUpdate]:
        """θ_t's units of the clients that are away, and not for too long."""
        seen: Any = self.model.memory.get("seen", {})
        since = self.model.round - self.method.absence
        self.known = {id: own for id, own in self.known.items() if int(id) in here or seen[id] >= since}
        away = [units for id, units in self.known.items() if int(id) not in here]
        if away:
            self.theirs = {
                group: torch.cat([units[group] for units in away]).bincount().nonzero()[:, 0] for group in away[0]
            }
            params = self.symmetry.take(self.model.params, self.theirs)
            yield ClientUpdate(client_id=AWAY, num_examples=1, params=params)

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
        here, away = weights[: len(precisions)], weights[len(precisions) :]
        found = match_units(here, precisions, self.method.prior, sweeps=self.method.sweeps, generator=generator)
        self.shared += int((torch.cat(found.units).bincount() == len(here)).sum())
        for theirs in away:
            found = joined(found, theirs, self.method.sigma**-2, self.method.prior)
        self.sizes[group] = found.size
        for own, units in zip(self.units.values(), found.units, strict=True):
            own[group] = units

    def _grown(self, level: Level, update: ClientUpdate, own: Sizes) -> ClientUpdate:
        """The update with the level's units where the atoms are, and zeros where it has none."""
        units = {group: self.units[update.client_id][group] for group in level.groups}
        return replace(update, params=self.symmetry.put(update.params, units, self.sizes, own))

    def _mean(self, name: str, grown: Updates, precisions: Sequence[float]) -> Tensor:
        """Σ s_k θ_k / Σ s_k over the clients that have the unit, or that had it; 1/σ0² below if weights are shrunk."""
        layout = self.depth.layout(name)
        total, mass = self._sums(name, grown, precisions)
        if self.method.shrunk and any(name in self.depth.weights(group) for group in groups(layout)):
            mass = torch.where(mass > 0, mass + self.method.sigma0**-2, 0)
        if away := grown[len(precisions) :]:
            theirs, held = self._sums(name, away, [1.0] * len(away))
            total, mass = torch.where(mass > 0, total, theirs), torch.where(mass > 0, mass, held)
        return (total / mass.clamp(min=TINY)).to(self.model.params[name].dtype)

    def _sums(self, name: str, grown: Updates, precisions: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Σ s_k θ_k, and Σ s_k of each unit's clients, which broadcasts to it."""
        axis, layout = self.depth.outputs[name], self.depth.layout(name) or 1
        total = zeros(grown[0].params[name].shape, self.model.device)
        mass = torch.zeros(total.shape[axis], dtype=torch.float64)
        for update, precision in zip(grown, precisions, strict=False):
            add_scaled_(total, precision, update.params[name])
            mass[places(layout, self.units[update.client_id], self.sizes)] += precision
        return total, along(mass.to(total.device), axis, total.ndim)

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
        if exchanges == 1:  # else the last one had everybody read the units of those who are away
            params |= {name: self._read(name, params[name]) for name in left.names}
        metrics = {**self._metrics(), "exchanges": exchanges}
        return Merged(like(self.model.params, params), self._memory(), metrics)

    def _read(self, name: str, mean: Tensor) -> Tensor:
        """What reads the units that only clients that are away have is theirs."""
        for away, (axis, layout) in product(self.away, enumerate(self.symmetry.axes.get(name, ()))):
            if layout is not None:
                here = torch.zeros(mean.shape[axis], dtype=torch.bool)
                for update in self.rest:
                    here[places(layout, self.units[update.client_id], self.sizes)] = True
                mean = torch.where(along(here.to(mean.device), axis, mean.ndim), mean, away.params[name])
        return mean

    def _memory(self) -> Memory:
        """The units of every client that is known, and the round of its last answer."""
        units, seen = {str(id): own for id, own in self.units.items()}, cast(Any, self.model.memory.get("seen", {}))
        moved = units.pop(str(AWAY), {})
        away = {id: own for id, own in self.known.items() if moved and id not in units}
        found = {id: {g: moved[g][torch.searchsorted(self.theirs[g], own[g])] for g in own} for id, own in away.items()}
        rounds = {**{id: seen[id] for id in away}, **dict.fromkeys(units, self.model.round)}
        return {"units": {**found, **units}, "seen": rounds}

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
        total += update.params[name].double() * along(share.to(value.device), 0, value.ndim)
    return total


def _shares(updates: Updates, classes: int) -> Tensor:
    """n_kc / n_c of each client and class; n_k / n for classes without examples, and where others are counted."""
    numbers = torch.tensor([[update.num_examples] for update in updates], dtype=torch.float64)
    counts = [update.class_counts for update in updates if update.class_counts is not None]
    if len(counts) < len(updates) or len(counts[0]) != classes:
        return numbers / numbers.sum()
    held = torch.stack(counts).double().cpu()
    return torch.where(held.sum(0) > 0, held / held.sum(0), numbers / numbers.sum())
