"""Table 2 of Recasens et al. 2023: self-supervised Fisher merging (SSF) of three ConvNets on MNIST and Fashion-MNIST.

Three clients hold the whole training set and begin at the same initialisation; client k takes steps k times as large
for k times as long. Each method merges their networks of 21,840 parameters once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch.utils.data import Subset

from aggregators.core.seed import derive_seed
from aggregators.core.update import Tensors
from aggregators.weight_average.ssf import SSF
from client.task import Examples, Task, load, parse, tensors
from client.training import Training, seeded, train

from .cache import cached
from .merging import Cohort, Method, Outcome, costs, held_out, one_exchange
from .report import Gate, Report, Row, Spread, command_line, spread
from .sources import sources

SETS = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
CLIENTS = 3
TOLERANCE = 0.02  # of Fisher's loss
NOTES = (
    "The statistics come from training examples, 10,000 in the full run. The authors' code takes test examples, which "
    "leaks them into the merge. As all clients hold all training examples, the worst client's loss is taken on those "
    "of the statistics.",
    "SSF begins at isotropic merging and draws its masks anew in every step, 50 in the full run, each 800 of a window "
    "of 5,000 parameters: 16 % of the window, 3.7 % of the network. `closed form` merges the very posteriors whose "
    "masked loss SSF descends, of the whole network.",
    "The best client alone is chosen on the test images. These clients share their data, so merging has little to add.",
)


class Size(NamedTuple):
    """How large a run is."""

    limit: int | None  # training examples, None for all
    statistics: int  # of them, behind the statistics
    masks: int
    steps: int


FULL, QUICK = Size(None, 10_000, masks=50, steps=3000), Size(6000, 6000, masks=5, steps=3000)


def run(quick: bool, seeds: int) -> Report:
    """The whole table; a quick run has MNIST only, a tenth of its examples and of the masks."""
    size, sets = (QUICK, ["mnist"]) if quick else (FULL, [*SETS])
    results = {name: defaultdict[str, list[Outcome]](list) for name in sets}
    for seed, name in track([*product(range(seeds), sets)], "merging"):
        for method, outcome in cohort(name, size, seed).contest(methods(size, seed), seed):
            results[name][method].append(outcome)
    chosen, params = methods(size, seed=0), tensors(_task("mnist", size).model())
    losses: list[Row] = [{"data": SETS[name], **_losses(found)} for name, found in results.items()]
    return Report(
        title="SSF, Table 2: three ConvNets on MNIST and Fashion-MNIST",
        tables={"Loss on the 10,000 test images, estimator logit": losses}
        | {f"Costs, {SETS[name]}": costs(found, chosen, params) for name, found in results.items()},
        plot=lambda figure: plot(results, figure),
        gates=[gate(name, solver, found) for name, found in results.items() for solver in ("SSF", "closed form")],
        notes=NOTES,
    )


def methods(size: Size, seed: int) -> dict[str, Method]:
    """The table's columns."""
    paper = {**SSF.paper, "alpha": 1e-3, "start": "mean"}
    masks = {"window": 5000, "mask_size": 800, "masks": size.masks, "steps": size.steps, "resample": True, "seed": seed}
    configs: dict[str, Mapping[str, Any]] = {
        "isotropic": {"kind": "fedavg", "weights": "uniform"},
        "Fisher": {"kind": "fisher", "estimator": "logit", "damping": 0.0},
        "SSF": {**paper, **masks},
        "closed form": {**paper, "solver": "closed_form"},
    }
    return {name: one_exchange(config) for name, config in configs.items()}


def cohort(name: str, size: Size, seed: int) -> Cohort:
    """The three clients of this seed, trained or from the cache."""
    task = _task(name, size)
    examples, _ = task.data({"partition-id": 0, "num-partitions": CLIENTS})
    with seeded(derive_seed(seed, "initialisation")):
        start = {key: value.clone() for key, value in tensors(task.model()).items()}
        behind = Subset(examples, torch.randperm(len(examples))[: size.statistics].tolist())  # type: ignore[arg-type]
    models = [trained(task, start, examples, k, seed) for k in range(1, CLIENTS + 1)]
    held = task.test_data()
    assert held is not None
    return Cohort(task, start, models, [behind] * CLIENTS, held)


def trained(task: Task, start: Tensors, examples: Examples, k: int, seed: int) -> Tensors:
    """Client k's network, trained from `start` or from the cache."""
    training = Training(batch_size=64, epochs=2 * k, learning_rate=0.005 * k, momentum=0.9, weight_decay=1e-3)
    settings = {
        "task": task.model_dump(),
        "seed": seed,
        "client": k,
        "training": training.model_dump(),
        "code": sources("client/training.py", "client/tasks"),
    }

    def make() -> Tensors:
        model = task.model()
        load(model, start)
        train(task, model, examples, training, seed=derive_seed(seed, "order", k), round=1)
        return tensors(model)

    return cached(f"convnet-{type(task).__name__.lower()}", settings, make)


def _task(name: str, size: Size) -> Task:
    return parse(json.dumps({"kind": name, "partition": "shared", "limit": size.limit, "validation": 0.0}))


def _losses(found: Mapping[str, Sequence[Outcome]]) -> dict[str, Spread]:
    return {name: spread(held_out(outcomes)) for name, outcomes in found.items()}


def gate(name: str, solver: str, found: Mapping[str, Sequence[Outcome]]) -> Gate:
    """Whether the solver's mean loss is at most 2 % above Fisher's."""
    ratio = fmean(held_out(found[solver])) / fmean(held_out(found["Fisher"]))
    return Gate(
        f"{solver} at most 2 % above Fisher on {SETS[name]}", ratio <= 1 + TOLERANCE, f"{ratio:.4f} of Fisher's"
    )


def plot(results: Mapping[str, Mapping[str, Sequence[Outcome]]], figure: Figure) -> None:
    """A bar per method and set: mean loss over seeds, with its deviation."""
    for axes, (name, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        losses = _losses(found)
        means, sds = [loss.mean for loss in losses.values()], [loss.sd for loss in losses.values()]
        axes.bar(range(len(losses)), means, yerr=sds, capsize=3, color=[f"C{i}" for i in range(len(losses))])
        axes.set_xticks(range(len(losses)), [*losses], rotation=30, ha="right")
        axes.set(title=SETS[name], ylabel="loss on the test images")
        axes.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    command_line("ssf_mnist", run, seeds=3, quick_seeds=1)()
