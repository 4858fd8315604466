"""Closed-form SSF beside the masked loss by gradient descent, and O(r) conditionals beside dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from aggregators.core.masked import Mask, MaskedLoss, conditional, descend, draw, residual
from aggregators.core.posterior import Block, Prior, Shapes, Span, flat, product

from .row import Row, interleaved

CLIENTS = 5
ALPHA = 0.01  # of the prior N(0, 1/α): the paper's
STEPS = 5000
MEASURED = 50  # steps of a large model that are taken; a step costs the same each time


def rows() -> Iterator[Row]:
    """The paper's two networks, then conditionals in its window of 5000."""
    generator = torch.Generator().manual_seed(0)
    yield from _solvers(
        "PINWHEEL, 400 parameters, 100 masked, 20 masks", 400, draw(generator, 400, 20, 100, None), STEPS
    )
    masks = draw(generator, 21_840, 50, 800, 5000)
    yield from _solvers("ConvNet, 21,840 parameters, 800 of 5000 masked, 50 masks", 21_840, masks, MEASURED)
    yield from _conditionals()


def cohort(size: int, rank: int = 1) -> Block:
    """Random posteriors, diagonal plus low rank, that contain the prior; five clients around one point."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    diagonal = normal(CLIENTS, size).square() + ALPHA
    return Block(normal(1, size) + 0.3 * normal(CLIENTS, size), diagonal, normal(CLIENTS, size, rank) * 0.3)


def _solvers(work: str, size: int, masks: list[Mask], steps: int) -> Iterator[Row]:
    block, shapes = cohort(size), {"theta": torch.Size([size])}
    loss = MaskedLoss.of(block, masks, zeros(size), ALPHA, "marginal")
    found = {}

    def sgd() -> None:
        found["sgd"] = descend(repeat(loss), zeros(size), steps, 0.01, 0.9)

    def closed() -> None:
        found["closed"] = closed_form(block, shapes)

    slow, fast = interleaved(sgd, partial(times, closed, 10), repeats=1)
    seconds, quick = slow * STEPS / steps, fast / 10
    taken = f"{STEPS} steps {seconds:.2f} s" + ("" if steps == STEPS else f" (of {steps} measured)")
    yield Row(f"closed-form SSF, {work}, K = {CLIENTS}", "sgd", seconds / quick, ">= 300", f"{quick:.4f} s, {taken}")
    if steps < STEPS:
        return  # sgd has not ended: its loss says nothing
    gap = energy(block, found["closed"]) - energy(block, found["sgd"])
    detail = "−log of the product's density above its minimum"
    yield Row(f"−log density at the closed form, {work}", "where sgd ends: the difference", gap, "<= 0", detail)


def times(work: object, number: int) -> None:
    for _ in range(number):
        work()  # type: ignore[operator]


def zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64)


def closed_form(block: Block, shapes: Shapes) -> Tensor:
    """The mean of the product of all posteriors, the shared prior counted once."""

    def read(client: int, span: Span) -> Block:
        part = slice(span.start, span.stop)
        return Block(block.mean[client, part], block.diagonal[client, part] - ALPHA, block.factor[client, part])

    prior = Prior(lambda span: zeros(span.stop - span.start), ALPHA, shared=True)
    clients = [partial(read, client) for client in range(len(block.mean))]
    return flat(product(clients, prior, shapes).mean, shapes)


def energy(block: Block, theta: Tensor) -> float:
    """½ Σ (θ − θ_k)ᵀ Λ_k (θ − θ_k) − ½ (K − 1) α ‖θ‖²: minus the log of the product's density, but for a constant."""
    steps = theta - block.mean
    quadratic = (block.diagonal * steps.square()).sum() + (block.factor.mT @ steps[..., None]).square().sum()
    return float(quadratic - (len(block.mean) - 1) * ALPHA * theta.square().sum()) / 2


def _conditionals() -> Iterator[Row]:
    block = cohort(5000)
    one = Block(block.mean[:1], block.diagonal[:1], block.factor[:1])
    steps = torch.linspace(-1, 1, 5000, dtype=torch.float64)

    def ours(masked: int) -> Tensor:
        mask = Mask(torch.arange(masked)[None])
        return residual(one, steps[None], mask, conditional(one, mask, "marginal"))

    fast, twice, dense = interleaved(
        partial(times, partial(ours, 800), 20),
        partial(times, partial(ours, 1600), 20),
        partial(_dense, one, steps, 800),
        repeats=5,
    )
    work = "conditionals of 800 masked given the rest of 5000"
    if not torch.allclose(ours(800).flatten(), _dense(one, steps, 800)):
        raise RuntimeError("the two ways to the conditionals disagree")
    yield Row(work, "a dense solve, one right-hand side", dense / (fast / 20), ">= 20", f"{fast / 20 * 1e3:.2f} ms")
    yield Row(f"{work}: seconds with twice as many masked", "once", twice / fast, "<= 2.2", "")


def _dense(one: Block, steps: Tensor, masked: int) -> Tensor:
    """δ_M + Λ_MM^{-1} Λ_MR δ_R from full matrices."""
    u, d = one.factor[0], one.diagonal[0]
    among = u[:masked] @ u[:masked].T + d[:masked].diag()
    across = u[:masked] @ u[masked:].T
    shift: Tensor = torch.linalg.solve(among, across @ steps[masked:])
    return steps[:masked] + shift


if __name__ == "__main__":
    for row in rows():
        print(f"{row.work} / {row.beside}: {row.ratio:.2f} {row.asked} ({row.detail})")
