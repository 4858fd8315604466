"""FedMA's costs, matching and bytes, and plans of optimal transport, by width and number of clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from math import log
from typing import Any

import torch
from torch import Tensor

from aggregators.core.nonparametric import Atoms, Prior, gains, match_units
from aggregators.core.transport import plan, uniform
from server import loopback

from .row import Row, interleaved

UNITS, ATOMS, WEIGHTS = 512, 1024, 2304  # of a convolution of 3 × 3 pixels that reads 256 channels
SQUARE = 2048  # of the product that shows what the machine can do
PRIOR = Prior(gamma=1.0, sigma0=100.0)
WIDTHS, CLIENTS = (128, 512), (2, 8)
PASS = "one pass over the clients' bytes"


def rows() -> Iterator[Row]:
    """The cost matrix; a layer's matching; a layer's plan; the bytes of a federation."""
    yield from _costs()
    for units, clients in product(WIDTHS, CLIENTS):
        yield _matching(units, clients)
    for units, others in product(WIDTHS, (1, 2)):
        yield _plan(units, others * units)
    yield _bytes()


def _costs() -> Iterator[Row]:
    torch.manual_seed(0)
    weights, square = torch.randn(UNITS, WEIGHTS), torch.randn(SQUARE, SQUARE)
    atoms = Atoms.none(weights).add(torch.randn(ATOMS, WEIGHTS), torch.arange(ATOMS), 1.0)
    ours, machine = interleaved(lambda: gains(atoms, weights, 1.0, 8, PRIOR), lambda: square @ square)
    sums = atoms.sums.float()
    published = _seconds(lambda: by_atom(sums.numpy(), weights.numpy(), atoms, 8, PRIOR))
    loop = _seconds(lambda: by_atom(sums, weights, atoms, 8, PRIOR))
    rate, best = 2 * UNITS * ATOMS * WEIGHTS / ours / 1e9, 2 * SQUARE**3 / machine / 1e9
    work, took = f"FedMA's costs of {UNITS} units in {ATOMS} atoms", f"{1e3 * ours:.0f} ms"
    yield Row(work, "a loop over the atoms in numpy", published / ours, ">= 20", f"{took}, the loop {published:.2f} s")
    detail = f"{took}, the loop {loop:.2f} s; {loop / ours * best / rate:.0f} if all were one product"
    yield Row(work, "the same loop in torch", loop / ours, "", detail)
    detail = f"{rate:.0f} Gflop/s, the machine {best:.0f}"
    yield Row(f"{work}, flop/s", f"a product of {SQUARE} × {SQUARE}", rate / best, ">= 0.3", detail)


def by_atom(sums: Any, weights: Any, atoms: Atoms, clients: int, prior: Prior) -> list[Any]:
    """The same at precision 1 by the formula, atom after atom, all units at once; of numpy's arrays or torch's."""
    s, s0 = 1.0, prior.sigma0**-2
    found = []
    for g, mass, count in zip(sums, atoms.masses.tolist(), atoms.counts.tolist(), strict=True):
        popular = min(count, prior.popularity)
        gain = ((s * weights + g) ** 2).sum(1) / (s + s0 + mass) - (g**2).sum() / (s0 + mass)
        found.append(gain + 2 * log(popular / (clients - popular)))
    return found


def _matching(units: int, clients: int) -> Row:
    """One level of FedMA: clients that share half of their units."""
    torch.manual_seed(0)
    shared = torch.randn(units // 2, WEIGHTS)
    weights = [
        torch.cat([shared + 0.1 * torch.randn_like(shared), torch.randn(units - len(shared), WEIGHTS)])
        for _ in range(clients)
    ]
    shuffled = [one[torch.randperm(units)] for one in weights]
    seconds = _seconds(lambda: match_units(shuffled, [1.0] * clients, PRIOR))
    work = f"FedMA's matching of a layer, {units} units, {clients} clients"
    return Row(work, PASS, seconds / _passed(weights), "", f"{seconds:.2f} s")


def _plan(units: int, others: int) -> Row:
    """One exact plan, its costs included."""
    torch.manual_seed(0)
    a, b = torch.randn(units, WEIGHTS), torch.randn(others, WEIGHTS)
    plan(torch.cdist(a[:2], b[:3]), *uniform(2, 3))  # loads the solver
    seconds = _seconds(lambda: plan(torch.cdist(a, b), *uniform(units, others)))
    work = f"an exact plan of a layer, {units} units to {others}"
    return Row(work, PASS, seconds / _passed([a, b]), "", f"{seconds:.3f} s")


def _bytes() -> Row:
    """Two rounds of digits."""
    fedma, fedavg = (_traffic(kind) for kind in ("fedma", "fedavg"))
    detail = f"{fedma / 1e6:.2f} MB and {fedavg / 1e6:.2f} MB"
    return Row("bytes of FedMA, two rounds, a perceptron of two hidden layers", "FedAvg's", fedma / fedavg, "", detail)


def _traffic(kind: str) -> float:
    settings: dict[str, Any] = {"rounds": 2, "evaluate": False, "training": {"epochs": 1}}
    records = loopback.run({"kind": "digits", "partition": "iid"}, kind, clients=4, **settings).records
    exchanges = [exchange for record in records for exchange in record["exchanges"]]
    return float(sum(exchange["bytes_in"] + exchange["bytes_out"] for exchange in exchanges))


def _passed(weights: list[Tensor]) -> float:
    return interleaved(lambda: [float(one.sum()) for one in weights])[0]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
