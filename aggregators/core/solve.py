"""Linear systems known by their products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """x of b's shape, the iterations taken, ‖b − Ax‖ / ‖b‖, and whether it ended at a direction of curvature ≤ 0."""

    x: Tensor
    iterations: int
    residual: float
    indefinite: bool


def cg(matvec: Callable[[Tensor], Tensor], b: Tensor, tolerance: float = 1e-10, iterations: int = 1000) -> Solution:
    """The solution of Ax = b for a symmetric positive A, from x = 0, by conjugate gradients in b's dtype and shape.

    Stops at a residual below tolerance · ‖b‖, after `iterations`, or where A is not positive along the direction.
    Source: Hestenes and Stiefel 1952.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, rr, start = r.clone(), float((r * r).sum()), float((b * b).sum())
    taken, indefinite = 0, False
    while taken < iterations and rr > tolerance**2 * start:
        ap = matvec(p)
        curvature = float((p * ap).sum())
        if indefinite := curvature <= 0:
            break
        step = rr / curvature
        x, r = x + step * p, r - step * ap
        rr, last = float((r * r).sum()), rr
        p, taken = r + (rr / last) * p, taken + 1
    return Solution(x, taken, (rr / start) ** 0.5 if start else 0.0, indefinite)
