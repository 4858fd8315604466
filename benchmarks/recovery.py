"""How long a round takes from a kill in its midst to its end, beside the same round left alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from deploy.chaos import APP, runs_app
from deploy.local import LocalFederation, make_certs

from .row import Row

CLIENTS = 2
CONFIG = {"rounds": 1, "evaluate": False, "device": "cpu", "min-clients": CLIENTS, "quorum": CLIENTS, "deadline": 400.0}
PATIENCE = 500.0  # seconds for a round
Strike = Callable[[LocalFederation], None]


def rows() -> Iterator[Row]:
    """Seconds from each kill, over TLS, with keys and executors, to the end of the round; the process starts again."""
    nodes = [{"partition-id": number, "name": f"site-{number}"} for number in range(CLIENTS)]
    with TemporaryDirectory(prefix="fedbasin-bench-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        with LocalFederation(folder, nodes, tls=make_certs(folder / "certs", CLIENTS), isolated=True) as federation:
            alone = _seconds(federation, lambda federation: None)
            for victim, (strike, ends_run) in STRIKES.items():
                seconds = _seconds(federation, strike, ends_run)
                detail = f"{seconds:.0f} s of {alone:.0f} s"
                yield Row(
                    f"a round in which {victim} is killed, from then on", "left alone", seconds / alone, "", detail
                )


def _killed(name: str) -> Strike:
    def strike(federation: LocalFederation) -> None:
        federation.kill(name)
        federation.start(name)

    return strike


STRIKES: dict[str, tuple[Strike, bool]] = {  # and whether it ends the run, which is then resumed
    "the ServerApp": (lambda federation: federation.kill_apps("superexec"), True),
    "the ServerApp's executor": (_killed("superexec"), True),
    "the SuperLink": (_killed("superlink"), False),
    "a ClientApp": (lambda federation: federation.kill_apps("superexec-1"), False),
    "a ClientApp's executor": (_killed("superexec-1"), False),
    "a SuperNode": (_killed("supernode-1"), False),
}


def _seconds(federation: LocalFederation, strike: Strike, ends_run: bool = False) -> float:
    """From the strike, while client 1 trains, to the end of the round."""
    runs = federation.folder / "runs"
    config = {**CONFIG, "runs-dir": str(runs)}
    folder = runs / federation.submit(APP, config)
    _until(lambda: runs_app(federation.processes["superexec-1"].pid))
    start = time.monotonic()
    strike(federation)
    if ends_run:
        federation.submit(APP, {**config, "resume": str(folder)})
    _until((folder / "evaluation.json").exists)
    return time.monotonic() - start


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"the round has not ended in {PATIENCE:g} s")
        time.sleep(0.1)
