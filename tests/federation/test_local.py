"""Processes of a local federation: killed, started again, and ended."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from stat import S_IMODE

import pytest
import torch
from processes import left_behind
from safetensors.torch import load_file

from deploy.local import MARK, LocalFederation, kill_marked, make_certs
from server import loopback

ROOT = Path(__file__).resolve().parents[2]
NODES = [{"partition-id": number, "num-partitions": 2, "name": f"site-{number}"} for number in (0, 1)]

PARENT = """import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)"""


def started(mark: str) -> None:
    """Leaves a process in a session of its own, whose parent has ended."""
    subprocess.run([sys.executable, "-c", PARENT], env={**os.environ, MARK: mark}, check=True)


def test_an_orphan_in_a_session_of_its_own_ends_with_the_federation() -> None:
    mark = uuid.uuid4().hex
    started(f"{mark} supernode-1;")
    assert len(left_behind(mark)) == 1
    kill_marked(mark)
    assert left_behind(mark) == []


def test_killing_one_node_leaves_the_other_alone() -> None:
    mark = uuid.uuid4().hex
    started(f"{mark} supernode-1;")
    started(f"{mark} supernode-10;")
    kill_marked(f"{mark} supernode-1;")
    (left,) = left_behind(mark)
    kill_marked(mark)
    assert left not in left_behind(mark)


def test_certificates_that_are_missing_are_named_with_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ca.crt is missing: deploy/certs.sh -d .*certs -n 2 makes it"):
        LocalFederation(tmp_path, NODES, tls=tmp_path / "certs").__enter__()
    assert left_behind(str(tmp_path)) == []


@pytest.mark.chaos
def test_a_superlink_killed_in_mid_round_goes_on_with_the_run_to_the_same_model(tmp_path: Path) -> None:
    settings = {"rounds": 1, "seed": 3, "device": "cpu", "evaluate": False}
    config = {**settings, "min-clients": 2, "quorum": 2, "deadline": 240.0, "training.epochs": 200}
    with LocalFederation(tmp_path, NODES, tls=make_certs(tmp_path / "certs", 2), isolated=True) as federation:
        run_id = federation.submit(ROOT, {**config, "aggregator": "fisher", "runs-dir": str(tmp_path / "runs")})
        for number in (0, 1):
            federation.wait_for_log(f"supernode-{number}", "Received successfully")
        federation.kill("superlink")
        federation.start("superlink")
        assert not [*(tmp_path / "runs").rglob("round-*")]
        assert federation.wait(run_id, timeout=300)["status"] == "finished:completed"
        assert {S_IMODE(path.stat().st_mode) for path in (tmp_path / "secrets").iterdir()} == {0o600}
    there = load_file(tmp_path / "runs" / run_id / "round-0001.safetensors")
    here = loopback.run("digits", "fisher", nodes=NODES, training={"epochs": 200}, **settings).model
    for name, value in here.params.items():
        torch.testing.assert_close(there[json.dumps(["params", name])], value, rtol=2e-6, atol=1e-7)
