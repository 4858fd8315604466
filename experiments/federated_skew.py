"""Federations of ten clients under label skew: every method of posterior merging beside FedAvg and FedProx.

Labels are dealt by Dirichlet 0.1, Dirichlet 0.5 or evenly; clients train long and are merged once, or in ten rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from math import isfinite
from statistics import fmean
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.progress import track
from torch import nn

from client.tasks.architectures import mlp
from client.tasks.images import Images
from client.tasks.mnist import Mnist
from client.tasks.own_data import Labelled

from .federation import Course, Federation, course
from .report import Cell, Gate, Report, Row, command_line, spread

CLIENTS = 10
MU = 0.01  # FedProx's


@final
class Mnist14(Images):
    """MNIST at 14 × 14 pixels, for a perceptron; tested on 2,000 of its test images, as rounds are many."""

    shape: ClassVar[tuple[int, int]] = (14, 14)
    white: ClassVar[int] = Mnist.white

    def model(self) -> nn.Module:
        """A perceptron with hidden layers of 64 and 64, 17,418 parameters."""
        return mlp(14 * 14, 64, 64, 10)

    def train_set(self) -> Labelled:
        """The official training set."""
        return halved("train")

    def test_set(self) -> Labelled:
        """The beginning of the official test set."""
        images, labels = halved("test")
        return Labelled(images[:2000], labels[:2000])


@cache
def halved(split: Literal["train", "test"]) -> Labelled:
    """MNIST with each two by two pixels as their mean, in a process once."""
    images, labels = Mnist().train_set() if split == "train" else Mnist().test_set()
    squares = images.reshape(len(images), 14, 2, 14, 2)
    return Labelled((squares.sum((2, 4), dtype=np.uint16) // 4).astype(np.uint8), labels)


class Method(NamedTuple):
    """A method by its configuration, FedProx's pull, and whether it makes sense from a random start in one round."""

    config: Mapping[str, Any]
    proximal: float = 0.0
    one_shot: bool = True


class Plan(NamedTuple):
    """What is run: the task, the skews, and how long clients train by themselves and between two merges."""

    task: Mapping[str, Any]
    skews: Mapping[str, Mapping[str, Any]]
    rounds: int
    alone: int
    between: int
    grads: int


class Case(NamedTuple):
    """Rounds, skew and method; a course per seed belongs to it."""

    rounds: int
    skew: str
    method: str


Courses: TypeAlias = Mapping[Case, Sequence[Course]]

SKEWS: Mapping[str, Mapping[str, Any]] = {
    "Dirichlet 0.1": {"partition": "dirichlet", "alpha": 0.1},
    "Dirichlet 0.5": {"partition": "dirichlet", "alpha": 0.5},
    "IID": {"partition": "iid"},
}
FULL = Plan(
    task={"kind": "experiments.federated_skew:Mnist14", "limit": 2500, "validation": 0.0},
    skews=SKEWS,
    rounds=10,
    alone=15,
    between=2,
    grads=64,
)
QUICK = Plan(
    task={"kind": "digits", "validation": 0.0},
    skews={"Dirichlet 0.1": SKEWS["Dirichlet 0.1"]},
    rounds=3,
    alone=20,
    between=5,
    grads=32,
)


def methods(grads: int) -> dict[str, Method]:
    """The contestants; those that ask for gradients take them of `grads` examples a client."""
    return {
        "FedAvg": Method({"kind": "fedavg"}),
        "FedProx": Method({"kind": "fedavg"}, proximal=MU),
        "Fisher": Method({"kind": "fisher", "max_grads": grads}),
        "tempered Fisher": Method({"kind": "fisher", "temper": 0.5, "max_grads": grads}),
        "SSF": Method({"kind": "ssf", "max_grads": grads}),
        "RegMean": Method({"kind": "regmean"}),
        "K-FAC, exponent ½": Method({"kind": "kfac", "max_grads": grads}),
        "WiSE-FT, α = ½": Method({"kind": "wise_ft", "inner": "fedavg", "anchor": "round"}, one_shot=False),
    }


def run(quick: bool, seeds: int) -> Report:
    """All federations; a quick run takes the small digits, fewer rounds and one skew."""
    plan = QUICK if quick else FULL
    courses: dict[Case, list[Course]] = {case: [] for case in cases(plan)}
    for case, seed in track([*product(courses, range(seeds))], "federating"):
        courses[case].append(course(federation(plan, case, seed)))
    return Report(
        title="Posterior merging in federations under label skew",
        tables=tables(courses),
        plot=lambda figure: plot(courses, figure),
        gates=gates(courses),
        notes=NOTES,
    )


def cases(plan: Plan) -> list[Case]:
    """One shot and many rounds, every skew, every method that makes sense there."""
    found = methods(plan.grads)
    return [
        Case(rounds, skew, name)
        for rounds, skew, (name, method) in product((1, plan.rounds), plan.skews, found.items())
        if rounds > 1 or method.one_shot
    ]


def federation(plan: Plan, case: Case, seed: int) -> Federation:
    """The federation of this case and seed; a seed deals the same data, and draws the same start, for every method."""
    method = methods(plan.grads)[case.method]
    return Federation(
        task={**plan.task, **plan.skews[case.skew], "partition_seed": seed},
        method=method.config,
        clients=CLIENTS,
        rounds=case.rounds,
        training={"epochs": plan.between if case.rounds > 1 else plan.alone, "proximal": method.proximal},
        seed=seed,
    )


def tables(courses: Courses) -> dict[str, list[Row]]:
    """The end of every federation, and its way by round and by byte."""
    one_shot, many = (
        {case: found for case, found in courses.items() if (case.rounds == 1) == alone} for alone in (True, False)
    )
    rounds = max(case.rounds for case in courses)
    return {
        "One shot": [_end(case, found) for case, found in one_shot.items()],
        f"{rounds} rounds": [_end(case, found) for case, found in many.items()],
        "Accuracy by round": [_by_round(case, found) for case, found in many.items()],
        f"Accuracy by the time FedAvg ends, in bytes: {rounds} of its rounds": [
            {"skew": case.skew, "method": case.method, **_by_byte(courses, case)} for case in many
        ],
    }


def _end(case: Case, found: Sequence[Course]) -> Row:
    return {
        "skew": case.skew,
        "method": case.method,
        "accuracy": spread(course.accuracy[-1] for course in found),
        "worst client": spread(course.worst for course in found),
        "best single client": spread(course.best_single for course in found),
        "mean single client": spread(course.mean_single for course in found),
        "prediction ensemble": spread(course.ensemble for course in found),
        "MB per round": round(fmean(fmean(course.nbytes) for course in found) / 1e6, 2),
    }


def _by_round(case: Case, found: Sequence[Course]) -> Row:
    rounds: dict[str, Cell] = {
        f"round {number}": round(fmean(accuracies), 4)
        for number, accuracies in enumerate(zip(*(course.accuracy for course in found), strict=True), start=1)
    }
    return {"skew": case.skew, "method": case.method, **rounds}


def _by_byte(courses: Courses, case: Case) -> Row:
    """The last round that ends within the bytes of all of FedAvg's, and the accuracy there."""
    budgets = [sum(course.nbytes) for course in courses[case._replace(method="FedAvg")]]
    found = [affordable(course, budget) for course, budget in zip(courses[case], budgets, strict=True)]
    if not all(found):
        return {"rounds": 0.0, "accuracy": "none ends"}
    there = [course.accuracy[num - 1] for course, num in zip(courses[case], found, strict=True)]
    return {"rounds": fmean(found), "accuracy": spread(there)}


def affordable(course: Course, budget: float) -> int:
    """How many of the course's rounds take no more than `budget` bytes."""
    total, rounds = 0.0, 0
    for nbytes in course.nbytes:
        total += nbytes
        rounds += total <= budget
    return rounds


def gates(courses: Courses) -> list[Gate]:
    """What held on the seeds that the methods were tuned on, paired by seed; and that nothing broke."""
    shot = {case.method: found for case, found in courses.items() if case[:2] == (1, "Dirichlet 0.1")}
    numbers = [x for found in courses.values() for course in found for x in (*course.accuracy, *course[2:])]
    return [
        _above(shot, "tempered Fisher", "FedAvg"),
        _above(shot, "tempered Fisher", "Fisher"),
        _above(shot, "K-FAC, exponent ½", "FedAvg"),
        Gate(
            "every round of every federation merged, every figure finite",
            all(map(isfinite, numbers)),
            f"{len(numbers)} figures",
        ),
    ]


def _above(courses: Mapping[str, Sequence[Course]], method: str, other: str) -> Gate:
    gaps = [a.accuracy[-1] - b.accuracy[-1] for a, b in zip(courses[method], courses[other], strict=True)]
    detail = f"{fmean(gaps):+.4f}, higher in {sum(gap > 0 for gap in gaps)} of {len(gaps)} seeds"
    return Gate(f"one shot, Dirichlet 0.1: {method} at least {other}, mean of paired seeds", fmean(gaps) >= 0, detail)


def plot(courses: Courses, figure: Figure) -> None:
    """Accuracy over rounds, above, and over bytes, below; a column of panels for each skew."""
    rounds = max(case.rounds for case in courses)
    skews = list(dict.fromkeys(case.skew for case in courses))
    figure.set_size_inches(4 * len(skews), 7)
    panels = figure.subplots(2, len(skews), sharey="col", squeeze=False)
    for skew, (over_rounds, over_bytes) in zip(skews, panels.T, strict=True):
        for case, found in courses.items():
            if case[:2] == (rounds, skew):
                _lines(over_rounds, over_bytes, case.method, found)
        over_rounds.set(title=skew, xlabel="round", ylabel="accuracy")
        over_bytes.set(xlabel="MB, all clients", ylabel="accuracy", xscale="log")
        over_bytes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        over_bytes.xaxis.set_major_formatter("{x:g}")
        over_bytes.xaxis.set_minor_locator(NullLocator())
    panels[0][0].legend(fontsize="x-small")


def _lines(over_rounds: Axes, over_bytes: Axes, name: str, found: Sequence[Course]) -> None:
    means = [fmean(accuracies) for accuracies in zip(*(course.accuracy for course in found), strict=True)]
    nbytes = [fmean(sizes) for sizes in zip(*(course.nbytes for course in found), strict=True)]
    over_rounds.plot(range(1, len(means) + 1), means, marker=".", label=name)
    over_bytes.plot([sum(nbytes[: end + 1]) / 1e6 for end in range(len(means))], means, marker=".", label=name)


NOTES = (
    "Accuracies on the server's test data; mean ± sd over seeds, paired: a seed deals the same data to every method.",
    "Worst client: the merged model's least accuracy on any client's mix of labels, by accuracies on the test data.",
    "Single clients and their ensemble are those of the last round, before they are merged; best is on the test data.",
    "WiSE-FT goes half of each round's way; from a random start, in one shot, it has nothing to hold on to.",
    "Bytes are of both directions and all clients, as encoded for the wire.",
)

app = command_line("federated_skew", run, seeds=5, quick_seeds=3)

if __name__ == "__main__":
    app()
