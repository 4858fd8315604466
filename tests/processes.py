"""Processes under test: waiting for what they do, and which of them are left behind."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def until(holds: Callable[[], object], timeout: float = 90) -> None:
    """Waits till it does."""
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, f"not within {timeout:g} s"
        time.sleep(0.05)


def left_behind(mark: str) -> list[int]:
    """The ids of the other processes whose environment names `mark`."""
    return [id for id in map(int, _running()) if id != os.getpid() and mark.encode() in _environment(id)]


def _running() -> list[str]:
    return [folder.name for folder in Path("/proc").glob("[0-9]*")]


def _environment(id: int) -> bytes:
    try:
        return Path(f"/proc/{id}/environ").read_bytes()
    except OSError:  # it has ended
        return b""
