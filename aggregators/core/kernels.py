"""Fused loops that torch lacks: float32 into float64 sums in one pass over memory, on every core."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


@numba.njit(parallel=True, nogil=True, cache=True)
def add_scaled(total: Array, scale: float, value: Array) -> None:
    """total += scale · value."""
    for i in numba.prange(total.size):
        total[i] += scale * value[i]


@numba.njit(parallel=True, nogil=True, cache=True)
def add_scaled_product(total: Array, scale: float, value: Array, factor: Array) -> None:
    """total += scale · (value · factor), the product in float64."""
    for i in numba.prange(total.size):
        total[i] += scale * (np.float64(value[i]) * np.float64(factor[i]))
