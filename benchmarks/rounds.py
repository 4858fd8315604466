"""Seconds per round of real processes over gRPC, beside a stock Flower app and beside one large tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from deploy.local import LocalFederation

from .row import Row

APPS = Path(__file__).resolve().parent / "apps"
TASK = {"kind": "tiny:Tiny", "tensors": 1}  # 4 MB
ROUNDS = 8  # enough that the one closing evaluation weighs as it does in a real run, where rounds are many


def rows() -> Iterator[Row]:
    """Two and four SuperNodes beside stock Flower; 300 tensors beside one."""
    for nodes in (2, 4):
        with _federation(nodes) as federation:
            mine, theirs = ours(federation, nodes), stock(federation, nodes)
            work = f"a round of {nodes} SuperNodes, tiny model, trained and evaluated"
            yield Row(work, "stock Flower FedAvg", mine / theirs, "<= 0.55", f"{mine:.1f} s, Flower {theirs:.1f} s")
    with _federation(2) as federation:
        many, one = ours(federation, 2, tensors=300), ours(federation, 2, tensors=1)
        detail = f"{many:.1f} s, one {one:.1f} s"
        yield Row("a live round, 4 MB in 300 tensors", "in one tensor", many / one, "<= 1.15", detail)


@contextmanager
def _federation(nodes: int) -> Iterator[LocalFederation]:
    configs = [{"partition-id": number} for number in range(nodes)]
    with (
        TemporaryDirectory(prefix="fedbasin-bench-", ignore_cleanup_errors=True) as folder,
        LocalFederation(Path(folder), configs) as federation,
    ):
        yield federation


def ours(federation: LocalFederation, nodes: int, tensors: int = 0) -> float:
    """Seconds per round of the tiny task, the last model's evaluation included."""
    runs = federation.folder / "runs"
    task = json.dumps({"kind": "tiny:Tiny", "tensors": tensors})
    config = {"task": task, "rounds": ROUNDS, "min-clients": nodes, "runs-dir": str(runs)}
    folder = runs / str(_finished(federation, "ours", config)["run-id"])
    rounds = [float(json.loads(path.read_text())["seconds"]) for path in folder.glob("round-*.json")]
    closing = float(json.loads((folder / "evaluation.json").read_text())["seconds"])
    return (sum(rounds) + closing) / ROUNDS


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
