"""`make chaos`: processes of a federation are killed at random, and its model is that of one left alone, to the bit."""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from server import loopback

from .local import LocalFederation, make_certs

APP = Path(__file__).resolve().parent.parent
METHOD, TASK = "fedavg", '{"kind": "digits", "partition": "iid"}'
CLIENTS = "superexec of a client"
APPS = {"superexec": "serverapp", CLIENTS: "clientapp"}  # what an executor runs, and can be killed without it
PATIENCE = 3  # deadlines in which no round finishes, and it is given up


@dataclass(eq=False)
class Chaos:
    """A run of `config` on a federation of which something is killed every so many seconds, and started again."""

    federation: LocalFederation
    config: Mapping[str, Any]
    every: float
    draw: random.Random
    begun: float = field(init=False, default_factory=time.monotonic)
    run_id: str = field(init=False)
    folder: Path = field(init=False)
    open: dict[str, tuple[int, float]] = field(init=False, default_factory=dict)  # kills in an unfinished round
    hits: Counter[str] = field(init=False, default_factory=Counter)  # kills, by kind
    recoveries: dict[str, list[float]] = field(init=False, default_factory=dict)  # seconds, by what was killed

    def run(self) -> None:
        """Returns when the run has ended; TimeoutError when it does not go on."""
        self.run_id = self.federation.submit(APP, self.config)
        self.folder = Path(self.config["runs-dir"]) / self.run_id
        due, last, finished = self.now() + self.every, self.now(), 0
        while not self._ended():
            if self.now() > due:
                due = self.now() + self.every
                self._disturb()
            self._revive()
            self._tell()
            if finished < self._finished():
                last, finished = self.now(), self._finished()
            if self.now() > last + PATIENCE * self.config["deadline"]:
                raise TimeoutError(f"round {finished + 1} does not finish: see {self.federation.folder}")
            time.sleep(1)
        self._tell()

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begun

    def say(self, text: str) -> None:
        """Prints the line, with the time."""
        print(f"{self.now():7.1f} s  {text}", flush=True)

    def _disturb(self) -> None:
        kind, name = self._victim()
        victim, struck, round = f"{kind} ({name})" if kind in APPS.values() else name, self.now(), self._finished() + 1
        self.say(f"kill -9 {victim} in round {round}")
        self.open[victim] = round, struck
        if kind in APPS.values():
            self.federation.kill_apps(name)
        else:
            self.federation.kill(name)
            self.federation.start(name)
            self.say(f"{name} is back after {self.now() - struck:.1f} s")
        if name == "superexec":
            self._resume()

    def _victim(self) -> tuple[str, str]:
        """What to kill, of a kind that was killed least often, and the process that runs it."""
        kinds: dict[str, list[str]] = {}
        for name, process in self.federation.processes.items():
            kinds.setdefault(_kind(name), []).append(name)
            if name.startswith("superexec") and runs_app(process.pid):
                kinds.setdefault(APPS[_kind(name)], []).append(name)
        fewest = min(self.hits[kind] for kind in kinds)
        kind = self.draw.choice(sorted(kind for kind in kinds if self.hits[kind] == fewest))
        self.hits[kind] += 1
        return kind, self.draw.choice(sorted(kinds[kind]))

    def _resume(self) -> None:
        """Goes on with the run, as another one: the ServerApp is gone."""
        begun = (self.folder / "settings.json").exists()
        self.run_id = self.federation.submit(APP, {**self.config, **({"resume": str(self.folder)} if begun else {})})
        self.folder = self.folder if begun else Path(self.config["runs-dir"]) / self.run_id
        self.say(f"resumed as run {self.run_id}")

    def _revive(self) -> None:
        """Starts again what has ended by itself, as an engine's restart policy does."""
        for name, process in list(self.federation.processes.items()):
            if (code := process.poll()) is not None:
                self.say(f"{name} has ended by itself, code {code}: it is started again")
                self.federation.start(name)

    def _ended(self) -> bool:
        if self._finished() < self.config["rounds"]:
            return False
        return str(self.federation.wait(self.run_id, self.config["deadline"])["status"]) == "finished:completed"

    def _finished(self) -> int:
        return len([*self.folder.glob("round-*.json")])

    def _tell(self) -> None:
        """Says of each kill whose round has finished since how long that took."""
        for victim, (round, struck) in list(self.open.items()):
            if round <= self._finished():
                del self.open[victim]
                self.recoveries.setdefault(_kind(victim), []).append(self.now() - struck)
                self.say(f"round {round} finished {self.now() - struck:.1f} s after {victim} was killed")


def runs_app(executor: int) -> bool:
    """Whether that process has a child that runs; it leaves its dead ones unburied."""
    with suppress(psutil.NoSuchProcess):
        return any(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process(executor).children())
    return False


def _kind(name: str) -> str:
    """Which sort of process this is."""
    head, _, number = name.partition(" ")[0].partition("-")
    return CLIENTS if number and head == "superexec" else head


def main(arguments: Sequence[str] = ()) -> int:
    """0 when all rounds have merged, through kills, to the model of the same run in the loopback, left alone."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    nodes = [
        {"partition-id": k, "num-partitions": options.clients, "name": f"site-{k}"} for k in range(options.clients)
    ]
    with redirect_stdout(StringIO()):
        alone = loopback.run(TASK, METHOD, nodes=nodes, **_shared(options)).model.params
    with tempfile.TemporaryDirectory(prefix="fedbasin-") as made:
        folder = Path(options.folder or made)
        tls = None if options.plaintext else make_certs(folder / "certs", options.clients)
        with LocalFederation(folder, nodes, tls=tls, isolated=True) as federation:
            chaos = Chaos(federation, _config(options, folder), options.every, random.Random(options.seed))
            chaos.run()
        return _verdict(chaos, alone)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.chaos", description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--every", type=float, default=90, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and of the run")
    parser.add_argument("--deadline", type=float, default=400, help="seconds of a round: more than any recovery")
    parser.add_argument("--plaintext", action="store_true", help="neither TLS nor keys: a killed client is a new one")
    parser.add_argument("--folder", help="where logs and records stay; a temporary one else")
    return parser.parse_args(arguments)


def _shared(options: argparse.Namespace) -> dict[str, Any]:
    """What both runs are told."""
    return {"rounds": options.rounds, "seed": options.seed, "evaluate": False, "device": "cpu"}


def _config(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    everyone = {"min-clients": options.clients, "quorum": options.clients, "deadline": options.deadline}
    return {**_shared(options), **everyone, "aggregator": METHOD, "task": TASK, "runs-dir": str(folder / "runs")}


def _verdict(chaos: Chaos, alone: Mapping[str, Tensor]) -> int:
    """Prints what came of it; 0 where something was killed and nothing lost."""
    records = [json.loads(path.read_text()) for path in sorted(chaos.folder.glob("round-*.json"))]
    merged = [record for record in records if record["status"] == "merged"]
    saved = load_file(chaos.folder / f"round-{len(records):04d}.safetensors")
    same = all(torch.equal(saved[json.dumps(["params", name])], value) for name, value in alone.items())
    for kind, seconds in sorted(chaos.recoveries.items()):
        print(f"{kind}: killed {len(seconds)} times, round finished after {median(seconds):.0f} s ({max(seconds):.0f})")
    rounds = [record["seconds"] for record in records]
    print(f"rounds: {len(merged)} of {chaos.config['rounds']} merged; {min(rounds):.1f} to {max(rounds):.1f} s each")
    print("the model is that of the undisturbed run, to the bit" if same else "the model is ANOTHER than undisturbed")
    return 0 if chaos.recoveries and same and len(merged) == chaos.config["rounds"] else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit("stopped: every process of the federation has ended") from None
