"""Peak memory of a fold above its baseline as replies grow in number, beside Flower's; each in a process of its own."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from aggregators.core.registry import parse
from aggregators.core.update import ClientUpdate
from server.wire import decode, forget

from .fold import merge, start
from .messages import ONE, model, ours, stock
from .row import Row

REPLIES = (8, 32, 128)
LIMITS = {"fedavg": "<= 6", "fisher": "<= 12", "flower": ""}
SMALL = {"weight": (256, 256)}
GROWTH = 1.05  # what counts as flat: most replies beside fewest


def rows() -> Iterator[Row]:
    """Peaks in float32 models for each method, whether they are flat, and how many updates were alive at once."""
    for method, limit in LIMITS.items():
        peaks, alive = zip(*(_measured(method, number) for number in REPLIES), strict=True)
        shown = ", ".join(f"{number}: {peak:.1f}x" for number, peak in zip(REPLIES, peaks, strict=True))
        name = {"flower": "Flower's aggregate_arrayrecords"}.get(method, method)
        yield Row(f"peak memory above baseline, {name}", "the float32 model", max(peaks), limit, shown)
        if limit:
            detail = f"updates alive at once, at most: {max(alive)}"
            yield Row(f"{name}, 128 replies", "8 replies", peaks[-1] / peaks[0], f"<= {GROWTH}", detail)
            yield Row(f"{name}, updates alive at once", "one", max(alive), "<= 2")


def _measured(method: str, replies: int) -> tuple[float, int]:
    command = [sys.executable, "-m", "benchmarks.memory", method, str(replies)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(out[0]), int(out[1])


def peak(method: str, replies: int) -> tuple[float, int]:
    """Peak resident memory above baseline, in float32 models, and the most updates alive at once.

    One reply's bytes are held from the start, as Flower's buffers would; each reply is inflated from them anew.
    """
    content = stock(ONE, 1) if method == "flower" else ours(ONE, 1, squares=method == "fisher")
    objects = {key: value.deflate() for key, value in get_all_nested_objects(content).items()}
    key, theta = content.object_id, start(ONE)
    del content
    merge("fisher", start(SMALL), [ours(SMALL, 1, squares=True)])  # loads what code the fold needs
    size = sum(tensor.nbytes for tensor in model(ONE, 0).values())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, alive = resident("VmRSS"), Alive()
    arrive = partial(inflate_object_from_contents, key, objects, keep_object_contents=True)
    arrivals: Iterator[Any] = (arrive() for _ in range(replies))
    if method == "flower":
        aggregate_arrayrecords(list(arrivals), "num-examples")
    else:
        parse(method).aggregate(theta, alive.watched(arrivals))
    return (resident("VmHWM") - before) / size, alive.most


class Alive:
    """Counts how many updates exist at once."""

    def __init__(self) -> None:
        self.now: set[int] = set()
        self.most = 0

    def watched(self, messages: Iterator[RecordDict]) -> Iterator[ClientUpdate]:
        """The decoded updates; each is counted from its birth to its end."""
        for number, message in enumerate(messages):
            update = decode(message, number)
            forget(message)
            del message
            self.now.add(number)
            weakref.finalize(update, self.now.discard, number)
            self.most = max(self.most, len(self.now))
            yield update
            del update


def resident(field: str) -> int:
    """Bytes of this process in memory, `VmRSS`, or at most so far, `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    print(*peak(sys.argv[1], int(sys.argv[2])))
