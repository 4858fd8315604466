"""What travels: what is asked of a client, what it answers, the model a round starts from and ends with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, Union, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

if TYPE_CHECKING:
    from .symmetry import Symmetry

Tensors: TypeAlias = Mapping[str, Tensor]  # read-only by convention
Memory: TypeAlias = Mapping[str, Union[Tensor, int, float, "Memory"]]
Estimator: TypeAlias = Literal["exact", "sampled", "empirical", "logit"]

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
TENSOR_FIELDS = ("params", "grad_sum", "sq_grad_sum", "grad_sketch", "gram", "grad_gram", "cross_moments")


class Moments(NamedTuple):
    """Count, mean and summed squared deviations m2 of each channel, shapes (), (C,), (C,)."""

    num: int
    mean: Tensor
    m2: Tensor


class Gradients(BaseModel):
    """Which sums over single examples' gradients a client computes; `limit` None means all training examples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sums: bool = False
    squares: bool = False
    sketches: int = Field(default=0, ge=0)
    estimator: Estimator = "exact"
    limit: int | None = Field(default=None, ge=1)

    def __or__(self, other: Gradients) -> Gradients:
        if self.estimator != other.estimator:
            raise ValueError(
                f"one reply cannot hold two estimators, {self.estimator!r} and {other.estimator!r}: choose one"
            )
        limits = (self.limit, other.limit)
        return Gradients(
            sums=self.sums or other.sums,
            squares=self.squares or other.squares,
            sketches=max(self.sketches, other.sketches),
            estimator=self.estimator,
            limit=None if None in limits else max(n for n in limits if n is not None),
        )


class Request(BaseModel):
    """What clients compute besides params; `a | b` asks for both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gradients: Gradients | None = None
    gram: bool = False
    grad_gram: bool = False
    moments: bool = False
    batch_stats: bool = False  # batch norms use the batch's own statistics while moments are measured
    cross_moments: bool = False
    class_counts: bool = False

    @model_validator(mode="after")
    def _batch_stats_are_of_moments(self) -> Request:
        if self.batch_stats and not self.moments:
            raise ValueError("batch_stats says how moments are measured: ask for moments too")
        return self

    def __or__(self, other: Request) -> Request:
        if self.moments and other.moments and self.batch_stats != other.batch_stats:
            raise ValueError("one reply cannot hold moments with batch_stats and without: choose one")
        mine, theirs = self.gradients, other.gradients
        flags = {n: getattr(self, n) or getattr(other, n) for n in Request.model_fields if n != "gradients"}
        return Request(gradients=mine | theirs if mine and theirs else mine or theirs, **flags)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientUpdate:
    """What one client returns from one exchange; fields that were not asked for are empty.

    Sums, and Gram matrices, are over `num_grads` single examples at θ_k in eval mode. `params` holds each tensor once
    (an alias of a tied weight is left out, the module restores it) and is empty where the exchange did not train.
    """

    client_id: int
    name: str = ""  # what the client calls itself in its node configuration; not authenticated
    num_examples: int
    params: Tensors = field(default_factory=dict)
    grad_sum: Tensors = field(default_factory=dict)  # Σ g_i
    sq_grad_sum: Tensors = field(default_factory=dict)  # Σ g_i²
    grad_sketch: Tensors = field(default_factory=dict)  # (r, *shape): s_j = Σ_i ε_ij g_i, ε = ±1
    num_grads: int = 0
    estimator: Estimator | None = None
    gram: Tensors = field(default_factory=dict)  # layer -> Σ x̃ x̃ᵀ, x̃ = [x, 1]
    grad_gram: Tensors = field(default_factory=dict)  # layer -> Σ δ δᵀ
    moments: Mapping[str, Moments] = field(default_factory=dict)  # layer or batch norm -> of its channels
    cross_moments: Tensors = field(default_factory=dict)  # layer -> correlations of its outputs, θ_k's by the anchor's
    class_counts: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def answers_to(self, client: int | str) -> bool:
        """Whether `client` means this one: its node id, as a number or its digits, or its name if that is no number."""
        named = bool(self.name) and not self.name.isdigit() and client == self.name
        return named or str(client) == str(self.client_id)

    def to(self, device: torch.device) -> ClientUpdate:
        """The same update with every tensor on `device`; tensors already there are shared, not copied."""
        moved = {f.name: _on(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Moments):
        return value._replace(mean=value.mean.to(device), m2=value.m2.to(device))
    if isinstance(value, Mapping):
        return {key: _on(item, device) for key, item in value.items()}
    return value


class Probe(BaseModel):
    """Server-side held-out data as functions of params: mean loss, and score (higher is better)."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    loss: Callable[[Tensors], float]
    score: Callable[[Tensors], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class GlobalModel:
    """The model θ_t a round starts from; the core follows its device.

    `trainable` is for membership: every other name in `params` is a buffer. Loops and float sums go over `names`
    or `params`, whose order is fixed.
    """

    params: Tensors
    trainable: frozenset[str]
    round: int = 0
    memory: Memory = field(default_factory=dict)
    probe: Probe | None = None
    symmetry: Symmetry | None = None  # for methods that need it

    @property
    def names(self) -> list[str]:
        """The trainable names in the order of `params`."""
        return [name for name in self.params if name in self.trainable]

    @property
    def buffers(self) -> list[str]:
        """Every other name, in the order of `params`."""
        return [name for name in self.params if name not in self.trainable]

    @property
    def device(self) -> torch.device:
        """Where the merge runs: the device of θ_t (CPU for a model without tensors)."""
        return next((tensor.device for tensor in self.params.values()), torch.device("cpu"))

    def within(self) -> GlobalModel:
        """The model as a wrapper's inner method sees it: with the inner's own part of the memory."""
        return replace(self, memory=self._part("inner"))

    def kept(self, key: str) -> Tensors:
        """The tensors the method left in its memory under `key` at the last round; empty in the first."""
        kept = self._part(key)
        return {name: value for name, value in kept.items() if isinstance(value, Tensor)}

    def _part(self, key: str) -> Memory:
        part = self.memory.get(key, {})
        if not isinstance(part, Mapping):
            raise TypeError(f"memory[{key!r}] holds {type(part).__name__}, not a mapping")
        return part


class Merged(NamedTuple):
    """What a round ends with: θ_{t+1}, the method's memory, and metrics (numbers or 0-d tensors)."""

    params: Tensors
    memory: Memory = {}
    metrics: Mapping[str, float | Tensor] = {}
