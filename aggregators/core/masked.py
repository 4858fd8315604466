"""The self-supervised objective: what masked parameters are, given the rest, under each client's posterior."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil, log, pi
from typing import Annotated, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from .exchange import LostRound
from .posterior import Block
from .solve import cg

MaskSize: TypeAlias = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | Literal["uniform"]
Precision: TypeAlias = Literal["marginal", "paper"]


class Mask(NamedTuple):
    """P sets of m masked coordinates, (P, m), and what they are conditioned on, (P, w − m); None: all the others."""

    masked: Tensor
    rest: Tensor | None = None


class Conditional(NamedTuple):
    """p(θ_M | θ_R) of each client and mask, but for θ: what every step shares.

    Factors U_M (K, P, m, r) and U_R (K, P, w − m, r) or None, the gain D_M^{-1} U_M C^{-1} with
    C = I + U_Mᵀ D_M^{-1} U_M, (K, P, m, r), and the precision of each masked coordinate (K, P, m).
    """

    factor: Tensor
    rest: Tensor | None
    gain: Tensor
    precision: Tensor


def conditional(cohort: Block, mask: Mask, precision: Precision) -> Conditional:
    """The conditionals of the masked coordinates, O(r) each: no m × m matrix is formed.

    `marginal` is each coordinate's own precision given the rest, 1 / [(Λ_MM)^{-1}]_jj with
    [(Λ_MM)^{-1}]_jj = 1/D_j − u_jᵀ C^{-1} u_j / D_j²; `paper` is [Λ_MM]_jj, which conditions on the other masked
    coordinates too (Recasens et al. 2023, the code of section 3.2).
    """
    diagonal, factor = cohort.diagonal[:, mask.masked], cohort.factor[:, mask.masked]
    rest = None if mask.rest is None else cohort.factor[:, mask.rest]
    scaled = factor / diagonal[..., None]
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    gain = scaled @ torch.linalg.inv(identity + factor.mT @ scaled)
    if precision == "paper":
        return Conditional(factor, rest, gain, diagonal + factor.square().sum(-1))
    variance = 1 / diagonal - (gain * scaled).sum(-1)
    return Conditional(factor, rest, gain, 1 / variance)


def residual(cohort: Block, steps: Tensor, mask: Mask, given: Conditional) -> Tensor:
    """θ_M − μ_{M|R} = δ_M + D_M^{-1} U_M C^{-1} U_Rᵀ δ_R of each client and mask, (K, P, m), from θ − θ_k, (K, D)."""
    masked = steps[:, mask.masked]
    if mask.rest is None or given.rest is None:
        whole = (cohort.factor.mT @ steps[..., None])[:, None]
        projected = whole - given.factor.mT @ masked[..., None]
    else:
        projected = given.rest.mT @ steps[:, mask.rest][..., None]
    return masked + (given.gain @ projected)[..., 0]


@dataclass(frozen=True, eq=False)
class MaskedLoss:
    """The loss of eq. 7 of Recasens et al. 2023 over fixed masks: an exact quadratic in θ.

    L(θ) = −mean over masks of 1/m Σ_k Σ_{j ∈ M} [log N(θ_j; μ_j|R, p_j^{-1}) − (K − 1)/K log N(θ_j; c_j, α^{-1})].
    The paper prints (k − 1)/K. The cohort, (K, D), (K, D) and (K, D, r), contains the prior N(c, α^{-1} I), c of (D,).
    """

    cohort: Block
    masks: Sequence[Mask]
    centre: Tensor
    alpha: float
    conditionals: Sequence[Conditional]

    @staticmethod
    def of(cohort: Block, masks: Sequence[Mask], centre: Tensor, alpha: float, precision: Precision) -> MaskedLoss:
        """The loss with each mask's conditionals at hand."""
        return MaskedLoss(cohort, masks, centre, alpha, [conditional(cohort, mask, precision) for mask in masks])

    def value(self, theta: Tensor) -> Tensor:
        """L(θ), a 0-d tensor."""
        return torch.stack([self._value(theta, *pair) for pair in self._pairs()]).mean()

    def gradient(self, theta: Tensor) -> Tensor:
        """∇L(θ), shape (D,)."""
        return torch.stack([self._gradient(theta, *pair) for pair in self._pairs()]).mean(0)

    def _pairs(self) -> zip[tuple[Mask, Conditional]]:
        return zip(self.masks, self.conditionals, strict=True)

    def _value(self, theta: Tensor, mask: Mask, given: Conditional) -> Tensor:
        p, off = given.precision, residual(self.cohort, theta - self.cohort.mean, mask, given)
        client = 0.5 * (p.log() - log(2 * pi) - p * off.square())
        from_centre = (theta - self.centre)[mask.masked]
        prior = 0.5 * (log(self.alpha) - log(2 * pi) - self.alpha * from_centre.square()) if self._shared else 0.0
        return -(client.sum(0) - self._shared * prior).mean()

    def _gradient(self, theta: Tensor, mask: Mask, given: Conditional) -> Tensor:
        weighted = given.precision * residual(self.cohort, theta - self.cohort.mean, mask, given)  # w
        pulled = given.gain.mT @ weighted[..., None]  # q = C^{-1} U_Mᵀ D_M^{-1} w, (K, P, r, 1)
        masked = weighted.sum(0) - self._shared * self.alpha * (theta - self.centre)[mask.masked]
        gradient = torch.zeros_like(theta)
        if mask.rest is None or given.rest is None:
            masked = masked - (given.factor @ pulled)[..., 0].sum(0)
            gradient += (self.cohort.factor @ pulled.sum(1))[..., 0].sum(0)
        else:
            gradient.index_add_(0, mask.rest.flatten(), (given.rest @ pulled).sum(0).flatten())
        return gradient.index_add_(0, mask.masked.flatten(), masked.flatten()) / mask.masked.numel()

    @property
    def _shared(self) -> int:
        return len(self.cohort.mean) - 1


def draw(generator: torch.Generator, size: int, masks: int, masked: MaskSize, window: int | None) -> list[Mask]:
    """Random masks of `size` coordinates: `masked` of them, a share, or of uniform number, within a random window."""
    width = size if window is None else min(window, size)
    device = generator.device
    orders = [torch.randperm(size, generator=generator, device=device)[:width] for _ in range(masks)]
    if masked == "uniform":
        numbers = torch.randint(1, width + 1, (masks,), generator=generator, device=device).tolist()
        return [_mask(order[None], number, size) for order, number in zip(orders, numbers, strict=True)]
    number = masked if isinstance(masked, int) else ceil(masked * width)
    return [_mask(torch.stack(orders), min(number, width), size)]


def _mask(orders: Tensor, masked: int, size: int) -> Mask:
    whole = orders.shape[1] == size
    return Mask(orders[:, :masked], None if whole else orders[:, masked:])


def descend(losses: Iterator[MaskedLoss], start: Tensor, steps: int, learning_rate: float, momentum: float) -> Tensor:
    """θ after gradient descent with momentum, a step on each loss; LostRound where the last loss is no number."""
    theta, velocity = start.clone(), torch.zeros_like(start)
    for loss in islice(losses, steps):
        velocity = momentum * velocity + loss.gradient(theta)
        theta = theta - learning_rate * velocity
    if not bool(loss.value(theta).isfinite()):
        raise LostRound(f"the masked loss diverged at learning rate {learning_rate:g}: lower it, or use 'closed_form'")
    return theta


def minimise(loss: MaskedLoss, start: Tensor) -> Tensor:
    """The θ nearest to `start` that minimises the loss, by conjugate gradients; LostRound where it has no minimum."""
    slope = loss.gradient(start)
    found = cg(lambda step: loss.gradient(start + step) - slope, -slope)
    if found.indefinite:
        raise LostRound("the masked loss has no minimum: mask more coordinates, or use the solver 'closed_form'")
    return start + found.x
