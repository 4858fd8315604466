"""FedMA: networks that began apart, matched level by level, beside averages, one-shot matching and their ensemble.

Perceptrons and a LeNet on MNIST, a small VGG on CIFAR-10, two to eight clients; labels are dealt evenly or by
Dirichlet 0.5.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise, product
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aggregators.alignment.fedma import FedMA
from aggregators.alignment.pfnm import PFNM
from aggregators.core.seed import derive_seed
from client.task import Examples, Node, parse, tensors
from client.tasks.images import Images
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled
from client.tasks.partition import Scheme, Split, parts, place
from client.training import Training, seeded

from .cache import cached
from .cifar10 import Cifar10
from .federated_skew import MU
from .federated_skew import SKEWS as DEALT
from .federation import completed
from .finetuning import Cohort, Config, Finetuned, accuracy
from .report import Cell, Gate, Report, Row, command_line, spread
from .sources import sources

SKEWS = {name: DEALT[name] for name in ("IID", "Dirichlet 0.5")}
ONE_SHOT: Mapping[str, Config] = {
    "one-shot average": {"kind": "fedavg"},
    "PFNM": {"kind": "pfnm"},
    "PFNM, paper": PFNM.paper().model_dump(),
}
EPOCHS, FIRST = 2, 8
ENSEMBLE, LONGER = "prediction ensemble", "prediction ensemble, trained as long"
LINES = {ENSEMBLE: "--", LONGER: ":"}
FILES = tuple(f"experiments/{name}.py" for name in ("fedma", "federation", "mode_connectivity", "cifar10"))
COSTS = {"exchanges": "exchanges", "epochs": "epochs", "bytes": "nbytes"}
GATED = "perceptron 3 × 64, 3 clients"
SLACK, GAIN, GROWTH = 0.01, 0.4, 1.25


class LeNet(Images):
    """MNIST for a LeNet-5 with ReLU and the greatest of each two by two pixels."""

    shape: ClassVar[tuple[int, int]] = (28, 28)
    white: ClassVar[int] = Mnist.white

    def model(self) -> nn.Module:
        """Convolutions of 6 and 16 channels, linear layers of 120 and 84 units: 44,426 parameters."""
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 6, 5),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                hidden3=nn.Linear(256, 120),
                relu3=nn.ReLU(),
                hidden4=nn.Linear(120, 84),
                relu4=nn.ReLU(),
                output=nn.Linear(84, 10),
            )
        )

    def train_set(self) -> Labelled:
        """The official training set."""
        return Mnist().train_set()

    def test_set(self) -> Labelled:
        """The official test set."""
        return Mnist().test_set()


class Vgg(Cifar10):
    """CIFAR-10 for a VGG whose first stage has `width` channels; images are dealt as `partition.parts` says."""

    width: int = 16
    partition: Scheme = "iid"
    alpha: float = 0.5
    partition_seed: int = 0

    def model(self) -> nn.Module:
        """Stages of a convolution and a pooling, each twice as wide as the last, and a layer: 89,834 parameters."""
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        widths = (3, self.width, 2 * self.width, last := 4 * self.width)
        for stage, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
            stages[f"conv{stage}"] = nn.Conv2d(fan_in, fan_out, 3, padding=1)
            stages[f"relu{stage}"], stages[f"pool{stage}"] = nn.ReLU(), nn.MaxPool2d(2)
        head = {"hidden4": nn.Linear(16 * last, last), "relu4": nn.ReLU(), "output": nn.Linear(last, 10)}
        return nn.Sequential(OrderedDict(**stages, flatten=nn.Flatten(), **head))

    def data(self, node: Node) -> tuple[Examples, Examples]:
        """The client's part to train on, and nothing to validate with."""
        examples, (part, num) = pictures(self.limit), place(node)
        split = Split(self.partition, self.alpha, seed=self.partition_seed)
        own = torch.from_numpy(parts(examples.tensors[1].numpy(), num, split)[part])
        return TensorDataset(*(x[own] for x in examples.tensors)), TensorDataset(*(x[:0] for x in examples.tensors))


@cache
def pictures(num: int) -> TensorDataset:
    """So many training images of CIFAR-10, in a process once."""
    return cast(TensorDataset, Cifar10(limit=num).data({})[0])


class Setting(NamedTuple):
    """A network, its levels of units, its clients and how many examples each has, and passes of FedMA."""

    task: Config
    levels: int
    clients: int
    examples: int
    passes: int = 1

    @property
    def epochs(self) -> list[int]:
        """Of training in each pass of FedMA."""
        return [FIRST + EPOCHS * self.levels, *[EPOCHS * (self.levels + 1)] * (self.passes - 1)]

    def dealt(self, skew: str, seed: int) -> Config:
        """The task, its examples dealt so."""
        return {**self.task, **SKEWS[skew], "limit": self.clients * self.examples, "partition_seed": seed}


class Method(NamedTuple):
    """A method by its configuration, and FedProx's pull."""

    config: Config
    proximal: float = 0.0

    @property
    def matches(self) -> bool:
        """Whether a round is a pass, clients beginning from own starts; else it is one exchange, from a shared one."""
        return "first_epochs" in self.config

    def epochs(self, setting: Setting) -> list[int]:
        """Of training in each round."""
        if not self.matches:
            return [EPOCHS] * (sum(setting.epochs) // EPOCHS)
        more = (self.config.get("last_epochs") or EPOCHS) - EPOCHS
        return [epochs + more for epochs in setting.epochs]


class Case(NamedTuple):
    """Network, skew and method; a course per seed belongs to it."""

    network: str
    skew: str
    method: str


class Course(NamedTuple):
    """By round: accuracy on the test data, growth; and of each client: bytes, epochs of training, and exchanges."""

    accuracy: list[float]
    growth: list[float]
    nbytes: list[float]
    epochs: list[float]
    exchanges: list[float]


Courses: TypeAlias = Mapping[Case, Sequence[Course]]

PERCEPTRON: Config = {"kind": "experiments.mode_connectivity:Perceptron", "width": 64, "validation": 0.0}
LENET: Config = {"kind": "experiments.fedma:LeNet", "validation": 0.0}
FULL = {
    GATED: Setting(PERCEPTRON, levels=3, clients=3, examples=8000, passes=2),
    "perceptron 3 × 64, 8 clients": Setting(PERCEPTRON, levels=3, clients=8, examples=2500),
    "LeNet, 4 clients": Setting(LENET, levels=4, clients=4, examples=2000),
    "VGG, 2 clients": Setting({"kind": "experiments.fedma:Vgg"}, levels=4, clients=2, examples=1500),
}
QUICK = {GATED: FULL[GATED]._replace(examples=1500, passes=1)}
TRAINING = Training(epochs=EPOCHS)
METHODS = {
    "FedMA": Method({"kind": "fedma", "first_epochs": FIRST}),
    "FedMA, paper": Method(FedMA.paper(EPOCHS, TRAINING.learning_rate, first_epochs=FIRST).model_dump()),
    "FedAvg": Method({"kind": "fedavg"}),
    "FedProx": Method({"kind": "fedavg"}, MU),
}


def run(quick: bool, seeds: int) -> Report:
    """All networks; a quick run has one pass over the perceptrons of three clients."""
    settings = QUICK if quick else FULL
    courses: dict[Case, list[Course]] = {}
    jobs = [*product(range(seeds), settings, SKEWS)]
    for seed, network, skew in track(jobs, "federating"):
        for method, found in outcome(settings[network], skew, seed).items():
            courses.setdefault(Case(network, skew, method), []).append(found)
    return Report(
        title="FedMA: matched averaging of networks that began apart",
        tables=tables(courses),
        plot=lambda figure: plot(courses, figure),
        gates=gates(courses),
        notes=NOTES,
    )


def outcome(setting: Setting, skew: str, seed: int) -> dict[str, Course]:
    """The course of every method; a seed deals the same data, and draws the same starts, for all."""
    live = {name: course(setting, skew, method, seed) for name, method in METHODS.items()}
    longer = ensemble(alone(setting, skew, seed, setting.epochs[0]), setting.epochs[0])
    return {**live, **one_shot(alone(setting, skew, seed, FIRST)), LONGER: longer}


def course(setting: Setting, skew: str, method: Method, seed: int) -> Course:
    """The federation's course, run unless it was run before by the same code."""
    epochs = method.epochs(setting)
    settings = {
        "task": setting.dealt(skew, seed),
        "aggregator": method.config,
        "clients": setting.clients,
        "rounds": len(epochs),
        "seed": seed,
        "start": "own" if method.matches else "shared",
        "training": {**TRAINING.model_dump(exclude={"rounds"}), "proximal": method.proximal},
    }
    code = sources("aggregators", "client", "server", *FILES)
    kept = cached("fedma", {**settings, "code": code}, lambda: _run(settings))
    return Course(epochs=[*map(float, epochs)], **{name: values.tolist() for name, values in kept.items()})


def _run(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    records = completed(**settings).records
    asked = [record["exchanges"] for record in records]
    found = {
        "accuracy": [record["test"]["accuracy"] for record in records],
        "growth": [record["metrics"].get("growth", 1.0) for record in records],
        "nbytes": [sum(e["bytes_in"] + e["bytes_out"] for e in each) / settings["clients"] for each in asked],
        "exchanges": [len(exchanges) for exchanges in asked],
    }
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def alone(setting: Setting, skew: str, seed: int, epochs: int) -> Cohort:
    """The clients' networks after so many epochs alone, from the starts that a federation has."""
    task, clients = parse(json.dumps(setting.dealt(skew, seed))), []
    training = TRAINING.model_copy(update={"epochs": epochs})
    for part in range(setting.clients):
        with seeded(derive_seed(seed, "initial", part)):
            start = tensors(task.model())
        examples = cast(TensorDataset, task.data({"partition-id": part, "num-partitions": setting.clients})[0])
        clients.append(Finetuned(task, start, examples).tuned(examples, training, derive_seed(seed, 1, part)))
    return Cohort(clients)


def one_shot(cohort: Cohort) -> dict[str, Course]:
    """What merging once makes of the networks that FedMA begins to match; their mean and their ensemble's accuracy."""
    task, test = cohort.clients[0].task, cast(TensorDataset, cohort.clients[0].task.test_data())
    found = {}
    for name, config in ONE_SHOT.items():
        merged, nbytes = cohort.round(config)
        growth = float(merged.metrics.get("growth", 1.0))
        found[name] = _once(accuracy(task, [merged.params], test), growth, nbytes, FIRST)
    single = fmean(accuracy(task, [client.params], test) for client in cohort.clients)
    return {**found, "mean single client": _once(single, 1.0, 0.0, FIRST), ENSEMBLE: ensemble(cohort, FIRST)}


def ensemble(cohort: Cohort, epochs: int) -> Course:
    """The prediction ensemble of these networks, each of which was sent once."""
    task, models = cohort.clients[0].task, [client.params for client in cohort.clients]
    found = accuracy(task, models, cast(TensorDataset, task.test_data()))
    return _once(found, float(len(models)), cohort.round({"kind": "fedavg"}).nbytes, epochs)


def _once(accuracy: float, growth: float, nbytes: float, epochs: int) -> Course:
    return Course([accuracy], [growth], [nbytes], [float(epochs)], [1.0])


def tables(courses: Courses) -> dict[str, list[Row]]:
    """Every method's end, and the federations' way by exchange, by epoch and by byte."""
    ends = {"Where every method ends": [_row(case, _ended(found)) for case, found in courses.items()]}
    passes = max(len(found[0].accuracy) for case, found in courses.items() if case.method == "FedMA")
    return ends | {
        f"Accuracy by the time a pass of FedMA ends, in {cost}": [
            _row(case, {f"pass {number}": _after(courses, case, number, cost) for number in range(1, passes + 1)})
            for case in courses
            if case.method in METHODS
        ]
        for cost in COSTS
    }


def _row(case: Case, cells: Row) -> Row:
    return {"network": case.network, "labels": case.skew, "method": case.method, **cells}


def _ended(found: Sequence[Course]) -> Row:
    return {
        "accuracy": spread(course.accuracy[-1] for course in found),
        "growth": spread(course.growth[-1] for course in found),
        "rounds": len(found[0].accuracy),
        "exchanges": int(sum(found[0].exchanges)),
        "epochs": int(sum(found[0].epochs)),
        "MB per client": round(fmean(sum(course.nbytes) for course in found) / 1e6, 2),
    }


def _after(courses: Courses, case: Case, number: int, cost: str) -> Cell:
    """Accuracy of the last round that costs no more than so many passes of FedMA."""
    passes = courses[case._replace(method="FedMA")]
    if number > len(passes[0].accuracy):
        return ""
    pairs = [
        (course, reached(course, spent(one, cost)[number - 1], cost))
        for course, one in zip(courses[case], passes, strict=True)
    ]
    return spread(course.accuracy[end - 1] for course, end in pairs) if all(end for _, end in pairs) else "none ends"


def reached(course: Course, budget: float, cost: str) -> int:
    """How many of the course's rounds cost no more than `budget`."""
    return sum(total <= budget for total in spent(course, cost))


def spent(course: Course, cost: str) -> list[float]:
    """What each client has spent when each round ends."""
    return [*accumulate(getattr(course, COSTS[cost]))]


def gates(courses: Courses) -> list[Gate]:
    """What a pass over the perceptrons of three clients is to come to, as means over paired seeds."""
    iid, skewed = SKEWS
    growth = max(most for skew in SKEWS for found in courses[Case(GATED, skew, "FedMA")] for most in found.growth)
    return [
        _above(courses, [iid], ENSEMBLE, -SLACK),
        _above(courses, [skewed], ENSEMBLE, 0.0),
        _above(courses, [iid, skewed], "one-shot average", GAIN),
        Gate(f"{GATED}: FedMA grows to at most {GROWTH}", growth <= GROWTH, f"{growth:.4f} at most"),
        _above(courses, [iid, skewed], "PFNM, paper", 0.0, "PFNM"),
    ]


def _above(courses: Courses, skews: Sequence[str], other: str, least: float, method: str = "FedMA") -> Gate:
    """Whether a pass, or a one-shot method, is so much above the other after one round, for each skew."""
    pairs = [zip(courses[Case(GATED, skew, method)], courses[Case(GATED, skew, other)], strict=True) for skew in skews]
    gaps = [spread(a.accuracy[0] - b.accuracy[0] for a, b in found) for found in pairs]
    name = f"{GATED}, {' and '.join(skews)}: {method} at least {other} {least:+.2f}"
    return Gate(name, all(gap.mean >= least for gap in gaps), ", ".join(map(str, gaps)))


def plot(courses: Courses, figure: Figure) -> None:
    """A row of panels for each network: accuracy over epochs and over bytes, for each skew."""
    networks = list(dict.fromkeys(case.network for case in courses))
    figure.set_size_inches(16, 3.6 * len(networks))
    panels = figure.subplots(len(networks), 2 * len(SKEWS), squeeze=False)
    for row, network in zip(panels, networks, strict=True):
        for axes, beside, skew in zip(row[::2], row[1::2], SKEWS, strict=True):
            _panels(axes, beside, {case: found for case, found in courses.items() if case[:2] == (network, skew)})
            axes.set(title=f"{network}, {skew}")
    panels[0][0].legend(fontsize="x-small")


def _panels(over_epochs: Axes, over_bytes: Axes, courses: Courses) -> None:
    for axes, cost, scale in ((over_epochs, "epochs", 1.0), (over_bytes, "bytes", 1e6)):
        for case, found in courses.items():
            means = [fmean(values) for values in zip(*(course.accuracy for course in found), strict=True)]
            at = [fmean(x) / scale for x in zip(*(spent(course, cost) for course in found), strict=True)]
            if case.method in LINES:
                axes.axhline(means[0], linestyle=LINES[case.method], color="black", label=case.method)
            elif case.method in (*METHODS, "PFNM", "PFNM, paper"):
                axes.plot(at, means, marker="." if len(at) > 2 else "D", label=case.method)
    over_epochs.set(xlabel="epochs of training", ylabel="accuracy")
    over_bytes.set(xlabel="MB per client", ylabel="accuracy")


NOTES = (
    "Accuracies on the test data; mean ± sd over seeds, paired: a seed deals the same data, and draws the same starts "
    "of clients, for every method.",
    f"Clients train for {FIRST} epochs from starts of their own. One-shot methods merge, and FedMA begins to match, "
    f"the networks that they then have; of these is the ensemble. In any other exchange clients train for {EPOCHS} "
    "epochs.",
    "A round of FedMA is a pass: an exchange for each level of units and one for the last layer. Of FedAvg and "
    "FedProx, which begin from a shared start, it is one exchange. The last ensemble is of networks that trained alone "
    "for as many epochs as FedMA's clients do in the first pass.",
    "By the published values FedMA trains the last layer three times as long, at a tenth of the rate.",
    "Growth: units in the end over the widest client's; of an ensemble, whose every network is served, their number.",
    "MB per client: received and sent, as encoded for the wire.",
)

app = command_line("fedma", run, seeds=3, quick_seeds=2)

if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
