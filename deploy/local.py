"""A SuperLink and SuperNodes as real processes on loopback, over gRPC."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from server.settings import overrides

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
ASK_PAUSE = 2.0  # seconds between questions to `flwr`, each of which takes a processor about as long
ANSWER_SECONDS = 120.0  # for a `flwr` command to end
STOP_SECONDS = 10.0  # for a process to end after SIGTERM
RETURN_SECONDS = 150.0  # for a SuperNode with a key to be let in again: twice what it takes the SuperLink to miss it
LET_IN = "SuperNode ID: "  # what a SuperNode logs then


def free_ports(number: int) -> list[int]:
    """Ports on loopback that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def listens(port: int) -> bool:
    """Whether something on loopback does."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def make_certs(folder: Path, sites: int) -> Path:
    """The folder with a development CA, a server certificate and keys for so many sites in it, by deploy/certs.sh."""
    script = Path(__file__).with_name("certs.sh")
    done = subprocess.run([script, "-d", folder, "-n", str(sites)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return folder


@dataclass(eq=False)
class LocalFederation:
    """A context in which a SuperLink and one SuperNode per node configuration run; leaving it stops them all.

    Logs and Flower's own files go to `folder`; `environment` is added to every process's. With `tls`, a folder that
    deploy/certs.sh has made, the SuperLink speaks nothing but TLS, and lets in SuperNode k by the key of site k. Where
    `isolated`, apps run in executors, `superexec` beside the SuperLink and `superexec-k` beside `supernode-k`, and the
    SuperLink's state is in SQLite, so that each process can be killed and started again by its name.
    """

    folder: Path
    nodes: Sequence[Mapping[str, Any]]
    environment: Mapping[str, str] = field(default_factory=dict)
    tls: Path | None = None
    isolated: bool = False
    processes: dict[str, subprocess.Popen[bytes]] = field(init=False, default_factory=dict)
    mark: str = field(init=False, default_factory=lambda: uuid.uuid4().hex)

    def __enter__(self) -> LocalFederation:
        self.folder = self.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.http, self.fleet, self.health, *self.ports = free_ports(3 + len(self.nodes))
        try:
            self.start("superlink")
            self._introduce()
            for name in [*self._executor(""), *chain(*map(self._site, range(len(self.nodes))))]:
                self._spawn(name)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str) -> None:
        """Starts the process, or starts it again; returns when the SuperLink listens, or a SuperNode's key is taken.

        A SuperNode with a key, once killed, exits until the SuperLink has missed it: it is started anew till then, for
        about a minute.
        """
        before = self._let_in(name)
        self._spawn(name)
        if name == "superlink":
            self._wait_for(name, self.fleet)
            self._wait_for(name, self.http)
        elif self.tls and name.startswith("supernode"):
            self._insist(name, before)

    def _insist(self, name: str, before: int) -> None:
        end = time.monotonic() + RETURN_SECONDS
        while self._let_in(name) == before:
            if time.monotonic() > end:
                raise TimeoutError(f"{name} was not let in within {RETURN_SECONDS:g} s: see {self.folder / name}.log")
            if self.processes[name].poll() is not None:
                self._spawn(name)
            time.sleep(0.5)

    def _let_in(self, name: str) -> int:
        """How often a SuperNode has been."""
        log = self.folder / f"{name}.log"
        return log.read_text(errors="replace").count(LET_IN) if log.exists() else 0

    def kill(self, name: str) -> None:
        """Kills the process, and what it started, at once, as `kill -9` would."""
        kill_marked(self._mark(name))
        self.processes.pop(name).wait()

    def kill_apps(self, name: str) -> None:
        """Kills at once what the process has started, such as an executor's apps, and leaves it alone."""
        for process in psutil.Process(self.processes[name].pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def start_node(self, number: int) -> None:
        """Starts SuperNode `number` again, and its executor where it has one."""
        for name in self._site(number):
            self.start(name)

    def kill_node(self, number: int) -> None:
        """Kills SuperNode `number`, its executor and their children at once, as a power cut would."""
        for name in self._site(number):
            self.kill(name)

    def _site(self, number: int) -> list[str]:
        return [f"supernode-{number}", *self._executor(f"-{number}")]

    def _executor(self, of: str) -> list[str]:
        return [f"superexec{of}"] if self.isolated else []

    def _introduce(self) -> None:
        """Tells `flwr` where the SuperLink is, and the SuperLink whose keys to take."""
        trust = f"root-certificates = {json.dumps(str(self._certificate('ca.crt')))}" if self.tls else "insecure = true"
        config = f'[superlink.{NAME}]\naddress = "127.0.0.1:{self.http}"\n{trust}\n'
        (self._home("run") / "config.toml").write_text(config)
        for number in range(len(self.nodes) if self.tls else 0):
            key = self._certificate(f"keys/site-{number}.pub")
            self._flwr("supernode", "register", str(key), NAME, "--name", f"site-{number}")

    def _command(self, name: str) -> list[str]:
        """What runs under this name."""
        kind, _, number = name.partition("-")
        if kind == "superexec":
            return self._superexec(f"supernode-{number}" if number else "superlink")
        return self._supernode(int(number)) if number else self._superlink()

    def _superlink(self) -> list[str]:
        listen = f"--host 127.0.0.1 --port {self.http} --fleet-api-address 127.0.0.1:{self.fleet}"
        health = f"--health-server-address 127.0.0.1:{self.health}"
        options = f"--fleet-api-type grpc-rere {listen} {health} --disable-runtime-dependency-installation".split()
        state = ["--database", "state.db"] if self.isolated else []
        return ["flower-superlink", *options, *self._server_tls(), *state, *self._isolation("superlink")]

    def _supernode(self, number: int) -> list[str]:
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in self.nodes[number].items())
        listen = f"--host 127.0.0.1 --port {self.ports[number]}"
        options = f"--grpc-rere --superlink 127.0.0.1:{self.fleet} {listen}".split()
        secured = [*self._trust(), *self._key(number), *self._isolation(f"supernode-{number}")]
        return ["flower-supernode", *options, *secured, "--node-config", config]

    def _superexec(self, beside: str) -> list[str]:
        """The executor of the apps of that SuperLink or SuperNode."""
        number = beside.partition("-")[2]
        address = f"127.0.0.1:{self.ports[int(number)] if number else self.http}"
        trust = ["--insecure"] if number else self._trust()
        return ["flower-superexec", "--runtime-api-address", address, *trust, *self._secret(beside)]

    def _server_tls(self) -> list[str]:
        if not self.tls:
            return ["--insecure"]
        files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
        named = [word for option, file in files.items() for word in (option, str(self._certificate(file)))]
        return ["--enable-supernode-auth", *named]

    def _trust(self) -> list[str]:
        """By what a client knows the SuperLink."""
        return ["--root-certificates", str(self._certificate("ca.crt"))] if self.tls else ["--insecure"]

    def _key(self, number: int) -> list[str]:
        """By what the SuperLink knows a client."""
        return ["--auth-supernode-private-key", str(self._certificate(f"keys/site-{number}"))] if self.tls else []

    def _certificate(self, name: str) -> Path:
        assert self.tls is not None
        if not (path := self.tls.resolve() / name).exists():
            raise FileNotFoundError(f"{path} is missing: deploy/certs.sh -d {self.tls} -n {len(self.nodes)} makes it")
        return path

    def _isolation(self, name: str) -> list[str]:
        return ["--isolation", "process", *self._secret(name)] if self.isolated else []

    def _secret(self, name: str) -> list[str]:
        """The option that names the file of the secret which this process and its executor share."""
        path = self.folder / "secrets" / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)
            path.write_bytes(secrets.token_bytes(32))
        return ["--superexec-auth-secret-file", str(path)]

    def run(self, app: Path, config: Mapping[str, Any], timeout: float = 600) -> dict[str, Any]:
        """Runs the app in folder `app` to its end; what `flwr ls` then says of the run.

        `flwr run` exits with 0 even when the run fails: ask the status in the answer. TimeoutError after `timeout` s.
        """
        return self.wait(self.submit(app, config), timeout)

    def submit(self, app: Path, config: Mapping[str, Any]) -> str:
        """Starts a run of the app in folder `app`; its id. RuntimeError, with Flower's words, where it refuses."""
        said = self._flwr("run", str(app), NAME, "-c", overrides(config), "--format", "json")
        if "run-id" not in (answer := json.loads(said)):
            raise RuntimeError(f"flwr run: {said.strip()}")
        return str(answer["run-id"])

    def wait(self, run_id: str, timeout: float = 600) -> dict[str, Any]:
        """What `flwr ls` says of the run once it has finished; TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not str((run := self.runs()[run_id])["status"]).startswith("finished"):
            if time.monotonic() > end:
                raise TimeoutError(f"the run is {run['status']} after {timeout:g} s: see {self.folder}")
            time.sleep(ASK_PAUSE)
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
        command, environment = [str(BIN / "flwr"), *arguments], self._environment("run")
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
        )
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

    def _spawn(self, name: str) -> None:
        program, *arguments = self._command(name)
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
        share = {"OMP_NUM_THREADS": "1"} if "-" in name else {}  # nodes share this machine's cores
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
            if listens(port):
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
