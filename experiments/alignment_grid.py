"""Matching, merging and restoring, each with each: two clients that hold half of MNIST each and begin on their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple, cast

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch.utils.data import TensorDataset

from .finetuning import Cohort, Config, accuracy
from .mode_connectivity import Perceptron
from .repair import endpoints, trained
from .report import Gate, Report, Row, command_line, spread
from .scores import Scores, over, table

CLIENTS = 2
MATCHED = {"not matched": "", "by weights": "git_rebasin", "by activations": "activation_matching"}
MERGED: Mapping[str, Config] = {
    "FedAvg": {"kind": "fedavg"},
    "Fisher": {"kind": "fisher"},
    "tempered Fisher": {"kind": "fisher", "temper": 0.5},
}
RESTORED = {"as merged": "", "REPAIR": "repair"}
CLOSE = 0.02


class Sizes(NamedTuple):
    """Numbers of examples: of each client, and behind its Fisher information."""

    client: int = 30_000
    grads: int = 1000


class Cell(NamedTuple):
    """How clients are matched, merged and restored."""

    matched: str
    merged: str
    restored: str

    def __str__(self) -> str:
        return ", ".join(self)

    def config(self, grads: int) -> Config:
        """The method: matching without, restoring within, merging innermost."""
        inner = MERGED[self.merged]
        if self.merged != "FedAvg":
            inner = {**inner, "max_grads": grads}
        for kind in (RESTORED[self.restored], MATCHED[self.matched]):
            inner = {"kind": kind, "inner": inner} if kind else inner
        return inner


CELLS = [Cell(*names) for names in product(MATCHED, MERGED, RESTORED)]


class Outcome(NamedTuple):
    """What one seed comes to: a row for every cell, and the bytes that a client receives and sends for it."""

    scores: Scores
    nbytes: Mapping[str, float]


def run(quick: bool, seeds: int) -> Report:
    """All cells; a quick run has fewer examples."""
    sizes = Sizes(4000, 256) if quick else Sizes()
    outcomes = [outcome(seed, sizes) for seed in track(range(seeds), "merging")]
    return Report(
        title="Alignment: matching, merging and restoring",
        tables=tables(outcomes, sizes),
        plot=lambda figure: plot(outcomes, figure),
        gates=[gate(outcomes)],
        notes=NOTES,
    )


def outcome(seed: int, sizes: Sizes) -> Outcome:
    """All that one seed comes to."""
    task = Perceptron(width=64, partition="iid", partition_seed=seed, limit=CLIENTS * sizes.client, validation=0.0)
    cohort, test = Cohort(trained(task, CLIENTS, seed)), cast(TensorDataset, task.test_data())
    beside, scores, nbytes = endpoints(cohort, test), {}, {}
    for cell in CELLS:
        round = cohort.round(cell.config(sizes.grads))
        scores[str(cell)] = {"accuracy": accuracy(task, [round.merged.params], test), **beside}
        nbytes[str(cell)] = round.nbytes
    return Outcome(scores, nbytes)


def tables(outcomes: Sequence[Outcome], sizes: Sizes) -> dict[str, list[Row]]:
    """A row for every cell."""
    megabytes = {name: {"MB per client": round(nbytes / 1e6, 2)} for name, nbytes in outcomes[0].nbytes.items()}
    caption = f"Two perceptrons 3 × 64, trained on {sizes.client:,} digits each"
    return {caption: table("cell", [outcome.scores for outcome in outcomes], megabytes)}


def gate(outcomes: Sequence[Outcome]) -> Gate:
    """Whether the best cell, as a mean over paired seeds, comes close to the clients themselves."""
    scores = [outcome.scores for outcome in outcomes]
    best = max(map(str, CELLS), key=lambda cell: over(scores, cell, "accuracy").mean)
    gaps = spread(seed[best]["accuracy"] - seed[best]["mean endpoint"] for seed in scores)
    return Gate("the best cell within 2 points of the endpoints' mean", gaps.mean >= -CLOSE, f"{best}: {gaps}")


def plot(outcomes: Sequence[Outcome], figure: Figure) -> None:
    """A group of bars for every way to match, beside the endpoints and their ensemble."""
    scores, axes = [outcome.scores for outcome in outcomes], figure.subplots()
    kinds = [*product(MERGED, RESTORED)]
    for place, (merged, restored) in enumerate(kinds):
        found = [over(scores, str(Cell(matched, merged, restored)), "accuracy") for matched in MATCHED]
        at = [group + (place - (len(kinds) - 1) / 2) / (len(kinds) + 1) for group in range(len(MATCHED))]
        label, colour = f"{merged}, {restored}", f"C{place // 2}"
        axes.bar(
            at,
            [x.mean for x in found],
            1 / (len(kinds) + 1),
            yerr=[x.sd for x in found],
            label=label,
            color=colour,
            alpha=0.5 if restored == "as merged" else 1.0,
        )
    for column, line in (("mean endpoint", "--"), ("prediction ensemble", "-")):
        axes.axhline(over(scores, str(CELLS[0]), column).mean, linestyle=line, color="black", label=column)
    axes.set_xticks(range(len(MATCHED)), [*MATCHED])
    axes.set(ylabel="accuracy", title="two perceptrons from different initialisations")
    axes.legend(fontsize="x-small", loc="lower right")


NOTES = (
    "Accuracies on the 10,000 test images; mean ± sd over seeds, paired: a seed's cells merge the same two networks. "
    "The best cell is the best on these images.",
    "By weights, squared gradients weight the matching where the method asks for them (F^¼): with Fisher, not with "
    "FedAvg. By activations takes a second exchange, on the clients' examples.",
    "Fisher and tempered Fisher take 1,000 examples of each client in the full run, and REPAIR within them the same; "
    "with FedAvg it takes all.",
    "MB per client: received and sent, once trained. A merge costs one network to serve, the ensemble two.",
)

app = command_line("alignment_grid", run, seeds=5, quick_seeds=3)

if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
