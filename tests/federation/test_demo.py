"""`make demo`, interrupted, and what it shows; that it runs to its end is a block of the README."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import left_behind, until
from rich.table import Table

from deploy.demo import DEMOS, curves, load, plot, table
from server import loopback

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_nothing_is_left_running_after_ctrl_c(tmp_path: Path) -> None:
    environment = {**os.environ, "FEDBASIN_MARK": str(tmp_path)}
    with (tmp_path / "out").open("wb") as out:
        demo = subprocess.Popen(
            [sys.executable, "-m", "deploy.demo"], cwd=ROOT, env=environment, stdout=out, stderr=out
        )
    try:
        until(lambda: b"round 1 of 3 merged" in (tmp_path / "out").read_bytes(), timeout=240)
        assert len(left_behind(str(tmp_path))) > 5
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 1
    finally:
        demo.kill()
    assert "stopped: every process of the federation has ended" in (tmp_path / "out").read_text()
    time.sleep(1)
    assert left_behind(str(tmp_path)) == []


@pytest.mark.slow
def test_three_clients_known_by_their_keys_end_in_a_table() -> None:
    demo = subprocess.run(
        [sys.executable, "-m", "deploy.demo", "tls"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert "client traffic over gRPC and TLS" in demo.stdout
    assert "round 2 of 2 merged, 3 replies" in demo.stdout
    (row,) = [line for line in demo.stdout.splitlines() if line.startswith("│ Fisher")]
    assert float(row.split("│")[3]) > 0.8


def ran(method: str, folder: Path, *widths: int) -> dict[str, Any]:
    """The records of two rounds of clients of these widths."""
    nodes = [{"partition-id": k, "num-partitions": len(widths), "task.hidden": width} for k, width in enumerate(widths)]
    task = {"kind": "digits", "partition": "iid", "limit": 120}
    loopback.run(task, method, nodes=nodes, folder=folder, start="own", rounds=2, training={"epochs": 1})
    return load(folder)


def columns(shown: Table) -> dict[str, str]:
    """The first row's cells by what heads them."""
    return {str(column.header): next(iter(column.cells)) for column in shown.columns}  # type: ignore[misc]


def test_of_clients_with_their_own_widths_the_servers_model_is_shown_apart_from_what_each_received(
    tmp_path: Path,
) -> None:
    demo, result = DEMOS["fedma"], ran("fedma", tmp_path, 6, 8)
    whole = [record["test"]["accuracy"] for record in result["records"]]
    received = result["records"][1]["received"]["accuracy"]
    solid, dashed = curves(demo, result).values()
    assert (solid[1:], dashed[1]) == (whole, received)
    assert all(map(math.isnan, (solid[0], dashed[0], dashed[2])))
    shown = columns(table(demo, {"FedMA": result}))
    assert [shown[name] for name in ("server, round 1", "in own widths", "server")] == [
        f"{value:.3f}" for value in (whole[0], received, whole[1])
    ]


def test_of_clients_of_one_width_mean_and_worst_are_shown_over_the_rounds(tmp_path: Path) -> None:
    demo, result = DEMOS["posterior"], ran("fedavg", tmp_path, 64, 64)
    mean, worst = curves(demo, result).values()
    measured = [result["records"][1]["received"], result["final"]]
    assert mean[1:] == [one["accuracy"] for one in measured]
    assert worst[1:] == [one["worst"] for one in measured]
    shown = columns(table(demo, {"FedAvg": result}))
    assert shown["after round 1"] == f"{mean[1]:.3f}"
    assert "in own widths" not in shown


def test_the_plot_says_what_it_shows(tmp_path: Path) -> None:
    from matplotlib import pyplot

    demo = DEMOS["fedma"]
    assert plot(demo, {"FedMA": ran("fedma", tmp_path, 6, 8)}, tmp_path / "demo.png").stat().st_size > 1000
    (axes,) = pyplot.gcf().axes
    assert axes.get_title().endswith("(solid: server's model, small dots: mean over clients in their widths)")
    pyplot.close()
