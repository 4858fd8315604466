"""Figure 1 of Recasens et al. 2023: Bayesian linear regression on three overlapping subsets, where all is exact.

The clients' posteriors are Gaussian, so the pooled posterior is known in closed form, and SSF's steps, the closed form,
isotropic and diagonal Fisher merging can be told apart by their distance to its mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from aggregators.core.masked import MaskedLoss, MaskSize, Precision, draw
from aggregators.core.posterior import Block, Posterior, Prior, posteriors, product
from aggregators.core.seed import derive_seed

from .report import Gate, Report, Row, command_line, spread

FEATURES, CLIENTS, POINTS = 11, 3, 200  # the first feature is 1; points per client
ALPHA, BETA = 1.0, 4.0  # precisions of the prior, N(0, 1/α), and of the noise
STEPS, MASKS, LEARNING_RATE, MOMENTUM = 5000, 10, 1e-4, 0.9
TOLERANCE = 1e-10
MEAN, DIAGONAL, FULL = FEATURES, 2 * FEATURES, FEATURES + FEATURES * (FEATURES + 1) // 2  # numbers a client sends
SHAPES = {"weight": torch.Size([FEATURES])}
DESCENTS: Mapping[str, tuple[MaskSize, Precision]] = {
    "SSF, 3 masked": (3, "paper"),
    "SSF, 7 masked": (7, "paper"),
    "SSF, 3 masked, marginal": (3, "marginal"),
    "SSF, uniform number masked, marginal": ("uniform", "marginal"),
}
NOTES = (
    "SSF's steps with a fixed number masked converge to another point than the posterior's mean, because their "
    "objective is another; with all 11 masked it would be diagonal Fisher merging's. Only with a uniform number masked "
    "and each coordinate's own (marginal) precision is the posterior's mean the objective's minimum. Steps of constant "
    "size then come as near as the masks' noise lets them, and diverge when they are ten times as large.",
    "The paper's diagonal Fisher curve takes another noise variance and leaves the bias out; here it has the true "
    "posteriors' diagonals.",
    "For linear models the ensemble's prediction is isotropic merging's.",
)


class Client(NamedTuple):
    """A subset: design matrix Φ (n, D) and targets t (n,), float64."""

    design: Tensor
    targets: Tensor

    def posterior(self) -> Block:
        """N(m, (αI + UUᵀ)^{-1}) with UUᵀ = β ΦᵀΦ and m = β (αI + UUᵀ)^{-1} Φᵀt; as a block, without the prior's αI."""
        factor = torch.linalg.qr(BETA**0.5 * self.design).R.T
        precision = ALPHA * torch.eye(FEATURES).double() + factor @ factor.T
        mean = torch.linalg.solve(precision, BETA * self.design.T @ self.targets)
        return Block(mean, torch.zeros(FEATURES).double(), factor)

    def error(self, theta: Tensor) -> float:
        """The mean squared error of the prediction Φθ."""
        return float((self.design @ theta - self.targets).square().mean())


class Course(NamedTuple):
    """Where a method ends, its relative distance to the pooled posterior's mean on the way, and what clients send."""

    theta: Tensor
    sent: int
    distances: Sequence[float]


def run(quick: bool, seeds: int) -> Report:
    """The figure and its end points; a quick run takes a quarter of the steps."""
    courses: dict[str, list[Course]] = {}
    clients = {seed: subsets(seed) for seed in range(seeds)}
    for seed in track(clients, "seeds"):
        for name, course in merged(clients[seed], STEPS // 4 if quick else STEPS, seed):
            courses.setdefault(name, []).append(course)
    return Report(
        title="SSF, Figure 1: Bayesian linear regression",
        tables={"At the end": [row(name, found, list(clients.values())) for name, found in courses.items()]},
        plot=lambda figure: plot(courses, figure),
        gates=[gate(courses["closed form"])],
        notes=NOTES,
    )


def subsets(seed: int) -> list[Client]:
    """Three clients of one linear function with noise; client k's inputs lie in [k/4, k/4 + 1/2]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "linear"))
    weight = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    found = []
    for client in range(CLIENTS):
        inputs = client / 4 + torch.rand(POINTS, FEATURES - 1, generator=generator, dtype=torch.float64) / 2
        design = torch.cat([torch.ones(POINTS, 1).double(), inputs], 1)
        noise = torch.randn(POINTS, generator=generator, dtype=torch.float64) / BETA**0.5
        found.append(Client(design, design @ weight + noise))
    return found


def pooled(clients: Sequence[Client]) -> Tensor:
    """The mean of the posterior given all clients' points, (D,)."""
    return Client(*(torch.cat(parts) for parts in zip(*clients, strict=True))).posterior().mean


def merged(clients: Sequence[Client], steps: int, seed: int) -> Iterator[tuple[str, Course]]:
    """Each method's course; of one point where it takes no steps."""
    blocks, target = [client.posterior() for client in clients], pooled(clients)

    def course(sent: int, *thetas: Tensor) -> Course:
        return Course(thetas[-1], sent, [float((theta - target).norm() / target.norm()) for theta in thetas])

    precisions = torch.stack([block.precision() + ALPHA for block in blocks])
    means = torch.stack([block.mean for block in blocks])
    yield "isotropic", course(MEAN, means.mean(0))
    yield "diagonal Fisher", course(DIAGONAL, (precisions * means).sum(0) / precisions.sum(0))
    for name, (size, precision) in DESCENTS.items():
        yield name, course(FULL, *islice(descent(blocks, size, precision, seed), steps))
    yield "closed form", course(FULL, product(_callables(blocks), _prior(), SHAPES).mean["weight"])
    yield "best client alone", min((course(MEAN, mean) for mean in means), key=lambda course: course.distances[-1])


def descent(blocks: Sequence[Block], size: MaskSize, precision: Precision, seed: int) -> Iterator[Tensor]:
    """θ after each step of SSF from a draw of the prior, with masks drawn anew in every step."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "masks"))
    cohort, centre = posteriors(_callables(blocks), _prior(), SHAPES), torch.zeros(FEATURES).double()
    theta = torch.randn(FEATURES, generator=generator, dtype=torch.float64) / ALPHA**0.5
    velocity = torch.zeros_like(theta)
    while True:
        loss = MaskedLoss.of(cohort, draw(generator, FEATURES, MASKS, size, None), centre, ALPHA, precision)
        velocity = MOMENTUM * velocity + loss.gradient(theta)
        theta = theta - LEARNING_RATE * velocity
        yield theta


def _prior() -> Prior:
    return Prior(lambda span: torch.zeros(span.stop - span.start).double(), ALPHA, shared=True)


def _callables(blocks: Sequence[Block]) -> list[Posterior]:
    """The blocks as functions of a span, which here is always all."""
    return [lambda span, block=block: block for block in blocks]  # type: ignore[misc]


def gate(courses: Sequence[Course]) -> Gate:
    """Whether the closed form is the pooled posterior's mean, in every seed."""
    worst = max(course.distances[-1] for course in courses)
    name = "the closed form is the pooled posterior's mean to 1e-10 relative, in every seed"
    return Gate(name, worst <= TOLERANCE, f"largest distance {worst:.2g}")


def row(name: str, courses: Sequence[Course], clients: Sequence[Sequence[Client]]) -> Row:
    """A method's end points over seeds."""
    worst = [max(c.error(course.theta) for c in found) for course, found in zip(courses, clients, strict=True)]
    return {
        "method": name,
        "distance to the pooled posterior's mean": spread(course.distances[-1] for course in courses),
        "worst client's squared error": spread(worst),
        "bytes a client sends": 8 * courses[0].sent,
    }


def plot(courses: Mapping[str, Sequence[Course]], figure: Figure) -> None:
    """The geometric mean over seeds of the distance, by step."""
    axes = figure.subplots()
    for style, (name, found) in enumerate(courses.items()):
        distances = torch.tensor([course.distances for course in found]).log().mean(0).exp()
        if len(distances) > 1:
            axes.plot(range(1, 1 + len(distances)), distances, color=f"C{style}", label=name)
        else:
            axes.axhline(float(distances), linestyle="--", color=f"C{style}", label=name)
    axes.set(xlabel="step", ylabel="relative distance to the pooled posterior's mean", xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


if __name__ == "__main__":
    torch.set_num_threads(1)  # such small systems only lose by more
    command_line("ssf_linear", run, seeds=5, quick_seeds=2)()
