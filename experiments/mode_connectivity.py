"""Mode connectivity: the loss on the straight way between two networks that began apart, before and after matching.

Perceptrons with three hidden layers on MNIST, from narrow to wide; and a ResNet-20 on CIFAR-10, whose running
statistics are measured anew at every point of the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch import nn
from torch.utils.data import TensorDataset

from aggregators.core.diagnosis import between
from aggregators.core.seed import derive_seed
from aggregators.core.update import Tensors
from client.task import Task, load
from client.tasks.architectures import mlp
from client.tasks.images import Images
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled
from client.training import Training, evaluate

from .cifar10 import Cifar10
from .finetuning import Cohort, Config, Finetuned, Round, accuracy, initial
from .report import Gate, Report, Row, command_line, spread
from .scores import Scores, over, table

KEPT: Config = {"kind": "experiments.federation:Observed", "inner": "fedavg"}  # the mean, and what it is the mean of
METHODS: Mapping[str, Config] = {
    "not matched": KEPT,
    "matched by weights": {"kind": "git_rebasin", "inner": KEPT},
    "matched by activations": {"kind": "activation_matching", "inner": KEPT},
}
RESET: Config = {"kind": "batch_norm", "inner": "fedavg", "source": "measure"}
BEFORE, AFTER = 0.8, 0.01  # barriers of the widest perceptron


class Perceptron(Images):
    """MNIST for a perceptron with three hidden layers of equal width."""

    shape: ClassVar[tuple[int, int]] = (28, 28)
    white: ClassVar[int] = Mnist.white

    width: int = 512

    def model(self) -> nn.Module:
        """784 inputs, three hidden layers, 10 outputs."""
        return mlp(28 * 28, self.width, self.width, self.width, 10)

    def train_set(self) -> Labelled:
        """The official training set."""
        return Mnist().train_set()

    def test_set(self) -> Labelled:
        """The official test set."""
        return Mnist().test_set()


class Setting(NamedTuple):
    """A network and its data, how it is trained, and in how many steps the way is walked.

    `reset`: how many examples tell the running statistics at each point, 0 for a network without any.
    """

    task: Task
    training: Training
    steps: int = 24
    reset: int = 0


def perceptrons(steps: int, **options: Any) -> dict[str, Setting]:
    """Three widths, trained alike: Adam, as there is no weight decay."""
    training = Training(optimizer="adamw", learning_rate=1e-3, batch_size=128, epochs=5)
    tasks = {width: Perceptron(width=width, partition="shared", validation=0.0, **options) for width in (64, 128, 512)}
    return {f"perceptron 3 × {width}": Setting(task, training, steps) for width, task in tasks.items()}


RESNET = Setting(Cifar10(), Training(learning_rate=0.1, weight_decay=5e-4, batch_size=128, epochs=5), 10, 2000)


class Way(NamedTuple):
    """Loss and accuracy on the test images at equal steps, from one end to the other."""

    loss: list[float]
    accuracy: list[float]

    @property
    def barrier(self) -> float:
        """max_t L(t) − (1 − t) L(0) − t L(1), 0 or more (Entezari et al. 2022, eq. 1)."""
        last = len(self.loss) - 1
        line = [((last - step) * self.loss[0] + step * self.loss[-1]) / last for step in range(last + 1)]
        return max(here - there for here, there in zip(self.loss, line, strict=True))

    @property
    def middle(self) -> float:
        """Accuracy half-way."""
        return self.accuracy[len(self.accuracy) // 2]


class Outcome(NamedTuple):
    """What one seed comes to: every pair's scores, and its ways by network and method."""

    scores: Scores
    ways: Mapping[tuple[str, str], Way]
    nbytes: Mapping[str, float]


def run(quick: bool, seeds: int) -> Report:
    """Every network; a quick run has fewer examples and steps, and no ResNet."""
    settings = perceptrons(steps=10, limit=10_000) if quick else perceptrons(steps=24)
    if not quick:
        settings["ResNet-20"] = RESNET
    outcomes = [outcome(seed, settings) for seed in track(range(seeds), "connecting")]
    return Report(
        title="Mode connectivity: networks from different initialisations",
        tables=tables(outcomes),
        plot=lambda figure: plot(outcomes, figure),
        gates=gates(outcomes),
        notes=NOTES if quick else NOTES + NOTES_RESNET,
    )


def outcome(seed: int, settings: Mapping[str, Setting]) -> Outcome:
    """All that one seed comes to."""
    scores: dict[str, dict[str, float]] = {}
    ways: dict[tuple[str, str], Way] = {}
    nbytes: dict[str, float] = {}
    for name, setting in settings.items():
        cohort = pair(setting, seed)
        beside = endpoints(cohort, setting)
        for method, config in METHODS.items():
            round = cohort.round(config)
            found = way(setting, cohort, *ends(round))
            moved = float(round.merged.metrics.get("units_moved", 0.0))
            ways[name, method], nbytes[f"{name}, {method}"] = found, round.nbytes
            scores[f"{name}, {method}"] = {
                "barrier": found.barrier,
                "accuracy half-way": found.middle,
                **beside,
                "share of units moved": moved,
            }
    return Outcome(scores, ways, nbytes)


def pair(setting: Setting, seed: int) -> Cohort:
    """Two networks, trained on the same examples in orders of their own, from starts of their own."""
    task, clients = setting.task, []
    examples = cast(TensorDataset, task.data({"partition-id": 0, "num-partitions": 2})[0])
    for own in (derive_seed(seed, number) for number in range(2)):
        clients.append(Finetuned(task, initial(task, own), examples).tuned(examples, setting.training, own))
    return Cohort(clients)


def endpoints(cohort: Cohort, setting: Setting) -> dict[str, float]:
    """The two networks' mean accuracy, and that of their prediction ensemble."""
    test, models = _test(setting), [client.params for client in cohort.clients]
    alone = fmean(accuracy(setting.task, [params], test) for params in models)
    return {"mean endpoint": alone, "prediction ensemble": accuracy(setting.task, models, test)}


def ends(round: Round) -> list[Tensors]:
    """The clients' networks as the round's innermost method saw them, aligned or not."""
    kept: Any = round.merged.memory["clients"]
    return [client["params"] for client in kept.values()]


def way(setting: Setting, cohort: Cohort, start: Tensors, end: Tensors) -> Way:
    """The straight way from start to end."""
    task, test, scores = setting.task, _test(setting), []
    model = task.model()
    for step in range(setting.steps + 1):
        params = between(start, end, step / setting.steps)
        load(model, reset(params, cohort, setting.reset) if setting.reset else params)
        scores.append(evaluate(task, model, test))
    return Way(*([score[key] for score in scores] for key in Way._fields))


def reset(params: Tensors, cohort: Cohort, num: int) -> Tensors:
    """The parameters with running statistics of the first examples that the networks were trained on."""
    first = cohort.clients[0].at(params)
    some = TensorDataset(*(part[:num] for part in first.examples.tensors))
    return Cohort([replace(first, examples=some)]).round(RESET).merged.params


def _test(setting: Setting) -> TensorDataset:
    return cast(TensorDataset, setting.task.test_data())


def tables(outcomes: Sequence[Outcome]) -> dict[str, list[Row]]:
    """A row for every network and method."""
    megabytes = {name: {"MB per client": round(nbytes / 1e6, 2)} for name, nbytes in outcomes[0].nbytes.items()}
    return {
        "Two networks on the same data, from different initialisations; barrier in test loss": table(
            "networks", [outcome.scores for outcome in outcomes], megabytes
        )
    }


def gates(outcomes: Sequence[Outcome]) -> list[Gate]:
    """What Ainsworth et al. report of perceptrons: matching takes the barrier away, the better the wider they are."""
    widths = list(dict.fromkeys(name for name, _ in outcomes[0].ways if name.startswith("perceptron")))
    scores = [outcome.scores for outcome in outcomes]
    before, after = (over(scores, f"{widths[-1]}, {method}", "barrier") for method in list(METHODS)[:2])
    falls = [over(scores, f"{width}, matched by weights", "barrier").mean for width in widths]
    return [
        Gate(f"{widths[-1]}: barrier at least {BEFORE} before matching", before.mean >= BEFORE, str(before)),
        Gate(f"{widths[-1]}: barrier at most {AFTER} after matching by weights", after.mean <= AFTER, str(after)),
        Gate(
            "matched by weights, the barrier falls with width 64, 128, 512",
            all(wide < narrow for narrow, wide in pairwise(falls)),
            ", ".join(f"{barrier:.4f}" for barrier in falls),
        ),
    ]


def plot(outcomes: Sequence[Outcome], figure: Figure) -> None:
    """The loss along every network's ways; lines are means over seeds, bands a standard deviation."""
    networks = list(dict.fromkeys(name for name, _ in outcomes[0].ways))
    figure.set_size_inches(4 * len(networks), 4.5)
    panels: list[Axes] = list(figure.subplots(1, len(networks), squeeze=False).flat)
    for axes, network in zip(panels, networks, strict=True):
        for method in METHODS:
            _line(axes, method, [outcome.ways[network, method].loss for outcome in outcomes])
        axes.set(title=network, xlabel="t, from one network to the other", ylabel="test loss", yscale="log")
    panels[0].legend(fontsize="x-small")


def _line(axes: Axes, method: str, losses: Sequence[Sequence[float]]) -> None:
    found = [spread(there) for there in zip(*losses, strict=True)]
    t = [step / (len(found) - 1) for step in range(len(found))]
    axes.plot(t, [loss.mean for loss in found], label=method)
    low, high = ([loss.mean + sign * loss.sd for loss in found] for sign in (-1, 1))
    axes.fill_between(t, low, high, alpha=0.2)


NOTES = (
    "Barrier: the most by which the loss on the test images exceeds the line between the two ends' losses; mean ± sd "
    "over seeds, paired: a seed's methods walk between the same two networks.",
    "Matching permutes the second network's units, and by weights scales them; what it computes stays the same.",
    "Half-way is the mean of the two. The prediction ensemble costs both networks to serve.",
    "MB per client: received and sent, once trained; by activations a client also receives its own network again, and "
    "the other one, to compare them on its training examples. Nothing is matched on the test images.",
)
NOTES_RESNET = (
    "The ResNet-20 has an original's first stage of 8 channels instead of 16, 10,000 training images without "
    "augmentation and five epochs; running statistics are measured at every point, on 2,000 of the training images, "
    "and tests are on the first 2,000 test images.",
)

app = command_line("mode_connectivity", run, seeds=3, quick_seeds=1)

if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
