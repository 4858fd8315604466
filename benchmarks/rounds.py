"""Seconds per round of real processes over gRPC, beside a stock Flower app and beside one large tensor."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deploy.local import LocalFederation

from .row import Row

APPS = Path(__file__).resolve().parent / "apps"
ROUNDS = 4


def rows() -> Iterator[Row]:
    """Two and four SuperNodes beside stock Flower; 300 tensors beside one."""
    for nodes, turns in ((2, 2), (4, 2)):
        with _federation(nodes) as federation:
            pairs = [(ours(federation, nodes), stock(federation, nodes)) for _ in range(turns)]
            mine, theirs = (min(times) for times in zip(*pairs, strict=True))
            work = f"a round of {nodes} SuperNodes, tiny model, trained and evaluated"
            yield Row(work, "stock Flower FedAvg", mine / theirs, "<= 0.55", f"{mine:.1f} s, Flower {theirs:.1f} s")
    with _federation(2) as federation:
        pairs = [(ours(federation, 2, tensors=300), ours(federation, 2, tensors=1)) for _ in range(2)]
        many, one = (min(times) for times in zip(*pairs, strict=True))
        yield Row("a live round, 4 MB in 300 tensors", "in one tensor", many / one, "<= 1.15", f"{many:.1f} s")


def _federation(nodes: int) -> LocalFederation:
    folder = Path(tempfile.mkdtemp(prefix="fedbasin-bench-"))
    return LocalFederation(folder, [{"partition-id": number} for number in range(nodes)])


def ours(federation: LocalFederation, nodes: int, tensors: int = 0) -> float:
    """Seconds per round of the tiny task, the last model's evaluation included."""
    runs = federation.folder / "runs"
    task = json.dumps({"kind": "tiny:Tiny", "tensors": tensors})
    config = {"task": task, "rounds": ROUNDS, "min-clients": nodes, "runs-dir": str(runs)}
    folder = runs / str(_finished(federation, "ours", config)["run-id"])
    rounds = [float(json.loads(path.read_text())["seconds"]) for path in folder.glob("round-*.json")]
    return (sum(rounds) + float(json.loads((folder / "evaluation.json").read_text())["seconds"])) / ROUNDS


def stock(federation: LocalFederation, nodes: int) -> float:
    """Seconds per round of the stock app."""
    out = federation.folder / "stock.json"
    _finished(federation, "stock", {"rounds": ROUNDS, "nodes": nodes, "out": str(out)})
    return float(json.loads(out.read_text())) / ROUNDS


def _finished(federation: LocalFederation, app: str, config: dict[str, object]) -> dict[str, object]:
    run = federation.run(APPS / app, config)
    if run["status"] != "finished:completed":
        raise RuntimeError(f"{app}: the run is {run['status']}: see {federation.folder}")
    return run
