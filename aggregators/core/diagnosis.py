"""What an alignment did: how far clients were from one another, and whether a barrier is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .matching import Matching
from .tensors import norm
from .update import GlobalModel, Tensors

POINTS = (0.25, 0.5, 0.75)  # of the path on which the barrier is looked for


@dataclass(eq=False)
class Diagnosis:
    """Sums over the clients that a round aligned, and where the path to the merge starts: the first of them, if unset.

    The parameters of that client stay in memory, where there is a probe to look for a barrier with.
    """

    model: GlobalModel
    start: Tensors = field(default_factory=dict)
    clients: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, matching: Matching, reference: Tensors, params: tuple[Tensors, Tensors]) -> None:
        """One client, what it is compared with, and its parameters before and after."""
        self.start = self.start or ({} if self.model.probe is None else params[1])
        self.clients += 1
        measured = {
            "matching_objective_before": matching.before,
            "matching_objective": matching.after,
            "units_moved": matching.moved_share,
            "distance_before": self._distance(params[0], reference),
            "distance": self._distance(params[1], reference),
        }
        for name, value in measured.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def metrics(self, merged: Tensors) -> dict[str, float]:
        """Means over clients; with a probe the loss barrier on the path from a client to the merge."""
        means = {name: total / self.clients for name, total in self.sums.items()}
        probe = self.model.probe
        return means if probe is None or not self.start else {**means, "barrier": self._barrier(probe.loss, merged)}

    def _distance(self, params: Tensors, reference: Tensors) -> float:
        """‖θ_k − θ_ref‖ over trainable tensors."""
        return float(norm(params[name].double() - reference[name].double() for name in self.model.names))

    def _barrier(self, loss: Callable[[Tensors], float], merged: Tensors) -> float:
        """max_t L((1 − t) θ_1 + t θ*) − [(1 − t) L(θ_1) + t L(θ*)] (Entezari et al. 2022, eq. 1), at least 0.

        Running statistics go the same way: they are not measured anew in between.
        """
        ends = loss(self.start), loss(merged)
        return max(0.0, *(loss(between(self.start, merged, t)) - (1 - t) * ends[0] - t * ends[1] for t in POINTS))


def between(start: Tensors, end: Tensors, t: float) -> dict[str, Tensor]:
    """(1 − t) start + t end, in their dtypes; integers are those of the start."""
    return {
        name: torch.lerp(value.double(), end[name].double(), t).to(value.dtype) if value.is_floating_point() else value
        for name, value in start.items()
    }
