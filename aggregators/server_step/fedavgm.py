"""Server momentum."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..core.base import Aggregator
from ..core.exchange import Round
from ..core.registry import OfOneWidth
from ..core.tensors import like, steps, widened
from ..core.update import GlobalModel


class FedAvgM(Aggregator):
    """The inner method's result taken as a step, with momentum: v ← β v + (θ* − θ_t), θ_{t+1} = θ_t + η v.

    Trainable names only; buffers are the inner's. Memory: v, float32 or wider as the model is.
    Source: Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", section 4.3.
    """

    kind: Literal["fedavgm"] = "fedavgm"
    inner: OfOneWidth = Field(description="the method that makes θ*")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="β")
    learning_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="η")

    def round(self, model: GlobalModel) -> Round:
        """The inner's round, then the step."""
        merged = yield from self.inner.round(model.within())
        past = model.kept("momentum")
        step = steps(model.names, merged.params, model.params)
        velocity = {name: self.momentum * past[name] + delta if name in past else delta for name, delta in step.items()}
        moved = {name: model.params[name] + self.learning_rate * v for name, v in velocity.items()}
        kept = {name: v.to(widened(model.params[name]).dtype) for name, v in velocity.items()}
        return merged._replace(
            params=like(model.params, {**merged.params, **moved}),
            memory={"momentum": kept, "inner": merged.memory},
        )
