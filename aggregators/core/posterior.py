"""Gaussian posteriors N(θ_k, Λ_k^{-1}) with Λ_k = D_k + U_k U_kᵀ, diagonal plus low rank, and their product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

BLOCK = 1 << 16  # coordinates at once: a block with all clients' factors stays small
FLOOR = 1e-12  # of the mean precision; what the prior has at least, so that every system has one solution

Shapes: TypeAlias = Mapping[str, torch.Size]


class Span(NamedTuple):
    """The entries from `start` to `stop` of the flattened parameter `name`."""

    name: str
    start: int
    stop: int

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """These entries, shape (b,), float64."""
        return tensors[self.name].reshape(-1)[self.start : self.stop].double()

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """These entries of each of r stacked parameters, shape (b, r), float64."""
        return tensors[self.name].unsqueeze(-1).flatten(1)[:, self.start : self.stop].T.double()


class Block(NamedTuple):
    """A posterior on b coordinates, float64: mean θ_k (b,), diagonal D_k ≥ 0 (b,), factor U_k (b, r)."""

    mean: Tensor
    diagonal: Tensor
    factor: Tensor

    def precision(self) -> Tensor:
        """The diagonal of D_k + U_k U_kᵀ, shape (b,)."""
        return self.diagonal + self.factor.square().sum(1)


Posterior: TypeAlias = Callable[[Span], Block]


class Prior(NamedTuple):
    """N(c, λ^{-1} I), by its centre c on each span and λ > 0.

    `shared`: every client's posterior contains it already, so the product takes it out K − 1 times.
    """

    centre: Callable[[Span], Tensor]
    precision: float
    shared: bool = False


class Product(NamedTuple):
    """The product's mean by parameter name, float64, and the share of coordinates where the prior outweighs data."""

    mean: dict[str, Tensor]
    damped_share: Tensor


def spans(shapes: Shapes) -> Iterator[Span]:
    """All entries of all parameters in order, in blocks."""
    for name, shape in shapes.items():
        for start in range(0, max(1, shape.numel()), BLOCK):  # an empty parameter is one empty block
            yield Span(name, start, min(start + BLOCK, shape.numel()))


def flat(tensors: Mapping[str, Tensor], shapes: Shapes) -> Tensor:
    """The parameters in `shapes` as one float64 vector, shape (D,)."""
    return torch.cat([tensors[name].reshape(-1).double() for name in shapes])


def unflat(vector: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The inverse of `flat`: views of the vector by name."""
    parts = torch.split(vector, [shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def damped(clients: Sequence[Posterior], shapes: Shapes, damping: float) -> float:
    """λ = damping · the mean over all coordinates of Σ_k diag Λ_k, and no less than makes every system solvable."""
    total = sum(client(span).precision().sum() for span in spans(shapes) for client in clients)
    return max(damping, FLOOR) * float(total) / max(1, _size(shapes)) or 1.0


def _size(shapes: Shapes) -> int:
    return sum(shape.numel() for shape in shapes.values())


def everywhere(part: Callable[[Span], Tensor], shapes: Shapes) -> Tensor:
    """What `part` gives on every span, as one vector, shape (D,)."""
    return torch.cat([part(span) for span in spans(shapes)])


def posteriors(clients: Sequence[Posterior], prior: Prior, shapes: Shapes) -> Block:
    """Each client's likelihood times the prior, on all coordinates: (K, D), (K, D) and (K, D, r)."""
    blocks = [[client(span) for client in clients] for span in spans(shapes)]
    stacked = [Block(*(torch.stack(field) for field in zip(*row, strict=True))) for row in blocks]
    whole = Block(*(torch.cat(field, dim=1) for field in zip(*stacked, strict=True)))
    if not prior.shared:
        modes = [flat(product([client], prior, shapes).mean, shapes) for client in clients]
        whole = whole._replace(mean=torch.stack(modes))
    return whole._replace(diagonal=whole.diagonal + prior.precision)


def product(clients: Sequence[Posterior], prior: Prior, shapes: Shapes) -> Product:
    """The mean of the product of all clients' likelihoods and one prior, in closed form.

    θ* = c + [Σ Λ_k + λI]^{-1} b, b = Σ Λ_k (θ_k − c), or Σ (Λ_k + λI)(θ_k − c) for a shared prior. With D̃ = Σ D_k + λ,
    Ũ = [U_1 … U_K] and t = [U_kᵀ (θ_k − c)], Woodbury's identity leaves one system of Σ r_k unknowns:
    z = (I + Ũᵀ D̃^{-1} Ũ)^{-1} (t − Ũᵀ D̃^{-1} d), θ* = c + D̃^{-1} (d + Ũ z), where b = d + Ũ t. Coordinates on which no
    client has information take c. Two passes over blocks of coordinates; time O(D R²), memory O(R²) beside the result,
    R = Σ r_k. Source: Recasens et al. 2023, eq. 5 with the exponent (K − 1)/K, minimised exactly.
    """
    weights = _weights(clients, prior, shapes)
    mean, damped = [], []
    for span in spans(shapes):
        joint = _joint(clients, prior, span)
        mean.append(joint.centre + (joint.pull + joint.factor @ weights) / joint.diagonal)
        damped.append((joint.information < prior.precision).sum())
    return Product(unflat(torch.cat(mean), shapes), torch.stack(damped).sum() / max(1, _size(shapes)))


class _Joint(NamedTuple):
    """All clients on one span: c, D̃, Ũ, d, t of this span, and Σ diag Λ_k."""

    centre: Tensor
    diagonal: Tensor
    factor: Tensor
    pull: Tensor
    projected: Tensor
    information: Tensor


def _joint(clients: Sequence[Posterior], prior: Prior, span: Span) -> _Joint:
    blocks = [client(span) for client in clients]
    information = torch.stack([block.precision() for block in blocks]).sum(0)
    centre = prior.centre(span)
    steps = [torch.where(information > 0, block.mean - centre, 0) for block in blocks]
    own = prior.precision if prior.shared else 0.0
    pairs = list(zip(blocks, steps, strict=True))
    return _Joint(
        centre=centre,
        diagonal=torch.stack([block.diagonal for block in blocks]).sum(0) + prior.precision,
        factor=torch.cat([block.factor for block in blocks], dim=1),
        pull=torch.stack([(block.diagonal + own) * step for block, step in pairs]).sum(0),
        projected=torch.cat([block.factor.T @ step for block, step in pairs]),
        information=information,
    )


def _weights(clients: Sequence[Posterior], prior: Prior, shapes: Shapes) -> Tensor:
    """z, shape (R,)."""
    system, right = torch.zeros(()), torch.zeros(())
    for span in spans(shapes):
        joint = _joint(clients, prior, span)
        scaled = joint.factor / joint.diagonal[:, None]
        system = system.to(scaled) + joint.factor.T @ scaled
        right = right.to(scaled) + joint.projected - scaled.T @ joint.pull
    identity = torch.eye(len(system), dtype=torch.float64, device=system.device)
    return torch.cholesky_solve(right[:, None], torch.linalg.cholesky(system + identity))[:, 0]
