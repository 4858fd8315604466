"""Fusion by optimal transport: perceptrons from different initialisations, of one width or of several, become one.

Two to six clients with a sixth of MNIST each; two of which one alone knows a digit; and a network and its copy, every
unit of which is doubled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch.utils.data import TensorDataset

from aggregators.core.diagnosis import between
from aggregators.core.seed import derive_seed
from aggregators.core.update import Tensors

from .finetuning import Cohort, Config, Finetuned, Round, accuracy, correct, initial, outputs
from .mode_connectivity import KEPT, Perceptron
from .repair import TRAINING
from .report import Gate, Report, Row, command_line
from .scores import LINES, Scores, bars, gap, over, table

WIDTH = 64
TASK = Perceptron(width=WIDTH)
PARTS = 6
ALIKE = tuple((WIDTH,) * clients for clients in (2, 4, 6))  # the hidden widths of each cohort's clients
APART = ((64, 96), (64, 128), (64, 96, 128))
PLAIN, WEIGHTS, ACTIVATIONS, MATCHING = "plain average", "OT by weights", "OT by activations", "weight matching"
OT: Mapping[str, Config] = {
    WEIGHTS: {"kind": "ot_fusion"},
    f"{WEIGHTS}, iterated": {"kind": "ot_fusion", "iterations": 3},
    ACTIVATIONS: {"kind": "ot_fusion", "cost": "activations"},
}
ONE_WIDTH: Mapping[str, Config] = {PLAIN: {}, **OT, MATCHING: {"kind": "git_rebasin"}}
WIDTHS: Mapping[str, Config] = {**OT, f"{ACTIVATIONS}, mean": {**OT[ACTIVATIONS], "outgoing": "mean"}}
ONCE = (PLAIN, WEIGHTS, ACTIVATIONS, MATCHING)  # two of one width are not matched better again
INNER: Mapping[str, Config] = {"FedAvg": {"kind": "fedavg"}, "Fisher": {"kind": "fisher", "max_grads": 1000}}
DIGIT, SHARE = 4, 0.1  # what one client alone knows, and its part of all other digits
STEPS = 10  # from the client that does not know it to the one that does
GAIN, IMAGE, ROUNDING = 0.15, 1e-4, 1e-5  # points; one of the test images; of the largest output


class Outcome(NamedTuple):
    """What one seed comes to, by study; bytes are what a client receives and sends for a merge.

    `ways`: accuracy by the specialist's proportion, in equal steps from 0 to 1.
    """

    fused: Scores
    nbytes: Mapping[str, float]
    digit: Scores
    ways: Mapping[str, list[float]]
    doubled: Scores


def run(quick: bool, seeds: int) -> Report:
    """All three studies; a quick run trains on fewer examples."""
    outcomes = [outcome(seed, 2000 if quick else 10_000) for seed in track(range(seeds), "fusing")]
    return Report(
        title="Fusion of perceptrons by optimal transport",
        tables=tables(outcomes),
        plot=lambda figure: plot(outcomes, figure),
        gates=gates(outcomes),
        notes=NOTES,
    )


def outcome(seed: int, num: int) -> Outcome:
    """All that one seed comes to, of six parts with so many examples."""
    options = {"partition_seed": seed, "limit": PARTS * num, "validation": 0.0}
    test = cast(TensorDataset, TASK.test_data())
    fused, nbytes = fusions(seed, options, test)
    return Outcome(fused, nbytes, *lone_digit(seed, options, test), doublings(seed, options, test))


# --- clients of one width, or of several ----------------------------------------------------------------------------


def fusions(seed: int, options: Mapping[str, Any], test: TensorDataset) -> tuple[Scores, dict[str, float]]:
    """A row for every cohort, way to match and inner method; and the bytes of each."""
    scores: dict[str, dict[str, float]] = {}
    nbytes: dict[str, float] = {}
    known: dict[object, dict[str, Any]] = {}
    for widths in ALIKE + APART:
        cohort = Cohort([client(seed, number, width, options) for number, width in enumerate(widths)], known)
        beside = alone([one.params for one in cohort.clients], test)
        for (matched, how), inner in product(methods(widths).items(), INNER):
            name, round = row(widths, matched, inner), cohort.round(around(how, INNER[inner]))
            score, nbytes[name] = accuracy(TASK, [round.merged.params], test), round.nbytes
            scores[name] = {"accuracy": score, **beside}
    return scores, nbytes


def methods(widths: Sequence[int]) -> Mapping[str, Config]:
    """The ways to match clients of these widths."""
    return ONE_WIDTH if len({*widths}) == 1 else WIDTHS


def around(how: Config, inner: Config) -> Config:
    """The method that matches so, if at all, and merges by the inner one."""
    return {**how, "inner": inner} if how else inner


def row(widths: Sequence[int], matched: str, inner: str) -> str:
    """What a merge is called."""
    return f"{called(widths)}, {matched}, {inner}"


def called(widths: Sequence[int]) -> str:
    """The widths of a cohort's clients, as `6 × 64` or `64 + 96`."""
    return f"{len(widths)} × {widths[0]}" if len({*widths}) == 1 else " + ".join(map(str, widths))


def client(seed: int, number: int, width: int, options: Mapping[str, Any]) -> Finetuned:
    """The client of this width with this part of the examples."""
    task = Perceptron(width=width, partition="iid", **options)
    examples = cast(TensorDataset, task.data({"partition-id": number, "num-partitions": PARTS})[0])
    return trained(task, examples, derive_seed(seed, number))


def trained(task: Perceptron, examples: TensorDataset, seed: int) -> Finetuned:
    """A client trained on these examples from a start of its own."""
    return Finetuned(task, initial(task, seed), examples).tuned(examples, TRAINING, seed)


def alone(models: Sequence[Tensors], test: TensorDataset) -> dict[str, float]:
    """What is not merged: the prediction ensemble, and the best and mean single client."""
    each = [accuracy(TASK, [params], test) for params in models]
    return dict(zip(LINES, (accuracy(TASK, models, test), max(each), fmean(each)), strict=True))


# --- one client alone knows a digit ---------------------------------------------------------------------------------


def lone_digit(
    seed: int, options: Mapping[str, Any], test: TensorDataset
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """A row for the two clients, and for every way to match them; and its accuracies by proportion."""
    cohort = Cohort(specialists(seed, options))
    models = [client.params for client in cohort.clients]
    scores = {"specialist": [models[0]], "generalist": [models[1]], "prediction ensemble": models}
    ways: dict[str, list[float]] = {}
    for matched, how in ((matched, ONE_WIDTH[matched]) for matched in ONCE):
        special, general = moved(cohort.round(around(how, KEPT)))
        mixes = [between(general, special, step / STEPS) for step in range(STEPS + 1)]
        ways[matched] = [accuracy(TASK, [mix], test) for mix in mixes]
        scores[f"{matched}, half and half"] = [mixes[STEPS // 2]]
        scores[f"{matched}, best proportion"] = [mixes[ways[matched].index(max(ways[matched]))]]
        scores[f"{matched}, Fisher"] = [cohort.round(around(how, INNER["Fisher"])).merged.params]
    return {name: known_digit(found, test) for name, found in scores.items()}, ways


def specialists(seed: int, options: Mapping[str, Any]) -> list[Finetuned]:
    """A client with all examples of the digit and few of all others, and one with the rest."""
    task = Perceptron(width=WIDTH, partition="shared", **options)
    examples = cast(TensorDataset, task.data({"partition-id": 0, "num-partitions": 2})[0])
    labels = examples.tensors[1]
    drawn = torch.rand(len(labels), generator=torch.Generator().manual_seed(derive_seed(seed, "share"))) < SHARE
    held = (labels == DIGIT) | drawn
    parts = [TensorDataset(*(part[mine] for part in examples.tensors)) for mine in (held, ~held)]
    return [trained(task, part, derive_seed(seed, "digit", number)) for number, part in enumerate(parts)]


def moved(round: Round) -> list[Tensors]:
    """The clients' networks as the round's innermost method saw them."""
    memory: Any = round.merged.memory
    clients = memory if "clients" in memory else memory["inner"]
    return [client["params"] for client in clients["clients"].values()]


def known_digit(models: Sequence[Tensors], test: TensorDataset) -> dict[str, float]:
    """Accuracy on all digits, and on the one."""
    hits = correct(TASK, models, test).double()
    return {"accuracy": hits.mean().item(), f"on {DIGIT}": hits[test.tensors[1] == DIGIT].mean().item()}


# --- exact duplication ----------------------------------------------------------------------------------------------


def doublings(seed: int, options: Mapping[str, Any], test: TensorDataset) -> dict[str, dict[str, float]]:
    """A row for every way to fuse a network with its copy of twice the width, into the width of the one or the other.

    What is lost is the accuracy's change, and of the outputs on the test images the largest over the largest output.
    """
    one = client(seed, 0, WIDTH, options)
    twice, scores = doubled(one, derive_seed(seed, "doubled")), {}
    own = outputs(TASK, one.params, test.tensors[0])
    cohorts = [Cohort(clients) for clients in ((one, twice), (twice, one))]
    for kind, outgoing, cohort in product((WEIGHTS, ACTIVATIONS), ("sum", "mean"), cohorts):
        config = {**OT[kind], "outgoing": outgoing, "reference": "first", "inner": "fedavg"}
        params = cohort.round(config).merged.params
        away = (outputs(TASK, params, test.tensors[0]) - own).abs().max() / own.abs().max()
        lost = accuracy(TASK, [one.params], test) - accuracy(TASK, [params], test)
        name = f"{kind}, {outgoing}, into {len(params['hidden1.bias'])}"
        scores[name] = {"accuracy lost": lost, "outputs' change": away.item()}
    return scores


def doubled(client: Finetuned, seed: int) -> Finetuned:
    """The same function by twice the units, in an order at random: each is there twice, and read by half."""
    symmetry, generator = client.task.symmetry(client.task.model()), torch.Generator().manual_seed(seed)
    units = {
        group: torch.randperm(2 * width, generator=generator) % width
        for group, width in symmetry.sizes(client.params).items()
    }
    wide = symmetry.take(client.params, units)
    reading = wide.keys() - {"hidden1.weight"} - {name for name in wide if name.endswith("bias")}
    params = {name: value / 2 if name in reading else value for name, value in wide.items()}
    return replace(client, task=Perceptron(width=len(params["hidden1.bias"])), params=params)


# --- what is reported -----------------------------------------------------------------------------------------------


def tables(outcomes: Sequence[Outcome]) -> dict[str, list[Row]]:
    """Merges of clients of one width and of several, of the two of which one knows a digit, and of doubled units."""
    megabytes = {name: {"MB per client": round(nbytes / 1e6, 2)} for name, nbytes in outcomes[0].nbytes.items()}
    return {
        "Perceptrons of one width, number × width": table("merge", merges(outcomes, ALIKE), megabytes),
        "Perceptrons of several widths": table("merge", merges(outcomes, APART), megabytes),
        f"One client alone knows the {DIGIT}": table("model", [outcome.digit for outcome in outcomes]),
        f"A perceptron of {WIDTH} units a layer, fused with its copy whose units are doubled": table(
            "merge", [outcome.doubled for outcome in outcomes]
        ),
    }


def merges(outcomes: Sequence[Outcome], cohorts: Sequence[Sequence[int]]) -> list[Scores]:
    """The rows of these cohorts."""
    names = [row(widths, *names) for widths in cohorts for names in product(methods(widths), INNER)]
    return [{name: outcome.fused[name] for name in names} for outcome in outcomes]


def gates(outcomes: Sequence[Outcome]) -> list[Gate]:
    """What transport is to gain where averaging fails, and to keep where units were doubled."""
    scores, (two, *_) = [outcome.fused for outcome in outcomes], ALIKE
    gains = [gap(scores, row(two, how, "FedAvg"), row(two, PLAIN, "FedAvg")) for how in (WEIGHTS, ACTIVATIONS)]
    summed = [one for outcome in outcomes for name, one in outcome.doubled.items() if ", sum," in name]
    lost, change = (max(abs(one[column]) for one in summed) for column in ("accuracy lost", "outputs' change"))
    return [
        Gate(
            "two from different initialisations: at least 15 points on the plain average, by weights and activations",
            min(gains) >= GAIN,
            ", ".join(f"{gain:+.4f}" for gain in gains),
        ),
        Gate(
            f"doubled units, summed: the same accuracy but for one image, outputs within {ROUNDING:g} of the largest",
            lost <= 1.5 * IMAGE and change <= ROUNDING,
            f"{lost:.4f}, {change:.1e}",
        ),
    ]


def plot(outcomes: Sequence[Outcome], figure: Figure) -> None:
    """Accuracy by number of clients, by widths, and by proportion of the client that knows the digit."""
    figure.set_size_inches(16, 5)
    panels: list[Axes] = list(figure.subplots(1, 3).flat)
    _numbers(panels[0], [outcome.fused for outcome in outcomes])
    bars(panels[1], [_averaged(outcome.fused) for outcome in outcomes], "several widths, FedAvg")
    _proportions(panels[2], [outcome.ways for outcome in outcomes])
    for axes in panels[::2]:
        axes.set_ylabel("accuracy")
        axes.legend(fontsize="x-small")


def _numbers(axes: Axes, scores: Sequence[Scores]) -> None:
    at = [*map(len, ALIKE)]
    for matched in ONE_WIDTH:
        found = [over(scores, row(widths, matched, "FedAvg"), "accuracy") for widths in ALIKE]
        axes.errorbar(at, [x.mean for x in found], [x.sd for x in found], marker="o", capsize=3, label=matched)
    for column, line in LINES.items():
        beside = [over(scores, row(widths, PLAIN, "FedAvg"), column).mean for widths in ALIKE]
        axes.plot(at, beside, line, color="black", label=column)
    axes.set(title=f"one width, {WIDTH}, FedAvg", xlabel="clients", xticks=at)


def _averaged(scores: Scores) -> Scores:
    """Of the cohorts of several widths, the merges by FedAvg, and their ensembles."""
    found: dict[str, Mapping[str, float]] = {}
    for widths in APART:
        merged = {how: scores[row(widths, how, "FedAvg")] for how in WIDTHS}
        found |= {f"{called(widths)}, {how}": {"accuracy": one["accuracy"]} for how, one in merged.items()}
        found[f"{called(widths)}, ensemble"] = {"accuracy": merged[WEIGHTS]["prediction ensemble"]}
    return found


def _proportions(axes: Axes, ways: Sequence[Mapping[str, list[float]]]) -> None:
    at = [step / STEPS for step in range(STEPS + 1)]
    for matched in ONCE:
        axes.plot(at, [fmean(there) for there in zip(*(way[matched] for way in ways), strict=True)], label=matched)
    axes.set(title=f"one client alone knows the {DIGIT}", xlabel="its proportion")


NOTES = (
    "Accuracies on the 10,000 test images; mean ± sd over seeds, paired: a seed's merges are of the same networks, "
    "three hidden layers of the widths given, each trained on a sixth of the digits from a start of its own.",
    "The widest client, or the first of them, gives the units. Iterated: the mean of the clients is the reference of "
    "two further plans. Plain averages and weight matching take one width only.",
    f"One client alone knows the {DIGIT}: it holds all of them and a tenth of the others, the second client the rest "
    "(Singh & Jaggi 2020, section 5). Half and half, whoever has more examples; the best of eleven proportions is the "
    "best on the test images; Fisher weighs by examples too.",
    "Several widths: mean is the reference implementation's averaging of outgoing weights. Doubled units are summed "
    "without loss into either width; averaged, what a layer puts out doubles, or halves, which changes all scores much "
    "and the largest of them, by ReLUs, hardly ever.",
    "MB per client: received and sent, once trained; by activations a client also receives its own network again, "
    "and the reference. A merge costs one network to serve, the ensemble one per client.",
)

app = command_line("ot_fusion", run, seeds=3, quick_seeds=1)

if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
