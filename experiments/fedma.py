"""FedMA: networks that began apart, matched level by level, beside averages, one-shot matching and their ensemble.

Perceptrons and a LeNet on MNIST, a small VGG on CIFAR-10, two to eight clients; labels are dealt evenly or by
Dirichlet 0.5.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from itertools import accumulate, product
from statistics import fmean
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aggregators.alignment.fedma import FedMA
from aggregators.alignment.pfnm import PFNM
from aggregators.core.fitting import fit
from aggregators.core.seed import derive_seed
from aggregators.core.update import Tensors
from client.task import Examples, Node, Task, load, parse, tensors
from client.tasks.images import Images
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled
from client.tasks.partition import Scheme, Split, parts, place
from client.training import Training, evaluate, seeded
from server import loopback

from .cache import cached
from .cifar10 import Cifar10
from .federated_skew import MU
from .federated_skew import SKEWS as DEALT
from .finetuning import Cohort, Config, Finetuned, accuracy
from .report import Cell, Gate, Report, Row, command_line, spread
from .sources import sources

SKEWS = {name: DEALT[name] for name in ("IID", "Dirichlet 0.5")}
ONE_SHOT: Mapping[str, Config] = {
    "one-shot average": {"kind": "fedavg"},
    "PFNM": {"kind": "pfnm"},
    "PFNM, paper": PFNM.paper().model_dump(),
}
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


class Vgg(Task):
    """CIFAR-10 for a VGG of three stages, its first `limit` images dealt to the clients as `partition.parts` says."""

    num_classes: ClassVar[int] = 10

    partition: Scheme = "iid"
    alpha: float = 0.5
    partition_seed: int = 0
    limit: int = 10_000
    tested: int = 2000

    def model(self) -> nn.Module:
        """A convolution and a pooling a stage, of 16, 32 and 64 channels, and 64 units: 89,834 parameters."""
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        for stage, (fan_in, width) in enumerate(((3, 16), (16, 32), (32, 64)), start=1):
            stages[f"conv{stage}"] = nn.Conv2d(fan_in, width, 3, padding=1)
            stages[f"relu{stage}"], stages[f"pool{stage}"] = nn.ReLU(), nn.MaxPool2d(2)
        head = {"hidden4": nn.Linear(1024, 64), "relu4": nn.ReLU(), "output": nn.Linear(64, 10)}
        return nn.Sequential(OrderedDict(**stages, flatten=nn.Flatten(), **head))

    def data(self, node: Node) -> tuple[Examples, Examples]:
        """The client's part to train on, and nothing to validate with."""
        examples, (part, num) = pictures(self.limit), place(node)
        split = Split(self.partition, self.alpha, seed=self.partition_seed)
        own = torch.from_numpy(parts(examples.tensors[1].numpy(), num, split)[part])
        return TensorDataset(*(x[own] for x in examples.tensors)), TensorDataset(*(x[:0] for x in examples.tensors))

    def test_data(self) -> Examples:
        """The first of the test images."""
        return Cifar10(tested=self.tested).test_data()


@cache
def pictures(num: int) -> TensorDataset:
    """So many training images of CIFAR-10, in a process once."""
    return cast(TensorDataset, Cifar10(limit=num).data({})[0])


class Setting(NamedTuple):
    """A network, its levels of units, and how its clients train in an exchange, on how many examples each."""

    task: Config
    levels: int
    clients: int
    examples: int
    passes: int
    training: Training

    @property
    def exchanges(self) -> int:
        """Of a pass: one for each level, and one for the last layer."""
        return self.levels + 1

    def dealt(self, skew: str, seed: int) -> Config:
        """The task, its examples dealt so."""
        return {**self.task, **SKEWS[skew], "limit": self.clients * self.examples, "partition_seed": seed}


class Method(NamedTuple):
    """A method by its configuration, where clients begin, and FedProx's pull."""

    config: Config
    start: Literal["own", "shared"]
    proximal: float = 0.0


class Case(NamedTuple):
    """Network, skew and method; a course per seed belongs to it."""

    network: str
    skew: str
    method: str


class Course(NamedTuple):
    """Accuracy on the test data, bytes of a client and growth, by round; and the exchanges that a round takes."""

    accuracy: list[float]
    nbytes: list[float]
    growth: list[float]
    exchanges: int = 1


Courses: TypeAlias = Mapping[Case, Sequence[Course]]

PERCEPTRON: Config = {"kind": "experiments.mode_connectivity:Perceptron", "width": 64, "validation": 0.0}
LENET: Config = {"kind": "experiments.fedma:LeNet", "validation": 0.0}
SGD = Training(epochs=2, learning_rate=0.05, batch_size=32)
ADAM = Training(epochs=2, optimizer="adamw", learning_rate=1e-3, batch_size=32)
FULL = {
    GATED: Setting(PERCEPTRON, 3, 3, 8000, 3, SGD),
    "perceptron 3 × 64, 8 clients": Setting(PERCEPTRON, 3, 8, 7500, 1, SGD),
    "LeNet, 4 clients": Setting(LENET, 4, 4, 4000, 2, SGD),
    "VGG, 2 clients": Setting({"kind": "experiments.fedma:Vgg"}, 4, 2, 5000, 1, ADAM),
}
QUICK = {GATED: FULL[GATED]._replace(passes=1)}


def methods(training: Training) -> dict[str, Method]:
    """The contestants that take many exchanges."""
    return {
        "FedMA": Method({"kind": "fedma"}, "own"),
        "FedMA, paper": Method(FedMA.paper(training.epochs, training.learning_rate).model_dump(), "own"),
        "FedAvg": Method({"kind": "fedavg"}, "shared"),
        "FedProx": Method({"kind": "fedavg"}, "shared", MU),
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
        tables=tables(courses, settings),
        plot=lambda figure: plot(courses, figure),
        gates=gates(courses),
        notes=NOTES,
    )


def outcome(setting: Setting, skew: str, seed: int) -> dict[str, Course]:
    """The course of every method; a seed deals the same data, and draws the same starts, for all."""
    live = {name: course(setting, skew, method, seed) for name, method in methods(setting.training).items()}
    return {**live, **one_shot(alone(setting, skew, seed))}


def course(setting: Setting, skew: str, method: Method, seed: int) -> Course:
    """The federation's course, run unless it was run before by the same code."""
    passes = setting.passes * (1 if method.start == "own" else setting.exchanges)
    settings = {
        "task": setting.dealt(skew, seed),
        "aggregator": method.config,
        "clients": setting.clients,
        "rounds": passes,
        "seed": seed,
        "start": method.start,
        "training": {**setting.training.model_dump(exclude={"rounds"}), "proximal": method.proximal},
    }
    code = sources("aggregators", "client", "server", "experiments/fedma.py", "experiments/mode_connectivity.py")
    kept = cached("fedma", {**settings, "code": code}, lambda: _run(settings))
    accuracy, nbytes, growth = (kept[name].tolist() for name in ("accuracy", "nbytes", "growth"))
    return Course(accuracy, nbytes, growth, int(kept["exchanges"]))


def _run(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    with redirect_stdout(StringIO()):  # a line for every round is too much here
        records = loopback.run(**settings, evaluate=False, keep_replies=False).records
    asked = [record["exchanges"] for record in records]
    left_out = [one["reason"] for exchanges in asked for exchange in exchanges for one in exchange["left_out"]]
    lost = [record["reason"] for record in records if record["status"] != "merged"]
    if left_out or lost:
        raise RuntimeError(f"{settings['aggregator']}: {'; '.join([*left_out, *lost])}")
    nbytes = [sum(e["bytes_in"] + e["bytes_out"] for e in exchanges) / settings["clients"] for exchanges in asked]
    return {
        "accuracy": torch.tensor([record["test"]["accuracy"] for record in records], dtype=torch.float64),
        "nbytes": torch.tensor(nbytes, dtype=torch.float64),
        "growth": torch.tensor([record["metrics"].get("growth", 1.0) for record in records], dtype=torch.float64),
        "exchanges": torch.tensor(len(asked[0])),
    }


def alone(setting: Setting, skew: str, seed: int) -> Cohort:
    """The clients' networks, from the starts that a federation has, trained as long as in a pass."""
    task = parse(json.dumps(setting.dealt(skew, seed)))
    training = setting.training.model_copy(update={"epochs": setting.exchanges * setting.training.epochs})
    clients = []
    for part in range(setting.clients):
        with seeded(derive_seed(seed, "initial", part)):
            start = tensors(task.model())
        examples = cast(TensorDataset, task.data({"partition-id": part, "num-partitions": setting.clients})[0])
        clients.append(Finetuned(task, start, examples).tuned(examples, training, derive_seed(seed, 1, part)))
    return Cohort(clients)


def one_shot(cohort: Cohort) -> dict[str, Course]:
    """What merging once makes of these networks; their mean and their ensemble's accuracy."""
    rounds = {name: cohort.round(config) for name, config in ONE_SHOT.items()}
    task, models = cohort.clients[0].task, [client.params for client in cohort.clients]
    test, sent = cast(TensorDataset, task.test_data()), rounds["one-shot average"].nbytes
    found = {
        name: Course([score(task, round.merged.params)], [round.nbytes], [_growth(round.merged.metrics)])
        for name, round in rounds.items()
    }
    single = fmean(accuracy(task, [params], test) for params in models)
    ensemble = Course([accuracy(task, models, test)], [sent], [float(len(models))])
    return {**found, "mean single client": Course([single], [0.0], [1.0]), "prediction ensemble": ensemble}


def _growth(metrics: Mapping[str, float | Tensor]) -> float:
    return float(metrics.get("growth", 1.0))


def score(task: Task, params: Tensors) -> float:
    """Accuracy on the test data of a network of any widths."""
    model = fit(task.model(), params)
    load(model, params)
    return evaluate(task, model, cast(TensorDataset, task.test_data()))["accuracy"]


def tables(courses: Courses, settings: Mapping[str, Setting]) -> dict[str, list[Row]]:
    """Every method after one pass, and the federations' way by exchange and by byte."""
    live = [case for case in courses if case.method in methods(settings[case.network].training)]
    passes = {case: range(1, settings[case.network].passes + 1) for case in live}
    return {
        "One pass of FedMA, others as long": [_row(case, _ended(case, courses)) for case in courses],
        "Accuracy after as many exchanges as passes of FedMA": [
            _row(case, {f"{p} passes": _after(courses, case, p, "exchanges") for p in passes[case]}) for case in live
        ],
        "Accuracy within as many bytes as passes of FedMA": [
            _row(case, {f"{p} passes": _after(courses, case, p, "bytes") for p in passes[case]}) for case in live
        ],
    }


def _row(case: Case, cells: Row) -> Row:
    return {"network": case.network, "labels": case.skew, "method": case.method, **cells}


def _ended(case: Case, courses: Courses) -> Row:
    """Where the method is when FedMA has ended its first pass."""
    ends = [_rounds(courses, case, 1, "exchanges", seed) for seed in range(len(courses[case]))]
    found = [*zip(courses[case], ends, strict=True)]
    return {
        "accuracy": spread(course.accuracy[end - 1] for course, end in found),
        "growth": spread(course.growth[end - 1] for course, end in found),
        "exchanges": found[0][0].exchanges * ends[0],
        "MB per client": round(fmean(sum(course.nbytes[:end]) for course, end in found) / 1e6, 2),
    }


def _after(courses: Courses, case: Case, passes: int, cost: Literal["exchanges", "bytes"]) -> Cell:
    """Accuracy when FedMA has ended so many passes, by what both have cost."""
    ends = [_rounds(courses, case, passes, cost, seed) for seed in range(len(courses[case]))]
    if not all(ends):
        return "none ends"
    return spread(course.accuracy[end - 1] for course, end in zip(courses[case], ends, strict=True))


def _rounds(courses: Courses, case: Case, passes: int, cost: Literal["exchanges", "bytes"], seed: int) -> int:
    budget = costs(courses[case._replace(method="FedMA")][seed], cost)[passes - 1]
    return sum(spent <= budget for spent in costs(courses[case][seed], cost))


def costs(course: Course, cost: Literal["exchanges", "bytes"]) -> list[float]:
    """What has been spent when each round ends."""
    each = course.nbytes if cost == "bytes" else [float(course.exchanges)] * len(course.accuracy)
    return [*accumulate(each)]


def gates(courses: Courses) -> list[Gate]:
    """What a pass over the perceptrons of three clients is to come to, as means over paired seeds."""
    iid, skewed = SKEWS
    growth = max(most for skew in SKEWS for found in courses[Case(GATED, skew, "FedMA")] for most in found.growth)
    return [
        _above(courses, [iid], "prediction ensemble", -SLACK),
        _above(courses, [skewed], "prediction ensemble", 0.0),
        _above(courses, [iid, skewed], "one-shot average", GAIN),
        Gate(f"{GATED}: FedMA grows to at most {GROWTH}", growth <= GROWTH, f"{growth:.4f} at most"),
        _above(courses, [iid, skewed], "PFNM, paper", 0.0, "PFNM"),
    ]


def _above(courses: Courses, skews: Sequence[str], other: str, least: float, method: str = "FedMA") -> Gate:
    """Whether a pass, or a one-shot method, is so much above the other, for each skew."""
    gaps = [spread(gaps_of(courses, skew, method, other)) for skew in skews]
    name = f"{GATED}, {' and '.join(skews)}: {method} at least {other} {least:+.2f}"
    return Gate(name, all(gap.mean >= least for gap in gaps), ", ".join(map(str, gaps)))


def gaps_of(courses: Courses, skew: str, method: str, other: str) -> list[float]:
    """How far the first is above the second after one round, by seed."""
    pairs = zip(*(courses[Case(GATED, skew, name)] for name in (method, other)), strict=True)
    return [a.accuracy[0] - b.accuracy[0] for a, b in pairs]


def plot(courses: Courses, figure: Figure) -> None:
    """A row of panels for each network: accuracy over exchanges and over bytes, for each skew."""
    networks = list(dict.fromkeys(case.network for case in courses))
    figure.set_size_inches(16, 3.6 * len(networks))
    panels = figure.subplots(len(networks), 2 * len(SKEWS), squeeze=False)
    for row, network in zip(panels, networks, strict=True):
        for axes, beside, skew in zip(row[::2], row[1::2], SKEWS, strict=True):
            _panels(axes, beside, {case: found for case, found in courses.items() if case[:2] == (network, skew)})
            axes.set(title=f"{network}, {skew}")
    panels[0][0].legend(fontsize="x-small")


def _panels(over_exchanges: Axes, over_bytes: Axes, courses: Courses) -> None:
    for number, (case, found) in enumerate(courses.items()):
        means = [fmean(values) for values in zip(*(course.accuracy for course in found), strict=True)]
        over_exchanges.plot(costs(found[0], "exchanges"), means, marker=".", color=f"C{number}", label=case.method)
        spent = zip(*(costs(course, "bytes") for course in found), strict=True)
        over_bytes.plot([fmean(x) / 1e6 for x in spent], means, marker=".", color=f"C{number}", label=case.method)
        if case.method == "prediction ensemble":
            for axes in (over_exchanges, over_bytes):
                axes.axhline(means[0], linestyle="--", color="black", label=None)
    over_exchanges.set(xlabel="exchange", ylabel="accuracy")
    over_bytes.set(xlabel="MB per client", ylabel="accuracy")


NOTES = (
    "Accuracies on the test data; mean ± sd over seeds, paired: a seed deals the same data, and draws the same starts, "
    "for every method.",
    "Clients train for two epochs in an exchange. A round of FedAvg and FedProx is one exchange, a round of FedMA a "
    "pass, of one for each level and one for the last layer; its clients begin from starts of their own.",
    "One-shot methods, the single clients and their ensemble are of networks that trained alone for as many epochs as "
    "FedMA's clients do in a pass. By the published values FedMA trains the last layer three times as long.",
    "Growth: units in the end over the widest client's; of the ensemble, whose every network is served, their number.",
    "MB per client: received and sent, as encoded for the wire.",
)

app = command_line("fedma", run, seeds=3, quick_seeds=2)

if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
