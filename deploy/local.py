"""A SuperLink and SuperNodes as real processes on loopback, over gRPC."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

QUIET = {  # only loopback is contacted
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}
NAME = "fedbasin-local"  # of the SuperLink in Flower's configuration
MARK = "FEDBASIN_STARTED_BY"  # in the environment of every process, which those that it starts inherit
BIN = Path(sys.executable).parent
START_SECONDS = 60.0  # for a process to listen
STOP_SECONDS = 10.0  # for a process to end after SIGTERM


def free_ports(number: int) -> list[int]:
    """Ports on loopback that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass(eq=False)
class LocalFederation:
    """A context in which a SuperLink and one SuperNode per node configuration run; leaving it stops them all.

    Logs and Flower's own files go to `folder`. `environment` is added to every process's.
    """

    folder: Path
    nodes: Sequence[Mapping[str, Any]]
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(init=False, default_factory=dict)
    mark: str = field(init=False, default_factory=lambda: uuid.uuid4().hex)

    def __enter__(self) -> LocalFederation:
        self.folder = self.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.http, self.fleet, self.health = free_ports(3)
        try:
            self._start_superlink()
            for number in range(len(self.nodes)):
                self.start_node(number)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start_superlink(self) -> None:
        listen = f"--host 127.0.0.1 --port {self.http} --fleet-api-address 127.0.0.1:{self.fleet}"
        health = f"--health-server-address 127.0.0.1:{self.health}"
        options = f"--insecure --fleet-api-type grpc-rere {listen} {health} --disable-runtime-dependency-installation"
        self._spawn("superlink", "flower-superlink", *options.split())
        self._wait_for("superlink", self.fleet)
        self._wait_for("superlink", self.http)
        home = self._home("run")
        config = f'[superlink.{NAME}]\naddress = "127.0.0.1:{self.http}"\ninsecure = true\n'
        (home / "config.toml").write_text(config)

    def start_node(self, number: int) -> None:
        """Starts SuperNode `number`, or starts it again."""
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in self.nodes[number].items())
        (port,) = free_ports(1)
        options = f"--insecure --grpc-rere --superlink 127.0.0.1:{self.fleet} --host 127.0.0.1 --port {port}"
        self._spawn(f"supernode-{number}", "flower-supernode", *options.split(), "--node-config", config)

    def kill_node(self, number: int) -> None:
        """Kills SuperNode `number` and its children at once, as a power cut would."""
        name = f"supernode-{number}"
        kill_marked(self._mark(name))
        self.processes.pop(name).wait()

    def run(self, app: Path, config: Mapping[str, Any], timeout: float = 600) -> dict[str, Any]:
        """Runs the app in folder `app` to its end; what `flwr ls` then says of the run.

        `flwr run` exits with 0 even when the run fails: ask the status in the answer. TimeoutError after `timeout` s.
        """
        return self.wait(self.submit(app, config), timeout)

    def submit(self, app: Path, config: Mapping[str, Any]) -> str:
        """Starts a run of the app in folder `app`; its id."""
        said = self._flwr("run", str(app), NAME, "-c", _overrides(config), "--format", "json")
        return str(json.loads(said)["run-id"])

    def wait(self, run_id: str, timeout: float = 600) -> dict[str, Any]:
        """What `flwr ls` says of the run once it has finished; TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not str((run := self.runs()[run_id])["status"]).startswith("finished"):
            if time.monotonic() > end:
                raise TimeoutError(f"the run is {run['status']} after {timeout:g} s: see {self.folder}")
            time.sleep(0.5)
        return run

    def wait_for_log(self, process: str, text: str, timeout: float = 60) -> None:
        """Returns when the process has logged `text`; TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while text not in (self.folder / f"{process}.log").read_text(errors="replace"):
            if time.monotonic() > end:
                raise TimeoutError(f"{process} did not log {text!r} in {timeout:g} s: see {self.folder}")
            time.sleep(0.1)

    def runs(self) -> dict[str, dict[str, Any]]:
        """What `flwr ls` says of every run, by its id."""
        runs: list[dict[str, Any]] = json.loads(self._flwr("ls", NAME, "--format", "json"))["runs"]
        return {str(run["run-id"]): run for run in runs}

    def log(self, run: Mapping[str, Any]) -> str:
        """What the run's ServerApp has logged."""
        return self._flwr("log", str(run["run-id"]), NAME, "--show")

    def _flwr(self, *arguments: str) -> str:
        """What the command prints."""
        environment = self._environment("run")
        done = subprocess.run([BIN / "flwr", *arguments], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"flwr {arguments[0]}: {done.stdout}{done.stderr}")
        return done.stdout

    def stop(self) -> None:
        """Ends every process started here and what they started, the nodes first, each by its own id."""
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        kill_marked(self.mark)
        for process in self.processes.values():
            process.wait()

    def _spawn(self, name: str, program: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [BIN / program, *arguments],
                env=self._environment(name),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, so that its children end with it
            )

    def _environment(self, name: str) -> dict[str, str]:
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
        share = {"OMP_NUM_THREADS": "1"} if name.startswith("supernode") else {}  # nodes share this machine's cores
        own = {"PATH": path, "FLWR_HOME": str(self._home(name)), MARK: self._mark(name)}
        return {**os.environ, **QUIET, **share, **own, **self.environment}

    def _mark(self, name: str) -> str:
        return f"{self.mark} {name};"

    def _home(self, name: str) -> Path:
        home = self.folder / "flower" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _wait_for(self, name: str, port: int) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.processes[name].poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"{name} does not listen on port {port}: see {self.folder / name}.log")


def kill_marked(mark: str) -> None:
    """Kills the processes whose mark begins so, in whatever session they are, and those they start meanwhile."""
    end = time.monotonic() + STOP_SECONDS
    while (marked := _marked(mark)) and time.monotonic() < end:
        for process in marked:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(marked, timeout=1)


def _marked(mark: str) -> list[psutil.Process]:
    """What runs with this mark in its environment; a zombie has none left."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK, "").startswith(mark):
                found.append(process)
    return found


def _overrides(config: Mapping[str, Any]) -> str:
    """Flower's `-c` argument; strings in single quotes, so that JSON goes through."""
    return " ".join(f"{key}={_literal(value)}" for key, value in config.items())


def _literal(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)
