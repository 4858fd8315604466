"""`make demo` and its kin: a SuperLink and SuperNodes on loopback, digits, methods at once, a table and a plot."""

from __future__ import annotations

import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

from server.telemetry import console_for_output

from .local import LocalFederation, make_certs

APP = Path(__file__).resolve().parent.parent
CLIENTS = 4
WIDTHS = (32, 48, 64, 64)
PAUSE = 20.0  # seconds between questions to Flower: each starts a process
RUNS = APP / "runs"
ALIGNED = {"kind": "git_rebasin", "inner": {"kind": "repair", "inner": {"kind": "fisher", "temper": 0.5}}}


class Demo(NamedTuple):
    """What is shown: a title, the methods, the run configuration that they share, and options of clients' own."""

    title: str
    methods: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    own: Sequence[Mapping[str, int]] = ({},) * CLIENTS
    tls: bool = False  # and SuperNodes that are known by their keys

    @property
    def widths(self) -> bool:
        """Whether clients' networks are of their own sizes."""
        return any(self.own)


DEMOS = {
    "posterior": Demo(
        f"Non-IID digits, {CLIENTS} clients",
        {
            "FedAvg": {"kind": "fedavg"},
            "Fisher": {"kind": "fisher"},
            "SSF": {"kind": "ssf"},
        },
        {"task": {"kind": "digits", "partition": "dirichlet", "alpha": 0.1}, "rounds": 3, "training.epochs": 5},
    ),
    "alignment": Demo(
        f"Digits, {CLIENTS} clients that start from {CLIENTS} initialisations",
        {
            "FedAvg": {"kind": "fedavg"},
            "activation matching": {"kind": "activation_matching", "inner": "fedavg"},
            "Git Re-Basin, √Fisher, REPAIR": ALIGNED,
        },
        {"task": {"kind": "digits", "partition": "iid"}, "rounds": 2, "start": "own", "training.epochs": 20},
    ),
    "fedma": Demo(
        f"Digits, {CLIENTS} clients with hidden layers of {', '.join(map(str, WIDTHS))} units",
        {
            "PFNM": {"kind": "pfnm"},
            "optimal transport": {"kind": "ot_fusion", "inner": "fedavg"},
            "FedMA": {"kind": "fedma"},
        },
        {"task": {"kind": "digits", "partition": "iid"}, "rounds": 2, "start": "own", "training.epochs": 20},
        [{"task.hidden": width} for width in WIDTHS],
    ),
    "tls": Demo(
        "Digits, 3 clients over TLS, known by their keys",
        {"Fisher": {"kind": "fisher"}},
        {"task": {"kind": "digits", "partition": "iid"}, "rounds": 2, "training.epochs": 5},
        ({},) * 3,
        tls=True,
    ),
}


def main(name: str = "posterior") -> int:
    """0 when every method's run of this demo has finished and left its records; what it wrote is printed."""
    demo = DEMOS[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore
    console, start = console_for_output(), time.monotonic()
    size = len(demo.own)
    nodes = [{"partition-id": k, "num-partitions": size, "name": f"site-{k}", **own} for k, own in enumerate(demo.own)]
    with tempfile.TemporaryDirectory(prefix="fedbasin-") as logs:
        certs = make_certs(Path(logs) / "certs", size) if demo.tls else None
        secured = "gRPC and TLS, each client known by its key" if demo.tls else "gRPC"
        console.print(f"starting a SuperLink and {size} SuperNodes on 127.0.0.1, client traffic over {secured}")
        with LocalFederation(Path(logs), nodes, tls=certs) as federation:
            submitted = {method: _submit(federation, demo, method, console) for method in demo.methods}
            with console.status(f"{len(submitted)} runs at once on the same clients"):
                _follow(federation, submitted, console, demo.config["rounds"])
    folders = {method: RUNS / run_id for method, run_id in submitted.items()}
    results = {method: load(folder) for method, folder in folders.items()}
    console.print(table(demo, results))
    picture = plot(demo, results, next(iter(folders.values())) / "demo.png")
    for path in (*folders.values(), picture):
        console.print(f"  {path.relative_to(APP)}")
    console.print(f"took {time.monotonic() - start:.0f} s")
    return 0


def _submit(federation: LocalFederation, demo: Demo, name: str, console: Console) -> str:
    texts = {"task": json.dumps(demo.config["task"]), "aggregator": json.dumps(demo.methods[name])}
    shared = {"min-clients": len(demo.own), "deadline": 200.0, "runs-dir": str(RUNS)}
    run_id = federation.submit(APP, {**demo.config, **shared, **texts})
    console.print(f"{name}: flwr run, id {run_id}", highlight=False)
    return run_id


def _follow(federation: LocalFederation, submitted: Mapping[str, str], console: Console, rounds: int) -> None:
    """Prints each round as it finishes; returns when every run has."""
    shown: set[Path] = set()
    running, asked = True, time.monotonic()
    while running:
        time.sleep(0.5)
        for name, run_id in submitted.items():
            for path in sorted({*(RUNS / run_id).glob("round-*.json")} - shown):
                console.print(f"{name}: {_said(json.loads(path.read_text()), rounds)}", highlight=False)
                shown.add(path)
        ended = all((RUNS / run_id / "evaluation.json").exists() for run_id in submitted.values())
        if ended or time.monotonic() > asked + PAUSE:
            running, asked = not _finished(federation, submitted), time.monotonic()


def _finished(federation: LocalFederation, submitted: Mapping[str, str]) -> bool:
    """Whether every run is; SystemExit with its log where one has failed."""
    runs = federation.runs()
    for name, run_id in submitted.items():
        if (status := str(runs[run_id]["status"])).startswith("finished") and status != "finished:completed":
            raise SystemExit(f"{name}: the run is {status}\n{federation.log(runs[run_id])}")
    return all(runs[run_id]["status"] == "finished:completed" for run_id in submitted.values())


def _said(record: Mapping[str, Any], rounds: int) -> str:
    """One line about a finished round."""
    admitted = sum(len(exchange["admitted"]) for exchange in record["exchanges"])
    accuracy = f"accuracy {record['test']['accuracy']:.3f} on the server's data"
    return f"round {record['round']} of {rounds} {record['status']}, {admitted} replies, {accuracy}"


def load(folder: Path) -> dict[str, Any]:
    """A run's records in order, and the clients' evaluation of the last model."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("round-*.json"))]
    return {"records": records, "final": json.loads((folder / "evaluation.json").read_text())["clients"]}


def curve(result: Mapping[str, Any], key: str) -> list[float]:
    """`accuracy`, `worst` or `spread` over the clients of the model before round 1, after round 1, and so on.

    As each client received it: in its own width, if it has one, but for the last model, which all receive whole. NaN
    where clients received none: before round 1 each may start from its own.
    """
    measured = [*(record["received"] for record in result["records"]), result["final"]]
    return [math.nan if (value := one.get(key)) is None else value for one in measured]


def curves(demo: Demo, result: Mapping[str, Any]) -> dict[str, list[float]]:
    """What is shown of the model before round 1, after round 1, and so on: two accuracies by what they are of.

    Where clients have widths of their own, the server's model on its data, which is one model all along.
    """
    if not demo.widths:
        return {"mean": curve(result, "accuracy"), "worst client": curve(result, "worst")}
    whole = [math.nan, *(record["test"]["accuracy"] for record in result["records"])]
    return {"server's model": whole, "mean over clients in their widths": [*curve(result, "accuracy")[:-1], math.nan]}


def table(demo: Demo, results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per method: accuracies after the first round and of the last model, bytes per round, replies left out."""
    early = ("server, round 1", "in own widths") if demo.widths else ("after round 1",)
    rows = Table("method", *early, "accuracy", "worst client", "spread", "server", "MB a round", "left out")
    for name, result in results.items():
        records = result["records"]
        exchanges: Sequence[Mapping[str, Any]] = [exchange for record in records for exchange in record["exchanges"]]
        traffic = sum(exchange["bytes_in"] + exchange["bytes_out"] for exchange in exchanges)
        rows.add_row(
            name,
            *(f"{shown[1]:.3f}" for _, shown in zip(early, curves(demo, result).values(), strict=False)),
            *(f"{result['final'][key]:.3f}" for key in ("accuracy", "worst", "spread")),
            f"{records[-1]['test']['accuracy']:.3f}",
            f"{traffic / len(records) / 1e6:.2f}",
            str(sum(len(exchange["left_out"]) for exchange in exchanges)),
        )
    return rows


def plot(demo: Demo, results: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Accuracy over rounds, the two curves of each method solid and dashed."""
    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, result in results.items():
        (solid, first), (other, second) = curves(demo, result).items()
        (line,) = axes.plot(first, marker="o", label=name)
        axes.plot(second, linestyle="--", marker=".", color=line.get_color())
    held, thin = ("held-out", "small dots") if demo.widths else ("the clients' validation", "dashed")
    axes.set(xlabel="rounds finished", ylabel=f"accuracy on {held} data", ylim=(0, 1))
    axes.set_title(f"{demo.title}\n(solid: {solid}, {thin}: {other})", fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    try:
        raise SystemExit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit("stopped: every process of the federation has ended") from None
