"""Processes of a local federation, without Flower."""

import os
import subprocess
import sys
import uuid

from processes import left_behind

from deploy.local import MARK, kill_marked

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
