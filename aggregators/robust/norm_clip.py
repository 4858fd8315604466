"""Clipping of each client's step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ..core.base import Aggregator
from ..core.exchange import Exchange, Round, premap
from ..core.registry import AnyAggregator
from ..core.tensors import norm, steps
from ..core.update import ClientUpdate, GlobalModel


class NormClip(Aggregator):
    """The inner method's round, on clients whose step is at most `max_norm` long.

    θ_k ← θ_t + Δ_k · min(1, max_norm / ‖Δ_k‖), Δ_k = θ_k − θ_t over all trainable parameters, θ_t what that client
    was sent. Source: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 4 (norm thresholding).
    """

    kind: Literal["norm_clip"] = "norm_clip"
    inner: AnyAggregator = Field(description="the method that merges the clipped clients")
    max_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="the longest step, an L2 norm")

    needs: ClassVar[frozenset[str]] = frozenset({"shared_start"})

    def round(self, model: GlobalModel) -> Round:
        """The inner's round, its updates clipped first."""

        def clip(exchange: Exchange[Any], update: ClientUpdate) -> ClientUpdate:
            start = exchange.sent(update.client_id)
            if start is None:
                raise ValueError("norm_clip measures steps from the server's model: use start = 'shared'")
            theta = update.params
            delta = steps(model.names, theta, start)
            scale = self.max_norm / norm(delta.values()).clamp(min=self.max_norm)
            clipped = {
                name: torch.where(scale < 1, start[name] + scale * step, theta[name]).to(theta[name].dtype)
                for name, step in delta.items()
            }
            return replace(update, params={**theta, **clipped})

        return premap(self.inner.round(model), clip)
