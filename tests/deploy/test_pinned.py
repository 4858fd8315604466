"""A site that has pinned an app runs what it has reviewed, whatever the operator sends."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from typing import Any
from unittest.mock import MagicMock

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp as task

from deploy.local import LocalFederation
from deploy.pinned import pin

ROOT = Path(__file__).parents[2]
REVIEWED, CHANGED = "reviewed", "changed"


def app(whose: str, canary: Path | str = os.devnull, version: str = "1.0.0") -> dict[str, str]:
    """The files of an app that touches `canary` when it is imported, and whose every reply says whose it is."""
    return {
        "pyproject.toml": f"""
[project]
name = "toy"
version = {version!r}
[tool.flwr.app]
publisher = "site"
components = {{ serverapp = "toy_app:app", clientapp = "toy_app:app" }}
""",
        "toy_app.py": f"""
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
Path({str(canary)!r}).touch()
app = ClientApp()
@app.train()
def train(message, context):
    return Message(RecordDict({{"reply": ConfigRecord({{"whose": {whose!r}}})}}), reply_to=message)
""",
    }


def fab(files: dict[str, str]) -> Fab:
    """The app as an operator sends it."""
    listed = [f"{name},{hashlib.sha256(text.encode()).hexdigest()},{len(text) * 8}" for name, text in files.items()]
    with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
        for name, text in {**files, ".info/CONTENT": "\n".join(listed)}.items():
            archive.writestr(name, text)
    return Fab(hashlib.sha256(packed.getvalue()).hexdigest(), packed.getvalue(), {})


Run = Callable[[dict[str, str]], str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a task of the app with Flower's own program, but for the network: whose code replied, or the error."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    for name in ("install_from_fab", "get_project_dir", "get_load_client_app_fn"):
        monkeypatch.setattr(task, name, getattr(task, name))  # to be put back after pin
    for name in ("RuntimeHttpClient", "HeartbeatSender", "register_signal_handlers", "flwr_exit", "push_message"):
        monkeypatch.setattr(task, name, MagicMock())

    def run(files: dict[str, str]) -> str:
        sys.modules.pop("toy_app", None)
        monkeypatch.setattr(task, "pull_task_input", lambda client: asked(files))
        task.run_clientapp("127.0.0.1:1", "token", insecure=True)
        _, reply, _ = task.push_message.call_args.args  # type: ignore[attr-defined]
        return str(reply.error.reason if reply.has_error() else reply.content["reply"]["whose"])

    return run


def asked(files: dict[str, str]) -> tuple[Message, Context, Any, Fab]:
    """What a SuperNode gives for a task: of the run it says what the operator says."""
    version = tomllib.loads(files["pyproject.toml"])["project"]["version"]
    message = Message(RecordDict({"ask": ConfigRecord()}), dst_node_id=1, message_type="train")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    return message, context, MagicMock(fab_id="site/toy", fab_version=version, run_id=1), fab(files)


@pytest.fixture
def reviewed(tmp_path: Path) -> Path:
    (folder := tmp_path / "srv" / "app").mkdir(parents=True)
    for name, text in app(REVIEWED).items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def astray(tmp_path: Path, canary: Path) -> dict[str, str]:
    """An app that Flower unpacks and loads where its version leads to."""
    (tmp_path / "flower" / "apps" / "site.toy.1.0.0").mkdir(parents=True)
    return app(CHANGED, canary, "1.0.0/../../../elsewhere")


def test_unpinned_a_site_runs_whatever_is_sent(run: Run, canary: Path) -> None:
    assert run(app(CHANGED, canary)) == CHANGED
    assert canary.exists()


def test_unpinned_an_app_is_unpacked_wherever_its_version_leads(run: Run, tmp_path: Path, canary: Path) -> None:
    assert run(astray(tmp_path, canary)) == CHANGED
    assert canary.exists()
    assert list(tmp_path.glob("elsewhere.*/toy_app.py"))


@pytest.mark.parametrize("whose", [REVIEWED, CHANGED])
def test_a_pinned_site_runs_what_it_has_reviewed(
    run: Run, reviewed: Path, tmp_path: Path, canary: Path, whose: str
) -> None:
    pin(reviewed)
    assert run(app(whose, canary)) == REVIEWED
    assert not canary.exists()
    assert not (tmp_path / "flower").exists()


def test_a_pinned_site_runs_nothing_of_a_version_that_leads_elsewhere(
    run: Run, reviewed: Path, tmp_path: Path, canary: Path
) -> None:
    pin(reviewed)
    assert "load `ClientApp`" in run(astray(tmp_path, canary))
    assert not canary.exists()
    assert not list(tmp_path.glob("elsewhere*"))


# --- as an executor starts it -----------------------------------------------------------------


@pytest.fixture
def only_path(reviewed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder on PATH, with the program installed as docs/security.md says."""
    install(reviewed.parent)
    monkeypatch.setenv("PATH", str(reviewed.parent))
    return reviewed.parent


def install(folder: Path) -> Path:
    first, rest = (ROOT / "deploy" / "pinned.py").read_text().split("\n", 1)
    assert first == "#!/opt/fedbasin/bin/python3 -I"
    (program := folder / "flwr-clientapp").write_text(f"#!{sys.executable} -I\n{rest}")
    program.chmod(0o755)
    return program


def test_the_program_takes_the_options_of_flowers_own(only_path: Path) -> None:
    said = subprocess.run(["flwr-clientapp", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--runtime-api-address" in said


def test_another_flower_is_refused_in_words(only_path: Path) -> None:
    program = only_path / "flwr-clientapp"
    program.write_text(program.read_text().replace('FLOWER = "1.39.0"', 'FLOWER = "1.38.0"'))
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    assert "checked with Flower 1.38.0, and this is 1.39.0: install 1.38.0" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("kind", sorted(set(TaskType) - {TaskType.CLIENT_APP}))
def test_an_executor_finds_no_program_for_a_task_of_another_kind(only_path: Path, kind: TaskType) -> None:
    spec = ExecutionSpec(kind, "127.0.0.1:1", "token", True, None, False, None, False, 1)
    with pytest.raises(FileNotFoundError, match=kind.value):
        SubprocessExecutor().launch(spec)


# --- in a federation --------------------------------------------------------------------------


class FirstPinned(LocalFederation):
    """A federation whose site 0 has pinned the app in the folder `pinned/app`."""

    def _environment(self, name: str) -> dict[str, str]:
        pinned = {"PATH": str(self.folder / "pinned")} if name == "superexec-0" else {}
        return {**super()._environment(name), **pinned}


def copy_of_the_app(folder: Path) -> Path:
    for name in ("aggregators", "client", "server"):
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        copy(ROOT / name, folder)
    return folder


@pytest.mark.slow
def test_of_two_sites_the_one_that_has_pinned_runs_nothing_of_a_changed_app(tmp_path: Path) -> None:
    copy_of_the_app(tmp_path / "pinned" / "app")
    install(tmp_path / "pinned")
    changed = copy_of_the_app(tmp_path / "changed")
    with (changed / "client" / "app.py").open("a") as file:
        file.write('\nimport os, pathlib\npathlib.Path(os.environ["FLWR_HOME"], "canary").touch()\n')
    nodes = [{"partition-id": number, "num-partitions": 2, "name": f"site-{number}"} for number in (0, 1)]
    config = {"rounds": 1, "min-clients": 2, "quorum": 2, "evaluate": False, "runs-dir": str(tmp_path / "runs")}
    with FirstPinned(tmp_path, nodes, isolated=True) as federation:
        run = federation.run(changed, config)
    record = json.loads((tmp_path / "runs" / str(run["run-id"]) / "round-0001.json").read_text())
    (exchange,) = record["exchanges"]
    assert sorted(client["name"] for client in exchange["clients"].values()) == ["site-0", "site-1"]
    assert [(tmp_path / "flower" / f"superexec-{site}" / "canary").exists() for site in (0, 1)] == [False, True]
    assert not (tmp_path / "flower" / "superexec-0" / "apps").exists()
