"""The README's commands, programs and files are run, in their order, in a copy of the project, as a reader would."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import left_behind, until

from deploy.local import QUIET, listens

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w+)[ ]?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    info: str  # "terminal" for what goes on running, or the name of the file to write
    text: str


RUN = (
    "bash",
    "python",
    "toml",
)  # `sh` takes an engine for containers: deploy/smoke.sh runs it; `text` is what is printed
BLOCKS = [Block(*match) for match in FENCE.findall((ROOT / "README.md").read_text())]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project whose environment is the one that runs this test."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "project" / name)
    environment = tmp_path / "project" / ".venv"
    environment.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    (environment / "ready").touch()
    return tmp_path / "project"


@pytest.fixture
def reader(project: Path) -> Iterator["Reader"]:
    reader = Reader(project)
    yield reader
    reader.leave()


class Reader:
    """Who types in what the README says."""

    def __init__(self, project: Path) -> None:
        home = project.parent / "home"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.project, self.home, self.terminals = project, home, list[subprocess.Popen[bytes]]()
        self.environment = {**os.environ, **QUIET, "PATH": path, "HOME": str(home), "PYTHONPATH": str(project)}
        self.environment |= {
            "OMP_NUM_THREADS": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
            "XDG_CACHE_HOME": str(home / "cache"),
        }

    def follow(self, block: Block) -> None:
        if block.info == "terminal":
            self.terminals.append(self.start(["bash", "-c", block.text]))
            (port,) = re.findall(r"--port (\d+)", block.text)
            until(lambda: listens(int(port)), timeout=120)
        elif block.info:
            file = self.home / block.info[2:] if block.info.startswith("~/") else self.project / block.info
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        else:
            command = ["bash", "-ec", block.text] if block.language == "bash" else [sys.executable, "-c", block.text]
            process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            out, _ = process.communicate(timeout=600)
            assert process.returncode == 0, out.decode()
            assert b"finished:failed" not in out, out.decode()

    def start(self, command: list[str], **streams: int) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command, cwd=self.project, env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True, **streams
        )

    def leave(self) -> None:
        """Ends the terminals, and the SuperLink that Flower's simulation leaves behind."""
        for terminal in self.terminals:  # the SuperNodes first, which say good-bye to the SuperLink
            os.killpg(terminal.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):  # seen once: it had said that it ended, and did not
                terminal.wait(30)
        for process in left_behind(str(self.home)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for terminal in self.terminals:
            terminal.wait(30)


def test_the_readme_has_the_blocks_that_its_sections_need() -> None:
    kinds = [(block.language, block.info == "terminal") for block in BLOCKS]
    assert kinds.count(("bash", True)) == 3
    assert {block.language for block in BLOCKS} == {*RUN, "sh", "text"}


def test_a_task_of_ones_own_takes_20_lines() -> None:
    (task,) = (block for block in BLOCKS if block.info == "wine/wine.py")
    assert sum(bool(line.strip()) for line in task.text.splitlines()) <= 20


def test_the_readmes_python_blocks_run(reader: Reader) -> None:
    for block in BLOCKS:
        if block.language in ("python", "toml"):
            reader.follow(block)


@pytest.mark.slow
def test_every_block_of_the_readme_runs_in_its_order(reader: Reader) -> None:
    reader.environment["PYTEST_ADDOPTS"] = "--collect-only -q"  # of `make test`, all but the tests themselves
    for block in (block for block in BLOCKS if block.language in RUN):
        if "pytest" in block.text:
            del reader.environment["PYTEST_ADDOPTS"]
        reader.follow(block)
        time.sleep(1)
    assert list((reader.project / "runs").glob("*/demo.png"))
