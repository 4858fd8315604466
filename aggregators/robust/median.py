"""Coordinate-wise median."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..core.base import CohortAggregator
from ..core.update import ClientUpdate, GlobalModel, Merged, Request


class Median(CohortAggregator):
    """The median over clients of every coordinate, buffers included, θ*_j = median_k θ_kj.

    Of an even cohort it is the middle two's mean.
    Integer buffers take the lower median, so that they keep their dtype and no single client can set them.
    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    definition 1 and algorithm 1. Time O(D K log K), memory K models.
    """

    kind: Literal["median"] = "median"

    @property
    def request(self) -> Request:
        """Nothing besides params."""
        return Request()

    @property
    def min_updates(self) -> int:
        """One: its own median."""
        return 1

    def merge(self, model: GlobalModel, updates: Sequence[ClientUpdate]) -> Merged:
        """The middle of each coordinate's sorted values."""
        return Merged({name: _middle([update.params[name] for update in updates]) for name in model.params})


def _middle(values: Sequence[Tensor]) -> Tensor:
    ranked = torch.stack(list(values)).sort(dim=0).values
    low, high = ranked[(len(values) - 1) // 2], ranked[len(values) // 2]
    return (low.double() + high.double()) / 2 if low.is_floating_point() else low
