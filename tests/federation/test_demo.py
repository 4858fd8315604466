"""`make demo`, interrupted; that it runs to its end is a block of the README."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import left_behind

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_nothing_is_left_running_after_ctrl_c(tmp_path: Path) -> None:
    environment = {**os.environ, "FEDBASIN_MARK": str(tmp_path)}
    with (tmp_path / "out").open("wb") as out:
        demo = subprocess.Popen(
            [sys.executable, "-m", "deploy.demo"], cwd=ROOT, env=environment, stdout=out, stderr=out
        )
    try:
        end = time.monotonic() + 240
        while b"round 1 of 3 merged" not in (tmp_path / "out").read_bytes() and time.monotonic() < end:
            time.sleep(0.2)
        assert len(left_behind(str(tmp_path))) > 5
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 1
    finally:
        demo.kill()
    assert "stopped: every process of the federation has ended" in (tmp_path / "out").read_text()
    time.sleep(1)
    assert left_behind(str(tmp_path)) == []
