"""REPAIR: what averaging takes from the variance of every layer, and what giving it back is worth.

Two to six perceptrons with three hidden layers of 64 units, each trained on a sixth of MNIST from its own start,
averaged as they are or matched by weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch.utils.data import TensorDataset

from aggregators.core.seed import derive_seed
from aggregators.core.update import Request
from client.task import Task
from client.training import Training

from .finetuning import Cohort, Config, Finetuned, Round, accuracy, initial
from .mode_connectivity import KEPT, Perceptron, ends
from .report import Gate, Report, Row, command_line
from .scores import Scores, gap, over, table

LAYERS = ("hidden1", "hidden2", "hidden3")
CLIENTS = range(2, 7)
TRAINING = Training(optimizer="adamw", learning_rate=1e-3, batch_size=64, epochs=5)  # Adam: no weight decay
RESTORED: Mapping[str, Config] = {
    "average": KEPT,
    "gram": {"kind": "repair", "inner": KEPT},
    "exact": {"kind": "repair", "inner": KEPT, "mode": "exact"},
}
MATCHED = ("not matched", "matched")
GAIN, SLACK = 0.15, 0.005


class Outcome(NamedTuple):
    """What one seed comes to: a row for every merge, and the bytes that a client receives and sends for it."""

    scores: Scores
    nbytes: Mapping[str, float]


def run(quick: bool, seeds: int) -> Report:
    """Every merge; a quick run trains on fewer examples."""
    outcomes = [outcome(seed, 2000 if quick else 10_000) for seed in track(range(seeds), "repairing")]
    return Report(
        title="REPAIR of averages of two to six perceptrons",
        tables=tables(outcomes),
        plot=lambda figure: plot(outcomes, figure),
        gates=gates(outcomes),
        notes=NOTES,
    )


def outcome(seed: int, num: int) -> Outcome:
    """All that one seed comes to, of clients with so many examples."""
    task = Perceptron(width=64, partition="iid", partition_seed=seed, limit=num * CLIENTS[-1], validation=0.0)
    clients, test = trained(task, CLIENTS[-1], seed), cast(TensorDataset, task.test_data())
    scores: dict[str, dict[str, float]] = {}
    nbytes: dict[str, float] = {}
    known: dict[object, dict[str, Any]] = {}
    for k in CLIENTS:
        cohort = Cohort(clients[:k], known)
        beside = endpoints(cohort, test)
        for matched, restored in product(MATCHED, RESTORED):
            name, round = row(k, matched, restored), cohort.round(config(matched, restored))
            score, nbytes[name] = accuracy(task, [round.merged.params], test), round.nbytes
            scores[name] = {"accuracy": score, **beside, **kept(cohort, round)}
    return Outcome(scores, nbytes)


def row(clients: int, matched: str, restored: str) -> str:
    """What a merge is called."""
    return f"{clients}, {matched}, {restored}"


def config(matched: str, restored: str) -> Config:
    """The method that matches or does not, and restores so."""
    inner = RESTORED[restored]
    return {"kind": "git_rebasin", "inner": inner} if matched == "matched" else inner


def trained(task: Task, num: int, seed: int) -> list[Finetuned]:
    """So many clients with an equal part of the examples each, trained from starts of their own."""
    clients = []
    for number in range(num):
        own = derive_seed(seed, number)
        examples = task.data({"partition-id": number, "num-partitions": num})[0]
        start = Finetuned(task, initial(task, own), cast(TensorDataset, examples))
        clients.append(start.tuned(start.examples, TRAINING, own))
    return clients


def endpoints(cohort: Cohort, test: TensorDataset) -> dict[str, float]:
    """The clients' mean accuracy, and that of their prediction ensemble."""
    task, models = cohort.clients[0].task, [client.params for client in cohort.clients]
    alone = fmean(accuracy(task, [params], test) for params in models)
    return {"mean endpoint": alone, "prediction ensemble": accuracy(task, models, test)}


def kept(cohort: Cohort, round: Round) -> dict[str, float]:
    """Of each layer, the merge's variance over that of the networks it was merged from, as means over clients."""
    merged = [variances(client.at(round.merged.params)) for client in cohort.clients]
    own = [variances(client.at(params)) for client, params in zip(cohort.clients, ends(round), strict=True)]
    return {
        f"variance kept, {layer}": sum(one[layer] for one in merged) / sum(one[layer] for one in own)
        for layer in LAYERS
    }


def variances(client: Finetuned) -> dict[str, float]:
    """The mean over units of the variance of what each layer puts out, on the client's examples."""
    moments = client.measured(Request(moments=True))["moments"]
    return {layer: float(moments[layer].m2.mean()) / moments[layer].num for layer in LAYERS}


def tables(outcomes: Sequence[Outcome]) -> dict[str, list[Row]]:
    """A row for every merge."""
    megabytes = {name: {"MB per client": round(nbytes / 1e6, 2)} for name, nbytes in outcomes[0].nbytes.items()}
    scores = [outcome.scores for outcome in outcomes]
    return {"Merges of perceptrons 3 × 64, by number of clients": table("merge", scores, megabytes)}


def gates(outcomes: Sequence[Outcome]) -> list[Gate]:
    """What REPAIR is to give back, and how close one shot comes to measuring level by level."""
    scores = [outcome.scores for outcome in outcomes]
    gains = [gap(scores, row(2, "not matched", mode), row(2, "not matched", "average")) for mode in ("gram", "exact")]
    short = [gap(scores, row(k, "matched", "gram"), row(k, "matched", "exact")) for k in CLIENTS]
    return [
        Gate("two, not matched: at least 15 points on the average, gram and exact", min(gains) >= GAIN, _listed(gains)),
        Gate("matched, two to six: gram within 0.5 point of exact", max(map(abs, short)) <= SLACK, _listed(short)),
    ]


def _listed(gaps: Sequence[float]) -> str:
    return ", ".join(f"{gap:+.4f}" for gap in gaps)


def plot(outcomes: Sequence[Outcome], figure: Figure) -> None:
    """Accuracy by number of clients, not matched and matched; and what is left of each layer's variance."""
    scores = [outcome.scores for outcome in outcomes]
    figure.set_size_inches(13, 4.5)
    panels: list[Axes] = list(figure.subplots(1, 3).flat)
    for axes, matched in zip(panels, MATCHED, strict=False):
        for restored in RESTORED:
            found = [over(scores, row(k, matched, restored), "accuracy") for k in CLIENTS]
            axes.errorbar(
                CLIENTS, [x.mean for x in found], [x.sd for x in found], marker="o", capsize=3, label=restored
            )
        for column, line in (("mean endpoint", ":"), ("prediction ensemble", "-")):
            beside = [over(scores, row(k, matched, "average"), column).mean for k in CLIENTS]
            axes.plot(CLIENTS, beside, line, color="black", label=column)
        axes.set(title=matched, xlabel="clients", ylabel="accuracy", xticks=[*CLIENTS])
    panels[0].legend(fontsize="x-small")
    _layers(panels[2], scores)


def _layers(axes: Axes, scores: Sequence[Scores]) -> None:
    for matched, restored in product(MATCHED, RESTORED):
        found = [over(scores, row(2, matched, restored), f"variance kept, {layer}") for layer in LAYERS]
        style, colour = "-" if matched == "matched" else "--", f"C{[*RESTORED].index(restored)}"
        axes.plot(LAYERS, [x.mean for x in found], style, color=colour, marker="o", label=f"{matched}, {restored}")
    axes.set(title="two clients", ylabel="the merge's variance over the clients'")
    axes.legend(fontsize="xx-small", loc="lower left")


NOTES = (
    "Accuracies on the 10,000 test images; mean ± sd over seeds, paired: a seed's merges are of the same networks.",
    "Variance kept: of what a layer puts out before its ReLU, the mean over units, of the merge over that of the "
    "networks it was merged from, on the clients' own examples.",
    "Gram repairs in one shot from Gram matrices of what enters layers, nearly all of the bytes being the first one's, "
    "of 785 × 785 numbers. Exact receives the merge once for each of the three layers and sends moments.",
    "MB per client: received and sent, once trained. A merge costs one network to serve, the ensemble one per client.",
)

app = command_line("repair", run, seeds=3, quick_seeds=2)

if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
