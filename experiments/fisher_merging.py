"""Fisher merging on images, after the experiments of Matena and Raffel 2022 (section 4).

Five models fine-tuned from one; the way from a broad model to a fine-tuned one, on digits upright and turned; a target
with few examples that borrows from a donor task; and how many examples the Fisher information takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import TensorDataset

from aggregators.core.registry import parse
from aggregators.core.seed import derive_seed
from aggregators.core.update import Merged, Probe, Tensors
from client.task import Task, is_private
from client.tasks.fashion_mnist import FashionMnist
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled
from client.training import Training

from .finetuning import Config, Finetuned, accuracy, initial, merged, merged_from
from .merging import traffic
from .report import Gate, Report, Row, command_line
from .scores import Scores, bars, gap, over, table

TASK: Task = Mnist()  # the ConvNet and ten labels, for every set of images
CLIENTS = 5
METHODS: Mapping[str, Config] = {
    "isotropic": {"kind": "fedavg"},
    "Fisher": {"kind": "fisher"},
    "Fisher, undamped": {"kind": "fisher", "damping": 0.0},
    "Fisher, normalised": {"kind": "fisher", "normalize": True},
    "tempered Fisher": {"kind": "fisher", "temper": 0.5},
}
WEIGHTINGS = ("isotropic", "fisher")
ALPHAS = tuple(step / 10 for step in range(11))
BROAD, TURN = 60, 45  # degrees: how far digits are turned, at most, to pretrain on; and as shifted data
HEAD = ("output.*",)
SEARCH: Mapping[str, Config] = {
    "isotropic": {"kind": "fisher", "temper": 0.0, "damping": 0.0},
    "Fisher": {"kind": "fisher"},
}
SLACK = 0.002


class Sizes(NamedTuple):
    """Numbers of examples: to train, test and measure with."""

    pretraining: int = 5000
    client: int = 4096
    held_out: int = 500
    upright: int = 2000
    few: int = 100
    donor: int = 5000
    test: int = 4000
    grads: int = 256
    counts: tuple[int, ...] = (16, 64, 256, 1024, 4096)


QUICK = Sizes(3000, 1024, 200, 1000, 100, 3000, 2000, 256, (16, 64, 256, 1024))


class Outcome(NamedTuple):
    """What one seed comes to: the four tables' scores, and whether the way's ends are its endpoints."""

    ensembling: Scores
    counts: Scores
    robust: Scores
    donors: Scores
    exact: bool


def run(quick: bool, seeds: int) -> Report:
    """The four tables."""
    sizes = QUICK if quick else Sizes()
    outcomes = [outcome(seed, sizes) for seed in track(range(seeds), "merging")]
    return Report(
        title="Fisher merging",
        tables=tables(outcomes, sizes),
        plot=lambda figure: plot(outcomes, figure),
        gates=gates(outcomes),
        notes=NOTES,
    )


def outcome(seed: int, sizes: Sizes) -> Outcome:
    """All that one seed comes to."""
    images = Images(seed, sizes)
    clients = cohort(images)
    broad, tuned = way(images)
    return Outcome(
        ensembling(clients, images),
        counts(clients, images),
        robust(broad, tuned, images),
        donors(broad, images),
        ends_exactly(broad, tuned, sizes.grads),
    )


class Images:
    """Clothes and digits in an order of this seed, and test sets."""

    def __init__(self, seed: int, sizes: Sizes) -> None:
        self.seed, self.sizes = seed, sizes
        self.order = np.random.default_rng(seed).permutation(60_000)

    def clothes(self, begin: int, num: int) -> TensorDataset:
        """Clothes to train on, `num` from the `begin`-th on."""
        return examples(FashionMnist().train_set(), self.order[begin : begin + num])

    def digits(self, begin: int, num: int) -> TensorDataset:
        """Digits to train on, `num` from the `begin`-th on."""
        return examples(Mnist().train_set(), self.order[begin : begin + num])

    def few(self) -> TensorDataset:
        """The few digits of the target."""
        return self.digits(40_000, self.sizes.few)

    def validation(self) -> TensorDataset:
        """What the donors' shares are chosen on."""
        return self.digits(45_000, 500)

    def parity(self) -> TensorDataset:
        """A near donor's examples: digits on their side, labelled by whether they are odd."""
        digits, labels = aside(self.digits(20_000, self.sizes.donor)).tensors
        return TensorDataset(digits, labels % 2)

    def test(self, task: FashionMnist | Mnist) -> TensorDataset:
        """The first of the official test set."""
        return examples(task.test_set(), np.arange(self.sizes.test))

    def new(self) -> Finetuned:
        """A model that has seen nothing."""
        return Finetuned(TASK, initial(TASK, self.seed), self.clothes(0, 1))


def examples(images: Labelled, which: np.ndarray[Any, np.dtype[np.int64]]) -> TensorDataset:
    """Some of the images, float32 in [0, 1], (n, 1, 28, 28), and their labels."""
    pixels = np.asarray(images.images[which], dtype=np.float32)[:, None] / 255
    return TensorDataset(torch.from_numpy(pixels), torch.from_numpy(images.labels[which]))


def turned(examples: TensorDataset, degrees: Tensor) -> TensorDataset:
    """The same examples, each turned by its own angle, (n,)."""
    images, labels = examples.tensors
    cos, sin, zero = degrees.deg2rad().cos(), degrees.deg2rad().sin(), torch.zeros_like(degrees)
    rotations = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = affine_grid(rotations, list(images.shape), align_corners=False)
    return TensorDataset(grid_sample(images, grid, align_corners=False), labels)


def aside(examples: TensorDataset) -> TensorDataset:
    """The same examples, each on its side."""
    return turned(examples, torch.full((len(examples),), 90.0))


def training(epochs: int) -> Training:
    """Gentle: models that drift apart do not merge."""
    return Training(epochs=epochs, learning_rate=0.02)


def cohort(images: Images) -> list[Finetuned]:
    """Five models fine-tuned on clothes, each on its own, from one that was pretrained on others."""
    sizes, seed = images.sizes, images.seed
    start = images.new().tuned(images.clothes(0, sizes.pretraining), Training(epochs=3), seed)
    parts = [images.clothes(sizes.pretraining + k * sizes.client, sizes.client) for k in range(CLIENTS)]
    return [start.tuned(part, training(2), derive_seed(seed, k)) for k, part in enumerate(parts)]


def ensembling(clients: Sequence[Finetuned], images: Images) -> Scores:
    """Every method's merge of the five, from few examples, beside its worst client and what is not merged."""
    updates = [client.update(k, limit=images.sizes.grads) for k, client in enumerate(clients)]
    test, models = images.test(FashionMnist()), [client.params for client in clients]
    alone = [accuracy(TASK, [params], test) for params in models]
    beside = {"best single client": max(alone), "mean single client": fmean(alone)}
    beside["prediction ensemble"] = accuracy(TASK, models, test)
    found = {name: merged(config, updates).params for name, config in METHODS.items()}
    return {
        name: {
            "accuracy": accuracy(TASK, [params], test),
            "worst client": min(accuracy(TASK, [params], held) for held in held_out(images)),
            **beside,
        }
        for name, params in found.items()
    }


def held_out(images: Images) -> list[TensorDataset]:
    """Each client's own examples that nobody trains on."""
    end, num = 60_000 - CLIENTS * images.sizes.held_out, images.sizes.held_out
    return [images.clothes(end + k * num, num) for k in range(CLIENTS)]


def counts(clients: Sequence[Finetuned], images: Images) -> Scores:
    """Accuracies by the number of examples behind the Fisher information; isotropic takes none."""
    test = images.test(FashionMnist())
    found = {}
    for num in images.sizes.counts:
        updates = [client.update(k, limit=num) for k, client in enumerate(clients)]
        merges = {name: merged(METHODS[name], updates).params for name in ("isotropic", "Fisher", "tempered Fisher")}
        found[f"{num:,}"] = {name: accuracy(TASK, [params], test) for name, params in merges.items()}
    return found


def way(images: Images) -> tuple[Finetuned, Finetuned]:
    """A model of digits turned at random, and what fine-tuning on upright ones makes of it."""
    sizes, seed = images.sizes, images.seed
    generator = torch.Generator().manual_seed(derive_seed(seed, "angles"))
    angles = BROAD * (2 * torch.rand(2 * sizes.pretraining, generator=generator) - 1)
    digits = turned(images.digits(0, 2 * sizes.pretraining), angles)
    broad = images.new().tuned(digits, Training(epochs=4), seed)
    return broad, broad.tuned(images.digits(2 * sizes.pretraining, sizes.upright), training(10), seed)


def wise_ft(weighting: str, alpha: float) -> Config:
    """The method that goes α of the way."""
    return {"kind": "wise_ft", "inner": "fedavg", "alpha": alpha, "weighting": weighting}


def robust(broad: Finetuned, tuned: Finetuned, images: Images) -> Scores:
    """Accuracies on upright and on turned digits along the way, isotropic and Fisher-weighted."""
    upright = images.test(Mnist())
    shifted = turned(upright, torch.full((len(upright),), float(TURN)))
    found = {}
    for weighting, alpha in product(WEIGHTINGS, ALPHAS):
        params = merged_from(wise_ft(weighting, alpha), broad.params, [tuned], images.sizes.grads).params
        scores = [accuracy(TASK, [params], test) for test in (upright, shifted)]
        found[f"{weighting} {alpha:g}"] = dict(zip(("upright", "turned"), scores, strict=True))
    return found


def ends_exactly(broad: Finetuned, tuned: Finetuned, grads: int) -> bool:
    """Whether α = 0 and 1 are the two models to the bit."""
    return all(
        torch.equal(params[name], end.params[name])
        for weighting in WEIGHTINGS
        for alpha, end in ((0.0, broad), (1.0, tuned))
        for params in [merged_from(wise_ft(weighting, alpha), broad.params, [tuned], grads).params]
        for name in end.params
    )


def donors(broad: Finetuned, images: Images) -> Scores:
    """A target of few digits on their side, alone, merged with each donor's body, and trained from each donor's."""
    few, validation, test = (aside(part) for part in (images.few(), images.validation(), images.test(Mnist())))
    fresh = broad.with_new(HEAD, images.seed)
    target = fresh.tuned(few, training(20), images.seed)
    found = {"target alone": {"accuracy": accuracy(TASK, [target.params], test), "donor's share": 0.0}}
    for name, examples in {"parity": images.parity(), "clothes": images.clothes(30_000, images.sizes.donor)}.items():
        donor = fresh.tuned(examples, training(2), derive_seed(images.seed, name))
        for method, config in SEARCH.items():
            chosen = borrowed(config, target, donor, validation, images.sizes.grads)
            score, share = accuracy(TASK, [target.at(chosen.params).params], test), chosen.metrics["coefficient_1"]
            found[f"{method}, with {name}"] = {"accuracy": score, "donor's share": float(share)}
        then = donor.with_new(HEAD, images.seed).tuned(few, training(20), images.seed)
        found[f"{name}, then target"] = {"accuracy": accuracy(TASK, [then.params], test), "donor's share": 1.0}
    return found


def borrowed(config: Config, target: Finetuned, donor: Finetuned, validation: TensorDataset, grads: int) -> Merged:
    """The merge of the two bodies with the fewest errors on the target's validation examples, under its head."""

    def score(body: Tensors) -> float:
        return accuracy(TASK, [target.at(body).params], validation)

    updates = [replace(who.update(k, limit=grads), num_examples=1) for k, who in enumerate((target, donor))]
    search = {"kind": "coefficient_search", "inner": config, "candidates": 21}
    return merged(search, updates, Probe(loss=lambda body: 1 - score(body), score=score))


def tables(outcomes: Sequence[Outcome], sizes: Sizes) -> dict[str, list[Row]]:
    """The four tables, with the bytes that a client receives and sends in a round."""
    params = initial(TASK, 0)
    body = {name: value for name, value in params.items() if not is_private(name, HEAD)}
    ways = {f"{weighting} {alpha:g}": wise_ft(weighting, alpha) for weighting, alpha in product(WEIGHTINGS, ALPHAS)}
    searches = {f"{method}, with {donor}": SEARCH[method] for method, donor in product(SEARCH, ("parity", "clothes"))}
    return {
        f"Five models fine-tuned on {sizes.client:,} clothes each": table(
            "method", [outcome.ensembling for outcome in outcomes], _bytes(METHODS, params)
        ),
        "Accuracy by the number of examples behind each Fisher information": table(
            "examples", [outcome.counts for outcome in outcomes]
        ),
        f"From a broad model, α = 0, to one fine-tuned upright, α = 1; tested upright and turned by {TURN}°": (
            table("way", [outcome.robust for outcome in outcomes], _bytes(ways, params))
        ),
        f"A target of {sizes.few} digits on their side that borrows from a donor": table(
            "model", [outcome.donors for outcome in outcomes], _bytes(searches, body)
        ),
    }


def _bytes(configs: Mapping[str, Config], params: Tensors) -> dict[str, Row]:
    return {name: {"bytes per client and round": traffic(parse(config), params)} for name, config in configs.items()}


def gates(outcomes: Sequence[Outcome]) -> list[Gate]:
    """What the paper leads one to expect, as means over paired seeds."""
    fused, borrowing = [outcome.ensembling for outcome in outcomes], [outcome.donors for outcome in outcomes]
    last = [*outcomes[0].counts][-1]
    above = gap(fused, "Fisher", "isotropic")
    single = fmean(seed["Fisher"]["accuracy"] - seed["Fisher"]["mean single client"] for seed in fused)
    few = fmean(outcome.counts["256"]["Fisher"] - outcome.counts[last]["Fisher"] for outcome in outcomes)
    ways = [outcome.robust for outcome in outcomes]
    middle = gap(ways, "isotropic 0.5", "isotropic 1", "turned"), gap(ways, "isotropic 0.5", "isotropic 0", "upright")
    near = gap(borrowing, "Fisher, with parity", "target alone")
    return [
        Gate("five models: Fisher at least isotropic - 0.002", above >= -SLACK, f"{above:+.4f}"),
        Gate("five models: Fisher above the mean single client", single > 0, f"{single:+.4f}"),
        Gate(f"256 examples within 0.005 of {last}", abs(few) <= 0.005, f"{few:+.4f}"),
        Gate("the way: α = 0 and 1 are the endpoints to the bit", all(o.exact for o in outcomes), "both weightings"),
        Gate(
            "the way: half of it beats the fine-tuned model turned, the broad one upright",
            min(middle) > 0,
            f"{middle[0]:+.4f}, {middle[1]:+.4f}",
        ),
        Gate("Fisher with the near donor at least the target alone - 0.002", near >= -SLACK, f"{near:+.4f}"),
    ]


def plot(outcomes: Sequence[Outcome], figure: Figure) -> None:
    """A panel for each table; bars and lines are means, whiskers standard deviations over seeds."""
    figure.set_size_inches(12, 8)
    panels: list[Axes] = list(figure.subplots(2, 2).flat)
    bars(panels[0], [outcome.ensembling for outcome in outcomes], "five models fine-tuned from one")
    _counts(panels[1], [outcome.counts for outcome in outcomes])
    _way(panels[2], [outcome.robust for outcome in outcomes])
    bars(panels[3], [outcome.donors for outcome in outcomes], "borrowing from a donor")


def _counts(axes: Axes, seeds: Sequence[Scores]) -> None:
    numbers = [int(name.replace(",", "")) for name in seeds[0]]
    for name in next(iter(seeds[0].values())):
        found = [over(seeds, row, name) for row in seeds[0]]
        axes.errorbar(numbers, [x.mean for x in found], [x.sd for x in found], marker="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="examples behind each Fisher information", ylabel="accuracy", title="few examples")
    axes.legend(fontsize="x-small")


def _way(axes: Axes, seeds: Sequence[Scores]) -> None:
    for weighting in WEIGHTINGS:
        names = [f"{weighting} {alpha:g}" for alpha in ALPHAS]
        x, y = ([over(seeds, name, column).mean for name in names] for column in ("upright", "turned"))
        axes.plot(x, y, marker="o", label=weighting)
    axes.annotate("broad", (x[0], y[0]))
    axes.annotate("fine-tuned", (x[-1], y[-1]))
    axes.set(xlabel="accuracy, upright", ylabel=f"accuracy, turned by {TURN}°", title="robust fine-tuning")
    axes.legend(fontsize="x-small")


NOTES = (
    "Accuracies on official test data; mean ± sd over seeds, paired: a seed's methods merge the same models.",
    "Best single client is the best on the test data itself, so an upper bound of what choosing a client can give.",
    "A merge costs one model to serve, a prediction ensemble one per client; an ensemble travels like FedAvg.",
    "Worst client: the merge's least accuracy on the examples that each client holds out.",
    "A donor's share is chosen by errors on 500 validation examples of the target, both endpoints among the choices;"
    " training the target from the donor, which takes a second round, does better than merging with it.",
    "The way's Fisher information is of the fine-tuning client's examples, at both ends: no other data is needed.",
)

app = command_line("fisher_merging", run, seeds=3, quick_seeds=2)

if __name__ == "__main__":
    app()
