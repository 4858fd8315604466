"""Federated averaging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from ..core.base import SumAggregator, Sums, Term
from ..core.update import ClientUpdate, GlobalModel, Merged, Request


class FedAvg(SumAggregator):
    """The mean of the clients' models, θ* = Σ w_k θ_k / Σ w_k.

    w_k = n_k with weights `num_examples`; w_k = 1 with `uniform`, the fusion papers' isotropic merging.
    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    algorithm 1; Matena and Raffel 2022, eq. 1. Time O(D) a client, memory one float64 sum.
    """

    kind: Literal["fedavg"] = "fedavg"
    weights: Literal["num_examples", "uniform"] = Field(default="num_examples", description="what w_k is")

    examples = ({"weights": "uniform"},)

    @property
    def request(self) -> Request:
        """Nothing besides params."""
        return Request()

    def terms(self, model: GlobalModel, update: ClientUpdate) -> Iterator[Term]:
        """w_k θ_k."""
        weight = update.num_examples if self.weights == "num_examples" else 1
        for name in model.names:
            yield Term("weighted", name, weight, update.params[name])

    def finish(self, model: GlobalModel, sums: Sums) -> Merged:
        """Σ w_k θ_k / Σ w_k."""
        return Merged({name: sum.mean() for name, sum in sums["weighted"].items()})
