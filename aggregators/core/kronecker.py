"""Linear systems of sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .solve import Solution, cg

ROUNDING = 2**-24  # relative, of each entry of a matrix that came in float32


class Pair(NamedTuple):
    """The Kronecker product of symmetric positive B, (m, m), and A, (n, n), as a map; float64."""

    b: Tensor
    a: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """B V A."""
        return self.b @ v @ self.a

    def trace(self) -> Tensor:
        """Of B ⊗ A."""
        return self.b.trace() * self.a.trace()


def solve(pairs: Sequence[Pair], right: Tensor, damping: float, tolerance: float, iterations: int) -> Solution:
    """The V, (m, n), of Σ B_k V A_k + λV = right with λ = damping · tr(Σ B_k ⊗ A_k) / (m n), by conjugate gradients.

    Preconditioned by one Kronecker product, exact for one pair, and for pairs that share A or B but for a factor: in
    its eigenbasis it is a scale of each entry, and the residual that `tolerance` bounds is of the scaled system.
    Directions that Σ A_k does not reach, but for the rounding of float32, are 0 in V. Time O(m³ + n³) a pair, and
    O(m n (m + n)) a pair and iteration.
    """
    mean = _mean(pairs)
    strength = damping * mean.trace() / right.numel()
    (b, q), (a, p) = torch.linalg.eigh(mean.b), torch.linalg.eigh(mean.a)
    precision = torch.outer(b, a) + strength
    reached = (a > len(a) * ROUNDING * a[-1]) & (precision > 0)
    scale = torch.where(reached, precision.rsqrt(), 0)

    def matvec(u: Tensor) -> Tensor:
        v = q @ (scale * u) @ p.T
        total = strength * v
        for pair in pairs:
            total += pair(v)
        back: Tensor = q.T @ total @ p
        return scale * back

    found = cg(matvec, scale * (q.T @ right @ p), tolerance, iterations)
    return found._replace(x=q @ (scale * found.x) @ p.T)


def _mean(pairs: Sequence[Pair]) -> Pair:
    """The B ⊗ A of the same trace as Σ B_k ⊗ A_k in which each factor is weighted by the other's trace."""
    total = torch.stack([pair.trace() for pair in pairs]).sum().clamp(min=torch.finfo(torch.float64).tiny)
    b = torch.stack([pair.a.trace() * pair.b / total for pair in pairs]).sum(0)
    return Pair(b, torch.stack([pair.b.trace() * pair.a for pair in pairs]).sum(0))
