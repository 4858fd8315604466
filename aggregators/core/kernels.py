"""Fused loops that torch lacks: float32 into float64 sums in one pass over memory, on as many threads as torch has."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

_threads = torch.get_num_threads()
numba.set_num_threads(min(_threads, numba.get_num_threads()))
torch.set_num_threads(_threads)  # the line before started numba's, and with them gave torch another number


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
